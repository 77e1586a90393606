"""Stacks with known truth that models are scored on.

Tables carry `split` (0 train, 1 test), `true_junk`, and what is known of `true_conformation`, `true_label`,
`true_angle_deg` with `true_fold` (rotational symmetry; 0 where there is no angle to find), `true_shift_y_px`
and `true_shift_x_px`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from particle_explorer import simulate
from particle_explorer.configs import AccuracyConfig, PreprocessConfig, SimulateConfig
from particle_explorer.files import UserError
from particle_explorer.io.reading import read, read_array
from particle_explorer.particles import Particles
from particle_explorer.transforms import place

Float = NDArray[np.float32]

INTEGRIN_LIMITS = {"0.5": 0.985, "0.1": 0.911}
"""|r| of the posterior mean under the true templates: 37 hinge angles × 3° × half pixels, 1 500 test images,
± 0.001 and ± 0.005. The notes that come with the stack say 0.974 and 0.905, from 5° and whole pixels."""
HINGE = SimulateConfig(n=10_000, box_px=64, pixel_size_A=4.0, snr=0.1, seed=1)
MNIST_BOX_PX = 50
MNIST_DIGIT_PX = 28
MNIST_SHIFT_SD_PX = 5.0
MULTI_BOX_PX = 150
MULTI_N_DIGITS = 4
CLEAN = PreprocessConfig(contrast="keep", background="none", ctf="none")
"""Images without noise are taken as they are."""
CLASSES = {"varies": "classes", "angle_step_deg": 15.0}
"""Settings of the class map for stacks of different objects."""


@dataclass(frozen=True)
class Stack:
    """Particles with their truth, and what is known beyond the table."""

    name: str
    particles: Particles
    limit_abs_r: float = math.nan
    """|r| of the posterior mean under the true noise-free templates, on a grid of poses; NaN if unknown."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    upright: Float | None = None
    """`(m, n, n)` the images of all test particles, in order, unturned and centred."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that this stack calls for, given to the models that have a setting of that name."""


def make(name: str, config: AccuracyConfig, folder: Path) -> Stack:
    """One of the stacks named in `AccuracyConfig.stacks`; `folder` is for files that it needs."""
    n = config.n_particles or (SMOKE_N if config.protocol == "smoke" else 0)
    if name.startswith("hinge"):
        return hinge(folder / name, name.removeprefix("hinge-"), n)
    if not n and config.protocol == "quick":
        n = QUICK_N.get(name, 0)
    if name == "xyrcs":
        return xyrcs(n)
    data = data_folder(config.data)
    if name.startswith("integrin"):
        return integrin(data, name.removeprefix("integrin-"), n)
    makers: dict[str, Callable[[], Stack]] = {
        "mnist-n": lambda: mnist(data, "mnist-n", n),
        "mnist-u": lambda: mnist(data, "mnist-u", n),
        "mnist-multi": lambda: mnist_multi(data, n),
        "mnist-posed": lambda: mnist_posed(data, n),
        "mnist-posed-90": lambda: mnist_posed_90(data, n),
        "dsprites": lambda: dsprites(data, n),
    }
    return makers[name]()


SMOKE_N = 1500
QUICK_N = {
    "mnist-n": 12_500, "mnist-u": 12_500, "mnist-multi": 12_500, "mnist-posed": 12_500,
    "mnist-posed-90": 12_500, "xyrcs": 6_000, "dsprites": 6_000,
}  # fmt: skip
"""Particles that the quick protocol takes of the stacks without noise, a fifth of them to score."""


def data_folder(given: str) -> Path:
    """The folder of large data; `UserError` where it is not."""
    text = given or os.environ.get("PARTICLE_EXPLORER_DATA", "")
    if not text:
        raise UserError(
            "the integrin, MNIST and dSprites stacks are not part of the package: give their folder by "
            "--data or PARTICLE_EXPLORER_DATA, or choose --stacks hinge-0.1 or xyrcs"
        )
    return Path(text)


def _file(data: Path, *names: str) -> Path:
    path = data.joinpath(*names)
    if not path.is_file():
        raise UserError(f"{path} is not there; give the folder that holds {names[0]} by --data")
    return path


# ---------------------------------------------------------------------- one motion


def integrin(data: Path, snr: str, n: int = 0) -> Stack:
    """The simulated integrin stack at `snr` "0.5" or "0.1"; `n` takes fewer, one in five for testing."""
    images_path = _file(data, "5hdb_sim", f"images_snr{snr}.npz")
    truth = np.load(_file(data, "5hdb_sim", "truth.npz"))
    split = truth["split"]
    rows = np.arange(len(split))
    if n:
        train, test = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
        rows = np.concatenate([train[: n - n // 5], test[: n // 5]])
    # grey levels of 0.25 noise deviations about 128
    images = (np.load(images_path)["images"][rows].astype(np.float32) - 128) * np.float32(0.25)
    particles = read_array(images, f"integrin-{snr}", float(truth["pixel_size_A"]))
    columns = {
        "split": split[rows].astype(np.int64),
        "true_conformation": truth["hinge_deg"][rows].astype(np.float64),
        **_pose_columns(np.rad2deg(truth["angle_rad"][rows]), truth["shift_px"][rows][:, ::-1]),
        "true_junk": np.zeros(len(rows), dtype=np.int64),
    }
    particles = dataclasses.replace(particles, table=particles.table.assign(**columns))
    return Stack(f"integrin-{snr}", particles, INTEGRIN_LIMITS[snr])


def hinge(folder: Path, snr: str = "0.1", n: int = 0) -> Stack:
    """A stack of our own simulator with CTF, coloured noise and junk; every fifth particle is for testing."""
    config = HINGE.model_copy(update={"n": n or HINGE.n, "snr": float(snr)})
    simulation = simulate.write(folder, config)
    particles = read(folder / "particles.star")
    split = _every_fifth(config.n)
    extra = {"split": split, "true_conformation": particles.table["true_hinge_deg"].to_numpy()}
    particles = dataclasses.replace(particles, table=particles.table.assign(**extra))
    best = simulate.limit(simulation, np.flatnonzero(split)[:400])
    return Stack(f"hinge-{snr}", particles, float(best["limit_abs_r"]))


# ---------------------------------------------------------------------- digits


def mnist(data: Path, name: str, n: int = 0) -> Stack:
    """MNIST(N) or MNIST(U) of Nasiri & Bepler (2022): 50 px, shifts N(0, 5²) px, angles N(0, 45²)° or any.

    `n` takes the first 4/5 `n` of the training digits and the first `n` / 5 of the test digits.
    """
    digits, label, split = _digits(data, n)
    random = np.random.default_rng(50 if name == "mnist-n" else 51)
    angle = random.normal(0, 45, len(digits)) if name == "mnist-n" else random.uniform(-180, 180, len(digits))
    shift = random.normal(0, MNIST_SHIFT_SD_PX, (len(digits), 2))
    images = placed(digits, angle, shift).clip(0, 1)
    return _labelled(name, images, label, split, angle, shift, digits[split == 1])


def mnist_multi(data: Path, n: int = 0) -> Stack:
    """MNIST(multi): fitted to MNIST(U), scored on windows about the digits of images of 150 px with four.

    A window of 50 px lies about every digit as far off as those of MNIST(U) do, and shows whatever of its
    neighbours falls into it; so the same question can be put to every model.
    """
    digits, label, split = _digits(data, n)
    random = np.random.default_rng(52)
    angle, shift = (
        random.uniform(-180, 180, len(digits)),
        random.normal(0, MNIST_SHIFT_SD_PX, (len(digits), 2)),
    )
    images = placed(digits, angle, shift).clip(0, 1)
    half, n_test = MNIST_BOX_PX // 2, int((split == 1).sum())
    # centres at least 28 px apart, windows inside the large image
    for start in range(0, n_test, MULTI_N_DIGITS):
        rows = np.flatnonzero(split == 1)[start : start + MULTI_N_DIGITS]
        centre = _apart(random, len(rows), half + 10, MULTI_BOX_PX - half - 10, 28.0)
        scene = np.zeros((MULTI_BOX_PX, MULTI_BOX_PX), np.float32)
        turned = placed(digits[rows], angle[rows], np.zeros((len(rows), 2)))
        for image, (y, x) in zip(turned, centre, strict=True):
            scene[y - half : y + half, x - half : x + half] += image
        # whole pixels, so that the window is cut, not interpolated
        shift[rows] = shift[rows].round().clip(-10, 10)
        for row, (y, x), (move_y, move_x) in zip(rows, centre, shift[rows].astype(int), strict=True):
            top, left = y - move_y - half, x - move_x - half
            images[row] = scene[top : top + MNIST_BOX_PX, left : left + MNIST_BOX_PX].clip(0, 1)
    return _labelled("mnist-multi", images, label, split, angle, shift, digits[split == 1])


def mnist_posed(data: Path, n: int = 0) -> Stack:
    """Digits of 28 px, turned to any angle and not moved, with these angles in the table: what an autoencoder
    learns from that is taught poses."""
    digits, label, split = _digits(data, n, MNIST_DIGIT_PX)
    angle = np.random.default_rng(53).uniform(-180, 180, len(digits))
    shift = np.zeros((len(digits), 2))
    images = placed(digits, angle, shift).clip(0, 1)
    return _posed("mnist-posed", images, label, split, angle, digits[split == 1], 180.0)


def mnist_posed_90(data: Path, n: int = 0) -> Stack:
    """The published setting of the rotation-invariant autoencoder: upright digits of 28 px are fitted, turned
    anew within ± 90° whenever they are seen; those to score are turned once, uniformly in that range."""
    digits, label, split = _digits(data, n, MNIST_DIGIT_PX)
    # a whole turn: angles that are all 0 are taken for those of a file that was never aligned
    angle = np.where(split == 1, np.random.default_rng(54).uniform(-90, 90, len(digits)), 360.0)
    images = digits.copy()
    test = split == 1
    images[test] = placed(digits[test], angle[test], np.zeros((int(test.sum()), 2))).clip(0, 1)
    return _posed("mnist-posed-90", images, label, split, angle, digits[test], 90.0)


def _posed(
    name: str,
    images: Float,
    label: NDArray[np.int64],
    split: NDArray[np.int64],
    angle_deg: NDArray[Any],
    upright: Float,
    turn_range_deg: float,
) -> Stack:
    shift = np.zeros((len(images), 2))
    stack = _labelled(name, images, label, split, angle_deg, shift, upright, diameter_px=26.0)
    table = stack.particles.table.assign(angle_deg=angle_deg, shift_y_px=0.0, shift_x_px=0.0)
    particles = dataclasses.replace(stack.particles, table=table)
    settings = {**CLASSES, "poses": "file", "pixels": "sigmoid", "turn_range_deg": turn_range_deg}
    return dataclasses.replace(stack, particles=particles, settings=settings)


def _apart(random: np.random.Generator, n: int, low: int, high: int, least: float) -> NDArray[np.int64]:
    """`(n, 2)` whole-pixel places no closer than `least`."""
    while True:
        at = random.integers(low, high + 1, (n, 2))
        away = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) + least * np.eye(n)
        if away.min() >= least:
            return at


def _digits(
    data: Path, n: int, box_px: int = MNIST_BOX_PX
) -> tuple[Float, NDArray[np.int64], NDArray[np.int64]]:
    """`(m, box_px, box_px)` upright digits in [0, 1], their labels, and the split."""
    file = np.load(_file(data, "mnist", "mnist.npz"))
    n_train, n_test = (n - n // 5, n // 5) if n else (len(file["x_train"]), len(file["x_test"]))
    small = np.concatenate([file["x_train"][:n_train], file["x_test"][:n_test]])
    label = np.concatenate([file["y_train"][:n_train], file["y_test"][:n_test]]).astype(np.int64)
    split = (np.arange(len(small)) >= min(n_train, len(file["x_train"]))).astype(np.int64)
    border = (box_px - small.shape[-1]) // 2
    padded = np.pad(small, ((0, 0), (border, border), (border, border)))
    return np.asarray(padded / np.float32(255), np.float32), label, split


# ---------------------------------------------------------------------- plain shapes

XYRCS_BOX_PX = 84
XYRCS_FOLDS = (0, 3, 2)
"""Disc, equilateral triangle, rectangle."""
_SUPERSAMPLED = 4


def xyrcs(n: int = 0) -> Stack:
    """Three shapes of equal area at 8 × 8 places, 24 angles and 5 grey values: 23 040 images of 84 px.

    The published set's grids are not public; these follow its ancestor XYC (radius 12 for 15). `n` takes a
    random subset. The fifth to score is drawn at random too.
    """
    place_at = np.linspace(20, 64, 8)
    grid = np.meshgrid(
        range(3), place_at, place_at, np.arange(24) * 15.0, np.linspace(0.2, 1, 5), indexing="ij"
    )
    label, y, x, angle, grey = (axis.ravel() for axis in grid)
    random = np.random.default_rng(84)
    chosen = random.permutation(len(label))[: n or None]
    label, y, x, angle, grey = (values[chosen] for values in (label, y, x, angle, grey))
    label = label.astype(np.int64)
    shift = np.column_stack([y, x]) - XYRCS_BOX_PX // 2
    images = np.concatenate(
        [
            _shapes(label[i : i + 512], angle[i : i + 512], y[i : i + 512], x[i : i + 512])
            for i in range(0, len(label), 512)
        ]
    )
    images *= grey[:, None, None].astype(np.float32)
    fold = np.asarray(XYRCS_FOLDS)[label]
    stack = _labelled("xyrcs", images, label, _every_fifth(len(label)), angle, shift, None, fold, 40.0)
    return dataclasses.replace(stack, settings={**CLASSES, "shift_range_px": 20, "shift_sd_px": 10.0})


def _shapes(label: NDArray[Any], angle_deg: Float, y: Float, x: Float) -> Float:
    """`(k, 84, 84)` shapes placed by our convention, edges supersampled."""
    n, s = XYRCS_BOX_PX, _SUPERSAMPLED
    at = (np.arange(n * s, dtype=np.float32) + 0.5) / s - 0.5
    turn = np.deg2rad(angle_deg)[:, None, None].astype(np.float32)
    d_y, d_x = at[:, None] - y[:, None, None].astype(np.float32), at - x[:, None, None].astype(np.float32)
    u = np.cos(turn) * d_x + np.sin(turn) * d_y
    v = np.cos(turn) * d_y - np.sin(turn) * d_x
    area = math.pi * 12**2
    inner = math.sqrt(area / (3 * math.sqrt(3)))  # of the triangle's inscribed circle
    short = math.sqrt(area / 2) / 2  # half of a side
    root = np.float32(math.sqrt(3) / 2)
    disc = u * u + v * v < 144
    triangle = (v < inner) & (root * u - v / 2 < inner) & (-root * u - v / 2 < inner)
    rectangle = (np.abs(u) < 2 * short) & (np.abs(v) < short)
    kind = label[:, None, None]
    fine = np.where(kind == 0, disc, np.where(kind == 1, triangle, rectangle))
    return fine.reshape(len(label), n, s, n, s).mean((2, 4), dtype=np.float32)


def dsprites(data: Path, n: int = 0) -> Stack:
    """The dSprites (Matthey et al. 2017), regenerated: squares, ellipses and hearts of six sizes, 64 px.

    `n` takes a random subset; labels are the shapes.
    """
    file = np.load(_file(data, "dsprites_regen", "dsprites_regen_co1sh3sc6or40x8y8_64x64.npz"))
    values, classes = file["latents_values"], file["latents_classes"]
    random = np.random.default_rng(64)
    chosen = random.permutation(len(values))[: n or None]
    images = file["imgs"][chosen].astype(np.float32)
    values, label = values[chosen], classes[chosen, 1].astype(np.int64)
    # pixel i covers i … i + 1; the orientation turns against ours
    shift = 16 + 32 * values[:, [5, 4]] - 0.5 - 32
    angle = -np.rad2deg(values[:, 3])
    fold = np.array([4, 2, 1])[label]
    stack = _labelled("dsprites", images, label, _every_fifth(len(label)), angle, shift, None, fold, 36.0)
    return dataclasses.replace(stack, settings={**CLASSES, "shift_range_px": 18, "shift_sd_px": 9.0})


# ---------------------------------------------------------------------- helpers


def placed(images: Float, angle_deg: NDArray[Any], shift_yx_px: NDArray[Any]) -> Float:
    """`(k, n, n)` images turned and moved."""
    parts = []
    for i in range(0, len(images), 2048):
        angle = torch.deg2rad(torch.from_numpy(np.asarray(angle_deg[i : i + 2048], np.float32)))
        shift = torch.from_numpy(np.asarray(shift_yx_px[i : i + 2048], np.float32))
        parts.append(place(torch.from_numpy(images[i : i + 2048]), angle, shift, mode="bicubic").numpy())
    return np.concatenate(parts)


def _every_fifth(n: int) -> NDArray[np.int64]:
    return (np.arange(n) % 5 == 4).astype(np.int64)


def _pose_columns(angle_deg: NDArray[Any], shift_yx_px: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    return {
        "true_angle_deg": np.asarray(angle_deg, np.float64),
        "true_shift_y_px": np.asarray(shift_yx_px[:, 0], np.float64),
        "true_shift_x_px": np.asarray(shift_yx_px[:, 1], np.float64),
    }


def _labelled(
    name: str,
    images: Float,
    label: NDArray[np.int64],
    split: NDArray[np.int64],
    angle_deg: NDArray[Any],
    shift_yx_px: NDArray[Any],
    upright: Float | None,
    fold: NDArray[Any] | None = None,
    diameter_px: float = 28.0,
) -> Stack:
    particles = read_array(np.asarray(images, np.float32), name)
    columns = {
        "split": split,
        "true_label": label,
        "true_fold": np.ones(len(label), np.int64) if fold is None else fold,
        **_pose_columns(angle_deg, shift_yx_px),
        "true_junk": np.zeros(len(label), np.int64),
    }
    particles = dataclasses.replace(particles, table=particles.table.assign(**columns))
    return Stack(
        name,
        particles,
        preprocess=CLEAN.model_copy(update={"diameter_A": diameter_px}),
        upright=upright,
        settings={
            **CLASSES,
            "shift_range_px": round(3 * MNIST_SHIFT_SD_PX),
            "shift_sd_px": MNIST_SHIFT_SD_PX,
        },
    )

"""The classic bug of the field, held by one phantom: signs, units and centres of poses, from file to file.

An asymmetric phantom is drawn at known psi and origins in RELION's convention,
x_ref = R(psi) (x_particle + o), by a few lines that use nothing of the package. It is imported, "encoded" by
a model that answers the truth, averaged and exported; the exported star, averaged again by a few independent
lines, must give the phantom back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import starfile
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from particle_explorer.averaging import average_classes
from particle_explorer.configs import AverageConfig, Config, DataSpec, PreprocessConfig
from particle_explorer.encoding import encode
from particle_explorer.exporting import export_classes
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.models.base import Batch, Encoding, ParticleModel
from particle_explorer.session import Session
from particle_explorer.spectra import align

K = 12
APIX = 2.5
RNG = np.random.default_rng(11)
PSI_DEG = RNG.uniform(-180, 180, K)
ORIGIN_XY_PX = RNG.uniform(-3, 3, (K, 2))


def turned(psi_deg: float) -> NDArray[np.float64]:
    """RELION's R(psi) on (x, y)."""
    psi = np.deg2rad(psi_deg)
    return np.array([[np.cos(psi), -np.sin(psi)], [np.sin(psi), np.cos(psi)]])


def draw(n: int, psi_deg: float = 0.0, origin_xy_px: Any = (0.0, 0.0)) -> NDArray[np.float32]:
    """The phantom as RELION would see it: a point of the reference is found at R(-psi) x_ref - o."""
    rng = np.random.default_rng(4)
    points, weights = rng.uniform(-0.24, 0.24, (20, 2)) * n, rng.uniform(0.5, 1.5, 20)
    at = points @ turned(-psi_deg).T - np.asarray(origin_xy_px)
    y, x = np.indices((n, n)) - n // 2
    image = np.zeros((n, n))
    for (px, py), weight in zip(at, weights, strict=True):
        image += weight * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * 1.6**2))
    return image.astype(np.float32)


def average_by_star(star: Path, images: NDArray[Any], dialect: str, sign: float = 1.0) -> NDArray[np.float64]:
    """Average by the poses in a star file: x_particle = R(-psi) x_ref - o, as RELION does it."""
    table = starfile.read(star, always_dict=True)
    rows = next(block for block in table.values() if "rlnImageName" in block)
    if dialect == "3.1":
        origins = rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy() / APIX
    else:
        origins = rows[["rlnOriginX", "rlnOriginY"]].to_numpy()
    which = [int(name.split("@")[0]) - 1 for name in rows["rlnImageName"]]
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    total = np.zeros((n, n))
    for i, psi, origin in zip(which, rows["rlnAnglePsi"], origins, strict=True):
        xy = turned(-sign * psi) @ np.stack([x.ravel(), y.ravel()]) - sign * origin[:, None]
        total += ndimage.map_coordinates(images[i], (xy[::-1] + n // 2).reshape(2, n, n), order=3)
    return total / len(which)


def write_input(folder: Path, n: int, dialect: str) -> tuple[Path, NDArray[np.float32]]:
    """A stack of the phantom at known poses, and a star file that says nothing true of them."""
    images = np.stack([draw(n, psi, origin) for psi, origin in zip(PSI_DEG, ORIGIN_XY_PX, strict=True)])
    with mrcfile.new(folder / "phantom.mrcs", images) as stack:
        stack.set_image_stack()
        stack.voxel_size = APIX
    names = [f"{i + 1:06d}@phantom.mrcs" for i in range(K)]
    if dialect == "3.1":
        lines = [
            "# version 30001", "data_optics", "loop_", "_rlnOpticsGroup #1", "_rlnImagePixelSize #2",
            "_rlnImageSize #3", "_rlnVoltage #4", "_rlnSphericalAberration #5", f"1 {APIX} {n} 300.0 2.7", "",
            "# version 30001", "data_particles", "loop_", "_rlnImageName #1", "_rlnOpticsGroup #2",
            "_rlnAnglePsi #3", "_rlnOriginXAngst #4", "_rlnOriginYAngst #5",
        ]  # fmt: skip
        lines += [f"{name} 1 77.0 9.0 -9.0" for name in names]
    else:
        lines = [
            "data_", "loop_", "_rlnImageName #1", "_rlnMagnification #2", "_rlnDetectorPixelSize #3",
            "_rlnAnglePsi #4", "_rlnOriginX #5", "_rlnOriginY #6",
        ]  # fmt: skip
        lines += [f"{name} 10000.0 {APIX} 77.0 3.0 -3.0" for name in names]
    star = folder / "phantom.star"
    star.write_text("\n".join([*lines, ""]))
    return star, images


class Oracle(ParticleModel):
    """Answers the true pose, in radians and pixels of the cached images, as a model must."""

    latent_dim = 1

    def __init__(self, data: DataSpec, n: int) -> None:
        super().__init__(Config(), data)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        # placement: the phantom appears at R(-psi) x_ref - o
        self.angle = torch.tensor(np.deg2rad(-PSI_DEG), dtype=torch.float32)
        self.shift = torch.tensor(-ORIGIN_XY_PX[:, ::-1].copy() * data.box_px / n, dtype=torch.float32)

    def encode(self, batch: Batch) -> Encoding:
        rows = batch.row
        return Encoding(torch.zeros(len(rows), 1), None, self.angle[rows], self.shift[rows], {})

    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return torch.zeros(len(z), self.data.n_channels, self.data.box_px, self.data.box_px)

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        raise NotImplementedError


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
@pytest.mark.parametrize(("n", "box"), [(48, 48), (48, 32), (49, 49), (49, 32), (49, 33), (48, 33)])
def test_poses_survive_from_file_to_file(tmp_path: Path, n: int, box: int, dialect: str) -> None:
    star, images = write_input(tmp_path, n, dialect)
    session = Session.create(tmp_path / "session", read(star), PreprocessConfig(box_px=box))
    assert session.images.shape[-1] == box
    *_, (_, latents) = encode(Oracle(session.data_spec(), n), session)
    assert latents is not None and latents.angle_deg is not None and latents.shift_yx_px is not None
    phantom = draw(n)

    # the cached images show the phantom about the same centre
    cached = align(session.images[:], latents.angle_deg, latents.shift_yx_px * box / n)[:, 0].mean(0)
    expected = align(phantom[None, None], [0.0], [[0.0, 0.0]], box_px=box)[0, 0]
    assert correlation(cached, expected) > 0.999

    (average,) = average_classes(session, np.ones(K), latents.angle_deg, latents.shift_yx_px)
    assert correlation(average.image, phantom) > 0.999
    assert average.pixel_size_A == pytest.approx(APIX)

    exported = tmp_path / "exported.star"
    export_particles(
        exported,
        table=session.table,
        source=session.source_path,
        kind=session.info.source_kind,
        class_id=np.ones(K, dtype=int),
        angle_deg=latents.angle_deg,
        shift_yx_px=latents.shift_yx_px,
    )
    again = average_by_star(exported, images, dialect)
    assert correlation(again, phantom) > 0.99
    assert correlation(again, average.image) > 0.99
    # the test can tell: every other sign is far off
    assert correlation(average_by_star(exported, images, dialect, sign=-1.0), phantom) < 0.8
    assert correlation(average_by_star(star, images, dialect), phantom) < 0.8


@pytest.mark.parametrize("dialect", ["3.0", "3.1"])
def test_what_was_exported_reads_back_as_the_same_pose(tmp_path: Path, dialect: str) -> None:
    star, _ = write_input(tmp_path, 48, dialect)
    particles = read(star)
    export_particles(
        tmp_path / "posed.star",
        table=particles.table,
        source=star,
        kind="star",
        angle_deg=-PSI_DEG,
        shift_yx_px=-ORIGIN_XY_PX[:, ::-1],
    )
    table = read(tmp_path / "posed.star").table
    turn = np.abs((table["angle_deg"].to_numpy() + PSI_DEG + 180) % 360 - 180)
    assert turn.max() < 1e-3
    found = table[["shift_x_px", "shift_y_px"]].to_numpy()
    np.testing.assert_allclose(found, -ORIGIN_XY_PX, atol=1e-3)


def draw_at(n: int, step: float, psi_deg: float = 0.0, origin_xy: Any = (0.0, 0.0)) -> NDArray[np.float32]:
    """One phantom whatever the sampling: a box of n px, each `step` fine pixels wide; origins in those."""
    rng = np.random.default_rng(4)
    points, weights = rng.uniform(-11, 11, (20, 2)), rng.uniform(0.5, 1.5, 20)
    at = (points @ turned(-psi_deg).T - np.asarray(origin_xy)) / step
    y, x = np.indices((n, n)) - n // 2
    image = np.zeros((n, n))
    for (px, py), weight in zip(at, weights, strict=True):
        image += weight * np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (2.4 / step) ** 2))
    return image.astype(np.float32)


@pytest.mark.parametrize(("kind", "unit"), [("star", 1.0), ("cs", 1.0), ("cs", 4.0)])
@pytest.mark.parametrize("n", [48, 49])
def test_two_pixel_sizes_in_one_file(tmp_path: Path, n: int, kind: str, unit: float) -> None:
    """Two optics groups, the second sampled twice as coarsely; only one of four sign combinations is right.

    `unit` is `alignments2D/psize_A` over the finer pixel size.
    """
    half = K // 2
    steps, boxes = (1.0, 2.0), (n, 25 if n % 2 else 24)
    stacks = []
    for group, (step, box) in enumerate(zip(steps, boxes, strict=True)):
        rows = range(group * half, (group + 1) * half)
        stacks.append(np.stack([draw_at(box, step, PSI_DEG[i], ORIGIN_XY_PX[i]) for i in rows]))
        with mrcfile.new(tmp_path / f"g{group}.mrcs", stacks[-1]) as stack:
            stack.set_image_stack()
            stack.voxel_size = APIX * step
    names, index = [f"g{i // half}.mrcs" for i in range(K)], np.arange(K) % half
    step_of = np.repeat(steps, half)
    source = tmp_path / f"two.{kind}"
    if kind == "cs":
        fields = [("uid", "<u8"), ("blob/path", "S7"), ("blob/idx", "<u4"), ("blob/psize_A", "<f4"),
                  ("alignments2D/shift", "<f4", (2,)), ("alignments2D/pose", "<f4"),
                  ("alignments2D/psize_A", "<f4"), ("alignments2D/class", "<u4")]  # fmt: skip
        records = np.zeros(K, fields)
        records["uid"], records["blob/path"], records["blob/idx"] = np.arange(K) + 7, names, index
        records["blob/psize_A"], records["alignments2D/psize_A"] = APIX * step_of, APIX * unit
        with source.open("wb") as file:
            np.save(file, records)
    else:
        text = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n"
        text += "".join(f"{g + 1} {APIX * steps[g]} {boxes[g]}\n" for g in (0, 1))
        text += "\ndata_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n"
        text += "".join(f"{index[i] + 1}@{names[i]} {i // half + 1}\n" for i in range(K))
        source.write_text(text)
    out = tmp_path / f"out.{kind}"
    export_particles(
        out,
        table=read(source).table,
        source=source,
        kind=kind,
        angle_deg=-PSI_DEG,
        shift_yx_px=-ORIGIN_XY_PX[:, ::-1] / step_of[:, None],
    )
    if kind == "cs":
        written = np.load(out)
        psi = np.rad2deg(written["alignments2D/pose"].astype(float))
        origin_A = written["alignments2D/shift"] * written["alignments2D/psize_A"][:, None].astype(float)
    else:
        rows = starfile.read(out)["particles"]
        psi, origin_A = (
            rows["rlnAnglePsi"].to_numpy(),
            rows[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy(),
        )
    for group, (step, box) in enumerate(zip(steps, boxes, strict=True)):
        y, x = np.indices((box, box)) - box // 2
        grid = np.stack([x.ravel(), y.ravel()])
        scores = {}
        for turn, move in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            total = np.zeros((box, box))
            for i in range(half):
                at = group * half + i
                origin = move * origin_A[at] / (APIX * step)
                xy = turned(-turn * psi[at]) @ grid - origin[:, None]
                total += ndimage.map_coordinates(
                    stacks[group][i], (xy[::-1] + box // 2).reshape(2, box, box), order=3
                )
            scores[turn, move] = correlation(total, draw_at(box, step))
        right = scores.pop((1, 1))
        assert right > 0.99 and max(scores.values()) < 0.95, (right, scores)


@pytest.mark.parametrize("boxes", [(64, 48), (65, 47)])
@pytest.mark.parametrize("interpolation", ["spline", "shears"])
def test_averages_of_two_pixel_sizes_and_fields(
    tmp_path: Path, boxes: tuple[int, int], interpolation: str
) -> None:
    """Two optics groups of 1 and 1.6 units per pixel that show different fields: one average of both, and an
    export whose poses give the phantom back in either group."""
    half, steps = K // 2, (1.0, 1.6)
    step_of = np.repeat(steps, half)
    stacks = []
    for group in (0, 1):
        rows = range(group * half, (group + 1) * half)
        images = [draw_at(boxes[group], steps[group], PSI_DEG[i], ORIGIN_XY_PX[i]) for i in rows]
        stacks.append(np.stack(images))
        with mrcfile.new(tmp_path / f"g{group}.mrcs", stacks[-1]) as stack:
            stack.set_image_stack()
            stack.voxel_size = APIX * steps[group]
    text = "data_optics\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n"
    text += "".join(f"{g + 1} {APIX * steps[g]} {boxes[g]}\n" for g in (0, 1))
    text += "\ndata_particles\nloop_\n_rlnImageName\n_rlnOpticsGroup\n"
    text += "".join(f"{i % half + 1}@g{i // half}.mrcs {i // half + 1}\n" for i in range(K))
    (tmp_path / "two.star").write_text(text)
    session = Session.create(tmp_path / "session", read(tmp_path / "two.star"))
    shift = -ORIGIN_XY_PX[:, ::-1] / step_of[:, None]
    labels = np.arange(K) % 2  # both classes hold images of both groups
    config = AverageConfig(interpolation=interpolation)  # type: ignore[arg-type]
    averages = average_classes(session, labels, -PSI_DEG, shift, config)
    scale = session.scale
    assert scale is not None and scale.pixel_size_A == APIX * 1.6
    assert scale.box_px == int(min(boxes[0], 1.6 * boxes[1]) / 1.6 + 1e-6)
    for average in averages:
        assert average.pixel_size_A == pytest.approx(scale.pixel_size_A)
        assert correlation(average.image, draw_at(scale.box_px, 1.6)) > 0.99
        rows_of = np.flatnonzero(labels == int(average.label))
        np.testing.assert_allclose(average.shift_yx_px, shift[rows_of], err_msg="in pixels of each original")
    turned_wrong = average_classes(session, np.zeros(K, int), PSI_DEG, shift, config)[0]
    assert correlation(turned_wrong.image, draw_at(scale.box_px, 1.6)) < 0.9
    # one of the classes holds images of one group only, and is checked against what was shown all the same
    labels = np.where(np.arange(K) < half - 2, 0, 1)
    averages = average_classes(session, labels, -PSI_DEG, shift, config)
    session.classes.save("two", averages, ["1", "2"], {"config": config.model_dump()})
    notes = export_classes(tmp_path / "classes", session, "two")
    assert any("averaged again from what was written, r 0.99" in note or "r 1.0" in note for note in notes)
    written = starfile.read(tmp_path / "classes" / "run_it000_data.star")["particles"]
    origin_A = written[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()
    np.testing.assert_allclose(origin_A, ORIGIN_XY_PX * APIX, atol=1e-4)
    np.testing.assert_allclose(written["rlnAnglePsi"], PSI_DEG, atol=1e-4)

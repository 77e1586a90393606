"""Holding a part of the particle still.

A map may turn and move its canonical frame from place to place; the likelihood does not mind. A gauge is a
turn and a move for every latent position that bring the frames into register on one region, so that this part
stays where it is while the rest moves, and that are taken over into the poses of the particles.

The gauge lies on top of a fit: `gauge.json` of the run, and the poses in `columns/pose-held.parquet`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from particle_explorer.configs import RunConfig
from particle_explorer.files import UserError, write_text
from particle_explorer.latents import Latents
from particle_explorer.models.build import build_model
from particle_explorer.pose import recentre, rotation_matrix, wrap_deg
from particle_explorer.preprocess import original_pixels
from particle_explorer.transforms import place, pose_gradients, register, soft_disc

Float = NDArray[np.float64]
Decode = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""`(b, d)` latent positions → `(b, c, n, n)` images"""

PAST = "gauge-past"
"""Folder of a run with the gauges that others have replaced"""
DEGREE = 4
MAX_TURN_DEG = 60.0
POSITIONS_PER_DIM = {1: 24, 2: 8}


@dataclass(frozen=True)
class Gauge:
    """A turn and a move as a smooth function of the latent position: a polynomial."""

    degree: int
    centre: tuple[float, ...]
    scale: tuple[float, ...]
    """Latents enter as (z - centre) / scale, held within ±1: no polynomial is trusted outside its data."""
    coefficients: Float
    """`(m, 3)` for turn (degrees), move y and move x (px of the decoded image)"""
    region: Mapping[str, Any]
    """What is held still: `{"disc_yxr_px": [y, x, r]}` or `{"mask_px": number of pixels}`"""
    largest_turn_deg: float = 0.0

    def at(self, z: ArrayLike) -> tuple[Float, Float]:
        """Turn `(b,)` in degrees and move `(b, 2)` in px (y, x) at latent positions `(b, d)`.

        They bring the frame of the decoded image into the held one: x_held = R(turn) · x + move.
        """
        value = _monomials(self._scaled(z), self.degree) @ self.coefficients
        return value[:, 0], value[:, 1:]

    def _scaled(self, z: ArrayLike) -> Float:
        return np.clip((np.asarray(z, np.float64) - self.centre) / self.scale, -1, 1)

    def held_pose(
        self, z: ArrayLike, angle_deg: ArrayLike, shift_yx_px: ArrayLike, px_per_px: ArrayLike = 1.0
    ) -> tuple[Float, Float]:
        """Poses relative to the held frames; `px_per_px` is how many px of `shift_yx_px` a decoded px is."""
        turn, move = self.at(z)
        return recentre(angle_deg, shift_yx_px, turn, move * np.asarray(px_per_px, np.float64)[..., None])

    def pose_to_draw(
        self, z: ArrayLike, angle_deg: ArrayLike = 0.0, shift_yx_px: ArrayLike = 0.0
    ) -> tuple[Float, Float]:
        """The pose at which to decode `z` so that the *held* frame appears at this angle and shift."""
        turn, move = self.at(z)
        angle = np.broadcast_to(np.asarray(angle_deg, np.float64), turn.shape)
        moved = np.einsum("...ij,...j->...i", rotation_matrix(angle), move[:, ::-1])[:, ::-1]
        return wrap_deg(angle + turn), moved + np.asarray(shift_yx_px, np.float64)

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "region": dict(self.region),
            "degree": self.degree,
            "centre": list(self.centre),
            "scale": list(self.scale),
            "coefficients": self.coefficients.tolist(),
            "largest_turn_deg": self.largest_turn_deg,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Gauge:
        if content.get("format_version") != 1:
            raise UserError(
                f"gauge.json has format {content.get('format_version')!r}, this version reads 1; hold again"
            )
        return cls(
            int(content["degree"]),
            tuple(map(float, content["centre"])),
            tuple(map(float, content["scale"])),
            np.asarray(content["coefficients"], np.float64),
            dict(content["region"]),
            float(content["largest_turn_deg"]),
        )


# ---------------------------------------------------------------------- fitting


def fit_gauge(
    decode: Decode,
    z: ArrayLike,
    *,
    disc_yxr_px: tuple[float, float, float] | None = None,
    mask: ArrayLike | None = None,
    at: ArrayLike | None = None,
) -> Gauge:
    """The gauge that holds one part still; without a region, the most rigid disc.

    Parameters
    ----------
    decode
        Draws latent positions.
    z
        `(N, d)` latent positions of the particles: the gauge is fitted where they are.
    disc_yxr_px
        Centre (y, x) from the corner, and radius, in pixels of the decoded image at the middle of the map.
    mask
        `(n, n)`, the part is where it is not 0.
    at
        `(d,)` the latent position on whose picture the region was drawn; by default the middle of the map.
    """
    latents = np.asarray(z, np.float64)
    if latents.ndim != 2 or len(latents) == 0:
        raise ValueError(f"latents are (N, d), not {latents.shape}")
    if not np.isfinite(latents).all():
        raise ValueError("latents hold values that are not finite")
    positions, counts, middle = _positions(latents)
    if at is not None:
        drawn_on = np.asarray(at, np.float64)
        if drawn_on.shape != latents.shape[1:] or not np.isfinite(drawn_on).all():
            raise UserError(f"a position of this map is {latents.shape[1]} numbers, not {drawn_on.shape}")
        # the picture that the others are brought into register with; it stands for no particle
        positions, counts = np.vstack([positions, drawn_on]), np.r_[counts, 1e-3 * counts.min()]
        middle = len(positions) - 1
    images = torch.from_numpy(np.ascontiguousarray(decode(positions.astype(np.float32)), dtype=np.float32))
    n = images.shape[-1]
    if mask is not None:
        weight = torch.from_numpy((np.asarray(mask) != 0).astype(np.float32))
        if weight.shape != (n, n):
            raise UserError(f"the mask has shape {tuple(weight.shape)}; the decoded images are {n} × {n} px")
        if float(weight.sum()) < 4:
            raise UserError("the mask is empty: it must be different from 0 where the part is")
        region: dict[str, Any] = {"mask_px": int(weight.sum())}
        turn, move, _ = _hold(images, weight, middle)
    else:
        if disc_yxr_px is None:
            disc_yxr_px = most_rigid_disc(images, middle)
        y, x, r = disc_yxr_px
        if not (0 <= y < n and 0 <= x < n and 1 < r <= n):
            raise UserError(f"disc {y:g},{x:g},{r:g} is not inside the decoded image of {n} × {n} px")
        region = {"disc_yxr_px": [float(y), float(x), float(r)]}
        turn, move, _ = _hold(images, _disc(n, y, x, r), middle)

    low, high = latents.min(0), latents.max(0)
    centre, scale = (low + high) / 2, np.maximum((high - low) / 2, 1e-6)
    terms = _monomials((positions - centre) / scale, DEGREE)
    value = np.column_stack([np.rad2deg(turn.double().numpy()), move.double().numpy()])
    weight_of = np.sqrt(counts)[:, None]
    # a light ridge: positions may lie on few places of the map
    ridge = 1e-3 * np.sqrt(counts.mean()) * np.eye(terms.shape[1])
    ridge[0, 0] = 0
    left = np.vstack([terms * weight_of, ridge])
    right = np.vstack([value * weight_of, np.zeros((len(ridge), 3))])
    coefficients = np.linalg.lstsq(left, right, rcond=None)[0]
    largest = float(np.abs(terms @ coefficients)[:, 0].max())
    return Gauge(DEGREE, tuple(centre), tuple(scale), coefficients, region, largest)


def most_rigid_disc(images: Tensor, middle: int) -> tuple[float, float, float]:
    """The disc (y, x, radius) whose content changes least along the map, once it is in register there.

    `images` `(k, c, n, n)` along the map. Compared are discs on one grid and of two sizes that hold enough
    to tell a turn from a move; what counts is the change left over, as a share of the content.
    """
    n = images.shape[-1]
    some = images[torch.linspace(0, len(images) - 1, min(len(images), 10)).round().long().unique()]
    mean = images.mean(0, keepdim=True)
    around = soft_disc(n, 0.42 * n)
    step = max(1, round(n / 14))
    found: list[tuple[float, float, float, float, float]] = []
    for radius in (0.17 * n, 0.22 * n):
        for y, x in np.ndindex(n // step, n // step):
            y_px, x_px = float(y * step + step), float(x * step + step)
            if np.hypot(y_px - n // 2, x_px - n // 2) > 0.45 * n - 0.6 * radius:
                continue
            content, grip = _content(mean, _disc(n, y_px, x_px, radius) * around)
            found.append((content, grip, y_px, x_px, radius))
    largest_content, largest_grip = (max(row[i] for row in found) for i in (0, 1))
    best, rigid = float("inf"), found[0]
    for row in found:
        content, grip, y_px, x_px, radius = row
        if content < 0.3 * largest_content or grip < 0.15 * largest_grip:
            continue
        weight = _disc(n, y_px, x_px, radius) * around
        _, _, left_over = _hold(some, weight, len(some) // 2, n_rounds=1, coarse=True)
        # the larger disc says more about turns; prefer it when it is as rigid
        change = left_over / (content * radius**0.5)
        if change < best:
            best, rigid = change, row
    return rigid[2], rigid[3], rigid[4]


def _content(mean: Tensor, weight: Tensor) -> tuple[float, float]:
    """Variance of an image within a region, and how strongly it changes there when turned (not moved)."""
    total = weight.sum()
    centred = mean - (mean * weight).sum((2, 3), keepdim=True) / total
    gradients = pose_gradients(mean)[0]
    normal = torch.einsum("ichw,jchw,hw->ij", gradients, gradients, weight)
    moves = normal[1:, 1:] + 1e-9 * torch.eye(2)
    grip = normal[0, 0] - normal[0, 1:] @ torch.linalg.solve(moves, normal[1:, 0])
    return float((centred.square() * weight).sum()), float(grip)


def _hold(
    images: Tensor, weight: Tensor, middle: int, *, n_rounds: int = 3, coarse: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Turn `(k,)` rad and move `(k, 2)` px that register images on a region, and the change left there."""
    step = 6.0 if coarse else 3.0
    angles = torch.deg2rad(torch.arange(-MAX_TURN_DEG, MAX_TURN_DEG + 0.1, step))
    max_shift = max(2, round(0.1 * images.shape[-1]))
    reference = images[middle : middle + 1]
    for i in range(n_rounds):
        turn, move = register(images, reference, weight, angles=angles, max_shift_px=max_shift)
        placed = place(images, turn, move, mode="bicubic")
        if i + 1 < n_rounds:
            reference = placed.mean(0, keepdim=True)
    change = (placed - placed.mean(0)).square().mean(0).sum(0)
    return turn, move, float((change * weight).sum())


def _disc(n: int, y: float, x: float, radius: float) -> Tensor:
    """`(n, n)` a disc about (y, x) from the corner, with an edge of 2 px."""
    at = torch.arange(n, dtype=torch.float32)
    away = torch.hypot(at[:, None] - y, at - x)
    return 0.5 + 0.5 * torch.cos(torch.pi * ((away - radius + 1) / 2).clamp(0, 1))


def _positions(z: Float) -> tuple[Float, Float, int]:
    """Latent positions that stand for the particles, how many each stands for, and the one in the middle."""
    d = z.shape[1]
    if d == 1:
        n = min(POSITIONS_PER_DIM[1], len(z))
        first, last = np.quantile(z[:, 0], [0.002, 0.998])
        edges = np.linspace(float(first), float(last), n + 1)
        positions = ((edges[1:] + edges[:-1]) / 2)[:, None]
        counts = np.maximum(np.histogram(z[:, 0], edges)[0], 0.1 * len(z) / n).astype(np.float64)
    elif d == 2:
        n = POSITIONS_PER_DIM[2]
        low, high = z.min(0), z.max(0)
        cell = np.clip(((z - low) / np.maximum(high - low, 1e-9) * n).astype(int), 0, n - 1)
        _, inverse, count = np.unique(cell @ [n, 1], return_inverse=True, return_counts=True)
        total = np.stack([np.bincount(inverse, z[:, i]) for i in range(d)], -1)
        keep = count >= max(1, 0.1 * len(z) / n**2)
        positions, counts = (total / count[:, None])[keep], count[keep].astype(np.float64)
    else:
        chosen = np.random.default_rng(0).permutation(len(z))[:96]
        positions, counts = z[chosen], np.ones(len(chosen))
    middle = int(np.argmin(np.linalg.norm(positions - np.median(z, axis=0), axis=1)))
    return positions, counts, middle


def _monomials(z: Float, degree: int) -> Float:
    """`(b, d)` → `(b, m)`: monomials of total degree up to `degree`; above two dimensions at most 2."""
    b, d = z.shape
    degree = degree if d <= 2 else min(degree, 2)
    exponents = [e for e in np.ndindex(*[degree + 1] * d) if sum(e) <= degree] if d <= 8 else None
    if exponents is None:
        return np.column_stack([np.ones(b), z])
    return np.stack([np.prod(z ** np.asarray(e), axis=1) for e in sorted(exponents, key=sum)], -1)


# ---------------------------------------------------------------------- on a run


class HeldRun(Protocol):
    """What is needed of a run (`session.Run`)."""

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> RunConfig: ...
    @property
    def session(self) -> Any: ...

    def latents(self) -> Latents | None: ...
    def gauge(self) -> dict[str, Any] | None: ...
    def save_gauge(self, gauge: Mapping[str, Any]) -> None: ...
    def write_column(
        self, name: str, table: pd.DataFrame, config: Mapping[str, Any], *, replace: bool = False
    ) -> str: ...


def hold_still(
    run: HeldRun,
    *,
    auto: bool = False,
    disc_yxr_px: tuple[float, float, float] | None = None,
    mask: ArrayLike | None = None,
    at: ArrayLike | None = None,
) -> Gauge:
    """Fit the gauge of a finished run; writes its `gauge.json` and `columns/pose-held.parquet`.

    Exactly one of `auto` (the most rigid disc), a disc and a mask says what to hold; `at` is the position
    on whose picture it was drawn. What was held before is kept for `undo`.
    """
    if auto + (disc_yxr_px is not None) + (mask is not None) != 1:
        raise ValueError("one of auto, a disc and a mask says what to hold still")
    latents = run.latents()
    if latents is None:
        raise UserError(f"run {run.path.name} has no latents yet; let it finish, or encode it")
    if latents.angle_deg is None or latents.shift_yx_px is None:
        raise UserError(f"the model of run {run.path.name} infers no poses; there is nothing to hold still")
    model = build_model(run.config.model, run.config.data)
    model.load_state_dict(safetensors.torch.load_file(run.path / "model.safetensors"))
    model.eval()

    @torch.inference_mode()
    def decode(z: NDArray[np.float32]) -> NDArray[np.float32]:
        drawn: NDArray[np.float32] = model.decode(torch.from_numpy(z)).numpy()
        return drawn

    gauge = fit_gauge(decode, latents.z, disc_yxr_px=disc_yxr_px, mask=mask, at=at)
    before = run.gauge()
    past = _past(run)
    number = 1 + max((int(path.stem) for path in past), default=0)
    write_text(run.path / PAST / f"{number:04d}.json", json.dumps(before) + "\n")
    _put_to_use(run, gauge, latents)
    return gauge


def undo(run: HeldRun) -> Gauge | None:
    """Hold what was held before the last `hold_still`; None when that was nothing."""
    past = _past(run)
    latents = run.latents()
    if not past or latents is None:
        raise UserError(f"run {run.path.name} has no earlier state to go back to")
    before = json.loads(past[-1].read_text(encoding="utf-8"))
    if before is None:
        for name in ("gauge.json", "columns/pose-held.parquet", "columns/pose-held.json"):
            (run.path / name).unlink(missing_ok=True)
    else:
        _put_to_use(run, Gauge.from_json(before), latents)
    past[-1].unlink()
    return None if before is None else Gauge.from_json(before)


def _past(run: HeldRun) -> list[Path]:
    """What was held before each time that something else was, oldest first."""
    return sorted((run.path / PAST).glob("[0-9]*.json"))


def _put_to_use(run: HeldRun, gauge: Gauge, latents: Latents) -> None:
    """Write a gauge and the poses that follow from it."""
    assert latents.angle_deg is not None and latents.shift_yx_px is not None
    original_px = original_pixels(run.session.table.loc[latents.uid], run.session.plan)
    angle, shift = gauge.held_pose(latents.z, latents.angle_deg, latents.shift_yx_px, original_px)
    table = pd.DataFrame(
        {"angle_deg": angle, "shift_y_px": shift[:, 0], "shift_x_px": shift[:, 1]},
        index=pd.Index(latents.uid, name="uid"),
    ).astype(np.float32)
    run.save_gauge(gauge.to_json())
    run.write_column("pose-held", table, gauge.to_json(), replace=True)

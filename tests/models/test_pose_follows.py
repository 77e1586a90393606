"""Turning and moving the input turns and moves the pose, for every model that infers both.

The average by the exported pose is taken by a few independent lines, as RELION reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import Tensor

from particle_explorer import pose
from particle_explorer.configs import (
    ClassMapConfig,
    CODAEConfig,
    Config,
    DataSpec,
    SpatialVAEConfig,
    TargetVAEConfig,
)
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.models.base import Batch, ParticleModel
from particle_explorer.models.build import build_model
from particle_explorer.models.class_map import ClassMap
from particle_explorer.models.hybrid_map import HybridMap
from particle_explorer.transforms import place


class Fit(NamedTuple):
    """A small network, and what it takes to learn the pose of one molecule."""

    config: Config
    n_steps: int
    """Of networks; a class map is fitted to one stack by itself, and a hybrid starts with one"""
    angle_within_deg: float
    boxes_px: tuple[int, ...] = (24, 25)
    molecule_px: int = 0
    """Side of a box that the molecule would fill; 0 for that of the images"""
    shift_sd_px: float = 1.0
    shift_within_px: float = 0.5


MAP: dict[str, Any] = {"nodes_per_dim": 3, "angle_step_deg": 15}
FITS = {
    "spatial-vae": Fit(
        SpatialVAEConfig(latent_dim=1, hidden=96, shift_sd_px=1.0, pixel_fraction=0.5), 400, 10
    ),
    "target-vae": Fit(
        TargetVAEConfig(
            channels=32, kernel_functions=60, features=128, hidden=64,
            latent_dim=1, shift_sd_px=1.0, pixel_fraction=0.3,
        ),
        300,
        10,
    ),
    "codae": Fit(CODAEConfig(latent_dim=1, width=4), 140, 8),
    "class-map": Fit(ClassMapConfig(**MAP, latent_dim=2), 0, 2, shift_within_px=0.15),
    "class-map, wide shifts": Fit(
        ClassMapConfig(**MAP, latent_dim=2, shift_range_px=10),
        0, 2, (40,), 24, shift_sd_px=4.0, shift_within_px=0.15,
    ),
    "hybrid map": Fit(ClassMapConfig(**MAP, latent_dim=4), 40, 2, shift_within_px=0.15),
    "hybrid map, wide shifts": Fit(
        ClassMapConfig(**MAP, latent_dim=4, shift_range_px=10),
        40, 2, (41,), 24, shift_sd_px=4.0, shift_within_px=0.15,
    ),
}  # fmt: skip
CASES = [(kind, box_px) for kind, fit in FITS.items() for box_px in fit.boxes_px]


PIXEL_SIZE_A = 2.0


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)))


class Stack:
    """Images at hand, as training gives them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: Tensor) -> Batch:
        return Batch(self.images[index], None, index)


def phantom(n: int, molecule_px: int = 0) -> Tensor:
    """An image that no turn brings onto itself: a bar, a blob at one end, a dot beside it."""
    y, x = np.mgrid[:n, :n] - n // 2
    r = (molecule_px or n) / 24
    image = np.exp(-0.5 * (y**2 + x**2) / (3 * r) ** 2)
    image += 1.3 * np.exp(-0.5 * ((y - 2 * r) ** 2 + (x - 6 * r) ** 2) / (1.8 * r) ** 2)
    image += 0.7 * np.exp(-0.5 * ((y + 5 * r) ** 2 + (x - 2 * r) ** 2) / (1.5 * r) ** 2)
    return torch.from_numpy(image.astype(np.float32))[None, None]


def placed(fit: Fit, box_px: int, n_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Phantoms without noise, their angles and shifts."""
    angle = 2 * math.pi * torch.rand(n_images)
    shift = (fit.shift_sd_px * torch.randn(n_images, 2)).clamp(-7, 7)
    return place(3 * phantom(box_px, fit.molecule_px), angle, shift, mode="bicubic"), angle, shift


def noisy(images: Tensor) -> Tensor:
    return images + 0.3 * torch.randn_like(images)


def fitted(fit: Fit, box_px: int) -> ParticleModel:
    torch.manual_seed(0)
    diameter_px = 0.8 * (fit.molecule_px or box_px)
    data = DataSpec(box_px=box_px, n_channels=1, diameter_px=diameter_px, n_particles=200)
    model = build_model(fit.config, data)  # type: ignore[arg-type]
    stack = Stack(noisy(placed(fit, box_px, 200)[0]))
    if isinstance(model, ClassMap):
        for _ in model.fit(stack):
            pass
        return model.eval()
    if isinstance(model, HybridMap):
        for _ in model.start(stack):
            pass
    optimiser = torch.optim.Adam(model.parts()["model"], 3e-3)
    for step in range(fit.n_steps):
        model.schedule(
            step / fit.n_steps, int(step > fit.n_steps / 4)
        )  # at first there is only pose to learn
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / fit.n_steps))
        if isinstance(model, HybridMap):  # it knows the poses of its stack
            batch = stack.take(torch.randperm(200)[:32])
        else:
            batch = batch_of(noisy(placed(fit, box_px, 32)[0]))
        loss = sum(model(batch).values())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    return model.eval()


def exported_poses(
    folder: Path, images: Tensor, angle_deg: NDArray[np.float32], shift_yx_px: NDArray[np.float32]
) -> pd.DataFrame:
    """The particles of the star file that results from these poses and a source with false ones."""
    n = images.shape[-1]
    with mrcfile.new(folder / "in.mrcs", images[:, 0].numpy()) as stack:
        stack.set_image_stack()
    optics = "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n_rlnImageSize\n"
    names = ["ImageName", "OpticsGroup", "AnglePsi", "OriginXAngst", "OriginYAngst"]
    rows = [f"{i + 1}@in.mrcs 1 77.0 8.0 -6.0" for i in range(len(images))]
    lines = ["data_particles", "", "loop_", *(f"_rln{name}" for name in names), *rows, ""]
    star = folder / "in.star"
    star.write_text(f"{optics}1 {PIXEL_SIZE_A} {n}\n\n" + "\n".join(lines))
    out, table = folder / "out.star", read(star).table
    export_particles(out, table=table, source=star, kind="star", angle_deg=angle_deg, shift_yx_px=shift_yx_px)
    particles = starfile.read(out)["particles"]
    assert isinstance(particles, pd.DataFrame)
    return particles


@pytest.mark.parametrize(("kind", "box_px"), CASES)
def test_turning_and_moving_the_input_turns_and_moves_the_pose(
    kind: str, box_px: int, tmp_path: Path
) -> None:
    model = fitted(FITS[kind], box_px)
    images, angle, shift = placed(FITS[kind], box_px, 200)
    encoding = model.encode(batch_of(images))
    assert encoding.angle is not None and encoding.shift is not None
    difference = torch.exp(1j * (encoding.angle - angle))
    constant = difference.mean()
    assert constant.abs() > 0.9  # the mirrored sense of rotation would leave nothing
    assert torch.rad2deg((difference / constant).angle().abs()).median() < FITS[kind].angle_within_deg
    # the model's own centre, a point of the molecule, is found where the turned and moved molecule has it
    xy = pose.rotation_matrix(np.rad2deg(angle.numpy())).reshape(-1, 2)
    found = (encoding.shift - shift).flip(-1).reshape(-1).numpy()
    centre = np.linalg.lstsq(xy, found, rcond=None)[0]
    assert np.sqrt(np.mean((found - xy @ centre) ** 2)) < FITS[kind].shift_within_px
    # as RELION takes the pose of the exported file: x_ref = R(psi) (x_particle + origin)
    exported = exported_poses(tmp_path, images, np.rad2deg(encoding.angle.numpy()), encoding.shift.numpy())
    psi, *origin = exported[["rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy().T
    grid = np.indices((box_px, box_px))[::-1].reshape(2, -1) - box_px // 2
    average, mirrored = np.zeros(box_px**2), np.zeros(box_px**2)
    for image, turn, x, y in zip(images[:, 0].numpy(), psi, *origin, strict=True):
        for total, sign in ((average, 1), (mirrored, -1)):
            at = pose.rotation_matrix(-sign * turn) @ grid - sign * np.array([[x], [y]]) / PIXEL_SIZE_A
            total += map_coordinates(image, at[::-1] + box_px // 2, order=1) / len(images)
    assert average.var() > 0.75 * images.var()
    assert average.var() > 1.5 * mirrored.var()  # a molecule has something of its mirrored turns
    views = model.decode(encoding.z, encoding.angle, encoding.shift).flatten(1)
    match = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(views, images.flatten(1), strict=True)]
    assert torch.stack(match).median() > 0.9

"""Turning and moving the input turns and moves the pose, for every model that infers it by networks.

The average by the exported pose is taken by a few independent lines, as RELION reads it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

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
from particle_explorer.configs import CODAEConfig, Config, DataSpec, SpatialVAEConfig, TargetVAEConfig
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.models.base import Batch, ParticleModel
from particle_explorer.models.build import build_model
from particle_explorer.transforms import place


class Fit(NamedTuple):
    """A small network, and what it takes to learn the pose of one molecule."""

    config: Config
    n_steps: int
    angle_within_deg: float


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
}  # fmt: skip


PIXEL_SIZE_A = 2.0


def batch_of(images: Tensor) -> Batch:
    return Batch(images, None, torch.arange(len(images)))


def phantom(n: int) -> Tensor:
    """An image that no turn brings onto itself: a bar, a blob at one end, a dot beside it."""
    y, x = np.mgrid[:n, :n] - n // 2
    r = n / 24
    image = np.exp(-0.5 * (y**2 + x**2) / (3 * r) ** 2)
    image += 1.3 * np.exp(-0.5 * ((y - 2 * r) ** 2 + (x - 6 * r) ** 2) / (1.8 * r) ** 2)
    image += 0.7 * np.exp(-0.5 * ((y + 5 * r) ** 2 + (x - 2 * r) ** 2) / (1.5 * r) ** 2)
    return torch.from_numpy(image.astype(np.float32))[None, None]


def fitted(fit: Fit, box_px: int) -> ParticleModel:
    torch.manual_seed(0)
    data = DataSpec(box_px=box_px, n_channels=1, diameter_px=0.8 * box_px, n_particles=10)
    model = build_model(fit.config, data)  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(fit.n_steps):
        model.schedule(
            step / fit.n_steps, int(step > fit.n_steps / 4)
        )  # at first there is only pose to learn
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * (1 + math.cos(math.pi * step / fit.n_steps))
        images = place(3 * phantom(box_px), 2 * math.pi * torch.rand(32), torch.randn(32, 2), mode="bicubic")
        loss = sum(model(batch_of(images + 0.3 * torch.randn_like(images))).values())
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


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("box_px", [24, 25])
def test_turning_and_moving_the_input_turns_and_moves_the_pose(
    kind: str, box_px: int, tmp_path: Path
) -> None:
    model = fitted(FITS[kind], box_px)
    angle, shift = 2 * math.pi * torch.rand(200), torch.randn(200, 2)
    images = place(3 * phantom(box_px), angle, shift, mode="bicubic")
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
    assert np.sqrt(np.mean((found - xy @ centre) ** 2)) < 0.5
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

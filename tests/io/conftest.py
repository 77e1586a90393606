"""An asymmetric phantom with known poses, rendered by RELION's definition, in every kind of file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from particle_explorer.io.mrc import write_stack

N_PARTICLES = 24


def phantom(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Three blobs without any symmetry, at (x, y) px from the centre; x along columns, y down the rows."""
    parts = [(5.0, 1.0, 1.8, 1.0), (-4.0, 3.0, 1.5, 0.7), (1.0, -6.0, 1.6, 1.3)]
    return np.asarray(sum(h * np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s * s)) for a, b, s, h in parts))


def phantom_image(n: int) -> np.ndarray:
    y, x = np.indices((n, n)) - n // 2
    return phantom(x, y)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@dataclass
class Rendered:
    """Particles as RELION defines their pose: x_ref = R(psi) (x_particle + origin), about pixel n // 2."""

    folder: Path
    images: np.ndarray
    psi_deg: np.ndarray
    origin_xy_px: np.ndarray
    pixel_size_A: float

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def box(self) -> int:
        return self.images.shape[-1]

    def star(self, name: str, dialect: str, **columns: list[str]) -> Path:
        """A star file of these particles, `dialect` "3.0" or "3.1"; further columns come first."""
        unit = 1.0 if dialect == "3.0" else self.pixel_size_A
        suffix = "" if dialect == "3.0" else "Angst"
        o = self.origin_xy_px * unit
        cells = {
            **{f"rln{label}": values for label, values in columns.items()},
            "rlnAnglePsi": [f"{value:12.6f}" for value in self.psi_deg],
            "rlnImageName": [f"{i + 1:06d}@stack.mrcs" for i in range(self.n)],
            f"rlnOriginX{suffix}": [f"{value:.5f}" for value in o[:, 0]],
            f"rlnOriginY{suffix}": [f"{value:.5f}" for value in o[:, 1]],
            "rlnClassNumber": [str(1 + i % 3) for i in range(self.n)],
        }
        text = "\n# version 30001\n\n"
        if dialect == "3.0":
            cells["rlnMagnification"] = ["10000.0"] * self.n
            cells["rlnDetectorPixelSize"] = [f"{self.pixel_size_A:.4f}"] * self.n
            text += "data_images\n\nloop_ \n"
        else:
            cells["rlnOpticsGroup"] = ["1"] * self.n
            text += (
                "data_optics\n\nloop_ \n_rlnOpticsGroup #1 \n_rlnOpticsGroupName #2 \n_rlnImagePixelSize #3 "
                "\n"
                "_rlnImageSize #4 \n_rlnVoltage #5 \n_rlnSphericalAberration #6 \n"
                f"    1 opticsGroup1 {self.pixel_size_A:.4f} {self.box} 300.000 2.70 \n \n\n"
                "# version 30001\n\ndata_particles\n\nloop_ \n"
            )
        text += "".join(f"_{label} #{i} \n" for i, label in enumerate(cells, 1))
        text += "".join("  ".join(row) + " \n" for row in zip(*cells.values(), strict=True)) + "\n"
        path = self.folder / name
        path.write_text(text)
        return path


Render = Callable[..., Rendered]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    def make(box: int = 32, pixel_size_A: float = 2.5, n: int = N_PARTICLES, seed: int = 0) -> Rendered:
        rng = np.random.default_rng(seed)
        psi, origin = rng.uniform(-180, 180, n), rng.uniform(-2.5, 2.5, (n, 2))
        y, x = np.indices((box, box)) - box // 2
        images = np.empty((n, box, box), np.float32)
        for i in range(n):
            c, s = np.cos(np.deg2rad(psi[i])), np.sin(np.deg2rad(psi[i]))
            moved_x, moved_y = x + origin[i, 0], y + origin[i, 1]
            images[i] = phantom(c * moved_x - s * moved_y, s * moved_x + c * moved_y)
        write_stack(tmp_path / "stack.mrcs", images, pixel_size_A, overwrite=True)
        return Rendered(tmp_path, images, psi, origin, pixel_size_A)

    return make


def average_by_placement(images: np.ndarray, angle_deg: np.ndarray, shift_yx_px: np.ndarray) -> np.ndarray:
    """Our convention: the reference's pixel x_ref is found at R(angle) x_ref + shift in the image."""
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    total = np.zeros((n, n))
    for image, angle, (dy, dx) in zip(images, np.deg2rad(angle_deg), shift_yx_px, strict=True):
        at_x = np.cos(angle) * x - np.sin(angle) * y + dx + n // 2
        at_y = np.sin(angle) * x + np.cos(angle) * y + dy + n // 2
        total += map_coordinates(image, [at_y, at_x], order=3, mode="nearest")
    return total / len(images)


def average_by_relion(images: np.ndarray, psi_deg: np.ndarray, origin_xy_px: np.ndarray) -> np.ndarray:
    """RELION's convention, solved for the particle: x_particle = R(-psi) x_ref - origin."""
    n = images.shape[-1]
    y, x = np.indices((n, n)) - n // 2
    total = np.zeros((n, n))
    for image, psi, (ox, oy) in zip(images, np.deg2rad(psi_deg), origin_xy_px, strict=True):
        at_x = np.cos(psi) * x + np.sin(psi) * y - ox + n // 2
        at_y = -np.sin(psi) * x + np.cos(psi) * y - oy + n // 2
        total += map_coordinates(image, [at_y, at_x], order=3, mode="nearest")
    return total / len(images)


@pytest.fixture
def helpers() -> type:
    """The functions above; test modules cannot import a conftest."""

    class Helpers:
        by_placement = staticmethod(average_by_placement)
        by_relion = staticmethod(average_by_relion)
        phantom_image = staticmethod(phantom_image)
        correlation = staticmethod(correlation)

    return Helpers

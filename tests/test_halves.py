"""Independent halves: aligned to each other only afterwards, and what their FRC then says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from particle_explorer import halves
from particle_explorer.averaging import average_classes
from particle_explorer.configs import AverageConfig
from particle_explorer.files import UserError
from particle_explorer.latents import Latents
from particle_explorer.pose import rotation_matrix, wrap_deg
from particle_explorer.spectra import placed

BOX = 32


class _Stack:
    def __init__(self, images: NDArray[Any]) -> None:
        self.images = images.astype(np.float32)[:, None]
        self.box_px = np.full(len(images), images.shape[-1])

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.images[rows]


class _Session:
    plan = SimpleNamespace(sign=1, ctf="auto")
    scale = None

    def __init__(self, images: NDArray[Any], first: NDArray[np.bool_]) -> None:
        n = len(images)
        self.table = pd.DataFrame(
            {"pixel_size_A": 2.0, "box_px": images.shape[-1], "ctf_state": "none"},
            index=pd.Index(np.arange(n, dtype=np.uint64), name="uid"),
        )
        self.images = images
        self.masks = {"a": first, "b": ~first}
        self.selections = SimpleNamespace(mask=self.masks.__getitem__)
        self.n_particles = n

    def originals(self) -> _Stack:
        return _Stack(self.images)


def _run(session: _Session, name: str, z: Any, angle: Any, shift: Any) -> Any:
    uid = session.table.index.to_numpy(np.uint64)
    found = Latents(
        uid,
        np.asarray(z, np.float32).reshape(len(uid), -1),
        angle_deg=np.asarray(angle, np.float32),
        shift_yx_px=np.asarray(shift, np.float32),
    )
    return SimpleNamespace(
        session=session, name=name, config=SimpleNamespace(selection=name), latents=lambda: found
    )


def _picture(bend: float, angle_deg: Any = 0.0, shift_yx_px: Any = (0.0, 0.0)) -> NDArray[np.float64]:
    """`(k, BOX, BOX)`: a body and an arm that bends, no symmetry."""
    angle = np.atleast_1d(np.asarray(angle_deg, float))
    bend_rad = np.deg2rad(bend)
    arm = np.array([[np.cos(bend_rad), np.sin(bend_rad)]]) * np.array([[2.0], [4.5], [7.0]]) + [1.0, 2.0]
    points = np.concatenate([[[0.0, 0.0], [-4.0, 1.0], [-7.0, -3.0]], arm])
    xy = points @ np.swapaxes(rotation_matrix(angle), -1, -2)
    xy = xy + np.broadcast_to(np.asarray(shift_yx_px, float), (len(angle), 2))[:, None, ::-1]
    profile = np.exp(-0.5 * ((np.arange(BOX) - BOX // 2 - xy[..., None]) / 1.6) ** 2)
    return np.einsum("kiy,kix->kyx", profile[:, :, 1], profile[:, :, 0])


def test_a_picture_is_found_on_another() -> None:
    y, x = np.indices((BOX, BOX)) - BOX // 2
    mask = np.hypot(y, x) < 0.45 * BOX
    found = placed(_picture(30, 117.0, (1.3, -2.2))[0], _picture(30)[0], mask)
    assert abs(wrap_deg(found.angle_deg - 117.0)) < 0.3 and found.correlation > 0.999
    np.testing.assert_allclose(found.shift_yx_px, (1.3, -2.2), atol=0.05)


def test_halves_of_two_models_are_joined_and_may_be_called_independent() -> None:
    """The second model has another frame for each of its classes, and counts its map the other way round."""
    rng = np.random.default_rng(0)
    k = 160
    angle, shift = rng.uniform(-180, 180, k), rng.normal(0, 1.5, (k, 2))
    bent = np.arange(k) % 2 == 0
    images = np.where(
        bent[:, None, None], _picture(80, angle, shift), _picture(-40, angle, shift)
    ) + rng.normal(0, 0.4, (k, BOX, BOX))
    first = rng.random(k) < 0.5
    session = _Session(images, first)
    # x_img = R(a) x + s and x = R(t) x_b + m: the pose of x_b is a + t and s + R(a) m
    turn = np.where(bent, 71.0, -130.0)
    move = np.where(bent[:, None], (1.0, -0.6), (0.4, 1.2))  # x, y
    angle_b = wrap_deg(angle + turn)
    shift_b = shift + np.einsum("kij,kj->ki", rotation_matrix(angle), move)[:, ::-1]
    runs = [
        _run(session, "a", np.where(bent, 1.0, -1.0) + rng.normal(0, 0.1, k), angle, shift),
        _run(session, "b", np.where(bent, -1.0, 1.0) + rng.normal(0, 0.1, k), angle_b, shift_b),
    ]
    found = halves.independent_averages(runs, 2, AverageConfig(ctf="none"))
    assert sorted((a, b) for a, b, _ in found.matches) == [(0, 1), (1, 0)]
    for average, bend in zip(found.averages, (-40, 80), strict=True):
        assert average.halves_independent and "independent" in average.frc_label
        assert np.corrcoef(average.image.ravel(), _picture(bend)[0].ravel())[0, 1] > 0.97
        assert average.frc[2:6].min() > 0.9 and np.isfinite(average.resolution_A)
        in_first = first[average.uid.astype(int)]
        assert in_first.any() and not in_first.all()
    shared = average_classes(session, bent.astype(int), angle, shift, AverageConfig(ctf="none"))
    assert all(np.isnan(one.resolution_A) and "upper bound" in one.frc_label for one in shared)


def test_noise_aligned_by_two_models_has_no_resolution() -> None:
    """Each half is shifted to fit a template of its own, which look nothing like each other."""
    rng = np.random.default_rng(1)
    k = 1200
    noise = rng.normal(size=(k, BOX, BOX))
    first = np.arange(k) % 2 == 0
    session = _Session(noise, first)

    def aligned_to(template: NDArray[Any]) -> NDArray[np.float64]:
        score = np.fft.irfft2(np.fft.rfft2(noise) * np.fft.rfft2(template).conj(), s=(BOX, BOX))
        y, x = np.unravel_index(score.reshape(k, -1).argmax(1), (BOX, BOX))
        return (np.stack([y, x], 1) + BOX // 2) % BOX - BOX // 2.0

    templates = [gaussian_filter(rng.normal(size=(BOX, BOX)), 1.3) for _ in range(2)]
    z, still = rng.normal(size=k), np.zeros(k)
    shifts = [aligned_to(template - template.mean()) for template in templates]
    runs = [_run(session, name, z, still, shift) for name, shift in zip("ab", shifts, strict=True)]
    (independent,) = halves.independent_averages(runs, 1, AverageConfig(ctf="none")).averages
    (shared,) = average_classes(session, np.zeros(k), still, shifts[0], AverageConfig(ctf="none"))
    assert shared.frc[3:8].mean() > 0.8, "one template puts itself into both halves"
    assert independent.frc[3:8].mean() < 0.4


def test_common_particles_are_refused() -> None:
    session = _Session(np.zeros((8, BOX, BOX)), np.arange(8) < 4)
    session.masks["b"] = np.arange(8) > 2
    runs = [_run(session, name, np.arange(8), np.zeros(8), np.zeros((8, 2))) for name in "ab"]
    with pytest.raises(UserError, match="common particles"):
        halves.independent_averages(runs, 1)

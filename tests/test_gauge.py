from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray

from particle_explorer import metrics, pose
from particle_explorer.configs import ClassMapConfig, DataSpec, RunConfig
from particle_explorer.files import UserError
from particle_explorer.gauge import Gauge, fit_gauge, hold_still
from particle_explorer.latents import Latents
from particle_explorer.models.build import build_model
from particle_explorer.transforms import place

N = 40


def wander(z: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By how much the frame of the map below turns (degrees) and moves (px yx) along it."""
    t = z[:, 0]
    return 18 * t + 6 * t**2, np.column_stack([1.2 * t, -0.8 * t**2])


def body_and_arm(z: NDArray[np.float64]) -> torch.Tensor:
    """A lopsided body that stands still and an arm that swings with z."""
    y, x = np.mgrid[:N, :N] - N // 2
    opening = 0.6 + 0.7 * z[:, 0]

    def blob(at_y: Any, at_x: Any, sd: float, height: float = 1.0) -> NDArray[np.float64]:
        at_y, at_x = np.broadcast_to(at_y, len(z)), np.broadcast_to(at_x, len(z))
        away = (y - at_y[:, None, None]) ** 2 + (x - at_x[:, None, None]) ** 2
        return np.asarray(height * np.exp(-away / (2 * sd**2)))

    image = blob(0, -8, 2.5) + blob(-5, -5, 1.7, 0.9) + blob(5, -9, 1.5, 0.7) + blob(3, -3, 1.3, 0.8)
    for reach in (5, 8, 11, 14):
        image = image + blob(reach * np.sin(opening), 2 + 0.9 * reach * np.cos(opening), 1.8, 0.8)
    return torch.from_numpy(image.astype(np.float32))[:, None]


def decode(z: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same with a frame that wanders."""
    turn, move = wander(z.astype(np.float64))
    placed = place(
        body_and_arm(z.astype(np.float64)),
        torch.from_numpy(np.deg2rad(turn)).float(),
        torch.from_numpy(move).float(),
        mode="fourier",
    )
    return np.asarray(placed.numpy())


@pytest.fixture(scope="module")
def latents() -> NDArray[np.float64]:
    return np.random.default_rng(0).uniform(-1, 1, (800, 1))


def deviation(gauge: Gauge, z: NDArray[np.float64]) -> tuple[float, float]:
    """What is left of the wandering of body points: its spread in turn (degrees) and in place (px)."""
    turn, move = gauge.at(z)
    wandered, moved = wander(z)
    # body -> decoded frame -> held frame
    left = turn + wandered
    centre = np.array([0.0, -6.0])  # the middle of the body, (y, x) about n // 2

    def onward(angle: NDArray[np.float64], point: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.einsum("bij,bj->bi", pose.rotation_matrix(angle), point[:, ::-1])[:, ::-1]

    place_now = onward(turn, onward(wandered, np.tile(centre, (len(z), 1))) + moved) + move
    return float(np.abs(left - np.median(left)).max()), float(np.ptp(place_now, axis=0).max())


def test_a_region_is_held_where_it_was_drawn(latents: NDArray[np.float64]) -> None:
    """At the end of the map the frame is turned: a tight mask of the body as it lies there holds the body."""
    at = np.array([[1.0]])
    turn, move = wander(at)
    y, x = np.mgrid[:N, :N] - N // 2
    centre = pose.rotation_matrix(turn[0]) @ [-7.0, 0.0]
    mask = np.hypot(x - centre[0] - move[0, 1], y - centre[1] - move[0, 0]) < 7
    gauge = fit_gauge(decode, latents, mask=mask, at=at[0])
    turn_left, place_left = deviation(gauge, latents)
    assert turn_left < 2.5 and place_left < 0.5
    assert abs(gauge.at(at)[0][0] - gauge.at([[0.0]])[0][0] + 24) < 4
    with pytest.raises(UserError, match="1 numbers"):
        fit_gauge(decode, latents, mask=mask, at=[0.0, 1.0])


@pytest.mark.parametrize("how", ["auto", "disc", "mask"])
def test_the_wandering_is_taken_back(latents: NDArray[np.float64], how: str) -> None:
    region: dict[str, Any] = {}
    if how == "disc":
        region["disc_yxr_px"] = (N / 2, N / 2 - 6, 8)
    if how == "mask":
        y, x = np.mgrid[:N, :N]
        region["mask"] = np.hypot(y - N / 2, x - N / 2 + 6) < 8
    gauge = fit_gauge(decode, latents, **region)
    turn_left, place_left = deviation(gauge, latents)
    assert turn_left < 2.5
    assert place_left < 0.5
    if how == "auto":
        _, x, _ = gauge.region["disc_yxr_px"]
        assert x < N / 2  # the body, not the arm
    assert gauge.largest_turn_deg == pytest.approx(24, abs=5)


def test_poses_agree_with_the_body(latents: NDArray[np.float64]) -> None:
    """Poses relative to the wandering frame become poses relative to the body, but for a constant."""
    rng = np.random.default_rng(1)
    true_angle, true_shift = rng.uniform(-180, 180, len(latents)), rng.normal(size=(len(latents), 2))
    turn, move = wander(latents)
    # the map's frame is the body's, turned and moved: so are the poses that a fit finds
    angle, shift = pose.recentre(true_angle, true_shift, turn, move)
    before = metrics.angle_error_deg(np.deg2rad(true_angle), np.deg2rad(angle))
    gauge = fit_gauge(decode, latents)
    held_angle, held_shift = gauge.held_pose(latents, angle, shift)
    after = metrics.angle_error_deg(np.deg2rad(true_angle), np.deg2rad(held_angle))
    assert np.median(before) > 5
    assert after.max() < 2.5
    # drawing the held frame at the held pose puts the image where it is
    draw_angle, draw_shift = gauge.pose_to_draw(latents, held_angle, held_shift)
    np.testing.assert_allclose(pose.wrap_deg(draw_angle - angle), 0, atol=1e-6)
    np.testing.assert_allclose(draw_shift, shift, atol=1e-6)


def test_shifts_are_scaled_to_the_original(latents: NDArray[np.float64]) -> None:
    gauge = fit_gauge(decode, latents, disc_yxr_px=(20, 14, 8))
    zero = np.zeros(len(latents))
    _, once = gauge.held_pose(latents, zero, np.zeros((len(latents), 2)), 1.0)
    _, thrice = gauge.held_pose(latents, zero, np.zeros((len(latents), 2)), np.full(len(latents), 3.0))
    np.testing.assert_allclose(thrice, 3 * once)


def test_two_dimensions() -> None:
    z = np.random.default_rng(0).uniform(-1, 1, (900, 2))
    gauge = fit_gauge(lambda at: decode(at[:, :1]), z, disc_yxr_px=(20, 14, 8))
    turn_left, _ = deviation(gauge, z)
    assert turn_left < 3


def test_it_goes_through_json(latents: NDArray[np.float64]) -> None:
    gauge = fit_gauge(decode, latents, disc_yxr_px=(20, 14, 8))
    back = Gauge.from_json(json.loads(json.dumps(gauge.to_json())))
    np.testing.assert_allclose(back.at(latents)[0], gauge.at(latents)[0])
    with pytest.raises(UserError, match="format 7"):
        Gauge.from_json({**gauge.to_json(), "format_version": 7})


@pytest.mark.parametrize(
    ("region", "words"),
    [
        ({"disc_yxr_px": (50.0, 3.0, 5.0)}, "not inside the decoded image of 40 × 40 px"),
        ({"mask": np.ones((5, 5))}, r"mask has shape \(5, 5\)"),
        ({"mask": np.zeros((N, N))}, "mask is empty"),
    ],
)
def test_a_region_that_is_none_is_refused(
    latents: NDArray[np.float64], region: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fit_gauge(decode, latents, **region)


def test_a_run_keeps_its_gauge_and_its_poses(tmp_path: Path) -> None:
    config = RunConfig(
        model=ClassMapConfig(latent_dim=1, nodes_per_dim=4),
        data=DataSpec(box_px=20, diameter_px=16, n_particles=50),
    )
    model = build_model(config.model, config.data)
    model.decoder.base.data.normal_()  # type: ignore[union-attr, operator]
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    uid = np.arange(50, dtype=np.uint64) + 7
    rng = np.random.default_rng(0)
    found = Latents(
        uid=uid,
        z=rng.uniform(-1, 1, (50, 1)).astype(np.float32),
        z_std=None,
        angle_deg=rng.uniform(-180, 180, 50).astype(np.float32),
        shift_yx_px=np.zeros((50, 2), np.float32),
        extras={},
    )
    saved: dict[str, Any] = {}
    run: Any = SimpleNamespace(
        path=tmp_path,
        config=config,
        session=SimpleNamespace(
            table=pd.DataFrame({"box_px": 40}, index=pd.Index(uid, name="uid")),
            plan=SimpleNamespace(mixed=False, cached_box_px=20),
        ),
        latents=lambda: found,
        gauge=lambda: saved.get("gauge"),
        save_gauge=lambda content: saved.update(gauge=content),
        write_column=lambda name, table, content, replace: saved.update({name: table}),
    )
    gauge = hold_still(run, disc_yxr_px=(10, 10, 6))
    table = saved["pose-held"]
    assert list(table.columns) == ["angle_deg", "shift_y_px", "shift_x_px"]
    assert (table.index.to_numpy() == uid).all()
    assert found.angle_deg is not None and found.shift_yx_px is not None
    angle, shift = gauge.held_pose(found.z, found.angle_deg, found.shift_yx_px, np.full(50, 2.0))
    np.testing.assert_allclose(pose.wrap_deg(table["angle_deg"] - angle), 0, atol=1e-3)
    np.testing.assert_allclose(table[["shift_y_px", "shift_x_px"]], shift, atol=1e-4)
    json.dumps(saved["gauge"])
    assert math.isfinite(saved["gauge"]["largest_turn_deg"])
    with pytest.raises(ValueError, match="one of"):
        hold_still(run)

"""The benchmark of averages scores what it says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd

from particle_explorer.bench.averages import Scene, ml2d, table
from particle_explorer.summing.work import Members

N = 40


def _pictures(turn_deg):
    y, x = np.indices((N, N)) - N // 2
    turn = np.deg2rad(turn_deg)
    arm = np.exp(
        -(
            (x * np.cos(turn) + y * np.sin(turn) - 6) ** 2 / 14
            + (y * np.cos(turn) - x * np.sin(turn)) ** 2 / 5
        )
    )
    return np.exp(-(x**2 + (y + 4) ** 2) / 18.0) + arm


def _scene(hinge):
    grid = np.linspace(0, 70, 8)
    table_ = pd.DataFrame({"true_conformation": np.asarray(hinge, float)})
    return Scene(SimpleNamespace(table=table_), np.stack([_pictures(h) for h in grid]), grid)


def test_quality_is_one_for_the_picture_itself_turned_and_moved():
    scene = _scene([0.0])
    from particle_explorer.spectra import align

    for turn, move in ((0.0, (0.0, 0.0)), (73.0, (1.5, -2.2)), (-160.0, (-1.0, 0.4))):
        picture = align(scene.at(20.0)[None, None], [turn], [move])[0, 0]
        assert scene.quality(picture, 20.0) > 0.998
    assert scene.quality(scene.at(70.0), 0.0) < 0.95


def test_scores_are_those_of_the_members():
    scene = _scene([0.0, 10.0, 60.0, 70.0])
    members = Members(np.arange(4), np.array([0, 0, 1, 1]), np.ones(4))
    found = scene.scored("two", np.stack([scene.at(5.0), scene.at(65.0)]), members, 1.0)
    assert found["hinge_sd_deg"] == 5.0 and found["averages"] == 2 and found["members"] == 2
    assert found["hinge_r"] > 0.95 and found["quality"][1] > 0.999
    assert table([{"snr": "0.5", **found}]).splitlines()[2].startswith("| 0.5 | two | 2 | 2 | 1.000")


def test_discrete_classes_tell_two_pictures_apart():
    random = np.random.default_rng(0)
    clean = np.stack([_pictures(0.0), _pictures(120.0)[:, ::-1]]).astype(np.float32)
    clean -= clean.mean((1, 2), keepdims=True)
    truth = np.arange(120) % 2
    images = 2.5 * clean[truth] + random.normal(size=(120, N, N)).astype(np.float32)
    _, label, _ = ml2d(images.astype(np.float32), 2, iterations=6, n_angles=12, reach=1)
    agree = (label == truth).mean()
    assert max(agree, 1 - agree) > 0.9

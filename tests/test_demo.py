"""The demo reaches a verdict by honest scores, and leaves a session, an export and a report behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from particle_explorer import cli, demo
from particle_explorer.configs import SimulateConfig
from particle_explorer.demo import Outcome, frame_offset, score
from particle_explorer.pose import recentre


def test_the_frame_of_a_model_is_found() -> None:
    rng = np.random.default_rng(0)
    true_angle, true_shift = rng.uniform(-180, 180, 300), rng.normal(0, 2, (300, 2))
    # the model's reference shows the true one turned by 37° and moved by (1.5, -2) px
    angle, shift = recentre(true_angle, true_shift, 37.0, [1.5, -2.0])
    turn, move, residual = frame_offset(true_angle, true_shift, angle, shift)
    assert turn == pytest.approx(37.0, abs=1e-6)
    np.testing.assert_allclose(move, [1.5, -2.0], atol=1e-9)
    np.testing.assert_allclose(residual, 0.0, atol=1e-9)


def test_scores_have_known_answers() -> None:
    rng = np.random.default_rng(0)
    n = 2000
    truth, true_angle = rng.uniform(0, 60, n), rng.uniform(-180, 180, n)
    true_shift = rng.normal(0, 2, (n, 2))
    noise = rng.normal(0, 1, n)
    angle, shift = recentre(true_angle + 5 * noise, true_shift, 20.0, [3.0, 1.0])
    shift = shift + rng.normal(0, 0.4, shift.shape)
    found = score(truth, (-truth / 30)[:, None], true_angle, angle, true_shift, shift)
    assert found["conformation_abs_r"] == pytest.approx(1.0)  # a map may run backwards
    assert found["angle_error_median_deg"] == pytest.approx(5 * 0.6745, rel=0.08)
    assert found["rotation_T"] > 0.98
    # 5° of error turns the move of 3.16 px by up to 0.28 px beside the 0.4 px put in
    assert 0.38 < found["shift_rms_px"] < 0.5
    two = np.stack([np.cos(truth / 20), np.sin(truth / 20)], 1)
    assert score(truth, two, true_angle, None)["conformation_abs_r"] > 0.99
    assert "rotation_T" not in score(truth, two, true_angle, None)
    assert score(truth, rng.normal(size=(n, 2)), true_angle, None)["conformation_abs_r"] < 0.1


def test_the_verdict_is_against_the_limit() -> None:
    outcome = Outcome(0.93, 0.9, 0.96, 0.98, 50.0, {})
    (_, _, needed, conformation), (_, _, _, rotation) = outcome.checks
    assert needed == pytest.approx(0.931) and not conformation and rotation
    better = dataclasses.replace(outcome, conformation_abs_r=0.932)
    assert all(passed for *_, passed in better.checks)
    keys = ["conformation_abs_r", "rotation_T", "rotation_T_held_still", "limit_abs_r", "seconds"]
    assert list(json.loads(json.dumps(better.record)))[:5] == keys


@pytest.mark.parametrize(("r", "status"), [(0.9, 1), (0.95, 0)])
def test_the_exit_status_is_the_verdict(r: float, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(r, 0.9, 0.96, 0.98, 50.0, {})
    monkeypatch.setattr(demo, "demo", lambda out, window: outcome)
    try:
        code = cli.main(["demo"])
    except SystemExit as ended:
        code = ended.code
    assert code == status


def test_the_sample_is_found(sample_dir: Path) -> None:
    assert demo.sample_folder().resolve() == sample_dir.resolve()
    assert 0.9 < json.loads((sample_dir / "truth.json").read_text())["limit_abs_r"] <= 1


def test_no_display_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.platform, "system", lambda: "Linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not demo.has_display()
    monkeypatch.setenv("DISPLAY", ":99")
    assert demo.has_display()


def test_the_whole_chain_on_a_small_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from particle_explorer.simulate import write

    sample = tmp_path / "sample-data"
    config = SimulateConfig(n=240, box_px=32, pixel_size_A=7.0, snr=1.0, junk_fraction=0.05, seed=1)
    write(sample, config)
    (sample / "truth.json").write_text(json.dumps({"limit_abs_r": 0.99, "simulate": config.model_dump()}))
    monkeypatch.setattr(demo, "sample_folder", lambda: sample)
    monkeypatch.setattr(demo, "N_CLUSTERS", 3)
    said: list[str] = []
    outcome = demo.demo(tmp_path / "out", window=False, say=said.append)
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == outcome.record
    assert outcome.conformation_abs_r > 0.8 and outcome.rotation_T_held_still > 0.9
    assert min(outcome.more["averages_r_with_noise_free"]) > 0.9
    hinge = outcome.more["hinge_deg_of_averages"]
    assert hinge in (sorted(hinge), sorted(hinge, reverse=True))  # the averages open the hinge in order
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "self-consistency, upper bound" in report and "http" not in report
    assert report.count("<img") == 20 + 3 * 3
    assert any(line.startswith("pass") for line in said) and said[-1].endswith("report.html")

    from particle_explorer.io.reading import read
    from particle_explorer.session import Session

    session = Session.open(out / "session")
    assert session.classes.names() == ["demo"]
    held = session.newest_finished_run()
    assert held is not None
    exported = read(out / "particles-classified.star").table
    expected = held.column("pose-held").loc[session.table.index]
    turn = np.abs((exported["angle_deg"].to_numpy() - expected["angle_deg"].to_numpy() + 180) % 360 - 180)
    assert turn.max() < 0.01
    assert set(exported["class_id"]) == {1, 2, 3}

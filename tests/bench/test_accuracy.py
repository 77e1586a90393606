"""The benchmark of accuracy scores the right rows against the right truth, and says when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from particle_explorer.bench import accuracy
from particle_explorer.configs import AccuracyConfig, PreprocessConfig, SimulateConfig
from particle_explorer.files import UserError
from particle_explorer.pose import recentre
from particle_explorer.session import Session


@pytest.fixture
def small_hinge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        accuracy, "HINGE", SimulateConfig(n=150, box_px=32, pixel_size_A=7.0, snr=1.0, seed=1)
    )
    monkeypatch.setattr(accuracy, "QUICK_N", 150)
    monkeypatch.setattr(accuracy.simulate, "limit", lambda simulation, rows: {"limit_abs_r": 0.99})


def test_truth_scores_as_truth_whatever_the_frame(tmp_path: Path, small_hinge: None) -> None:
    stack = accuracy.hinge(tmp_path / "hinge")
    session = Session.create(tmp_path / "session", stack.particles, PreprocessConfig())
    table = session.table
    assert set(table["split"]) == {0, 1} and table["split"].mean() == pytest.approx(0.2)
    angle, shift = recentre(
        table["true_angle_deg"], table[["true_shift_y_px", "true_shift_x_px"]].to_numpy(), 30.0, [1.0, 2.0]
    )
    scored = (table["split"] == 1) & (table["true_junk"] == 0)
    # what is not scored may be anything
    z = np.where(scored, -table["true_hinge_deg"], 999.0)
    angle = np.where(scored, angle, 0.0)
    found = accuracy.scored(session, z, angle, shift)
    assert found["conformation_abs_r"] == pytest.approx(1.0)
    assert found["rotation_T"] == pytest.approx(1.0)
    assert found["angle_error_median_deg"] < 1e-3 and found["shift_rms_px"] < 1e-6


def test_a_small_benchmark_runs_through(tmp_path: Path, small_hinge: None) -> None:
    said: list[str] = []
    config = AccuracyConfig(stacks="hinge", models="spatial-vae", vae_epochs=1, quick=True)
    report = accuracy.run(config, tmp_path / "accuracy.json", said.append)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == report
    (result,) = report["results"]
    assert {*accuracy.SHOWN, "stack", "model", "seed", "limit_abs_r"} <= set(result)
    assert np.isfinite([result[name] for name in accuracy.SHOWN]).all()
    assert result["seconds"] > 0 and report["machine"]["cores"] >= 1
    assert any(line.strip().startswith("| stack | model |") for line in said)


def test_the_table_shows_the_spread_of_seeds() -> None:
    base = {"stack": "s", "model": "m", "limit_abs_r": 0.9, "seconds": 10.0}
    results = [base | {"seed": i, "conformation_abs_r": r} for i, r in enumerate((0.8, 0.86, 0.84))]
    line = accuracy.table(results).splitlines()[-1]
    assert line.startswith("| s | m | 3 | 0.900 | 0.840 (0.800–0.860) |")
    assert "| 10 (10–10) |" in line


def test_without_the_data_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PARTICLE_EXPLORER_DATA", raising=False)
    with pytest.raises(UserError, match="--stacks hinge"):
        accuracy.data_folder("")
    with pytest.raises(UserError, match="5hdb_sim"):
        accuracy.integrin(accuracy.data_folder(str(tmp_path)), "0.5")


def test_the_integrin_stack_is_read_with_its_truth(data_dir: Path) -> None:
    stack = accuracy.integrin(data_dir, "0.5", 500)
    table = stack.particles.table
    assert len(table) == 500 and (table["split"] == 1).sum() == 100
    images = stack.particles.images.read(np.arange(500))[:, 0]
    # moved back by the truth, the images of one conformation agree with the noise-free picture of it
    from particle_explorer.averaging import align

    truth = np.load(data_dir / "5hdb_sim" / "truth.npz")
    shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy()
    back = align(images[:, None], table["true_angle_deg"], shift)[:, 0]
    near = np.abs(table["true_conformation"] - truth["template_hinge_deg"][9]) < 8
    assert np.corrcoef(back[near].mean(0).ravel(), truth["templates"][9].ravel())[0, 1] > 0.95

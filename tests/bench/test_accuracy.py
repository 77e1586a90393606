"""The benchmark of accuracy scores the right rows against the right truth, and says when it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from particle_explorer import training
from particle_explorer.bench import accuracy, stacks
from particle_explorer.configs import AccuracyConfig, PreprocessConfig, SimulateConfig, TrainConfig
from particle_explorer.files import UserError
from particle_explorer.latents import Latents
from particle_explorer.pose import recentre
from particle_explorer.session import Run, Session


@pytest.fixture
def small_hinge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "HINGE", SimulateConfig(n=150, box_px=32, pixel_size_A=7.0, snr=1.0, seed=1))
    monkeypatch.setattr(stacks, "SMOKE_N", 150)
    monkeypatch.setattr(stacks.simulate, "limit", lambda simulation, rows: {"limit_abs_r": 0.99})


def test_truth_scores_as_truth_whatever_the_frame(tmp_path: Path, small_hinge: None) -> None:
    stack = stacks.hinge(tmp_path / "hinge", "1.0")
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


def test_a_small_benchmark_runs_through(
    tmp_path: Path, small_hinge: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    config = AccuracyConfig(
        stacks="hinge-0.1",
        models="spatial-vae",
        epochs=1,
        protocol="smoke",
        first_seed=7,
        precision="float32",
    )
    trained: list[TrainConfig] = []
    fit = training.fit

    def told(run: Run) -> Iterator[training.Progress]:
        trained.append(run.config.train)
        return fit(run)

    monkeypatch.setattr(training, "fit", told)
    report = accuracy.run(config, tmp_path / "accuracy.json", said.append)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == report
    (result,) = report["results"]
    motion = {"conformation_abs_r", "rotation_T", "rotation_T_held_still", "shift_rms_px", "seconds"}
    assert {*motion, "stack", "model", "seed", "limit_abs_r"} <= set(result)
    assert [(one.seed, one.precision, one.n_epochs) for one in trained] == [(7, "float32", 1)]
    assert result["seed"] == 7
    assert np.isfinite([result[name] for name in motion]).all()
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
    with pytest.raises(UserError, match="choose --stacks hinge"):
        stacks.data_folder("")
    with pytest.raises(UserError, match="5hdb_sim"):
        stacks.integrin(stacks.data_folder(str(tmp_path)), "0.5")


def test_the_integrin_stack_is_read_with_its_truth(data_dir: Path) -> None:
    stack = stacks.integrin(data_dir, "0.5", 500)
    table = stack.particles.table
    assert len(table) == 500 and (table["split"] == 1).sum() == 100
    images = stack.particles.images.read(np.arange(500))[:, 0]
    # moved back by the truth, the images of one conformation agree with the noise-free picture of it
    from particle_explorer.spectra import align

    truth = np.load(data_dir / "5hdb_sim" / "truth.npz")
    shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy()
    back = align(images[:, None], table["true_angle_deg"], shift)[:, 0]
    near = np.abs(table["true_conformation"] - truth["template_hinge_deg"][9]) < 8
    assert np.corrcoef(back[near].mean(0).ravel(), truth["templates"][9].ravel())[0, 1] > 0.95


@pytest.fixture
def few_digits(tmp_path: Path) -> Path:
    """A folder of large data whose digits are two letters, each brighter or darker."""
    letters = np.zeros((2, 28, 28), np.float32)
    letters[0, 6:22, 9:13] = letters[0, 18:22, 9:20] = 255
    letters[1, 6:22, 9:13] = letters[1, 6:10, 9:20] = letters[1, 12:16, 9:17] = 255
    label = np.arange(260) % 2
    grey = np.random.default_rng(0).uniform(0.7, 1, 260)
    images = (letters[label] * grey[:, None, None]).astype(np.uint8)
    (tmp_path / "mnist").mkdir()
    np.savez(
        tmp_path / "mnist" / "mnist.npz",
        x_train=images[:200], y_train=label[:200], x_test=images[200:], y_test=label[200:],
    )  # fmt: skip
    return tmp_path


def brought_back(stack: stacks.Stack) -> np.ndarray:
    from particle_explorer.spectra import align

    table = stack.particles.table
    images = stack.particles.images.read(np.arange(len(table)))
    shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy()
    return np.asarray(align(images, table["true_angle_deg"], shift)[:, 0])


@pytest.mark.parametrize("name", ["mnist-n", "mnist-u", "mnist-multi"])
def test_digits_are_where_the_truth_says(few_digits: Path, name: str) -> None:
    config = AccuracyConfig(data=str(few_digits), n_particles=75)
    stack = stacks.make(name, config, few_digits)
    assert stack.upright is not None
    table = stack.particles.table
    test = np.flatnonzero(table["split"] == 1)
    assert len(test) == 15 == len(stack.upright) and len(table) == 75
    inside = np.hypot(*(np.indices((50, 50)) - 25)) < (14 if name == "mnist-multi" else 10)
    away = table[["true_shift_y_px", "true_shift_x_px"]].abs().to_numpy().max(1)[test] < 8
    back = brought_back(stack)[test]
    r = [np.corrcoef(a[inside], b[inside])[0, 1] for a, b in zip(back, stack.upright, strict=True)]
    # in a window a neighbour may cover a corner
    assert np.median(np.asarray(r)[away]) > (0.9 if name == "mnist-multi" else 0.97)
    spread = table["true_angle_deg"].std()
    assert 35 < spread < 55 if name == "mnist-n" else 85 < spread < 125


def test_posed_digits_carry_the_truth(few_digits: Path) -> None:
    stack = stacks.make("mnist-posed", AccuracyConfig(data=str(few_digits), n_particles=75), few_digits)
    table = stack.particles.table
    assert np.array_equal(table["angle_deg"], table["true_angle_deg"]) and table["true_angle_deg"].std() > 85
    assert stack.upright is not None and stack.upright.shape == (15, 28, 28)
    inside = np.hypot(*(np.indices((28, 28)) - 14)) < 10
    for a, b in zip(brought_back(stack)[table["split"] == 1], stack.upright, strict=True):
        assert np.corrcoef(a[inside], b[inside])[0, 1] > 0.97


def test_digits_of_the_published_setting_lie_upright_and_are_scored_turned(
    few_digits: Path, tmp_path: Path
) -> None:
    config = AccuracyConfig(data=str(few_digits), n_particles=75, epochs=1)
    stack = stacks.make("mnist-posed-90", config, few_digits)
    table, upright = stack.particles.table, stack.upright
    test = (table["split"] == 1).to_numpy()
    assert np.array_equal(table["angle_deg"], table["true_angle_deg"])
    assert (table["angle_deg"][~test] % 360 == 0).all()
    assert 35 < table["angle_deg"][test].std() and table["angle_deg"][test].abs().max() < 90
    assert upright is not None and len(upright) == test.sum() == 15
    inside = np.hypot(*(np.indices((28, 28)) - 14)) < 10
    for a, b in zip(brought_back(stack)[test], upright, strict=True):
        assert np.corrcoef(a[inside], b[inside])[0, 1] > 0.97
    settings = accuracy._settings("rotation-ae-3d", stack, config)
    assert settings.poses == "file" and settings.turn_range_deg == 90
    session = Session.create(tmp_path / "session", stack.particles, stack.preprocess)
    result = accuracy._one(session, stack, settings, 0, config)
    # turned further than it was taught it would be asked what it cannot know
    assert 0 < result["mse_average"] < result["mse_worst"] and "rotation_rmse_160_deg" not in result


def test_what_a_taught_autoencoder_draws_is_compared_as_it_is(few_digits: Path, tmp_path: Path) -> None:
    config = AccuracyConfig(data=str(few_digits), n_particles=75)
    stack = stacks.make("mnist-posed", config, few_digits)
    session = Session.create(tmp_path / "session", stack.particles, stack.preprocess)
    settings = accuracy._settings("rotation-ae-3d", stack, config)
    assert settings.poses == "file" and settings.pixels == "sigmoid"
    model = accuracy.build_model(settings, session.data_spec())
    model.supervised.fill_(True)
    random = np.random.default_rng(0)
    z = random.normal(0, 1, (75, 3)).astype(np.float32)
    angle = random.uniform(-180, 180, 75).astype(np.float32)
    rows = np.flatnonzero(session.table["split"] == 1)
    latents = Latents(np.arange(75, dtype=np.uint64), z, angle_deg=angle)
    drawn = accuracy._drawn_upright(model, session, latents, rows)
    plain = model.decode(torch.from_numpy(z[rows]))[:, 0].numpy()
    assert np.allclose(drawn, plain, atol=0.02)
    model.supervised.fill_(False)
    assert not np.allclose(accuracy._drawn_upright(model, session, latents, rows), plain, atol=0.02)


def test_shapes_are_where_the_truth_says() -> None:
    stack = stacks.xyrcs(60)
    table = stack.particles.table
    back = brought_back(stack)
    back /= back[:, 40:45, 40:45].mean((1, 2), keepdims=True)
    for label, fold in enumerate(stacks.XYRCS_FOLDS):
        of_kind = back[table["true_label"] == label]
        assert np.corrcoef(of_kind.reshape(len(of_kind), -1)).min() > 0.95
        assert of_kind.sum((1, 2)) == pytest.approx(np.pi * 144, rel=0.05)
        assert set(table["true_fold"][table["true_label"] == label]) == {fold}


@pytest.mark.parametrize("kind", list(accuracy.kinds()))
def test_every_kind_of_model_takes_the_settings_of_a_stack(kind: str) -> None:
    for stack in (stacks.xyrcs(20), stacks.Stack("motion", stacks.xyrcs(20).particles)):
        model = accuracy._settings(f"{kind}-3d" if kind != "class-map" else kind, stack, AccuracyConfig())
        assert model.kind == kind and model.latent_dim == (2 if kind == "class-map" else 3)


def test_dsprites_are_where_the_truth_says(data_dir: Path) -> None:
    stack = stacks.dsprites(data_dir, 400)
    table = stack.particles.table
    back = brought_back(stack)
    for label in range(3):
        of_kind = back[table["true_label"] == label]
        large = of_kind[of_kind.sum((1, 2)) > np.quantile(of_kind.sum((1, 2)), 0.8)]
        assert np.corrcoef(large.reshape(len(large), -1)).min() > 0.9


def test_labels_score_as_they_should(few_digits: Path) -> None:
    table = stacks.mnist(few_digits, "mnist-u", 150).particles.table
    label = table["true_label"].to_numpy()
    uid = np.arange(len(table), dtype=np.uint64)
    z = np.column_stack([label, np.random.default_rng(0).normal(0, 0.01, len(label))]).astype(np.float32)
    angle = (table["true_angle_deg"] + np.where(label == 1, 50, 20)).to_numpy(np.float32)
    shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy(np.float32) + 3
    found = accuracy.scored_labels(table, Latents(uid, z, angle_deg=angle, shift_yx_px=shift))
    assert found["clustering_ward"] == found["clustering_kmeans"] == 1
    # each label has its own zero, which counts against the correlation but not against the residual
    assert found["angle_residual_rms_deg"] < 1e-3 and found["angle_residual_local_deg"] < 1e-3
    assert 0.8 < found["rotation_T"] < 0.98
    assert found["shift_r_y"] == pytest.approx(1) and found["shift_r_x"] == pytest.approx(1)
    without = accuracy.scored_labels(table, Latents(uid, np.random.default_rng(0).permutation(z)))
    assert without["clustering_ward"] < 0.75 and "rotation_T" not in without


def test_a_small_benchmark_of_digits_runs_through(few_digits: Path) -> None:
    config = AccuracyConfig(
        stacks="mnist-u", models="class-map", protocol="smoke", n_particles=150, data=str(few_digits),
        settings='{"nodes_per_dim": 4, "angle_step_deg": 30, "shift_range_px": 4}',
    )  # fmt: skip
    (result,) = accuracy.run(config, say=lambda text: None)["results"]
    assert 0.5 <= result["clustering_ward"] <= 1 and 0 < result["mse_average"] <= result["mse_worst"] < 1
    assert 0 < result["rotation_rmse_160_deg"] < 120 and -1 <= result["rotation_T_calibrated"] <= 1


def test_the_beta_vae_is_the_vae_with_other_settings() -> None:
    stack = stacks.xyrcs(40)
    settings = [accuracy._settings(name, stack, AccuracyConfig(models=name)) for name in ("vae", "beta-vae")]
    assert [(one.kind, one.beta, one.latent_dim) for one in settings] == [("vae", 1, 2), ("vae", 4, 4)]
    assert "beta-vae" in accuracy._models(AccuracyConfig())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"stacks": "hinge-7"}, "integrin-0.5"),
        ({"models": "no-such"}, "class-map"),
        ({"models": "class-map", "stacks": "xyrcs", "settings": "{"}, "JSON"),
        ({"models": "class-map", "stacks": "xyrcs", "settings": '{"angle_step_deg": 99}'}, "angle_step_deg"),
    ],
)
def test_what_cannot_be_measured_is_said(wrong: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        accuracy.run(AccuracyConfig(n_particles=50, **wrong), say=lambda text: None)


def test_what_lies_in_a_digit_is_no_shift() -> None:
    """Of a model whose frame lies elsewhere in each digit, calibrated shifts are the true ones."""
    random = np.random.default_rng(0)
    n = 40
    angle, shift = random.uniform(-180, 180, n), random.normal(0, 5, (n, 2))
    own_angle, own_shift = random.uniform(-180, 180, n), random.normal(0, 3, (n, 2))
    turn = np.deg2rad(angle)
    y, x = own_shift.T
    moved = np.column_stack([np.sin(turn) * x + np.cos(turn) * y, np.cos(turn) * x - np.sin(turn) * y])
    table = pd.DataFrame(
        {"true_angle_deg": angle, "true_shift_y_px": shift[:, 0], "true_shift_x_px": shift[:, 1]}
    )

    def latents(angle_deg, shift_yx_px) -> Latents:
        uid = np.arange(n, dtype=np.uint64)
        return Latents(uid, np.zeros((n, 1), np.float32), None, angle_deg, shift_yx_px)

    found = accuracy.calibrated(
        table, latents(angle + own_angle, shift + moved), latents(own_angle, own_shift)
    )
    assert found["shift_r_y_calibrated"] == pytest.approx(1) and found[
        "shift_r_x_calibrated"
    ] == pytest.approx(1)
    assert found["rotation_T_calibrated"] == pytest.approx(1)

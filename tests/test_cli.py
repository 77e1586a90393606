"""The command line: every command from end to end, and bad input as one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from particle_explorer.cli import BENCH, COMMANDS, main, parse
from particle_explorer.configs import ClassMapConfig, Config, SpatialVAEConfig
from particle_explorer.files import UserError
from particle_explorer.io.mrc import MrcFile
from particle_explorer.io.reading import read
from particle_explorer.io.star import StarFile
from particle_explorer.session import Run, Session

TINY = "--model.kind spatial-vae --model.hidden 8 --model.layers 1 --train.n-epochs 1 --device cpu".split()


@pytest.fixture
def say(capsys):
    """Run a command line that must go well; returns the lines of its standard output."""

    def run(*words: object) -> list[str]:
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refuse(capsys):
    """Run a command line that must be refused; returns its sentence."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        sentence = captured.err.splitlines()[-1]
        assert sentence.startswith("particle-explorer: ") and "Traceback" not in captured.err
        return sentence

    return run


@pytest.fixture
def trained(tiny_session, say) -> Run:
    """A run of the smallest spatial-VAE."""
    return Run.open(Path(say("train", tiny_session.path, *TINY)[-1]))


# ---------------------------------------------------------------------- the chain


def test_from_a_stack_to_a_star_file(tiny_stack, tmp_path, say):
    path = tmp_path / "session"
    assert say("import", tiny_stack, "--session", path, "--preprocess.box-px", 24)[-1] == str(path)
    session = Session.open(path)
    assert session.images.shape == (120, 1, 24, 24)
    run = Run.open(Path(say("train", path, *TINY, "--model.latent-dim", 3, "--where", "source_row < 60")[-1]))
    assert run.config.where == "source_row < 60" and run.latents().z.shape == (120, 3)
    assert say("embed", run.path, "--method", "pca") == ["pca"]
    assert say("cluster", run.path, "--n-clusters", 4) == ["cluster-kmeans"]
    assert say("cluster", path, "--n-clusters", 5) == [
        "cluster-kmeans-2"
    ]  # a session: its newest finished run
    assert say("cluster", run.path, "--method", "ward", "--n-clusters", 3, "--on", "pca") == ["cluster-ward"]
    assert say("regroup", run.path, "--by", "cluster-ward", "--merge", "1,2") == ["cluster-regrouped"]
    assert say("regroup", run.path, "--by", "cluster-regrouped", "--names", "1=open") == ["cluster-named"]
    merged, named = run.column("cluster-regrouped").iloc[:, 0], run.column("cluster-named").iloc[:, 0]
    assert set(merged) == {1, 2} and set(named) == {"open", "group 2"}
    assert ((named == "open") == (merged == 1)).all()
    averages = Path(say("average", run.path, "--by", "cluster-kmeans")[-1])
    assert averages == path / "classes" / "cluster-kmeans.mrcs" and MrcFile(averages).shape == (1, 32, 32)
    stored = session.classes.read("cluster-kmeans")
    assert [one["label"] for one in stored.classes] == ["1", "2", "3", "4"]
    assert sum(one["n"] for one in stored.classes) == 120 and stored.how["run"] == run.name
    out = tmp_path / "out.star"
    say("export", path, "--out", out, "--averages", tmp_path / "out.mrcs", "--classes", "cluster-kmeans-2")
    exported = read(out, project_dir=tiny_stack.parent)
    latents = run.latents()
    assert exported.table["class_id"].tolist() == run.column("cluster-kmeans-2")["cluster-kmeans-2"].tolist()
    turn = exported.table["angle_deg"].to_numpy() - latents.angle_deg
    np.testing.assert_allclose((turn + 180) % 360 - 180, 0, atol=1e-3)
    shift = exported.table[["shift_y_px", "shift_x_px"]].to_numpy()
    np.testing.assert_allclose(shift, latents.shift_yx_px, atol=1e-3)
    assert MrcFile(tmp_path / "out.mrcs").n_images == 5
    assert say("export-classes", path, "--out", tmp_path / "c") == [str(tmp_path / "c")]
    assert len(read(tmp_path / "c" / "run_it000_data.star", project_dir=tiny_stack.parent)) == 120


def test_ways_through_the_map_are_drawn_and_averaged(trained, tmp_path, say, refuse):
    session, m = trained.session, trained.session.images.shape[-1]
    drawn, beside = map(Path, say("traverse", trained.path, "--n-frames", 5, "--n-each", 4))
    assert drawn.parent == session.path / "paths" and MrcFile(drawn).shape == (1, m, m)
    assert MrcFile(drawn).n_images == MrcFile(beside).n_images == 5
    record = json.loads(drawn.with_suffix(".json").read_text())
    assert np.shape(record["positions"]) == (5, 2) and max(record["n_particles"]) <= 4
    for curve, n in zip(record["frc"], record["n_particles"], strict=True):
        assert (curve is None) == (n == 0)
        assert curve is None or (len(curve) == m // 2 + 1 and np.abs(curve).max() <= 1)
    again = Path(say("traverse", trained.path, "--n-frames", 5, "--n-each", 0)[0])
    assert again.stem == f"{drawn.stem}-2"
    uid = trained.latents().uid
    np.save(tmp_path / "curve.npy", trained.latents().z[[3, 60, 9]])
    for words in (
        ("--along", "particles", "--start", uid[3], "--end", uid[60]),
        ("--along", "curve", "--positions", tmp_path / "curve.npy"),
        ("--along", "grid"),
        ("--along", "prior"),
    ):
        out = tmp_path / words[1]
        files = say("traverse", trained.path, *words, "--out", out, "--n-frames", 4, "--formats", "gif,png")
        assert files == [f"{out}.gif", f"{out}.png"] and all(
            Path(file).stat().st_size > 200 for file in files
        )
    ends = np.array(json.loads((tmp_path / "particles.json").read_text())["positions"])[[0, -1]]
    np.testing.assert_allclose(ends, trained.latents().z[[3, 60]], atol=1e-5)
    for words, sentence in (
        (("--along", "curve"), "needs --positions"),
        (("--along", "straight", "--start", "3"), "needs both --start UID and --end UID"),
        (("--along", "straight", "--start", "3", "--end", "x"), "has no particle of that uid"),
        (("--along", "dimension", "--number", "3"), "there is no dimension 3"),
        (("--formats", "avi"), "--formats avi: choose from gif"),
        (("--along", "grid", "--out", tmp_path / "grid", "--formats", "gif"), "exists already"),
        (("--held",), "holds nothing still yet"),
    ):
        assert sentence in refuse("traverse", trained.path, *words), words


def test_a_selection_is_averaged_and_exported_alone(trained, tiny_stack, tmp_path, say, refuse):
    session = trained.session
    mask = np.arange(120) % 7 == 0
    session.selections.save("good", mask, "test")
    say("average", trained.path, "--selection", "good", "--average.ctf", "none")
    stored = session.classes.read("good")
    assert [one["n"] for one in stored.classes] == [mask.sum()] and stored.how["selection"] == "good"
    members = stored.members.loc[session.uid[mask]]
    assert (members["weight"] == 1).all() and members[["angle_deg", "shift_y_px"]].notna().all(axis=None)
    say("average", trained.path, "--selection", "good", "--average.ctf", "none", "--device", "torch-cpu")
    by_torch = session.classes.read("good-2")
    np.testing.assert_allclose(by_torch.images, stored.images, atol=1e-4)
    assert by_torch.classes[0]["settings"]["computed_on"] == "torch on the CPU"
    say("amend", session.path, "--averages", "good-2", "--rename", "good=all", "--device", "cpu")
    for command in ("average", "average-independent"):
        assert "--device gpu is not known" in refuse(command, trained.path, "--device", "gpu")
    assert "--device gpu is not known" in refuse("amend", session.path, "--device", "gpu")
    say("average", trained.path, "--by", "grid", "--cells", 3, "--weights", "posterior")
    grid = session.classes.read("grid")
    assert len(grid.how["positions"]) == len(grid.classes) and (grid.members["weight"] > 0).all()
    say("traverse", trained.path, "--n-frames", 4, "--out", tmp_path / "way")
    way = ("--by", "near", "--positions", tmp_path / "way.json", "--n-near", 9, "--weights", "distance")
    say("average", trained.path, *way)
    assert [one["n"] for one in session.classes.read("near").classes] == [9] * 4
    few = ("--selection", "good", "--refine.n-iterations", 1)
    assert say("refine", trained.path, *few) == ["pose-refined"]
    assert say("refine", trained.path, *few, "--against", "decoded") == ["pose-refined"]
    refined = trained.column("pose-refined")
    assert np.isfinite(refined["angle_deg"].to_numpy()[mask]).all() and refined["angle_deg"].isna().sum() > 0
    assert trained.column_record("pose-refined")["config"]["against"] == "decoded"
    say("average", trained.path, "--selection", "good", "--poses", "refined")
    by_refined = session.classes.read("good-4").members
    np.testing.assert_allclose(by_refined["angle_deg"], refined.loc[by_refined.index, "angle_deg"])
    say("average", trained.path, "--selection", "good", "--noise-control")
    [one] = session.classes.read("good-5").classes
    assert one["control_n"] == mask.sum() and len(one["control_frc"]) == len(one["frc"])
    assert np.isfinite(one["control_frc"]).all() and "believable_radius_A" in one
    assert "carries no angles" in refuse("average", trained.path, "--selection", "good", "--poses", "file")
    assert "needs --positions" in refuse("average", trained.path, "--by", "near")
    assert "cannot be read" in refuse(
        "average", trained.path, "--by", "near", "--positions", tmp_path / "no.json"
    )
    say("export", session.path, "--out", tmp_path / "good.star", "--selection", "good", "--run", 1)
    exported = read(tmp_path / "good.star", project_dir=tiny_stack.parent)
    assert exported.table["rlnImageName"].tolist() == session.table["rlnImageName"][mask].tolist()
    assert "there are: good" in refuse(
        "export", session.path, "--out", tmp_path / "a.star", "--selection", "bad"
    )


def test_independent_halves_have_a_model_each_and_alone_may_speak_of_a_resolution(
    trained, tmp_path, say, refuse
):
    session = trained.session
    say("average-independent", trained.path, "--classes", 2)
    stored = session.classes.read("independent")
    assert all(one["halves_independent"] for one in stored.classes)
    runs = [session.run(name) for name in stored.how["runs"]]
    first, second = (session.selections.mask(run.config.selection) for run in runs)
    assert (first ^ second).all() and runs[0].config.model == trained.config.model
    members = stored.members
    row = session.table.index.get_indexer(members.index)
    poses = [run.latents().table for run in runs]
    np.testing.assert_allclose(  # the first half stays where its own model put it
        members["angle_deg"].to_numpy()[first[row]],
        poses[0].loc[members.index[first[row]], "angle_deg"],
        atol=1e-4,
    )
    count = len(session.runs())
    say("average-independent", trained.path, "--classes", 2)
    assert len(session.runs()) == count, "models that are there are not fitted again"
    say("cluster", trained.path, "--n-clusters", 3)
    say("average", trained.path)
    for name, known in (("independent", True), ("cluster-kmeans", False)):
        say("export-classes", session.path, "--averages", name, "--out", tmp_path / name)
        star = StarFile(tmp_path / name / "run_it000_model.star")
        written = star.table(star.block("model_classes"))["rlnEstimatedResolution"].astype(float)
        found = [one["resolution_A"] for one in session.classes.read(name).classes]
        expected = [999.0 if value is None else value for value in found]
        np.testing.assert_allclose(written, expected, atol=0.01)
        assert known or found == [None] * 3
    say("export", session.path, "--out", tmp_path / "members.star", "--members", "independent")
    written = StarFile(tmp_path / "members.star")
    table = written.table(next(block for block in written.blocks if "rlnImageName" in block.labels))
    order = session.table.sort_values("source_row").index
    kept = members.loc[order[order.isin(members.index)]]
    assert table["rlnClassNumber"].astype(int).tolist() == (kept["average"] + 1).tolist()
    apart = (table["rlnAnglePsi"].astype(float) + kept["angle_deg"].to_numpy() + 180) % 360 - 180
    np.testing.assert_allclose(apart, 0, atol=1e-3)
    assert "leave out --selection" in refuse(
        "export", session.path, "--out", tmp_path / "x.star", "--members", "independent", "--classes", "y"
    )
    lines = say("compare-classes", session.path, "--averages", "cluster-kmeans", "--beside", "cluster-kmeans")
    assert len(lines) == 5 and "100% share one" in lines[-1] and "index 1.000" in lines[-1]
    assert "there are: " in refuse(
        "compare-classes", session.path, "--averages", "independent", "--beside", "no"
    )


def test_what_another_seed_keeps_together_is_a_column(trained, say):
    say("cluster", trained.path, "--n-clusters", 3)
    assert say("reproduce", trained.path, "--seeds", 1) == ["stays-together"]
    share = trained.column("stays-together")["stays-together"]
    assert share.between(0, 1).all()
    record = trained.column_record("stays-together")["config"]
    again = trained.session.run(record["found"][0]["run"])
    assert again.config.train.seed == trained.config.train.seed + 1 and again.config.parent == trained.name
    from particle_explorer.membership import staying

    label, other = np.array([0, 0, 0, 1, 1, -1]), np.array([5, 5, 6, 7, -1, 5])
    np.testing.assert_array_equal(staying(label, other), [0.5, 0.5, 0, np.nan, np.nan, np.nan])


def test_all_files_of_a_run_have_the_same_permissions(trained):
    modes = {path.name: path.stat().st_mode for path in trained.path.iterdir() if path.is_file()}
    assert "model.safetensors" in modes and len(set(modes.values())) == 1, modes


def test_a_given_pixel_size_gives_an_export_in_angstrom(tmp_path, say):
    images = np.random.default_rng(0).normal(size=(8, 16, 16)).astype(np.float32)
    np.save(tmp_path / "bare.npy", images)
    size = ("--preprocess.pixel-size-A", "2.5")
    path = Path(say("import", tmp_path / "bare.npy", "--session", tmp_path / "s", *size)[-1])
    say("train", path, *TINY)
    say("export", path, "--out", tmp_path / "out.star")
    text = (tmp_path / "out.star").read_text()
    assert "_rlnImagePixelSize" in text and "_rlnOriginXAngst" in text
    latents = Session.open(path).newest_finished_run().latents()
    found = read(tmp_path / "out.star").table
    assert found["pixel_size_A"].eq(2.5).all()
    shift = found[["shift_y_px", "shift_x_px"]].to_numpy()
    np.testing.assert_allclose(shift, latents.shift_yx_px, atol=1e-5)


def test_an_edited_star_file_keeps_its_own_pixel_size(tiny_stack, tmp_path, say):
    """Its optics table stays, so its origins in Å must fit that and not the number given."""
    path = Path(
        say("import", tiny_stack, "--session", tmp_path / "s", "--preprocess.pixel-size-A", "6.5")[-1]
    )
    session = Session.open(path)
    assert session.plan.pixel_size_A == 6.5
    say("train", path, *TINY)
    say("export", path, "--out", tmp_path / "out.star")
    found = read(tmp_path / "out.star", project_dir=tiny_stack.parent).table
    latents = session.newest_finished_run().latents()
    shift = found[["shift_y_px", "shift_x_px"]].to_numpy()
    np.testing.assert_allclose(shift, latents.shift_yx_px, atol=1e-5)


def test_a_session_without_runs_exports_its_particles(tiny_session, tiny_stack, tmp_path, say):
    say("export", tiny_session.path, "--out", tmp_path / "same.star", "--classes", "true_junk")
    table = read(tmp_path / "same.star", project_dir=tiny_stack.parent).table
    assert (table["class_id"] == tiny_session.table["true_junk"].to_numpy() + 1).all()


def test_a_cryosparc_source_goes_back_to_cryosparc(tiny_stack, tmp_path, say, capsys):
    """Out of a `.cs` file, through a session and a model, into a `.cs` file with its result group."""
    path = Path(say("import", tiny_stack.with_suffix(".cs"), "--session", tmp_path / "s")[-1])
    say("train", path, *TINY)
    say("cluster", path, "--n-clusters", 3)
    session = Session.open(path)
    session.selections.save("half", np.arange(120) % 2 == 0)
    out = tmp_path / "half.cs"
    assert main(["export", str(path), "--out", str(out), "--selection", "half", "--latents"]) == 0
    assert "checked: 60 particles averaged again from what was written" in capsys.readouterr().err
    run = session.newest_finished_run()
    latents, found = run.latents(), read(out, project_dir=tiny_stack.parent).table
    assert found.index.tolist() == session.uid[::2].tolist()
    turn = found["angle_deg"].to_numpy() - latents.angle_deg[::2]
    np.testing.assert_allclose((turn + 180) % 360 - 180, 0, atol=1e-3)
    np.testing.assert_allclose(found["explorer/z_0"], latents.z[::2, 0], rtol=1e-6)
    assert found["class_id"].tolist() == run.column("cluster-kmeans")["cluster-kmeans"][::2].tolist()
    assert "num_items: 60" in out.with_suffix(".csg").read_text()


def test_tables_and_lists_of_rows(trained, tiny_stack, tmp_path, say, refuse):
    session, latents = trained.session, trained.latents()
    mask = np.arange(120) % 3 == 1
    session.selections.save("third", mask)
    words = ("export", session.path, "--selection", "third", "--out")
    say(*words, tmp_path / "rows.txt")
    assert np.loadtxt(tmp_path / "rows.txt", int).tolist() == np.flatnonzero(mask).tolist()
    say(*words, tmp_path / "t.csv")
    say(*words, tmp_path / "t.parquet")
    tables = (
        pd.read_csv(tmp_path / "t.csv", dtype={"uid": np.uint64}).set_index("uid"),
        pd.read_parquet(tmp_path / "t.parquet"),
    )
    for table in tables:
        assert table.index.tolist() == session.uid[mask].tolist()
        np.testing.assert_allclose(table["z_0"], latents.z[mask, 0], rtol=1e-5)
        np.testing.assert_allclose(table["shift_x_px"], latents.shift_yx_px[mask, 1], rtol=1e-5)
        assert table["rlnImageName"].tolist() == session.table["rlnImageName"][mask].tolist()
    say(*words, tmp_path / "z.star", "--latents", "--poses", "none")
    found = read(tmp_path / "z.star", project_dir=tiny_stack.parent).table
    np.testing.assert_allclose(found["explorerZ0"], latents.z[mask, 0], rtol=1e-5)
    assert not {"rlnAnglePsi", "rlnOriginXAngst"} & set(found)
    assert "none of the endings" in refuse(*words, tmp_path / "t.xlsx")


def test_an_export_elsewhere_says_where_its_images_are(trained, tmp_path, capsys):
    """Names stay relative to the project; nothing is said where they can be found."""
    words = ["export", str(trained.session.path), "--out"]
    assert main([*words, str(tmp_path / "far.star")]) == 0
    told = capsys.readouterr().err
    assert "lead nowhere from" in told and "run RELION in" in told


def test_a_wrong_pose_in_an_export_is_noticed(trained, tmp_path, monkeypatch):
    """The sign of psi turned in the writer: what was written is not what was meant."""
    from particle_explorer.io import relion

    right = relion.to_relion
    monkeypatch.setattr(relion, "to_relion", lambda *given: (-right(*given)[0], *right(*given)[1:]))
    with pytest.raises(RuntimeError, match="120 of the written poses are not those that were meant"):
        main(["export", str(trained.session.path), "--out", str(tmp_path / "wrong.star")])
    assert not (tmp_path / "wrong.star").exists()


def test_an_export_never_overwrites_what_matters(tiny_session, tiny_stack, tmp_path, say, refuse):
    out = tmp_path / "out.star"
    out.write_text("precious")
    assert "exists already" in refuse("export", tiny_session.path, "--out", out)
    assert out.read_text() == "precious"
    say("export", tiny_session.path, "--out", out, "--overwrite")
    assert len(read(out, project_dir=tiny_stack.parent)) == 120
    before = tiny_session.original_source.read_bytes()
    for target in (tiny_session.original_source, tiny_session.table["stack_path"].iloc[0]):
        assert "choose another name" in refuse("export", tiny_session.path, "--out", target, "--overwrite")
    assert tiny_session.original_source.read_bytes() == before


def test_a_part_is_held_still(trained, tiny_stack, tmp_path, say, refuse):
    (column,) = say("hold-still", trained.path, "--disc-yxr-px", "16,16,8")
    assert column == str(trained.path / "columns" / "pose-held.parquet") and trained.gauge() is not None
    mask = np.zeros((32, 32), np.float32)
    mask[10:20, 8:20] = 1
    np.save(tmp_path / "mask.npy", mask)
    say("hold-still", trained.path, "--mask", tmp_path / "mask.npy")
    assert trained.columns() == ["pose-held"] and trained.gauge()["region"] == {"mask_px": 120}
    held = trained.column("pose-held")
    say("export", trained.session.path, "--out", tmp_path / "held.star", "--held")
    exported = read(tmp_path / "held.star", project_dir=tiny_stack.parent).table
    turn = exported["angle_deg"].to_numpy() - held["angle_deg"].to_numpy()
    np.testing.assert_allclose((turn + 180) % 360 - 180, 0, atol=1e-3)
    say("average", trained.path, "--by", "true_junk", "--held")
    assert "mask" in refuse("hold-still", trained.path, "--mask", tiny_stack)
    first = trained.gauge()
    at = ",".join(map(str, trained.latents().z[0]))
    say("hold-still", trained.path, "--mask", tmp_path / "mask.npy", f"--at={at}")
    assert trained.gauge() != first
    say("hold-still", trained.path, "--undo")
    assert trained.gauge() == first
    pd.testing.assert_frame_equal(trained.column("pose-held"), held)
    say("hold-still", trained.path, "--undo")
    assert trained.gauge()["region"] == {"disc_yxr_px": [16, 16, 8]}
    assert say("hold-still", trained.path, "--undo") == ["nothing"]
    assert trained.gauge() is None and trained.columns() == []
    assert "no earlier state" in refuse("hold-still", trained.path, "--undo")


def test_the_probability_of_every_pose_is_a_stack_of_images(trained, tmp_path, say, refuse):
    small = "--model.kind target-vae --model.channels 4 --model.kernel-functions 8 --model.features 16"
    words = (small + " --model.hidden 8 --model.shift-range-px 3 --train.n-epochs 1 --device cpu").split()
    run = Run.open(Path(say("train", trained.session.path, *words)[-1]))
    out = tmp_path / "poses.mrcs"
    assert say("pose-map", run.path, "--rows", "0,7", "--out", out) == [str(out)]
    stack = read(out).images.read(np.arange(16))[:, 0]
    assert stack.shape == (16, 7, 7)  # two particles, P8, shifts up to 3 px
    np.testing.assert_allclose(stack.reshape(2, -1).sum(1), 1, atol=1e-3)
    assert "there is no particle 1000" in refuse("pose-map", run.path, "--rows", "1000", "--out", out)
    assert "exists already" in refuse("pose-map", run.path, "--out", out)
    assert "does not weigh poses" in refuse("pose-map", trained.path, "--out", tmp_path / "other.mrcs")


def test_other_stacks_are_encoded_by_the_same_model(trained, tiny_stack, tmp_path, say, refuse):
    before = trained.latents()
    (trained.path / "latents.parquet").unlink()
    assert say("encode", trained.path, "--device", "cpu") == [str(trained.path / "latents.parquet")]
    np.testing.assert_array_equal(trained.latents().z, before.z)
    out = tmp_path / "other.parquet"
    say("encode", trained.path, "--stack", tiny_stack, "--out", out)
    np.testing.assert_allclose(pd.read_parquet(out)["z_0"], before.z[:, 0], atol=1e-2)
    assert "exists already" in refuse("encode", trained.path, "--stack", tiny_stack, "--out", out)


def test_a_run_is_resumed_by_name_or_number(trained, say, refuse):
    assert say("train", trained.session.path, "--resume", trained.name) == [str(trained.path)]
    assert say("train", trained.session.path, "--resume", "1") == [str(trained.path)]
    assert "has no run 9" in refuse("train", trained.session.path, "--resume", "9")


def test_columns_are_joined_on_import(tiny_stack, tmp_path, say, refuse):
    truth = tmp_path / "truth.npz"
    np.savez(truth, score=np.arange(120), split=np.arange(120) % 2)
    say("import", tiny_stack, "--session", tmp_path / "s", "--table", truth, "--where", "split == 1")
    assert Session.open(tmp_path / "s").table["score"].tolist() == list(range(1, 120, 2))
    np.savez(truth, score=np.arange(7))
    words = ("import", tiny_stack, "--session", tmp_path / "t", "--table", truth)
    assert "one row for each of the 120 particles" in refuse(*words)


def test_an_existing_session_is_kept(tiny_session, tiny_stack, say, refuse):
    words = ("import", tiny_stack, "--session", tiny_session.path)
    assert "is a session already" in refuse(*words)
    say(*words, "--overwrite")
    assert tiny_session.path.with_name("tiny-replaced-1").is_dir()


def test_simulated_stacks_are_inspected(tmp_path, say):
    (star,) = say("simulate", "--out", tmp_path, "--n", 20, "--box-px", 48, "--pixel-size-A", 5)
    text = "\n".join(say("inspect", star))
    assert "20" in text and "48" in text


# ---------------------------------------------------------------------- parsing


def test_the_kind_of_model_need_not_be_said():
    command = parse(["train", "d", "--model.latent-dim", "1", "--train.seed", "3"])
    assert command.model == ClassMapConfig(latent_dim=1) and command.train.seed == 3
    for words in (["--model.kind", "spatial-vae"], ["--model.kind=spatial-vae"]):
        command = parse(["train", "d", *words, "--model.hidden", "64"])
        assert command.model == SpatialVAEConfig(hidden=64)


def test_flags_may_be_written_out():
    for words, value in (
        (["--model.infer-shift", "false"], False),
        (["--no-model.infer-shift"], False),
        (["--model.infer-shift", "true"], True),
        (["--model.infer-shift"], True),
    ):
        command = parse(["train", "d", "--model.kind", "spatial-vae", *words])
        assert command.model.infer_shift is value


def test_the_environment_is_not_read(monkeypatch):
    for name in ("OUT", "N", "SEED", "seed", "n", "where"):
        monkeypatch.setenv(name, "7")
    command = parse(["simulate", "--out", "x"])
    assert command.n == 4000 and command.seed == 0 and str(command.out) == "x"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("nonsense", "there is no command 'nonsense'; choose one of inspect, import"),
        ("bench nonsense", "there is no command 'bench nonsense'"),
        ("train", "required: SESSION"),
        ("simulate --n 5", "required: --out"),
        ("train d --model.latent-dim 33", "--model.latent-dim 33: input should be less than or equal to 32"),
        ("train d --model.latent-dim two", "--model.latent-dim two: input should be a valid integer"),
        ("train d --model.kind x", "there is no such model; choose one of class-map, spatial-vae"),
        ("train d --model.hidden 9", "unrecognized arguments: --model.hidden 9"),
        (
            "train d --train.precision half",
            "--train.precision half: input should be 'auto', 'float32' or 'bf16'",
        ),
        ("embed d --method som", "--method som: input should be 'umap', 'tsne' or 'pca'"),
        ("hold-still d", "say what to hold still by one of"),
        ("hold-still d --auto --mask m.npy", "say what to hold still by one of"),
        ("train d", "is not a session"),
        ("open d", "is not a session"),
        ("average d", "is not a run"),
        ("inspect nowhere.star", "does not exist"),
        ("average d --held --by x --frame 3", "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, refuse, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert sentence in refuse(*words.split())
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_of_a_run_are_one_sentence(trained, refuse, tmp_path):
    run, session = trained.path, trained.session.path
    for words, sentence in (
        (("average", run), "cluster the run first"),
        (("average", run, "--by", "nothing"), "there is no column 'nothing'"),
        (("average", run, "--by", "defocus_u_A"), "classes are whole numbers"),
        (("average", run, "--by", "stack_index", "--held"), "holds nothing still yet"),
        (("cluster", run, "--n-clusters", "500"), "cannot make 500 clusters"),
        (("cluster", run, "--on", "umap"), "no embedding 'umap'"),
        (("regroup", run, "--merge", "1,2"), "has no clustering"),
        (("regroup", run), "say what to do by one of"),
        (
            ("export", session, "--out", tmp_path / "a.star", "--averages", tmp_path / "a.mrcs"),
            "needs classes",
        ),
        (("train", session, "--device", "abacus"), "--device abacus is not known"),
        (("hold-still", run, "--disc-yxr-px", "3,4"), "give three numbers"),
    ):
        assert sentence in refuse(*words), words


@pytest.mark.parametrize("name", [*COMMANDS, *BENCH])
def test_help_says_every_option(name, capsys):
    assert parse([*name.split(), "--help"]) is None
    text = " ".join(capsys.readouterr().out.split())
    command = (COMMANDS | BENCH)[name]
    assert (command.__doc__ or "").split(":")[0].split()[0] in text
    for field_name, field in command.model_fields.items():
        if field_name == "model":
            assert "--model.angle-step-deg" in text and "--model.kind spatial-vae" in text
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            for inner_name, inner in field.annotation.model_fields.items():
                assert f"--{field_name}.{inner_name}".replace("_", "-") in text
                assert inner.description and inner.description.split()[0] in text
        else:
            assert field.description, field_name
            assert " ".join(field.description.split()[:3]) in text


def test_the_overview_lists_every_command_but_the_hidden(say):
    text = "\n".join(say())
    for name in COMMANDS:
        assert f"  {name} " in text
    assert "bench" in text and "decode-server" not in text
    assert say("--help") == say() and "bench accuracy" in "\n".join(say("bench"))


# ---------------------------------------------------------------------- as a program


def run_program(*words: object, code: str = "") -> subprocess.CompletedProcess[str]:
    program = ["-c", code] if code else ["-m", "particle_explorer.cli", *map(str, words)]
    return subprocess.run([sys.executable, *program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["examine"], ["amend"], ["report-classes", "--out", "a.html"]])
def test_averages_that_are_not_there_are_a_sentence(words, tiny_session, say):
    with pytest.raises(UserError, match="no class averages yet; make some with particle-explorer average"):
        parse([words[0], str(tiny_session.path), *words[1:]]).execute()


def test_exit_status_tells_whose_fault_it_is():
    assert run_program("--help").returncode == 0
    bad = run_program("train", "nowhere")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
    fault = (
        "import particle_explorer.cli as c\n"
        "c.COMMANDS['inspect'].execute = lambda self: 1 / 0\nc.main(['inspect', 'x'])"
    )
    ours = run_program(code=fault)
    assert ours.returncode == 1 and "ZeroDivisionError" in ours.stderr


def test_the_start_is_light():
    code = """if True:
        import json, sys, time
        import pydantic
        class Model(pydantic.BaseModel):
            a: int = 1
        start = time.process_time()
        import particle_explorer.cli
        spent = time.process_time() - start
        heavy = ['qtpy', 'napari', 'torch', 'pandas', 'numpy', 'sklearn', 'scipy', 'umap', 'pyarrow']
        print(json.dumps([spent, [name for name in heavy if name in sys.modules]]))
    """
    found = [json.loads(run_program(code=code).stdout) for _ in range(5)]
    assert all(heavy == [] for _, heavy in found)
    assert min(spent for spent, _ in found) < 0.1  # 0.03 to 0.05 s on a machine that does nothing else


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_saves_first(tiny_session, tmp_path):
    import signal

    from particle_explorer.jobs import read_status

    words = ["train", str(tiny_session.path), *TINY, "--train.n-epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "particle_explorer.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    run = Run.open(Path(process.stdout.readline().strip()))
    while read_status(run.path).epoch < 2:
        assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 0 and f"--resume {run.name} goes on" in told
    assert run.state == "stopped" and run.can_resume


def test_letters_that_an_encoding_lacks_do_not_end_it(tiny_stack: Path) -> None:
    command = [sys.executable, "-m", "particle_explorer.cli", "inspect", str(tiny_stack)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"7 ?" in done.stdout, done.stderr


def test_what_zero_means_is_in_the_help() -> None:
    from particle_explorer import configs

    for config in vars(configs).values():
        if isinstance(config, type) and issubclass(config, Config) and config is not Config:
            for name, field in config.model_fields.items():
                extra = field.json_schema_extra
                if isinstance(extra, dict) and extra.get("zero"):
                    assert re.search(r"\b0\b", field.description or ""), f"{config.__name__}.{name}"

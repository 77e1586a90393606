"""A session on disk: complete or not there, never in the way of the user's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from particle_explorer import cache, preprocess
from particle_explorer.averaging import average_classes
from particle_explorer.configs import ClassMapConfig, DataSpec, PreprocessConfig, RunConfig
from particle_explorer.files import Stopped, UserError, locked
from particle_explorer.io.reading import read, read_array
from particle_explorer.io.tables import join, read_table
from particle_explorer.latents import Latents
from particle_explorer.session import Run, Session, default_path


def config_of(found: Session) -> RunConfig:
    return RunConfig(model=ClassMapConfig(latent_dim=1), data=found.data_spec())


def latents_of(found: Session, d: int = 1) -> Latents:
    n = found.n_particles
    rng = np.random.default_rng(0)
    return Latents(
        uid=found.uid,
        z=rng.normal(size=(n, d)).astype(np.float32),
        angle_deg=rng.uniform(-180, 180, n).astype(np.float32),
        shift_yx_px=rng.normal(size=(n, 2)).astype(np.float32),
    )


# ---------------------------------------------------------------------- making


def test_the_cache_is_what_preprocessing_gives(tiny_session, tiny_particles):
    rows = np.array([0, 1, 2, 50, 119])
    wanted = preprocess.apply(
        tiny_particles.images.read(rows), tiny_particles.table.iloc[rows], tiny_session.plan
    )
    np.testing.assert_allclose(tiny_session.images.read(rows), wanted, atol=2e-3 * np.abs(wanted).max())


def test_blocks_and_threads_change_nothing(tiny_particles, tmp_path, monkeypatch):
    whole = Session.create(tmp_path / "whole", tiny_particles)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 7 * 4 * 32 * 32)
    told: list[float] = []
    blocks = Session.create(
        tmp_path / "blocks", tiny_particles, progress=lambda what, done: told.append(done)
    )
    assert len(told) > 15 and told[-1] == 1 and np.all(np.diff(told) > 0)
    np.testing.assert_array_equal(whole.images.read(np.arange(120)), blocks.images.read(np.arange(120)))


def test_the_table_comes_back_whole(tiny_session, tiny_particles):
    table = tiny_session.table
    assert table.index.dtype == np.uint64 and table.index.name == "uid"
    np.testing.assert_array_equal(table.index, tiny_particles.table.index)
    for name in tiny_particles.table:
        assert table[name].tolist() == tiny_particles.table[name].tolist(), name
    np.testing.assert_array_equal(tiny_session.originals()[7], tiny_particles.images[7])


def test_the_source_is_kept_to_the_letter(tiny_session, tiny_stack):
    assert tiny_session.source_path.read_bytes() == tiny_stack.read_bytes()
    assert tiny_session.source_path.parent.parent == tiny_session.path


def test_a_subset_is_taken_on_opening(tiny_particles, tmp_path):
    found = Session.create(tmp_path / "s", tiny_particles, where="source_row < 10 and stack_index >= 4")
    assert found.table["source_row"].tolist() == [4, 5, 6, 7, 8, 9]
    assert len(found.images) == 6 and found.info.where
    with pytest.raises(UserError, match=r"no particle of .* is left"):
        Session.create(tmp_path / "t", tiny_particles, where="source_row < 0")


def test_a_layer_is_saved_with_the_session(tmp_path):
    images = np.random.default_rng(0).normal(size=(12, 20, 20)).astype(np.float32)
    found = Session.create(tmp_path / "s", read_array(images, "my layer"))
    np.testing.assert_array_equal(found.originals().read([3, 4])[:, 0], images[[3, 4]])
    assert found.source_path is None
    (tmp_path / "s").rename(tmp_path / "moved")
    np.testing.assert_array_equal(Session.open(tmp_path / "moved").originals()[3][0], images[3])


def test_session_and_stack_move_together(tiny_stack, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    for file in tiny_stack.parent.iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    Session.create(home / "session", read(home / tiny_stack.name))
    home.rename(tmp_path / "elsewhere")
    moved = Session.open(tmp_path / "elsewhere" / "session")
    assert moved.originals()[0].shape == (1, 32, 32)
    assert moved.original_source == tmp_path / "elsewhere" / tiny_stack.name


def test_stacks_that_do_not_move_with_the_session_are_found_where_they_are(tiny_stack, tmp_path):
    home, away = tmp_path / "home", tmp_path / "far" / "away"
    home.mkdir()
    away.mkdir(parents=True)
    for file in tiny_stack.parent.iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    Session.create(home / "session", read(home / tiny_stack.name))
    (home / "session").rename(away / "session")
    moved = Session.open(away / "session")
    assert moved.originals()[0].shape == (1, 32, 32)
    assert moved.original_source == home / tiny_stack.name
    moved.join_table(pd.DataFrame({"mine": np.zeros(120)}))
    assert Session.open(away / "session").originals()[0].shape == (1, 32, 32)


def test_a_session_without_its_cache_makes_it_again(tiny_session):
    before = tiny_session.images.read(np.arange(5))
    (tiny_session.path / "images.npy").unlink()
    again = Session.open(tiny_session.path)
    assert not again.has_images
    with pytest.raises(UserError, match="missing or stale"):
        _ = again.images
    again.prepare_images()
    np.testing.assert_array_equal(again.images.read(np.arange(5)), before)


def test_a_cache_of_other_preprocessing_is_not_taken(tiny_session):
    (tiny_session.path / "images.json").write_text('{"key": "another"}')
    assert not Session.open(tiny_session.path).has_images


def test_stopping_leaves_nothing_behind(tiny_particles, tmp_path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        Session.create(tmp_path / "s", tiny_particles, stop=stop)
    assert list(tmp_path.iterdir()) == []


def stopped_after(path, particles, config, n_blocks):
    """Start a session and stop it in the middle; returns the hidden folder that is left."""
    stop, heard = threading.Event(), []

    def progress(what, fraction):
        heard.append(fraction)
        if len(heard) == n_blocks:
            stop.set()

    with pytest.raises(Stopped, match="goes on from there"):
        Session.create(path, particles, config, progress=progress, stop=stop)
    [left] = path.parent.glob(f".{path.name}-*.part")
    return left


def rows_prepared(monkeypatch):
    """The number of images that are prepared from now on, as a list that grows."""
    counts, apply = [], preprocess.apply
    monkeypatch.setattr(
        preprocess, "apply", lambda images, *a, **k: counts.append(len(images)) or apply(images, *a, **k)
    )
    return counts


@pytest.mark.parametrize("damaged", [False, True])
def test_a_stopped_import_goes_on_where_it_was(tmp_path, monkeypatch, damaged):
    images = np.random.default_rng(0).normal(size=(100, 32, 32)).astype(np.float32)
    images[3], images[70], images[44] = 1, np.nan, images[44] * 30
    np.save(tmp_path / "stack.npy", images)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 8 * 4 * 32**2)
    particles, config = read(tmp_path / "stack.npy"), PreprocessConfig(outlier_sd=8)
    whole = Session.create(tmp_path / "whole", particles, config)
    left = stopped_after(tmp_path / "s", particles, config, 6)
    if damaged:  # in the third block of 8 images
        with (left / ".images-unfinished.npy").open("r+b") as file:
            file.seek(128 + 20 * 2 * 32**2)
            file.write(b"\1\2\3")
    counts = rows_prepared(monkeypatch)
    again = Session.create(tmp_path / "s", particles, config)
    assert sum(counts) == (100 - 16 - 1 if damaged else 100 - 48 - 1)
    assert again.info.n == 97 and again.info.notes == whole.info.notes
    assert (again.path / "images.npy").read_bytes() == (whole.path / "images.npy").read_bytes()
    ours, theirs = (json.loads((s.path / "images.json").read_text()) for s in (again, whole))
    assert (
        ours["blake2b"]
        == theirs["blake2b"]
        == hashlib.blake2b((whole.path / "images.npy").read_bytes(), digest_size=16).hexdigest()
    )
    assert not left.exists() and not list(again.path.glob(".images*"))


def test_what_another_import_has_left_is_not_taken_but_removed(tmp_path, monkeypatch):
    images = np.random.default_rng(0).normal(size=(40, 32, 32)).astype(np.float32)
    np.save(tmp_path / "stack.npy", images)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 8 * 4 * 32**2)
    particles = read(tmp_path / "stack.npy")
    left = stopped_after(tmp_path / "s", particles, PreprocessConfig(), 3)
    mine, alive = tmp_path / ".s-abcdefgh.part", tmp_path / ".s-12345678.part"
    mine.mkdir(), alive.mkdir()  # a folder without a lock is not ours; one with a held lock is at work
    with locked(alive / ".lock"):
        np.save(tmp_path / "stack.npy", -images)
        counts = rows_prepared(monkeypatch)
        Session.create(tmp_path / "s", read(tmp_path / "stack.npy"), PreprocessConfig(contrast="invert"))
        assert sum(counts) == 40 and not left.exists() and mine.exists() and alive.exists()


def test_preparing_again_goes_on_where_it_was(tmp_path, monkeypatch):
    np.save(tmp_path / "stack.npy", np.random.default_rng(0).normal(size=(40, 32, 32)).astype(np.float32))
    monkeypatch.setattr(cache, "BLOCK_BYTES", 8 * 4 * 32**2)
    session = Session.create(tmp_path / "s", read(tmp_path / "stack.npy"))
    before = (session.path / "images.npy").read_bytes()
    (session.path / "images.npy").unlink()
    stop = threading.Event()
    with pytest.raises(Stopped, match="of 40 are kept"):
        session.prepare_images(lambda what, fraction: stop.set() if fraction > 0.5 else None, stop)
    counts = rows_prepared(monkeypatch)
    session.prepare_images()
    assert sum(counts) == 16 and (session.path / "images.npy").read_bytes() == before
    assert not list(session.path.glob(".images*"))


def test_what_is_there_is_never_lost(tiny_particles, tmp_path):
    path = tmp_path / "s"
    first = Session.create(path, tiny_particles)
    first.selections.save("good", np.arange(120) < 5, "by hand")
    with pytest.raises(UserError, match="is a session already"):
        Session.create(path, tiny_particles)
    Session.create(path, tiny_particles, overwrite=True)
    assert Session.open(path).selections.names() == []
    assert Session.open(tmp_path / "s-replaced-1").selections.names() == ["good"]
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a session"):
        Session.create(other, tiny_particles, overwrite=True)
    assert (other / "chapter1.txt").read_text() == "precious"


def test_particles_named_twice_are_refused(tiny_particles, tmp_path):
    index = np.array(tiny_particles.table.index)
    index[3] = index[9]
    twice = replace(tiny_particles, table=tiny_particles.table.set_axis(pd.Index(index, name="uid")))
    with pytest.raises(UserError, match="in rows 4 and 10"):
        Session.create(tmp_path / "s", twice)


def test_unknown_pixel_size_survives(tmp_path):
    images = np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32)
    found = Session.create(tmp_path / "s", read_array(images, "layer"), PreprocessConfig(diameter_A=12))
    again = Session.open(found.path)
    assert np.isnan(again.plan.pixel_size_A) and again.data_spec() == DataSpec(
        box_px=16, diameter_px=12, n_particles=4
    )


def test_a_given_pixel_size_is_the_sessions(tmp_path):
    images = np.random.default_rng(0).normal(size=(4, 16, 16)).astype(np.float32)
    config = PreprocessConfig(diameter_A=24, pixel_size_A=2.0)
    again = Session.open(Session.create(tmp_path / "s", read_array(images, "layer"), config).path)
    assert again.table["pixel_size_A"].eq(2.0).all()
    assert again.plan.cached_pixel_size_A == 2.0 and again.data_spec().diameter_px == 12


def test_the_default_place_is_beside_the_data_if_it_can_be_written(tmp_path, monkeypatch):
    assert default_path(tmp_path / "a.star") == tmp_path / "a_explorer"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert default_path(tmp_path / "a.star") == Path.cwd() / "a_explorer"


# ---------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "is not a session"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format_version": 99}', "install a newer"),
        ('{"format_version": 1}', "is damaged"),
    ],
)
def test_broken_sessions_are_said_in_a_sentence(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "session.json").write_text(text)
    with pytest.raises(UserError, match=sentence) as error:
        Session.open(tmp_path)
    assert "\n" not in str(error.value)


def test_a_cut_cache_and_table_are_said_in_a_sentence(tiny_session):
    for name in ("images.npy", "particles.parquet"):
        file = tiny_session.path / name
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        _ = Session.open(tiny_session.path).images
    with pytest.raises(UserError, match="is damaged"):
        _ = Session.open(tiny_session.path).table


# ---------------------------------------------------------------------- images


@pytest.mark.parametrize(
    "key",
    [
        0,
        -1,
        np.int64(5),
        slice(3, 9),
        slice(None, None, 40),
        [5, 5, 2, 3, 4],
        (slice(2, 4), 0, slice(1, 5)),
        (7, 0),
        (Ellipsis, slice(0, 3)),
        np.arange(120) % 50 == 0,
        np.array([-2, 1]),
        slice(0, 0),
    ],
)
def test_images_index_like_an_array(tiny_session, key):
    images = tiny_session.images
    whole = images.read(np.arange(len(images)))
    found = images[key]
    np.testing.assert_array_equal(found, whole[key])
    assert found.dtype == np.float32 and images.shape == whole.shape and images.ndim == 4


def test_images_are_never_loaded_whole(tiny_session):
    with pytest.raises(TypeError, match="not loaded whole"):
        np.asarray(tiny_session.images)
    with pytest.raises(IndexError):
        tiny_session.images.read([120])


# ---------------------------------------------------------------------- runs


def test_runs_are_numbered_on_and_found_by_number(tiny_session):
    first, second = (tiny_session.new_run(config_of(tiny_session)) for _ in range(2))
    assert [run.name for run in tiny_session.runs()] == ["0001-class-map", "0002-class-map"]
    assert tiny_session.run("2").path == second.path and first.state == "new"
    assert Run.open(second.path).config == config_of(tiny_session)
    with pytest.raises(UserError, match="has no run 7; there are: 0001"):
        tiny_session.run("7")


def test_two_writers_never_share_a_run(tiny_session):
    found: list[str] = []

    def make() -> None:
        other = Session.open(tiny_session.path)
        found.extend(other.new_run(config_of(tiny_session)).name for _ in range(5))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name[:4] for name in found) == [f"{i:04d}" for i in range(1, 21)]


def test_a_mistyped_subset_makes_no_run(tiny_session):
    config = config_of(tiny_session).model_copy(update={"where": "no_such == 1"})
    with pytest.raises(UserError, match="no_such"):
        tiny_session.new_run(config)
    assert tiny_session.runs() == []


def test_latents_make_a_run_finished(tiny_session):
    run = tiny_session.new_run(config_of(tiny_session))
    assert run.latents() is None and tiny_session.newest_finished_run() is None
    run.save_latents(latents_of(tiny_session))
    tiny_session.new_run(config_of(tiny_session))
    assert tiny_session.newest_finished_run().name == run.name
    np.testing.assert_array_equal(run.latents().uid, tiny_session.uid)


def test_results_join_by_uid_and_keep_apart(tiny_session):
    run = tiny_session.new_run(config_of(tiny_session))
    run.save_latents(latents_of(tiny_session))
    uid = tiny_session.uid[::-1]
    for shift in (0, 1):
        table = pd.DataFrame(
            {"umap_0": np.arange(120.0) + shift, "umap_1": 0.0}, index=pd.Index(uid, name="uid")
        )
        run.write_column("umap", table, {"seed": shift})
    held = pd.DataFrame({"angle_deg": np.zeros(3)}, index=pd.Index(uid[:3], name="uid"))
    run.write_column("pose-held", held, {})
    run.write_column("pose-held", held + 1, {}, replace=True)
    assert run.columns() == ["umap", "umap-2", "pose-held"]
    features = run.features()
    np.testing.assert_array_equal(features["umap_0"], np.arange(120.0)[::-1])
    np.testing.assert_array_equal(features["umap-2_0"], np.arange(120.0)[::-1] + 1)
    assert features["pose-held angle_deg"].tolist()[-3:] == [1, 1, 1]
    assert features["pose-held angle_deg"].isna().sum() == 117
    np.testing.assert_array_equal(features.index, tiny_session.table.index)
    assert run.column_record("umap-2")["config"] == {"seed": 1}
    assert run.newest_column("umap") == "umap-2" and run.newest_column("cluster") is None
    # half-written files and those of other systems are none of ours, nor is a folder of another name a run
    for name in (".umap-ab12cd34.part.json", "._umap.json"):
        (run.path / "columns" / name).touch()
    shutil.copytree(run.path, run.path.with_name("backup"))
    assert run.columns() == ["umap", "umap-2", "pose-held"]
    assert tiny_session.run(str(run.number)).name == run.name


def test_metrics_pass_over_what_was_repeated_or_cut(tiny_session):
    run = tiny_session.new_run(config_of(tiny_session))
    assert run.metrics().empty
    lines = ["epoch,step,loss", "0,1,5.0", "1,2,4.0", "1,3,9.0", "1,4,", "1,3,3.0", "2,4,2.0", "2,5"]
    (run.path / "metrics.csv").write_text("\n".join(lines))
    found = run.metrics()
    assert found["step"].tolist() == [1, 2, 3, 4] and found["loss"].tolist() == [5, 4, 3, 2]


def test_a_newer_run_is_refused(tiny_session):
    run = tiny_session.new_run(config_of(tiny_session))
    content = json.loads((run.path / "config.json").read_text()) | {"format_version": 2}
    (run.path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="install a newer"):
        _ = Run.open(run.path).config


# ---------------------------------------------------------------------- selections and classes


def test_selections_come_back(tiny_session):
    mask = np.random.default_rng(0).random(120) < 0.3
    tiny_session.selections.save("good ones", mask, "lasso")
    again = Session.open(tiny_session.path)
    np.testing.assert_array_equal(again.selections.mask("good ones"), mask)
    assert again.selections.names() == ["good ones"]
    with pytest.raises(UserError, match="there are: good ones"):
        again.selections.mask("bad")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a\x00b"])
def test_names_cannot_leave_the_session(tiny_session, name):
    with pytest.raises(UserError, match="cannot be a name"):
        tiny_session.selections.save(name, np.zeros(120, bool))


def test_averages_come_back_with_members_and_quality(tiny_session):
    labels = np.arange(120) % 3
    averages = average_classes(tiny_session, labels)
    names = [tiny_session.classes.save("mine", averages, ["a", "b", "c"], {"by": "test"}) for _ in range(2)]
    assert names == ["mine", "mine-2"] == tiny_session.classes.names()
    found = Session.open(tiny_session.path).classes.read("mine-2")
    np.testing.assert_allclose(found.images, [average.image for average in averages], rtol=1e-6)
    assert [one["label"] for one in found.classes] == ["a", "b", "c"] and found.classes[0]["n"] == 40
    assert found.members["average"].reindex(tiny_session.table.index).tolist() == labels.tolist()
    assert found.pixel_size_A == pytest.approx(7.0) and found.how == {"by": "test"}
    np.testing.assert_allclose(found.classes[1]["frc"], averages[1].frc, atol=1e-5)


# ---------------------------------------------------------------------- joining tables


def test_tables_join_by_uid_or_by_order(tiny_session):
    uid = tiny_session.uid
    by_uid = pd.DataFrame({"uid": uid[::-1], "score": np.arange(120)})
    joined = join(tiny_session.table, by_uid)
    np.testing.assert_array_equal(joined["score"], np.arange(120)[::-1])
    by_order = join(tiny_session.table, pd.DataFrame({"score": np.arange(120)}))
    np.testing.assert_array_equal(by_order["score"], np.arange(120))
    tiny_session.join_table(by_uid)
    assert Session.open(tiny_session.path).rows_where("score < 2").tolist() == [118, 119]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (pd.DataFrame({"a": [1, 2]}), "has 2 rows and no uid column"),
        (pd.DataFrame({"stack_index": np.arange(120)}), "have already: stack_index"),
        (pd.DataFrame({"uid": [1, 1], "a": [1, 2]}), "names uid 1 twice"),
        (pd.DataFrame({"uid": [1, 2], "a": [1, 2]}), "none of the table's uids"),
    ],
)
def test_tables_that_do_not_fit_are_said_in_a_sentence(tiny_session, extra, sentence):
    with pytest.raises(UserError, match=sentence):
        join(tiny_session.table, extra)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".npz", ".npy"])
def test_tables_are_read(tmp_path, suffix):
    path = tmp_path / f"truth{suffix}"
    table = pd.DataFrame({"angle": [0.5, 1.5, 2.5], "shift_0": [1.0, 2.0, 3.0], "shift_1": [4.0, 5.0, 6.0]})
    if suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".npz":
        shift = table[["shift_0", "shift_1"]].to_numpy()
        np.savez(path, angle=table["angle"], shift=shift, templates=np.zeros((2, 4, 4)), other=np.zeros(7))
    elif suffix == ".npy":
        np.save(path, table.to_records(index=False))
    else:
        table.to_csv(path, sep="," if suffix == ".csv" else "\t", index=False)
    pd.testing.assert_frame_equal(read_table(path, 3), table)


def test_pickles_and_strange_files_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "a.txt").write_text("1 2 3")
    for name, sentence in (
        ("a.npy", "cannot be read"),
        ("a.txt", "is no table"),
        ("b.csv", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_table(tmp_path / name, 1)


def _noise(n: int = 40, box: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, box, box)).astype("f4")


def test_bad_images_are_left_out_and_listed(tmp_path: Path) -> None:
    """All of them are found, and the cache is that of the good ones alone."""
    images = _noise()
    images[3], images[17, 2, 2], images[30] = 5, np.nan, images[30] * 50
    np.save(tmp_path / "bad.npy", images)
    good = np.delete(images, [3, 17, 30], axis=0)
    np.save(tmp_path / "good.npy", good)
    made = Session.create(tmp_path / "a", read(tmp_path / "bad.npy"), PreprocessConfig(outlier_sd=6))
    wanted = Session.create(tmp_path / "b", read(tmp_path / "good.npy"), PreprocessConfig())
    assert made.n_particles == 37 and made.table["source_row"].tolist()[2:5] == [2, 4, 5]
    np.testing.assert_array_equal(made.images[:], wanted.images[:])
    text = "\n".join(made.info.notes)
    assert "2 images (rows 4, 18 of the file) are blank or broken and left out" in text
    assert "1 image (row 31 of the file) is more than 6 SD" in text
    (tmp_path / "a" / "images.npy").unlink()
    made.prepare_images()
    np.testing.assert_array_equal(Session.open(tmp_path / "a").images[:], wanted.images[:])
    with pytest.raises(UserError, match="row 4"):
        Session.create(tmp_path / "c", read(tmp_path / "bad.npy"), PreprocessConfig(bad_images="stop"))
    images[:] = 0
    np.save(tmp_path / "none.npy", images)
    with pytest.raises(UserError, match="none of the 40 images can be used"):
        Session.create(tmp_path / "d", read(tmp_path / "none.npy"))
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_cache_is_found_by_its_checksum_and_made_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", _noise())
    session = Session.create(tmp_path / "s", read(tmp_path / "a.npy"))
    before = session.images[:]
    path = tmp_path / "s" / "images.npy"
    content = path.read_bytes()
    path.write_bytes(content)  # touched and the same: only looked at
    session.prepare_images()
    assert path.read_bytes() == content
    path.write_bytes(content[:900] + bytes([content[900] ^ 1]) + content[901:])
    os.utime(path, ns=(1, 1))
    session.prepare_images()
    np.testing.assert_array_equal(Session.open(tmp_path / "s").images[:], before)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    np.save(tmp_path / "a.npy", _noise())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.Cache, "_finish", full)
    with pytest.raises(UserError, match="No space left on device; nothing of it was kept"):
        Session.create(tmp_path / "s", read(tmp_path / "a.npy"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_several_pixel_sizes_make_one_session(tmp_path: Path) -> None:
    """The same images at 2 Å in 32 px and, Fourier-cropped, at 4 Å in 16 px come to the same cache."""
    from particle_explorer.io.mrc import write_stack
    from particle_explorer.preprocess import fourier_crop

    y, x = np.indices((32, 32)) - 16
    fine = np.stack([np.exp(-((x - i % 5) ** 2 + (y + i % 3) ** 2) / 40) for i in range(10)]).astype("f4")
    write_stack(tmp_path / "a.mrcs", fine, 2.0)
    write_stack(tmp_path / "b.mrcs", fourier_crop(fine[:, None], 16)[:, 0], 4.0)
    text = (
        "data_optics\n\nloop_\n_rlnOpticsGroup\n_rlnImagePixelSize\n1 2.0\n2 4.0\n\ndata_particles\n\nloop_\n"
    )
    text += "_rlnImageName\n_rlnOpticsGroup\n"
    text += "".join(
        f"{i}@{name}.mrcs {group}\n" for i in range(1, 11) for group, name in ((1, "a"), (2, "b"))
    )
    (tmp_path / "p.star").write_text(text)
    session = Session.create(tmp_path / "s", read(tmp_path / "p.star"), PreprocessConfig(background="none"))
    assert session.plan.mixed and session.images.shape == (20, 1, 16, 16)
    np.testing.assert_allclose(session.images[::2], session.images[1::2], atol=2e-3)


def test_rows_of_a_named_selection_that_a_run_is_fitted_to(tiny_session: Session) -> None:
    from particle_explorer.configs import ClassMapConfig, RunConfig

    n = tiny_session.n_particles
    tiny_session.selections.save("some", np.arange(n) < 30)
    assert list(tiny_session.rows_where("", "some")) == list(range(30))
    where = "stack_index >= 20"
    both = tiny_session.rows_where(where, "some")
    assert set(both) == set(tiny_session.rows_where(where)) & set(range(30)) and 0 < both.size < 30
    spec = tiny_session.data_spec()
    with pytest.raises(UserError, match="no selection 'other'"):
        tiny_session.new_run(RunConfig(model=ClassMapConfig(), data=spec, selection="other"))
    with pytest.raises(UserError, match="is left by --where"):
        tiny_session.rows_where("stack_index >= 100", "some")

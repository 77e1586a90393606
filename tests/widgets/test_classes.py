"""The Classes dock: what is averaged, the montage, its quality, an export that asks before it replaces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("napari")

from napari.components import ViewerModel
from pytestqt.qtbot import QtBot
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

from particle_explorer import jobs
from particle_explorer.averaging import average_classes
from particle_explorer.configs import ClassMapConfig, RunConfig
from particle_explorer.latents import Latents
from particle_explorer.session import Session
from particle_explorer.state import Opened
from particle_explorer.status import StatusWriter
from particle_explorer.widgets import class_layer
from particle_explorer.widgets.average_words import SHARED, made_words
from particle_explorer.widgets.classes import ClassesDock
from particle_explorer.widgets.exporting import groupings
from particle_explorer.widgets.montage import caption_lines, montage
from particle_explorer.widgets.set_comparison import NO_OTHER

SLOW = 20_000


@pytest.fixture
def dock(qtbot: QtBot) -> Iterator[ClassesDock]:
    widget = ClassesDock(ViewerModel())
    qtbot.addWidget(widget)
    widget.resize(392, 600)
    widget.show()
    yield widget
    widget.shutdown()


def _show_run(dock: ClassesDock, session: Session) -> None:
    run = session.new_run(RunConfig(model=ClassMapConfig(), data=session.data_spec()))
    n = session.n_particles
    extra = pd.DataFrame(
        {"z_0": np.linspace(-1, 1, n), "cluster-kmeans": np.arange(n) % 3}, index=session.table.index
    )
    dock.state.show(Opened(session, run, pd.concat([session.table, extra], axis=1)))


def _save_averages(session: Session) -> str:
    labels = np.arange(session.n_particles) % 3
    averages = average_classes(session, labels)
    how = {"run": "0001-class-map", "by": "cluster-kmeans", "selection": "", "held": False}
    return session.classes.save("cluster-kmeans", averages, [average.label for average in averages], how)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path]]:
    lines: list[tuple[list[str], Path]] = []

    def start(arguments: list[str], folder: Path) -> Path:
        lines.append((list(arguments), folder))
        StatusWriter(folder).__enter__()
        return folder

    monkeypatch.setattr(jobs, "start", start)
    return lines


def test_without_a_run_it_says_what_to_do(dock: ClassesDock) -> None:
    assert dock.no_run.isVisible() and not dock.make.isVisible()


def test_an_empty_selection_cannot_be_averaged_and_says_why(dock: ClassesDock, tiny_session: Session) -> None:
    _show_run(dock, tiny_session)
    dock.make.what.setCurrentIndex(0)
    assert not dock.make.average_button.isEnabled() and "lasso" in dock.make.average_button.toolTip()
    mask = np.arange(tiny_session.n_particles) < 12
    dock.state.selection.set(mask)
    assert dock.make.average_button.isEnabled() and "12" in dock.make.average_button.text()


def test_the_newest_clusters_are_proposed(dock: ClassesDock, tiny_session: Session) -> None:
    _show_run(dock, tiny_session)
    assert dock.make.what.currentData() == "cluster-kmeans"
    table = pd.DataFrame(
        {"class_id": [1, 1], "cluster-kmeans": [0, 1], "cluster-kmeans-2 cluster-kmeans": [1, 0]}
    )
    assert groupings(table) == ["cluster-kmeans", "cluster-kmeans-2 cluster-kmeans"]


def test_the_selection_is_saved_and_averaged_by_a_worker(
    dock: ClassesDock, tiny_session: Session, started: list[tuple[list[str], Path]], qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    mask = np.arange(tiny_session.n_particles) < 12
    dock.state.selection.set(mask)
    dock.average_selection()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    [(line, folder)] = started
    assert dock.state.run is not None
    assert line == ["average", str(dock.state.run.path), "--selection", "averaged-1"]
    assert folder.parent == tiny_session.path / "jobs"
    np.testing.assert_array_equal(tiny_session.selections.mask("averaged-1"), mask)


def test_averages_become_one_layer_with_their_quality(
    dock: ClassesDock, tiny_session: Session, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    _show_run(dock, tiny_session)
    name = _save_averages(tiny_session)
    dock.state.classes_changed.emit(name)
    qtbot.waitUntil(lambda: dock.stored is not None, timeout=SLOW)
    assert [layer.name for layer in dock.viewer.layers] == ["class averages"]
    assert dock.one.count() == 3 and "40" in dock.one.itemText(0)
    [curve] = dock.quality.curves
    assert curve.y[0] == pytest.approx(1, abs=0.01) and dock.quality.x_as_period
    assert dock.quality_words.text().startswith(SHARED) and "N 40" in dock.quality_words.text()

    made = dock.picture.montage
    assert made is not None
    event: Any = type("Event", (), {})()
    event.position = dock.picture.layer.data_to_world((made.tile[0] * 1.3, made.tile[1] * 0.5))  # second row
    dock.picture.on_click(dock.picture.layer, event)
    said: list[str] = []
    monkeypatch.setattr(class_layer.QToolTip, "showText", lambda at, words: said.append(words))
    dock.picture.on_move(dock.picture.layer, event)
    assert dock.one.currentIndex() == 2
    empty = (made.tile[0] * 1.3, made.tile[1] * 1.5)
    event.position = dock.picture.layer.data_to_world(empty)
    dock.picture.on_click(dock.picture.layer, event)
    dock.picture.on_move(dock.picture.layer, event)
    assert said[0].startswith("2 · N 40\nSSNR") and said[1:] == [""]
    assert dock.one.currentIndex() == 2


def test_an_export_never_replaces_without_a_word(
    dock: ClassesDock,
    tiny_session: Session,
    started: list[tuple[list[str], Path]],
    tmp_path: Path,
    qtbot: QtBot,
) -> None:
    _show_run(dock, tiny_session)
    dock.state.classes_changed.emit(_save_averages(tiny_session))
    qtbot.waitUntil(lambda: dock.stored is not None, timeout=SLOW)
    dock.show_export()
    form = dock.exporting
    star = tmp_path / "out.star"
    star.write_text("precious")
    form.path.setText(str(star))
    form.button.click()
    assert form.question.isVisible() and "out.star exists already" in form.question_words.text()
    form.keep_button.click()
    assert not form.question.isVisible() and not started
    form.button.click()
    form.replace_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    [(line, _)] = started
    expected = ["export", str(tiny_session.path), "--out", str(star), "--run", "0001-class-map"]
    assert line == [*expected, "--members", "cluster-kmeans", "--overwrite"]
    assert star.read_text() == "precious", "the worker replaces it, at once, when the new one is there"


def test_every_choice_of_the_export_reaches_the_worker(
    dock: ClassesDock,
    tiny_session: Session,
    started: list[tuple[list[str], Path]],
    tmp_path: Path,
    qtbot: QtBot,
) -> None:
    _show_run(dock, tiny_session)
    dock.show_export()
    form = dock.exporting
    form.who.setCurrentIndex(form.who.findData("selected"))
    assert not form.button.isEnabled() and "Select particles" in form.button.toolTip()
    mask = np.arange(tiny_session.n_particles) < 7
    dock.state.selection.set(mask)
    assert form.who.currentText() == "the 7 selected particles" and form.button.isEnabled()
    form.path.setText(str(tmp_path / "out.star"))
    assert form.latents.isEnabled() and not form.every_column.isEnabled() and not form.averages.isEnabled()
    form.latents.setChecked(True)
    form.form.setCurrentIndex(form.form.findData(".csv"))
    assert form.path.text() == str(tmp_path / "out.csv") and not form.latents.isEnabled()
    form.every_column.setChecked(True)
    form.poses.setCurrentIndex(form.poses.findData("none"))
    QTest.mouseClick(form.button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    [(line, _)] = started
    run = ["--run", "0001-class-map", "--classes", "cluster-kmeans", "--poses", "none"]
    assert line[4:] == [*run, "--every-column", "--selection", "exported-1"]
    np.testing.assert_array_equal(tiny_session.selections.mask("exported-1"), mask)


def test_recentring_asks_for_the_pixel_size_of_the_micrographs_where_it_is_not_known(
    dock: ClassesDock,
    tiny_session: Session,
    started: list[tuple[list[str], Path]],
    tmp_path: Path,
    qtbot: QtBot,
) -> None:
    _show_run(dock, tiny_session)
    dock.show_export()
    form = dock.exporting
    form.path.setText(str(tmp_path / "out.star"))
    assert not form.recentre.isEnabled() and form.micrograph_size.isHidden()
    dock.state.features["rlnCoordinateX"] = dock.state.features["rlnCoordinateY"] = 100.0
    dock.state.selection.set(np.ones(tiny_session.n_particles, bool))
    form._update()
    form.recentre.setChecked(True)
    assert form.micrograph_size.isVisible() and not form.button.isEnabled()
    assert "pixel size of the micrographs" in form.button.toolTip()
    form.micrograph_size.setValue(1.25)
    QTest.mouseClick(form.button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    asked = "--recentre --micrograph-pixel-size-A 1.25"
    assert asked in " ".join(started[0][0])
    dock.state.features["rlnMicrographPixelSize"] = 1.25
    form._update()
    assert form.micrograph_size.isHidden()


def test_a_table_has_every_column_and_pictures_come_beside(
    dock: ClassesDock, tiny_session: Session, tmp_path: Path, qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    assert dock.state.run is not None
    z = np.linspace(-1, 1, tiny_session.n_particles, dtype=np.float32)[:, None]
    dock.state.run.save_latents(Latents(tiny_session.uid, z, None, None, None))
    dock.state.classes_changed.emit(_save_averages(tiny_session))
    qtbot.waitUntil(lambda: dock.stored is not None, timeout=SLOW)
    dock.show_export()
    form = dock.exporting
    form.path.setText(str(tmp_path / "out.csv"))
    form.every_column.setChecked(True)
    form.montage.setChecked(True)
    QTest.mouseClick(form.button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: form.words.text() != "" or form.complaint.isVisible(), timeout=150_000)
    assert form.words.text().startswith("Written"), form.complaint.sentence.text()
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == tiny_session.n_particles and set(tiny_session.table) <= set(table)
    assert sorted(table["class_id"].unique()) == [1, 2, 3]
    np.testing.assert_allclose(table["z_0"], z[:, 0], atol=1e-6)
    averages = plugin_read(tmp_path / "out.mrcs")
    assert dock.stored is not None
    np.testing.assert_allclose(averages, dock.stored.images, atol=1e-6)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_averages_are_judged_by_keys_and_the_good_are_selected(
    dock: ClassesDock, tiny_session: Session, qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    name = _save_averages(tiny_session)
    dock.state.classes_changed.emit(name)
    qtbot.waitUntil(lambda: dock.stored is not None, timeout=SLOW)
    assert dock.picture.montage is not None and not dock.select_good_button.isEnabled()
    before = dock.picture.montage.pixels.copy()

    def stored() -> list[str]:
        return [str(one.get("mark", "")) for one in tiny_session.classes.read(name).classes]

    dock.one.setCurrentIndex(1)
    layer = dock.picture.layer
    layer.keymap[next(key for key in layer.keymap if str(key) == "G")](layer)
    dock.one.setCurrentIndex(2)
    QTest.mouseClick(dock.bad_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: stored() == ["", "good", "bad"], timeout=SLOW)
    changed = np.any(dock.picture.montage.pixels != before, axis=1)
    assert changed[dock.picture.montage.tile[1] :].any(), "the caption says it"
    QTest.mouseClick(dock.select_good_button, Qt.MouseButton.LeftButton)
    expected = np.arange(tiny_session.n_particles) % 3 == 1
    qtbot.waitUntil(lambda: np.array_equal(dock.state.selection.mask, expected), timeout=SLOW)
    QTest.mouseClick(dock.bad_button, Qt.MouseButton.LeftButton)  # again: taken back
    qtbot.waitUntil(lambda: stored() == ["", "good", ""], timeout=SLOW)


def test_the_class_set_goes_into_a_new_folder(
    dock: ClassesDock, tiny_session: Session, tmp_path: Path, qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    dock.state.classes_changed.emit(_save_averages(tiny_session))
    qtbot.waitUntil(lambda: dock.stored is not None, timeout=SLOW)
    dock.show_export()
    (tmp_path / "out_classes").mkdir()  # somebody's: it is left alone
    form = dock.exporting
    form.path.setText(str(tmp_path / "out.star"))
    for box in (form.particles, form.averages):
        box.setChecked(False)
    assert not form.button.isEnabled()
    form.class_set.setChecked(True)
    QTest.mouseClick(form.button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: form.words.text() != "", timeout=60_000)
    folder = tmp_path / "out_classes-2"
    assert str(folder) in form.words.text()
    assert {"backup_selection.star", "templates.csg", "montage.png"} <= {
        each.name for each in folder.iterdir()
    }
    assert not list((tmp_path / "out_classes").iterdir())


def plugin_read(path: Path) -> Any:
    from particle_explorer.plugin import read_stack

    return read_stack(str(path))[0][0][:]


@given(k=st.integers(1, 17), n=st.integers(16, 200))
def test_every_average_has_its_place_in_the_montage(qapp: QApplication, k: int, n: int) -> None:
    images = np.random.default_rng(k).normal(size=(k, n, n)).astype(np.float32)
    made = montage(images, [(f"class {i}", "signal > noise to 12 Å") for i in range(k)])
    height, width = made.pixels.shape
    assert made.pixels.min() >= 0 and made.pixels.max() <= 1
    for index in range(k):
        row, column = divmod(index, made.columns)
        middle = ((row + 0.5) * made.tile[0], (column + 0.5) * made.tile[1])
        assert middle[0] < height and middle[1] < width
        assert made.index_at(*middle) == index
        tile = made.pixels[row * made.tile[0] :, column * made.tile[1] :][: made.tile[0], : made.tile[1]]
        words = tile[-40:]
        assert words.max() > 0.5, "the caption is there"


def _shown(dock: ClassesDock, session: Session, qtbot: QtBot) -> None:
    _show_run(dock, session)
    dock.state.classes_changed.emit(_save_averages(session))
    qtbot.waitUntil(lambda: dock.stored is not None and dock.one.count() == 3, timeout=SLOW)


def test_averages_are_sorted_and_the_picture_follows(
    dock: ClassesDock, tiny_session: Session, qtbot: QtBot
) -> None:
    _shown(dock, tiny_session, qtbot)
    assert dock.stored is not None and dock.picture.montage is not None
    dock.stored.classes[2]["mark"] = "good"
    dock.stored.classes[0]["mark"] = "bad"
    before = dock.picture.montage.pixels.copy()
    dock.tools.sort.setCurrentIndex(dock.tools.sort.findData("mark"))
    assert dock.tools.order == [2, 1, 0] and not np.array_equal(dock.picture.montage.pixels, before)
    assert "good" in dock.tools.list.item(0).text()
    dock.tools.list.setCurrentRow(0)
    assert dock.one.currentIndex() == 2, "list and box look at the same average"
    dock.one.setCurrentIndex(0)
    assert dock.tools.current == 0


def test_classes_are_joined_by_a_worker(
    dock: ClassesDock, tiny_session: Session, started: list[tuple[list[str], Path]], qtbot: QtBot
) -> None:
    _shown(dock, tiny_session, qtbot)
    tools, path = dock.tools, str(tiny_session.path)
    assert not tools.join_button.isEnabled() and "Ctrl" in tools.join_button.toolTip()
    tools.list.item(1).setSelected(True)
    assert tools.chosen == [0, 1] and tools.join_button.isEnabled()
    tools.join_button.click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    assert started[0][0] == ["amend", path, "--averages", "cluster-kmeans", "--join", "0,1"]
    qtbot.waitUntil(lambda: dock.bar.folder is not None, timeout=SLOW)
    assert not tools.join_button.isEnabled(), "one change at a time"


@pytest.mark.parametrize(
    ("button", "words"),
    [("rename", ["--rename", "2=open"]), ("divide", ["--divide", "2=2"]), ("remove", ["--remove", "2"])],
)
def test_one_class_is_renamed_divided_or_removed_by_a_worker(
    dock: ClassesDock,
    tiny_session: Session,
    started: list[tuple[list[str], Path]],
    qtbot: QtBot,
    button: str,
    words: list[str],
) -> None:
    _shown(dock, tiny_session, qtbot)
    dock.tools.list.setCurrentRow(2)
    dock.tools.name.setText("a,b")
    assert not dock.tools.rename_button.isEnabled(), "a comma would be two classes"
    dock.tools.name.setText("open")
    getattr(dock.tools, f"{button}_button").click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    assert started[0][0][-2:] == words


def test_a_click_leaves_a_member_out_and_the_average_follows(
    dock: ClassesDock, tiny_session: Session, started: list[tuple[list[str], Path]], qtbot: QtBot
) -> None:
    _shown(dock, tiny_session, qtbot)
    panel = dock.members
    assert panel.loaded is None, "members are read when they are looked at"
    dock.members_part.button.setChecked(True)
    qtbot.waitUntil(lambda: panel.loaded is not None, timeout=SLOW)
    loaded = panel.loaded
    assert loaded is not None and loaded.n == 40 and panel.members.n_images == 16
    fit = loaded.values["correlation"][panel.order]
    assert (np.diff(fit) >= 0).all(), "the worst fit comes first"
    before = panel.average()
    weight = np.ones(40)
    weight[panel.order[9]] = 0
    panel.members.clicked.emit(1, 1)
    assert panel.out.sum() == 1 and panel.out[panel.order[9]]
    expected = np.einsum("b,bij->ij", weight, loaded.images.astype(np.float64)) / 39
    np.testing.assert_allclose(panel.average(), expected, atol=1e-6)
    assert not np.allclose(before, expected, atol=1e-4) and "1 left out" in panel.words.text()
    gone = loaded.uid[panel.out]
    panel.again_button.click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    line, folder = started[0]
    assert line[:4] == ["amend", str(tiny_session.path), "--averages", "cluster-kmeans"]
    assert (folder / "leave-out.txt").read_text() == str(gone[0]) and line[-1] == str(
        folder / "leave-out.txt"
    )
    panel.select_button.click()
    assert dock.state.selection.count == 39
    panel.members.clicked.emit(1, 1)
    assert not panel.out.any() and not panel.again_button.isEnabled()


def test_grid_weights_and_poses_reach_the_worker(
    dock: ClassesDock, tiny_session: Session, started: list[tuple[list[str], Path]], qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    assert [dock.make.poses.itemData(i) for i in range(dock.make.poses.count())] == ["run"]
    table = tiny_session.table.assign(angle_deg=0.0, shift_y_px=0.0, shift_x_px=0.0)
    tiny_session.__dict__["table"] = table
    dock.state.set_features(dock.state.features.assign(**{"pose-refined_moved_deg": 1.0}))
    assert [dock.make.poses.itemData(i) for i in range(dock.make.poses.count())] == ["run", "refined", "file"]
    dock.make.poses.setCurrentIndex(1)
    dock.make.weights.setCurrentIndex(dock.make.weights.findData("posterior"))
    dock.make.what.setCurrentIndex(dock.make.what.findData("grid"))
    dock.make.average_button.click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    words = started[0][0]
    assert words[2:4] == ["--by", "grid"] and " ".join(words).endswith("--poses refined --weights posterior")


def test_poses_are_refined_against_classes(
    dock: ClassesDock, tiny_session: Session, started: list[tuple[list[str], Path]], qtbot: QtBot
) -> None:
    _show_run(dock, tiny_session)
    dock.make.what.setCurrentIndex(dock.make.what.findData("grid"))
    dock.make.refine_button.click()
    assert "cluster first" in dock.complaint.sentence.text() and not started
    dock.make.what.setCurrentIndex(dock.make.what.findData("cluster-kmeans"))
    dock.make.refine_button.click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    assert started[0][0][0] == "refine" and started[0][0][2:] == ["--by", "cluster-kmeans"]


def test_every_average_says_what_made_it(dock: ClassesDock, tiny_session: Session, qtbot: QtBot) -> None:
    _shown(dock, tiny_session, qtbot)
    words = dock.made_words.text()
    for part in ("run 0001-class-map", "by k-means cluster", "poses of the run", "CTF: wiener", "spline"):
        assert part in words
    assert "classes/cluster-kmeans.parquet" in words


def test_report_and_aligned_images_are_written_on_demand(
    dock: ClassesDock,
    tiny_session: Session,
    started: list[tuple[list[str], Path]],
    qtbot: QtBot,
    tmp_path: Path,
) -> None:
    _shown(dock, tiny_session, qtbot)
    form = dock.exporting
    form.path.setText(str(tmp_path / "out.star"))
    for box in form._boxes():
        box.setChecked(box in (form.report, form.aligned))
    form.export()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    session = [str(tiny_session.path), "--averages", "cluster-kmeans", "--out"]
    assert started[0][0] == ["report-classes", *session, str(tmp_path / "out.html")]
    assert form._steps == [["export-aligned", *session, str(tmp_path / "out_aligned.star")]]


def test_a_refinement_says_how_far_poses_moved_and_from_whose() -> None:
    from particle_explorer.widgets.average_words import refined_words

    step = {"median_deg": 1.25, "median_px": 0.4}
    words = refined_words({"history": [step, {"median_deg": 0.5, "median_px": 0.125}]})
    assert "last of 2 iterations" in words and "0.50°" in words and "file" not in words
    apart = {"median_deg": 2.0, "within_10_deg": 0.9, "median_px": 0.3}
    assert "90% within 10°" in refined_words({"history": [step], "from_the_file": apart})


def test_captions_say_the_class_its_particles_its_mark_and_its_signal() -> None:
    one = {"label": "3", "n": 40, "ssnr_radius_A": 18.51, "mark": "good"}
    assert caption_lines(one) == ("3 ✓ · N 40", "SSNR 18.5 Å")
    assert caption_lines({**one, "label": "row 1 column 2", "mark": "bad"}) == (
        "row 1 column 2 ✗",
        "N 40 · SSNR 18.5 Å",
    )
    assert caption_lines(one, among=17) == ("3 ✓",) and len(caption_lines(one, among=16)) == 2
    assert caption_lines({"label": "3", "n": 40}) == ("3 · N 40", "")


def test_two_sets_are_compared(dock: ClassesDock, tiny_session: Session, qtbot: QtBot) -> None:
    _shown(dock, tiny_session, qtbot)
    comparison = dock.comparison
    assert not comparison.beside.isVisibleTo(comparison) and comparison.words.text() == NO_OTHER
    other = _save_averages(tiny_session)
    dock.state.classes_changed.emit("")
    qtbot.waitUntil(lambda: comparison.beside.findData(other) > 0, timeout=SLOW)
    assert comparison.beside.findData("cluster-kmeans") < 0, "what is shown is not compared with itself"
    comparison.beside.setCurrentIndex(comparison.beside.findData(other))
    comparison.beside.activated.emit(comparison.beside.currentIndex())
    qtbot.waitUntil(lambda: bool(comparison.words.text()), timeout=SLOW)
    assert "100% share one there" in comparison.words.text() and "2 → 2: 40 (100%)" in comparison.words.text()
    metadata = dock.picture.layer.metadata
    assert metadata["averages"] == "cluster-kmeans" and metadata["how"]["run"]
    assert dock.stored is not None and "away" not in made_words(dock.stored, 0)
    dock.stored.how["apart"] = {"from": "file", "median_deg": 2.0, "within_10_deg": 1.0, "median_px": 0.3}
    assert "those of the file are 2.0°, 0.30 px away" in made_words(dock.stored, 0)


def test_halves_are_called_independent_by_their_models_alone() -> None:
    from particle_explorer.widgets.average_words import quality_words

    one = {"n": 10, "n_effective": 10.0, "halves_independent": False, "ssnr_radius_A": 12.0}
    assert SHARED in quality_words(one, True) and "resolution" not in quality_words(one, True)
    own = {**one, "halves_independent": True, "resolution_A": 14.2}
    assert "14.2 Å" in quality_words(own, True) and "resolution" in quality_words(own, True)


@pytest.mark.parametrize("colour", [False, True])
def test_of_many_averages_the_names_stand_in_the_corners(colour: bool) -> None:
    images = np.ones((20, 3, 32, 32) if colour else (20, 32, 32), np.float32)
    images[..., 8:24, 8:24] = 3  # the particles
    named = montage(images, [caption_lines({"label": str(i), "n": 9}, 20) for i in range(20)])
    bare = montage(images, [("",)] * 20)
    assert named.tile[0] == named.tile[1] and named.columns == 5
    side = named.tile[1] - 4
    for one in (0, 7, 19):
        row, column = divmod(one, 5)
        place = slice(row * named.tile[0], row * named.tile[0] + side), slice(column * named.tile[1], None)
        got, without = (made.pixels[place][:, :side] for made in (named, bare))
        changed = got != without
        assert changed[: side // 2].any() and not changed[side // 2 :].any()
        assert got[changed].max() > 0.9 and named.index_at(place[0].start, place[1].start) == one

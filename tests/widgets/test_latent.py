"""The latent dock on real sessions: axes, handle, live map, background jobs, sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from napari.components import ViewerModel
from numpy.typing import NDArray
from pytestqt.qtbot import QtBot
from qtpy.QtCore import QPoint, Qt
from qtpy.QtGui import QAction
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QComboBox, QWidget

from particle_explorer import jobs
from particle_explorer.configs import ClassMapConfig, RunConfig, SpatialVAEConfig
from particle_explorer.latents import Latents
from particle_explorer.session import Run, Session
from particle_explorer.state import AppState, Preview
from particle_explorer.status import STOP, StatusWriter
from particle_explorer.widgets.explore import Worker
from particle_explorer.widgets.groups import GroupsPanel
from particle_explorer.widgets.latent import HINT, LEARNING, NO_RUN, NOTHING_OPEN, LatentDock
from particle_explorer.widgets.latent_axes import LiveReader, read_columns
from particle_explorer.widgets.provenance import TITLE, ProvenanceDialog
from particle_explorer.widgets.value_slider import ValueSlider
from particle_explorer.widgets.workspace import state_of

LEFT, NONE = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier
Floats = NDArray[np.float64]


def positions(n: int, d: int) -> Floats:
    return np.random.default_rng(0).normal(size=(n, d)) * np.linspace(2, 0.5, d) + 1


def new_run(session: Session, d: int) -> Run:
    model = ClassMapConfig(latent_dim=d) if d <= 2 else SpatialVAEConfig(latent_dim=d)
    return session.new_run(RunConfig(model=model, data=session.data_spec()))


def encoded(session: Session, d: int) -> Run:
    """A run with latents, as if it had been fitted."""
    run, n = new_run(session, d), session.n_particles
    rng = np.random.default_rng(1)
    run.save_latents(
        Latents(
            session.uid,
            positions(n, d).astype(np.float32),
            angle_deg=rng.uniform(-180, 180, n).astype(np.float32),
            extras={"log_likelihood": rng.normal(size=n).astype(np.float32)},
        )
    )
    return run


Open = Callable[..., LatentDock]


@pytest.fixture
def open_dock(qtbot: QtBot, tiny_session: Session) -> Iterator[Open]:
    docks: list[LatentDock] = []

    def build(
        d: int = 2,
        *,
        viewer: ViewerModel | None = None,
        umap: bool = False,
        state: AppState | None = None,
    ) -> LatentDock:
        state = AppState() if state is None else state
        dock = LatentDock(viewer, state=state)
        qtbot.addWidget(dock)
        dock.resize(392, 384)
        with qtbot.waitExposed(dock):
            dock.show()
        docks.append(dock)
        if d:
            run = encoded(tiny_session, d)
            if umap:
                z = positions(tiny_session.n_particles, d)
                table = pd.DataFrame(
                    {"umap_0": 3 * z[:, 1], "umap_1": -(z[:, 0] ** 3)}, tiny_session.table.index
                )
                run.write_column("umap", table, {})
        state.open_session(tiny_session)
        if d:
            qtbot.waitUntil(lambda: dock.canvas.n_points > 0 and dock._axes is not None)
        return dock

    yield build
    for dock in docks:
        dock.shutdown()


def menu_action(dock: LatentDock, words: str, row: int | None = None) -> QAction:
    """A line of the menu Select, or of the one under the right button on a particle."""
    menu = dock.menu
    menu.fill(row)
    return next(action for action in menu.actions() if action.text().startswith(words))


def choose(combo: QComboBox, key: str) -> None:
    index = combo.findData(key)
    assert index >= 0, f"{key} is not offered"
    combo.setCurrentIndex(index)
    combo.activated.emit(index)


def titles(combo: QComboBox) -> list[str]:
    return [combo.itemData(i, Qt.ItemDataRole.ToolTipRole) for i in range(combo.count())]


def drag_handle(dock: LatentDock, to: tuple[float, float]) -> None:
    start, end = dock.canvas.handle_position(), dock.canvas.to_widget(*to)
    assert start is not None
    QTest.mousePress(dock.canvas, LEFT, NONE, start.toPoint())
    for share in (0.5, 1.0):
        QTest.mouseMove(dock.canvas, (start + (end - start) * share).toPoint())
    QTest.mouseRelease(dock.canvas, LEFT, NONE, end.toPoint())


def a_pixel(dock: LatentDock) -> float:
    """How much of the larger axis one pixel is."""
    x0, x1, y0, y1 = dock.canvas.view
    plot = dock.canvas.plot_rect()
    return max((x1 - x0) / plot.width(), (y1 - y0) / plot.height())


# ---- what is said and offered ---------------------------------------------------------


def test_empty_states_say_what_to_do(qtbot: QtBot, tiny_session: Session) -> None:
    state = AppState()
    dock = LatentDock(None, state=state)
    qtbot.addWidget(dock)
    assert dock.canvas._message == NOTHING_OPEN
    state.open_session(tiny_session)
    assert dock.canvas._message == NO_RUN
    qtbot.waitUntil(lambda: len(dock._columns.features) == tiny_session.n_particles)
    assert dock.canvas.n_points == 0 and not dock.x.isEnabled()
    for button in (dock.actions.groups_button, dock.actions.save_button):
        assert not button.isEnabled() and button.toolTip()
    dock.shutdown()


def test_axes_have_names_for_people(open_dock: Open) -> None:
    dock = open_dock(3)
    found = titles(dock.x)
    assert found[:3] == ["map 1", "map 2", "map 3"]
    assert found[3].startswith("principal component 1 (") and found[3].endswith(" %)")
    assert "angle (°)" in found and "log-likelihood" in found
    assert "pixel size (Å)" not in found  # one value for all
    assert "one colour" == titles(dock.colour)[0]
    assert (dock.x.currentData(), dock.y.currentData()) == ("pc_0", "pc_1")


def test_all_of_it_fits_a_narrow_column(open_dock: Open) -> None:
    dock = open_dock(5)
    hint = dock.minimumSizeHint()
    assert hint.width() <= 320 and hint.height() <= 384
    for widget in dock.findChildren(QWidget):
        if widget.isVisibleTo(dock) and widget.toolTip():
            assert widget.mapTo(dock, QPoint(widget.width(), 0)).x() <= dock.width() + 20


def test_the_colour_box_colours_the_map(open_dock: Open, qtbot: QtBot) -> None:
    dock = open_dock()
    choose(dock.colour, "angle_deg")
    qtbot.waitUntil(lambda: dock.canvas.colouring.kind == "cyclic")
    choose(dock.colour, "log_likelihood")
    qtbot.waitUntil(lambda: dock.canvas.colouring.kind == "continuous")
    assert dock.canvas.colouring.title == "log-likelihood"


def test_counts_follow_the_selection(open_dock: Open) -> None:
    dock = open_dock()
    n = dock.state.selection.mask.size
    assert dock.counts.text() == f"{n} particles"
    dock.state.selection.set(np.arange(n) < 7)
    assert dock.counts.text() == f"7 of {n} selected"
    menu_action(dock, "Clear").trigger()
    assert dock.state.selection.count == 0


def test_theme_follows_napari(open_dock: Open) -> None:
    viewer = ViewerModel()
    dock = open_dock(viewer=viewer)
    dark = dock.canvas.grab().toImage().pixelColor(3, 3).lightness()
    viewer.theme = "light"
    assert dock.canvas.grab().toImage().pixelColor(3, 3).lightness() > dark + 100
    dock.deleteLater()


# ---- the handle -----------------------------------------------------------------------


def test_dragging_writes_the_map_position_into_the_state(open_dock: Open) -> None:
    dock = open_dock()
    told: list[Floats] = []
    dock.state.handle_changed.connect(told.append)
    drag_handle(dock, (1.5, 0.8))
    assert np.allclose(dock.state.handle_z, (1.5, 0.8), atol=1.5 * a_pixel(dock))
    assert len(told) == 2  # one per move: no echo
    assert np.allclose(dock.canvas.handle, dock.state.handle_z)
    assert dock.state.selection.count == 0


def test_the_hint_is_gone_after_the_first_drag(open_dock: Open) -> None:
    dock = open_dock()
    assert dock.canvas._hint == HINT
    drag_handle(dock, (1.2, 0.9))
    assert dock.canvas._hint == ""


def test_the_handle_starts_among_the_particles(open_dock: Open) -> None:
    dock = open_dock()
    z = positions(dock.state.selection.mask.size, 2)
    assert np.abs(z - dock.state.handle_z).max(axis=1).min() < 1e-5


def test_others_may_move_the_handle(open_dock: Open) -> None:
    dock = open_dock()
    dock.state.set_handle(np.array([0.3, 0.7]))
    assert dock.canvas.handle == (0.3, 0.7)


def test_dimensions_that_are_not_shown_are_kept_and_have_sliders(open_dock: Open, qtbot: QtBot) -> None:
    dock = open_dock(4)
    choose(dock.x, "z_0")
    choose(dock.y, "z_2")
    qtbot.waitUntil(lambda: dock.canvas._titles == ("map 1", "map 3"))
    before = dock.state.handle_z.copy()
    drag_handle(dock, (1.0, 1.2))
    after = dock.state.handle_z
    assert np.array_equal(after[[1, 3]], before[[1, 3]])
    assert np.allclose(after[[0, 2]], (1.0, 1.2), atol=1.5 * a_pixel(dock))
    assert sorted(dock.sliders.dimensions) == [1, 3]
    slider = dock.sliders.dimensions[3]
    slider.slider.setFocus()
    QTest.keyClick(slider.slider, Qt.Key.Key_Right)
    assert dock.state.handle_z[3] != before[3]
    assert np.array_equal(dock.state.handle_z[:3], after[:3])


def test_principal_components_are_inverted_exactly() -> None:
    z = positions(300, 4)
    columns = read_columns(pd.DataFrame({f"z_{i}": z[:, i] for i in range(4)}))
    axes = columns.handle_axes("pc_1", "pc_3")
    start = z[5]
    assert np.allclose(axes.place(start), [columns.values(key)[5] for key in ("pc_1", "pc_3")], atol=1e-5)
    there = axes.z_at(0.7, -0.2, start)
    assert np.allclose(axes.place(there), (0.7, -0.2))
    assert columns.pca is not None
    moved = columns.pca.components @ (there - start)
    assert np.allclose(moved[[0, 2]], 0, atol=1e-5)  # the others stay


def test_an_axis_that_is_no_latent_dimension_does_not_hold_the_handle() -> None:
    z = positions(50, 2)
    columns = read_columns(pd.DataFrame({"z_0": z[:, 0], "z_1": z[:, 1], "defocus_u_A": np.arange(50.0)}))
    assert columns.handle_axes("z_1", "defocus_u_A").place(z[3]) == (z[3, 1], None)
    assert columns.handle_axes("defocus_u_A", "defocus_u_A").place(z[3]) == (None, None)


def test_in_an_embedding_the_handle_means_its_neighbours(open_dock: Open, qtbot: QtBot) -> None:
    dock = open_dock(umap=True)
    choose(dock.x, "umap_0")
    choose(dock.y, "umap_1")
    qtbot.waitUntil(lambda: dock.canvas._titles == ("UMAP 1", "UMAP 2"))
    z = positions(dock.state.selection.mask.size, 2)
    umap = np.stack([3 * z[:, 1], -(z[:, 0] ** 3)], axis=1)
    middle = int(np.argmin(((z - z.mean(0)) ** 2).sum(1)))
    drag_handle(dock, (float(umap[middle, 0]), float(umap[middle, 1])))
    assert np.linalg.norm(dock.state.handle_z - z[middle]) < 1.0
    under_hand = dock.canvas.handle
    assert np.allclose(under_hand, umap[middle], atol=1.5 * a_pixel(dock))  # it does not jump to a particle
    dock.state.set_handle(z[11])
    assert np.allclose(dock.canvas.handle, umap[11], rtol=1e-5)
    QTest.keyClick(dock.canvas, Qt.Key.Key_Return)
    assert np.allclose(dock.state.handle_z, z[11], rtol=1e-5)
    assert dock.state.selection.active == 11


def test_a_one_dimensional_map_has_another_column_across(open_dock: Open) -> None:
    dock = open_dock(1)
    assert (dock.x.currentData(), dock.y.currentData()) == ("z_0", "log_likelihood")
    assert dock.canvas.handle[1] is None
    drag_handle(dock, (1.7, dock.canvas.view[2]))
    assert dock.state.handle_z == pytest.approx([1.7], abs=0.1)
    before = dock.state.handle_z[0]
    QTest.keyClick(dock.canvas, Qt.Key.Key_Left)
    assert dock.state.handle_z[0] < before


def test_pose_sliders_turn_and_shift_and_reset(open_dock: Open) -> None:
    dock = open_dock()
    told: list[tuple[float, ...]] = []
    dock.state.pose_changed.connect(lambda angle, shift: told.append((angle, *shift)))
    QTest.keyClick(dock.sliders.angle.slider, Qt.Key.Key_PageUp)
    QTest.keyClick(dock.sliders.shift_x.slider, Qt.Key.Key_PageUp)
    assert told[0][0] > 5 and told[0][1:] == (0, 0)
    assert told[1][0] == told[0][0] and told[1][1] == 0 and told[1][2] > 0.1  # (y, x)
    assert dock.sliders.angle.words.text() == f"{told[0][0]:.0f}°"
    dock.state.set_pose(-90.0, np.array([2.0, 0.0]))
    assert (dock.sliders.angle.value, dock.sliders.shift_y.value, dock.sliders.shift_x.value) == (
        -90.0,
        2.0,
        0.0,
    )
    QTest.mouseClick(dock.sliders.reset_pose, LEFT)
    assert dock.state.angle_deg == 0 and not dock.state.shift_yx_px.any()


# ---- another run, another session -----------------------------------------------------


def test_another_run_of_other_dimensions_brings_its_own_axes(
    open_dock: Open, qtbot: QtBot, tiny_session: Session
) -> None:
    dock = open_dock(2)
    run = encoded(tiny_session, 4)
    dock.state.selection.set(np.arange(tiny_session.n_particles) < 5)
    dock.state.open_run(run)
    qtbot.waitUntil(lambda: dock.x.currentData() == "pc_0" and dock.canvas._titles[0].startswith("principal"))
    assert dock.state.handle_z.shape == (4,) and dock.state.selection.count == 5
    dock.state.open_session(None)
    assert dock.canvas.n_points == 0 and dock.canvas._message == NOTHING_OPEN
    assert dock.canvas.handle == (None, None)


def test_a_zoom_stays_when_columns_are_added(open_dock: Open, qtbot: QtBot, tiny_session: Session) -> None:
    dock = open_dock()
    dock.canvas.zoom(3.0, dock.canvas.to_widget(1, 1))
    view = dock.canvas.view
    run = dock.state.run
    assert run is not None
    table = pd.DataFrame({"mood": np.arange(tiny_session.n_particles)}, tiny_session.table.index)
    run.write_column("mood", table, {})
    dock.state.reload_features()
    qtbot.waitUntil(lambda: dock.colour.findData("mood") >= 0)
    qtbot.wait(50)
    assert dock.canvas.view == view


# ---- while a run trains ---------------------------------------------------------------


def write_live(run: Run, number: int, row: NDArray[np.int64], z: Floats) -> None:
    (run.path / "live").mkdir(exist_ok=True)
    np.savez(run.path / "live" / f"{number:04d}.npz", epoch=number, row=row, z=z.astype(np.float32))


def test_the_map_of_a_run_that_trains_is_live(qtbot: QtBot, tiny_session: Session) -> None:
    state = AppState()
    dock = LatentDock(None, state=state)
    qtbot.addWidget(dock)
    dock.resize(392, 384)
    dock.show()
    state.open_session(tiny_session)
    run = new_run(tiny_session, 2)
    rows = np.arange(0, 60, 2)
    z = positions(30, 2)
    with StatusWriter(run.path):
        qtbot.waitUntil(lambda: dock.canvas._message == LEARNING, timeout=5000)
        write_live(run, 0, rows, z)
        qtbot.waitUntil(lambda: dock.canvas.n_points == 30, timeout=5000)
        assert set(dock.canvas.picture.points.rows) == set(rows)
        assert dock.live_button.isVisibleTo(dock)
        dock.canvas.zoom(2.0, dock.canvas.to_widget(1, 1))
        view = dock.canvas.view
        write_live(run, 1, rows[:20], z[:20] + 5)
        qtbot.waitUntil(lambda: dock.canvas.n_points == 20, timeout=5000)
        assert dock.canvas.view == view
    run.save_latents(Latents(tiny_session.uid, positions(tiny_session.n_particles, 2).astype(np.float32)))
    state.open_run(run)
    qtbot.waitUntil(lambda: dock.canvas.n_points == tiny_session.n_particles, timeout=5000)
    qtbot.waitUntil(lambda: not dock.live_button.isVisibleTo(dock), timeout=5000)
    assert dock.canvas.handle != (None, None)
    dock.shutdown()


def test_the_finished_map_stays_within_reach_while_another_run_trains(
    open_dock: Open, qtbot: QtBot, tiny_session: Session
) -> None:
    dock = open_dock()
    n = tiny_session.n_particles
    run = new_run(tiny_session, 2)
    with StatusWriter(run.path):
        write_live(run, 0, np.arange(10), positions(10, 2))
        qtbot.waitUntil(lambda: dock.canvas.n_points == 10, timeout=5000)
        dock.live_button.setChecked(False)
        qtbot.waitUntil(lambda: dock.canvas.n_points == n, timeout=5000)
        write_live(run, 1, np.arange(11), positions(11, 2))
        qtbot.wait(900)
        assert dock.canvas.n_points == n


def test_each_live_file_is_read_once_and_old_ones_never(tiny_session: Session) -> None:
    run, look = new_run(tiny_session, 2), LiveReader()
    assert look(tiny_session.path).run_path is None
    with StatusWriter(run.path):
        assert look(tiny_session.path).live is None
        for number in (9, 10):
            write_live(run, number, np.arange(3), positions(3, 2))
        first = look(tiny_session.path)
        assert first.live is not None and first.live.epoch == 10
        assert look(tiny_session.path).live is None
    assert look(tiny_session.path).run_path is None


# ---- jobs and sets --------------------------------------------------------------------


Panels = Callable[..., tuple[LatentDock, GroupsPanel]]


@pytest.fixture
def panels(open_dock: Open, qtbot: QtBot) -> Iterator[Panels]:
    """A map and, of the same state, the part of Explore that lays out and groups."""
    made: list[GroupsPanel] = []

    def build() -> tuple[LatentDock, GroupsPanel]:
        model = ViewerModel()
        dock = open_dock(viewer=model, state=state_of(model))
        worker = Worker(model)
        panel = GroupsPanel(model, worker)
        worker.layout().addWidget(panel)
        qtbot.addWidget(worker)
        worker.show()
        made.append(panel)
        return dock, panel

    yield build
    for panel in made:
        panel.tasks.stop()
        panel.worker.stop()


def test_umap_runs_in_the_background_and_shows_itself(
    panels: Panels, qtbot: QtBot, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    dock, groups = panels()
    run = dock.state.run
    assert run is not None
    asked: list[list[str]] = []
    worker = StatusWriter(tiny_session.path / "jobs" / "0001-embed")

    def start(args: list[str], folder: Path) -> Path:
        asked.append(args)
        assert folder == worker.folders[0]
        worker.__enter__()
        return folder

    monkeypatch.setattr(jobs, "start", start)
    QTest.mouseClick(groups.embed_button, LEFT)
    bar = groups.worker.bar
    qtbot.waitUntil(lambda: bar.isVisible())
    assert asked == [["embed", str(run.path)]]
    assert not groups.cluster_button.isEnabled() and "Wait" in groups.cluster_button.toolTip()
    z = positions(tiny_session.n_particles, 2)
    run.write_column(
        "umap", pd.DataFrame({"umap_0": z[:, 1], "umap_1": z[:, 0]}, tiny_session.table.index), {}
    )
    worker.update(message="umap")
    worker.__exit__(None, None, None)
    qtbot.waitUntil(lambda: dock.x.currentData() == "umap_0", timeout=5000)
    assert dock.y.currentData() == "umap_1"
    assert groups.embed_button.isEnabled() and not bar.isVisible()


def test_a_job_can_be_cancelled(panels: Panels, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> None:
    _, groups = panels()
    workers: list[StatusWriter] = []

    def start(args: list[str], folder: Path) -> Path:
        workers.append(StatusWriter(folder).__enter__())
        return folder

    monkeypatch.setattr(jobs, "start", start)
    QTest.mouseClick(groups.embed_button, LEFT)
    bar = groups.worker.bar
    qtbot.waitUntil(lambda: bar.isVisible())
    QTest.mouseClick(bar.cancel, LEFT)
    folder = workers[0].folders[0]
    assert (folder / STOP).exists()
    workers[0].stop.set()
    workers[0].__exit__(None, None, None)
    qtbot.waitUntil(lambda: not bar.isVisible(), timeout=5000)
    assert groups.embed_button.isEnabled()
    assert not groups.worker.complaint.isVisible()


def test_clusters_are_computed_by_a_worker_and_colour_the_map(panels: Panels, qtbot: QtBot) -> None:
    dock, groups = panels()
    asked: list[bool] = []
    dock.state.groups_asked.connect(lambda: asked.append(True))
    QTest.keyClick(dock.canvas, Qt.Key.Key_C)
    QTest.mouseClick(dock.actions.groups_button, LEFT)
    assert asked == [True, True], "the map shows the way to the one place where groups are made"
    groups.clustering.editor("n_clusters").value = 3
    QTest.mouseClick(groups.cluster_button, LEFT)
    complaint = groups.worker.complaint
    qtbot.waitUntil(lambda: dock.canvas.colouring.kind == "category" or complaint.isVisible(), timeout=90_000)
    assert not complaint.isVisible(), complaint.details.toPlainText()
    assert dock.canvas.colouring.labels == ("1", "2", "3")
    assert dock.colour.currentText() == "k-means cluster"


def test_a_group_keeps_the_colour_it_is_given(panels: Panels, qtbot: QtBot, tiny_session: Session) -> None:
    dock, groups = panels()
    run = dock.state.run
    assert run is not None
    n = tiny_session.n_particles
    table = pd.DataFrame({"cluster-kmeans": np.arange(n) % 3 + 1}, tiny_session.table.index)
    run.write_column("cluster-kmeans", table, {"method": "kmeans"})
    dock.state.reload_features()
    qtbot.waitUntil(lambda: groups.groups.count() == 3)
    menu = groups.colour_menu(groups.groups.item(1))
    pink = next(action for action in menu.actions() if action.text() == "pink")
    pink.trigger()
    qtbot.waitUntil(
        lambda: (
            dock.canvas.colouring.kind == "category"
            and dock.canvas.colouring.lut[1].tolist() == [0xCC, 0x79, 0xA7]
        ),
        timeout=5000,
    )
    assert dock.canvas.colouring.lut[0].tolist() != [0xCC, 0x79, 0xA7]
    assert run.group_colours("cluster-kmeans") == {"2": "cc79a7"}
    assert run.column_record("cluster-kmeans")["config"] == {"method": "kmeans"}, "the rest is kept"
    assert run.group_colours("class_id") == {}


def test_a_failed_job_says_why_in_place(
    panels: Panels, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    from particle_explorer.files import UserError

    _, groups = panels()

    def start(args: list[str], folder: Path) -> Path:
        with StatusWriter(folder):
            raise UserError("120 particles cannot make 1000 clusters; ask for fewer")

    def swallow(args: list[str], folder: Path) -> Path:
        try:
            return start(args, folder)
        except UserError:
            return folder

    monkeypatch.setattr(jobs, "start", swallow)
    groups.cluster()
    complaint = groups.worker.complaint
    qtbot.waitUntil(lambda: complaint.isVisible(), timeout=5000)
    assert complaint.sentence.text().startswith("120 particles")
    assert groups.cluster_button.isEnabled()


def test_a_set_is_saved_by_keyboard(open_dock: Open, qtbot: QtBot, tiny_session: Session) -> None:
    dock = open_dock()
    mask = np.arange(tiny_session.n_particles) % 3 == 0
    dock.state.selection.set(mask)
    QTest.keyClick(dock.canvas, Qt.Key.Key_S)
    qtbot.waitUntil(lambda: dock.actions.set_name.text() == "set 1")
    QTest.keyClicks(dock.actions.set_name, "open ones")
    with qtbot.waitSignal(SignalBridge(dock.state.sets_changed, dock).told):
        QTest.keyClick(dock.actions.set_name, Qt.Key.Key_Return)
    assert tiny_session.selections.names() == ["open ones"]
    assert np.array_equal(tiny_session.selections.mask("open ones"), mask)


def test_a_bad_name_for_a_set_is_refused_in_one_sentence(
    open_dock: Open, qtbot: QtBot, tiny_session: Session
) -> None:
    dock = open_dock()
    dock.state.selection.set(np.arange(tiny_session.n_particles) < 4)
    dock.actions.ask_name()
    dock.actions.set_name.setText("../evil")
    dock.actions.save_set()
    qtbot.waitUntil(lambda: dock.complaint.isVisibleTo(dock))
    assert "evil" in dock.complaint.sentence.text()
    assert tiny_session.selections.names() == []


def SignalBridge(signal: object, owner: QWidget) -> object:
    """A psygnal signal as a Qt signal, for `waitSignal`."""
    from qtpy.QtCore import QObject, Signal

    class Bridge(QObject):
        told = Signal()

    bridge = Bridge(owner)
    signal.connect(lambda *_: bridge.told.emit())  # type: ignore[attr-defined]
    return bridge


def test_the_dock_may_go_at_any_time(qtbot: QtBot, tiny_session: Session) -> None:
    state = AppState()
    dock = LatentDock(None, state=state)
    encoded(tiny_session, 2)
    state.open_session(tiny_session)
    gone: list[bool] = []
    dock.destroyed.connect(lambda: gone.append(True))
    dock.deleteLater()
    qtbot.waitUntil(lambda: bool(gone))
    state.selection.set(np.ones(tiny_session.n_particles, bool))
    state.set_handle(np.array([1.0, 2.0]))
    state.open_session(None)


def test_a_million_rows_are_read_off_the_thread_of_the_window() -> None:
    """Reading is one call, so that a thread can do it; it must not take long either."""
    n = 100_000
    rng = np.random.default_rng(0)
    features = pd.DataFrame(
        {f"z_{i}": rng.normal(size=n) for i in range(8)} | {"defocus_u_A": rng.normal(size=n)}
    )
    columns = read_columns(features)
    assert columns.n_dims == 8 and columns.points("pc_0", "pc_1").rows.size == n


# ---- selecting by what particles are --------------------------------------------------


def test_neighbours_on_the_map_and_like_this_one(open_dock: Open, qtbot: QtBot) -> None:
    dock = open_dock(3)
    dock.menu.n_nearest = 12
    z = positions(dock.state.selection.mask.size, 3).astype(np.float32)
    menu_action(dock, "The 12 most like this one", row=30).trigger()
    qtbot.waitUntil(lambda: dock.state.selection.count == 12)
    away = np.hypot.reduce(z - z[30], axis=1)
    assert set(dock.state.selection.rows) == set(np.argsort(away)[:12])
    dock.state.set_handle(z[7].astype(float))
    menu_action(dock, "The 12 nearest to ◉").trigger()
    wanted = set(np.argsort(np.hypot.reduce(z - z[7], axis=1))[:12])
    qtbot.waitUntil(lambda: set(dock.state.selection.rows) == wanted)
    menu_action(dock, "Undo").trigger()
    assert dock.state.selection.mask[30]
    menu_action(dock, "Invert").trigger()
    assert dock.state.selection.count == z.shape[0] - 12
    assert not menu_action(dock, "The same group").isEnabled(), "there are no groups yet"


def test_a_group_is_selected_in_the_legend_and_its_histogram(open_dock: Open, qtbot: QtBot) -> None:
    from particle_explorer.widgets.plot_frame import swatches

    dock = open_dock(2)
    kinds = np.where(np.arange(dock.state.selection.mask.size) % 3 == 0, "round", "long")
    dock.state.set_features(dock.state.features.assign(kind=kinds))
    qtbot.waitUntil(lambda: dock.colour.findData("kind") >= 0)
    choose(dock.colour, "kind")
    qtbot.waitUntil(lambda: dock.canvas.colouring.kind == "category")
    found, _ = swatches(dock.canvas.plot_rect(), dock.canvas.colouring, dock.canvas.font())
    place = next(box for _, words, box in found if words == "round").center().toPoint()
    QTest.mouseClick(dock.canvas, LEFT, NONE, place)
    assert np.array_equal(dock.state.selection.mask, kinds == "round")
    QTest.mouseClick(dock.histogram_button, LEFT)
    qtbot.waitUntil(lambda: dock.histogram.histogram.counts is not None)
    bars = dock.histogram.histogram
    QTest.mouseClick(bars, LEFT, NONE, QPoint(round(bars.to_x(0)), round(bars.plot().center().y())))
    assert np.array_equal(dock.state.selection.mask, kinds == "long")
    qtbot.waitUntil(lambda: bool((bars.counts.selected == [(kinds == "long").sum(), 0]).all()))


def test_numbers_of_the_histogram_select_and_its_handles_recolour(open_dock: Open, qtbot: QtBot) -> None:
    dock = open_dock(2)
    choose(dock.colour, "log_likelihood")
    QTest.mouseClick(dock.histogram_button, LEFT)
    qtbot.waitUntil(lambda: dock.histogram.histogram.colouring is not None)
    dock.histogram.low.setText("0.5")
    QTest.keyClick(dock.histogram.low, Qt.Key.Key_Return)
    values = dock.state.features["log_likelihood"].to_numpy()
    assert np.array_equal(dock.state.selection.mask, values >= 0.5)
    dock.histogram.histogram.limits_moved.emit(-0.2, 0.2)
    assert (dock.canvas.colouring.low, dock.canvas.colouring.high) == (-0.2, 0.2)
    QTest.mouseClick(dock.histogram.reset_button, LEFT)
    qtbot.waitUntil(lambda: dock.canvas.colouring.high > 1)


def test_a_slider_has_the_digits_that_its_range_needs(qtbot: QtBot) -> None:
    slider = ValueSlider("map 1", -0.02, 0.02)
    qtbot.addWidget(slider)
    got: list[float] = []
    slider.moved.connect(got.append)
    slider.slider.setValue(750)
    assert got == [pytest.approx(0.01, abs=1e-4)] and slider.words.text() == "0.0100"
    slider.set_value(-0.000001)
    assert slider.words.text() == "0.0000"
    slider.set_range(-30.0, 50.0)
    slider.slider.setValue(1000)
    assert got[-1] == 50.0 and slider.words.text() == "50.0"


def test_a_new_column_leaves_what_follows_from_the_positions() -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"z_0": rng.normal(size=50), "z_1": rng.normal(size=50), "z_2": rng.normal(size=50)})
    before = read_columns(table)
    grouped = read_columns(table.assign(cluster=np.arange(50) % 3), None, before)
    assert grouped.positions is before.positions
    assert [choice for choice in grouped.axes if choice.key != "cluster"] == list(before.axes)
    assert "cluster" in [choice.key for choice in grouped.colours]
    moved = read_columns(table.assign(z_0=2 * table["z_0"]), None, before)
    assert moved.z is not before.z and moved.positions.spread[0, 1] == pytest.approx(
        2 * before.positions.spread[0, 1]
    )


def test_the_menu_says_what_made_the_pictures_beside_the_mouse(open_dock: Open) -> None:
    dock = open_dock(2)
    state, session = dock.state, dock.state.session
    assert session is not None
    assert not menu_action(dock, "What made the preview average?").isEnabled()

    def record(words: str, row: int | None = None) -> str:
        menu_action(dock, words, row).trigger()
        dialog = dock.findChildren(ProvenanceDialog)[-1]
        text = dialog.text.toPlainText()
        dialog.setParent(None)  # type: ignore[call-overload]
        dialog.close()
        return text

    text = record(TITLE, 7)
    stack, index = state.features["stack_path"].iloc[7], state.features["stack_index"].iloc[7]
    assert f"image: number {index + 1} of {stack}" in text and f"uid: {session.uid[7]}" in text
    assert "particle: 8" in text and "angle_deg:" in text and "z_0:" in text and "z_1:" in text
    assert str(session.path / "session.json") in text and "config.json" not in text
    made = {"poses": "of the run", "uid": session.uid[:3]}
    state.set_preview(Preview(np.zeros((8, 8), np.float32), 3, 3, True, made))
    assert f"uid: {', '.join(map(str, session.uid[:3]))}" in record("What made the preview average?")

"""Lasso, save a set, zoom, sort, close: the session opens again as it was left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("napari")

from pytestqt.qtbot import QtBot
from qtpy.QtCore import QPointF, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QDockWidget, QMainWindow

from particle_explorer.configs import ClassMapConfig, RunConfig
from particle_explorer.latents import Latents
from particle_explorer.session import Run, Session
from particle_explorer.widgets.memory import NAME, _dock_of, _put, read_memory
from particle_explorer.widgets.screenshots import Camera, Hand
from particle_explorer.widgets.workspace import Workspace, open_workspace


def encoded(session: Session, seed: int) -> Run:
    run = session.new_run(RunConfig(model=ClassMapConfig(), data=session.data_spec()))
    rng, n = np.random.default_rng(seed), session.n_particles
    run.save_latents(
        Latents(
            session.uid,
            rng.normal(size=(n, 2)).astype(np.float32),
            angle_deg=rng.uniform(-180, 180, n).astype(np.float32),
            shift_yx_px=rng.normal(size=(n, 2)).astype(np.float32),
            extras={"log_likelihood": rng.normal(size=n).astype(np.float32)},
        )
    )
    return run


def opened(viewer: Any, session: Session, qtbot: QtBot) -> tuple[Workspace, Hand]:
    workspace = open_workspace(viewer, session.path)
    qtbot.waitUntil(lambda: workspace.latent.canvas.n_points == 120, timeout=10_000)
    qtbot.waitUntil(lambda: workspace.memory._ready and not workspace.latent.is_recalling, timeout=10_000)
    return workspace, Hand(workspace)


def choose(combo: Any, key: str) -> None:
    combo.setCurrentIndex(combo.findData(key))
    combo.activated.emit(combo.currentIndex())


def test_a_session_opens_again_as_it_was_left(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, qtbot: QtBot, tmp_path: Path
) -> None:
    older = encoded(tiny_session, 1)
    encoded(tiny_session, 2)
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    workspace, hand = opened(viewer, tiny_session, qtbot)
    workspace.train.show_run(older.name)
    hand.wait(lambda: workspace.state.run.name == older.name, "the older run")
    hand.rest(0.5)
    latent, gallery, canvas = workspace.latent, workspace.gallery, workspace.latent.canvas
    choose(latent.x, "pc_0")
    choose(latent.y, "log_likelihood")
    choose(latent.colour, "angle_deg")
    hand.rest(0.3)
    hand.lasso((0.3, 0.4), 0.25)
    selection = workspace.state.selection
    assert 0 < selection.count < 120
    layer = viewer.layers["selected particles"]
    hand.wait(lambda: len(layer.data) == selection.count, "the layer")
    QTest.keyClick(canvas, Qt.Key.Key_S)
    hand.write(latent.actions.set_name, "left side")
    hand.wait(lambda: tiny_session.selections.names() == ["left side"], "the set")
    kept = selection.mask.copy()
    canvas.zoom(2.0, QPointF(canvas.plot_rect().center()))
    workspace.state.set_handle(np.array([0.25, -0.5]))
    workspace.state.set_view("low-pass")
    gallery.sort_by("log_likelihood", descending=True)
    newest = workspace.state.session.newest_finished_run().name
    second = workspace.train.second
    second.show(newest)
    hand.wait(lambda: second.is_open and second.dock.canvas.n_points == 120, "the second map")
    choose(second.dock.x, "angle_deg")
    choose(second.dock.colour, "log_likelihood")
    second.twin.set_handle(np.array([-1.0, 0.5]))
    second.holder.setGeometry(60, 50, 420, 480)
    hand.tab("Classes")
    view = canvas.view
    hand.rest(0.3)
    placed = second.holder.geometry()
    workspace.shutdown()
    assert read_memory(tiny_session.path)["run"] == older.name
    viewer.close()

    other = make_napari_viewer(show=True)
    other.window.resize(1366, 768)
    again, hand = opened(other, Session.open(tiny_session.path), qtbot)
    state = again.state
    assert state.run.name == older.name
    assert np.array_equal(state.selection.mask, kept)
    assert np.array_equal(tiny_session.selections.mask("left side"), kept)
    assert list(state.handle_z) == [0.25, -0.5] and state.view == "low-pass"
    axes = (again.latent.x, again.latent.y, again.latent.colour)
    assert [combo.currentData() for combo in axes] == ["pc_0", "log_likelihood", "angle_deg"]
    np.testing.assert_allclose(again.latent.canvas.view, view)
    qtbot.waitUntil(lambda: again.gallery.sort.currentData() == "log_likelihood", timeout=5000)
    assert again.gallery.down_button.isChecked()
    assert again.tabs.tabText(again.tabs.currentIndex()) == "Classes"
    hand.wait(lambda: len(other.layers["selected particles"].data) == kept.sum(), "the layer")
    second = again.train.second
    hand.wait(lambda: second.is_open and second.dock.canvas.n_points == 120, "the second map")
    hand.wait(lambda: not second.dock.is_recalling, "its axes")
    assert second.twin.run.name == newest and list(second.twin.handle_z) == [-1.0, 0.5]
    assert [box.currentData() for box in (second.dock.x, second.dock.colour)] == [
        "angle_deg",
        "log_likelihood",
    ]
    assert second.holder.isFloating() and second.holder.geometry() == placed
    Camera(other, tmp_path).take_window(second.holder, "second")
    hand.lasso((0.6, 0.5), 0.2)
    np.testing.assert_array_equal(second.twin.selection.mask, state.selection.mask)
    second.holder.destroyOnClose()
    hand.rest(0.2)
    assert again.memory.snapshot()["second"] == {} and second.dock is None
    again.shutdown()
    hand.rest(0.1)


def test_a_session_whose_prepared_images_are_gone_opens_and_says_so(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, qtbot: QtBot
) -> None:
    encoded(tiny_session, 1)
    (tiny_session.path / "images.json").unlink()
    viewer = make_napari_viewer(show=True)
    workspace, hand = opened(viewer, Session.open(tiny_session.path), qtbot)
    hand.lasso((0.5, 0.5), 0.3)
    hand.rest(0.2)
    assert workspace.state.selection.count and "selected particles" not in viewer.layers
    assert "the next training makes them again" in workspace.gallery.strip.message
    workspace.shutdown()
    hand.rest(0.1)


def test_docks_float_again_where_they_floated_and_undo_goes_on(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, qtbot: QtBot
) -> None:
    encoded(tiny_session, 1)
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1100, 700)
    workspace, hand = opened(viewer, tiny_session, qtbot)
    selection, n = workspace.state.selection, tiny_session.n_particles
    earlier = [np.arange(n) % k == 0 for k in (2, 3, 5)]
    for mask in earlier:
        selection.set(mask)
    column, strip = _dock_of(workspace), workspace.gallery_dock
    assert column is not None and strip is not None
    column.setFloating(True)
    column.setGeometry(40, 30, 380, 560)
    column.parentWidget().addDockWidget(Qt.DockWidgetArea.TopDockWidgetArea, strip)
    hand.rest(0.3)
    at = column.geometry()
    workspace.shutdown()
    viewer.close()

    other = make_napari_viewer(show=True)
    other.window.resize(1100, 700)
    again, hand = opened(other, Session.open(tiny_session.path), qtbot)
    hand.rest(0.3)
    column, strip = _dock_of(again), again.gallery_dock
    assert column is not None and column.isFloating() and column.geometry() == at
    assert strip is not None and not strip.isFloating()
    main = strip.parentWidget()
    assert main.dockWidgetArea(strip) == Qt.DockWidgetArea.TopDockWidgetArea
    selection = again.state.selection
    for mask in reversed(earlier):
        np.testing.assert_array_equal(selection.mask, mask)
        selection.undo()
    again.shutdown()
    hand.rest(0.1)


def test_a_dock_that_floated_on_a_screen_that_is_gone_comes_to_one_that_is_there(qtbot: QtBot) -> None:
    main, dock = QMainWindow(), QDockWidget("one")
    qtbot.addWidget(main)
    main.addDockWidget(Qt.DockWidgetArea.RightDockWidgetArea, dock)
    main.show()
    _put(dock, main, {"area": "gone", "floating": True, "at": [90_000, -9_000, 300, 200]})
    screen = QApplication.primaryScreen().availableGeometry()
    assert dock.isFloating() and screen.contains(dock.geometry())
    _put(dock, main, {"area": "LeftDockWidgetArea", "floating": False, "at": []})
    assert not dock.isFloating()
    assert main.dockWidgetArea(dock) == Qt.DockWidgetArea.LeftDockWidgetArea


def test_a_damaged_memory_is_no_obstacle(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, qtbot: QtBot
) -> None:
    encoded(tiny_session, 1)
    damaged = {
        "format_version": 1,
        "map": {"x": "gone", "y": 3},
        "run": "9",
        "docks": {"column": {"at": "x"}, "gallery": 3},
        "past": [7],
    }
    (tiny_session.path / NAME).write_text(json.dumps(damaged))
    viewer = make_napari_viewer(show=True)
    workspace, hand = opened(viewer, tiny_session, qtbot)
    assert workspace.latent.x.currentData() == "z_0"
    workspace.memory.save()
    assert read_memory(tiny_session.path)["map"]["x"] == "z_0"
    (tiny_session.path / NAME).write_text("{")
    assert read_memory(tiny_session.path) == {}
    workspace.shutdown()
    hand.rest(0.1)

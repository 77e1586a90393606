"""The workspace: one state per viewer, one column that fits, nothing heavy in the window's process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("napari")

from napari.components import ViewerModel
from napari.utils._proxies import PublicOnlyProxy
from pytestqt.qtbot import QtBot
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QAbstractButton, QComboBox, QLabel, QWidget

from particle_explorer.session import Session
from particle_explorer.widgets.workspace import open_workspace, state_of, workspace_of


def test_one_state_per_viewer_seen_through_any_proxy() -> None:
    one, other = ViewerModel(), ViewerModel()
    assert state_of(one) is state_of(one)
    assert state_of(PublicOnlyProxy(one)) is state_of(one)
    assert state_of(one) is not state_of(other)


def test_the_state_goes_with_its_viewer() -> None:
    viewer = ViewerModel()
    gone = weakref.ref(state_of(viewer))
    del viewer
    gc.collect()
    assert gone() is None


def test_the_window_never_imports_torch() -> None:
    code = (
        "import sys\n"
        "import particle_explorer.plugin\n"
        "assert not {'qtpy', 'napari', 'torch', 'pandas'} & set(sys.modules), sorted(sys.modules)\n"
        "from particle_explorer.widgets import classes, data, latent, reconstruction, selected, train\n"
        "from particle_explorer.widgets import workspace\n"
        "workspace._import_slow_modules()\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def workspace(make_napari_viewer: Callable[..., Any], qtbot: QtBot) -> Any:
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    column = open_workspace(viewer)
    qtbot.wait(100)
    yield column
    column.shutdown()
    qtbot.wait(50)


def test_opened_twice_is_there_once(workspace: Any) -> None:
    assert open_workspace(workspace.viewer) is workspace
    assert workspace_of(workspace.viewer) is workspace
    assert workspace.viewer.canvas.grid.enabled


def test_fits_a_small_screen(workspace: Any, tiny_session: Session, qtbot: QtBot) -> None:
    assert 320 <= workspace.width() <= 400
    assert workspace.minimumSizeHint().height() <= 640
    workspace.open(tiny_session.path)
    qtbot.waitUntil(lambda: workspace.state.session is not None, timeout=10_000)
    for index in range(workspace.tabs.count()):
        workspace.tabs.setCurrentIndex(index)
        qtbot.wait(20)
        page = workspace.tabs.currentWidget().widget()
        assert page.width() <= workspace.width()
        assert page.minimumSizeHint().width() <= workspace.width(), "cut off: there is no sideways scrolling"


def test_a_folded_gallery_gives_its_room_away(workspace: Any, tiny_session: Session, qtbot: QtBot) -> None:
    workspace.open(tiny_session.path)
    qtbot.waitUntil(lambda: workspace.gallery_dock is not None, timeout=10_000)
    qtbot.wait(50)
    before = workspace.gallery_dock.height()
    assert before >= 100
    workspace.gallery.set_folded(True)
    qtbot.waitUntil(lambda: workspace.gallery_dock.height() < 50)
    workspace.gallery.set_folded(False)
    qtbot.waitUntil(lambda: workspace.gallery_dock.height() >= min(before, 150) - 10)


def test_every_control_says_what_it_does(workspace: Any) -> None:
    for control in workspace.findChildren(QAbstractButton) + workspace.findChildren(QComboBox):
        if isinstance(control, QWidget) and control.isVisibleTo(workspace):
            text = getattr(control, "text", str)()
            assert control.toolTip() or len(text) > 2, (control, control.parent())


def test_a_session_opens_with_its_particles_as_a_layer(
    workspace: Any, tiny_session: Session, qtbot: QtBot
) -> None:
    workspace.open(tiny_session.path)
    qtbot.waitUntil(lambda: "selected particles" in workspace.viewer.layers, timeout=10_000)
    assert workspace.state.session.path == tiny_session.path
    assert workspace.tabs.currentIndex() == 1, "the next step: training"
    assert tiny_session.path.name in workspace.viewer.title


def test_a_wrong_folder_is_said_in_place(workspace: Any, tmp_path: Any, qtbot: QtBot) -> None:
    workspace.open(tmp_path)
    qtbot.waitUntil(lambda: workspace.particles.complaint.isVisible(), timeout=10_000)
    assert "not a session" in workspace.particles.complaint.sentence.text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_follows_the_theme(workspace: Any, theme: str, qtbot: QtBot) -> None:
    workspace.viewer.theme = theme
    qtbot.wait(50)
    text = workspace.train.watch.curves.palette().windowText().color().lightness()
    assert text < 100 if theme == "light" else text > 150


def test_the_binding_keeps_its_references(qapp: Any) -> None:
    """One release of PySide6 gives back a reference to None too many in every call: napari dies of it."""
    label = QLabel()
    before = sys.getrefcount(None)
    for _ in range(200):
        label.setText("a")
    assert sys.getrefcount(None) > before - 100


def test_letters_on_the_map_average_and_export(workspace: Any, tiny_session: Session, qtbot: QtBot) -> None:
    workspace.open(tiny_session.path)
    qtbot.waitUntil(lambda: workspace.latent.isVisible(), timeout=10_000)
    QTest.keyClick(workspace.latent.canvas, Qt.Key.Key_A)
    assert workspace.tabs.tabText(workspace.tabs.currentIndex()) == "Classes"
    workspace.tabs.setCurrentIndex(0)
    QTest.keyClick(workspace.latent.canvas, Qt.Key.Key_L)
    assert workspace.tabs.currentIndex() == 0 and workspace.latent.canvas.tool == "lasso"
    QTest.keyClick(workspace.latent.canvas, Qt.Key.Key_E)
    assert workspace.tabs.tabText(workspace.tabs.currentIndex()) == "Classes"

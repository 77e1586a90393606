"""Selected particles as points on their micrographs, by hand in a real window."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest

pytest.importorskip("napari")

from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QMouseEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

from particle_explorer.configs import PreprocessConfig
from particle_explorer.io.reading import read
from particle_explorer.session import Session
from particle_explorer.widgets.micrograph import IMAGE, LOOKED_AT, POINTS, SELECTED
from particle_explorer.widgets.screenshots import Hand, live
from particle_explorer.widgets.workspace import Workspace, open_workspace

starfile = pytest.importorskip("starfile")

HEIGHT, WIDTH, N = 300, 420, 3


@pytest.fixture
def workspace(
    make_napari_viewer: Callable[..., Any], tiny_stack: Path, tmp_path: Path
) -> Iterator[Workspace]:
    """A session of particles from three micrographs; the image of the last one is missing."""
    for file in tiny_stack.parent.iterdir():
        shutil.copy(file, tmp_path)
    star = starfile.read(tmp_path / tiny_stack.name)
    particles = star["particles"]
    n = len(particles)
    on = np.arange(n) % N
    along = np.arange(n) // N
    x, y = 20.0 + 9 * along, 25.0 + 70 * on + 6.0 * (along % 4)
    particles["rlnMicrographName"] = [f"Movies/m{i}.mrc" for i in on]
    particles["rlnCoordinateX"], particles["rlnCoordinateY"] = x, y
    particles["rlnMicrographPixelSize"] = 7.0
    starfile.write(star, tmp_path / "located.star")
    (tmp_path / "Movies").mkdir()
    for i in range(N - 1):
        pixels = np.zeros((HEIGHT, WIDTH), np.float32)
        pixels[y[on == i].astype(int), x[on == i].astype(int)] = 5
        with mrcfile.new(tmp_path / "Movies" / f"m{i}.mrc") as file:
            file.set_data(pixels)
    Session.create(tmp_path / "session", read(tmp_path / "located.star"), PreprocessConfig())
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    column = open_workspace(viewer, tmp_path / "session")
    hand = Hand(column)
    hand.wait(lambda: "selected particles" in viewer.layers, "the session")
    hand.rest(0.3)
    yield column
    column.shutdown()
    hand.rest(0.2)


def colours(layer: Any) -> list[str]:
    from napari.utils.colormaps.standardize_color import rgb_to_hex

    return [str(each) for each in rgb_to_hex(layer.border_color)]


def click(canvas: Any, at: QPointF) -> None:
    left, none = Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton
    where = QPointF(canvas.mapToGlobal(QPoint(int(at.x()), int(at.y()))))
    for kind, button, buttons in (
        (QEvent.Type.MouseMove, none, none),
        (QEvent.Type.MouseButtonPress, left, left),
        (QEvent.Type.MouseButtonRelease, left, none),
    ):
        event = QMouseEvent(kind, at, where, button, buttons, Qt.KeyboardModifier.NoModifier)
        QApplication.sendEvent(canvas, event)
        live(30)


def test_selected_particles_are_points_on_their_micrograph(workspace: Workspace) -> None:
    hand, viewer, state = Hand(workspace), workspace.viewer, workspace.state
    panel, table = workspace.particles.micrograph, workspace.state.session.table
    mask = np.zeros(len(table), bool)
    mask[[1, 4, 7, 9]] = True  # three on the second micrograph, one on the first
    state.selection.set(mask)
    hand.tab("Particles")
    hand.click(panel.button)
    hand.wait(lambda: POINTS in viewer.layers and IMAGE in viewer.layers, "the micrograph")
    points, image = viewer.layers[POINTS], viewer.layers[IMAGE]
    rows = np.flatnonzero(np.arange(len(table)) % N == 1)
    np.testing.assert_array_equal(points.features["particle"], rows + 1)
    assert image.data.shape == (HEIGHT, WIDTH)
    for i in (0, 11):  # a point lies on the bright pixel of its particle
        pixel = np.round(image.world_to_data(points.data_to_world(points.data[i]))).astype(int)
        assert image.data[tuple(pixel)] == 5
    chosen = np.array([colour.upper().startswith(SELECTED) for colour in colours(points)])
    np.testing.assert_array_equal(rows[chosen], [1, 4, 7])
    assert "m1.mrc" in panel.words.text() and "3 of its 40 particles" in panel.words.text()
    assert not viewer.canvas.grid.enabled and not viewer.layers["selected particles"].visible

    # what others show meanwhile stays behind; the gallery leads to other micrographs
    state.selection.add(np.arange(len(table)) == 10)
    hand.wait(lambda: "4 of its 40" in panel.words.text(), "one more")
    hand.rest(0.2)
    assert not viewer.layers["selected particles"].visible
    state.selection.set_active(9)
    hand.wait(lambda: "m0.mrc" in panel.words.text(), "the other micrograph")
    points = viewer.layers[POINTS]
    assert [i for i, colour in enumerate(colours(points)) if colour.upper().startswith(LOOKED_AT)] == [3]

    # a click on a circle looks at its particle
    hand.rest(0.3)
    canvas = viewer.window._qt_viewer.canvas
    state.selection.set_active(None)
    world = points.data_to_world(points.data[20])
    centre, zoom = np.array(viewer.scene.camera.center[-2:]), viewer.scene.camera.zoom
    dy, dx = (np.array(world) - centre) * zoom
    native = canvas.native
    click(native, QPointF(native.width() / 2 + dx, native.height() / 2 + dy))
    hand.wait(lambda: state.selection.active == 60, "the particle that was clicked")

    # one whose image is not there, in words; and back
    state.selection.set(np.arange(len(table)) % N == 2)
    hand.wait(lambda: "m2.mrc" in panel.words.text(), "the third micrograph")
    assert "was not found" in panel.words.text() and IMAGE not in viewer.layers
    assert len(viewer.layers[POINTS].data) == 40
    QTest.keyClick(workspace.gallery.strip, Qt.Key.Key_M)
    hand.wait(lambda: POINTS not in viewer.layers, "the way back")
    assert viewer.canvas.grid.enabled and viewer.layers["selected particles"].visible
    assert not panel.words.isVisible()


def test_the_arrows_go_through_the_micrographs_of_the_selection(workspace: Workspace) -> None:
    hand, state = Hand(workspace), workspace.state
    panel = workspace.particles.micrograph
    hand.tab("Particles")
    hand.click(panel.button)
    hand.wait(lambda: "m0.mrc" in panel.words.text(), "the first")
    assert "1 of 3 micrographs" in panel.words.text(), "none selected: all of them"
    for name in ("m1", "m2", "m0"):
        hand.click(panel.after)
        hand.wait(lambda name=name: f"{name}.mrc" in panel.words.text(), name)
    state.selection.set(np.isin(np.arange(state.selection.mask.size) % N, [0, 2]))
    hand.click(panel.before)
    hand.wait(lambda: "m2.mrc" in panel.words.text(), "past the one without")


def test_without_places_it_is_said_why(make_napari_viewer: Callable[..., Any], tiny_session: Session) -> None:
    viewer = make_napari_viewer(show=True)
    workspace = open_workspace(viewer, tiny_session.path)
    hand = Hand(workspace)
    hand.wait(lambda: "selected particles" in viewer.layers, "the session")
    button = workspace.particles.micrograph.button
    assert not button.isEnabled() and "does not say" in button.toolTip()
    workspace.shutdown()
    hand.rest(0.2)

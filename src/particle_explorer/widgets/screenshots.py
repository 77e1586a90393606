"""The pictures of the documentation: `python -m particle_explorer.widgets.screenshots --out docs/images`.

Goes through the whole job in a real window with mouse and keys, as a person would, and takes the pictures
on the way, so they show what the program does and nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from qtpy.QtCore import QEventLoop, QPoint, QPointF, Qt, QTimer
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QComboBox, QFileDialog, QLineEdit, QWidget

from particle_explorer.files import UserError
from particle_explorer.widgets.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    import napari

WINDOW = (1366, 768)
LEFT = Qt.MouseButton.LeftButton
PLAIN = Qt.KeyboardModifier.NoModifier


def live(ms: int) -> None:
    """Let the window's event loop run, without the haste of a loop over `processEvents`."""
    loop = QEventLoop()
    QTimer.singleShot(ms, loop.quit)
    loop.exec()


class Hand:
    """Mouse and keys of somebody in front of the workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        """Let the window live until something is so; it is the patience of the hand that ends."""
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds:g} s for: {what}{self._complaints()}")
            live(20)

    def rest(self, seconds: float = 0.4) -> None:
        """Let everything settle."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            live(20)

    def click(self, widget: QWidget) -> None:
        """Scroll a control into view and click it."""
        self._show(widget)
        QTest.mouseClick(widget, LEFT, PLAIN, QPoint(min(12, widget.width() // 2), widget.height() // 2))

    def write(self, widget: QWidget, text: str) -> None:
        """Click into a field, replace what is there, and press Enter."""
        field = widget if isinstance(widget, QLineEdit) else widget.findChild(QLineEdit)
        assert field is not None
        self._show(widget)
        QTest.mouseClick(field, LEFT)
        # keys go to the spin box, which hands them to its field, as they do under real fingers
        QTest.keyClick(widget, Qt.Key.Key_A, Qt.KeyboardModifier.ControlModifier)
        QTest.keyClicks(widget, text)
        QTest.keyClick(widget, Qt.Key.Key_Return)

    def choose(self, box: QComboBox, words: str) -> None:
        """Choose an entry of a list by typing how it begins, as far as every keyboard can; press Enter."""
        self._show(box)
        box.setFocus()
        QTest.keyClicks(box, "".join(itertools.takewhile(str.isascii, words)))
        QTest.keyClick(box, Qt.Key.Key_Return)
        live(20)
        if box.currentText() != words:
            raise LookupError(f"there is no {words!r} to choose; {box.currentText()!r} is chosen")

    def tab(self, name: str) -> None:
        """Click one of the tabs."""
        bar = self.workspace.tabs.tabBar()
        names = [bar.tabText(i) for i in range(bar.count())]
        QTest.mouseClick(bar, LEFT, PLAIN, bar.tabRect(names.index(name)).center())

    def choose_file(self, path: Path) -> None:
        """Type a path into the file dialog that is open, and press Enter."""
        self.wait(lambda: _file_dialog() is not None, "the file dialog")
        live(100)
        dialog = _file_dialog()
        assert dialog is not None
        field = dialog.findChild(QLineEdit, "fileNameEdit")
        assert field is not None
        QTest.keyClicks(field, str(path))
        QTest.keyClick(field, Qt.Key.Key_Return)

    def drag(self, way: Sequence[QPointF], key: Qt.Key | None = None) -> None:
        """Press at the start of a way across the map, move along it, let go at its end."""
        canvas = self.workspace.latent.canvas
        if key is not None:
            QTest.keyClick(canvas, key)
        points = [point.toPoint() for point in way]
        QTest.mousePress(canvas, LEFT, PLAIN, points[0])
        for point in points[1:]:
            QTest.mouseMove(canvas, point)
            live(8)
        QTest.mouseRelease(canvas, LEFT, PLAIN, points[-1])
        live(20)

    def lasso(self, centre: tuple[float, float], radius: float) -> None:
        """Draw around a part of the map; both in fractions of the plot."""
        plot = self.workspace.latent.canvas.plot_rect()
        turns = np.linspace(0, 2 * np.pi, 40)
        self.drag(
            [
                QPointF(
                    plot.left() + plot.width() * (centre[0] + radius * np.cos(turn)),
                    plot.top() + plot.height() * (centre[1] + radius * np.sin(turn)),
                )
                for turn in turns
            ],
            Qt.Key.Key_L,
        )

    def drag_handle(self, to: tuple[float, float]) -> None:
        """Take the handle to a place, in fractions of the plot."""
        canvas = self.workspace.latent.canvas
        start, plot = canvas.handle_position(), canvas.plot_rect()
        assert start is not None
        end = QPointF(plot.left() + plot.width() * to[0], plot.top() + plot.height() * to[1])
        self.drag([start + (end - start) * share for share in np.linspace(0, 1, 30)], Qt.Key.Key_D)

    def _show(self, widget: QWidget) -> None:
        area = self.workspace.tabs.currentWidget()
        if area.isAncestorOf(widget):
            area.ensureWidgetVisible(widget)
        live(20)

    def _complaints(self) -> str:
        docks = (
            self.workspace.particles,
            self.workspace.train,
            self.workspace.classes,
            self.workspace.latent,
        )
        said = [dock.complaint for dock in docks]
        return "".join(f"; {each.sentence.text()}\n{each.details.toPlainText()}" for each in said)


def _file_dialog() -> QFileDialog | None:
    shown = [widget for widget in QApplication.topLevelWidgets() if isinstance(widget, QFileDialog)]
    return next((dialog for dialog in shown if dialog.isVisible()), None)


class Camera:
    """Takes pictures of the whole window."""

    def __init__(self, viewer: napari.Viewer, folder: Path) -> None:
        self._viewer, self._folder = viewer, folder
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> Path:
        """One picture; returns where it lies."""
        path = self._folder / f"{name}.png"
        self._viewer.window.screenshot(str(path), canvas_only=False, flash=False)
        return path

    def take_window(self, widget: QWidget, name: str) -> Path:
        """One picture of a window of its own."""
        path = self._folder / f"{name}.png"
        widget.grab().save(str(path))
        return path


def journey(viewer: napari.Viewer, stack: Path, folder: Path) -> None:
    """The whole job on a stack, pictures taken on the way into `folder`."""
    viewer.window.resize(*WINDOW)
    workspace = open_workspace(viewer)
    hand, camera = Hand(workspace), Camera(viewer, folder)
    hand.rest(1.0)
    camera.take("start")

    hand.click(workspace.particles.open_button)
    hand.choose_file(stack)
    hand.wait(lambda: workspace.particles.stack.preview.n_images > 0, "the preview")
    hand.rest()
    camera.take("open")
    hand.click(workspace.particles.stack.prepare_button)
    hand.wait(lambda: "selected particles" in viewer.layers, "the session", 120)

    hand.click(workspace.train.train_button)
    hand.wait(lambda: workspace.train.watch.panel.n_images > 0, "the first pictures of the training", 300)
    hand.rest(1.5)
    camera.take("train")
    hand.wait(lambda: "reconstruction" in viewer.layers, "the map", 900)
    hand.rest(1.0)

    hand.drag_handle((0.8, 0.35))
    hand.rest(0.8)
    camera.take("handle")
    hand.lasso((0.3, 0.5), 0.22)
    hand.rest(0.8)
    camera.take("lasso")
    QTest.keyClick(workspace.latent.canvas, Qt.Key.Key_S)
    hand.write(workspace.latent.actions.set_name, "left")
    session = workspace.state.session
    assert session is not None
    hand.wait(lambda: session.selections.names() == ["left"], "the set")

    gallery = workspace.gallery
    hand.click(gallery.view_buttons["low-pass"])
    hand.choose(gallery.sort, "log-likelihood")
    hand.rest(1.0)
    strip = gallery.strip
    QTest.mouseClick(strip.viewport(), LEFT, PLAIN, strip.place(2).center())
    hand.rest(0.8)
    camera.take("gallery")
    hand.click(gallery.view_buttons["aligned"])
    hand.choose(gallery.sort, "file order")

    explore = workspace.explore
    groups = explore.groups
    hand.click(workspace.latent.actions.groups_button)
    hand.rest()
    hand.write(groups.clustering.editor("n_clusters").native, "6")
    hand.click(groups.cluster_button)
    hand.wait(lambda: groups.groups.count() == 6 and not explore.worker.busy, "clusters", 120)
    hand.rest(0.8)
    workspace.tabs.currentWidget().ensureWidgetVisible(groups.split_button)
    hand.rest()
    camera.take("groups")
    explore.show_part("Paths")
    hand.rest()
    hand.click(explore.paths.make_button)
    hand.wait(lambda: explore.paths.walk is not None, "the path", 180)
    hand.rest(1.2)
    camera.take("explore")
    for layer in explore.paths.layers.values():
        layer.visible = False
    hand.lasso((0.3, 0.5), 0.22)
    hand.tab("Classes")
    hand.click(workspace.classes.make.average_button)
    hand.wait(lambda: workspace.classes.stored is not None, "the averages", 180)
    hand.rest(1.0)
    camera.take("classes")
    hand.tab("Particles")
    hand.rest()
    camera.take("window")

    workspace.start_tour()
    hand.rest(0.8)
    camera.take("tour")
    assert workspace.tour is not None
    workspace.tour.end()
    _compare(workspace, hand, camera)


def _compare(workspace: Workspace, hand: Hand, camera: Camera) -> None:
    """Train a second run with other settings, and compare the two."""
    train, first = workspace.train, workspace.state.run
    hand.tab("Train")
    hand.write(train.forms["class-map"].editor("latent_dim").native, "1")
    hand.click(train.train_button)
    state = workspace.state
    session = state.session
    assert session is not None
    hand.wait(lambda: len(session.runs()) == 2, "the second training", 60)
    hand.wait(lambda: session.runs()[-1].can_resume, "its first checkpoint", 300)
    hand.click(train.watch.stop_button)
    hand.wait(train.runs.resume_button.isVisible, "the stop", 120)
    hand.rest(1.0)
    camera.take("stopped")
    hand.click(train.runs.resume_button)
    hand.wait(lambda: state.run is not first and not train.watch.isVisible(), "the second map", 900)
    hand.rest(1.0)
    hand.click(train.runs.table_button)
    hand.wait(lambda: train.table is not None and train.table.table.rowCount() == 2, "the table of runs")
    runs = train.table
    assert runs is not None
    for row, key in ((0, PLAIN), (1, Qt.KeyboardModifier.ControlModifier)):
        place = runs.table.visualItemRect(runs.table.item(row, 0)).center()
        QTest.mouseClick(runs.table.viewport(), LEFT, key, place)
    hand.click(runs.compare_button)
    hand.wait(lambda: "particles:" in runs.words.text(), "the comparison")
    hand.rest()
    camera.take_window(runs, "compare")
    runs.table.clearSelection()
    place = runs.table.visualItemRect(runs.table.item(1, 0)).center()
    QTest.mouseClick(runs.table.viewport(), LEFT, PLAIN, place)
    hand.click(runs.second_button)
    second = train.second
    hand.wait(lambda: second.dock is not None and second.dock.canvas.n_points > 0, "the map beside")
    runs.close()
    assert second.holder is not None
    second.holder.move(40, 60)  # where it does not lie over the map that is drawn on
    hand.rest()
    hand.lasso((0.7, 0.45), 0.22)
    hand.rest(0.8)
    camera.take_window(second.holder, "beside")


def reopened(viewer: napari.Viewer, session: Path, folder: Path) -> None:
    """The session that was closed, opened again: as it was left."""
    viewer.window.resize(*WINDOW)
    workspace = open_workspace(viewer, session)
    hand = Hand(workspace)
    hand.wait(lambda: "reconstruction" in viewer.layers, "the map", 120)
    second = workspace.train.second
    hand.wait(lambda: second.dock is not None and second.dock.canvas.n_points > 0, "the map beside")
    hand.rest(1.5)
    hand.tab("Particles")
    hand.rest()
    Camera(viewer, folder).take("reopened")
    workspace.shutdown()


def main(arguments: Sequence[str] | None = None) -> None:
    """Take all pictures anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--stack", type=Path, help="particles to go through; by default the sample")
    parser.add_argument("--theme", default="dark", help="dark, light or another theme of napari")
    options = parser.parse_args(arguments)

    import napari

    from particle_explorer.plugin import sample_particles

    source = options.stack or sample_particles()
    if not source.is_file():
        raise UserError(f"there is no file {source}")
    viewer = napari.Viewer(show=True)
    viewer.theme = options.theme
    with tempfile.TemporaryDirectory(prefix="particle-explorer-") as folder:
        for file in source.parent.iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        journey(viewer, Path(folder) / source.name, options.out)
        workspace = open_workspace(viewer)
        session = workspace.state.session
        assert session is not None
        workspace.shutdown()
        viewer.close()
        viewer = napari.Viewer(show=True)
        viewer.theme = options.theme
        reopened(viewer, session.path, options.out)
        viewer.close()


if __name__ == "__main__":
    main()

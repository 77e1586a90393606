"""The workspace: the map on top, below it the step of the work, and the pictures on napari's canvas."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from qtpy.QtCore import QEvent, QObject, Qt, QTimer
from qtpy.QtGui import QHideEvent, QKeyEvent, QShowEvent
from qtpy.QtWidgets import (
    QApplication,
    QDockWidget,
    QFrame,
    QMainWindow,
    QMenu,
    QScrollArea,
    QSplitter,
    QTabWidget,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.state import AppState, Opened, read
from particle_explorer.widgets.background import Tasks, notify
from particle_explorer.widgets.job_bar import JobBar
from particle_explorer.widgets.lifetime import follow

if TYPE_CHECKING:
    import napari

    from particle_explorer.widgets.tour import Tour

DOCK_NAME = "Particle Explorer"
GALLERY_NAME = "Gallery"
TOUR_AFTER_MS = 800
"""The window has found its shape by then."""
COLUMN_PX = 392
GALLERY_PX = 150
FOLDED_PX = 42
HIGHEST_PX = 16_777_215
"""Of a widget without a limit"""
LEAST_WINDOW = (1366, 740)
FONT_SIZE = 8.0
SWITCH_S = 0.001
VIEW_MARGIN = 0.23
LARGEST_MARGIN = 0.5
LINE_PX = 20
"""Height of a line of words on the canvas"""
CAPTION_CHARACTERS = 84
"""What fits into one line at the foot of the canvas of a small screen."""

_states: WeakKeyDictionary[napari.Viewer, AppState] = WeakKeyDictionary()
_captions: WeakKeyDictionary[napari.Viewer, dict[str, str]] = WeakKeyDictionary()


def unwrapped(viewer: Any) -> napari.Viewer:
    """The viewer itself, of which napari gives plugins a proxy."""
    return getattr(viewer, "__wrapped__", viewer)


def state_of(viewer: napari.Viewer) -> AppState:
    """What all docks of this viewer share; made on first use, gone with the viewer."""
    return _states.setdefault(unwrapped(viewer), AppState())


def caption(viewer: napari.Viewer, of: str, line: str) -> None:
    """Say at the foot of the canvas what a layer of ours shows, one line each; empty takes the line away."""
    viewer = unwrapped(viewer)
    lines = _captions.setdefault(viewer, {})
    if lines.get(of, "") != line:
        lines[of] = line
        viewer.canvas.overlays.text.text = wrapped([words for words in lines.values() if words])


def wrapped(parts: list[str], width: int = CAPTION_CHARACTERS) -> str:
    """Parts joined by dots, in as many lines as their lengths need."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


def fit_view(viewer: napari.Viewer) -> None:
    """Show every tile whole, with room above for its name and below for the words about it.

    Later in the event loop: the canvas lays its tiles out anew after a layer has come or gone.
    """
    viewer = unwrapped(viewer)
    QTimer.singleShot(0, lambda: viewer.reset_view(margin=_margin(viewer)))


def _margin(viewer: Any) -> float:
    """What is left free of a tile: below a square picture no less than the words at the foot take."""
    words = viewer.canvas.overlays.text.text
    lines = words.count("\n") + 1 if words else 0
    height, width = (max(1.0, float(side)) for side in viewer.canvas.viewbox_size(viewer.layers))
    needed = 1 - (height - 2 * (LINE_PX * lines + 6)) / min(height, width)
    return min(LARGEST_MARGIN, max(VIEW_MARGIN, needed))


def tile(layer: Any) -> None:
    """Write the name of a layer of ours over its tile."""
    layer.name_overlay.visible = True
    layer.name_overlay.font_size = FONT_SIZE


def show_session(
    state: AppState,
    tasks: Tasks,
    path: Path,
    run: str = "newest",
    shown: Callable[[], None] | None = None,
    failed: Callable[[Any], None] = notify,
) -> None:
    """Open a session folder and show it; reading happens in a thread.

    `run` names a run, or is "newest" for the newest finished one.
    """

    def work() -> Opened:
        from particle_explorer.session import Session

        session = Session.open(path)
        return read(session) if run == "newest" else read(session, session.run(run))

    def done(opened: Opened) -> None:
        state.show(opened)
        if shown is not None:
            shown()

    tasks.run("open session", work, done, failed)


class Workspace(QWidget):
    """Everything about one stack of particles, in one column beside napari's canvas."""

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        from particle_explorer.widgets.classes import ClassesDock
        from particle_explorer.widgets.data import ParticlesDock
        from particle_explorer.widgets.explore import ExploreDock
        from particle_explorer.widgets.gallery import Gallery
        from particle_explorer.widgets.latent import LatentDock
        from particle_explorer.widgets.memory import Memory
        from particle_explorer.widgets.pictures import Decoder
        from particle_explorer.widgets.preview_average import PreviewAverage
        from particle_explorer.widgets.reconstruction import Reconstruction
        from particle_explorer.widgets.selected import SelectedParticles
        from particle_explorer.widgets.sets import Marks, bind_marks
        from particle_explorer.widgets.shortcuts import show_shortcuts
        from particle_explorer.widgets.train import TrainDock

        super().__init__()
        hand_over_quickly()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)

        self.decoder = Decoder()
        self.latent = LatentDock(self.viewer, decoder=self.decoder)
        self.particles = ParticlesDock(self.viewer)
        self.train = TrainDock(self.viewer)
        self.classes = ClassesDock(self.viewer)
        self.reconstruction = Reconstruction(self.viewer, self)
        self.explore = ExploreDock(self.viewer, self.reconstruction)
        self.selected = SelectedParticles(self.viewer, self, self.decoder)
        self.preview = PreviewAverage(self.state, self, self.decoder)
        self.gallery = Gallery(self.viewer, self.state, self.decoder)
        self.gallery_dock: QDockWidget | None = None
        self._gallery_px = GALLERY_PX
        self.tour: Tour | None = None
        self._tour_waits = False
        self._tour_timer = QTimer(self)
        self._tour_timer.setSingleShot(True)
        self._tour_timer.setInterval(TOUR_AFTER_MS)
        self._tour_timer.timeout.connect(self._offer_tour)
        self.marks = Marks(self.state, self, lambda words: caption(self.viewer, "marks", words))
        self.gallery.strip.marked.connect(self.marks.mark)
        self.selected.made.connect(lambda layer: bind_marks(layer, self.marks))
        self.memory = Memory(self)

        self.tabs = QTabWidget()
        for dock, name, hint in (
            (self.particles, "Particles", "What is open, how its images are prepared, and named sets"),
            (self.train, "Train", "Fit a map to the particles; the runs of this session"),
            (self.explore, "Explore", "Walk through the map, hold a part still, lay out and group particles"),
            (self.classes, "Classes", "Average particles and export them"),
        ):
            self.tabs.addTab(_scrolling(dock), name)
            self.tabs.setTabToolTip(self.tabs.count() - 1, hint)

        self.help_button = QToolButton()
        self.help_button.setText("?")
        self.help_button.setAutoRaise(True)
        self.help_button.setMinimumWidth(28)
        self.help_button.setStyleSheet("QToolButton::menu-indicator { image: none; }")
        self.help_button.setPopupMode(QToolButton.ToolButtonPopupMode.InstantPopup)
        self.help_button.setToolTip("The tour, and the list of shortcuts")
        menu = QMenu(self.help_button)
        menu.addAction("Tour in five steps", self.start_tour)
        menu.addAction("Shortcuts\tF1", lambda: show_shortcuts(self))
        self.help_button.setMenu(menu)
        self.tabs.setCornerWidget(self.help_button, Qt.Corner.TopRightCorner)

        self.splitter = QSplitter(Qt.Orientation.Vertical)
        self.splitter.addWidget(self.latent)
        self.splitter.addWidget(self.tabs)
        self.splitter.setStretchFactor(0, 3)
        self.splitter.setStretchFactor(1, 2)
        self.splitter.setChildrenCollapsible(False)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 0, 4, 4)
        layout.addWidget(self.splitter)

        self.viewer.canvas.grid.enabled = True
        self.viewer.canvas.overlays.text.visible = True
        self.viewer.canvas.overlays.text.font_size = FONT_SIZE
        self.viewer.canvas.overlays.text.position = "bottom_left"
        self.particles.prepared.connect(self.show_train)
        self.train.trained.connect(self._trained)
        follow(self, self.state.train_asked, self.show_train)
        follow(self, self.state.train_shown, self.show_train)
        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.groups_asked, self.show_groups)
        follow(self, self.state.tour_asked, self.start_tour)
        follow(self, self.state.run_changed, self._on_run)
        self.latent.setVisible(self.state.session is not None)  # before, there is nothing to see in it
        self.setMinimumWidth(320)
        for part in (self.latent.canvas, self.gallery.strip):
            part.installEventFilter(self)
        # floating a dock hides it for a moment too: only what stays hidden lets its worker go
        self._away = QTimer(self)
        self._away.setSingleShot(True)
        self._away.setInterval(1500)
        self._away.timeout.connect(self.reconstruction.pause)
        self._fitted = self._had_run = False
        self._fit_splitter()
        QTimer.singleShot(0, self._warm_up)

    def shutdown(self) -> None:
        """End all threads and workers of this column; jobs that train or average go on."""
        self._tour_timer.stop()
        if self.tour is not None:
            self.tour.close()
            self.tour = None
        self.marks.flush()
        self.memory.stop()
        self.latent.shutdown()
        self.reconstruction.stop()
        self.explore.shutdown()
        self.selected.stop()
        self.preview.stop()
        self.gallery.shutdown()
        self.decoder.close()
        self.tasks.stop()
        self.particles.shutdown()
        for bar in self.findChildren(JobBar):
            bar.stop()
        self.train.shutdown()
        self.classes.shutdown()

    def open(self, path: Path) -> None:
        """Open a session folder."""
        show_session(self.state, self.tasks, path, failed=self.particles.complain)

    def show_train(self) -> None:
        self.tabs.setCurrentIndex(1)

    def show_groups(self) -> None:
        """Where particles are laid out and grouped."""
        self.tabs.setCurrentIndex(2)
        self.explore.show_groups()

    def start_tour(self) -> None:
        """Show around on the map that is open; where there is none, on that of the sample."""
        if self.state.drawable:
            self._begin_tour()
        else:
            self._tour_waits = True
            self.particles.open_sample_session()

    def _begin_tour(self) -> None:
        from particle_explorer.widgets.tour import Tour

        self._tour_waits = False
        main = None if self.gallery_dock is None else self.gallery_dock.parentWidget()
        if isinstance(main, QMainWindow):
            self.tour = self.tour or Tour(self, main)
            self.tour.start()

    def _offer_tour(self) -> None:
        """The first time that the sample is looked at."""
        from particle_explorer.plugin import cache_folder
        from particle_explorer.widgets.tour import was_seen

        session = self.state.session
        if session is not None and self.state.drawable and cache_folder() in session.path.parents:
            if self._tour_waits or not was_seen():
                self._begin_tour()

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        """V shows particles in the next way, M on their micrograph; on the map A averages, E exports."""
        plain = Qt.KeyboardModifier.NoModifier
        if (
            isinstance(event, QKeyEvent)
            and event.type() == QEvent.Type.KeyPress
            and event.modifiers() == plain
        ):
            keys = {Qt.Key.Key_V: self._next_view, Qt.Key.Key_M: self.particles.micrograph.toggle}
            if watched is self.latent.canvas:
                keys |= {Qt.Key.Key_A: self._average, Qt.Key.Key_E: self._export}
            does = keys.get(Qt.Key(event.key()))
            if does is not None:
                does()
                return True
        return False

    def _next_view(self) -> None:
        from particle_explorer.widgets.pictures import best_view, views_of

        if self.state.session is not None:
            there = views_of(self.state)
            at = there.index(best_view(self.state, self.state.view))
            self.state.set_view(there[(at + 1) % len(there)])

    def _average(self) -> None:
        self.tabs.setCurrentIndex(3)
        self.classes.average_selection()

    def _export(self) -> None:
        self.tabs.setCurrentIndex(3)
        self.classes.show_export()

    def _trained(self) -> None:
        # the first look at a map is the moment to say what one does with it
        self.latent.canvas.setFocus()  # no focus proxy: it would outlive its canvas under PyQt6

    def _on_session(self, session: object) -> None:
        self._fit_splitter()
        self.latent.setVisible(session is not None)
        if self.state.session is not None:
            self._show_gallery()
            self.viewer.title = f"{self.state.session.path.name} · Particle Explorer"
            self.tabs.setCurrentIndex(1 if self.state.run is None else 2)

    def _show_gallery(self) -> None:
        """Lay the gallery under the canvas, the first time there is something to show in it."""
        if self.gallery_dock is None:
            dock = self.viewer.window.add_dock_widget(self.gallery, name=GALLERY_NAME, area="bottom")
            main = dock.parentWidget()
            self.gallery_dock = dock
            if isinstance(main, QMainWindow):
                # the column beside it keeps the whole height
                right = Qt.DockWidgetArea.RightDockWidgetArea
                main.setCorner(Qt.Corner.BottomRightCorner, right)
                main.resizeDocks([dock], [GALLERY_PX], Qt.Orientation.Vertical)
            self.gallery.fold_button.toggled.connect(self._on_gallery_folded)
            self._on_gallery_folded(not self.gallery.is_folded)

    def _on_gallery_folded(self, shown: bool) -> None:
        """Give its room to the canvas, or take it back: napari's dock keeps what it had."""
        dock = self.gallery_dock
        if dock is None:
            return
        # folded, it is too low for all the buttons that napari puts beside it, one above the other
        bar = dock.titleBarWidget()
        for button in (getattr(bar, "hide_button", None), getattr(bar, "float_button", None)):
            if button is not None:
                button.setVisible(shown)
        if not shown:
            self._gallery_px = max(dock.height(), GALLERY_PX)
        dock.setMinimumHeight(0 if shown else FOLDED_PX)
        dock.setMaximumHeight(HIGHEST_PX if shown else FOLDED_PX)
        main = dock.parentWidget()
        if shown and isinstance(main, QMainWindow):
            main.resizeDocks([dock], [self._gallery_px], Qt.Orientation.Vertical)

    def _on_run(self, run: object) -> None:
        if run is not None and not self._had_run:
            self._had_run = True
            self._fit_splitter()
        if run is not None:
            self._tour_timer.start()

    def _fit_splitter(self) -> None:
        """More room for the map once there is one."""
        height = max(self.height(), 560)
        top = 0.5 if self.state.run is None else 0.62
        self.splitter.setSizes([int(height * top), int(height * (1 - top))])

    def _warm_up(self) -> None:
        self.tasks.run("warm up", _import_slow_modules, lambda _: None)

    def showEvent(self, event: QShowEvent | None) -> None:
        super().showEvent(event)
        self._away.stop()
        self.reconstruction.resume()
        if not self._fitted:
            self._fitted = True
            QTimer.singleShot(0, self._fit_column)

    def _fit_column(self) -> None:
        """As wide as is needed and no wider; the pictures get the rest."""
        _make_room(self.viewer)
        dock: QWidget | None = self
        while dock is not None and not isinstance(dock, QDockWidget):
            dock = dock.parentWidget()
        main = None if dock is None else dock.parentWidget()
        if isinstance(dock, QDockWidget) and isinstance(main, QMainWindow):
            main.resizeDocks([dock], [COLUMN_PX], Qt.Orientation.Horizontal)
        self._fit_splitter()

    def hideEvent(self, event: QHideEvent | None) -> None:
        # napari never sends closeEvent to a dock, and `destroyed` comes late
        super().hideEvent(event)
        self.marks.flush()
        self.memory.save()
        if event is None or not event.spontaneous():
            self._away.start()


def _import_slow_modules() -> None:
    """Modules that stall the window for a tenth of a second when they are first needed under the mouse."""
    import pyarrow.parquet  # noqa: F401
    import scipy.ndimage  # noqa: F401

    import particle_explorer.io.reading
    import particle_explorer.preprocess
    import particle_explorer.session  # noqa: F401


def _scrolling(widget: QWidget) -> QScrollArea:
    area = QScrollArea()
    area.setWidgetResizable(True)
    area.setFrameShape(QFrame.Shape.NoFrame)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    area.setWidget(widget)
    return area


def workspace_of(viewer: napari.Viewer) -> Workspace | None:
    """The workspace of this viewer, if it is open."""
    for widget in unwrapped(viewer).window.dock_widgets.values():
        if isinstance(widget, Workspace):
            return widget
    return None


def open_workspace(viewer: napari.Viewer, session_path: str | os.PathLike[str] | None = None) -> Workspace:
    """The workspace in this viewer's window, with a session if one is named."""
    viewer = unwrapped(viewer)
    workspace = workspace_of(viewer)
    if workspace is None:
        workspace = Workspace(viewer)
        viewer.window.add_dock_widget(workspace, name=DOCK_NAME, area="right", add_vertical_stretch=False)
    if session_path is not None:
        workspace.open(Path(session_path))
    return workspace


def hand_over_quickly() -> None:
    """Let threads pass Python's lock on after a millisecond instead of five.

    The window's thread gives the lock up at every call of Qt that paints or lays out, and then waits for it
    as long as another thread may keep it: filling a list of forty columns beside one took 0.1 s.
    """
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))


def spare_collector() -> None:
    """Take what napari and the libraries hold out of Python's garbage collector, in a process of our own.

    A full pass over those million objects stops the window for a fifth of a second now and then, even in the
    middle of a drag. Nothing is collected here: finalizers run when Python chooses, not at a moment of ours.
    """
    QTimer.singleShot(3000, gc.freeze)


def run(session_path: str | os.PathLike[str] | None = None) -> None:
    """Start napari with the workspace open: what `particle-explorer open DIR` does."""
    import napari

    viewer = napari.Viewer(title="Particle Explorer")
    open_workspace(viewer, session_path)
    spare_collector()
    napari.run()


def _make_room(viewer: napari.Viewer) -> None:
    """Map, layers and tabs want a laptop's whole screen; napari comes back in the size it was left."""
    screen = QApplication.primaryScreen()
    if screen is None:
        return
    free = screen.availableGeometry()
    x, y, width, height = viewer.window.geometry()
    if width < LEAST_WINDOW[0] or height < LEAST_WINDOW[1]:
        size = (min(LEAST_WINDOW[0], free.width()), min(LEAST_WINDOW[1], free.height()))
        viewer.window.set_geometry(
            min(x, free.right() + 1 - size[0]), min(y, free.bottom() + 1 - size[1]), *size
        )

"""The tour: five steps through the window on a trained session, each done by hand or passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QEvent, QObject, QPoint, QRect, Qt, QTimer
from qtpy.QtGui import QColor, QKeyEvent, QPainter, QPaintEvent, QPen
from qtpy.QtWidgets import (
    QFrame,
    QHBoxLayout,
    QLabel,
    QMainWindow,
    QPushButton,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.plugin import cache_folder

if TYPE_CHECKING:
    from particle_explorer.widgets.workspace import Workspace

CARD_PX = 330
LOOK_MS = 250
"""How often it is looked whether a step was done."""
ACCENT = "#E69F00"


@dataclass(frozen=True)
class Step:
    """One step of the tour."""

    title: str
    words: str
    show: Callable[[Workspace], QWidget]
    """brings what it is about into sight, and gives it"""
    now: Callable[[Workspace], Any]
    """what the hand changes in this step; it is done when this is something else, and true"""


def _handle(workspace: Workspace) -> Any:
    return tuple(workspace.state.handle_z)


def _selection(workspace: Workspace) -> Any:
    mask = workspace.state.selection.mask
    return mask.tobytes() if mask.any() else b""


def _looked_at(workspace: Workspace) -> Any:
    return workspace.state.selection.active, workspace.state.view


def _film(workspace: Workspace) -> Any:
    walk = workspace.explore.paths.walk
    return 0 if walk is None else id(walk)


def _averages(workspace: Workspace) -> Any:
    stored = workspace.classes.stored
    return 0 if stored is None else id(stored)


def _show_gallery(workspace: Workspace) -> QWidget:
    workspace.gallery.set_folded(False)
    if workspace.gallery_dock is not None:
        workspace.gallery_dock.show()
    return workspace.gallery


def _show_paths(workspace: Workspace) -> QWidget:
    workspace.tabs.setCurrentIndex(2)
    workspace.explore.show_part("Paths")
    return workspace.tabs


def _show_classes(workspace: Workspace) -> QWidget:
    workspace.tabs.setCurrentIndex(3)
    return workspace.tabs


STEPS = (
    Step(
        "Drag across the map",
        "Every point is a particle; those that look alike lie side by side. Drag the ring <b>◉</b> across the"
        " map, or press arrow keys: the layer <i>reconstruction</i> shows what the model believes particles"
        " at that place look like. Where the ring turns hollow there are no particles.",
        lambda workspace: workspace.latent.canvas,
        _handle,
    ),
    Step(
        "Select with a lasso",
        "Press <b>L</b> and draw around some points. The layer <i>selected particles</i>, the gallery and the"
        " preview average follow at once. Shift adds, Alt takes away, Ctrl+Z undoes, S saves a set.",
        lambda workspace: workspace.latent.canvas,
        _selection,
    ),
    Step(
        "Look at the particles",
        "Click a thumbnail: the map marks that particle. The words above the thumbnails, or <b>V</b>, show"
        " them as prepared, low-passed, aligned, as the model draws them, or what it leaves unexplained.",
        _show_gallery,
        _looked_at,
    ),
    Step(
        "See it move",
        "<i>Draw</i> in the tab Explore walks through the map: the model's pictures, and beside them averages"
        " of real particles. Believe what moves in both. The same tab holds a part still, and groups.",
        _show_paths,
        _film,
    ),
    Step(
        "Average and export",
        "<i>Average</i> in the tab Classes averages what you selected from the original images; read its"
        " caption. <i>Export…</i> writes star or cs files for RELION and cryoSPARC. Your own stack: tab"
        " Particles, <i>Open another…</i>. This tour is under <b>?</b>.",
        _show_classes,
        _averages,
    ),
)


def was_seen() -> bool:
    """Whether the tour was taken, or sent away, by this user."""
    return (cache_folder() / "tour-seen").exists()


def remember_seen() -> None:
    """Do not offer the tour by itself any more."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        (cache_folder() / "tour-seen").touch()
    except OSError:
        pass  # it will be offered once more


class Tour(QObject):
    """A card over the canvas and a frame around what it speaks of; the window stays usable."""

    def __init__(self, workspace: Workspace, main: QMainWindow) -> None:
        super().__init__(workspace)
        self.workspace, self.main = workspace, main
        self.card, self.frame = Card(main), Frame(main)
        self.card.back.clicked.connect(lambda: self.go(self.at - 1))
        self.card.next.clicked.connect(lambda: self.go(self.at + 1))
        self.card.close_button.clicked.connect(self.end)
        self.card.escaped = self.end
        self.at: int = -1
        self.is_done = False
        self._before: Any = None
        self._target: QWidget | None = None
        self._timer = QTimer(self)
        self._timer.setInterval(LOOK_MS)
        self._timer.timeout.connect(self._look)
        main.installEventFilter(self)

    @property
    def is_on(self) -> bool:
        return self.at >= 0

    def start(self) -> None:
        """From the first step."""
        remember_seen()
        self.go(0)

    def go(self, step: int) -> None:
        """To a step, counted from 0; behind the last one it ends."""
        if not 0 <= step < len(STEPS):
            self.end()
            return
        self.at, self.is_done = step, False
        self._target = STEPS[step].show(self.workspace)
        self._before = STEPS[step].now(self.workspace)
        self.card.say(step)
        self.card.show()
        self.frame.show()
        self._timer.start()
        self.place()
        if self._target is self.workspace.latent.canvas:
            self._target.setFocus()  # the keys it speaks of go to the map

    def end(self) -> None:
        """Take everything away."""
        self._timer.stop()
        self.at, self._target = -1, None
        self.card.hide()
        self.frame.hide()

    def close(self) -> None:
        """Leave the window for good: what holds on to it would keep it."""
        self.end()
        self.main.removeEventFilter(self)
        for part in (self.card, self.frame):
            part.setParent(None)
            part.deleteLater()
        self.card.escaped = lambda: None
        del self.main, self.card, self.frame

    def place(self) -> None:
        """The frame around what the step is about, the card over the canvas beside it."""
        if self._target is None or not self.is_on:
            return
        centre = self.main.centralWidget()
        free = QRect(centre.mapTo(self.main, QPoint(0, 0)), centre.size())
        self.card.setFixedWidth(min(CARD_PX, max(free.width() - 16, 200)))
        self.card.adjustSize()
        self.card.move(
            max(free.left() + 8, free.right() - self.card.width() - 8),
            max(free.top() + 8, free.bottom() - self.card.height() - 8),
        )
        seen = self._target.isVisible() and self._target.window() is self.main
        self.frame.setVisible(seen)
        if seen:
            at = QRect(self._target.mapTo(self.main, QPoint(0, 0)), self._target.size())
            self.frame.setGeometry(at.adjusted(-3, -3, 3, 3).intersected(self.main.rect()))
        self.frame.raise_()
        self.card.raise_()

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        if self.is_on and event is not None and event.type() == QEvent.Type.Resize:
            QTimer.singleShot(0, self.place)
        return False

    def _look(self) -> None:
        if self.workspace.state.run is None:
            self.end()  # what it spoke of has been closed
            return
        self.place()
        now = STEPS[self.at].now(self.workspace)
        if not self.is_done and now and now != self._before:
            self.is_done = True
            self.card.praise()


class Card(QFrame):
    """What a step says, with the way on, back and out."""

    def __init__(self, parent: QWidget) -> None:
        super().__init__(parent)
        self.setObjectName("tour")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setStyleSheet(f"#tour {{ border: 2px solid {ACCENT}; border-radius: 6px; }}")
        self.setAutoFillBackground(True)
        self.escaped: Callable[[], None] = lambda: None
        self.title = QLabel()
        self.title.setStyleSheet("font-weight: bold;")
        self.title.setWordWrap(True)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.words.setTextFormat(Qt.TextFormat.RichText)
        self.count = QLabel()
        self.close_button = QToolButton()
        self.close_button.setText("✕")
        self.close_button.setAutoRaise(True)
        self.close_button.setToolTip("End the tour (Esc); it is under ? above the tabs")
        self.back, self.next = QPushButton("Back"), QPushButton("Next")
        self.back.setToolTip("The step before")
        self.next.setToolTip("The next step, also without doing this one")
        head, foot = QHBoxLayout(), QHBoxLayout()
        head.addWidget(self.title, 1)
        head.addWidget(self.close_button)
        foot.addWidget(self.count, 1)
        foot.addWidget(self.back)
        foot.addWidget(self.next)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(10, 6, 10, 8)
        layout.addLayout(head)
        layout.addWidget(self.words)
        layout.addLayout(foot)
        self.hide()

    def say(self, step: int) -> None:
        """Show the words of a step."""
        self.title.setText(STEPS[step].title)
        self.words.setText(STEPS[step].words)
        self.count.setText(f"{step + 1} of {len(STEPS)}")
        self.back.setEnabled(step > 0)
        self.next.setText("Next" if step + 1 < len(STEPS) else "Finish")

    def praise(self) -> None:
        """Say that the step was done."""
        self.count.setText(f"{self.count.text()} · ✓ done")

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        if event is not None and event.key() == Qt.Key.Key_Escape:
            self.escaped()
        else:
            super().keyPressEvent(event)


class Frame(QWidget):
    """A frame that takes no mouse."""

    def __init__(self, parent: QWidget) -> None:
        super().__init__(parent)
        self.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self.setAttribute(Qt.WidgetAttribute.WA_NoSystemBackground)
        self.hide()

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setPen(QPen(QColor(ACCENT), 3))
        painter.drawRect(self.rect().adjusted(1, 1, -2, -2))
        painter.end()

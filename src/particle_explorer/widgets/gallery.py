"""The gallery: thumbnails of the selected particles in any order; picking in it selects."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from qtpy.QtCore import QEvent, QPoint, QRect, QRectF, QSize, Qt, Signal
from qtpy.QtGui import (
    QColor,
    QFontMetricsF,
    QHelpEvent,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPen,
    QResizeEvent,
    QWheelEvent,
)
from qtpy.QtWidgets import (
    QAbstractScrollArea,
    QButtonGroup,
    QComboBox,
    QFrame,
    QHBoxLayout,
    QLabel,
    QSizePolicy,
    QToolButton,
    QToolTip,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.state import AppState, Mask, Preview, View
from particle_explorer.widgets.background import Mailbox, Tasks, in_turn
from particle_explorer.widgets.colours import number as figure
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.latent_axes import Choice, varies
from particle_explorer.widgets.lifetime import follow, follow_event
from particle_explorer.widgets.painted import to_qimage
from particle_explorer.widgets.pictures import (
    SHORT,
    TIPS,
    Decoder,
    Pictures,
    best_view,
    displayed,
    thumbnail,
    views_of,
)
from particle_explorer.widgets.plot_frame import LOOKS, Look, look_of
from particle_explorer.widgets.provenance import show_provenance

if TYPE_CHECKING:
    import napari

Rows = NDArray[np.intp]
FILE_ORDER = ""
LEAST_PX, MOST_PX = 56, 128
"""Side of a thumbnail: as many rows of them as the height has room for."""
GAP_PX = 4
AT_ONCE = 16
"""Thumbnails read before they are shown."""
N_KEPT = 3000
EMPTY = "No particles yet: open a stack in the tab Particles."
NOT_PREPARED = "The prepared images of this session are missing: the next training makes them again."


class Words:
    """Values of the column sorted by, in words; each made when it is looked at: there may be a million."""

    def __init__(self, values: NDArray[Any], numeric: bool) -> None:
        self._values, self._numeric = values, numeric

    def __getitem__(self, index: int) -> str:
        value = self._values[index]
        if not self._numeric:
            return str(value)
        return figure(float(value)) if np.isfinite(float(value)) else "no value"


class Strip(QAbstractScrollArea):
    """Thumbnails in columns that scroll sideways; only those in sight are ever asked for."""

    wanted = Signal()
    """other thumbnails are in sight"""
    picked = Signal(int, object)
    """index of the thumbnail clicked, and the keys held down"""
    swept = Signal(int, int, object)
    """first and last index of a row of thumbnails dragged over, and the keys held down"""
    stepped = Signal(int)
    """arrow keys: so many thumbnails on"""
    marked = Signal(str)
    """G or B: the particle looked at is "good" or "bad" """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOn)
        self.setMinimumHeight(LEAST_PX + 2 * GAP_PX + self.horizontalScrollBar().sizeHint().height())
        self.setAccessibleName("Gallery of particles")
        self.viewport().setMouseTracking(True)
        self.look: Look = LOOKS["dark"]
        self.message = EMPTY
        self.rows: Rows = np.zeros(0, np.intp)
        self.texts: Words | None = None
        self.chosen: Mask = np.zeros(0, bool)
        self._all_chosen = False
        self.active: int | None = None
        self.pictures: OrderedDict[int, QImage] = OrderedDict()
        self._press: int | None = None
        self._sweep: tuple[int, int] | None = None
        self.horizontalScrollBar().valueChanged.connect(self._on_scrolled)

    # what is shown

    def set_rows(self, rows: Rows, texts: Words | None) -> None:
        """Show these particles, in this order; back to the start unless the one looked at is among them."""
        self.rows, self.texts, self._sweep = rows, texts, None
        self._note_chosen()
        self._fit_bar()
        at = np.flatnonzero(rows == self.active) if self.active is not None else np.zeros(0, int)
        if at.size:
            self.show_index(int(at[0]))
        else:
            self.horizontalScrollBar().setValue(0)
        self._on_scrolled()

    def set_chosen(self, mask: Mask) -> None:
        self.chosen = mask
        self._note_chosen()
        self.viewport().update()

    def _note_chosen(self) -> None:
        fits = self.rows.size > 0 and int(self.rows.max()) < self.chosen.size
        self._all_chosen = fits and bool(self.chosen[self.rows].all())

    def set_active(self, row: int | None) -> None:
        self.active = row
        index = self.index_of(row)
        if index is not None:
            self.show_index(index)
        self.viewport().update()

    def put(self, row: int, picture: QImage) -> None:
        """A thumbnail that has been made."""
        self.pictures[row] = picture
        self.pictures.move_to_end(row)
        while len(self.pictures) > N_KEPT:
            self.pictures.popitem(last=False)

    def index_of(self, row: int | None) -> int | None:
        """Where a particle is shown."""
        at = np.flatnonzero(self.rows == row) if row is not None else np.zeros(0, int)
        return int(at[0]) if at.size else None

    def in_sight(self) -> Rows:
        """Particles whose thumbnails are at least partly visible."""
        first, last = self._visible()
        return self.rows[first:last]

    def show_index(self, index: int) -> None:
        """Scroll no more than needed to see a thumbnail whole."""
        step, bar = self._step(), self.horizontalScrollBar()
        left = (index // self.n_lines) * step
        if left < bar.value():
            bar.setValue(left)
        elif left + step > bar.value() + self.viewport().width():
            bar.setValue(left + step + GAP_PX - self.viewport().width())

    # geometry

    @property
    def n_lines(self) -> int:
        return max(1, (self.viewport().height() - GAP_PX) // (LEAST_PX + 32 + GAP_PX))

    @property
    def side(self) -> int:
        room = (self.viewport().height() - GAP_PX) // self.n_lines - GAP_PX
        return int(np.clip(room, LEAST_PX, MOST_PX))

    def _step(self) -> int:
        return self.side + GAP_PX

    def _visible(self) -> tuple[int, int]:
        step, x = self._step(), self.horizontalScrollBar().value()
        first = x // step * self.n_lines
        last = ((x + self.viewport().width()) // step + 1) * self.n_lines
        return first, min(last, self.rows.size)

    def place(self, index: int) -> QRect:
        """Where a thumbnail is, in pixels of the viewport."""
        step = self._step()
        column, line = divmod(index, self.n_lines)
        x = GAP_PX + column * step - self.horizontalScrollBar().value()
        return QRect(x, GAP_PX + line * step, self.side, self.side)

    def index_at(self, at: QPoint) -> int | None:
        """The thumbnail at a place, or None."""
        step = self._step()
        column = (at.x() - GAP_PX // 2 + self.horizontalScrollBar().value()) // step
        line = min((at.y() - GAP_PX // 2) // step, self.n_lines - 1)
        index = column * self.n_lines + line
        return index if 0 <= index < self.rows.size and line >= 0 and column >= 0 else None

    def _fit_bar(self) -> None:
        n_columns = -(-self.rows.size // self.n_lines)
        bar = self.horizontalScrollBar()
        bar.setPageStep(self.viewport().width())
        bar.setSingleStep(self._step())
        bar.setRange(0, max(0, n_columns * self._step() + GAP_PX - self.viewport().width()))

    def _on_scrolled(self, *_: object) -> None:
        self.viewport().update()
        self.wanted.emit()

    def resizeEvent(self, event: QResizeEvent | None) -> None:
        super().resizeEvent(event)
        self._fit_bar()
        self._on_scrolled()

    def sizeHint(self) -> QSize:
        return QSize(600, 100)

    # painting

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self.viewport())
        try:
            self._paint(painter)
        finally:
            painter.end()

    def _paint(self, painter: QPainter) -> None:
        painter.fillRect(self.viewport().rect(), QColor(self.look.plot))
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        if not self.rows.size:
            painter.setPen(QColor(self.look.text))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            painter.drawText(QRectF(self.viewport().rect()), flags, self.message)
            return
        some = bool(self.chosen.any())
        # where all that is shown is selected, a ring around each would say nothing
        mixed = some and not self._all_chosen
        ring, accent, line = (QColor(c) for c in (self.look.ring, self.look.accent, self.look.line))
        font = self.font()
        font.setPointSizeF(max(font.pointSizeF() * 0.85, 6.0))
        painter.setFont(font)
        metrics = QFontMetricsF(font)
        first, last = self._visible()
        swept = range(0) if self._sweep is None else range(min(self._sweep), max(self._sweep) + 1)
        for index in range(first, last):
            row, box = int(self.rows[index]), self.place(index)
            chosen = row < self.chosen.size and bool(self.chosen[row])
            painter.setOpacity(0.35 if some and not chosen and index not in swept else 1.0)
            picture = self.pictures.get(row)
            if picture is None:
                painter.fillRect(box, line)
            else:
                painter.drawImage(box, picture)
            if self.texts is not None:
                words = metrics.elidedText(
                    str(self.texts[index]), Qt.TextElideMode.ElideMiddle, box.width() - 4
                )
                strip = QRectF(box.left(), box.bottom() - metrics.height() + 1, box.width(), metrics.height())
                ground = QColor(0, 0, 0, 150)
                painter.fillRect(strip, ground)
                painter.setPen(QColor("white"))
                painter.drawText(strip, Qt.AlignmentFlag.AlignCenter, words)
            painter.setOpacity(1.0)
            painter.setBrush(Qt.BrushStyle.NoBrush)
            if (chosen and mixed) or index in swept:
                painter.setPen(QPen(ring, 1.5))
                painter.drawRect(QRectF(box).adjusted(-1, -1, 1, 1))
            if row == self.active:
                painter.setPen(QPen(accent, 2.5))
                painter.drawRect(QRectF(box).adjusted(1, 1, -1, -1))

    # hands

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is not None and event.button() == Qt.MouseButton.LeftButton:
            self._press = self.index_at(event.position().toPoint())

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self._press is None:
            return
        index = self.index_at(event.position().toPoint())
        if index is not None and (index != self._press or self._sweep is not None):
            self._sweep = (self._press, index)
            self.viewport().update()

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is None or self._press is None:
            return
        press, sweep = self._press, self._sweep
        self._press = self._sweep = None
        self.viewport().update()
        if sweep is not None:
            self.swept.emit(min(sweep), max(sweep), event.modifiers())
        elif self.index_at(event.position().toPoint()) == press:
            self.picked.emit(press, event.modifiers())

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if event is None:
            return
        delta = event.angleDelta()
        turn = delta.y() or delta.x()
        bar = self.horizontalScrollBar()
        bar.setValue(bar.value() - round(turn / 120 * self._step()))
        event.accept()

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        if event is None:
            return
        steps = {
            Qt.Key.Key_Left: -self.n_lines,
            Qt.Key.Key_Right: self.n_lines,
            Qt.Key.Key_Up: -1,
            Qt.Key.Key_Down: 1,
        }
        key = Qt.Key(event.key())
        if key in steps:
            self.stepped.emit(steps[key])
        elif key in (Qt.Key.Key_G, Qt.Key.Key_B):
            self.marked.emit("good" if key == Qt.Key.Key_G else "bad")
        else:
            super().keyPressEvent(event)

    def viewportEvent(self, event: QEvent | None) -> bool:
        if isinstance(event, QHelpEvent) and event.type() == QEvent.Type.ToolTip:
            index = self.index_at(event.pos())
            QToolTip.showText(event.globalPos(), "" if index is None else self.words(index), self.viewport())
            return True
        return bool(super().viewportEvent(event))

    def words(self, index: int) -> str:
        """Number of the particle (from 1) and its value of the column sorted by."""
        value = "" if self.texts is None else f" · {self.texts[index]}"
        return f"particle {number(int(self.rows[index]) + 1)}{value}"


class Average(QWidget):
    """The average in passing of what is selected, with the number of particles in it."""

    def __init__(self) -> None:
        super().__init__()
        self.look: Look = LOOKS["dark"]
        self.preview: Preview | None = None
        self._picture: QImage | None = None
        self.setSizePolicy(QSizePolicy.Policy.Fixed, QSizePolicy.Policy.Expanding)
        self.setFixedWidth(112)

    def show_preview(self, preview: Preview | None) -> None:
        self.preview = preview
        self._picture = None if preview is None else to_qimage(thumbnail(preview.image))
        how = "aligned by the poses of this run" if preview is None or preview.aligned else "not aligned"
        self.setToolTip(
            f"<p>A preview: a sample of the selected particles, as prepared for the model, {how}, averaged "
            "without CTF correction. It follows the lasso while it is drawn. The tab Classes averages the "
            "original images. A click says which particles, poses and settings made it.</p>"
        )
        self.update()

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is not None and event.button() == Qt.MouseButton.LeftButton and self.preview is not None:
            show_provenance(self.window(), "preview average", self.preview.made)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        line = QFontMetricsF(self.font()).height()
        side = max(min(self.width() - 6.0, self.height() - 2 * line - 2), 8.0)
        box = QRectF((self.width() - side) / 2, 2, side, side)
        painter.setPen(QColor(self.look.text))
        if self._picture is None or self.preview is None:
            painter.fillRect(self.rect().adjusted(0, 2, 0, -2), QColor(self.look.plot))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            words = "Select particles: their average appears here."
            painter.drawText(QRectF(self.rect()).adjusted(6, 2, -6, -2), flags, words)
        else:
            painter.drawImage(box, self._picture)
            n, of = self.preview.n, self.preview.of
            for i, words in enumerate(("preview average", f"N {number(n)} of {number(of)}")):
                below = QRectF(0, box.bottom() + i * line, self.width(), line)
                painter.drawText(below, Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextDontClip, words)
        painter.end()


class Gallery(QWidget):
    """Thumbnails of the selection, or of all particles where nothing is selected; under the canvas."""

    def __init__(self, viewer: napari.Viewer | None, state: AppState, decoder: Decoder) -> None:
        super().__init__()
        self.viewer, self.state, self._decoder = viewer, state, decoder
        self.tasks = Tasks(self)
        self._pictures: Pictures | None = None
        self._mine = False  # the selection is being changed by a hand in here
        self._wanted: tuple[str, bool] | None = None
        self._mailbox = Mailbox(self, _thumbnails, self._on_thumbnails, lambda _: None, "gallery")

        self.strip = Strip()
        self.average = Average()
        self.body = QWidget()
        row = QHBoxLayout(self.body)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        row.addWidget(self.average)
        row.addWidget(self.strip, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 0, 4, 2)
        layout.setSpacing(2)
        layout.addLayout(self._build_head())
        layout.addWidget(self.body, 1)

        self.strip.wanted.connect(self._ask)
        self.strip.picked.connect(self._on_picked)
        self.strip.swept.connect(self._on_swept)
        self.strip.stepped.connect(self._on_stepped)
        for signal in (state.features_changed, state.run_changed, state.held_changed):
            follow(self, signal, self._on_other_pictures)
        follow(self, state.session_changed, self._on_session)
        follow(self, state.features_changed, self._offer_columns)
        follow(self, state.view_changed, self._on_view)
        follow(self, state.selection.changed, self._on_selection)
        follow(self, state.selection.active_changed, self.strip.set_active)
        follow(self, state.preview_changed, self.average.show_preview)
        if viewer is not None:
            follow_event(self, viewer.events.theme, self._on_theme)
        self._on_theme()
        self._on_session(state.session)
        self.average.show_preview(state.preview)

    def shutdown(self) -> None:
        """Stop all background work."""
        self._mailbox.stop()
        self.tasks.stop()

    def sizeHint(self) -> QSize:
        return QSize(700, 140)

    @property
    def is_folded(self) -> bool:
        return not self.fold_button.isChecked()

    def set_folded(self, folded: bool) -> None:
        """Only the line of controls, or the thumbnails too."""
        self.fold_button.setChecked(not folded)

    # --- parts ------------------------------------------------------------------------------------

    def _build_head(self) -> QHBoxLayout:
        head = QHBoxLayout()
        head.setSpacing(4)
        self.fold_button = QToolButton()
        self.fold_button.setText("Gallery")
        self.fold_button.setCheckable(True)
        self.fold_button.setChecked(True)
        self.fold_button.setAutoRaise(True)
        self.fold_button.setArrowType(Qt.ArrowType.DownArrow)
        self.fold_button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.fold_button.setToolTip("Fold the gallery away, or show it")
        self.fold_button.toggled.connect(self._on_folded)
        head.addWidget(self.fold_button)
        self.views = QButtonGroup(self)
        self.view_buttons: dict[View, QToolButton] = {}
        for view, words in SHORT.items():
            button = QToolButton()
            button.setText(words)
            button.setCheckable(True)
            button.setToolTip(f"<p>{TIPS[view]}. In the layer, here and under the mouse; V is the next.</p>")
            button.clicked.connect(lambda _=False, view=view: self.state.set_view(view))
            self.views.addButton(button)
            self.view_buttons[view] = button
            head.addWidget(button)
        self.words = QLabel()
        self.words.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        head.addWidget(self.words, 1)
        head.addWidget(QLabel("sort by"))
        self.sort = QComboBox()
        self.sort.setToolTip("Order of the thumbnails: any column of the particles")
        self.sort.setMinimumContentsLength(12)
        self.sort.setMaximumWidth(200)
        self.sort.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.sort.addItem("file order", FILE_ORDER)
        self.sort.activated.connect(self._arrange)
        head.addWidget(self.sort)
        self.down_button = QToolButton()
        self.down_button.setCheckable(True)
        self.down_button.setArrowType(Qt.ArrowType.UpArrow)
        self.down_button.setToolTip("Smallest first; press for largest first")
        self.down_button.toggled.connect(self._on_direction)
        head.addWidget(self.down_button)
        return head

    # --- what is open -----------------------------------------------------------------------------

    def _on_session(self, session: object) -> None:
        self.tasks.forget("order")
        self._offer_columns()
        self._on_other_pictures()
        self._on_selection(self.state.selection.mask)

    def _on_other_pictures(self, *_: object) -> None:
        self._pictures = None
        self.strip.pictures.clear()
        session = self.state.session
        has_images = session is not None and session.has_images
        self.strip.message = NOT_PREPARED if session is not None and not has_images else EMPTY
        if has_images and not self.strip.rows.size:
            self._arrange()  # a training has made them again
        there = views_of(self.state) if self.state.session is not None else []
        for view, button in self.view_buttons.items():
            button.setVisible(view in there)
        if there:
            self.view_buttons[best_view(self.state, self.state.view)].setChecked(True)
        self._ask()

    def _on_view(self, _: object) -> None:
        self._on_other_pictures()
        self.strip.viewport().update()

    def _offer_columns(self) -> None:
        features = self.state.features
        self.tasks.run("columns", lambda: in_turn(sortable, features), self._on_columns)

    def _on_columns(self, choices: list[Choice]) -> None:
        before = self.sort.currentData()
        self.sort.clear()
        self.sort.addItem("file order", FILE_ORDER)
        for choice in choices:
            self.sort.addItem(choice.title, choice.key)
        self.sort.setCurrentIndex(max(0, self.sort.findData(before)))
        wanted = self._wanted
        if wanted is not None and self.sort.findData(wanted[0]) >= 0:
            self._wanted = None
            self.sort_by(wanted[0], descending=wanted[1])
        elif before and self.sort.currentData() != before:
            self._arrange()

    def sort_by(self, key: str, *, descending: bool = False) -> None:
        """Order by a column, once it is there."""
        index = self.sort.findData(key)
        if index >= 0:
            self.sort.setCurrentIndex(index)
            self.down_button.setChecked(descending)
            self._arrange()

    def sort_when_there(self, key: str, descending: bool) -> None:
        """Order by a column now, or as soon as a table with it has been looked through."""
        self._wanted = (key, descending)
        if self.sort.findData(key) >= 0:
            self.sort_by(key, descending=descending)

    # --- order ------------------------------------------------------------------------------------

    def _on_selection(self, mask: Mask) -> None:
        self.strip.set_chosen(mask)
        if not self._mine:
            self._arrange()
        self._say()

    def _arrange(self, *_: object) -> None:
        """Show what is selected, else all; sorting is a thread's work."""
        mask, features = self.state.selection.mask, self.state.features
        session = self.state.session
        if session is None or not session.has_images:
            self.strip.set_rows(np.zeros(0, np.intp), None)
            return
        rows = np.flatnonzero(mask) if mask.any() else np.arange(mask.size)
        key, descending = self.sort.currentData() or FILE_ORDER, self.down_button.isChecked()
        if key == FILE_ORDER:
            self.tasks.forget("order")
            self.strip.set_rows(rows[::-1] if descending else rows, None)
            self._say()
            return

        def done(found: tuple[Rows, Words]) -> None:
            self.strip.set_rows(*found)
            self._say()

        self.tasks.run("order", lambda: ordered(features[key], rows, descending), done)

    def _on_direction(self, down: bool) -> None:
        self.down_button.setArrowType(Qt.ArrowType.DownArrow if down else Qt.ArrowType.UpArrow)
        self.down_button.setToolTip(
            "Largest first; press for smallest first" if down else "Smallest first; press for largest first"
        )
        self._arrange()

    def _say(self) -> None:
        shown, selected = self.strip.rows.size, self.state.selection.count
        if not shown:
            words = ""
        elif not selected:
            words = f"all {number(shown)} particles"
        elif selected == shown:
            words = f"{number(selected)} selected"
        else:
            words = f"{number(selected)} selected, {number(shown)} shown"
        self.words.setText(f"  {words}")

    # --- pictures ---------------------------------------------------------------------------------

    def _ask(self) -> None:
        session = self.state.session
        if session is None or not session.has_images or self.is_folded or not self.isVisible():
            return
        missing = [int(row) for row in self.strip.in_sight() if int(row) not in self.strip.pictures]
        if not missing:
            return
        if self._pictures is None:
            self._pictures = Pictures.of(self.state, self.state.view, self._decoder)
        self._mailbox.submit(self._pictures, np.array(missing[:AT_ONCE], np.intp))

    def _on_thumbnails(self, made: tuple[Pictures, Rows, list[QImage]]) -> None:
        pictures, rows, images = made
        if pictures is self._pictures:
            for row, image in zip(rows, images, strict=True):
                self.strip.put(int(row), image)
            self.strip.viewport().update()
        self._ask()

    def showEvent(self, event: Any) -> None:
        super().showEvent(event)
        self._ask()

    # --- hands ------------------------------------------------------------------------------------

    def _on_picked(self, index: int, modifiers: Qt.KeyboardModifier) -> None:
        row = int(self.strip.rows[index])
        one = np.zeros(self.state.selection.mask.size, bool)
        one[row] = True
        # a plain click on one that is selected only looks at it: the selection is not lost by looking
        if modifiers != Qt.KeyboardModifier.NoModifier or not self.state.selection.mask[row]:
            self._select(one, modifiers)
        self.state.selection.set_active(row)

    def _on_swept(self, first: int, last: int, modifiers: Qt.KeyboardModifier) -> None:
        some = np.zeros(self.state.selection.mask.size, bool)
        some[self.strip.rows[first : last + 1]] = True
        self._select(some, modifiers)

    def _select(self, mask: Mask, modifiers: Qt.KeyboardModifier) -> None:
        """As on the map: Shift adds, Alt or Ctrl takes away, both keep the overlap."""
        shift = bool(modifiers & Qt.KeyboardModifier.ShiftModifier)
        alt = bool(modifiers & (Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ControlModifier))
        selection = self.state.selection
        self._mine = True  # what is shown stays while one picks in it
        try:
            if shift and alt:
                selection.intersect(mask)
            elif shift:
                selection.add(mask)
            elif alt:
                selection.subtract(mask)
            else:
                selection.set(mask)
        finally:
            self._mine = False

    def _on_stepped(self, by: int) -> None:
        at = self.strip.index_of(self.state.selection.active)
        index = 0 if at is None else int(np.clip(at + by, 0, self.strip.rows.size - 1))
        if self.strip.rows.size:
            self.state.selection.set_active(int(self.strip.rows[index]))

    # --- look -------------------------------------------------------------------------------------

    def _on_folded(self, shown: bool) -> None:
        self.fold_button.setArrowType(Qt.ArrowType.DownArrow if shown else Qt.ArrowType.RightArrow)
        self.body.setVisible(shown)
        self.setMaximumHeight(16777215 if shown else self.fold_button.sizeHint().height() + 6)
        self.updateGeometry()
        self._ask()

    def _on_theme(self, *_: object) -> None:
        look = LOOKS["dark"] if self.viewer is None else look_of(self.viewer.theme)
        self.strip.look = self.average.look = look
        for button in self.view_buttons.values():
            button.setStyleSheet(f"QToolButton:checked {{ background: {look.line}; border-radius: 3px; }}")
        self.strip.viewport().update()
        self.average.update()


def _thumbnails(pictures: Pictures, rows: Rows) -> tuple[Pictures, Rows, list[QImage]]:
    """A thread's work."""
    return pictures, rows, [to_qimage(thumbnail(image)) for image in displayed(pictures.read(rows))]


def sortable(features: pd.DataFrame) -> list[Choice]:
    """The columns that a gallery can be sorted by, with their names for people."""
    return [Choice(str(name), title_of(str(name))) for name in features.columns if varies(features[name])]


def ordered(column: pd.Series, rows: Rows, descending: bool) -> tuple[Rows, Words]:
    """`rows` in the order of a column, those without a value last; and the values in words."""
    values = column.to_numpy()[rows]
    numeric = pd.api.types.is_numeric_dtype(column)
    known = np.isfinite(values.astype(float)) if numeric else ~pd.isna(values)
    order = np.argsort(values[known] if numeric else values[known].astype(str), kind="stable")
    order = np.flatnonzero(known)[order[::-1] if descending else order]
    order = np.concatenate([order, np.flatnonzero(~known)])
    return rows[order], Words(values[order], numeric)

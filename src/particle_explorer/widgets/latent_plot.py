"""The scatter: the picture of the points in its axes, and what mouse and keys do in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from qtpy.QtCore import QEvent, QPointF, QRectF, QSize, QSizeF, Qt, QTimer, Signal
from qtpy.QtGui import (
    QColor,
    QContextMenuEvent,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPaintEvent,
    QPixmap,
    QWheelEvent,
)
from qtpy.QtWidgets import QSizePolicy, QWidget

from particle_explorer.state import Mask, Selection
from particle_explorer.widgets.colours import Colouring
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.outline import Corners, Outline
from particle_explorer.widgets.plot_frame import (
    LOOKS,
    Look,
    View,
    paint_axes,
    paint_legend,
    plot_rect,
    swatches,
)
from particle_explorer.widgets.plot_marks import (
    paint_active,
    paint_handle,
    paint_inset,
    paint_outline,
    paint_words,
)
from particle_explorer.widgets.point_picture import Density, PointPicture
from particle_explorer.widgets.splat import Points

Tool = Literal["handle", "lasso", "rectangle", "ellipse", "pan"]

HANDLE_REACH_PX = 12.0
LINE_REACH_PX = 6.0
"""So near to its line a handle that has one coordinate is taken, where no tool draws."""
CLICK_REACH_PX = 12.0
HANDLE_FRAME_MS = 16
"""A handle that was moved is painted with the picture drawn for it, or so much later at most."""
OUTLINE_MS = 50
"""Least time between two looks at what a lasso holds while it is drawn."""
ARROW_STEPS = 100
"""Arrow-key steps across the visible map."""


class ScatterCanvas(QWidget):
    """Points, axes, handle, lasso; `selection` is read and written, everything else is told by methods.

    Coordinates of the public methods are those of the axes. Rows are rows of the session.
    """

    handle_moved = Signal(float, float)
    """the user moved the handle to (x, y); a coordinate the handle does not have is NaN"""
    snap_asked = Signal(int)
    """the user asked the handle to go to this particle"""
    tool_changed = Signal(str)
    density_changed = Signal(bool)
    """whether the picture shows density now"""
    hovered = Signal(int)
    """the particle under the mouse, -1 for none"""
    menu_asked = Signal(object, object)
    """right click: the particle there or None, and where on the screen (QPoint)"""
    help_asked = Signal()
    """F1 or ?"""
    view_changed = Signal()
    """another part is shown, or in another way"""
    save_asked = Signal()
    """S: keep the selection as a set"""
    cluster_asked = Signal()
    """C"""

    def __init__(self, selection: Selection | None = None, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setMouseTracking(True)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.setAttribute(Qt.WidgetAttribute.WA_OpaquePaintEvent)
        self.setMinimumSize(160, 120)
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Expanding)
        self.setAccessibleName("Latent map")
        self._selection = selection if selection is not None else Selection()
        self._look = LOOKS["dark"]
        self._titles = ("", "")
        self._message = ""
        self._hint = ""
        self._describe: Callable[[int], str] | None = None
        self.picture = PointPicture()
        self._fitted = True
        self._said_density = False
        self._backdrop: QPixmap | None = None
        self._handle: tuple[float | None, float | None] = (None, None)
        self._hollow = False
        self._active_at: tuple[float, float] | None = None
        self._tool: Tool = "lasso"
        self._drag: Literal["", "pan", "outline", "handle"] = ""
        self._outline: Outline | None = None
        self._space = False
        self._press = QPointF()
        self._last = QPointF()
        self._hover: int | None = None
        self._hover_at = QPointF()
        self._handle_frame = QTimer(self)
        self._handle_frame.setSingleShot(True)
        self._handle_frame.setInterval(HANDLE_FRAME_MS)
        self._handle_frame.timeout.connect(self.update)
        self._thumbnail: tuple[int, QImage] | None = None
        self._modifiers = Qt.KeyboardModifier.NoModifier
        self._hinting = False
        self._inset: tuple[QImage, str] | None = None
        self._outlined = QTimer(self)  # not every move of the mouse is worth a mask of a million particles
        self._outlined.setSingleShot(True)
        self._outlined.setInterval(OUTLINE_MS)
        self._outlined.timeout.connect(self._hint_selection)
        self._settle = QTimer(self)
        self._settle.setSingleShot(True)
        self._settle.setInterval(120)
        self._settle.timeout.connect(self._draw_all_points)
        follow(self, self._selection.changed, self._on_selection_changed)
        follow(self, self._selection.active_changed, self._on_active_changed)
        self._update_cursor()

    # ---- what is shown -----------------------------------------------

    @property
    def selection(self) -> Selection:
        return self._selection

    @property
    def n_points(self) -> int:
        return self.picture.points.rows.size

    @property
    def view(self) -> View:
        """x0, x1, y0, y1 of the visible part."""
        return self.picture.view

    @property
    def colouring(self) -> Colouring:
        return self.picture.colouring

    @property
    def handle(self) -> tuple[float | None, float | None]:
        return self._handle

    @property
    def tool(self) -> Tool:
        return self._tool

    @property
    def is_painted(self) -> bool:
        """Whether the picture shows the present points, colours and selection."""
        return self._backdrop is not None

    def set_points(
        self, points: Points, *, titles: tuple[str, str] = ("", ""), keep_view: bool = False
    ) -> None:
        """Show other points; with `keep_view` a zoom made by the user stays."""
        self._titles = titles
        self._hover = None
        self.picture.set_points(points)
        self.picture.set_selection(self._selection.mask)
        self._find_active()
        if not keep_view or self._fitted:
            self.fit()
        else:
            self._repaint()

    def clear_points(self) -> None:
        self._cancel_drag()
        self.set_points(Points.of([], []))

    def set_colouring(self, colouring: Colouring) -> None:
        """Colour by `colouring`, whose levels are per row of the session."""
        self.picture.set_colouring(colouring)
        self._repaint()

    def set_theme(self, name: str) -> None:
        """ "dark" or "light"."""
        self.set_look(LOOKS[name])

    def set_look(self, look: Look) -> None:
        self._look = look
        self.picture.set_look(look)
        self._repaint()

    def set_message(self, text: str) -> None:
        """Words in place of an empty plot."""
        if text != self._message:
            self._message = text
            self.update()

    def set_hint(self, text: str) -> None:
        """One line over the lower edge of the map; "" for none."""
        if text != self._hint:
            self._hint = text
            self.update()

    def set_describe(self, describe: Callable[[int], str] | None) -> None:
        """Words for the particle under the cursor, in place of its number and colour value."""
        self._describe = describe

    def set_thumbnail(self, row: int, picture: QImage) -> None:
        """Show a picture of a particle beside its words while the mouse is over it."""
        self._thumbnail = (row, picture)
        if row == self._hover:
            self.update()

    def forget_thumbnail(self) -> None:
        """Particles look different now: ask for the one under the mouse again."""
        self._thumbnail = None
        if self._hover is not None:
            self.hovered.emit(self._hover)
            self.update()

    def set_inset(self, picture: QImage | None, words: str = "") -> None:
        """A picture in a corner while a hand draws around particles."""
        self._inset = None if picture is None else (picture, words)
        if self._outline is not None:
            self.update()

    def set_density(self, density: Density) -> None:
        self.picture.set_density(density)
        self._repaint()

    def set_point_size(self, size_px: float) -> None:
        """Diameter of a point in widget pixels; 0 fits it to the number of visible points."""
        self.picture.set_point_size(size_px)
        self._repaint()

    def set_opacity(self, opacity: float) -> None:
        """Strength of the points over the ground, 0 to 1."""
        self.picture.set_opacity(opacity)
        self._repaint()

    @property
    def is_fitted(self) -> bool:
        """Whether all points are shown, not a part that was zoomed to."""
        return self._fitted

    def show_part(self, view: View) -> None:
        """Show x0, x1, y0, y1."""
        self._fitted = False
        self._set_view(view, keep_size=False)

    def set_handle(self, x: float | None, y: float | None) -> None:
        """Put the handle there, silently; None in one axis makes it a line, None in both hides it."""
        if (x, y) != self._handle:
            self._handle = (x, y)
            self.update()

    def show_handle(self) -> None:
        """Paint the handle where it is now, if it was moved since.

        The window composes all of itself, napari's OpenGL canvas too, whenever a part is painted. A frame for
        the handle and another for its picture would take twice as long on a software renderer.
        """
        if self._handle_frame.isActive():
            self._handle_frame.stop()
            self.update()

    @property
    def handle_near_data(self) -> bool:
        """Whether the handle stands among points, as far as these axes can tell."""
        return self.picture.points.near_data(*self._handle)

    def set_handle_hollow(self, hollow: bool) -> None:
        """Draw the handle hollow, also among points: what lies off these axes says so."""
        if hollow != self._hollow:
            self._hollow = hollow
            self.update()

    def set_tool(self, tool: Tool) -> None:
        if tool != self._tool:
            self._tool = tool
            self._cancel_drag()
            self._update_cursor()
            self.tool_changed.emit(tool)

    def fit(self) -> None:
        """Show all points, or, where a few lie very far out, nearly all."""
        self._fitted = True
        self._set_view(self.picture.points.home, keep_size=False)

    def zoom(self, factor: float, at: QPointF, *, x: bool = True, y: bool = True) -> None:
        """Zoom in by `factor` with the point under `at` (widget pixels) held fixed."""
        plot = self.plot_rect()
        x0, x1, y0, y1 = self.view
        wide, high = self.picture.points.extent
        if x:
            x0, x1 = _zoomed(x0, x1, (at.x() - plot.left()) / plot.width(), factor, wide)
        if y:
            y0, y1 = _zoomed(y0, y1, (plot.bottom() - at.y()) / plot.height(), factor, high)
        self._fitted = False
        self._hand_moves()
        self._set_view((x0, x1, y0, y1), keep_size=False)

    # ---- geometry ----------------------------------------------------

    def sizeHint(self) -> QSize:
        return QSize(380, 300)

    def plot_rect(self) -> QRectF:
        """The part of the widget inside the axes."""
        return plot_rect(self.width(), self.height(), self.font())

    def to_widget(self, x: float, y: float) -> QPointF:
        """Axes → widget pixels."""
        plot = self.plot_rect()
        x0, x1, y0, y1 = self.view
        return QPointF(
            plot.left() + (x - x0) / (x1 - x0) * plot.width(),
            plot.bottom() - (y - y0) / (y1 - y0) * plot.height(),
        )

    def to_axes(self, at: QPointF) -> tuple[float, float]:
        """Widget pixels → axes."""
        plot = self.plot_rect()
        x0, x1, y0, y1 = self.view
        return (
            x0 + (at.x() - plot.left()) / plot.width() * (x1 - x0),
            y0 + (plot.bottom() - at.y()) / plot.height() * (y1 - y0),
        )

    def handle_position(self) -> QPointF | None:
        """Where the ◉ is drawn, in widget pixels; on a line it sits in the middle."""
        x, y = self._handle
        if x is None and y is None:
            return None
        x0, x1, y0, y1 = self.view
        return self.to_widget((x0 + x1) / 2 if x is None else x, (y0 + y1) / 2 if y is None else y)

    def nearest(self, at: QPointF, reach_px: float = math.inf) -> int | None:
        """The row of the particle nearest to a place in the widget, within `reach_px`."""
        return self._framed().nearest(at - self.plot_rect().topLeft(), reach_px)

    def inside(self, polygon: Corners) -> Mask:
        """`(n,)` rows of the session inside a polygon of widget pixels (even-odd), of those visible."""
        self._draw_all_points()
        plot = self.plot_rect()
        corners = np.array(polygon, float).reshape(-1, 2) - (plot.left(), plot.top())
        return self._framed().inside(corners, self._selection.mask.size)

    def _framed(self) -> PointPicture:
        """The picture at the present size of the plot."""
        plot = self.plot_rect()
        self.picture.set_frame(plot.width(), plot.height(), self.devicePixelRatioF())
        return self.picture

    # ---- the picture -------------------------------------------------

    def _repaint(self) -> None:
        """Paint all anew: something has changed that the backdrop shows."""
        self._backdrop = None
        self.update()

    def _set_view(self, view: View, *, keep_size: bool) -> None:
        self.picture.set_view(view, keep_size=keep_size)
        self._repaint()
        self.view_changed.emit()

    def _hand_moves(self) -> None:
        if self.picture.hurry():
            self._settle.start()

    def _draw_all_points(self) -> None:
        self._settle.stop()
        if self.picture.take_time():
            self._repaint()

    def _tell_density(self) -> None:
        self.density_changed.emit(self._said_density)

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        try:
            self._paint(painter)
        finally:
            painter.end()  # a painter that an error leaves open takes the process down

    def _paint(self, painter: QPainter) -> None:
        look = self._look
        painter.fillRect(self.rect(), QColor(look.background))
        if not self.n_points:
            painter.setPen(QColor(look.text))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            painter.drawText(QRectF(self.rect()).adjusted(16, 8, -16, -8), flags, self._message)
            return
        plot = self.plot_rect()
        painter.drawPixmap(0, 0, self._still(plot))
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setClipRect(plot)
        if self._active_at is not None:
            paint_active(painter, self.to_widget(*self._active_at), look)
        at = self.handle_position()
        if at is not None:
            along = (self._handle[0] is not None, self._handle[1] is not None)
            paint_handle(painter, plot, at, along, self._hollow or not self.handle_near_data, look)
        if self._outline is not None and self._outline.has_begun:
            if self._inset is not None:
                paint_inset(painter, plot, self._last, *self._inset, look, self.font())
            paint_outline(painter, self._outline.polygon(), look)
        painter.setClipping(False)
        if self._hint:
            self._paint_words(painter, self._hint, QPointF(plot.center().x(), plot.bottom() - 6))
        if self._hover is not None and not self._drag:
            row, picture = self._thumbnail or (-1, None)
            above = QPointF(self._hover_at.x(), self._hover_at.y() - 10)
            words = self.describe(self._hover)
            self._paint_words(painter, words, above, picture if row == self._hover else None)

    def _paint_words(
        self, painter: QPainter, words: str, above: QPointF, picture: QImage | None = None
    ) -> None:
        paint_words(painter, QSizeF(self.size()), words, above, self._look, self.font(), picture)

    def _still(self, plot: QRectF) -> QPixmap:
        """All that does not move with the handle, kept as one picture."""
        picture = self._framed()
        image = picture.image()
        if picture.shows_density != self._said_density:
            self._said_density = picture.shows_density
            QTimer.singleShot(0, self._tell_density)
        ratio = self.devicePixelRatioF()
        if self._backdrop is None or self._backdrop.size() != self.size() * ratio:
            self._backdrop = QPixmap(self.size() * ratio)
            self._backdrop.setDevicePixelRatio(ratio)
            self._backdrop.fill(QColor(self._look.background))
            painter = QPainter(self._backdrop)
            painter.drawImage(plot, image)
            paint_axes(painter, plot, self.view, self._titles, self._look, self.font(), self.width())
            paint_legend(painter, plot, self.colouring, picture.n_max, self.n_points, self._look, self.font())
            painter.end()
        return self._backdrop

    def describe(self, row: int) -> str:
        """The words beside the cursor: number of the particle (from 1) and its value of the colour column."""
        if self._describe is not None:
            return self._describe(row)
        words = f"particle {row + 1:,}".replace(",", "\u202f")
        if self.colouring.kind != "none" and row < self.colouring.level.size:
            words += f" · {self.colouring.title}: {self.colouring.text(row)}"
        return words

    # ---- the selection -----------------------------------------------

    def _on_selection_changed(self, mask: Mask) -> None:
        self.picture.set_selection(mask)
        self._repaint()

    def _on_active_changed(self, row: int | None) -> None:
        self._find_active()
        self.update()

    def _find_active(self) -> None:
        self._active_at = None
        row = self._selection.active
        if row is None:
            return
        found = np.flatnonzero(self.picture.points.rows == row)
        if found.size:
            self._active_at = self.picture.points.place(int(found[0]))

    def choose(self, mask: Mask, modifiers: Qt.KeyboardModifier) -> None:
        """Select particles in the way that the keys held down ask for."""
        self._selection.set(self.combined(mask, modifiers))

    def combined(self, mask: Mask, modifiers: Qt.KeyboardModifier) -> Mask:
        """The selection with `mask` added, taken away or intersected, as the keys held down ask."""
        shift = bool(modifiers & Qt.KeyboardModifier.ShiftModifier)
        # many Linux desktops move the window on Alt + drag, so Ctrl does the same
        alt = bool(modifiers & (Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ControlModifier))
        now = self._selection.mask
        if shift and alt:
            return now & mask
        return now | mask if shift else now & ~mask if alt else mask

    def _outline_moves(self, event: QMouseEvent) -> None:
        self._modifiers = event.modifiers()
        if not self._outlined.isActive():
            self._outlined.start()

    def _hint_selection(self) -> None:
        if self._outline is not None and self._outline.has_begun:
            self._hinting = True
            self._selection.hint(self.combined(self.inside(self._outline.polygon()), self._modifiers))

    # ---- hands -------------------------------------------------------

    def event(self, event: QEvent | None) -> bool:
        # without this, keys that are also shortcuts of the main window would never arrive
        if (
            event is not None
            and event.type() == QEvent.Type.ShortcutOverride
            and isinstance(event, QKeyEvent)
            and self._understands(event)
        ):
            event.accept()
            return True
        return bool(super().event(event))

    def _understands(self, event: QKeyEvent) -> bool:
        ctrl = bool(event.modifiers() & Qt.KeyboardModifier.ControlModifier)
        if event.key() in (Qt.Key.Key_Z, Qt.Key.Key_Y):
            return ctrl
        return not ctrl and event.key() in _KEYS

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        if event is None:
            return
        if not self._understands(event):
            super().keyPressEvent(event)
            return
        key = event.key()
        shift = bool(event.modifiers() & Qt.KeyboardModifier.ShiftModifier)
        if key in _TOOL_KEYS:
            self.set_tool(_TOOL_KEYS[key])
        elif key == Qt.Key.Key_Y or (key == Qt.Key.Key_Z and shift):
            self._selection.redo()
        elif key == Qt.Key.Key_Z:
            self._selection.undo()
        elif key == Qt.Key.Key_Escape:
            if self._drag:
                self._cancel_drag()
            else:
                self._selection.clear()
        elif key == Qt.Key.Key_S:
            self.save_asked.emit()
        elif key == Qt.Key.Key_C:
            self.cluster_asked.emit()
        elif key == Qt.Key.Key_I:
            self._selection.invert()
        elif key in (Qt.Key.Key_F1, Qt.Key.Key_Question):
            self.help_asked.emit()
        elif key == Qt.Key.Key_Space:
            self._space = True
            self._update_cursor()
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter):
            at = self.handle_position()
            row = None if at is None else self.nearest(at)
            if row is not None:
                self.snap_asked.emit(row)
        else:
            right, up = _ARROWS[key]
            self._step_handle(right * (10 if shift else 1), up * (10 if shift else 1))

    def keyReleaseEvent(self, event: QKeyEvent | None) -> None:
        if event is not None and event.key() == Qt.Key.Key_Space and not event.isAutoRepeat():
            self._space = False
            self._update_cursor()
            return
        super().keyReleaseEvent(event)

    def _step_handle(self, right: int, up: int) -> None:
        x, y = self._handle
        x0, x1, y0, y1 = self.view
        if x is not None:
            x += right * (x1 - x0) / ARROW_STEPS
        if y is not None:
            y += up * (y1 - y0) / ARROW_STEPS
        self._move_handle(x, y)

    def _move_handle(self, x: float | None, y: float | None) -> None:
        if (x, y) == self._handle:
            return
        self._handle = (x, y)
        if not self._handle_frame.isActive():
            self._handle_frame.start()
        self.handle_moved.emit(math.nan if x is None else x, math.nan if y is None else y)

    def _handle_to(self, at: QPointF) -> None:
        plot = self.plot_rect()
        x, y = self.to_axes(
            QPointF(min(max(at.x(), plot.left()), plot.right()), min(max(at.y(), plot.top()), plot.bottom()))
        )
        self._move_handle(None if self._handle[0] is None else x, None if self._handle[1] is None else y)

    def _over_handle(self, at: QPointF) -> bool:
        here = self.handle_position()
        if here is None:
            return False
        if math.hypot(at.x() - here.x(), at.y() - here.y()) <= HANDLE_REACH_PX:
            return True
        if self._tool in ("lasso", "rectangle", "ellipse"):
            return False  # the line crosses the whole plot: a drag that starts on it draws
        x, y = self._handle
        across = at.x() - here.x() if y is None else at.y() - here.y()
        return (x is None or y is None) and abs(across) <= LINE_REACH_PX

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        self._press = self._last = at
        self._hover = None
        group = self._legend_at(at)
        if group is not None and event.button() == Qt.MouseButton.LeftButton:
            self.choose(self.colouring.level == group, event.modifiers())
            return
        if not self.n_points or not self.plot_rect().adjusted(-4, -4, 4, 4).contains(at):
            return
        middle = event.button() == Qt.MouseButton.MiddleButton
        if middle or (event.button() == Qt.MouseButton.LeftButton and (self._space or self._tool == "pan")):
            if not middle and not self._space and self._over_handle(at):
                self._drag = "handle"
            else:
                self._drag = "pan"
        elif event.button() == Qt.MouseButton.LeftButton:
            free = event.modifiers() == Qt.KeyboardModifier.NoModifier
            if self._tool == "handle" and self._handle != (None, None):
                self._drag = "handle"
                self._handle_to(at)
            elif free and self._over_handle(at):
                self._drag = "handle"
            elif self._tool == "lasso" or self._tool == "rectangle" or self._tool == "ellipse":
                self._drag, self._outline = "outline", Outline(self._tool, at)
        self._update_cursor()

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        if self._drag == "pan":
            plot = self.plot_rect()
            x0, x1, y0, y1 = self.view
            dx = (at.x() - self._last.x()) / plot.width() * (x1 - x0)
            dy = (at.y() - self._last.y()) / plot.height() * (y1 - y0)
            self._fitted = False
            self._hand_moves()
            self._set_view((x0 - dx, x1 - dx, y0 + dy, y1 + dy), keep_size=True)
        elif self._drag == "handle":
            self._handle_to(at)
        elif self._outline is not None:
            self._outline_moves(event)
            if self._outline.move(at):
                self.update()
        else:
            self._hover_at, plot = at, self.plot_rect()
            hover = self.picture.row_under(at - plot.topLeft()) if plot.contains(at) else None
            if hover != self._hover or hover is not None:
                self._set_hover(hover)
                self.update()
            self._update_cursor()
        self._last = at

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        drag, outline = self._drag, self._outline
        hinting, self._hinting = self._hinting, False
        self._cancel_drag()
        if drag == "pan":
            self._draw_all_points()
        if outline is None:
            return
        if not outline.is_click(at):
            self.choose(self.inside(outline.polygon()), event.modifiers())
            if hinting:  # after the selection, so that its average does not blink
                self._selection.hint(None)
            return
        row = self.nearest(at, CLICK_REACH_PX)
        if row is not None:
            one = np.zeros(self._selection.mask.size, bool)
            one[row] = True
            self.choose(one, event.modifiers())
            self._selection.set_active(row)

    def _legend_at(self, at: QPointF) -> int | None:
        """The group whose name in the legend is at a place."""
        fits = self.colouring.level.size == self._selection.mask.size
        if self.colouring.kind != "category" or not self.n_points or not fits:
            return None
        found, _ = swatches(self.plot_rect(), self.colouring, self.font())
        return next((level for level, _, box in found if level >= 0 and box.contains(at)), None)

    def contextMenuEvent(self, event: QContextMenuEvent | None) -> None:
        if event is not None and self.n_points:
            self._cancel_drag()
            at = QPointF(event.pos())
            self._press = self._last = at
            self.menu_asked.emit(self.nearest(at, CLICK_REACH_PX), event.globalPos())
            event.accept()

    def mouseDoubleClickEvent(self, event: QMouseEvent | None) -> None:
        self._cancel_drag()
        self.fit()

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if event is None or not self.n_points:
            return
        at, plot = event.position(), self.plot_rect()
        # over an axis, only that axis is zoomed
        self.zoom(1.0015 ** event.angleDelta().y(), at, x=at.x() >= plot.left(), y=at.y() <= plot.bottom())
        event.accept()

    def _set_hover(self, row: int | None) -> None:
        if row != self._hover:
            self._hover = row
            self.hovered.emit(-1 if row is None else row)

    def leaveEvent(self, event: QEvent | None) -> None:
        self._set_hover(None)
        self.update()

    def focusOutEvent(self, event: Any) -> None:
        self._space = False  # its release would go elsewhere
        super().focusOutEvent(event)

    def _cancel_drag(self) -> None:
        self._outlined.stop()
        if self._hinting:
            self._hinting = False
            self._selection.hint(None)
        self._drag, self._outline = "", None
        self._update_cursor()
        self.update()

    def _update_cursor(self) -> None:
        if self._drag == "pan":
            shape = Qt.CursorShape.ClosedHandCursor
        elif self._space or self._tool == "pan":
            shape = Qt.CursorShape.OpenHandCursor
        elif self._drag == "handle":
            shape = Qt.CursorShape.ClosedHandCursor
        elif self._over_handle(self._last) or self._legend_at(self._last) is not None:
            shape = Qt.CursorShape.PointingHandCursor
        else:
            shape = Qt.CursorShape.CrossCursor
        if self.cursor().shape() != shape:
            self.setCursor(shape)


_TOOL_KEYS: dict[int, Tool] = {
    Qt.Key.Key_D: "handle",
    Qt.Key.Key_L: "lasso",
    Qt.Key.Key_R: "rectangle",
    Qt.Key.Key_O: "ellipse",
    Qt.Key.Key_P: "pan",
}
_ARROWS: dict[int, tuple[int, int]] = {
    Qt.Key.Key_Left: (-1, 0),
    Qt.Key.Key_Right: (1, 0),
    Qt.Key.Key_Up: (0, 1),
    Qt.Key.Key_Down: (0, -1),
}
_KEYS: set[int] = {
    *_TOOL_KEYS,
    *_ARROWS,
    Qt.Key.Key_Escape,
    Qt.Key.Key_Space,
    Qt.Key.Key_Return,
    Qt.Key.Key_Enter,
    Qt.Key.Key_S,
    Qt.Key.Key_C,
    Qt.Key.Key_I,
    Qt.Key.Key_F1,
    Qt.Key.Key_Question,
}


def _zoomed(low: float, high: float, share: float, factor: float, extent: float) -> tuple[float, float]:
    span = float(np.clip((high - low) / factor, extent * 1e-5, extent * 100))
    fixed = low + share * (high - low)
    return fixed - share * span, fixed + (1 - share) * span

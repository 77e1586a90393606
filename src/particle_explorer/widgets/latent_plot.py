"""The scatter: up to millions of particles painted by numpy into a QImage, without OpenGL.

Why not a plotting library: on software OpenGL, which is what remote desktops at microscopy facilities have,
every one of them takes seconds per frame at 10⁶ points; this takes about 15 ms, survives undocking and
paints the same pixels everywhere.

One picture is made in three steps, each kept until something it depends on changes: the points that the
view shows and the pixel each falls on (`Projection`), which point owns each pixel (`Owners`), and the
colours of the pixels. So a new colour costs per pixel, not per particle, and hovering is one look at the
owners.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QEvent, QPointF, QRectF, QSize, Qt, QTimer, Signal
from qtpy.QtGui import (
    QColor,
    QContextMenuEvent,
    QFontMetricsF,
    QImage,
    QKeyEvent,
    QMouseEvent,
    QPainter,
    QPainterPath,
    QPaintEvent,
    QPen,
    QPixmap,
    QPolygonF,
    QWheelEvent,
)
from qtpy.QtWidgets import QSizePolicy, QWidget

from particle_explorer.state import Mask, Selection
from particle_explorer.widgets.colours import DENSITY, Colouring, plain
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.plot_frame import LOOKS, Look, paint_axes, paint_legend, plot_rect, swatches
from particle_explorer.widgets.splat import (
    Owners,
    Points,
    Projection,
    grown,
    mix,
    pack,
    points_in_polygon,
    stamp,
    unpack,
    visible,
)

Tool = Literal["handle", "lasso", "rectangle", "ellipse", "pan"]
Density = Literal["auto", "on", "off"]
Floats = NDArray[np.float64]

DENSITY_FROM = 300_000
"""Visible points from which the automatic mode shows density: beyond it single points hide each other."""
GESTURE_POINTS = 2_000_000
"""Points drawn while the hand moves; the order is random, so the first ones are a fair sample."""
FADE = 0.25
"""Strength of what is not selected while something is."""
RING_EACH_FROM_PX = 3.0
"""Diameter from which every selected point has a ring of its own."""
HANDLE_REACH_PX = 12.0
CLICK_REACH_PX = 12.0
HOVER_REACH_PX = 6
STILL_PX = 3.0
"""A press that moved less than this was a click; lasso corners closer than this are dropped."""
HANDLE_FRAME_MS = 16
"""A handle that was moved is painted with the picture drawn for it, or so much later at most."""
ELLIPSE_CORNERS = 96
OUTLINE_MS = 50
"""Least time between two looks at what a lasso holds while it is drawn."""
INSET_PX = 104
"""Side of the average that is shown while a lasso is drawn."""
THUMBNAIL_PX = 88
"""Side of the picture of the particle under the mouse."""
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
        self._points = Points.of([], [])
        self._view = (0.0, 1.0, 0.0, 1.0)  # x0, x1, y0, y1
        self._fitted = True
        self._colouring = plain(0)
        self._level: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._chosen: Mask | None = None
        self._density: Density = "auto"
        self._was_density = False
        self._size_px = 0.0  # 0: automatic
        self._opacity = 1.0
        self._kept_size: float | None = None
        self._projection: Projection | None = None
        self._owners: Owners | None = None
        self._image: QImage | None = None
        self._backdrop: QPixmap | None = None
        self._pixels: NDArray[np.uint32] | None = None  # QImage does not keep its buffer alive
        self._handle: tuple[float | None, float | None] = (None, None)
        self._hollow = False
        self._active_at: tuple[float, float] | None = None
        self._tool: Tool = "lasso"
        self._drag: Literal["", "pan", "lasso", "rectangle", "ellipse", "handle"] = ""
        self._space = False
        self._press = QPointF()
        self._last = QPointF()
        self._path: list[tuple[float, float]] = []
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
        return self._points.rows.size

    @property
    def view(self) -> tuple[float, float, float, float]:
        """x0, x1, y0, y1 of the visible part."""
        return self._view

    @property
    def handle(self) -> tuple[float | None, float | None]:
        return self._handle

    @property
    def tool(self) -> Tool:
        return self._tool

    @property
    def shows_density(self) -> bool:
        return self._was_density

    @property
    def is_painted(self) -> bool:
        """Whether the picture shows the present points, colours and selection."""
        return self._backdrop is not None

    def set_points(
        self, points: Points, *, titles: tuple[str, str] = ("", ""), keep_view: bool = False
    ) -> None:
        """Show other points; with `keep_view` a zoom made by the user stays."""
        self._points = points
        self._titles = titles
        self._hover = None
        self._spread_colours()
        self._read_selection()
        self._find_active()
        if not keep_view or self._fitted:
            self.fit()
        else:
            self._forget(projection=True)

    def clear_points(self) -> None:
        self._cancel_drag()
        self.set_points(Points.of([], []))

    def set_colouring(self, colouring: Colouring) -> None:
        """Colour by `colouring`, whose levels are per row of the session."""
        self._colouring = colouring
        self._spread_colours()
        self._forget()

    def set_theme(self, name: str) -> None:
        """ "dark" or "light"."""
        self.set_look(LOOKS[name])

    def set_look(self, look: Look) -> None:
        self._look = look
        self._forget()

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
        if self._drag in ("lasso", "rectangle", "ellipse"):
            self.update()

    def set_density(self, density: Density) -> None:
        self._density = density
        self._forget(projection=True)

    def set_point_size(self, size_px: float) -> None:
        """Diameter of a point in widget pixels; 0 fits it to the number of visible points."""
        self._size_px = size_px
        self._forget(projection=True)

    @property
    def point_size(self) -> float:
        return self._size_px

    @property
    def opacity(self) -> float:
        return self._opacity

    @property
    def density(self) -> Density:
        """Whether density is shown: always, never, or as the number of points asks for."""
        return self._density

    @property
    def is_fitted(self) -> bool:
        """Whether all points are shown, not a part that was zoomed to."""
        return self._fitted

    def set_opacity(self, opacity: float) -> None:
        """Strength of the points over the ground, 0 to 1."""
        self._opacity = opacity
        self._forget()

    def show_part(self, view: tuple[float, float, float, float]) -> None:
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
        return self._points.near_data(*self._handle)

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
        self._set_view(self._points.home, keep_size=False)

    def zoom(self, factor: float, at: QPointF, *, x: bool = True, y: bool = True) -> None:
        """Zoom in by `factor` with the point under `at` (widget pixels) held fixed."""
        plot = self.plot_rect()
        x0, x1, y0, y1 = self._view
        if x:
            x0, x1 = _zoomed(x0, x1, (at.x() - plot.left()) / plot.width(), factor, self._points.extent[0])
        if y:
            y0, y1 = _zoomed(y0, y1, (plot.bottom() - at.y()) / plot.height(), factor, self._points.extent[1])
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
        x0, x1, y0, y1 = self._view
        return QPointF(
            plot.left() + (x - x0) / (x1 - x0) * plot.width(),
            plot.bottom() - (y - y0) / (y1 - y0) * plot.height(),
        )

    def to_axes(self, at: QPointF) -> tuple[float, float]:
        """Widget pixels → axes."""
        plot = self.plot_rect()
        x0, x1, y0, y1 = self._view
        return (
            x0 + (at.x() - plot.left()) / plot.width() * (x1 - x0),
            y0 + (plot.bottom() - at.y()) / plot.height() * (y1 - y0),
        )

    def handle_position(self) -> QPointF | None:
        """Where the ◉ is drawn, in widget pixels; on a line it sits in the middle."""
        x, y = self._handle
        if x is None and y is None:
            return None
        x0, x1, y0, y1 = self._view
        return self.to_widget((x0 + x1) / 2 if x is None else x, (y0 + y1) / 2 if y is None else y)

    def nearest(self, at: QPointF, reach_px: float = math.inf) -> int | None:
        """The row of the particle nearest to a place in the widget, within `reach_px`."""
        if not self._points.rows.size:
            return None
        plot = self.plot_rect()
        x, y = self.to_axes(at)
        x0, x1, y0, y1 = self._view
        dx = (
            self._points.u - np.float32((x - self._points.origin[0]) / self._points.extent[0])
        ) * np.float32(plot.width() * self._points.extent[0] / (x1 - x0))
        dy = (
            self._points.v - np.float32((y - self._points.origin[1]) / self._points.extent[1])
        ) * np.float32(plot.height() * self._points.extent[1] / (y1 - y0))
        squares = dx * dx + dy * dy
        best = int(np.argmin(squares))
        return int(self._points.rows[best]) if squares[best] <= reach_px**2 else None

    def inside(self, polygon: list[tuple[float, float]]) -> Mask:
        """`(n,)` rows of the session inside a polygon of widget pixels (even-odd), of those that are visible.

        The polygon is painted into a mask; only particles on pixels that its outline touches need geometry.
        """
        mask = np.zeros(self._selection.mask.size, bool)
        self._draw_all_points()
        projection = self._projected()
        if len(polygon) < 3 or not projection.flat.size:
            return mask
        plot = self.plot_rect()
        corners = (np.array(polygon) - (plot.left(), plot.top())) * projection.resolution + projection.pad
        painted = QImage(projection.width, projection.height, QImage.Format.Format_Grayscale8)
        painted.fill(0)
        painter = QPainter(painted)
        painter.setRenderHint(QPainter.RenderHint.Antialiasing, False)
        shape = QPolygonF([QPointF(*corner) for corner in corners])
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(255, 255, 255))
        painter.drawPolygon(shape, Qt.FillRule.OddEvenFill)
        painter.setBrush(Qt.BrushStyle.NoBrush)
        pen = QPen(QColor(128, 128, 128), 3.0)
        pen.setJoinStyle(Qt.PenJoinStyle.RoundJoin)
        painter.setPen(pen)
        painter.drawPolygon(shape)
        painter.end()
        stride = painted.bytesPerLine()
        bits = np.frombuffer(_bytes_of(painted), np.uint8).reshape(projection.height, stride)
        # only pixels inside the axes: what lies in the padding is not visible
        pad, height, width = projection.pad, projection.height, projection.width
        sure = np.zeros((height, width), np.uint8)
        sure[pad : height - pad, pad : width - pad] = bits[pad : height - pad, pad : width - pad]
        found = sure.ravel()[projection.flat]
        taken = found > 200
        doubtful = np.flatnonzero((found > 0) & ~taken)
        if doubtful.size:
            index = projection.index[doubtful]
            a, b, c, d = projection.to_pixel
            x, y = self._points.u[index].astype(float) * a + b, self._points.v[index].astype(float) * c + d
            taken[doubtful] = points_in_polygon(x, y, corners)
        mask[self._points.rows[projection.index[taken]]] = True
        return mask

    # ---- the picture -------------------------------------------------

    def _forget(self, *, projection: bool = False) -> None:
        """Drop what has to be made anew, and repaint."""
        if projection:
            self._projection = None
        if (
            projection
            or self._chosen is not None
            or (self._owners is not None and self._owners.selected.any())
        ):
            self._owners = None
        self._image, self._backdrop = None, None
        self.update()

    def _set_view(self, view: tuple[float, float, float, float], *, keep_size: bool) -> None:
        if not keep_size:
            self._kept_size = None
        self._view = view
        self._forget(projection=True)
        self.view_changed.emit()

    def _hand_moves(self) -> None:
        if self._points.rows.size > GESTURE_POINTS:
            self._settle.start()

    def _draw_all_points(self) -> None:
        if self._projection is not None and self._projection.partial:
            self._settle.stop()
            self._forget(projection=True)

    def _projected(self) -> Projection:
        ratio = self.devicePixelRatioF()
        plot = self.plot_rect()
        ready = self._projection
        if ready is not None:
            scale = ready.resolution if ready.density else ratio
            size = (round(plot.width() * scale) + 2 * ready.pad, round(plot.height() * scale) + 2 * ready.pad)
            if (ready.width, ready.height) == size and ready.resolution == scale:
                return ready
        partial = self._settle.isActive() and self._points.rows.size > GESTURE_POINTS
        n = GESTURE_POINTS if partial else self._points.rows.size
        made = self._project(ratio, plot, n, density=False)
        n_visible = made.index.size * (self._points.rows.size / n if partial else 1)
        density = self._density == "on" or (self._density == "auto" and n_visible > DENSITY_FROM)
        if density and made.resolution != 1.0:
            made = self._project(1.0, plot, n, density=True)
        made.density, made.partial = density, partial
        if self._kept_size is None:
            area = plot.width() * plot.height()
            self._kept_size = self._size_px or float(np.clip(math.sqrt(area / max(n_visible, 1)), 1.0, 6.0))
        made.size_px = max(1.0, self._kept_size * made.resolution)
        self._projection, self._owners, self._image, self._backdrop = made, None, None, None
        if density != self._was_density:
            self._was_density = density
            QTimer.singleShot(0, self._tell_density)
        return made

    def _tell_density(self) -> None:
        self.density_changed.emit(self._was_density)

    def _project(self, resolution: float, plot: QRectF, n: int, *, density: bool) -> Projection:
        """Pixels of those of the first `n` points that the view shows, and a margin for rims of others."""
        pad = 1 if density else math.ceil(4 * resolution) + 2
        width, height = (
            round(plot.width() * resolution) + 2 * pad,
            round(plot.height() * resolution) + 2 * pad,
        )
        x0, x1, y0, y1 = self._view
        inner_w, inner_h = width - 2 * pad, height - 2 * pad
        a = self._points.extent[0] / (x1 - x0) * inner_w
        b = (self._points.origin[0] - x0) / (x1 - x0) * inner_w + pad
        c = -self._points.extent[1] / (y1 - y0) * inner_h
        d = (y1 - self._points.origin[1]) / (y1 - y0) * inner_h + pad
        reach = pad if density else math.ceil(3.5 * resolution) + 1  # margin that stamps may touch
        index, flat = visible(
            self._points.u[:n],
            self._points.v[:n],
            (a, b, c, d),
            (reach, width - reach, reach, height - reach),
            width,
        )
        return Projection(index, flat, width, height, pad, resolution, (a, b, c, d), density, 1.0, False)

    def _owned(self) -> Owners:
        projection = self._projected()
        if self._owners is not None:
            return self._owners
        n_pixels = projection.width * projection.height
        owner = np.full(n_pixels, -1, np.int32)
        cover = np.full(n_pixels, 255, np.uint8)
        selected = np.zeros(n_pixels, bool)
        index, flat = projection.index, projection.flat
        share, n_max = None, 0
        if projection.density:
            counts = np.bincount(flat, minlength=n_pixels)
            owner[flat] = index
            n_max = int(counts.max(initial=0))
            # the fullest pixel is often a freak: 99.9 % of the filled ones set the scale
            filled = counts[counts > 0]
            top = float(np.percentile(filled, 99.9)) if filled.size else 1.0
            n_max = max(1, round(top))
            share = np.minimum(np.log1p(counts, dtype=np.float32) / np.float32(np.log1p(top)), np.float32(1))
        else:
            stamp(owner, cover, index, flat, projection)
        if self._chosen is not None:
            mine = self._chosen[index]
            chosen, where = index[mine], flat[mine]
            if projection.density:
                owner[where] = chosen
                selected[where] = True
            else:
                on_top = np.full(n_pixels, -1, np.int32)
                its_cover = np.full(n_pixels, 255, np.uint8)
                stamp(on_top, its_cover, chosen, where, projection)
                selected = on_top >= 0
                owner[selected], cover[selected] = on_top[selected], its_cover[selected]
        self._owners = Owners(owner, cover, selected, share, n_max)
        return self._owners

    def _rendered(self) -> QImage:
        projection = self._projected()
        if self._image is not None:
            return self._image
        owners = self._owned()
        look = self._look
        ground = _channels(look.plot)
        table, faded = self._lookup()
        level = np.take(self._level, owners.owner, mode="wrap")  # -1 takes the last: the background
        if owners.share is not None:
            pixels = self._density_pixels(owners, level, table, ground)
        else:
            fades = self._chosen is not None
            pixels = (
                np.where(owners.selected | (not fades), table[level], faded[level]) if fades else table[level]
            )
            rim = np.flatnonzero(owners.cover < 255)
            if rim.size:
                blended = mix(unpack(pixels[rim]), ground, owners.cover[rim] / np.float32(255))
                pixels[rim] = pack(blended)
        if self._chosen is not None:
            self._ring(pixels, owners, projection)
        pad, height, width = projection.pad, projection.height, projection.width
        cut = np.ascontiguousarray(pixels.reshape(height, width)[pad : height - pad, pad : width - pad])
        self._pixels = cut
        self._image = QImage(
            cut.data, cut.shape[1], cut.shape[0], 4 * cut.shape[1], QImage.Format.Format_RGB32
        )
        return self._image

    def _lookup(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Colours of the levels, "no value" and background at the end; full and faded."""
        look = self._look
        ground = _channels(look.plot)
        colours = self._colouring.lut if self._colouring.kind != "none" else _channels(look.plain)[None]
        unknown = mix(_channels(look.text)[None], ground, np.array([0.45]))
        full = mix(np.concatenate([colours, unknown, ground[None]]), ground, np.array([self._opacity]))
        return pack(full), pack(mix(full, ground, np.full(len(full), FADE)))

    def _density_pixels(
        self, owners: Owners, level: NDArray[np.uint16], table: NDArray[np.uint32], ground: Floats
    ) -> NDArray[np.uint32]:
        share = owners.share
        assert share is not None
        if self._colouring.kind == "none":
            shades = np.concatenate([ground[None], DENSITY])
            step = np.where(owners.owner >= 0, 1 + share * (len(shades) - 2), 0).astype(np.intp)
            if self._chosen is None:
                return pack(shades)[step]
            grey = mix(_channels(self._look.text)[None], ground, 0.15 + 0.35 * np.linspace(0, 1, len(shades)))
            grey[0] = ground
            return np.where(owners.selected, pack(shades)[step], pack(grey)[step])
        strength = np.where(owners.owner >= 0, np.float32(0.3) + np.float32(0.7) * share, np.float32(1))
        if self._chosen is not None:
            strength = np.where(owners.selected | (owners.owner < 0), strength, strength * np.float32(FADE))
        return pack(mix(unpack(table[level]), ground, strength))

    def _ring(self, pixels: NDArray[np.uint32], owners: Owners, projection: Projection) -> None:
        """Draw the outline of what is selected; small points that lie close together share one."""
        chosen = owners.selected.reshape(projection.height, projection.width)
        if projection.size_px < RING_EACH_FROM_PX * projection.resolution:
            gap = max(1, round(2 * projection.resolution))
            chosen = ~grown(~grown(chosen, gap), gap)
        ring = grown(chosen, max(1, round(projection.resolution))) & ~chosen
        pixels[ring.ravel()] = pack(_channels(self._look.ring)[None])[0]

    def _spread_colours(self) -> None:
        """Levels in paint order; the last entry is the background, which owner -1 picks."""
        n_levels = self._colouring.missing
        level = np.full(self._points.rows.size + 1, n_levels, np.uint16)
        if self._colouring.kind == "none":
            level[:] = 0
        elif self._points.rows.size and self._colouring.level.size > self._points.rows.max():
            level[:-1] = self._colouring.level[self._points.rows]
        level[-1] = (1 if self._colouring.kind == "none" else n_levels) + 1
        self._level = level

    def paintEvent(self, event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        try:
            self._paint(painter)
        finally:
            painter.end()  # a painter that an error leaves open takes the process down

    def _paint(self, painter: QPainter) -> None:
        look = self._look
        painter.fillRect(self.rect(), QColor(look.background))
        if not self._points.rows.size:
            painter.setPen(QColor(look.text))
            flags = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextWordWrap
            painter.drawText(QRectF(self.rect()).adjusted(16, 8, -16, -8), flags, self._message)
            return
        plot = self.plot_rect()
        painter.drawPixmap(0, 0, self._still(plot))
        painter.setRenderHint(QPainter.RenderHint.Antialiasing)
        painter.setClipRect(plot)
        self._paint_active(painter)
        self._paint_handle(painter, plot)
        self._paint_path(painter)
        painter.setClipping(False)
        if self._hint:
            self._paint_words(painter, self._hint, QPointF(plot.center().x(), plot.bottom() - 6))
        self._paint_hover(painter)

    def _still(self, plot: QRectF) -> QPixmap:
        """All that does not move with the handle, kept as one picture."""
        picture = self._rendered()
        ratio = self.devicePixelRatioF()
        if self._backdrop is None or self._backdrop.size() != self.size() * ratio:
            self._backdrop = QPixmap(self.size() * ratio)
            self._backdrop.setDevicePixelRatio(ratio)
            self._backdrop.fill(QColor(self._look.background))
            painter = QPainter(self._backdrop)
            painter.drawImage(plot, picture)
            paint_axes(painter, plot, self._view, self._titles, self._look, self.font(), self.width())
            n_max = self._owned().n_max if self._was_density else 0
            n = self._points.rows.size
            paint_legend(painter, plot, self._colouring, n_max, n, self._look, self.font())
            painter.end()
        return self._backdrop

    def _paint_active(self, painter: QPainter) -> None:
        if self._active_at is None:
            return
        at = self.to_widget(*self._active_at)
        painter.setBrush(Qt.BrushStyle.NoBrush)
        painter.setPen(QPen(QColor(self._look.plot), 4))
        painter.drawEllipse(at, 6.5, 6.5)
        painter.setPen(QPen(QColor(self._look.ring), 2))
        painter.drawEllipse(at, 6.5, 6.5)

    def _paint_handle(self, painter: QPainter, plot: QRectF) -> None:
        at = self.handle_position()
        if at is None:
            return
        accent, under = QColor(self._look.accent), QColor(self._look.plot)
        x, y = self._handle
        if x is None or y is None:
            ends = (
                (QPointF(at.x(), plot.top()), QPointF(at.x(), plot.bottom()))
                if y is None
                else (QPointF(plot.left(), at.y()), QPointF(plot.right(), at.y()))
            )
            for colour, width in ((under, 3.5), (accent, 1.5)):
                painter.setPen(QPen(colour, width))
                painter.drawLine(*ends)
        near = not self._hollow and self._points.near_data(x, y)
        under.setAlpha(200)
        painter.setPen(QPen(under, 5))
        painter.setBrush(under if near else Qt.BrushStyle.NoBrush)
        painter.drawEllipse(at, 8, 8)
        pen = QPen(accent, 2.2)
        if not near:
            pen.setDashPattern([1.6, 1.3])
        painter.setPen(pen)
        painter.drawEllipse(at, 8, 8)
        if near:
            painter.setPen(Qt.PenStyle.NoPen)
            painter.setBrush(accent)
            painter.drawEllipse(at, 4, 4)

    def _paint_path(self, painter: QPainter) -> None:
        if self._drag not in ("lasso", "rectangle", "ellipse") or len(self._path) < 2:
            return
        self._paint_inset(painter)
        path = QPainterPath(QPointF(*self._path[0]))
        for point in self._polygon()[1:]:
            path.lineTo(QPointF(*point))
        path.closeSubpath()
        fill = QColor(self._look.ring)
        fill.setAlpha(28)
        painter.setBrush(fill)
        painter.setPen(QPen(QColor(self._look.plot), 3))
        painter.drawPath(path)
        painter.setBrush(Qt.BrushStyle.NoBrush)
        pen = QPen(QColor(self._look.ring), 1.3)
        pen.setStyle(Qt.PenStyle.DashLine)
        painter.setPen(pen)
        painter.drawPath(path)

    def _paint_inset(self, painter: QPainter) -> None:
        """The average so far, in the upper corner that the hand is not in."""
        if self._inset is None:
            return
        picture, words = self._inset
        plot, line = self.plot_rect(), QFontMetricsF(self.font()).height()
        side = min(INSET_PX, plot.height() * 0.38)
        left = self._last.x() > plot.center().x()
        x = plot.left() + 4 if left else plot.right() - side - 4
        box = QRectF(x, plot.top() + 4, side, side)
        ground = QColor(self._look.background)
        painter.fillRect(box.adjusted(-2, -2, 2, line + 3), ground)
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        painter.drawImage(box, picture)
        painter.setPen(QColor(self._look.text))
        below = QRectF(box.left(), box.bottom(), side, line + 2)
        painter.drawText(below, Qt.AlignmentFlag.AlignCenter, words)

    def _paint_hover(self, painter: QPainter) -> None:
        if self._hover is None or self._drag:
            return
        at, thumbnail = self._hover_at, self._thumbnail
        picture = thumbnail[1] if thumbnail is not None and thumbnail[0] == self._hover else None
        self._paint_words(painter, self.describe(self._hover), QPointF(at.x(), at.y() - 10), picture)

    def _paint_words(
        self, painter: QPainter, words: str, above: QPointF, picture: QImage | None = None
    ) -> None:
        """Words, under a picture, on a small plate whose lower edge is centred on `above`, kept inside."""
        metrics = QFontMetricsF(self.font())
        line, side = metrics.height() + 6, 0 if picture is None else THUMBNAIL_PX
        width, height = max(metrics.horizontalAdvance(words) + 12, side + 8), line + (side + 4 if side else 0)
        x = max(2.0, min(above.x() - width / 2, self.width() - width - 2))
        y = above.y() - height if above.y() - height > 2 else min(above.y() + 30, self.height() - height - 2)
        ground = QColor(self._look.background)
        ground.setAlpha(225)
        box = QRectF(x, y, width, height)
        painter.setPen(QPen(QColor(self._look.line), 1))
        painter.setBrush(ground)
        painter.drawRoundedRect(box, 3, 3)
        if picture is not None:
            painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
            painter.drawImage(QRectF(x + (width - side) / 2, y + 4, side, side), picture)
        painter.setPen(QColor(self._look.text))
        painter.drawText(box.adjusted(0, height - line, 0, 0), Qt.AlignmentFlag.AlignCenter, words)

    def describe(self, row: int) -> str:
        """The words beside the cursor: number of the particle (from 1) and its value of the colour column."""
        if self._describe is not None:
            return self._describe(row)
        words = f"particle {row + 1:,}".replace(",", "\u202f")
        if self._colouring.kind != "none" and row < self._colouring.level.size:
            words += f" · {self._colouring.title}: {self._colouring.text(row)}"
        return words

    # ---- the selection -----------------------------------------------

    def _on_selection_changed(self, mask: Mask) -> None:
        self._read_selection()
        self._owners = None
        self._forget()

    def _on_active_changed(self, row: int | None) -> None:
        self._find_active()
        self.update()

    def _read_selection(self) -> None:
        """Selection in paint order; None while nothing is selected or it is of another table."""
        mask = self._selection.mask
        fits = self._points.rows.size and mask.size > int(self._points.rows.max(initial=0))
        self._chosen = mask[self._points.rows] if fits and mask.any() else None

    def _find_active(self) -> None:
        self._active_at = None
        row = self._selection.active
        if row is None:
            return
        found = np.flatnonzero(self._points.rows == row)
        if found.size:
            self._active_at = self._points.place(int(found[0]))

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
        if self._drag in ("lasso", "rectangle", "ellipse") and len(self._path) > 1:
            self._hinting = True
            self._selection.hint(self.combined(self.inside(self._polygon()), self._modifiers))

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
        x0, x1, y0, y1 = self._view
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
        x, y = self._handle
        # a handle that is a line may be taken anywhere along it
        dx = 0.0 if x is None else at.x() - here.x()
        dy = 0.0 if y is None else at.y() - here.y()
        reach = HANDLE_REACH_PX if x is not None and y is not None else HANDLE_REACH_PX / 2
        on_knob = math.hypot(at.x() - here.x(), at.y() - here.y()) <= HANDLE_REACH_PX
        return on_knob or math.hypot(dx, dy) <= reach

    def mousePressEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        self._press = self._last = at
        self._hover = None
        group = self._legend_at(at)
        if group is not None and event.button() == Qt.MouseButton.LeftButton:
            self.choose(self._colouring.level == group, event.modifiers())
            return
        if not self._points.rows.size or not self.plot_rect().adjusted(-4, -4, 4, 4).contains(at):
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
            elif self._tool in ("lasso", "rectangle", "ellipse"):
                self._drag = self._tool
                self._path = [(at.x(), at.y())]
        self._update_cursor()

    def mouseMoveEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        if self._drag == "pan":
            plot = self.plot_rect()
            x0, x1, y0, y1 = self._view
            dx = (at.x() - self._last.x()) / plot.width() * (x1 - x0)
            dy = (at.y() - self._last.y()) / plot.height() * (y1 - y0)
            self._fitted = False
            self._hand_moves()
            self._set_view((x0 - dx, x1 - dx, y0 + dy, y1 + dy), keep_size=True)
        elif self._drag == "handle":
            self._handle_to(at)
        elif self._drag == "lasso":
            self._outline_moves(event)
            if math.dist(self._path[-1], (at.x(), at.y())) >= STILL_PX:
                self._path.append((at.x(), at.y()))
                self.update()
        elif self._drag in ("rectangle", "ellipse"):
            self._outline_moves(event)
            self._path = [self._path[0], (at.x(), at.y())]
            self.update()
        else:
            self._hover_at = at
            hover = self._row_under(at)
            if hover != self._hover or hover is not None:
                self._set_hover(hover)
                self.update()
            self._update_cursor()
        self._last = at

    def mouseReleaseEvent(self, event: QMouseEvent | None) -> None:
        if event is None:
            return
        at = event.position()
        drag, path = self._drag, self._polygon()
        moved = (
            math.hypot(at.x() - self._press.x(), at.y() - self._press.y()) > STILL_PX or len(self._path) > 2
        )
        hinting, self._hinting = self._hinting, False
        self._cancel_drag()
        if drag == "pan":
            self._draw_all_points()
        if drag not in ("lasso", "rectangle", "ellipse"):
            return
        if moved:
            self.choose(self.inside(path), event.modifiers())
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
        fits = self._colouring.level.size == self._selection.mask.size
        if self._colouring.kind != "category" or not self._points.rows.size or not fits:
            return None
        found, _ = swatches(self.plot_rect(), self._colouring, self.font())
        return next((level for level, _, box in found if level >= 0 and box.contains(at)), None)

    def contextMenuEvent(self, event: QContextMenuEvent | None) -> None:
        if event is not None and self._points.rows.size:
            self._cancel_drag()
            at = QPointF(event.pos())
            self._press = self._last = at
            self.menu_asked.emit(self.nearest(at, CLICK_REACH_PX), event.globalPos())
            event.accept()

    def mouseDoubleClickEvent(self, event: QMouseEvent | None) -> None:
        self._cancel_drag()
        self.fit()

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if event is None or not self._points.rows.size:
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

    def _row_under(self, at: QPointF) -> int | None:
        """The particle painted under the cursor or next to it, from the owners of the pixels."""
        plot = self.plot_rect()
        if self._projection is None or self._owners is None or not plot.contains(at):
            return None
        projection, owner = self._projection, self._owners.owner
        x = int((at.x() - plot.left()) * projection.resolution) + projection.pad
        y = int((at.y() - plot.top()) * projection.resolution) + projection.pad
        reach = max(1, round(HOVER_REACH_PX * projection.resolution))
        square = owner.reshape(projection.height, projection.width)
        top, left = max(0, y - reach), max(0, x - reach)
        part = square[top : y + reach + 1, left : x + reach + 1]
        ys, xs = np.nonzero(part >= 0)
        if not ys.size:
            return None
        best = int(np.argmin((ys + top - y) ** 2 + (xs + left - x) ** 2))
        return int(self._points.rows[part[ys[best], xs[best]]])

    def _polygon(self) -> list[tuple[float, float]]:
        if self._drag in ("rectangle", "ellipse") and len(self._path) == 2:
            (x0, y0), (x1, y1) = self._path
            if self._drag == "ellipse":
                turn = np.linspace(0, 2 * np.pi, ELLIPSE_CORNERS, endpoint=False)
                xs = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(turn)
                ys = (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(turn)
                return list(zip(xs.tolist(), ys.tolist(), strict=True))
            return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        return list(self._path)

    def _cancel_drag(self) -> None:
        self._outlined.stop()
        if self._hinting:
            self._hinting = False
            self._selection.hint(None)
        self._drag = ""
        self._path = []
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


def _channels(colour: str) -> Floats:
    value = QColor(colour)
    return np.array([value.red(), value.green(), value.blue()], float)


def _bytes_of(image: QImage) -> Any:
    """The pixels of an image as a buffer, under PyQt and PySide."""
    bits = image.constBits()
    if hasattr(bits, "setsize"):  # PyQt gives a pointer without a length
        bits.setsize(image.sizeInBytes())
    return bits

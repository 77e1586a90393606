"""The points of the map as a picture: up to millions of them, painted by numpy, without OpenGL.

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
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPointF, Qt
from qtpy.QtGui import QColor, QImage, QPainter, QPen, QPolygonF

from particle_explorer.widgets.colours import DENSITY, Colouring, plain
from particle_explorer.widgets.plot_frame import LOOKS, Look, View
from particle_explorer.widgets.splat import (
    Mask,
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
HOVER_REACH_PX = 6


class PointPicture:
    """What the plot shows inside its frame; told by methods, asked for `image` and for who is where.

    Places are widget pixels from the upper left corner of the frame, `view` is in coordinates of the axes,
    rows are those of the session.
    """

    def __init__(self) -> None:
        self.points = Points.of([], [])
        self.view: View = (0.0, 1.0, 0.0, 1.0)  # x0, x1, y0, y1
        self.colouring = plain(0)
        self.density: Density = "auto"
        self.size_px = 0.0  # 0: automatic
        self.opacity = 1.0
        self.shows_density = False
        self._frame = (1.0, 1.0, 1.0)  # width and height in widget pixels, pixels of the screen to each
        self._look = LOOKS["dark"]
        self._hurried = False
        self._level: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._chosen: Mask | None = None
        self._kept_size: float | None = None
        self._projection: Projection | None = None
        self._owners: Owners | None = None
        self._image: QImage | None = None
        self._pixels: NDArray[np.uint32] | None = None  # QImage does not keep its buffer alive

    # ---- what it is a picture of ---------------------------------------

    def set_frame(self, width: float, height: float, ratio: float) -> None:
        """Size in widget pixels, and pixels of the screen to each of them."""
        self._frame = (width, height, ratio)

    def set_points(self, points: Points) -> None:
        """Show other points."""
        self.points = points
        self._spread_colours()
        self._forget(projection=True)

    def set_view(self, view: View, *, keep_size: bool) -> None:
        """Show another part; with `keep_size` points stay as large as they are."""
        if not keep_size:
            self._kept_size = None
        self.view = view
        self._forget(projection=True)

    def set_colouring(self, colouring: Colouring) -> None:
        """Colour by `colouring`, whose levels are per row of the session."""
        self.colouring = colouring
        self._spread_colours()
        self._forget()

    def set_selection(self, mask: Mask) -> None:
        """Ring the points of these rows and fade the others; one of another table rings none."""
        rows = self.points.rows
        fits = rows.size and mask.size > int(rows.max(initial=0))
        self._chosen = mask[rows] if fits and mask.any() else None
        self._owners = None
        self._forget()

    def set_look(self, look: Look) -> None:
        """Colours of another theme."""
        self._look = look
        self._forget()

    def set_density(self, density: Density) -> None:
        """Show density always, never, or as the number of points asks for."""
        self.density = density
        self._forget(projection=True)

    def set_point_size(self, size_px: float) -> None:
        """Diameter of a point in widget pixels; 0 fits it to the number of visible points."""
        self.size_px = size_px
        self._forget(projection=True)

    def set_opacity(self, opacity: float) -> None:
        """Strength of the points over the ground, 0 to 1."""
        self.opacity = opacity
        self._forget()

    def hurry(self) -> bool:
        """From now on paint a sample where all would take too long; tells whether that is so."""
        self._hurried = self.points.rows.size > GESTURE_POINTS
        return self._hurried

    def take_time(self) -> bool:
        """Paint all points again; tells whether the picture was of a sample."""
        self._hurried = False
        if self._projection is None or not self._projection.partial:
            return False
        self._forget(projection=True)
        return True

    def _forget(self, *, projection: bool = False) -> None:
        """Drop what has to be made anew."""
        if projection:
            self._projection = None
        if (
            projection
            or self._chosen is not None
            or (self._owners is not None and self._owners.selected.any())
        ):
            self._owners = None
        self._image = None

    # ---- who is where ----------------------------------------------------

    def nearest(self, at: QPointF, reach_px: float = math.inf) -> int | None:
        """The row of the particle nearest to a place, within `reach_px`."""
        points = self.points
        if not points.rows.size:
            return None
        width, height, _ = self._frame
        x0, x1, y0, y1 = self.view
        x, y = x0 + at.x() / width * (x1 - x0), y1 - at.y() / height * (y1 - y0)
        (left, low), (wide, high) = points.origin, points.extent
        dx = (points.u - np.float32((x - left) / wide)) * np.float32(width * wide / (x1 - x0))
        dy = (points.v - np.float32((y - low) / high)) * np.float32(height * high / (y1 - y0))
        squares = dx * dx + dy * dy
        best = int(np.argmin(squares))
        return int(points.rows[best]) if squares[best] <= reach_px**2 else None

    def inside(self, polygon: NDArray[np.float64], n: int) -> Mask:
        """`(n,)` rows of the session inside a polygon of places `(k, 2)` (even-odd), of those visible.

        The polygon is painted into a mask; only particles on pixels that its outline touches need geometry.
        """
        mask = np.zeros(n, bool)
        projection = self._projected()
        if len(polygon) < 3 or not projection.flat.size:
            return mask
        corners = polygon * projection.resolution + projection.pad
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
            x, y = self.points.u[index].astype(float) * a + b, self.points.v[index].astype(float) * c + d
            taken[doubtful] = points_in_polygon(x, y, corners)
        mask[self.points.rows[projection.index[taken]]] = True
        return mask

    def row_under(self, at: QPointF) -> int | None:
        """The particle painted at a place of the frame or next to it, from the owners of the pixels."""
        if self._projection is None or self._owners is None:
            return None
        projection, owner = self._projection, self._owners.owner
        x = int(at.x() * projection.resolution) + projection.pad
        y = int(at.y() * projection.resolution) + projection.pad
        reach = max(1, round(HOVER_REACH_PX * projection.resolution))
        square = owner.reshape(projection.height, projection.width)
        top, left = max(0, y - reach), max(0, x - reach)
        part = square[top : y + reach + 1, left : x + reach + 1]
        ys, xs = np.nonzero(part >= 0)
        if not ys.size:
            return None
        best = int(np.argmin((ys + top - y) ** 2 + (xs + left - x) ** 2))
        return int(self.points.rows[part[ys[best], xs[best]]])

    # ---- making it -------------------------------------------------------

    def _projected(self) -> Projection:
        frame_width, frame_height, ratio = self._frame
        ready = self._projection
        if ready is not None:
            scale = ready.resolution if ready.density else ratio
            size = tuple(round(side * scale) + 2 * ready.pad for side in (frame_width, frame_height))
            if (ready.width, ready.height) == size and ready.resolution == scale:
                return ready
        partial = self._hurried and self.points.rows.size > GESTURE_POINTS
        n = GESTURE_POINTS if partial else self.points.rows.size
        made = self._project(ratio, n, density=False)
        n_visible = made.index.size * (self.points.rows.size / n if partial else 1)
        density = self.density == "on" or (self.density == "auto" and n_visible > DENSITY_FROM)
        if density and made.resolution != 1.0:
            made = self._project(1.0, n, density=True)
        made.density, made.partial = density, partial
        if self._kept_size is None:
            area = frame_width * frame_height
            self._kept_size = self.size_px or float(np.clip(math.sqrt(area / max(n_visible, 1)), 1.0, 6.0))
        made.size_px = max(1.0, self._kept_size * made.resolution)
        self._projection, self._owners, self._image = made, None, None
        self.shows_density = density
        return made

    def _project(self, resolution: float, n: int, *, density: bool) -> Projection:
        """Pixels of those of the first `n` points that the view shows, and a margin for rims of others."""
        pad = 1 if density else math.ceil(4 * resolution) + 2
        width, height = (round(side * resolution) + 2 * pad for side in self._frame[:2])
        x0, x1, y0, y1 = self.view
        inner_w, inner_h = width - 2 * pad, height - 2 * pad
        a = self.points.extent[0] / (x1 - x0) * inner_w
        b = (self.points.origin[0] - x0) / (x1 - x0) * inner_w + pad
        c = -self.points.extent[1] / (y1 - y0) * inner_h
        d = (y1 - self.points.origin[1]) / (y1 - y0) * inner_h + pad
        reach = pad if density else math.ceil(3.5 * resolution) + 1  # margin that stamps may touch
        index, flat = visible(
            self.points.u[:n],
            self.points.v[:n],
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

    @property
    def n_max(self) -> int:
        """Particles on the fullest pixel where density is shown, else 0."""
        return self._owned().n_max

    def image(self) -> QImage:
        """The picture, made anew where something has changed."""
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
        colours = self.colouring.lut if self.colouring.kind != "none" else _channels(look.plain)[None]
        unknown = mix(_channels(look.text)[None], ground, np.array([0.45]))
        full = mix(np.concatenate([colours, unknown, ground[None]]), ground, np.array([self.opacity]))
        return pack(full), pack(mix(full, ground, np.full(len(full), FADE)))

    def _density_pixels(
        self, owners: Owners, level: NDArray[np.uint16], table: NDArray[np.uint32], ground: Floats
    ) -> NDArray[np.uint32]:
        share = owners.share
        assert share is not None
        if self.colouring.kind == "none":
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
        n_levels = self.colouring.missing
        level = np.full(self.points.rows.size + 1, n_levels, np.uint16)
        if self.colouring.kind == "none":
            level[:] = 0
        elif self.points.rows.size and self.colouring.level.size > self.points.rows.max():
            level[:-1] = self.colouring.level[self.points.rows]
        level[-1] = (1 if self.colouring.kind == "none" else n_levels) + 1
        self._level = level


def _channels(colour: str) -> Floats:
    value = QColor(colour)
    return np.array([value.red(), value.green(), value.blue()], float)


def _bytes_of(image: QImage) -> Any:
    """The pixels of an image as a buffer, under PyQt and PySide."""
    bits = image.constBits()
    if hasattr(bits, "setsize"):  # PyQt gives a pointer without a length
        bits.setsize(image.sizeInBytes())
    return bits

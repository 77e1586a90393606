"""What surrounds the points: theme, ticks, titles, and one line of legend above."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qtpy.QtCore import QPointF, QRectF, Qt
from qtpy.QtGui import QColor, QFont, QFontMetricsF, QImage, QPainter, QPen

from particle_explorer.widgets.colours import DENSITY, Colouring, number
from particle_explorer.widgets.splat import pack

View = tuple[float, float, float, float]
LEFT = Qt.AlignmentFlag.AlignLeft | Qt.AlignmentFlag.AlignVCenter | Qt.TextFlag.TextDontClip
RIGHT = Qt.AlignmentFlag.AlignRight | Qt.AlignmentFlag.AlignVCenter | Qt.TextFlag.TextDontClip
MIDDLE = Qt.AlignmentFlag.AlignCenter | Qt.TextFlag.TextDontClip


@dataclass(frozen=True)
class Look:
    """Colours of one theme."""

    background: str
    plot: str
    text: str
    line: str
    ring: str
    accent: str
    plain: str


LOOKS = {
    "dark": Look("#23242b", "#101115", "#d9dadc", "#565f6c", "#ffffff", "#ff4d6d", "#56b4e9"),
    "light": Look("#ebe7e6", "#ffffff", "#2c2c30", "#b4b2af", "#000000", "#d6003c", "#2a7ab8"),
}


def look_of(theme: str) -> Look:
    """Our colours for one of napari's themes."""
    from napari.utils.theme import get_theme

    colours = get_theme(theme)
    base = LOOKS["light" if colours.type == "light" else "dark"]
    text, ground, line = (colours.text.as_hex(), colours.background.as_hex(), colours.secondary.as_hex())
    return Look(_six(ground), base.plot, _six(text), _six(line), base.ring, base.accent, base.plain)


def _six(colour: str) -> str:
    return QColor(colour).name()


def plot_rect(width: int, height: int, font: QFont) -> QRectF:
    """The part of a widget inside axes, legend and titles, on whole pixels."""
    metrics = QFontMetricsF(font)
    line = metrics.height()
    left, top = math.ceil(line + metrics.horizontalAdvance("−00.00") + 6), math.ceil(line + 9)
    bottom = math.ceil(2 * line + 9)
    return QRectF(left, top, max(width - left - 8, 10), max(height - top - bottom, 10))


def paint_axes(
    painter: QPainter, plot: QRectF, view: View, titles: tuple[str, str], look: Look, font: QFont, width: int
) -> None:
    """Frame, ticks and titles of a plot showing `view` (x0, x1, y0, y1) in a widget `width` wide."""
    metrics = QFontMetricsF(font)
    line = metrics.height()
    x0, x1, y0, y1 = view
    thin, text = QPen(QColor(look.line), 1), QColor(look.text)
    painter.setPen(thin)
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.drawRect(plot.adjusted(-0.5, -0.5, 0.5, 0.5))
    marks, step = ticks(x0, x1, max(2, int(plot.width() / 45)))
    for tick in marks:
        at = plot.left() + (tick - x0) / (x1 - x0) * plot.width()
        painter.setPen(thin)
        painter.drawLine(QPointF(at, plot.bottom()), QPointF(at, plot.bottom() + 4))
        painter.setPen(text)
        words = number(tick, step=step)
        half = metrics.horizontalAdvance(words) / 2 + 1
        middle = min(at, width - half)
        painter.drawText(QRectF(middle - half, plot.bottom() + 4, 2 * half, line), MIDDLE, words)
    marks, step = ticks(y0, y1, max(2, int(plot.height() / 34)))
    for tick in marks:
        at = plot.bottom() - (tick - y0) / (y1 - y0) * plot.height()
        painter.setPen(thin)
        painter.drawLine(QPointF(plot.left() - 4, at), QPointF(plot.left(), at))
        painter.setPen(text)
        box = QRectF(line + 1, at - line / 2, plot.left() - 6 - line - 1, line)
        painter.drawText(box, RIGHT, number(tick, step=step))
    painter.setPen(text)
    elide = Qt.TextElideMode.ElideRight
    below = QRectF(plot.left(), plot.bottom() + line + 5, plot.width(), line + 2)
    painter.drawText(below, MIDDLE, metrics.elidedText(titles[0], elide, plot.width()))
    painter.save()
    painter.translate(line * 0.6, plot.center().y())
    painter.rotate(-90)
    room = plot.height() + 2 * line  # it may reach past the plot at both ends
    beside = QRectF(-room / 2, -line / 2, room, line)
    painter.drawText(beside, MIDDLE, metrics.elidedText(titles[1], elide, room))
    painter.restore()


def paint_legend(
    painter: QPainter, plot: QRectF, colouring: Colouring, n_max: int, n: int, look: Look, font: QFont
) -> None:
    """One line above the plot: colour bar with its range, swatches with names, or how many particles.

    `n_max` particles on the fullest pixel when density is shown, else 0; `n` particles in all.
    """
    metrics = QFontMetricsF(font)
    line = metrics.height()
    middle = plot.top() - 4 - line / 2
    painter.setPen(QColor(look.text))
    if colouring.kind == "category":
        _paint_swatches(painter, plot, middle, colouring, font)
        return
    if colouring.kind == "none" and not n_max:
        words = f"{n:,} particles".replace(",", "\u202f")
        painter.drawText(QRectF(plot.left(), middle - line / 2, 10, line), LEFT, words)
        return
    if colouring.kind == "none":
        title, low, high, shades = "particles per pixel", "1", number(n_max, step=1), DENSITY
    else:
        step = (colouring.high - colouring.low) / 100
        title, low, high = (
            colouring.title,
            number(colouring.low, step=step),
            number(colouring.high, step=step),
        )
        shades = colouring.lut
    bar = min(130.0, plot.width() * 0.4)
    x = plot.right() - metrics.horizontalAdvance(high)
    painter.drawText(QRectF(x, middle - line / 2, 10, line), LEFT, high)
    x -= bar + 5
    picture = pack(shades).reshape(1, -1)
    image = QImage(picture.data, picture.shape[1], 1, 4 * picture.shape[1], QImage.Format.Format_RGB32)
    painter.drawImage(QRectF(x, middle - 4, bar, 8), image)
    x -= metrics.horizontalAdvance(low) + 5
    painter.drawText(QRectF(x, middle - line / 2, 10, line), LEFT, low)
    room = x - 10 - plot.left()
    title = metrics.elidedText(title, Qt.TextElideMode.ElideRight, room)
    painter.drawText(QRectF(plot.left(), middle - line / 2, room, line), LEFT, title)


def swatches(plot: QRectF, colouring: Colouring, font: QFont) -> tuple[list[tuple[int, str, QRectF]], str]:
    """Level, words and place of the groups that the legend has room for, and words for the rest."""
    metrics = QFontMetricsF(font)
    line = metrics.height()
    middle = plot.top() - 4 - line / 2
    title = metrics.elidedText(colouring.title, Qt.TextElideMode.ElideRight, plot.width() * 0.4)
    x = plot.left() + metrics.horizontalAdvance(title) + 10
    found: list[tuple[int, str, QRectF]] = []
    for i, label in enumerate(colouring.labels):
        words = metrics.elidedText(label, Qt.TextElideMode.ElideMiddle, plot.width() * 0.3)
        rest = f"+ {len(colouring.labels) - i} more"
        end = x + 13 + metrics.horizontalAdvance(words)
        is_last = i == len(colouring.labels) - 1
        if end > plot.right() - (0 if is_last else metrics.horizontalAdvance(rest) + 10):
            found.append((-1, rest, QRectF(x, middle - line / 2, metrics.horizontalAdvance(rest), line)))
            break
        found.append((i, words, QRectF(x, middle - line / 2, end - x, line)))
        x = end + 9
    return found, title


def _paint_swatches(
    painter: QPainter, plot: QRectF, middle: float, colouring: Colouring, font: QFont
) -> None:
    line = QFontMetricsF(font).height()
    found, title = swatches(plot, colouring, font)
    painter.drawText(QRectF(plot.left(), middle - line / 2, 10, line), LEFT, title)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    for level, words, box in found:
        if level < 0:
            painter.drawText(box, LEFT, words)
            continue
        red, green, blue = (int(value) for value in colouring.lut[level])
        painter.save()
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(QColor(red, green, blue))
        painter.drawEllipse(QRectF(box.left(), middle - 4, 8, 8))
        painter.restore()
        painter.drawText(box.adjusted(11, 0, 0, 0), LEFT, words)


def ticks(low: float, high: float, n: int) -> tuple[list[float], float]:
    """About `n` round numbers between `low` and `high`, and their step."""
    rough = (high - low) / max(n, 1)
    if not rough > 0 or not math.isfinite(rough):
        return [], 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)], step

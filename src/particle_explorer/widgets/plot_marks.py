"""What is painted over the points: handle, outline, pictures and words on small plates."""

from __future__ import annotations

from qtpy.QtCore import QPointF, QRectF, QSizeF, Qt
from qtpy.QtGui import QColor, QFont, QFontMetricsF, QImage, QPainter, QPainterPath, QPen

from particle_explorer.widgets.outline import Corners
from particle_explorer.widgets.plot_frame import Look

INSET_PX = 104
"""Side of the average that is shown while a lasso is drawn."""
THUMBNAIL_PX = 88
"""Side of the picture of the particle under the mouse."""


def paint_active(painter: QPainter, at: QPointF, look: Look) -> None:
    """A ring around the particle that is looked at."""
    painter.setBrush(Qt.BrushStyle.NoBrush)
    painter.setPen(QPen(QColor(look.plot), 4))
    painter.drawEllipse(at, 6.5, 6.5)
    painter.setPen(QPen(QColor(look.ring), 2))
    painter.drawEllipse(at, 6.5, 6.5)


def paint_handle(
    painter: QPainter, plot: QRectF, at: QPointF, along: tuple[bool, bool], hollow: bool, look: Look
) -> None:
    """The ◉ at a place, hollow where there are no data; with a line to both ends of an axis it is free in.

    `along` says for x and y whether the handle has a coordinate there.
    """
    accent, under = QColor(look.accent), QColor(look.plot)
    if not all(along):
        ends = (
            (QPointF(at.x(), plot.top()), QPointF(at.x(), plot.bottom()))
            if along[0]
            else (QPointF(plot.left(), at.y()), QPointF(plot.right(), at.y()))
        )
        for colour, width in ((under, 3.5), (accent, 1.5)):
            painter.setPen(QPen(colour, width))
            painter.drawLine(*ends)
    under.setAlpha(200)
    painter.setPen(QPen(under, 5))
    painter.setBrush(Qt.BrushStyle.NoBrush if hollow else under)
    painter.drawEllipse(at, 8, 8)
    pen = QPen(accent, 2.2)
    if hollow:
        pen.setDashPattern([1.6, 1.3])
    painter.setPen(pen)
    painter.drawEllipse(at, 8, 8)
    if not hollow:
        painter.setPen(Qt.PenStyle.NoPen)
        painter.setBrush(accent)
        painter.drawEllipse(at, 4, 4)


def paint_outline(painter: QPainter, polygon: Corners, look: Look) -> None:
    """A lasso, rectangle or ellipse that is being drawn."""
    path = QPainterPath(QPointF(*polygon[0]))
    for point in polygon[1:]:
        path.lineTo(QPointF(*point))
    path.closeSubpath()
    fill = QColor(look.ring)
    fill.setAlpha(28)
    painter.setBrush(fill)
    painter.setPen(QPen(QColor(look.plot), 3))
    painter.drawPath(path)
    painter.setBrush(Qt.BrushStyle.NoBrush)
    pen = QPen(QColor(look.ring), 1.3)
    pen.setStyle(Qt.PenStyle.DashLine)
    painter.setPen(pen)
    painter.drawPath(path)


def paint_inset(
    painter: QPainter, plot: QRectF, hand: QPointF, picture: QImage, words: str, look: Look, font: QFont
) -> None:
    """A picture with its words, in the upper corner that the hand is not in."""
    line = QFontMetricsF(font).height()
    side = min(INSET_PX, plot.height() * 0.38)
    left = hand.x() > plot.center().x()
    x = plot.left() + 4 if left else plot.right() - side - 4
    box = QRectF(x, plot.top() + 4, side, side)
    painter.fillRect(box.adjusted(-2, -2, 2, line + 3), QColor(look.background))
    painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
    painter.drawImage(box, picture)
    painter.setPen(QColor(look.text))
    below = QRectF(box.left(), box.bottom(), side, line + 2)
    painter.drawText(below, Qt.AlignmentFlag.AlignCenter, words)


def paint_words(
    painter: QPainter,
    widget: QSizeF,
    words: str,
    above: QPointF,
    look: Look,
    font: QFont,
    picture: QImage | None = None,
) -> None:
    """Words, under a picture, on a small plate whose lower edge is centred on `above`, kept in the widget."""
    metrics = QFontMetricsF(font)
    line, side = metrics.height() + 6, 0 if picture is None else THUMBNAIL_PX
    width, height = max(metrics.horizontalAdvance(words) + 12, side + 8), line + (side + 4 if side else 0)
    x = max(2.0, min(above.x() - width / 2, widget.width() - width - 2))
    y = above.y() - height if above.y() - height > 2 else min(above.y() + 30, widget.height() - height - 2)
    ground = QColor(look.background)
    ground.setAlpha(225)
    box = QRectF(x, y, width, height)
    painter.setPen(QPen(QColor(look.line), 1))
    painter.setBrush(ground)
    painter.drawRoundedRect(box, 3, 3)
    if picture is not None:
        painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
        painter.drawImage(QRectF(x + (width - side) / 2, y + 4, side, side), picture)
    painter.setPen(QColor(look.text))
    painter.drawText(box.adjusted(0, height - line, 0, 0), Qt.AlignmentFlag.AlignCenter, words)

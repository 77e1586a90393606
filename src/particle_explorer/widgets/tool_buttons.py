"""The small buttons beside the map, with pictures that are drawn here."""

from __future__ import annotations

from qtpy.QtCore import QPointF, QRectF, QSize, Qt
from qtpy.QtGui import QColor, QIcon, QPainter, QPainterPath, QPen, QPixmap
from qtpy.QtWidgets import QToolButton


def tool_button(tip: str, *, checkable: bool = False) -> QToolButton:
    """A button without words, named by the beginning of its tooltip."""
    button = QToolButton()
    button.setToolTip(tip)
    button.setAccessibleName(tip.partition(":")[0].partition("\n")[0])
    button.setCheckable(checkable)
    button.setAutoRaise(True)
    button.setIconSize(QSize(18, 18))
    button.setFixedSize(26, 24)
    return button


def tool_icon(name: str, colour: str, off: str) -> QIcon:
    """The picture of a tool in `colour`, and in `off` where the button cannot be pressed."""
    icon = QIcon()
    icon.addPixmap(_drawing(name, colour), QIcon.Mode.Normal)
    icon.addPixmap(_drawing(name, off), QIcon.Mode.Disabled)
    return icon


def _drawing(name: str, colour: str) -> QPixmap:
    """Small pictures of the tools, drawn, so that no font and no file has to have them."""
    size = 54  # three times the size they are shown at, for sharp edges on dense screens
    picture = QPixmap(size, size)
    picture.fill(Qt.GlobalColor.transparent)
    painter = QPainter(picture)
    painter.setRenderHint(QPainter.RenderHint.Antialiasing)
    pen = QPen(QColor(colour), 4.5)
    pen.setCapStyle(Qt.PenCapStyle.RoundCap)
    painter.setPen(pen)
    if name == "handle":
        painter.drawEllipse(QPointF(27, 27), 18, 18)
        painter.setBrush(QColor(colour))
        painter.drawEllipse(QPointF(27, 27), 6, 6)
    elif name == "lasso":
        path = QPainterPath(QPointF(20, 46))
        path.cubicTo(26, 40, 20, 36, 14, 32)
        path.cubicTo(0, 20, 16, 6, 32, 8)
        path.cubicTo(52, 11, 54, 30, 36, 34)
        path.cubicTo(28, 36, 18, 36, 14, 32)
        painter.drawPath(path)
    elif name == "rectangle":
        pen.setDashPattern([2, 1.8])
        painter.setPen(pen)
        painter.drawRect(QRectF(8, 12, 38, 30))
    elif name == "ellipse":
        pen.setDashPattern([2, 1.8])
        painter.setPen(pen)
        painter.drawEllipse(QRectF(7, 12, 40, 30))
    elif name == "pan":
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            tip = QPointF(27 + 20 * dx, 27 + 20 * dy)
            painter.drawLine(QPointF(27, 27), tip)
            for side in (-1, 1):
                painter.drawLine(
                    tip, QPointF(tip.x() - 7 * dx + 7 * side * dy, tip.y() - 7 * dy + 7 * side * dx)
                )
    elif name == "histogram":
        for x, height in ((11, 14), (22, 32), (33, 24), (44, 10)):
            painter.fillRect(QRectF(x - 4, 46 - height, 8, height), QColor(colour))
    elif name == "fit":
        for dx, dy in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            corner = QPointF(27 + 18 * dx, 27 + 18 * dy)
            painter.drawLine(corner, QPointF(corner.x() - 11 * dx, corner.y()))
            painter.drawLine(corner, QPointF(corner.x(), corner.y() - 11 * dy))
    else:
        painter.setPen(Qt.PenStyle.NoPen)
        shade = QColor(colour)
        for radius, strength in ((22, 70), (15, 120), (8, 255)):
            shade.setAlpha(strength)
            painter.setBrush(shade)
            painter.drawEllipse(QPointF(27, 27), radius, radius * 0.8)
    painter.end()
    return picture

"""What a hand draws around particles: a lasso, or a rectangle or an ellipse by two corners of its box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from qtpy.QtCore import QPointF

Shape = Literal["lasso", "rectangle", "ellipse"]
Corners = list[tuple[float, float]]

STILL_PX = 3.0
"""A press that moved less than this was a click; lasso corners closer than this are dropped."""
ELLIPSE_CORNERS = 96


@dataclass
class Outline:
    """Begun where the mouse was pressed; places are pixels of the widget."""

    shape: Shape
    start: QPointF
    _way: Corners = field(default_factory=list)

    def move(self, at: QPointF) -> bool:
        """Draw on to a place; tells whether that changed anything."""
        if self.shape == "lasso" and math.dist(self._last, (at.x(), at.y())) < STILL_PX:
            return False
        if self.shape != "lasso":
            self._way.clear()
        self._way.append((at.x(), at.y()))
        return True

    @property
    def _last(self) -> tuple[float, float]:
        return self._way[-1] if self._way else (self.start.x(), self.start.y())

    @property
    def has_begun(self) -> bool:
        """Whether there is a line to be seen."""
        return bool(self._way)

    def is_click(self, at: QPointF) -> bool:
        """Whether a mouse let go at a place has drawn nothing."""
        near = math.hypot(at.x() - self.start.x(), at.y() - self.start.y()) <= STILL_PX
        return near and len(self._way) < 2

    def polygon(self) -> Corners:
        """`(k, 2)` corners of the shape as it is now."""
        x0, y0 = self.start.x(), self.start.y()
        if self.shape == "lasso" or not self._way:
            return [(x0, y0), *self._way]
        x1, y1 = self._way[0]
        if self.shape == "rectangle":
            return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        turn = np.linspace(0, 2 * np.pi, ELLIPSE_CORNERS, endpoint=False)
        xs = (x0 + x1) / 2 + (x1 - x0) / 2 * np.cos(turn)
        ys = (y0 + y1) / 2 + (y1 - y0) / 2 * np.sin(turn)
        return list(zip(xs.tolist(), ys.tolist(), strict=True))

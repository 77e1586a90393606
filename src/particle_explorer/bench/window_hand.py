"""The hand of a benchmark: real mouse events on the scatter, and the ways it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from particle_explorer.bench.window_clocks import Lap, until_painted

if TYPE_CHECKING:
    from qtpy.QtCore import QPoint

    from particle_explorer.widgets.latent_plot import ScatterCanvas


def every(ms: float, spots: list[QPoint]) -> Iterator[QPoint]:
    """Spots at a steady rate; those that the window was too busy for come at once, as from a real mouse."""
    from qtpy.QtWidgets import QApplication

    began = time.perf_counter()
    for i, spot in enumerate(spots):
        due = began + i * ms / 1e3
        while time.perf_counter() < due:
            QApplication.processEvents()
            time.sleep(0.0002)
        yield spot


def press(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> None:
    """Press the left button, or the middle one."""
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    button = Qt.MouseButton.MiddleButton if middle else Qt.MouseButton.LeftButton
    QTest.mousePress(canvas, button, Qt.KeyboardModifier.NoModifier, spot)


def move(canvas: ScatterCanvas, spot: QPoint) -> None:
    """Move the mouse there."""
    from qtpy.QtTest import QTest

    QTest.mouseMove(canvas, spot)


def release(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> None:
    """Let the button go."""
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    button = Qt.MouseButton.MiddleButton if middle else Qt.MouseButton.LeftButton
    QTest.mouseRelease(canvas, button, Qt.KeyboardModifier.NoModifier, spot)


@contextmanager
def pressed(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> Iterator[None]:
    """Hold the button down in a `with` block."""
    press(canvas, spot, middle=middle)
    try:
        yield
    finally:
        release(canvas, spot, middle=middle)


def handle_spot(canvas: ScatterCanvas) -> QPoint:
    """Where the handle can be taken."""
    at = canvas.handle_position()
    if at is None:
        raise RuntimeError("the map has no handle")
    return at.toPoint()


def round_trip(canvas: ScatterCanvas, n: int) -> list[QPoint]:
    """A path across most of the map, a few pixels per step, no two spots in a row the same."""
    from qtpy.QtCore import QPoint

    plot = canvas.plot_rect()
    turn = 2 * np.pi * np.arange(n) / max(n, 30)
    x = plot.center().x() + 0.33 * plot.width() * np.cos(turn)
    y = plot.center().y() + 0.33 * plot.height() * np.sin(2 * turn)
    spots = [QPoint(round(a), round(b)) for a, b in zip(x, y, strict=True)]
    return [spot for i, spot in enumerate(spots) if i == 0 or spot != spots[i - 1]]


def circle(centre: QPoint, radius: float, n: int) -> list[QPoint]:
    """Once around, from a place back to it; the place is the top of the circle."""
    from qtpy.QtCore import QPoint

    turn: NDArray[np.float64] = 2 * np.pi * np.arange(1, n + 1) / n
    return [
        QPoint(
            centre.x() + round(radius * float(np.sin(t))), centre.y() + round(radius * float(1 - np.cos(t)))
        )
        for t in turn
    ]


def blob(canvas: ScatterCanvas) -> list[QPoint]:
    """A hand-drawn looking outline around a good part of the map."""
    from qtpy.QtCore import QPoint

    plot = canvas.plot_rect()
    turn = np.linspace(0, 2 * np.pi, 140, endpoint=False)
    reach = 0.33 * (1 + 0.15 * np.sin(9 * turn))
    return [
        QPoint(
            round(plot.center().x() + r * plot.width() * c), round(plot.center().y() + r * plot.height() * s)
        )
        for r, c, s in zip(reach, np.cos(turn), np.sin(turn), strict=True)
    ]


def timed_moves(canvas: ScatterCanvas, spots: list[QPoint]) -> list[Lap]:
    """Move the mouse from spot to spot and time each until it is painted."""
    return [until_painted(canvas, lambda spot=spot: move(canvas, spot)) for spot in spots]  # type: ignore[misc]

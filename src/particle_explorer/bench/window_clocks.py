"""Clocks in a window: laps until something is painted, and how long its event loop was deaf."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from particle_explorer.widgets.latent_plot import ScatterCanvas

HEARTBEAT_MS = 10
WARM_UP_S = 2.0


class Lap:
    """Wall time and processor time of this thread in a `with` block."""

    def __enter__(self) -> Lap:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_ms = 1e3 * (time.perf_counter() - self._wall)
        self.cpu_ms = 1e3 * (time.thread_time() - self._cpu)


class Counter:
    """Counts a signal and remembers when it came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def n(self) -> int:
        return len(self.times)

    @property
    def last(self) -> float:
        return self.times[-1]

    def __call__(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def arrivals(canvas: ScatterCanvas) -> Any:
    """Remembers when mouse moves reach the canvas: under X they take their own way."""
    from qtpy.QtCore import QEvent, QObject

    class Arrivals(QObject):
        def __init__(self) -> None:
            super().__init__(canvas)
            self.times: list[float] = []
            canvas.installEventFilter(self)

        @property
        def n(self) -> int:
            return len(self.times)

        def stop(self) -> None:
            canvas.removeEventFilter(self)

        def eventFilter(self, _: QObject | None, event: QEvent | None) -> bool:
            if event is not None and event.type() == QEvent.Type.MouseMove:
                self.times.append(time.perf_counter())
            return False

    return Arrivals()


def _watch(canvas: ScatterCanvas) -> Any:
    """Counts the paintings of the canvas that are done, with the processor time of each."""
    from qtpy.QtCore import QEvent, QObject

    class Watch(QObject):
        def __init__(self) -> None:
            super().__init__(canvas)
            self.n = 0
            self.cpu_ms = 0.0
            canvas.installEventFilter(self)

        def stop(self) -> None:
            canvas.removeEventFilter(self)
            self.deleteLater()

        def eventFilter(self, _: QObject | None, event: QEvent | None) -> bool:
            if event is None or event.type() != QEvent.Type.Paint:
                return False
            with Lap() as lap:
                canvas.event(event)
            self.n += 1
            self.cpu_ms += lap.cpu_ms
            return True

    return Watch()


def until_painted(canvas: ScatterCanvas, act: Callable[[], object]) -> Lap:
    """Do something and wait until the canvas has painted what came of it.

    The window composes one frame at a time, with napari's OpenGL canvas in it, and paints when that is done,
    so the wall time holds such a frame; the processor time is that of the canvas alone.
    """
    watch = _watch(canvas)
    whole = Lap()
    with whole:
        with Lap() as acting:
            act()
        during = watch.cpu_ms
        spin_until(lambda: watch.n > 0 and canvas.is_painted, 2)
    watch.stop()
    whole.cpu_ms = max(acting.cpu_ms - during, 0.0) + watch.cpu_ms
    return whole


class Heartbeat:
    """A timer of the event loop; the time between its beats is how long the window was deaf."""

    def __enter__(self) -> Heartbeat:
        from qtpy.QtCore import Qt, QTimer

        self._beats: list[tuple[float, float]] = []
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.setInterval(HEARTBEAT_MS)
        self._timer.timeout.connect(lambda: self._beats.append((time.perf_counter(), time.thread_time())))
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.stop()

    def gaps_ms(self) -> tuple[list[float], list[float]]:
        """Between beats after the warm-up: time that passed, and time that this thread itself worked."""
        beats = np.array(self._beats).reshape(-1, 2)
        if beats.size:
            beats = beats[beats[:, 0] > beats[0, 0] + WARM_UP_S]
        gaps = 1e3 * np.diff(beats, axis=0)
        return gaps[:, 0].tolist(), gaps[:, 1].tolist()


def spin(ms: float) -> None:
    """Let the event loop run; `QTest.qWait` would sleep in it."""
    from qtpy.QtCore import QEventLoop, QTimer

    loop = QEventLoop()
    QTimer.singleShot(round(ms), loop.quit)
    loop.exec()


def spin_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Let the event loop run until something is so; whether it came in time."""
    from qtpy.QtWidgets import QApplication

    until = time.perf_counter() + timeout_s
    while not done():
        if time.perf_counter() > until:
            return False
        QApplication.processEvents()
        time.sleep(0.0002)  # a worker thread needs the interpreter to deliver
    return True

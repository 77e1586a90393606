"""Work off the window's thread: one-shot tasks, a one-slot mailbox, following a job's folder.

Threads never touch a widget or a layer (both crash): results travel through one queued signal and are
handed over on the window's own thread, and only while their owner still lives.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qtpy.QtCore import QObject, Qt, QTimer, Signal
from qtpy.QtWidgets import QWidget

from particle_explorer.files import UserError
from particle_explorer.widgets.lifetime import when_destroyed

T = TypeVar("T")

log = logging.getLogger(__name__)

TURN_MS = 1
"""An answer waits so long for its turn among the timers of the window."""


class Failure(Exception):
    """What went wrong in the background: one sentence, and the details behind it."""

    def __init__(self, sentence: str, details: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.details = details


def as_failure(error: BaseException) -> Failure:
    """One sentence for the window: the user's own mistakes as they are, ours with a traceback behind."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, UserError):
        return Failure(str(error))
    details = "".join(traceback.format_exception(error))
    log.error("%s", details)
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return Failure(f"{where}{error.strerror}", details)
    return Failure(f"Something went wrong inside: {type(error).__name__}: {error}", details)


def notify(error: BaseException) -> None:
    """Show a failure that no dock shows in place, in napari's own way."""
    from napari.utils.notifications import show_error, show_warning

    failure = as_failure(error)
    (show_error if failure.details else show_warning)(failure.sentence)


class _Relay(QObject):
    """Calls functions on the thread it was made on."""

    posted = Signal(object)

    def __init__(self) -> None:
        super().__init__()
        self.posted.connect(self._call, Qt.ConnectionType.QueuedConnection)

    def _call(self, function: Callable[[], None]) -> None:
        function()


_relays: list[_Relay] = []


def _relay() -> _Relay:
    # It belongs to the process, not to a window: a thread may finish after its window is gone, and
    # emitting on a deleted object from another thread is a race that ends in a crash.
    if not _relays:
        _relays.append(_Relay())
    return _relays[0]


_turn = threading.Lock()


def in_turn(work: Callable[..., T], *arguments: Any) -> T:
    """`work(*arguments)`, never beside another that is done in turn.

    Several threads that compute at once, as after a new column, keep the window waiting for Python's lock.
    """
    with _turn:
        return work(*arguments)


class Tasks:
    """One-shot functions in threads, for one widget. A newer task of the same name outdates the older."""

    def __init__(self, owner: QWidget | QObject) -> None:
        self._relay = _relay()
        self._latest: dict[str, int] = {}
        self._alive = True
        when_destroyed(owner, self.stop)

    def stop(self) -> None:
        self._alive = False

    def forget(self, name: str) -> None:
        """Let the result of a running task of this name fall on the floor."""
        self._latest[name] = self._latest.get(name, 0) + 1

    def run(
        self,
        name: str,
        work: Callable[..., Any],
        done: Callable[[Any], None],
        failed: Callable[[Failure], None] = notify,
        told: Callable[[Any], None] | None = None,
    ) -> None:
        """Call `work` in a thread, then `done(result)` or `failed(failure)` on the window's thread.

        With `told`, `work` is given a function: what it is called with comes to `told`, ten times a second at
        most.
        """
        self.forget(name)
        number = self._latest[name]
        said_at = 0.0

        def deliver(slot: Callable[[Any], None], value: Any) -> None:
            if self._alive and self._latest[name] == number:
                slot(value)

        def tell(value: Any) -> None:
            nonlocal said_at
            if told is not None and time.monotonic() - said_at > 0.1:
                said_at = time.monotonic()
                self._post(partial(deliver, told, value))

        def body() -> None:
            try:
                result = work() if told is None else work(tell)
            except Exception as error:  # the window's edge: whatever it is, it is shown
                self._post(partial(deliver, failed, as_failure(error)))
            else:
                self._post(partial(deliver, done, result))

        threading.Thread(target=body, name=f"particle-explorer {name}", daemon=True).start()

    def _post(self, function: Callable[[], None]) -> None:
        if self._alive:
            self._relay.posted.emit(function)


class Mailbox:
    """One long-lived thread that works on the newest request only; what came between is dropped.

    Answers arrive on the window's thread in the order of their requests, and an answer that has not been
    shown yet when a newer one arrives is dropped too.
    """

    def __init__(
        self,
        owner: QWidget | QObject,
        work: Callable[..., Any],
        done: Callable[[Any], None],
        failed: Callable[[Failure], None] = notify,
        name: str = "mailbox",
        at_end: Callable[[], None] | None = None,
    ) -> None:
        """`at_end` is called in the thread when it ends."""
        self._relay = _relay()
        self._work, self._done, self._failed, self._at_end = work, done, failed, at_end
        self._condition = threading.Condition()
        self._request: tuple[Any, ...] | None = None
        self._answer: tuple[Callable[[Any], None], Any] | None = None
        self._stopped = False
        # Queued signals are handed over before timers and paints of the same turn, so answers that come while
        # a frame is painted would hold up everything else for a second frame: they wait for a timer's turn.
        self._turn = QTimer(owner)
        self._turn.setSingleShot(True)
        self._turn.setInterval(TURN_MS)
        self._turn.setTimerType(Qt.TimerType.PreciseTimer)
        self._turn.timeout.connect(self._deliver)
        self._thread = threading.Thread(target=self._loop, name=f"particle-explorer {name}", daemon=True)
        self._thread.start()
        when_destroyed(owner, self.stop)

    def submit(self, *request: Any) -> None:
        with self._condition:
            self._request = request
            self._condition.notify()

    def stop(self) -> None:
        """End the thread after the request it is working on; nothing is delivered from now on."""
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def join(self, timeout_s: float = 5.0) -> None:
        self._thread.join(timeout_s)

    def _loop(self) -> None:
        self._answer_requests()
        if self._at_end is not None:
            self._at_end()

    def _answer_requests(self) -> None:
        while True:
            with self._condition:
                while self._request is None and not self._stopped:
                    self._condition.wait()
                if self._stopped:
                    return
                request, self._request = self._request, None
            assert request is not None
            try:
                answer = (self._done, self._work(*request))
            except Exception as error:  # the window's edge
                answer = (self._failed, as_failure(error))
            with self._condition:
                waiting, self._answer = self._answer is not None, answer
                stopped = self._stopped
            if not waiting and not stopped:
                self._relay.posted.emit(self._wake)

    def _wake(self) -> None:
        with self._condition:
            stopped = self._stopped
        if not stopped:  # its owner, and the timer with it, may be gone otherwise
            self._turn.start()

    def _deliver(self) -> None:
        with self._condition:
            answer, self._answer = self._answer, None
            stopped = self._stopped
        if answer is not None and not stopped:
            slot, value = answer
            slot(value)


class JobFollower:
    """Reads the folder of one background job twice a second and tells what changed.

    `read` runs in a thread with the folder and returns anything; `told` gets it on the window's thread.
    """

    def __init__(
        self, owner: QWidget, read: Callable[[Path], Any], told: Callable[[Any], None], every_ms: int = 400
    ) -> None:
        self._folder: Path | None = None
        self._told = told
        self._mailbox = Mailbox(owner, self._read_with_folder, self._deliver, name="job follower")
        self._read = read
        self._timer = QTimer(owner)
        self._timer.setInterval(every_ms)
        self._timer.timeout.connect(self._ask)

    @property
    def folder(self) -> Path | None:
        return self._folder

    def follow(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is None:
            self._timer.stop()
        else:
            self._timer.start()
            self._ask()

    def stop(self) -> None:
        self.follow(None)
        self._mailbox.stop()

    def _ask(self) -> None:
        if self._folder is not None:
            self._mailbox.submit(self._folder)

    def _read_with_folder(self, folder: Path) -> tuple[Path, Any]:
        return folder, self._read(folder)

    def _deliver(self, answer: tuple[Path, Any]) -> None:
        folder, value = answer
        if folder == self._folder:
            self._told(value)

"""What every command of the command line is: its options, and how it reports while it works."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from particle_explorer.configs import Config
from particle_explorer.files import Stopped

if TYPE_CHECKING:
    from particle_explorer.status import StatusWriter


T = TypeVar("T")


PROGRAM = "particle-explorer"


class Command(Config):
    """One command; `execute` does it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """The texts of the options are read when help is asked for: they are many, and the start is short."""

    def execute(self) -> None:
        """Do it, or raise `UserError`."""
        raise NotImplementedError


class JobCommand(Command):
    """A command that may take long and can be followed."""

    status: str = ""
    """Folder to report to (status.json; a file named stop ends the job in good order). With it the job also
    stands back for other programs: lowest priority, one core left free."""

    @contextlib.contextmanager
    def job(self, what: str) -> Iterator[Job]:
        """Report this block as a job that does `what`."""
        from particle_explorer.status import StatusWriter

        folders = [Path(self.status)] if self.status else []
        with StatusWriter(*folders) as writer, interrupts_stop(writer.stop):
            job = Job(writer)
            job.tell(what)
            yield job
            job.end_line()


class Job:
    """What a running command says: to the terminal, and to the folder it reports to."""

    def __init__(self, writer: StatusWriter) -> None:
        self.writer = writer
        self.stop = writer.stop
        self._what = ""
        self._said_at = 0.0
        self._open_line = False

    def tell(self, what: str, fraction: float = 0.0) -> None:
        """`what` is being done, and this share of it is done."""
        self.writer.update(what=what, fraction=fraction)
        self.line(what, f"{what} {fraction:.0%}" if fraction else what)

    def line(self, key: str, text: str) -> None:
        """Say `text` on standard error: again and again in one line of a terminal, else now and then."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if key == self._what and now - self._said_at < (0.2 if terminal else 5.0):
            return
        if terminal:
            end = "\n" if self._open_line and key != self._what else ""
            print(f"{end}\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._open_line = True
        else:
            print(text, file=sys.stderr, flush=True)
        self._what, self._said_at = key, now

    def end_line(self) -> None:
        """Leave the line of the terminal that was written again and again."""
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False

    def note(self, text: str) -> None:
        """Something to know that stays on the screen."""
        self.end_line()
        self.writer.update(notes=(*self.writer.status.notes, text))
        print(text, file=sys.stderr, flush=True)

    def finish(self, what: str, steps: Iterator[tuple[float, T | None]]) -> T:
        """Go through `steps`, telling how much is done, to the result that comes with the last of them."""
        result: T | None = None
        for fraction, found in steps:
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
            self.tell(what, fraction)
            result = found
        assert result is not None
        return result

    def tell_share(self, what: str) -> Callable[[float], None]:
        """A function that is told how much of `what` is done, and ends the job when it is to stop."""

        def tell(fraction: float) -> None:
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
            self.tell(what, fraction)

        return tell

    def wait(self, work: Callable[[], T]) -> T:
        """`work()` in a thread, so that a job also stops while a library computes and says nothing."""
        done: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                done.append(work())
            except BaseException as error:  # raised again by the thread that waits
                failed.append(error)

        thread = threading.Thread(target=body, name="job", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
        if failed:
            raise failed[0]
        return done[0]

    def result(self, text: object) -> None:
        """What came out."""
        self.end_line()
        self.writer.update(message=str(text))
        print(text, flush=True)


@contextlib.contextmanager
def interrupts_stop(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C, and the polite kill, end a job in good order; the second time at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        print("\nstopping in good order; once more to stop at once", file=sys.stderr)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settings_of(command: Config, base: type[Config]) -> dict[str, Any]:
    """The settings of a command that are those of `base`."""
    return {name: getattr(command, name) for name in base.model_fields}

"""What a long job says of itself while it runs: `status.json`, rewritten by a heartbeat, and a `stop` file.

Whoever looks (the window, another terminal) reads the folder and never talks to the process, so a job
outlives the window that started it, and a window finds the jobs that ran before it was opened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from particle_explorer.files import Stopped, UserError, replacing

State = Literal["new", "running", "finished", "failed", "stopped", "interrupted"]

STATUS = "status.json"
STOP = "stop"
PAUSE = "pause"
HEARTBEAT_S = 1.0
NICE = 19
STALE_S = 60.0
"""A job on another computer counts as interrupted when its heartbeat is older; covers slow file systems
and clocks that differ."""


@dataclass(frozen=True)
class Status:
    """The content of `status.json`; times are seconds since 1970."""

    state: State = "new"
    pid: int = 0
    host: str = ""
    process_started: str = ""
    """When the system started process `pid`, in the system's own words: a number used again is found out."""
    started: float = 0.0
    heartbeat: float = 0.0
    what: str = ""
    """What is being done now, in plain words"""
    fraction: float = 0.0
    """How much of `what` is done, 0 to 1"""
    epoch: int = 0
    n_epochs: int = 0
    images_per_second: float = 0.0
    seconds_left: float = -1.0
    """-1 where it is not known"""
    device: str = ""
    message: str = ""
    """What came out: the path that was written, a note"""
    notes: Sequence[str] = ()
    """What there is to know of it, one sentence each"""
    error: str = ""
    """One sentence for bad input, the last line of the traceback for a fault"""

    @property
    def is_over(self) -> bool:
        return self.state in ("finished", "failed", "stopped", "interrupted")


def give_way() -> None:
    """Claim little of the processor from now on, so that the window stays quick while a job runs.

    Linux schedules each session of processes as a group ("autogroup") and heeds a nice value only within it.
    A job started by the window leads a session of its own, so its group must be made to give way too.
    """
    if not hasattr(os, "nice"):
        return
    os.nice(NICE)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError):  # a kernel without groups has no such file
            Path("/proc/self/autogroup").write_text(str(NICE), encoding="ascii")


def read_status(folder: Path) -> Status:
    """The status of the job of this folder; "new" where none was started.

    A job that says "running" while its process is gone, or, on another computer, while its heartbeat is
    stale, was "interrupted".
    """
    while (status := _said(Path(folder))).state == "running" and not _is_alive(status):
        # It may have said how it ended, and gone, between the two looks. Who is gone says nothing more, so
        # what stands there now counts; another process that has taken over is asked in its turn.
        if _said(Path(folder)) == status:
            return dataclasses.replace(status, state="interrupted", seconds_left=-1.0)
    return status


def _said(folder: Path) -> Status:
    """What `status.json` says, whether true or not."""
    try:
        text = (folder / STATUS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return Status()
    except OSError as error:
        raise UserError(f"cannot read {folder / STATUS}: {error.strerror}") from error
    try:
        found = json.loads(text)
        known = {field.name for field in dataclasses.fields(Status)}
        return Status(**{name: value for name, value in found.items() if name in known})
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / STATUS} is not a status file; delete it to go on") from error


def request_stop(folder: Path) -> None:
    """Ask the job of this folder to end in good order; a training run writes a checkpoint first."""
    (Path(folder) / STOP).touch()


def request_pause(folder: Path, paused: bool = True) -> None:
    """Ask the training of this folder to stand still, keeping its memory, or to go on."""
    if paused:
        (Path(folder) / PAUSE).touch()
    else:
        (Path(folder) / PAUSE).unlink(missing_ok=True)


class StatusWriter:
    """Writes `status.json` at each change and every second, from entering the block until leaving it.

    Leaving it normally says "finished" (or "stopped", when `stop` was set), leaving by an error "failed"
    with its sentence. `stop` is set when a `stop` file appears in one of the folders.
    """

    def __init__(self, *folders: Path, stop: threading.Event | None = None) -> None:
        self.folders = [Path(folder) for folder in dict.fromkeys(folders)]
        self.stop = stop if stop is not None else threading.Event()
        self.status = Status()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._paused = False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> StatusWriter:
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            if read_status(folder).pid != os.getpid():  # not announced: what lies there is of an earlier job
                (folder / STOP).unlink(missing_ok=True)
                (folder / PAUSE).unlink(missing_ok=True)
        self.status = Status(
            state="running",
            pid=os.getpid(),
            host=socket.gethostname(),
            process_started=process_started(os.getpid()),
            started=time.time(),
        )
        with self._lock:
            self._write()
        if self.folders:
            self._thread.start()
        return self

    @property
    def paused(self) -> bool:
        """Whether it was asked to stand still, by the last look into the folders."""
        return self._paused

    @staticmethod
    def announce(folder: Path, pid: int) -> None:
        """Say for a process that was just started, and cannot yet speak, that it runs."""
        started = process_started(pid)
        status = Status("running", pid, socket.gethostname(), started, time.time(), time.time(), "starting")
        if read_status(folder).pid != pid:  # else it was faster
            with replacing(folder / STATUS, sync=False) as temporary:
                temporary.write_text(json.dumps(dataclasses.asdict(status), indent=1), encoding="utf-8")

    @staticmethod
    def note_failure(folder: Path, error: UserError) -> None:
        """Say for this process that it failed, if it has not said already how it ended."""
        found = read_status(folder)
        if found.is_over and found.pid == os.getpid():
            return
        said = dataclasses.replace(
            found,
            state="failed",
            pid=os.getpid(),
            host=socket.gethostname(),
            process_started=process_started(os.getpid()),
            heartbeat=time.time(),
            error=str(error),
        )
        with replacing(folder / STATUS, sync=False) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(said), indent=1), encoding="utf-8")

    def hand_over(self) -> None:
        """Say nothing more: another writer of this process goes on, and the job is not over between them."""
        with self._lock:
            self.folders = []

    def update(self, **changes: Any) -> None:
        """Change fields of the status; written at once when the job turns to something else, else soon."""
        with self._lock:
            before = self.status
            self.status = dataclasses.replace(before, **changes)
            if (before.what, before.epoch) != (self.status.what, self.status.epoch):
                self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        changes: dict[str, Any] = {"seconds_left": -1.0}
        if error is None:
            changes |= {"state": "stopped"} if self.stop.is_set() else {"state": "finished", "fraction": 1.0}
        elif isinstance(error, (GeneratorExit, KeyboardInterrupt, Stopped)):
            changes |= {"state": "stopped"}
        elif isinstance(error, UserError):
            changes |= {"state": "failed", "error": str(error)}
        else:
            changes |= {"state": "failed", "error": traceback.format_exception_only(error)[-1].strip()}
        with self._lock:
            self.status = dataclasses.replace(self.status, **changes)
            self._write()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            if any((folder / STOP).exists() for folder in self.folders):
                self.stop.set()
            self._paused = any((folder / PAUSE).exists() for folder in self.folders)
            # a full disk or a folder that was moved must not end hours of work: the next beat tries again
            with contextlib.suppress(OSError, UserError), self._lock:
                self._write()

    def _write(self) -> None:
        self.status = dataclasses.replace(self.status, heartbeat=time.time())
        text = json.dumps(dataclasses.asdict(self.status), indent=1)
        for folder in self.folders:
            if folder.is_dir():  # deleted meanwhile: do not bring it back
                with replacing(folder / STATUS, sync=False) as temporary:
                    temporary.write_text(text, encoding="utf-8")


def _is_alive(status: Status) -> bool:
    if status.host != socket.gethostname():
        return time.time() - status.heartbeat < STALE_S
    return process_started(status.pid) == status.process_started != ""


def process_started(pid: int) -> str:
    """When process `pid` was started, as the system words it; "" when there is no such process."""
    if Path("/proc/self/stat").exists():
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return ""
        fields = text.rpartition(")")[2].split()  # the name in brackets may hold spaces
        return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended
    if os.name == "nt":
        return _process_started_windows(pid)
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return listed.stdout.strip()


def _process_started_windows(pid: int) -> str:
    import ctypes

    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return ""
    try:
        code = ctypes.c_ulong()
        kernel.GetExitCodeProcess(handle, ctypes.byref(code))
        times = [ctypes.c_ulonglong() for _ in range(4)]
        kernel.GetProcessTimes(handle, *(ctypes.byref(each) for each in times))
        return str(times[0].value) if code.value == 259 else ""  # STILL_ACTIVE
    finally:
        kernel.CloseHandle(handle)

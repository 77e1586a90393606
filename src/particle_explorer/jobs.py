"""Worker processes: started detached, followed through their folder; and the one that draws under the mouse.

The window never computes: fits, embeddings, clusterings, averages and exports are runs of the command line
in a process group of their own, so that they outlive the window and neither share its interpreter lock nor
take it down.
"""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from particle_explorer.files import UserError
from particle_explorer.status import (
    STOP,
    Status,
    StatusWriter,
    process_started,
    read_status,
    request_pause,
    request_stop,
)

__all__ = [
    "DecodeClient",
    "Status",
    "StatusWriter",
    "process_started",
    "read_log",
    "read_status",
    "request_pause",
    "request_stop",
    "start",
    "start_passing",
]

LOG = "log.txt"


def start(args: Sequence[str], folder: Path) -> Path:
    """Run `particle-explorer ARGS --status FOLDER` in the background; returns `folder`.

    The process has its own group and no terminal, reads nothing, writes its output to `log.txt` and says
    how it fares in `status.json`, which exists when this returns. It does not end with its parent.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP).unlink(missing_ok=True)
        log = (folder / LOG).open("ab")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    command = [*_command(), *args, "--status", str(folder)]
    with log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **_apart())
    # until the worker writes for itself, seconds later, the folder says whose word is awaited
    StatusWriter.announce(folder, process.pid)
    threading.Thread(target=process.wait, name="reaper", daemon=True).start()  # leaves no zombie behind
    return folder


def start_passing(args: Sequence[str]) -> Path:
    """`start` in a temporary folder, for a job that no session keeps."""
    return start(args, Path(tempfile.mkdtemp(prefix=f"particle-explorer-{args[0]}-")))


def read_log(folder: Path, n_bytes: int = 20_000) -> str:
    """The end of what a job has printed."""
    try:
        with (Path(folder) / LOG).open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - n_bytes))
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def _command() -> list[str]:
    return [sys.executable, "-m", "particle_explorer.cli"]


def _apart() -> dict[str, Any]:
    """How a process is started in a group of its own: Ctrl-C and closing of the terminal are not for it."""
    if os.name == "nt":
        flags = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
        return {"creationflags": sum(int(getattr(subprocess, flag)) for flag in flags)}
    return {"start_new_session": True}


# ---------------------------------------------------------------------- drawing under the mouse
#
# One request at a time over the pipes of a long-lived process, little-endian:
#   → u32 b, u32 d, u32 flags (1: a pose follows, 2: held still);
#     float32 z (b, d) [, angle_deg (b,), shift_yx_px (b, 2)]
#   ← u32 c, u32 m; float32 images (b, c, m, m); or c = 0, u32 length and a sentence
# The server greets with u32 c, u32 m, u32 d once it has drawn a first picture (or with the error form).

HAS_POSE, HELD = 1, 2
_REQUEST, _REPLY, _GREETING = struct.Struct("<III"), struct.Struct("<II"), struct.Struct("<I")
MAX_DECODED = 4096
"""Positions in one request; a longer one is a mistake and would only fill memory"""


class DecodeClient:
    """Pictures of latent positions of one run, drawn by a process of their own.

    Calls block (about 1 ms beside the model's time) and may come from any one thread at a time. The
    first call waits for the process, which takes seconds to import torch; `wait` does just that.
    """

    def __init__(self, run_path: Path) -> None:
        self.run_path = Path(run_path)
        # a file, not a pipe: nobody reads it unless the process fails, and a full pipe would block it
        self._errors = tempfile.TemporaryFile()
        self._lock = threading.Lock()
        self._greeted = False
        self.shape: tuple[int, int, int] = (0, 0, 0)
        """(c, m, m) of the pictures, once the process is ready"""
        self.latent_dim = 0
        self._process = subprocess.Popen(
            [*_command(), "decode-server", str(self.run_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            **_apart(),
        )

    def wait(self) -> None:
        """Return when the process is ready to draw; `UserError` when it says why it cannot."""
        with self._lock:
            self._greet()

    def decode(
        self,
        z: ArrayLike,
        angle_deg: ArrayLike | None = None,
        shift_yx_px: ArrayLike | None = None,
        *,
        held: bool = False,
    ) -> NDArray[np.float32]:
        """`(b, d)` → `(b, c, m, m)`: the canonical view, or the view at a pose (px of the cached image).

        With `held`, the run's `gauge.json` is applied first, so that the part it holds stays where it is.
        """
        z = np.atleast_2d(np.asarray(z, "<f4"))
        b, d = z.shape
        if b > MAX_DECODED:
            raise ValueError(f"{b} positions in one request; at most {MAX_DECODED}")
        flags = HELD if held else 0
        parts = [np.ascontiguousarray(z).tobytes()]
        if angle_deg is not None or shift_yx_px is not None:
            flags |= HAS_POSE
            angle = np.broadcast_to(np.asarray(0.0 if angle_deg is None else angle_deg, "<f4"), (b,))
            shift = np.broadcast_to(np.asarray(0.0 if shift_yx_px is None else shift_yx_px, "<f4"), (b, 2))
            parts += [angle.tobytes(), shift.tobytes()]
        with self._lock:
            self._greet()
            try:
                self._stdin.write(_REQUEST.pack(b, d, flags) + b"".join(parts))
                self._stdin.flush()
            except OSError:
                raise self._ended() from None
            c, m = _REPLY.unpack(self._read(_REPLY.size))
            if c == 0:
                raise UserError(self._read(m).decode())
            data = self._read(4 * b * c * m * m)
        return np.frombuffer(data, "<f4").reshape(b, c, m, m)

    def close(self) -> None:
        """End the process; a call under way in another thread ends with `UserError`."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            self._stdout.close()
        self._errors.close()

    def __enter__(self) -> DecodeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _stdout(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def _greet(self) -> None:
        if self._greeted:
            return
        c, m = _REPLY.unpack(self._read(_REPLY.size))
        if c == 0:
            raise UserError(self._read(m).decode())
        (self.latent_dim,) = _GREETING.unpack(self._read(_GREETING.size))
        self.shape = (c, m, m)
        self._greeted = True

    def _read(self, n: int) -> bytes:
        try:
            data = self._stdout.read(n)
        except (OSError, ValueError):  # closed meanwhile
            raise self._ended() from None
        if len(data) < n:
            raise self._ended()
        return data

    def _ended(self) -> UserError:
        said = ""
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
            said = f": {lines[-1]}" if lines else ""
        return UserError(f"the process that draws {self.run_path.name} has ended{said}")


def serve_decoding(
    requests: IO[bytes], replies: IO[bytes], draw: Any, shape: tuple[int, int], latent_dim: int
) -> None:
    """Answer `DecodeClient` until `requests` is closed.

    `draw(z, angle_deg, shift_yx_px, held)` returns `(b, c, m, m)` float32; its `UserError` is sent back.
    """
    replies.write(_REPLY.pack(*shape) + _GREETING.pack(latent_dim))
    replies.flush()
    while len(header := requests.read(_REQUEST.size)) == _REQUEST.size:
        b, d, flags = _REQUEST.unpack(header)
        n_pose = 3 * b if flags & HAS_POSE else 0
        data = requests.read(4 * (b * d + n_pose))
        if len(data) < 4 * (b * d + n_pose):
            return
        values = np.frombuffer(data, "<f4").astype(np.float32)
        angle, shift = None, None
        if n_pose:
            angle, shift = values[b * d : b * d + b], values[b * d + b :].reshape(b, 2)
        try:
            if d != latent_dim:
                raise UserError(f"positions have {d} coordinates, the model has {latent_dim}")
            images = draw(values[: b * d].reshape(b, d), angle, shift, bool(flags & HELD))
        except UserError as error:
            send_error(replies, str(error))
            continue
        replies.write(_REPLY.pack(*images.shape[1:3]) + np.ascontiguousarray(images, "<f4").tobytes())
        replies.flush()


def send_error(replies: IO[bytes], sentence: str) -> None:
    """Answer, or greet, with a sentence."""
    data = sentence.encode()
    replies.write(_REPLY.pack(0, len(data)) + data)
    replies.flush()

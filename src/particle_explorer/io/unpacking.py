"""Compressed files, unpacked once per process into a temporary folder that goes when the process ends.

Particles are read at random, and a compressed stream can be read from its start only.
"""

from __future__ import annotations

import bz2
import gzip
import os
import shutil
import tempfile
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from particle_explorer.files import UserError

MAGIC: dict[bytes, tuple[str, Callable[[str], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"BZh": ("bzip2", bz2.open),
}
MOST_PACKED = 1100
"""Deflate makes nothing smaller than by a factor of 1032."""
_BLOCK = 4 << 20
_BROKEN = (EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
_lock = threading.Lock()
_done: dict[tuple[str, str, int, int], str] = {}
_folders: list[Path] = []


def compression(start: bytes) -> str:
    """Name of the compression that a file with these first bytes has; "" for none."""
    return next((name for magic, (name, _) in MAGIC.items() if start.startswith(magic)), "")


def first_bytes(path: str, n_bytes: int) -> bytes:
    """The first bytes of what a gzip or bzip2 file holds; fewer where it holds no more."""
    try:
        with _stream(path) as file:
            return bytes(file.read(n_bytes))
    except _BROKEN as error:
        raise UserError(
            f"{path} begins like a gzip or bzip2 file and cannot be decompressed ({error})"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def unpack(path: str, most_bytes: int) -> str:
    """Where the content of a gzip or bzip2 file lies; no more than `most_bytes` of it are written."""
    return unpacked(path, "", most_bytes, lambda: _stream(path))


def unpacked(path: str, member: str, most_bytes: int, stream: Callable[[], BinaryIO]) -> str:
    """Where the content of `member` of `path` lies after unpacking; the same place when asked again.

    Names in an archive are never used for a file.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    key = (os.path.abspath(path), member, stat.st_size, stat.st_mtime_ns)
    with _lock:
        if key in _done and os.path.exists(_done[key]):
            return _done[key]
        folder = _folder()
        free = shutil.disk_usage(folder).free
        if most_bytes > free:
            raise UserError(
                f"{path} takes {most_bytes / 2**30:.1f} GiB unpacked, and {folder} has {free / 2**30:.1f} "
                "GiB "
                "left; decompress it first, or name a larger folder by the variable TMPDIR"
            )
        target = folder / f"{len(_done)}"
        try:
            with stream() as source, target.open("wb") as out:
                left = most_bytes
                while left > 0 and (block := source.read(min(_BLOCK, left))):
                    out.write(block)
                    left -= len(block)
        except _BROKEN as error:
            target.unlink(missing_ok=True)
            raise UserError(f"{path} is damaged: it cannot be decompressed ({error})") from error
        except OSError as error:
            target.unlink(missing_ok=True)
            raise UserError(f"cannot unpack {path} into {folder}: {error.strerror or error}") from error
        _done[key] = str(target)
        return str(target)


def _folder() -> Path:
    if not _folders or not _folders[0].is_dir():
        _folders[:] = [Path(tempfile.mkdtemp(prefix="particle-explorer-"))]
        # a process that was forked leaves its parent's files alone
        weakref.finalize(_Owner.now, _remove, _folders[0], os.getpid())
    return _folders[0]


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


class _Owner:
    """Lives as long as the process."""

    now: _Owner


_Owner.now = _Owner()


def _stream(path: str) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(4)
    for magic, (_, opened) in MAGIC.items():
        if start.startswith(magic):
            stream: BinaryIO = opened(path)
            return stream
    raise UserError(f"{path} is compressed in no way that is known here")

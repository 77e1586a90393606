"""Writing files so that nothing is ever half there and nothing of the user's is lost."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input, said in one sentence: which file, which row, what was found, what would be right."""


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success sync it and move it to `path` at once.

    A crash at any moment leaves either the old file or the new one. With `overwrite=False` an existing
    `path` raises `UserError` and stays untouched, also when it appears while the new one is written.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=f".part{path.suffix}", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _move_without_overwriting(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _move_without_overwriting(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, a hard link never replaces what is there
    except FileExistsError as error:
        raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)") from error
    except OSError:  # a file system without hard links
        if path.exists():
            raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)") from None
        temporary.replace(path)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write `text` with UNIX line ends (RELION stops at CR+LF), atomically."""
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

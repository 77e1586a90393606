"""Writing files so that nothing is ever half there and nothing of the user's is lost."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_NO_ROOM = frozenset({errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""A disk, a quota or a file system without room for what is written."""


class UserError(Exception):
    """Bad input, said in one sentence: which file, which row, what was found, what would be right."""

    def __init__(self, sentence: str) -> None:
        # a name out of a damaged file must neither break the line nor steer the terminal
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in sentence))


class Stopped(UserError):
    """Work was asked to stop, and did; what is kept of it is for the one who raises to say."""


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True, sync: bool = True) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; on success sync it and move it to `path` at once.

    A crash at any moment leaves either the old file or the new one. With `overwrite=False` an existing
    `path` raises `UserError` and stays untouched, also when it appears while the new one is written.
    `sync=False` leaves out the wait for the disk, for files that tell of a moment: a power cut may empty
    them. A disk that is full is a `UserError` too, and leaves nothing behind.
    """
    with replacing_all([path], overwrite=overwrite, sync=sync) as (temporary,):
        yield temporary


@contextlib.contextmanager
def replacing_all(
    paths: Sequence[Path], *, overwrite: bool = True, sync: bool = True
) -> Iterator[tuple[Path, ...]]:
    """`replacing` for files that belong together: none of them gets its name before all are complete."""
    paths = [Path(path) for path in paths]
    if not overwrite:
        for path in paths:
            if path.exists():
                raise _exists_already(path)
    temporaries: list[Path] = []
    new: list[Path] = []
    folders = [folder for path in paths for folder in path.parents if not folder.exists()]
    try:
        for path in paths:
            temporaries.append(_temporary_beside(path))
        yield tuple(temporaries)
        for temporary in temporaries:
            temporary.chmod(0o666 & ~umask())  # last: some writers put a file of their own in the place
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
        for temporary, path in zip(temporaries, paths, strict=True):
            if overwrite:
                temporary.replace(path)
            else:
                _move_without_overwriting(temporary, path)
                new.append(path)
    except OSError as error:
        _remove(new)
        if error.errno in _NO_ROOM:
            raise UserError(
                f"cannot write {paths[0]}: {error.strerror}; nothing of it was kept, make room and try again"
            ) from error
        raise
    except BaseException:
        _remove(new)
        raise
    finally:
        _remove(temporaries)
        for folder in sorted(set(folders), key=lambda folder: len(folder.parts), reverse=True):
            with contextlib.suppress(OSError):  # it holds the new files, or what others put there
                folder.rmdir()
    if sync:
        for folder in dict.fromkeys(path.parent for path in paths):
            sync_folder(folder)


def _temporary_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ending = f".part{path.suffix}"
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=ending, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}") from error
    os.close(handle)
    return Path(name)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _move_without_overwriting(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike rename, a hard link never replaces what is there
    except FileExistsError as error:
        raise _exists_already(path) from error
    except OSError:  # a file system without hard links
        if path.exists():
            raise _exists_already(path) from None
        temporary.replace(path)


def write_text(path: Path, text: str, *, overwrite: bool = True) -> None:
    """Write `text` with UNIX line ends (RELION stops at CR+LF), atomically."""
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def locked(path: Path, *, wait_s: float = 10.0, busy: str = "") -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it when the process ends, however it ends.

    After `wait_s` seconds in vain, `UserError(busy)`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise UserError(f"cannot write into {path.parent}: {error.strerror}") from error
    with file:
        deadline = time.monotonic() + wait_s
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                raise UserError(busy or f"another process is writing into {path.parent}; try again later")
            time.sleep(0.05)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    _NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)

    def _try_lock(descriptor: int) -> bool:
        """By `flock`; by `lockf` on network file systems that know only that."""
        for lock in (fcntl.flock, fcntl.lockf):
            try:
                lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            else:
                return True
        raise UserError(
            "the file system that this folder lies on has no locks, so two programs could write into it at"
            " once; put the session onto another (for Lustre: mounted with flock)"
        )


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last through a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems sync no folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _exists_already(path: Path) -> UserError:
    return UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")


def umask() -> int:
    """The permissions that new files do without."""
    current = os.umask(0)
    os.umask(current)
    return current


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    """Write a table."""
    with replacing(path) as temporary:
        table.to_parquet(temporary, compression="zstd")


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a table of ours."""
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def stamp_of(path: Path) -> list[int]:
    """Size and time of a file: as long as both stay, its content is taken to be the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]

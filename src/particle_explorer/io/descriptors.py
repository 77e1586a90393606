"""Reading at an offset from many files while only a few are open."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

from particle_explorer.files import UserError


class DescriptorPool:
    """Keeps the `limit` most recently used files open; safe to use from several threads.

    `os.pread` has no file position to share and was ten times faster than a memory map on random reads of a
    file that is not cached. Projects of thousands of stacks would run out of descriptors without a limit.
    """

    def __init__(self, limit: int = 32) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()

    def pread(self, path: str, n_bytes: int, offset: int) -> bytes:
        """`n_bytes` of the file from `offset`; fewer only where the file ends."""
        try:
            with self._borrow(path) as descriptor:
                return descriptor.pread(n_bytes, offset)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def pread_into(self, path: str, target: memoryview, offset: int) -> int:
        """Fill `target` from `offset` of the file; returns how many bytes, fewer where it ends."""
        try:
            with self._borrow(path) as descriptor:
                return descriptor.pread_into(target, offset)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def size(self, path: str) -> int:
        """Bytes in the file."""
        try:
            with self._borrow(path) as descriptor:
                return os.fstat(descriptor.number).st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close what is not being read; the pool stays usable."""
        with self._lock:
            self._shrink(0)

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor.number)

    @contextlib.contextmanager
    def _borrow(self, path: str) -> Iterator[_Descriptor]:
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = _Descriptor(path)
            self._open.move_to_end(path)
            descriptor.users += 1
            self._shrink(self._limit)
        try:
            yield descriptor
        finally:
            with self._lock:
                descriptor.users -= 1

    def _shrink(self, limit: int) -> None:
        idle = [path for path, descriptor in self._open.items() if descriptor.users == 0]
        for path in idle[: max(0, len(self._open) - limit)]:
            os.close(self._open.pop(path).number)


class _Descriptor:
    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self.users = 0
        self._position = threading.Lock()

    def pread(self, n_bytes: int, offset: int) -> bytes:
        parts = []
        while n_bytes > 0:
            part = self._pread_once(n_bytes, offset)
            if not part:
                break
            parts.append(part)
            n_bytes -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pread_into(self, target: memoryview, offset: int) -> int:
        done = 0
        while done < len(target):
            if hasattr(os, "preadv"):
                count = os.preadv(self.number, [target[done:]], offset + done)
            else:
                part = self._pread_once(len(target) - done, offset + done)
                count = len(part)
                target[done : done + count] = part
            if not count:
                break
            done += count
        return done

    def _pread_once(self, n_bytes: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.number, n_bytes, offset)
        with self._position:  # Windows has no pread: seek and read belong together
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, n_bytes)


def read_images(
    pool: DescriptorPool, path: str, indices: list[int], first_byte: int, n_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """Equally sized records → (position in `indices`, their bytes); neighbours are read in one go of up to 4
    MiB."""
    most = max(1, (4 << 20) // n_bytes)
    order = sorted(range(len(indices)), key=indices.__getitem__)
    at = 0
    while at < len(order):
        first, end = indices[order[at]], at + 1
        while (
            end < len(order)
            and indices[order[end]] - indices[order[end - 1]] <= 1
            and (indices[order[end]] - first < most)
        ):
            end += 1
        count = indices[order[end - 1]] - first + 1
        block = pool.pread(path, count * n_bytes, first_byte + first * n_bytes)
        if len(block) < count * n_bytes:
            raise UserError(
                f"{path} is shorter than when it was opened: image {first + 1} and on cannot be read"
            )
        view = memoryview(block)
        for place in order[at:end]:
            start = (indices[place] - first) * n_bytes
            yield place, view[start : start + n_bytes]
        at = end

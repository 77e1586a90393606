"""Formats that a library of others decodes: asked for where it is missing, its errors made one sentence."""

from __future__ import annotations

import contextlib
import importlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from particle_explorer.files import UserError

LARGEST_DECODED_PX = 8192
"""Side of an image whose size the file's length cannot confirm, because it is compressed."""
LARGEST_CHUNK_BYTES = 256 * 2**20
"""What a chunked file may make us decode for one image."""
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What decoders raise at files that are not what they say."""


def needs(module: str, path: str, extra: str = "formats") -> Any:
    """The module of another package that reads `path`; a sentence naming our extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{path} needs the package {module.partition('.')[0]}, which is not installed: "
            f'pip install "napari-particle-explorer[{extra}]"'
        ) from error


@contextlib.contextmanager
def decoding(path: str, what: str) -> Iterator[None]:
    """Whatever goes wrong inside is a damaged file `path`, a `what`."""
    try:
        yield
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise UserError(f"{path} is damaged or no {what}: {reason}") from error

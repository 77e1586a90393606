"""Named results in a folder: NAME.json, written last, announces the files beside it."""

from __future__ import annotations

import datetime
import math
import re
from pathlib import Path
from typing import Any

from particle_explorer.files import UserError

LOCK = ".lock"
"""Held in the folder of a session for the moment of a write"""
_NAME = re.compile(r"\w[\w .+-]*")


def unused(folder: Path, name: str) -> str:
    """`name`, or NAME-2, NAME-3 … where it is taken."""
    used, number = name, 1
    while any((folder / f"{used}{suffix}").exists() for suffix in (".json", ".parquet", ".mrcs")):
        number += 1
        used = f"{name}-{number}"
    return used


def names_in(folder: Path) -> list[str]:
    """What is kept in `folder`, by name; a file that begins with a dot is half written, or not ours."""
    found = folder.glob("[!.]*.json") if folder.is_dir() else ()
    return sorted(path.stem for path in found)


def checked(name: str) -> str:
    """`name`; `UserError` where it cannot be one."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a name; use letters, digits, space and . _ + - only")
    return name


def json_number(value: Any) -> Any:
    """`value`, but None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def now() -> str:
    """The moment, in UTC, as records keep it; in order as text too."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")

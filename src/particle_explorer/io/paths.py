"""Finding the stacks that a star or cs file names: every one, before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from particle_explorer.files import UserError


class StacksMissing(UserError):
    """Image stacks that a star or cs file names are nowhere; one project folder may mend them all."""

    def __init__(self, sentence: str, source: Path, missing: list[str]) -> None:
        super().__init__(sentence)
        self.source = source
        self.missing = missing


_UID_PREFIX = re.compile(r"^\d{18,21}_")
_TYPE_SUFFIX = re.compile(r":mrcs?$")  # "stack.mrc:mrcs" is RELION's way to say how to read a file
_SHOWN = 20


def resolve_stacks(names: Iterable[str], source: Path, project_dir: Path | None = None) -> dict[str, str]:
    """Stack names as written → absolute paths; all that are missing are listed in one `UserError`.

    Tried in turn: the name as it is, if absolute; under `project_dir`, dropping leading folders of the name
    one by one; beside `source` and under each folder above it (RELION's and cryoSPARC's project root is one
    of them); the same without cryoSPARC's unique-number prefix of the file name. Names may be absolute or
    hold `..`, as RELION follows them too.
    """
    source = Path(os.path.abspath(source))
    if project_dir is not None and not Path(project_dir).is_dir():
        raise UserError(f"the project folder {project_dir} does not exist")
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        path = _find(name, source, project_dir)
        if path is None:
            missing.append(name)
        else:
            found[name] = path
    if missing:
        listed = ", ".join(missing[:_SHOWN])
        if len(missing) > _SHOWN:
            listed += f" and {len(missing) - _SHOWN} more"
        total = len(missing) + len(found)
        raise StacksMissing(
            f"{source} names {total} image stack{'s' * (total > 1)}, and {len(missing)} cannot be found: "
            f"{listed}; "
            f"looked beside the file and in the folders above it"
            + (f" and under {project_dir}" if project_dir is not None else "")
            + "; give the project folder that the names start from (--project-dir)",
            source,
            missing,
        )
    return found


def _find(name: str, source: Path, project_dir: Path | None) -> str | None:
    plain = name.replace("\\", "/") if os.sep == "\\" else name
    candidates = [plain, _TYPE_SUFFIX.sub("", plain)]
    folder, base = os.path.split(candidates[1])
    if _UID_PREFIX.match(base):
        candidates.append(os.path.join(folder, _UID_PREFIX.sub("", base)))
    for candidate in candidates:
        for path in _places(candidate, source, project_dir):
            if os.path.isfile(path):
                return os.path.abspath(path)
    return None


def _places(name: str, source: Path, project_dir: Path | None) -> Iterable[str]:
    if os.path.isabs(name):
        yield name
    if project_dir is not None:
        parts = [part for part in Path(name).parts if part not in (os.sep, "..")]
        for first in range(len(parts)):
            yield os.path.join(project_dir, *parts[first:])
    if not os.path.isabs(name):
        for folder in source.parents:
            yield os.path.join(folder, name)

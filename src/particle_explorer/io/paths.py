"""Finding the stacks that a star or cs file names: every one, before anything starts."""

from __future__ import annotations

import os
import re
from collections import Counter
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
_MOST_FILES = 2_000_000


def resolve_stacks(names: Iterable[str], source: Path, project_dir: Path | None = None) -> dict[str, str]:
    """Stack names as written → absolute paths; all that are missing are listed in one `UserError`.

    Tried in turn: the name as it is, if absolute; under `project_dir`, dropping leading folders of the name
    one by one; beside `source` and under each folder above it (RELION's and cryoSPARC's project root is one
    of them), and where `source` is a link, beside and above what it leads to; the same without cryoSPARC's
    unique-number prefix of the file name; at last anywhere below `project_dir`, where just one file has that
    name. Names may be absolute or hold `..`, as RELION follows them too.
    """
    source = Path(os.path.abspath(source))
    if project_dir is not None and not Path(project_dir).is_dir():
        raise UserError(f"the project folder {project_dir} does not exist")
    folders = _folders(source)
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in names:
        path = _find(name, folders, project_dir)
        if path is None:
            missing.append(name)
        else:
            found[name] = path
    if missing and project_dir is not None:
        # one file must never stand for two stacks, such as a/stack.mrcs and b/stack.mrcs
        counts = Counter(_bare_name(name) for name in [*missing, *found])
        below = _files_below(project_dir, {bare for bare, count in counts.items() if count == 1})
        found |= {name: below[_bare_name(name)] for name in missing if _bare_name(name) in below}
        missing = [name for name in missing if name not in found]
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


def find_file(name: str, source: Path) -> Path | None:
    """One file that a star or cs file names, looked for as `resolve_stacks` does; None where it is not."""
    found = _find(name, _folders(Path(os.path.abspath(source))), None)
    return None if found is None else Path(found)


def _bare_name(name: str) -> str:
    """File name without folders, suffix for RELION's type and cryoSPARC's number."""
    return _UID_PREFIX.sub("", os.path.basename(_TYPE_SUFFIX.sub("", name)))


def _files_below(folder: Path, wanted: set[str]) -> dict[str, str]:
    """Bare name → the one file below `folder` that has it; names of several files are left out."""
    found: dict[str, str] = {}
    several: set[str] = set()
    count = 0
    for here, _, names in os.walk(folder):
        count += len(names)
        if count > _MOST_FILES:
            break
        for name in names:
            bare = _UID_PREFIX.sub("", name)
            if bare in wanted:
                several |= {bare} & found.keys()
                found[bare] = os.path.abspath(os.path.join(here, name))
    return {name: path for name, path in found.items() if name not in several}


def _folders(source: Path) -> list[Path]:
    """The folder of a file and those above it; then the same of the file that it is a link to."""
    return list(dict.fromkeys([*source.parents, *Path(os.path.realpath(source)).parents]))


def _find(name: str, folders: Iterable[Path], project_dir: Path | None) -> str | None:
    plain = name.replace("\\", "/") if os.sep == "\\" else name
    candidates = [plain, _TYPE_SUFFIX.sub("", plain)]
    folder, base = os.path.split(candidates[1])
    if _UID_PREFIX.match(base):
        candidates.append(os.path.join(folder, _UID_PREFIX.sub("", base)))
    for candidate in candidates:
        for path in _places(candidate, folders, project_dir):
            if os.path.isfile(path):
                return os.path.abspath(path)
    return None


def _places(name: str, folders: Iterable[Path], project_dir: Path | None) -> Iterable[str]:
    if os.path.isabs(name):
        yield name
    if project_dir is not None:
        parts = [part for part in Path(name).parts if part not in (os.sep, "..")]
        for first in range(len(parts)):
            yield os.path.join(project_dir, *parts[first:])
    if not os.path.isabs(name):
        for folder in folders:
            yield os.path.join(folder, name)

"""Named sets of particles: the folder `selections` of a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError, locked, read_json, read_parquet, write_json, write_parquet
from particle_explorer.records import LOCK, checked, names_in, now, unused

Mask = NDArray[np.bool_]


class Selections:
    """Which particles belong together, by name; what is replaced or removed is put aside, not lost."""

    def __init__(self, folder: Path, uid: Callable[[], NDArray[np.uint64]]) -> None:
        """`uid` gives the session's particles, `(N,)`, in the order of its rows."""
        self.folder = folder
        self.uid = uid

    def names(self) -> list[str]:
        """Names of the saved selections."""
        return names_in(self.folder)

    def save(self, name: str, mask: Mask, how: str = "", colour: str = "", *, aside: bool = True) -> None:
        """Keep which particles `(N,)` are selected, and how they were chosen.

        A set of that name is put aside first (`bring_back`), unless `aside` is off.
        """
        if mask.shape != (len(self.uid()),):
            raise ValueError(f"mask of {mask.shape} for {len(self.uid())} particles")
        folder = self.folder
        with self._lock():
            there = (folder / f"{checked(name)}.json").is_file()
            colour = colour or (str(self.record(name).get("colour", "")) if there else "")
            if there and aside:
                self._put_aside(name)
            table = pd.DataFrame(index=pd.Index(self.uid()[mask], name="uid"))
            write_parquet(table, folder / f"{name}.parquet")
            record = {"how": how, "n": int(mask.sum()), "made": now()}
            write_json(folder / f"{name}.json", record | ({"colour": colour} if colour else {}))

    def record(self, name: str) -> dict[str, Any]:
        """How a selection was chosen: how, n, made, and its colour (RRGGBB) where it was given one."""
        return read_json(self.folder / f"{checked(name)}.json")

    def colour(self, name: str, colour: str) -> None:
        """Give a selection another colour, RRGGBB."""
        with self._lock():
            path = self.folder / f"{checked(name)}.json"
            write_json(path, self.record(name) | {"colour": colour})

    def rename(self, name: str, new: str) -> None:
        """Give a selection another name, which must be free."""
        folder = self.folder
        with self._lock():
            if (folder / f"{checked(new)}.json").exists():
                raise UserError(f"there is a set {new!r} already; choose another name")
            for suffix in (".parquet", ".json"):  # the record last: it announces the rest
                (folder / f"{checked(name)}{suffix}").rename(folder / f"{new}{suffix}")

    def remove(self, name: str) -> None:
        """Put a selection aside, into `selections/removed/`; `bring_back` undoes it."""
        self.record(name)  # a wrong name is said before anything moves
        with self._lock():
            self._put_aside(name)

    def removed(self) -> list[tuple[str, str]]:
        """Name, and name of the files, of what was put aside, the latest last."""
        folder = self.folder / "removed"
        found = [(path.stem.partition(" ")[2], path.stem) for path in folder.glob("[!.]*.json")]
        return sorted(found, key=lambda each: each[1])

    def bring_back(self) -> str:
        """Bring back what was put aside last, under its name or NAME-2 …; returns the name."""
        folder = self.folder
        with self._lock():
            removed = self.removed()
            if not removed:
                raise UserError(f"no set of {self.folder.parent} was removed")
            name, stem = removed[-1]
            used = unused(folder, name)
            for suffix in (".parquet", ".json"):
                (folder / "removed" / f"{stem}{suffix}").rename(folder / f"{used}{suffix}")
        return used

    def _put_aside(self, name: str) -> None:
        folder = self.folder
        (folder / "removed").mkdir(exist_ok=True)
        numbers = [int(stem.partition(" ")[0]) for _, stem in self.removed()]
        stem = f"{max(numbers, default=0) + 1:04d} {name}"
        for suffix in (".json", ".parquet"):
            (folder / f"{name}{suffix}").rename(folder / "removed" / f"{stem}{suffix}")

    def mask(self, name: str) -> Mask:
        """`(N,)` bool."""
        path = self.folder / f"{checked(name)}.parquet"
        if not path.is_file():
            there = ", ".join(self.names()) or "none"
            raise UserError(f"{self.folder.parent} has no selection {name!r}; there are: {there}")
        return np.asarray(pd.Index(self.uid()).isin(read_parquet(path).index))

    def _lock(self) -> Any:
        return locked(self.folder.parent / LOCK)

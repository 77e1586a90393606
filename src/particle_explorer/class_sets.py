"""Sets of class averages with their members and what was found of them: the folder `classes` of a session."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.files import UserError, locked, read_json, read_parquet, write_json, write_parquet
from particle_explorer.io import mrc
from particle_explorer.records import LOCK, checked, json_number, names_in, now, unused

if TYPE_CHECKING:
    from particle_explorer.averaging import ClassAverage


class StoredClasses(NamedTuple):
    """Averages read back from `classes/NAME`."""

    name: str
    images: NDArray[np.float32]
    """`(k, n, n)`, or `(k, c, n, n)` for images of several channels"""
    pixel_size_A: float
    """NaN where it is not known"""
    classes: list[dict[str, Any]]
    """per average: label, n, n_effective, frc, frc_label, ssnr, ssnr_radius_A, ctf, halves_independent,
    and where it was judged, mark: good or bad"""
    members: pd.DataFrame
    """uid → index of the average, column `average`; a particle may be in several. `weight`, and the pose
    it was moved back by: `angle_deg`, `shift_y_px`, `shift_x_px` (px of the original)"""
    how: dict[str, Any]


class ClassSets:
    """Averages kept under names, NAME, NAME-2 …; pictures, members and poses of a set never change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Names of the saved sets of averages."""
        return names_in(self.folder)

    def newest(self) -> str:
        """The set of averages that was made last, or an empty text."""
        folder = self.folder
        names = self.names()
        return max(
            names, key=lambda name: str(read_json(folder / f"{name}.json").get("made", "")), default=""
        )

    def save(
        self, name: str, averages: Sequence[ClassAverage], labels: Sequence[str], how: Mapping[str, Any]
    ) -> str:
        """Keep averages of one box size, their members and quality; returns the name used (NAME, NAME-2, …).

        The averages of images with several channels lie in the .mrcs channel by channel.
        """
        images = np.stack([average.image for average in averages]).astype(np.float32)
        shift = np.concatenate([average.shift_yx_px for average in averages])
        members = pd.DataFrame(
            {
                "average": np.repeat(np.arange(len(averages)), [average.n for average in averages]),
                "weight": np.concatenate([average.weight for average in averages]),
                "angle_deg": np.concatenate([average.angle_deg for average in averages]),
                "shift_y_px": shift[:, 0],
                "shift_x_px": shift[:, 1],
            },
            index=pd.Index(
                np.concatenate([average.uid for average in averages]), dtype=np.uint64, name="uid"
            ),
        )
        records = [_class_record(*each) for each in zip(averages, labels, strict=True)]
        return self._put(name, images, float(averages[0].pixel_size_A), members, records, how)

    def save_changed(
        self,
        stored: StoredClasses,
        members: pd.DataFrame,
        labels: Sequence[str],
        averages: Mapping[int, ClassAverage],
        copies: Mapping[int, int],
        how: Mapping[str, Any],
    ) -> str:
        """Keep a changed set beside the one it was made of; returns the name used.

        `members` are those of the new set, `averages` its classes that were made anew, `copies` those that
        are as they were, with their place in `stored`.
        """
        images, records = [], []
        for i, label in enumerate(labels):
            if i in copies:
                images.append(stored.images[copies[i]])
                records.append({**stored.classes[copies[i]], "label": label})
            else:
                images.append(averages[i].image)
                records.append(_class_record(averages[i], label))
        order = np.argsort(members["average"].to_numpy(), kind="stable")
        base = re.sub(r"-\d+$", "", stored.name)
        table = members.iloc[order]
        return self._put(base, np.stack(images), stored.pixel_size_A, table, records, how)

    def _put(
        self,
        name: str,
        images: NDArray[np.float32],
        pixel_size_A: float,
        members: pd.DataFrame,
        records: list[dict[str, Any]],
        how: Mapping[str, Any],
    ) -> str:
        folder = self.folder
        record = {
            "how": dict(how),
            "made": now(),
            "pixel_size_A": json_number(pixel_size_A),
            "n_channels": 1 if images.ndim == 3 else images.shape[1],
            "classes": records,
        }
        with self._lock():
            used = unused(folder, checked(name))
            mrc.write_stack(folder / f"{used}.mrcs", images.reshape(-1, *images.shape[-2:]), pixel_size_A)
            write_parquet(members, folder / f"{used}.parquet")
            write_json(folder / f"{used}.json", record)  # last: it announces the rest
        return used

    def save_examined(
        self,
        name: str,
        columns: pd.DataFrame,
        classes: Sequence[Mapping[str, Any]],
        pictures: Mapping[str, NDArray[np.float32]],
        pixel_size_A: float,
    ) -> None:
        """Keep what was found of a class set: `columns` beside its members, row by row, more words for each
        of its `classes`, and stacks of `pictures` as NAME-KEY.mrcs."""
        folder = self.folder
        with self._lock():
            members = read_parquet(folder / f"{checked(name)}.parquet")
            if not np.array_equal(members.index, columns.index):
                raise ValueError(f"{len(columns)} rows do not fit the {len(members)} members of {name}")
            record = read_json(folder / f"{name}.json")
            for one, more in zip(record["classes"], classes, strict=True):
                one.update(more)
            for key, images in pictures.items():
                mrc.write_stack(folder / f"{name}-{key}.mrcs", images, pixel_size_A, overwrite=True)
            write_parquet(members.assign(**columns), folder / f"{name}.parquet")
            write_json(folder / f"{name}.json", record)

    def pictures(self, name: str, key: str) -> NDArray[np.float32] | None:
        """`(k, m, m)` pictures that `save_examined` has kept, or None."""
        path = self.folder / f"{checked(name)}-{key}.mrcs"
        if not path.is_file():
            return None
        file = mrc.MrcFile(path)
        return file.read(np.arange(file.n_images))[:, 0]

    def read(self, name: str) -> StoredClasses:
        """A saved set of averages."""
        folder = self.folder
        if not (folder / f"{checked(name)}.json").is_file():
            there = ", ".join(self.names()) or "none"
            raise UserError(f"{self.folder.parent} has no class averages {name!r}; there are: {there}")
        record = read_json(folder / f"{name}.json")
        k, c, size = len(record["classes"]), record["n_channels"], record["pixel_size_A"]
        images = mrc.MrcFile(folder / f"{name}.mrcs").read(np.arange(k * c))
        return StoredClasses(
            name=name,
            images=images.reshape(k, *((c,) if c > 1 else ()), *images.shape[-2:]),
            pixel_size_A=math.nan if size is None else size,
            classes=record["classes"],
            members=read_parquet(folder / f"{name}.parquet"),
            how=record["how"],
        )

    def mark(self, name: str, marks: Sequence[str]) -> None:
        """Keep how averages were judged: "good", "bad" or "", one for each.

        `marks` is read once the lock is held, so of several writers of one list the last writes the newest.
        """
        path = self.folder / f"{checked(name)}.json"
        with self._lock():
            record = read_json(path)
            for one, mark in zip(record["classes"], list(marks), strict=True):
                one["mark"] = mark
            write_json(path, record)

    def _lock(self) -> Any:
        return locked(self.folder.parent / LOCK)


def kept_classes(marks: Sequence[str]) -> NDArray[np.bool_]:
    """`(k,)` averages to go on with: those marked good; where none is, those that are not marked bad."""
    given = np.asarray(marks, dtype=str)
    return given == "good" if (given == "good").any() else given != "bad"


def _class_record(average: ClassAverage, label: str) -> dict[str, Any]:
    return {
        "label": str(label),
        "n": average.n,
        "n_effective": float(average.n_effective),
        "frc": [json_number(value) for value in np.asarray(average.frc, float).round(5).tolist()],
        "frc_label": average.frc_label,
        "halves_independent": average.halves_independent,
        "resolution_A": json_number(float(average.resolution_A)),
        "ssnr": [json_number(value) for value in np.asarray(average.ssnr, float).round(5).tolist()],
        "ssnr_radius_A": json_number(float(average.ssnr_radius_A)),
        "ctf": average.ctf,
        "settings": average.settings,
        **_control_record(average),
    }


def _control_record(average: ClassAverage) -> dict[str, Any]:
    """The curves of the noise control; nothing where there was none."""
    if average.control_frc is None or average.control_ssnr is None:
        return {}
    side, ring = average.image.shape[-1], average.believable_ring
    radius = side * average.pixel_size_A / ring if ring else math.inf
    return {
        "control_frc": np.asarray(average.control_frc, float).round(5).tolist(),
        "control_ssnr": np.asarray(average.control_ssnr, float).round(5).tolist(),
        "control_n": average.control_n,
        "believable_radius_A": json_number(float(radius)),
    }

"""A session and its runs: the folder on disk that every view, command and job reads.

    my_particles/
      session.json              SessionInfo
      particles.parquet         the table, original columns included
      images.npy + images.json  (N, c, m, m) float16 cache and the key of the preprocessing that made it
      source/                   the source file as it was, or the images of a layer
      runs/0003-class-map/      one fit: config.json, metrics.csv, weights, latents.parquet, columns/
      selections/ classes/      named sets of particles; averages
      jobs/0001-export/         status and log of background jobs that are not fits

Everything is written under a temporary name, synced and renamed, so a reader never meets half a file and
a killed writer leaves the session as it was.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from particle_explorer import __version__, preprocess
from particle_explorer.configs import Config, DataSpec, PreprocessConfig, RunConfig
from particle_explorer.files import Stopped, UserError, locked, replacing, sync_folder, write_text
from particle_explorer.io import cryosparc, cs_writing, mrc, reading
from particle_explorer.io.inspecting import look_at_contrast
from particle_explorer.latents import Latents
from particle_explorer.particles import ImageStack, Particles, where_mask
from particle_explorer.status import Status, read_status

if TYPE_CHECKING:
    from particle_explorer.averaging import ClassAverage

FORMAT_VERSION = 1
CACHE_HEADER_BYTES = 128
"""Of `images.npy`; numpy pads the header of any such shape to it."""
BLOCK_BYTES = 32 * 2**20
"""Originals preprocessed at once; two threads hold three such blocks at most."""

Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]
ProgressCallback = Callable[[str, float], None]

_PLAN: TypeAdapter[preprocess.Plan] = TypeAdapter(preprocess.Plan)
_UNKNOWN = ("pixel_size_A", "cached_pixel_size_A")
"""Numbers of a plan that may be NaN, for which JSON has no word"""
_NAME = re.compile(r"\w[\w .+-]*")


class SessionInfo(Config):
    """What `session.json` holds."""

    format_version: int = FORMAT_VERSION
    version: str = __version__
    """Version of the package that made the session."""
    created: str = ""
    source: str = ""
    """Path of what was opened; relative to the session where it lies beside or inside it."""
    source_kind: str = ""
    """star, cs, mrc, npy or layer"""
    source_copy: str = ""
    """Name of its verbatim copy under `source/`; empty for bare stacks"""
    source_bytes: int = 0
    source_hash: str = ""
    """blake2b of size and first MiB, to tell whether the file has changed since"""
    where: str = ""
    """The rows taken, as `COLUMN OP VALUE [and …]`"""
    n: int
    n_channels: int = 1
    preprocess: PreprocessConfig
    plan: dict[str, Any]
    """What `preprocess` came to for this table"""
    notes: tuple[str, ...] = ()
    """What the reader said of the source"""


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


class CachedImages:
    """`images.npy` as an array `(N, c, m, m)` of float32 that is never loaded whole.

    Indexing reads just what is asked for, with `os.pread`, from any thread.
    """

    dtype = np.dtype(np.float32)
    ndim = 4

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise UserError(f"{path} was not written by this package; delete it to have it made again")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if len(shape) != 4 or fortran or dtype != np.float16:
            raise UserError(f"{path} is not an image cache of ours; delete it to have it made again")
        self.shape: tuple[int, int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]), int(shape[3]))
        self._bytes = 2 * int(np.prod(self.shape[1:]))
        if path.stat().st_size != self._start + self._bytes * self.shape[0]:
            raise UserError(f"{path} is cut short; delete it to have it made again")
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def size(self) -> int:
        """Number of pixels of all images."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all images as they lie on disk."""
        return self._bytes * self.shape[0]

    def read(self, rows: Any) -> NDArray[np.float32]:
        """`(k,)` rows → `(k, c, m, m)` float32."""
        return self.read_raw(rows).astype(np.float32)

    def read_raw(self, rows: Any) -> NDArray[np.float16]:
        """`(k,)` rows → `(k, c, m, m)` float16, as on disk; neighbouring rows are read in one go."""
        rows = np.asarray(rows, np.intp).ravel()
        if rows.size and (rows.min() < 0 or rows.max() >= self.shape[0]):
            raise IndexError(f"row outside 0 … {self.shape[0] - 1}")
        out = np.empty((len(rows), *self.shape[1:]), np.float16)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
            if last > first:
                self._fill(out[first:last], int(rows[first]))
        return out

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        first, rest = (key[0], key[1:]) if isinstance(key, tuple) else (key, ())
        if first is Ellipsis:
            first, rest = slice(None), (Ellipsis, *rest)
        if isinstance(first, (int, np.integer)):
            row = int(first) + (self.shape[0] if first < 0 else 0)
            images = self.read([row])[0]
            return images[rest] if rest else images
        if isinstance(first, slice):
            rows = np.arange(*first.indices(self.shape[0]))
        else:
            rows = np.asarray(first)
            rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        images = self.read(rows)
        return images[(slice(None), *rest)] if rest else images

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        raise TypeError("the images of a session are not loaded whole; index them, e.g. images[:100]")

    def _fill(self, out: NDArray[np.float16], row: int) -> None:
        view = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        offset, done = self._start + row * self._bytes, 0
        while done < len(view):
            if hasattr(os, "preadv"):
                n = os.preadv(self._descriptor, [view[done:]], offset + done)
            else:  # Windows has no positioned read
                with self._lock:
                    os.lseek(self._descriptor, offset + done, os.SEEK_SET)
                    data = os.read(self._descriptor, len(view) - done)
                n = len(data)
                view[done : done + n] = data
            if n == 0:
                raise UserError(f"{self.path} was cut short while it was read")
            done += n


class Session:
    """One data set being explored: a folder, opened with `Session.open` and made with `Session.create`."""

    def __init__(self, path: Path, info: SessionInfo) -> None:
        self.path = path
        self.info = info

    # ------------------------------------------------------------------ making and opening

    @classmethod
    def create(
        cls,
        path: Path,
        particles: Particles,
        config: PreprocessConfig | None = None,
        *,
        where: str = "",
        overwrite: bool = False,
        progress: ProgressCallback | None = None,
        stop: threading.Event | None = None,
    ) -> Session:
        """Make a session folder at `path`: table, verbatim source and image cache.

        The folder appears at once, complete. With `overwrite`, a session that is there is kept beside it as
        `NAME-replaced-1`; any other folder with something in it is never touched. Setting `stop` ends with
        `Stopped`; the images prepared by then, or when the process was killed, are kept in a hidden folder
        until the next import of that name, which goes on from there where it is the same.
        """
        path = Path(path).absolute()
        _check_free(path, overwrite)
        if where:
            particles = particles[where_mask(particles.table, where)]
        n = len(particles.table)
        if n == 0:
            raise UserError(
                f"no particle of {particles.source} is left" + (f" by --where {where!r}" if where else "")
            )
        _check_uids(particles)
        config = config or PreprocessConfig()
        plan = preprocess.plan(particles.table, config, guessed_sign(particles, config))
        key = _inputs_key(particles.table, plan, config)
        particles = replace(particles, table=preprocess.with_pixel_size(particles.table, config))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent))
        except OSError as error:
            raise UserError(f"cannot write into {path.parent}: {error.strerror}") from error
        alive, keep = contextlib.ExitStack(), False
        made = _Cache(folder / "images.npy", plan, particles.images.n_channels)
        try:
            folder.chmod(0o777 & ~_umask())
            alive.enter_context(locked(folder / ".lock"))
            _clean_up_after_dead(path, folder, made, key)
            copy = _keep_source(particles, folder, path, progress)
            try:
                left_out = made.build(particles.images, particles.table, config, progress, stop, key)
            except Stopped:
                keep = made.is_unfinished
                raise
            kept = particles[~left_out.mask]
            info = SessionInfo(
                created=_now(),
                source=_portable(particles.source, path),
                source_kind=particles.kind,
                source_copy=copy,
                source_bytes=_size(particles.source),
                source_hash=_hash(particles.source),
                where=where,
                n=len(kept),
                n_channels=particles.images.n_channels,
                preprocess=config,
                plan={
                    name: _json_number(value) for name, value in _PLAN.dump_python(plan, mode="json").items()
                },
                notes=(*particles.notes, *left_out.notes),
            )
            session = cls(folder, info)
            session._write_table(kept.table, at=path)
            made.record(session.cache_key, len(kept))
            write_text(folder / "session.json", info.model_dump_json(indent=1) + "\n")
            if os.name == "nt":  # a folder with an open file in it cannot be renamed there
                alive.close()
            _put_in_place(folder, path, overwrite)
        finally:
            alive.close()
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Session:
        """Open a session folder; nothing but `session.json` is read until it is asked for."""
        path = Path(path).absolute()
        try:
            found = json.loads((path / "session.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path} is not a session: there is no session.json in it; make one with `import`"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path / 'session.json'}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path / 'session.json'} is damaged: {error}") from error
        _check_version(found, path / "session.json")
        try:
            return cls(path, SessionInfo.model_validate(found))
        except ValidationError as error:
            raise UserError(_first_problem(path / "session.json", error)) from error

    @staticmethod
    def is_session(path: Path) -> bool:
        """Whether `path` is a session folder."""
        return (Path(path) / "session.json").is_file()

    # ------------------------------------------------------------------ what is in it

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def n_particles(self) -> int:
        """Rows of the table, images of the cache."""
        return self.info.n

    @functools.cached_property
    def plan(self) -> preprocess.Plan:
        """How the cached images were made of the originals."""
        try:
            unknown = {name: math.nan for name in _UNKNOWN if self.info.plan.get(name) is None}
            return _PLAN.validate_python(self.info.plan | unknown)
        except ValidationError as error:
            raise UserError(_first_problem(self.path / "session.json", error)) from error

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """N rows indexed by uid (uint64); stack paths are absolute."""
        table = _read_parquet(self.path / "particles.parquet")
        if len(table) != self.info.n:
            raise UserError(
                f"{self.path / 'particles.parquet'} has {len(table)} rows, not the session's {self.info.n}"
            )
        table["stack_path"] = _absolute(table["stack_path"], self.path)
        return table

    @property
    def uid(self) -> NDArray[np.uint64]:
        """`(N,)` in the order of the rows."""
        return self.table.index.to_numpy(np.uint64)

    @functools.cached_property
    def images(self) -> CachedImages:
        """The cached images, `(N, c, m, m)`, read when indexed."""
        if not self.has_images:
            raise UserError(
                f"the image cache of {self.path} is missing or stale; `prepare_images` makes it again"
            )
        return CachedImages(self.path / "images.npy")

    @property
    def has_images(self) -> bool:
        """Whether the image cache is there and was made by the session's preprocessing."""
        try:
            found = json.loads((self.path / "images.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(found.get("key") == self.cache_key) and (self.path / "images.npy").is_file()

    @property
    def cache_key(self) -> str:
        """Hash of all that decides the cached pixels."""
        text = json.dumps([self.info.plan, self.info.n, self.info.n_channels], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def prepare_images(
        self, progress: ProgressCallback | None = None, stop: threading.Event | None = None
    ) -> None:
        """Make the image cache where it is missing or stale, from the originals."""
        if self.has_images and self._is_cache_sound(progress, stop):
            return
        with self._writing():
            self._build_images(self.originals(), self.table, progress, stop)
        self.__dict__.pop("images", None)

    def _is_cache_sound(self, progress: ProgressCallback | None, stop: threading.Event | None) -> bool:
        """Whether the cache still has the hash it was made with; read only where it was touched since."""
        path, record = self.path / "images.npy", _read_json(self.path / "images.json")
        wanted, stamp = record.get("blake2b", ""), _stamp(path)
        if not wanted or record.get("stamp") == stamp:
            return True
        digest, size, done = hashlib.blake2b(digest_size=16), path.stat().st_size, 0
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                if stop is not None and stop.is_set():
                    raise Stopped("stopped while the prepared images were checked")
                digest.update(block)
                done += len(block)
                if progress is not None:
                    progress("checking the prepared images", min(1.0, done / size))
        if digest.hexdigest() != wanted:
            return False
        with contextlib.suppress(UserError):  # a session that may only be read is checked each time
            _write_json(self.path / "images.json", {**record, "stamp": stamp})
        return True

    def originals(self) -> ImageStack:
        """The original full-size images, in the order of the rows."""
        return reading.open_stacks(self.table)

    def ctf(self, rows: Rows) -> NDArray[np.float32] | None:
        """`(k, m, m // 2 + 1)` effective CTF of the cached images of these rows, or None without CTF."""
        return preprocess.effective_ctf(self.table.iloc[rows], self.plan)

    @property
    def source_path(self) -> Path | None:
        """The verbatim copy of the star or cs file, or None for bare stacks and layers."""
        return self.path / "source" / self.info.source_copy if self.info.source_copy else None

    @property
    def group_file(self) -> Path | None:
        """The `.csg` that lists the cs file, as it was, where there is one."""
        return None if self.source_path is None else cs_writing.group_file_of(self.source_path)

    @property
    def original_source(self) -> Path:
        """Where the source lay when it was opened."""
        return Path(_absolute(pd.Series([self.info.source]), self.path).iloc[0])

    def data_spec(self) -> DataSpec:
        """What a model must know of the cached images."""
        return DataSpec(
            box_px=self.plan.cached_box_px,
            n_channels=self.info.n_channels,
            diameter_px=self.plan.diameter_px,
            n_particles=self.info.n,
        )

    def rows_where(self, where: str, selection: str = "") -> Rows:
        """The rows that `COLUMN OP VALUE [and …]` takes, of a named selection; all for empty texts."""
        rows = np.flatnonzero(where_mask(self.table, where)) if where else np.arange(self.info.n)
        if selection:
            rows = np.intersect1d(rows, np.flatnonzero(self.selection(selection)))
        if rows.size == 0:
            asked = (f"--where {where!r}" if where else "", f"--selection {selection!r}" if selection else "")
            raise UserError(f"no particle of {self.path} is left by {' and '.join(filter(None, asked))}")
        return rows

    def join_table(self, extra: pd.DataFrame) -> None:
        """Add the columns of a table for good, see `join`."""
        with self._writing():
            self._write_table(join(self.table, extra), at=self.path)
        self.__dict__.pop("table", None)

    # ------------------------------------------------------------------ runs

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        folder = self.path / "runs"
        found = sorted(folder.iterdir()) if folder.is_dir() else []
        return [Run(self, path) for path in found if (path / "config.json").is_file()]

    def run(self, name: str) -> Run:
        """The run of this name; its number alone will do."""
        for run in self.runs():
            if run.name == name or (name.isdigit() and run.number == int(name)):
                return run
        names = ", ".join(run.name for run in self.runs()) or "none"
        raise UserError(f"{self.path} has no run {name}; there are: {names}")

    def new_run(self, config: RunConfig) -> Run:
        """Make the folder `runs/NNNN-kind` of a run that is yet to be fitted."""
        self.rows_where(config.where, config.selection)  # a mistyped subset is found now, not in a worker
        path = self._new_folder("runs", config.model.kind)
        write_text(path / "config.json", config.model_dump_json(indent=1) + "\n")
        return Run(self, path)

    def newest_finished_run(self) -> Run | None:
        """The newest run that has latents."""
        finished = [run for run in self.runs() if run.is_encoded]
        return finished[-1] if finished else None

    def new_job(self, kind: str) -> Path:
        """A folder `jobs/NNNN-kind` for the status and log of a background job."""
        return self._new_folder("jobs", kind)

    def jobs(self) -> list[Path]:
        """Folders of background jobs that are not fits, oldest first."""
        folder = self.path / "jobs"
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    # ------------------------------------------------------------------ selections and classes

    def selections(self) -> list[str]:
        """Names of the saved selections."""
        return _stems(self.path / "selections")

    def save_selection(
        self, name: str, mask: Mask, how: str = "", colour: str = "", *, aside: bool = True
    ) -> None:
        """Keep which particles `(N,)` are selected, and how they were chosen.

        A set of that name is put aside first (`bring_back_selection`), unless `aside` is off.
        """
        if mask.shape != (self.info.n,):
            raise ValueError(f"mask of {mask.shape} for {self.info.n} particles")
        folder = self.path / "selections"
        with self._writing():
            there = (folder / f"{_checked(name)}.json").is_file()
            colour = colour or (str(self.selection_record(name).get("colour", "")) if there else "")
            if there and aside:
                self._put_selection_aside(name)
            table = pd.DataFrame(index=pd.Index(self.uid[mask], name="uid"))
            _write_parquet(table, folder / f"{name}.parquet")
            record = {"how": how, "n": int(mask.sum()), "made": _now()}
            _write_json(folder / f"{name}.json", record | ({"colour": colour} if colour else {}))

    def selection_record(self, name: str) -> dict[str, Any]:
        """How a selection was chosen: how, n, made, and its colour (RRGGBB) where it was given one."""
        return _read_json(self.path / "selections" / f"{_checked(name)}.json")

    def colour_selection(self, name: str, colour: str) -> None:
        """Give a selection another colour, RRGGBB."""
        with self._writing():
            path = self.path / "selections" / f"{_checked(name)}.json"
            _write_json(path, self.selection_record(name) | {"colour": colour})

    def rename_selection(self, name: str, new: str) -> None:
        """Give a selection another name, which must be free."""
        folder = self.path / "selections"
        with self._writing():
            if (folder / f"{_checked(new)}.json").exists():
                raise UserError(f"there is a set {new!r} already; choose another name")
            for suffix in (".parquet", ".json"):  # the record last: it announces the rest
                (folder / f"{_checked(name)}{suffix}").rename(folder / f"{new}{suffix}")

    def remove_selection(self, name: str) -> None:
        """Put a selection aside, into `selections/removed/`; `bring_back_selection` undoes it."""
        self.selection_record(name)  # a wrong name is said before anything moves
        with self._writing():
            self._put_selection_aside(name)

    def removed_selections(self) -> list[tuple[str, str]]:
        """Name, and name of the files, of what was put aside, the latest last."""
        folder = self.path / "selections" / "removed"
        found = [(path.stem.partition(" ")[2], path.stem) for path in folder.glob("*.json")]
        return sorted(found, key=lambda each: each[1])

    def bring_back_selection(self) -> str:
        """Bring back what was put aside last, under its name or NAME-2 …; returns the name."""
        folder = self.path / "selections"
        with self._writing():
            removed = self.removed_selections()
            if not removed:
                raise UserError(f"no set of {self.path} was removed")
            name, stem = removed[-1]
            used = _unused(folder, name)
            for suffix in (".parquet", ".json"):
                (folder / "removed" / f"{stem}{suffix}").rename(folder / f"{used}{suffix}")
        return used

    def _put_selection_aside(self, name: str) -> None:
        folder = self.path / "selections"
        (folder / "removed").mkdir(exist_ok=True)
        numbers = [int(stem.partition(" ")[0]) for _, stem in self.removed_selections()]
        stem = f"{max(numbers, default=0) + 1:04d} {name}"
        for suffix in (".json", ".parquet"):
            (folder / f"{name}{suffix}").rename(folder / "removed" / f"{stem}{suffix}")

    def selection(self, name: str) -> Mask:
        """`(N,)` bool."""
        path = self.path / "selections" / f"{_checked(name)}.parquet"
        if not path.is_file():
            there = ", ".join(self.selections()) or "none"
            raise UserError(f"{self.path} has no selection {name!r}; there are: {there}")
        return np.asarray(self.table.index.isin(_read_parquet(path).index))

    def class_sets(self) -> list[str]:
        """Names of the saved sets of averages."""
        return _stems(self.path / "classes")

    def newest_classes(self) -> str:
        """The set of averages that was made last, or an empty text."""
        folder = self.path / "classes"
        names = self.class_sets()
        return max(
            names, key=lambda name: str(_read_json(folder / f"{name}.json").get("made", "")), default=""
        )

    def save_classes(
        self, name: str, averages: Sequence[ClassAverage], labels: Sequence[str], how: Mapping[str, Any]
    ) -> str:
        """Keep averages of one box size, their members and quality; returns the name used (NAME, NAME-2, …).

        The averages of images with several channels lie in the .mrcs channel by channel.
        """
        folder = self.path / "classes"
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
        pixel_size_A = float(averages[0].pixel_size_A)
        record = {
            "how": dict(how),
            "made": _now(),
            "pixel_size_A": _json_number(pixel_size_A),
            "n_channels": 1 if images.ndim == 3 else images.shape[1],
            "classes": [_class_record(*each) for each in zip(averages, labels, strict=True)],
        }
        with self._writing():
            used = _unused(folder, _checked(name))
            mrc.write_stack(folder / f"{used}.mrcs", images.reshape(-1, *images.shape[-2:]), pixel_size_A)
            _write_parquet(members, folder / f"{used}.parquet")
            _write_json(folder / f"{used}.json", record)  # last: it announces the rest
        return used

    def classes(self, name: str) -> StoredClasses:
        """A saved set of averages."""
        folder = self.path / "classes"
        if not (folder / f"{_checked(name)}.json").is_file():
            there = ", ".join(self.class_sets()) or "none"
            raise UserError(f"{self.path} has no class averages {name!r}; there are: {there}")
        record = _read_json(folder / f"{name}.json")
        k, c, size = len(record["classes"]), record["n_channels"], record["pixel_size_A"]
        images = mrc.MrcFile(folder / f"{name}.mrcs").read(np.arange(k * c))
        return StoredClasses(
            name=name,
            images=images.reshape(k, *((c,) if c > 1 else ()), *images.shape[-2:]),
            pixel_size_A=math.nan if size is None else size,
            classes=record["classes"],
            members=_read_parquet(folder / f"{name}.parquet"),
            how=record["how"],
        )

    def mark_classes(self, name: str, marks: Sequence[str]) -> None:
        """Keep how averages were judged: "good", "bad" or "", one for each.

        `marks` is read once the lock is held, so of several writers of one list the last writes the newest.
        """
        path = self.path / "classes" / f"{_checked(name)}.json"
        with self._writing():
            record = _read_json(path)
            for one, mark in zip(record["classes"], list(marks), strict=True):
                one["mark"] = mark
            _write_json(path, record)

    # ------------------------------------------------------------------ inside

    def _writing(self) -> Any:
        """The one writer lock of the session, held for the moment of a write."""
        return locked(self.path / ".lock")

    def _new_folder(self, group: str, kind: str) -> Path:
        parent = self.path / group
        with self._writing():
            try:
                parent.mkdir(exist_ok=True)
                taken = [int(path.name[:4]) for path in parent.iterdir() if path.name[:4].isdigit()]
                path = parent / f"{max(taken, default=0) + 1:04d}-{kind}"
                path.mkdir()
            except OSError as error:
                raise UserError(f"cannot write into {parent}: {error.strerror}") from error
        return path

    def _write_table(self, table: pd.DataFrame, at: Path) -> None:
        """Write the table; `at` is where the session will lie, which stack paths are made relative to."""
        table = table.copy()
        for name in table.columns:
            if table[name].dtype == object:
                table[name] = table[name].astype(str)
        paths = table["stack_path"].astype(str)
        table["stack_path"] = paths.map({path: _portable(Path(path), at) for path in paths.unique()})
        _write_parquet(table, self.path / "particles.parquet")

    def _build_images(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        progress: ProgressCallback | None,
        stop: threading.Event | None,
    ) -> None:
        """Make the cache of a session whose rows are settled; a bad image among them is an error by now."""
        cache = _Cache(self.path / "images.npy", self.plan, self.info.n_channels)
        config = self.info.preprocess.model_copy(update={"bad_images": "stop", "outlier_sd": 0.0})
        cache.build(images, table, config, progress, stop, _inputs_key(table, self.plan, config))
        cache.record(self.cache_key, self.info.n)


def requirements(particles: Particles, config: PreprocessConfig) -> list[str]:
    """What preparing and training will take, one fact a line; a few images are prepared to time it."""
    n = len(particles)
    try:
        plan = preprocess.plan(particles.table, config, guessed_sign(particles, config))
    except UserError as error:
        return [f"cannot be prepared as it is: {error}"]
    n_bytes = 2 * n * particles.images.n_channels * plan.cached_box_px**2
    rows = np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int))
    rows = rows[particles.images.box_px[rows] == particles.images.box_px[rows[0]]]
    start = time.perf_counter()
    images = particles.images.read(rows)
    good = ~preprocess.bad_images(images)
    preprocess.apply(images[good], particles.table.iloc[rows[good]], plan)
    seconds = (time.perf_counter() - start) / len(rows) * n
    fit = first_estimate(n, plan.cached_box_px)
    return [
        f"prepared in {plan.cached_box_px} px: {_in_words(n_bytes)} on disk and, where free, in memory while "
        f"training; about {_time_in_words(seconds)} to prepare and {_time_in_words(fit)} for a class map"
    ]


def first_estimate(n: int, cached_box_px: int) -> float:
    """Seconds that a class map will take before any was fitted here: rough, by images and pixels."""
    cores = max(1, min(os.cpu_count() or 1, 16))
    return 15 + n * (cached_box_px / 40) ** 2 * 0.006 / cores


def _in_words(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{max(1, round(n_bytes / 2**20))} MiB"


def _time_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class LeftOut(NamedTuple):
    """Rows that are not taken into a session, and why."""

    mask: Mask
    """`(N,)`"""
    notes: tuple[str, ...]


class _Cache:
    """`images.npy` in the making. Rows are known to be good only when all have been read."""

    def __init__(self, path: Path, plan: preprocess.Plan, n_channels: int) -> None:
        self.path = path
        self.plan = plan
        self.image_shape = (n_channels, plan.cached_box_px, plan.cached_box_px)
        self._hash = ""
        self._digest = hashlib.blake2b(digest_size=16)
        self.unfinished = path.with_name(".images-unfinished.npy")
        self.journal = path.with_name(".images-unfinished.jsonl")

    def build(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        config: PreprocessConfig,
        progress: ProgressCallback | None,
        stop: threading.Event | None,
        key: str = "",
    ) -> LeftOut:
        """Prepare all images, write those that are good, and say which are not.

        With a `key` of all that decides the pixels, a preparation of the same key that was stopped or killed
        is gone on with.
        """
        n = len(table)
        bad, statistics = np.zeros(n, bool), np.full((n, 2), np.nan)
        with replacing(self.path) as temporary:
            temporary.unlink()  # its name is used at the end; until then a killed process leaves `unfinished`
            try:
                with self._opened(bad, statistics, key) as (file, journal, begun):
                    found = bad, statistics
                    self._prepare(images, table, config, file, journal, begun, found, progress, stop)
                    left_out = _left_out(table, bad, statistics, config)
                    if left_out.mask.all():
                        raise UserError(f"none of the {n} images can be used: {left_out.notes[0]}")
                    self._finish(file, ~left_out.mask)
                self.unfinished.replace(temporary)
            except BaseException as error:
                if not (isinstance(error, Stopped) and self.is_unfinished):
                    self.forget()
                raise
        self.forget()
        return left_out

    @property
    def is_unfinished(self) -> bool:
        """Whether an earlier preparation ended early and left something to go on with."""
        try:
            return self.journal.is_file() and self.unfinished.stat().st_size > CACHE_HEADER_BYTES
        except FileNotFoundError:
            return False

    def forget(self) -> None:
        """Remove what an earlier preparation has left."""
        self.journal.unlink(missing_ok=True)
        self.unfinished.unlink(missing_ok=True)

    def take_over(self, folder: Path, key: str) -> None:
        """Move what a dead process has prepared in `folder` here, if it was for the same images."""
        left = _Cache(folder / self.path.name, self.plan, self.image_shape[0])
        if key and not self.journal.is_file() and left.is_unfinished and left._key() == key:
            left.unfinished.replace(self.unfinished)
            left.journal.replace(self.journal)

    def _key(self) -> str:
        with contextlib.suppress(OSError, ValueError, AttributeError), self.journal.open("rb") as file:
            return str(json.loads(file.readline()).get("key", ""))
        return ""

    @contextlib.contextmanager
    def _opened(
        self, bad: Mask, statistics: NDArray[np.float64], key: str
    ) -> Iterator[tuple[BinaryIO, BinaryIO | None, int]]:
        """The unfinished file at the first row to prepare, its journal (None without `key`), and that row.

        The journal has a line for every block that was written; blocks whose checksum is wrong and all after
        them are prepared again.
        """
        self._digest = hashlib.blake2b(_cache_header(len(bad), self.image_shape), digest_size=16)
        if not (key and self.is_unfinished and self._key() == key):
            self.forget()
        with self.unfinished.open("a+b"):
            pass
        with self.unfinished.open("r+b") as file, contextlib.ExitStack() as stack:
            if not key:
                file.write(bytes(CACHE_HEADER_BYTES))
                yield file, None, 0
                return
            journal = stack.enter_context(self.journal.open("a+b"))
            journal.seek(0)
            head = journal.readline() or json.dumps({"key": key}).encode() + b"\n"
            begun, end = 0, len(head)
            file.seek(CACHE_HEADER_BYTES)
            for line in journal:
                rows = self._rows_of(line, file, begun, bad, statistics)
                if not rows:
                    break
                begun, end = begun + rows, end + len(line)
            if not begun:
                journal.truncate(0)
                journal.write(head)
                file.truncate(0)
                file.write(bytes(CACHE_HEADER_BYTES))
            journal.truncate(end)
            file.seek(CACHE_HEADER_BYTES + begun * 2 * math.prod(self.image_shape))
            file.truncate()
            yield file, journal, begun

    def _rows_of(
        self, line: bytes, file: BinaryIO, begun: int, bad: Mask, statistics: NDArray[np.float64]
    ) -> int:
        """The rows that a line of the journal stands for, 0 where it or its block in `file` is damaged."""
        try:
            entry = json.loads(line)
            rows, crc, broken, numbers = (entry[name] for name in ("rows", "crc32", "bad", "statistics"))
            if not 0 < rows <= len(bad) - begun:
                return 0
            found = file.read(rows * 2 * math.prod(self.image_shape))
            if zlib.crc32(found) != crc or len(found) != rows * 2 * math.prod(self.image_shape):
                return 0
            bad[begun : begun + rows] = np.isin(np.arange(rows), broken)
            if numbers:
                statistics[begun : begun + rows] = numbers
        except (ValueError, KeyError, TypeError):
            return 0
        self._digest.update(found)
        return int(rows)

    def _prepare(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        config: PreprocessConfig,
        file: BinaryIO,
        journal: BinaryIO | None,
        begun: int,
        found: tuple[Mask, NDArray[np.float64]],
        progress: ProgressCallback | None,
        stop: threading.Event | None,
    ) -> None:
        """Prepare and write the rows from `begun` on, and enter each block into the journal."""
        n, done = len(table), begun
        bad, statistics = found
        for block in _preprocessed(images, table, self.plan, self.image_shape, config.bad_images, begun):
            if stop is not None and stop.is_set():
                kept = f"{done} of {n} are kept, and the same again goes on from there"
                raise Stopped(
                    "stopped before all images were prepared; "
                    + (kept if journal is not None and done else "nothing was kept")
                )
            rows = slice(done, done + len(block.images))
            data = block.images.reshape(-1).view(np.uint8).data
            file.write(data)
            self._digest.update(data)
            bad[rows], statistics[rows] = block.bad, block.statistics
            done = rows.stop
            if journal is not None:
                file.flush()
                numbers = block.statistics.tolist() if config.outlier_sd else []
                entry = {
                    "rows": len(block.images),
                    "crc32": zlib.crc32(data),
                    "bad": np.flatnonzero(block.bad).tolist(),
                    "statistics": numbers,
                }
                journal.write(json.dumps(entry).encode() + b"\n")
                journal.flush()
            if progress is not None:
                progress("preparing images", done / n)

    def record(self, key: str, n: int) -> None:
        """Write `images.json`, by which the cache counts as whole."""
        shape = (n, *self.image_shape)
        content = {"key": key, "shape": shape, "dtype": "float16", "blake2b": self._hash}
        _write_json(self.path.with_suffix(".json"), {**content, "stamp": _stamp(self.path)})

    def _finish(self, file: BinaryIO, good: Mask) -> None:
        """Close the gaps that bad images leave, write the header, and take the hash on the way."""
        n_bytes = 2 * math.prod(self.image_shape)
        header = _cache_header(int(good.sum()), self.image_shape)
        if good.all():  # as it was written, and its hash taken on the way
            file.seek(0)
            file.write(header)
            self._hash = self._digest.hexdigest()
            return
        digest = hashlib.blake2b(header, digest_size=16)
        per_block = max(1, BLOCK_BYTES // n_bytes)
        written = 0
        for start in range(0, len(good), per_block):
            rows = good[start : start + per_block]
            file.seek(CACHE_HEADER_BYTES + start * n_bytes)
            block = np.frombuffer(file.read(len(rows) * n_bytes), np.uint8).reshape(len(rows), n_bytes)
            kept = block[rows].tobytes()
            digest.update(kept)
            if written != start or not rows.all():
                file.seek(CACHE_HEADER_BYTES + written * n_bytes)
                file.write(kept)
            written += int(rows.sum())
        file.truncate(CACHE_HEADER_BYTES + written * n_bytes)
        file.seek(0)
        file.write(header)
        self._hash = digest.hexdigest()


def _cache_header(n: int, image_shape: tuple[int, ...]) -> bytes:
    """The first bytes of `images.npy`."""
    header = io.BytesIO()
    shape = (n, *image_shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    assert header.tell() == CACHE_HEADER_BYTES
    return header.getvalue()


def _inputs_key(table: pd.DataFrame, plan: preprocess.Plan, config: PreprocessConfig) -> str:
    """Hash of all that decides what is prepared, the times of the image files included; "" for images of no
    file, which may be others the next time."""
    codes, paths = pd.factorize(table["stack_path"])
    try:
        stamps = [[path, *_stamp(Path(path))] for path in paths if path]
    except OSError:
        return ""
    if len(stamps) < len(paths):
        return ""
    chosen = [config.bad_images, config.outlier_sd > 0, BLOCK_BYTES, __version__]
    text = json.dumps([_PLAN.dump_python(plan, mode="json"), chosen, stamps], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(codes.astype("<i8").tobytes())
    for name in ("stack_index", "box_px", "pixel_size_A", *preprocess.CTF_COLUMNS):
        if name in table:
            digest.update(name.encode() + table[name].to_numpy("<f8").tobytes())
    digest.update(",".join(table["ctf_state"]).encode())
    return digest.hexdigest()


def _left_out(
    table: pd.DataFrame, bad: Mask, statistics: NDArray[np.float64], config: PreprocessConfig
) -> LeftOut:
    notes = []
    if bad.any():
        notes.append(f"{_rows_in_words(table, bad)} blank or broken and left out")
    far = np.zeros(len(bad), bool)
    if config.outlier_sd:
        far = preprocess.outliers(np.where(bad[:, None], np.nan, statistics), config.outlier_sd) & ~bad
        if far.any():
            what = f"more than {config.outlier_sd:g} SD from the others in mean or contrast, and left out"
            notes.append(f"{_rows_in_words(table, far)} {what}")
    return LeftOut(bad | far, tuple(notes))


def _rows_in_words(table: pd.DataFrame, mask: Mask) -> str:
    """`3 images (rows 4, 17 and 80000 of the file) are`"""
    rows = [str(row + 1) for row in table["source_row"].to_numpy()[mask][:10]]
    n = int(mask.sum())
    if n == 1:
        return f"1 image (row {rows[0]} of the file) is"
    return f"{n} images (rows {', '.join(rows)}{' …' if n > len(rows) else ''} of the file) are"


@dataclass(frozen=True)
class Run:
    """One fit of one model in a session: a folder."""

    session: Session
    path: Path

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open `SESSION/runs/NAME`."""
        path = Path(path).absolute()
        if not (path / "config.json").is_file() or path.parent.name != "runs":
            raise UserError(f"{path} is not a run: give SESSION/runs/NAME")
        return cls(Session.open(path.parent.parent), path)

    @property
    def name(self) -> str:
        """NNNN-kind"""
        return self.path.name

    @property
    def number(self) -> int:
        """The number in the name."""
        return int(self.name.partition("-")[0])

    @functools.cached_property
    def config(self) -> RunConfig:
        """Everything needed to repeat the run."""
        path = self.path / "config.json"
        found = _read_json(path)
        _check_version(found, path)
        try:
            return RunConfig.model_validate(found)
        except ValidationError as error:
            raise UserError(_first_problem(path, error)) from error

    @property
    def status(self) -> Status:
        """What the run says of itself, checked against its process."""
        return read_status(self.path)

    @property
    def state(self) -> str:
        """new, running, finished, failed, stopped or interrupted"""
        return self.status.state

    @property
    def is_encoded(self) -> bool:
        """Whether latents were written."""
        return (self.path / "latents.parquet").is_file()

    @property
    def has_weights(self) -> bool:
        """Whether there is a model to load."""
        return (self.path / "model.safetensors").is_file()

    @property
    def can_resume(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return (self.path / "resume.pt").is_file()

    def latents(self) -> Latents | None:
        """Coordinates and poses of all rows of the session, or None before they are written."""
        return Latents.from_table(_read_parquet(self.path / "latents.parquet")) if self.is_encoded else None

    def save_latents(self, latents: Latents) -> None:
        """Write `latents.parquet`."""
        latents.write(self.path / "latents.parquet")

    def columns(self) -> list[str]:
        """Names of the results in `columns/`, oldest first."""
        folder = self.path / "columns"
        return sorted(
            _stems(folder), key=lambda name: (_read_json(folder / f"{name}.json").get("made", ""), name)
        )

    def column(self, name: str) -> pd.DataFrame:
        """One result, indexed by uid."""
        path = self.path / "columns" / f"{_checked(name)}.parquet"
        if not path.is_file():
            there = ", ".join(self.columns()) or "none"
            raise UserError(f"run {self.name} has no column {name!r}; there are: {there}")
        return _read_parquet(path)

    def column_record(self, name: str) -> dict[str, Any]:
        """The config and time of one result."""
        return _read_json(self.path / "columns" / f"{_checked(name)}.json")

    def newest_column(self, kind: str) -> str | None:
        """The newest result whose name starts with `kind`, e.g. "cluster"."""
        found = [name for name in self.columns() if name.startswith(kind)]
        return found[-1] if found else None

    def features(self, uid: pd.Index | None = None) -> pd.DataFrame:
        """Latents and all results side by side, in the order of `uid` (default: the session's).

        A result whose column is there already is shown as `RESULT COLUMN` (`pose-held angle_deg`).
        """
        index = self.session.table.index if uid is None else uid
        latents = self.latents()
        tables = [] if latents is None else [latents.table.reindex(index)]
        taken = set(tables[0].columns) if tables else set()
        for name in self.columns():
            table = self.column(name).reindex(index)
            table = table.rename(columns={old: f"{name} {old}" for old in table.columns if old in taken})
            taken |= set(table.columns)
            tables.append(table)
        return pd.concat(tables, axis=1) if tables else pd.DataFrame(index=index)

    def write_column(
        self, name: str, table: pd.DataFrame, config: Mapping[str, Any], *, replace: bool = False
    ) -> str:
        """Keep a per-particle result, indexed by uid, in `columns/`; returns the name used.

        A second result of one NAME becomes NAME-2 (or replaces the first with `replace`). Columns called
        NAME or NAME_… follow the name used, so that results keep apart.
        """
        folder = self.path / "columns"
        with self.session._writing():
            used = _checked(name) if replace else _unused(folder, _checked(name))
            pattern = re.compile(rf"{re.escape(name)}(?=$|_)")
            table = table.rename(columns={old: pattern.sub(used, str(old), count=1) for old in table.columns})
            _write_parquet(table, folder / f"{used}.parquet")
            _write_json(folder / f"{used}.json", {"config": dict(config), "made": _now()})
        return used

    def metrics(self) -> pd.DataFrame:
        """One row per log step: epoch, step, seconds, images_per_second, learning_rate, loss and its terms.

        The file is only ever appended to; what an interrupted process wrote beyond the checkpoint that was
        resumed from is passed over here.
        """
        path = self.path / "metrics.csv"
        if not path.is_file():
            return pd.DataFrame()
        lines = path.read_text(encoding="utf-8").splitlines()
        n_fields = lines[0].count(",")
        whole = [line for line in lines if line.count(",") == n_fields and line]
        table = pd.read_csv(io.StringIO("\n".join(whole)))
        step = table["step"].to_numpy()
        later = np.append(np.minimum.accumulate(step[::-1])[::-1][1:], np.inf)
        return table[step < later].reset_index(drop=True)

    def gauge(self) -> dict[str, Any] | None:
        """The content of `gauge.json`, or None where nothing is held still."""
        path = self.path / "gauge.json"
        return _read_json(path) if path.is_file() else None

    def save_gauge(self, gauge: Mapping[str, Any]) -> None:
        """Write `gauge.json`."""
        _write_json(self.path / "gauge.json", dict(gauge))


def kept_classes(marks: Sequence[str]) -> NDArray[np.bool_]:
    """`(k,)` averages to go on with: those marked good; where none is, those that are not marked bad."""
    given = np.asarray(marks, dtype=str)
    return given == "good" if (given == "good").any() else given != "bad"


def _class_record(average: ClassAverage, label: str) -> dict[str, Any]:
    return {
        "label": str(label),
        "n": average.n,
        "n_effective": float(average.n_effective),
        "frc": [_json_number(value) for value in np.asarray(average.frc, float).round(5).tolist()],
        "frc_label": average.frc_label,
        "halves_independent": average.halves_independent,
        "ssnr": [_json_number(value) for value in np.asarray(average.ssnr, float).round(5).tolist()],
        "ssnr_radius_A": _json_number(float(average.ssnr_radius_A)),
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
        "believable_radius_A": _json_number(float(radius)),
    }


def guessed_sign(particles: Particles, config: PreprocessConfig) -> int:
    """What a look at the images says of the contrast (+1 bright, -1 dark, 0 unsure); 0 where it need not."""
    if config.contrast != "auto" or (particles.table["contrast_sign"] != 0).any():
        return 0
    return look_at_contrast(particles)[0].sign


def default_path(source: Path) -> Path:
    """Where the session of a source goes unless told: beside it, or in the working directory if that is
    read-only."""
    source = Path(source).absolute()
    parent = source.parent if os.access(source.parent, os.W_OK) else Path.cwd()
    return parent / f"{source.stem}_explorer"


def join(table: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    """`table` with the columns of `extra`, matched by `uid` (column or index), else by the order of rows."""
    if "uid" in extra.columns:
        extra = extra.set_index(extra["uid"].astype(np.uint64)).drop(columns="uid")
    by_uid = extra.index.name == "uid"
    clash = [str(name) for name in extra.columns if name in table.columns]
    if clash:
        raise UserError(
            f"the table has columns that the particles have already: {', '.join(clash)}; rename them"
        )
    if by_uid:
        if extra.index.has_duplicates:
            raise UserError(f"the table names uid {extra.index[extra.index.duplicated()][0]} twice")
        extra = extra.reindex(table.index)
        if len(extra.columns) and extra.isna().all(axis=None):
            raise UserError("none of the table's uids is one of the particles")
    elif len(extra) != len(table):
        raise UserError(
            f"the table has {len(extra)} rows and no uid column, but there are {len(table)} particles"
        )
    else:
        extra = extra.set_index(table.index)
    return pd.concat([table, extra], axis=1)


def read_table(path: Path, n: int) -> pd.DataFrame:
    """A table to `join` to `n` particles: .csv, .tsv, .parquet, .npy or .npz.

    Arrays of two dimensions become columns NAME_0, NAME_1, …; of an .npz, the arrays with `n` rows are taken.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".csv", ".tsv"):
            return pd.read_csv(path, sep="," if suffix == ".csv" else "\t")
        if suffix == ".parquet":
            return pd.read_parquet(path)
        if suffix not in (".npy", ".npz"):
            raise UserError(f"{path} is no table; give a .csv, .tsv, .parquet, .npy or .npz file")
        found = np.load(path, allow_pickle=False)
        arrays = {path.stem: found} if suffix == ".npy" else dict(found)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table: {str(error).splitlines()[0]}") from error
    columns: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        if array.dtype.names and array.ndim == 1:
            columns |= {field: array[field] for field in array.dtype.names}
        elif array.ndim == 2 and (len(array) == n or suffix == ".npy"):
            columns |= {f"{name}_{i}": array[:, i] for i in range(array.shape[1])}
        elif array.ndim == 1 and (len(array) == n or suffix == ".npy"):
            columns[name] = array
    if not columns:
        raise UserError(f"{path} holds no array with one row for each of the {n} particles")
    return pd.DataFrame(columns)


# ---------------------------------------------------------------------- preprocessing in blocks


class _Block(NamedTuple):
    images: NDArray[np.float16]
    """`(k, c, m, m)`; zeros where `bad`"""
    bad: Mask
    statistics: NDArray[np.float64]
    """`(k, 2)` mean and standard deviation of the originals"""


def _preprocessed(
    images: ImageStack,
    table: pd.DataFrame,
    plan: preprocess.Plan,
    shape: tuple[int, ...],
    bad_images: str = "stop",
    begun: int = 0,
) -> Iterator[_Block]:
    """Blocks in the order of the rows from `begun` on, two of them worked on ahead of the one taken."""
    box_px = np.asarray(images.box_px)
    per_block = max(1, BLOCK_BYTES // (4 * shape[0] * int(box_px.max()) ** 2))
    starts = iter(range(begun, len(table), per_block))

    def work(start: int) -> _Block:
        rows = np.arange(start, min(start + per_block, len(table)))
        block = _Block(
            np.zeros((len(rows), *shape), np.float16), np.zeros(len(rows), bool), np.zeros((len(rows), 2))
        )
        for box in np.unique(box_px[rows]):  # an image stack is read one box size at a time
            at = np.flatnonzero(box_px[rows] == box)
            originals = images.read(rows[at])
            leave_out = bad_images == "leave-out"
            if leave_out and (bad := preprocess.bad_images(originals)).any():
                block.bad[at[bad]] = True
                at, originals = at[~bad], originals[~bad]
            if not len(at):
                continue
            block.statistics[at] = _statistics(originals)
            some = preprocess.apply(originals, table.iloc[rows[at]], plan, known_good=leave_out)
            _check_range(some, table.iloc[rows[at]])
            block.images[at] = some
        return block

    with ThreadPoolExecutor(2) as pool:
        ahead: deque[Future[_Block]] = deque()
        try:
            for start in starts:
                ahead.append(pool.submit(work, start))
                if len(ahead) == 3:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _statistics(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(k, 2)` mean and standard deviation of every image, of every third line of a large one."""
    some = images[..., :: 3 if images.shape[-1] > 64 else 1, :].reshape(len(images), -1)
    mean = some.mean(axis=1)
    centred = some - mean[:, None]
    square = np.einsum("kp,kp->k", centred, centred) / some.shape[1]
    return np.stack([mean, np.sqrt(square)], axis=1).astype(np.float64)


def _check_range(images: NDArray[np.float32], table: pd.DataFrame) -> None:
    bad = np.flatnonzero(np.abs(images).max(axis=(1, 2, 3)) > np.finfo(np.float16).max)
    if bad.size:
        row = table.iloc[bad[0]]
        raise UserError(
            f"image {int(row['stack_index']) + 1} of {row['stack_path'] or 'the layer'} has grey values too"
            " large for the cache (float16); use --preprocess.background ring"
        )


# ---------------------------------------------------------------------- folders and small files


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if Session.is_session(path):
        if not overwrite:
            raise UserError(
                f"{path} is a session already; choose another --session, or --overwrite to replace it"
            )
    elif not path.is_dir() or any(path.iterdir()):
        raise UserError(f"{path} exists and is not a session; choose another --session")


def _put_in_place(folder: Path, path: Path, overwrite: bool) -> None:
    _check_free(path, overwrite)
    if Session.is_session(path):
        number = 1
        while (aside := path.with_name(f"{path.name}-replaced-{number}")).exists():
            number += 1
        path.rename(aside)
    elif path.exists():
        path.rmdir()
    folder.rename(path)
    sync_folder(path.parent)


def _clean_up_after_dead(path: Path, folder: Path, made: _Cache, key: str) -> None:
    """Remove what stopped or killed imports to `path` have left, but first take over the images that this
    one, in `folder`, would prepare as well. Imports that live hold their lock and are left alone."""
    pattern = re.compile(rf"\.{re.escape(path.name)}-[a-z0-9_]{{8}}\.part")
    for left in path.parent.iterdir():
        if left == folder or not pattern.fullmatch(left.name) or not (left / ".lock").is_file():
            continue
        with contextlib.suppress(UserError, OSError):
            with locked(left / ".lock", wait_s=0):
                made.take_over(left, key)
                if os.name != "nt":
                    shutil.rmtree(left, ignore_errors=True)
            shutil.rmtree(left, ignore_errors=True)


def _check_uids(particles: Particles) -> None:
    index = particles.table.index
    if index.has_duplicates:
        uid = index[index.duplicated()][0]
        rows = np.flatnonzero(index == uid)[:2] + 1
        raise UserError(f"{particles.source} names particle {uid} twice, in rows {rows[0]} and {rows[1]}")


def _keep_source(particles: Particles, folder: Path, path: Path, progress: ProgressCallback | None) -> str:
    """Copy the source file into the session being made in `folder`; returns its name there."""
    if particles.kind == "layer":
        _keep_layer(particles, folder, path, progress)
        return ""
    if particles.kind not in ("star", "cs"):
        return ""
    (folder / "source").mkdir()
    for path in [particles.source, *_belonging(particles)]:
        shutil.copyfile(path, folder / "source" / path.name)
    return particles.source.name


def _belonging(particles: Particles) -> list[Path]:
    """What lies beside a cs file and is part of it: its passthrough file and its result group."""
    if particles.kind != "cs":
        return []
    found = (cryosparc.passthrough_of(particles.source), cs_writing.group_file_of(particles.source))
    return [path for path in found if path is not None]


def _keep_layer(particles: Particles, folder: Path, path: Path, progress: ProgressCallback | None) -> None:
    """Save the images of a layer, which has no file, and point the table at them."""
    stack, table = particles.images, particles.table
    n, c, box = len(table), stack.n_channels, int(np.asarray(stack.box_px)[0])
    (folder / "source").mkdir()
    with replacing(folder / "source" / "source.npy") as temporary, temporary.open("wb") as file:
        shape = (n, box, box) if c == 1 else (n, box, box, c)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        per_block = max(1, BLOCK_BYTES // (4 * c * box * box))
        for start in range(0, n, per_block):
            images = stack.read(np.arange(start, min(start + per_block, n)))
            file.write(np.ascontiguousarray(np.moveaxis(images, 1, -1), "<f4").tobytes())
            if progress is not None:
                progress("saving the layer", min(1.0, (start + per_block) / n))
    table["stack_path"] = str(path / "source" / "source.npy")
    table["stack_index"] = np.arange(n)


def _portable(target: Path, session: Path) -> str:
    """Relative to the session where `target` lies in it or beside it, so that they can move together."""
    target = Path(target)
    if not target.is_absolute() or not target.is_relative_to(session.parent):
        return str(target)
    return Path(os.path.relpath(target, session)).as_posix()


def _absolute(paths: pd.Series, session: Path) -> pd.Series:
    resolved = {path: os.path.normpath(session / path) for path in paths.unique()}
    return paths.map(resolved)


def _unused(folder: Path, name: str) -> str:
    used, number = name, 1
    while any((folder / f"{used}{suffix}").exists() for suffix in (".json", ".parquet")):
        number += 1
        used = f"{name}-{number}"
    return used


def _stems(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot be a name; use letters, digits, space and . _ + - only")
    return name


def _write_parquet(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, compression="zstd")


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def _check_version(found: Any, path: Path) -> None:
    version = found.get("format_version") if isinstance(found, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} is damaged: it has no format version")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}; install a newer"
        )


def _first_problem(path: Path, error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{path} is damaged: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _json_number(value: Any) -> Any:
    """`value`, but None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stamp(path: Path) -> list[int]:
    """Size and time of a file: as long as both stay, its content is taken to be the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _hash(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(2**20) + str(_size(path)).encode(), digest_size=16).hexdigest()


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

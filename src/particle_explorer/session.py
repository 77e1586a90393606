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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import ValidationError

from particle_explorer import __version__, preprocess
from particle_explorer.cache import BLOCK_BYTES, PLAN, Cache, CachedImages, ProgressCallback, inputs_key
from particle_explorer.class_sets import ClassSets
from particle_explorer.configs import Config, DataSpec, PreprocessConfig, RunConfig
from particle_explorer.files import (
    Stopped,
    UserError,
    locked,
    read_json,
    read_parquet,
    replacing,
    stamp_of,
    sync_folder,
    umask,
    write_json,
    write_parquet,
    write_text,
)
from particle_explorer.io import cryosparc, cs_writing, reading
from particle_explorer.io.inspecting import guessed_sign
from particle_explorer.io.tables import join
from particle_explorer.latents import Latents
from particle_explorer.particles import ImageStack, Particles, where_mask
from particle_explorer.records import LOCK, checked, json_number, names_in, now, unused
from particle_explorer.resampling import Scale, common_scale
from particle_explorer.selections import Selections
from particle_explorer.status import Status, read_status

FORMAT_VERSION = 1

Mask = NDArray[np.bool_]
Rows = NDArray[np.intp]

_UNKNOWN = ("pixel_size_A", "cached_pixel_size_A")
"""Numbers of a plan that may be NaN, for which JSON has no word"""


class SessionInfo(Config):
    """What `session.json` holds."""

    format_version: int = FORMAT_VERSION
    version: str = __version__
    """Version of the package that made the session."""
    created: str = ""
    made_at: str = ""
    """Where the session lay when it was made: stacks that did not move with it are looked for from there"""
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
        key = inputs_key(particles.table, plan, config)
        particles = replace(particles, table=preprocess.with_pixel_size(particles.table, config))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent))
        except OSError as error:
            raise UserError(f"cannot write into {path.parent}: {error.strerror}") from error
        alive, keep = contextlib.ExitStack(), False
        made = Cache(folder / "images.npy", plan, particles.images.n_channels)
        try:
            folder.chmod(0o777 & ~umask())
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
                created=now(),
                made_at=str(path),
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
                    name: json_number(value) for name, value in PLAN.dump_python(plan, mode="json").items()
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
            return PLAN.validate_python(self.info.plan | unknown)
        except ValidationError as error:
            raise UserError(_first_problem(self.path / "session.json", error)) from error

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """N rows indexed by uid (uint64); stack paths are absolute."""
        table = read_parquet(self.path / "particles.parquet")
        if len(table) != self.info.n:
            raise UserError(
                f"{self.path / 'particles.parquet'} has {len(table)} rows, not the session's {self.info.n}"
            )
        table["stack_path"] = _absolute(table["stack_path"], self.path, self.info.made_at)
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
        path, record = self.path / "images.npy", read_json(self.path / "images.json")
        wanted, stamp = record.get("blake2b", ""), stamp_of(path)
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
            write_json(self.path / "images.json", {**record, "stamp": stamp})
        return True

    @functools.cached_property
    def scale(self) -> Scale | None:
        """What images that show different fields are brought to; None where they show one."""
        return common_scale(self.table["box_px"].to_numpy(), self.table["pixel_size_A"].to_numpy(np.float64))

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
        return Path(_absolute(pd.Series([self.info.source]), self.path, self.info.made_at).iloc[0])

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
            rows = np.intersect1d(rows, np.flatnonzero(self.selections.mask(selection)))
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
        try:
            write_text(path / "config.json", config.model_dump_json(indent=1) + "\n")
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
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

    @property
    def selections(self) -> Selections:
        """Named sets of its particles."""
        return Selections(self.path / "selections", lambda: self.uid)

    def mask_of(self, selection: str) -> Mask:
        """`(N,)` bool of a named selection; of all particles for the empty name."""
        return self.selections.mask(selection) if selection else np.ones(self.info.n, bool)

    @property
    def classes(self) -> ClassSets:
        """Sets of averages of its particles."""
        return ClassSets(self.path / "classes")

    # ------------------------------------------------------------------ inside

    def _writing(self) -> Any:
        """The one writer lock of the session, held for the moment of a write."""
        return locked(self.path / LOCK)

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
        write_parquet(table, self.path / "particles.parquet")

    def _build_images(
        self,
        images: ImageStack,
        table: pd.DataFrame,
        progress: ProgressCallback | None,
        stop: threading.Event | None,
    ) -> None:
        """Make the cache of a session whose rows are settled; a bad image among them is an error by now."""
        cache = Cache(self.path / "images.npy", self.plan, self.info.n_channels)
        config = self.info.preprocess.model_copy(update={"bad_images": "stop", "outlier_sd": 0.0})
        cache.build(images, table, config, progress, stop, inputs_key(table, self.plan, config))
        cache.record(self.cache_key, self.info.n)


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
        """The number in the name; 0 where somebody gave the folder another name."""
        number = self.name.partition("-")[0]
        return int(number) if number.isdecimal() else 0

    @functools.cached_property
    def config(self) -> RunConfig:
        """Everything needed to repeat the run."""
        path = self.path / "config.json"
        found = read_json(path)
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
        return Latents.from_table(read_parquet(self.path / "latents.parquet")) if self.is_encoded else None

    def save_latents(self, latents: Latents) -> None:
        """Write `latents.parquet`."""
        latents.write(self.path / "latents.parquet")

    def columns(self) -> list[str]:
        """Names of the results in `columns/`, oldest first."""
        folder = self.path / "columns"
        made: dict[str, str] = {}
        for name in names_in(folder):
            try:
                made[name] = str(read_json(folder / f"{name}.json").get("made", ""))
            except UserError:
                if (folder / f"{name}.json").exists():
                    raise  # damaged, and not taken away meanwhile
        return sorted(made, key=lambda name: (made[name], name))

    def column(self, name: str) -> pd.DataFrame:
        """One result, indexed by uid."""
        path = self.path / "columns" / f"{checked(name)}.parquet"
        if not path.is_file():
            there = ", ".join(self.columns()) or "none"
            raise UserError(f"run {self.name} has no column {name!r}; there are: {there}")
        return read_parquet(path)

    def column_record(self, name: str) -> dict[str, Any]:
        """The config and time of one result."""
        return read_json(self.path / "columns" / f"{checked(name)}.json")

    def group_colours(self, name: str) -> dict[str, str]:
        """Colours chosen for groups of a result, as {group: hexadecimal}; {} for columns of the file."""
        if name not in self.columns():
            return {}
        found = self.column_record(name).get("colours", {})
        return {str(group): str(colour) for group, colour in found.items()}

    def colour_group(self, name: str, group: str, colour: str) -> None:
        """Keep the colour of one group of a result."""
        with self.session._writing():
            record = self.column_record(name)
            record["colours"] = {**record.get("colours", {}), group: colour}
            write_json(self.path / "columns" / f"{checked(name)}.json", record)

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
            used = checked(name) if replace else unused(folder, checked(name))
            pattern = re.compile(rf"{re.escape(name)}(?=$|_)")
            table = table.rename(columns={old: pattern.sub(used, str(old), count=1) for old in table.columns})
            write_parquet(table, folder / f"{used}.parquet")
            write_json(folder / f"{used}.json", {"config": dict(config), "made": now()})
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
        return read_json(path) if path.is_file() else None

    def save_gauge(self, gauge: Mapping[str, Any]) -> None:
        """Write `gauge.json`."""
        write_json(self.path / "gauge.json", dict(gauge))


def default_path(source: Path) -> Path:
    """Where the session of a source goes unless told: beside it, or in the working directory if that is
    read-only."""
    source = Path(source).absolute()
    parent = source.parent if os.access(source.parent, os.W_OK) else Path.cwd()
    return parent / f"{source.stem}_explorer"


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


def _clean_up_after_dead(path: Path, folder: Path, made: Cache, key: str) -> None:
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
        try:
            shutil.copyfile(path, folder / "source" / path.name)
        except OSError as error:
            raise UserError(f"cannot copy {path} into the session: {error.strerror}") from error
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


def _absolute(paths: pd.Series, session: Path, made_at: str) -> pd.Series:
    """Paths from the session, or from where it was made, if it was moved and they were not."""

    def resolved(path: str) -> str:
        here, before = (os.path.normpath(Path(at) / path) for at in (session, made_at or session))
        return before if here != before and not os.path.exists(here) and os.path.exists(before) else here

    return paths.map({path: resolved(path) for path in paths.unique()})


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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _hash(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.blake2b(file.read(2**20) + str(_size(path)).encode(), digest_size=16).hexdigest()

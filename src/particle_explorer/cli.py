"""The command line: one small class per command.

Its fields are the options, read by pydantic-settings, so a default, a bound or a help text is declared once,
in `configs` or here. What comes out (the path of a run, of a file) goes to standard output; the tale of how
it fared to standard error. Exit status: 0; 2 for bad input, with one sentence; 1 for a fault of ours.

Everything heavy is imported inside the function that needs it: `--help` and bad input answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.exceptions import SettingsError

from particle_explorer.configs import (
    AccuracyConfig,
    AverageConfig,
    AveragesConfig,
    ClassMapConfig,
    ClusterConfig,
    Config,
    EmbedConfig,
    ModelConfig,
    PreprocessConfig,
    RefineConfig,
    SimulateConfig,
    SpeedConfig,
    TrainConfig,
    TraverseConfig,
    describe,
)
from particle_explorer.files import Stopped, UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from particle_explorer.averaging import Members
    from particle_explorer.latents import Latents
    from particle_explorer.session import Run, Session
    from particle_explorer.status import StatusWriter
    from particle_explorer.team import Team

T = TypeVar("T")

PROGRAM = "particle-explorer"

PoseSource = Literal["run", "held", "refined", "file"]


class Command(Config):
    """One command; `execute` does it."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """The texts of the options are read when help is asked for: they are many, and the start is short."""

    def execute(self) -> None:
        """Do it, or raise `UserError`."""
        raise NotImplementedError


class JobCommand(Command):
    """A command that may take long and can be followed."""

    status: str = ""
    """Folder to report to (status.json; a file named stop ends the job in good order). With it the job also
    stands back for other programs: lowest priority, one core left free."""

    @contextlib.contextmanager
    def job(self, what: str) -> Iterator[Job]:
        """Report this block as a job that does `what`."""
        from particle_explorer.status import StatusWriter

        folders = [Path(self.status)] if self.status else []
        with StatusWriter(*folders) as writer, _interrupts_stop(writer.stop):
            job = Job(writer)
            job.tell(what)
            yield job
            job.end_line()


class Job:
    """What a running command says: to the terminal, and to the folder it reports to."""

    def __init__(self, writer: StatusWriter) -> None:
        self.writer = writer
        self.stop = writer.stop
        self._what = ""
        self._said_at = 0.0
        self._open_line = False

    def tell(self, what: str, fraction: float = 0.0) -> None:
        """`what` is being done, and this share of it is done."""
        self.writer.update(what=what, fraction=fraction)
        self.line(what, f"{what} {fraction:.0%}" if fraction else what)

    def line(self, key: str, text: str) -> None:
        """Say `text` on standard error: again and again in one line of a terminal, else now and then."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if key == self._what and now - self._said_at < (0.2 if terminal else 5.0):
            return
        if terminal:
            end = "\n" if self._open_line and key != self._what else ""
            print(f"{end}\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
            self._open_line = True
        else:
            print(text, file=sys.stderr, flush=True)
        self._what, self._said_at = key, now

    def end_line(self) -> None:
        """Leave the line of the terminal that was written again and again."""
        if self._open_line:
            print(file=sys.stderr)
            self._open_line = False

    def note(self, text: str) -> None:
        """Something to know that stays on the screen."""
        self.end_line()
        print(text, file=sys.stderr, flush=True)

    def finish(self, what: str, steps: Iterator[tuple[float, T | None]]) -> T:
        """Go through `steps`, telling how much is done, to the result that comes with the last of them."""
        result: T | None = None
        for fraction, found in steps:
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
            self.tell(what, fraction)
            result = found
        assert result is not None
        return result

    def tell_share(self, what: str) -> Callable[[float], None]:
        """A function that is told how much of `what` is done, and ends the job when it is to stop."""

        def tell(fraction: float) -> None:
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
            self.tell(what, fraction)

        return tell

    def wait(self, work: Callable[[], T]) -> T:
        """`work()` in a thread, so that a job also stops while a library computes and says nothing."""
        done: list[T] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                done.append(work())
            except BaseException as error:  # raised again by the thread that waits
                failed.append(error)

        thread = threading.Thread(target=body, name="job", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            if self.stop.is_set():
                raise Stopped("stopped; nothing was written")
        if failed:
            raise failed[0]
        return done[0]

    def result(self, text: object) -> None:
        """What came out."""
        self.end_line()
        self.writer.update(message=str(text))
        print(text, flush=True)


# ---------------------------------------------------------------------- looking and importing


class Inspect(JobCommand):
    """Say what is in a particle file (box, pixel size, CTF, contrast, poses) and what it will take."""

    stack: CliPositionalArg[Path]
    """A .star, .cs, .mrcs, .mrc, .hdf, .spi, .hed, .tif, .npy, .npz or .zarr file, or a folder of pictures"""
    project_dir: str = ""
    """Where the stack names of a star or cs file start from, if they cannot be found otherwise"""

    full: bool = False
    """Read every image too, and list those that are blank, broken or twice there"""

    def execute(self) -> None:
        """Print the summary."""
        from particle_explorer.io.checking import scan
        from particle_explorer.io.inspecting import summarise
        from particle_explorer.io.reading import read
        from particle_explorer.session import requirements

        particles = read(self.stack, project_dir=_path(self.project_dir))
        if not self.full:
            for line in [*summarise(particles).lines(), *requirements(particles, PreprocessConfig())]:
                print(line)
            return
        with self.job("reading every image") as job:
            found = job.finish("reading every image", scan(particles))
            job.result("\n".join(found.lines()))


class Import(JobCommand):
    """Make a session of a particle file: its table, the file itself and the images prepared for models."""

    stack: CliPositionalArg[list[Path]]
    """A .star, .cs, .mrcs, .mrc, .hdf, .spi, .hed, .tif, .npy, .npz or .zarr file, or a folder of pictures;
    several .star files are joined into NAME_joined.star beside the session"""
    session: str = ""
    """Folder of the session; by default NAME_explorer beside the file, or in the working directory where that
    is read-only"""
    preprocess: PreprocessConfig = PreprocessConfig()
    where: str = ""
    """Take only these particles: COLUMN OP VALUE [and ...], e.g. "rlnClassNumber == 3" """
    sample: int = Field(0, ge=0)
    """Take at most this many of them, at random; 0 takes all"""
    sample_by: str = ""
    """With --sample: as many of each value of this column, e.g. class_id"""
    table: str = ""
    """A .csv, .tsv, .parquet, .npy or .npz file with more columns, by `uid` or in the particles' order"""
    project_dir: str = ""
    """Where the stack names of a star or cs file start from, if they cannot be found otherwise"""
    overwrite: bool = False
    """Replace a session of that name; the old one is kept beside it as NAME-replaced-1"""

    def execute(self) -> None:
        """Make the session and print its path."""
        from dataclasses import replace

        from particle_explorer.io.joining import joined
        from particle_explorer.io.reading import read
        from particle_explorer.particles import random_subset, where_mask
        from particle_explorer.session import Session, default_path, join, read_table

        with contextlib.ExitStack() as stack:
            job = stack.enter_context(self.job("reading"))
            source = self.stack[0]
            joining: list[str] = []
            several = len(self.stack) > 1
            named = source.with_name(f"{source.stem}_joined.star") if several else source
            target = _path(self.session) or default_path(named)
            if several:
                out = target.absolute().with_name(named.name)
                source, joining = stack.enter_context(joined(self.stack, out, _path(self.project_dir)))
            particles = read(source, project_dir=_path(self.project_dir))
            particles = replace(particles, notes=(*joining, *particles.notes))
            for note in particles.notes:
                job.note(note)
            if self.table:
                extra = read_table(Path(self.table), len(particles))
                particles = replace(particles, table=join(particles.table, extra))
            if self.sample:
                particles = particles[where_mask(particles.table, self.where)]
                rows = random_subset(particles.table, self.sample, self.sample_by)
                note = f"{len(rows)} of {len(particles)} particles were taken at random"
                particles = replace(particles[rows], notes=(*particles.notes, note))
            session = Session.create(
                target,
                particles,
                self.preprocess,
                where=self.where,
                overwrite=self.overwrite,
                progress=job.tell,
                stop=job.stop,
            )
            for reason in [*session.info.notes[len(particles.notes) :], *session.plan.reasons]:
                job.note(reason)
            job.result(session.path)


# ---------------------------------------------------------------------- fitting


class Train(JobCommand):
    """Fit a model to a session and write the latent coordinates and poses of all its particles."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    model: ModelConfig = ClassMapConfig()
    train: TrainConfig = TrainConfig()
    where: str = ""
    """Fit only these particles: COLUMN OP VALUE [and ...]; all are encoded at the end"""
    selection: str = ""
    """Fit only the particles of this named selection; all are encoded at the end"""
    parent: str = ""
    """Name of the run whose map the selection was made on, to be remembered with the new run"""
    device: str = "auto"
    """auto (the GPU with most free memory, else the CPU), cpu, mps or cuda:N"""
    resume: str = ""
    """Go on with this run (its name or number) from its last checkpoint, with its own settings"""

    def execute(self) -> None:
        """Fit, and print the path of the run."""
        from particle_explorer.session import Session

        session = Session.open(self.session)

        from particle_explorer.team import joined, started_by_torchrun
        from particle_explorer.training import help_fit

        with contextlib.ExitStack() as stack:
            team = stack.enter_context(joined(self.device)) if started_by_torchrun() else None
            if team is None or team.leads:
                run = self._run(session, team.size if team else self.train.devices)
            if team is not None:
                run = session.run(Path(team.tell(run.name if team.leads else "")).name)
                if not team.leads:
                    help_fit(run, team, resume=bool(self.resume))
                    return
            self._fit(session, run, team)

    def _run(self, session: Session, n_devices: int) -> Run:
        """The run that is gone on with, or a new one."""
        from particle_explorer import __version__
        from particle_explorer.configs import RunConfig

        if self.resume:
            return session.run(Path(self.resume).name)
        return session.new_run(
            RunConfig(
                model=self.model,
                train=self.train.model_copy(update={"devices": n_devices}),
                data=session.data_spec(),
                where=self.where,
                selection=self.selection,
                parent=self.parent,
                device=self.device,
                version=__version__,
            )
        )

    def _fit(self, session: Session, run: Run, team: Team | None) -> None:
        from particle_explorer.status import StatusWriter
        from particle_explorer.training import fit

        print(run.path, flush=True)
        stop = threading.Event()
        job = Job(StatusWriter())  # `fit` reports to the folders; this one only talks
        with _interrupts_stop(stop):
            for progress in fit(
                run,
                stop,
                resume=bool(self.resume),
                status_folders=(Path(self.status),) if self.status else (),
                background=bool(self.status),
                team=team,
            ):
                job.line(f"{progress.what} {progress.epoch}", _progress_text(progress))
        job.end_line()
        if stop.is_set():
            job.note(f"stopped; {PROGRAM} train {session.path} --resume {run.name} goes on")


class Encode(JobCommand):
    """Write the latent coordinates and poses that a run's model gives of its session or of another stack."""

    run: CliPositionalArg[Path]
    """Folder of the run, SESSION/runs/NAME; or of a session, for its newest finished run"""
    stack: str = ""
    """Encode this particle file instead, prepared as the session was"""
    out: str = ""
    """With --stack: the .parquet file to write, by default STACK_latents.parquet in the run's folder"""
    project_dir: str = ""
    """Where the stack names of a star or cs file start from, if they cannot be found otherwise"""
    overwrite: bool = False
    """Replace the file of --out"""
    device: str = "auto"
    """auto, cpu, mps or cuda:N"""

    def execute(self) -> None:
        """Encode, and print the path of the table."""
        from particle_explorer.training import choose_device, encode, encode_stack, load_model, stand_back

        with self.job("loading the model") as job:
            run = _open_run(self.run, needs="weights")
            device = choose_device(self.device)
            if self.status:
                stand_back()
            model = load_model(run, device)
            precision = run.config.train.precision
            if not self.stack:
                run.session.prepare_images(job.tell, job.stop)
                latents = job.finish("encoding", encode(model, run.session, precision=precision))
                run.save_latents(latents)
                job.result(run.path / "latents.parquet")
                return
            from particle_explorer.io.reading import read

            particles = read(Path(self.stack), project_dir=_path(self.project_dir))
            out = _path(self.out) or run.path / f"{Path(self.stack).stem}_latents.parquet"
            coded = encode_stack(model, run.session, particles, precision=precision)
            latents = job.finish("encoding", coded)
            latents.write(out, overwrite=self.overwrite)
            job.result(out)


class PoseMap(JobCommand):
    """Write how probable every angle and shift of some particles is, as images: rows and columns are shifts,
    one image for each angle that the model weighs (TARGET-VAE: 0° and on)."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    rows: str = "0"
    """Rows of the session's particles, counted from 0, separated by commas"""
    out: Path
    """The .mrcs file to write: all angles of the first particle, then of the next"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def execute(self) -> None:
        """Weigh, and print the path of the stack."""
        from particle_explorer.io.mrc import write_stack
        from particle_explorer.training import load_model, pose_posterior

        with self.job("weighing poses") as job:
            run = _open_run(self.run, needs="weights")
            rows = [round(value) for value in _numbers(self.rows, "--rows")]
            run.session.prepare_images(job.tell, job.stop)
            q = pose_posterior(load_model(run), run, rows)
            size = run.session.plan.cached_pixel_size_A
            write_stack(self.out, q.reshape(-1, *q.shape[2:]), size, overwrite=self.overwrite)
            job.note(f"{q.shape[1]} images for each particle, at angles {360 / q.shape[1]:g}° apart")
            job.result(self.out)


class ImportLatents(JobCommand):
    """Take coordinates that another program found as a run, to be explored like our own."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    file: CliPositionalArg[Path]
    """A .npy, .npz, .csv, .tsv, .parquet, .star or .cs file; rows are joined by uid, in a star file by image
    name, else by order"""
    columns: str = ""
    """Columns or fields that are the coordinates, parted by commas; by default z_0, z_1 ..., else all that
    hold numbers"""

    def execute(self) -> None:
        """Import, and print the path of the run."""
        from particle_explorer.coordinates import import_latents
        from particle_explorer.session import Session

        with self.job("importing coordinates") as job:
            run, notes = import_latents(Session.open(self.session), self.file, self.columns)
            for note in notes:
                job.note(note)
            job.result(run.path)


# ---------------------------------------------------------------------- exploring


class Embed(EmbedConfig, JobCommand):
    """Lay the particles of a run out in two dimensions; a result to colour and select by."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""

    def execute(self) -> None:
        """Embed, and print the name of the result."""
        import pandas as pd

        from particle_explorer.latents import embed

        with self.job(f"{self.method} of the latent coordinates") as job:
            run = _open_run(self.run)
            latents = _latents(run)
            tell = job.tell_share(f"{self.method} of the latent coordinates")
            xy = job.wait(lambda: embed(latents.z, self, tell))
            index = pd.Index(latents.uid, name="uid")
            table = pd.DataFrame({f"{self.method}_{i}": xy[:, i] for i in range(2)}, index=index)
            job.result(run.write_column(self.method, table, _settings(self, EmbedConfig)))


class Cluster(ClusterConfig, JobCommand):
    """Group the particles of a run by their latent coordinates; a result to average and export by."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    on: str = ""
    """Group the places in this layout, such as umap, instead of the latent coordinates"""

    def execute(self) -> None:
        """Cluster, and print the name of the result."""
        import pandas as pd

        from particle_explorer.latents import cluster

        with self.job("clustering the latent coordinates") as job:
            run = _open_run(self.run)
            latents = _latents(run)
            name = f"cluster-{self.method}"
            found: dict[str, Any] = {}
            z = _coordinates(run, self.on) if self.on else latents.z
            tell = job.tell_share("clustering")
            number = job.wait(lambda: cluster(z, self, tell, found))
            table = pd.DataFrame({name: number}, index=pd.Index(latents.uid, name="uid"))
            if "bic" in found:
                job.note(f"least BIC with {found['n_clusters']} Gaussians")
            job.result(
                run.write_column(name, table, {**_settings(self, ClusterConfig), "on": self.on, **found})
            )


class Regroup(JobCommand):
    """Merge, split or name the groups of a clustering; the result is a clustering beside it."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """The clustering; by default the newest"""
    merge: str = ""
    """Numbers of groups to make one, as 1,2"""
    split: int = Field(0, ge=0)
    """Number of a group to split by k-means"""
    n_parts: int = Field(2, ge=2, le=100)
    """With --split: into how many"""
    names: str = ""
    """Names of groups, as "1=open, 2=closed"; the clustering is then one of names"""

    def execute(self) -> None:
        """Make the new clustering, and print its name."""
        import numpy as np

        from particle_explorer.latents import merged, split

        if bool(self.merge) + bool(self.split) + bool(self.names) != 1:
            raise UserError("say what to do by one of --merge 1,2, --split 3 and --names '1=open, 2=closed'")
        with self.job("regrouping") as job:
            run = _open_run(self.run)
            latents = _latents(run)
            by = self.by or run.newest_column("cluster") or ""
            if by not in run.columns():
                there = ", ".join(name for name in run.columns() if name.startswith("cluster"))
                raise UserError(f"run {run.name} has no clustering {by!r}; there are: {there or 'none'}")
            column = run.column(by).reindex(latents.uid).iloc[:, 0]
            numbers, known = _grouped(column, by)
            label = np.where(numbers < 0, 0, numbers + (known is not None))
            names = {} if known is None else {i + 1: name for i, name in enumerate(known)}
            if self.merge:
                wanted = _whole_numbers(self.merge, "--merge")
                label = merged(label, wanted)
                names = {}
            elif self.split:
                label = split(label, self.split, latents.z, self.n_parts)
                names = {}
            else:
                names |= _named(self.names, label)
            table = _named_groups(label, names, latents.uid)
            how = {"of": by, "merge": self.merge, "split": self.split, "names": self.names}
            job.result(run.write_column("cluster-named" if names else "cluster-regrouped", table, how))


class HoldStill(JobCommand):
    """Turn and shift the map so that one part of the particle stays where it is; poses follow."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    auto: bool = False
    """Hold the most rigid part: the disc whose content changes least along the map"""
    disc_yxr_px: str = ""
    """Hold the disc Y,X,R: centre from the corner of the decoded image, and radius, in its pixels"""
    mask: str = ""
    """Hold the part where this image (.npy or .mrc, in the box of the decoded image) is not 0"""
    at: str = ""
    """The position on the map, as 0.2,-0.5, on whose picture the part was drawn; by default its middle"""
    undo: bool = False
    """Go back to what was held before, or to nothing"""

    def execute(self) -> None:
        """Fit the gauge, and print the path of the poses."""
        from particle_explorer.gauge import hold_still, undo

        if (self.auto + bool(self.disc_yxr_px) + bool(self.mask) + self.undo) != 1:
            raise UserError(
                "say what to hold still by one of --auto, --disc-yxr-px Y,X,R and --mask FILE, or --undo"
            )
        if self.undo:
            with self.job("going back") as job:
                run = _open_run(self.run)
                job.result("nothing" if undo(run) is None else run.path / "columns" / "pose-held.parquet")
            return
        with self.job("holding a part still") as job:
            run = _open_run(self.run)
            _latents(run)
            gauge = hold_still(
                run,
                auto=self.auto,
                disc_yxr_px=_disc(self.disc_yxr_px) if self.disc_yxr_px else None,
                mask=_mask(Path(self.mask)) if self.mask else None,
                at=_numbers(self.at, "--at") if self.at else None,
            )
            job.note(f"frames were turned by up to {gauge.largest_turn_deg:.0f}°")
            job.result(run.path / "columns" / "pose-held.parquet")


class Traverse(TraverseConfig, JobCommand):
    """Walk through the map of a run: a stack of pictures, the same way averaged from particles, a film."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    start: str = ""
    """Uid of the particle where `straight` and `particles` begin; by default at one end of the map"""
    end: str = ""
    """Uid of the particle where they end"""
    positions: str = ""
    """With `curve`: a .npy file of positions (m, d) on the way"""
    held: bool = False
    """Show everything with a part held still (hold-still)"""
    out: str = ""
    """Begin the names of the files with this; by default SESSION/paths/NAME"""
    formats: str = "mrcs"
    """Files to write: mrcs, gif, mp4, png (a contact sheet), separated by commas"""
    pictures_per_second: float = Field(8.0, gt=0, le=60)
    """Speed of films"""
    overwrite: bool = False
    """Replace the files if they are there"""

    def execute(self) -> None:
        """Walk, and print the paths of the files."""
        import json

        import numpy as np

        from particle_explorer.files import write_text
        from particle_explorer.io.writing import export_averages
        from particle_explorer.training import Drawer
        from particle_explorer.traversals import members

        formats = _formats(self.formats)
        with self.job("loading the model") as job:
            run = _open_run(self.run, needs="weights")
            session, latents = run.session, _latents(run)
            positions = _positions(self, run, latents.z)
            out = _path(self.out) or _free_name(session.path / "paths", f"{run.name}-{self.along}", "mrcs")
            if formats & {"gif", "mp4", "png"} and positions.shape[0] > 400:
                raise UserError(f"{len(positions)} pictures are too many for a film; at most 400")
            drawer = Drawer(run)
            job.tell("drawing")
            at_once = 64
            parts = []
            for first in range(0, len(positions), at_once):
                z = positions[first : first + at_once].astype(np.float32)
                parts.append(drawer.draw(z, None, None, self.held))
                job.tell_share("drawing")(min(1.0, (first + at_once) / len(positions)))
            stacks = [np.concatenate(parts).mean(1)]
            label = members(latents.z, positions, self.n_each)
            counts = np.bincount(label[label >= 0], minlength=len(positions))
            angle, shift = _poses(run, self.held)
            if counts.any():
                stacks.append(_averages_of_cached(session, label, len(positions), angle, shift, job))
            pixel_size_A = session.plan.cached_pixel_size_A
            written = []
            for kind in sorted(formats):
                if kind == "mrcs":
                    for name, stack in zip(("", "-particles"), stacks, strict=False):
                        path = out.parent / f"{out.name}{name}.mrcs"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        export_averages(path, np.nan_to_num(stack), pixel_size_A, overwrite=self.overwrite)
                        written.append(path)
                else:
                    path = out.parent / f"{out.name}.{kind}"
                    _write_film(path, stacks, self.pictures_per_second, self.overwrite)
                    written.append(path)
            record = {
                "run": run.name,
                "config": _settings(self, TraverseConfig),
                "held": self.held,
                "positions": np.round(positions, 6).tolist(),
                "n_particles": counts.tolist(),
            }
            path = out.parent / f"{out.name}.json"
            if path.exists() and not self.overwrite:
                raise UserError(
                    f"{path} exists already; choose another name or allow overwriting (--overwrite)"
                )
            write_text(path, json.dumps(record, indent=1) + "\n")
            job.result("\n".join(map(str, written)))


class Film(JobCommand):
    """Make a film, or a contact sheet, of an image stack such as traverse writes."""

    stack: CliPositionalArg[Path]
    """An image stack (.mrcs)"""
    beside: str = ""
    """A second stack, shown beside the first"""
    out: str
    """The file to write; its ending says what: .gif, .mp4, .png (a contact sheet) or .mrcs"""
    pictures_per_second: float = Field(8.0, gt=0, le=60)
    """Speed of films"""
    overwrite: bool = False
    """Replace the file if it is there"""

    def execute(self) -> None:
        """Write, and print the path of the file."""
        import numpy as np

        from particle_explorer.io.mrc import MrcFile
        from particle_explorer.io.writing import export_averages

        out = Path(self.out).absolute()
        kind = out.suffix[1:].lower()
        _formats(kind or "none")
        with self.job("writing the film") as job:
            stacks = []
            for path in (self.stack, *([Path(self.beside)] if self.beside else [])):
                file = MrcFile(path)
                stacks.append(file.read(np.arange(file.n_images))[:, 0])
            if len({stack.shape for stack in stacks}) > 1:
                shapes = " and ".join(str(stack.shape) for stack in stacks)
                raise UserError(f"the stacks have shapes {shapes}; a film shows equal ones beside each other")
            if kind == "mrcs":
                export_averages(out, stacks[0], MrcFile(self.stack).pixel_size_A, overwrite=self.overwrite)
            else:
                job.wait(lambda: _write_film(out, stacks, self.pictures_per_second, self.overwrite))
            job.result(out)


class Average(JobCommand):
    """Average the original full-size images by class, aligned with the poses of a run."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """Column that gives the classes (a result such as cluster-kmeans, or a column of the file), `grid` for
    the cells of a grid over the map, or `near` for the particles nearest to --positions; by default the
    newest clustering"""
    selection: str = ""
    """Average only the particles of this named selection; without --by as one class"""
    cells: int = Field(6, ge=1, le=100)
    """With --by grid: cells along each of the first two dimensions of the map"""
    positions: str = ""
    """With --by near: a .npy file of positions (k, d), or the .json that `traverse` writes"""
    n_near: int = Field(50, ge=1, le=1_000_000)
    """With --by near: particles averaged at each position"""
    weights: Literal["hard", "distance", "posterior"] = "hard"
    """`hard` counts every member once; `distance` less the farther it lies from the middle of its average;
    `posterior` shares a particle between averages by the spread of its own position"""
    held: bool = False
    """Take the poses that hold a part still (hold-still) instead of the run's own; as --poses held"""
    poses: PoseSource = "run"
    """Whose poses move the images back: the run's, `held` with a part held still, `refined` by `refine`, or
    those that the file carried from RELION or cryoSPARC"""
    noise_control: bool = False
    """Also put noise through the same inference of poses and the same averaging: what the alignment alone
    puts into an average. Takes about as long again"""
    average: AverageConfig = AverageConfig()

    def execute(self) -> None:
        """Average, and print the path of the averages."""
        import numpy as np

        from particle_explorer.averaging import Members

        with self.job("averaging") as job:
            run = _open_run(self.run, needs="weights" if self.noise_control else "")
            session = run.session
            members, names, name, positions = _members(self, run)
            source = "held" if self.held else self.poses
            averages = _average(run, members, names, source, self.average, job)
            if self.noise_control:
                from particle_explorer.controls import noise_control
                from particle_explorer.training import stand_back

                if self.status:
                    stand_back()
                present = np.array([names.index(average.label) for average in averages])
                kept = np.isin(members.average, present)
                which = np.searchsorted(present, members.average[kept])
                same = Members(members.row[kept], which, members.weight[kept])
                averages = noise_control(run, same, averages, self.average, tell=job.tell, stop=job.stop)
            if positions is not None:  # a cell whose particles all count elsewhere has no average
                positions = positions[[names.index(average.label) for average in averages]]
            how = {
                "run": run.name,
                "by": name if not self.selection or self.by else "",
                "selection": self.selection,
                "held": source == "held",
                "poses": source,
                "weights": self.weights,
                "positions": None if positions is None else positions.round(6).tolist(),
                "config": self.average.model_dump(),
            }
            used = session.save_classes(name, averages, [average.label for average in averages], how)
            job.result(session.path / "classes" / f"{used}.mrcs")


class Refine(JobCommand):
    """Refine angle and shift of every particle against its class average, or against what the model draws."""

    run: CliPositionalArg[Path]
    """Folder of the run, or of a session for its newest finished run"""
    by: str = ""
    """Column that gives the classes; by default the newest clustering"""
    selection: str = ""
    """Refine only the particles of this named selection; without --by as one class"""
    against: Literal["averages", "decoded"] = "averages"
    """`averages`: of the class, each half against the other; `decoded`: the picture that the model draws at
    the particle's place on the map"""
    poses: PoseSource = "run"
    """Poses to start from, see `average --poses`"""
    refine: RefineConfig = RefineConfig()

    def execute(self) -> None:
        """Refine, say how far poses moved, and print the name of the result."""
        import numpy as np
        import pandas as pd

        from particle_explorer.refining import compare, refine

        with self.job("refining poses") as job:
            run = _open_run(self.run, needs="weights" if self.against == "decoded" else "")
            angle, shift = _poses_of(run, self.poses)
            if angle is None or shift is None:
                raise UserError(f"run {run.name} infers no poses; start from others with --poses file")
            references = None
            if self.against == "decoded":
                labels, references = _decoded_places(run, self.selection, self.poses == "held")
            else:
                labels, _, _ = _labels(run, self.by, self.selection)
            found = refine(
                run.session,
                labels,
                angle,
                shift,
                self.refine,
                references=references,
                progress=job.tell_share("refining poses"),
                stop=job.stop,
            )
            classes = np.where(np.isfinite(found.angle_deg), labels, -1)
            table = pd.DataFrame(
                {
                    "angle_deg": found.angle_deg,
                    "shift_y_px": found.shift_yx_px[:, 0],
                    "shift_x_px": found.shift_yx_px[:, 1],
                    "pose-refined_moved_deg": found.moved_deg,
                    "pose-refined_moved_px": found.moved_px,
                    "pose-refined_correlation": found.correlation,
                },
                index=run.session.table.index,
            )
            record = {
                "by": self.by,
                "selection": self.selection,
                "against": self.against,
                "poses": self.poses,
                "config": self.refine.model_dump(),
                "history": found.history,
            }
            for i, step in enumerate(found.history):
                job.note(
                    f"iteration {i + 1}: angles moved by {step['median_deg']:.2f}° (95 % within "
                    f"{step['p95_deg']:.1f}°), shifts by {step['median_px']:.2f} px "
                    f"({step['p95_px']:.1f}); correlation {step['correlation']:.3f}"
                )
            carried = {"angle_deg", "shift_y_px", "shift_x_px"} <= set(run.session.table.columns)
            if carried and self.poses != "file":
                their_angle, their_shift = _poses_of(run, "file")
                assert their_angle is not None and their_shift is not None
                try:
                    apart = compare(their_angle, their_shift, found.angle_deg, found.shift_yx_px, classes)
                except UserError:
                    apart = None
                if apart is not None:
                    record["from_the_file"] = apart._asdict()
                    job.note(
                        f"beside the poses of the file, frames joined class by class: angles "
                        f"{apart.median_deg:.1f}° apart, {apart.within_10_deg:.0%} within 10°, shifts "
                        f"{apart.median_px:.2f} px"
                    )
            job.result(run.write_column("pose-refined", table, record, replace=True))


def _decoded_places(run: Run, selection: str, held: bool) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest of at most 64 places of the map for every row, and what the model draws there."""
    import numpy as np
    from scipy.cluster.vq import kmeans2

    from particle_explorer.training import Drawer

    session = run.session
    mask = session.selection(selection) if selection else np.ones(session.n_particles, bool)
    table = _latents(run).table.reindex(session.table.index)
    z = table[[str(name) for name in table if re.fullmatch(r"z_\d+", str(name))]].to_numpy(float)
    rows = np.flatnonzero(mask & np.isfinite(z).all(1))
    if not len(rows):
        raise UserError("no particle has a position on the map")
    k = int(min(64, max(1, len(rows) // 20)))
    centres, place = kmeans2(z[rows], k, minit="++", seed=0, missing="warn")
    labels = np.full(len(z), -1, np.int64)
    labels[rows] = place
    pictures = Drawer(run).draw(centres.astype(np.float32), None, None, held)
    return labels, pictures.mean(1)


class Export(JobCommand):
    """Write particles for RELION or cryoSPARC: all their columns, with poses and classes of a run."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    out: str
    """The file to write. Its ending says what: .star for RELION, in the dialect of the source; .cs for
    cryoSPARC, with a .csg beside it; .csv, .tsv or .parquet for a table of classes, poses and latents; .txt
    for the rows of the source, counted from 0"""
    run: str = ""
    """Name or number of the run whose poses are written; by default the newest finished one"""
    selection: str = ""
    """Only the particles of this named selection"""
    classes: str = ""
    """Column that gives the class numbers; by default the newest clustering of the run, if there is one"""
    held: bool = False
    """Write the poses that hold a part still (hold-still) instead of the run's own; as --poses held"""
    poses: Literal["run", "held", "refined", "none"] = "run"
    """Whose poses are written: the run's, `held` with a part held still, `refined` by `refine`; `none` leaves
    those of the source as they are"""
    latents: bool = False
    """Also write the latent coordinates, as columns explorerZ0, explorerZ1 ... of a star file or fields
    explorer/z_0 ... of a cs file; tables have them anyway"""
    averages: str = ""
    """Also write the averages of these classes to this .mrcs file"""
    average: AverageConfig = AverageConfig()
    recentre: bool = False
    """Move rlnCoordinateX and Y to where the particles are, by whole pixels of the micrograph, to extract
    them again; what is left stays in the origins. For star files"""
    micrograph_pixel_size_A: float = Field(0.0, ge=0, le=1000)
    """With --recentre: pixel size of the micrographs (Å), where the file does not say it"""
    overwrite: bool = False
    """Replace the files if they are there; the source is never replaced"""

    def execute(self) -> None:
        """Export, and print the paths of the files."""
        import numpy as np

        from particle_explorer.exporting import TABLE_SUFFIXES, choose, export, latent_columns, recentred
        from particle_explorer.io.writing import export_averages
        from particle_explorer.membership import by_class
        from particle_explorer.session import Session

        with self.job("exporting") as job:
            session = Session.open(self.session)
            run = session.run(self.run) if self.run else session.newest_finished_run()
            mask = session.selection(self.selection) if self.selection else np.ones(session.n_particles, bool)
            if not mask.any():
                raise UserError(f"selection {self.selection!r} is empty; there is nothing to export")
            out = Path(self.out).absolute()
            files = [out, *([Path(self.averages).absolute()] if self.averages else [])]
            for path in files:
                _check_writable(path, session, self.overwrite)
            number = _class_numbers(session, run, self.classes)
            source: PoseSource | None = "held" if self.held else None if self.poses == "none" else self.poses
            angle, shift = (None, None)
            if run is not None and source is not None:
                angle, shift = _poses_of(run, source)
            if self.latents and run is None:
                raise UserError(f"{session.path} has no finished run yet, so there are no latents to write")
            with_latents = run is not None and (self.latents or out.suffix.lower() in TABLE_SUFFIXES)
            averages = None
            if self.averages:  # first, because they take long and can be stopped
                if number is None or run is None:
                    raise UserError("--averages needs classes: cluster a run first, or give --classes COLUMN")
                members, classes = by_class(np.where(mask, number, -1))
                captions = [str(c) for c in classes]
                averages = _average(run, members, captions, source or "run", self.average, job)
            job.tell("writing")
            chosen = choose(
                session,
                mask,
                class_id=number,
                angle_deg=angle,
                shift_yx_px=shift,
                further=latent_columns(run) if run is not None and with_latents else None,
            )
            coordinates = None
            if self.recentre:
                if out.suffix.lower() != ".star":
                    raise UserError(f"--recentre writes a .star file, not {out.name}")
                chosen, coordinates = recentred(chosen, self.micrograph_pixel_size_A)
                job.note(
                    "coordinates are where the particles are: extract them anew before using the origins"
                )
            notes = export(
                out,
                chosen,
                average=self.average,
                coordinates_xy_px=coordinates,
                overwrite=self.overwrite,
                progress=job.tell,
                stop=job.stop,
            )
            for note in notes:
                job.note(note)
            if averages is not None:
                images = np.stack([average.image for average in averages])
                grey = images if images.ndim == 3 else images.mean(1)  # an MRC stack has no colours
                export_averages(files[1], grey, averages[0].pixel_size_A, overwrite=self.overwrite)
            job.result(" ".join(map(str, files)))


class Merge(JobCommand):
    """Join several star files into one, to make one session of them."""

    stars: CliPositionalArg[list[Path]]
    """Two star files or more, of one dialect"""
    out: Path
    """The .star file to write"""
    project_dir: str = ""
    """Where the stack names start from, if they cannot be found otherwise"""
    overwrite: bool = False
    """Replace the file if it is there; the sources are never replaced"""

    def execute(self) -> None:
        """Join, and print the path of the file."""
        from particle_explorer.io.joining import merge_stars

        with self.job("joining star files") as job:
            notes = merge_stars(
                self.stars, self.out, project_dir=_path(self.project_dir), overwrite=self.overwrite
            )
            for note in notes:
                job.note(note)
            job.result(self.out)


class Transfer(JobCommand):
    """Find a session's particles in another extraction by micrograph and coordinate, and write them there."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    to: Path
    """The star or cs file of the other extraction, e.g. the unbinned one"""
    out: Path
    """The file to write: rows of --to, with classes and poses of the session"""
    run: str = ""
    """Name or number of the run whose poses are written; by default the newest finished one"""
    selection: str = ""
    """Only the particles of this named selection"""
    classes: str = ""
    """Column that gives the class numbers; by default the newest clustering of the run, if there is one"""
    poses: Literal["run", "held", "refined", "none"] = "run"
    """Whose poses are written, see `export --poses`"""
    tolerance_px: float = Field(2.0, gt=0, le=10_000)
    """How far apart coordinates of one particle may lie, in pixels of the micrograph"""
    project_dir: str = ""
    """Where the stack names of --to start from, if they cannot be found otherwise"""
    overwrite: bool = False
    """Replace the file if it is there; sources are never replaced"""

    def execute(self) -> None:
        """Write, and print the path of the file."""
        import numpy as np

        from particle_explorer.exporting import choose, transfer
        from particle_explorer.io.reading import read
        from particle_explorer.session import Session

        with self.job("finding particles") as job:
            session = Session.open(self.session)
            run = session.run(self.run) if self.run else session.newest_finished_run()
            mask = session.selection(self.selection) if self.selection else np.ones(session.n_particles, bool)
            other = read(self.to, project_dir=_path(self.project_dir))
            angle, shift = (None, None)
            if run is not None and self.poses != "none":
                angle, shift = _poses_of(run, self.poses)
            chosen = choose(
                session,
                mask,
                class_id=_class_numbers(session, run, self.classes),
                angle_deg=angle,
                shift_yx_px=shift,
            )
            notes = transfer(
                self.out, chosen, other, tolerance_px=self.tolerance_px, overwrite=self.overwrite
            )
            for note in notes:
                job.note(note)
            job.result(self.out)


class ExportClasses(JobCommand):
    """Write class averages and their particles for RELION's class display and as templates of cryoSPARC."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    out: Path
    """A new folder: run_it000_classes.mrcs with its _model.star, _data.star and _optimiser.star,
    class_averages.star, backup_selection.star, templates.mrc with .cs and .csg, montage.png"""
    averages: str = ""
    """Name of the averages, as `average` printed it; by default those that were made last"""
    project_dir: str = ""
    """The folder that RELION runs in, from which names in the files start; by default that of the source,
    where --out lies in it"""

    def execute(self) -> None:
        """Export, and print the path of the folder."""
        from particle_explorer.exporting import export_classes
        from particle_explorer.session import Session

        with self.job("exporting class averages") as job:
            session = Session.open(self.session)
            name = self.averages or session.newest_classes()
            if not name:
                raise UserError(f"{session.path} has no class averages yet; make some with {PROGRAM} average")
            notes = export_classes(
                self.out,
                session,
                name,
                project_dir=_path(self.project_dir),
                progress=job.tell,
                stop=job.stop,
            )
            for note in notes:
                job.note(note)
            job.result(self.out)


# ---------------------------------------------------------------------- the rest


class Simulate(SimulateConfig, JobCommand):
    """Simulate a stack of a hinged molecule with every truth known: .mrcs, .star and .cs."""

    out: Path
    """Folder to write into"""
    overwrite: bool = False
    """Replace the files if they are there"""

    def execute(self) -> None:
        """Simulate, and print the path of the star file."""
        from particle_explorer.simulate import write

        with self.job("simulating") as job:
            config = SimulateConfig(**_settings(self, SimulateConfig))
            write(
                self.out, config, overwrite=self.overwrite, progress=lambda done: job.tell("simulating", done)
            )
            job.result(self.out / "particles.star")


class Demo(Command):
    """Run the whole chain on the sample, score it against the truth, and open it if there is a display."""

    out: Path = Path("particle-explorer-demo")
    """Folder to write into: a session, averages, report.html and metrics.json"""
    window: bool = True
    """Open napari at the end where there is a display"""

    def execute(self) -> None:
        """Run the demo; a score that falls short is a fault of ours, and the exit status says so."""
        from particle_explorer.demo import demo

        outcome = demo(self.out, self.window)
        if not all(passed for *_, passed in outcome.checks):
            sys.exit(1)


class Open(Command):
    """Open a session in napari."""

    session: CliPositionalArg[Path]
    """Folder of the session"""

    def execute(self) -> None:
        """Show the window until it is closed."""
        from particle_explorer.session import Session

        open_session(Session.open(self.session).path)


def open_session(path: Path) -> None:
    """Show the workspace in napari, open on a session; returns when the window is closed."""
    try:
        import napari
    except ImportError as error:
        raise UserError(
            "napari is not installed; install it with pip install 'napari-particle-explorer[napari]'"
        ) from error
    from particle_explorer.widgets.workspace import open_workspace

    viewer = napari.Viewer()
    open_workspace(viewer, path)
    napari.run()


class DecodeServer(Command):
    """Draw latent positions of a run for the window, over standard input and output."""

    run: CliPositionalArg[Path]
    """Folder of the run"""

    def execute(self) -> None:
        """Answer until standard input is closed."""
        from particle_explorer.jobs import send_error, serve_decoding

        # what libraries print must not get between the replies
        replies = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        try:
            import torch

            from particle_explorer.training import Drawer

            torch.set_num_threads(1)
            drawer = Drawer(_open_run(self.run, needs="weights"))
        except UserError as error:
            send_error(replies, str(error))
            return
        serve_decoding(sys.stdin.buffer, replies, drawer.draw, drawer.shape, drawer.latent_dim)


class Bench(Command):
    """Measure accuracy, speed and the window on this machine: bench accuracy, speed or interface."""


class BenchCommand(Command):
    """A measurement that prints its table."""

    json_file: str = Field("", validation_alias="json")
    """Also write the numbers to this file"""


class BenchAccuracy(AccuracyConfig, BenchCommand):
    """How well the models find conformation and pose where the truth is known."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import accuracy

        accuracy.run(AccuracyConfig(**_settings(self, AccuracyConfig)), _path(self.json_file))


class BenchAverages(AveragesConfig, BenchCommand):
    """How good averages along the map are, beside discrete classes and k-means, where the truth is known."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import averages

        averages.run(AveragesConfig(**_settings(self, AveragesConfig)), _path(self.json_file))


class BenchSpeed(SpeedConfig, BenchCommand):
    """Images per second of training, encoding, decoding, averaging and preprocessing."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import speed

        speed.run(SpeedConfig(**_settings(self, SpeedConfig)), _path(self.json_file))


class BenchInterface(BenchCommand):
    """How fast the window follows the hand: dragging, painting, selecting, stalls of the event loop."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import interface

        interface.run(_path(self.json_file))


COMMANDS: dict[str, type[Command]] = {
    "inspect": Inspect,
    "import": Import,
    "train": Train,
    "encode": Encode,
    "import-latents": ImportLatents,
    "pose-map": PoseMap,
    "embed": Embed,
    "cluster": Cluster,
    "regroup": Regroup,
    "hold-still": HoldStill,
    "traverse": Traverse,
    "film": Film,
    "average": Average,
    "refine": Refine,
    "export": Export,
    "export-classes": ExportClasses,
    "merge": Merge,
    "transfer": Transfer,
    "open": Open,
    "simulate": Simulate,
    "demo": Demo,
}
BENCH: dict[str, type[Command]] = {
    "bench accuracy": BenchAccuracy,
    "bench averages": BenchAverages,
    "bench speed": BenchSpeed,
    "bench interface": BenchInterface,
}
HIDDEN: dict[str, type[Command]] = {"decode-server": DecodeServer}


# ---------------------------------------------------------------------- from words to a command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Threads that wait by spinning starve their partners when another program wants a core: a fit beside
    # one busy program took twice as long. Sleeping costs nothing on a quiet machine. torch reads this once.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "--status" in words:  # a job stands back for the window from its first import on
        from particle_explorer.status import give_way

        give_way()
    try:
        command = parse(words)
        if command is not None:
            command.execute()
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        _report_failure(words, error)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def parse(words: Sequence[str]) -> Command | None:
    """The command that these words ask for; None when they asked for help, which was given."""
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return None
    if words[0] == "--version":
        from particle_explorer import __version__

        print(__version__)
        return None
    name, rest = words[0], list(words[1:])
    commands = COMMANDS | HIDDEN
    if name == "bench":
        commands = BENCH
        if not rest or rest[0] in ("-h", "--help"):
            print(_list_commands(str(Bench.__doc__), BENCH))
            return None
        name, rest = f"bench {rest[0]}", rest[1:]
    if name not in commands:
        known = ", ".join(command for command in commands if command not in HIDDEN)
        raise UserError(f"there is no command {name!r}; choose one of {known}")
    command = commands[name]
    if {"-h", "--help"} & set(rest):
        describe(command)
    if command is Train:
        command = _train_of_kind(_kind(rest))
    settings = _settings_class(command, name)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            settings, formatter_class=_Help, cli_exit_on_error=False
        )
        return CliApp.run(settings, cli_args=_plain_flags(rest, command), cli_settings_source=source)
    except SystemExit:  # --help was given
        return None
    except SettingsError as error:
        text = str(error).removeprefix("error parsing CLI: ")
        raise UserError(f"{name}: {text}; see {PROGRAM} {name} --help") from error
    except ValidationError as error:
        raise UserError(_sentence(error, name, command)) from error


class _Help(argparse.HelpFormatter):
    """Help as argparse writes it, without the defaults that are empty texts."""

    def _expand_help(self, action: argparse.Action) -> str:
        return super()._expand_help(action).removesuffix("(default: )").rstrip()


def _settings_class(command: type[Command], name: str) -> type[Any]:
    """`command` as pydantic-settings reads it: from the words alone, never from the environment."""

    class FromWords(BaseSettings, command):  # type: ignore[misc, valid-type]
        __doc__ = command.__doc__
        model_config = SettingsConfigDict(
            cli_prog_name=f"{PROGRAM} {name}",
            cli_kebab_case=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_avoid_json=True,
            cli_enforce_required=True,
            nested_model_default_partial_update=True,
            case_sensitive=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (init_settings,)

    return FromWords


def _plain_flags(words: Sequence[str], command: type[Config]) -> list[str]:
    """`--flag true` as `--flag`, `--flag false` as `--no-flag`, and `--n` as `-n`.

    So whoever builds a command line need not know which options are flags, and which have one letter.
    """
    flags = set(_flags(command, "--"))
    plain: list[str] = []
    for word in words:
        if word.partition("=")[0] == "--n":
            word = word[1:]
        if word in ("true", "false") and plain and plain[-1] in flags:
            if word == "false":
                plain[-1] = "--no-" + plain[-1][2:]
        else:
            plain.append(word)
    return plain


def _flags(config: type[Config], prefix: str) -> Iterator[str]:
    for name, field in config.model_fields.items():
        option = prefix + name.replace("_", "-")
        if field.annotation is bool:
            yield option
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Config):
            yield from _flags(field.annotation, option + ".")


def _kinds() -> dict[str, type[Config]]:
    """The model configs by the name of their kind."""
    union = get_args(ModelConfig)[0]
    return {get_args(config.model_fields["kind"].annotation)[0]: config for config in get_args(union)}


def _kind(words: Sequence[str]) -> str:
    """What --model.kind says, or the default."""
    for i, word in enumerate(words):
        if word.startswith("--model.kind="):
            return word.partition("=")[2]
        if word == "--model.kind" and i + 1 < len(words):
            return words[i + 1]
    return ClassMapConfig().kind


def _train_of_kind(kind: str) -> type[Command]:
    """`train` with the settings of one kind of model: its help shows just those, others are refused."""
    kinds = _kinds()
    if kind not in kinds:
        raise UserError(f"--model.kind {kind}: there is no such model; choose one of {', '.join(kinds)}")
    others = ", ".join(f"--model.kind {other}" for other in kinds if other != kind)
    about = (
        f"{Train.__doc__} The model settings below are those of {kind}; for others add --help to {others}."
    )
    return create_model("Train", __base__=Train, __doc__=about, model=(kinds[kind], kinds[kind]()))


def _sentence(error: ValidationError, name: str, command: type[Command]) -> str:
    """The first problem, with the option as it is typed."""
    problem = error.errors()[0]
    parts = [str(part).replace("_", "-") for part in problem["loc"]]
    field = command.model_fields.get(str(problem["loc"][0])) if problem["loc"] else None
    positional = field is not None and any("Positional" in type(item).__name__ for item in field.metadata)
    option = parts[0].upper() if positional else "--" + ".".join(parts)
    message = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{name}: {option} {problem['input']!s}: {message}; see {PROGRAM} {name} --help"


def _overview() -> str:
    about = "Explore single-particle electron microscopy images by content, with pose set apart."
    return _list_commands(about, COMMANDS | {"bench": Bench})


def _list_commands(about: str, commands: dict[str, type[Command]]) -> str:
    width = max(map(len, commands)) + 2
    lines = [
        f"  {name:{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()
    ]
    usage = f"usage: {PROGRAM} COMMAND ...   ({PROGRAM} COMMAND --help says more of one)"
    return "\n".join([usage, "", about, "", *lines])


def _report_failure(words: Sequence[str], error: UserError) -> None:
    """Tell whoever follows the folder of --status of a failure that came before the job reported itself."""
    if "--status" not in words[:-1]:
        return
    from particle_explorer.status import StatusWriter

    folder = Path(words[words.index("--status") + 1])
    if folder.is_dir():
        StatusWriter.note_failure(folder, error)


@contextlib.contextmanager
def _interrupts_stop(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C, and the polite kill, end a job in good order; the second time at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        print("\nstopping in good order; once more to stop at once", file=sys.stderr)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------- shared by commands


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _settings(command: Config, base: type[Config]) -> dict[str, Any]:
    """The settings of a command that are those of `base`."""
    return {name: getattr(command, name) for name in base.model_fields}


def _open_run(path: Path, needs: Literal["", "weights"] = "") -> Run:
    """A run folder, or the newest finished run of a session folder."""
    from particle_explorer.session import Run, Session

    if Session.is_session(path):
        newest = Session.open(path).newest_finished_run()
        if newest is None:
            raise UserError(f"{path} has no finished run yet; train one with {PROGRAM} train {path}")
        return newest
    run = Run.open(path)
    if needs == "weights" and run.config.model.kind == "imported":
        raise UserError(f"run {run.name} has coordinates from a file and no model, so nothing can be drawn")
    if needs == "weights" and not run.has_weights:
        raise UserError(f"run {run.name} has no weights yet; its state is {run.state!r}")
    return run


def _latents(run: Run) -> Latents:
    latents = run.latents()
    if latents is None:
        raise UserError(f"run {run.name} has no latents yet; its state is {run.state!r}")
    return latents


def _coordinates(run: Run, name: str) -> NDArray[np.float32]:
    """`(N, 2)` of an embedding, in the order of the run's latents."""
    import numpy as np

    if name not in run.columns() or run.column(name).shape[1] < 2:
        there = ", ".join(each for each in run.columns() if run.column(each).shape[1] == 2)
        raise UserError(f"run {run.name} has no embedding {name!r}; there are: {there or 'none'}")
    return run.column(name).reindex(_latents(run).uid).to_numpy(np.float32)[:, :2]


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers separated by commas, as 1,2") from None


def _named(text: str, label: NDArray[np.integer]) -> dict[int, str]:
    """ "1=open, 2=closed" as numbers and names."""
    names: dict[int, str] = {}
    for part in text.split(","):
        number, equal, name = (each.strip() for each in part.partition("="))
        if not equal or not number.isdigit() or not name:
            raise UserError(f"--names {text}: give NUMBER=NAME separated by commas, as 1=open, 2=closed")
        if int(number) not in label:
            raise UserError(f"--names {text}: there is no group {number}")
        names[int(number)] = name
    return names


def _named_groups(label: NDArray[np.integer], names: dict[int, str], uid: NDArray[np.uint64]) -> pd.DataFrame:
    """Groups as numbers, or, where some have names, as texts."""
    import pandas as pd

    index = pd.Index(uid, name="uid")
    if not names:
        return pd.DataFrame({"cluster-regrouped": label.astype("int32")}, index=index)
    words = [names.get(int(number), f"group {number}") for number in label]
    return pd.DataFrame({"cluster-named": pd.Categorical(words)}, index=index)


def _poses(run: Run, held: bool) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Angle `(N,)` (°) and shift `(N, 2)` (px of the original) of all rows, or None where there are none."""
    if held:
        if "pose-held" not in run.columns():
            raise UserError(
                f"run {run.name} holds nothing still yet; run {PROGRAM} hold-still {run.path} --auto"
            )
        table = run.column("pose-held")
    else:
        table = _latents(run).table
    table = table.reindex(run.session.table.index)
    angle = table["angle_deg"].to_numpy(float) if "angle_deg" in table else None
    has_shift = "shift_y_px" in table and "shift_x_px" in table
    return angle, table[["shift_y_px", "shift_x_px"]].to_numpy(float) if has_shift else None


def _poses_of(run: Run, source: PoseSource) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Angle and shift of all rows from a source, see `Average.poses`."""
    if source in ("run", "held"):
        return _poses(run, source == "held")
    columns = ["angle_deg", "shift_y_px", "shift_x_px"]
    if source == "refined":
        if "pose-refined" not in run.columns():
            raise UserError(f"run {run.name} has no refined poses yet; run {PROGRAM} refine {run.path}")
        table = run.column("pose-refined").reindex(run.session.table.index)
    else:
        table = run.session.table
        if any(name not in table for name in columns):
            raise UserError("the particle file carries no angles and shifts; choose the poses of the run")
    return table["angle_deg"].to_numpy(float), table[columns[1:]].to_numpy(float)


def _labels(run: Run, by: str, selection: str) -> tuple[NDArray[np.int64], list[str] | None, str]:
    """Class of every row (-1: none), names of the classes, name of the grouping."""
    import numpy as np

    session = run.session
    mask = session.selection(selection) if selection else np.ones(session.n_particles, bool)
    if selection and not by:
        if not mask.any():
            raise UserError(f"selection {selection!r} is empty; there is nothing to average")
        return np.where(mask, 0, -1), [selection], selection
    by = by or run.newest_column("cluster") or ""
    if not by:
        raise UserError("say what to average by --by COLUMN or --selection NAME, or cluster the run first")
    numbers, names = _grouped(_column(session, run, by), by)
    numbers = np.where(mask, numbers, -1)
    present = np.unique(numbers[numbers >= 0])
    return numbers, None if names is None else [names[i] for i in present], by


def _column(session: Session, run: Run | None, name: str) -> pd.Series:
    """A column of a run's results or of the session's table."""
    features = run.features() if run is not None else session.table.iloc[:, :0]
    if name in features:
        return features[name]
    if name in session.table:
        return session.table[name]
    results = ", ".join(run.columns()) if run is not None else ""
    raise UserError(
        f"there is no column {name!r}; results of the run: {results or 'none'}; columns of the file:"
        f" {', '.join(map(str, session.table.columns))}"
    )


def _grouped(column: pd.Series, name: str) -> tuple[NDArray[np.int64], list[str] | None]:
    """Whole numbers as they are, text numbered from 0; -1 where there is none."""
    import numpy as np
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(float)
        known = np.isfinite(values)
        if not np.array_equal(values[known], np.round(values[known])):
            raise UserError(
                f"column {name!r} holds {values[known][0]:g} and other fractions; classes are whole numbers"
            )
        if known.any() and values[known].min() < 0:
            raise UserError(
                f"column {name!r} holds {values[known].min():g}; classes are numbered from 0 or 1"
            )
        return np.where(known, np.nan_to_num(values), -1).astype(np.int64), None
    codes, names = pd.factorize(column, sort=True)
    return codes.astype(np.int64), [str(value) for value in names]


def _class_numbers(session: Session, run: Run | None, classes: str) -> NDArray[np.int64] | None:
    """`(N,)` class numbers from 1 for an export, or None where there are no classes."""
    name = classes or (run.newest_column("cluster") if run is not None else None)
    if not name:
        return None
    numbers, names = _grouped(_column(session, run, name), name)
    if (numbers < 0).any():
        raise UserError(
            f"column {name!r} gives no class to {(numbers < 0).sum()} particles; fill it, or choose another"
        )
    return numbers + 1 if names is not None or numbers.min() == 0 else numbers


def _members(command: Average, run: Run) -> tuple[Members, list[str], str, NDArray[np.float64] | None]:
    """Members, captions, name of the set and positions on the map (where there are any)."""
    import numpy as np

    from particle_explorer import membership

    session = run.session
    mask = session.selection(command.selection) if command.selection else np.ones(session.n_particles, bool)
    if not mask.any():
        raise UserError(f"selection {command.selection!r} is empty; there is nothing to average")
    table = _latents(run).table.reindex(session.table.index)
    z_names = [str(name) for name in table if re.fullmatch(r"z_\d+", str(name))]
    z = np.where(mask[:, None], table[z_names].to_numpy(float), np.nan)
    std_names = [name.replace("z_", "z_std_") for name in z_names]
    z_std = table[std_names].to_numpy(float) if all(name in table for name in std_names) else None
    if command.by == "grid":
        members, names, middles = membership.cells(z, command.cells, z_std, command.weights)
        return members, names, "grid", middles
    if command.by == "near":
        positions = _read_positions(command.positions, len(z_names))
        if command.weights == "posterior":
            raise UserError("--by near knows the weights hard and distance")
        members = membership.near(z, positions, command.n_near, command.weights)
        return members, [f"position {i + 1}" for i in range(len(positions))], "near", positions
    labels, given, name = _labels(run, command.by, command.selection)
    members, classes = membership.by_class(labels, z, z_std, command.weights)
    return members, given or [str(c) for c in classes], name, None


def _read_positions(path: str, d: int) -> NDArray[np.float64]:
    import json

    import numpy as np

    if not path:
        raise UserError("--by near needs --positions FILE: a .npy file, or the .json that `traverse` writes")
    try:
        if path.endswith(".json"):
            found = np.asarray(json.loads(Path(path).read_text(encoding="utf-8"))["positions"], float)
        else:
            found = np.asarray(np.load(path, allow_pickle=False), float)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as positions on a map: {error}") from error
    if found.ndim != 2 or found.shape[1] != d or not np.isfinite(found).all():
        raise UserError(f"{path} holds {found.shape}; positions of this run are (k, {d}) finite numbers")
    return found


def _average(
    run: Run, members: Members, names: list[str], poses: PoseSource, config: AverageConfig, job: Job
) -> list[Any]:
    from particle_explorer.averaging import Stopped as AveragingStopped
    from particle_explorer.averaging import average_members

    angle, shift = _poses_of(run, poses)
    try:
        return average_members(
            run.session,
            members,
            names,
            angle,
            shift,
            config,
            progress=lambda done: job.tell("averaging", done),
            stop=job.stop,
        )
    except AveragingStopped:
        raise Stopped("stopped; nothing was written") from None


def _row_of(run: Run, uid: str, option: str) -> int:
    """The row of a particle in the latents of a run."""
    import numpy as np

    if not uid.isdigit():
        raise UserError(f"{option} {uid}: give the uid of a particle, a whole number")
    rows = np.flatnonzero(_latents(run).uid == np.uint64(uid))
    if not rows.size:
        raise UserError(f"{option} {uid}: run {run.name} has no particle of that uid")
    return int(rows[0])


def _positions(command: Traverse, run: Run, z: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(n, d)` positions of the way that a command asks for."""
    import numpy as np

    from particle_explorer import traversals

    n, kind = command.n_frames, command.along
    if kind == "curve":
        path = _path(command.positions)
        if path is None:
            raise UserError("--along curve needs --positions FILE.npy with positions on the way")
        try:
            points = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a .npy file of positions: {error}") from error
        if points.ndim != 2 or points.shape[1] != z.shape[1] or not np.isfinite(points).all():
            raise UserError(
                f"{path} holds {points.shape}; positions of this run are (m, {z.shape[1]}) numbers"
            )
        return traversals.along_curve(points, n)
    good = z[np.isfinite(z).all(1)]
    middle = np.median(good, axis=0)
    if kind == "dimension":
        return traversals.along_dimension(good, command.number, middle, n)
    if kind == "component":
        return traversals.along_component(good, command.number, middle, n)
    prior = traversals.prior_of(run.config.model.kind)
    if kind == "grid":
        return traversals.grid(good, max(2, round(n**0.5)), prior)
    if kind == "prior":
        return traversals.samples(good, n, prior, command.seed)
    if bool(command.start) != bool(command.end):
        raise UserError(f"--along {kind} needs both --start UID and --end UID, or neither")
    if command.start:
        first, last = _row_of(run, command.start, "--start"), _row_of(run, command.end, "--end")
    else:
        line = traversals.along_component(good, 1, middle, 2)
        first, last = (int(np.nanargmin(((z - end) ** 2).sum(1))) for end in line)
    if kind == "straight":
        return traversals.straight(z[first], z[last], n)
    rows = np.flatnonzero(np.isfinite(z).all(1))
    ends = np.searchsorted(rows, [first, last])
    return traversals.along_graph(z[rows], int(ends[0]), int(ends[1]), n)[0]


def _averages_of_cached(
    session: Session,
    label: NDArray[np.int64],
    k: int,
    angle: NDArray[np.float64] | None,
    shift: NDArray[np.float64] | None,
    job: Job,
) -> NDArray[np.float32]:
    """`(k, m, m)` means of the cached images with each label, moved back by their poses; NaN for none."""
    import numpy as np

    from particle_explorer.averaging import align
    from particle_explorer.preprocess import original_pixels

    rows = np.flatnonzero(label >= 0)
    m = session.images.shape[-1]
    total, count = np.zeros((k, m, m)), np.zeros(k)
    scale = 1 / original_pixels(session.table, session.plan)
    tell = job.tell_share("averaging the particles along the way")
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        images = session.images.read(part)
        if angle is not None and shift is not None:
            images = align(images, angle[part], shift[part] * scale[part, None])
        np.add.at(total, label[part], images.mean(1))
        np.add.at(count, label[part], 1)
        tell((start + len(part)) / len(rows))
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count[:, None, None], np.float32)


def _formats(text: str) -> set[str]:
    known = {"mrcs", "gif", "mp4", "png"}
    wanted = {part.strip() for part in text.split(",") if part.strip()}
    if not wanted or wanted - known:
        raise UserError(f"--formats {text}: choose from {', '.join(sorted(known))}, separated by commas")
    return wanted


def _write_film(path: Path, stacks: list[NDArray[np.float32]], per_second: float, overwrite: bool) -> None:
    """A film of stacks side by side, or a contact sheet; the ending says which."""
    from particle_explorer import movies
    from particle_explorer.files import replacing
    from particle_explorer.report import png_file

    if path.suffix == ".png":
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(png_file(movies.contact_sheet(stacks), low=0, high=255))
        return
    write = movies.write_gif if path.suffix == ".gif" else movies.write_mp4
    write(path, movies.enlarged(movies.side_by_side(stacks)), per_second, overwrite=overwrite)


def _free_name(folder: Path, stem: str, suffix: str) -> Path:
    """FOLDER/STEM, or STEM-2, …: the first whose `.suffix` is not there."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 10_000))]
    return next(folder / name for name in names if not (folder / f"{name}.{suffix}").exists())


def _check_writable(path: Path, session: Session, overwrite: bool) -> None:
    """Found out before the work: an export replaces files only when told, and never what it was made of."""
    resolved = path.resolve()
    sources = {Path(source).resolve() for source in session.table["stack_path"].unique()}
    if resolved in sources or resolved == session.original_source.resolve():
        raise UserError(
            f"{path} is what the session was made of, which an export never replaces; choose another name"
        )
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")


def _disc(text: str) -> tuple[float, float, float]:
    try:
        y, x, radius = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--disc-yxr-px {text}: give three numbers Y,X,R, as 20,31.5,8") from None
    return y, x, radius


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give numbers separated by commas, as 0.2,-0.5") from None


def _mask(path: Path) -> NDArray[np.float32]:
    """A single image `(n, n)` of a .npy or .mrc file."""
    from particle_explorer.io.reading import read

    particles = read(path)
    if len(particles) != 1 or particles.images.n_channels != 1:
        raise UserError(f"{path} holds {len(particles)} images; a mask is one grey image")
    return particles.images[0][0]


def _progress_text(progress: Any) -> str:
    text = progress.what
    if progress.what != "training":
        return f"{text} {progress.fraction:.0%}"
    losses = "  ".join(f"{name} {loss:.4g}" for name, loss in progress.losses.items())
    speed = f"{progress.images_per_second:.0f} images/s  {progress.seconds_left:.0f} s left"
    return f"epoch {progress.epoch}/{progress.n_epochs}  {losses}  {speed}"


if __name__ == "__main__":
    sys.exit(main())

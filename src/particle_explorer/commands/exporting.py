"""Commands that write files for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.averaging import average_members_of
from particle_explorer.commands.command import Job, JobCommand
from particle_explorer.commands.options import path_or_none
from particle_explorer.commands.runs import PoseSource, averages_of, column_of, grouped, poses_of
from particle_explorer.configs import AverageConfig
from particle_explorer.files import UserError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from particle_explorer.averaging import ClassAverage
    from particle_explorer.exporting import Chosen
    from particle_explorer.session import Run, Session


class Export(JobCommand):
    """Write particles for RELION or cryoSPARC: all their columns, with poses and classes of a run."""

    session: CliPositionalArg[Path]
    """Folder of the session"""
    out: str
    """The file to write. Its ending says what: .star for RELION, in the dialect of the source; .cs for
    cryoSPARC, with a .csg beside it; .csv, .tsv or .parquet for a table of classes, poses and latents; .txt
    for the rows of the source, counted from 0; .mrcs or .png for class averages, as a stack or a picture"""
    run: str = ""
    """Name or number of the run whose poses are written; by default the newest finished one"""
    selection: str = ""
    """Only the particles of this named selection"""
    classes: str = ""
    """Column that gives the class numbers; by default the newest clustering of the run, if there is one;
    `none` leaves those of the source as they are"""
    members: str = ""
    """Only the particles of these class averages (their name, as `average` printed it), with the class and
    the pose that each was averaged at"""
    good: bool = False
    """With --members: only of averages that are marked good; where none is, of those not marked bad"""
    held: bool = False
    """Write the poses that hold a part still (hold-still) instead of the run's own; as --poses held"""
    poses: Literal["run", "held", "refined", "none"] = "run"
    """Whose poses are written: the run's, `held` with a part held still, `refined` by `refine`; `none` leaves
    those of the source as they are"""
    latents: bool = False
    """Also write the latent coordinates, as columns explorerZ0, explorerZ1 ... of a star file or fields
    explorer/z_0 ... of a cs file; tables have them anyway"""
    every_column: bool = False
    """Also write every column of the particle file into a table; star and cs files have them anyway"""
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
        from particle_explorer.exporting import PICTURE_SUFFIXES, export, export_pictures
        from particle_explorer.io.writing import export_averages
        from particle_explorer.session import Session

        with self.job("exporting") as job:
            session = Session.open(self.session)
            out = Path(self.out).absolute()
            files = [out, *([Path(self.averages).absolute()] if self.averages else [])]
            for path in files:
                _check_writable(path, session, self.overwrite)
            if self.averages and files[1].suffix.lower() != ".mrcs":
                raise UserError(f"{files[1]} does not end in .mrcs; averages are exported as an image stack")
            if out.suffix.lower() in PICTURE_SUFFIXES:
                stored = averages_of(session, self.members)
                self._say(job, export_pictures(out, stored, overwrite=self.overwrite))
                job.result(out)
                return
            chosen, averages, shown, config = self._chosen(session, out, job)
            job.tell("writing")
            coordinates = None
            if self.recentre:
                chosen, coordinates = self._recentred(chosen, out, job)
            notes = export(
                out,
                chosen,
                average=config,
                shown=shown,
                coordinates_xy_px=coordinates,
                overwrite=self.overwrite,
                progress=job.tell,
                stop=job.stop,
            )
            self._say(job, notes)
            if averages:
                grey = pictures_of(averages)
                export_averages(files[1], grey, averages[0].pixel_size_A, overwrite=self.overwrite)
            job.result(" ".join(map(str, files)))

    def _chosen(
        self, session: Session, out: Path, job: Job
    ) -> tuple[Chosen, list[ClassAverage], Mapping[int, NDArray[np.float32]] | None, AverageConfig]:
        """The particles and what is said of them; averages made of them; averages that they must give again,
        and how those were made."""
        from particle_explorer.exporting import TABLE_SUFFIXES, averaged, latent_columns

        if self.members and (self.selection or self.classes or self.averages):
            raise UserError(
                "--members says which particles and classes are written; leave out --selection, --classes and"
                " --averages"
            )
        run = session.run(self.run) if self.run else session.newest_finished_run()
        if self.latents and run is None:
            raise UserError(f"{session.path} has no finished run yet, so there are no latents to write")
        with_latents = run is not None and (self.latents or out.suffix.lower() in TABLE_SUFFIXES)
        further = latent_columns(run) if run is not None and with_latents else None
        if not self.members:
            chosen, averages = self._by_columns(session, run, further, job)
            return chosen, averages, None, self.average
        behind = averaged(
            session,
            session.classes.read(self.members),
            good=self.good,
            further=further,
            every_column=self.every_column,
        )
        return behind.chosen, [], behind.shown, behind.config

    def _by_columns(
        self, session: Session, run: Run | None, further: pd.DataFrame | None, job: Job
    ) -> tuple[Chosen, list[ClassAverage]]:
        """Particles of a selection, with classes and poses of columns; and their averages where asked for."""
        import numpy as np

        from particle_explorer.exporting import choose
        from particle_explorer.membership import by_class

        mask = session.mask_of(self.selection)
        if not mask.any():
            raise UserError(f"selection {self.selection!r} is empty; there is nothing to export")
        number = _class_numbers(session, run, self.classes)
        source: PoseSource | None = "held" if self.held else None if self.poses == "none" else self.poses
        angle, shift = (None, None)
        if run is not None and source is not None:
            angle, shift = poses_of(run, source)
        averages: list[ClassAverage] = []
        if self.averages:  # first, because they take long and can be stopped
            if number is None or run is None:
                raise UserError("--averages needs classes: cluster a run first, or give --classes COLUMN")
            members, classes = by_class(np.where(mask, number, -1))
            captions = [str(c) for c in classes]
            averages = average_members_of(run, members, captions, source or "run", self.average, job)
        chosen = choose(
            session,
            mask,
            class_id=number,
            angle_deg=angle,
            shift_yx_px=shift,
            further=further,
            every_column=self.every_column,
        )
        return chosen, averages

    def _recentred(self, chosen: Chosen, out: Path, job: Job) -> tuple[Chosen, NDArray[np.float64]]:
        from particle_explorer.exporting import recentred

        if out.suffix.lower() != ".star":
            raise UserError(f"--recentre writes a .star file, not {out.name}")
        found = recentred(chosen, self.micrograph_pixel_size_A)
        job.note("coordinates are where the particles are: extract them anew before using the origins")
        return found

    @staticmethod
    def _say(job: Job, notes: Sequence[str]) -> None:
        for note in notes:
            job.note(note)


def pictures_of(averages: Sequence[ClassAverage]) -> NDArray[np.float32]:
    """`(k, n, n)`; an MRC stack has no colours."""
    import numpy as np

    images = np.stack([average.image for average in averages])
    return images if images.ndim == 3 else images.mean(1)


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
                self.stars,
                self.out,
                project_dir=path_or_none(self.project_dir),
                overwrite=self.overwrite,
                progress=job.tell_share("writing"),
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

        from particle_explorer.exporting import choose, transfer
        from particle_explorer.io.reading import read
        from particle_explorer.session import Session

        with self.job("finding particles") as job:
            session = Session.open(self.session)
            run = session.run(self.run) if self.run else session.newest_finished_run()
            mask = session.mask_of(self.selection)
            other = read(
                self.to,
                project_dir=path_or_none(self.project_dir),
                progress=job.tell_share("reading"),
            )
            job.tell("finding particles")
            angle, shift = (None, None)
            if run is not None and self.poses != "none":
                angle, shift = poses_of(run, self.poses)
            chosen = choose(
                session,
                mask,
                class_id=_class_numbers(session, run, self.classes),
                angle_deg=angle,
                shift_yx_px=shift,
            )
            notes = transfer(
                self.out,
                chosen,
                other,
                tolerance_px=self.tolerance_px,
                overwrite=self.overwrite,
                progress=job.tell,
                stop=job.stop,
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
            notes = export_classes(
                self.out,
                session,
                averages_of(session, self.averages).name,
                project_dir=path_or_none(self.project_dir),
                progress=job.tell,
                stop=job.stop,
            )
            for note in notes:
                job.note(note)
            job.result(self.out)


def _class_numbers(session: Session, run: Run | None, classes: str) -> NDArray[np.int64] | None:
    """`(N,)` class numbers from 1 for an export, or None where there are no classes."""
    name = classes or (run.newest_column("cluster") if run is not None else None)
    if not name or name == "none":
        return None
    numbers, names = grouped(column_of(session, run, name), name)
    if (numbers < 0).any():
        raise UserError(
            f"column {name!r} gives no class to {(numbers < 0).sum()} particles; fill it, or choose another"
        )
    return numbers + 1 if names is not None or numbers.min() == 0 else numbers


def _check_writable(path: Path, session: Session, overwrite: bool) -> None:
    """Found out before the work: an export replaces files only when told, and never what it was made of."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file")
    resolved = path.resolve()
    sources = {Path(source).resolve() for source in session.table["stack_path"].unique()}
    if resolved in sources or resolved == session.original_source.resolve():
        raise UserError(
            f"{path} is what the session was made of, which an export never replaces; choose another name"
        )
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; choose another name or allow overwriting (--overwrite)")

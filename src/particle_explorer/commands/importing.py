"""Commands that look at particle files and make sessions of them."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import JobCommand
from particle_explorer.commands.options import path_or_none
from particle_explorer.configs import PreprocessConfig


class Inspect(JobCommand):
    """Say what is in a particle file (box, pixel size, CTF, contrast, poses) and what it will take."""

    stack: CliPositionalArg[Path]
    """A .star, .cs, .mrcs, .mrc (also .gz, .bz2), .hdf, .h5, .spi, .hed, .tif, .npy, .npz or .zarr file, or a
    folder of pictures"""
    project_dir: str = ""
    """Where the stack names of a star or cs file start from, if they cannot be found otherwise"""

    full: bool = False
    """Read every image too, and list those that are blank, broken or twice there"""

    def execute(self) -> None:
        """Print the summary."""
        from particle_explorer.estimates import requirements
        from particle_explorer.io.checking import scan
        from particle_explorer.io.inspecting import summarise
        from particle_explorer.io.reading import read

        particles = read(self.stack, project_dir=path_or_none(self.project_dir))
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
    """A .star, .cs, .mrcs, .mrc (also .gz, .bz2), .hdf, .h5, .spi, .hed, .tif, .npy, .npz or .zarr file, or a
    folder of pictures; several .star files are joined into NAME_joined.star beside the session"""
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
        from particle_explorer.io.tables import join, read_table
        from particle_explorer.particles import random_subset, where_mask
        from particle_explorer.session import Session, default_path

        with contextlib.ExitStack() as stack:
            job = stack.enter_context(self.job("reading"))
            source = self.stack[0]
            joining: list[str] = []
            several = len(self.stack) > 1
            named = source.with_name(f"{source.stem}_joined.star") if several else source
            target = path_or_none(self.session) or default_path(named)
            if several:
                out = target.absolute().with_name(named.name)
                source, joining = stack.enter_context(joined(self.stack, out, path_or_none(self.project_dir)))
            particles = read(source, project_dir=path_or_none(self.project_dir))
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

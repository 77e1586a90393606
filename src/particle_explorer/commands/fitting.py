"""Commands that fit a model and encode with it."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import PROGRAM, Job, JobCommand, interrupts_stop
from particle_explorer.commands.options import numbers, path_or_none
from particle_explorer.commands.runs import open_run
from particle_explorer.configs import ClassMapConfig, ModelConfig, RunModel, TrainConfig
from particle_explorer.files import Stopped, UserError, write_text

if TYPE_CHECKING:
    from particle_explorer.choosing import Choice
    from particle_explorer.session import Run, Session
    from particle_explorer.team import Team


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
    """Name of the run whose map the selection was made on, or that is gone on from, to be remembered"""
    warm_start: bool = False
    """Start from the weights of --parent, with other settings; the model must be of the same kind and size"""
    device: str = "auto"
    """auto (the CUDA device with most free memory, else an Apple GPU, else the CPU), cpu, mps or cuda:N"""
    resume: str = ""
    """Go on with this run (its name or number) from its last checkpoint, with its own settings"""

    def execute(self) -> None:
        """Fit, and print the path of the run."""
        from particle_explorer.session import Session

        session = Session.open(self.session)

        from particle_explorer.team import joined, place_among_several
        from particle_explorer.training import help_fit

        with contextlib.ExitStack() as stack:
            place = place_among_several()
            team = None if place is None else stack.enter_context(joined(self.device, place))
            if team is None or team.leads:
                run = self._run(session, team.size if team else self.train.devices)
            if team is not None:
                run = session.run(Path(team.tell(run.name if team.leads else "")).name)
                if not team.leads:
                    help_fit(run, team, resume=bool(self.resume))
            if team is None or team.leads:
                self._fit(session, run, team)
        if team is not None and not team.leads:
            # all is written; gloo's threads may still be ending, which can abort the interpreter's own end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def _run(self, session: Session, n_devices: int) -> Run:
        """The run that is gone on with, or a new one."""
        from particle_explorer import __version__
        from particle_explorer.configs import RunConfig

        if self.resume:
            return session.run(Path(self.resume).name)
        parent = session.run(Path(self.parent).name) if self.parent else None
        if self.warm_start and parent is None:
            raise UserError("--warm-start goes on from another run: name it by --parent")
        model: RunModel = self.model
        choice = None
        if self.warm_start and isinstance(model, ClassMapConfig) and model.latent_dim == 0:
            dims = parent.config.model.latent_dim if parent is not None else 2
            model = model.model_copy(update={"latent_dim": dims})  # as many as there are
        if isinstance(model, ClassMapConfig) and model.latent_dim == 0 and not self.warm_start:
            choice = self._choose(session, model)
            model = choice.model
        config = RunConfig(
            model=model,
            train=self.train.model_copy(update={"devices": n_devices}),
            data=session.data_spec(),
            where=self.where,
            selection=self.selection,
            parent="" if parent is None else parent.name,
            warm_start=self.warm_start,
            device=self.device,
            version=__version__,
        )
        if parent is not None and self.warm_start:
            from particle_explorer.encoding import weights_to_start_from

            weights_to_start_from(config, parent)  # before there is a run that cannot begin
        run = session.new_run(config)
        if choice is not None:
            write_text(run.path / "choice.json", json.dumps(choice.to_json(), indent=1) + "\n")
        return run

    def _choose(self, session: Session, model: ClassMapConfig) -> Choice:
        """The dimensions of a class map that leaves them open."""
        from particle_explorer.choosing import choose
        from particle_explorer.devices import stand_back

        if self.status:
            stand_back()
        with self.job("choosing the dimensions") as job:

            def tell(what: str, fraction: float) -> None:
                if job.stop.is_set():
                    raise Stopped("stopped; nothing was written")
                job.tell(what, fraction)

            choice = choose(
                session,
                model,
                self.train,
                where=self.where,
                selection=self.selection,
                device=self.device,
                tell=tell,
            )
            for line in choice.lines():
                job.note(line)
            job.writer.hand_over()
        return choice

    def _fit(self, session: Session, run: Run, team: Team | None) -> None:
        from particle_explorer.status import StatusWriter
        from particle_explorer.training import fit

        print(run.path, flush=True)
        stop = threading.Event()
        job = Job(StatusWriter())  # `fit` reports to the folders; this one only talks
        with interrupts_stop(stop):
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
        from particle_explorer.devices import choose_device, stand_back
        from particle_explorer.encoding import encode, encode_stack, load_model

        with self.job("loading the model") as job:
            run = open_run(self.run, needs="weights")
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

            particles = read(Path(self.stack), project_dir=path_or_none(self.project_dir))
            out = path_or_none(self.out) or run.path / f"{Path(self.stack).stem}latents_of.parquet"
            coded = encode_stack(model, run.session, particles, precision=precision)
            latents = job.finish("encoding", coded)
            latents.write(out, overwrite=self.overwrite)
            job.result(out)


class PoseMap(JobCommand):
    """Write how probable every angle and shift of some particles is, as images.

    Rows and columns are shifts, one image for each angle that the model weighs (TARGET-VAE: 0° and on)."""

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
        from particle_explorer.encoding import load_model, pose_posterior
        from particle_explorer.io.mrc import write_stack

        with self.job("weighing poses") as job:
            run = open_run(self.run, needs="weights")
            rows = [round(value) for value in numbers(self.rows, "--rows")]
            run.session.prepare_images(job.tell, job.stop)
            q = pose_posterior(load_model(run), run, rows)
            size = run.session.plan.cached_pixel_size_A
            write_stack(self.out, q.reshape(-1, *q.shape[2:]), size, overwrite=self.overwrite)
            job.note(f"{q.shape[1]} images for each particle, at angles {360 / q.shape[1]:g}° apart")
            job.result(self.out)


def _progress_text(progress: Any) -> str:
    text = progress.what
    if progress.what != "training":
        return f"{text} {progress.fraction:.0%}"
    losses = "  ".join(f"{name} {loss:.4g}" for name, loss in progress.losses.items())
    speed = f"{progress.images_per_second:.0f} images/s  {progress.seconds_left:.0f} s left"
    return f"epoch {progress.epoch}/{progress.n_epochs}  {losses}  {speed}"

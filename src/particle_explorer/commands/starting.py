"""Commands that start something: a simulation, the demo, the window, the process that draws for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pydantic_settings import CliPositionalArg

from particle_explorer.commands.command import Command, JobCommand, settings_of
from particle_explorer.commands.runs import open_run
from particle_explorer.configs import SimulateConfig
from particle_explorer.files import UserError


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
            config = SimulateConfig(**settings_of(self, SimulateConfig))
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
        import napari  # noqa: F401
    except ImportError as error:
        raise UserError(
            "napari is not installed; install it with pip install 'napari-particle-explorer[napari]'"
        ) from error
    from particle_explorer.widgets.workspace import run

    run(path)


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

            from particle_explorer.encoding import Drawer

            torch.set_num_threads(1)
            drawer = Drawer(open_run(self.run, needs="weights"))
        except UserError as error:
            send_error(replies, str(error))
            return
        serve_decoding(sys.stdin.buffer, replies, drawer.draw, drawer.shape, drawer.latent_dim)

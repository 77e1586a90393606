"""Commands that measure on this machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from particle_explorer.commands.command import Command, settings_of
from particle_explorer.commands.options import path_or_none
from particle_explorer.configs import AccuracyConfig, AveragesConfig, SpeedConfig


class Bench(Command):
    """Measure accuracy, speed and the window on this machine: accuracy, averages, speed, interface."""


class BenchCommand(Command):
    """A measurement that prints its table."""

    json_file: str = Field("", validation_alias="json")
    """Also write the numbers to this file"""


class BenchAccuracy(AccuracyConfig, BenchCommand):
    """How well the models find conformation and pose where the truth is known."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import accuracy

        accuracy.run(AccuracyConfig(**settings_of(self, AccuracyConfig)), path_or_none(self.json_file))


class BenchAverages(AveragesConfig, BenchCommand):
    """How good averages along the map are, beside discrete classes and k-means, where the truth is known."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import averages

        averages.run(AveragesConfig(**settings_of(self, AveragesConfig)), path_or_none(self.json_file))


class BenchSpeed(SpeedConfig, BenchCommand):
    """Images per second of training, encoding, decoding, averaging and preprocessing."""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import speed

        speed.run(SpeedConfig(**settings_of(self, SpeedConfig)), path_or_none(self.json_file))


class BenchInterface(BenchCommand):
    """How fast the window follows the hand: dragging, painting, selecting, stalls of the event loop."""

    part: Literal["all", "hand", "models", "jobs", "large"] = "all"
    """Only dragging and training beside it, other models, jobs of the window, or many particles"""

    def execute(self) -> None:
        """Measure."""
        from particle_explorer.bench import interface

        interface.run(path_or_none(self.json_file), part=self.part)

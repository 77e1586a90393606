"""How many dimensions, and how many classes, a class map should have: what particles it has not seen say.

Candidates are fitted to one part of the particles and asked for the density of another. A map of more
dimensions must explain the other part better by more than chance, or the smaller one is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer.configs import MOST_DIMS_OF_A_GRID, ClassMapConfig, DataSpec, TrainConfig
from particle_explorer.devices import choose_device
from particle_explorer.encoding import SessionBatches
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch
from particle_explorer.models.build import build_model
from particle_explorer.models.class_map import FITTING, ClassMap
from particle_explorer.session import Session
from particle_explorer.training import seed_everything

N_FITTED, N_HELD_OUT = 4000, 2000
"""At most so many particles are fitted by each candidate, and so many ask it."""
LEAST = 200
ERRORS, LEAST_SHARE = 2.0, 0.01
"""A larger map must explain more by so many standard errors, and by this share of what maps tell of particles
beyond noise: what turns and classes lose by lying on a grid is also a gain, and no motion."""
FINER = 1.5
"""Nodes per dimension that are tried too, by the automatic number: else a second dimension could do no more
than stand in for classes that the first has too few of."""

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Candidate:
    """One map that was tried."""

    latent_dim: int
    nodes_per_dim: int
    density: float
    """Mean log density (nats) of a held-out particle"""
    gain: float
    """By how much it is above that of the map which had been the best before it was tried; 0 for the first"""
    gain_se: float
    """Standard error of `gain`, over particles"""
    seconds: float
    taken: bool
    """Whether it took the place of that map"""


@dataclass(frozen=True)
class Choice:
    """What was found; `choice.json` of a run."""

    model: ClassMapConfig
    candidates: tuple[Candidate, ...]
    n_fitted: int
    n_held_out: int

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": 1,
            "latent_dim": self.model.latent_dim,
            "nodes_per_dim": self.model.nodes_per_dim,
            "n_fitted": self.n_fitted,
            "n_held_out": self.n_held_out,
            "standard_errors": ERRORS,
            "least_share": LEAST_SHARE,
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }

    def lines(self) -> list[str]:
        """For people to read."""
        found = [
            f"log density of {self.n_held_out} particles that were not among the {self.n_fitted} fitted:"
        ]
        for one in self.candidates:
            gain = f", {one.gain:+.2f} ± {one.gain_se:.2f}" if one is not self.candidates[0] else ""
            taken = ", taken" if one.taken else ""
            found.append(
                f"  {one.latent_dim}-D, {one.nodes_per_dim} classes per dimension:"
                f" {one.density:.2f} per particle{gain}{taken}"
            )
        return found


def choose(
    session: Session,
    model: ClassMapConfig,
    train: TrainConfig,
    *,
    where: str = "",
    selection: str = "",
    device: str = "auto",
    tell: Tell = lambda what, fraction: None,
) -> Choice:
    """The dimensions of the map, and the nodes per dimension where the settings leave them open.

    From one dimension on, each map that explains more than the best before takes its place.

    Of particles in random order the first `N_FITTED` are fitted (two thirds of all, where there are fewer),
    and as many as `N_HELD_OUT` of the others ask. `tell` may raise to end it.
    """
    rows = session.rows_where(where, selection)
    if len(rows) < LEAST:
        raise UserError(
            f"--model.latent-dim 0: {len(rows)} particles are too few to choose the dimensions by; give at"
            f" least {LEAST}, or say the dimensions"
        )
    session.prepare_images(tell)
    rows = np.random.default_rng(train.seed).permutation(rows)
    n_fitted = min(N_FITTED, 2 * len(rows) // 3)
    fitted, held_out = np.sort(rows[:n_fitted]), np.sort(rows[n_fitted : n_fitted + N_HELD_OUT])
    trial = _Trial(session, fitted, held_out, train, device, model.psi_prior_deg > 0, tell)
    tried: list[Candidate] = []
    best: tuple[ClassMapConfig, NDArray[np.float64], float] | None = None

    def ask(wanted: ClassMapConfig) -> None:
        nonlocal best
        started = time.monotonic()
        density, told, side = trial.density(wanted)
        gain, error, taken = 0.0, 0.0, True
        if best is not None:
            more = density - best[1]
            gain, error = float(more.mean()), float(more.std() / math.sqrt(len(more)))
            taken = gain > max(ERRORS * error, LEAST_SHARE * best[2])
        if taken:
            best = wanted, density, told
        seconds = round(time.monotonic() - started, 1)
        mean = float(density.mean())
        tried.append(Candidate(wanted.latent_dim, side, mean, gain, error, seconds, taken))

    for latent_dim in range(1, MOST_DIMS_OF_A_GRID + 1):
        wanted = model.model_copy(update={"latent_dim": latent_dim})
        ask(wanted)
        if tried[-1].taken and not model.nodes_per_dim:
            ask(wanted.model_copy(update={"nodes_per_dim": round(FINER * tried[-1].nodes_per_dim)}))
    assert best is not None
    return Choice(best[0], tuple(tried), len(fitted), len(held_out))


class _Trial:
    """Some particles to fit, some to ask."""

    def __init__(
        self,
        session: Session,
        fitted: NDArray[np.intp],
        held_out: NDArray[np.intp],
        train: TrainConfig,
        device: str,
        with_pose: bool,
        tell: Tell,
    ) -> None:
        self.device = choose_device(device)
        self.fitted = _Part(session, fitted, self.device, with_pose)
        self.held_out = _Part(session, held_out, self.device, with_pose)
        self.data: DataSpec = session.data_spec().model_copy(update={"n_particles": len(fitted)})
        self.train = train
        self.tell = tell

    def density(self, config: ClassMapConfig) -> tuple[NDArray[np.float64], float, int]:
        """Of every held-out particle under a map of these settings; the mean told beyond noise;
        and nodes per dimension."""
        seed_everything(self.train.seed)
        model = build_model(config, self.data).to(self.device)
        assert isinstance(model, ClassMap)
        side = round(len(model.grid_z) ** (1 / config.latent_dim))
        what = (
            f"trying {config.latent_dim} dimension{'s' if config.latent_dim > 1 else ''}, {side} classes each"
        )
        model.precision = self.train.precision
        for step in model.fit(self.fitted):
            self.tell(what, 0.9 * step.fraction if step.what == FITTING else 0.0)
        model.eval()
        parts, told = [], 0.0
        for index in torch.arange(len(self.held_out)).split(1000):
            batch = self.held_out.take(index)
            encoding = model.encode(batch)
            told += float(encoding.extras["log_likelihood"].clamp_min(0).sum()) / len(self.held_out)
            parts.append(model.log_density(batch, encoding).double().cpu().numpy())
            self.tell(what, 0.9 + 0.1 * float(index[-1] + 1) / len(self.held_out))
        return np.concatenate(parts), told, side


class _Part:
    """Some rows of a session as `models.base.Batches`, counted from 0."""

    def __init__(
        self, session: Session, rows: NDArray[np.intp], device: torch.device, with_pose: bool
    ) -> None:
        self.batches = SessionBatches(session, rows, device, with_ctf=ClassMap.uses_ctf, with_pose=with_pose)

    def __len__(self) -> int:
        return len(self.batches)

    def take(self, index: Tensor) -> Batch:
        batch = self.batches.take(index)
        return batch._replace(row=index.to(batch.row.device))

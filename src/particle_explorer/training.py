"""Fitting a model to a session: one generator that the command line, the window and the tests consume.

    for progress in fit(run, stop):   # a set `stop` event ends it after a checkpoint
        ...

What is needed to go on is in `resume.pt`: weights, optimisers, counters and the states of the random number
generators, as one file, so that a kill between two renames cannot pair weights of one epoch with an
optimiser of another. On the CPU a run that was stopped, or killed, and resumed gives the very numbers of an
uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer.configs import RunConfig
from particle_explorer.devices import (
    autocast,
    choose_device,
    describe_device,
    generator_states,
    images_at_once,
    is_out_of_memory,
    set_generator_states,
    stand_back,
)
from particle_explorer.encoding import (
    ENCODE_AT_ONCE,
    SessionBatches,
    as_array,
    encode,
    misfit,
    weights_to_start_from,
)
from particle_explorer.files import Stopped, UserError, locked, replacing
from particle_explorer.models.base import Batch, ParticleModel, Share
from particle_explorer.models.build import build_model
from particle_explorer.session import Run, Session
from particle_explorer.status import StatusWriter
from particle_explorer.team import Place, Team, joined, led, ready_file

LOG_S = 0.25
"""Least time between two reports"""
PAUSE_LOOK_S = 0.2
LIVE_S = 1.0
LIVE_SHARE = 0.05
"""Share of the time that may go into the live view"""
N_LIVE_ENCODED = 2000
MAX_LIVE = 50_000
N_PANEL = 9
CHECKPOINT_VERSION = 1
"""Of `resume.pt`"""
_NO_CHECKPOINT = (RuntimeError, KeyError, ValueError, TypeError, AttributeError)
"""What reading something else as a checkpoint may raise"""


@dataclass(frozen=True)
class Progress:
    """Where a fit stands; one is yielded every quarter of a second or so."""

    what: str
    """What is being done: the model's own words for its start and finish, "training", "encoding" """
    fraction: float
    """How much of `what` is done, 0 to 1"""
    epoch: int = 0
    """Epochs finished"""
    n_epochs: int = 0
    step: int = 0
    n_steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Named losses, averaged since the last report; empty outside of training"""
    images_per_second: float = 0.0
    seconds_left: float = -1.0
    """Of the training proper; -1 where it is not known"""
    live: Path | None = None
    """Newest file of the live view"""


# ---------------------------------------------------------------------- the fit


class NotFinite(UserError):
    """The loss left the numbers; the last good weights were kept."""


def fit(
    run: Run,
    stop: threading.Event | None = None,
    *,
    resume: bool = False,
    status_folders: tuple[Path, ...] = (),
    background: bool = False,
    team: Team | None = None,
) -> Iterator[Progress]:
    """Fit the model of `run`, then write the latents of all rows of its session.

    Parameters
    ----------
    run
        A new run, or with `resume` one that has a checkpoint (without one it starts over).
    stop
        Set it to end in good order: a checkpoint of this very step's epoch is written, the state is
        "stopped".
    status_folders
        Where to report beside the run's own folder.
    background
        Leave a core and precedence to other programs.
    team
        The processes that train together, where `torchrun` or `srun` has started them; else as many as
        `TrainConfig.devices` says are started here.
    """
    folder = run.path
    busy = f"run {run.name} is being trained by another process"
    # wait a moment: a process that was just killed lets go of its lock a moment later
    with locked(folder / ".lock", wait_s=2.0, busy=busy):
        with StatusWriter(folder, *status_folders, stop=stop) as status:
            try:
                with _team_of(run, team, resume=resume) as members:
                    yield from _Fit(run, status, members, resume=resume, background=background).run()
            except Stopped:
                status.stop.set()


def help_fit(run: Run, team: Team, *, resume: bool) -> None:
    """The part in a fit of a process that does not lead: it computes its share of every step."""
    with contextlib.suppress(Stopped):
        for _ in _Fit(run, StatusWriter(), team, resume=resume, background=False).run():
            pass


@contextlib.contextmanager
def _team_of(run: Run, team: Team | None, *, resume: bool) -> Iterator[Team]:
    size = run.config.train.devices
    if team is not None:
        yield team
    elif size == 1:
        yield Team(device=choose_device(run.config.device))
    else:
        with led(run.path, run.config.device, size, resume=resume) as team:
            yield team


class _Fit:
    """The state of one fit; its methods are the phases in the order in which they happen."""

    def __init__(self, run: Run, status: StatusWriter, team: Team, *, resume: bool, background: bool) -> None:
        self.run_ = run
        self.team = team
        self.status = status
        self.stop = status.stop
        self.config: RunConfig = run.config
        self.session = run.session
        self.device = team.device
        if background:
            stand_back()
        device = describe_device(self.device)
        if team.size > 1:
            device = f"{team.size} × {device}"
        status.update(what="reading the images", device=device, message=str(run.path))
        if self.config.data != self.session.data_spec():
            raise UserError(
                f"run {run.name} was made for images of {self.config.data.box_px} px and"
                f" {self.config.data.n_particles} particles, the session has others now; start a new run"
            )
        self.rows = self.session.rows_where(self.config.where, self.config.selection)
        if len(self.rows) == 1:
            raise UserError(
                f"run {run.name} has 1 particle to learn from, and a map shows differences between particles;"
                " give it thousands, at least 2"
            )
        self.resume = resume
        self.epoch = self.step = self.n_epochs = self.n_steps = 0
        self.started = False
        self.seconds_before = 0.0
        self._good: dict[str, Any] | None = None
        self.meter: _Meter | None = None
        self.live = _Live(self)

    def run(self) -> Iterator[Progress]:
        """All of it."""
        yield from self._prepare()
        yield from self._start()
        yield from self._train()
        if self.team.leads:
            yield from self._finish()
            yield from self._encode()

    # -- phases

    def _prepare(self) -> Iterator[Progress]:
        if not self.session.has_images:  # the sample session comes without its cache
            yield self._said("preparing images", 0.0)
        self.session.prepare_images(
            lambda what, done: self.status.update(what=what, fraction=done), self.stop
        )
        train = self.config.train
        seed_everything(train.seed)
        self.model = build_model(self.config.model, self.config.data).to(self.device)
        self.model.precision = train.precision
        self.batches = SessionBatches(
            self.session, self.rows, self.device, with_ctf=self.model.uses_ctf, with_pose=self.model.uses_pose
        )
        self.batch_size = min(train.batch_size or self.model.batch_size, len(self.rows))
        fits = images_at_once(self.model.step_bytes_per_image, self.batch_size, self.device)
        self.at_once = self.team.least(fits)  # all take the same parts
        self.learning_rate = train.learning_rate or self.model.learning_rate
        self.steps_per_epoch = math.ceil(len(self.rows) / self.batch_size)
        self._plan()
        self.optimisers = {
            part: torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.model.betas)
            for part, parameters in self.model.parts().items()
            if parameters
        }
        if self.config.warm_start:
            self.model.skip_warm_up()
        if self.resume and self.run_.can_resume:
            self._load_checkpoint()
            self._plan()
        self.began = time.monotonic()

    def _plan(self) -> None:
        """How long the run is; a model may know more of that once it has started."""
        self.n_epochs = self.config.train.n_epochs or self.model.n_epochs
        self.n_steps = self.n_epochs * self.steps_per_epoch
        self.status.update(n_epochs=self.n_epochs)

    def _start(self) -> Iterator[Progress]:
        if self.started:
            return
        self.model.train()
        if self.config.warm_start:
            yield self._said(f"starting from {self.config.parent}", 0.0)
            parent = self.session.run(self.config.parent)
            self.model.load_state_dict(weights_to_start_from(self.config, parent))
        for step in () if self.config.warm_start else self.model.start(self.batches):
            if self.team.leads:
                self.live.write_if_due(starting=True)
            yield self._said(step.what, step.fraction)
            if self.stop.is_set():
                raise Stopped("stopped")  # nothing is worth keeping yet: resuming starts over
        self.started = True
        self._plan()
        # everybody has started alike, up to what devices compute differently
        state = torch.get_rng_state()
        known = _tensors_in(self.model.training_state())
        self.team.same(state, *self.model.state_dict().values(), *known)
        torch.set_rng_state(state)
        if self.team.size > 1:
            self.model.agreed()

    def _train(self) -> Iterator[Progress]:
        checkpoint_s = 60 * self.config.train.checkpoint_minutes
        self._keep_good()
        if self.team.leads and not self.run_.can_resume:
            self._save_checkpoint()  # the start may have taken long
        saved_at = time.monotonic()
        while self.epoch < self.n_epochs:
            yield from self._train_epoch()
            self._keep_good()
            due = time.monotonic() - saved_at >= checkpoint_s or self.epoch == self.n_epochs
            if self.team.leads and due:
                self._save_checkpoint()
                saved_at = time.monotonic()

    def _train_epoch(self) -> Iterator[Progress]:
        self.model.train()
        self.status.update(what="training", epoch=self.epoch)
        order = torch.randperm(len(self.rows))
        self.team.same(order)
        meter = self.meter = _Meter(self.meter)
        for index in order.split(self.batch_size):
            if self.status.paused and self.team.size == 1:
                self._wait(meter)
            if self.team.any(self.stop.is_set()):
                self._go_back()
                if self.team.leads:
                    self._save_checkpoint()
                raise Stopped("stopped")
            losses = self._step(index)
            meter.add(losses, len(index))
            self.step += 1
            last = self.step % self.steps_per_epoch == 0
            if last:
                self.epoch += 1
            if self.team.leads and (last or meter.seconds >= LOG_S):
                yield self._report(meter)
                meter = self.meter = _Meter(meter)

    def _wait(self, meter: _Meter) -> None:
        """Stand still, with all in memory, until somebody lets it go on or stop."""
        began = time.monotonic()
        self.status.update(what="paused", seconds_left=-1.0)
        while self.status.paused and not self.stop.wait(PAUSE_LOOK_S):
            pass
        away = time.monotonic() - began
        self.began += away
        meter.began += away
        self.status.update(what="training")

    def _step(self, index: Tensor) -> dict[str, Tensor]:
        """One batch; the parts of an adversarial model are stepped one after the other."""
        fraction = self.step / self.n_steps
        self.model.schedule(fraction, self.epoch)
        portions = list(self._portions(index))
        named: dict[str, Tensor] = {}
        for part, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = self._rate(fraction)
            states, before = generator_states(self.device), self.model.training_state()
            while (losses := self._fitting_gradient(index, portions, part)) is None:
                # other programs took memory meanwhile: the same once more, in smaller parts
                self.at_once = max(1, min(self.at_once, len(index)) // 2)
                portions = list(self._portions(index))
                set_generator_states(states, self.device)
                self.model.load_training_state(before)
            if losses:  # else the part sits this step out
                optimiser.step()
            named |= {
                name if len(self.optimisers) == 1 else f"{part}/{name}": loss for name, loss in losses.items()
            }
        return named

    def _rate(self, fraction: float) -> float:
        """The learning rate after this share of all steps."""
        if self.config.train.schedule == "constant":
            return self.learning_rate
        return 0.5 * self.learning_rate * (1 + math.cos(math.pi * fraction))

    def _fitting_gradient(
        self, index: Tensor, portions: list[tuple[Batch, Share | None, float]], part: str
    ) -> dict[str, Tensor] | None:
        """`_gradient`, or None where memory holds it in smaller parts only."""
        try:
            return self._gradient(index, portions, part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if self.at_once == 1 or not self.model.step_bytes_per_image or self.team.size > 1:
                raise UserError(
                    f"the memory of {describe_device(self.device)} does not hold a step of"
                    f" {len(portions[0][0].row)} images; choose a smaller --train.batch-size or model"
                ) from error
        return None

    def _portions(self, index: Tensor) -> Iterator[tuple[Batch, Share | None, float]]:
        """A batch in parts that fit, of each this process's share: where it lies, its weight in the whole."""
        for start in range(0, len(index), self.at_once * self.team.size):
            some = index[start : start + self.at_once * self.team.size]
            mine, share, weight = self.team.portion(some)
            if len(some) < len(index):
                first = start + (share.first if share else 0)
                share = Share(first, len(index), (start, len(some)))
            yield self.batches.take(mine), share, weight * len(some) / len(index)

    def _gradient(
        self, index: Tensor, portions: list[tuple[Batch, Share | None, float]], part: str
    ) -> dict[str, Tensor]:
        """The gradient of a batch taken in parts and by processes, as if it had been whole; its losses."""
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        in_parts = len(portions) > 1
        if in_parts:
            ahead = (batch for batch, _, _ in portions)
            if self.team.size > 1:  # the rows of the others too
                ahead = (self.batches.take(some) for some in index.split(self.at_once))
            with autocast(self.model, self.device, self.config.train.precision):
                self.model.look_ahead(ahead)
        states = generator_states(self.device)
        for i, (batch, share, weight) in enumerate(portions):
            if i:  # all draw the numbers of the whole batch
                set_generator_states(states, self.device)
            self.model.share = share
            with autocast(self.model, self.device, self.config.train.precision):
                losses = self.model(batch, part)
            if not losses:
                return {}
            (torch.stack([loss.float() for loss in losses.values()]).sum() * weight).backward()
            for name, loss in losses.items():
                value = loss.detach() * weight
                sums[name] = sums[name] + value if name in sums else value
        self.model.share = None
        if in_parts:
            self.model.look_ahead(())
        if self.team.size > 1:
            own = (p.grad for group in self.optimisers[part].param_groups for p in group["params"])
            self.team.add([gradient for gradient in own if gradient is not None] + list(sums.values()))
        return sums

    def _finish(self) -> Iterator[Progress]:
        self.model.eval()
        for step in self.model.finish(self.batches):
            self.live.write_if_due()
            yield self._said(step.what, step.fraction)
            if self.stop.is_set():
                raise Stopped("stopped")  # the checkpoint after the last epoch is there: resuming finishes
        _save_weights(self.model, self.run_.path)
        self.live.write()

    def _encode(self) -> Iterator[Progress]:
        latents = None
        for fraction, latents in encode(self.model, self.session, precision=self.config.train.precision):
            yield self._said("encoding", fraction)
            if self.stop.is_set() and latents is None:
                raise Stopped("stopped")
        assert latents is not None
        self.run_.save_latents(latents)

    # -- reports

    def _said(self, what: str, fraction: float) -> Progress:
        self.status.update(what=what, fraction=fraction, seconds_left=-1.0)
        return Progress(
            what, fraction, self.epoch, self.n_epochs, self.step, self.n_steps, live=self.live.path
        )

    def _report(self, meter: _Meter) -> Progress:
        losses = meter.losses()
        if not all(math.isfinite(loss) for loss in losses.values()):
            self._refuse_loss()
        seconds = self.seconds_before + time.monotonic() - self.began
        left = (self.n_steps - self.step) * self.batch_size / max(meter.speed, 1e-9)
        fraction = self.step / self.n_steps
        self.status.update(
            what="training",
            fraction=fraction,
            epoch=self.epoch,
            images_per_second=round(meter.speed, 1),
            seconds_left=round(left, 1),
        )
        rate = self._rate(fraction)
        _append_metrics(
            self.run_.path / "metrics.csv",
            {
                "epoch": self.epoch,
                "step": self.step,
                "seconds": round(seconds, 3),
                "images_per_second": round(meter.speed, 1),
                "learning_rate": rate,
                "loss": sum(losses.values()),
                **losses,
            },
        )
        self.live.write_if_due()
        return Progress(
            "training",
            fraction,
            self.epoch,
            self.n_epochs,
            self.step,
            self.n_steps,
            losses,
            meter.speed,
            left,
            self.live.path,
        )

    # -- checkpoints

    def _state(self) -> dict[str, Any]:
        """All that resuming needs, as tensors and numbers."""
        return {
            "format_version": CHECKPOINT_VERSION,
            "kind": self.config.model.kind,
            "epoch": self.epoch,
            "at_once": self.at_once,
            "seconds": self.seconds_before + time.monotonic() - self.began,
            "weights": self.model.state_dict(),
            "optimisers": {part: optimiser.state_dict() for part, optimiser in self.optimisers.items()},
            "model": self.model.training_state(),
            "generators": generator_states(self.device),
        }

    def _keep_good(self) -> None:
        """Remember the state at the end of an epoch: what a stop in the next one, or a NaN, goes back to."""
        # buffers too: noise and ranges that are learned without a gradient
        if not all(bool(value.isfinite().all()) for value in self.model.state_dict().values()):
            if self._good is None:
                raise NotFinite(
                    f"the start of {self.run_.name} gave weights that are not numbers; check the images"
                )
            self._refuse_loss()
        self.team.check_agreement(self.model.parameters())
        self._good = _copied(self._state())

    def _go_back(self) -> None:
        """To the end of the last epoch: a checkpoint inside one could not repeat the uninterrupted run."""
        assert self._good is not None
        self._restore(self._good)

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch = int(state["epoch"])
        self.step = self.epoch * self.steps_per_epoch
        self.model.load_state_dict(state["weights"])
        for part, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][part])
        self.model.load_training_state(state["model"])
        set_generator_states(state["generators"], self.device)

    def _save_checkpoint(self) -> None:
        with replacing(self.run_.path / "resume.pt") as temporary:
            torch.save(self._state(), temporary)
        _save_weights(self.model, self.run_.path)

    def _load_checkpoint(self) -> None:
        path = self.run_.path / "resume.pt"
        refused, mine = f"{path} cannot be resumed from", self.config.model.kind
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            version, kind = int(state["format_version"]), state.get("kind", mine)
            weights = dict(state["weights"])
        except (*_NO_CHECKPOINT, EOFError, OSError, _pickle_error()) as error:
            reason = (isinstance(error, OSError) and error.strerror) or "it is damaged, or no checkpoint"
            raise UserError(f"{refused}: {reason}; start a new run") from error
        if version > CHECKPOINT_VERSION:
            raise UserError(
                f"{refused}: it has format version {version}, this program reads up to {CHECKPOINT_VERSION};"
                " install a newer, or start a new run"
            )
        if kind != mine:
            raise UserError(f"{refused}: it is of the model {kind}, this run's is {mine}; start a new run")
        try:
            self._restore(state)
        except _NO_CHECKPOINT as error:
            raise UserError(f"{refused}: {misfit(self.model, weights)}; start a new run") from error
        # parts of another size would round otherwise than the uninterrupted run
        self.at_once = min(self.at_once, int(state.get("at_once", self.at_once)))
        self.started = True
        self.seconds_before = float(state["seconds"])

    def _refuse_loss(self) -> None:
        epoch = (self.step - 1) // self.steps_per_epoch + 1
        self._go_back()
        if self.team.leads:
            self._save_checkpoint()
        kept = (
            f"the weights of epoch {self.epoch} were kept"
            if self.epoch
            else "the weights at the start were kept"
        )
        raise NotFinite(
            f"the loss is not a number any more in epoch {epoch}; {kept}; try a smaller"
            f" --train.learning-rate than {self.learning_rate:g}, or --train.precision float32"
        )


class _Meter:
    """Losses and speed between two reports."""

    def __init__(self, before: _Meter | None = None) -> None:
        self.speed: float = before.speed if before else 0.0
        self.n = 0
        self.known: dict[str, float] = before.known if before else {}
        """Losses of the last report: a part may have sat out since"""
        self.sums: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, losses: dict[str, Tensor], n: int) -> None:
        self.n += n
        for name, loss in losses.items():
            value = loss.float() * n  # a tensor: no wait for the device here
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.seen[name] = self.seen.get(name, 0) + n

    def losses(self) -> dict[str, float]:
        """Means; the speed is smoothed over some reports, because it decides the time left."""
        self.known = self.known | {name: float(sum_) / self.seen[name] for name, sum_ in self.sums.items()}
        now = self.n / max(self.seconds, 1e-9)
        self.speed = 0.7 * self.speed + 0.3 * now if self.speed else now
        return self.known


class _Live:
    """`live/NNNN.npz`: the map and some reconstructions as they are now, for whoever is watching.

    Files are numbered on and the one before the newest is kept, so that a reader never finds its file gone.
    """

    def __init__(self, fit: _Fit) -> None:
        self.fit = fit
        self.folder = fit.run_.path / "live"
        numbers = [int(path.stem) for path in self.folder.glob("[0-9]*.npz") if path.stem.isdigit()]
        self.number = max(numbers, default=-1) + 1
        self.path: Path | None = None
        self.due = time.monotonic()
        spread = np.random.default_rng(0)
        self.panel = np.sort(spread.permutation(len(fit.rows))[:N_PANEL])
        self.some = np.sort(spread.permutation(len(fit.rows))[:N_LIVE_ENCODED])

    def write_if_due(self, *, starting: bool = False) -> None:
        if time.monotonic() >= self.due:
            self.write(starting=starting)

    @torch.no_grad()
    def write(self, *, starting: bool = False) -> None:
        """Write a file now; random numbers of the fit are left as they are."""
        began = time.monotonic()
        model = self.fit.model
        latest = model.latest()
        if starting and latest is None:
            return  # a model that has not started has nothing to show
        training = model.training
        model.eval()
        devices = [self.fit.device] if self.fit.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._autocast():
            if latest is None:
                row, z = self._encode_some()
            else:
                row, z = (value.detach().float().cpu().numpy() for value in latest)
            nodes_z = model.nodes().to(self.fit.device)
            nodes_images = model.decode(nodes_z)[:, 0] if len(nodes_z) else torch.zeros(0, 1, 1)
            batch = self.fit.batches.take(torch.from_numpy(self.panel))
            encoding = model.encode(batch)
            drawn = model.decode(encoding.z, encoding.angle, encoding.shift)
        model.train(training)
        path = self.folder / f"{self.number:04d}.npz"
        with replacing(path, sync=False) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                epoch=self.fit.epoch,
                row=row[-MAX_LIVE:].astype(np.int64),
                z=z[-MAX_LIVE:].astype(np.float32),
                nodes_z=as_array(nodes_z),
                nodes_images=as_array(nodes_images),
                panel_row=self.fit.rows[self.panel],
                panel_images=as_array(batch.images[:, 0]),
                panel_reconstructions=as_array(drawn[:, 0]),
            )
        self.path = path
        (self.folder / f"{self.number - 2:04d}.npz").unlink(missing_ok=True)
        self.number += 1
        took = time.monotonic() - began
        self.due = time.monotonic() + max(LIVE_S, took / LIVE_SHARE)

    def _encode_some(self) -> tuple[NDArray[Any], NDArray[Any]]:
        parts = [
            self.fit.model.encode(self.fit.batches.take(index)).z
            for index in torch.from_numpy(self.some).split(ENCODE_AT_ONCE)
        ]
        return self.fit.rows[self.some], as_array(torch.cat(parts))

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.fit.model, self.fit.device, self.fit.config.train.precision)


def seed_everything(seed: int) -> None:
    """Seed torch on all devices, numpy's old generator and Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _save_weights(model: ParticleModel, folder: Path) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        safetensors.torch.save_file(weights, temporary)


def _append_metrics(path: Path, row: dict[str, float]) -> None:
    """Add a line; the header is written with the first, a line that a kill cut short is ended.

    A value that the header has and the line has not is not a number: a part sat out since a resume.
    """
    with path.open("a+b") as file:
        file.seek(0)
        names = file.readline().decode().strip().split(",")
        text = ""
        if names == [""]:
            names = list(row)
            text = ",".join(names) + "\n"
        else:
            file.seek(-1, os.SEEK_END)
            text = "" if file.read(1) == b"\n" else "\n"
        text += ",".join(f"{row.get(name, math.nan):.8g}" for name in names) + "\n"
        file.write(text.encode())  # one write: lines of two processes do not mix


def _copied(state: Any) -> Any:
    """A copy that later steps do not change; tensors go to main memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


def _tensors_in(state: dict[str, Any]) -> Iterator[Tensor]:
    """Those of a model's state, as they are."""
    for value in state.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors_in(value)


def _pickle_error() -> type[Exception]:
    import pickle

    return pickle.UnpicklingError


def _help(path: str, rank: str, size: str, port: str, resume: str) -> None:
    """What `team.led` starts: number `rank` of `size` processes that train the run at `path`."""
    folder = Path(path)
    run = Run(Session.open(folder.parents[1]), folder)
    ready_file(folder / f".helper-{rank}.log").touch()
    place = Place(int(rank), int(size), int(rank), int(size), int(port))
    with joined(run.config.device, place) as team:
        help_fit(run, team, resume=resume == "1")


if __name__ == "__main__":
    try:
        _help(*sys.argv[1:])
    except UserError as refused:
        sys.exit(str(refused))

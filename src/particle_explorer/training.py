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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer import preprocess
from particle_explorer.configs import RotationAEConfig, RunConfig
from particle_explorer.files import Stopped, UserError, locked, replacing
from particle_explorer.gauge import Gauge
from particle_explorer.io.inspecting import guessed_sign
from particle_explorer.latents import Latents
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Share
from particle_explorer.models.build import build_model
from particle_explorer.particles import Particles, carries_angles
from particle_explorer.pose import wrap_deg
from particle_explorer.session import Run, Session
from particle_explorer.status import StatusWriter
from particle_explorer.team import Team, joined, led, ready_file

LOG_S = 0.25
"""Least time between two reports"""
PAUSE_LOOK_S = 0.2
LIVE_S = 1.0
LIVE_SHARE = 0.05
"""Share of the time that may go into the live view"""
N_LIVE_ENCODED = 2000
MAX_LIVE = 50_000
N_PANEL = 9
ENCODE_AT_ONCE = 512
STEP_MEMORY_SHARE = 0.5
"""A batch is taken in parts where a step would need more than this of what is free"""
PIXEL_SIZE_TOLERANCE = 0.01
MEMORY_SHARE = 0.25
"""Images are held in memory when they take no more than this of what is free"""
FREE_MEMORY_UNKNOWN = 2 * 2**30
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


# ---------------------------------------------------------------------- images in, latents out


class SessionBatches:
    """The particles at `rows` of a session, as batches on a device (`models.base.Batches`).

    The cached float16 images stay in memory when they fit into a quarter of it; else each batch is read
    from disk. The CTF comes along only `with_ctf`, poses that the particles carry only `with_pose`: a model
    that does not look at them need not wait for them.
    """

    def __init__(
        self,
        session: Session,
        rows: NDArray[np.intp],
        device: torch.device,
        *,
        with_ctf: bool = False,
        with_pose: bool = False,
    ) -> None:
        self.session = session
        self.rows = rows
        self.device = device
        images = session.images
        n_bytes = 2 * len(rows) * int(np.prod(images.shape[1:]))
        fits = n_bytes <= MEMORY_SHARE * free_memory_bytes()
        self._held = torch.from_numpy(images.read_raw(rows)) if fits else None
        first_ctf = session.ctf(rows[:1]) if with_ctf else None
        self._has_ctf = first_ctf is not None
        self._ctf: Tensor | None = None
        if first_ctf is not None and first_ctf.nbytes * len(rows) <= MEMORY_SHARE * free_memory_bytes():
            self._ctf = torch.from_numpy(self._read_ctf(rows))
        self._pose = None
        if with_pose:
            self._pose = _carried_pose(session.table.iloc[rows], session.plan)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: Tensor) -> Batch:
        """The particles at these positions of `rows`."""
        at = index.to("cpu", torch.int64)
        rows = self.rows[at.numpy()]
        held = (
            self._held[at] if self._held is not None else torch.from_numpy(self.session.images.read_raw(rows))
        )
        ctf = None
        if self._has_ctf:
            ctf = self._ctf[at] if self._ctf is not None else torch.from_numpy(self._read_ctf(rows))
            ctf = ctf.to(self.device)
        pose = None if self._pose is None else self._pose[at].to(self.device)
        return Batch(held.to(self.device).float(), ctf, torch.from_numpy(rows).to(self.device), pose)

    def _read_ctf(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        parts = [self.session.ctf(rows[i : i + 4096]) for i in range(0, len(rows), 4096)]
        return np.concatenate([np.asarray(part, np.float32) for part in parts])


def _carried_pose(table: pd.DataFrame, plan: preprocess.Plan) -> Tensor | None:
    """`(n, 3)` angle (rad) and shift (cached px, y, x) of the source; None where it has no angles."""
    if not carries_angles(table):
        return None
    original_px = preprocess.original_pixels(table, plan)
    shift = [
        table[name].fillna(0).to_numpy(np.float64) / original_px if name in table else np.zeros(len(table))
        for name in ("shift_y_px", "shift_x_px")
    ]
    angle = np.deg2rad(table["angle_deg"].to_numpy(np.float64))
    return torch.from_numpy(np.stack([angle, *shift], 1).astype(np.float32))


def encode(
    model: ParticleModel, session: Session, rows: NDArray[np.intp] | None = None, *, precision: str = "auto"
) -> Iterator[tuple[float, Latents | None]]:
    """Latents of `rows` (default: all): yields (share done, None) while at it, at last (1, the Latents).

    Here, and nowhere else, radians become degrees and shifts of the cached images pixels of the original.
    """
    rows = np.arange(session.n_particles) if rows is None else rows
    images = SessionBatches(
        session, rows, _device_of(model), with_ctf=model.uses_ctf, with_pose=model.uses_pose
    )
    original_px = preprocess.original_pixels(session.table, session.plan)[rows]
    yield from _encode_batches(model, images, session.uid[rows], original_px, precision)


def encode_stack(
    model: ParticleModel, session: Session, particles: Particles, *, precision: str = "auto"
) -> Iterator[tuple[float, Latents | None]]:
    """The same of other particles, prepared like those of the session that the model was fitted to."""
    fitted = session.plan
    wanted = session.info.preprocess.model_copy(update={"box_px": fitted.cached_box_px})
    plan = preprocess.plan(particles.table, wanted, guessed_sign(particles, wanted))
    ratio = plan.cached_pixel_size_A / fitted.cached_pixel_size_A  # NaN where one is not known
    if abs(ratio - 1) > PIXEL_SIZE_TOLERANCE:
        raise UserError(
            f"{particles.source} prepared in {plan.cached_box_px} px has {plan.cached_pixel_size_A:.4g} Å per"
            f" pixel, but the model was fitted to {fitted.cached_pixel_size_A:.4g} Å per pixel"
        )
    if particles.images.n_channels != session.info.n_channels:
        raise UserError(
            f"{particles.source} has {particles.images.n_channels} channels, the model was fitted to"
            f" {session.info.n_channels}"
        )
    yield from encode_prepared(model, particles, plan, precision=precision)


def encode_prepared(
    model: ParticleModel, particles: Particles, plan: preprocess.Plan, *, precision: str = "auto"
) -> Iterator[tuple[float, Latents | None]]:
    """The same of any particles, prepared by a plan that is known already."""
    images = _ParticleBatches(
        particles, plan, _device_of(model), with_ctf=model.uses_ctf, with_pose=model.uses_pose
    )
    original_px = preprocess.original_pixels(particles.table, plan)
    uid = particles.table.index.to_numpy(np.uint64)
    yield from _encode_batches(model, images, uid, original_px, precision)


class _ParticleBatches:
    """Particles that are in no session, prepared as they are asked for."""

    def __init__(
        self,
        particles: Particles,
        plan: preprocess.Plan,
        device: torch.device,
        *,
        with_ctf: bool,
        with_pose: bool = False,
    ) -> None:
        self.particles, self.plan, self.device, self.with_ctf = particles, plan, device, with_ctf
        self._pose = _carried_pose(particles.table, plan) if with_pose else None

    def __len__(self) -> int:
        return len(self.particles)

    def take(self, index: Tensor) -> Batch:
        rows = index.numpy()
        table = self.particles.table.iloc[rows]
        stack, size = self.particles.images, self.plan.cached_box_px
        images = np.empty((len(rows), stack.n_channels, size, size), np.float32)
        boxes = stack.box_px[rows]
        for box in np.unique(boxes):
            some = boxes == box
            images[some] = preprocess.apply(stack.read(rows[some]), table[some], self.plan)
        ctf = preprocess.effective_ctf(table, self.plan) if self.with_ctf else None
        return Batch(
            torch.from_numpy(images).to(self.device),
            None if ctf is None else torch.from_numpy(ctf).to(self.device),
            index.to(self.device),
            None if self._pose is None else self._pose[index].to(self.device),
        )


@torch.no_grad()
def _encode_batches(
    model: ParticleModel,
    images: Batches,
    uid: NDArray[np.uint64],
    original_px: NDArray[np.float64],
    precision: str,
) -> Iterator[tuple[float, Latents | None]]:
    parts: list[Encoding] = []
    model.eval()
    n, at_once = len(images), max(ENCODE_AT_ONCE, model.batch_size)
    for start in range(0, n, at_once):
        index = torch.arange(start, min(start + at_once, n))
        with autocast(model, _device_of(model), precision):
            encoding = model.encode(images.take(index))
        parts.append(_to_cpu(encoding))
        yield min(1.0, (start + at_once) / n), None
    yield 1.0, to_latents(uid, parts, original_px)


def _device_of(model: ParticleModel) -> torch.device:
    return next(model.parameters()).device


def to_latents(uid: NDArray[np.uint64], parts: list[Encoding], original_px: NDArray[np.float64]) -> Latents:
    """Encodings in radians and cached pixels → degrees and pixels of the originals.

    `original_px` `(n,)` is how many pixels of the original one cached pixel is.
    """

    def joined(name: str) -> NDArray[np.float64] | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values).double().numpy()

    z, z_std, angle, shift = (joined(name) for name in ("z", "z_std", "angle", "shift"))
    assert z is not None
    extras = {}
    for name in parts[0].extras:
        values = torch.cat([part.extras[name] for part in parts]).double().numpy()
        if name == "angle_std":
            extras["angle_std_deg"] = np.rad2deg(values)
        elif name == "shift_std":
            extras["shift_std_px"] = values * original_px
        else:
            extras[name] = values
    return Latents(
        uid=uid,
        z=z.astype(np.float32),
        z_std=None if z_std is None else z_std.astype(np.float32),
        angle_deg=None if angle is None else wrap_deg(np.rad2deg(angle)).astype(np.float32),
        shift_yx_px=None if shift is None else (shift * original_px[:, None]).astype(np.float32),
        extras={name: values.astype(np.float32) for name, values in extras.items()},
    )


def load_model(run: Run, device: torch.device | str = "cpu") -> ParticleModel:
    """The fitted model of a run, ready to encode and decode."""
    path = run.path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"run {run.name} has no weights yet; train it, or resume it with --resume {run.name}")
    model = build_model(run.config.model, run.config.data)
    model.precision = run.config.train.precision
    try:
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged and holds no weights; train the run again") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not hold the weights of this run's {run.config.model.kind}:"
            f" {_misfit(model, weights)}; put back its own file, or train the run again"
        ) from error
    return model.to(device).eval()


def weights_to_start_from(config: RunConfig, parent: Run) -> dict[str, Tensor]:
    """The weights of another run, for a fit of the same model to the same images; else says what differs."""
    refused, theirs = f"a run cannot start from the weights of {parent.name}", parent.config
    if theirs.model.kind != config.model.kind:
        raise UserError(
            f"{refused}: that is of the model {theirs.model.kind}, the new one would be of"
            f" {config.model.kind}; choose the same model, or start anew"
        )
    for name in ("box_px", "n_channels", "diameter_px"):
        here, before = getattr(config.data, name), getattr(theirs.data, name)
        if here != before:
            raise UserError(f"{refused}: it was fitted to images of {name} {before:g}, these have {here:g}")
    differ = [
        f"{field.title or name} is {getattr(theirs.model, name)} there and {getattr(config.model, name)} here"
        for name, field in type(config.model).model_fields.items()
        if getattr(theirs.model, name) != getattr(config.model, name)
    ]
    ours, there = config.model, theirs.model
    if (
        isinstance(ours, RotationAEConfig)
        and isinstance(there, RotationAEConfig)
        and ours.poses != there.poses
    ):
        raise UserError(f"{refused}: {'; '.join(differ)}; keep the angles to learn from, or start anew")
    path = parent.path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{refused}: it has none yet")
    try:
        weights = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{refused}: {path} is damaged") from error
    model = build_model(config.model, config.data)
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        why = "; ".join(differ) or _misfit(model, weights)
        keep = "keep what gives the networks their size, or start anew"
        raise UserError(f"{refused}: {why}; {keep}") from error
    return weights


def _misfit(model: ParticleModel, weights: dict[str, Tensor]) -> str:
    """The first difference of `weights` from those that a model has, in a few words."""
    wanted = model.state_dict()
    for name, value in wanted.items():
        if name not in weights:
            return f"it has no {name}"
        if weights[name].shape != value.shape:
            found, right = ("×".join(map(str, one.shape)) or "1" for one in (weights[name], value))
            return f"its {name} has the shape {found}, not {right}"
    unknown = [name for name in weights if name not in wanted]
    return f"this model has no {unknown[0]}" if unknown else "its parts are not those of this model"


@torch.no_grad()
def pose_posterior(model: ParticleModel, run: Run, rows: Sequence[int]) -> NDArray[np.float32]:
    """Probabilities `(b, r, m, m)` of every angle (r) and shift (y, x) of particles, see `models.base`."""
    n = run.session.n_particles
    for row in rows:
        if not 0 <= row < n:
            raise UserError(f"there is no particle {row}; rows go from 0 to {n - 1}")
    images = SessionBatches(run.session, np.asarray(rows), _device_of(model), with_ctf=model.uses_ctf)
    with autocast(model, _device_of(model), run.config.train.precision):
        q = model.pose_posterior(images.take(torch.arange(len(rows))))
    if q is None:
        raise UserError(
            f"the model of run {run.name} ({run.config.model.kind}) does not weigh poses against each other;"
            " target-vae does"
        )
    return _array(q)


class Drawer:
    """The pictures of a run's model on the CPU, for the process that draws under the mouse."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.model = load_model(run)
        self.latent_dim = self.model.latent_dim
        self._read_gauge: tuple[int, Gauge] | None = None
        data = run.config.data
        self.shape = (data.n_channels, data.box_px)
        for _ in range(2):  # the first pass of a model costs many times the next
            self.draw(np.zeros((1, self.latent_dim), np.float32), None, None, False)

    @torch.inference_mode()
    def draw(
        self,
        z: NDArray[np.float32],
        angle_deg: NDArray[np.float32] | None,
        shift_yx_px: NDArray[np.float32] | None,
        held: bool,
    ) -> NDArray[np.float32]:
        """`(b, d)` → `(b, c, m, m)`; a pose turns and shifts the canonical view, or, `held`, the held one."""
        if held:
            zero = np.zeros((len(z), 2), np.float32)
            angle_deg = zero[:, 0] if angle_deg is None else angle_deg
            pose = self._gauge().pose_to_draw(z, angle_deg, zero if shift_yx_px is None else shift_yx_px)
            angle_deg, shift_yx_px = (part.astype(np.float32) for part in pose)
        angle = None if angle_deg is None else torch.deg2rad(torch.from_numpy(angle_deg))
        shift = None if shift_yx_px is None else torch.from_numpy(shift_yx_px)
        with autocast(self.model, torch.device("cpu"), "auto"):
            return _array(self.model.decode(torch.from_numpy(z), angle, shift))

    def _gauge(self) -> Gauge:
        """The gauge of the run, read again when it was written anew."""
        path = self.run.path / "gauge.json"
        if not path.is_file():
            raise UserError(f"run {self.run.name} holds nothing still yet")
        written = path.stat().st_mtime_ns
        if self._read_gauge is None or self._read_gauge[0] != written:
            self._read_gauge = written, Gauge.from_json(self.run.gauge() or {})
        return self._read_gauge[1]


# ---------------------------------------------------------------------- devices and precision


def choose_device(wanted: str = "auto") -> torch.device:
    """`cpu`, `mps`, `cuda:N`, or `auto`: the CUDA device with most free memory, else MPS, else CPU."""
    n_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu":
        return torch.device("cpu")
    if wanted == "mps" or (wanted == "auto" and n_cuda == 0 and torch.backends.mps.is_available()):
        if not torch.backends.mps.is_available():
            raise UserError("there is no Apple GPU that torch can use here; choose --device auto or cpu")
        return torch.device("mps")
    if wanted in ("auto", "cuda"):
        if n_cuda:
            free = [torch.cuda.mem_get_info(i)[0] for i in range(n_cuda)]
            return torch.device("cuda", int(np.argmax(free)))
        if wanted == "auto":
            return torch.device("cpu")
    number = wanted.removeprefix("cuda:")
    if wanted == "cuda" or (wanted.startswith("cuda:") and number.isdigit()):
        if wanted == "cuda" or int(number) >= n_cuda:
            there = f"{n_cuda} CUDA devices" if n_cuda else "no CUDA device"
            raise UserError(f"--device {wanted}: torch finds {there} here; choose --device auto or cpu")
        return torch.device("cuda", int(number))
    raise UserError(f"--device {wanted} is not known; choose auto, cpu, mps or cuda:N")


def describe_device(device: torch.device) -> str:
    """In the words of a user: the name of the GPU, or the number of CPU threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index or 0})"
    threads = torch.get_num_threads()
    return "Apple GPU" if device.type == "mps" else f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than float32 here: the hardware has them."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # emulated bf16 would be slower
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def autocast(model: ParticleModel, device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context that steps and encoding of `model` run in."""
    if not model.autocast or precision == "float32" or (precision == "auto" and not has_bf16(device)):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def stand_back() -> None:
    """Leave one core for others."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), n_cores - 1)))


def free_memory_bytes() -> int:
    """Memory that could be had now, by the system's count."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * int(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    except (OSError, KeyError):
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            free = FREE_MEMORY_UNKNOWN
    group = Path("/sys/fs/cgroup")  # a container may have less than the computer
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such limit ("max")
        return free
    return min(free, max(0, limit - used))


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
        The processes that train together, where `torchrun` has started them; else as many as
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
        self.n_epochs = train.n_epochs or self.model.n_epochs
        self.batch_size = min(train.batch_size or self.model.batch_size, len(self.rows))
        self.at_once = self._images_at_once()
        self.learning_rate = train.learning_rate or self.model.learning_rate
        self.steps_per_epoch = math.ceil(len(self.rows) / self.batch_size)
        self.n_steps = self.n_epochs * self.steps_per_epoch
        self.optimisers = {
            part: torch.optim.Adam(parameters, lr=self.learning_rate, betas=self.model.betas)
            for part, parameters in self.model.parts().items()
            if parameters
        }
        self.status.update(n_epochs=self.n_epochs)
        if self.config.warm_start:
            self.model.skip_warm_up()
        if self.resume and self.run_.can_resume:
            self._load_checkpoint()
        self.began = time.monotonic()

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
        # everybody has started alike, up to what devices compute differently
        state = torch.get_rng_state()
        self.team.same(state, *self.model.state_dict().values())
        torch.set_rng_state(state)

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
                group["lr"] = 0.5 * self.learning_rate * (1 + math.cos(math.pi * fraction))
            try:
                losses = self._gradient(portions, part)
            except torch.OutOfMemoryError as error:
                if self.at_once == 1 or not self.model.step_bytes_per_image or self.team.size > 1:
                    raise UserError(
                        f"the memory of {describe_device(self.device)} does not hold a step of"
                        f" {len(portions[0][0].row)} images; choose a smaller --train.batch-size or model"
                    ) from error
                # other programs took memory meanwhile: this step once more, in smaller parts
                self.at_once = max(1, self.at_once // 2)
                return self._step(index)
            if losses:  # else the part sits this step out
                optimiser.step()
            named |= {
                name if len(self.optimisers) == 1 else f"{part}/{name}": loss for name, loss in losses.items()
            }
        return named

    def _portions(self, index: Tensor) -> Iterator[tuple[Batch, Share | None, float]]:
        """A batch in parts that fit, of each this process's share: where it lies, its weight in the whole."""
        for some in index.split(self.at_once * self.team.size):
            mine, share, weight = self.team.portion(some)
            yield self.batches.take(mine), share, weight * len(some) / len(index)

    def _gradient(self, portions: list[tuple[Batch, Share | None, float]], part: str) -> dict[str, Tensor]:
        """The gradient of a batch taken in parts and by processes, as if it had been whole; its losses."""
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for batch, share, weight in portions:
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
        if self.team.size > 1:
            own = (p.grad for group in self.optimisers[part].param_groups for p in group["params"])
            self.team.add([gradient for gradient in own if gradient is not None] + list(sums.values()))
        return sums

    def _images_at_once(self) -> int:
        """How many images of a batch a step can hold: the batch, or a power of two."""
        each = self.model.step_bytes_per_image
        if not each:
            return self.batch_size
        free = free_memory_bytes()
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        fits = int(STEP_MEMORY_SHARE * free) // each
        return self.batch_size if fits >= self.batch_size else 2 ** int(math.log2(max(1, fits)))

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
        rate = 0.5 * self.learning_rate * (1 + math.cos(math.pi * fraction))
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
        generators = {"torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "format_version": CHECKPOINT_VERSION,
            "kind": self.config.model.kind,
            "epoch": self.epoch,
            "at_once": self.at_once,
            "seconds": self.seconds_before + time.monotonic() - self.began,
            "weights": self.model.state_dict(),
            "optimisers": {part: optimiser.state_dict() for part, optimiser in self.optimisers.items()},
            "model": self.model.training_state(),
            "generators": generators,
        }

    def _keep_good(self) -> None:
        """Remember the state at the end of an epoch: what a stop in the next one, or a NaN, goes back to."""
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
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
        torch.set_rng_state(state["generators"]["torch"].cpu())
        if "cuda" in state["generators"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"].cpu(), self.device)

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
            raise UserError(f"{refused}: {_misfit(self.model, weights)}; start a new run") from error
        # parts of another size would draw other random numbers than the uninterrupted run
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
                nodes_z=_array(nodes_z),
                nodes_images=_array(nodes_images),
                panel_row=self.fit.rows[self.panel],
                panel_images=_array(batch.images[:, 0]),
                panel_reconstructions=_array(drawn[:, 0]),
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
        return self.fit.rows[self.some], _array(torch.cat(parts))

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


def _to_cpu(encoding: Encoding) -> Encoding:
    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.float().cpu()

    extras = {name: value.float().cpu() for name, value in encoding.extras.items()}
    z = encoding.z.float().cpu()
    return Encoding(z, moved(encoding.z_std), moved(encoding.angle), moved(encoding.shift), extras)


def _copied(state: Any) -> Any:
    """A copy that later steps do not change; tensors go to main memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


def _array(tensor: Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()


def _pickle_error() -> type[Exception]:
    import pickle

    return pickle.UnpicklingError


def _help(path: str, rank: str, size: str, resume: str) -> None:
    """What `team.led` starts: number `rank` of `size` processes that train the run at `path`."""
    folder = Path(path)
    run = Run(Session.open(folder.parents[1]), folder)
    ready_file(folder / f".helper-{rank}.log").touch()
    with joined(run.config.device, int(rank), int(size), folder / ".team") as team:
        help_fit(run, team, resume=resume == "1")


if __name__ == "__main__":
    try:
        _help(*sys.argv[1:])
    except UserError as refused:
        sys.exit(str(refused))

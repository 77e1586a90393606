"""A trained model at work: images in, latents and poses out; and pictures drawn at places of its map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from particle_explorer import preprocess
from particle_explorer.configs import RotationAEConfig, RunConfig
from particle_explorer.devices import autocast, free_memory_bytes
from particle_explorer.files import UserError
from particle_explorer.gauge import Gauge
from particle_explorer.io.inspecting import guessed_sign
from particle_explorer.latents import Latents
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel
from particle_explorer.models.build import build_model
from particle_explorer.models.layers import disc_pixels
from particle_explorer.particles import Particles, carries_angles
from particle_explorer.pose import wrap_deg
from particle_explorer.session import Run, Session

ENCODE_AT_ONCE = 512
RESIDUAL = "residual"
"""Name of the column that says how much of an image its model leaves unexplained"""
PIXEL_SIZE_TOLERANCE = 0.01
MEMORY_SHARE = 0.25
"""Images are held in memory when they take no more than this of what is free"""


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
        session, rows, device_of_model(model), with_ctf=model.uses_ctf, with_pose=model.uses_pose
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
        particles, plan, device_of_model(model), with_ctf=model.uses_ctf, with_pose=model.uses_pose
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
        with autocast(model, device_of_model(model), precision):
            batch = images.take(index)
            encoding = model.encode(batch)
            if RESIDUAL not in encoding.extras:  # the class maps find their own while they search
                encoding.extras[RESIDUAL] = unexplained(model, batch, encoding)
        parts.append(_to_cpu(encoding))
        yield min(1.0, (start + at_once) / n), None
    yield 1.0, to_latents(uid, parts, original_px)


@torch.no_grad()
def unexplained(model: ParticleModel, batch: Batch, encoding: Encoding) -> Tensor:
    """`(b,)` mean square of what is left of each image without what the model draws of it where it lies.

    Over the disc of the particle, in units of the variance of the background.
    """
    drawn = model.decode(encoding.z, encoding.angle, encoding.shift).float()
    if batch.ctf is not None:  # a model that asks for it draws without
        drawn = torch.fft.irfft2(torch.fft.rfft2(drawn) * batch.ctf[:, None], s=drawn.shape[-2:])
    disc = disc_pixels(model.data.box_px, model.data.diameter_px / 2).to(drawn.device)
    off = (batch.images - drawn).flatten(2)[:, :, disc]
    return off.square().mean((1, 2))


def device_of_model(model: ParticleModel) -> torch.device:
    """Where its weights are."""
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
            f" {misfit(model, weights)}; put back its own file, or train the run again"
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
        why = "; ".join(differ) or misfit(model, weights)
        keep = "keep what gives the networks their size, or start anew"
        raise UserError(f"{refused}: {why}; {keep}") from error
    return weights


def misfit(model: ParticleModel, weights: dict[str, Tensor]) -> str:
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
    images = SessionBatches(run.session, np.asarray(rows), device_of_model(model), with_ctf=model.uses_ctf)
    with autocast(model, device_of_model(model), run.config.train.precision):
        q = model.pose_posterior(images.take(torch.arange(len(rows))))
    if q is None:
        raise UserError(
            f"the model of run {run.name} ({run.config.model.kind}) does not weigh poses against each other;"
            " target-vae does"
        )
    return as_array(q)


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
            return as_array(self.model.decode(torch.from_numpy(z), angle, shift))

    def _gauge(self) -> Gauge:
        """The gauge of the run, read again when it was written anew."""
        path = self.run.path / "gauge.json"
        if not path.is_file():
            raise UserError(f"run {self.run.name} holds nothing still yet")
        written = path.stat().st_mtime_ns
        if self._read_gauge is None or self._read_gauge[0] != written:
            self._read_gauge = written, Gauge.from_json(self.run.gauge() or {})
        return self._read_gauge[1]


def _to_cpu(encoding: Encoding) -> Encoding:
    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.float().cpu()

    extras = {name: value.float().cpu() for name, value in encoding.extras.items()}
    z = encoding.z.float().cpu()
    return Encoding(z, moved(encoding.z_std), moved(encoding.angle), moved(encoding.shift), extras)


def as_array(tensor: Tensor) -> NDArray[np.float32]:
    """A tensor of any device and precision in main memory."""
    return tensor.detach().float().cpu().numpy()

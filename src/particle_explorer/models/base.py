"""The contract of a model: three questions, and losses that are named terms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, distributed, nn

from particle_explorer.configs import Config, DataSpec
from particle_explorer.devices import generator_states, set_generator_states


class Batch(NamedTuple):
    """Some particles as the model sees them."""

    images: Tensor
    """`(b, c, n, n)` float32; background about 0 with standard deviation about 1, particle bright."""
    ctf: Tensor | None
    """`(b, n, n // 2 + 1)` effective CTF of the cached images (|CTF| after phase flipping), or None."""
    row: Tensor
    """`(b,)` int64 rows of the session's table."""
    pose: Tensor | None = None
    """`(b, 3)` placement that the particles carry: angle (rad), shift (px of the batch, y, x); None where
    they carry none, or the model does not ask."""


class Encoding(NamedTuple):
    """What a model says of some particles; angles in radians, shifts in pixels of the batch, yx."""

    z: Tensor
    """`(b, d)`"""
    z_std: Tensor | None
    angle: Tensor | None
    """`(b,)` placement angle, see `pose`"""
    shift: Tensor | None
    """`(b, 2)` placement shift"""
    extras: dict[str, Tensor]
    """Further numbers per particle, `(b,)` each: `log_likelihood`, `angle_std` (rad), `shift_std` (px),
    `pose_entropy` (nats), `junk_probability`, `residual` (mean square left unexplained, noise 1; computed
    from the drawing where a model does not say it)."""


class Share(NamedTuple):
    """Which rows of a step's batch this process computes now; the rest is others' or comes later."""

    first: int
    total: int
    together: tuple[int, int] | None = None
    """First and number of the rows that all processes compute at this time; None stands for all."""

    @property
    def now(self) -> tuple[int, int]:
        """`together`, with numbers in any case."""
        return self.together or (0, self.total)


class Batches(Protocol):
    """The particles that are fitted, by position 0 … `len` - 1 in the fitted set."""

    def __len__(self) -> int: ...

    def take(self, index: Tensor) -> Batch:
        """The particles at these positions, on the model's device."""


class Step(NamedTuple):
    """One report of `start` or `finish`: what is being done, and how much of it is done (0 to 1)."""

    what: str
    fraction: float


class _Summed(torch.autograd.Function):
    """The sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        distributed.all_reduce(gradient)
        return gradient


class ParticleModel(nn.Module, ABC):
    """A model of particle images that keeps content and pose apart.

    A subclass is built from its config and a `DataSpec` alone (weights come after), keeps its random
    numbers in torch's global generator, and works on any device and in any box from 16 to 256 px.
    """

    latent_dim: int
    learning_rate: float = 1e-4
    """What `TrainConfig.learning_rate = 0` means for this model."""
    batch_size: int = 100
    n_epochs: int = 20
    precision: str = "auto"
    """The setting of this name, told by training: `float32` forbids products in lower precision."""
    uses_ctf: bool = False
    """Whether batches should carry the CTF; computing it takes time."""
    uses_pose: bool = False
    """Whether batches should carry the poses of the source, where it has any."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    share: Share | None = None
    """Told before what is not the whole batch of a step, because several processes take it together or it is
    taken in parts."""
    step_bytes_per_image: int = 0
    """Memory that a training step takes for each image, about; a batch that does not fit is taken in parts
    whose gradients are added. 0 says that it is small."""
    autocast: bool = False
    """Whether steps and encoding may run under bf16 autocast; a model with products of its own says no."""

    def __init__(self, config: Config, data: DataSpec) -> None:
        super().__init__()
        self.config = config
        self.data = data

    @abstractmethod
    def encode(self, batch: Batch) -> Encoding:
        """Content and pose of each image; deterministic."""

    @abstractmethod
    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """`(b, d)` → `(b, c, n, n)`; the canonical view, or the view at `angle` (rad) and `shift` (px yx)."""

    @abstractmethod
    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        """Named scalar losses, averaged over the batch, whose sum is minimised.

        A part that sits this step out answers with none; it takes part in the first step of a fit.
        """

    def drawn(
        self, draw: Callable[..., Tensor], rows: int, *size: int, device: torch.device | None = None
    ) -> Tensor:
        """Random numbers `(rows, *size)` by `torch.randn` or its like, a row per particle of the batch.

        Parts of a step's batch draw for all of it and keep their rows: the numbers do not depend on how many
        they are. Those that one process takes after each other start from the same state of its generators.
        """
        if self.share is None:
            return draw(rows, *size, device=device)
        return draw(self.share.total, *size, device=device)[self.share.first : self.share.first + rows]

    def normal_like(self, values: Tensor) -> Tensor:
        """Normal random numbers of the shape of values of this process's rows, by `drawn`."""
        return self.drawn(torch.randn, *values.shape, device=values.device).to(values.dtype)

    def gathered(self, values: Tensor) -> Tensor:
        """Values `(b, ...)` of this process's rows → those of all processes now, with their gradient."""
        if self.share is None or len(values) == self.share.now[1]:
            return values
        start, total = self.share.now
        first = self.share.first - start
        empty = values.new_zeros(total, *values.shape[1:])
        whole: Tensor = _Summed.apply(torch.cat([empty[:first], values, empty[first + len(values) :]]))
        return whole

    def own(self, values: Tensor, rows: int) -> Tensor:
        """The rows of this process, of values of all processes."""
        first = 0 if self.share is None else self.share.first - self.share.now[0]
        return values[first : first + rows]

    def look_ahead(self, parts: Iterable[Batch]) -> None:
        """Told all parts of a batch before they are taken one after the other; none when it is done.

        For a loss that depends on the batch as a whole.
        """

    def in_parts(self, batches: Batches, index: Tensor, at_once: int) -> Iterator[tuple[Batch, float]]:
        """The particles at `index` in parts of `at_once`, each with its weight in the mean over all of them.

        Random numbers drawn for the parts are those of the whole.
        """
        if at_once >= len(index):
            yield batches.take(index), 1.0
            return
        device = next(self.parameters()).device
        self.look_ahead(batches.take(some) for some in index.split(at_once))
        states = generator_states(device)
        for start in range(0, len(index), at_once):
            some = index[start : start + at_once]
            if start:
                set_generator_states(states, device)
            self.share = Share(start, len(index), (start, len(some)))
            yield batches.take(some), len(some) / len(index)
        self.share = None
        self.look_ahead(())

    def pose_posterior(self, batch: Batch) -> Tensor | None:
        """`(b, r, m, m)` the probability of angle 2 pi i / r and shift (y, x), none in the middle.

        None where a model does not weigh poses against each other.
        """
        return None

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Groups of parameters that are optimised in turn; more than one for an adversarial model."""
        return {"model": list(self.parameters())}

    def start(self, batches: Batches) -> Iterator[Step]:
        """Prepare from data before the first step; yields often, so that a stop is obeyed."""
        yield from ()

    def skip_warm_up(self) -> None:
        """Told before the first step of a fit that starts from the weights of another one."""

    def schedule(self, fraction: float, epoch: int) -> None:
        """Told before each step how much of the training is done (0 to 1)."""

    def finish(self, batches: Batches) -> Iterator[Step]:
        """Put the last touch to a fit (the class map's exact passes and gauge)."""
        yield from ()

    def nodes(self) -> Tensor:
        """`(k, d)` latent positions worth showing while training; `(0, d)` where there are none."""
        return torch.zeros(0, self.latent_dim)

    def latest(self) -> tuple[Tensor, Tensor] | None:
        """Rows `(m,)` and latent positions `(m, d)` of particles seen lately, for the live view.

        None where they are not at hand; training then encodes some particles itself.
        """
        return None

    def agreed(self) -> None:
        """Told where several processes train together: they have the weights, buffers and tensors of the
        `training_state` of the first now."""

    def training_state(self) -> dict[str, Any]:
        """Tensors and numbers beyond the weights that resuming needs; loadable with `weights_only=True`."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Undo `training_state`."""

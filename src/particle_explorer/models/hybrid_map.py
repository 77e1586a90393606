"""The class map of many dimensions: its search for poses, and an encoder and decoder for the content.

A grid of classes grows with the power of its dimensions; poses do not need it. So a class map of two
dimensions is fitted as ever, and gives each particle the few poses that it may have. Then an encoder looks
at the image brought back from each of them and a decoder draws it: with whitened images y, z ~ q(z | y, pose)
and m = D(z),

    log p(y | pose) - log p(y | noise alone) ≥ E_q[ y · m_pose - ½ ‖m_pose‖² ] - KL(q(z | y, pose) ‖ N(0, 1)),

and the poses of a particle share it by that bound, exactly. One of them, drawn by its share, carries the
gradient, by as much as it is no junk. The canonical frame is the map's, registered before the content is
learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from particle_explorer.configs import ClassMapConfig, DataSpec
from particle_explorer.files import UserError
from particle_explorer.models.base import Batch, Batches, Encoding, ParticleModel, Step
from particle_explorer.models.class_map import ClassMap
from particle_explorer.models.layers import SmoothDecoder, gaussian_kl
from particle_explorer.transforms import place

_N_MODES = 3
"""Poses kept of each particle."""
_N_IMAGES = 240_000
"""Images that the content is learned from, passes included."""
_KL_RAMP = 0.2
"""Share of the training in which the prior of the content gains its weight."""
_LEAST_NOISE = 0.02
_REFINED_AT_ONCE = 256


class _Content(NamedTuple):
    """Images at several poses, seen and drawn."""

    mean: Tensor
    """`(b, p, d)`"""
    log_sd: Tensor
    """`(b, p, d)`"""
    score: Tensor
    """`(b, p)` nats over noise alone, the prior's share taken off"""


class HybridMap(ParticleModel):
    """A class map of more dimensions than a grid can have; see the module's text."""

    learning_rate = 2e-3
    batch_size = 128
    uses_ctf = True

    def __init__(self, config: ClassMapConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.latent_dim = d = config.latent_dim
        self.mirror = config.mirror
        self.map = ClassMap(config.model_copy(update={"latent_dim": 2, "mirror": False}), data)
        self.uses_pose = self.map.uses_pose
        n, c = self.map.box, data.n_channels
        self.n_epochs = max(8, min(300, math.ceil(_N_IMAGES / data.n_particles)))
        self.step_bytes_per_image = 4 * n * n * c * 200
        sides = [-(-n // 2**i) for i in range(4)]
        self.encoder = nn.Sequential(
            nn.Conv2d(c, 16, 5, stride=2, padding=2), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(32 * sides[3] ** 2, 256), nn.SiLU(), nn.Linear(256, 2 * d),
        )  # fmt: skip
        self.decoder = SmoothDecoder(d, c, n, self.map.disc_px)
        self.register_buffer("contrast", torch.tensor(1.0))
        self.register_buffer("noise", torch.tensor(1.0))
        self.contrast: Tensor
        """Root mean square of the images that the encoder sees."""
        self.noise: Tensor
        """Variance of what the decoder leaves of a pixel, over that of the map's noise: below 1 where classes
        differ in kind, which the map holds for noise."""
        self.kl_weight = 1.0
        self._ramp = _KL_RAMP
        self._modes: dict[str, Tensor] = {}
        """By row of the session: `angle` `(N, p)`, `move` and `score` of its poses, its `centre`, and the
        probability that it is `junk`; nan where not known yet."""
        self._last_z: Tensor | None = None

    @property
    def precision(self) -> str:  # type: ignore[override]
        """The map's, which searches by it; told anew after every load."""
        return self.map.precision

    @precision.setter
    def precision(self, setting: str) -> None:
        self.map.precision = setting

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"model": [*self.encoder.parameters(), *self.decoder.parameters()]}

    # ---- fitting

    def start(self, batches: Batches) -> Iterator[Step]:
        """Fit the map that finds poses, then keep the poses of all particles that are fitted."""
        if self.mirror:
            raise UserError(
                f"--model.mirror is for maps of up to 3 dimensions, this one has {self.latent_dim};"
                " choose fewer dimensions, or leave mirror images out"
            )
        yield from self.map.fit(batches)
        yield from self._find_modes(batches)
        with torch.no_grad():
            self.decoder.base.copy_(self._canonical_nodes().mean(0))
            some = torch.linspace(0, len(batches) - 1, min(len(batches), 512)).round().long()
            batch = batches.take(some)
            views, _ = self._views(batch, self._known(batch))
            self.contrast.copy_((views * self.map.mask).square().mean().sqrt().clamp_min(1e-6))

    @torch.no_grad()
    def _find_modes(self, batches: Batches) -> Iterator[Step]:
        for i, part in enumerate(torch.arange(len(batches)).split(1000)):
            batch = batches.take(part)
            self._keep_modes(batch.row, self._found(self.map.encode_modes(batch, _N_MODES)))
            yield Step("poses", min(1.0, (i + 1) * 1000 / len(batches)))

    def _keep_modes(self, row: Tensor, found: dict[str, Tensor]) -> None:
        size = max(self.data.n_particles, int(row.max()) + 1)
        for name, values in found.items():
            if name not in self._modes:
                self._modes[name] = values.new_full((size, *values.shape[1:]), torch.nan)
            self._modes[name] = _long_enough(self._modes[name], size)
            self._modes[name][row] = values

    def _canonical_nodes(self) -> Tensor:
        """`(k, c, n, n)` the classes of the map in the frame that poses are reported in."""
        z = self.map.node_z
        turn, move = self.map.frames(z)
        return place(self.map.decoder(z), turn, move, mode="bicubic")

    def agreed(self) -> None:
        self.map.agreed()

    def skip_warm_up(self) -> None:
        self._ramp = 0.0

    def schedule(self, fraction: float, epoch: int) -> None:
        self.kl_weight = min(1.0, 0.05 + fraction / self._ramp) if self._ramp else 1.0

    def forward(self, batch: Batch, part: str = "model") -> dict[str, Tensor]:
        modes = self._known(batch)
        with torch.no_grad():
            views, ctf_square = self._views(batch, modes)
            seen = self._seen(views, ctf_square, modes)
            share = (seen.score / self.noise).softmax(1)
            dice = self.drawn(torch.rand, len(share), 1, device=share.device)
            chosen = (share.cumsum(1) < dice).sum(1).clamp_max(share.shape[1] - 1)
            at = torch.arange(len(views), device=views.device), chosen
            view, ctf_square = views[at], None if ctf_square is None else ctf_square[at]
            weight = self._weight(modes)
        mean, log_sd = self._encoded(view)
        z = mean + log_sd.exp() * self.normal_like(mean)
        fit, square = self._fit(view, self.map.whitened(self.decoder(z)), ctf_square)
        if self.training:
            self._learn_noise(view, square, ctf_square)
            self._show(batch.row, mean.detach())
        kl = (weight * gaussian_kl(mean, log_sd).sum(1)).mean()
        fit = (weight * fit).mean()
        return {"negative_log_likelihood": -fit / self.noise, "kl": self.kl_weight * kl}

    def _weight(self, modes: dict[str, Tensor]) -> Tensor:
        """`(b,)` what images have to say: the probability of being no junk, 1 in the mean over the stack.

        Of different objects some are junk to a map of two dimensions because it does not show them yet.
        """
        if self.map.classes:
            return torch.ones_like(modes["junk"])
        return (1 - modes["junk"]) / (1 - self.map.junk_share)

    @torch.no_grad()
    def _learn_noise(self, view: Tensor, square: Tensor, ctf_square: Tensor | None) -> None:
        """Only where classes vary: else the noise is known; and without CTF, so that the residual is seen."""
        if ctf_square is not None or not self.map.classes:
            return
        n_pixels = float(self.map.mask.sum()) * self.data.n_channels
        residual = self.gathered(square).mean() / n_pixels
        part = 1.0 if self.share is None else self.share.now[1] / self.share.total
        self.noise.lerp_(residual.clamp(_LEAST_NOISE, 1.0), 0.05 * part)

    def _show(self, row: Tensor, z: Tensor) -> None:
        row, z = self.gathered(row), self.gathered(z)
        n = max(self.data.n_particles, int(row.max()) + 1)
        if self._last_z is None:
            self._last_z = torch.full((n, self.latent_dim), torch.nan, device=z.device)
        self._last_z[row] = z

    def latest(self) -> tuple[Tensor, Tensor] | None:
        if self._last_z is None:
            return None
        row = self._last_z[:, 0].isfinite().nonzero()[:, 0]
        return row, self._last_z[row]

    def training_state(self) -> dict[str, Any]:
        return {"modes": self._modes, "last_z": self._last_z}

    def load_training_state(self, state: dict[str, Any]) -> None:
        self._modes = dict(state["modes"])
        if self._modes and "junk" not in self._modes:  # of an older version
            self._modes["junk"] = torch.zeros_like(self._modes["angle"][:, 0])
        self._last_z = state["last_z"]

    # ---- content at given poses

    def _found(self, encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"angle": "mode_angle", "move": "mode_move", "score": "mode_score", "centre": "centre"}
        junk = encoded.get("junk_probability", torch.zeros_like(encoded["angle"]))
        return {name: encoded[key] for name, key in names.items()} | {"junk": junk}

    @torch.no_grad()
    def _known(self, batch: Batch) -> dict[str, Tensor]:
        """The poses of a batch, kept from the start; found now where a fit goes on from other weights."""
        unknown = torch.arange(len(batch.row), device=batch.row.device)
        if self._modes:
            self._modes = {name: _long_enough(v, int(batch.row.max()) + 1) for name, v in self._modes.items()}
            unknown = self._modes["angle"][batch.row, 0].isnan().nonzero()[:, 0]
        if len(unknown):
            some = Batch._make(None if field is None else field[unknown] for field in batch)
            self._keep_modes(some.row, self._found(self.map.encode_modes(some, _N_MODES)))
        return {name: values[batch.row] for name, values in self._modes.items()}

    def _views(self, batch: Batch, modes: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return self.map.brought_back(batch, modes["centre"], modes["angle"], modes["move"])

    def _encoded(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened images in the canonical frame `(b, c, n, n)` → mean and log sd `(b, d)`."""
        both = self.encoder(view * self.map.mask / self.contrast).float()
        mean, log_sd = both.chunk(2, 1)
        return mean, log_sd.clamp(-8, 2)

    def _fit(self, view: Tensor, drawn: Tensor, ctf_square: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(b,)` y · m - ½ ‖C m‖² (nats over noise alone), and the squared residual inside the mask."""
        norm = self.map.norms(drawn, ctf_square)
        # a whitened image sums to 0, and so do pictures, through a constant that goes on where turned images
        # have lost their corners; without the constant the product with a whole image is the same
        outside = 1 - self.map.mask
        level = (drawn * outside).sum((2, 3), keepdim=True) / outside.sum()
        fit = (view * (drawn - level) * self.map.mask).flatten(1).sum(1) - 0.5 * norm
        return fit, ((view - drawn) * self.map.mask).square().flatten(1).sum(1)

    def _seen(self, views: Tensor, ctf_square: Tensor | None, modes: dict[str, Tensor]) -> _Content:
        """Content of all poses, drawn from its mean."""
        b, p = views.shape[:2]
        flat = views.flatten(0, 1)
        mean, log_sd = self._encoded(flat)
        each = None if ctf_square is None else ctf_square.flatten(0, 1)
        fit, _ = self._fit(flat, self.map.whitened(self.decoder(mean)), each)
        score = fit - self.noise * gaussian_kl(mean, log_sd).sum(1)
        score = score.view(b, p) + self.map.log_prior(modes["move"])
        # a mode that is none is as good as another, but never chosen
        score = torch.where(modes["score"].isfinite(), score, -torch.inf)
        return _Content(mean.view(b, p, -1), log_sd.view(b, p, -1), score)

    # ---- encoding and drawing

    @torch.no_grad()
    def encode(self, batch: Batch) -> Encoding:
        parts = []
        for i in range(0, len(batch.images), _REFINED_AT_ONCE):
            part = Batch._make(None if field is None else field[i : i + _REFINED_AT_ONCE] for field in batch)
            parts.append(self._encode_part(part))
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return Encoding(whole.pop("z"), whole.pop("z_std"), whole.pop("angle"), whole.pop("shift"), whole)

    def _encode_part(self, batch: Batch) -> dict[str, Tensor]:
        encoded = self.map.encode_modes(batch, _N_MODES)
        modes = self._found(encoded)
        centre = modes["centre"]
        views, ctf_square = self._views(batch, modes)
        seen = self._seen(views, ctf_square, modes)
        at = torch.arange(len(centre), device=centre.device), seen.score.argmax(1)
        angle, move = modes["angle"][at], modes["move"][at]
        drawn = self.map.whitened(self.decoder(seen.mean[at]))
        angle, move, residual = self.map.refined(batch, centre, drawn, angle, move)
        # content once more, of the image brought back from where it was found to lie
        view, _ = self.map.brought_back(batch, centre, angle[:, None], move[:, None])
        mean, log_sd = self._encoded(view[:, 0])
        log_share = (seen.score / self.noise).log_softmax(1)
        entropy = -(log_share.exp() * log_share.clamp_min(-1e4)).sum(1)
        return {
            "z": mean,
            "z_std": log_sd.exp(),
            "angle": angle,
            "shift": centre + move * self.map.px_per_px,
            "log_likelihood": seen.score.logsumexp(1),
            "angle_std": encoded["angle_std"],
            "shift_std": encoded["shift_std"],
            "pose_entropy": torch.maximum(entropy, encoded["pose_entropy"]),
            "residual": residual,
            **{name: encoded[name] for name in ("junk_probability",) if name in encoded},
        }

    def decode(self, z: Tensor, angle: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        still = z.new_zeros(len(z)), z.new_zeros(len(z), 2)
        return self.map.in_box(self.decoder(z), *still, angle, shift)


def _long_enough(values: Tensor, n: int) -> Tensor:
    """`values` with at least `n` rows, nan behind."""
    if len(values) >= n:
        return values
    return F.pad(values, [0, 0] * (values.ndim - 1) + [0, n - len(values)], value=torch.nan)

"""The last touch to a class map: frames in register, noise from refined poses, poses to encode by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.models.base import Batch, Batches, Step
from particle_explorer.models.layers import fast_products
from particle_explorer.models.pose_posterior.junk import tells_junk
from particle_explorer.models.pose_posterior.pictures import polynomial
from particle_explorer.models.pose_posterior.posterior import PosePosterior
from particle_explorer.models.pose_posterior.shells import filtered, radial_power
from particle_explorer.transforms import place, register

MOST_JUNK = 0.5
"""A map that explains less than this is no map to call others junk by."""
_MOST_PROPOSALS = 40


@torch.no_grad()
def finish(model: PosePosterior, batches: Batches) -> Iterator[Step]:
    """Bring the canonical frames along the map into register, and take the noise from refined poses."""
    yield from _register_frames(model)
    parts = torch.randperm(len(batches))[:2000].split(1000)
    model.heat = 1.0
    yield from _measure_noise(model, batches, parts)
    _choose_proposals(model, batches.take(parts[0][:500]))


def _register_frames(model: PosePosterior) -> Iterator[Step]:
    yield Step("gauge", 0.0)
    model.gauge.zero_()
    raw = model.decoder(model.node_z)
    terms = polynomial(model.node_z, model.gauge_degree)
    angles = torch.deg2rad(torch.arange(-40.0, 41.0, 4.0, device=raw.device))
    reference = raw[model.node_z.norm(dim=1).argmin()][None]
    n_rounds = 5
    for i in range(n_rounds):
        turn, move = register(raw, reference, model.mask, angles=angles, max_shift_px=max(2, model.box // 10))
        value = torch.cat([turn[:, None], move], 1)
        # of the drivers, the default gives other last digits in every process
        found = torch.linalg.lstsq(terms.cpu(), value.cpu(), driver="gelsd").solution
        model.gauge.copy_(found.to(raw.device))
        turn, move = model.frames(model.node_z)
        reference = place(raw, turn, move, mode="bicubic").mean(0, keepdim=True)
        yield Step("gauge", (i + 1) / n_rounds)


def _measure_noise(model: PosePosterior, batches: Batches, parts: tuple[Tensor, ...]) -> Iterator[Step]:
    found = []
    for i, part in enumerate(parts):
        found.append(residuals(model, batches.take(part)))
        yield Step("noise", (i + 1) / len(parts))
    power, signal, shift_square, junk = (torch.stack(values).mean(0) for values in zip(*found, strict=True))
    if not model.classes:
        model.set_noise(power)
    model.signal_power.copy_(signal)
    if tells_junk(model):
        model.junk_share.copy_(junk.clamp(1e-3, MOST_JUNK))
    model.shift_sd.copy_(shift_square.sqrt().clamp(0.3 * model.shift_step, model.spread_px))


class Residuals(NamedTuple):
    """What images leave of their reconstructions; junk is left out of all but its share."""

    power: Tensor
    """`(n // 2 + 1)` of what is left, by shells"""
    signal: Tensor
    """`(n // 2 + 1)` of the reconstructions"""
    shift_square: Tensor
    """Mean square of a shift, px² of the model"""
    junk: Tensor
    """Share of junk"""


def residuals(model: PosePosterior, batch: Batch) -> Residuals:
    """Images minus what the map draws of them at their refined poses."""
    encoding = model.encode(batch)
    assert encoding.angle is not None and encoding.shift is not None
    images, transfer, centre, _ = model.seen(batch)
    drawn = model.window.cut(model.decode(encoding.z, encoding.angle, encoding.shift), centre)
    if transfer is not None:
        drawn = filtered(drawn, transfer[:, None])
    junk = encoding.extras.get("junk_probability", torch.zeros_like(encoding.z[:, 0]))
    known = (1 - junk) * (1 - encoding.extras.get("mirror_probability", torch.zeros_like(junk)))
    share = known.clamp_min(1e-6) / known.clamp_min(1e-6).sum()
    power = share @ radial_power(images - drawn, model.shell)
    signal = share @ radial_power(drawn, model.shell)
    # pose and z were fitted to the same pixels: give back what they took, where turns and shifts are seen
    shell = torch.arange(len(power), device=power.device, dtype=power.dtype)
    n_values = (2 * math.pi * shell).clamp_min(1) * model.data.n_channels
    grip = shell**2 * signal / power * n_values
    taken = (3 + model.latent_dim) * grip / grip.sum().clamp_min(1e-12)
    power = power * n_values / (n_values - taken).clamp_min(0.5 * n_values)
    squares = (encoding.shift - centre).square().mean(1) + encoding.extras["shift_std"].square()
    return Residuals(power, signal, share @ squares / model.px_per_px**2, junk.mean())


def _choose_proposals(model: PosePosterior, batch: Batch) -> None:
    """As many poses per image as hold 99.8 % of the posterior in a search that keeps the most."""
    model.n_encode_proposals.fill_(_MOST_PROPOSALS)
    with fast_products(model.precision):
        mass = model.encode_part(model.seen(batch), model.decoder(model.node_z))["proposal_mass"]
    # one image in ten may need more
    held = mass.cumsum(1).quantile(0.1, dim=0)
    model.n_encode_proposals.fill_(max(6, 1 + int((held < 0.998).sum())))

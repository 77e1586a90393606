"""How the fit of a class map starts: the noise, one template, first classes, and a decoder that draws them.

A map that starts at random folds: two of its parts come to describe the same conformation. So one template
is found by annealed expectation and maximisation, images are aligned by it, and the map starts along the main
components of what they differ in. Where classes vary, they are laid out by their neighbours instead.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from particle_explorer.models.base import Batches, Step
from particle_explorer.models.layers import fast_products
from particle_explorer.models.neighbours import places_among_neighbours
from particle_explorer.models.pose_posterior.blocks import block
from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.pictures import ClassPictures
from particle_explorer.models.pose_posterior.placing import Placing
from particle_explorer.models.pose_posterior.search import search
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.models.pose_posterior.shells import filtered, radial_power, ring_mean
from particle_explorer.models.pose_posterior.window import turned_average
from particle_explorer.transforms import (
    FourierBand,
    fourier_radius,
    fourier_resize,
    place,
    real_rows,
    soft_disc,
    unplace,
)

_FLOOR_OF_CLASSES = 0.25
"""Least noise, as a share of the variance of the signal inside the disc, where classes differ in kind: what
a smooth map cannot show of them is noise to it."""
_WIENER = 0.05
"""Added to the mean CTF² when first averages are divided by it."""
_ALIGNED_BYTES = 128 * 2**20
"""Images aligned at the start, for the components of the first map, take this much."""
_MANY = 6_000
"""No more particles are laid out by their neighbours."""
_N_STEPS_OF_TEMPLATE = (60, 120, 240)
_CLEAR_NATS = 15.0
"""A template by which images say more of their pose, in the mean, is taken; of others, the best."""


class FirstClasses(NamedTuple):
    """A first map."""

    row: Tensor
    """`(m,)` rows of some particles"""
    place: Tensor
    """`(m, d)` where they lie"""
    pictures: Tensor
    """`(k, c, n, n)` of the nodes"""


# ---- noise


@torch.no_grad()
def first_noise(model: Comparison, batches: Batches) -> Generator[Step, None, float]:
    """Set the noise to that around the particles.

    Where classes vary: the variance of the signal over that of the noise in a pixel; else 0.
    """
    yield Step("noise", 0.0)
    some = torch.randperm(len(batches))[:4096]
    blob = torch.exp(-((2.5 * model.radius / model.disc_px) ** 2) / 2)
    model.look_for(blob.expand(1, model.data.n_channels, -1, -1))
    images = torch.cat([model.seen(batches.take(part)).images for part in some.split(1024)])
    total = radial_power(images, model.shell).mean(0)
    outside = 1 - soft_disc(model.box, model.disc_px + 2, 2.0, device=images.device)
    share = outside.square().mean()
    if share > 0.05:
        around = radial_power(images * outside, model.shell).mean(0) / share
        total = torch.minimum(total, around)
    clearness = 0.0
    if model.classes:
        inside = (images.square().mean(0) * model.mask).sum() / (model.mask.sum() * model.data.n_channels)
        # white noise has one power in all shells, its variance
        beyond = total[len(total) // 2 :].mean()
        clearness = float((inside - beyond) / beyond.clamp_min(1e-6 * inside))
        model.noise_floor.copy_(_FLOOR_OF_CLASSES * (inside - beyond).clamp_min(0))
        total = around if share > 0.05 else beyond.expand_as(total)
    model.set_noise(total)
    return clearness


# ---- one template


@torch.no_grad()
def first_template(model: Comparison, batches: Batches) -> Generator[Step, None, Tensor]:
    """One whitened template `(1, c, n, n)` by annealed EM.

    In much noise it has hardly formed after as many steps as otherwise do, and shows the particle at several
    turns at once, which a map then keeps apart. It says so: no pose of an image is likelier than noise.
    """
    batch = batches.take(torch.randperm(len(batches))[:4096])
    sample = model.seen(batch)
    best, best_score = None, -math.inf
    for n_steps in _N_STEPS_OF_TEMPLATE:
        template = yield from _annealed(model, sample, n_steps)
        score = _said_of_poses(model, sample, template)
        if best is None or score > best_score:
            best, best_score = template, score
        if score > _CLEAR_NATS:
            break
    assert best is not None
    return best


def _annealed(model: Comparison, sample: Seen, n_steps: int) -> Generator[Step, None, Tensor]:
    n_fit, v = len(sample.images), model.n_versions
    size = min(n_fit, 300)
    template = sample.versions(v).images.mean(0, keepdim=True) * model.mask
    for step in range(n_steps):
        heat = min(1.0, 0.05 * 20 ** (step / (0.7 * n_steps)))
        band = model.coarse_band if step < 0.6 * n_steps else model.band
        some = sample.some(torch.randint(n_fit, (size,))).versions(v)
        with fast_products(model.precision):
            new = _average_by_posterior(model, some, template, heat, band)
        keep = 0.0 if step < 5 else 0.7
        template = keep * template + (1 - keep) * new * model.mask
        if step % 5 == 4:
            yield Step("one template", step / n_steps)
    return template


def _said_of_poses(model: Comparison, sample: Seen, template: Tensor) -> float:
    """Mean log posterior over noise alone, nats, of the best pose of some images."""
    some = sample.some(torch.arange(min(len(sample.images), 1000))).versions(model.n_versions)
    with fast_products(model.precision):
        _, score = search(model, some, model.templates(template, model.coarse_band), 1)
    return float(score.view(-1, model.n_versions).amax(1).mean())


def _average_by_posterior(
    model: Comparison, seen: Seen, template: Tensor, heat: float, band: FourierBand
) -> Tensor:
    """The average `(1, c, n, n)` of images brought back by the posterior over poses of one template."""
    images, transfer, _, turns = seen
    templates = model.templates(template, band)[:, 0]
    minus_norm = -0.5 * templates.square().sum(-1).expand(len(images), -1)
    if transfer is not None:
        minus_norm = -0.5 * model.weights_of(transfer, band) @ model.powers(templates, band).T
    prior = model.log_prior_shifts()
    phases = band.phases(-model.shifts)[:, None]
    total = torch.zeros_like(templates)
    v = model.n_versions
    step = v * block(v * len(prior) * templates.shape[1], images.device)
    parts = model.rows(images, band, transfer).split(step)
    prior_of = (None,) * len(parts) if turns is None else turns.split(step)
    for part, norm, turn in zip(parts, minus_norm.split(step), prior_of, strict=True):
        rows = real_rows(part[:, None] * phases).flatten(0, 1)
        scores = (rows @ templates.T).view(len(part), len(prior), -1) + norm[:, None]
        logits = (scores + prior[:, None]) * heat
        if turn is not None:
            logits += turn[:, None]  # what is known of the angles is known from the first step on
        gamma = logits.view(len(part) // v, -1).softmax(1)
        total.addmm_(gamma.view(len(rows), -1).T, rows)
    coefficients = torch.view_as_complex(total.view(len(total), model.data.n_channels, -1, 2))
    unwhitener = model.unwhitener()
    if transfer is not None:
        unwhitener = unwhitener * _wiener(model, ring_mean(transfer.square(), model.shell).mean(0))
    unwhitener = unwhitener.flatten()[band.index]
    back = unplace(band.images(coefficients * unwhitener), model.angles, mode="bicubic")
    average = back.sum(0, keepdim=True) / (len(images) // v)
    # the mean is not in the band: what makes the surroundings of the particle 0
    around = (1 - model.mask) * (model.radius < model.box / 2 - 1)
    return average - (average * around).sum((2, 3), keepdim=True) / around.sum().clamp_min(1.0)


def _wiener(model: Comparison, ctf_square: Tensor) -> Tensor:
    """`(n, n // 2 + 1)` filter that divides sums over images by their mean CTF² `(n // 2 + 1)`."""
    return (1 / (ctf_square + _WIENER))[model.shell]


# ---- first classes


@torch.no_grad()
def along_components(
    model: Comparison, batches: Batches, template: Tensor
) -> Generator[Step, None, FirstClasses]:
    """Classes to start from: mean ± components of images aligned by a template."""
    n_fit = len(batches)
    n, c, d = model.box, model.data.n_channels, model.latent_dim
    with_mean = 1 / model.unwhitener()
    chosen = torch.randperm(n_fit)[: min(n_fit, 16384, _ALIGNED_BYTES // (4 * c * n * n))]
    templates = model.templates(template, model.coarse_band)
    aligned, rows, ctf_squares = [], [], []
    for i, part in enumerate(chosen.split(1024)):
        batch = batches.take(part)
        rows.append(batch.row)
        seen = model.seen(batch).versions(model.n_versions)
        with fast_products(model.precision):
            pose, score = search(model, seen, templates, 1)
        better = score.view(len(part), -1).argmax(1)
        better += model.n_versions * torch.arange(len(part), device=score.device)
        images, pose = seen.images[better], pose[better, 0]
        transfer = None if seen.transfer is None else seen.transfer[better]
        r = len(model.angles)
        angle, move = model.angles[pose % r], model.shifts[pose // r].float()
        factor = with_mean
        if transfer is not None:
            # without the template, whose contrast differs with the defocus: that is no motion
            images = images - filtered(place(template, angle, move), transfer[:, None])
            factor = with_mean * transfer[:, None]
            ctf_squares.append(ring_mean(transfer.square(), model.shell))
        aligned.append(unplace(filtered(images, factor), angle, move))
        yield Step("aligning", min(1.0, (i + 1) * 1024 / len(chosen)))
    stack = torch.cat(aligned)
    aligned.clear()
    mean = stack.mean(0)
    flat_mean = mean
    if ctf_squares:
        divide = _wiener(model, torch.cat(ctf_squares).mean(0))
        flat_mean = filtered(template[0], with_mean) + filtered(mean, divide)
    blur = torch.exp(-2 * (math.pi * 1.0 * fourier_radius(n, stack.device) / n) ** 2)
    blur[0, 0] = 0  # the noise of the background's mean would be the first component
    flat = (filtered(stack - mean, blur) * model.mask).flatten(1)
    # junk that is brighter than the particles would be the first component
    length = flat.norm(dim=1, keepdim=True)
    flat = flat * (1.3 * length.median() / length.clamp_min(1e-9)).clamp(max=1)
    where_to = torch.device("cpu") if flat.device.type == "mps" else flat.device  # not written for Apple's
    found = torch.svd_lowrank(flat.to(where_to), q=min(d + 6, *flat.shape), niter=3)
    s, v = (part.to(flat.device) for part in found[1:])
    s, v = F.pad(s, (0, max(0, d + 1 - len(s)))), F.pad(v, (0, max(0, d - len(s))))
    sd = s / math.sqrt(len(flat))
    sd = (sd[:d] ** 2 - sd[-1] ** 2).clamp_min(1e-6).sqrt()
    # uniform on ±1 has a standard deviation of 1 / √3
    where = (flat @ v[:, :d] / (math.sqrt(3) * sd)).clamp(-1, 1)
    components = v[:, :d].T.reshape(d, c, n, n) * sd[:, None, None, None]
    if ctf_squares:
        components = filtered(components, divide)
    nodes = flat_mean * model.mask + torch.einsum("kd,dchw->kchw", model.node_z * math.sqrt(3), components)
    return FirstClasses(torch.cat(rows), where, filtered(nodes, model.unwhitener()))


@torch.no_grad()
def among_neighbours(
    model: Placing, batches: Batches, template: Tensor
) -> Generator[Step, None, FirstClasses]:
    """Classes of particles laid out among their neighbours, which the model knows from now on."""
    n, m = model.box, model.small_px
    chosen = torch.randperm(len(batches))[:_MANY]
    model.centring = turned_average(template)
    small, rows = [], []
    for i, part in enumerate(chosen.split(1000)):
        batch = batches.take(part)
        rows.append(batch.row)
        with fast_products(model.precision):
            small.append(model.centred(model.seen(batch)))
        yield Step("centring", min(1.0, (i + 1) * 1000 / len(chosen)))
    disc = soft_disc(m, model.disc_px * m / n, device=template.device)
    seed = int(torch.randint(2**31, (1,)))
    known = torch.cat(small)
    with fast_products(model.precision):
        found = yield from places_among_neighbours(
            known.unflatten(1, (-1, m, m)), disc, model.angles, model.grid_z, 0.5 * (n / m) ** 2, seed
        )
    model.keep(found.kept)
    model.known, model.known_place = known.half(), found.place
    pictures = filtered(fourier_resize(found.pictures[found.kept], n), model.unwhitener())
    return FirstClasses(torch.cat(rows), found.place, pictures)


def every_second(model: ClassPictures) -> Tensor:
    """`(side^d,)` points of the grid that are every second one along each side."""
    side = round(len(model.grid_z) ** (1 / model.latent_dim))
    even = torch.arange(side, device=model.grid_z.device) % 2 == 0
    return torch.cartesian_prod(*[even] * model.latent_dim).view(len(model.grid_z), -1).all(1)


# ---- the decoder


def draw(model: ClassPictures, targets: Tensor, n_steps: int) -> Iterator[Step]:
    """Fit the decoder to pictures `(k, c, n, n)` of the nodes."""
    targets = targets * model.decoder.disc
    scale = (targets - targets.mean(0)).std().clamp_min(1e-3)
    with torch.no_grad():
        model.decoder.base.copy_(targets.mean(0))
    # a subset of a large map per step: the decoder is smooth
    n_nodes = min(len(targets), 64 if model.classes else 36)
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=4e-3)
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * step / n_steps)) + 1e-5
        chosen = torch.randperm(len(targets), device=targets.device)[:n_nodes]
        loss = ((model.decoder(model.node_z[chosen]) - targets[chosen]) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            yield Step("ordering", (step + 1) / n_steps)
    optimizer.zero_grad()

"""The expectation step: all nodes at proposed poses, and the gradient of the evidence by the templates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.blocks import block
from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.junk import log_junk, tells_junk
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.transforms import real_rows


class Expectation(NamedTuple):
    """What images say of the templates."""

    log_evidence: Tensor
    """`(b,)` nats over noise alone, under the current temperature"""
    gradient: Tensor
    """`(r, k, px)` of the sum of `log_evidence` with respect to the templates"""
    node: Tensor
    """`(b, k)` posterior of the nodes; what it lacks to 1 is junk"""


def expect(
    model: Comparison, seen: Seen, pose: Tensor, templates: Tensor, where: Tensor | None = None
) -> Expectation:
    """Score all nodes at proposed poses `(b, p)` in the full band, `templates` being `(r, k, px)`.

    `where` `(b, k)` is the log prior of the nodes, against an even one, if something is known of it.
    What is seen are versions one after the other; what is found is of the particles, fewer by `n_versions`.
    """
    images, transfer, _, turns = seen
    r, k, px = templates.shape
    b, p = pose.shape
    v = model.n_versions
    minus_norm = -0.5 * templates.square().sum(-1)
    if transfer is not None:
        of_image = model.weights_of(transfer, model.band)
        powers = model.powers(templates, model.band)
    # a prior of angles has the 1 / r in it
    prior = model.log_prior_shifts() - math.log((k if turns is not None else r * k) * v)
    back = model.band.phases(-model.shifts)[:, None]
    junk = log_junk(model, images[::v]) if tells_junk(model) else None
    gradient = torch.zeros_like(templates)
    evidence, nodes = [], []
    step = v * block(v * p * (px + 2 * k), images.device, 4)
    for start in range(0, b, step):
        part = pose[start : start + step]
        some = slice(start, start + step)
        coefficients = model.rows(images[some], model.band, None if transfer is None else transfer[some])
        angle = (part % r).flatten()
        order = angle.argsort(stable=True)
        count = torch.bincount(angle, minlength=r).tolist()
        shift = (part // r).flatten()[order]
        rows = real_rows(coefficients[order // p] * back[shift])
        scores = rows.new_empty(len(order), k)
        norm_rows = None if transfer is None else of_image[some][order // p].split(count)
        for a, (row, score) in enumerate(zip(rows.split(count), scores.split(count), strict=True)):
            if not len(row):
                continue
            if norm_rows is None:
                torch.addmm(minus_norm[a], row, templates[a].T, out=score)
            else:
                torch.mm(row, templates[a].T, out=score)
                score.addmm_(norm_rows[a], powers[a].T, alpha=-0.5)
        scores += prior[shift, None]
        if turns is not None:
            scores += turns[some][order // p, angle[order], None]
        by_image = torch.empty_like(scores)
        by_image[order] = scores
        logits = by_image.view(len(part) // v, v * p * k).mul_(model.heat)
        if where is not None:  # what is known of the content is known from the first step on
            of_part = where[start // v : (start + step) // v, None]
            logits.view(len(part) // v, v * p, k).add_(of_part)
        total = logits.logsumexp(1, keepdim=True)
        if junk is not None:
            of_junk = junk[start // v : (start + step) // v, None]
            total = torch.logaddexp(total + (1 - model.junk_share).log(), of_junk)
            logits.add_((1 - model.junk_share).log())
        gamma = logits.sub_(total).exp_().view(len(part) // v, v * p, k)
        evidence.append(total[:, 0] / model.heat)
        nodes.append(gamma.sum(1))
        weights = gamma.view(-1, k)[order]
        _add_gradient(model, gradient, templates, rows.split(count), weights.split(count), norm_rows)
    return Expectation(torch.cat(evidence), gradient, torch.cat(nodes))


def _add_gradient(
    model: Comparison,
    gradient: Tensor,
    templates: Tensor,
    rows: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm_rows: Sequence[Tensor] | None,
) -> None:
    """Add Σ γ (y - C² m) of some images to `(r, k, px)`; rows, their γ, and what C² is, by angle."""
    k = templates.shape[1]
    for a, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        if not len(row):
            continue
        gradient[a].addmm_(weight.T, row)
        if norm_rows is None:
            gradient[a].addcmul_(templates[a], weight.sum(0)[:, None], value=-1)
        else:
            square = (weight.T @ norm_rows[a]) @ model.band.power_basis
            by_pixel = gradient[a].view(k, model.data.n_channels, -1, 2)
            by_pixel.addcmul_(templates[a].view_as(by_pixel), square[:, None, :, None], value=-1)

"""The search over all angles and shifts, by a few nodes and in a coarse band: it proposes poses."""

from __future__ import annotations

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.blocks import block
from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.transforms import real_rows


def search(
    model: Comparison, seen: Seen, templates: Tensor, n_best: int, *, per_angle: bool = False
) -> tuple[Tensor, Tensor]:
    """The most promising poses of each image, best first: `(b, p)` indices shift · r + angle, and scores.

    `templates` `(r, k, px)` of a few nodes in the coarse band; a pose is ranked by its best node. With
    `per_angle` only the best shift of each angle counts.
    """
    r, k, px = templates.shape
    flat = templates.flatten(0, 1)
    prior = model.log_prior_shifts()
    back = model.coarse_band.phases(-model.shifts)[:, None]
    found, scored = [], []
    step = block(len(prior) * (px + r * k), seen.images.device)
    parts = model.rows(seen.images, model.coarse_band, seen.transfer).split(step)
    if seen.transfer is None:
        minus_norm = -0.5 * flat.square().sum(-1)
        weights: tuple[Tensor | None, ...] = (None,) * len(parts)
    else:  # the norms are a few more columns of the same product
        minus_norm = flat.new_zeros(len(flat))
        flat = torch.cat([flat, -0.5 * model.powers(flat, model.coarse_band)], -1)
        weights = model.weights_of(seen.transfer, model.coarse_band).split(step)
    prior_of = (None,) * len(parts) if seen.turns is None else seen.turns.split(step)
    for part, weight, turn in zip(parts, weights, prior_of, strict=True):
        rows = real_rows(part[:, None] * back)
        if weight is not None:
            rows = torch.cat([rows, weight[:, None].expand(-1, len(prior), -1)], -1)
        scores = torch.addmm(minus_norm, rows.flatten(0, 1), flat.T)
        best = scores.view(len(part), len(prior), r, k).amax(-1) + prior[:, None]
        if turn is not None:
            best += turn[:, None]
        if per_angle:
            top, shift = best.max(1)
            score, angle = top.topk(min(n_best, r), dim=1)
            found.append(shift.gather(1, angle) * r + angle)
        else:
            score, index = best.flatten(1).topk(n_best, dim=1)
            found.append(index)
        scored.append(score)
    return torch.cat(found), torch.cat(scored)

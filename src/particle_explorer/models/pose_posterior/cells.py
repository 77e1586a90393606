"""Fine cells about proposed poses, each divided in turns and moves, and the scores of all nodes in them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.modes import away_from, near
from particle_explorer.models.pose_posterior.seen import Seen
from particle_explorer.transforms import place, real_rows

_KEPT_BYTES = 192 * 2**20
"""Finely turned templates are kept between calls when they take less."""


class Cells(NamedTuple):
    """The posterior over the cells of proposed poses, in nats up to what all poses of an image share."""

    angle: Tensor
    """`(b, p, f)` rad"""
    move: Tensor
    """`(b, p, f, 2)` px of the model (y, x)"""
    by_node: Tensor
    """`(b, p, k)` summed over cells"""
    by_cell: Tensor
    """`(b, p, f)` summed over nodes"""
    best: Tensor
    """`(b, p)` of the best cell and node"""
    best_cell: Tensor
    """`(b, p)`"""
    best_node: Tensor
    """`(b, p)`"""


class FineTemplates:
    """All nodes at the fine turns about each angle of the search, kept until the weights change."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._kept: dict[int, Tensor] = {}

    def rows(self, model: Comparison, nodes: Tensor, a: int) -> Tensor:
        """`(3, k, c, q)` about angle `a`."""
        key = (str(nodes.device), *(value._version for value in (*model.parameters(), model.noise_power)))
        if self._key != key:
            self._key, self._kept = key, {}
        if a not in self._kept:
            turned = place(nodes.flatten(0, 1)[None], model.angles[a] + _fine_turns(model), mode="bicubic")
            rows = model.rows(turned.unflatten(1, nodes.shape[:2]), model.band)
            if len(model.angles) * rows.numel() * 8 > _KEPT_BYTES:
                return rows
            self._kept[a] = rows
        return self._kept[a]


def _fine_turns(model: Comparison) -> Tensor:
    return torch.tensor([-1.0, 0.0, 1.0], device=model.angles.device) * (model.angle_step / 3)


def score_cells(
    model: Comparison,
    seen: Seen,
    nodes: Tensor,
    pose: Tensor,
    templates: FineTemplates,
    where: Tensor | None = None,
) -> Cells:
    """Score all nodes `(k, c, n, n)` in 3 angles × 2 × 2 shifts about each proposed pose `(b, p)`.

    `where` `(b, k)` is the log prior of the nodes, against an even one, if something is known of it.
    """
    images, transfer, _, prior_of_turns = seen
    (b, p), r, k = pose.shape, len(model.angles), len(nodes)
    quarter = model.shift_step / 4
    fine_turns = _fine_turns(model)
    beside = torch.tensor([-quarter, quarter], device=images.device)
    fine_moves = torch.cartesian_prod(beside, beside)
    turns, moves = fine_turns.repeat_interleave(4), fine_moves.repeat(3, 1)
    n_fine = len(turns)

    coefficients = model.rows(images, model.band, transfer)
    of_image = None if transfer is None else model.weights_of(transfer, model.band)
    back, ahead = model.band.phases(-model.shifts)[:, None], model.band.phases(fine_moves)[:, None, None]
    angle_index = (pose % r).flatten()
    order = angle_index.argsort(stable=True)
    count = torch.bincount(angle_index, minlength=r).tolist()
    shift_index = (pose // r).flatten()[order]
    image = order // p
    node_score = images.new_empty(b * p, k)
    cell_score = images.new_empty(b * p, n_fine)
    best_score = images.new_empty(b * p)
    best_at = order.new_empty(b * p)
    n_alike = k * n_fine * (1 if prior_of_turns is not None else r)
    normaliser = model.log_prior(model.shifts).logsumexp(0) + math.log(n_alike)
    done = 0
    for a, size in enumerate(count):
        if not size:
            continue
        at, shift = order[done : done + size], shift_index[done : done + size]
        row = real_rows(coefficients[image[done : done + size]] * back[shift])
        fine = templates.rows(model, nodes, a)
        turned = real_rows(fine[:, None] * ahead).flatten(0, 2)
        if of_image is None:
            score = torch.addmm(-0.5 * turned.square().sum(-1), row, turned.T).view(size, n_fine, k)
        else:  # the norm does not depend on the shift
            powers = model.powers(real_rows(fine), model.band).flatten(0, 1)
            norm = 0.5 * of_image[image[done : done + size]] @ powers.T
            score = (row @ turned.T).view(size, 3, 4, k).sub_(norm.view(size, 3, 1, k))
            score = score.view(size, n_fine, k)
        score += (model.log_prior(model.shifts[shift, None] + moves) - normaliser)[..., None]
        if prior_of_turns is not None:
            score += prior_of_turns[image[done : done + size], a, None, None]
        if where is not None:
            score += where[image[done : done + size], None]
        top, cell_at = score.flatten(1).max(1)
        weight = score.sub_(top[:, None, None]).exp_()
        node_score[at] = weight.sum(1).log() + top[:, None]
        cell_score[at] = weight.sum(2).log() + top[:, None]
        best_score[at], best_at[at] = top, cell_at
        done += size

    best_at = best_at.view(b, p)
    return Cells(
        model.angles[pose % r][..., None] + turns,
        model.shifts[pose // r][:, :, None] + moves,
        node_score.view(b, p, k),
        cell_score.view(b, p, n_fine),
        best_score.view(b, p),
        best_at // k,
        best_at % k,
    )


def spread_of_mode(
    model: Comparison, cells: Cells, share: Tensor, angle: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Variances `(b,)` of angle and shift inside the mode about `angle` `(b,)` and `move` `(b, 2)`.

    `share` `(b, p · f)` is the posterior of the cells.
    """
    cell_angle, cell_move = cells.angle.flatten(1), cells.move.flatten(1, 2)
    away = away_from(cell_angle, angle)
    mode = torch.where(near(model, cell_angle, cell_move, angle, move), share, 0)
    mode = mode / mode.sum(1, keepdim=True).clamp_min(1e-30)
    angle_var = (mode * away**2).sum(1) - (mode * away).sum(1) ** 2
    mode_move = torch.einsum("bm,bmi->bi", mode, cell_move)
    shift_var = torch.einsum("bm,bmi->bi", mode, (cell_move - mode_move[:, None]) ** 2).mean(1)
    return angle_var, shift_var

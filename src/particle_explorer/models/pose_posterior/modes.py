"""Modes of the posterior over poses: the best pose of an image, and the best that is no neighbour of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.refinement import Refined, refine

_RIVAL_NATS, _RIVAL_SHARE = 5.0, 0.05
"""A second pose whose log posterior comes this close, in nats and as a share of it, is refined too: the
poses of a search lie a third of an angle step apart."""


class Poses(NamedTuple):
    """Poses of images, each with the picture of one node."""

    angle: Tensor
    """`(b, p)` rad"""
    move: Tensor
    """`(b, p, 2)` px of the model (y, x)"""
    node: Tensor
    """`(b, p)`"""


def away_from(angles: Tensor, angle: Tensor) -> Tensor:
    """`(b, p)` rad from `angle` `(b,)`, the short way round."""
    return torch.remainder(angles - angle[:, None] + math.pi, 2 * math.pi) - math.pi


def near(model: Comparison, angles: Tensor, moves: Tensor, angle: Tensor, move: Tensor) -> Tensor:
    """`(b, p)` which poses belong to the mode about `angle` `(b,)` and `move` `(b, 2)`."""
    return (away_from(angles, angle).abs() <= 2.5 * model.angle_step) & (
        (moves - move[:, None]).norm(dim=-1) <= 3 * model.shift_step
    )


def best_pose(
    model: Comparison, whitened: Tensor, transfer: Tensor | None, nodes: Tensor, poses: Poses, score: Tensor
) -> tuple[Poses, Refined]:
    """The best `(b,)` of some poses `(b, p)` by their `score`, as it was found and refined.

    Of different objects some look almost alike after half a turn, and their two poses differ by less than
    the search leaves open: where the best of those that are no neighbours comes close, both are refined
    and compared. In noise the search decides better, which sees no frequencies beyond its band.
    """
    at = torch.arange(len(score), device=score.device)
    value, first = score.max(1)
    best = Poses(*(part[at, first] for part in poses))
    refined = refine(model, whitened, transfer, nodes, best.node, best.angle, best.move)
    if not model.classes:
        return best, refined
    others = torch.where(near(model, poses.angle, poses.move, best.angle, best.move), -torch.inf, score)
    rival_value, second = others.max(1)
    close = (rival_value > value - _RIVAL_NATS - _RIVAL_SHARE * value.abs()).nonzero()[:, 0]
    if len(close):
        rival = Poses(*(part[close, second[close]] for part in poses))
        again = refine(
            model, whitened[close], None if transfer is None else transfer[close], nodes,
            rival.node, rival.angle, rival.move,
        )  # fmt: skip
        better = again.score > refined.score[close]
        won = close[better]
        for mine, theirs in zip((*best, *refined), (*rival, *again), strict=True):
            mine[won] = theirs[better]
    return best, refined


def modes(
    model: Comparison,
    whitened: Tensor,
    transfer: Tensor | None,
    nodes: Tensor,
    poses: Poses,
    score: Tensor,
    n_modes: int,
) -> list[tuple[Poses, Tensor]]:
    """The best of some poses `(b, p)` by their `score`, then the best of those that are no neighbours.

    `n_modes` times poses `(b,)`, refined, and their scores; -inf where there is no further mode.
    """
    found = []
    pick = torch.arange(len(score), device=score.device)
    for _ in range(n_modes):
        value, best = score.max(1)
        angle, move, node = (part[pick, best] for part in poses)
        score = torch.where(near(model, poses.angle, poses.move, angle, move), -torch.inf, score)
        refined = refine(model, whitened, transfer, nodes, node, angle, move)
        found.append((Poses(refined.angle, refined.move, node), value))
    return found

"""Gauss-Newton on the angle and shift of each image, against the picture of one node."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from particle_explorer.models.pose_posterior.comparison import Comparison
from particle_explorer.models.pose_posterior.pictures import rotated
from particle_explorer.models.pose_posterior.shells import filtered, in_shell, ring_mean
from particle_explorer.transforms import pose_gradients, unplace


class Refined(NamedTuple):
    """Poses after refinement against the picture of one node each."""

    angle: Tensor
    """`(b,)` rad"""
    move: Tensor
    """`(b, 2)` px of the model (y, x)"""
    curvature: Tensor
    """`(b, 3, 3)` of the log posterior"""
    residual: Tensor
    """`(b,)` mean square of what is left"""
    score: Tensor
    """`(b,)` log posterior at the best, up to what is the same for all poses and nodes of an image"""


def refine(
    model: Comparison,
    whitened: Tensor,
    transfer: Tensor | None,
    nodes: Tensor,
    node: Tensor,
    angle: Tensor,
    move: Tensor,
    n_steps: int = 3,
) -> Refined:
    """Refine angle and shift against each image's own node; only improvements are kept.

    `nodes` are whitened, `node` `(b,)` says which.
    """
    # an image brought back, times every node and its gradients, is one product
    flat = (nodes * model.mask).flatten(1)
    gradients = (pose_gradients(nodes) * model.mask).flatten(2)
    n_pixels = float(model.mask.sum()) * model.data.n_channels
    if transfer is None:
        products = torch.cat([flat[:, None], gradients], 1)
        products = (products @ products.transpose(1, 2))[node]
    else:
        # ⟨C a, C b⟩ by shells; what is compared is the whole image, as the CTF spreads the particle
        of_image, total = transfer.square(), whitened.square().flatten(1).sum(1)
        whitened = filtered(whitened, transfer[:, None])
        products = _products_by_shell(model, nodes, ring_mean(of_image, model.shell), node)
        n_pixels = float(model.mask.numel()) * model.data.n_channels
    squares, along, normal = products[:, 0, 0], products[:, 1:, 0], products[:, 1:, 1:]
    factors = torch.cat([flat[:, None], gradients], 1).flatten(0, 1).T.contiguous()
    prior = torch.diag(torch.tensor([1e-6, 0.0, 0.0], device=angle.device))
    prior[1, 1] = prior[2, 2] = model.shift_sd**-2
    curvature = normal + prior
    inverse = torch.linalg.inv(curvature)
    at = torch.arange(len(node), device=node.device)
    start_angle, start_move = angle, move
    best = torch.full_like(angle, -torch.inf)
    best_angle, best_move, residual = angle, move, torch.zeros_like(angle)
    for step in range(n_steps + 1):
        back = (unplace(whitened, angle, move, mode="bicubic") * model.mask).flatten(1)
        overlap = (back @ factors).view(len(back), -1, 4)[at, node]
        energy = back.square().sum(1) if transfer is None else total
        square = energy - 2 * overlap[:, 0] + squares
        score = -0.5 * square + model.log_prior(move)
        better = score > best
        best = torch.where(better, score, best)
        best_angle = torch.where(better, angle, best_angle)
        best_move = torch.where(better[:, None], move, best_move)
        residual = torch.where(better, square, residual)
        if step == n_steps:
            break
        slope = overlap[:, 1:] - along
        # the prior's pull, in the reference frame
        slope[:, 1:] -= rotated(move, -angle) / model.shift_sd**2
        delta = (inverse @ slope[..., None])[..., 0]
        angle = start_angle + (angle + delta[:, 0] - start_angle).clamp(-model.angle_step, model.angle_step)
        reach = 1.5 * model.shift_step
        ahead = move + rotated(delta[:, 1:], angle)
        move = start_move + (ahead - start_move).clamp(-reach, reach)
    return Refined(best_angle, best_move, curvature, residual / n_pixels, best)


def _products_by_shell(model: Comparison, nodes: Tensor, ctf_square: Tensor, node: Tensor) -> Tensor:
    """`(b, 4, 4)` products ⟨C u, C v⟩ of each image's node and its three gradients, C² `(b, shells)`."""
    parts = torch.cat([nodes[:, None], pose_gradients(nodes)], 1) * model.mask
    spectra = torch.fft.rfft2(parts) / model.box
    count = in_shell(model.shell)
    by_shell = nodes.new_empty(len(nodes), 4, 4, len(count))
    for i in range(4):
        for j in range(i, 4):
            cross = (spectra[:, i] * spectra[:, j].conj()).real.sum(1)
            by_shell[:, i, j] = by_shell[:, j, i] = ring_mean(cross, model.shell) * count
    flat = by_shell.flatten(1, 2)
    found = ctf_square.new_empty(len(node), 16)
    for one in node.unique().tolist():
        of_node = node == one
        found[of_node] = ctf_square[of_node] @ flat[one].T
    return found.view(-1, 4, 4)

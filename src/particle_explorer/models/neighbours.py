"""Where images of different objects lie among their neighbours, whichever way they are turned.

A map of different objects that freezes out of disorder puts an object in two places, and objects side by
side that have nothing in common. Neighbours know better: the distance of two images is that at the best turn
of one, the graph of nearest neighbours is laid out (UMAP, McInnes, Healy & Melville 2018), and the map
starts from that layout: a class is the mean of the images that lie near its node, turned onto each other,
and where nothing lies there is no class.

The mean of an image says nothing of its shape and is left out of every distance.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from particle_explorer.layouts import Array, laid_out
from particle_explorer.models.base import Step
from particle_explorer.transforms import place, radius, unplace

T = TypeVar("T")

N_NEIGHBOURS = 15
_MIN_DISTANCE = 0.1
"""UMAP's, with its 200 passes."""
_EVENNESS = 0.85
"""How far a layout is evened out along its axes, of the way to uniform: so that the map is filled, and gaps
between groups stay."""
_EDGE = 0.97
_SPAN = 10.0
"""Width of a layout to start from."""
_LEAST_SHARE = 0.25
"""A node to which fewer images are the nearest, as a share of an even distribution, has no class."""
_N_ROUNDS = 8
_REACH = 3.2
"""Nodes within this many spacings are turned onto each other."""
_AT_ONCE = 250
_LOOK_S = 0.2
_WIDTH = 0.35
"""Standard deviation, in spacings of the nodes, of the prior that neighbours are. With 1 a node of another
kind is taken wherever its picture fits a little better (see `docs/decisions.md`)."""


class Places(NamedTuple):
    """A first map of images."""

    place: Tensor
    """`(n, d)` in [-1, 1]"""
    kept: Tensor
    """`(k,)` whether a node has a class"""
    pictures: Tensor
    """`(k, c, m, m)` of the classes; of the other nodes, what lies between"""


def places_among_neighbours(
    images: Tensor, disc: Tensor, angles: Tensor, node_z: Tensor, weight: float, seed: int
) -> Generator[Step, None, Places]:
    """A first map of `(n, c, m, m)` centred images inside `disc` `(m, m)`.

    Parameters
    ----------
    angles
        `(r,)` rad, all turns that are tried, evenly spaced and 0 first.
    node_z
        `(k, d)` grid of the map, evenly spaced from -1 to 1.
    weight
        Of a squared difference of two images, in nats: 1 / (2 σ²).
    """
    flat = _without_mean(images * disc, disc)
    near, distance = yield from neighbours(flat, images.shape[1:], angles, min(N_NEIGHBOURS, len(flat)))
    start = _start_of_parts(near.cpu().numpy(), images * disc, node_z.shape[1])
    layout = yield from _in_steps(
        "laying neighbours out",
        lambda tell: laid_out(
            near.int().cpu().numpy(),
            distance.cpu().numpy(),
            flat.cpu().numpy(),
            min_distance=_MIN_DISTANCE,
            n_epochs=200,
            n_dims=node_z.shape[1],
            seed=seed,
            start=start,
            tell=tell,
        ),
    )
    where = torch.from_numpy(evened(layout)).to(images.device)
    off = torch.cdist(where, node_z).square()
    count = torch.bincount(off.argmin(1), minlength=len(node_z))
    kept = count >= _LEAST_SHARE * len(where) / len(node_z)
    pictures = yield from _means(images * disc, flat, angles, node_z, off, count > 0, weight)
    return Places(where, kept, pictures)


def _in_steps(what: str, work: Callable[[Callable[[float], None]], T]) -> Generator[Step, None, T]:
    """What `work` returns, which is done in a thread and tells its share; closing the generator ends it."""
    share, over = 0.0, threading.Event()

    def tell(done: float) -> None:
        nonlocal share
        if over.is_set():
            raise _OverError
        share = done

    with ThreadPoolExecutor(1) as pool:
        try:
            future = pool.submit(work, tell)
            while not wait([future], _LOOK_S).done:
                yield Step(what, share)
            return future.result()
        finally:
            over.set()


class _OverError(Exception):
    """Nobody waits for the work any more."""


def neighbours(
    flat: Tensor, shape: torch.Size, angles: Tensor, k: int
) -> Generator[Step, None, tuple[Tensor, Tensor]]:
    """The `k` nearest of `(n, px)` images at any turn, each itself first: rows and distances `(n, k)`."""
    n = len(flat)
    near = torch.empty(n, k, dtype=torch.int64, device=flat.device)
    distance = torch.empty(n, k, device=flat.device)
    square = flat.square().sum(1)
    for start in range(0, n, _AT_ONCE):
        part = slice(start, min(start + _AT_ONCE, n))
        best = torch.full((part.stop - start, n), -torch.inf, device=flat.device)
        for turned in _turned(flat[part], shape, angles).unbind(1):
            torch.maximum(best, turned @ flat.T, out=best)
        off = square[part, None] + square - 2 * best
        at = torch.arange(part.stop - start, device=flat.device)
        off[at, start + at] = -torch.inf
        value, near[part] = off.topk(k, largest=False)
        distance[part] = value.clamp_min(0).sqrt()
        yield Step("neighbours", part.stop / n)
    return near, distance


def _start_of_parts(near: NDArray[np.int64], images: Tensor, d: int) -> Array | None:
    """`(n, d)` places to start from where the graph falls into parts, else None.

    Eigenvectors know nothing of how parts lie to each other. What does not turn with an image does: its mean
    in rings, of which the main components are taken.
    """
    n, k = near.shape
    graph = coo_matrix((np.ones(n * k), (np.repeat(np.arange(n), k), near.ravel())), shape=(n, n))
    if connected_components(graph, directed=False, return_labels=False) == 1:
        return None
    m = images.shape[-1]
    ring = radius(m, images.device).round().long().clamp(max=m // 2).flatten()
    sums = images.new_zeros(*images.shape[:2], m // 2 + 1).index_add_(-1, ring, images.flatten(2))
    rings = (sums / torch.bincount(ring)).flatten(1).cpu().double().numpy()
    u, s, _ = np.linalg.svd(rings - rings.mean(0), full_matrices=False)
    start = np.zeros((n, d))
    some = min(d, len(s))
    start[:, :some] = u[:, :some] * s[:some]
    start *= _SPAN / max(float(np.ptp(start, axis=0).max()), 1e-30)
    shake = np.random.default_rng(0).normal(0, 1e-3 * _SPAN, start.shape)  # copies must come apart
    return (start + shake).astype(np.float32)


@torch.no_grad()
def place_among(
    images: Tensor, disc: Tensor, angles: Tensor, known: Tensor, known_place: Tensor, width: float
) -> Tensor:
    """`(b, d)` where images `(b, c, m, m)` lie among known ones `(q, px)` of known places `(q, d)`.

    The nearest ones at any turn vote, each for the places within `width` of its own: where they lie in two
    groups, the image lies in one of them and not between.
    """
    known = _without_mean(known.view(-1, *images.shape[1:]) * disc, disc)
    flat = _without_mean(images * disc, disc)
    square = known.square().sum(1)
    found = []
    for part in flat.split(_AT_ONCE):
        best = torch.full((len(part), len(known)), -torch.inf, device=part.device)
        for turned in _turned(part, images.shape[1:], angles).unbind(1):
            torch.maximum(best, turned @ known.T, out=best)
        off = part.square().sum(1, keepdim=True) + square - 2 * best
        value, near = off.topk(min(N_NEIGHBOURS, len(known)), largest=False)
        away = value.clamp_min(0).sqrt()
        away = away - away[:, :1]
        weight = (-away / away.mean(1, keepdim=True).clamp_min(1e-9)).exp()
        place = known_place[near]
        support = (-torch.cdist(place, place).square() / (2 * width**2)).exp()
        chosen = (support @ weight[..., None])[..., 0].argmax(1)
        votes = weight * support[torch.arange(len(part), device=part.device), chosen]
        found.append(torch.einsum("bk,bkd->bd", votes / votes.sum(1, keepdim=True), place))
    return torch.cat(found) if found else known_place[:0]


def evened(layout: Array) -> Array:
    """`(n, d)` places → [-1, 1], most of the way to an even distribution along every axis."""
    low, high = np.quantile(layout, (0.005, 0.995), axis=0)
    plain = np.clip((layout - low) / np.maximum(high - low, 1e-9) * 2 - 1, -1, 1)
    rank = (layout.argsort(0).argsort(0) + 0.5) / len(layout) * 2 - 1
    return (_EDGE * ((1 - _EVENNESS) * plain + _EVENNESS * rank)).astype(np.float32)


def _turned(flat: Tensor, shape: torch.Size, angles: Tensor, back: bool = False) -> Tensor:
    """`(b, px)` images turned by (back from) every angle: `(b, r, px)`."""
    images = flat.view(-1, *shape).repeat_interleave(len(angles), 0)
    turned = (unplace if back else place)(images, angles.repeat(len(flat)), mode="bicubic")
    return turned.flatten(1).unflatten(0, (len(flat), len(angles)))


def _without_mean(images: Tensor, disc: Tensor) -> Tensor:
    """`(n, c, m, m)` → `(n, px)`, the mean inside the disc taken off."""
    mean = (images * disc).sum((2, 3), keepdim=True) / disc.square().sum()
    return (images - mean * disc).flatten(1)


def _means(
    images: Tensor,
    flat: Tensor,
    angles: Tensor,
    node_z: Tensor,
    off: Tensor,
    used: Tensor,
    weight: float,
) -> Generator[Step, None, Tensor]:
    """Means `(k, c, m, m)` of the images that lie near each node, turned onto each other."""
    shape, k = images.shape[1:], len(node_z)
    spacing = float(torch.cdist(node_z[:1], node_z[1:]).min()) if k > 1 else 2.0
    between = torch.cdist(node_z, node_z) / spacing
    smooth = (-2 * between.square()).exp()
    node = flat[off.argmin(0)]  # to begin with, the image that lies nearest
    node = _onto_each_other(node, shape, angles, between, used.float())
    pictures = images.new_zeros(k, *shape)
    for step in range(_N_ROUNDS):
        last = step == _N_ROUNDS - 1
        heat = weight * (0.1 + 0.9 * step / (_N_ROUNDS - 1))
        width = spacing if step >= _N_ROUNDS // 2 else 2 * spacing
        total, picture, count = torch.zeros_like(node), pictures.flatten(1).zero_(), flat.new_zeros(k)
        minus_norm = -node.square().sum(1)
        for part in torch.arange(len(flat), device=flat.device).split(_AT_ONCE):
            back = _turned(flat[part], shape, angles, back=True)
            score = torch.addmm(minus_norm, back.flatten(0, 1), node.T, alpha=2).unflatten(0, back.shape[:2])
            score = heat * score - (off[part] / (2 * width**2))[:, None]
            share = score.flatten(1).softmax(1).view(-1, k)
            total.addmm_(share.T, back.flatten(0, 1))
            if last:
                whole = _turned(images[part].flatten(1), shape, angles, back=True)
                picture.addmm_(share.T, whole.flatten(0, 1))
            count += share.sum(0)
        # a node with few images borrows from its neighbours
        weights = (smooth @ count).clamp_min(1e-3)[:, None]
        node = (smooth @ total) / weights
        if last:
            picture = (smooth @ picture) / weights
        elif step in (1, 3):
            node = _onto_each_other(node, shape, angles, between, count)
        yield Step("first classes", (step + 1) / _N_ROUNDS)
    return picture.view(k, *shape)


def _onto_each_other(
    node: Tensor, shape: torch.Size, angles: Tensor, between: Tensor, count: Tensor
) -> Tensor:
    """`(k, px)` pictures, each turned onto a neighbour that was turned before, the most alike first.

    `between` `(k, k)` says how many spacings lie between nodes, `count` `(k,)` how many images each shows.
    """
    k, r = len(node), len(angles)
    turned = _turned(node, shape, angles)
    best = node.new_full((k, k), -torch.inf)
    at = torch.zeros(k, k, dtype=torch.int64, device=node.device)
    for i in range(r):
        value = node @ turned[:, i].T
        better = value > best
        best = torch.where(better, value, best)
        at[better] = i
    square = node.square().sum(1)
    off = (square[:, None] + square - 2 * best).clamp_min(0).sqrt() / square.mean().sqrt().clamp_min(1e-9)
    empty = (count <= 1e-3 * count.sum() / k).float()
    cost = (off * between + 5 * torch.maximum(empty[:, None], empty)).tolist()
    angle_of, close = at.tolist(), (between < _REACH).tolist()
    turn = [-1] * k
    first = int(count.argmax())
    waiting = [(0.0, first, first)]
    while waiting:
        _, one, onto = heapq.heappop(waiting)
        if turn[one] >= 0:
            continue
        turn[one] = 0 if one == onto else (turn[onto] + angle_of[onto][one]) % r
        for other in range(k):
            if turn[other] < 0 and close[one][other]:
                heapq.heappush(waiting, (cost[one][other], other, one))
    return turned[torch.arange(k, device=node.device), torch.tensor(turn, device=node.device)]


def log_prior(where: Tensor, node_z: Tensor, spacing: float) -> Tensor:
    """`(b, k)` log prior of the nodes for particles of these places `(b, d)`, against an even one."""
    off = torch.cdist(where, node_z).square() / (2 * (_WIDTH * spacing) ** 2)
    return (-off).log_softmax(1) + math.log(len(node_z))

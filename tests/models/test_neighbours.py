"""Neighbours at any turn, and the map that starts from them."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from particle_explorer.models.base import Step
from particle_explorer.models.neighbours import (
    _in_steps,
    evened,
    log_prior,
    neighbours,
    place_among,
    places_among_neighbours,
)
from particle_explorer.transforms import place, soft_disc

M, N_ANGLES = 20, 24
ANGLES = torch.arange(N_ANGLES) * (2 * math.pi / N_ANGLES)
DISC = soft_disc(M, 8.0)
Found = TypeVar("Found")


def result(steps: Generator[Step, None, Found]) -> Found:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def kinds(n: int, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """`(n, 1, M, M)` bars, rings and hooks of changing size at any turn, and which is which."""
    random = torch.Generator().manual_seed(3)
    kind = torch.arange(n) % 3
    size = 0.85 + 0.3 * torch.rand(n, 1, 1, generator=random)
    at = torch.arange(M) - M // 2
    y, x = torch.meshgrid(at.float(), at.float(), indexing="ij")
    y, x = y / size, x / size
    bar = torch.sigmoid(3 * (6 - x.abs())) * torch.sigmoid(3 * (1.5 - y.abs()))
    ring = torch.sigmoid(3 * (1.5 - (torch.hypot(x, y) - 5).abs()))
    hook = ring * torch.sigmoid(3 * x) + bar * (y < 2)
    images = torch.stack([bar, ring, hook])[kind, torch.arange(n)][:, None]
    images = place(images, 2 * math.pi * torch.rand(n, generator=random), mode="bicubic")
    return images + noise * torch.randn(images.shape, generator=random), kind


def test_an_image_is_nearest_to_its_own_turned_copy() -> None:
    images, _ = kinds(30, noise=0.3)
    turned = place(images, torch.full((30,), math.radians(75)), mode="bicubic")
    both = torch.cat([images, turned]) * DISC
    flat = (both - both.mean((2, 3), keepdim=True)).flatten(1)
    near, distance = result(neighbours(flat, both.shape[1:], ANGLES, 3))
    assert torch.equal(near[:, 0], torch.arange(60))  # itself
    assert torch.equal(near[:30, 1], torch.arange(30, 60)) and torch.equal(near[30:, 1], torch.arange(30))
    assert bool((distance[:, 0] == 0).all()) and bool((distance.diff(dim=1) >= 0).all())


def test_neighbours_without_noise_are_of_one_kind_and_with_much_of_any() -> None:
    share = []
    for noise in (0.05, 20.0):
        images, kind = kinds(150, noise)
        flat = ((images * DISC) - (images * DISC).mean((2, 3), keepdim=True)).flatten(1)
        near, _ = result(neighbours(flat, images.shape[1:], ANGLES, 10))
        share.append(float((kind[near[:, 1:]] == kind[:, None]).float().mean()))
    assert share[0] > 0.99 and share[1] == pytest.approx(1 / 3, abs=0.1)


@pytest.fixture(scope="module")
def map_of_kinds() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, kinds, grid, and the places, classes and pictures found."""
    images, kind = kinds(240)
    axis = torch.linspace(-1, 1, 7)
    grid = torch.cartesian_prod(axis, axis)
    found = result(places_among_neighbours(images, DISC, ANGLES, grid, 0.5 / 0.05**2 / 100, seed=1))
    return images, kind, grid, *found


def test_kinds_lie_apart_and_nothing_lies_between(map_of_kinds: tuple[Tensor, ...]) -> None:
    _, kind, grid, where, kept, _ = map_of_kinds
    assert bool((where.abs() <= 1).all())
    off = torch.cdist(where, where).fill_diagonal_(torch.inf)
    assert float((kind[off.argmin(1)] == kind).float().mean()) > 0.99
    node = torch.cdist(where, grid).argmin(1)
    assert 6 < int(kept.sum()) < 45
    assert float(kept[node].float().mean()) > 0.9  # few images lie where no class is
    for one in node.unique():
        assert (torch.bincount(kind[node == one]).max() / (node == one).sum()) > 0.7


def test_a_class_looks_like_its_images_and_like_the_class_beside_it(map_of_kinds: tuple[Tensor, ...]) -> None:
    images, kind, grid, where, kept, pictures = map_of_kinds
    node = torch.cdist(where, grid).argmin(1)
    likeness, off_by = [], []
    for one in kept.nonzero()[:, 0]:
        own = images[node == one] * DISC
        turned = place(pictures[one].expand(N_ANGLES, -1, -1, -1), ANGLES, mode="bicubic")
        r = torch.corrcoef(torch.cat([own.flatten(1), turned.flatten(1)]))[: len(own), len(own) :]
        likeness.append(float(r.max(1).values.mean()))
    assert np.median(likeness) > 0.9
    # classes of one kind side by side are turned alike: the best turn from one to the next is none
    most = torch.stack([torch.bincount(kind[node == i], minlength=3) for i in range(len(grid))]).argmax(1)
    pairs = (torch.cdist(grid, grid) < 0.4) & kept & kept[:, None] & (most == most[:, None]) & (most != 1)
    for i, j in pairs.triu(1).nonzero().tolist():
        turned = place(pictures[j].expand(N_ANGLES, -1, -1, -1), ANGLES, mode="bicubic")
        best = int((turned * pictures[i]).sum((1, 2, 3)).argmax())
        off_by.append(min(best, N_ANGLES - best))
    assert len(off_by) > 3 and np.mean(np.array(off_by) <= 1) > 0.8


def test_the_same_seed_gives_the_same_map(map_of_kinds: tuple[Tensor, ...]) -> None:
    images, _, grid, where, kept, pictures = map_of_kinds
    again = result(places_among_neighbours(images, DISC, ANGLES, grid, 0.5 / 0.05**2 / 100, seed=1))
    torch.testing.assert_close(again.place, where)
    assert torch.equal(again.kept, kept)
    torch.testing.assert_close(again.pictures, pictures)


def test_laying_out_ends_when_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("particle_explorer.models.neighbours._LOOK_S", 0.002)
    images, _ = kinds(240)
    axis = torch.linspace(-1, 1, 5)
    grid = torch.cartesian_prod(axis, axis)
    n_threads = threading.active_count()
    steps = places_among_neighbours(images, DISC, ANGLES, grid, 50.0, seed=1)
    told = []
    for step in steps:
        if step.what == "laying neighbours out":
            told.append(step.fraction)
            if len(told) == 2:
                break
    assert len(told) == 2
    steps.close()
    assert threading.active_count() == n_threads


def test_what_is_done_in_a_thread_tells_its_share() -> None:
    seen = threading.Event()

    def work(tell: Callable[[float], None]) -> int:
        tell(0.5)
        assert seen.wait(60)
        return 7

    steps = _in_steps("waiting", work)
    for step in steps:
        assert step.what == "waiting" and step.fraction in (0.0, 0.5)
        if step.fraction == 0.5:
            break
    seen.set()
    assert result(steps) == 7


def test_other_images_are_placed_among_their_kind(map_of_kinds: tuple[Tensor, ...]) -> None:
    images, kind, _, where, _, _ = map_of_kinds
    known, others = slice(0, 180), slice(180, 240)
    found = place_among(images[others], DISC, ANGLES, images[known].flatten(1), where[known], 0.3)
    nearest = torch.cdist(found, where[known]).argmin(1)
    assert float((kind[known][nearest] == kind[others]).float().mean()) > 0.95
    assert float((found - where[others]).norm(dim=1).median()) < 0.15


def test_an_image_between_two_groups_lies_in_one_of_them() -> None:
    images, kind = kinds(60)
    where = torch.where(kind[:, None] == 0, -0.8, 0.8).expand(-1, 2)
    half = (images[0] + images[1])[None] / 2
    found = place_among(half, DISC, ANGLES, images.flatten(1), where, 0.2)
    assert float((found.abs() - 0.8).abs().max()) < 0.05


def test_evened_places_keep_their_order_and_fill_the_map() -> None:
    random = np.random.default_rng(0)
    far = np.concatenate([random.normal(0, 1, (300, 2)), random.normal(40, 1, (100, 2))]).astype(np.float32)
    found = evened(far)
    assert np.abs(found).max() <= 1 and found.std() > 0.4
    for i in range(2):
        assert np.all(np.diff(found[far[:, i].argsort(), i]) >= 0)
    gap = found[300:].min(0) - found[:300].max(0)
    assert np.all(gap > 0.05)


def test_the_prior_of_the_nodes_is_one_over_all() -> None:
    nodes = torch.linspace(-1, 1, 9)[:, None]
    prior = log_prior(torch.tensor([[0.5]]), nodes, 0.25)
    assert float(prior.exp().mean()) == pytest.approx(1.0, abs=1e-5)
    assert int(prior.argmax()) == 6

"""What is computed from coordinates alone, on clouds whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import adjusted_rand_score

from particle_explorer import latents as latents_module
from particle_explorer.configs import ClusterConfig, EmbedConfig
from particle_explorer.files import Stopped, UserError
from particle_explorer.latents import (
    Latents,
    agreement,
    angle_leak,
    cluster,
    embed,
    latent_columns,
    local_density,
    merged,
    pca,
    rand_index,
    split,
)


def blobs(n: int = 60, k: int = 3, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """`k` far apart groups of `n` points along the first axis, in order."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(k), n)
    z = rng.normal(size=(n * k, d))
    z[:, 0] += 20 * group
    return z.astype(np.float32), group


def everything(n: int = 5) -> Latents:
    rng = np.random.default_rng(1)
    return Latents(
        uid=rng.integers(2**63, 2**64 - 1, n, dtype=np.uint64),  # beyond what a float or an int64 can hold
        z=rng.normal(size=(n, 12)).astype(np.float32),
        z_std=rng.random((n, 12)).astype(np.float32),
        angle_deg=rng.random(n).astype(np.float32),
        shift_yx_px=rng.random((n, 2)).astype(np.float32),
        extras={"log_likelihood": rng.random(n).astype(np.float32)},
    )


def test_a_table_and_back_changes_nothing(tmp_path):
    latents = everything()
    assert latent_columns(latents.table) == [f"z_{i}" for i in range(12)]
    latents.write(tmp_path / "latents.parquet")
    again = Latents.from_table(pd.read_parquet(tmp_path / "latents.parquet"))
    assert again.uid.dtype == np.uint64
    for name in ("uid", "z", "z_std", "angle_deg", "shift_yx_px"):
        np.testing.assert_array_equal(getattr(again, name), getattr(latents, name))
    np.testing.assert_array_equal(again.extras["log_likelihood"], latents.extras["log_likelihood"])


def test_what_a_model_does_not_say_stays_unsaid():
    latents = Latents(uid=np.arange(3, dtype=np.uint64), z=np.zeros((3, 1), np.float32))
    again = Latents.from_table(latents.table)
    assert again.z_std is None and again.angle_deg is None and again.shift_yx_px is None and not again.extras


def test_principal_components_turn_the_cloud_onto_its_widest_axes():
    z, _ = blobs()
    found = pca(z @ np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0].astype(np.float32))
    np.testing.assert_allclose(found.components @ found.components.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(found.scores.var(0) / found.scores.var(0).sum(), found.share, rtol=1e-3)
    assert found.share[0] > 0.95 and np.all(np.diff(found.share) <= 0)


def test_one_dimension_is_its_own_component():
    z = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    np.testing.assert_allclose(pca(z).scores, z, atol=1e-6)


def test_clusters_are_numbered_from_1_along_the_map():
    z, group = blobs(k=5)
    number = cluster(z, ClusterConfig(n_clusters=5))
    assert set(number) == {1, 2, 3, 4, 5}
    rising = np.array_equal(number, group + 1)
    assert rising or np.array_equal(number, 5 - group)


def test_clusters_repeat_with_their_seed():
    z = np.random.default_rng(3).normal(size=(200, 3)).astype(np.float32)
    first, second = (cluster(z, ClusterConfig(n_clusters=7, seed=4)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_embedding_by_components_pads_one_dimension():
    xy = embed(np.arange(10, dtype=np.float32)[:, None], EmbedConfig(method="pca"))
    assert xy.shape == (10, 2) and np.ptp(xy[:, 0]) == pytest.approx(9) and not xy[:, 1].any()


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
def test_umap_keeps_groups_apart_and_repeats():
    z, group = blobs(n=30)
    config = EmbedConfig(n_neighbours=8)
    xy = embed(z, config)
    assert xy.shape == (90, 2)
    centres = np.stack([xy[group == i].mean(0) for i in range(3)])
    nearest = np.linalg.norm(xy[:, None] - centres, axis=-1).argmin(1)
    assert np.mean(nearest == group) == 1
    np.testing.assert_array_equal(xy, embed(z, config))


def stretched(n: int = 600):
    """Three long parallel clouds; and the cloud of every point."""
    rng = np.random.default_rng(5)
    group = rng.integers(0, 3, n)
    z = np.stack([rng.normal(0, 1.5, n), group * 2 + rng.normal(0, 0.25, n)], 1)
    return z.astype(np.float32), group


@pytest.mark.parametrize("method", ["gmm", "hdbscan", "ward"])
def test_methods_find_the_groups_there_are(method):
    z, group = stretched() if method == "gmm" else blobs(n=100)
    config = ClusterConfig(method=method, n_clusters={"gmm": 0, "hdbscan": 0, "ward": 3}[method], min_size=20)
    found = {}
    number = cluster(z, config, found=found)
    assert adjusted_rand_score(number, group) > 0.9
    assert set(number) - {0} == {1, 2, 3}
    if method == "gmm":
        assert min(found["bic"], key=found["bic"].get) == "3" and found["n_clusters"] == 3


@pytest.mark.parametrize("method", ["hdbscan", "ward"])
def test_particles_outside_the_fitted_part_join_their_neighbours(method, monkeypatch):
    z, group = blobs(n=200)
    for limit in ("PAIRS_LIMIT", "DENSITY_LIMIT"):
        monkeypatch.setattr(latents_module, limit, 150)
    number = cluster(z, ClusterConfig(method=method, n_clusters=3, min_size=40))
    assert adjusted_rand_score(number, group) > 0.95


def test_groups_merge_split_and_close_their_gaps():
    z, _ = blobs(k=4)
    label = cluster(z, ClusterConfig(n_clusters=4))
    one = merged(label, [2, 3])
    assert set(one) == {1, 2, 3}
    np.testing.assert_array_equal(one == 2, (label == 2) | (label == 3))
    two = split(one, 2, z)
    assert adjusted_rand_score(two, label) == 1 and set(two) == {1, 2, 3, 4}
    sparse = merged(np.array([0, 1, 2, 5], np.int32), [1, 2])
    np.testing.assert_array_equal(sparse, [0, 1, 1, 2])


def test_a_layout_of_a_part_places_the_others_among_their_own():
    z, group = blobs(n=80)
    told = []
    xy = embed(z, EmbedConfig(method="tsne", perplexity=10, fit_at_most=120), told.append)
    centres = np.stack([np.median(xy[group == i], axis=0) for i in range(3)])
    nearest = np.linalg.norm(xy[:, None] - centres, axis=-1).argmin(1)
    assert np.mean(nearest == group) > 0.98
    assert told == sorted(told) and told[-1] == 1


@pytest.mark.filterwarnings("ignore:Tensorflow not installed:ImportWarning")
def test_umap_says_how_far_it_is_and_can_be_stopped():
    z, _ = blobs(n=100)
    told = []
    embed(z, EmbedConfig(), told.append)
    assert told == sorted(told) and len(told) >= 3 and told[-1] > 0.9

    def stop(fraction):
        if fraction > 0.5:
            raise Stopped("stopped")

    with pytest.raises(Stopped):
        embed(z, EmbedConfig(), stop)


def test_runs_agree_up_to_what_no_fit_can_know():
    rng = np.random.default_rng(2)
    n = 1500
    z = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    uid, angle = np.arange(n, dtype=np.uint64), rng.uniform(-180, 180, n)
    noise = rng.normal(0, 3, n)
    one = Latents(uid, z, angle_deg=angle.astype(np.float32))
    # another map of the same: bent and turned, its frame turned by 50° and ±20° along the map
    bent = np.stack([z[:, 1] + 0.2 * z[:, 0] ** 2, -z[:, 0]], 1)
    turned = (angle + 50 + 20 * z[:, 0] + noise + 180) % 360 - 180
    other = Latents(uid, bent, angle_deg=turned.astype(np.float32))
    groups = (z[:, 0] > 0).astype(int)
    found = agreement(one, other, groups, 1 - groups)
    assert found.position > 0.97 and found.clusters == 1 and found.n == n
    assert 5 < found.angle_deg < 14 and found.angle_along_map_deg < 4
    nothing = Latents(uid, rng.normal(size=(n, 2)).astype(np.float32))
    assert agreement(one, nothing).position < 0.1 and np.isnan(agreement(one, nothing).angle_deg)
    with pytest.raises(UserError, match="different particles"):
        agreement(one, Latents(uid + 1, z))


def test_rand_index_is_that_of_sklearn():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, 400), rng.integers(0, 3, 400)
    assert rand_index(a, b) == pytest.approx(adjusted_rand_score(a, b))
    assert rand_index(a, a // 2) == pytest.approx(adjusted_rand_score(a, a // 2))


def test_leak_tells_content_that_knows_the_angle_from_content_that_does_not():
    rng = np.random.default_rng(1)
    angle = rng.uniform(-180, 180, 3000).astype(np.float32)
    unit = np.stack([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], 1)
    noise = rng.normal(size=(3000, 2))
    assert angle_leak(noise.astype(np.float32), angle) < 0.03
    assert angle_leak((unit + 0.05 * noise).astype(np.float32), angle) > 0.95
    assert 0.2 < angle_leak((unit + 0.7 * noise).astype(np.float32), angle) < 0.8
    assert np.isnan(angle_leak(noise[:10].astype(np.float32), angle[:10]))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: cluster(np.zeros((30, 2), np.float32), ClusterConfig(method="ward", n_clusters=0)),
            "only gmm finds the number",
        ),
        (
            lambda: cluster(np.zeros((30, 2), np.float32), ClusterConfig(method="hdbscan", min_size=50)),
            "smaller --min-size",
        ),
        (lambda: merged(np.array([1, 2]), [3]), "no group 3"),
        (
            lambda: cluster(np.zeros((3, 2), np.float32), ClusterConfig(n_clusters=4)),
            "3 particles cannot make 4",
        ),
        (lambda: embed(np.zeros((9, 2), np.float32), EmbedConfig()), "too few for UMAP"),
        (lambda: cluster(np.full((30, 2), np.nan, np.float32), ClusterConfig()), "not numbers"),
    ],
)
def test_impossible_wishes_are_said_in_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_local_density_follows_the_true_one() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 2)).astype(np.float32)
    z[7] = np.nan
    found = local_density(z)
    truth = -(z**2).sum(1) / (2 * np.log(10))  # of a normal distribution, in decimal logarithms
    assert np.isnan(found[7])
    known = np.isfinite(found) & (truth > -1.5)
    assert np.corrcoef(found[known], truth[known])[0, 1] > 0.94
    slope = np.polyfit(truth[known], found[known], 1)[0]
    assert 0.8 < slope < 1.2, "a logarithm of the density itself"
    assert np.isnan(local_density(np.zeros((2, 3), np.float32))).all()


def test_the_local_density_of_many_is_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    z = np.random.default_rng(0).normal(size=(3000, 3))
    whole = local_density(z)
    monkeypatch.setattr(latents_module, "DENSITY_SAMPLE", 1000)
    assert np.corrcoef(local_density(z), whole)[0, 1] > 0.95

"""How good averages are where the truth is known: along a map, of discrete classes, and of plain k-means.

Quality is the correlation of an average with the noise-free picture at the mean true hinge of its members,
at the best pose, in a disc. It discriminates weakly (a picture without any hinge scores 0.88), so beside it
stand the spread of the true hinge within a class and the correlation of class means with the particles' own.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from particle_explorer import membership, training
from particle_explorer.averaging import average_members
from particle_explorer.bench.machine import describe
from particle_explorer.bench.stacks import data_folder, integrin
from particle_explorer.configs import AverageConfig, AveragesConfig, ClassMapConfig, RunConfig
from particle_explorer.files import write_text
from particle_explorer.session import Session
from particle_explorer.spectra import align, placed
from particle_explorer.summing.work import Members

Floats = NDArray[np.float64]
DISC_PX = 18.0
HOTTEST = (0.25, 0.05)
"""What the likelihood of discrete classes is raised to at the start of their annealing: the classes of two
starts, of which the likelier are kept."""
PLACES = 40
"""Positions along the map at which the nearest particles are averaged."""


def run(
    config: AveragesConfig, json_file: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure everything asked for; prints a markdown table and writes JSON."""
    data = data_folder(config.data)
    truth = np.load(data / "5hdb_sim" / "truth.npz")
    results: list[dict[str, Any]] = []
    n = 1000 if config.quick else config.n_particles
    for k, snr in enumerate(("0.5", "0.1")):
        if config.snr not in ("both", snr):
            continue
        pictures = truth["templates"].astype(np.float64) * float(truth["signal_scale"][k])
        with tempfile.TemporaryDirectory(prefix="particle-explorer-bench-") as folder:
            stack = integrin(data, snr, n)
            session = Session.create(Path(folder) / "session", stack.particles, stack.preprocess)
            scene = Scene(session, pictures, truth["template_hinge_deg"].astype(np.float64))
            for result in _measured(scene, config):
                results.append({"snr": snr, "n": len(session.table)} | result)
                say(f"SNR {snr}, {result['method']}: " + ", ".join(f"{k} {v}" for k, v in result.items()))
    say("\n" + table(results))
    report = {"machine": describe(), "config": config.model_dump(), "results": results}
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
        say(f"\nwritten to {json_file}")
    return report


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a line per stack and method."""
    head = ["SNR", "method", "averages", "members, median", "quality, median (10th–90th %)"]
    head += ["hinge s.d. within, °", "r(h)", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in results:
        low, middle, high = one["quality"]
        cells = [one["snr"], one["method"], str(one["averages"]), f"{one['members']:.0f}"]
        cells += [
            f"{middle:.3f} ({low:.3f}–{high:.3f})",
            f"{one['hinge_sd_deg']:.1f}",
            f"{one['hinge_r']:.3f}",
        ]
        lines.append("| " + " | ".join([*cells, f"{one['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


class Scene:
    """A session with its true hinge and the noise-free pictures."""

    def __init__(self, session: Session, pictures: Floats, picture_hinge: Floats) -> None:
        self.session, self.pictures, self.picture_hinge = session, pictures, picture_hinge
        self.hinge = session.table["true_conformation"].to_numpy(float)
        y, x = np.indices(pictures.shape[1:]) - pictures.shape[1] // 2
        self.disc = np.hypot(y, x) <= DISC_PX

    def at(self, hinge: float) -> Floats:
        """The noise-free picture at a hinge, between its neighbours on the grid."""
        place = float(np.interp(hinge, self.picture_hinge, np.arange(len(self.picture_hinge))))
        low = min(int(place), len(self.pictures) - 2)
        share = place - low
        return np.asarray((1 - share) * self.pictures[low] + share * self.pictures[low + 1])

    def quality(self, average: NDArray[Any], hinge: float) -> float:
        """Correlation with the picture at `hinge`, at the best angle and shift."""
        return placed(average, self.at(hinge), self.disc).correlation

    def scored(self, method: str, images: NDArray[Any], members: Members, seconds: float) -> dict[str, Any]:
        """All columns of the table for averages and their members."""
        means, within, weight, quality, sizes = [], [], [], [], []
        own_mean = np.empty(len(members.row))
        for i in range(len(images)):
            own = members.average == i
            if not own.any():
                continue
            hinge = self.hinge[members.row[own]]
            means.append(float(hinge.mean()))
            own_mean[own] = hinge.mean()
            within.append(float(hinge.var()))
            weight.append(len(hinge))
            quality.append(self.quality(images[i], hinge.mean()))
            sizes.append(len(hinge))
        correlation = np.corrcoef(own_mean, self.hinge[members.row])[0, 1] if len(means) > 1 else np.nan
        return {
            "method": method,
            "averages": len(quality),
            "members": float(np.median(sizes)),
            "quality": [round(float(q), 4) for q in np.quantile(quality, [0.1, 0.5, 0.9])],
            "hinge_sd_deg": round(float(np.sqrt(np.average(within, weights=weight))), 2),
            "hinge_r": round(float(correlation), 4),
            "seconds": round(seconds, 1),
        }


def _measured(scene: Scene, config: AveragesConfig) -> list[dict[str, Any]]:
    session = scene.session
    truth = session.table
    angle = truth["true_angle_deg"].to_numpy(float)
    shift = truth[["true_shift_y_px", "true_shift_x_px"]].to_numpy(float)
    results = []

    def averaged(method: str, members: Members, k: int, poses: Any, before: float = 0.0) -> None:
        start = time.monotonic()
        names = [str(i) for i in range(k)]
        exact = AverageConfig(ctf="none", interpolation="spline")
        made = average_members(session, members, names, poses[0], poses[1], exact)
        seconds = before + time.monotonic() - start
        results.append(scene.scored(method, np.stack([one.image for one in made]), members, seconds))

    places = np.quantile(scene.hinge, (np.arange(PLACES) + 0.5) / PLACES)[:, None]
    averaged(
        "oracle: 50 nearest true hinges, true poses",
        membership.near(scene.hinge, places, 50),
        PLACES,
        (angle, shift),
    )
    start = time.monotonic()
    settings = RunConfig(model=ClassMapConfig(latent_dim=1), data=session.data_spec())
    run = session.new_run(settings)
    for _ in training.fit(run):
        pass
    seconds = time.monotonic() - start
    latents = run.latents()
    assert latents is not None and latents.angle_deg is not None and latents.shift_yx_px is not None
    z, poses = latents.z[:, 0].astype(np.float64), (latents.angle_deg, latents.shift_yx_px)
    places = np.quantile(z, (np.arange(PLACES) + 0.5) / PLACES)[:, None]
    averaged("class map: 50 nearest on the map", membership.near(z, places, 50), PLACES, poses, seconds)
    for k in (10, 20):
        label = np.clip(np.searchsorted(np.quantile(z, np.arange(1, k) / k), z), 0, k - 1)
        members, _ = membership.by_class(label)
        averaged(f"class map: {k} along the map", members, k, poses, seconds)
        averaged(f"the same {k}, true poses", members, k, (angle, shift), seconds)
    if not config.baselines:
        return results
    images = session.images.read(np.arange(len(truth)))[:, 0]
    start = time.monotonic()
    iterations = 6 if config.quick else 16
    tries = [ml2d(images, 20, config.seed, iterations=iterations, hottest=heat) for heat in HOTTEST]
    pictures, label, _ = max(tries, key=lambda one: one[2])
    results.append(
        scene.scored("ML2D, 20 classes", pictures, membership.by_class(label)[0], time.monotonic() - start)
    )
    start = time.monotonic()
    means = KMeans(100, n_init=1, random_state=config.seed).fit(images.reshape(len(images), -1))
    pictures = means.cluster_centers_.reshape(100, *images.shape[1:])
    members, _ = membership.by_class(means.labels_)
    results.append(scene.scored("k-means on pixels, 100", pictures, members, time.monotonic() - start))
    return results


def ml2d(
    images: NDArray[np.float32],
    k: int,
    seed: int = 0,
    *,
    iterations: int = 16,
    n_angles: int = 36,
    reach: int = 2,
    hottest: float = HOTTEST[0],
) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
    """Discrete maximum-likelihood 2D classes (Scheres et al. 2005), annealed → `(k, n, n)`, `(N,)` classes,
    and the logarithm of the likelihood but for a constant.

    `images` `(N, n, n)` with noise of variance 1; angles in steps of 360° / `n_angles`, whole shifts within
    `reach` px with a Gaussian prior of 1 px. Classes without images are left as they are.
    """
    n = images.shape[-1]
    random = np.random.default_rng(seed)
    data = torch.from_numpy(np.ascontiguousarray(images.reshape(len(images), -1)))
    angles = np.arange(n_angles) * 360.0 / n_angles
    steps = [(y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)]
    prior = torch.tensor([-0.5 * (y**2 + x**2) for y, x in steps], dtype=torch.float32)
    mean = images.mean(0)
    classes = np.stack([mean + images[random.choice(len(images), 50)].mean(0) * 0.3 for _ in range(k)])
    label = np.zeros(len(images), np.int64)
    y, x = np.indices((n, n)) - n // 2
    disc = (np.hypot(y, x) < n / 2).astype(np.float32)
    share = np.full(k, 1.0 / k)
    for iteration in range(iterations):
        heat = min(1.0, hottest * (1 / hottest) ** (iteration / max(1, 0.7 * iterations)))
        # placed at angle a: moved back by -a
        copies = np.repeat((classes * disc).astype(np.float32)[:, None], n_angles, 0)
        turned = torch.from_numpy(align(copies, np.tile(-angles, k), np.zeros((k * n_angles, 2)))[:, 0])
        moved = torch.stack([torch.roll(turned, step, (1, 2)) for step in steps], 1).reshape(-1, n * n)
        offset = prior.repeat(k * n_angles) - 0.5 * moved.square().sum(1)
        offset += (
            torch.from_numpy(np.log(np.maximum(share, 1e-6))).float().repeat_interleave(n_angles * len(steps))
        )
        total = torch.zeros_like(moved)
        weight, likelihood = torch.zeros(len(moved)), 0.0
        for start in range(0, len(data), 500):
            block = data[start : start + 500]
            score = torch.addmm(offset, block, moved.T).mul_(heat)
            posterior = torch.softmax(score, 1)
            likelihood += float(torch.logsumexp(score, 1).sum())
            total.addmm_(posterior.T, block)
            weight += posterior.sum(0)
            by_class = posterior.reshape(len(block), k, -1).sum(2)
            label[start : start + 500] = by_class.argmax(1).numpy()
        back = total.reshape(k * n_angles, len(steps), n, n)
        unmoved = torch.stack([torch.roll(back[:, i], (-y, -x), (1, 2)) for i, (y, x) in enumerate(steps)])
        upright = align(unmoved.sum(0).numpy()[:, None], np.tile(angles, k), np.zeros((k * n_angles, 2)))[
            :, 0
        ]
        count = weight.reshape(k, -1).sum(1).numpy()
        sums = upright.reshape(k, n_angles, n, n).sum(1)
        used = count > 1
        classes[used] = sums[used] / count[used, None, None]
        share = count / count.sum()
    return classes.astype(np.float32), label, likelihood

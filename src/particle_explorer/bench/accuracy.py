"""How well models find content and pose, through the very chain that users run.

Every stack becomes a session, every model a run of `training.fit` on the session's train split, and the
latents that it writes are scored on the test split. `seconds` is from the start of the fit to the latents of
all rows written, the same for the processor's time of all threads. Holding a part still and turning images
for the measure of rotation come after and are timed apart.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from particle_explorer import devices, encoding, gauge, metrics, training
from particle_explorer.bench.machine import describe
from particle_explorer.bench.stacks import Stack, make, placed
from particle_explorer.configs import AccuracyConfig, ModelConfig, RunConfig, TrainConfig
from particle_explorer.demo import score
from particle_explorer.files import UserError, write_text
from particle_explorer.io.reading import read_array
from particle_explorer.latents import Latents
from particle_explorer.models.build import build_model
from particle_explorer.models.rotation_ae import RotationAE
from particle_explorer.session import Run, Session

STACKS = (
    "integrin-0.5", "integrin-0.1", "hinge-0.1", "hinge-0.03",
    "mnist-n", "mnist-u", "mnist-multi", "mnist-posed", "mnist-posed-90", "xyrcs", "dsprites",
)  # fmt: skip
PAPER_EPOCHS = {"spatial-vae": 500, "target-vae": 500, "vae": 500, "rotation-ae": 200}
"""What `full` trains where the paper says it; other models take their own number."""
QUICK_MINUTES = 25.0
"""Training of the quick protocol is as many epochs as fit into this, by the speed of some steps."""
N_TURNS = 160
N_TURNED = {"smoke": 4, "quick": 200, "full": 10_000}
"""Test digits that are turned `N_TURNS` times each."""


def run(
    config: AccuracyConfig, json_file: Path | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Fit and score everything asked for; prints markdown tables and writes JSON."""
    results: list[dict[str, Any]] = []
    names, models = _chosen(config.stacks, STACKS, "stacks"), _models(config)
    with tempfile.TemporaryDirectory(prefix="particle-explorer-bench-") as folder:
        for stack_name in names:
            stack = make(stack_name, config, Path(folder))
            limit = f", limit {stack.limit_abs_r:.3f}" if math.isfinite(stack.limit_abs_r) else ""
            say(f"{stack.name}: {len(stack.particles)} particles{limit}")
            session = Session.create(
                Path(folder) / f"session-{stack.name}", stack.particles, stack.preprocess
            )
            for name in models:
                for number in range(1 if config.protocol == "smoke" else config.n_seeds):
                    seed = config.first_seed + number
                    result = {"stack": stack.name, "model": name, "protocol": config.protocol, "seed": seed}
                    if math.isfinite(stack.limit_abs_r):
                        result["limit_abs_r"] = stack.limit_abs_r
                    result |= _one(session, stack, _settings(name, stack, config), seed, config)
                    results.append(result)
                    said = ", ".join(f"{k} {v}" for k, v in result.items() if k in SHOWN)
                    say(f"  {name}, seed {seed}: {said}")
    say("\n" + table(results))
    report = {"machine": describe(), "config": config.model_dump(), "results": results}
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
        say(f"\nwritten to {json_file}")
    return report


SHOWN = {
    "epochs": "epochs",
    "conformation_abs_r": "|r|",
    "rotation_T": "T",
    "rotation_T_held_still": "T held still",
    "angle_error_median_deg": "angle error, median °",
    "angle_error_median_deg_held_still": "held still, °",
    "shift_rms_px": "shift rms, px",
    "junk_auc": "junk AUC",
    "junk_found": "junk found",
    "particles_taken_for_junk": "particles taken for junk",
    "clustering_ward": "clustering, Ward",
    "clustering_kmeans": "k-means",
    "clustering_ward_with_std": "Ward on z and its spread",
    "rotation_rc": "rotation r as published",
    "rotation_T_calibrated": "T calibrated",
    "rotation_rc_calibrated": "r as published, calibrated",
    "rotation_rmse_160_deg": "RMSE of 160 turns, °",
    "angle_residual_median_deg": "angle residual per shape, median °",
    "angle_residual_rms_deg": "rms °",
    "angle_residual_local_deg": "beside its neighbours on the map, median °",
    "shift_r_y": "shift r, y",
    "shift_r_x": "shift r, x",
    "shift_r_y_calibrated": "shift r calibrated, y",
    "shift_r_x_calibrated": "x",
    "mse_average": "MSE, average",
    "mse_worst": "MSE, worst",
    "seconds": "seconds",
    "cpu_seconds": "CPU seconds",
}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a table per kind of stack, a line per stack and model: median over seeds, and their range."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["stack"], result["model"]), []).append(result)
    labelled = [group for group in groups.values() if "clustering_ward" in group[0]]
    others = [group for group in groups.values() if "clustering_ward" not in group[0]]
    return "\n\n".join(_one_table(kind) for kind in (others, labelled) if kind)


def _one_table(groups: list[list[dict[str, Any]]]) -> str:
    shown = {k: v for k, v in SHOWN.items() if any(k in result for group in groups for result in group)}
    with_limit = any("limit_abs_r" in group[0] for group in groups)
    head = ["stack", "model", "seeds", *(["limit"] if with_limit else []), *shown.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for group in groups:
        cells = [group[0]["stack"], group[0]["model"], str(len(group))]
        if with_limit:
            cells.append(f"{group[0]['limit_abs_r']:.3f}" if "limit_abs_r" in group[0] else "–")
        for name in shown:
            values = [result[name] for result in group if name in result]
            if not values:
                cells.append("–")
                continue
            text = f"{statistics.median(values):.{_digits(name)}f}"
            if len(values) > 1:
                text += f" ({min(values):.{_digits(name)}f}–{max(values):.{_digits(name)}f})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _digits(name: str) -> int:
    if name.endswith("seconds") or name == "epochs":
        return 0
    return 1 if "deg" in name else 2 if "px" in name else 3


# ---------------------------------------------------------------------- what is asked for


def _chosen(text: str, known: Sequence[str], what: str) -> list[str]:
    if text == "all":
        return list(known)
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(
            f"--{what} {unknown[0]}: choose all, or some of {', '.join(known)}, with commas between"
        )
    return names


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {"beta-vae": ("vae", {"beta": 4.0, "latent_dim": 4})}
"""Models by other names: the kind, and what is set; the baseline that the TARGET-VAE paper calls β-VAE."""


def kinds() -> dict[str, type[Any]]:
    """Every kind of model and its settings."""
    union = get_args(ModelConfig)[0]
    classes = get_args(union) or (union,)
    return {str(cls.model_fields["kind"].default): cls for cls in classes}


def _models(config: AccuracyConfig) -> list[str]:
    if config.models == "all":
        return [*kinds(), *VARIANTS]
    names = [name.strip() for name in config.models.split(",")]
    for name in names:
        _kind_and_dims(name)
    return names


def _kind_and_dims(name: str) -> tuple[str, int]:
    """`target-vae-32d` → ("target-vae", 32); 0 dimensions where the name does not say."""
    kind, dash, last = name.rpartition("-")
    if dash and last.endswith("d") and last[:-1].isdigit() and kind in kinds():
        return kind, int(last[:-1])
    if name in VARIANTS:
        return name, 0
    if name not in kinds():
        known = ", ".join([*kinds(), *VARIANTS])
        raise UserError(f"--models {name}: choose all, or some of {known}, each also as KIND-2d, KIND-3d, …")
    return name, 0


def _settings(name: str, stack: Stack, config: AccuracyConfig) -> Any:
    """The settings of a model for a stack: one dimension for one motion, two for labels, unless named."""
    kind, dims = _kind_and_dims(name)
    kind, named = VARIANTS.get(kind, (kind, {}))
    cls = kinds()[kind]
    labelled = "true_label" in stack.particles.table
    try:
        given = json.loads(config.settings) if config.settings else {}
        settings = {k: v for k, v in stack.settings.items() if k in cls.model_fields}
        settings |= {"latent_dim": dims or (2 if labelled else 1)} | named | given | {"kind": kind}
        return TypeAdapter(ModelConfig).validate_python(settings)
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"--settings must be a JSON object, not {config.settings}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise UserError(f"--models {name} with --settings: {where}: {first['msg']}") from error


def _epochs(session: Session, model: Any, seed: int, config: AccuracyConfig) -> int:
    """How long to train; 0 is the model's own number."""
    if config.epochs:
        return config.epochs
    if config.protocol == "smoke":
        return 0 if model.kind == "class-map" else 2
    if config.protocol == "full":
        return PAPER_EPOCHS.get(model.kind, 0)
    built = build_model(model, session.data_spec())
    n_train = len(session.rows_where("split == 0"))
    images = n_train * built.n_epochs
    if model.kind == "class-map" or images < 20_000:
        return 0
    affordable = QUICK_MINUTES * 60 * _images_per_second(session, model, seed, config.precision)
    return 0 if affordable >= images else max(1, int(affordable / n_train))


def _images_per_second(session: Session, model: Any, seed: int, precision: str) -> float:
    """Of training, from four steps after a first."""
    training.seed_everything(seed)
    device = devices.choose_device("auto")
    built = build_model(model, session.data_spec()).to(device).train()
    batches = encoding.SessionBatches(
        session, session.rows_where("split == 0")[:4096], device, with_ctf=built.uses_ctf
    )
    size = min(built.batch_size, len(batches))
    parts = {part: torch.optim.Adam(parameters) for part, parameters in built.parts().items() if parameters}
    began = 0.0
    for step in range(5):
        if step == 1:
            began = time.monotonic()
        batch = batches.take(torch.randint(len(batches), (size,)))
        for part, optimiser in parts.items():
            with devices.autocast(built, device, precision):
                losses = built(batch, part)
            if not losses:
                continue
            built.zero_grad(set_to_none=True)
            torch.stack([loss.float() for loss in losses.values()]).sum().backward()
            optimiser.step()
    return 4 * size / (time.monotonic() - began)


# ---------------------------------------------------------------------- one run


def _one(session: Session, stack: Stack, model: Any, seed: int, config: AccuracyConfig) -> dict[str, Any]:
    epochs = _epochs(session, model, seed, config)
    train = TrainConfig(seed=seed, n_epochs=epochs, precision=config.precision)
    settings = RunConfig(model=model, train=train, data=session.data_spec(), where="split == 0")
    new = session.new_run(settings)
    wall, cpu = time.monotonic(), time.process_time()
    epochs = 0
    for progress in training.fit(new):
        epochs = progress.n_epochs or epochs
    seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
    result: dict[str, Any] = {
        "epochs": epochs,
        "settings": model.model_dump(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }
    latents = new.latents()
    assert latents is not None
    if "true_label" in session.table:
        wall = time.monotonic()
        scores = scored_labels(session.table, latents)
        if stack.upright is not None:
            scores |= _scored_digits(new, stack.upright, latents, N_TURNED[config.protocol])
        result["seconds_scoring"] = round(time.monotonic() - wall, 1)
        return result | {name: round(value, 4) for name, value in scores.items()}
    scores = scored(session, latents.z, latents.angle_deg, latents.shift_yx_px)
    scores |= _scored_junk(session.table, latents)
    if latents.angle_deg is not None:
        wall = time.monotonic()
        held = _held(new)
        result["seconds_held_still"] = round(time.monotonic() - wall, 1)
        still = scored(session, latents.z, held[:, 0], held[:, 1:])
        scores |= {f"{name}_held_still": v for name, v in still.items() if name != "conformation_abs_r"}
    return result | {name: round(value, 4) for name, value in scores.items()}


def scored(
    session: Session, z: NDArray[Any], angle_deg: NDArray[Any] | None, shift_yx_px: NDArray[Any] | None
) -> dict[str, float]:
    """The test split against its true motion; arrays over all rows of the session."""
    truth = session.table
    rows = np.flatnonzero((truth["split"] == 1) & (truth["true_junk"] == 0))
    truth = truth.iloc[rows]
    scores = score(
        truth["true_conformation"].to_numpy(),
        z[rows],
        truth["true_angle_deg"].to_numpy(),
        None if angle_deg is None else angle_deg[rows],
        truth[["true_shift_y_px", "true_shift_x_px"]].to_numpy(),
        None if shift_yx_px is None else shift_yx_px[rows],
    )
    if angle_deg is not None:
        pair = np.deg2rad(truth["true_angle_deg"].to_numpy()), np.deg2rad(angle_deg[rows])
        scores["rotation_rc"] = metrics.circular_correlation(*pair)
    return scores


def _scored_junk(table: pd.DataFrame, latents: Latents) -> dict[str, float]:
    """How well junk of the test split is told: the area under the curve, and what is found beyond 0.5."""
    rows = np.flatnonzero(table["split"] == 1)
    junk = table["true_junk"].to_numpy()[rows] == 1
    if "junk_probability" not in latents.extras or not 0 < junk.sum() < len(junk):
        return {}
    probability = latents.extras["junk_probability"][rows]
    return {
        "junk_auc": metrics.auc(probability, junk),
        "junk_found": float((probability[junk] > 0.5).mean()),
        "particles_taken_for_junk": float((probability[~junk] > 0.5).mean()),
    }


def _held(new: Run) -> NDArray[np.float64]:
    gauge.hold_still(new, auto=True)
    held = new.column("pose-held").reindex(new.session.table.index)
    return held[["angle_deg", "shift_y_px", "shift_x_px"]].to_numpy(np.float64)


def scored_labels(table: pd.DataFrame, latents: Latents) -> dict[str, float]:
    """Clusters, angles and shifts of the test split against labels and poses.

    `angle_residual_…` take the best constant offset of every label and its symmetry; the median is over all
    particles with an angle to find, the rms the root of the mean over labels. `local` takes the offset of the
    nearest of the label on the map instead.
    """
    rows = np.flatnonzero(table["split"] == 1)
    truth = table.iloc[rows]
    label, fold = truth["true_label"].to_numpy(), truth["true_fold"].to_numpy()
    z = latents.z[rows]
    scores: dict[str, float] = {
        "clustering_ward": metrics.clustering_accuracy(z, label),
        "clustering_kmeans": metrics.clustering_accuracy(z, label, method="kmeans"),
    }
    if latents.z_std is not None:
        both = np.concatenate([z, latents.z_std[rows]], 1)
        scores["clustering_ward_with_std"] = metrics.clustering_accuracy(both, label)
    if latents.angle_deg is not None:
        true_rad = np.deg2rad(truth["true_angle_deg"].to_numpy())
        rad = np.deg2rad(latents.angle_deg[rows].astype(np.float64))
        if (fold == 1).all():
            scores["rotation_T"] = metrics.fisher_lee_T(true_rad, rad)
            scores["rotation_rc"] = metrics.circular_correlation(true_rad, rad)
        errors, squares, local = [], [], []
        for one in np.unique(label[fold > 0]):
            some = label == one
            pair = true_rad[some], rad[some]
            symmetry = int(fold[some][0])
            errors.append(metrics.angle_error_deg(*pair, fold=symmetry))
            squares.append(metrics.wrapped_rms_deg(*pair, fold=symmetry) ** 2)
            local.append(metrics.local_angle_error_deg(z[some], *pair, fold=symmetry))
            scores[f"angle_residual_median_deg_{one}"] = float(np.median(errors[-1]))
        scores["angle_residual_median_deg"] = float(np.median(np.concatenate(errors)))
        scores["angle_residual_rms_deg"] = float(np.sqrt(np.mean(squares)))
        scores["angle_residual_local_deg"] = float(np.median(np.concatenate(local)))
    if latents.shift_yx_px is not None:
        for i, axis in enumerate("yx"):
            true_shift = truth[f"true_shift_{axis}_px"].to_numpy()
            scores[f"shift_r_{axis}"] = metrics.pearson(true_shift, latents.shift_yx_px[rows, i])
    return scores


def _scored_digits(
    new: Run, upright: NDArray[np.float32], latents: Latents, n_turned: int
) -> dict[str, float]:
    """What needs the upright digits: calibrated angles, `N_TURNS` turns, and images drawn in their frame."""
    model = encoding.load_model(new, devices.choose_device("auto"))
    truth = new.session.table
    rows = np.flatnonzero(truth["split"] == 1)
    truth = truth.iloc[rows]
    scores: dict[str, float] = {}
    if latents.angle_deg is not None:
        reference = _encoded(model, new.session, upright)
        shift = latents.shift_yx_px
        latents_of_test = dataclasses.replace(
            latents, angle_deg=latents.angle_deg[rows], shift_yx_px=None if shift is None else shift[rows]
        )
        scores |= calibrated(truth, latents_of_test, reference)
    if latents.angle_deg is not None and _knows_all_turns(model):
        turns = 360 * np.arange(N_TURNS) / N_TURNS
        label = truth["true_label"].to_numpy()
        # as many of every digit
        order = np.argsort(pd.Series(label).groupby(label).cumcount().to_numpy(), kind="stable")
        chosen = np.sort(order[:n_turned])
        found = []
        for some in np.array_split(chosen, math.ceil(len(chosen) / 20)):
            turned = placed(
                np.repeat(upright[some], N_TURNS, 0),
                np.tile(turns, len(some)),
                np.zeros((len(some) * N_TURNS, 2)),
            )
            angle = _encoded(model, new.session, turned).angle_deg
            assert angle is not None
            found.append(angle.reshape(len(some), N_TURNS))
        rmse = metrics.rotation_rmse_deg(np.deg2rad(turns), np.deg2rad(np.concatenate(found)))
        per_digit = {int(one): float(rmse[label[chosen] == one].mean()) for one in np.unique(label[chosen])}
        scores |= {f"rotation_rmse_160_deg_{one}": value for one, value in per_digit.items()}
        scores["rotation_rmse_160_deg"] = float(np.mean(list(per_digit.values())))
    mse = metrics.image_mse(_drawn_upright(model, new.session, latents, rows), upright)
    return scores | {"mse_average": float(mse.mean()), "mse_worst": float(mse.max())}


def _knows_all_turns(model: Any) -> bool:
    return not isinstance(model, RotationAE) or model.settings.turn_range_deg == 180


def calibrated(truth: pd.DataFrame, found: Latents, upright: Latents) -> dict[str, float]:
    """Angles and shifts of digits against the truth, less those found for the same digits unturned."""
    assert found.angle_deg is not None and upright.angle_deg is not None
    true_rad = np.deg2rad(truth["true_angle_deg"].to_numpy())
    difference = np.deg2rad(found.angle_deg - upright.angle_deg)
    scores = {
        "rotation_T_calibrated": metrics.fisher_lee_T(true_rad, difference),
        "rotation_rc_calibrated": metrics.circular_correlation(true_rad, difference),
    }
    if found.shift_yx_px is not None and upright.shift_yx_px is not None:
        # where the frame lies in the upright digit turns with the digit
        cos, sin = np.cos(difference), np.sin(difference)
        y, x = upright.shift_yx_px.T
        own = np.column_stack([sin * x + cos * y, cos * x - sin * y])
        for i, axis in enumerate("yx"):
            true_shift = truth[f"true_shift_{axis}_px"].to_numpy()
            away = (found.shift_yx_px - own)[:, i]
            scores[f"shift_r_{axis}_calibrated"] = metrics.pearson(true_shift, away)
    return scores


def _encoded(model: Any, session: Session, images: NDArray[np.float32]) -> Latents:
    *_, (_, latents) = encoding.encode_stack(model, session, read_array(images, "upright"))
    assert latents is not None
    return latents


@torch.no_grad()
def _drawn_upright(
    model: Any, session: Session, latents: Latents, rows: NDArray[np.intp]
) -> NDArray[np.float32]:
    """`(m, n, n)` decoded images of test particles, brought back by their true pose.

    What is decoded is the pose that was found relative to the true one, so that a model's own frame does not
    count. A model without poses is compared with what it draws, and so is one that was taught the true frame.
    """
    truth = session.table.iloc[rows]
    device = next(model.parameters()).device
    z = torch.from_numpy(latents.z[rows]).to(device)
    angle = shift = None
    taught = isinstance(model, RotationAE) and bool(model.supervised)
    if latents.angle_deg is not None and not taught:
        back = np.deg2rad(truth["true_angle_deg"].to_numpy())
        turn = np.deg2rad(latents.angle_deg[rows].astype(np.float64)) - back
        angle = torch.from_numpy(turn).float().to(device)
        if latents.shift_yx_px is not None:
            away = latents.shift_yx_px[rows] - truth[["true_shift_y_px", "true_shift_x_px"]].to_numpy()
            y, x = away[:, 0], away[:, 1]
            cos, sin = np.cos(back), np.sin(back)
            moved = np.column_stack([cos * y - sin * x, cos * x + sin * y])  # R(-back) on (x, y)
            shift = torch.from_numpy(moved).float().to(device)
    parts = []
    for i in range(0, len(rows), 256):
        some = slice(i, i + 256)
        with devices.autocast(model, device, "auto"):
            drawn = model.decode(
                z[some], None if angle is None else angle[some], None if shift is None else shift[some]
            )
        parts.append(drawn[:, 0].float().cpu().numpy())
    return np.concatenate(parts)

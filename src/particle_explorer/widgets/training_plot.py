"""The curve of a training: what its log says, in words and in points that compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer.configs import CLASS_MAP_WARM_UP
from particle_explorer.widgets.painted import Curve

MAX_POINTS = 2000
"""Points of a curve that are painted."""
MANY_EPOCHS = 10
"""From this many on a curve has one point per epoch."""
COUNTERS = {"epoch", "step", "seconds", "images_per_second", "learning_rate"}
"""Columns of a run's log that are no losses."""
LIKELIHOOD_TIP = (
    "How much better the map explains a particle than noise alone does, in natural logarithms. In the first "
    "part of a fit particles are shared out softly among classes; numbers of that part cannot be compared "
    "with later ones and are not drawn."
)
SMOOTH_FROM = 40
"""Curves of so many points are drawn faint, under their running mean."""


@dataclass(frozen=True)
class Drawn:
    """What the plot of a training shows."""

    title: str
    empty: str
    """Said instead while there is no curve"""
    tip: str
    curve: Curve | None = None
    better: str = "higher"
    """Which way is better"""
    terms: tuple[Curve, ...] = ()
    """What the curve is the sum of"""


def with_trend(curve: Curve) -> list[Curve]:
    """A curve of many noisy points with its running mean, which comes first; else as it is."""
    n = len(curve.y)
    if n < SMOOTH_FROM:
        return [curve]
    width = max(3, n // 20) | 1
    filled = np.where(np.isfinite(curve.y), curve.y, 0.0)
    kernel = np.ones(width)
    count = np.convolve(np.isfinite(curve.y).astype(float), kernel, "same")
    smooth = np.convolve(filled, kernel, "same") / np.maximum(count, 1)
    return [Curve(curve.name, curve.x, smooth), Curve("", curve.x, curve.y, faint=True)]


def read_metrics(path: Path) -> pd.DataFrame:
    """The log of a run, thinned to what can be painted; empty before its first line."""
    try:
        metrics = pd.read_csv(path)
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()
    # what an interrupted process wrote beyond the checkpoint that was resumed from is passed over
    least_later = metrics["step"][::-1].cummin()[::-1].shift(-1, fill_value=np.iinfo(np.int64).max)
    metrics = metrics[metrics["step"] < least_later]
    return metrics.iloc[:: max(1, len(metrics) // MAX_POINTS)]


def drawn(metrics: pd.DataFrame, n_epochs: int) -> Drawn:
    """The curve of a run, in words that say what it is, over the epochs whose values compare."""
    if metrics.empty or "epoch" not in metrics:
        return Drawn("", "The curve starts after the first epoch", "")
    at, values = _over_epochs(metrics, n_epochs)
    if "negative_log_likelihood" in metrics:
        warm = CLASS_MAP_WARM_UP * n_epochs
        first, y = at >= warm, -values["negative_log_likelihood"]
        if not first.any():
            return Drawn("", f"Warming up; the curve starts after epoch {int(np.ceil(warm))}", LIKELIHOOD_TIP)
        curve = Curve("log-likelihood", at[first], y[first])
        title = f"Log-likelihood per particle over noise: {_in_short(y[-1])}"
        return Drawn(title, "", LIKELIHOOD_TIP, curve)
    terms = {name: y for name, y in values.items() if name != "loss"}
    loss = values["loss"] if "loss" in values else sum(terms.values(), np.zeros(len(at)))
    tip = ""
    if len(terms) > 1:
        parts = ", ".join(f"{name.replace('_', ' ')} {_in_short(y[-1])}" for name, y in terms.items())
        tip = f"The sum of {parts}."
    curves = tuple(Curve(name.replace("_", " "), at, y) for name, y in terms.items())
    title = f"Loss per particle: {_in_short(loss[-1])}"
    return Drawn(title, "", tip, Curve("loss", at, loss), "lower", curves)


def _over_epochs(metrics: pd.DataFrame, n_epochs: int) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Epochs (parts of one count) and the losses there; of a long run the means of whole epochs, because
    every batch has images of its own."""
    begun = metrics[metrics["epoch"] > 0]
    steps = int((begun["step"] / begun["epoch"]).min()) if len(begun) else 0
    at = metrics["step"].to_numpy(float) / steps if steps else metrics["epoch"].to_numpy(float)
    names = [str(name) for name in metrics if name not in COUNTERS and metrics[name].dtype.kind == "f"]
    table = metrics[names]
    if steps and n_epochs >= MANY_EPOCHS:
        table = table.groupby(np.ceil(at)).mean()
        at = table.index.to_numpy(float)
    return at, {name: table[name].to_numpy(float) for name in names}


def _in_short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def round_limits(values: NDArray[Any]) -> tuple[float, float] | None:
    """Limits of an axis in few digits; None where there is nothing to show."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), 1e-9)
    step = 10.0 ** np.floor(np.log10(span))
    return float(np.floor(low / step) * step), float(np.ceil(high / step) * step)

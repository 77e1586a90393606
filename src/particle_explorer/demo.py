"""The main job from end to end on the sample, scored against its known truth, with a report to look at.

Simulated particles of a hinged molecule are imported, fitted, clustered, averaged, held still and exported by
the same functions that the commands run; only the last step, the comparison with the truth, is particular to
simulated data. Everything made is left in the folder, to be opened and explored further.
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from particle_explorer import __version__, averaging, metrics
from particle_explorer.configs import (
    AverageConfig,
    ClassMapConfig,
    ClusterConfig,
    PreprocessConfig,
    RunConfig,
)
from particle_explorer.files import UserError, replacing, write_text
from particle_explorer.pose import rotation_matrix
from particle_explorer.report import curves, figures, page, scatter
from particle_explorer.session import Run, Session
from particle_explorer.spectra import outside_circle

if TYPE_CHECKING:
    import pandas as pd

N_CLUSTERS = 8
"""Averages along the map."""
SHARE_OF_LIMIT, LEAST_T = 0.95, 0.95
"""What the demo must reach: of the best conformation any method can find, and of the in-plane angle."""
Say = Callable[[str], None]
Picture = NDArray[np.float32]


# ---------------------------------------------------------------------- scores


def score(
    truth: NDArray[Any],
    z: NDArray[Any],
    true_angle_deg: NDArray[Any],
    angle_deg: NDArray[Any] | None,
    true_shift_yx_px: NDArray[Any] | None = None,
    shift_yx_px: NDArray[Any] | None = None,
) -> dict[str, float]:
    """Conformation and pose of `n` particles against their truth.

    Parameters
    ----------
    truth
        `(n,)` true conformation, a scalar.
    z
        `(n, d)` latent coordinates. In one dimension `conformation_abs_r` is |Pearson|; in more, the held-out
        k-nearest-neighbour regression of the truth from `z`.

    Returns
    -------
    `conformation_abs_r`, `rotation_T` (Fisher and Lee), `angle_error_median_deg` after the best constant
    offset, and `shift_rms_px` per axis after the best constant move of the reference.
    """
    z = np.asarray(z, dtype=np.float64).reshape(len(truth), -1)
    if z.shape[1] == 1:
        r = abs(metrics.pearson(z[:, 0], truth))
    else:
        r = metrics.knn_regression_r(z, truth)
    scores = {"conformation_abs_r": float(r)}
    if angle_deg is None:
        return scores
    true_rad, rad = np.deg2rad(true_angle_deg), np.deg2rad(angle_deg)
    scores["rotation_T"] = float(metrics.fisher_lee_T(true_rad, rad))
    scores["angle_error_median_deg"] = float(np.median(metrics.angle_error_deg(true_rad, rad)))
    if true_shift_yx_px is not None and shift_yx_px is not None:
        _, _, residual = frame_offset(true_angle_deg, true_shift_yx_px, angle_deg, shift_yx_px)
        scores["shift_rms_px"] = float(np.sqrt(np.mean(residual**2)))
    return scores


def frame_offset(
    true_angle_deg: ArrayLike, true_shift_yx_px: ArrayLike, angle_deg: ArrayLike, shift_yx_px: ArrayLike
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """How the reference of a model lies to the true one: x_model = R(turn) x_true + move.

    Both place the same particle in the image, so R(angle) move = true shift - shift.

    Returns
    -------
    turn in degrees, move `(2,)` yx px, and what is left of the shifts `(n, 2)` yx px.
    """
    true_angle, angle = np.asarray(true_angle_deg, dtype=np.float64), np.asarray(angle_deg, dtype=np.float64)
    difference = np.asarray(true_shift_yx_px, dtype=np.float64) - np.asarray(shift_yx_px, dtype=np.float64)
    turn = metrics.angle_offset_rad(np.deg2rad(true_angle), np.deg2rad(angle))
    matrix = rotation_matrix(angle)[:, ::-1, ::-1]  # acting on (y, x)
    move = np.median(np.einsum("nji,nj->ni", matrix, difference), axis=0)
    return float(np.rad2deg(turn)), move, difference - np.einsum("nij,j->ni", matrix, move)


# ---------------------------------------------------------------------- the demo


@dataclass(frozen=True)
class Outcome:
    """What the demo came to; the content of `metrics.json`."""

    conformation_abs_r: float
    rotation_T: float
    rotation_T_held_still: float
    limit_abs_r: float
    seconds: float
    more: dict[str, Any]
    """Further figures: angle and shift errors, averages against noise-free pictures, versions."""

    @property
    def checks(self) -> list[tuple[str, float, float, bool]]:
        """(what, reached, needed, passed)"""
        rows = [
            ("conformation |r|", self.conformation_abs_r, SHARE_OF_LIMIT * self.limit_abs_r),
            ("rotation T, a part held still", self.rotation_T_held_still, LEAST_T),
        ]
        return [(what, value, needed, value >= needed) for what, value, needed in rows]

    @property
    def record(self) -> dict[str, Any]:
        checks = [
            {"what": what, "reached": round(value, 4), "needed": round(needed, 4), "passed": passed}
            for what, value, needed, passed in self.checks
        ]
        return {
            "conformation_abs_r": round(self.conformation_abs_r, 4),
            "rotation_T": round(self.rotation_T, 4),
            "rotation_T_held_still": round(self.rotation_T_held_still, 4),
            "limit_abs_r": round(self.limit_abs_r, 4),
            "seconds": round(self.seconds, 1),
            "checks": checks,
            **self.more,
        }


def sample_folder() -> Path:
    """The folder of the sample stack, in a checkout or in an installed package."""
    spec = importlib.util.find_spec("particle_explorer_dist")
    places = list(spec.submodule_search_locations or []) if spec else []
    for place in [*map(Path, places), Path(__file__).parents[2]]:
        if (place / "sample_data" / "particles.star").is_file():
            return place / "sample_data"
    raise UserError("the sample data are not there; install the package again, or get the whole repository")


def has_display() -> bool:
    """Whether a window can be shown."""
    if platform.system() == "Linux":
        return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return True


def demo(out: Path, window: bool = True, *, say: Say = print) -> Outcome:
    """Run the whole chain on the sample into the folder `out`; then open napari on it, if there is a display.

    Writes a copy of the stack, `session/`, `particles-classified.star`, `averages.mrcs`, `metrics.json` and
    `report.html`. What an earlier demo left under these names is replaced, its session kept beside.
    """
    started = time.monotonic()
    out = Path(out).absolute()
    sample = sample_folder()
    truth_file = json.loads((sample / "truth.json").read_text(encoding="utf-8"))

    def tell(text: str) -> None:
        say(f"{time.monotonic() - started:6.1f} s  {text}")

    session, run = _fit(out, sample, tell)
    held = _hold_still(run, tell)
    latents = run.latents()
    assert latents is not None and latents.angle_deg is not None and latents.shift_yx_px is not None
    classes, averages = _average(session, run, held, tell)
    _export(out, session, classes, held, averages, tell)
    good = session.table["true_junk"].to_numpy() == 0
    truth = session.table[good]
    true_shift = truth[["true_shift_y_px", "true_shift_x_px"]].to_numpy()
    conformation, true_angle = truth["true_hinge_deg"].to_numpy(), truth["true_angle_deg"].to_numpy()
    as_fitted = score(
        conformation,
        latents.z[good],
        true_angle,
        latents.angle_deg[good],
        true_shift,
        latents.shift_yx_px[good],
    )
    still = score(conformation, latents.z[good], true_angle, held[good, 0], true_shift, held[good, 1:])
    views = _views(session, run, held, classes, averages)
    outcome = Outcome(
        conformation_abs_r=as_fitted["conformation_abs_r"],
        rotation_T=as_fitted["rotation_T"],
        rotation_T_held_still=still["rotation_T"],
        limit_abs_r=float(truth_file["limit_abs_r"]),
        seconds=time.monotonic() - started,
        more={
            "angle_error_median_deg": round(as_fitted["angle_error_median_deg"], 2),
            "angle_error_median_deg_held_still": round(still["angle_error_median_deg"], 2),
            "shift_rms_px": round(as_fitted["shift_rms_px"], 3),
            "shift_rms_px_held_still": round(still["shift_rms_px"], 3),
            "averages_r_with_noise_free": [round(view.r, 3) for view in views],
            "hinge_deg_of_averages": [round(view.hinge_deg, 1) for view in views],
            "hinge_sd_deg_of_averages": [round(view.hinge_sd_deg, 1) for view in views],
            "n_particles": int(good.sum()),
            "n_junk": int((~good).sum()),
            "version": __version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} logical cores, {platform.system()}",
        },
    )
    write_text(out / "metrics.json", json.dumps(outcome.record, indent=1) + "\n")
    write_text(
        out / "report.html", _report(session, run, latents.table, views, averages, outcome, truth_file)
    )
    for what, value, needed, passed in outcome.checks:
        say(f"{'pass' if passed else 'FAIL'}  {what}: {value:.3f} (needed {needed:.3f})")
    say(
        f"      conformation limit {outcome.limit_abs_r:.3f}, rotation T {outcome.rotation_T:.3f} before "
        f"holding still, median angle error {still['angle_error_median_deg']:.1f}°, {outcome.seconds:.0f} s"
    )
    say(f"report: {out / 'report.html'}")
    if window and has_display():
        from particle_explorer.commands.starting import open_session

        open_session(session.path)
    return outcome


def _fit(out: Path, sample: Path, tell: Say) -> tuple[Session, Run]:
    from particle_explorer.io.reading import read
    from particle_explorer.training import fit

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    for name in ("particles.star", "particles.mrcs"):
        with replacing(out / name) as temporary:
            shutil.copyfile(sample / name, temporary)
    tell(f"importing {out / 'particles.star'}")
    session = Session.create(
        out / "session", read(out / "particles.star"), PreprocessConfig(), overwrite=True
    )
    # one motion is known to be in the sample, so the map is a line; everything else is as it comes
    run = session.new_run(
        RunConfig(model=ClassMapConfig(latent_dim=1), data=session.data_spec(), version=__version__)
    )
    tell(f"{session.n_particles} particles; fitting {run.name}: 1 dimension, all else as it comes")
    what = ""
    for progress in fit(run):
        if progress.what != what:
            what = progress.what
            tell(f"  {what}")
    return session, run


def _hold_still(run: Run, tell: Say) -> NDArray[np.float64]:
    """`(N, 3)` angle (degrees) and shift (px yx) of every row, the most rigid part held still."""
    from particle_explorer.gauge import hold_still

    tell("holding the most rigid part still")
    hold_still(run, auto=True)
    table = run.column("pose-held").reindex(run.session.table.index)
    return table[["angle_deg", "shift_y_px", "shift_x_px"]].to_numpy(np.float64)


def _average(
    session: Session, run: Run, held: NDArray[np.float64], tell: Say
) -> tuple[NDArray[np.int32], list[averaging.ClassAverage]]:
    from particle_explorer.latents import cluster

    latents = run.latents()
    assert latents is not None
    config = ClusterConfig(n_clusters=N_CLUSTERS)
    tell(f"averaging the originals of {N_CLUSTERS} k-means clusters")
    classes = cluster(latents.z, config)
    import pandas as pd

    column = pd.DataFrame({"cluster-kmeans": classes}, index=session.table.index)
    run.write_column("cluster-kmeans", column, config.model_dump())
    averages = averaging.average_classes(session, classes, held[:, 0], held[:, 1:], AverageConfig())
    session.classes.save(
        "demo", averages, [average.label for average in averages], {"run": run.name, "held": True}
    )
    return classes, averages


def _export(
    out: Path,
    session: Session,
    classes: NDArray[np.int32],
    held: NDArray[np.float64],
    averages: list[averaging.ClassAverage],
    tell: Say,
) -> None:
    from particle_explorer.io.writing import export_averages, export_particles

    tell("exporting particles-classified.star and averages.mrcs")
    export_particles(
        out / "particles-classified.star",
        table=session.table,
        source=session.source_path,
        kind=session.info.source_kind,
        class_id=classes,
        angle_deg=held[:, 0],
        shift_yx_px=held[:, 1:],
        overwrite=True,
    )
    images = np.stack([average.image for average in averages])
    export_averages(out / "averages.mrcs", images, averages[0].pixel_size_A, overwrite=True)


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class View:
    """One class beside its truth."""

    average: Picture
    decoded: Picture
    noise_free: Picture
    hinge_deg: float
    """Mean true hinge of the members that are molecules."""
    hinge_sd_deg: float
    r: float
    """Correlation of the average with the noise-free picture inside the circle in the box."""
    z: float


def _views(
    session: Session,
    run: Run,
    held: NDArray[np.float64],
    classes: NDArray[np.int32],
    averages: list[averaging.ClassAverage],
) -> list[View]:
    from particle_explorer.simulate import render

    latents = run.latents()
    assert latents is not None
    z, table = latents.z[:, 0], session.table
    good = table["true_junk"].to_numpy() == 0
    positions = np.array([z[classes == label].mean() for label in np.unique(classes)])
    decoded = _decoded(run, positions)
    views = []
    for k, average in enumerate(averages):
        members = good & (classes == int(average.label))
        hinge = table["true_hinge_deg"].to_numpy()[members]
        true_angle = table["true_angle_deg"].to_numpy()[members]
        true_shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy()[members]
        # the model's frame is its own: the true molecule is drawn where the members' poses put it
        turn, move, _ = frame_offset(true_angle, true_shift, held[members, 0], held[members, 1:])
        n, size = average.image.shape[-1], average.pixel_size_A
        clean = render(
            hinge, np.full(len(hinge), turn), np.broadcast_to(move, (len(hinge), 2)), n, size
        ).mean(0)
        inside = ~outside_circle(n)
        r = float(np.corrcoef(average.image[inside], clean[inside])[0, 1])
        views.append(
            View(
                average.image,
                decoded[k],
                clean,
                float(hinge.mean()),
                float(hinge.std()),
                r,
                float(positions[k]),
            )
        )
    return views


def _decoded(run: Run, z: NDArray[Any]) -> NDArray[np.float32]:
    """The model's own pictures at `z` `(k,)`, the most rigid part held still."""
    import torch

    from particle_explorer.encoding import load_model
    from particle_explorer.gauge import Gauge

    held = run.gauge()
    assert held is not None
    at = z.astype(np.float32)[:, None]
    angle_deg, shift_yx_px = Gauge.from_json(held).pose_to_draw(at)
    angle, shift = (torch.from_numpy(v.astype(np.float32)) for v in (np.deg2rad(angle_deg), shift_yx_px))
    with torch.inference_mode():
        drawn: NDArray[np.float32] = load_model(run).decode(torch.from_numpy(at), angle, shift)[:, 0].numpy()
    return drawn


def _report(
    session: Session,
    run: Run,
    features: pd.DataFrame,
    views: list[View],
    averages: list[averaging.ClassAverage],
    outcome: Outcome,
    truth_file: dict[str, Any],
) -> str:
    table = session.table
    good = table["true_junk"].to_numpy() == 0
    hinge = np.where(good, table["true_hinge_deg"].to_numpy(), np.nan)
    shown = np.where(good, table["true_hinge_deg"].to_numpy(), np.nanmin(hinge) - 4)
    zoom = 2 if averages[0].image.shape[-1] <= 64 else 1
    first = session.images.read(np.arange(20))[:, 0]
    cards = [
        _card("conformation |r|", outcome.conformation_abs_r, outcome.checks[0][2], outcome.checks[0][3]),
        _card("rotation T, held still", outcome.rotation_T_held_still, LEAST_T, outcome.checks[1][3]),
        f'<div class="card"><b>{outcome.limit_abs_r:.3f}</b><span>|r| with the molecule known</span></div>',
        f'<div class="card"><b>{outcome.seconds:.0f} s</b><span>import to this page</span></div>',
    ]
    z_captions = [f"z = {view.z:.2f}" for view in views]
    counts = [f"n = {average.n}" for average in averages]
    truths = [f"{view.hinge_deg:.0f}° ± {view.hinge_sd_deg:.0f}°<br>r = {view.r:.3f}" for view in views]
    n = averages[0].image.shape[-1]
    rings = np.arange(2, n // 2 + 1)
    frequency = rings / (n * averages[0].pixel_size_A)
    lines = [(f"class {a.label}, n = {a.n}", a.frc[rings]) for a in averages[:: max(1, len(averages) // 3)]]
    settings = {
        "preprocessing": session.info.preprocess.model_dump(),
        "run": run.config.model_dump(),
        "clusters": ClusterConfig(n_clusters=N_CLUSTERS).model_dump(),
        "averages": averages[0].settings | {"ctf used": averages[0].ctf},
        "sample": truth_file.get("simulate", {}),
    }
    junk = int((~good).sum())
    how = truth_file.get("how", "posterior mean under the true templates")
    frc_label = averages[0].frc_label[0].upper() + averages[0].frc_label[1:]
    the_map = scatter(features["z_0"], shown, hinge, "place on the map, z", "true hinge angle (°)")
    body = f"""
<h1>Particle Explorer: the demo</h1>
<p>{session.n_particles} simulated images of a molecule with one hinge, in random in-plane orientation,
shifted, through a microscope's CTF and under noise. From the images alone a <b>class map</b> of one dimension
was fitted: every particle got a place on the map, an angle and a shift. Nothing on this page but the scores,
the colours of the map and the row “truth” has seen the truth.</p>
<div class="cards">{"".join(cards)}</div>
<p class="note">|r|: correlation of the place on the map with the true hinge angle. Its yardstick of
{outcome.limit_abs_r:.3f} is a search that knows the noise-free molecule: {html.escape(how)}.
T: Fisher and Lee's correlation of found and true in-plane angle. Both leave out the {junk} images that hold
no molecule; the fit did not know which.</p>
<h2>The images</h2>
<p>Twenty of them as the model saw them: background normalised, phases flipped.</p>
<div class="panel">
{figures(first[:10], [""] * 10, zoom=zoom)}
{figures(first[10:], [""] * 10, zoom=zoom)}
</div>
<h2>The map</h2>
<p>One point per particle: its place on the map, found, against its hinge angle, true. Open circles below hold
no molecule.</p>
<div class="panel">{the_map}</div>
<h2>Along the map</h2>
<p>Eight groups of neighbours on the map (k-means). <b>Decoded</b>: what the model draws there.
<b>Averaged</b>: the original images of the group, turned and shifted by the poses found, the most rigid part
held still, CTF corrected (Wiener). <b>Truth</b>: the mean noise-free molecule of the same particles, with the
mean and spread of its hinge angle and the correlation r with the average.</p>
<div class="panel">
<div class="row"><i>decoded</i>{figures([v.decoded for v in views], z_captions, zoom=zoom)}</div>
<div class="row"><i>averaged</i>{figures([v.average for v in views], counts, zoom=zoom)}</div>
<div class="row"><i>truth</i>{figures([v.noise_free for v in views], truths, zoom=zoom)}</div>
</div>
<h2>Do halves agree?</h2>
<p>{html.escape(frc_label)}. One model aligned both halves, which puts a common bias
into them: this curve says that an average is consistent with itself, not how well it is resolved.</p>
<div class="panel">{curves(frequency, lines, "spatial frequency (1/Å)", "correlation of the halves")}</div>
<h2>Numbers</h2>
{_numbers(outcome)}
<h2>Settings</h2>
<pre>{html.escape(json.dumps(settings, indent=1))}</pre>
<p class="note">napari-particle-explorer {__version__}, {html.escape(outcome.more["machine"])}. To explore on:
<code>particle-explorer open {html.escape(str(session.path))}</code></p>
"""
    return page("Particle Explorer: the demo", body)


def _card(what: str, value: float, needed: float, passed: bool) -> str:
    kind = "pass" if passed else "fail"
    return f'<div class="card {kind}"><b>{value:.3f}</b><span>{what} (needed {needed:.3f})</span></div>'


def _numbers(outcome: Outcome) -> str:
    more = outcome.more
    rows = [
        ("conformation |r|", f"{outcome.conformation_abs_r:.3f}", f"{outcome.conformation_abs_r:.3f}"),
        ("|r| with the molecule known", f"{outcome.limit_abs_r:.3f}", f"{outcome.limit_abs_r:.3f}"),
        ("rotation T", f"{outcome.rotation_T:.3f}", f"{outcome.rotation_T_held_still:.3f}"),
        (
            "angle error, median",
            f"{more['angle_error_median_deg']:.1f}°",
            f"{more['angle_error_median_deg_held_still']:.1f}°",
        ),
        (
            "shift error, rms per axis",
            f"{more['shift_rms_px']:.2f} px",
            f"{more['shift_rms_px_held_still']:.2f} px",
        ),
    ]
    lines = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
    return f"<table><tr><th></th><th>as fitted</th><th>part held still</th></tr>{lines}</table>"

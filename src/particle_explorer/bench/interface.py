"""How fast the window follows the hand: real mouse events in a real window, under a screen or a virtual one.

Sessions are made for it. In the small one a class map of 64 px is trained by a worker and dragged through
while another one trains; then models of 128 px are dragged through. The large one has a million particles
with 8 latent dimensions, whose images are empty, because only their number matters here; in a smaller one of
its kind the window's own jobs run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from particle_explorer import jobs
from particle_explorer.bench.window_clocks import (
    HEARTBEAT_MS,
    WARM_UP_S,
    Counter,
    Heartbeat,
    Lap,
    arrivals,
    spin,
    spin_until,
    until_painted,
)
from particle_explorer.bench.window_hand import (
    blob,
    circle,
    every,
    handle_spot,
    move,
    press,
    pressed,
    release,
    round_trip,
    timed_moves,
)
from particle_explorer.bench.window_sessions import (
    large_session,
    model_session,
    small_session,
    training_words,
)
from particle_explorer.files import UserError, write_text

if TYPE_CHECKING:
    from particle_explorer.session import Session
    from particle_explorer.widgets.workspace import Workspace

WINDOW = (1366, 768)
EVENTS_HZ = 125
FAST_HZ = 200
"""As fast as mice report moves"""
Say = Callable[[str], None]
Part = Literal["all", "hand", "models", "jobs", "large"]
"""The handle and its process; other models; jobs of the window; many particles"""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    n_small: int = 400
    box_px: int = 64
    nodes_per_dim: int = 0
    sizes: tuple[int, ...] = (100_000, 1_000_000)
    n_bare: int = 5_000_000
    """points panned in a scatter by itself"""
    n_moves: int = 120
    seconds: float = 20.0
    models: tuple[str, ...] = ("class-map", "codae", "vae")
    """kinds that are dragged through in a larger box"""
    model_box_px: int = 128
    n_model: int = 60


QUICK = Plan(
    n_small=60,
    box_px=32,
    nodes_per_dim=4,
    sizes=(2000,),
    n_bare=5000,
    n_moves=12,
    seconds=2.0,
    models=("vae",),
    model_box_px=32,
    n_model=24,
)
"""Enough to see that everything is measured."""


@dataclass(frozen=True)
class Result:
    """One line of the table; `values` in `unit`."""

    what: str
    unit: str
    median: float
    p95: float
    worst: float
    n: int
    cpu: float = float("nan")
    """median of the processor time of the window's thread; the same on a busy machine"""
    note: str = ""

    @classmethod
    def of(
        cls, what: str, values: list[float], unit: str = "ms", cpu: list[float] | None = None, note: str = ""
    ) -> Result:
        nan = float("nan")
        own = float(np.median(cpu)) if cpu else nan
        if not values:
            return cls(what, unit, nan, nan, nan, 0, own, note)
        median, p95 = np.percentile(values, (50, 95))
        return cls(what, unit, float(median), float(p95), float(max(values)), len(values), own, note)

    @classmethod
    def timed(cls, what: str, laps: list[Lap], note: str = "") -> Result:
        return cls.of(what, [lap.wall_ms for lap in laps], cpu=[lap.cpu_ms for lap in laps], note=note)


def run(
    json_file: Path | None = None, say: Say = print, plan: Plan | None = None, part: Part = "all"
) -> dict[str, Any]:
    """Measure everything, or one part; prints a markdown table and writes JSON."""
    plan = plan or Plan()
    if (
        sys.platform.startswith("linux")
        and not os.environ.get("DISPLAY")
        and not os.environ.get("WAYLAND_DISPLAY")
    ):
        raise UserError(
            "there is no screen to open a window on; run `xvfb-run -a particle-explorer bench interface`"
        )
    with tempfile.TemporaryDirectory(prefix="particle-explorer-bench-", ignore_cleanup_errors=True) as folder:
        say(f"training a class map of {plan.n_small} particles, {plan.box_px} px …")
        session = small_session(Path(folder) / "small", plan.n_small, plan.box_px, plan.nodes_per_dim)
        models = {}
        for kind in plan.models if part in ("all", "models") else ():
            say(f"training {kind}, {plan.model_box_px} px …")
            models[kind] = model_session(Path(folder) / kind, kind, plan.n_model, plan.model_box_px)
        results, opened = _in_a_window(Path(folder), session, models, plan, say, part)
    machine = _machine()
    report = {"machine": machine, "window": opened, "results": [asdict(result) for result in results]}
    say("\n" + table(results))
    say("\n" + ", ".join(f"{name}: {value}" for name, value in {**machine, **opened}.items()))
    if json_file is not None:
        write_text(json_file, json.dumps(report, indent=1) + "\n")
        say(f"\nwritten to {json_file}")
    return report


def table(results: list[Result]) -> str:
    """Markdown, one line per measurement."""
    heads = ("what", "unit", "median", "p95", "longest", "n", "own CPU", "")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in results:
        numbers = [f"{value:.1f}" for value in (r.median, r.p95, r.worst)]
        own = "" if np.isnan(r.cpu) else f"{r.cpu:.1f}"
        lines.append("| " + " | ".join([r.what, r.unit, *numbers, str(r.n), own, r.note]) + " |")
    return "\n".join(lines)


def _machine() -> dict[str, Any]:
    # not before the window was measured: this imports torch, which a window never does
    from particle_explorer.bench.machine import describe

    return describe()


# ---------------------------------------------------------------------- sessions to look at


# ---------------------------------------------------------------------- the window


def _in_a_window(
    folder: Path, small: Session, models: dict[str, Session], plan: Plan, say: Say, part: Part
) -> tuple[list[Result], dict[str, str]]:
    import napari
    from qtpy import API_NAME

    from particle_explorer.widgets.workspace import open_workspace, spare_collector

    began = time.perf_counter()
    viewer = napari.Viewer(show=True)
    viewer.window.resize(*WINDOW)
    spin(500)
    own_MiB = _memory_MiB()
    results = [Result.of("napari opens", [1e3 * (time.perf_counter() - began) - 500])]
    began = time.perf_counter()
    workspace = open_workspace(viewer, small.path)
    if plan != QUICK:  # tests share their process
        spare_collector()  # as the command `open` does
    spin_until(
        lambda: workspace.reconstruction.layer is not None and workspace.latent.canvas.n_points > 0, 60
    )
    results.append(
        Result.of("workspace opens, first reconstruction shown", [1e3 * (time.perf_counter() - began)])
    )
    spin(1000)
    if part in ("all", "hand"):
        say("dragging …")
        results += _dragging(workspace, plan, f"{plan.box_px} px")
        say("hovering …")
        results.append(_hovering(workspace, small, plan))
        say("dragging while another run trains …")
        results += _while_training(workspace, small, plan)
    for kind, session in models.items():
        say(f"dragging through {kind}, {plan.model_box_px} px …")
        _open(workspace, session)
        results += _dragging(workspace, plan, f"{kind}, {plan.model_box_px} px")
    for n in plan.sizes if part != "models" and part != "hand" else ():
        say(f"{n:,} particles …")
        large = large_session(folder / f"large-{n}", small, n)
        if part in ("all", "large"):
            results += _large(workspace, large, plan)
            results.append(
                Result.of(f"{n:,} × 8: memory above napari's own", [_memory_MiB() - own_MiB], "MiB")
            )
        if n == plan.sizes[0] and part in ("all", "jobs"):
            results += _while_jobs_run(workspace, large, plan, say)
        shutil.rmtree(large.path, ignore_errors=True)
    if plan.n_bare and part in ("all", "large"):
        say(f"{plan.n_bare:,} points …")
        results.append(_bare_pan(plan))
    workspace.shutdown()
    opened = {"qt": API_NAME, "screen": f"{WINDOW[0]} × {WINDOW[1]}", "opengl": _opengl()}
    viewer.close()
    spin(200)
    return results, opened


def _open(workspace: Workspace, session: Session) -> None:
    """Show another session, and wait for its first picture."""
    state = workspace.state
    workspace.open(session.path)
    ready = lambda: state.session is not None and state.session.path == session.path  # noqa: E731
    if not spin_until(ready, 60):
        raise RuntimeError(f"{session.path} did not open")
    box = session.images.shape[-1]

    def drawn() -> bool:
        image = workspace.reconstruction.image
        return image is not None and image.shape[0] == box and workspace.latent.canvas.n_points > 0

    if not spin_until(drawn, 90):
        raise RuntimeError(f"no picture of {session.path}")
    spin(1000)


def _while_jobs_run(workspace: Workspace, large: Session, plan: Plan, say: Say) -> list[Result]:
    """Gaps of the event loop while the window's own jobs lay out, group and export many particles."""
    _show(workspace, large)
    results, groups, state = [], workspace.explore.groups, workspace.state
    assert state.run is not None
    worker = workspace.explore.worker
    table = large.path / "exported.csv"

    def export() -> None:
        worker.start(
            "export",
            lambda run, folder: [str(run.session.path), "--out", str(table), "--overwrite"],
            "Writing",
            lambda _: None,
        )

    n = len(state.features)
    for what, does in (("embedding", groups.embed), ("clustering", groups.cluster), ("exporting", export)):
        say(f"{what} {n:,} particles …")
        n_ended = -1
        with Heartbeat() as beat:
            until = time.perf_counter() + WARM_UP_S + plan.seconds
            while time.perf_counter() < until:
                if not worker.busy:  # begun, or begun again: the load is there all the time
                    n_ended += 1
                    does()
                spin(200)
            if worker.bar.folder is not None:
                jobs.request_stop(worker.bar.folder)
            spin_until(lambda: not worker.busy, 30)
            spin(1000)  # what it wrote is read and shown
        result = _stalls(f"event loop while {what} {n:,} particles", beat)
        results.append(dataclasses.replace(result, note=f"{result.note}; {n_ended} done meanwhile"))
    return results


def _dragging(workspace: Workspace, plan: Plan, of: str) -> list[Result]:
    canvas, shown = workspace.latent.canvas, Counter()
    workspace.reconstruction.shown.connect(shown)
    moves = arrivals(canvas)
    spots = round_trip(canvas, plan.n_moves)
    took: list[float] = []
    with pressed(canvas, handle_spot(canvas)):
        for spot in spots:
            spin(25)
            shown.times.clear()
            moves.times.clear()
            move(canvas, spot)
            if spin_until(lambda: shown.n > 0, 2) and moves.n:
                took.append(1e3 * (shown.last - moves.times[0]))
    results = [Result.of(f"drag: mouse move to new picture, {of}", took, note="layer refreshed")]
    for hz in (EVENTS_HZ, FAST_HZ):
        shown.times.clear()
        last = [0.0]
        with pressed(canvas, handle_spot(canvas)):
            for spot in every(1000 / hz, spots + spots[::-1]):
                move(canvas, spot)
                last[0] = time.perf_counter()
            n_moves = 2 * len(spots)
            spin(300)
        gaps = [1e3 * (b - a) for a, b in zip(shown.times, shown.times[1:], strict=False)]
        after = max(0.0, 1e3 * (shown.times[-1] - last[0])) if shown.times else float("nan")
        note = f"{len(shown.times)} pictures for {n_moves} moves, last one {after:.0f} ms after the last move"
        results.append(Result.of(f"drag at {hz} moves/s, {of}: between pictures", gaps, note=note))
    workspace.reconstruction.shown.disconnect(shown)
    moves.stop()
    return results


def _hovering(workspace: Workspace, session: Session, plan: Plan) -> Result:
    """From the mouse on a particle to its thumbnail, the file out of the page cache each time."""
    canvas, state = workspace.latent.canvas, workspace.state
    arrived: list[float] = []
    put = canvas.set_thumbnail

    def noted(row: int, picture: Any) -> None:
        put(row, picture)
        arrived.append(time.perf_counter())

    canvas.set_thumbnail = noted  # type: ignore[method-assign]
    took: list[float] = []
    rows = np.random.default_rng(0).permutation(state.selection.mask.size)[: plan.n_moves]
    for row in rows:
        _forget_file(session.path / "images.npy")
        arrived.clear()
        began = time.perf_counter()
        canvas.hovered.emit(int(row))
        if spin_until(lambda: bool(arrived), 2):
            took.append(1e3 * (arrived[0] - began))
        spin(10)
    del canvas.set_thumbnail
    return Result.of("hover: thumbnail from a cold file", took)


def _forget_file(path: Path) -> None:
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _bare_pan(plan: Plan) -> Result:
    """More points than there is a session for here: a scatter by itself, as large as in the window."""
    from particle_explorer.state import Selection
    from particle_explorer.widgets.latent_plot import ScatterCanvas
    from particle_explorer.widgets.splat import Points

    rng, n = np.random.default_rng(0), plan.n_bare
    canvas = ScatterCanvas(Selection(n))
    canvas.resize(360, 270)
    canvas.show()
    canvas.set_points(Points.of(rng.normal(size=n), rng.normal(size=n)))
    spin(500)
    plot = canvas.plot_rect().center().toPoint()
    with pressed(canvas, plot, middle=True):
        pans = timed_moves(canvas, circle(plot, 25, max(10, plan.n_moves // 3)))
    canvas.close()
    note = f"{_fps(pans)} frames/s; a sample of the points while the hand moves"
    return Result.timed(f"{n:,}: pan, mouse move to painted", pans, note)


def _while_training(workspace: Workspace, small: Session, plan: Plan) -> list[Result]:
    canvas = workspace.latent.canvas
    results = []
    with Heartbeat() as quiet:
        spin(1000 * (WARM_UP_S + plan.seconds / 4))
    results.append(_stalls("event loop at rest", quiet))
    workspace.latent.live_button.setChecked(
        False
    )  # the finished map stays, so that it can be dragged through
    folder = jobs.start(training_words(small, plan.nodes_per_dim), small.new_job("train"))
    spin(1000 * WARM_UP_S)
    with Heartbeat() as busy:
        spots, until = round_trip(canvas, 100), time.perf_counter() + WARM_UP_S + plan.seconds
        while time.perf_counter() < until and not jobs.read_status(folder).is_over:
            with pressed(canvas, handle_spot(canvas)):
                for spot in every(1000 / EVENTS_HZ, spots):
                    move(canvas, spot)
            spin(300)
    results.append(_stalls("event loop while a run trains and the handle is dragged", busy))
    workspace.latent.live_button.setChecked(True)
    with Heartbeat() as live:
        spin(1000 * (WARM_UP_S + plan.seconds / 2))
    results.append(_stalls("event loop while a run trains, live map", live))
    jobs.request_stop(folder)
    for run in small.runs():
        if run.state == "running":
            jobs.request_stop(run.path)
    spin_until(lambda: jobs.read_status(folder).is_over, 60)
    return results


def _stalls(what: str, beat: Heartbeat) -> Result:
    gaps, own = beat.gaps_ms()
    if not gaps:
        return Result.of(what, [])
    tail, own_tail = (float(np.percentile(values, 99.9)) for values in (gaps, own))
    note = (
        f"p99.9 {tail:.1f} ms; own CPU p99.9 {own_tail:.1f}, longest {max(own):.1f}; due every {HEARTBEAT_MS}"
    )
    return Result.of(what, gaps, cpu=own, note=note)


def _show(workspace: Workspace, session: Session) -> float:
    """Show a session that is read here; seconds until its map was painted."""
    from particle_explorer.state import Opened, read

    opened: list[Opened] = []
    began = time.perf_counter()
    workspace.tasks.run("bench", lambda: read(session), opened.append)
    spin_until(lambda: bool(opened), 120)
    if workspace.state.session is None or workspace.state.session.path != session.path:
        workspace.state.show(opened[0])
    spin_until(lambda: workspace.latent.canvas.n_points == session.n_particles, 60)
    return time.perf_counter() - began


def _large(workspace: Workspace, session: Session, plan: Plan) -> list[Result]:
    n, state, dock = session.n_particles, workspace.state, workspace.latent
    canvas = dock.canvas
    took = _show(workspace, session)
    results = [Result.of(f"{n:,}: open, read, first picture of the map", [1e3 * took])]
    spin(1000)
    plot = canvas.plot_rect().center().toPoint()

    with pressed(canvas, plot, middle=True):
        pans = timed_moves(canvas, circle(plot, 25, max(10, plan.n_moves // 3)))
    canvas.fit()
    canvas.repaint()
    mode = "density" if canvas.picture.shows_density else "points"
    results.append(Result.timed(f"{n:,}: pan, mouse move to painted", pans, f"{mode}, {_fps(pans)} frames/s"))

    recolours: list[Lap] = []
    columns = dock._columns
    for key in 2 * ("angle_deg", "cluster-kmeans", "log_likelihood"):
        recolours.append(
            until_painted(canvas, lambda key=key: canvas.set_colouring(columns.colouring(key)))  # type: ignore[misc]
        )
    results.append(Result.timed(f"{n:,}: colour by another column, painted", recolours))

    outline = blob(canvas)
    polygon = [(float(spot.x()), float(spot.y())) for spot in outline]
    masks: list[Lap] = []
    for _ in range(7):
        with Lap() as lap:
            inside = canvas.inside(polygon)
        masks.append(lap)
    note = f"{len(outline)} corners, {int(inside.sum()):,} particles inside"
    results.append(Result.timed(f"{n:,}: lasso, mask", masks, note))
    canvas.set_tool("lasso")
    releases: list[Lap] = []
    for _ in range(5):
        state.selection.clear()
        spin(200)
        press(canvas, outline[0])
        timed_moves(canvas, outline[1:])
        with Lap() as lap:
            until_painted(canvas, lambda: release(canvas, outline[-1]))
            spin_until(lambda: len(workspace.selected.layer.data) == state.selection.count, 5)
        releases.append(lap)
    note = "scatter painted, layer set"
    results.append(Result.timed(f"{n:,}: lasso, release to all views updated", releases, note))
    some = np.zeros(n, bool)
    some[np.random.default_rng(1).permutation(n)[: min(n // 2, 100_000)]] = True
    shown: list[Lap] = []
    for _ in range(5):
        state.selection.clear()
        spin(300)
        with Lap() as lap:
            state.selection.set(some)
            spin_until(lambda: len(workspace.selected.layer.data) == int(some.sum()), 5)
        shown.append(lap)
    results.append(Result.timed(f"{n:,}: a selection of {int(some.sum()):,} shown in the layer", shown))
    spot = handle_spot(canvas)
    with pressed(canvas, spot):
        drags = timed_moves(canvas, circle(spot, 30, max(10, plan.n_moves // 3)))
    results.append(Result.timed(f"{n:,}: handle, mouse move to painted", drags))
    state.selection.clear()
    return results


def _fps(laps: list[Lap]) -> str:
    return f"{1e3 / float(np.median([lap.wall_ms for lap in laps])):.0f}" if laps else "?"


def _memory_MiB() -> float:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        if sys.platform == "win32":
            return float("nan")
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _opengl() -> str:
    from vispy.gloo import gl  # type: ignore[import-untyped,unused-ignore]

    return str(gl.glGetParameter(gl.GL_RENDERER))

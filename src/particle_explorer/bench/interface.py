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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from particle_explorer import jobs
from particle_explorer.configs import ClassMapConfig, PreprocessConfig, RunConfig, SimulateConfig, TrainConfig
from particle_explorer.files import UserError, write_text
from particle_explorer.latents import Latents

if TYPE_CHECKING:
    from qtpy.QtCore import QPoint

    from particle_explorer.session import Session
    from particle_explorer.widgets.latent_plot import ScatterCanvas
    from particle_explorer.widgets.workspace import Workspace

WINDOW = (1366, 768)
EVENTS_HZ = 125
FAST_HZ = 200
"""As fast as mice report moves"""
HEARTBEAT_MS = 10
WARM_UP_S = 2.0
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


class Lap:
    """Wall time and processor time of this thread in a `with` block."""

    def __enter__(self) -> Lap:
        self._wall, self._cpu = time.perf_counter(), time.thread_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_ms = 1e3 * (time.perf_counter() - self._wall)
        self.cpu_ms = 1e3 * (time.thread_time() - self._cpu)


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
        session = _small_session(Path(folder) / "small", plan)
        models = {}
        for kind in plan.models if part in ("all", "models") else ():
            say(f"training {kind}, {plan.model_box_px} px …")
            models[kind] = _model_session(Path(folder) / kind, kind, plan)
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


def _small_session(path: Path, plan: Plan) -> Session:
    session = _simulated(path, plan.n_small, plan.box_px)
    _fitted(session, _train(session, plan))
    return session


def _model_session(path: Path, kind: str, plan: Plan) -> Session:
    """A few particles with a run of one kind; how well it learned does not change how long it draws."""
    session = _simulated(path, plan.n_model, plan.model_box_px)
    few = ["--model.nodes-per-dim", "4"] if kind == "class-map" else []
    few += ["--train.n-epochs", "1", "--device", "cpu"]
    _fitted(session, ["train", str(session.path), "--model.kind", kind, *few])
    return session


def _simulated(path: Path, n: int, box_px: int) -> Session:
    from particle_explorer.io.reading import read
    from particle_explorer.session import Session
    from particle_explorer.simulate import write

    config = SimulateConfig(n=n, box_px=box_px, pixel_size_A=256 / box_px, snr=0.3, seed=1)
    write(path / "stack", config)
    particles = read(next((path / "stack").glob("*.star")))
    return Session.create(path / "session", particles, PreprocessConfig(box_px=box_px))


def _fitted(session: Session, arguments: list[str]) -> None:
    folder = jobs.start(arguments, session.new_job("train"))
    while not (status := jobs.read_status(folder)).is_over:
        time.sleep(0.2)
    if status.state != "finished":
        raise RuntimeError(f"training ended as {status.state}: {status.error}\n{jobs.read_log(folder)}")


def _train(session: Session, plan: Plan) -> list[str]:
    return [
        *("train", str(session.path), "--model.kind", "class-map", "--model.latent-dim", "2"),
        *("--model.nodes-per-dim", str(plan.nodes_per_dim), "--train.n-epochs", "1", "--device", "cpu"),
    ]


def _large_session(path: Path, small: Session, n: int, n_dims: int = 8) -> Session:
    """A session of `n` particles with latents: a table made longer, and an image cache that is a hole."""
    from particle_explorer.session import Session, SessionInfo

    path.mkdir(parents=True)
    rng = np.random.default_rng(0)
    table = small.table.iloc[np.arange(n) % small.n_particles].copy()
    table.index = pd.Index(rng.permutation(n).astype(np.uint64), name="uid")
    table["defocus_u_A"] = rng.uniform(8000, 25_000, n)
    table.to_parquet(path / "particles.parquet")
    info = SessionInfo(**{**small.info.model_dump(), "n": n})
    write_text(path / "session.json", info.model_dump_json())
    session = Session.open(path)
    shape = (n, *small.images.shape[1:])
    with (path / "images.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * int(np.prod(shape)))
    write_text(path / "images.json", json.dumps({"key": session.cache_key}))
    run = session.new_run(RunConfig(model=ClassMapConfig(), train=TrainConfig(), data=session.data_spec()))
    centres = rng.normal(size=(6, n_dims)) * 2
    z = (centres[rng.integers(0, 6, n)] + rng.normal(size=(n, n_dims))).astype(np.float32)
    run.save_latents(
        Latents(
            session.uid,
            z,
            angle_deg=rng.uniform(-180, 180, n).astype(np.float32),
            shift_yx_px=rng.normal(size=(n, 2)).astype(np.float32),
            extras={"log_likelihood": rng.normal(size=n).astype(np.float32)},
        )
    )
    clusters = pd.DataFrame({"cluster-kmeans": rng.integers(1, 11, n).astype(np.int32)}, index=table.index)
    run.write_column("cluster-kmeans", clusters, {})
    return session


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
        large = _large_session(folder / f"large-{n}", small, n)
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
        with _Heartbeat() as beat:
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
    canvas, shown = workspace.latent.canvas, _Counter()
    workspace.reconstruction.shown.connect(shown)
    arrivals = _arrivals(canvas)
    spots = _round_trip(canvas, plan.n_moves)
    took: list[float] = []
    with _pressed(canvas, _handle_spot(canvas)):
        for spot in spots:
            spin(25)
            shown.times.clear()
            arrivals.times.clear()
            _move(canvas, spot)
            if spin_until(lambda: shown.n > 0, 2) and arrivals.n:
                took.append(1e3 * (shown.last - arrivals.times[0]))
    results = [Result.of(f"drag: mouse move to new picture, {of}", took, note="layer refreshed")]
    for hz in (EVENTS_HZ, FAST_HZ):
        shown.times.clear()
        last = [0.0]
        with _pressed(canvas, _handle_spot(canvas)):
            for spot in _every(1000 / hz, spots + spots[::-1]):
                _move(canvas, spot)
                last[0] = time.perf_counter()
            n_moves = 2 * len(spots)
            spin(300)
        gaps = [1e3 * (b - a) for a, b in zip(shown.times, shown.times[1:], strict=False)]
        after = max(0.0, 1e3 * (shown.times[-1] - last[0])) if shown.times else float("nan")
        note = f"{len(shown.times)} pictures for {n_moves} moves, last one {after:.0f} ms after the last move"
        results.append(Result.of(f"drag at {hz} moves/s, {of}: between pictures", gaps, note=note))
    workspace.reconstruction.shown.disconnect(shown)
    arrivals.stop()
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
    with _pressed(canvas, plot, middle=True):
        pans = _timed_moves(canvas, _circle(plot, 25, max(10, plan.n_moves // 3)))
    canvas.close()
    note = f"{_fps(pans)} frames/s; a sample of the points while the hand moves"
    return Result.timed(f"{n:,}: pan, mouse move to painted", pans, note)


def _while_training(workspace: Workspace, small: Session, plan: Plan) -> list[Result]:
    canvas = workspace.latent.canvas
    results = []
    with _Heartbeat() as quiet:
        spin(1000 * (WARM_UP_S + plan.seconds / 4))
    results.append(_stalls("event loop at rest", quiet))
    workspace.latent.live_button.setChecked(
        False
    )  # the finished map stays, so that it can be dragged through
    folder = jobs.start(_train(small, plan), small.new_job("train"))
    spin(1000 * WARM_UP_S)
    with _Heartbeat() as busy:
        spots, until = _round_trip(canvas, 100), time.perf_counter() + WARM_UP_S + plan.seconds
        while time.perf_counter() < until and not jobs.read_status(folder).is_over:
            with _pressed(canvas, _handle_spot(canvas)):
                for spot in _every(1000 / EVENTS_HZ, spots):
                    _move(canvas, spot)
            spin(300)
    results.append(_stalls("event loop while a run trains and the handle is dragged", busy))
    workspace.latent.live_button.setChecked(True)
    with _Heartbeat() as live:
        spin(1000 * (WARM_UP_S + plan.seconds / 2))
    results.append(_stalls("event loop while a run trains, live map", live))
    jobs.request_stop(folder)
    for run in small.runs():
        if run.state == "running":
            jobs.request_stop(run.path)
    spin_until(lambda: jobs.read_status(folder).is_over, 60)
    return results


def _stalls(what: str, beat: _Heartbeat) -> Result:
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

    with _pressed(canvas, plot, middle=True):
        pans = _timed_moves(canvas, _circle(plot, 25, max(10, plan.n_moves // 3)))
    canvas.fit()
    canvas.repaint()
    mode = "density" if canvas.picture.shows_density else "points"
    results.append(Result.timed(f"{n:,}: pan, mouse move to painted", pans, f"{mode}, {_fps(pans)} frames/s"))

    recolours: list[Lap] = []
    columns = dock._columns
    for key in 2 * ("angle_deg", "cluster-kmeans", "log_likelihood"):
        recolours.append(
            _until_painted(canvas, lambda key=key: canvas.set_colouring(columns.colouring(key)))  # type: ignore[misc]
        )
    results.append(Result.timed(f"{n:,}: colour by another column, painted", recolours))

    outline = _blob(canvas)
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
        _press(canvas, outline[0])
        _timed_moves(canvas, outline[1:])
        with Lap() as lap:
            _until_painted(canvas, lambda: _release(canvas, outline[-1]))
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
    spot = _handle_spot(canvas)
    with _pressed(canvas, spot):
        drags = _timed_moves(canvas, _circle(spot, 30, max(10, plan.n_moves // 3)))
    results.append(Result.timed(f"{n:,}: handle, mouse move to painted", drags))
    state.selection.clear()
    return results


def _fps(laps: list[Lap]) -> str:
    return f"{1e3 / float(np.median([lap.wall_ms for lap in laps])):.0f}" if laps else "?"


# ---------------------------------------------------------------------- hands and clocks


class _Counter:
    """Counts a signal and remembers when it came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @property
    def n(self) -> int:
        return len(self.times)

    @property
    def last(self) -> float:
        return self.times[-1]

    def __call__(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def _arrivals(canvas: ScatterCanvas) -> Any:
    """Remembers when mouse moves reach the canvas: under X they take their own way."""
    from qtpy.QtCore import QEvent, QObject

    class Arrivals(QObject):
        def __init__(self) -> None:
            super().__init__(canvas)
            self.times: list[float] = []
            canvas.installEventFilter(self)

        @property
        def n(self) -> int:
            return len(self.times)

        def stop(self) -> None:
            canvas.removeEventFilter(self)

        def eventFilter(self, _: QObject | None, event: QEvent | None) -> bool:
            if event is not None and event.type() == QEvent.Type.MouseMove:
                self.times.append(time.perf_counter())
            return False

    return Arrivals()


def _watch(canvas: ScatterCanvas) -> Any:
    """Counts the paintings of the canvas that are done, with the processor time of each."""
    from qtpy.QtCore import QEvent, QObject

    class Watch(QObject):
        def __init__(self) -> None:
            super().__init__(canvas)
            self.n = 0
            self.cpu_ms = 0.0
            canvas.installEventFilter(self)

        def stop(self) -> None:
            canvas.removeEventFilter(self)
            self.deleteLater()

        def eventFilter(self, _: QObject | None, event: QEvent | None) -> bool:
            if event is None or event.type() != QEvent.Type.Paint:
                return False
            with Lap() as lap:
                canvas.event(event)
            self.n += 1
            self.cpu_ms += lap.cpu_ms
            return True

    return Watch()


def _until_painted(canvas: ScatterCanvas, act: Callable[[], object]) -> Lap:
    """Do something and wait until the canvas has painted what came of it.

    The window composes one frame at a time, with napari's OpenGL canvas in it, and paints when that is done,
    so the wall time holds such a frame; the processor time is that of the canvas alone.
    """
    watch = _watch(canvas)
    whole = Lap()
    with whole:
        with Lap() as acting:
            act()
        during = watch.cpu_ms
        spin_until(lambda: watch.n > 0 and canvas.is_painted, 2)
    watch.stop()
    whole.cpu_ms = max(acting.cpu_ms - during, 0.0) + watch.cpu_ms
    return whole


def _timed_moves(canvas: ScatterCanvas, spots: list[QPoint]) -> list[Lap]:
    """Move the mouse from spot to spot and time each until it is painted."""
    return [_until_painted(canvas, lambda spot=spot: _move(canvas, spot)) for spot in spots]  # type: ignore[misc]


class _Heartbeat:
    """A timer of the event loop; the time between its beats is how long the window was deaf."""

    def __enter__(self) -> _Heartbeat:
        from qtpy.QtCore import Qt, QTimer

        self._beats: list[tuple[float, float]] = []
        self._timer = QTimer()
        self._timer.setTimerType(Qt.TimerType.PreciseTimer)
        self._timer.setInterval(HEARTBEAT_MS)
        self._timer.timeout.connect(lambda: self._beats.append((time.perf_counter(), time.thread_time())))
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.stop()

    def gaps_ms(self) -> tuple[list[float], list[float]]:
        """Between beats after the warm-up: time that passed, and time that this thread itself worked."""
        beats = np.array(self._beats).reshape(-1, 2)
        if beats.size:
            beats = beats[beats[:, 0] > beats[0, 0] + WARM_UP_S]
        gaps = 1e3 * np.diff(beats, axis=0)
        return gaps[:, 0].tolist(), gaps[:, 1].tolist()


def spin(ms: float) -> None:
    """Let the event loop run; `QTest.qWait` would sleep in it."""
    from qtpy.QtCore import QEventLoop, QTimer

    loop = QEventLoop()
    QTimer.singleShot(round(ms), loop.quit)
    loop.exec()


def spin_until(done: Callable[[], bool], timeout_s: float) -> bool:
    """Let the event loop run until something is so; whether it came in time."""
    from qtpy.QtWidgets import QApplication

    until = time.perf_counter() + timeout_s
    while not done():
        if time.perf_counter() > until:
            return False
        QApplication.processEvents()
        time.sleep(0.0002)  # a worker thread needs the interpreter to deliver
    return True


def _every(ms: float, spots: list[QPoint]) -> Iterator[QPoint]:
    """Spots at a steady rate; those that the window was too busy for come at once, as from a real mouse."""
    from qtpy.QtWidgets import QApplication

    began = time.perf_counter()
    for i, spot in enumerate(spots):
        due = began + i * ms / 1e3
        while time.perf_counter() < due:
            QApplication.processEvents()
            time.sleep(0.0002)
        yield spot


def _press(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> None:
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    button = Qt.MouseButton.MiddleButton if middle else Qt.MouseButton.LeftButton
    QTest.mousePress(canvas, button, Qt.KeyboardModifier.NoModifier, spot)


def _move(canvas: ScatterCanvas, spot: QPoint) -> None:
    from qtpy.QtTest import QTest

    QTest.mouseMove(canvas, spot)


def _release(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> None:
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    button = Qt.MouseButton.MiddleButton if middle else Qt.MouseButton.LeftButton
    QTest.mouseRelease(canvas, button, Qt.KeyboardModifier.NoModifier, spot)


@contextmanager
def _pressed(canvas: ScatterCanvas, spot: QPoint, *, middle: bool = False) -> Iterator[None]:
    _press(canvas, spot, middle=middle)
    try:
        yield
    finally:
        _release(canvas, spot, middle=middle)


def _handle_spot(canvas: ScatterCanvas) -> QPoint:
    at = canvas.handle_position()
    if at is None:
        raise RuntimeError("the map has no handle")
    return at.toPoint()


def _round_trip(canvas: ScatterCanvas, n: int) -> list[QPoint]:
    """A path across most of the map, a few pixels per step, no two spots in a row the same."""
    from qtpy.QtCore import QPoint

    plot = canvas.plot_rect()
    turn = 2 * np.pi * np.arange(n) / max(n, 30)
    x = plot.center().x() + 0.33 * plot.width() * np.cos(turn)
    y = plot.center().y() + 0.33 * plot.height() * np.sin(2 * turn)
    spots = [QPoint(round(a), round(b)) for a, b in zip(x, y, strict=True)]
    return [spot for i, spot in enumerate(spots) if i == 0 or spot != spots[i - 1]]


def _circle(centre: QPoint, radius: float, n: int) -> list[QPoint]:
    from qtpy.QtCore import QPoint

    turn: NDArray[np.float64] = 2 * np.pi * np.arange(1, n + 1) / n
    return [
        QPoint(
            centre.x() + round(radius * float(np.sin(t))), centre.y() + round(radius * float(1 - np.cos(t)))
        )
        for t in turn
    ]


def _blob(canvas: ScatterCanvas) -> list[QPoint]:
    """A hand-drawn looking outline around a good part of the map."""
    from qtpy.QtCore import QPoint

    plot = canvas.plot_rect()
    turn = np.linspace(0, 2 * np.pi, 140, endpoint=False)
    reach = 0.33 * (1 + 0.15 * np.sin(9 * turn))
    return [
        QPoint(
            round(plot.center().x() + r * plot.width() * c), round(plot.center().y() + r * plot.height() * s)
        )
        for r, c, s in zip(reach, np.cos(turn), np.sin(turn), strict=True)
    ]


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

"""Paths, grids and samples: drawn by a worker, shown as layers with a slider, exported as films."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.latents import latent_columns
from particle_explorer.status import Status
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import Folded
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow, follow_event
from particle_explorer.widgets.painted import Curve, CurveView
from particle_explorer.widgets.workspace import caption, fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run
    from particle_explorer.widgets.explore import Worker

DRAWN, AVERAGED = "path", "path, particles"
KINDS = {
    "component": "along a principal component",
    "dimension": "along a map coordinate",
    "straight": "straight between two places",
    "particles": "between two places, by way of particles",
    "curve": "along the way the handle goes",
    "grid": "grid over the map",
    "prior": "samples the model expects",
}
TIPS = {
    "component": "The widest directions of all particles, through their middle",
    "dimension": "One coordinate of the map, the others in the middle",
    "straight": "From the particle nearest to one place to that nearest to another; it may cross empty parts",
    "particles": "The shortest way from neighbour to neighbour: it stays where there are particles",
    "curve": "Press Record, drag the handle along a curve on any axes, press Stop",
    "grid": "A square of places, evenly spaced in probability",
    "prior": "Positions drawn as the model expects them",
}
LEAST_STEP = 1e-9


@dataclass(frozen=True)
class Walk:
    """A path as it was written."""

    stem: Path
    """Path of the files without ending"""
    along: str
    held: bool
    positions: NDArray[np.float64]
    drawn: NDArray[np.float32]
    """`(k, m, m)`"""
    averaged: NDArray[np.float32] | None
    n_particles: NDArray[np.int64]
    frc: list[list[float] | None]
    """Of each picture with the average beside it, ring by ring"""
    pixel_size_A: float
    made: dict[str, Any]
    """Run and settings"""


class PathsPanel(QWidget):
    """Choose a way, draw it, play it, export it."""

    def __init__(self, viewer: napari.Viewer, worker: Worker) -> None:
        super().__init__()
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.worker = worker
        self.tasks = Tasks(self)
        self.walk: Walk | None = None
        self.layers: dict[str, Any] = {}
        self._ends: dict[str, NDArray[np.float64]] = {}
        self._record: list[NDArray[np.float64]] = []

        self.kind = QComboBox()
        for key, words in KINDS.items():
            self.kind.addItem(words, key)
        self.kind.currentIndexChanged.connect(self._show_choice)
        self.number = QSpinBox()
        self.number.setRange(1, 64)
        self.number.setToolTip("Which one, counted from 1")
        self.n_frames = QSpinBox()
        self.n_frames.setRange(4, 400)
        self.n_frames.setValue(24)
        self.n_frames.setSuffix(" pictures")
        self.n_frames.setToolTip("How many pictures on the way")
        self.from_button, self.to_button = QPushButton("From here"), QPushButton("To here")
        for button, end in ((self.from_button, "start"), (self.to_button, "end")):
            button.setToolTip(f"The {end} of the way is the particle nearest to where the handle stands now")
            button.clicked.connect(lambda _=False, end=end: self._set_end(end))
        self.record_button = QPushButton("Record")
        self.record_button.setCheckable(True)
        self.record_button.toggled.connect(self._on_record)
        self.ends_row = _row(self.from_button, self.to_button)
        self.make_button = QPushButton("Draw")
        self.make_button.clicked.connect(self.make)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.agreement = CurveView(x_label="Å", height=110)
        self.agreement.setToolTip(
            "<p>How far the picture that the model draws agrees with the average of the real particles near"
            " it. The model has seen these particles: this is no resolution.</p>"
        )
        self.agreement.setVisible(False)
        self.format = QComboBox()
        for words, ending in (("GIF", "gif"), ("contact sheet (PNG)", "png"), ("MRC stack", "mrcs")):
            self.format.addItem(words, ending)
        self.format.setToolTip("What to write: a film, one picture of all, or numbers")
        self.format.currentIndexChanged.connect(self._suggest_path)
        self.export_path = QLineEdit()
        self.export_path.setToolTip("Where to write it")
        self.export_button = QPushButton("Export")
        self.export_button.clicked.connect(self.export)
        self.average_button = QPushButton("Average the originals along it")
        self.average_button.setToolTip(
            "<p>Average the particles nearest to each position from the original full-size images; the"
            " averages appear in the tab Classes</p>"
        )
        self.average_button.clicked.connect(self.average)
        self.average_button.setVisible(False)
        export = QWidget()
        inside = QVBoxLayout(export)
        inside.setContentsMargins(0, 0, 0, 0)
        inside.setSpacing(3)
        inside.addWidget(self.export_path)
        inside.addWidget(_row(self.format, self.export_button))
        self.export_part = Folded("Export…", export)
        self.export_part.setVisible(False)

        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(self.kind)
        layout.addWidget(_row(self.number, self.n_frames))
        layout.addWidget(self.ends_row)
        layout.addWidget(self.record_button)
        layout.addWidget(self.make_button)
        layout.addWidget(self.words)
        layout.addWidget(self.agreement)
        layout.addWidget(self.average_button)
        layout.addWidget(self.export_part)
        follow(self, self.state.run_changed, self._on_run)
        follow(self, self.state.handle_changed, self._on_handle)
        worker.when_changed(self._show_choice)
        follow_event(self, self.viewer.dims.events.current_step, self._on_slider)
        from particle_explorer.movies import can_write_mp4

        if can_write_mp4():
            self.format.insertItem(0, "MP4", "mp4")
            self.format.setCurrentIndex(0)
        self._show_choice()

    # --- choosing -----------------------------------------------------------------------------------

    def _show_choice(self, *_: object) -> None:
        kind = str(self.kind.currentData())
        self.kind.setToolTip(f"<p>{TIPS[kind]}</p>")
        d = self.state.handle_z.size
        self.number.setVisible(kind in ("component", "dimension") and d > 1)
        self.number.setMaximum(max(1, d))
        self.number.setPrefix("component " if kind == "component" else "coordinate ")
        ends = kind in ("straight", "particles")
        self.ends_row.setVisible(ends)
        self.from_button.setText("From here ✓" if "start" in self._ends else "From here")
        self.to_button.setText("To here ✓" if "end" in self._ends else "To here")
        self.record_button.setVisible(kind == "curve")
        recording = self.record_button.isChecked()
        self.record_button.setText(
            "Stop recording" if recording else "Record again" if len(self._record) > 1 else "Record"
        )
        self.record_button.setToolTip("Drag the handle along the curve between Record and Stop")
        why = ""
        if self.worker.busy:
            why = "Wait until the job above has ended"
        elif ends and len(self._ends) < 2:
            why = "Take the handle to both ends and say From here and To here first"
        elif kind == "curve" and (recording or len(self._record) < 2):
            why = "Record a way of the handle first"
        elif kind == "grid" and d < 2:
            why = "A grid needs a map of two dimensions or more"
        self.make_button.setEnabled(not why)
        self.make_button.setToolTip(why or "<p>Draw it, and average the real particles along it beside</p>")

    def _set_end(self, end: str) -> None:
        self._ends[end] = np.array(self.state.handle_z)
        self._show_choice()

    def _on_record(self, on: bool) -> None:
        if on:
            self._record = [np.array(self.state.handle_z)]
        self._show_choice()

    def _on_handle(self, z: NDArray[np.float64]) -> None:
        if self.record_button.isChecked() and self._record and z.shape == self._record[-1].shape:
            if np.linalg.norm(z - self._record[-1]) > LEAST_STEP:
                self._record.append(np.array(z))

    # --- making -------------------------------------------------------------------------------------

    def make(self) -> None:
        """Let a worker draw the way that is chosen."""
        kind, features = str(self.kind.currentData()), self.state.features
        options = ["--along", kind, "--n-frames", str(self.n_frames.value())]
        if kind in ("component", "dimension"):
            options += ["--number", str(self.number.value())]
        if self.state.held:
            options.append("--held")
        ends, record = dict(self._ends), list(self._record)

        def arguments(run: Run, folder: Path) -> list[str]:
            more = []
            if kind in ("straight", "particles"):
                z = features[latent_columns(features)].to_numpy(float)
                for end in ("start", "end"):
                    row = int(np.nanargmin(((z - ends[end]) ** 2).sum(1)))
                    more += [f"--{end}", str(int(features.index[row]))]
            if kind == "curve":
                np.save(folder / "positions.npy", np.stack(record))
                more += ["--positions", str(folder / "positions.npy")]
            return [str(run.path), *options, *more]

        self.worker.start("traverse", arguments, "Drawing the way", self._on_made)

    def _on_made(self, status: Status) -> None:
        self.tasks.run(
            "walk", lambda: read_walk(Path(status.message.splitlines()[0])), self.show_walk, self.worker.fail
        )

    def show_walk(self, walk: Walk) -> None:
        """Show a way as layers."""
        self.walk = walk
        flat = walk.along in ("grid", "prior")
        n_columns = max(1, round(len(walk.drawn) ** 0.5)) if walk.along == "grid" else 0
        for name, stack in ((DRAWN, walk.drawn), (AVERAGED, walk.averaged)):
            if stack is None:
                if name in self.layers and self.layers[name] in self.viewer.layers:
                    self.layers[name].visible = False
                continue
            data = montage(stack, n_columns) if flat else stack[:, None]
            self._show_layer(name, data, stack)
        if not flat:
            self._fit_particle_axis()
            self.viewer.dims.set_current_step(0, 0)
        fit_view(self.viewer)
        n = walk.n_particles[walk.n_particles > 0]
        words = f"{len(walk.drawn)} pictures"
        words += (
            f", beside them means of {number(int(n.min()))} to {number(int(n.max()))} particles"
            if n.size
            else ""
        )
        how = "" if flat else " The slider below the canvas walks, its arrow plays; the handle walks along."
        self.words.setText(f"{words}.{how}")
        self._write_caption()
        self.export_part.setVisible(True)
        self._suggest_path()
        self.average_button.setVisible(bool(n.size))
        self._show_agreement(-1 if flat else 0)

    def _write_caption(self, *_: object) -> None:
        """At the foot of the canvas what the path is, for as long as one of its layers is seen."""
        walk = self.walk
        there = any(layer in self.viewer.layers and layer.visible for layer in self.layers.values())
        words = ""
        if walk is not None and there:
            words = f"path: {KINDS[walk.along]}{', a part held still' if walk.held else ''}"
        caption(self.viewer, "path", words)

    def _show_agreement(self, i: int) -> None:
        """The curve of picture `i`, or nothing where no particles are near it."""
        walk = self.walk
        curve = walk.frc[i] if walk is not None and 0 <= i < len(walk.frc) else None
        self.agreement.setVisible(curve is not None)
        if walk is None or curve is None:
            return
        known = np.isfinite(walk.pixel_size_A)
        x = np.arange(len(curve)) / (walk.drawn.shape[-1] * (walk.pixel_size_A if known else 1.0))
        self.agreement.x_label = "Å" if known else "pixels"
        self.agreement.title = f"Drawn and averaged (FRC), picture {i + 1}"
        one = Curve(f"N {number(int(walk.n_particles[i]))}", x, np.asarray(curve))
        self.agreement.set_curves([one], y_range=(-0.1, 1.0), levels=(0.0, 0.5), x_as_period=True)

    def _show_layer(self, name: str, data: NDArray[np.float32], stack: NDArray[np.float32]) -> None:
        low, high = np.nanpercentile(stack, [1, 99.8])
        limits = (float(low), float(max(high, low + 1e-6)))
        session = self.state.session
        size = float("nan") if session is None else session.plan.cached_pixel_size_A
        size = float(size) if np.isfinite(size) and size > 0 else 1.0
        if data.ndim == 2:  # as large on the canvas as one picture
            size *= stack.shape[-1] / max(data.shape)
        layer = self.layers.get(name)
        if layer is not None and layer in self.viewer.layers and layer.ndim != data.ndim:
            self.viewer.layers.remove(layer)  # its slider went along other axes
            layer = None
        if layer is None or layer not in self.viewer.layers:
            layer = self.viewer.add_image(
                data,
                name=name,
                contrast_limits=limits,
                scale=(1.0,) * (data.ndim - 2) + (size, size),
                interpolation2d="cubic",
                axis_labels=("path", "particle", "y", "x")[-data.ndim :] if data.ndim > 2 else None,
            )
            tile(layer)
            layer.events.visible.connect(self._write_caption)
            self.layers[name] = layer
        else:
            layer.data = data
            layer.contrast_limits = limits
            layer.scale = (*layer.scale[:-2], size, size)
            layer.visible = True
        if self.walk is not None:  # positions, run and settings lie there
            written = str(self.walk.stem.with_name(f"{self.walk.stem.name}.json"))
            layer.metadata = {**self.walk.made, "positions, uids of the particles": written}

    def _fit_particle_axis(self, *_: object) -> None:
        """A path is to be seen whatever particle the other slider stands at: it repeats along that axis."""
        from particle_explorer.widgets.selected import LAYER

        n = next(
            (len(layer.data) for layer in self.viewer.layers if layer.name == LAYER and layer.visible), 1
        )
        for name in (DRAWN, AVERAGED):
            layer = self.layers.get(name)
            if (
                layer is not None
                and layer in self.viewer.layers
                and layer.ndim == 4
                and layer.data.shape[1] != n
            ):
                first = layer.data[:, :1]
                layer.data = np.broadcast_to(first, (first.shape[0], max(n, 1), *first.shape[2:]))

    def _on_slider(self, _: object = None) -> None:
        layer, walk = self.layers.get(DRAWN), self.walk
        if (
            walk is None
            or layer is None
            or layer not in self.viewer.layers
            or layer.ndim != 4
            or not layer.visible
        ):
            return
        self._fit_particle_axis()
        i = int(self.viewer.dims.current_step[self.viewer.dims.ndim - 4])
        self._show_agreement(i)
        if i < len(walk.positions) and walk.positions.shape[1] == self.state.handle_z.size:
            self.state.set_handle(walk.positions[i])

    def _on_run(self, *_: object) -> None:
        self.walk = None
        self._ends, self._record = {}, []
        for layer in self.layers.values():
            if layer in self.viewer.layers:
                layer.visible = False
        caption(self.viewer, "path", "")
        self.words.clear()
        self.export_part.setVisible(False)
        self.agreement.setVisible(False)
        self.average_button.setVisible(False)
        self._show_choice()

    # --- exporting ----------------------------------------------------------------------------------

    def _suggest_path(self, *_: object) -> None:
        session = self.state.session
        if self.walk is not None and session is not None:
            ending = self.format.currentData()
            folder = session.path.parent
            names = [self.walk.stem.name, *(f"{self.walk.stem.name}-{i}" for i in range(2, 10_000))]
            path = next(path for name in names if not (path := folder / f"{name}.{ending}").exists())
            self.export_path.setText(str(path))

    def export(self) -> None:
        """Let a worker write the file."""
        walk, out = self.walk, self.export_path.text().strip()
        if walk is None or not out:
            return
        stack = f"{walk.stem}.mrcs"
        beside = f"{walk.stem}-particles.mrcs"

        def arguments(run: Run, folder: Path) -> list[str]:
            return [stack, *(["--beside", beside] if Path(beside).exists() else []), "--out", out]

        self.worker.start("film", arguments, "Writing the film", self._on_exported)

    def average(self) -> None:
        """Let a worker average the originals near the positions of the way."""
        walk = self.walk
        if walk is None:
            return
        positions = str(walk.stem.with_name(f"{walk.stem.name}.json"))
        n_near = str(max(1, int(np.median(walk.n_particles[walk.n_particles > 0]))))
        held = ["--held"] if walk.held else []

        def arguments(run: Run, folder: Path) -> list[str]:
            return [str(run.path), "--by", "near", "--positions", positions, "--n-near", n_near, *held]

        self.worker.start("average", arguments, "Averaging along the way", self._on_averaged)

    def _on_averaged(self, status: Status) -> None:
        name = Path(status.message).stem
        self.words.setText(f"Averages along the way are in the tab Classes: {name}")
        self.state.classes_changed.emit(name)

    def _on_exported(self, status: Status) -> None:
        self.words.setText(f"Written: {status.message}")
        self._suggest_path()

    def fail(self, failure: Failure) -> None:
        self.worker.fail(failure)


def read_walk(path: Path) -> Walk:
    """Read what `traverse` wrote; `path` is that of the stack. A thread's work."""
    from particle_explorer.io.mrc import MrcFile

    def stack(at: Path) -> NDArray[np.float32]:
        file = MrcFile(at)
        return np.asarray(file.read(np.arange(file.n_images))[:, 0], np.float32)

    stem = path.with_suffix("")
    record = json.loads(stem.with_name(f"{stem.name}.json").read_text(encoding="utf-8"))
    beside = stem.with_name(f"{stem.name}-particles.mrcs")
    return Walk(
        stem,
        record["config"]["along"],
        bool(record["held"]),
        np.asarray(record["positions"], float),
        stack(path),
        stack(beside) if beside.exists() else None,
        np.asarray(record["n_particles"], np.int64),
        record.get("frc") or [None] * len(record["positions"]),
        MrcFile(path).pixel_size_A,
        {name: record[name] for name in ("run", "held", "config") if name in record},
    )


def montage(stack: NDArray[np.float32], n_columns: int = 0) -> NDArray[np.float32]:
    """`(k, m, m)` side by side in reading order."""
    k, h, w = stack.shape
    columns = n_columns or int(np.ceil(k**0.5))
    rows = -(-k // columns)
    padded = np.full((rows * columns, h, w), np.nanmin(stack), np.float32)
    padded[:k] = stack
    return padded.reshape(rows, columns, h, w).swapaxes(1, 2).reshape(rows * h, columns * w)


def _row(*widgets: QWidget) -> QWidget:
    page = QWidget()
    row = QHBoxLayout(page)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(3)
    for widget in widgets:
        row.addWidget(widget, 1)
    return page

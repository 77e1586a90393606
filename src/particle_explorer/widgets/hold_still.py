"""Hold a part of the particle still: drawn by hand on the reconstruction, or the most rigid part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtWidgets import QCheckBox, QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from particle_explorer.status import Status
from particle_explorer.widgets.background import Failure
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.workspace import fit_view, state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run
    from particle_explorer.widgets.explore import Worker
    from particle_explorer.widgets.reconstruction import Reconstruction

LAYER = "part to hold still"
LEAST_PX = 4


class HoldStillPanel(QWidget):
    """Draw a region, hold it, undo; says how far the frames were turned."""

    def __init__(self, viewer: napari.Viewer, worker: Worker, reconstruction: Reconstruction) -> None:
        super().__init__()
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.worker = worker
        self.shapes: Any = None
        self._reconstruction = reconstruction
        self._hidden: list[Any] = []
        self._had_grid = True
        self._was_held = False
        self._drawn_at: NDArray[np.float64] = np.zeros(0)

        self.about = QLabel(
            "The frame of a map may turn along it, and then everything seems to move. Say what stands still."
        )
        self.about.setWordWrap(True)
        self.draw_button = QPushButton("Draw the part…")
        self.draw_button.setToolTip(
            "<p>Draw around the part on the reconstruction, with napari's ellipse, rectangle or polygon</p>"
        )
        self.draw_button.clicked.connect(self.draw)
        self.auto_button = QPushButton("Most rigid part")
        self.auto_button.setToolTip("<p>Find the part that changes least along the map and hold it</p>")
        self.auto_button.clicked.connect(lambda: self._start(lambda run, folder: [str(run.path), "--auto"]))
        self.done_button = QPushButton("Hold what is drawn")
        self.done_button.setToolTip("Turn the frames so that the part inside the drawing stays where it is")
        self.done_button.clicked.connect(self.hold)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.clicked.connect(self.end_drawing)
        self.held = QCheckBox("Show everything with it held still")
        self.held.toggled.connect(self.state.set_held)
        self.undo_button = QPushButton("Undo")
        self.undo_button.setToolTip("Go back to what was held before, or to nothing")
        self.undo_button.clicked.connect(self.undo)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.start_row, self.drawing_row, self.below_row = QWidget(), QWidget(), QWidget()
        for row, widgets in (
            (self.start_row, (self.draw_button, self.auto_button)),
            (self.drawing_row, (self.done_button, self.cancel_button)),
            (self.below_row, (self.held, self.undo_button)),
        ):
            layout = QHBoxLayout(row)
            layout.setContentsMargins(0, 0, 0, 0)
            layout.setSpacing(3)
            for widget in widgets:
                layout.addWidget(widget, 0 if widget is self.undo_button else 1)
        layout_ = QVBoxLayout(self)
        layout_.setContentsMargins(0, 0, 0, 0)
        layout_.setSpacing(4)
        for part in (self.about, self.start_row, self.drawing_row, self.below_row, self.words):
            layout_.addWidget(part)
        self.drawing_row.setVisible(False)
        follow(self, self.state.held_changed, self._show)
        follow(self, self.state.run_changed, self._on_run)
        follow(self, self.state.features_changed, self._show)
        worker.when_changed(self._show)
        self._show()

    # --- drawing --------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Show the reconstruction alone and let the user draw on it."""
        layer = self._reconstruction.layer
        if layer is None or layer not in self.viewer.layers or self.shapes is not None:
            return
        # the region belongs to the model's own frame at this place of the map
        self._was_held = self.state.held
        self.state.set_held(False)
        self.state.set_pose(0.0, np.zeros(2))
        self._drawn_at = np.array(self.state.handle_z)
        self._hidden = [each for each in self.viewer.layers if each is not layer and each.visible]
        for each in self._hidden:
            each.visible = False
        self._had_grid = self.viewer.canvas.grid.enabled
        self.viewer.canvas.grid.enabled = False
        self.shapes = self.viewer.add_shapes(
            name=LAYER,
            ndim=2,
            scale=layer.scale,
            edge_color="#E69F00",
            edge_width=max(0.4, layer.data.shape[0] / 150),
            face_color="#E69F0033",
        )
        self.shapes.mode = "add_ellipse"
        fit_view(self.viewer)
        self.start_row.setVisible(False)
        self.drawing_row.setVisible(True)
        self.words.setVisible(True)
        self.words.setText(
            "Drag an ellipse over the part on the canvas; other shapes are in napari's layer controls."
        )

    def end_drawing(self) -> None:
        """Put the canvas back as it was."""
        shapes, self.shapes = self.shapes, None
        if shapes is None:
            return
        if shapes in self.viewer.layers:
            self.viewer.layers.remove(shapes)
        self.viewer.canvas.grid.enabled = self._had_grid
        for each in self._hidden:
            if each in self.viewer.layers:
                each.visible = True
        self._hidden = []
        fit_view(self.viewer)
        self.start_row.setVisible(True)
        self.drawing_row.setVisible(False)
        self.state.set_held(self._was_held and self._has_gauge())
        self._show()

    def mask(self) -> NDArray[np.bool_]:
        """`(m, m)` what was drawn, in pixels of the reconstruction."""
        shape = self._reconstruction.layer.data.shape[:2]
        if self.shapes is None or not len(self.shapes.data):
            return np.zeros(shape, bool)
        return np.asarray(self.shapes.to_masks(mask_shape=shape).any(axis=0))

    def hold(self) -> None:
        """Hold what was drawn."""
        mask, at = self.mask(), self._drawn_at
        if mask.sum() < LEAST_PX:
            self.worker.fail(Failure("Nothing is drawn yet: drag a shape over the part on the canvas."))
            return
        self.end_drawing()

        def arguments(run: Run, folder: Path) -> list[str]:
            path = folder / "mask.npy"
            np.save(path, mask.astype(np.float32))
            where = ",".join(f"{value:.6g}" for value in at)
            return [str(run.path), "--mask", str(path), f"--at={where}"]

        self._start(arguments)

    # --- holding ----------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Go back to what was held before."""
        self._start(lambda run, folder: [str(run.path), "--undo"])

    def _start(self, arguments: Any) -> None:
        self.worker.start("hold-still", arguments, "Registering the frames", self._on_held)

    def _on_held(self, status: Status) -> None:
        nothing = status.message == "nothing"

        def shown() -> None:
            # also when something was held before: every view reads the poses and the gauge anew
            self.state.set_held(False)
            self.state.set_held(not nothing)
            self._show()

        self.worker.read_again(shown)

    def _has_gauge(self) -> bool:
        return self.state.run is not None and self.state.run.gauge() is not None

    def _on_run(self, *_: object) -> None:
        self.end_drawing()
        self._show()

    def _show(self, *_: object) -> None:
        from particle_explorer.widgets.rigid_part import gauge_words

        run = self.state.run
        gauge = None if run is None else run.gauge()
        past = (
            run is not None
            and (run.path / "gauge-past").is_dir()
            and any((run.path / "gauge-past").iterdir())
        )
        busy = self.worker.busy
        for button in (self.draw_button, self.auto_button):
            button.setEnabled(not busy and self.state.drawable)
        self.held.blockSignals(True)
        self.held.setChecked(self.state.held)
        self.held.blockSignals(False)
        self.held.setEnabled(gauge is not None and not busy)
        self.held.setToolTip(
            "Pictures, averages and aligned particles" if gauge is not None else "Nothing is held still yet"
        )
        self.undo_button.setEnabled(past and not busy)
        if self.shapes is None:
            self.words.setText("" if gauge is None else gauge_words(gauge))
            self.words.setVisible(bool(self.words.text()))
        else:
            self.words.setVisible(True)

"""Where the handle stands: sliders of all dimensions and components, pinned positions, particles near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QTimer
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QPushButton,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.latents import PCA, latent_columns, pca
from particle_explorer.preprocess import original_pixels
from particle_explorer.widgets.background import Mailbox, Tasks, in_turn
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.pictures import to_reference
from particle_explorer.widgets.pins import Pins
from particle_explorer.widgets.value_slider import ValueSlider
from particle_explorer.widgets.workspace import caption, fit_view, state_of, tile, unwrapped

if TYPE_CHECKING:
    import napari
    from scipy.spatial import cKDTree

    from particle_explorer.session import Session
    from particle_explorer.widgets.reconstruction import Reconstruction

MEAN_LAYER = "particles near the handle"
SAMPLE = 200_000
"""Particles among which near ones are sought."""
NEAR = 5
"""So many particles must be no farther than particles usually are from each other."""
N_AVERAGED = 100
SETTLE_MS = 90
"""The mean of particles follows a hand that has slowed down; on the way the reconstruction alone moves."""
MAX_SLIDERS = 8


@dataclass(frozen=True)
class Space:
    """The latent positions of particles, and how near to each other they lie."""

    rows: NDArray[np.intp]
    z: NDArray[np.float64]
    """`(n, d)` of those rows"""
    tree: cKDTree
    reach: float
    """Distance within which nearly all particles have `NEAR` others"""
    components: PCA
    spread: NDArray[np.float64]
    """`(d, 2)` lowest and highest value of each dimension"""
    score_spread: NDArray[np.float64]
    """`(d, 2)` of each component"""

    @classmethod
    def of(cls, z: NDArray[np.float64]) -> Space | None:
        """Of all positions `(N, d)`; a thread's work."""
        from scipy.spatial import cKDTree

        rows = np.flatnonzero(np.isfinite(z).all(1))
        if len(rows) <= NEAR:
            return None
        rng = np.random.default_rng(0)
        if len(rows) > SAMPLE:
            rows = np.sort(rng.choice(rows, SAMPLE, replace=False))
        known = z[rows]
        tree = cKDTree(known)
        some = known[rng.permutation(len(known))[:2000]]
        reach = 1.2 * float(np.quantile(tree.query(some, NEAR + 1)[0][:, -1], 0.99))
        components = pca(known.astype(np.float32))
        scores = components.scores
        return cls(
            rows,
            known,
            tree,
            reach,
            components,
            np.stack([known.min(0), known.max(0)], 1),
            np.stack([scores.min(0), scores.max(0)], 1).astype(float),
        )

    def is_near(self, z: NDArray[np.float64]) -> bool:
        """Whether particles lie near a position `(d,)`."""
        return bool(self.tree.query(z, NEAR)[0][-1] <= self.reach)

    def nearest(self, z: NDArray[np.float64], k: int) -> NDArray[np.intp]:
        """Rows of the `k` particles nearest to a position, nearest first."""
        return self.rows[np.atleast_1d(self.tree.query(z, min(k, len(self.rows)))[1])]


@dataclass(frozen=True)
class Wanted:
    """Which particles are to be averaged."""

    session: Session
    rows: NDArray[np.intp]
    angle_deg: NDArray[np.float64] | None
    shift_yx_px: NDArray[np.float64] | None
    """px of the originals"""
    z: NDArray[np.float64]
    """Where they are near to"""
    held: bool


class HandlePanel(QWidget):
    """Sliders, snapping, pins, and the mean of the particles near the handle as a layer."""

    def __init__(self, viewer: napari.Viewer, owner: QWidget, reconstruction: Reconstruction) -> None:
        super().__init__()
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self.pins = Pins(self.viewer, owner)
        self.space: Space | None = None
        self._places: NDArray[np.float64] | None = None
        self.layer: Any = None
        self._reconstruction = reconstruction
        self._sliders: list[ValueSlider] = []
        self._mailbox = Mailbox(owner, _average, self._show_mean, name="particles near")
        self._settle = QTimer(self)
        self._settle.setSingleShot(True)
        self._settle.setInterval(SETTLE_MS)
        self._settle.timeout.connect(self._ask_mean)

        self.words = QLabel()
        self.words.setWordWrap(True)
        self.snap_button = QPushButton("Nearest particle")
        self.snap_button.setToolTip("Take the handle to the particle nearest to it (Enter on the map)")
        self.snap_button.clicked.connect(self.snap)
        self.middle_button = QPushButton("Middle")
        self.middle_button.setToolTip("Take the handle to the middle of all particles")
        self.middle_button.clicked.connect(self.to_middle)
        self.kind = QComboBox()
        self.kind.addItem("map coordinates", "z")
        self.kind.addItem("principal components", "pc")
        self.kind.setToolTip("What the sliders move the handle along")
        self.kind.activated.connect(self._build_sliders)
        self.rows = QVBoxLayout()
        self.rows.setSpacing(1)
        self.near = QCheckBox("Mean of the particles near the handle")
        self.near.setToolTip(
            f"<p>A layer with the mean of the {N_AVERAGED} particles nearest to the handle, aligned: what the"
            " model draws can be checked against what was recorded. It follows when the hand slows down.</p>"
        )
        self.near.toggled.connect(self._on_near)
        self.pin_button = QPushButton("Pin")
        self.pin_button.clicked.connect(self._pin)
        self.unpin_button = QPushButton("Clear pins")
        self.unpin_button.setToolTip("Forget all pinned positions")
        self.unpin_button.clicked.connect(self.pins.clear)
        self.pin_row = QHBoxLayout()
        self.pin_row.setSpacing(3)
        self.pin_row.addWidget(self.pin_button, 1)
        self.pin_row.addWidget(self.unpin_button, 1)
        self._pin_buttons: list[QToolButton] = []

        snap = QHBoxLayout()
        snap.setSpacing(3)
        snap.addWidget(self.snap_button, 1)
        snap.addWidget(self.middle_button, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addWidget(self.words)
        layout.addWidget(self.kind)
        layout.addLayout(self.rows)
        layout.addLayout(snap)
        layout.addLayout(self.pin_row)
        layout.addWidget(self.near)

        follow(self, self.state.features_changed, self._on_features)
        follow(self, self.state.run_changed, self._on_run)
        follow(self, self.state.handle_changed, self._on_handle)
        follow(self, self.state.off_data_changed, self._say)
        follow(self, self.state.held_changed, self._later)
        follow(self, self.pins.changed, self._show_pins)
        reconstruction.shown.connect(self.pins.compare)
        self._show_pins()
        self._on_features()

    def stop(self) -> None:
        """End the thread that averages."""
        self.tasks.stop()
        self._mailbox.stop()
        self._mailbox.join()

    # --- where the particles are --------------------------------------------------------------------

    def _on_run(self, *_: object) -> None:
        self.space = None
        self.pins.clear()
        self.state.set_off_data("latent", False)
        if self.layer is not None:
            self.layer.visible = False
        caption(self.viewer, "near", "")

    def _on_features(self) -> None:
        features, run = self.state.features, self.state.run
        names = latent_columns(features)
        if run is None or not names:
            self.space = None
            return

        before = self.space, self._places

        def work() -> tuple[Space | None, NDArray[np.float64]]:
            places = features[names].to_numpy(float)
            space, known = before
            # a new column, such as a clustering, leaves the positions as they are
            if space is not None and known is not None and np.array_equal(places, known, equal_nan=True):
                return space, known
            return Space.of(places), places

        def done(found: tuple[Space | None, NDArray[np.float64]]) -> None:
            if self.state.run is run and found[0] is not self.space:
                self.space, self._places = found
                self._build_sliders()
                self._on_handle(self.state.handle_z)

        self.tasks.run("space", lambda: in_turn(work), done)

    def _on_handle(self, z: NDArray[np.float64]) -> None:
        if self.space is None or z.size != self.space.z.shape[1]:
            return
        self.state.set_off_data("latent", not self.space.is_near(z))
        for slider, value in zip(self._sliders, self._values(z), strict=False):
            slider.set_value(float(value))
        self._say()
        self._later()

    def _say(self, *_: object) -> None:
        if self.state.off_data:
            self.words.setText("No particles near here: the picture is <b>extrapolation</b>.")
        else:
            self.words.setText("Among particles: the picture rests on data.")

    # --- sliders ------------------------------------------------------------------------------------

    def _values(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        assert self.space is not None
        if self.kind.currentData() == "z":
            return z
        return np.asarray((z - self.space.components.mean) @ self.space.components.components.T, float)

    def _build_sliders(self, *_: object) -> None:
        space = self.space
        d = 0 if space is None else min(space.z.shape[1], MAX_SLIDERS)
        by_component = self.kind.currentData() == "pc"
        self.kind.setVisible(d > 1)
        for old in self._sliders:
            self.rows.removeWidget(old)
            old.deleteLater()
        self._sliders = []
        if space is None:
            return
        spread = space.score_spread if by_component else space.spread
        for i in range(d):
            share = f" ({100 * space.components.share[i]:.0f} %)" if by_component else ""
            name = f"PC {i + 1}{share}" if by_component else f"map {i + 1}"
            tip = f"Move the handle along {'principal component' if by_component else 'coordinate'} {i + 1}"
            slider = ValueSlider(name, *map(float, spread[i]), tip=tip)
            slider.moved.connect(lambda value, i=i: self._on_slider(i, value))
            self.rows.addWidget(slider)
            self._sliders.append(slider)
        z = self.state.handle_z
        if z.size == space.z.shape[1]:
            for slider, value in zip(self._sliders, self._values(z), strict=False):
                slider.set_value(float(value))

    def _on_slider(self, i: int, value: float) -> None:
        if self.space is None:
            return
        z = self.state.handle_z
        if self.kind.currentData() == "z":
            moved = z.copy()
            moved[i] = value
        else:
            moved = z + (value - self._values(z)[i]) * self.space.components.components[i]
        self.state.set_handle(moved)

    def snap(self) -> None:
        """Take the handle to the particle nearest to it."""
        if self.space is not None:
            row = int(self.space.nearest(self.state.handle_z, 1)[0])
            self.state.selection.set_active(row)
            self.state.set_handle(self.space.z[np.searchsorted(self.space.rows, row)])

    def to_middle(self) -> None:
        """Take the handle to the particle in the middle of all."""
        if self.space is not None:
            row = self.space.nearest(np.median(self.space.z, axis=0), 1)[0]
            self.state.set_handle(self.space.z[np.searchsorted(self.space.rows, row)])

    # --- pins ---------------------------------------------------------------------------------------

    def _pin(self) -> None:
        image = self._reconstruction.image
        if image is not None:
            self.pins.add(self.state.handle_z, image)

    def _show_pins(self) -> None:
        for old in self._pin_buttons:
            self.pin_row.removeWidget(old)
            old.deleteLater()
        self._pin_buttons = []
        for i, z in enumerate(self.pins.positions):
            button = QToolButton()
            button.setText(str(i + 1))
            button.setToolTip(f"Take the handle to pin {i + 1}")
            button.clicked.connect(lambda _=False, z=z: self.state.set_handle(z))
            self.pin_row.addWidget(button)
            self._pin_buttons.append(button)
        full = self.pins.is_full
        self.pin_button.setEnabled(not full)
        self.pin_button.setToolTip(
            "Four positions are pinned already; clear them first"
            if full
            else "<p>Keep this picture in the layer 'pinned positions'; below it stands what is brighter or"
            " darker where the handle goes</p>"
        )
        self.unpin_button.setEnabled(bool(self.pins.positions))

    # --- the mean of particles ----------------------------------------------------------------------

    def _on_near(self, on: bool) -> None:
        if on:
            self._later()
        elif self.layer is not None:
            self.layer.visible = False
            caption(self.viewer, "near", "")

    def _later(self, *_: object) -> None:
        if self.near.isChecked():
            self._settle.start()

    def _ask_mean(self) -> None:
        space, state = self.space, self.state
        if space is None or state.session is None or state.handle_z.size != space.z.shape[1]:
            return
        rows = space.nearest(state.handle_z, N_AVERAGED)
        features = state.features
        angle = shift = None
        if {"angle_deg", "shift_y_px", "shift_x_px"} <= set(features.columns):
            held = "pose-held " if state.held and "pose-held angle_deg" in features else ""
            angle = features[f"{held}angle_deg"].to_numpy(float)[rows]
            shift = np.stack([features[f"{held}shift_{axis}_px"].to_numpy(float)[rows] for axis in "yx"], 1)
        self._mailbox.submit(Wanted(state.session, rows, angle, shift, state.handle_z, state.held))

    def _show_mean(self, found: tuple[Wanted, NDArray[np.float32]]) -> None:
        wanted, image = found
        if wanted.session is not self.state.session or not self.near.isChecked() or self.state.run is None:
            return
        low, high = np.percentile(image, [1, 99.8])
        limits = (float(low), float(max(high, low + 1e-6)))
        if self.layer is None or self.layer not in self.viewer.layers:
            size = wanted.session.plan.cached_pixel_size_A
            scale = (size, size) if np.isfinite(size) and size > 0 else (1.0, 1.0)
            self.layer = self.viewer.add_image(
                image,
                name=MEAN_LAYER,
                contrast_limits=limits,
                rgb=image.ndim == 3,
                scale=scale,
                interpolation2d="cubic",
            )
            tile(self.layer)
            self.viewer.layers.move(self.viewer.layers.index(self.layer), 1)  # beside the reconstruction
            fit_view(self.viewer)
        else:
            self.layer.data = image
            self.layer.contrast_limits = limits
            if not self.layer.visible:
                self.layer.visible = True
        run = self.state.run
        self.layer.metadata = {
            "session": str(wanted.session.path),
            "run": str(run.path),
            "settings": str(run.path / "config.json"),
            "prepared": str(wanted.session.path / "session.json"),
            "poses": "none" if wanted.angle_deg is None else "held" if wanted.held else "run",
            "nearest to": wanted.z.tolist(),
            "uid": wanted.session.uid[wanted.rows],
        }
        caption(self.viewer, "near", f"near: {number(len(wanted.rows))} particles")


def _average(wanted: Wanted) -> tuple[Wanted, NDArray[np.float32]]:
    """The mean `(m, m)` or `(m, m, 3)` of some cached images, moved back by their poses."""
    images = wanted.session.images.read(wanted.rows)
    if wanted.angle_deg is not None and wanted.shift_yx_px is not None:
        scale = original_pixels(wanted.session.table.iloc[wanted.rows], wanted.session.plan)
        shifts = wanted.shift_yx_px / scale[:, None]
        for image, angle, shift in zip(images, wanted.angle_deg, shifts, strict=True):
            for channel in image:
                channel[:] = to_reference(channel, angle, shift)
    mean = images.mean(0)
    return wanted, np.asarray(mean[0] if mean.shape[0] == 1 else np.moveaxis(mean, 0, -1), np.float32)

"""The sliders below the map: its dimensions that are not on the axes, and the pose of the reconstruction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QShowEvent
from qtpy.QtWidgets import QFrame, QHBoxLayout, QScrollArea, QToolButton, QVBoxLayout, QWidget

from particle_explorer.state import AppState
from particle_explorer.widgets.latent_axes import Columns
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.value_slider import ValueSlider

ROWS = 4
"""Rows of sliders that are seen however small the window is; the others are scrolled to"""
SHARE = 0.2
"""Part of the dock's height that sliders may take"""


class MapSliders(QScrollArea):
    """Moves the handle where the axes cannot, and turns and shifts what is drawn of it."""

    def __init__(self, state: AppState) -> None:
        super().__init__()
        self.state = state
        self._room = 0
        page = QWidget()
        self._rows = QVBoxLayout(page)
        self._rows.setContentsMargins(0, 0, 2, 0)
        self._rows.setSpacing(1)
        self._dimension_rows = QVBoxLayout()
        self._dimension_rows.setSpacing(1)
        self._rows.addLayout(self._dimension_rows)
        self.dimensions: dict[int, ValueSlider] = {}
        self._fit_soon = QTimer(self)  # ours, so that it goes with us
        self._fit_soon.setSingleShot(True)
        self._fit_soon.setInterval(0)
        self._fit_soon.timeout.connect(self._fit)
        self.angle = ValueSlider("angle", -180, 180, unit="°", digits=0, tip="Turn the reconstruction")
        self.shift_x = ValueSlider("shift x", -10, 10, unit=" px", tip="Shift the reconstruction right")
        self.shift_y = ValueSlider("y", -10, 10, unit=" px", tip="Shift the reconstruction down")
        self.reset_pose = QToolButton()
        self.reset_pose.setText("reset")
        self.reset_pose.setToolTip("Angle and shift back to 0")
        self.reset_pose.clicked.connect(lambda: self.state.set_pose(0.0, np.zeros(2)))
        for widgets in ((self.angle, self.reset_pose), (self.shift_x, self.shift_y)):
            row = QHBoxLayout()
            row.setSpacing(8)
            for widget in widgets:
                row.addWidget(widget, 1 if isinstance(widget, ValueSlider) else 0)
            self._rows.addLayout(row)
        for slider in (self.angle, self.shift_x, self.shift_y):
            slider.moved.connect(self._on_pose_moved)
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setWidget(page)
        follow(self, state.pose_changed, self._show_pose)

    # ---- dimensions ------------------------------------------------------------------

    def offer(self, columns: Columns, x: str | None, y: str | None) -> None:
        """One slider for each dimension that the axes `x` and `y` do not hold, none if they hold all."""
        d = columns.n_dims if self.state.handle_z.size == columns.n_dims else 0
        keys = {x, y}
        on_axes = [
            key for key in keys if key is not None and key.startswith(("z_", "pc_")) and key[-1].isdigit()
        ]
        hidden = (
            []
            if len([key for key in on_axes if "std" not in key]) >= d
            else [i for i in range(d) if f"z_{i}" not in keys]
        )
        if list(self.dimensions) != hidden:
            for old in self.dimensions.values():
                self._dimension_rows.removeWidget(old)
                old.deleteLater()
            self.dimensions = {}
            for i in hidden:
                tip = f"Move ◉ along dimension {i + 1} of the map"
                slider = ValueSlider(f"map {i + 1}", 0, 1, tip=tip)
                slider.moved.connect(lambda value, i=i: self._on_moved(i, value))
                self.dimensions[i] = slider
                self._dimension_rows.addWidget(slider)
                slider.show()  # now: the room for the rows is measured in a moment
        for i, slider in self.dimensions.items():
            slider.set_range(*(float(value) for value in columns.positions.spread[i]))
            slider.set_value(float(self.state.handle_z[i]))
        self._fit_soon.start()  # when the style has had its say

    def show_position(self, z: NDArray[np.float64]) -> None:
        """Show where the handle is now, silently."""
        for i, slider in self.dimensions.items():
            slider.set_value(float(z[i]))

    def _on_moved(self, i: int, value: float) -> None:
        z = self.state.handle_z.copy()
        z[i] = value
        self.state.set_handle(z)

    # ---- the pose ----------------------------------------------------------------

    def _on_pose_moved(self, _: float) -> None:
        self.state.set_pose(self.angle.value, np.array([self.shift_y.value, self.shift_x.value]))

    def _show_pose(self, angle_deg: float, shift_yx_px: NDArray[np.float64]) -> None:
        self.angle.set_value(angle_deg)
        self.shift_y.set_value(float(shift_yx_px[0]))
        self.shift_x.set_value(float(shift_yx_px[1]))

    # ---- room --------------------------------------------------------------------

    def fit_into(self, height: int) -> None:
        """Take no more room than becomes a dock `height` pixels high."""
        self._room = int(SHARE * height)
        self._fit()

    def _fit(self) -> None:
        """All sliders where there is room, else a few rows of them and a scroll bar."""
        row = max(self.angle.sizeHint().height(), self.reset_pose.sizeHint().height()) + 1
        room = max(ROWS * row, self._room)
        for rows in (self._dimension_rows, self._rows):
            rows.invalidate()
        frame = 2 * self.frameWidth()  # napari's style draws one that was switched off
        self.setFixedHeight(min(self._rows.totalSizeHint().height(), room) + frame)

    def showEvent(self, event: QShowEvent | None) -> None:
        super().showEvent(event)
        self._fit_soon.start()

"""A slider that shows its name and its value."""

from __future__ import annotations

import math

import numpy as np
from qtpy.QtCore import QSignalBlocker, Qt, Signal
from qtpy.QtWidgets import QHBoxLayout, QLabel, QSlider, QWidget

SLIDER_STEPS = 1000


class ValueSlider(QWidget):
    """A slider with its name and its value."""

    moved = Signal(float)
    """by hand"""

    def __init__(
        self, name: str, low: float, high: float, *, unit: str = "", digits: int = 1, tip: str = ""
    ) -> None:
        super().__init__()
        self._low, self._high, self._unit = low, high, unit
        self._digits = digits if unit else _digits(low, high)
        self._value = 0.0
        self.slider = QSlider(Qt.Orientation.Horizontal)
        self._steps = min(SLIDER_STEPS, round((high - low) * 10**digits)) if unit else SLIDER_STEPS
        self.slider.setRange(0, self._steps)
        self.slider.setPageStep(self._steps // 20)
        self.slider.setMinimumWidth(36)
        self.slider.setAccessibleName(name)
        self.slider.valueChanged.connect(self._on_moved)
        self.words = QLabel()
        self.words.setMinimumWidth(self.words.fontMetrics().horizontalAdvance(f"−{high:.{digits}f}{unit}"))
        self.setToolTip(tip)
        row = QHBoxLayout(self)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(3)
        row.addWidget(QLabel(name))
        row.addWidget(self.slider, 1)
        row.addWidget(self.words)
        self.set_value(0.0)

    @property
    def value(self) -> float:
        return self._value

    def set_range(self, low: float, high: float) -> None:
        """Other ends, with the digits that a hundredth of the way needs."""
        self._low, self._high = low, high if high > low else low + 1
        self._digits = _digits(self._low, self._high)
        self.set_value(self._value)

    def set_value(self, value: float) -> None:
        """Show a value, silently; one outside the range leaves the knob at its end."""
        self._value = value
        share = (value - self._low) / (self._high - self._low)
        with QSignalBlocker(self.slider):
            self.slider.setValue(round(min(max(share, 0.0), 1.0) * self._steps))
        self._say()

    def _on_moved(self, step: int) -> None:
        value = self._low + step / self._steps * (self._high - self._low)
        self._value = round(value, self._digits + 1) if self._digits else float(round(value))
        self._say()
        self.moved.emit(self._value)

    def _say(self) -> None:
        value = round(self._value, self._digits) + 0.0  # no minus before a zero
        self.words.setText(f"{value:.{self._digits}f}{self._unit}".replace("-", "−"))


def _digits(low: float, high: float) -> int:
    """Digits behind the point that show a hundredth of the way."""
    return int(np.clip(math.ceil(-math.log10(max(high - low, 1e-9) / 100)), 0, 6))

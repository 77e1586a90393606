"""magicgui widgets for numbers that are kept exactly, with a unit and a word for zero.

magicgui's own `FloatSpinBox` rounds to its decimals and its `SpinBox` can show neither a unit nor a word;
these two are magicgui widgets all the same, over Qt boxes of ours, by the protocol magicgui has for that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from magicgui.widgets import protocols
from magicgui.widgets.bases import RangedWidget
from numpy.typing import NDArray
from qtpy.QtCore import QEvent, Signal
from qtpy.QtGui import QImage, QValidator
from qtpy.QtWidgets import QAbstractSpinBox, QDoubleSpinBox, QSpinBox, QWidget

ADAPTIVE = QAbstractSpinBox.StepType.AdaptiveDecimalStepType
DECIMALS = 15
"""Finest grid of a `QDoubleSpinBox`; the exact number is remembered beside it."""


class WholeBox(QSpinBox):
    """A whole number."""

    numberChanged = Signal(object)
    parentChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.setKeyboardTracking(False)
        self.valueChanged.connect(self._on_change)

    def _on_change(self, value: int) -> None:
        self.numberChanged.emit(value)

    def number(self) -> int:
        return self.value()

    def set_number(self, value: int) -> None:
        self.setValue(value)

    def bounds(self) -> tuple[int, int]:
        return self.minimum(), self.maximum()

    def set_bounds(self, low: float, high: float) -> None:
        self.setRange(math.ceil(low), math.floor(high))

    def changeEvent(self, event: QEvent | None) -> None:
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.ParentChange:
            self.parentChanged.emit(self.parent())


class ExactBox(QDoubleSpinBox):
    """A number of any size, kept exactly: 1e-4 stays 1e-4, and 182.37 does not become 182.4."""

    numberChanged = Signal(object)
    parentChanged = Signal(object)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._exact: float | None = None
        self._low, self._high = 0.0, 99.0
        self.setDecimals(DECIMALS)
        self.setKeyboardTracking(False)
        self.valueChanged.connect(self._on_change)

    def number(self) -> float:
        exact = self.value() if self._exact is None else self._exact
        return min(max(exact, self._low), self._high)

    def set_number(self, value: float) -> None:
        before = self.number()
        blocked = self.blockSignals(True)
        self.setValue(value)
        self.blockSignals(blocked)
        self._exact = value
        if self.number() != before:
            self.numberChanged.emit(self.number())

    def _on_change(self, _: float) -> None:
        self._exact = None
        self.numberChanged.emit(self.number())

    def bounds(self) -> tuple[float, float]:
        return self._low, self._high

    def set_bounds(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        # "greater than zero" on the grid of the box
        self.setRange(10.0**-DECIMALS if 0 < low < 10.0**-DECIMALS else low, high)

    def textFromValue(self, value: float) -> str:
        return f"{value:.6g}"

    def valueFromText(self, text: str | None) -> float:
        number = self._parsed(text or "")
        return self.value() if number is None else number

    def validate(self, text: str | None, position: int) -> tuple[Any, str, int]:
        text = text or ""
        number = self._parsed(text)
        if number is None:
            # on the way to a number: "1e", "-", ""
            partial = re.fullmatch(r"\s*[-+]?[0-9]*\.?[0-9]*([eE][-+]?)?\s*", self._bare(text)) is not None
            state = QValidator.State.Intermediate if partial else QValidator.State.Invalid
        elif self._low <= number <= self._high:
            state = QValidator.State.Acceptable
        else:
            state = QValidator.State.Intermediate
        return state, text, position

    def _bare(self, text: str) -> str:
        return text.removesuffix(self.suffix()).strip()

    def _parsed(self, text: str) -> float | None:
        bare = self._bare(text)
        if self.specialValueText() and bare == self.specialValueText():
            return self.minimum()
        try:
            number = float(bare)
        except ValueError:
            return None
        return number if math.isfinite(number) else None

    def stepBy(self, steps: int) -> None:
        """About a tenth of the number's own size, so that one arrow serves 0.0003 and 3000."""
        if self.stepType() != ADAPTIVE:
            super().stepBy(steps)
            return
        now = self.value()
        if now == 0:
            self.setValue(steps * min(1.0, self.maximum() / 1000))
            return
        step = 10.0 ** math.floor(math.log10(abs(now)))
        if abs(now) < 2 * step:
            step /= 10
        self.setValue(round(now / step + steps) * step)

    def changeEvent(self, event: QEvent | None) -> None:
        super().changeEvent(event)
        if event is not None and event.type() == QEvent.Type.ParentChange:
            self.parentChanged.emit(self.parent())


class _Backend(protocols.RangedWidgetProtocol):
    """What magicgui asks of a widget with a number in bounds, answered by one of the boxes above."""

    box: type[WholeBox] | type[ExactBox]

    def __init__(self, parent: QWidget | None = None, unit: str = "", zero: str = "") -> None:
        self._native = self.box(parent)
        self._zero = zero
        self._native.setSuffix(f" {unit}" if unit else "")

    def _mgui_get_value(self) -> float:
        return self._native.number()

    def _mgui_set_value(self, value: Any) -> None:
        self._native.set_number(value)

    def _mgui_bind_change_callback(self, callback: Callable[[Any], Any]) -> None:
        self._native.numberChanged.connect(callback)

    def _mgui_get_min(self) -> float:
        return self._native.bounds()[0]

    def _mgui_set_min(self, value: float) -> None:
        self._native.set_bounds(value, max(value, self._mgui_get_max()))
        # the word stands for the least value, which must be 0 then
        self._native.setSpecialValueText(self._zero if value == 0 else "")

    def _mgui_get_max(self) -> float:
        return self._native.bounds()[1]

    def _mgui_set_max(self, value: float) -> None:
        self._native.set_bounds(min(value, self._mgui_get_min()), value)

    def _mgui_get_step(self) -> float:
        return self._native.singleStep()

    def _mgui_set_step(self, value: float) -> None:
        self._native.setSingleStep(value)

    def _mgui_get_adaptive_step(self) -> bool:
        return self._native.stepType() == ADAPTIVE

    def _mgui_set_adaptive_step(self, value: bool) -> None:
        self._native.setStepType(ADAPTIVE if value else QAbstractSpinBox.StepType.DefaultStepType)

    def _mgui_close_widget(self) -> None:
        self._native.close()

    def _mgui_get_visible(self) -> bool:
        return self._native.isVisible()

    def _mgui_set_visible(self, value: bool) -> None:
        self._native.setVisible(value)

    def _mgui_get_enabled(self) -> bool:
        return self._native.isEnabled()

    def _mgui_set_enabled(self, enabled: bool) -> None:
        self._native.setEnabled(enabled)

    def _mgui_get_parent(self) -> Any:
        parent = self._native.parent()
        while parent is not None and not hasattr(parent, "_magic_widget"):
            parent = parent.parent()
        return None if parent is None else parent._magic_widget

    def _mgui_set_parent(self, widget: Any) -> None:
        self._native.setParent(widget.native if widget else None)

    def _mgui_get_native_widget(self) -> QWidget:
        return self._native

    def _mgui_get_root_native_widget(self) -> QWidget:
        return self._native

    def _mgui_bind_parent_change_callback(self, callback: Callable[[Any], None]) -> None:
        self._native.parentChanged.connect(callback)

    def _mgui_render(self) -> NDArray[np.uint8]:
        image = self._native.grab().toImage().convertToFormat(QImage.Format.Format_RGBA8888)
        bits: Any = image.constBits()
        if hasattr(bits, "setsize"):  # PyQt does not know its length
            bits.setsize(image.sizeInBytes())
        return np.frombuffer(bits, np.uint8).reshape(image.height(), image.width(), 4).copy()

    def _mgui_get_width(self) -> int:
        return self._native.width()

    def _mgui_set_width(self, value: int) -> None:
        self._native.resize(value, self._native.height())

    def _mgui_get_min_width(self) -> int:
        return self._native.minimumWidth()

    def _mgui_set_min_width(self, value: int) -> None:
        self._native.setMinimumWidth(value)

    def _mgui_get_max_width(self) -> int:
        return self._native.maximumWidth()

    def _mgui_set_max_width(self, value: int) -> None:
        self._native.setMaximumWidth(value)

    def _mgui_get_height(self) -> int:
        return self._native.height()

    def _mgui_set_height(self, value: int) -> None:
        self._native.resize(self._native.width(), value)

    def _mgui_get_min_height(self) -> int:
        return self._native.minimumHeight()

    def _mgui_set_min_height(self, value: int) -> None:
        self._native.setMinimumHeight(value)

    def _mgui_get_max_height(self) -> int:
        return self._native.maximumHeight()

    def _mgui_set_max_height(self, value: int) -> None:
        self._native.setMaximumHeight(value)

    def _mgui_get_tooltip(self) -> str:
        return self._native.toolTip()

    def _mgui_set_tooltip(self, value: str | None) -> None:
        self._native.setToolTip(value or "")


class _WholeBackend(_Backend):
    box = WholeBox


class _ExactBackend(_Backend):
    box = ExactBox


class WholeNumber(RangedWidget[int]):
    """A magicgui widget for a whole number between two bounds."""

    def __init__(self, low: int, high: int, unit: str = "", zero: str = "") -> None:
        words = {"unit": unit, "zero": zero}
        super().__init__(min=low, max=high, step=1, widget_type=_WholeBackend, backend_kwargs=words)


class Number(RangedWidget[float]):
    """A magicgui widget for a number between two bounds, kept exactly, stepped by its own size."""

    def __init__(self, low: float, high: float, unit: str = "", zero: str = "") -> None:
        words = {"unit": unit, "zero": zero}
        super().__init__(min=low, max=high, widget_type=_ExactBackend, backend_kwargs=words)

"""A form built from a class of settings: `value()`, `setValue()`, `valueChanged`.

Titles, units, bounds and help are the declaration's own. What comes out is what went in: numbers are kept
exactly, not to the digits a spin box shows.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from typing import Any, Generic, Literal, TypeVar

from pydantic.fields import FieldInfo
from qtpy.QtCore import Qt, Signal
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QLabel,
    QSizePolicy,
    QSpinBox,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import Config

C = TypeVar("C", bound=Config)


class WholeNumber(QSpinBox):
    """A whole number; the wheel changes it only after a click, so that scrolling a dock is harmless."""

    def __init__(self, low: int, high: int, unit: str, zero: str) -> None:
        super().__init__()
        self.setRange(low, high)
        self.setSuffix(f" {unit}" if unit else "")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        if zero and low == 0:
            self.setSpecialValueText(zero)

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if self.hasFocus():
            super().wheelEvent(event)
        elif event is not None:
            event.ignore()


class Number(QDoubleSpinBox):
    """A number of any size, kept exactly: 1e-4 stays 1e-4, and 182.37 does not become 182.4."""

    def __init__(self, low: float, high: float, unit: str, zero: str) -> None:
        super().__init__()
        self._exact: float | None = None
        self.setDecimals(15)
        self.setRange(low, high)
        self.setSuffix(f" {unit}" if unit else "")
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        if zero and low == 0:
            self.setSpecialValueText(zero)
        self.valueChanged.connect(self._forget)

    def number(self) -> float:
        return self.value() if self._exact is None else self._exact

    def set_number(self, value: float) -> None:
        self.setValue(value)
        self._exact = value

    def _forget(self, _: float) -> None:
        self._exact = None

    def textFromValue(self, value: float) -> str:
        return f"{value:.6g}"

    def valueFromText(self, text: str | None) -> float:
        number = self._parsed(text or "")
        return self.value() if number is None else number

    def validate(self, text: str | None, position: int) -> tuple[Any, str, int]:
        from qtpy.QtGui import QValidator

        text = text or ""
        number = self._parsed(text)
        if number is None:
            # on the way to a number: "1e", "-", ""
            partial = re.fullmatch(r"\s*[-+]?[0-9]*\.?[0-9]*([eE][-+]?)?\s*", self._bare(text)) is not None
            state = QValidator.State.Intermediate if partial else QValidator.State.Invalid
        elif self.minimum() <= number <= self.maximum():
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
        now = self.value()
        if now == 0:
            self.setValue(steps * min(1.0, self.maximum() / 1000))
            return
        step = 10.0 ** math.floor(math.log10(abs(now)))
        size = abs(now)
        if size < 2 * step:
            step /= 10
        self.setValue(round(now / step + steps) * step)

    def wheelEvent(self, event: QWheelEvent | None) -> None:
        if self.hasFocus():
            super().wheelEvent(event)
        elif event is not None:
            event.ignore()


class Folded(QWidget):
    """A part that is folded away behind one line of text."""

    def __init__(self, title: str, content: QWidget, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.button = QToolButton()
        self.button.setText(title)
        self.button.setCheckable(True)
        self.button.setAutoRaise(True)
        self.button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.button.setArrowType(Qt.ArrowType.RightArrow)
        self.button.setToolTip(f"Show or hide: {title}")
        self.content = content
        content.setVisible(False)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addWidget(self.button)
        layout.addWidget(content)
        self.button.toggled.connect(self._show)

    def _show(self, shown: bool) -> None:
        self.button.setArrowType(Qt.ArrowType.DownArrow if shown else Qt.ArrowType.RightArrow)
        self.content.setVisible(shown)


class ConfigForm(QWidget, Generic[C]):
    """The settings of one `Config` class: the ones that matter in front, the rest folded away."""

    valueChanged = Signal()

    def __init__(
        self, config: type[C], parent: QWidget | None = None, *, advanced_title: str = "Advanced"
    ) -> None:
        super().__init__(parent)
        self._config = config
        self._editors: dict[str, QWidget] = {}
        self._helps: dict[str, str] = {}
        self._constant: dict[str, Any] = {}
        front, folded = _rows(self), _rows()
        for name, field in config.model_fields.items():
            self._add(name, field, front, folded)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(front)
        self.advanced: Folded | None = None
        if folded.rowCount():
            content = QWidget()
            content.setLayout(folded)
            self.advanced = Folded(advanced_title, content)
            layout.addWidget(self.advanced)
        self.setValue(config())

    def _add(self, name: str, field: FieldInfo, front: QFormLayout, folded: QFormLayout) -> None:
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        editor = _editor(field, str(extra.get("unit", "")), str(extra.get("zero", "")))
        if editor is None:
            self._constant[name] = field.get_default()
            return
        help_text = inspect.cleandoc(field.description or "")
        title = QLabel(field.title or name)
        for part in (title, editor):
            part.setToolTip(_wrapped(help_text))
        editor.setObjectName(name)
        editor.setAccessibleName(field.title or name)
        self._editors[name], self._helps[name] = editor, help_text
        rows = folded if extra.get("advanced") else front
        if isinstance(editor, QCheckBox):
            editor.setText(field.title or name)
            rows.addRow(editor)
        else:
            rows.addRow(title, editor)
        if isinstance(editor, QCheckBox):
            editor.toggled.connect(self._changed)
        elif isinstance(editor, QComboBox):
            editor.currentIndexChanged.connect(self._changed)
        elif isinstance(editor, QSpinBox | QDoubleSpinBox):
            editor.setKeyboardTracking(False)
            editor.valueChanged.connect(self._changed)

    def _changed(self, *_: object) -> None:
        self.valueChanged.emit()

    def editor(self, name: str) -> QWidget:
        """The control of one setting."""
        return self._editors[name]

    def value(self) -> C:
        values = {name: _read(editor) for name, editor in self._editors.items()}
        return self._config(**values, **self._constant)

    def setValue(self, config: C) -> None:
        """Show these settings; tells `valueChanged` once if anything is different."""
        before = None if not self._editors else {n: _read(e) for n, e in self._editors.items()}
        for name, editor in self._editors.items():
            blocked = editor.blockSignals(True)
            _write(editor, getattr(config, name))
            editor.blockSignals(blocked)
        if {n: _read(e) for n, e in self._editors.items()} != before:
            self.valueChanged.emit()

    def set_applicable(self, name: str, applicable: bool, reason: str = "") -> None:
        """Switch a control off where it has no meaning; hovering says why."""
        editor = self._editors[name]
        editor.setEnabled(applicable)
        editor.setToolTip(_wrapped(self._helps[name] if applicable else reason))


def _rows(parent: QWidget | None = None) -> QFormLayout:
    rows = QFormLayout()
    rows.setContentsMargins(0, 0, 0, 0)
    rows.setVerticalSpacing(4)
    rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    return rows


def _editor(field: FieldInfo, unit: str, zero: str) -> QWidget | None:
    """The control for one field, chosen by its type; None for a field with a single possible value."""
    kind = field.annotation
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if len(choices) == 1:
            return None
        combo = QComboBox()
        for choice in choices:
            combo.addItem(str(choice).replace("-", " "), choice)
        combo.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        return combo
    if kind is bool:
        return QCheckBox()
    low, high = _bounds(field)
    if kind is int:
        return WholeNumber(int(low), int(high), unit, zero)
    if kind is float:
        return Number(low, high, unit, zero)
    raise TypeError(f"no control for a setting of type {kind}")


def _bounds(field: FieldInfo) -> tuple[float, float]:
    low, high = -math.inf, math.inf
    for bound in field.metadata:
        for attribute, value in ((a, getattr(bound, a, None)) for a in ("ge", "gt", "le", "lt")):
            if value is None:
                continue
            if attribute in ("ge", "gt"):
                low = value if attribute == "ge" else math.nextafter(value, math.inf)
            else:
                high = value if attribute == "le" else math.nextafter(value, -math.inf)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise TypeError(f"setting {field.title!r} has no bounds, which a form needs")
    if field.annotation is float and low != 0 and abs(low) < 1e-15:
        low = 1e-15  # "greater than zero" on the grid of what a spin box can hold
    return low, high


def _read(editor: QWidget) -> Any:
    if isinstance(editor, QCheckBox):
        return editor.isChecked()
    if isinstance(editor, QComboBox):
        return editor.currentData()
    if isinstance(editor, Number):
        return editor.number()
    assert isinstance(editor, QSpinBox)
    return editor.value()


def _write(editor: QWidget, value: Any) -> None:
    if isinstance(editor, QCheckBox):
        editor.setChecked(value)
    elif isinstance(editor, QComboBox):
        editor.setCurrentIndex(editor.findData(value))
    elif isinstance(editor, Number):
        editor.set_number(value)
    else:
        assert isinstance(editor, QSpinBox)
        editor.setValue(value)


def _wrapped(text: str) -> str:
    """Tooltips wrap only as rich text."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "")
    return f"<p>{escaped}</p>" if text else ""


def command_line(prefix: str, config: Config) -> list[str]:
    """The options that make a worker process use these settings: `--prefix.name value` where not default."""
    arguments: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        constant = (
            typing.get_origin(field.annotation) is Literal and len(typing.get_args(field.annotation)) == 1
        )
        if constant:
            arguments += [f"--{prefix}.{name.replace('_', '-')}", str(value)]
        elif value != field.get_default():
            written = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += [f"--{prefix}.{name.replace('_', '-')}", written]
    return arguments

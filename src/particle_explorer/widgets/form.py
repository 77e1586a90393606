"""A form built from a class of settings: `value()`, `setValue()`, `valueChanged`.

One magicgui widget per field, chosen by its type. Titles, units, bounds and help are the declaration's own.
What comes out is what went in: numbers are kept exactly, not to the digits a spin box shows.
"""

from __future__ import annotations

import inspect
import math
import re
import typing
from typing import Any, Generic, Literal, TypeVar

from magicgui.widgets import CheckBox, ComboBox
from magicgui.widgets.bases import ValueWidget
from pydantic.fields import FieldInfo
from qtpy.QtCore import QEvent, QObject, Qt, QTimer, Signal
from qtpy.QtWidgets import (
    QComboBox,
    QFormLayout,
    QLabel,
    QScrollArea,
    QSizePolicy,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import Config
from particle_explorer.widgets.number_box import Number, WholeNumber

C = TypeVar("C", bound=Config)

CHOICES = {
    "auto": "automatic",
    "umap": "UMAP",
    "tsne": "t-SNE",
    "pca": "principal components",
    "kmeans": "k-means",
    "gmm": "Gaussian mixture",
    "hdbscan": "HDBSCAN",
    "ward": "Ward",
    "component": "principal component",
    "straight": "straight line",
    "particles": "by way of particles",
    "prior": "samples from the prior",
    "wiener": "Wiener filter",
    "gaussian": "Gaussian",
    "gaussian-learned": "Gaussian, learned variance",
    "bernoulli": "Bernoulli",
}
"""What forms call the values that the command line has short names for."""


class CalmWheel(QObject):
    """The wheel changes a control only after a click into it, so that scrolling a dock is harmless."""

    def eventFilter(self, watched: QObject | None, event: QEvent | None) -> bool:
        if (
            event is not None
            and event.type() == QEvent.Type.Wheel
            and isinstance(watched, QWidget)
            and not watched.hasFocus()
        ):
            event.ignore()  # for the scroll area around
            return True
        return False


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
        self._later = QTimer(self)  # when it has been laid out
        self._later.setSingleShot(True)
        self._later.setInterval(30)
        self._later.timeout.connect(self._into_view)

    def _into_view(self) -> None:
        """Scroll so far that the whole part is seen, at least its beginning."""
        area: QWidget | None = self
        while area is not None and not isinstance(area, QScrollArea):
            area = area.parentWidget()
        if isinstance(area, QScrollArea):
            area.ensureWidgetVisible(self.content, 0, 4)
            area.ensureWidgetVisible(self.button, 0, 4)

    def _show(self, shown: bool) -> None:
        if shown and self.isVisible():
            self._later.start()
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
        self._editors: dict[str, ValueWidget[Any]] = {}
        self._wheel = CalmWheel(self)
        self._labels: dict[str, QLabel] = {}
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
        title = field.title or name
        editor.name, editor.label, editor.tooltip = name, title, _wrapped(help_text)
        native: QWidget = editor.native
        native.setObjectName(name)
        native.setAccessibleName(title)
        native.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        native.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        native.installEventFilter(self._wheel)
        self._editors[name], self._helps[name] = editor, help_text
        rows = folded if extra.get("advanced") else front
        if isinstance(editor, CheckBox):
            editor.text = title
            rows.addRow(native)
        else:
            label = QLabel(title)
            label.setToolTip(editor.tooltip)
            rows.addRow(label, native)
            self._labels[name] = label
        editor.changed.connect(self._changed)

    def _changed(self, *_: object) -> None:
        self.valueChanged.emit()

    def editor(self, name: str) -> ValueWidget[Any]:
        """The magicgui widget of one setting; its Qt control is `native`."""
        return self._editors[name]

    def _values(self) -> dict[str, Any]:
        return {name: editor.value for name, editor in self._editors.items()}

    def value(self) -> C:
        return self._config(**self._values(), **self._constant)

    def setValue(self, config: C) -> None:
        """Show these settings; tells `valueChanged` once if anything is different."""
        before = self._values()
        for name, editor in self._editors.items():
            with editor.changed.blocked():
                editor.value = getattr(config, name)
        if self._values() != before:
            self.valueChanged.emit()

    def show_row(self, name: str, shown: bool, zero: str) -> None:
        """Show or hide a number that is asked for only sometimes, and say what 0 means then."""
        editor = self._editors[name]
        self._labels[name].setVisible(shown)
        editor.native.setVisible(shown)
        editor.native.setSpecialValueText(zero)

    def set_applicable(self, name: str, applicable: bool, reason: str = "") -> None:
        """Switch a control off where it has no meaning; hovering says why."""
        editor = self._editors[name]
        editor.enabled = applicable
        editor.tooltip = _wrapped(self._helps[name] if applicable else reason)


def _rows(parent: QWidget | None = None) -> QFormLayout:
    rows = QFormLayout()
    rows.setContentsMargins(0, 0, 0, 0)
    rows.setVerticalSpacing(4)
    rows.setFieldGrowthPolicy(QFormLayout.FieldGrowthPolicy.AllNonFixedFieldsGrow)
    return rows


def _editor(field: FieldInfo, unit: str, zero: str) -> ValueWidget[Any] | None:
    """The widget for one field, chosen by its type; None for a field with a single possible value."""
    kind = field.annotation
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if len(choices) == 1:
            return None
        words = [choice_words(choice) for choice in choices]
        box = ComboBox(choices=list(zip(words, choices, strict=True)))
        # as wide as there is room, or one long choice would push the form beyond the edge of its column
        box.native.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        box.native.setMinimumContentsLength(min(8, *map(len, words)))
        return box
    if kind is bool:
        return CheckBox()
    low, high = _bounds(field)
    if kind is int:
        return WholeNumber(int(low), int(high), unit, zero)
    if kind is float:
        return Number(low, high, unit, zero)
    raise TypeError(f"no control for a setting of type {kind}")


def choice_words(choice: object) -> str:
    """One of several values as people write it."""
    return CHOICES.get(str(choice), str(choice).replace("-", " "))


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
    return low, high


def _wrapped(text: str) -> str:
    """Tooltips wrap only as rich text."""
    named = re.sub("`([^`]*)`", lambda found: CHOICES.get(found[1], found[1]), text)
    escaped = named.replace("&", "&amp;").replace("<", "&lt;")
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

"""Which particles of a stack are taken: those of a class, a few at random, or all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QComboBox, QHBoxLayout, QSizePolicy, QSpinBox, QVBoxLayout, QWidget

from particle_explorer.widgets.looking import MAX_CHOICES, is_number

COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


class PartOfStack(QWidget):
    """Two boxes to tick, each with its row; all particles while neither is."""

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self._columns: Mapping[str, Sequence[str]] = {}
        self.subset = QCheckBox("Only particles where")
        self.subset.setToolTip(
            "<p>Explore inside one class: a map of particles seen from different sides learns the viewing"
            " direction first.</p>"
        )
        self.column, self.comparison, self.subset_value = QComboBox(), QComboBox(), QComboBox()
        self.comparison.addItems(COMPARISONS)
        self.subset_value.setEditable(True)
        self.column.setToolTip("Column of the particle file")
        self.comparison.setToolTip("Comparison")
        self.subset_value.setToolTip("Value to compare with")
        for combo in (self.column, self.subset_value):
            combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
            combo.setMinimumContentsLength(6)
            combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.subset.toggled.connect(self._on_subset)
        self.column.currentTextChanged.connect(self._on_column)
        self.comparison.currentTextChanged.connect(self._tell)
        self.subset_value.currentTextChanged.connect(self._tell)
        self.subset_row = QWidget()
        row = QHBoxLayout(self.subset_row)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.column, 3)
        row.addWidget(self.comparison)
        row.addWidget(self.subset_value, 2)
        self.sample = QSpinBox()
        self.sample.setRange(1, 10_000_000)
        self.sample.setValue(10_000)
        self.sample.setSingleStep(1000)
        self.sample.setPrefix("at most ")
        self.sample.setToolTip("Particles that are taken at most")
        self.random = QCheckBox("Only some, at random")
        self.random.setToolTip("A first look at a large stack is quick with a part of it")
        self.sample_by = QComboBox()
        self.sample_by.setToolTip("At random of all particles, or as many of each value of a column")
        self.sample_by.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.sample_by.setMinimumContentsLength(8)
        self.sample_row = QWidget()
        row = QHBoxLayout(self.sample_row)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.sample, 1)
        row.addWidget(self.sample_by, 1)
        self.random.toggled.connect(self.sample_row.setVisible)
        self.random.toggled.connect(self._tell)
        self.sample.valueChanged.connect(self._tell)
        self.sample_by.currentIndexChanged.connect(self._tell)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(5)
        for part in (self.subset, self.subset_row, self.random, self.sample_row):
            layout.addWidget(part)
        self.subset_row.setVisible(False)
        self.sample_row.setVisible(False)

    def offer(self, columns: Mapping[str, Sequence[str]]) -> None:
        """Columns of another file with their values; all its particles are taken at first."""
        self._columns = columns
        self.column.clear()
        self.column.addItems(list(columns))
        if "class_id" in columns:
            self.column.setCurrentText("class_id")
        self.sample_by.clear()
        self.sample_by.addItem("of all", "")
        for name, values in columns.items():
            if 1 < len(values) < MAX_CHOICES:
                self.sample_by.addItem(f"of each {name}", name)
        self.subset.setChecked(False)
        self.random.setChecked(False)

    def taken(self) -> tuple[int, str]:
        """At most so many at random, 0 for all; and the column of whose values each gives as many."""
        if not self.random.isChecked():
            return 0, ""
        return self.sample.value(), str(self.sample_by.currentData() or "")

    def where(self) -> str:
        """The subset as `COLUMN OP VALUE`; empty takes all particles."""
        value = self.subset_value.currentText().strip()
        if not self.subset.isChecked() or not value:
            return ""
        if not is_number(value):
            value = f'"{value}"'
        return f"{self.column.currentText()} {self.comparison.currentText()} {value}"

    def _on_subset(self, wanted: bool) -> None:
        self.subset_row.setVisible(wanted)
        self.changed.emit()

    def _on_column(self, name: str) -> None:
        self.subset_value.clear()
        self.subset_value.addItems(list(self._columns.get(name, ())))
        self.changed.emit()

    def _tell(self, *_: object) -> None:
        self.changed.emit()

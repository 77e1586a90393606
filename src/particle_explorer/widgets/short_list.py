"""A list that takes no more room than its rows."""

from __future__ import annotations

from qtpy.QtCore import QSize
from qtpy.QtWidgets import QListWidget, QSizePolicy, QWidget


class ShortList(QListWidget):
    """As high as its rows, `most` of them at most; beyond that it scrolls."""

    def __init__(self, most: int, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._most = most
        self.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
        model = self.model()
        for signal in (model.rowsInserted, model.rowsRemoved, model.modelReset):
            signal.connect(self._on_rows)

    def _on_rows(self, *_: object) -> None:
        self.updateGeometry()

    def sizeHint(self) -> QSize:
        row = max(self.sizeHintForRow(0), self.fontMetrics().height())
        margins = self.contentsMargins()
        frame = 2 * self.frameWidth() + margins.top() + margins.bottom()
        return QSize(super().sizeHint().width(), min(max(self.count(), 1), self._most) * row + frame)

    def minimumSizeHint(self) -> QSize:
        return QSize(super().minimumSizeHint().width(), self.sizeHint().height())

"""What made a picture: which particles, which poses, which settings, in words that can be copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QDialog, QDialogButtonBox, QPlainTextEdit, QVBoxLayout, QWidget

from particle_explorer.state import AppState
from particle_explorer.widgets.job_bar import number

if TYPE_CHECKING:
    import napari

TITLE = "What made this picture?"
NOTHING = "Nothing is written down with this layer."
PARTICLE = ("stack_path", "stack_index", "angle_deg", "shift_y_px", "shift_x_px")
"""Columns that say which image a particle's picture is made of, and how it is moved back."""


def provenance_words(record: Mapping[str, Any]) -> str:
    """A line for every entry; entries that hold others are indented, lists stand in one line."""
    return "\n".join(_lines(record, "")) or NOTHING


def _lines(record: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for name, value in record.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, f"{indent}  ")]
            continue
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, list | tuple):
            count = f" ({number(len(value))})" if len(value) > 4 else ""
            lines.append(f"{indent}{name}{count}: {', '.join(map(_word, value))}")
        elif value not in ("", None):
            lines.append(f"{indent}{name}: {_word(value)}")
    return lines


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_word, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def pictures_record(state: AppState, view: str, rows: NDArray[np.intp]) -> dict[str, Any]:
    """What made the pictures of some particles, as they are shown in `view`."""
    session, run = state.session, state.run
    assert session is not None
    return {
        "session": str(session.path),
        "run": "" if run is None else str(run.path),
        "pictures": view,
        "poses": "" if run is None else "held" if state.held else "run",
        "prepared": str(session.path / "session.json"),
        "uid": session.uid[rows],
    }


def particle_record(state: AppState, view: str, row: int) -> dict[str, Any]:
    """What made the picture of one particle: where its image lies, its pose and its position too."""
    features = state.features
    of = {
        name: features[name].iloc[row] for name in features if str(name) in PARTICLE or _is_place(str(name))
    }
    record = {**pictures_record(state, view, np.array([row])), "particle": row + 1}
    if "stack_path" in of and "stack_index" in of:
        record["image"] = f"number {int(of.pop('stack_index')) + 1} of {of.pop('stack_path')}"
    return {**record, **{str(name): value for name, value in of.items()}}


def _is_place(name: str) -> bool:
    return name.startswith("z_") and name[2:].isdigit()


class ProvenanceDialog(QDialog):
    """The record of one picture, to read and to copy."""

    def __init__(self, parent: QWidget | None, of: str, record: Mapping[str, Any]) -> None:
        super().__init__(parent)
        self.setWindowTitle(f"What made: {of}")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        self.text = QPlainTextEdit(provenance_words(record))
        self.text.setReadOnly(True)
        buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Close)
        self.copy_button = buttons.addButton("Copy", QDialogButtonBox.ButtonRole.ActionRole)
        self.copy_button.clicked.connect(self.copy)
        buttons.rejected.connect(self.close)
        layout = QVBoxLayout(self)
        layout.addWidget(self.text)
        layout.addWidget(buttons)
        self.resize(560, 300)

    def copy(self) -> None:
        """Put the words onto the clipboard."""
        clipboard = QApplication.clipboard()
        if clipboard is not None:
            clipboard.setText(self.text.toPlainText())


def show_provenance(parent: QWidget | None, of: str, record: Mapping[str, Any]) -> ProvenanceDialog:
    """Open the record of a picture; nothing waits meanwhile."""
    dialog = ProvenanceDialog(parent, of, record)
    dialog.show()
    return dialog


def show_layer_provenance(viewer: napari.Viewer) -> None:
    """What made the layer that is chosen: napari's menu Layers > Metadata."""
    layer = viewer.layers.selection.active
    if layer is None:
        viewer.status = "Choose one layer first, then ask what made it"
        return
    record = dict(layer.metadata)
    source = getattr(layer.source, "path", None)
    if source:
        record = {"file": str(source), **record}
    show_provenance(viewer.window._qt_window, layer.name, record)

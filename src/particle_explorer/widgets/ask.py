"""Asking for a file or a folder without stopping the window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QFileDialog, QWidget


def ask_path(
    parent: QWidget,
    title: str,
    chosen: Callable[[str], object],
    *,
    kind: Literal["open", "save", "folder"] = "open",
    start: str = "",
    patterns: str = "",
) -> QFileDialog:
    """Show the system's dialog; `chosen` gets the path when there is one. Nothing waits meanwhile."""
    dialog = QFileDialog(parent, title, start, patterns)
    if kind == "save":
        dialog.setAcceptMode(QFileDialog.AcceptMode.AcceptSave)
        dialog.setOption(QFileDialog.Option.DontConfirmOverwrite)  # the docks ask, for all files at once
    elif kind == "folder":
        dialog.setFileMode(QFileDialog.FileMode.Directory)
        dialog.setOption(QFileDialog.Option.ShowDirsOnly)
    else:
        dialog.setFileMode(QFileDialog.FileMode.ExistingFile)
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
    dialog.fileSelected.connect(chosen)
    dialog.open()
    return dialog


def ask_paths(
    parent: QWidget, title: str, chosen: Callable[[list[str]], object], *, patterns: str = ""
) -> QFileDialog:
    """The same for one file or several; `chosen` gets all paths."""
    dialog = QFileDialog(parent, title, "", patterns)
    dialog.setFileMode(QFileDialog.FileMode.ExistingFiles)
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
    dialog.filesSelected.connect(chosen)
    dialog.open()
    return dialog

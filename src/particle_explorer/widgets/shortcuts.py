"""The list of keys and mouse buttons."""

from __future__ import annotations

from qtpy.QtCore import Qt
from qtpy.QtGui import QIcon
from qtpy.QtWidgets import QDialog, QDialogButtonBox, QLabel, QScrollArea, QVBoxLayout, QWidget

SHORTCUTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "On the map",
        (
            ("D", "handle: click or drag to move ◉"),
            ("L · R · O", "lasso · rectangle · ellipse"),
            ("P, space, middle button", "move the view"),
            ("wheel", "zoom; over an axis only that axis"),
            ("double click", "show the whole map"),
            ("right click", "select by neighbours, micrograph or group"),
            ("click a name in the legend", "select that group"),
        ),
    ),
    (
        "The selection",
        (
            ("Shift · Alt or Ctrl · both", "add · take away · keep the overlap"),
            ("Esc · I", "clear · invert"),
            ("Ctrl+Z · Ctrl+Shift+Z", "undo · redo"),
            ("S", "save it as a set"),
            ("C", "lay out or group the particles, in the tab Explore"),
            ("A · E", "average it · export"),
        ),
    ),
    (
        "The handle",
        (
            ("arrow keys", "one step, with Shift ten"),
            ("Enter", "to the nearest particle"),
        ),
    ),
    (
        "Particles in the gallery and in the layer",
        (
            ("click · Shift · Alt", "look at it · select it too · take it away"),
            ("drag", "select all that it passes"),
            ("arrow keys, wheel", "on and back"),
            ("V", "show particles in the next way: as prepared, low-passed, aligned …"),
            ("M", "show the selected ones on their micrograph, and back"),
            ("G · B", "mark the one looked at as good · bad; they are sets of these names"),
        ),
    ),
)


def shortcut_text() -> str:
    """The list as rich text."""
    parts = []
    for title, lines in SHORTCUTS:
        rows = "".join(
            f"<tr><td style='padding-right:14px'><b>{keys}</b></td><td>{does}</td></tr>"
            for keys, does in lines
        )
        parts.append(f"<p style='margin-bottom:2px'><u>{title}</u></p><table>{rows}</table>")
    return "".join(parts)


def show_shortcuts(parent: QWidget) -> QDialog:
    """Show the list; nothing waits for it to be closed."""
    dialog = QDialog(parent)
    dialog.setWindowTitle("Shortcuts")
    dialog.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
    words = QLabel(shortcut_text())
    words.setTextFormat(Qt.TextFormat.RichText)
    words.setMargin(8)
    words.setWordWrap(True)
    area = QScrollArea()
    area.setWidget(words)
    area.setWidgetResizable(True)
    area.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    buttons = QDialogButtonBox(QDialogButtonBox.StandardButton.Close)
    buttons.rejected.connect(dialog.close)
    for button in buttons.buttons():
        button.setIcon(QIcon())  # the style's own is black, on dark too
    layout = QVBoxLayout(dialog)
    layout.addWidget(area)
    layout.addWidget(buttons)
    dialog.resize(640, 620)
    dialog.show()
    return dialog

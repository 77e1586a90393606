"""The menu of the map: selecting particles by what they are, rather than by drawing around them."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QPoint, Qt, Signal
from qtpy.QtWidgets import QApplication, QHBoxLayout, QLabel, QMenu, QSpinBox, QWidget, QWidgetAction

from particle_explorer.state import AppState, Mask
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.latent_axes import Columns
from particle_explorer.widgets.picking import groups, micrographs, nearest, same
from particle_explorer.widgets.pictures import best_view
from particle_explorer.widgets.provenance import TITLE, particle_record, show_provenance


class SelectMenu(QMenu):
    """Filled whenever it opens: under a button, or under the mouse with the particle that was clicked.

    `seen` tells the columns that the map shows now and the one it is coloured by.
    """

    picked = Signal(object, Qt.KeyboardModifier)
    """a mask of particles, and the keys that were held down"""
    look_asked = Signal()
    help_asked = Signal()

    def __init__(
        self,
        state: AppState,
        seen: Callable[[], tuple[Columns, str | None]],
        failed: Callable[[Failure], None],
        parent: QWidget,
    ) -> None:
        super().__init__(parent)
        self.state = state
        self.n_nearest = 100
        self._seen, self._failed = seen, failed
        self._row: int | None = None
        self._tasks = Tasks(self)
        self.setToolTipsVisible(True)
        self.aboutToShow.connect(self._fill)

    def pop_up(self, row: int | None, where: QPoint) -> None:
        """Open at a place of the screen, `row` being the particle that was clicked."""
        self._row = row
        self.popup(where)
        self._row = None

    def stop(self) -> None:
        """Let what is still being sought fall on the floor."""
        self._tasks.stop()

    def _fill(self) -> None:
        self.fill(self._row)

    def fill(self, row: int | None) -> None:
        """Everything that can be selected, `row` being the particle that was clicked."""
        self.clear()
        columns, colour = self._seen()
        selection, features = self.state.selection, self.state.features
        n, marked = selection.count, selection.active if row is None else row
        has_map = columns.n_dims > 0 and len(columns.features) == selection.mask.size
        if row is not None:
            self.addSection(f"particle {number(row + 1)}")
        self._add_k()
        k = number(self.n_nearest)
        near = self.state.handle_z
        self._offer(
            f"The {k} nearest to ◉",
            lambda: self._pick_nearest(columns, near),
            has_map and near.size == columns.n_dims,
            "Particles whose positions on the map (all its dimensions) are nearest to the handle",
        )
        there = has_map and marked is not None and bool(np.isfinite(columns.z[marked]).all())
        self._offer(
            f"The {k} most like this one",
            lambda: self._pick_nearest(columns, columns.z[marked]),
            there,
            "Particles nearest on the map to the one clicked or looked at",
        )
        from_rows = np.array([marked]) if row is not None or not n else selection.rows
        able = row is not None or n > 0 or marked is not None
        micrograph = micrographs(features)
        self._offer(
            "The same micrograph",
            lambda: self._pick_same(str(micrograph), from_rows),
            able and micrograph is not None,
            "All particles of the micrographs of these particles"
            if micrograph
            else "The file names no micrographs, or one for all",
        )
        group = groups(features, colour)
        self._offer(
            "The same group" + (f" ({title_of(group)})" if group else ""),
            lambda: self._pick_same(str(group), from_rows),
            able and group is not None,
            "All particles of the groups of these particles; or click a group in the legend"
            if group
            else "There are no groups yet: make some in the tab Explore (C)",
        )
        self.addSeparator()
        everything = np.ones(selection.mask.size, bool)
        self._offer("All", lambda: selection.set(everything), n < everything.size, "")
        self._offer("Invert", selection.invert, everything.size > 0, "What is not selected now", "I")
        self._offer("Clear", selection.clear, n > 0, "Select nothing; undo brings it back", "Esc")
        self._offer("Undo", selection.undo, selection.can_undo, "The selection before this one", "Ctrl+Z")
        self._offer("Redo", selection.redo, selection.can_redo, "", "Ctrl+Shift+Z")
        self.addSeparator()
        self._offer(
            "Train again on the selected particles",
            self.state.train_asked.emit,
            n > 0 and self.state.session is not None,
            "A new run on these particles alone, with the settings of the tab Train; it remembers this run",
        )
        if row is not None:
            self._offer(
                TITLE,
                lambda: self._show_what_made(row),
                self.state.session is not None and self.state.session.has_images,
                "Which image, pose, position and settings made the picture of this particle beside the mouse",
            )
        there = self.state.preview is not None
        self._offer(
            "What made the preview average?",
            self._show_what_made,
            there,
            "Which particles, poses and settings made the average that forms beside the lasso"
            if there
            else "Select particles: their average forms beside the lasso and stays in the gallery",
        )
        self._offer("Points and density…", self.look_asked.emit, True, "Size and strength of the points")
        self._offer("Shortcuts…", self.help_asked.emit, True, "What keys and mouse do on the map", "F1")

    def _show_what_made(self, row: int | None = None) -> None:
        """What made the picture of a particle, or the preview average."""
        if row is not None and self.state.session is not None:
            record = particle_record(self.state, best_view(self.state, self.state.view), row)
            show_provenance(self.parentWidget(), f"the picture of particle {number(row + 1)}", record)
        elif row is None and self.state.preview is not None:
            show_provenance(self.parentWidget(), "preview average", self.state.preview.made)

    def _offer(self, words: str, does: Callable[[], object], able: bool, tip: str, keys: str = "") -> None:
        action = self.addAction(words + (f"\t{keys}" if keys else ""))
        action.setToolTip(tip)
        action.setEnabled(able)
        action.triggered.connect(lambda *_: does())

    def _add_k(self) -> None:
        page = QWidget()
        row = QHBoxLayout(page)
        row.setContentsMargins(20, 2, 8, 2)
        row.addWidget(QLabel("neighbours"))
        spin = QSpinBox()
        spin.setRange(1, max(1, self.state.selection.mask.size))
        spin.setValue(min(self.n_nearest, spin.maximum()))
        spin.setToolTip("How many particles the two lines below select")
        spin.valueChanged.connect(self._set_n_nearest)
        row.addWidget(spin, 1)
        action = QWidgetAction(self)
        action.setDefaultWidget(page)
        self.addAction(action)

    def _set_n_nearest(self, k: int) -> None:
        self.n_nearest = k
        for action in self.actions():
            action.setText(re.sub(r"^The [\d\u202f]+ ", f"The {number(k)} ", action.text()))

    def _pick_nearest(self, columns: Columns, z: NDArray[np.floating]) -> None:
        k = self.n_nearest
        self._pick(lambda: nearest(columns.z, z, k))

    def _pick_same(self, column: str, rows: NDArray[np.intp]) -> None:
        values = self.state.features[column]
        self._pick(lambda: same(values, rows))

    def _pick(self, work: Callable[[], Mask]) -> None:
        modifiers = QApplication.keyboardModifiers()

        def done(mask: Mask) -> None:
            if mask.size == self.state.selection.mask.size:
                self.picked.emit(mask, modifiers)

        self._tasks.run("pick", work, done, self._failed)

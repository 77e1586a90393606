"""The row of buttons below the map, and what takes its place: naming a set, the look of the points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QSlider,
    QStackedWidget,
    QWidget,
)

from particle_explorer.state import AppState
from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.job_bar import Complaint
from particle_explorer.widgets.latent_plot import ScatterCanvas
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.select_menu import SelectMenu


class MapActions(QStackedWidget):
    """What one does with a selection; `origin` says in words where a selection was made."""

    def __init__(
        self,
        state: AppState,
        canvas: ScatterCanvas,
        menu: SelectMenu,
        complaint: Complaint,
        origin: Callable[[], str],
    ) -> None:
        super().__init__()
        self.state = state
        self._canvas, self._complaint, self._origin = canvas, complaint, origin
        self._tasks = Tasks(self)
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.groups_button = QPushButton("Layouts, groups…")
        self.save_button = QPushButton("Save set…")
        self.select_button = QPushButton("Select")
        self.select_button.setToolTip("Select all, others, neighbours, a micrograph; undo; the shortcuts")
        self.select_button.setMenu(menu)
        self.groups_button.clicked.connect(self.ask_groups)
        self.save_button.clicked.connect(self.ask_name)
        self._buttons = _row(self.groups_button, self.save_button, self.select_button)
        self.set_name = QLineEdit()
        self.set_name.setPlaceholderText("Name of the set")
        self.set_name.returnPressed.connect(self.save_set)
        self.confirm_save = QPushButton("Save")
        self.confirm_save.clicked.connect(self.save_set)
        self._naming = _row(self.set_name, self.confirm_save, self._back_button())
        self.look = LookRow(canvas, self._back_button())
        for page in (self._buttons, self._naming, self.look):
            self.addWidget(page)
        follow(self, state.selection.changed, self.show_able)

    def stop(self) -> None:
        """Look away from a set that is being written."""
        self._tasks.stop()

    def _back_button(self) -> QPushButton:
        button = QPushButton("Back")
        button.clicked.connect(self._back)
        return button

    def _back(self) -> None:
        self.setCurrentWidget(self._buttons)

    def show_able(self, *_: object) -> None:
        """What cannot be done now says why."""
        encoded = self.state.run is not None and self.state.handle_z.size > 0
        self.groups_button.setEnabled(encoded)
        self.groups_button.setToolTip(
            "UMAP, t-SNE, k-means and others, in the tab Explore (C)"
            if encoded
            else "There is no trained map yet"
        )
        some = self.state.selection.count > 0
        self.save_button.setEnabled(some)
        self.save_button.setToolTip(
            "Keep the selected particles under a name (S)"
            if some
            else "Nothing is selected; draw a lasso around particles first"
        )
        if not some and self.currentWidget() is self._naming:
            self._back()

    def ask_groups(self) -> None:
        """Ask for layouts and groups of the map, if there is one."""
        if self.groups_button.isEnabled():
            self.state.groups_asked.emit()

    def show_look(self) -> None:
        """Offer size and strength of the points."""
        self.setCurrentWidget(self.look)

    # ---- sets ------------------------------------------------------------------------

    def ask_name(self) -> None:
        """Ask under which name to keep the selection, if something is selected."""
        if not self.state.selection.count or self.state.session is None:
            return
        self.setCurrentWidget(self._naming)
        self.set_name.clear()
        self.set_name.setFocus()
        self._tasks.run("names", self.state.session.selections.names, self._propose)

    def _propose(self, taken: list[str]) -> None:
        """A name that is free, unless somebody has begun to type another."""
        if not self.set_name.text():
            self.set_name.setText(next(name for i in range(1, 10_000) if (name := f"set {i}") not in taken))
            self.set_name.selectAll()

    def save_set(self) -> None:
        """Keep the selection under the name that was typed."""
        session, name = self.state.session, self.set_name.text().strip()
        if session is None or not name:
            return
        mask, how = self.state.selection.mask, self._origin()

        def done(_: None) -> None:
            self._back()
            self._canvas.setFocus()
            self.state.sets_changed.emit()

        self._complaint.clear()
        self._tasks.run(
            "save set",
            lambda: session.selections.save(name, mask, how),
            done,
            self._complaint.show_failure,
        )


class LookRow(QWidget):
    """Size and strength of the points of a map, and whether their density is shown instead."""

    def __init__(self, canvas: ScatterCanvas, back: QPushButton) -> None:
        super().__init__()
        self._canvas = canvas
        self.point_size = QSlider(Qt.Orientation.Horizontal)
        self.point_size.setRange(0, 24)
        self.point_size.setToolTip("Size of the points; at the left end it follows from their number")
        self.point_size.valueChanged.connect(lambda value: canvas.set_point_size(value / 2))
        self.opacity = QSlider(Qt.Orientation.Horizontal)
        self.opacity.setRange(10, 100)
        self.opacity.setValue(100)
        self.opacity.setToolTip("Strength of the points")
        self.opacity.valueChanged.connect(lambda value: canvas.set_opacity(value / 100))
        self.density = QComboBox()
        self.density.setToolTip("Single points or how densely they lie; automatic from 300 000 points on")
        for words, mode in (("auto", "auto"), ("density", "on"), ("points", "off")):
            self.density.addItem(words, mode)
        self.density.activated.connect(self._set_density)
        _fill(self, QLabel("size"), self.point_size, QLabel("strength"), self.opacity, self.density)
        self.layout().addWidget(back)

    def _set_density(self, *_: object) -> None:
        self._canvas.set_density(self.density.currentData())

    def reset_density(self) -> None:
        """As the number of points asks for."""
        self.density.setCurrentIndex(0)
        self._set_density()

    def remembered(self) -> dict[str, Any]:
        """For `recall`."""
        picture = self._canvas.picture
        return {"density": picture.density, "point_size": picture.size_px, "opacity": picture.opacity}

    def recall(self, found: Mapping[str, Any]) -> None:
        """Show points as `remembered` said."""
        density = self.density.findData(found.get("density"))
        if density >= 0:
            self.density.setCurrentIndex(density)
            self._set_density()
        self.point_size.setValue(round(2 * float(found.get("point_size", 0))))
        self.opacity.setValue(round(100 * float(found.get("opacity", 1))))


def _row(*widgets: QWidget) -> QWidget:
    page = QWidget()
    _fill(page, *widgets)
    return page


def _fill(page: QWidget, *widgets: QWidget) -> None:
    row = QHBoxLayout(page)
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(4)
    for widget in widgets:
        row.addWidget(widget, 0 if isinstance(widget, QLabel) else 1)

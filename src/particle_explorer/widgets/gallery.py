"""The gallery: thumbnails of the selected particles in any order; picking in it selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from qtpy.QtCore import QSize, Qt
from qtpy.QtGui import (
    QImage,
)
from qtpy.QtWidgets import (
    QButtonGroup,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QSizePolicy,
    QToolButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.state import AppState, Mask, View
from particle_explorer.widgets.background import Mailbox, Tasks, in_turn
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.latent_axes import Choice, varies
from particle_explorer.widgets.lifetime import follow, follow_event
from particle_explorer.widgets.painted import to_qimage
from particle_explorer.widgets.pictures import (
    SHORT,
    TIPS,
    Decoder,
    Pictures,
    best_view,
    displayed,
    thumbnail,
    views_of,
)
from particle_explorer.widgets.plot_frame import LOOKS, look_of
from particle_explorer.widgets.preview_tile import Average
from particle_explorer.widgets.strip import EMPTY, Rows, Strip, Words

if TYPE_CHECKING:
    import napari

FILE_ORDER = ""
AT_ONCE = 16
"""Thumbnails read before they are shown."""
NOT_PREPARED = "The prepared images of this session are missing: the next training makes them again."


class Gallery(QWidget):
    """Thumbnails of the selection, or of all particles where nothing is selected; under the canvas."""

    def __init__(self, viewer: napari.Viewer | None, state: AppState, decoder: Decoder) -> None:
        super().__init__()
        self.viewer, self.state, self._decoder = viewer, state, decoder
        self.tasks = Tasks(self)
        self._pictures: Pictures | None = None
        self._mine = False  # the selection is being changed by a hand in here
        self._wanted: tuple[str, bool] | None = None
        self._mailbox = Mailbox(self, _thumbnails, self._on_thumbnails, lambda _: None, "gallery")

        self.strip = Strip()
        self.average = Average()
        self.body = QWidget()
        row = QHBoxLayout(self.body)
        row.setContentsMargins(0, 0, 0, 0)
        row.setSpacing(4)
        row.addWidget(self.average)
        row.addWidget(self.strip, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(4, 0, 4, 2)
        layout.setSpacing(2)
        layout.addLayout(self._build_head())
        layout.addWidget(self.body, 1)

        self.strip.wanted.connect(self._ask)
        self.strip.picked.connect(self._on_picked)
        self.strip.swept.connect(self._on_swept)
        self.strip.stepped.connect(self._on_stepped)
        for signal in (state.features_changed, state.run_changed, state.held_changed):
            follow(self, signal, self._on_other_pictures)
        follow(self, state.session_changed, self._on_session)
        follow(self, state.features_changed, self._offer_columns)
        follow(self, state.view_changed, self._on_view)
        follow(self, state.selection.changed, self._on_selection)
        follow(self, state.selection.active_changed, self.strip.set_active)
        follow(self, state.preview_changed, self.average.show_preview)
        if viewer is not None:
            follow_event(self, viewer.events.theme, self._on_theme)
        self._on_theme()
        self._on_session(state.session)
        self.average.show_preview(state.preview)

    def shutdown(self) -> None:
        """Stop all background work."""
        self._mailbox.stop()
        self.tasks.stop()

    def sizeHint(self) -> QSize:
        return QSize(700, 140)

    @property
    def is_folded(self) -> bool:
        return not self.fold_button.isChecked()

    def set_folded(self, folded: bool) -> None:
        """Only the line of controls, or the thumbnails too."""
        self.fold_button.setChecked(not folded)

    # --- parts ------------------------------------------------------------------------------------

    def _build_head(self) -> QHBoxLayout:
        head = QHBoxLayout()
        head.setSpacing(4)
        self.fold_button = QToolButton()
        self.fold_button.setText("Gallery")
        self.fold_button.setCheckable(True)
        self.fold_button.setChecked(True)
        self.fold_button.setAutoRaise(True)
        self.fold_button.setArrowType(Qt.ArrowType.DownArrow)
        self.fold_button.setToolButtonStyle(Qt.ToolButtonStyle.ToolButtonTextBesideIcon)
        self.fold_button.setToolTip("Fold the gallery away, or show it")
        self.fold_button.toggled.connect(self._on_folded)
        head.addWidget(self.fold_button)
        self.views = QButtonGroup(self)
        self.view_buttons: dict[View, QToolButton] = {}
        for view, words in SHORT.items():
            button = QToolButton()
            button.setText(words)
            button.setCheckable(True)
            button.setToolTip(f"<p>{TIPS[view]}. In the layer, here and under the mouse; V is the next.</p>")
            button.clicked.connect(lambda _=False, view=view: self.state.set_view(view))
            self.views.addButton(button)
            self.view_buttons[view] = button
            head.addWidget(button)
        self.words = QLabel()
        self.words.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        head.addWidget(self.words, 1)
        head.addWidget(QLabel("sort by"))
        self.sort = QComboBox()
        self.sort.setToolTip("Order of the thumbnails: any column of the particles")
        self.sort.setMinimumContentsLength(12)
        self.sort.setMaximumWidth(200)
        self.sort.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.sort.addItem("file order", FILE_ORDER)
        self.sort.activated.connect(self._arrange)
        head.addWidget(self.sort)
        self.down_button = QToolButton()
        self.down_button.setCheckable(True)
        self.down_button.setArrowType(Qt.ArrowType.UpArrow)
        self.down_button.setToolTip("Smallest first; press for largest first")
        self.down_button.toggled.connect(self._on_direction)
        head.addWidget(self.down_button)
        return head

    # --- what is open -----------------------------------------------------------------------------

    def _on_session(self, session: object) -> None:
        self.tasks.forget("order")
        self._offer_columns()
        self._on_other_pictures()
        self._on_selection(self.state.selection.mask)

    def _on_other_pictures(self, *_: object) -> None:
        self._pictures = None
        self.strip.pictures.clear()
        session = self.state.session
        has_images = session is not None and session.has_images
        self.strip.message = NOT_PREPARED if session is not None and not has_images else EMPTY
        if has_images and not self.strip.rows.size:
            self._arrange()  # a training has made them again
        there = views_of(self.state) if self.state.session is not None else []
        for view, button in self.view_buttons.items():
            button.setVisible(view in there)
        if there:
            self.view_buttons[best_view(self.state, self.state.view)].setChecked(True)
        self._ask()

    def _on_view(self, _: object) -> None:
        self._on_other_pictures()
        self.strip.viewport().update()

    def _offer_columns(self) -> None:
        features = self.state.features
        self.tasks.run("columns", lambda: in_turn(sortable, features), self._on_columns)

    def _on_columns(self, choices: list[Choice]) -> None:
        before = self.sort.currentData()
        self.sort.clear()
        self.sort.addItem("file order", FILE_ORDER)
        for choice in choices:
            self.sort.addItem(choice.title, choice.key)
        self.sort.setCurrentIndex(max(0, self.sort.findData(before)))
        wanted = self._wanted
        if wanted is not None and self.sort.findData(wanted[0]) >= 0:
            self._wanted = None
            self.sort_by(wanted[0], descending=wanted[1])
        elif before and self.sort.currentData() != before:
            self._arrange()

    def sort_by(self, key: str, *, descending: bool = False) -> None:
        """Order by a column, once it is there."""
        index = self.sort.findData(key)
        if index >= 0:
            self.sort.setCurrentIndex(index)
            self.down_button.setChecked(descending)
            self._arrange()

    def sort_when_there(self, key: str, descending: bool) -> None:
        """Order by a column now, or as soon as a table with it has been looked through."""
        self._wanted = (key, descending)
        if self.sort.findData(key) >= 0:
            self.sort_by(key, descending=descending)

    # --- order ------------------------------------------------------------------------------------

    def _on_selection(self, mask: Mask) -> None:
        self.strip.set_chosen(mask)
        if not self._mine:
            self._arrange()
        self._say()

    def _arrange(self, *_: object) -> None:
        """Show what is selected, else all; sorting is a thread's work."""
        mask, features = self.state.selection.mask, self.state.features
        session = self.state.session
        if session is None or not session.has_images:
            self.strip.set_rows(np.zeros(0, np.intp), None)
            return
        rows = np.flatnonzero(mask) if mask.any() else np.arange(mask.size)
        key, descending = self.sort.currentData() or FILE_ORDER, self.down_button.isChecked()
        if key == FILE_ORDER:
            self.tasks.forget("order")
            self.strip.set_rows(rows[::-1] if descending else rows, None)
            self._say()
            return

        def done(found: tuple[Rows, Words]) -> None:
            self.strip.set_rows(*found)
            self._say()

        self.tasks.run("order", lambda: ordered(features[key], rows, descending), done)

    def _on_direction(self, down: bool) -> None:
        self.down_button.setArrowType(Qt.ArrowType.DownArrow if down else Qt.ArrowType.UpArrow)
        self.down_button.setToolTip(
            "Largest first; press for smallest first" if down else "Smallest first; press for largest first"
        )
        self._arrange()

    def _say(self) -> None:
        shown, selected = self.strip.rows.size, self.state.selection.count
        if not shown:
            words = ""
        elif not selected:
            words = f"all {number(shown)} particles"
        elif selected == shown:
            words = f"{number(selected)} selected"
        else:
            words = f"{number(selected)} selected, {number(shown)} shown"
        self.words.setText(f"  {words}")

    # --- pictures ---------------------------------------------------------------------------------

    def _ask(self) -> None:
        session = self.state.session
        if session is None or not session.has_images or self.is_folded or not self.isVisible():
            return
        missing = [int(row) for row in self.strip.in_sight() if int(row) not in self.strip.pictures]
        if not missing:
            return
        if self._pictures is None:
            self._pictures = Pictures.of(self.state, self.state.view, self._decoder)
        self._mailbox.submit(self._pictures, np.array(missing[:AT_ONCE], np.intp))

    def _on_thumbnails(self, made: tuple[Pictures, Rows, list[QImage]]) -> None:
        pictures, rows, images = made
        if pictures is self._pictures:
            for row, image in zip(rows, images, strict=True):
                self.strip.put(int(row), image)
            self.strip.viewport().update()
        self._ask()

    def showEvent(self, event: Any) -> None:
        super().showEvent(event)
        self._ask()

    # --- hands ------------------------------------------------------------------------------------

    def _on_picked(self, index: int, modifiers: Qt.KeyboardModifier) -> None:
        row = int(self.strip.rows[index])
        one = np.zeros(self.state.selection.mask.size, bool)
        one[row] = True
        # a plain click on one that is selected only looks at it: the selection is not lost by looking
        if modifiers != Qt.KeyboardModifier.NoModifier or not self.state.selection.mask[row]:
            self._select(one, modifiers)
        self.state.selection.set_active(row)

    def _on_swept(self, first: int, last: int, modifiers: Qt.KeyboardModifier) -> None:
        some = np.zeros(self.state.selection.mask.size, bool)
        some[self.strip.rows[first : last + 1]] = True
        self._select(some, modifiers)

    def _select(self, mask: Mask, modifiers: Qt.KeyboardModifier) -> None:
        """As on the map: Shift adds, Alt or Ctrl takes away, both keep the overlap."""
        shift = bool(modifiers & Qt.KeyboardModifier.ShiftModifier)
        alt = bool(modifiers & (Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ControlModifier))
        selection = self.state.selection
        self._mine = True  # what is shown stays while one picks in it
        try:
            if shift and alt:
                selection.intersect(mask)
            elif shift:
                selection.add(mask)
            elif alt:
                selection.subtract(mask)
            else:
                selection.set(mask)
        finally:
            self._mine = False

    def _on_stepped(self, by: int) -> None:
        at = self.strip.index_of(self.state.selection.active)
        index = 0 if at is None else int(np.clip(at + by, 0, self.strip.rows.size - 1))
        if self.strip.rows.size:
            self.state.selection.set_active(int(self.strip.rows[index]))

    # --- look -------------------------------------------------------------------------------------

    def _on_folded(self, shown: bool) -> None:
        self.fold_button.setArrowType(Qt.ArrowType.DownArrow if shown else Qt.ArrowType.RightArrow)
        self.body.setVisible(shown)
        self.setMaximumHeight(16777215 if shown else self.fold_button.sizeHint().height() + 6)
        self.updateGeometry()
        self._ask()

    def _on_theme(self, *_: object) -> None:
        look = LOOKS["dark"] if self.viewer is None else look_of(self.viewer.theme)
        self.strip.look = self.average.look = look
        for button in self.view_buttons.values():
            button.setStyleSheet(f"QToolButton:checked {{ background: {look.line}; border-radius: 3px; }}")
        self.strip.viewport().update()
        self.average.update()


def _thumbnails(pictures: Pictures, rows: Rows) -> tuple[Pictures, Rows, list[QImage]]:
    """A thread's work."""
    return pictures, rows, [to_qimage(thumbnail(image)) for image in displayed(pictures.read(rows))]


def sortable(features: pd.DataFrame) -> list[Choice]:
    """The columns that a gallery can be sorted by, with their names for people."""
    return [Choice(str(name), title_of(str(name))) for name in features.columns if varies(features[name])]


def ordered(column: pd.Series, rows: Rows, descending: bool) -> tuple[Rows, Words]:
    """`rows` in the order of a column, those without a value last; and the values in words."""
    values = column.to_numpy()[rows]
    numeric = pd.api.types.is_numeric_dtype(column)
    known = np.isfinite(values.astype(float)) if numeric else ~pd.isna(values)
    order = np.argsort(values[known] if numeric else values[known].astype(str), kind="stable")
    order = np.flatnonzero(known)[order[::-1] if descending else order]
    order = np.concatenate([order, np.flatnonzero(~known)])
    return rows[order], Words(values[order], numeric)

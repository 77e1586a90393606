"""Beside the averages: their list, sorted and chosen from, what can be done with them, and their members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import QItemSelectionModel, Signal
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QListWidgetItem,
    QPushButton,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.examining import MIRRORED, compared
from particle_explorer.latents import latent_columns
from particle_explorer.preprocess import original_pixels
from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.painted import ImageRows
from particle_explorer.widgets.short_list import ShortList

if TYPE_CHECKING:
    import pandas as pd

    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Session
    from particle_explorer.state import AppState

SORTS = {
    "class": "as they are counted",
    "n": "particles, most first",
    "reach": "signal, finest first",
    "mark": "good first, bad last",
}
MEMBER_SORTS = {
    "correlation": "worst fit first",
    "error": "largest error first",
    "distance": "farthest on the map first",
    "row": "as in the file",
}
A_ROW, ROWS = 8, 2
"""Members shown at once: rows of so many."""
AT_MOST = 2000
"""Members that are looked at; of more, as many spread evenly."""


def in_order(classes: Sequence[dict[str, Any]], by: str) -> list[int]:
    """Places of averages, sorted by a key of `SORTS`."""

    def key(i: int) -> tuple[float, int]:
        one = classes[i]
        if by == "n":
            return -float(one["n"]), i
        if by == "reach":
            reach = one.get("ssnr_radius_A")
            return (math.inf if reach is None else float(reach)), i
        if by == "mark":
            return {"good": 0.0, "bad": 2.0}.get(str(one.get("mark", "")), 1.0), i
        return 0.0, i

    return sorted(range(len(classes)), key=key)


def words_of(one: dict[str, Any]) -> str:
    """An average in a line: what it is called, how many, how it was judged, what it resembles."""
    words = [str(one["label"]), f"N {number(one['n'])}"]
    if one.get("ssnr_radius_A") is not None:
        words.append(f"SSNR {one['ssnr_radius_A']:.3g} Å")
    if one.get("halves_independent") and one.get("resolution_A") is not None:
        words.append(f"resolution {one['resolution_A']:.3g} Å")
    if one.get("mark"):
        words.append(str(one["mark"]))
    if one.get("symmetry", {}).get("fold", 1) > 1:
        words.append(f"C{one['symmetry']['fold']}")
    mirror = one.get("mirror")
    if mirror and mirror["correlation"] > MIRRORED and mirror["of"] != str(one["label"]):
        words.append(f"mirror of {mirror['of']}?")
    return " · ".join(words)


class ClassTools(QWidget):
    """The list of averages: sort it, choose several, join, divide, rename and remove them."""

    current_changed = Signal(int)
    """place of the average that is looked at"""
    order_changed = Signal()
    amended = Signal(list)
    """words of the command `amend` after the session and the averages"""

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[dict[str, Any]] = []
        self.order: list[int] = []
        self.sort = QComboBox()
        for key, words in SORTS.items():
            self.sort.addItem(words, key)
        self.sort.setToolTip("In what order the averages are shown")
        self.sort.currentIndexChanged.connect(self._on_sort)
        self.list = ShortList(7)
        self.list.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.list.setToolTip("<p>Ctrl or Shift chooses several: they can be joined or removed together</p>")
        self.list.currentRowChanged.connect(self._on_row)
        self.list.itemSelectionChanged.connect(self._update)
        self.join_button = QPushButton("Join")
        self.join_button.clicked.connect(self._join)
        self.parts = QSpinBox()
        self.parts.setRange(2, 20)
        self.parts.setToolTip("Into how many parts a class is divided, by where its members lie on the map")
        self.divide_button = QPushButton("Divide in")
        self.divide_button.clicked.connect(self._divide)
        self.name = QLineEdit()
        self.name.setPlaceholderText("new name")
        self.name.setToolTip("What the class that is looked at shall be called")
        self.name.textChanged.connect(self._update)
        self.name.returnPressed.connect(self._rename)
        self.rename_button = QPushButton("Rename")
        self.rename_button.clicked.connect(self._rename)
        self.remove_button = QPushButton("Remove")
        self.remove_button.clicked.connect(self._remove)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self.sort)
        layout.addWidget(self.list)
        layout.addLayout(_row(self.join_button, self.remove_button, self.divide_button, self.parts))
        layout.addLayout(_row(self.name, self.rename_button))
        self.busy = False
        self._update()

    def show_classes(self, classes: list[dict[str, Any]]) -> None:
        """Another set of averages."""
        self.classes = classes
        self.order = in_order(classes, str(self.sort.currentData()))
        self._fill(self.order[0] if self.order else -1)

    def redraw(self, i: int) -> None:
        """Average `i` was judged: say so."""
        if i in self.order:
            self.list.item(self.order.index(i)).setText(words_of(self.classes[i]))

    def set_current(self, i: int) -> None:
        """Look at average `i`."""
        if i in self.order and self.list.currentRow() != self.order.index(i):
            self.list.setCurrentRow(self.order.index(i), QItemSelectionModel.SelectionFlag.ClearAndSelect)

    @property
    def current(self) -> int:
        """Place of the average that is looked at, -1 for none."""
        row = self.list.currentRow()
        return self.order[row] if 0 <= row < len(self.order) else -1

    @property
    def chosen(self) -> list[int]:
        """Places of the averages that are chosen."""
        return sorted(self.order[self.list.row(item)] for item in self.list.selectedItems())

    def set_busy(self, busy: bool) -> None:
        """While a set is being changed, nothing else can be."""
        self.busy = busy
        self._update()

    def _fill(self, current: int) -> None:
        self.list.blockSignals(True)
        self.list.clear()
        for i in self.order:
            self.list.addItem(QListWidgetItem(words_of(self.classes[i])))
        self.list.blockSignals(False)
        if current in self.order:
            self.list.setCurrentRow(self.order.index(current))
        self._update()

    def _on_sort(self) -> None:
        current = self.current
        self.order = in_order(self.classes, str(self.sort.currentData()))
        self._fill(current)
        self.order_changed.emit()

    def _on_row(self, row: int) -> None:
        if 0 <= row < len(self.order):
            self.current_changed.emit(self.order[row])
        self._update()

    def _labels(self, places: Sequence[int]) -> list[str]:
        return [str(self.classes[i]["label"]) for i in places]

    def _update(self) -> None:
        n, able = len(self.chosen), not self.busy
        self.join_button.setEnabled(able and n > 1)
        self.join_button.setToolTip(
            "<p>Average the chosen classes as one. The set as it is stays.</p>"
            if n > 1
            else "Choose two averages or more first (Ctrl + click in the list)"
        )
        self.remove_button.setEnabled(able and 0 < n < len(self.order))
        self.remove_button.setToolTip("Leave the chosen classes out of a new set; this one stays")
        self.divide_button.setEnabled(able and n == 1)
        self.divide_button.setToolTip("Divide the class by where its members lie on the map")
        text = self.name.text().strip()
        self.rename_button.setEnabled(able and n == 1 and bool(text) and not set(text) & set(",;="))
        self.rename_button.setToolTip("Names hold no comma, semicolon or equals sign")

    def _join(self) -> None:
        self.amended.emit(["--join", ",".join(self._labels(self.chosen))])

    def _remove(self) -> None:
        self.amended.emit(["--remove", ",".join(self._labels(self.chosen))])

    def _divide(self) -> None:
        self.amended.emit(["--divide", f"{self._labels(self.chosen)[0]}={self.parts.value()}"])

    def _rename(self) -> None:
        if self.rename_button.isEnabled():
            self.amended.emit(["--rename", f"{self._labels(self.chosen)[0]}={self.name.text().strip()}"])


@dataclass
class Loaded:
    """The members of one class, moved back, as the window looks at them."""

    set_name: str
    place: int
    uid: NDArray[np.uint64]
    images: NDArray[np.float16]
    """`(b, m, m)`"""
    weight: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    """`(b,)` correlation with the others, error, distance, row"""
    variance: NDArray[np.float32]
    residual: NDArray[np.float32] | None
    n: int
    """Members of the class, looked at or not"""


def load_members(session: Session, stored: StoredClasses, place: int, features: pd.DataFrame) -> Loaded:
    """Read the prepared images of a class and compare them with each other. A thread's work."""
    from particle_explorer.spectra import align

    own = stored.members[stored.members["average"] == place]
    n = len(own)
    if n > AT_MOST:
        own = own.iloc[np.linspace(0, n - 1, AT_MOST).astype(int)]
    rows = session.table.index.get_indexer(own.index)
    scale = 1 / original_pixels(session.table, session.plan)
    m = session.images.shape[-1]
    images = np.empty((len(own), m, m), np.float16)
    angle, shift = own["angle_deg"].to_numpy(float), own[["shift_y_px", "shift_x_px"]].to_numpy(float)
    for start in range(0, len(own), 64):
        part = slice(start, start + 64)
        read = session.images.read(rows[part]).mean(1, keepdims=True)
        images[part] = align(read, angle[part], shift[part] * scale[rows[part], None])[:, 0]
    weight = own["weight"].to_numpy(float)
    correlation, error, variance, _, _ = compared(images, weight)
    values = {"correlation": correlation, "error": error, "row": rows.astype(float)}
    columns = latent_columns(features)
    if columns:
        z = features[columns].reindex(own.index).to_numpy(float)
        values["distance"] = np.linalg.norm(z - np.nanmean(z, axis=0), axis=1)
    residual = session.classes.pictures(stored.name, "residual")
    kept = None if residual is None else residual[place]
    return Loaded(
        stored.name, place, own.index.to_numpy(np.uint64), images, weight, values, variance, kept, n
    )


class MembersPanel(QWidget):
    """The particles of one average, by how well they fit; a click leaves one out, the average follows."""

    leave_out = Signal(object)
    """`(k,)` uids to average without"""

    def __init__(self, state: AppState) -> None:
        super().__init__()
        self.state = state
        self.tasks = Tasks(self)
        self.loaded: Loaded | None = None
        self.out: NDArray[np.bool_] = np.zeros(0, bool)
        self.page = 0
        self.sort = QComboBox()
        for key, words in MEMBER_SORTS.items():
            self.sort.addItem(words, key)
        self.sort.setToolTip("In what order the members are shown")
        self.sort.currentIndexChanged.connect(lambda _: self._turn_to(0))
        self.before, self.after = QPushButton("‹"), QPushButton("›")
        for button, step, words in ((self.before, -1, "earlier"), (self.after, 1, "later")):
            button.setMaximumWidth(32)
            button.setToolTip(f"The {words} members in this order")
            button.clicked.connect(lambda _=False, step=step: self._turn_to(self.page + step))
        self.pictures = ImageRows()
        self.pictures.setToolTip(
            "<p>Average of the members that are in, where members differ (variance), and what the average"
            " shows and the model does not draw, or where the halves differ (residual; after"
            " <i>Examine</i>)</p>"
        )
        self.members = ImageRows()
        self.members.setToolTip(
            "<p>Click a particle to leave it out or take it back; the average follows</p>"
        )
        self.members.clicked.connect(self._on_click)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.again_button = QPushButton("Average again without them")
        self.again_button.setToolTip("Average this class anew from the originals; the set as it is stays")
        self.again_button.clicked.connect(self._again)
        self.select_button = QPushButton("Select on the map")
        self.select_button.setToolTip("Make the members that are in the selection")
        self.select_button.clicked.connect(self._select)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self.pictures)
        layout.addLayout(_row(self.sort, self.before, self.after))
        layout.addWidget(self.members)
        layout.addWidget(self.words)
        layout.addLayout(_row(self.again_button, self.select_button))
        self.clear()

    def clear(self) -> None:
        """Nothing to look at."""
        self.loaded = None
        self.pictures.clear()
        self.members.clear()
        self.words.setText("")
        for button in (self.again_button, self.select_button, self.before, self.after):
            button.setEnabled(False)

    def look_at(self, session: Session, stored: StoredClasses, place: int) -> None:
        """Show the members of average `place`."""
        if self.loaded is not None and (self.loaded.set_name, self.loaded.place) == (stored.name, place):
            return
        self.clear()
        self.words.setText("Reading the members …")
        features = self.state.features
        self.tasks.run(
            "members",
            lambda: load_members(session, stored, place, features),
            self.show_members,
            lambda failure: self.words.setText(str(failure.sentence)),
        )

    def show_members(self, loaded: Loaded) -> None:
        """They were read."""
        self.loaded = loaded
        self.out = np.zeros(len(loaded.uid), bool)
        self.select_button.setEnabled(True)
        self._turn_to(0)

    @property
    def order(self) -> NDArray[np.intp]:
        """Members as they are shown."""
        assert self.loaded is not None
        key = str(self.sort.currentData())
        values = self.loaded.values.get(key)
        if values is None:
            return np.arange(len(self.loaded.uid))
        falling = key in ("error", "distance")
        return np.argsort(np.nan_to_num(-values if falling else values, nan=np.inf), kind="stable")

    def average(self) -> NDArray[np.float64]:
        """Of the members that are in."""
        assert self.loaded is not None
        weight = np.where(self.out, 0.0, self.loaded.weight)
        total = np.zeros(self.loaded.images.shape[1:])
        for start in range(0, len(weight), 256):
            part = slice(start, start + 256)
            total += np.einsum("b,bij->ij", weight[part], self.loaded.images[part].astype(np.float64))
        return total / max(float(weight.sum()), 1e-12)

    def _turn_to(self, page: int) -> None:
        if self.loaded is None:
            return
        pages = -(-len(self.loaded.uid) // (A_ROW * ROWS))
        self.page = min(max(page, 0), max(pages - 1, 0))
        self.before.setEnabled(self.page > 0)
        self.after.setEnabled(self.page < pages - 1)
        self._draw_members()
        self._draw_average()

    def _shown(self) -> NDArray[np.intp]:
        start = self.page * A_ROW * ROWS
        return self.order[start : start + A_ROW * ROWS]

    def _draw_members(self) -> None:
        assert self.loaded is not None
        shown, key = self._shown(), str(self.sort.currentData())
        values = self.loaded.values.get(key)
        rows = []
        for start in range(0, len(shown), A_ROW):
            some = shown[start : start + A_ROW]
            images = self.loaded.images[some].astype(np.float32)
            images = np.stack(
                [_crossed(one) if self.out[i] else one for i, one in zip(some, images, strict=True)]
            )
            word = ""
            if values is not None and key != "row":
                word = f"{key} {values[some[0]]:.2f} to {values[some[-1]]:.2f}"
            rows.append((word, images))
        self.members.set_rows(rows)

    def _draw_average(self) -> None:
        loaded = self.loaded
        assert loaded is not None
        rows = [("average", self.average()[None].astype(np.float32)), ("variance", loaded.variance[None])]
        if loaded.residual is not None:
            rows.append(("residual", loaded.residual[None]))
        m = max(image.shape[-1] for _, image in rows)
        side_by_side = np.stack([_fitted(images[0], m) for _, images in rows])
        self.pictures.set_rows([(" · ".join(word for word, _ in rows), side_by_side)])
        out, n = int(self.out.sum()), len(loaded.uid)
        words = f"{number(n)} members" if n == loaded.n else f"{number(n)} of {number(loaded.n)} members"
        self.words.setText(f"{words}, {number(out)} left out" if out else f"{words}; a click leaves one out")
        self.again_button.setEnabled(0 < out < n)

    def _on_click(self, row: int, column: int) -> None:
        if self.loaded is None:
            return
        shown = self._shown()
        at = row * A_ROW + column
        if at < len(shown):
            self.out[shown[at]] ^= True
            self._draw_members()
            self._draw_average()

    def _again(self) -> None:
        if self.loaded is not None:
            self.leave_out.emit(self.loaded.uid[self.out])

    def _select(self) -> None:
        session = self.state.session
        if session is not None and self.loaded is not None:
            self.state.selection.set(np.isin(session.uid, self.loaded.uid[~self.out]))


def _crossed(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A picture that is left out: pale, with a cross."""
    low, high = float(image.min()), float(image.max())
    n = image.shape[-1]
    crossed = 0.35 * (image - low) + low
    i = np.arange(n)
    crossed[i, i] = crossed[i, n - 1 - i] = high
    return crossed


def _fitted(image: NDArray[Any], m: int) -> NDArray[np.float32]:
    """Drawn `m` px wide, for the eye."""
    at = np.minimum(np.arange(m) * image.shape[-1] // m, image.shape[-1] - 1)
    shown = np.asarray(image, np.float32)[np.ix_(at, at)]
    low, high = np.percentile(shown, [1, 99.5])
    return np.clip((shown - low) / max(float(high - low), 1e-12), 0, 1)


def _row(*widgets: QWidget) -> QHBoxLayout:
    row = QHBoxLayout()
    row.setContentsMargins(0, 0, 0, 0)
    row.setSpacing(3)
    for widget in widgets:
        row.addWidget(widget, 1 if isinstance(widget, (QComboBox, QLineEdit)) else 0)
    return row

"""Named sets of particles: select, combine, compare, rename, recolour, put aside and bring back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from qtpy.QtCore import QPoint, Qt, QTimer
from qtpy.QtGui import QColor, QIcon, QKeyEvent, QPixmap
from qtpy.QtWidgets import QLabel, QListWidgetItem, QMenu, QWidget

from particle_explorer.state import AppState, Mask
from particle_explorer.widgets.background import Failure, Tasks, notify
from particle_explorer.widgets.colours import CATEGORY_COLOURS, Colouring, rgb
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.short_list import ShortList

if TYPE_CHECKING:
    from particle_explorer.session import Session

NONE_YET = "No sets yet: select particles on the map and save them under a name (S)."
NAMED_COLOURS = {
    "orange": "e69f00",
    "sky blue": "56b4e9",
    "green": "009e73",
    "yellow": "f0e442",
    "blue": "0072b2",
    "red": "d55e00",
    "pink": "cc79a7",
}
"""Okabe and Ito's"""
MARK_AFTER_MS = 800
"""Marks are written so long after the last one."""
GOOD_BAD = {"good": "009e73", "bad": "d55e00"}


class Named(NamedTuple):
    """A set in the list."""

    name: str
    n: int
    colour: str
    how: str


def read_sets(session: Session) -> list[Named]:
    """All sets with their size, colour and how they were chosen. A thread's work."""
    found = []
    for i, name in enumerate(session.selections.names()):
        record = session.selections.record(name)
        n = record.get("n")
        n = int(np.count_nonzero(session.selections.mask(name))) if not isinstance(n, int) else n
        colour = str(record.get("colour") or CATEGORY_COLOURS[i % len(CATEGORY_COLOURS)])
        found.append(Named(name, n, colour, str(record.get("how", ""))))
    return found


def sets_colouring(session: Session) -> Colouring:
    """Every particle in the colour of its set, of several in that of the last. A thread's work."""
    sets = read_sets(session)
    level = np.full(session.n_particles, max(len(sets), 1), np.uint16)
    for i, each in enumerate(sets):
        level[session.selections.mask(each.name)] = i
    lut = rgb([each.colour for each in sets] or ["888888"])
    return Colouring(level, lut, "category", "set", labels=tuple(each.name for each in sets) or ("none",))


class SetsList(ShortList):
    """The sets of the session. A click selects; everything else is under the right button."""

    def __init__(
        self, state: AppState, words: QLabel, failed: Callable[[Failure], None], parent: QWidget | None = None
    ) -> None:
        super().__init__(6, parent)
        self.state, self._words, self._failed = state, words, failed
        self.tasks = Tasks(self)
        self._sets: dict[str, Named] = {}
        self._renamed = ""
        self.setToolTip(
            "Click a set to select its particles; Shift adds them, Alt takes them away.\n"
            "Right click: combine, compare, rename, recolour, remove. F2 renames."
        )
        self.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.customContextMenuRequested.connect(self._show_menu)
        self.itemClicked.connect(self._on_clicked)
        self.itemChanged.connect(self._on_renamed)
        follow(self, state.sets_changed, self.reload)
        follow(self, state.session_changed, self.reload)
        self.reload()

    def reload(self, *_: object) -> None:
        """Read the list anew."""
        session = self.state.session
        if session is None:
            self._show([])
        else:
            self.tasks.run("sets", lambda: read_sets(session), self._show)

    def _show(self, sets: list[Named]) -> None:
        self.blockSignals(True)
        self.clear()
        self._sets = {each.name: each for each in sets}
        for each in sets:
            item = QListWidgetItem(_swatch(each.colour), f"{each.name} · {number(each.n)} particles")
            item.setData(Qt.ItemDataRole.UserRole, each.name)
            item.setToolTip(each.how)
            self.addItem(item)
        self.blockSignals(False)
        self.setVisible(bool(sets))
        self._words.setText("Sets" if sets else NONE_YET)

    # hands

    def keyPressEvent(self, event: QKeyEvent | None) -> None:
        item = self.currentItem()
        if event is not None and event.key() == Qt.Key.Key_F2 and item is not None:
            self._edit(item)
        elif event is not None and event.key() == Qt.Key.Key_Delete and item is not None:
            self.remove(self._name(item))
        else:
            super().keyPressEvent(event)

    def _name(self, item: QListWidgetItem) -> str:
        return str(item.data(Qt.ItemDataRole.UserRole))

    def _on_clicked(self, item: QListWidgetItem) -> None:
        from qtpy.QtWidgets import QApplication

        keys = QApplication.keyboardModifiers()
        shift = bool(keys & Qt.KeyboardModifier.ShiftModifier)
        alt = bool(keys & (Qt.KeyboardModifier.AltModifier | Qt.KeyboardModifier.ControlModifier))
        how = "intersect" if shift and alt else "add" if shift else "subtract" if alt else "set"
        self.select(self._name(item), how)

    def _show_menu(self, at: QPoint) -> None:
        item = self.itemAt(at)
        if item is None:
            return
        menu = self.menu(self._name(item))
        menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        menu.popup(self.mapToGlobal(at))

    def menu(self, name: str) -> QMenu:
        """What can be done with a set."""
        menu, session = QMenu(self), self.state.session
        some = self.state.selection.count > 0

        def offer(words: str, does: Callable[[], object], able: bool = True, into: QMenu = menu) -> None:
            action = into.addAction(words)
            action.setEnabled(able)
            action.triggered.connect(lambda *_: does())

        offer("Select", lambda: self.select(name, "set"))
        offer("Add to the selection", lambda: self.select(name, "add"), some)
        offer("Take away from the selection", lambda: self.select(name, "subtract"), some)
        offer("Keep the overlap with the selection", lambda: self.select(name, "intersect"), some)
        menu.addSeparator()
        offer("Compare with the selection and the other sets", lambda: self.compare(name))
        offer("Replace by the selection", lambda: self.replace(name), some)
        offer("Rename (F2)", lambda: self.rename_in_place(name))
        colours = menu.addMenu("Colour")
        for words, colour in NAMED_COLOURS.items():
            offer(words, partial(self.recolour, name, colour), into=colours)
            colours.actions()[-1].setIcon(_swatch(colour))
        offer("Remove (Del)", lambda: self.remove(name))
        removed = [] if session is None else session.selections.removed()
        menu.addSeparator()
        offer(
            f"Bring back {removed[-1][0]!r}" if removed else "Bring back",
            self.bring_back,
            bool(removed),
        )
        return menu

    # what is done

    def select(self, name: str, how: str = "set") -> None:
        """Select a set, or add, subtract or intersect it."""
        session = self.state.session
        if session is not None:
            does = getattr(self.state.selection, how)
            self.tasks.run("set", lambda: session.selections.mask(name), does, self._failed)

    def compare(self, name: str) -> None:
        """Say in words how far a set overlaps with the selection and with the others."""
        session, selected = self.state.session, self.state.selection.mask
        if session is None:
            return

        def work() -> str:
            mine = session.selections.mask(name)
            others = {"the selection": selected} if selected.any() else {}
            others |= {
                other: session.selections.mask(other) for other in session.selections.names() if other != name
            }
            return overlap_words(name, mine, others)

        self.tasks.run("compare", work, self._words.setText, self._failed)

    def replace(self, name: str) -> None:
        """Keep the selection under the name of this set; the set as it was is put aside."""
        mask = self.state.selection.mask
        self._change(lambda session: session.selections.save(name, mask, "replaced by the selection"))

    def recolour(self, name: str, colour: str) -> None:
        self._change(lambda session: session.selections.colour(name, colour))

    def rename(self, name: str, new: str) -> None:
        self._change(lambda session: session.selections.rename(name, new))

    def remove(self, name: str) -> None:
        """Put a set aside; it can be brought back."""
        self._change(lambda session: session.selections.remove(name))

    def bring_back(self) -> None:
        """The set that was put aside last."""
        self._change(lambda session: session.selections.bring_back())

    def rename_in_place(self, name: str) -> None:
        """Edit the name in the list."""
        for row in range(self.count()):
            item = self.item(row)
            if item is not None and self._name(item) == name:
                self._edit(item)

    def _edit(self, item: QListWidgetItem) -> None:
        self.blockSignals(True)
        item.setText(self._name(item))  # without the number
        item.setFlags(item.flags() | Qt.ItemFlag.ItemIsEditable)
        self.blockSignals(False)
        self.editItem(item)

    def _on_renamed(self, item: QListWidgetItem) -> None:
        name, new = self._name(item), item.text().strip()
        if new and new != name:
            self.rename(name, new)
        else:
            self.reload()

    def _change(self, work: Callable[[Session], object]) -> None:
        session = self.state.session
        if session is None:
            return

        def failed(failure: Failure) -> None:
            self.reload()
            self._failed(failure)

        self.tasks.run("change", lambda: work(session), lambda _: self.state.sets_changed.emit(), failed)


def overlap_words(name: str, mine: Mask, others: dict[str, Mask]) -> str:
    """How many particles a set shares with others."""
    lines = [f"{name}: {number(int(mine.sum()))} particles"]
    for other, mask in others.items():
        both, either = int((mine & mask).sum()), int((mine | mask).sum())
        share = both / either if either else 0.0
        lines.append(f"and {other}: {number(both)} in both, {100 * share:.0f} % of all in either")
    return "\n".join(lines)


class Marks:
    """Good and bad particles, marked one by one while looking; the sets "good" and "bad"."""

    def __init__(self, state: AppState, owner: QWidget, say: Callable[[str], None]) -> None:
        self.state, self._say = state, say
        self._tasks = Tasks(owner)
        self._masks: dict[str, Mask] = {}
        self._waiting: list[tuple[int, str]] = []
        self._later = QTimer(owner)
        self._later.setSingleShot(True)
        self._later.setInterval(MARK_AFTER_MS)
        self._later.timeout.connect(self.write)
        follow(owner, state.session_changed, self._on_session)
        follow(owner, state.sets_changed, self._on_sets)
        self._on_session(state.session)

    def _on_session(self, session: Session | None) -> None:
        self._later.stop()
        self._masks, self._waiting = {}, []
        self._say("")

    def mark(self, kind: str) -> None:
        """Mark the particle that is looked at; the same mark again takes it away."""
        session, row = self.state.session, self.state.selection.active
        if session is None or row is None:
            return
        self._waiting.append((row, kind))
        if self._masks:
            self._apply()
            return

        def work() -> dict[str, Mask]:
            there = session.selections.names()
            empty = np.zeros(session.n_particles, bool)
            return {
                name: session.selections.mask(name) if name in there else empty.copy() for name in GOOD_BAD
            }

        def done(masks: dict[str, Mask]) -> None:
            if session is self.state.session:
                self._masks = self._masks or masks
                self._apply()

        self._tasks.run("marks", work, done)

    def _apply(self) -> None:
        for row, kind in self._waiting:
            other = "bad" if kind == "good" else "good"
            self._masks[kind][row] = not self._masks[kind][row]
            self._masks[other][row] = False
        self._waiting = []
        counts = " · ".join(f"{name} {number(int(self._masks[name].sum()))}" for name in GOOD_BAD)
        self._say(f"marked: {counts}")
        self._later.start()

    def _on_sets(self) -> None:
        if not self._later.isActive():
            self._masks = {}  # somebody may have changed them: read them again before the next mark

    def write(self) -> None:
        """Write the two sets."""
        session, masks = self.state.session, {name: mask.copy() for name, mask in self._masks.items()}
        if session is not None and masks:
            self._tasks.run(
                "write marks",
                lambda: _write(session, masks),
                lambda _: self.state.sets_changed.emit(),
                notify,
            )

    def flush(self) -> None:
        """Write what waits, now: the window is closing."""
        if self._later.isActive() and self.state.session is not None:
            self._later.stop()
            _write(self.state.session, self._masks)


def _write(session: Session, masks: dict[str, Mask]) -> None:
    for name, mask in masks.items():
        if mask.any() or name in session.selections.names():
            session.selections.save(name, mask, "marked one by one", GOOD_BAD[name], aside=False)


def _swatch(colour: str) -> QIcon:
    picture = QPixmap(12, 12)
    picture.fill(QColor(f"#{colour}"))
    return QIcon(picture)


def bind_marks(layer: Any, marks: Marks) -> None:
    """G and B while a layer of ours is the active one."""
    layer.bind_key("G", lambda _: marks.mark("good"), overwrite=True)
    layer.bind_key("B", lambda _: marks.mark("bad"), overwrite=True)

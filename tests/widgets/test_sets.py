"""Named sets in the list, and marking particles one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("napari")

from pytestqt.qtbot import QtBot
from qtpy.QtCore import QObject, Qt, Signal
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QLabel, QLineEdit, QMenu, QWidget

from particle_explorer.files import UserError
from particle_explorer.session import Session
from particle_explorer.state import AppState
from particle_explorer.widgets.sets import GOOD_BAD, Marks, SetsList, overlap_words, sets_colouring

A, B = np.arange(120) < 10, (np.arange(120) >= 5) & (np.arange(120) < 25)


@pytest.fixture
def sets(qtbot: QtBot, tiny_session: Session) -> Iterator[SetsList]:
    tiny_session.selections.save("a", A)
    tiny_session.selections.save("b", B, colour="cc79a7")
    state = AppState()
    state.open_session(tiny_session)
    widget = SetsList(state, QLabel(), lambda failure: pytest.fail(failure.sentence))
    qtbot.addWidget(widget)
    widget.show()
    qtbot.waitUntil(lambda: widget.count() == 2)
    yield widget
    widget.tasks.stop()


def press(menu: QMenu, words: str) -> None:
    action = next(action for action in menu.actions() if action.text().startswith(words))
    assert action.isEnabled(), words
    action.trigger()


def test_sets_are_combined_with_the_selection(sets: SetsList, qtbot: QtBot) -> None:
    selection = sets.state.selection
    press(sets.menu("a"), "Select")
    qtbot.waitUntil(lambda: np.array_equal(selection.mask, A))
    for words, wanted in (
        ("Add", A | B),
        ("Keep the overlap", (A | B) & B),
        ("Take away", np.zeros(120, bool)),
    ):
        press(sets.menu("b"), words)
        qtbot.waitUntil(lambda wanted=wanted: np.array_equal(selection.mask, wanted))
    for _ in range(4):
        selection.undo()
    assert not selection.count


def test_a_set_that_was_removed_or_replaced_comes_back(sets: SetsList, qtbot: QtBot) -> None:
    session, selection = sets.state.session, sets.state.selection
    assert session is not None
    sets.setCurrentRow(0)
    QTest.keyClick(sets, Qt.Key.Key_Delete)
    qtbot.waitUntil(lambda: sets.count() == 1)
    assert session.selections.names() == ["b"]
    press(sets.menu("b"), "Bring back 'a'")
    qtbot.waitUntil(lambda: sets.count() == 2)
    assert np.array_equal(session.selections.mask("a"), A)
    selection.set(~A)
    press(sets.menu("a"), "Replace by")
    qtbot.waitUntil(lambda: "110" in sets.item(0).text())
    press(sets.menu("a"), "Bring back 'a'")
    qtbot.waitUntil(lambda: sets.count() == 3)
    assert np.array_equal(session.selections.mask("a-2"), A) and np.array_equal(
        session.selections.mask("a"), ~A
    )


def test_renaming_in_place_and_recolouring(sets: SetsList, qtbot: QtBot) -> None:
    session = sets.state.session
    assert session is not None
    sets.setCurrentRow(0)
    QTest.keyClick(sets, Qt.Key.Key_F2)
    field = sets.findChild(QLineEdit)
    assert field is not None and field.text() == "a"
    field.setText("hinge open")
    QTest.keyClick(field, Qt.Key.Key_Return)
    qtbot.waitUntil(lambda: session.selections.names() == ["b", "hinge open"])
    assert np.array_equal(session.selections.mask("hinge open"), A)
    with pytest.raises(UserError, match="already"):
        session.selections.rename("hinge open", "b")
    sets.recolour("hinge open", "0072b2")
    qtbot.waitUntil(lambda: session.selections.record("hinge open").get("colour") == "0072b2")
    colouring = sets_colouring(session)
    assert colouring.labels == ("b", "hinge open")
    assert colouring.lut[0].tolist() == [0xCC, 0x79, 0xA7] and colouring.lut[1].tolist() == [0, 0x72, 0xB2]
    assert (colouring.level[A] == 1).all() and (colouring.level[B & ~A] == 0).all()
    assert (colouring.level[~(A | B)] == colouring.missing).all()


def test_sets_are_compared_in_words(sets: SetsList, qtbot: QtBot) -> None:
    press(sets.menu("a"), "Compare")
    qtbot.waitUntil(lambda: "in both" in sets._words.text())
    assert "and b: 5 in both, 20 %" in sets._words.text()
    assert overlap_words("x", A, {}) == "x: 10 particles"


def test_marks_are_sets_and_the_last_word_counts(qtbot: QtBot, tiny_session: Session) -> None:
    state, owner, said = AppState(), QWidget(), []
    qtbot.addWidget(owner)
    state.open_session(tiny_session)
    marks = Marks(state, owner, said.append)
    for row, kind in ((3, "good"), (4, "good"), (7, "bad"), (4, "bad"), (3, "good"), (9, "good")):
        state.selection.set_active(row)
        marks.mark(kind)
    qtbot.waitUntil(lambda: bool(said) and said[-1] == "marked: good 1 · bad 2")
    with qtbot.waitSignal(_Bridge(state, owner).told, timeout=5000):
        pass
    assert list(np.flatnonzero(tiny_session.selections.mask("good"))) == [9]
    assert list(np.flatnonzero(tiny_session.selections.mask("bad"))) == [4, 7]
    assert tiny_session.selections.record("good")["colour"] == GOOD_BAD["good"]
    assert tiny_session.selections.removed() == []
    state.selection.set_active(50)
    marks.mark("good")
    qtbot.waitUntil(lambda: "good 2" in said[-1])
    marks.flush()  # the window closes before the pause is over
    assert tiny_session.selections.mask("good")[50]


class _Bridge(QObject):
    told = Signal()

    def __init__(self, state: AppState, owner: QWidget) -> None:
        super().__init__(owner)
        state.sets_changed.connect(self.told.emit)

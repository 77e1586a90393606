"""What ends with a widget: connections, and the work of its threads."""

from __future__ import annotations

import gc
import weakref

from psygnal import Signal
from qtpy.QtCore import QCoreApplication, QEvent
from qtpy.QtWidgets import QWidget

from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.lifetime import _waiting, follow, when_destroyed


class State:
    changed = Signal(int)


class View(QWidget):
    def __init__(self, state: State) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.me = self  # as a widget whose parts refer to it
        self.tasks = Tasks(self)
        self.ended = 0
        follow(self, state.changed, self.seen_it)
        when_destroyed(self, self.end)

    def seen_it(self, value: int) -> None:
        self.seen.append(value)

    def end(self) -> None:
        self.ended += 1


def destroy_now() -> None:
    QCoreApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete.value)


def test_a_destroyed_widget_hears_no_more(qapp) -> None:
    destroy_now()  # what other tests have closed
    state, before = State(), set(_waiting)
    view = View(state)
    state.changed.emit(1)
    view.deleteLater()
    destroy_now()
    state.changed.emit(2)
    assert view.seen == [1]
    assert view.ended == 1
    assert _waiting == before


def test_a_widget_that_python_collects_is_let_go(qapp) -> None:
    """Also where its parts refer to it, and in any order that the collector takes them."""
    state = State()
    for _ in range(20):
        view = View(state)
        View(state).setParent(view)
        gone = weakref.ref(view)
        del view
        gc.collect()
        destroy_now()
        assert gone() is None
    state.changed.emit(1)
    assert len(state.changed) == 0

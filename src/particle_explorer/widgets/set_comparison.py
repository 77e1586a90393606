"""Two sets of averages compared: which class became which, and which particles stayed together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt
from qtpy.QtWidgets import QComboBox, QLabel, QVBoxLayout, QWidget

from particle_explorer.state import AppState
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.job_bar import number

if TYPE_CHECKING:
    from particle_explorer.class_sets import StoredClasses
    from particle_explorer.session import Session

NO_OTHER = "There is no other set yet: average another grouping, or with other settings, to compare."
CHOOSE = "compare with …"


class SetComparison(QWidget):
    """The set that is shown beside another one of the session."""

    def __init__(self, state: AppState, failed: Callable[[Failure], None]) -> None:
        super().__init__()
        self.state, self._failed = state, failed
        self._tasks = Tasks(self)
        self._shown: StoredClasses | None = None
        self.beside = QComboBox()
        self.beside.setToolTip("Other averages of this session")
        self.beside.activated.connect(self._compare)
        self.words = QLabel(NO_OTHER)
        self.words.setWordWrap(True)
        self.words.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self.beside)
        layout.addWidget(self.words)

    def stop(self) -> None:
        """Let a comparison that runs fall on the floor."""
        self._tasks.stop()

    def offer(self, shown: StoredClasses, names: list[str]) -> None:
        """Offer the sets of the session, but for the one that is shown."""
        self._shown = shown
        others = [name for name in names if name != shown.name]
        self._tasks.forget("compare")
        self.beside.clear()
        self.beside.addItem(CHOOSE, "")
        for name in others:
            self.beside.addItem(name, name)
        self.beside.setVisible(bool(others))
        self.words.setText("" if others else NO_OTHER)

    def _compare(self, *_: object) -> None:
        session, shown, name = self.state.session, self._shown, str(self.beside.currentData())
        if session is None or shown is None or not name:
            return
        self._tasks.run(
            "compare",
            lambda: comparison_words(session, shown, session.classes.read(name)),
            self.words.setText,
            self._failed,
        )


def comparison_words(session: Session, first: StoredClasses, second: StoredClasses) -> str:
    """Two sets of averages of the same particles. A thread's work."""
    from particle_explorer.membership import labels_of_members, matched, together

    labels = [labels_of_members(session.table.index, one.members) for one in (first, second)]
    both = together(labels[0], labels[1])
    if not both["n"]:
        return "The two sets have no particles in common."
    lines = [
        f"Of two particles that share a class here, {both['both']:.0%} share one there; adjusted Rand index"
        f" {both['rand']:.2f}, over {number(int(both['n']))} particles."
    ]
    for one, other, count, share in matched(labels[0], labels[1]):
        names = first.classes[one]["label"], second.classes[other]["label"]
        lines.append(f"{names[0]} → {names[1]}: {number(count)} ({share:.0%})")
    return "\n".join(lines)

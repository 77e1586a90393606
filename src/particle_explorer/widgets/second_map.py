"""The map of a second run in a dock of its own, linked with the first by the one selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtWidgets import QDockWidget, QWidget

from particle_explorer.state import AppState, Opened, read
from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.widgets.latent import LatentDock

SIZE_PX = (400, 460)

Placed = Callable[[QDockWidget], None]


class SecondMap:
    """At most one; it goes with the session."""

    def __init__(self, viewer: napari.Viewer, owner: QWidget) -> None:
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(owner)
        self.dock: LatentDock | None = None
        self.twin: AppState | None = None
        self.holder: QDockWidget | None = None
        self._found: dict[str, Any] = {}
        follow(owner, self.state.session_changed, self.close)

    @property
    def is_open(self) -> bool:
        """Whether it is in the window; a dock that was closed by its cross is not."""
        return self.dock is not None and self.dock in self.viewer.window.dock_widgets.values()

    def show(self, name: str, found: dict[str, Any] | None = None, placed: Placed | None = None) -> None:
        """Show the map of a run, looked at as `found` says; `placed` puts its dock where it belongs."""
        session = self.state.session
        if session is None:
            return

        def work() -> Opened | None:
            there = {run.name for run in session.runs() if run.is_encoded}
            return read(session, session.run(name)) if name in there else None

        def done(opened: Opened | None) -> None:
            if self.state.session is session and opened is not None:
                self._open(opened, found or {}, placed)

        self.tasks.run("second", work, done)

    def _open(self, opened: Opened, found: dict[str, Any], placed: Placed | None) -> None:
        from particle_explorer.widgets.latent import LatentDock

        self.close()
        assert opened.run is not None
        twin = AppState()
        twin.selection = self.state.selection  # the one link: a row is the same particle in every run
        twin.session = opened.session
        dock = LatentDock(self.viewer, state=twin)
        dock.actions.groups_button.hide()  # the tab Explore is about the run that is shown in the column
        twin.train_asked.connect(self._ask_to_train)
        twin.show(opened)
        self._found = dict(found.get("map") or {})
        if self._found:
            dock.recall(self._found)
        handle = np.asarray(found.get("handle") or [], float)
        if handle.size and handle.size == twin.handle_z.size and np.isfinite(handle).all():
            twin.set_handle(handle)
        holder = self.viewer.window.add_dock_widget(dock, name=f"Map of {opened.run.name}", area="right")
        holder.setFloating(True)  # a small screen has no room for two maps in one column
        holder.resize(*SIZE_PX)
        if placed is not None:
            placed(holder)
        self.dock, self.twin, self.holder = dock, twin, holder

    def _ask_to_train(self) -> None:
        self.state.train_asked.emit()

    def remembered(self) -> dict[str, Any]:
        """How it is looked at, for `show`; {} where there is none."""
        dock, twin = self.dock, self.twin
        if dock is not None and not self.is_open:
            self.close()  # by its cross, which tells nobody
            return {}
        if dock is None or twin is None or twin.run is None:
            return {}
        return {
            "run": twin.run.name,
            "map": self._found if dock.is_recalling else dock.remembered(),
            "handle": [float(value) for value in twin.handle_z],
        }

    def close(self, *_: object) -> None:
        """Take it away."""
        self.tasks.forget("second")
        dock = self.dock
        if dock is not None:
            dock.shutdown()
            if self.is_open:
                self.viewer.window.remove_dock_widget(dock)
        self.dock = self.twin = self.holder = None

    def stop(self) -> None:
        """End its background work; the dock goes with the window."""
        self.tasks.stop()
        if self.dock is not None:
            self.dock.shutdown()

"""What a session remembers of the window: selection, axes, colours, zoom, handle, gallery, layout.

It is kept as `window.json` in the session's folder and put back when the session is opened again. Nothing in
it is needed: a session without it, or with one that is damaged, opens as a new one does.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QRect, Qt, QTimer
from qtpy.QtWidgets import QApplication, QDockWidget, QMainWindow

from particle_explorer.files import UserError, replacing
from particle_explorer.state import Mask, Opened, read
from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.lifetime import follow, when_destroyed
from particle_explorer.widgets.pictures import SHORT

if TYPE_CHECKING:
    from particle_explorer.session import Run, Session
    from particle_explorer.widgets.workspace import Workspace

NAME = "window.json"
VERSION = 1
MOST_PAST = 500_000
"""Characters that selections of before may take, the newest of them."""
EVERY_MS = 2000
"""How often the window is compared with what was kept last."""


class Memory:
    """Keeps how a session is looked at, and puts it back when it is opened again."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace, self.state = workspace, workspace.state
        self._tasks = Tasks(workspace)
        self._session: Session | None = None
        self._kept = ""
        self._packed: tuple[Mask, str] | None = None
        self._packed_past: dict[bytes, str] = {}
        self._ready = False
        self._timer = QTimer(workspace)
        self._timer.setInterval(EVERY_MS)
        self._timer.timeout.connect(self.save_later)
        follow(workspace, self.state.session_changed, self._on_session)
        application = QApplication.instance()
        if application is not None:
            application.aboutToQuit.connect(self.save)
        when_destroyed(workspace, self._forget)
        self._on_session(self.state.session)

    def stop(self) -> None:
        """Keep what there is, and look no more."""
        self.save()
        self._timer.stop()
        self._tasks.stop()
        self._session = None

    def _forget(self) -> None:
        """The window is no more: there is nothing left to look at when the program ends."""
        self._session = None

    # ---- keeping --------------------------------------------------------------------------------

    def save_later(self) -> None:
        """Keep what has changed; writing is a thread's work."""
        content = self._changed()
        session = self._session
        if content and session is not None:
            self._tasks.run("remember", lambda: _write(session.path, content), lambda _: None, lambda _: None)

    def save(self) -> None:
        """Keep what has changed, now."""
        content = self._changed()
        if content and self._session is not None:
            _write(self._session.path, content)

    def _changed(self) -> str:
        if self._session is None or not self._ready or self._workspace.latent.is_recalling:
            return ""
        if self.state.session is not self._session:
            return ""
        content = json.dumps(self.snapshot())
        if content == self._kept:
            return ""
        self._kept = content
        return content

    def snapshot(self) -> dict[str, Any]:
        """All that is remembered, for JSON."""
        workspace, state = self._workspace, self.state
        gallery = workspace.gallery
        column, strip = _dock_of(workspace), workspace.gallery_dock
        return {
            "format_version": VERSION,
            "run": None if state.run is None else state.run.name,
            "selection": self._selection(),
            "past": self._past(),
            "active": state.selection.active,
            "handle": [float(value) for value in state.handle_z],
            "pose": [state.angle_deg, *(float(value) for value in state.shift_yx_px)],
            "view": state.view,
            "held": state.held,
            "map": workspace.latent.remembered(),
            "second": self._second(),
            "gallery": {
                "folded": gallery.is_folded,
                "sort": gallery.sort.currentData(),
                "descending": gallery.down_button.isChecked(),
                "visible": strip is not None and not strip.isHidden(),
                "height": 0 if strip is None else strip.height(),
            },
            "tab": workspace.tabs.tabText(workspace.tabs.currentIndex()),
            "splitter": workspace.splitter.sizes(),
            "column": 0 if column is None else column.width(),
            "docks": {
                name: _place_of(dock)
                for name, dock in (("column", column), ("gallery", strip))
                if dock is not None
            },
        }

    def _second(self) -> dict[str, Any]:
        second = self._workspace.train.second
        found = second.remembered()
        return {**found, "dock": _place_of(second.holder)} if found and second.holder is not None else {}

    def _selection(self) -> str:
        mask = self.state.selection.mask
        if self._packed is None or self._packed[0] is not mask:
            self._packed = (
                mask,
                base64.b64encode(np.packbits(mask).tobytes()).decode() if mask.any() else "",
            )
        return self._packed[1]

    def _past(self) -> list[str]:
        """The newest of the selections that undo goes back to, oldest first."""
        known, kept, room = self._packed_past, list[bytes](), MOST_PAST
        for bits in reversed(self.state.selection.past):
            if bits not in known:
                known[bits] = base64.b64encode(zlib.compress(bits, 1)).decode()
            room -= len(known[bits])
            if room < 0:
                break
            kept.append(bits)
        self._packed_past = {bits: known[bits] for bits in kept}
        return [known[bits] for bits in reversed(kept)]

    # ---- putting back ---------------------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self._session, self._kept, self._ready = session, "", False
        if session is None:
            self._timer.stop()
            return
        shown = self.state.run
        self._tasks.run("recall", lambda: _recalled(session, shown), self._put_back, lambda _: self._go_on())
        self._timer.start()

    def _put_back(self, recalled: tuple[Session, dict[str, Any], Opened | None]) -> None:
        session, found, opened = recalled
        if session is not self.state.session:
            return
        if opened is not None:
            self.state.show(opened)
        try:
            self._restore(found)
        except (TypeError, ValueError, AttributeError, LookupError, zlib.error):
            pass  # a file written by hand; what came before the mistake is put back
        self._go_on()

    def _go_on(self) -> None:
        self._ready = True

    def _restore(self, found: dict[str, Any]) -> None:
        if not found:
            return
        workspace, state = self._workspace, self.state
        workspace.latent.recall(found.get("map") or {})
        handle = np.asarray(found.get("handle") or [], float)
        if handle.size == state.handle_z.size and handle.size and np.isfinite(handle).all():
            state.set_handle(handle)
        pose = found.get("pose") or [0.0, 0.0, 0.0]
        state.set_pose(float(pose[0]), np.asarray(pose[1:3], float))
        if found.get("view") in SHORT:
            state.set_view(found["view"])
        bits = np.frombuffer(base64.b64decode(found.get("selection") or ""), np.uint8)
        n = state.selection.mask.size
        if bits.size == -(-n // 8) and not state.selection.mask.any():
            state.selection.set(np.unpackbits(bits, count=n).astype(bool))
            past = [base64.b64decode(each) for each in found.get("past") or []]
            state.selection.recall([zlib.decompress(each) for each in past])
        if found.get("held") and "pose-held angle_deg" in state.features:
            state.set_held(True)
        active = found.get("active")
        if isinstance(active, int) and 0 <= active < n:
            state.selection.set_active(active)
        gallery = found.get("gallery") or {}
        workspace.gallery.set_folded(bool(gallery.get("folded")))
        workspace.gallery.sort_when_there(str(gallery.get("sort") or ""), bool(gallery.get("descending")))
        names = [workspace.tabs.tabText(i) for i in range(workspace.tabs.count())]
        if found.get("tab") in names:
            workspace.tabs.setCurrentIndex(names.index(found["tab"]))
        self._lay_out(found, gallery)
        second = found.get("second")
        if isinstance(second, dict) and isinstance(second.get("run"), str):
            workspace.train.second.show(second["run"], second, lambda dock: _put_again(dock, second))

    def _lay_out(self, found: dict[str, Any], gallery: dict[str, Any]) -> None:
        workspace = self._workspace
        sizes = found.get("splitter") or []
        if len(sizes) == workspace.splitter.count() and all(size > 0 for size in sizes):
            QTimer.singleShot(0, lambda: workspace.splitter.setSizes([int(size) for size in sizes]))
        column, strip = _dock_of(workspace), workspace.gallery_dock
        main = None if column is None else column.parentWidget()
        if not isinstance(main, QMainWindow) or column is None:
            return
        docks = found.get("docks") or {}
        for dock, name in ((column, "column"), (strip, "gallery")):
            if dock is not None and isinstance(docks.get(name), dict):
                _put(dock, main, docks[name])
        width, height = int(found.get("column") or 0), int(gallery.get("height") or 0)
        if 0 < width <= 600:
            main.resizeDocks([column], [width], Qt.Orientation.Horizontal)
        if strip is not None:
            strip.setVisible(bool(gallery.get("visible", True)))
            if 0 < height <= main.height() // 2 and not gallery.get("folded"):
                main.resizeDocks([strip], [height], Qt.Orientation.Vertical)


def _recalled(session: Session, shown: Run | None) -> tuple[Session, dict[str, Any], Opened | None]:
    """What was kept of a session, and the run that was shown, read; a thread's work."""
    found = read_memory(session.path)
    name = found.get("run")
    if name is None or (shown is not None and shown.name == name):
        return session, found, None
    newest = session.newest_finished_run()
    if newest is not None and shown is not None and newest.name != shown.name:
        return session, {}, None  # somebody asked for this very run: that is what is shown
    known = {run.name for run in session.runs() if run.is_encoded}
    return session, found, read(session, session.run(name)) if name in known else None


def read_memory(folder: Path) -> dict[str, Any]:
    """The content of `window.json`; {} where there is none that can be read."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format_version") == VERSION else {}


def _write(folder: Path, content: str) -> None:
    try:
        with replacing(folder / NAME, sync=False) as temporary:
            temporary.write_text(content, encoding="utf-8")
    except (OSError, UserError):
        pass  # a session that is read-only, or gone, is looked at all the same


def _place_of(dock: QDockWidget) -> dict[str, Any]:
    """Where a dock is: at which side of the window, or floating, and where on the screen."""
    main, at = dock.parentWidget(), dock.geometry()
    area = main.dockWidgetArea(dock).name if isinstance(main, QMainWindow) else ""
    return {
        "area": area,
        "floating": dock.isFloating(),
        "at": [at.x(), at.y(), at.width(), at.height()] if dock.isFloating() else [],
    }


def _put(dock: QDockWidget, main: QMainWindow, found: dict[str, Any]) -> None:
    """Put a dock where it was; one that floated over a screen that is gone comes to one that is there."""
    area = getattr(Qt.DockWidgetArea, str(found.get("area")), None)
    none = Qt.DockWidgetArea.NoDockWidgetArea
    if area is not None and area not in (none, main.dockWidgetArea(dock)) and dock.isAreaAllowed(area):
        main.addDockWidget(area, dock)
    floating = bool(found.get("floating"))
    if dock.isFloating() != floating:
        dock.setFloating(floating)
    if floating and len(found.get("at") or []) == 4:
        x, y, width, height = (int(value) for value in found["at"])
        wanted = QRect(x, y, max(width, 120), max(height, 80))
        free = [screen.availableGeometry() for screen in QApplication.screens()]
        seen = next((each for each in free if each.contains(wanted.center())), free[0])
        wanted.setSize(wanted.size().boundedTo(seen.size()))
        wanted.moveLeft(min(max(wanted.left(), seen.left()), seen.right() + 1 - wanted.width()))
        wanted.moveTop(min(max(wanted.top(), seen.top()), seen.bottom() + 1 - wanted.height()))
        dock.setGeometry(wanted)


def _put_again(dock: QDockWidget, found: dict[str, Any]) -> None:
    main, place = dock.parentWidget(), found.get("dock")
    if isinstance(main, QMainWindow) and isinstance(place, dict):
        _put(dock, main, place)


def _dock_of(workspace: Workspace) -> QDockWidget | None:
    widget = workspace.parentWidget()
    while widget is not None and not isinstance(widget, QDockWidget):
        widget = widget.parentWidget()
    return widget

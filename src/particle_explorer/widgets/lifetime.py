"""What happens when a widget is destroyed: connections that end with it, workers that stop with it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QObject

if TYPE_CHECKING:
    from psygnal import SignalInstance

_waiting: set[Callable[..., None]] = set()


def when_destroyed(owner: QObject, call: Callable[[], object]) -> None:
    """Call `call` when `owner` is destroyed; a method of an object that is gone by then is not called.

    The function that is connected is kept here until then. PyQt6 keeps it with the widget, and Python's
    collector, which takes both at once, empties the function before Qt destroys the widget: calling it then
    ends the process.
    """
    reference = _reference(call)

    def destroyed(*_: object) -> None:
        _waiting.discard(destroyed)
        function = reference()
        if function is not None:
            function()

    _waiting.add(destroyed)
    owner.destroyed.connect(destroyed)


def follow(owner: QObject, signal: SignalInstance, slot: Callable[..., object]) -> None:
    """Connect a signal of the state for as long as a widget lives: the state outlives its views."""
    signal.connect(slot)
    _at_end(owner, slot, lambda function: signal.disconnect(function, missing_ok=True))


def follow_event(owner: QObject, emitter: Any, slot: Callable[..., object]) -> None:
    """Connect an event of napari for as long as a widget lives: the viewer outlives its docks."""
    emitter.connect(slot)
    _at_end(owner, slot, emitter.disconnect)


def _at_end(
    owner: QObject, slot: Callable[..., object], disconnect: Callable[[Callable[..., object]], object]
) -> None:
    reference = _reference(slot)

    def leave() -> None:
        function = reference()
        if function is not None:
            disconnect(function)

    when_destroyed(owner, leave)


def _reference(function: Callable[..., object]) -> Callable[[], Callable[..., object] | None]:
    # A widget must not live on because what waits for its end refers to it.
    return weakref.WeakMethod(function) if isinstance(function, MethodType) else lambda: function

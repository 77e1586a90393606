"""The layer of class averages: a montage that is clicked and marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtGui import QCursor
from qtpy.QtWidgets import QToolTip

from particle_explorer.widgets.montage import Montage, caption_lines, draw_tile, montage
from particle_explorer.widgets.workspace import fit_view, state_of, tile

if TYPE_CHECKING:
    import napari

    from particle_explorer.class_sets import StoredClasses

LAYER = "class averages"


class ClassLayer:
    """Shows one set of averages; `clicked` is told which of them was clicked, `marked` "good" or "bad"."""

    def __init__(
        self, viewer: napari.Viewer, clicked: Callable[[int], None], marked: Callable[[str], None]
    ) -> None:
        self.viewer = viewer
        self.state = state_of(viewer)
        self.layer: Any = None
        self.montage: Montage | None = None
        self._clicked, self._marked = clicked, marked
        self._order: Sequence[int] = ()
        self._stored: StoredClasses | None = None

    def show(self, stored: StoredClasses, order: Sequence[int]) -> None:
        """All averages of a set, in an order."""
        self._order = order
        self._stored = stored
        captions = [caption_lines(stored.classes[i], len(order)) for i in order]
        self.montage = made = montage(stored.images[order], captions)
        self._show_layer(made)
        session = self.state.session
        self.layer.metadata = {
            "session": str(session.path) if session is not None else "",
            "averages": stored.name,
            "members, weights, poses": str(Path("classes") / f"{stored.name}.parquet"),
            "order": [str(stored.classes[i]["label"]) for i in order],
            "how": stored.how,
            "settings": stored.classes[order[0]].get("settings") or {},
        }

    def redraw(self, stored: StoredClasses, index: int) -> None:
        """Draw one average again, whose mark has changed."""
        if self.montage is not None:
            at = list(self._order).index(index)
            lines = caption_lines(stored.classes[index], len(self._order))
            draw_tile(self.montage, at, stored.images[index], lines)
            self.layer.refresh()

    def hide(self) -> None:
        """Averages of another session are not to be seen."""
        if self.layer is not None:
            self.layer.visible = False

    def _show_layer(self, made: Montage) -> None:
        scale, translate = self._placement(made)
        if self.layer is None or self.layer not in self.viewer.layers:
            self.layer = self.viewer.add_image(
                made.pixels,
                name=LAYER,
                contrast_limits=(0, 1),
                rgb=made.pixels.ndim == 3,
                scale=scale,
                translate=translate,
                interpolation2d="linear",  # shown small, nearest pixels leave lines out of the letters
            )
            tile(self.layer)
            self.layer.mouse_drag_callbacks.append(self.on_click)
            self.layer.mouse_move_callbacks.append(self.on_move)
            for mark in ("good", "bad"):
                self.layer.bind_key(mark[0].upper(), self._key_for(mark), overwrite=True)
        else:
            self.layer.data = made.pixels
            self.layer.scale, self.layer.translate = scale, translate
            self.layer.visible = True
        fit_view(self.viewer)

    def _placement(self, made: Montage) -> tuple[tuple[float, float], tuple[float, float]]:
        """As large on the canvas as one particle image: all tiles of napari's grid share one camera."""
        session = self.state.session
        assert session is not None
        size = session.plan.cached_pixel_size_A
        size = float(size) if np.isfinite(size) and size > 0 else 1.0
        side = session.plan.cached_box_px * size
        height, width = made.pixels.shape[:2]
        scale = side / max(height, width)
        return (scale, scale), ((side - height * scale) / 2, (side - width * scale) / 2)

    def _key_for(self, mark: str) -> Callable[[object], None]:
        """What a key on the layer does; napari wants a function with a name."""

        def pressed(_: object) -> None:
            self._marked(mark)

        return pressed

    def _under(self, event: Any) -> int | None:
        """The average below the mouse."""
        if self.montage is None:
            return None
        row, column = self.layer.world_to_data(event.position)[-2:]
        height, width = self.montage.pixels.shape[:2]
        index = self.montage.index_at(row, column)
        inside = 0 <= row < height and 0 <= column < width and index < len(self._order)
        return self._order[index] if inside else None

    def on_click(self, _: Any, event: Any) -> None:
        """A callback of napari's: look at the average under the mouse."""
        index = self._under(event)
        if index is not None:
            self._clicked(index)

    def on_move(self, _: Any, event: Any) -> None:
        """A callback of napari's: the whole caption where the mouse is, as small ones say the class alone."""
        index, stored = self._under(event), self._stored
        words = "" if index is None or stored is None else "\n".join(caption_lines(stored.classes[index]))
        QToolTip.showText(QCursor.pos(), words)

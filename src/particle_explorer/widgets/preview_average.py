"""The average of what is being selected: a few hundred aligned cached images, running."""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from qtpy.QtWidgets import QWidget

from particle_explorer.state import AppState, Mask, Preview
from particle_explorer.widgets.background import Mailbox
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.pictures import Decoder, Pictures

N_AVERAGED = 256
"""Particles in a preview; more change what the eye sees by less than its noise."""
N_KEPT = 2048
"""Aligned images kept: a lasso that grows meets the same ones again."""
SLICE_S = 0.04
"""So long the thread works before it shows what it has."""
BLOCK = 16


class Request(NamedTuple):
    """What is to be averaged: `rows` of `of` particles, in this order."""

    pictures: Pictures
    rows: NDArray[np.intp]
    of: int


class Answer(NamedTuple):
    """The average over the first `n` rows of a request."""

    request: Request
    image: NDArray[np.float32]
    n: int


class PreviewAverage:
    """Keeps `state.preview` the average of the selection, or of what the hand is drawing around."""

    def __init__(self, state: AppState, owner: QWidget, decoder: Decoder) -> None:
        self.state, self._decoder = state, decoder
        self._pictures: Pictures | None = None
        self._kept: OrderedDict[int, NDArray[np.float16]] = OrderedDict()  # of the thread
        self._kept_of: Pictures | None = None
        self._mailbox = Mailbox(owner, self._average, self._show, lambda _: None, "preview average")
        for signal in (state.features_changed, state.run_changed, state.held_changed, state.session_changed):
            follow(owner, signal, self._on_other_pictures)
        follow(owner, state.selection.hinted, self._on_hint)
        follow(owner, state.selection.changed, self._ask)

    def stop(self) -> None:
        """End the thread."""
        self._mailbox.stop()

    def _on_other_pictures(self, *_: object) -> None:
        self._pictures = None
        self._ask(self.state.selection.mask)

    def _on_hint(self, mask: Mask | None) -> None:
        self._ask(self.state.selection.mask if mask is None else mask)

    def _ask(self, mask: Mask) -> None:
        session = self.state.session
        if session is None or not session.has_images or mask.size != session.n_particles or not mask.any():
            self._mailbox.submit(None)
            self.state.set_preview(None)
            return
        if self._pictures is None:
            self._pictures = Pictures.of(self.state, "aligned", self._decoder)
        rows = np.flatnonzero(mask)
        self._mailbox.submit(Request(self._pictures, sampled(rows, mask.size), rows.size))

    # in the thread ---------------------------------------------------------------------------------

    def _average(self, request: Request | None) -> Answer | None:
        if request is None:
            return None
        if request.pictures is not self._kept_of:
            self._kept.clear()
            self._kept_of = request.pictures
        end = time.monotonic() + SLICE_S
        rows, n = request.rows, 0
        total = np.zeros(request.pictures.images.shape[1:], np.float32)
        while n < rows.size and (n == 0 or time.monotonic() < end):
            block = rows[n : n + BLOCK]
            for image in self._aligned(request.pictures, block):
                total += image
            n += block.size
        total /= max(n, 1)
        return Answer(request, total, n)

    def _aligned(self, pictures: Pictures, rows: NDArray[np.intp]) -> list[NDArray[np.float16]]:
        missing = np.array([row for row in rows if int(row) not in self._kept], np.intp)
        if missing.size:
            for row, image in zip(missing, pictures.read(missing), strict=True):
                self._kept[int(row)] = image.astype(np.float16)
        found = [self._kept[int(row)] for row in rows]
        for row in rows:
            self._kept.move_to_end(int(row))
        while len(self._kept) > N_KEPT:
            self._kept.popitem(last=False)
        return found

    # in the window ---------------------------------------------------------------------------------

    def _show(self, answer: Answer | None) -> None:
        if answer is None or answer.request.pictures is not self._pictures:
            return
        if answer.n < answer.request.rows.size:
            self._mailbox.submit(answer.request)  # the images read so far are kept, so this one gets further
        image = answer.image[0] if answer.image.shape[0] == 1 else np.moveaxis(answer.image, 0, -1)
        session, run = self.state.session, self.state.run
        if session is None:
            return
        aligned = answer.request.pictures.is_aligned
        poses = ("that hold a part still" if self.state.held else "of the run") if aligned else "none"
        made = {
            "session": str(session.path),
            "run": "" if run is None else str(run.path),
            "settings": "" if run is None else str(run.path / "config.json"),
            "prepared": str(session.path / "session.json"),
            "averaged": "as prepared, no CTF correction, every particle counts once",
            "poses": poses,
            "sample": f"{answer.n} of {answer.request.of} selected particles",
            "uid": session.uid[answer.request.rows[: answer.n]],
        }
        self.state.set_preview(Preview(image, answer.n, answer.request.of, aligned, made))


def sampled(rows: NDArray[np.intp], n_all: int) -> NDArray[np.intp]:
    """Up to `N_AVERAGED` of `rows`, drawn once and for all: sets that overlap share what is drawn of them."""
    if rows.size <= N_AVERAGED:
        return rows
    rank = _ranks(n_all)[rows]
    return np.asarray(rows[np.argpartition(rank, N_AVERAGED)[:N_AVERAGED]], np.intp)


@functools.lru_cache(maxsize=2)
def _ranks(n: int) -> NDArray[np.int32]:
    return np.random.default_rng(1).permutation(n).astype(np.int32)

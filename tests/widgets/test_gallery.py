"""The gallery and the average in passing: what is shown, in which order, and what picking does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("napari")

from pytestqt.qtbot import QtBot
from qtpy.QtCore import QPoint, QRect, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication, QDockWidget, QWidget

from particle_explorer.session import Session
from particle_explorer.state import AppState, Preview
from particle_explorer.widgets.gallery import Gallery, ordered, sortable
from particle_explorer.widgets.pictures import Decoder, Pictures
from particle_explorer.widgets.preview_average import N_AVERAGED, PreviewAverage, sampled
from particle_explorer.widgets.preview_tile import Average
from particle_explorer.widgets.provenance import ProvenanceDialog, provenance_words
from particle_explorer.widgets.workspace import open_workspace

LEFT = Qt.MouseButton.LeftButton
NONE = Qt.KeyboardModifier.NoModifier
SHIFT, ALT = Qt.KeyboardModifier.ShiftModifier, Qt.KeyboardModifier.AltModifier


def with_poses(state: AppState, session: Session) -> AppState:
    state.open_session(session)
    n, rng = session.n_particles, np.random.default_rng(2)
    poses = pd.DataFrame(
        {
            "angle_deg": rng.uniform(-180, 180, n),
            "shift_y_px": 1.0,
            "shift_x_px": -1.0,
            "score": rng.normal(size=n),
        },
        index=session.table.index,
    )
    table = session.table.drop(columns=poses.columns, errors="ignore")
    state.set_features(pd.concat([table, poses], axis=1))
    return state


@pytest.fixture
def gallery(qtbot: QtBot, tiny_session: Session) -> Iterator[Gallery]:
    state = with_poses(AppState(), tiny_session)
    widget = Gallery(None, state, Decoder())
    qtbot.addWidget(widget)
    widget.resize(700, 150)
    with qtbot.waitExposed(widget):
        widget.show()
    qtbot.waitUntil(lambda: widget.sort.findData("score") > 0)
    yield widget
    widget.shutdown()


def click(gallery: Gallery, index: int, modifiers: Qt.KeyboardModifier = NONE) -> None:
    QTest.mouseClick(gallery.strip.viewport(), LEFT, modifiers, gallery.strip.place(index).center())


def sweep(gallery: Gallery, first: int, last: int, modifiers: Qt.KeyboardModifier = NONE) -> None:
    view = gallery.strip.viewport()
    spots = [gallery.strip.place(index).center() for index in (first, last)]
    QTest.mousePress(view, LEFT, modifiers, spots[0])
    QTest.mouseMove(view, spots[1])
    QTest.mouseRelease(view, LEFT, modifiers, spots[1])


def test_only_thumbnails_in_sight_are_read(qtbot: QtBot, gallery: Gallery) -> None:
    strip = gallery.strip
    qtbot.waitUntil(lambda: set(strip.in_sight()) <= set(strip.pictures))
    assert len(strip.pictures) < 60 < gallery.state.selection.mask.size
    strip.horizontalScrollBar().setValue(strip.horizontalScrollBar().maximum())
    assert 119 in strip.in_sight()
    qtbot.waitUntil(lambda: 119 in strip.pictures)
    assert strip.place(119).right() <= strip.viewport().width()


def test_it_shows_the_selection_in_the_order_of_any_column(qtbot: QtBot, gallery: Gallery) -> None:
    state, strip = gallery.state, gallery.strip
    assert strip.rows.size == 120 and gallery.words.text().strip() == "all 120 particles"
    mask = np.zeros(120, bool)
    mask[[5, 90, 17, 33]] = True
    state.selection.set(mask)
    assert list(strip.rows) == [5, 17, 33, 90]
    score = state.features["score"].to_numpy()
    gallery.sort_by("score", descending=True)
    wanted = sorted([5, 17, 33, 90], key=lambda row: -score[row])
    qtbot.waitUntil(lambda: list(strip.rows) == wanted)
    QTest.mouseClick(gallery.down_button, LEFT)
    qtbot.waitUntil(lambda: list(strip.rows) == wanted[::-1])
    assert f"particle {wanted[-1] + 1}" in strip.words(0)


def test_unknown_values_come_last_both_ways_round_and_words_sort_as_words() -> None:
    rows = np.array([3, 1, 4, 0, 2])
    values = pd.Series([2.0, np.nan, -1.0, 7.0, 0.0])
    assert list(ordered(values, rows, False)[0]) == [2, 4, 0, 3, 1]
    assert list(ordered(values, rows, True)[0]) == [3, 0, 4, 2, 1]
    words = pd.Series(["b", "a", None, "c", "a"])
    assert list(ordered(words, rows, False)[0]) == [1, 4, 0, 3, 2]
    constant = pd.DataFrame({"one": [1, 1], "two": [1, 2], "text": ["a", "b"]})
    assert [choice.key for choice in sortable(constant)] == ["two", "text"]


def test_picking_selects_and_looking_does_not_deselect(gallery: Gallery) -> None:
    selection = gallery.state.selection
    click(gallery, 2)
    assert list(selection.rows) == [2] and selection.active == 2
    click(gallery, 4, SHIFT)
    assert list(selection.rows) == [2, 4]
    assert gallery.strip.rows.size == 120, "what is shown stays while one picks in it"
    click(gallery, 2)
    assert list(selection.rows) == [2, 4] and selection.active == 2
    click(gallery, 4, ALT)
    assert list(selection.rows) == [2]
    sweep(gallery, 1, 3)
    assert list(selection.rows) == [1, 2, 3]
    sweep(gallery, 3, 5, SHIFT)
    assert list(selection.rows) == [1, 2, 3, 4, 5]
    selection.undo()
    assert list(gallery.strip.rows) == [1, 2, 3], "a change from elsewhere is shown"


def test_arrow_keys_walk_through_the_thumbnails(gallery: Gallery) -> None:
    selection = gallery.state.selection
    for key, row in (
        (Qt.Key.Key_Right, 0),
        (Qt.Key.Key_Right, 1),
        (Qt.Key.Key_Right, 2),
        (Qt.Key.Key_Left, 1),
    ):
        QTest.keyClick(gallery.strip, key)
        assert selection.active == row
    selection.set_active(110)  # from the layer's slider
    assert gallery.strip.viewport().rect().contains(gallery.strip.place(110))


def test_another_view_makes_other_pictures(qtbot: QtBot, gallery: Gallery) -> None:
    strip = gallery.strip
    qtbot.waitUntil(lambda: 0 in strip.pictures)
    assert [view for view, button in gallery.view_buttons.items() if button.isVisible()] == [
        "raw",
        "low-pass",
        "aligned",
    ]
    aligned = strip.pictures[0]
    QTest.mouseClick(gallery.view_buttons["raw"], LEFT)
    assert gallery.state.view == "raw"
    qtbot.waitUntil(lambda: 0 in strip.pictures and strip.pictures[0] != aligned)


def test_folded_it_is_one_line_and_reads_nothing(qtbot: QtBot, gallery: Gallery) -> None:
    QTest.mouseClick(gallery.fold_button, LEFT, pos=QPoint(10, 8))
    assert gallery.is_folded and gallery.maximumHeight() < 45
    gallery.state.set_view("raw")
    qtbot.wait(60)
    assert not gallery.strip.pictures
    gallery.set_folded(False)
    qtbot.waitUntil(lambda: len(gallery.strip.pictures) > 0)


# ---- the average in passing -----------------------------------------------------------------


def test_the_average_is_that_of_the_aligned_images_and_says_of_how_many(
    qtbot: QtBot, tiny_session: Session
) -> None:
    state, owner, told = AppState(), QWidget(), []
    qtbot.addWidget(owner)
    state.preview_changed.connect(told.append)
    average = PreviewAverage(state, owner, Decoder())
    with_poses(state, tiny_session)
    mask = np.arange(120) % 3 == 0
    state.selection.hint(mask)
    qtbot.waitUntil(lambda: state.preview is not None and state.preview.n == 40)
    assert state.selection.count == 0, "a hint selects nothing"
    pictures = Pictures.of(state, "aligned", Decoder())
    wanted = pictures.read(np.flatnonzero(mask)).mean(axis=0)[0]
    assert isinstance(state.preview, Preview) and state.preview.of == 40 and state.preview.aligned
    np.testing.assert_allclose(state.preview.image, wanted, atol=2e-3)
    np.testing.assert_array_equal(np.sort(state.preview.made["uid"]), np.sort(tiny_session.uid[mask]))
    assert state.preview.made["poses"] == "of the run"
    shown = Average()
    qtbot.addWidget(shown)
    shown.show_preview(state.preview)
    qtbot.mouseClick(shown, LEFT)
    dialog = shown.findChild(ProvenanceDialog)
    words = dialog.text.toPlainText()
    assert "uid (40): " in words and str(tiny_session.uid[0]) in words and "sample: 40 of 40" in words
    dialog.copy()
    assert QApplication.clipboard().text() == words
    state.selection.hint(None)
    assert state.preview is None, "nothing is selected after all"
    state.selection.set(np.arange(120) < 7)
    qtbot.waitUntil(lambda: state.preview is not None and state.preview.n == 7)
    average.stop()


def test_a_record_reads_like_a_list() -> None:
    record = {"run": "r", "empty": "", "positions": [[0.5, 1.0]], "how": {"by": "grid"}, "uid": np.arange(6)}
    assert provenance_words(record).splitlines() == [
        "run: r",
        "positions: (0.5, 1)",
        "how:",
        "  by: grid",
        "uid (6): 0, 1, 2, 3, 4, 5",
    ]
    assert "Nothing" in provenance_words({})


def test_overlapping_selections_share_what_is_drawn_of_them() -> None:
    n = 50_000
    rows = np.arange(n)
    small, large = sampled(rows[:20_000], n), sampled(rows[:22_000], n)
    assert small.size == large.size == N_AVERAGED
    assert np.unique(small).size == N_AVERAGED
    assert np.isin(small, large).mean() > 0.8
    assert abs(small.mean() - 10_000) < 1200, "from everywhere"
    assert sampled(rows[:5], n).size == 5


def test_in_the_window_it_lies_under_the_canvas(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, qtbot: QtBot
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    workspace = open_workspace(viewer)
    assert not workspace.gallery.isVisible(), "nothing to show yet"
    workspace.open(tiny_session.path)
    qtbot.waitUntil(lambda: workspace.gallery.isVisible(), timeout=10_000)
    qtbot.waitUntil(lambda: len(workspace.gallery.strip.pictures) > 0, timeout=10_000)
    dock, column = workspace.gallery, workspace
    bottom = QRect(dock.mapToGlobal(QPoint(0, 0)), dock.size())
    beside = QRect(column.mapToGlobal(QPoint(0, 0)), column.size())
    assert not bottom.intersects(beside) and bottom.right() <= beside.left()
    assert 100 <= bottom.height() <= 180 and beside.bottom() >= bottom.top() + 50
    assert isinstance(workspace.gallery_dock, QDockWidget)
    click(workspace.gallery, 3)
    qtbot.waitUntil(lambda: len(viewer.layers["selected particles"].data) == 1)
    workspace.shutdown()
    qtbot.wait(50)

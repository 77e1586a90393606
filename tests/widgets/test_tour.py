"""The tour on the sample session, taken by hand: offered once, sent away for good, there again when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("napari")

from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QLabel

from particle_explorer.widgets.screenshots import Hand
from particle_explorer.widgets.tour import STEPS, was_seen
from particle_explorer.widgets.workspace import Workspace, open_workspace

LEFT = Qt.MouseButton.LeftButton


@pytest.fixture
def workspace(
    make_napari_viewer: Callable[..., Any],
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Workspace]:
    """A first start: nothing open, nothing seen."""
    if not (sample_dir / "particles_explorer" / "runs").is_dir():
        pytest.skip("no trained session in sample_data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    column = open_workspace(viewer)
    Hand(column).rest(0.2)
    yield column
    column.shutdown()
    Hand(column).rest(0.2)


@pytest.mark.timeout(300)
def test_the_tour_is_taken_by_hand_and_not_offered_again(workspace: Workspace) -> None:
    hand, state = Hand(workspace), workspace.state
    button = workspace.particles.tour_button
    assert button.isVisible() and not was_seen()
    hand.click(button)
    hand.wait(lambda: workspace.tour is not None and workspace.tour.is_on, "the tour", 90)
    tour = workspace.tour
    assert tour is not None and was_seen()
    card, canvas = tour.card, workspace.latent.canvas
    hand.wait(lambda: workspace.reconstruction.image is not None, "the first picture")
    assert len(STEPS) == 5 and card.count.text().startswith("1 of 5") and not card.back.isEnabled()

    def inside() -> None:
        assert tour.main.rect().contains(card.geometry()), "all of the card is in the window"
        for label in card.findChildren(QLabel):
            assert label.height() >= label.heightForWidth(label.width()), label.text()

    def done(what: str) -> None:
        inside()
        hand.wait(lambda: tour.is_done, what)
        assert "done" in card.count.text()
        QTest.mouseClick(card.next, LEFT)

    assert tour.frame.isVisible()
    before = state.handle_z.copy()
    hand.drag_handle((0.7, 0.3))
    assert not np.array_equal(before, state.handle_z)
    done("the handle")
    assert not tour.is_done, "another step begins anew"
    hand.lasso((0.35, 0.5), 0.25)
    assert state.selection.count
    done("the lasso")
    hand.wait(lambda: workspace.gallery.strip.rows.size == state.selection.count, "the thumbnails")
    strip = workspace.gallery.strip
    QTest.mouseClick(
        strip.viewport(), LEFT, Qt.KeyboardModifier.NoModifier, strip.place(1).center() + QPoint(0, 0)
    )
    done("a thumbnail")
    assert workspace.tabs.tabText(workspace.tabs.currentIndex()) == "Explore"
    QTest.mouseClick(card.back, LEFT)
    assert card.count.text().startswith("3 of 5")
    QTest.mouseClick(card.next, LEFT)
    assert workspace.explore.paths.isVisible() and not tour.is_done
    QTest.mouseClick(card.next, LEFT)
    assert workspace.tabs.tabText(workspace.tabs.currentIndex()) == "Classes"
    assert card.next.text() == "Finish"
    inside()
    QTest.mouseClick(card.next, LEFT)
    assert not tour.is_on and not card.isVisible() and not tour.frame.isVisible()

    # opened anew it is not offered, but it is there for who asks
    workspace.open(state.session.path)
    hand.rest(1.5)
    assert not tour.is_on
    QTest.keyClick(canvas, Qt.Key.Key_P)
    action = workspace.help_button.menu().actions()[0]
    action.trigger()
    assert tour.is_on and card.count.text().startswith("1 of 5")
    QTest.keyClick(card, Qt.Key.Key_Escape)
    assert not tour.is_on


def test_the_sample_offers_it_by_itself_once(workspace: Workspace) -> None:
    hand = Hand(workspace)
    workspace.particles.open_sample_session()
    hand.wait(lambda: workspace.tour is not None and workspace.tour.is_on, "the offer", 90)
    assert workspace.tour is not None
    QTest.mouseClick(workspace.tour.card.close_button, LEFT)
    assert not workspace.tour.is_on and was_seen()
    workspace.state.run_changed.emit(workspace.state.run)
    hand.rest(1.2)
    assert not workspace.tour.is_on

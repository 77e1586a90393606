"""Selecting by values, neighbours and groups, with real mouse and key events."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("napari")

from pytestqt.qtbot import QtBot
from qtpy.QtCore import QPoint, Qt
from qtpy.QtTest import QTest

from particle_explorer.widgets.colours import colour_by, with_limits
from particle_explorer.widgets.histogram import HistogramPanel, count, recount, within
from particle_explorer.widgets.picking import groups, micrographs, nearest, same

LEFT, NONE = Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier


@given(st.integers(0, 60), st.integers(1, 4), st.integers(0, 5))
def test_nearest_are_the_nearest(k: int, d: int, n_unknown: int) -> None:
    rng = np.random.default_rng(k + 100 * d)
    points, to = rng.normal(size=(50, d)), rng.normal(size=d)
    points[:n_unknown] = np.nan
    mask = nearest(points, to, k)
    away = np.hypot.reduce(points - to, axis=1)
    assert mask.sum() == min(k, 50 - n_unknown) and not mask[:n_unknown].any()
    if 0 < mask.sum() < 50 - n_unknown:
        assert away[mask].max() <= np.nanmin(away[~mask])


def test_the_same_micrograph_and_group() -> None:
    features = pd.DataFrame(
        {"micrograph": ["a", "b", "a", None, "c"], "one": ["x"] * 5, "cluster-kmeans": [1, 2, 2, 1, 3]}
    )
    assert list(same(features["micrograph"], np.array([0, 3]))) == [True, False, True, False, False]
    assert micrographs(features) == "micrograph"
    assert micrographs(features[["one"]].rename(columns={"one": "micrograph"})) is None
    assert groups(features, "one") == "one" and groups(features, None) == "cluster-kmeans"
    assert groups(features[["one"]], "z_0") is None


def test_every_particle_is_in_the_bin_of_its_value() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000)
    values[:20] = np.nan
    values[20] = 1e6
    colouring = colour_by("score", values)
    mask = np.arange(3000) % 3 == 0
    counts = count(colouring, mask)
    assert counts.n.sum() == 2980 and counts.selected.sum() == mask[20:].sum()
    inner = np.abs(values) < 2
    at = counts.bin[inner]
    slack = 1e-9
    assert (values[inner] >= counts.edges[at] - slack).all() and (
        values[inner] <= counts.edges[at + 1] + slack
    ).all()
    assert counts.bin[20] == counts.n.size - 1, "what lies beyond is at the end"
    again = recount(counts, ~mask)
    assert (again.selected + counts.selected == counts.n).all()


def test_ranges_of_numbers_angles_and_groups() -> None:
    numbers = colour_by("score", np.array([0.0, 1.0, np.nan, 2.0]))
    assert list(within(numbers, 1.0, np.inf)) == [False, True, False, True]
    angles = colour_by("angle_deg", np.array([-175.0, 10.0, 170.0, 365.0]))
    assert list(within(angles, 0, 20)) == [False, True, False, True]
    assert list(within(angles, 160, -160)) == [True, False, True, False], "the way round over ±180°"
    words = colour_by("kind", pd.Series(["b", "a", None, "c"]))
    assert list(within(words, -0.5, 0.5)) == [False, True, False, False]
    assert list(within(words, 0.5, 9)) == [True, False, False, True]


def test_another_range_moves_the_colours_not_the_values() -> None:
    colouring = colour_by("score", np.linspace(0, 100, 101))
    narrow = with_limits(colouring, 40, 60)
    assert (narrow.low, narrow.high) == (40, 60)
    assert narrow.level[40] == 0 and narrow.level[60] == len(narrow.lut) - 1 == narrow.level[90]
    assert narrow.text(73) == "73.00"


@pytest.fixture
def panel(qtbot: QtBot) -> HistogramPanel:
    widget = HistogramPanel()
    qtbot.addWidget(widget)
    widget.resize(380, 110)
    colouring = colour_by("score", np.linspace(-5, 5, 1001))
    widget.show_counts(count(colouring, np.zeros(1001, bool)), colouring)
    with qtbot.waitExposed(widget):
        widget.show()
    return widget


def drag(panel: HistogramPanel, start: tuple[float, float], end: tuple[float, float]) -> None:
    view = panel.histogram
    a, b = (QPoint(round(x), round(y)) for x, y in (start, end))
    QTest.mousePress(view, LEFT, NONE, a)
    QTest.mouseMove(view, b)
    QTest.mouseRelease(view, LEFT, NONE, b)


def test_brushing_tells_a_range_and_writes_it_down(panel: HistogramPanel, qtbot: QtBot) -> None:
    view, middle = panel.histogram, panel.histogram.plot().center().y()
    live: list[float] = []
    view.brushing.connect(lambda low, high, keys: live.append(high))
    with qtbot.waitSignal(view.brushed) as told:
        drag(panel, (view.to_x(1.0), middle), (view.to_x(-2.0), middle))
    low, high, _ = told.args
    step = 12 / view.plot().width()
    assert low == pytest.approx(-2, abs=step) and high == pytest.approx(1, abs=step) and live
    assert float(panel.low.text()) == pytest.approx(low, abs=1e-4)
    with qtbot.waitSignal(view.brushed) as told:
        drag(panel, (view.to_x(3), middle), (view.plot().right() + 20, middle))
    assert told.args[1] == np.inf, "the last bin holds all that lies beyond"


def test_numbers_select_too_and_words_do_not(panel: HistogramPanel, qtbot: QtBot) -> None:
    panel.low.setText("")
    panel.high.setText("−1,5")
    with qtbot.waitSignal(panel.gated) as told:
        QTest.mouseClick(panel.select_button, LEFT)
    assert told.args == [-np.inf, -1.5]
    panel.high.setText("many")
    with qtbot.assertNotEmitted(panel.gated, wait=20):
        QTest.keyClick(panel.high, Qt.Key.Key_Return)
    assert "not a number" in panel.high.toolTip()


def test_a_handle_moves_the_range_of_the_colours(panel: HistogramPanel, qtbot: QtBot) -> None:
    view = panel.histogram
    assert view.colouring is not None
    foot = view.plot().bottom() + 4
    with qtbot.waitSignal(view.limits_moved) as told:
        drag(panel, (view.to_x(view.colouring.low), foot), (view.to_x(-1.0), foot))
    low, high = told.args
    assert low == pytest.approx(-1, abs=0.1) and high == view.colouring.high

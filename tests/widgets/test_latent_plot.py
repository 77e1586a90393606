"""The scatter under real mouse and key events: what is drawn, what is selected, where the handle goes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from pytestqt.qtbot import QtBot
from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QColor, QImage, QMouseEvent, QWheelEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

from particle_explorer.state import Selection
from particle_explorer.widgets.colours import CIRCLE, OKABE_ITO, colour_by, number, rgb, title_of
from particle_explorer.widgets.latent_plot import ScatterCanvas
from particle_explorer.widgets.plot_frame import ticks
from particle_explorer.widgets.splat import Points, points_in_polygon

NONE = Qt.KeyboardModifier.NoModifier
SHIFT, ALT = Qt.KeyboardModifier.ShiftModifier, Qt.KeyboardModifier.AltModifier
LEFT, MIDDLE = Qt.MouseButton.LeftButton, Qt.MouseButton.MiddleButton


def cloud(n: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.normal(size=n) * 0.5 + 3


@pytest.fixture
def canvas(qtbot: QtBot) -> Iterator[ScatterCanvas]:
    yield make(qtbot, 2000)


def make(qtbot: QtBot, n: int, size: tuple[int, int] = (400, 300)) -> ScatterCanvas:
    widget = ScatterCanvas(Selection(n))
    qtbot.addWidget(widget)
    widget.resize(*size)
    widget.set_points(Points.of(*cloud(n)), titles=("map 1", "map 2"))
    with qtbot.waitExposed(widget):
        widget.show()
    widget.repaint()
    return widget


def drag(
    canvas: ScatterCanvas,
    path: list[tuple[float, float]],
    modifiers: Qt.KeyboardModifier = NONE,
    button: Qt.MouseButton = LEFT,
) -> None:
    spots = [QPoint(round(x), round(y)) for x, y in path]
    QTest.mousePress(canvas, button, modifiers, spots[0])
    for spot in spots[1:]:
        QTest.mouseMove(canvas, spot)
    QTest.mouseRelease(canvas, button, modifiers, spots[-1])


def blob(canvas: ScatterCanvas, centre: tuple[float, float], radius_px: float) -> list[tuple[float, float]]:
    """A jagged outline around a place of the map."""
    middle = canvas.to_widget(*centre)
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    reach = radius_px * (1 + 0.3 * np.sin(7 * turn))
    return [
        (middle.x() + r * math.cos(t), middle.y() + r * math.sin(t)) for r, t in zip(reach, turn, strict=True)
    ]


def inside_slowly(x: float, y: float, polygon: list[tuple[float, float]]) -> bool:
    """Ray casting, one point at a time."""
    odd = False
    for (ax, ay), (bx, by) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        if (ay > y) != (by > y) and x < (bx - ax) * (y - ay) / (by - ay) + ax:
            odd = not odd
    return odd


def expected(canvas: ScatterCanvas, path: list[tuple[float, float]], n: int = 2000) -> NDArray[np.bool_]:
    polygon = [(float(round(x)), float(round(y))) for x, y in path]
    places = [canvas.to_widget(x, y) for x, y in zip(*cloud(n), strict=True)]
    return np.array([inside_slowly(at.x(), at.y(), polygon) for at in places])


def pixels(canvas: ScatterCanvas) -> NDArray[np.uint8]:
    image = canvas.grab().toImage().convertToFormat(canvas.grab().toImage().Format.Format_RGB32)
    bits = image.constBits()
    if hasattr(bits, "setsize"):
        bits.setsize(image.sizeInBytes())
    array = np.frombuffer(bits, np.uint8).reshape(image.height(), image.bytesPerLine() // 4, 4)
    return array[:, : image.width(), 2::-1].copy()


def count_near(picture: NDArray[np.uint8], colour: NDArray[np.float64], tolerance: int = 6) -> int:
    return int((np.abs(picture.astype(int) - colour).max(axis=-1) <= tolerance).sum())


# ---- selecting -----------------------------------------------------------------------


def test_lasso_takes_exactly_the_points_inside(canvas: ScatterCanvas) -> None:
    path = blob(canvas, (0.3, 3.1), 60)
    drag(canvas, path)
    wanted = expected(canvas, path)
    assert 100 < wanted.sum() < 1500
    assert np.array_equal(canvas.selection.mask, wanted)


def test_an_ellipse_takes_what_lies_in_the_ellipse_of_its_box(canvas: ScatterCanvas) -> None:
    QTest.keyClick(canvas, Qt.Key.Key_O)
    assert canvas.tool == "ellipse"
    a, b = canvas.to_widget(-0.8, 3.4).toPoint(), canvas.to_widget(1.0, 2.7).toPoint()
    drag(canvas, [(a.x(), a.y()), (b.x(), b.y())])
    places = [canvas.to_widget(x, y) for x, y in zip(*cloud(2000), strict=True)]
    dx = np.array([(at.x() - (a.x() + b.x()) / 2) / ((b.x() - a.x()) / 2) for at in places])
    dy = np.array([(at.y() - (a.y() + b.y()) / 2) / ((b.y() - a.y()) / 2) for at in places])
    radius = np.hypot(dx, dy)
    assert canvas.selection.mask[radius < 0.99].all() and not canvas.selection.mask[radius > 1.01].any()
    assert 100 < canvas.selection.count < 1500


@pytest.mark.parametrize(("modifiers", "what"), [(NONE, "set"), (SHIFT, "add"), (ALT, "subtract")])
def test_while_a_lasso_is_drawn_it_tells_what_would_be_selected(
    canvas: ScatterCanvas, qtbot: QtBot, modifiers: Qt.KeyboardModifier, what: str
) -> None:
    before = np.arange(2000) % 2 == 0
    canvas.selection.set(before)
    told: list[NDArray[np.bool_] | None] = []
    canvas.selection.hinted.connect(lambda mask: told.append(None if mask is None else mask.copy()))
    path = [QPoint(round(x), round(y)) for x, y in blob(canvas, (0, 3), 50)]
    QTest.mousePress(canvas, LEFT, modifiers, path[0])
    for spot in path[1:]:
        _move(canvas, spot, modifiers)
    qtbot.waitUntil(lambda: bool(told))
    assert np.array_equal(canvas.selection.mask, before), "nothing is selected before the hand lets go"
    hinted = told[-1]
    QTest.mouseRelease(canvas, LEFT, modifiers, path[-1])
    assert hinted is not None and np.array_equal(hinted, canvas.selection.mask)
    assert told[-1] is None, what


def _move(canvas: ScatterCanvas, spot: QPoint, modifiers: Qt.KeyboardModifier) -> None:
    """QTest moves without the keys that are held."""
    at = QPointF(spot)
    event = QMouseEvent(QEvent.Type.MouseMove, at, QPointF(canvas.mapToGlobal(spot)), LEFT, LEFT, modifiers)
    QApplication.sendEvent(canvas, event)


def test_hovering_asks_for_a_picture_and_shows_it(canvas: ScatterCanvas) -> None:
    asked: list[int] = []
    canvas.hovered.connect(asked.append)
    x, y = cloud(2000)
    row = int(np.argmin(np.hypot(x, y - 3)))
    # sent, not made by the pointer: another window may lie over this one
    _move(canvas, canvas.to_widget(x[row], y[row]).toPoint(), Qt.KeyboardModifier.NoModifier)
    assert len(asked) == 1 and asked[0] >= 0
    red = QImage(8, 8, QImage.Format.Format_RGB32)
    red.fill(QColor(250, 10, 10))
    canvas.set_thumbnail(asked[0] + 1, red)
    assert count_near(pixels(canvas), np.array([250, 10, 10])) == 0, "of another particle"
    canvas.set_thumbnail(asked[0], red)
    assert count_near(pixels(canvas), np.array([250, 10, 10])) > 5000
    _move(canvas, QPoint(2, 2), Qt.KeyboardModifier.NoModifier)
    assert asked[-1] == -1


def test_a_lasso_that_crosses_itself_follows_the_even_odd_rule(canvas: ScatterCanvas) -> None:
    middle = canvas.to_widget(0, 3)
    star = [
        (middle.x() + 80 * math.sin(4 * math.pi * i / 5), middle.y() - 80 * math.cos(4 * math.pi * i / 5))
        for i in range(5)
    ]
    drag(canvas, star)
    assert np.array_equal(canvas.selection.mask, expected(canvas, star))
    heart = int(np.argmin(np.hypot(cloud(2000)[0], cloud(2000)[1] - 3)))
    assert not canvas.selection.mask[heart]


def test_rectangle_takes_exactly_the_points_inside(canvas: ScatterCanvas) -> None:
    QTest.keyClick(canvas, Qt.Key.Key_R)
    a, b = canvas.to_widget(-1, 3.5), canvas.to_widget(0.5, 2.8)
    drag(canvas, [(a.x(), a.y()), (b.x(), b.y())])
    box = [(a.x(), a.y()), (b.x(), a.y()), (b.x(), b.y()), (a.x(), b.y())]
    assert np.array_equal(canvas.selection.mask, expected(canvas, box))


def test_modifiers_add_take_away_and_intersect(canvas: ScatterCanvas) -> None:
    left, right = blob(canvas, (-0.5, 3), 50), blob(canvas, (0.5, 3), 50)
    a, b = expected(canvas, left), expected(canvas, right)
    assert (a & b).any()
    for modifiers, wanted in (
        (SHIFT, a | b),
        (ALT, a & ~b),
        (Qt.KeyboardModifier.ControlModifier, a & ~b),
        (SHIFT | ALT, a & b),
        (NONE, b),
    ):
        drag(canvas, left)
        drag(canvas, right, modifiers)
        assert np.array_equal(canvas.selection.mask, wanted), modifiers


def test_keys_clear_undo_and_redo(canvas: ScatterCanvas) -> None:
    path = blob(canvas, (0, 3), 50)
    drag(canvas, path)
    mask = canvas.selection.mask
    ctrl = Qt.KeyboardModifier.ControlModifier
    QTest.keyClick(canvas, Qt.Key.Key_Escape)
    assert canvas.selection.count == 0
    QTest.keyClick(canvas, Qt.Key.Key_Z, ctrl)
    assert np.array_equal(canvas.selection.mask, mask)
    QTest.keyClick(canvas, Qt.Key.Key_Z, ctrl | SHIFT)
    assert canvas.selection.count == 0


def test_escape_during_a_lasso_drops_only_the_lasso(canvas: ScatterCanvas) -> None:
    canvas.selection.set(np.arange(2000) < 5)
    path = blob(canvas, (0, 3), 50)
    QTest.mousePress(canvas, LEFT, NONE, QPoint(*map(round, path[0])))
    QTest.mouseMove(canvas, QPoint(*map(round, path[10])))
    QTest.keyClick(canvas, Qt.Key.Key_Escape)
    QTest.mouseRelease(canvas, LEFT, NONE, QPoint(*map(round, path[10])))
    assert canvas.selection.count == 5


def test_a_click_takes_the_nearest_particle_and_looks_at_it(canvas: ScatterCanvas) -> None:
    x, y = cloud(2000)
    far = int(np.argmax(x))  # alone at the edge
    at = canvas.to_widget(x[far], y[far]).toPoint() + QPoint(2, -1)
    QTest.mouseClick(canvas, LEFT, NONE, at)
    assert list(canvas.selection.rows) == [far]
    assert canvas.selection.active == far
    corner = canvas.plot_rect().bottomLeft().toPoint() + QPoint(3, -3)
    QTest.mouseClick(canvas, LEFT, NONE, corner)
    assert canvas.selection.count == 1  # nothing near: nothing happens


def test_what_is_not_visible_is_not_taken(canvas: ScatterCanvas) -> None:
    canvas.zoom(3.0, canvas.to_widget(0, 3))
    inside = canvas.inside([(0, 0), (400, 0), (400, 300), (0, 300)])
    plot = canvas.plot_rect()
    places = [canvas.to_widget(x, y) for x, y in zip(*cloud(2000), strict=True)]
    assert np.array_equal(inside, [plot.contains(at) for at in places])


def test_one_change_of_the_selection_is_one_signal(canvas: ScatterCanvas) -> None:
    told: list[int] = []
    canvas.selection.changed.connect(lambda mask: told.append(int(mask.sum())))
    drag(canvas, blob(canvas, (0, 3), 50))
    QApplication.processEvents()
    assert told == [canvas.selection.count]


def test_points_in_polygon_agrees_with_ray_casting() -> None:
    rng = np.random.default_rng(1)
    polygon = rng.uniform(0, 10, (17, 2))
    x, y = rng.uniform(-1, 11, (2, 500))
    corners = [(float(a), float(b)) for a, b in polygon]
    slow = [inside_slowly(a, b, corners) for a, b in zip(x, y, strict=True)]
    assert np.array_equal(points_in_polygon(x, y, polygon), slow)


def test_points_without_a_place_are_never_selected(qtbot: QtBot) -> None:
    x, y = cloud(50)
    x[7] = np.nan
    canvas = ScatterCanvas(Selection(60))
    qtbot.addWidget(canvas)
    canvas.resize(400, 300)
    canvas.set_points(Points.of(x, y, rows=np.arange(10, 60)))
    canvas.show()
    mask = canvas.inside([(0, 0), (400, 0), (400, 300), (0, 300)])
    assert np.array_equal(np.flatnonzero(mask), np.delete(np.arange(10, 60), 7))


# ---- the handle ----------------------------------------------------------------------


def test_dragging_the_handle_moves_it_and_selects_nothing(canvas: ScatterCanvas) -> None:
    moved: list[tuple[float, float]] = []
    canvas.handle_moved.connect(lambda x, y: moved.append((x, y)))
    canvas.set_handle(0.0, 3.0)
    assert moved == []  # told where it is: silence
    at = canvas.handle_position()
    assert at is not None
    drag(canvas, [(at.x() + 3, at.y()), (at.x() + 20, at.y() - 10), (at.x() + 40, at.y() - 20)])
    assert len(moved) == 2
    wanted = canvas.to_axes(QPointF(round(at.x() + 40), round(at.y() - 20)))
    assert np.allclose(moved[-1], wanted)
    assert canvas.handle == moved[-1]
    assert canvas.selection.count == 0


def test_the_handle_tool_goes_where_one_clicks(canvas: ScatterCanvas) -> None:
    canvas.set_handle(0.0, 3.0)
    QTest.keyClick(canvas, Qt.Key.Key_D)
    spot = canvas.to_widget(-1.0, 2.5).toPoint()
    QTest.mouseClick(canvas, LEFT, NONE, spot)
    assert np.allclose(canvas.handle, canvas.to_axes(QPointF(spot)))
    assert canvas.selection.count == 0


def test_arrow_keys_move_the_handle_and_shift_ten_times_as_far(canvas: ScatterCanvas) -> None:
    canvas.set_handle(0.0, 3.0)
    x0, x1, y0, y1 = canvas.view
    QTest.keyClick(canvas, Qt.Key.Key_Right)
    assert np.allclose(canvas.handle, ((x1 - x0) / 100, 3.0))
    QTest.keyClick(canvas, Qt.Key.Key_Down, SHIFT)
    assert np.allclose(canvas.handle, ((x1 - x0) / 100, 3.0 - (y1 - y0) / 10))


def test_enter_asks_for_the_particle_nearest_to_the_handle(canvas: ScatterCanvas, qtbot: QtBot) -> None:
    canvas.set_handle(0.4, 3.2)
    with qtbot.waitSignal(canvas.snap_asked) as asked:
        QTest.keyClick(canvas, Qt.Key.Key_Return)
    x, y = cloud(2000)
    at = canvas.to_widget(0.4, 3.2)
    places = [canvas.to_widget(a, b) for a, b in zip(x, y, strict=True)]
    far = [math.hypot(p.x() - at.x(), p.y() - at.y()) for p in places]
    assert asked.args == [int(np.argmin(far))]


def test_a_one_dimensional_handle_is_a_line_that_moves_along_x(canvas: ScatterCanvas) -> None:
    moved: list[tuple[float, float]] = []
    canvas.handle_moved.connect(lambda x, y: moved.append((x, y)))
    canvas.set_handle(0.5, None)
    plot = canvas.plot_rect()
    at = canvas.handle_position()
    assert at is not None and at.y() == pytest.approx(plot.center().y(), abs=1)
    accent = rgb(["ff4d6d"])[0]
    column = pixels(canvas)[int(plot.top()) + 2 : int(plot.bottom()) - 2, round(at.x())]
    assert count_near(column, accent, 60) > 0.7 * len(column)
    drag(canvas, [(at.x(), at.y()), (at.x() + 30, plot.top() + 9)])
    assert canvas.handle[0] == pytest.approx(canvas.to_axes(QPointF(round(at.x() + 30), 0))[0])
    assert canvas.handle[1] is None
    assert math.isnan(moved[-1][1])
    QTest.keyClick(canvas, Qt.Key.Key_Up)
    assert len(moved) == 1  # there is no up on a line


def test_a_lasso_may_begin_on_the_line_of_the_handle(canvas: ScatterCanvas) -> None:
    canvas.set_handle(0.5, None)
    at = canvas.handle_position()
    assert at is not None
    start = (at.x(), at.y() - 40)
    drag(canvas, [start, (at.x() + 60, at.y() - 20), (at.x() + 60, at.y() + 60), (at.x(), at.y() + 40)])
    assert canvas.handle == (0.5, None)
    assert canvas.selection.count > 0
    QTest.keyClick(canvas, Qt.Key.Key_P)
    drag(canvas, [start, (at.x() + 30, start[1])])
    assert canvas.handle[0] == pytest.approx(canvas.to_axes(QPointF(round(at.x() + 30), 0))[0])


def test_the_handle_is_hollow_where_no_particle_is_near(canvas: ScatterCanvas) -> None:
    points = Points.of(*cloud(2000))
    assert points.near_data(0, 3) and not points.near_data(3.4, 4.6)
    assert points.near_data(0, None) and not points.near_data(40, None)
    accent = rgb(["ff4d6d"])[0]
    filled = []
    for place in ((0.0, 3.0), (3.0, 4.5)):
        canvas.set_handle(*place)
        at = canvas.to_widget(*place).toPoint()
        filled.append(
            count_near(pixels(canvas)[at.y() - 2 : at.y() + 2, at.x() - 2 : at.x() + 2], accent) > 0
        )
    assert filled == [True, False]


# ---- the view ------------------------------------------------------------------------


def test_the_wheel_zooms_about_the_cursor_and_a_double_click_fits(canvas: ScatterCanvas) -> None:
    spot = canvas.to_widget(0.5, 3.2)
    before = canvas.to_axes(spot)
    home = canvas.view
    wheel(canvas, spot, 480)
    assert np.allclose(canvas.to_axes(spot), before)
    assert canvas.view[1] - canvas.view[0] < 0.6 * (home[1] - home[0])
    QTest.mouseDClick(canvas, LEFT, NONE, spot.toPoint())
    assert np.allclose(canvas.view, home)


def wheel(canvas: ScatterCanvas, at: QPointF, turn: int) -> None:
    event = QWheelEvent(
        at,
        QPointF(canvas.mapToGlobal(at.toPoint())),
        QPoint(),
        QPoint(0, turn),
        Qt.MouseButton.NoButton,
        NONE,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    QApplication.sendEvent(canvas, event)


def test_the_wheel_over_an_axis_zooms_that_axis_only(canvas: ScatterCanvas) -> None:
    home = canvas.view
    plot = canvas.plot_rect()
    wheel(canvas, QPointF(plot.center().x(), plot.bottom() + 8), 240)
    assert canvas.view[2:] == home[2:]
    assert canvas.view[1] - canvas.view[0] < home[1] - home[0]


@pytest.mark.parametrize("how", ["tool", "middle", "space"])
def test_panning_moves_the_points_with_the_hand(canvas: ScatterCanvas, how: str) -> None:
    if how == "tool":
        QTest.keyClick(canvas, Qt.Key.Key_P)
    elif how == "space":
        QTest.keyPress(canvas, Qt.Key.Key_Space)
    grabbed = canvas.to_axes(QPointF(200, 150))
    drag(canvas, [(200, 150), (215, 140), (240, 170)], button=MIDDLE if how == "middle" else LEFT)
    assert np.allclose(canvas.to_axes(QPointF(240, 170)), grabbed)
    assert canvas.selection.count == 0


def test_new_points_keep_a_zoom_but_follow_an_untouched_view(canvas: ScatterCanvas) -> None:
    x, y = cloud(2000)
    canvas.set_points(Points.of(2 * x, y), keep_view=True)
    assert canvas.view[0] < 2 * x.min()  # untouched: all is shown again
    canvas.zoom(2.0, canvas.to_widget(0, 3))
    zoomed = canvas.view
    canvas.set_points(Points.of(3 * x, y), keep_view=True)
    assert canvas.view == zoomed
    canvas.set_points(Points.of(x, y))
    assert canvas.view != zoomed


def test_a_few_strays_do_not_shrink_the_map() -> None:
    x, y = cloud(5000)
    x[3] = 1e4
    home = Points.of(x, y).home
    assert home[1] < 20


# ---- the picture ---------------------------------------------------------------------


def test_points_are_drawn_where_they_are(qtbot: QtBot) -> None:
    canvas = make(qtbot, 60)
    x, y = cloud(60)
    level = np.arange(60) % 2 == 0
    canvas.set_colouring(colour_by("class_id", level.astype(int)))
    picture = pixels(canvas)
    colours = rgb(list(OKABE_ITO[:2]))
    right = 0
    for row in range(60):
        at = canvas.to_widget(x[row], y[row])
        shade = picture[int(at.y()), int(at.x())]
        right += int(np.abs(shade - colours[int(level[row])]).max() < 10)
    assert right >= 55  # a few are under others


def test_discs_are_round(qtbot: QtBot) -> None:
    canvas = ScatterCanvas(Selection(3))
    qtbot.addWidget(canvas)
    canvas.resize(300, 300)
    canvas.set_points(Points.of([0, 0.5, 1], [0, 0.5, 1]))
    canvas.show()
    at = canvas.to_widget(0.5, 0.5).toPoint()
    part = pixels(canvas)[at.y() - 6 : at.y() + 7, at.x() - 6 : at.x() + 7].astype(int)
    strength = part[:, :, 2] - part[0, 0, 2]
    assert (strength > 100).sum() in range(21, 40)  # about π · 3²
    ys, xs = np.nonzero(strength > 60)
    disc = strength[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    assert np.array_equal(disc, disc.T) and np.array_equal(disc, disc[::-1])


def test_what_is_not_selected_fades(canvas: ScatterCanvas) -> None:
    canvas.set_colouring(colour_by("class_id", np.zeros(2000, int)))
    full = rgb([OKABE_ITO[0]])[0]
    ground = rgb(["101115"])[0]
    before = count_near(pixels(canvas), full)
    canvas.selection.set(cloud(2000)[0] > 0)
    after = pixels(canvas)
    assert 0.2 * before < count_near(after, full) < 0.8 * before
    assert count_near(after, ground + 0.25 * (full - ground)) > 0.2 * before


@pytest.mark.parametrize(("theme", "ring"), [("dark", 255), ("light", 0)])
def test_the_ring_of_what_is_selected_stands_out(canvas: ScatterCanvas, theme: str, ring: int) -> None:
    canvas.set_theme(theme)
    canvas.set_colouring(colour_by("class_id", np.zeros(2000, int)))
    plot = canvas.plot_rect().adjusted(3, 3, -3, -3).toRect()

    def rings() -> int:
        part = pixels(canvas)[plot.top() : plot.bottom(), plot.left() : plot.right()]
        part = np.where(part == 255, 254, part) if theme == "light" else part
        return count_near(part, np.full(3, float(ring)), 0)

    before = rings()
    canvas.selection.set(cloud(2000)[0] > 1)
    assert rings() > before + 50


def test_themes_change_the_picture(canvas: ScatterCanvas) -> None:
    dark = pixels(canvas)
    canvas.set_theme("light")
    light = pixels(canvas)
    plot = canvas.plot_rect().toRect()
    for x, y in ((plot.left() + 4, plot.top() + 4), (4, 4)):
        assert dark[y, x].max() < 60 and light[y, x].min() > 200


def test_density_comes_by_itself_with_many_points(qtbot: QtBot) -> None:
    canvas = make(qtbot, 320_000)
    told: list[bool] = []
    canvas.density_changed.connect(told.append)
    assert canvas.picture.shows_density
    canvas.zoom(20.0, canvas.to_widget(0, 3))
    canvas.repaint()
    assert not canvas.picture.shows_density
    qtbot.waitUntil(lambda: told[-1:] == [False])
    canvas.set_density("on")
    canvas.repaint()
    assert canvas.picture.shows_density
    canvas.fit()
    middle = canvas.to_widget(0, 3).toPoint()
    edge = canvas.to_widget(2.6, 3.9).toPoint()
    picture = pixels(canvas).astype(int).sum(axis=-1)
    around = lambda at: picture[at.y() - 4 : at.y() + 5, at.x() - 4 : at.x() + 5].mean()  # noqa: E731
    assert around(middle) > around(edge) + 100


def test_density_and_selection_together(qtbot: QtBot) -> None:
    canvas = make(qtbot, 20_000)
    canvas.set_density("on")
    canvas.set_colouring(colour_by("class_id", np.zeros(20_000, int)))
    canvas.selection.set(cloud(20_000)[0] > 0)
    picture = pixels(canvas).astype(int).sum(axis=-1)
    left, right = canvas.to_widget(-0.7, 3).toPoint(), canvas.to_widget(0.7, 3).toPoint()
    around = lambda at: picture[at.y() - 6 : at.y() + 7, at.x() - 6 : at.x() + 7].mean()  # noqa: E731
    assert around(right) > 2 * around(left)


def test_dense_screens_get_all_their_pixels(qtbot: QtBot, monkeypatch: pytest.MonkeyPatch) -> None:
    canvas = make(qtbot, 500)
    plain = canvas._framed().image()
    monkeypatch.setattr(canvas, "devicePixelRatioF", lambda: 2.0)
    dense = canvas._framed().image()
    assert dense.width() == 2 * plain.width() and dense.height() == 2 * plain.height()
    path = blob(canvas, (0, 3), 50)
    polygon = [(float(round(x)), float(round(y))) for x, y in path]
    assert np.array_equal(canvas.inside(polygon), expected(canvas, path, 500))
    at = canvas.to_widget(*(float(v[4]) for v in cloud(500)))
    assert canvas.nearest(at) == 4


def test_the_cursor_names_the_particle_under_it(qtbot: QtBot, canvas: ScatterCanvas) -> None:
    canvas.set_colouring(colour_by("angle_deg", np.linspace(-180, 179, 2000)))
    x, y = cloud(2000)
    row = int(np.argmin(x))
    before = pixels(canvas)

    def names_it() -> None:
        QTest.mouseMove(canvas, canvas.to_widget(x[row], y[row]).toPoint())
        assert canvas._hover == row

    qtbot.waitUntil(names_it)  # the screen's own cursor may just be leaving a window that was shown late
    assert not np.array_equal(pixels(canvas), before)
    assert f"{row + 1:,}".replace(",", "\u202f") in canvas.describe(row)
    assert "angle (°)" in canvas.describe(row)
    QTest.mouseMove(canvas, canvas.plot_rect().topLeft().toPoint() + QPoint(3, 3))
    assert canvas._hover is None


def test_an_empty_map_says_what_to_do(qtbot: QtBot) -> None:
    canvas = ScatterCanvas(Selection(0))
    qtbot.addWidget(canvas)
    canvas.resize(300, 200)
    canvas.show()
    silent = pixels(canvas)
    canvas.set_message("Open a stack")
    assert not np.array_equal(pixels(canvas), silent)
    drag(canvas, [(100, 100), (150, 150), (100, 150)])  # harmless
    QTest.keyClick(canvas, Qt.Key.Key_Return)
    wheel(canvas, QPointF(100, 100), 120)


def test_a_selection_outlives_its_view(qtbot: QtBot) -> None:
    selection = Selection(100)
    canvas = ScatterCanvas(selection)
    canvas.set_points(Points.of(*cloud(100)))
    canvas.deleteLater()
    qtbot.waitUntil(lambda: len(selection.changed) == 0)
    selection.set(np.ones(100, bool))


def test_a_million_points_are_fluid(qtbot: QtBot) -> None:
    """Generous bounds for a busy machine; `bench interface` measures."""
    canvas = make(qtbot, 1_000_000)
    path = blob(canvas, (0, 3), 80)
    canvas.repaint()
    began = time.perf_counter()
    mask = canvas.inside(path)
    took = time.perf_counter() - began
    assert mask.sum() > 10_000
    assert took < 0.3
    began = time.perf_counter()
    for _ in range(5):
        canvas._set_view(tuple(v + 0.001 for v in canvas.view), keep_size=True)  # type: ignore[arg-type]
        canvas.repaint()
    assert (time.perf_counter() - began) / 5 < 0.3


# ---- colours and words ---------------------------------------------------------------


def test_columns_are_coloured_by_what_they_are() -> None:
    n = 1000
    rng = np.random.default_rng(0)
    assert colour_by("class_id", rng.integers(0, 5, n)).kind == "category"
    assert colour_by("x", rng.integers(0, 500, n)).kind == "continuous"
    assert colour_by("micrograph", np.array(["b", "a"] * 500, object)).labels == ("a", "b")
    assert colour_by("ok", rng.integers(0, 2, n).astype(bool)).labels == ("no", "yes")
    assert colour_by("defocus_angle_deg", rng.uniform(0, 180, n)).kind == "continuous"
    angle = colour_by("angle_deg", np.array([-180.0, 180.0, 179.99, 0.0, 540.0]))
    assert angle.kind == "cyclic"
    assert angle.level[0] == angle.level[1] == angle.level[4]  # a full turn is the same colour
    assert np.abs(CIRCLE[angle.level[2]] - CIRCLE[angle.level[0]]).max() < 5


def test_missing_values_are_said_and_coloured_apart() -> None:
    values = np.array([1.0, np.nan, 2.0, 3.5])
    found = colour_by("defocus_u_A", values)
    assert found.level[1] == found.missing and found.level[0] < found.missing
    assert found.text(1) == "no value" and found.text(3) == "3.500"
    words = colour_by("group", np.array(["a", None, "b"], object))
    assert words.level[1] == words.missing and words.text(1) == "no value"


@pytest.mark.parametrize(
    ("column", "title"),
    [
        ("z_0", "map 1"),
        ("pc_1", "principal component 2"),
        ("umap_0", "UMAP 1"),
        ("umap-2_1", "UMAP 2 (run 2)"),
        ("angle_deg", "angle (°)"),
        ("defocus_u_A", "defocus u (Å)"),
        ("cluster-kmeans", "k-means cluster"),
        ("class_id", "class"),
        ("rlnDefocusU", "rlnDefocusU"),
        ("alignments2D/shift[0]", "alignments2D/shift[0]"),
    ],
)
def test_columns_have_names_for_people(column: str, title: str) -> None:
    assert title_of(column) == title


def test_numbers_and_ticks() -> None:
    assert number(-1234.5, step=1) == "−1\u202f234"
    assert number(0.1 + 0.2 - 0.3, step=0.1) == "0"
    assert number(2.5, step=0.5) == "2.5"
    marks, step = ticks(-1.9, 2.1, 5)
    assert step == 1 and marks == [-1, 0, 1, 2]
    assert ticks(1, 1, 5)[0] == []

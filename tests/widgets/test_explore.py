"""The Explore dock on the trained sample, in a real window: what is drawn is what the molecule does."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

pytest.importorskip("napari")

from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QMouseEvent
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QApplication

from particle_explorer.session import Session
from particle_explorer.simulate import render
from particle_explorer.widgets import pins
from particle_explorer.widgets.screenshots import Hand, live
from particle_explorer.widgets.workspace import open_workspace, wrapped


@pytest.fixture
def explorer(make_napari_viewer: Callable[..., Any], sample_dir: Path, tmp_path: Path) -> Iterator[Any]:
    """The workspace, open on a copy of the trained sample, with its tab Explore on top."""
    if not (sample_dir / "particles_explorer" / "runs").is_dir():
        pytest.skip("no trained session in sample_data")
    shutil.copytree(sample_dir, tmp_path / "sample")
    session = Session.open(tmp_path / "sample" / "particles_explorer")
    session.prepare_images(lambda *_: None, threading.Event())
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    workspace = open_workspace(viewer, session.path)
    hand = Hand(workspace)
    hand.wait(lambda: workspace.reconstruction.image is not None, "the first picture")
    hand.wait(lambda: workspace.explore.handle.space is not None, "the positions")
    hand.tab("Explore")
    hand.rest(0.3)
    yield workspace
    workspace.shutdown()
    hand.rest(0.2)


def hinge_of(picture: NDArray[np.float32], size_A: float) -> float:
    """The opening (°) of the noise-free molecule that a picture resembles most, at any angle in the plane."""
    hinge, angle = (each.ravel() for each in np.meshgrid(np.arange(0, 61, 5.0), np.arange(0, 360, 6.0)))
    clean = render(hinge, angle, np.zeros((len(hinge), 2)), picture.shape[0], size_A).reshape(len(hinge), -1)
    clean = clean - clean.mean(1, keepdims=True)
    likeness = clean @ (picture - picture.mean()).ravel() / np.linalg.norm(clean, axis=1)
    return float(hinge[likeness.argmax()])


def test_a_path_opens_the_hinge_and_so_do_the_particles_along_it(explorer: Any) -> None:
    hand, explore, state = Hand(explorer), explorer.explore, explorer.state
    viewer, paths = explorer.viewer, explore.paths
    hinge = state.features["true_hinge_deg"].to_numpy(float)
    good = state.features["true_junk"].to_numpy(float) == 0
    space = explore.handle.space
    # the ends, as somebody would take them who knows a closed particle and an open one
    for share, button in ((2, paths.from_button), (98, paths.to_button)):
        about = np.abs(hinge - np.percentile(hinge[good], share)) < 4
        state.set_handle(np.median(space.z[about & good], axis=0))
        explore.show_part("Paths")
        paths.kind.setCurrentIndex(paths.kind.findData("particles"))
        hand.click(button)
    hand.write(paths.n_frames, "8")
    hand.click(paths.make_button)
    hand.wait(lambda: paths.walk is not None, "the path", 120)
    walk = paths.walk
    assert walk.drawn.shape == walk.averaged.shape and len(walk.drawn) == 8
    size = state.session.plan.cached_pixel_size_A
    drawn = [hinge_of(picture, size) for picture in walk.drawn[[0, 2, 5, 7]]]
    seen = [hinge_of(picture, size) for picture in walk.averaged[[0, 7]]]
    assert spearmanr(range(4), drawn).statistic > 0.9 and drawn[-1] - drawn[0] > 20, drawn
    assert seen[1] - seen[0] > 15, seen
    agreement = [np.mean(curve[2:5]) for curve in walk.frc if curve is not None]
    assert len(agreement) >= 6 and np.median(agreement) > 0.6, "what is drawn is what the particles show"
    assert not paths.agreement.isHidden() and not paths.average_button.isHidden()
    made = viewer.layers["path, particles"].metadata
    written = json.loads(Path(made["positions, uids of the particles"]).read_text(encoding="utf-8"))
    assert made["run"] == state.run.name and made["config"]["along"] == "particles"
    assert [len(uid) for uid in written["uid"]] == walk.n_particles.tolist()
    assert np.isin(np.concatenate(written["uid"]), state.session.uid).all()

    # its slider walks, whatever particle the other one shows, and takes the handle along
    assert viewer.layers["path"].data.shape[:2] == (8, len(viewer.layers["selected particles"].data))
    viewer.dims.set_current_step(0, 5)
    np.testing.assert_allclose(state.handle_z, walk.positions[5])
    state.selection.set(good & (hinge > 50))
    hand.wait(lambda: len(viewer.layers["selected particles"].data) == state.selection.count, "the selection")
    viewer.dims.set_current_step(0, 6)
    assert viewer.layers["path"].data.shape[1] == state.selection.count

    # hidden, it leaves the foot of the canvas to others
    text = viewer.canvas.overlays.text
    assert "path: " in text.text
    viewer.layers["path"].visible = viewer.layers["path, particles"].visible = False
    assert "path: " not in text.text
    viewer.layers["path"].visible = True
    assert "path: " in text.text

    # and it is exported
    hand.click(explore.paths.export_part.button)
    paths.format.setCurrentIndex(paths.format.findData("gif"))
    hand.click(paths.export_button)
    hand.wait(lambda: "Written" in paths.words.text(), "the film", 60)
    assert list(state.session.path.parent.glob("*.gif"))


def where_nothing_is_known(explorer: Any) -> None:
    hand, panel, state = Hand(explorer), explorer.explore.handle, explorer.state
    hand.click(panel.middle_button)
    assert not state.off_data and "rests on data" in panel.words.text()
    state.set_handle(state.handle_z + 30)
    assert state.off_data and "extrapolation" in panel.words.text()
    hand.wait(lambda: "extrapolated" in explorer.viewer.canvas.overlays.text.text, "the words")
    hand.click(panel.snap_button)
    assert not state.off_data and state.selection.active is not None
    row = state.selection.active
    np.testing.assert_allclose(state.handle_z, state.features.loc[:, ["z_0", "z_1"]].to_numpy(float)[row])


def sliders_of_components(explorer: Any) -> None:
    hand, panel, state = Hand(explorer), explorer.explore.handle, explorer.state
    hand.click(panel.middle_button)
    panel.kind.setCurrentIndex(1)
    panel._build_sliders()
    live(20)
    before = state.handle_z
    slider = panel._sliders[1].slider
    hand.click(slider)
    QTest.keyClick(slider, Qt.Key.Key_PageUp)
    QTest.keyClick(slider, Qt.Key.Key_PageUp)
    step = state.handle_z - before
    assert np.linalg.norm(step) > 0.05
    along = panel.space.components.components[1]
    np.testing.assert_allclose(abs(step @ along), np.linalg.norm(step), rtol=1e-5)


def pins_and_the_mean_of_particles(explorer: Any) -> None:
    hand, panel, viewer = Hand(explorer), explorer.explore.handle, explorer.viewer
    hand.click(panel.middle_button)
    hand.rest(0.4)
    first = explorer.reconstruction.image.copy()
    hand.click(panel.pin_button)
    hand.drag_handle((0.8, 0.7))
    hand.rest(0.5)
    second = explorer.reconstruction.image
    m = first.shape[0]
    shown = viewer.layers[pins.LAYER].data
    made = viewer.layers[pins.LAYER].metadata
    assert made["pin 1"]["position"] != made["below"]["position"] == explorer.state.handle_z.tolist()
    assert shown.shape == (2 * m + pins.GAP_PX, m)
    difference = shown[m + pins.GAP_PX :].ravel()
    assert np.corrcoef(difference, (second - first).ravel())[0, 1] > 0.99
    assert np.corrcoef(shown[:m].ravel(), first.ravel())[0, 1] > 0.98
    hand.click(panel.near)
    hand.wait(lambda: panel.layer is not None, "the mean")
    hand.rest(0.3)
    disc = np.hypot(*(np.mgrid[:m, :m] - m // 2)) < 0.4 * m
    assert np.corrcoef(panel.layer.data[disc], second[disc])[0, 1] > 0.8, "data and model agree here"
    hand.click(panel.unpin_button)
    assert not viewer.layers[pins.LAYER].visible and not panel.pins.positions


def test_the_handle_is_told_moved_pinned_and_checked_against_particles(explorer: Any) -> None:
    where_nothing_is_known(explorer)
    sliders_of_components(explorer)
    pins_and_the_mean_of_particles(explorer)


def test_a_part_is_drawn_held_and_let_go(explorer: Any) -> None:
    hand, viewer, state = Hand(explorer), explorer.viewer, explorer.state
    explore, panel = explorer.explore, explorer.explore.hold_still
    hand.click(explore.handle.middle_button)
    explore.show_part("Hold a part still")
    live(50)
    hand.click(panel.draw_button)
    hand.rest(0.4)
    assert viewer.layers.selection.active is panel.shapes and not viewer.canvas.grid.enabled
    canvas = viewer.window._qt_viewer.canvas.native
    at = QPointF(canvas.width() * 0.35, canvas.height() * 0.5)
    drag(canvas, at, at + QPointF(90, 110))
    hand.wait(lambda: len(panel.shapes.data) == 1, "the ellipse")
    mask = panel.mask()
    assert mask.shape == explorer.reconstruction.image.shape and 10 < mask.sum() < mask.size / 3
    hand.click(panel.done_button)
    hand.wait(lambda: state.held, "the held frames", 120)
    assert panel.shapes is None and viewer.canvas.grid.enabled and viewer.layers["selected particles"].visible
    assert state.run.gauge()["region"] == {"mask_px": int(mask.sum())}
    assert "turned by up to" in panel.words.text()
    assert "pose-held angle_deg" in state.features
    hand.wait(lambda: "held still" in viewer.canvas.overlays.text.text, "the held picture")
    hand.click(panel.undo_button)
    hand.wait(lambda: state.run.gauge() is None and not state.held, "the way back", 120)
    assert "pose-held angle_deg" not in state.features or not panel.undo_button.isEnabled()


def test_groups_are_made_named_merged_and_chosen(explorer: Any) -> None:
    hand, state, explore = Hand(explorer), explorer.state, explorer.explore
    groups = explore.groups
    explore.show_part("Layouts and groups")
    live(50)
    hand.write(groups.clustering.editor("n_clusters").native, "4")
    hand.click(groups.cluster_button)
    hand.wait(lambda: groups.groups.count() == 4 and not explore.worker.busy, "four groups", 120)
    column = groups.which.currentData()
    hand.wait(lambda: explorer.latent.colour.currentData() == column, "their colours")
    labels = state.features[column].to_numpy()
    groups.groups.item(1).setSelected(True)
    groups.groups.item(2).setSelected(True)
    both = np.isin(labels, [2, 3])
    hand.wait(lambda: np.array_equal(state.selection.mask, both), "their particles")
    hand.click(groups.merge_button)
    hand.wait(lambda: groups.groups.count() == 3 and not explore.worker.busy, "three groups", 60)
    groups.groups.item(1).setSelected(True)
    hand.write(groups.name, "open")
    hand.wait(lambda: groups.which.currentData() == "cluster-named", "a name", 60)
    named = state.features["cluster-named"]
    np.testing.assert_array_equal((named == "open").to_numpy(), np.isin(labels, [2, 3]))


def test_captions_share_lines_as_long_as_they_fit() -> None:
    assert wrapped(["a" * 40, "b" * 40]) == "a" * 40 + " · " + "b" * 40
    assert wrapped(["a" * 50, "b" * 40, "c"]).splitlines() == ["a" * 50, "b" * 40 + " · c"]
    assert wrapped([]) == ""


def drag(widget: Any, start: QPointF, end: QPointF) -> None:
    """A press, moves and a release that carry their buttons, as vispy's canvas wants them."""
    left, none = Qt.MouseButton.LeftButton, Qt.MouseButton.NoButton

    def send(kind: QEvent.Type, at: QPointF, button: Any, buttons: Any) -> None:
        where = QPointF(widget.mapToGlobal(QPoint(int(at.x()), int(at.y()))))
        QApplication.sendEvent(
            widget, QMouseEvent(kind, at, where, button, buttons, Qt.KeyboardModifier.NoModifier)
        )
        live(30)

    send(QEvent.Type.MouseMove, start, none, none)
    send(QEvent.Type.MouseButtonPress, start, left, left)
    for share in np.linspace(0.1, 1, 8):
        send(QEvent.Type.MouseMove, start + (end - start) * float(share), none, left)
    send(QEvent.Type.MouseButtonRelease, end, left, none)

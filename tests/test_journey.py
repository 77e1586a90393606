"""Open, train, lasso, drag, average, export: in a real window, by mouse and keys alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("napari")

from qtpy.QtCore import Qt
from qtpy.QtTest import QTest

from particle_explorer.plugin import read_stack
from particle_explorer.widgets.screenshots import Camera, Hand

if TYPE_CHECKING:
    from particle_explorer.session import Session

starfile = pytest.importorskip("starfile")


@pytest.mark.timeout(600)
def test_from_a_stack_to_class_averages_by_hand(
    make_napari_viewer: Callable[..., Any], tiny_stack: Path, tmp_path: Path
) -> None:
    for file in tiny_stack.parent.iterdir():
        shutil.copy(file, tmp_path)
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    _, workspace = viewer.window.add_plugin_dock_widget("napari-particle-explorer", "Particle Explorer")
    hand = Hand(workspace)
    camera = Camera(viewer, Path(os.environ.get("PARTICLE_EXPLORER_SCREENSHOTS", tmp_path / "screenshots")))
    hand.rest()

    # open
    particles = workspace.particles
    hand.click(particles.open_button)
    hand.choose_file(tmp_path / tiny_stack.name)
    hand.wait(lambda: particles.stack.preview.n_images > 0, "the preview")
    assert "120" in particles.stack.summary.text()
    hand.write(particles.stack.form.editor("diameter_A").native, "200")
    hand.rest()
    camera.take("1-open")
    hand.click(particles.stack.prepare_button)
    hand.wait(lambda: "selected particles" in viewer.layers, "the session", 120)
    assert workspace.state.session.info.preprocess.diameter_A == 200

    # train
    train = workspace.train
    hand.write(train.train_form.editor("n_epochs").native, "2")
    hand.click(train.train_button)
    hand.wait(lambda: train.watch.isVisible(), "the training", 60)
    hand.wait(lambda: "reconstruction" in viewer.layers, "the map", 400)
    hand.rest(1.0)
    camera.take("2-trained")
    canvas = workspace.latent.canvas
    assert canvas.n_points == 120

    # lasso
    hand.lasso((0.5, 0.5), 0.3)
    selection = workspace.state.selection
    assert 0 < selection.count < 120
    layer = viewer.layers["selected particles"]
    hand.wait(lambda: len(layer.data) == selection.count, "the selected particles")
    np.testing.assert_array_equal(layer.data.rows, selection.rows)
    hand.rest()
    camera.take("3-lasso")

    # drag
    picture = viewer.layers["reconstruction"].data.copy()
    before = workspace.state.handle_z
    hand.drag_handle((0.15, 0.2))
    assert not np.array_equal(workspace.state.handle_z, before)
    hand.wait(lambda: not np.array_equal(viewer.layers["reconstruction"].data, picture), "another picture")
    assert selection.count == len(layer.data), "dragging does not select"
    hand.rest()
    camera.take("4-drag")

    # average
    classes = workspace.classes
    hand.tab("Classes")
    hand.click(classes.make.average_button)
    hand.wait(lambda: "class averages" in viewer.layers, "the average", 120)
    assert classes.stored.classes[0]["n"] == selection.count
    hand.rest()
    camera.take("5-average")

    # export
    hand.click(classes.export_part.button)
    hand.write(classes.exporting.path, str(tmp_path / "out" / "selected.star"))
    hand.click(classes.exporting.button)
    hand.wait(lambda: "Written" in classes.exporting.words.text(), "the export", 120)
    camera.take("6-export")
    written = starfile.read(tmp_path / "out" / "selected.star")
    assert len(written["particles"]) == selection.count
    assert {"rlnAnglePsi", "rlnOriginXAngst"} <= set(written["particles"].columns)
    [(average, attributes, _)] = read_stack(str(tmp_path / "out" / "selected.mrcs"))
    assert average.shape == (1, 32, 32) and attributes["scale"][-1] == pytest.approx(7)
    np.testing.assert_allclose(average[0], classes.stored.images[0], atol=1e-6)

    workspace.shutdown()
    hand.rest(0.2)


@pytest.mark.timeout(300)
def test_a_training_is_stopped_resumed_and_compared_by_hand(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, tmp_path: Path
) -> None:
    n_epochs = 60  # enough to be stopped on the way on a fast machine
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    _, workspace = viewer.window.add_plugin_dock_widget("napari-particle-explorer", "Particle Explorer")
    hand = Hand(workspace)
    camera = Camera(viewer, Path(os.environ.get("PARTICLE_EXPLORER_SCREENSHOTS", tmp_path / "screenshots")))
    train = workspace.train
    workspace.open(tiny_session.path)
    hand.wait(lambda: train.setup.isVisible(), "the session")

    def state_of(name: str) -> str:
        return tiny_session.run(name).state

    # train a first run to its end
    hand.write(train.train_form.editor("n_epochs").native, "1")
    hand.click(train.train_button)
    hand.wait(lambda: workspace.state.run is not None, "the first map", 120)
    first = workspace.state.run.name

    # train another model, and stop it on the way
    hand.tab("Train")
    hand.choose(train.model, "spatial-VAE")
    hand.write(train.train_form.editor("n_epochs").native, str(n_epochs))
    hand.click(train.train_button)
    hand.wait(lambda: len(tiny_session.runs()) == 2, "the second run", 60)
    second = tiny_session.runs()[-1].name
    hand.wait(lambda: tiny_session.run(second).status.epoch > 1, "the first epochs", 60)
    hand.click(train.watch.stop_button)
    hand.wait(lambda: not train.watch.isVisible(), "the stop", 60)
    assert state_of(second) == "stopped", train.complaint.sentence.text()
    reached = tiny_session.run(second).status.epoch
    assert 0 < reached < n_epochs
    steps = tiny_session.run(second).metrics()["step"].tolist()

    # resume it where it stood
    hand.wait(lambda: train.runs.resume_button.isVisible(), "the button Resume")
    hand.rest()
    camera.take("7-stopped")
    hand.click(train.runs.resume_button)
    hand.wait(train.watch.isVisible, "the training going on")
    hand.wait(lambda: not train.watch.isVisible(), "the end", 200)
    assert state_of(second) == "finished", train.complaint.sentence.text()
    assert len(tiny_session.runs()) == 2, "resuming makes no other run"
    assert tiny_session.run(second).status.epoch == n_epochs
    logged = tiny_session.run(second).metrics()["step"].tolist()
    assert logged == sorted(set(logged)) and logged[-1] > steps[-1], "it goes on from its checkpoint"
    hand.wait(lambda: workspace.state.run is not None and workspace.state.run.name == second, "its map")

    # compare the two
    hand.click(train.runs.table_button)
    hand.wait(lambda: train.table is not None and train.table.table.rowCount() == 2, "the table of runs")
    runs = train.table
    for row, key in ((0, Qt.KeyboardModifier.NoModifier), (1, Qt.KeyboardModifier.ControlModifier)):
        place = runs.table.visualItemRect(runs.table.item(row, 0)).center()
        QTest.mouseClick(runs.table.viewport(), Qt.MouseButton.LeftButton, key, place)
    assert set(runs.chosen()) == {first, second}
    hand.click(runs.compare_button)
    hand.wait(lambda: "particles:" in runs.words.text(), "the comparison")
    assert "120 particles" in runs.words.text() and "explain" in runs.words.text()
    hand.rest()
    runs.grab().save(str(tmp_path / "compared.png"))
    camera.take("8-compared")
    runs.close()
    workspace.shutdown()
    hand.rest(0.2)


@pytest.mark.timeout(600)
def test_every_model_is_trained_and_dragged_by_hand(
    make_napari_viewer: Callable[..., Any], tiny_session: Session, tmp_path: Path
) -> None:
    viewer = make_napari_viewer(show=True)
    viewer.window.resize(1366, 768)
    _, workspace = viewer.window.add_plugin_dock_widget("napari-particle-explorer", "Particle Explorer")
    hand = Hand(workspace)
    camera = Camera(viewer, Path(os.environ.get("PARTICLE_EXPLORER_SCREENSHOTS", tmp_path / "screenshots")))
    train, canvas = workspace.train, workspace.latent.canvas
    workspace.open(tiny_session.path)
    hand.wait(lambda: train.setup.isVisible(), "the session")
    models = [train.model.itemText(i) for i in range(train.model.count())]
    assert len(models) == 6
    for model in models:
        hand.tab("Train")
        hand.choose(train.model, model)
        hand.write(train.train_form.editor("n_epochs").native, "1")
        hand.click(train.train_button)
        n = models.index(model) + 1
        hand.wait(lambda n=n: len(tiny_session.runs()) == n, f"the run of {model}", 60)
        name = tiny_session.runs()[-1].name
        hand.wait(
            lambda name=name: workspace.state.run is not None and workspace.state.run.name == name,
            f"the map of {model}",
            200,
        )
        hand.wait(lambda: "reconstruction" in viewer.layers, "the reconstruction")
        hand.rest(1.0)
        assert canvas.n_points == 120
        picture, before = viewer.layers["reconstruction"].data.copy(), workspace.state.handle_z
        hand.drag_handle((0.15, 0.2))
        assert not np.array_equal(workspace.state.handle_z, before), model
        hand.wait(
            lambda picture=picture: not np.array_equal(viewer.layers["reconstruction"].data, picture),
            f"another picture of {model}",
        )
        camera.take(f"9-{name}")
    hand.wait(lambda: "knows no pose" in viewer.canvas.overlays.text.text, "the caption of the VAE")
    workspace.shutdown()
    hand.rest(0.2)

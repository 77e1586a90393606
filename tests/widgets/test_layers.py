"""The layers "selected particles" and "reconstruction": lazy, linked, updated in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("napari")

from napari.components import ViewerModel
from pytestqt.qtbot import QtBot
from qtpy.QtWidgets import QWidget

from particle_explorer import jobs
from particle_explorer.configs import ClassMapConfig, SpatialVAEConfig, VAEConfig
from particle_explorer.session import Session
from particle_explorer.widgets.pictures import (
    Decoder,
    Pictures,
    best_view,
    low_passed,
    through_ctf,
    to_reference,
    views_of,
)
from particle_explorer.widgets.reconstruction import Reconstruction
from particle_explorer.widgets.selected import ParticleRows, SelectedParticles
from particle_explorer.widgets.workspace import state_of


@pytest.fixture
def viewer() -> Iterator[ViewerModel]:
    yield ViewerModel()


@pytest.fixture
def owner(qtbot: QtBot) -> QWidget:
    widget = QWidget()
    qtbot.addWidget(widget)
    return widget


def _phantom(n: int) -> NDArray[np.float32]:
    """Asymmetric and smooth."""
    y, x = np.indices((n, n)) - n // 2
    blobs = [(0, 0, 4, 1.0), (-6, 3, 2.5, 0.8), (5, 7, 2.0, 0.9)]
    image = sum(h * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * s**2)) for cy, cx, s, h in blobs)
    return np.asarray(image, np.float32)


@pytest.mark.parametrize("n", [40, 41])
@given(angle=st.floats(-180, 180), dy=st.floats(-3, 3), dx=st.floats(-3, 3))
def test_to_reference_undoes_a_placement(n: int, angle: float, dy: float, dx: float) -> None:
    torch = pytest.importorskip("torch")
    from particle_explorer.transforms import place

    reference = _phantom(n)
    placed = place(
        torch.from_numpy(reference)[None, None],
        torch.tensor([np.deg2rad(angle)], dtype=torch.float32),
        torch.tensor([[dy, dx]], dtype=torch.float32),
    )
    back = to_reference(placed[0, 0].numpy(), angle, np.array([dy, dx]))
    inside = np.hypot(*(np.indices((n, n)) - n // 2)) < 0.35 * n
    assert np.corrcoef(back[inside], reference[inside])[0, 1] > 0.99


def test_rows_are_read_only_when_asked(tiny_session: Session) -> None:
    images = tiny_session.images
    rows = ParticleRows(Pictures(images), np.array([5, 2, 9]))
    assert rows.shape == (3, *images.shape[2:]) and rows.dtype == np.float32
    np.testing.assert_array_equal(rows[1], images[2][0])
    np.testing.assert_array_equal(rows[-1, 3:5], images[9][0][3:5])
    np.testing.assert_array_equal(rows[:2], images[[5, 2]][:, 0])
    with pytest.raises(TypeError, match="not loaded whole"):
        np.asarray(rows)


def _with_poses(viewer: ViewerModel, session: Session) -> Any:
    state = state_of(viewer)
    state.open_session(session)
    n = session.n_particles
    poses = pd.DataFrame(
        {"angle_deg": np.linspace(-90, 90, n), "shift_y_px": np.ones(n), "shift_x_px": -np.ones(n)},
        index=session.table.index,
    )
    state.set_features(pd.concat([session.table.drop(columns=poses.columns, errors="ignore"), poses], axis=1))
    return state


def test_the_selection_is_the_layer(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session
) -> None:
    state = _with_poses(viewer, tiny_session)
    shown = SelectedParticles(viewer, owner)
    qtbot.waitUntil(lambda: shown.layer is not None)
    assert len(shown.layer.data) == tiny_session.n_particles  # nothing selected shows all, in words
    assert "none selected" in viewer.canvas.overlays.text.text

    mask = np.zeros(tiny_session.n_particles, bool)
    mask[[3, 50, 77]] = True
    state.selection.set(mask)
    qtbot.waitUntil(lambda: len(shown.layer.data) == 3)
    assert "3 of 120 particles selected, aligned" in viewer.canvas.overlays.text.text
    assert len(viewer.layers) == 1

    state.set_view("raw")
    qtbot.waitUntil(lambda: "as prepared" in viewer.canvas.overlays.text.text)
    np.testing.assert_array_equal(shown.layer.data[1], tiny_session.images[50][0])
    made = shown.layer.metadata
    assert made["pictures"] == "raw" and made["session"] == str(tiny_session.path)
    np.testing.assert_array_equal(made["uid"], tiny_session.uid[mask])


def test_a_session_without_its_images_says_so(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session
) -> None:
    (tiny_session.path / "images.json").unlink()
    _with_poses(viewer, Session.open(tiny_session.path))
    shown = SelectedParticles(viewer, owner)
    qtbot.waitUntil(lambda: "not prepared" in viewer.canvas.overlays.text.text)
    assert shown.layer is None
    shown.stop()


def _aligned_slowly(session: Session, state: Any, row: int) -> NDArray[np.float32]:
    features = state.features
    shift = features[["shift_y_px", "shift_x_px"]].to_numpy(float)[row]
    scale = session.images.shape[-1] / session.table["box_px"].iloc[row]
    return to_reference(session.images[row][0], float(features["angle_deg"].iloc[row]), shift * scale)


def test_every_view_of_a_particle_is_what_it_says(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, pencil: type[_Pencil]
) -> None:
    state = _with_poses(viewer, tiny_session)
    assert views_of(state) == ["raw", "low-pass", "aligned"]
    assert best_view(state, "residual") == "aligned", "no model yet: the next best"
    _show_run(state, tiny_session.path / "runs" / "0001-class-map")
    assert views_of(state)[-2:] == ["reconstruction", "residual"]
    rows, decoder, m = np.array([7, 3]), Decoder(), tiny_session.images.shape[-1]
    _Pencil.side = m
    shown = {view: Pictures.of(state, view, decoder) for view in views_of(state)}
    raw, low, aligned = (shown[view].read(rows) for view in ("raw", "low-pass", "aligned"))
    np.testing.assert_array_equal(raw, tiny_session.images.read(rows))
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(aligned[i, 0], _aligned_slowly(tiny_session, state, row))
        np.testing.assert_array_equal(low[i, 0], low_passed(aligned[i, 0], shown["low-pass"].low_pass_px))
    with ThreadPoolExecutor(1) as pool:  # decoding is never the window's own work
        drawn = pool.submit(shown["reconstruction"].read, rows).result()
        rest = pool.submit(shown["residual"].read, rows).result()
    z = state.features["z_0"].to_numpy()[rows]
    np.testing.assert_allclose(drawn[:, 0, 0, 0], z, rtol=1e-6)
    poses = shown["residual"].poses
    assert poses is not None
    for i, image in enumerate(raw - through_ctf(drawn, tiny_session.ctf(rows))):
        turn, move = poses.of(rows[i : i + 1], m)
        np.testing.assert_allclose(rest[i, 0], to_reference(image[0], turn[0], move[0]), atol=1e-5)
    decoder.close()
    assert pencil.made[0].closed and len(pencil.made) == 1


@pytest.mark.parametrize(
    ("model", "is_free"),
    [
        (ClassMapConfig(), True),
        (ClassMapConfig(use_ctf=False), False),
        (SpatialVAEConfig(apply_ctf=True), True),
        (SpatialVAEConfig(), False),
        (VAEConfig(), False),
    ],
)
def test_nothing_remains_of_a_particle_that_is_what_the_model_draws(
    viewer: ViewerModel, tiny_session: Session, pencil: type[_Pencil], model: Any, is_free: bool
) -> None:
    state = _with_poses(viewer, tiny_session)
    _show_run(state, tiny_session.path / "runs" / "0001", model)
    state.pose_of_run = frozenset({"angle_deg", "shift_y_px", "shift_x_px"})
    _Pencil.side = tiny_session.images.shape[-1]
    rows, decoder = np.array([4, 90]), Decoder()
    shown = Pictures.of(state, "residual", decoder)
    assert shown.placed is not None

    class Drawn:
        """Images that are the model's own, at the particles' poses, as the microscope shows them."""

        shape = tiny_session.images.shape

        def read(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
            angle, shift = shown.placed.of(rows, _Pencil.side)
            z = state.features[["z_0"]].to_numpy()[rows]
            drawn = _Pencil(Path()).decode(z, angle, shift)
            return through_ctf(drawn, tiny_session.ctf(rows)) if is_free else drawn

    with ThreadPoolExecutor(1) as pool:
        images = pool.submit(Drawn().read, rows).result()
        rest = pool.submit(replace(shown, images=Drawn()).read, rows).result()
    assert images.std() > 0.05 and np.abs(rest).max() < 1e-4
    decoder.close()


@pytest.mark.parametrize("period", [5.0, 8.0])
def test_low_passing_halves_a_wave_of_its_period(period: float) -> None:
    wave = np.broadcast_to(np.cos(2 * np.pi * np.arange(80) / period), (80, 80)).astype(np.float32)
    inner = low_passed(wave, period)[40, 20:60]
    assert np.abs(inner).max() == pytest.approx(0.5, abs=0.03)


def test_reconstructions_come_later_and_the_slider_never_waits(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, pencil: type[_Pencil]
) -> None:
    state = _with_poses(viewer, tiny_session)
    _Pencil.side = tiny_session.images.shape[-1]
    shown = SelectedParticles(viewer, owner)
    _show_run(state, tiny_session.path / "runs" / "0001-class-map")
    state.set_view("reconstruction")
    qtbot.waitUntil(lambda: shown.layer is not None and shown.layer.data.pictures.view == "reconstruction")
    z = state.features["z_0"].to_numpy()
    qtbot.waitUntil(lambda: bool(np.isclose(shown.layer.data[0][0, 0], z[0])))
    viewer.dims.set_current_step(0, 90)
    qtbot.waitUntil(lambda: bool(np.isclose(shown.layer.data[90][0, 0], z[90])))
    assert np.isclose(shown.layer.data[93][0, 0], z[93]), "those next in line were drawn ahead"
    assert "reconstruction" in viewer.canvas.overlays.text.text
    shown.stop()
    shown.decoder.close()


def test_the_slider_marks_the_particle_and_the_other_way_round(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session
) -> None:
    state = _with_poses(viewer, tiny_session)
    shown = SelectedParticles(viewer, owner)
    mask = np.zeros(tiny_session.n_particles, bool)
    mask[[3, 50, 77]] = True
    state.selection.set(mask)
    qtbot.waitUntil(lambda: shown.layer is not None and len(shown.layer.data) == 3)
    viewer.dims.set_current_step(0, 2)
    assert state.selection.active == 77
    state.selection.set_active(50)
    assert viewer.dims.current_step[0] == 1
    state.selection.set_active(10)  # not among the selected
    assert viewer.dims.current_step[0] == 1
    mask[3] = False
    state.selection.set_active(77)
    state.selection.set(mask)  # the marked one moves up a place and stays marked
    qtbot.waitUntil(lambda: len(shown.layer.data) == 2)
    assert (viewer.dims.current_step[0], state.selection.active) == (1, 77)


class _Pencil:
    """Draws the latent position as grey values, in place of the worker process."""

    def __init__(self, run_path: Path) -> None:
        self.run_path = run_path
        self.closed = False
        _Pencil.made.append(self)

    made: list[_Pencil] = []  # noqa: RUF012
    side = 8

    def decode(self, z: Any, *pose: Any, held: bool = False) -> NDArray[np.float32]:
        assert threading.current_thread() is not threading.main_thread()
        z = np.atleast_2d(z)
        image = np.add.outer(z[:, 0], np.linspace(0, 1, self.side**2).reshape(2 * [self.side]))
        if pose and pose[0] is not None:  # any picture that is another at another pose
            image = image * np.cos(np.deg2rad(pose[0]))[:, None, None] + np.asarray(pose[1])[:, :1, None]
        return image[:, None].astype(np.float32)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pencil(monkeypatch: pytest.MonkeyPatch) -> type[_Pencil]:
    _Pencil.made, _Pencil.side = [], 8
    monkeypatch.setattr(jobs, "DecodeClient", _Pencil)
    return _Pencil


class _Run:
    """As much of a run as the layer asks for."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path = path
        self.config = SimpleNamespace(model=model)


def _show_run(state: Any, path: Path, model: Any = None) -> None:
    state.run, state.drawable = _Run(path, model or ClassMapConfig()), True
    state.features = state.features.assign(z_0=np.linspace(-1, 1, len(state.features)))
    state.handle_z = np.zeros(1)
    state.run_changed.emit(state.run)


def test_the_reconstruction_follows_the_handle_in_place(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, pencil: type[_Pencil]
) -> None:
    state = state_of(viewer)
    state.open_session(tiny_session)
    drawn = Reconstruction(viewer, owner)
    _show_run(state, tiny_session.path / "runs" / "0001-class-map")
    qtbot.waitUntil(lambda: drawn.layer is not None)
    qtbot.wait(50)
    data, limits = drawn.layer.data, list(drawn.layer.contrast_limits)
    for z in np.linspace(0.1, 3, 40):
        state.set_handle(np.array([z]))
    qtbot.waitUntil(lambda: bool(np.isclose(drawn.layer.data[0, 0], 3)))
    assert drawn.layer.data is data, "updated in place"
    assert list(drawn.layer.contrast_limits) == limits, "contrast is set once per run"
    assert len(viewer.layers) == 1 and len(pencil.made) == 1
    qtbot.waitUntil(lambda: drawn.layer.metadata.get("position") == [3.0])
    assert drawn.layer.metadata["settings"].endswith("0001-class-map/config.json")


def test_the_drawing_process_goes_when_nobody_looks(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, pencil: type[_Pencil]
) -> None:
    state = state_of(viewer)
    state.open_session(tiny_session)
    drawn = Reconstruction(viewer, owner)
    _show_run(state, tiny_session.path / "runs" / "0001-class-map")
    qtbot.waitUntil(lambda: drawn.layer is not None)
    drawn.pause()
    qtbot.waitUntil(lambda: pencil.made[0].closed)
    state.set_handle(np.array([2.0]))
    qtbot.wait(50)
    assert len(pencil.made) == 1
    drawn.resume()
    qtbot.waitUntil(lambda: bool(np.isclose(drawn.layer.data[0, 0], 2)))
    assert len(pencil.made) == 2


def test_another_run_is_drawn_by_another_process(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, pencil: type[_Pencil]
) -> None:
    state = state_of(viewer)
    state.open_session(tiny_session)
    drawn = Reconstruction(viewer, owner)
    for name in ("0001-class-map", "0002-class-map"):
        _show_run(state, tiny_session.path / "runs" / name)
        qtbot.waitUntil(lambda name=name: bool(pencil.made) and pencil.made[-1].run_path.name == name)
    qtbot.waitUntil(lambda: drawn.layer is not None)
    assert pencil.made[0].closed


def test_coordinates_from_elsewhere_have_no_drawing(
    qtbot: QtBot, viewer: ViewerModel, owner: QWidget, tiny_session: Session, tmp_path: Path
) -> None:
    from particle_explorer.coordinates import import_latents

    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(120, 2)))
    run, _ = import_latents(tiny_session, tmp_path / "z.npy")
    state = state_of(viewer)
    state.open_session(tiny_session)
    drawn = Reconstruction(viewer, owner)
    state.open_run(run)
    qtbot.waitUntil(lambda: "no model draws" in viewer.canvas.overlays.text.text)
    state.set_handle(np.array([1.0, 0.5]))
    qtbot.wait(50)
    assert drawn.layer is None
    assert {"z_0", "z_1"} <= set(state.features.columns)

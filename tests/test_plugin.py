"""What napari finds: the reader, the writer, the sample; lazily, and with neither Qt nor torch."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from particle_explorer import plugin
from particle_explorer.configs import ClassMapConfig, RunConfig
from particle_explorer.files import UserError
from particle_explorer.jobs import DecodeClient
from particle_explorer.latents import latent_columns
from particle_explorer.particles import Particles
from particle_explorer.session import Session
from particle_explorer.status import StatusWriter

NAME = "napari-particle-explorer"


def test_importing_the_plugin_is_light() -> None:
    heavy = "{'qtpy', 'napari', 'torch', 'pandas', 'scipy', 'pyarrow'}"
    code = f"import sys, particle_explorer.plugin; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_menu_of_napari_says_what_made_a_layer(qtbot: Any) -> None:
    napari = pytest.importorskip("napari")
    from particle_explorer.widgets.provenance import ProvenanceDialog

    viewer = napari.Viewer(show=False)
    viewer.add_image(np.zeros((4, 4)), name="drawn", metadata={"run": "0001", "uid": [3, 4]})
    plugin.what_made_this()
    (dialog,) = viewer.window._qt_window.findChildren(ProvenanceDialog)
    assert dialog.text.toPlainText() == "run: 0001\nuid: 3, 4"
    viewer.close()


@pytest.mark.parametrize("suffix", [".star", ".cs", ".mrcs"])
def test_a_stack_becomes_a_lazy_layer_in_angstrom(
    tiny_stack: Path, suffix: str, tiny_particles: Particles
) -> None:
    path = tiny_stack.with_suffix(suffix)
    reader = plugin.get_reader(str(path))
    assert reader is not None
    [(data, attributes, kind)] = reader(str(path))
    assert kind == "image" and data.shape == (120, 32, 32)
    assert attributes["scale"] == pytest.approx((1, 7, 7))
    assert attributes["axis_labels"] == ("particle", "y", "x")
    assert attributes["metadata"][plugin.METADATA]["source"] == str(path)
    low, high = attributes["contrast_limits"]
    assert low < float(np.mean(data[3])) < high
    with pytest.raises(TypeError):
        np.asarray(data)
    np.testing.assert_allclose(data[7], tiny_particles.images[7][0])
    np.testing.assert_allclose(data[7:9, :5], tiny_particles.images.read([7, 8])[:, 0, :5])


@pytest.mark.parametrize(
    "path", ["picture.png", "a.tif", "a.npy", "folder", ["a.star", "b.star"], "notes.txt"]
)
def test_other_things_are_left_to_others(tmp_path: Path, path: str | list[str]) -> None:
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / name) for name in path] if isinstance(path, list) else str(tmp_path / path)
    assert plugin.get_reader(paths) is None


def test_a_star_file_without_particles_is_said_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "job.star"
    path.write_text("data_job\n\n_rlnJobType 1\n")
    reader = plugin.get_reader(str(path))
    assert reader is not None
    with pytest.raises(UserError, match=r"job\.star"):
        reader(str(path))


def test_a_session_without_a_window_is_its_images(tiny_session: Session) -> None:
    reader = plugin.get_reader(str(tiny_session.path))
    assert reader is not None
    [(data, attributes, kind)] = reader(str(tiny_session.path))
    assert kind == "image" and len(data) == tiny_session.n_particles
    assert attributes["name"] == tiny_session.name


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(5, 24, 24)).astype(np.float32)
    path = tmp_path / "out.mrcs"
    assert plugin.write_stack(str(path), images, {"scale": (1.0, 3.5, 3.5)}) == [str(path)]
    [(data, attributes, _)] = plugin.read_stack(str(path))
    np.testing.assert_array_equal(data[:], images)
    assert attributes["scale"] == pytest.approx((1, 3.5, 3.5))


def test_colours_are_not_written_as_grey(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grey"):
        plugin.write_stack(str(tmp_path / "out.mrcs"), np.zeros((2, 8, 8, 3)), {})


def test_the_sample_is_copied_to_the_users_folder(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    star = plugin.sample_particles()
    assert star.is_relative_to(tmp_path)
    [(data, _, _)] = plugin.open_sample_particles()
    assert len(data) > 100
    before = star.stat().st_mtime_ns
    assert plugin.sample_particles() == star and star.stat().st_mtime_ns == before


def test_the_trained_sample_opens_with_its_map(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not list(sample_dir.rglob("session.json")):
        pytest.skip("no trained session in sample_data")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    session = Session.open(plugin.sample_session())
    run = session.newest_finished_run()
    assert run is not None and run.has_weights and session.has_images
    assert np.isfinite(session.images[0]).all()
    assert len(session.originals()) == session.n_particles
    features = run.features()
    z = features[latent_columns(features)].to_numpy()
    with DecodeClient(run.path) as client:
        pictures = client.decode(z[[0, -1]])
    assert np.isfinite(pictures).all() and pictures.std() > 0


def test_a_packed_session_is_whole_again_when_opened(tiny_session: Session, tmp_path: Path) -> None:
    run = tiny_session.new_run(RunConfig(model=ClassMapConfig(), data=tiny_session.data_spec()))
    with StatusWriter(run.path):
        (run.path / "live").mkdir()
    plugin.pack_session(tiny_session.path, tmp_path / "packed")
    assert socket.gethostname() not in (tmp_path / "packed/runs" / run.name / "status.json").read_text()
    packed = Session.open(tmp_path / "packed")
    assert not packed.has_images and packed.runs()[0].state == "finished"
    packed.prepare_images()
    np.testing.assert_array_equal(packed.images[:], tiny_session.images[:])


def test_napari_opens_a_stack_by_its_manifest(
    make_napari_viewer: Callable[..., Any], tiny_stack: Path, tmp_path: Path
) -> None:
    pytest.importorskip("napari")
    for file in tiny_stack.parent.iterdir():
        shutil.copy(file, tmp_path)
    viewer = make_napari_viewer()
    [layer] = viewer.open(str(tmp_path / tiny_stack.name), plugin=NAME)
    assert layer.data.shape == (120, 32, 32)
    layer.save(str(tmp_path / "again.mrcs"), plugin=NAME)
    [(again, _, _)] = plugin.read_stack(str(tmp_path / "again.mrcs"))
    np.testing.assert_allclose(again[:], layer.data[:], rtol=1e-6)


def test_napari_opens_the_workspace_from_the_plugins_menu(
    make_napari_viewer: Callable[..., Any], qtbot: Any
) -> None:
    pytest.importorskip("napari")
    viewer = make_napari_viewer()
    _, workspace = viewer.window.add_plugin_dock_widget(NAME, "Particle Explorer")
    _, second = viewer.window.add_plugin_dock_widget(NAME, "Another view of the map")
    assert workspace.state is second.state
    workspace.shutdown()
    second.shutdown()
    qtbot.wait(20)


def test_the_trained_sample_opens_in_the_workspace(
    make_napari_viewer: Callable[..., Any],
    sample_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qtbot: Any,
) -> None:
    pytest.importorskip("napari")
    from particle_explorer.widgets.workspace import workspace_of

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    viewer = make_napari_viewer()
    viewer.open_sample(NAME, "hinge-session")
    workspace = workspace_of(viewer)
    assert workspace is not None
    qtbot.waitUntil(lambda: "reconstruction" in viewer.layers, timeout=60_000)
    assert workspace.state.run is not None and viewer.dims.ndim == 3
    assert [layer.name for layer in viewer.layers if layer.visible] == [
        "reconstruction",
        "selected particles",
    ]
    workspace.shutdown()
    qtbot.wait(50)

"""The Train dock: the form becomes a command, a running job is followed and found again."""

from __future__ import annotations

import csv
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("napari")

from napari.components import ViewerModel
from pytestqt.qtbot import QtBot
from qtpy.QtCore import Qt
from qtpy.QtTest import QTest
from qtpy.QtWidgets import QToolButton

from particle_explorer import jobs
from particle_explorer.configs import ClassMapConfig, RunConfig, TrainConfig
from particle_explorer.latents import Latents
from particle_explorer.session import Run, Session
from particle_explorer.state import read
from particle_explorer.status import PAUSE, STOP, StatusWriter
from particle_explorer.widgets.painted import Curve, CurveView
from particle_explorer.widgets.runs import RunsWindow
from particle_explorer.widgets.train import TrainDock, devices, model_classes
from particle_explorer.widgets.training_plot import drawn, read_metrics, round_limits


@pytest.fixture
def dock(qtbot: QtBot) -> Iterator[TrainDock]:
    widget = TrainDock(ViewerModel())
    qtbot.addWidget(widget)
    widget.show()
    yield widget
    widget.shutdown()


def _new_run(session: Session) -> Run:
    return session.new_run(RunConfig(model=ClassMapConfig(), data=session.data_spec()))


def test_says_what_to_do_before_there_are_particles(dock: TrainDock) -> None:
    assert dock.no_session.isVisible() and not dock.setup.isVisible() and not dock.runs.isVisible()


def test_the_class_map_comes_first_and_every_model_is_explained(
    dock: TrainDock, tiny_session: Session
) -> None:
    dock.state.open_session(tiny_session)
    assert dock.model.currentData() == "class-map"
    for index in range(dock.model.count()):
        dock.model.setCurrentIndex(index)
        assert len(dock.model_words.text()) > 40
        visible = [kind for kind, form in dock.forms.items() if form.isVisible()]
        assert visible == [dock.model.currentData()]
    assert dock.model.count() == len(model_classes())


def test_no_form_is_wider_than_its_column(dock: TrainDock, tiny_session: Session) -> None:
    dock.state.open_session(tiny_session)
    for index in range(dock.model.count()):
        dock.model.setCurrentIndex(index)
        for form in (dock.forms[dock.model.currentData()], dock.train_form):
            for fold in form.findChildren(QToolButton):
                if fold.text().startswith("Advanced") and not fold.isChecked():
                    fold.click()
            assert form.minimumSizeHint().width() <= 360, dock.model.currentText()


def test_the_form_is_the_command_line(dock: TrainDock, tiny_session: Session) -> None:
    dock.state.open_session(tiny_session)
    dock.forms["class-map"].editor("latent_dim").value = 1
    dock.train_form.editor("n_epochs").value = 3
    expected = ["train", str(tiny_session.path), "--model.kind", "class-map", "--model.latent-dim", "1"]
    assert dock.arguments() == [*expected, "--train.n-epochs", "3", "--device", "auto"]


def test_the_button_says_how_long_it_takes(dock: TrainDock, tiny_session: Session, qtbot: QtBot) -> None:
    dock.state.open_session(tiny_session)
    qtbot.waitUntil(lambda: "about" in dock.train_button.text())


def test_the_gpu_of_an_apple_computer_is_offered(dock: TrainDock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    dock._on_devices(devices())
    assert dock.device.itemText(0) == "automatic: Apple GPU" and dock.device.findData("mps") > 0


class _Pretended:
    """A training job as it looks from outside: status, metrics and live pictures in the run's folder."""

    def __init__(self, session: Session, job: Path | None = None) -> None:
        self.run = _new_run(session)
        self.stop = threading.Event()
        folders = [self.run.path] if job is None else [self.run.path, job]
        self.writer = StatusWriter(*folders, stop=self.stop)
        self.writer.__enter__()

    def epoch(self, number: int) -> None:
        path = self.run.path / "metrics.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            rows = csv.writer(file)
            if new:
                rows.writerow(["epoch", "step", "learning_rate", "loss", "fit"])
            rows.writerow([number, number, 1e-3, 10.0 / number, 9.0 / number])
        live = self.run.path / "live"
        live.mkdir(exist_ok=True)
        images = np.random.default_rng(number).normal(size=(4, 16, 16)).astype(np.float32)
        np.savez(live / f"{number:04d}.npz", epoch=number, panel_images=images, panel_reconstructions=images)
        what = {"what": "training", "fraction": number / 4, "epoch": number, "n_epochs": 4}
        self.writer.update(**what, images_per_second=123.0, seconds_left=7.0)

    def end(self) -> None:
        self.writer.__exit__(None, None, None)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_curve_of_one_value_is_drawn(qtbot: QtBot, log_y: bool, n: int) -> None:
    view = CurveView(title="Loss")
    qtbot.addWidget(view)
    y = np.full(n, 10.0)
    view.set_curves([Curve("loss", np.arange(n), y)], y_range=round_limits(y), log_y=log_y)
    view.grab()  # what is raised while painting fails the test


def test_a_training_is_followed_from_its_start(
    dock: TrainDock, tiny_session: Session, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[_Pretended] = []

    def start(arguments: list[str], folder: Path) -> Path:
        begun.append(_Pretended(tiny_session, job=folder))
        return folder

    monkeypatch.setattr(jobs, "start", start)
    dock.state.open_session(tiny_session)
    dock.train_button.click()
    qtbot.waitUntil(lambda: bool(begun))
    begun[0].epoch(1)
    begun[0].epoch(2)
    qtbot.waitUntil(lambda: "7 s left" in dock.watch.words.text(), timeout=10_000)
    assert "epoch 2 of 4" in dock.watch.words.text() and "123 images/s" in dock.watch.words.text()
    assert dock.watch.panel.n_images == 8 and dock.watch.curves.title.startswith("Loss per particle: ")
    assert not dock.setup.isVisible()

    dock.watch.stop_button.click()
    assert (begun[0].run.path / STOP).exists(), "asked to end in good order"
    qtbot.waitUntil(begun[0].stop.is_set, timeout=5000)
    begun[0].end()
    qtbot.waitUntil(lambda: dock.setup.isVisible(), timeout=10_000)
    assert "nothing to resume" in dock.complaint.sentence.text(), "it has no checkpoint yet"


def test_a_running_training_is_found_again(dock: TrainDock, tiny_session: Session, qtbot: QtBot) -> None:
    job = _Pretended(tiny_session)
    job.epoch(3)
    dock.state.open_session(Session.open(tiny_session.path))
    qtbot.waitUntil(lambda: "epoch 3 of 4" in dock.watch.words.text(), timeout=10_000)
    assert dock.runs.list.count() == 1 and "running" in dock.runs.list.item(0).text()
    job.end()
    qtbot.waitUntil(lambda: "finished" in dock.runs.list.item(0).text(), timeout=10_000)


def test_a_failed_training_says_why_in_place(
    dock: TrainDock, tiny_session: Session, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(arguments: list[str], folder: Path) -> Path:
        (folder / "log.txt").write_text("Traceback: all of it\n")
        writer = StatusWriter(folder)
        writer.__enter__()
        error = MemoryError("out of memory")
        writer.__exit__(MemoryError, error, None)
        return folder

    monkeypatch.setattr(jobs, "start", start)
    dock.state.open_session(tiny_session)
    dock.train_button.click()
    qtbot.waitUntil(lambda: dock.complaint.isVisible(), timeout=10_000)
    assert "out of memory" in dock.complaint.sentence.text()
    dock.complaint.button.click()
    assert "all of it" in dock.complaint.details.toPlainText()
    assert dock.setup.isVisible()


def _log(losses: list[float], name: str, n_epochs: int, steps_per_epoch: int = 2) -> pd.DataFrame:
    step = np.arange(1, len(losses) + 1)
    numbers = {"epoch": step // steps_per_epoch, "step": step, "seconds": step * 1.0, "loss": losses}
    return pd.DataFrame({**numbers, name: losses})


def test_the_curve_of_a_class_map_starts_where_it_can_be_compared() -> None:
    name = "negative_log_likelihood"
    annealed = [-83.0] * 8
    early = drawn(_log(annealed, name, 10), 10)
    assert early.curve is not None and list(early.curve.x) == [4], "heat is 1 from epoch 4 of 10 on"
    early = drawn(_log(annealed[:6], name, 10), 10)
    assert early.curve is None and "Warming up" in early.empty and "epoch 4" in early.empty
    late = drawn(_log([*annealed, -70.0, -71.0, -72.0, -73.0], name, 10), 10)
    assert late.curve is not None
    assert list(late.curve.x) == [4, 5, 6] and list(late.curve.y) == [83, 70.5, 72.5]
    assert late.title == "Log-likelihood per particle over noise: 72.5"
    assert late.better == "higher"


def test_the_curve_of_other_models_is_their_loss() -> None:
    log = _log([20.0, 10.0], "reconstruction", 2).assign(kl_angle=1.0, learning_rate=0.1)
    log["loss"] += 1
    plot = drawn(log, 2)
    assert plot.curve is not None and list(plot.curve.y) == [21, 11]
    assert list(plot.curve.x) == [0.5, 1.0]
    assert plot.title == "Loss per particle: 11" and plot.better == "lower" and "kl angle 1." in plot.tip


def test_parts_of_a_loss_trends_and_a_log_scale(dock: TrainDock) -> None:
    log = _log(list(np.linspace(20.0, 10.0, 100)), "reconstruction", 5, steps_per_epoch=20)
    log = log.assign(kl_angle=1.0)
    plot = drawn(log, 5)
    assert [curve.name for curve in plot.terms] == ["reconstruction", "kl angle"]
    dock.watch.show_plot(plot)
    assert [curve.faint for curve in dock.watch.curves.curves] == [False, True], "a trend over the points"
    smooth, raw = dock.watch.curves.curves
    assert np.corrcoef(smooth.y[5:-5], raw.y[5:-5])[0, 1] > 0.999
    dock.watch.each_term.setChecked(True)
    assert {curve.name for curve in dock.watch.curves.curves} == {"reconstruction", "kl angle", ""}
    dock.watch.log_scale.setChecked(True)
    assert dock.watch.curves.log_y and np.nanmax(dock.watch.curves.curves[0].y) < 1.4
    dock.watch.curves.grab()


def test_a_run_is_put_into_the_form_again(dock: TrainDock, tiny_session: Session, qtbot: QtBot) -> None:
    model = ClassMapConfig(latent_dim=1, nodes_per_dim=9)
    run = tiny_session.new_run(
        RunConfig(model=model, train=TrainConfig(n_epochs=7), data=tiny_session.data_spec())
    )
    dock.state.open_session(tiny_session)
    dock.use_settings(run.name)
    assert dock.forms["class-map"].value() == model and dock.train_form.value().n_epochs == 7


def test_training_goes_on_from_a_run_with_other_settings(
    dock: TrainDock, tiny_session: Session, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def start(arguments: list[str], folder: Path) -> Path:
        started.append(arguments)
        return folder

    monkeypatch.setattr(jobs, "start", start)
    run = _with_latents(tiny_session, 0.0)
    dock.state.open_session(tiny_session)
    table = RunsWindow(dock.viewer, dock)
    qtbot.addWidget(table)
    table.read()
    qtbot.waitUntil(lambda: table.table.rowCount() == 1)
    assert not table.go_on_button.isEnabled()
    table.table.selectRow(0)
    QTest.mouseClick(table.go_on_button, Qt.MouseButton.LeftButton)
    assert run.name in dock.going_on_words.text() and dock.train_button.text().startswith("Go on training")
    dock.train_form.editor("learning_rate").value = 0.0005
    arguments = dock.arguments()
    assert arguments[arguments.index("--parent") + 1] == run.name and "--warm-start" in arguments
    assert arguments[arguments.index("--train.learning-rate") + 1] == "0.0005"

    # another model cannot go on from there, and one may change one's mind
    dock.model.setCurrentIndex(dock.model.findData("vae"))
    assert not dock.going_on.isVisibleTo(dock) and "--warm-start" not in dock.arguments()
    dock.go_on_from(run.name)
    QTest.mouseClick(dock.anew_button, Qt.MouseButton.LeftButton)
    assert "--warm-start" not in dock.arguments()

    # duplicating takes the settings alone
    QTest.mouseClick(table.repeat_button, Qt.MouseButton.LeftButton)
    assert dock.model.currentData() == "class-map" and "--warm-start" not in dock.arguments()
    dock.go_on_from(run.name)
    QTest.mouseClick(dock.train_button, Qt.MouseButton.LeftButton)
    qtbot.waitUntil(lambda: bool(started))
    assert "--warm-start" in started[0]


def test_a_training_is_paused_and_let_go_on(dock: TrainDock, tiny_session: Session, qtbot: QtBot) -> None:
    run = tiny_session.new_run(RunConfig(model=ClassMapConfig(), data=tiny_session.data_spec()))
    with StatusWriter(run.path):
        dock.state.open_session(tiny_session)
        qtbot.waitUntil(lambda: dock.watch.isVisibleTo(dock), timeout=10_000)
        QTest.mouseClick(dock.watch.pause_button, Qt.MouseButton.LeftButton)
        assert (run.path / PAUSE).exists() and dock.watch.pause_button.text() == "Go on"
        QTest.mouseClick(dock.watch.pause_button, Qt.MouseButton.LeftButton)
        assert not (run.path / PAUSE).exists() and dock.watch.pause_button.text() == "Pause"
    dock.watch.stop_following()


def test_particles_of_another_file_are_placed_by_a_job(
    dock: TrainDock, tiny_session: Session, tiny_stack: Path, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def start(arguments: list[str], folder: Path) -> Path:
        started.append(arguments)
        with StatusWriter(folder):
            pass
        return folder

    monkeypatch.setattr(jobs, "start", start)
    run = _with_latents(tiny_session, 0.0)
    dock.state.open_run(None)
    dock.state.open_session(tiny_session)
    dock.state.open_run(run)
    dock.runs.encode_others(tiny_stack)
    qtbot.waitUntil(lambda: bool(started))
    assert started == [["encode", str(run.path), "--stack", str(tiny_stack)]]
    qtbot.waitUntil(lambda: dock.runs.encode_bar.folder is None, timeout=10_000)


def _with_latents(session: Session, turn_deg: float) -> Run:
    """A run whose map is a disc, angles free of it and turned by so much from one run to the next."""
    rng = np.random.default_rng(0)
    n = session.n_particles
    run = _new_run(session)
    z = rng.normal(size=(n, 2)).astype(np.float32)
    angle = (rng.uniform(-180, 180, n) + turn_deg + 180) % 360 - 180
    run.save_latents(Latents(session.uid, z, angle_deg=angle.astype(np.float32)))
    return run


def test_runs_stand_in_a_table_and_two_are_compared_and_shown_beside(
    make_napari_viewer: Any, tiny_session: Session, qtbot: QtBot
) -> None:
    viewer = make_napari_viewer()
    dock = TrainDock(viewer)
    qtbot.addWidget(dock)
    first, second = _with_latents(tiny_session, 0.0), _with_latents(tiny_session, 40.0)
    groups = pd.DataFrame({"cluster-kmeans": np.arange(120) % 3}, index=tiny_session.table.index)
    for run in (first, second):
        run.write_column("cluster-kmeans", groups, {})
    dock.state.open_session(tiny_session)
    dock.state.open_run(first)
    qtbot.waitUntil(lambda: "none to speak of" in dock.runs.leak.text(), timeout=10_000)
    dock.runs.read()
    qtbot.waitUntil(lambda: dock.runs.list.count() == 2)
    dock.show_table()
    window = dock.table
    assert window is not None
    qtbot.waitUntil(lambda: window.table.rowCount() == 2)
    assert window.table.item(1, 0).text() == f"● {first.name}"
    assert not window.compare_button.isEnabled() and window.compare_button.toolTip()
    window.table.selectAll()
    assert window.chosen() == [second.name, first.name]
    window.compare_button.click()
    qtbot.waitUntil(lambda: "Rand" in window.words.text(), timeout=10_000)
    assert "angles differ by 0.0°" in window.words.text() and "agree to 1.00" in window.words.text()

    window.table.selectRow(0)
    window.second_button.click()
    qtbot.waitUntil(lambda: dock.second.is_open, timeout=10_000)
    twin = dock.second.twin
    assert twin is not None and twin.run.name == second.name and dock.state.run.name == first.name
    mask = np.arange(120) < 30
    dock.state.selection.set(mask)
    np.testing.assert_array_equal(twin.selection.mask, mask)
    dock.state.show(read(None))
    assert not dock.second.is_open and dock.second.dock is None, "it goes with the session"
    dock.shutdown()
    window.tasks.stop()
    qtbot.wait(50)


def test_a_resumed_log_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    log = pd.DataFrame({"epoch": [0, 1, 1, 0, 1], "step": [1, 2, 3, 1, 2], "loss": [9.0, 8, 7, 6, 5]})
    log.to_csv(tmp_path / "metrics.csv", index=False)
    assert read_metrics(tmp_path / "metrics.csv")["loss"].tolist() == [6, 5]


def test_limits_have_few_digits() -> None:
    assert round_limits(np.array([70.24, 75.13])) == (70, 76)
    assert round_limits(np.array([3.0])) is not None and round_limits(np.array([np.nan])) is None


def test_without_a_log_there_is_no_curve() -> None:
    assert drawn(pd.DataFrame(), 3).curve is None


def test_a_run_without_a_map_is_not_shown(dock: TrainDock, tiny_session: Session, qtbot: QtBot) -> None:
    _new_run(tiny_session)
    dock.state.open_session(tiny_session)
    qtbot.waitUntil(lambda: dock.runs.list.count() == 1)
    dock.runs.list.itemClicked.emit(dock.runs.list.item(0))
    assert "no map yet" in dock.complaint.sentence.text()
    assert dock.state.run is None


def test_the_dock_of_a_closed_window_is_silent(qtbot: QtBot, tiny_session: Session) -> None:
    viewer: Any = ViewerModel()
    dock = TrainDock(viewer)
    state = dock.state
    dock.deleteLater()
    del dock
    qtbot.wait(20)
    state.open_session(tiny_session)
    qtbot.wait(100)


def test_training_again_on_the_selection_keeps_it_as_a_set(
    qtbot: QtBot, tiny_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from napari.components import ViewerModel

    from particle_explorer.widgets.workspace import state_of

    viewer = ViewerModel()
    state = state_of(viewer)
    dock = TrainDock(viewer)
    qtbot.addWidget(dock)
    state.open_session(tiny_session)
    started: list[list[str]] = []
    monkeypatch.setattr(dock, "_start", started.append)
    mask = np.arange(tiny_session.n_particles) % 4 == 0
    state.train_asked.emit()
    assert not started and not tiny_session.selections.names(), "nothing is selected"
    state.selection.set(mask)
    state.train_asked.emit()
    qtbot.waitUntil(lambda: bool(started))
    assert started[0][started[0].index("--selection") + 1] == "trained on 1"
    assert np.array_equal(tiny_session.selections.mask("trained on 1"), mask)
    dock.shutdown()

"""The Particles dock: what is found is said, settings reach the worker, errors stay in place."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("napari")

from napari.components import ViewerModel
from pytestqt.qtbot import QtBot
from qtpy.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from qtpy.QtGui import QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import QApplication

from particle_explorer import jobs, plugin
from particle_explorer.io.reading import read
from particle_explorer.particles import Particles
from particle_explorer.session import Session
from particle_explorer.widgets.data import ParticlesDock
from particle_explorer.widgets.looking import free_folder, in_short

SLOW = 20_000


@pytest.fixture
def dock(qtbot: QtBot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParticlesDock]:
    monkeypatch.chdir(tmp_path)
    widget = ParticlesDock(ViewerModel())
    qtbot.addWidget(widget)
    widget.resize(392, 500)
    widget.show()
    yield widget
    widget.shutdown()


@pytest.fixture
def stack(tiny_stack: Path, tmp_path: Path) -> Path:
    for file in tiny_stack.parent.iterdir():
        shutil.copy(file, tmp_path)
    return tmp_path / tiny_stack.name


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines of the workers that would have been started."""
    lines: list[list[str]] = []

    def start(arguments: list[str], folder: Path) -> Path:
        lines.append(list(arguments))
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr(jobs, "start", start)
    return lines


def _open(dock: ParticlesDock, path: Path, qtbot: QtBot) -> None:
    dock.open(path)
    qtbot.waitUntil(lambda: dock.stack.preview.n_images > 0, timeout=SLOW)


def test_empty_it_says_what_to_do(dock: ParticlesDock) -> None:
    assert dock.start_page.isVisible() and not dock.stack.isVisible()
    assert dock.open_button.isVisible() and dock.sample_button.isVisible()
    assert not dock.layer_button.isEnabled() and "layer list" in dock.layer_button.toolTip()


@pytest.mark.parametrize("suffix", [".star", ".cs", ".mrcs"])
def test_a_stack_is_summed_up_and_previewed(
    dock: ParticlesDock, stack: Path, suffix: str, qtbot: QtBot
) -> None:
    _open(dock, stack.with_suffix(suffix), qtbot)
    assert "120" in dock.stack.summary.text() and "32" in dock.stack.summary.text()
    assert dock.stack.preview.n_images == 18, "nine before and nine after"
    assert dock.stack.form.value().diameter_A == pytest.approx(0.9 * 32 * 7, rel=0.01)
    assert "Å" in dock.stack.form.editor("diameter_A").native.text()
    assert "about" in dock.stack.prepare_button.text()
    assert dock.stack.form.editor("ctf").enabled == (suffix != ".mrcs")
    assert Path(dock.stack.folder.text()) == stack.with_name(f"{stack.stem}_explorer")


def test_an_unknown_pixel_size_is_asked_for(
    dock: ParticlesDock, tmp_path: Path, started: list[list[str]], qtbot: QtBot
) -> None:
    images = np.random.default_rng(0).normal(size=(12, 20, 20)).astype(np.float32)
    np.save(tmp_path / "bare.npy", images)
    _open(dock, tmp_path / "bare.npy", qtbot)
    size, diameter = dock.stack.form.editor("pixel_size_A"), dock.stack.form.editor("diameter_A")
    assert size.native.isVisible() and size.native.text() == "the file does not say it"
    assert diameter.native.text() == "18 px"
    size.value = 2.5
    assert diameter.native.text() == "45 Å", "the same length"
    size.value = 2.0
    assert diameter.native.text() == "36 Å"
    qtbot.waitUntil(lambda: "2 Å, as given" in dock.stack.plan_words.text(), timeout=SLOW)
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    assert started[0][4:8] == ["--preprocess.diameter-A", "36.0", "--preprocess.pixel-size-A", "2.0"]


def test_a_known_pixel_size_is_not_asked_for(dock: ParticlesDock, stack: Path, qtbot: QtBot) -> None:
    _open(dock, stack, qtbot)
    assert not dock.stack.form.editor("pixel_size_A").native.isVisible()


def test_settings_and_subset_reach_the_worker(
    dock: ParticlesDock, stack: Path, started: list[list[str]], qtbot: QtBot
) -> None:
    _open(dock, stack, qtbot)
    dock.stack.form.editor("diameter_A").value = 150
    dock.stack.part.subset.setChecked(True)
    column = next(name for name, values in dock.stack.found.columns.items() if len(values) == 0)  # type: ignore[union-attr]
    dock.stack.part.column.setCurrentText("box_px")
    dock.stack.part.subset_value.setCurrentText("32")
    assert column and dock.stack.part.where() == "box_px == 32"
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    [line] = started
    assert line[:4] == ["import", str(stack), "--session", dock.stack.folder.text()]
    assert line[4:6] == ["--preprocess.diameter-A", "150.0"]
    assert line[-2:] == ["--where", "box_px == 32"]


def test_an_impossible_setting_is_said_at_once_and_not_started(
    dock: ParticlesDock, stack: Path, qtbot: QtBot
) -> None:
    _open(dock, stack, qtbot)
    dock.stack.form.editor("diameter_A").value = 1000
    qtbot.waitUntil(lambda: dock.complaint.isVisible(), timeout=SLOW)
    assert "larger than the box" in dock.complaint.sentence.text()
    assert not dock.stack.prepare_button.isEnabled()
    dock.stack.form.editor("diameter_A").value = 150
    qtbot.waitUntil(lambda: dock.stack.prepare_button.isEnabled(), timeout=SLOW)
    assert not dock.complaint.isVisible()


def test_a_broken_file_is_one_sentence(dock: ParticlesDock, tmp_path: Path, qtbot: QtBot) -> None:
    bad = tmp_path / "bad.mrcs"
    bad.write_bytes(b"no stack at all")
    dock.open(bad)
    qtbot.waitUntil(lambda: dock.complaint.isVisible(), timeout=SLOW)
    assert "bad.mrcs" in dock.complaint.sentence.text()
    assert dock.start_page.isVisible()


def test_preparing_makes_a_session_and_opens_it(dock: ParticlesDock, stack: Path, qtbot: QtBot) -> None:
    _open(dock, stack, qtbot)
    with qtbot.waitSignal(dock.prepared, timeout=60_000):
        dock.stack.prepare_button.click()
    assert dock.state.session is not None
    assert dock.state.session.path == stack.with_name(f"{stack.stem}_explorer")
    assert dock.session_page.isVisible()
    assert "120 particles" in dock.session_words.text()


def test_a_session_made_before_is_offered(
    dock: ParticlesDock, stack: Path, tiny_session: Session, qtbot: QtBot
) -> None:
    there = stack.with_name(f"{stack.stem}_explorer")
    shutil.copytree(tiny_session.path, there)
    _open(dock, stack, qtbot)
    assert dock.stack.existing_button.isVisible() and there.name in dock.stack.existing_button.text()
    assert Path(dock.stack.folder.text()) == there.with_name(f"{there.name}-2")
    dock.stack.existing_button.click()
    qtbot.waitUntil(lambda: dock.state.session is not None, timeout=SLOW)
    assert dock.state.session.path == there  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*QDragEnterEvent:DeprecationWarning")  # one binding has both forms
def test_a_file_can_be_dropped(dock: ParticlesDock, stack: Path, qtbot: QtBot) -> None:
    data = QMimeData()
    data.setUrls([QUrl.fromLocalFile(str(stack))])
    how = (Qt.DropAction.CopyAction, data, Qt.MouseButton.LeftButton, Qt.KeyboardModifier.NoModifier)
    for event in (QDragEnterEvent(QPoint(50, 50), *how), QDropEvent(QPointF(50, 50), *how)):
        QApplication.sendEvent(dock, event)
        assert event.isAccepted()
    qtbot.waitUntil(lambda: dock.stack.found is not None, timeout=SLOW)


def test_a_stack_opened_by_napari_is_adopted(dock: ParticlesDock, stack: Path, qtbot: QtBot) -> None:
    [(data, attributes, _)] = plugin.read_stack(str(stack))
    dock.viewer.add_image(data, **attributes)
    qtbot.waitUntil(lambda: dock.stack.found is not None, timeout=SLOW)
    assert dock.stack.found.particles.source == stack  # type: ignore[union-attr]


def test_a_layer_can_be_taken(
    dock: ParticlesDock, tmp_path: Path, started: list[list[str]], qtbot: QtBot
) -> None:
    images = np.random.default_rng(0).normal(size=(20, 24, 24)).astype(np.float32)
    dock.viewer.add_image(images, name="my picks")
    assert dock.layer_button.isEnabled() and "my picks" in dock.layer_button.toolTip()
    dock.layer_button.click()
    qtbot.waitUntil(lambda: dock.stack.preview.n_images > 0, timeout=SLOW)
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    saved = Path(started[0][1])
    assert saved == tmp_path / "my_picks.npy"
    np.testing.assert_array_equal(read(saved).images.read(np.arange(20))[:, 0], images)


def test_sets_are_listed_and_select(dock: ParticlesDock, tiny_session: Session, qtbot: QtBot) -> None:
    mask = np.arange(tiny_session.n_particles) % 3 == 0
    tiny_session.selections.save("every third", mask)
    dock.state.open_session(tiny_session)
    qtbot.waitUntil(lambda: dock.sets.count() == 1, timeout=SLOW)
    item = dock.sets.item(0)
    assert "every third" in item.text() and "40" in item.text()
    dock.sets.itemClicked.emit(item)
    qtbot.waitUntil(lambda: dock.state.selection.count == 40, timeout=SLOW)
    other: Any = np.zeros_like(mask)
    other[:7] = True
    tiny_session.selections.save("first seven", other)
    dock.state.sets_changed.emit()
    qtbot.waitUntil(lambda: dock.sets.count() == 2, timeout=SLOW)


def test_the_summary_is_short() -> None:
    lines = [
        "9 particles",
        "box 64 px",
        "pixel size 2 Å",
        "looks dark (t = 30.3 over 64 images)",
        "/a/b/c.mrcs is old",
    ]
    first, second, third = in_short(lines)
    assert first == "9 particles · box 64\u00a0px · pixel size 2\u00a0Å"
    assert second == "Looks dark" and third == "c.mrcs is old"


def test_a_free_folder_is_found(tmp_path: Path) -> None:
    assert free_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert free_folder(tmp_path / "a") == tmp_path / "a", "empty is as good as absent"
    (tmp_path / "a" / "x").touch()
    assert free_folder(tmp_path / "a") == tmp_path / "a-2"


def test_missing_stacks_are_mended_by_one_folder(
    dock: ParticlesDock, stack: Path, tmp_path: Path, started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch, qtbot: QtBot,
) -> None:  # fmt: skip
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-project")
    elsewhere.mkdir()
    mrcs = next(tmp_path.glob("*.mrcs"))
    shutil.move(mrcs, elsewhere / mrcs.name)
    dock.open(stack)
    qtbot.waitUntil(dock.missing.isVisible, timeout=SLOW)
    assert mrcs.name in dock.missing_words.text() and dock.start_page.isVisible()
    from particle_explorer.widgets import data

    monkeypatch.setattr(data, "ask_path", lambda parent, title, chosen, **_: chosen(str(elsewhere)))
    dock.project_button.click()
    qtbot.waitUntil(lambda: dock.stack.preview.n_images > 0, timeout=SLOW)
    assert not dock.missing.isVisible()
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    assert started[0][started[0].index("--project-dir") + 1] == str(elsewhere)


def test_a_folder_of_pictures_is_opened(dock: ParticlesDock, tmp_path: Path, qtbot: QtBot) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3)).astype("u1")
    (tmp_path / "pictures").mkdir()
    for i, each in enumerate(pixels):
        image.fromarray(each).save(tmp_path / "pictures" / f"{i}.png")
    _open(dock, tmp_path / "pictures", qtbot)
    assert "4 particles" in dock.stack.summary.text() and "3 colour channels" in dock.stack.summary.text()


def test_a_random_subset_and_the_check_of_every_image_reach_workers(
    dock: ParticlesDock, stack: Path, started: list[list[str]], qtbot: QtBot
) -> None:
    _open(dock, stack, qtbot)
    assert not dock.stack.part.sample.isVisible() and "to prepare and" in dock.stack.summary.text()
    dock.stack.check_button.click()
    qtbot.waitUntil(lambda: len(started) == 1, timeout=SLOW)
    assert started[0] == ["inspect", str(stack), "--full"]
    dock.stack.part.random.setChecked(True)
    assert dock.stack.part.sample.isVisible()
    dock.stack.part.sample.setValue(50)
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: len(started) == 2, timeout=SLOW)
    assert "--sample 50" in " ".join(started[1]) and "--sample-by" not in started[1]


def test_as_many_of_each_class_and_what_would_be_left_out_are_seen_before(
    dock: ParticlesDock, tmp_path: Path, started: list[list[str]], qtbot: QtBot
) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(200, 20, 20)).astype(np.float32)
    images[::40] *= 30
    np.savez(tmp_path / "half.npz", images=images, kind=np.arange(200) % 4)
    _open(dock, tmp_path / "half.npz", qtbot)
    assert "outlier" not in dock.stack.plan_words.text() and "on disk" in dock.stack.plan_words.text()
    dock.stack.form.setValue(dock.stack.form.value().model_copy(update={"outlier_sd": 6.0}))
    qtbot.waitUntil(lambda: "5 would be left out as outliers" in dock.stack.plan_words.text(), timeout=SLOW)
    assert dock.stack.preview.n_images == 9 + 9 + 5
    dock.stack.part.random.setChecked(True)
    dock.stack.part.sample.setValue(10)
    dock.stack.part.sample_by.setCurrentIndex(dock.stack.part.sample_by.findData("kind"))
    qtbot.waitUntil(lambda: "40 of 200 particles" in dock.stack.plan_words.text(), timeout=SLOW)
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    assert "--sample 10 --sample-by kind" in " ".join(started[0])


def test_the_preview_leaves_out_what_cannot_be_shown(
    dock: ParticlesDock, tmp_path: Path, qtbot: QtBot
) -> None:
    images = np.random.default_rng(0).normal(size=(12, 20, 20)).astype(np.float32)
    images[::2] = 0
    np.save(tmp_path / "half.npy", images)
    _open(dock, tmp_path / "half.npy", qtbot)
    assert dock.stack.preview.n_images == 12, "six that are not blank, before and after"


def test_several_star_files_are_opened_as_one(
    dock: ParticlesDock, stack: Path, tmp_path: Path, started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch, qtbot: QtBot,
) -> None:  # fmt: skip
    lines = stack.read_text().splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if "@" in line]
    halves = [tmp_path / "first.star", tmp_path / "second.star"]
    for half, left_out in zip(halves, (rows[:40], rows[40:]), strict=True):
        half.write_text("".join(line for i, line in enumerate(lines) if i not in left_out))
    from particle_explorer.widgets import data

    monkeypatch.setattr(
        data, "ask_paths", lambda parent, title, chosen, **_: chosen([str(p) for p in halves])
    )
    dock.ask_for_file()
    qtbot.waitUntil(lambda: dock.stack.preview.n_images > 0, timeout=SLOW)
    found = dock.stack.found
    assert found is not None and len(found.particles) == len(rows)
    assert found.particles.source == tmp_path / "first_joined.star" and found.particles.source.is_file()
    assert "joined into" in found.lines[0]
    dock.stack.prepare_button.click()
    qtbot.waitUntil(lambda: bool(started), timeout=SLOW)
    assert started[0][:2] == ["import", str(found.particles.source)]
    mrcs = next(tmp_path.glob("*.mrcs"))
    dock.open_several([halves[0], mrcs])
    qtbot.waitUntil(dock.complaint.isVisible, timeout=SLOW)
    assert "is no star file" in dock.complaint.sentence.text()


def test_reading_says_how_far_it_is(
    dock: ParticlesDock, stack: Path, qtbot: QtBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(path: Path, *, progress: Callable[[float], None], **options: Any) -> Particles:
        progress(0.42)
        assert go_on.wait(20)
        return read(path, **options)

    monkeypatch.setattr("particle_explorer.io.reading.read", slow)
    dock.open(stack)
    qtbot.waitUntil(lambda: dock.reading_words.text() == f"Reading {stack.name} … 42%", timeout=SLOW)
    go_on.set()
    qtbot.waitUntil(lambda: dock.stack.found is not None, timeout=SLOW)
    assert not dock.reading.isVisible()


def test_reading_can_be_called_off(dock: ParticlesDock, stack: Path, qtbot: QtBot) -> None:
    dock.open(stack)
    assert dock.reading.isVisible()
    dock.cancel_button.click()
    assert dock.start_page.isVisible() and not dock.reading.isVisible()
    qtbot.wait(1500)
    assert dock.stack.found is None and dock.start_page.isVisible(), "an answer that comes later is dropped"
    _open(dock, stack, qtbot)


def test_a_stack_of_blank_images_is_one_sentence(dock: ParticlesDock, tmp_path: Path, qtbot: QtBot) -> None:
    np.save(tmp_path / "blank.npy", np.zeros((40, 16, 16), np.float32))
    dock.open(tmp_path / "blank.npy")
    qtbot.waitUntil(lambda: dock.stack.found is not None, timeout=SLOW)
    assert "blank or broken" in dock.stack.summary.text()
    qtbot.waitUntil(dock.complaint.isVisible, timeout=SLOW)
    assert "blank" in dock.complaint.sentence.text() and "Error" not in dock.complaint.sentence.text()

"""The page of a stack that is open and not prepared: what is in it, how to prepare it, how that will look."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import Qt, QTimer, Signal
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import PREPROCESS_PRESETS, PreprocessConfig
from particle_explorer.widgets.ask import ask_path
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import ConfigForm, command_line
from particle_explorer.widgets.job_bar import Complaint, JobBar, duration
from particle_explorer.widgets.looking import Found, Preview, free_folder, in_short, preview, save_layer
from particle_explorer.widgets.number_box import Number
from particle_explorer.widgets.painted import ImageRows
from particle_explorer.widgets.part_of_stack import PartOfStack

if TYPE_CHECKING:
    from particle_explorer.status import Status


class StackPage(QWidget):
    """From what was found in a file to a session made of it."""

    imported = Signal(object)
    """the session is made: its folder"""
    open_asked = Signal(object)
    """open this session instead, which was made of the stack before"""
    back_asked = Signal()

    def __init__(self, complaint: Complaint) -> None:
        super().__init__()
        self.complaint = complaint
        self.tasks = Tasks(self)
        self.found: Found | None = None
        self._pixel_size = 0.0
        self._preview_timer = QTimer(self)
        self._preview_timer.setSingleShot(True)
        self._preview_timer.setInterval(250)
        self._preview_timer.timeout.connect(self._preview)
        self.summary = QLabel()
        self.summary.setWordWrap(True)
        self.summary.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.summary.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.existing_button = QPushButton("Open session")
        self.existing_button.clicked.connect(self._open_existing)

        self.form = ConfigForm(PreprocessConfig)
        self.form.valueChanged.connect(self._on_pixel_size)
        self.form.valueChanged.connect(self._preview_soon)

        self.preset = QComboBox()
        self.preset.addItem("particles in ice", "ice")
        self.preset.addItem("negative stain", "stain")
        self.preset.setToolTip(
            "<p>Sets contrast, CTF and low-pass under Advanced. In negative stain particles are bright as"
            " they are recorded, the CTF is left out, and details finer than 20 Å, which are grains of stain,"
            " are taken away.</p>"
        )
        self.preset.activated.connect(self._on_preset)
        preset_row = QHBoxLayout()
        preset_row.addWidget(QLabel("Sample"))
        preset_row.addWidget(self.preset, 1)

        self.part = PartOfStack()
        self.part.changed.connect(self._preview_soon)
        self.views_note = QLabel(
            "These particles show several views. The first thing a map of mixed views learns is the viewing"
            " direction; to see motion, take one class."
        )
        self.views_note.setWordWrap(True)

        self.folder = QLineEdit()
        self.folder.setToolTip("The session: a folder that keeps prepared images, runs, sets and averages")
        self.folder_button = QPushButton("…")
        self.folder_button.setMaximumWidth(32)
        self.folder_button.setToolTip("Choose the folder above the session")
        self.folder_button.clicked.connect(self._ask_for_folder)
        folder_row = QHBoxLayout()
        folder_row.addWidget(QLabel("Session"))
        folder_row.addWidget(self.folder, 1)
        folder_row.addWidget(self.folder_button)

        self.preview = ImageRows()
        self.plan_words = QLabel()
        self.plan_words.setWordWrap(True)
        self.prepare_button = QPushButton("Prepare")
        self.prepare_button.setToolTip("Write the prepared images into the session folder; once per stack")
        self.prepare_button.clicked.connect(self.prepare)
        self.back_button = QPushButton("Back")
        self.back_button.setToolTip("Leave this stack without preparing it")
        self.back_button.clicked.connect(self.back_asked)
        self.check_button = QPushButton("Check every image")
        self.check_button.setToolTip("Read them all in the background: which are blank, broken or doubled?")
        self.check_button.clicked.connect(self.check_all)
        self.check_bar = JobBar()
        self.check_bar.finished.connect(self._on_checked)
        self.check_bar.failed.connect(self._on_import_failed)
        self.import_bar = JobBar()
        self.import_bar.finished.connect(self._on_imported)
        self.import_bar.stopped.connect(self._on_import_stopped)
        self.import_bar.failed.connect(self._on_import_failed)
        buttons = QHBoxLayout()
        buttons.addWidget(self.prepare_button, 1)
        buttons.addWidget(self.back_button)

        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(5)
        layout.addWidget(self.summary)
        layout.addWidget(self.check_button)
        layout.addWidget(self.check_bar)
        layout.addWidget(self.existing_button)
        layout.addLayout(preset_row)
        layout.addWidget(self.form)
        layout.addWidget(self.part)
        layout.addWidget(self.views_note)
        layout.addLayout(folder_row)
        layout.addLayout(buttons)
        layout.addWidget(self.import_bar)
        layout.addWidget(self.preview)
        layout.addWidget(self.plan_words)

    def stop(self) -> None:
        """Look away; jobs go on."""
        self.tasks.stop()
        for bar in (self.check_bar, self.import_bar):
            bar.stop()

    def leave(self) -> None:
        """Forget the stack."""
        self.tasks.forget("preview")
        self.found = None

    def show_stack(self, found: Found) -> None:
        """Show what was found in a file, with the settings proposed for it."""
        self.found = found
        self.summary.setText("\n".join(in_short(found.lines)))
        self.summary.setToolTip("\n".join(found.lines))
        self.existing_button.setVisible(found.existing is not None)
        if found.existing is not None:
            self.existing_button.setText(f"Open the session that is there: {found.existing.name}")
            self.existing_button.setToolTip(str(found.existing))
        self._pixel_size = 0.0
        self.form.editor("diameter_A").native.setSuffix(f" {found.unit}")
        self.form.show_row("pixel_size_A", not found.pixel_size_known, zero="the file does not say it")
        self.form.setValue(PreprocessConfig(diameter_A=found.diameter))
        self.preset.setCurrentIndex(0)
        has_ctf = "defocus_u_A" in found.columns
        self.form.set_applicable("ctf", has_ctf, "The file has no CTF parameters")
        self.folder.setText(str(found.folder))
        self.part.offer(found.columns)
        self.views_note.setVisible(found.mixed_views)
        self.check_button.setVisible(found.particles.kind != "layer")  # a worker sees no layer
        self.check_bar.stop()
        self.preview.clear()
        self.plan_words.clear()
        self.prepare_button.setText("Prepare")
        self._set_busy(False)
        self._preview_soon()

    def _on_pixel_size(self) -> None:
        """The diameter is in pixels until the pixel size is known; it stays the same length."""
        value, before = self.form.value(), self._pixel_size
        if value.pixel_size_A == before or self.found is None or self.found.unit == "Å":
            return
        self._pixel_size = value.pixel_size_A
        editor = self.form.editor("diameter_A")
        assert isinstance(editor, Number)
        editor.native.setSuffix(" Å" if value.pixel_size_A else " px")
        diameter = value.diameter_A * (value.pixel_size_A or 1.0) / (before or 1.0)
        diameter = min(float(f"{diameter:.3g}"), editor.max)
        self.form.setValue(value.model_copy(update={"diameter_A": diameter}))

    def _on_preset(self, *_: object) -> None:
        found = self.found
        wanted = dict(PREPROCESS_PRESETS[self.preset.currentData()])
        if found is not None and found.unit == "px" and not self.form.value().pixel_size_A:
            wanted["low_pass_A"] = 0.0  # without a pixel size there is no ångström
        self.form.setValue(self.form.value().model_copy(update=wanted))

    def _open_existing(self) -> None:
        if self.found is not None and self.found.existing is not None:
            self.open_asked.emit(self.found.existing)

    # --- preview ----------------------------------------------------------------------------------

    def _preview_soon(self, *_: object) -> None:
        self._preview_timer.start()

    def _preview(self) -> None:
        found = self.found
        if found is None:
            return
        config, where, taken = self.form.value(), self.part.where(), self.part.taken()
        self.tasks.run(
            "preview",
            lambda: preview(found.particles, config, where, *taken),
            self._on_preview,
            self._on_no_preview,
        )

    def _on_preview(self, shown: Preview) -> None:
        self.complaint.clear()
        rows = [("As recorded", shown.before), ("As the model will see them", shown.after)]
        if len(shown.outliers):
            rows.append(("Would be left out as outliers", shown.outliers))
        self.preview.set_rows(rows)
        self.plan_words.setText(shown.words)
        self.prepare_button.setText(f"Prepare (about {duration(shown.seconds)})")
        self.prepare_button.setEnabled(self.import_bar.folder is None)

    def _on_no_preview(self, failure: Failure) -> None:
        self.preview.clear()
        self.plan_words.clear()
        self.prepare_button.setEnabled(False)
        self.complaint.show_failure(failure)

    # --- preparing --------------------------------------------------------------------------------

    def _ask_for_folder(self) -> None:
        now = Path(self.folder.text())

        def chosen(folder: str) -> None:
            self.folder.setText(str(free_folder(Path(folder) / now.name)))

        ask_path(self, "Folder in which to make the session", chosen, kind="folder", start=str(now.parent))

    def prepare(self) -> None:
        """Start the worker that makes the session."""
        from particle_explorer import jobs

        found = self.found
        if found is None:
            return
        self.complaint.clear()
        target = Path(self.folder.text()).expanduser()
        where, settings = self.part.where(), command_line("preprocess", self.form.value())
        sample, sample_by = self.part.taken()

        def work() -> Path:
            source = found.particles.source
            if found.particles.kind == "layer":
                source = save_layer(found.particles, target)
            arguments = ["import", str(source), "--session", str(target), *settings]
            if found.project_dir is not None:
                arguments += ["--project-dir", str(found.project_dir)]
            if sample:
                arguments += ["--sample", str(sample)]
                arguments += ["--sample-by", sample_by] if sample_by else []
            return jobs.start_passing([*arguments, "--where", where] if where else arguments)

        self._target = target
        self._set_busy(True)
        self.tasks.run(
            "prepare",
            work,
            lambda folder: self.import_bar.follow(folder, "Preparing the images", passing=True),
            self._on_import_failed,
        )

    def check_all(self) -> None:
        """Start the worker that reads every image."""
        from particle_explorer import jobs

        found = self.found
        if found is None:
            return
        arguments = ["inspect", str(found.particles.source), "--full"]
        if found.project_dir is not None:
            arguments += ["--project-dir", str(found.project_dir)]

        self.tasks.run(
            "check",
            lambda: jobs.start_passing(arguments),
            lambda folder: self.check_bar.follow(folder, "Reading every image", passing=True),
            self._on_import_failed,
        )

    def _on_checked(self, status: Status) -> None:
        self.summary.setText(f"{self.summary.text()}\n{status.message}")

    def _set_busy(self, busy: bool) -> None:
        for part in (
            self.prepare_button,
            self.back_button,
            self.form,
            self.preset,
            self.part,
            self.folder,
        ):
            part.setEnabled(not busy)

    def _on_imported(self, _: object) -> None:
        self._set_busy(False)
        self.imported.emit(self._target)

    def _on_import_stopped(self, _: object) -> None:
        self._set_busy(False)
        self.plan_words.setText("Cancelled. Preparing the same again goes on from where it was.")

    def _on_import_failed(self, failure: Failure) -> None:
        self._set_busy(False)
        self.complaint.show_failure(failure)

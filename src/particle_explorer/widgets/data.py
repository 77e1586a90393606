"""The Particles dock: open a stack, see what is in it, prepare it, and the named sets of a session."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Qt, QTimer, Signal
from qtpy.QtGui import QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QMenu,
    QPushButton,
    QSizePolicy,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import PREPROCESS_PRESETS, PreprocessConfig
from particle_explorer.io.paths import StacksMissing
from particle_explorer.widgets.ask import ask_path, ask_paths
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import ConfigForm, Folded, command_line
from particle_explorer.widgets.job_bar import Complaint, JobBar, duration, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.looking import (
    MAX_CHOICES,
    Found,
    Preview,
    free_folder,
    in_short,
    is_number,
    look_at_joined,
    look_at_layer,
    look_or_miss,
    preview,
    save_layer,
    session_lines,
)
from particle_explorer.widgets.micrograph import MicrographPanel
from particle_explorer.widgets.moving import JoinPanel
from particle_explorer.widgets.number_box import Number
from particle_explorer.widgets.painted import ImageRows
from particle_explorer.widgets.sets import SetsList
from particle_explorer.widgets.tour import was_seen
from particle_explorer.widgets.workspace import show_session, state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Session
    from particle_explorer.status import Status

MISSING_SHOWN = 4
METADATA = "particle_explorer"
"""Key of layer metadata by which the dock knows what a layer was read from."""
STEPS = (
    "<b>From a stack to classes</b><ol style='margin-left: -18px;'>"
    "<li><b>Open</b> the particles and say how large the molecule is.</li>"
    "<li><b>Train</b>: particles that look alike come to lie side by side on a map, turned and shifted"
    " to match.</li>"
    "<li><b>Drag</b> the handle across the map and see the molecule move.</li>"
    "<li><b>Lasso</b> particles, average them, and export them for RELION or cryoSPARC.</li></ol>"
)
OPENS = (
    "RELION .star, cryoSPARC .cs, .mrcs and .mrc (also .gz, .bz2), EMAN2 .hdf, SPIDER .spi and .stk,"
    " IMAGIC .hed and .img, .tif, .npy, .npz, .zarr, or a folder of PNG, JPEG or TIFF pictures"
)
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=")


class ParticlesDock(QWidget):
    """Open particles and prepare them."""

    prepared = Signal()

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self.found: Found | None = None
        self._pixel_size = 0.0
        self._layer_source: Path | None = None
        self._asked = [Path()]
        self.setAcceptDrops(True)

        self.complaint = Complaint()
        self.missing = self._build_missing()
        self.start_page = self._build_start()
        self.stack_page = self._build_stack()
        self.session_page = self._build_session()
        self.join = JoinPanel(self.state)
        self.join.joined.connect(self.open)
        self.join_part = Folded("Join star files…", self.join)
        self.reading = QWidget()
        self.reading_words = QLabel()
        self.reading_words.setWordWrap(True)
        self.cancel_button = QPushButton("Cancel")
        self.cancel_button.setToolTip("Forget this file; what has been read of it is dropped")
        self.cancel_button.clicked.connect(self._cancel_reading)
        reading_row = QHBoxLayout(self.reading)
        reading_row.setContentsMargins(0, 0, 0, 0)
        reading_row.addWidget(self.reading_words, 1)
        reading_row.addWidget(self.cancel_button)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        for part in (
            *(self.reading, self.complaint, self.missing),
            *(self.start_page, self.stack_page, self.session_page, self.join_part),
        ):
            layout.addWidget(part)
        layout.addStretch(1)

        self._preview_timer = QTimer(self)
        self._preview_timer.setSingleShot(True)
        self._preview_timer.setInterval(250)
        self._preview_timer.timeout.connect(self._preview)
        follow(self, self.state.session_changed, self._on_session)
        self.viewer.layers.events.inserted.connect(self._on_layer_inserted)
        self.viewer.layers.selection.events.active.connect(self._on_active_layer)
        self._on_active_layer()
        self._on_session(self.state.session)
        for layer in list(self.viewer.layers):
            self._adopt(layer)

    # --- what each state shows --------------------------------------------------------------------

    def _build_start(self) -> QWidget:
        page = QWidget()
        words = QLabel("Open a particle stack\n(.star, .cs, .mrcs …)\nor drop it here")
        words.setToolTip("<p>" + OPENS + "</p>")
        words.setAlignment(Qt.AlignmentFlag.AlignCenter)
        words.setMinimumHeight(84)
        words.setStyleSheet("border: 1px dashed gray; border-radius: 6px; font-size: 13px;")
        self.open_button = QPushButton("Open…")
        self.open_button.setToolTip("Choose a particle file, or the session.json of a session")
        self.open_button.clicked.connect(self.ask_for_file)
        self.sample_button = QPushButton("Try the sample")
        self.sample_button.setToolTip("A simulated molecule with a hinge, comes with this program")
        menu = QMenu(self.sample_button)
        menu.addAction("Particles, to train on", self.open_sample_particles)
        menu.addAction("A trained session, to look at", self.open_sample_session)
        self.sample_button.setMenu(menu)
        self.layer_button = QPushButton("Use the selected image layer")
        self.layer_button.clicked.connect(self.open_active_layer)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        steps = QLabel(STEPS)
        steps.setWordWrap(True)
        steps.setTextFormat(Qt.TextFormat.RichText)
        layout.addWidget(words)
        row = QHBoxLayout()
        row.addWidget(self.open_button)
        row.addWidget(self.sample_button)
        layout.addLayout(row)
        layout.addWidget(self.layer_button)
        self.tour_button = QPushButton("New here? A tour in five steps")
        self.tour_button.setToolTip("Opens the trained sample and shows around; later it is under ?")
        self.tour_button.clicked.connect(self.state.tour_asked.emit)
        self.tour_button.setVisible(not was_seen())
        layout.addWidget(self.tour_button)
        layout.addSpacing(10)
        layout.addWidget(steps)
        return page

    def _build_stack(self) -> QWidget:
        page = QWidget()
        self.summary = QLabel()
        self.summary.setWordWrap(True)
        self.summary.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.summary.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.existing_button = QPushButton("Open session")
        self.existing_button.clicked.connect(self._open_existing)

        self.form = ConfigForm(PreprocessConfig)
        self.form.valueChanged.connect(self._on_pixel_size)
        self.form.valueChanged.connect(self._preview_timer_start)

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

        self.subset = QCheckBox("Only particles where")
        self.subset.setToolTip(
            "<p>Explore inside one class: a map of particles seen from different sides learns the viewing"
            " direction first.</p>"
        )
        self.column, self.comparison, self.subset_value = QComboBox(), QComboBox(), QComboBox()
        self.comparison.addItems(COMPARISONS)
        self.subset_value.setEditable(True)
        self.column.setToolTip("Column of the particle file")
        self.comparison.setToolTip("Comparison")
        self.subset_value.setToolTip("Value to compare with")
        for combo in (self.column, self.subset_value):
            combo.setSizePolicy(QSizePolicy.Policy.Expanding, QSizePolicy.Policy.Fixed)
            combo.setMinimumContentsLength(6)
            combo.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.subset.toggled.connect(self._on_subset)
        self.column.currentTextChanged.connect(self._on_column)
        self.comparison.currentTextChanged.connect(self._preview_timer_start)
        self.subset_value.currentTextChanged.connect(self._preview_timer_start)
        self.subset_row = QWidget()
        row = QHBoxLayout(self.subset_row)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.column, 3)
        row.addWidget(self.comparison)
        row.addWidget(self.subset_value, 2)
        self.sample = QSpinBox()
        self.sample.setRange(1, 10_000_000)
        self.sample.setValue(10_000)
        self.sample.setSingleStep(1000)
        self.sample.setPrefix("at most ")
        self.sample.setToolTip("Particles that are taken at most")
        self.random = QCheckBox("Only some, at random")
        self.random.setToolTip("A first look at a large stack is quick with a part of it")
        self.sample_by = QComboBox()
        self.sample_by.setToolTip("At random of all particles, or as many of each value of a column")
        self.sample_by.setSizeAdjustPolicy(QComboBox.SizeAdjustPolicy.AdjustToMinimumContentsLengthWithIcon)
        self.sample_by.setMinimumContentsLength(8)
        self.sample_row = QWidget()
        row = QHBoxLayout(self.sample_row)
        row.setContentsMargins(0, 0, 0, 0)
        row.addWidget(self.sample, 1)
        row.addWidget(self.sample_by, 1)
        self.random.toggled.connect(self.sample_row.setVisible)
        self.random.toggled.connect(self._preview_timer_start)
        self.sample.valueChanged.connect(self._preview_timer_start)
        self.sample_by.currentIndexChanged.connect(self._preview_timer_start)
        self.subset_row.setVisible(False)
        self.sample_row.setVisible(False)
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
        self.back_button.clicked.connect(self._back)
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

        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(5)
        layout.addWidget(self.summary)
        layout.addWidget(self.check_button)
        layout.addWidget(self.check_bar)
        layout.addWidget(self.existing_button)
        layout.addLayout(preset_row)
        layout.addWidget(self.form)
        layout.addWidget(self.subset)
        layout.addWidget(self.subset_row)
        layout.addWidget(self.random)
        layout.addWidget(self.sample_row)
        layout.addWidget(self.views_note)
        layout.addLayout(folder_row)
        layout.addLayout(buttons)
        layout.addWidget(self.import_bar)
        layout.addWidget(self.preview)
        layout.addWidget(self.plan_words)
        return page

    def _build_session(self) -> QWidget:
        page = QWidget()
        self.session_words = QLabel()
        self.session_words.setWordWrap(True)
        self.session_words.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Preferred)
        self.session_words.setTextInteractionFlags(Qt.TextInteractionFlag.TextSelectableByMouse)
        self.sets_words = QLabel()
        self.sets_words.setWordWrap(True)
        self.sets = SetsList(self.state, self.sets_words, self.complain)
        self.another_button = QPushButton("Open another…")
        self.another_button.setToolTip("Choose another particle file or session")
        self.another_button.clicked.connect(self.ask_for_file)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.session_words)
        layout.addWidget(self.sets_words)
        layout.addWidget(self.sets)
        self.micrograph = MicrographPanel(self.viewer)
        layout.addWidget(self.micrograph)
        layout.addWidget(self.another_button)
        return page

    def _build_missing(self) -> QWidget:
        """What is asked when stacks are nowhere: one folder mends them all."""
        box = QWidget()
        self.missing_words = QLabel()
        self.missing_words.setWordWrap(True)
        self.project_button = QPushButton("Where is the project folder?")
        self.project_button.setToolTip(
            "<p>The folder that the names of the image stacks start from: the RELION or cryoSPARC project,"
            " or a folder that the stacks were copied to</p>"
        )
        self.project_button.clicked.connect(self._ask_for_project)
        layout = QVBoxLayout(box)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self.missing_words)
        layout.addWidget(self.project_button)
        box.setVisible(False)
        return box

    def _show(self, page: QWidget | None, reading: str = "") -> None:
        self.missing.setVisible(False)
        self.reading_words.setText(reading)
        self.reading.setVisible(bool(reading))
        for each in (self.start_page, self.stack_page, self.session_page):
            each.setVisible(each is page)
        self.join_part.setVisible(page in (self.start_page, self.session_page))

    def complain(self, failure: Failure) -> None:
        """Say in place what went wrong, and go back to where one can try again."""
        self.complaint.show_failure(failure)
        self._back()

    def _cancel_reading(self) -> None:
        for task in ("read", "open session", "sample"):
            self.tasks.forget(task)
        self._back()

    def _back(self) -> None:
        self.tasks.forget("preview")
        self.found = None
        self._show(self.start_page if self.state.session is None else self.session_page)

    # --- opening ----------------------------------------------------------------------------------

    def ask_for_file(self) -> None:
        from particle_explorer.io.reading import SUFFIXES

        patterns = " ".join(f"*{suffix}" for suffix in SUFFIXES)
        ask_paths(
            self,
            "Open particles, or several star files as one",
            lambda chosen: self.open_several([Path(path) for path in chosen]),
            patterns=f"Particles or session ({patterns} session.json);;All files (*)",
        )

    def open(self, path: Path, project_dir: Path | None = None) -> None:
        """Open a particle file, a folder of pictures, a session folder or its `session.json`."""
        self.complaint.clear()
        path = Path(path)
        self._asked = [path]
        folder = path.parent if path.name == "session.json" else path
        if (folder / "session.json").is_file():
            self._show(None, f"Opening {folder.name} …")
            show_session(self.state, self.tasks, folder, shown=self._back, failed=self.complain)
            return
        self._show(None, f"Reading {path.name} …")
        self.tasks.run(
            "read",
            lambda tell: look_or_miss(path, project_dir, tell),
            self._on_read,
            self.complain,
            told=lambda share: self.reading_words.setText(f"Reading {path.name} … {share:.0%}"),
        )

    def open_several(self, paths: list[Path], project_dir: Path | None = None) -> None:
        """Open what `open` does, or several star files, joined into one that stays beside the first."""
        if len(paths) == 1:
            self.open(paths[0], project_dir)
            return
        self.complaint.clear()
        self._asked = paths
        self._show(None, f"Joining {number(len(paths))} files …")
        self.tasks.run("read", lambda: look_at_joined(paths, project_dir), self._on_read, self.complain)

    def _on_read(self, found: Found | StacksMissing) -> None:
        if not isinstance(found, StacksMissing):
            self._on_found(found)
            return
        self._back()
        n = len(found.missing)
        listed = "\n".join(found.missing[:MISSING_SHOWN])
        more = f"\nand {number(n - MISSING_SHOWN)} more" if n > MISSING_SHOWN else ""
        stacks = "an image stack that is" if n == 1 else f"{number(n)} image stacks that are"
        self.missing_words.setText(f"{found.source.name} names {stacks} not where it says:\n{listed}{more}")
        self.missing_words.setToolTip(str(found))
        self.missing.setVisible(True)

    def _ask_for_project(self) -> None:
        asked = self._asked

        def chosen(folder: str) -> None:
            self.open_several(asked, Path(folder))

        ask_path(self, "Where is the project folder?", chosen, kind="folder", start=str(asked[0].parent))

    def open_active_layer(self) -> None:
        """Take the image layer that is selected in napari: its file if it has one, else its pixels."""
        layer = self.viewer.layers.selection.active
        if layer is None or self._adopt(layer):
            return
        self.complaint.clear()
        data, name = layer.data, str(layer.name)
        scale = [float(s) for s in layer.scale]
        units = [str(unit) for unit in layer.units]
        self._show(None, f"Taking the layer {name} …")
        self.tasks.run("read", lambda: look_at_layer(data, name, scale, units), self._on_found, self.complain)

    def open_sample_particles(self) -> None:
        from particle_explorer.plugin import sample_particles

        self._show(None, "Copying the sample …")
        self.tasks.run("sample", sample_particles, self.open, self.complain)

    def open_sample_session(self) -> None:
        from particle_explorer.plugin import sample_session

        self._show(None, "Building the sample session …")
        self.tasks.run("sample", sample_session, self.open, self.complain)

    def dragEnterEvent(self, event: QDragEnterEvent | None) -> None:
        if event is not None and _dropped(event):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent | None) -> None:
        paths = [] if event is None else _dropped(event)
        if event is not None and paths:
            event.acceptProposedAction()
            self.open_several(paths)

    def _on_layer_inserted(self, event: Any) -> None:
        layer = event.value
        # the layer list is not finished with this insertion yet
        QTimer.singleShot(0, lambda: self._adopt(layer))

    def _adopt(self, layer: Any) -> bool:
        """Open the file that a layer was read from by this program (File → Open, a drop on the canvas)."""
        source = layer.metadata.get(METADATA, {}).get("source")
        if source is None:
            return False
        self.open(Path(source))
        return True

    def _on_active_layer(self, _: object = None) -> None:
        layer = self.viewer.layers.selection.active
        usable = layer is not None and type(layer).__name__ == "Image" and METADATA not in layer.metadata
        self.layer_button.setEnabled(usable)
        self.layer_button.setToolTip(
            f"Take the images of the layer '{layer.name}' as particles"
            if usable and layer is not None
            else "Select an image layer with a stack of particle images in napari's layer list first"
        )

    def _on_found(self, found: Found) -> None:
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
        self.column.clear()
        self.column.addItems(list(found.columns))
        if "class_id" in found.columns:
            self.column.setCurrentText("class_id")
        self.sample_by.clear()
        self.sample_by.addItem("of all", "")
        for name, values in found.columns.items():
            if 1 < len(values) < MAX_CHOICES:
                self.sample_by.addItem(f"of each {name}", name)
        self.views_note.setVisible(found.mixed_views)
        self.check_button.setVisible(found.particles.kind != "layer")  # a worker sees no layer
        self.check_bar.stop()
        self.subset.setChecked(False)
        self.random.setChecked(False)
        self.preview.clear()
        self.plan_words.clear()
        self.prepare_button.setText("Prepare")
        self._set_busy(False)
        self._show(self.stack_page)
        self._preview_timer_start()

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
            self.open(self.found.existing)

    # --- subset, preview --------------------------------------------------------------------------

    def _on_subset(self, wanted: bool) -> None:
        self.subset_row.setVisible(wanted)
        self._preview_timer_start()

    def subset_taken(self) -> tuple[int, str]:
        """At most so many at random, 0 for all; and the column of whose values each gives as many."""
        if not self.random.isChecked():
            return 0, ""
        return self.sample.value(), str(self.sample_by.currentData() or "")

    def _on_column(self, name: str) -> None:
        if self.found is None:
            return
        self.subset_value.clear()
        self.subset_value.addItems(self.found.columns.get(name, []))
        self._preview_timer_start()

    def where(self) -> str:
        """The subset as `COLUMN OP VALUE`; empty takes all particles."""
        value = self.subset_value.currentText().strip()
        if not self.subset.isChecked() or not value:
            return ""
        if not is_number(value):
            value = f'"{value}"'
        return f"{self.column.currentText()} {self.comparison.currentText()} {value}"

    def _preview_timer_start(self, *_: object) -> None:
        self._preview_timer.start()

    def _preview(self) -> None:
        found = self.found
        if found is None:
            return
        config, where, taken = self.form.value(), self.where(), self.subset_taken()
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
        where, settings = self.where(), command_line("preprocess", self.form.value())
        sample, sample_by = self.subset_taken()

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
            status_folder = Path(tempfile.mkdtemp(prefix="particle-explorer-import-"))
            return jobs.start([*arguments, "--where", where] if where else arguments, status_folder)

        self._target = target
        self._set_busy(True)
        self.tasks.run(
            "prepare",
            work,
            lambda folder: self.import_bar.follow(folder, "Preparing the images"),
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

        def work() -> Path:
            folder = Path(tempfile.mkdtemp(prefix="particle-explorer-check-"))
            return jobs.start(arguments, folder)

        self.tasks.run(
            "check",
            work,
            lambda folder: self.check_bar.follow(folder, "Reading every image"),
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
            self.subset,
            self.subset_row,
            self.random,
            self.sample_row,
            self.folder,
        ):
            part.setEnabled(not busy)

    def _on_imported(self, _: object) -> None:
        self._set_busy(False)
        self._hide_adopted_layers()
        show_session(self.state, self.tasks, self._target, shown=self._on_shown, failed=self.complain)

    def _on_shown(self) -> None:
        self._back()
        self.prepared.emit()

    def _hide_adopted_layers(self) -> None:
        # from here on the particles are seen in the layer of the session; two tiles of the same would confuse
        for layer in self.viewer.layers:
            if METADATA in layer.metadata:
                layer.visible = False

    def _on_import_stopped(self, _: object) -> None:
        self._set_busy(False)
        self.plan_words.setText("Cancelled. Preparing the same again goes on from where it was.")

    def _on_import_failed(self, failure: Failure) -> None:
        self._set_busy(False)
        self.complaint.show_failure(failure)

    # --- a session is open ------------------------------------------------------------------------

    def _on_session(self, session: Session | None) -> None:
        self.complaint.clear()
        if session is None:
            self._show(self.start_page)
            return
        self.session_words.setText("\n".join(session_lines(session)))
        self._show(self.session_page)


def _dropped(event: QDropEvent) -> list[Path]:
    """The local files or folders that are dropped; none where one is not local."""
    mime = event.mimeData()
    urls = mime.urls() if mime is not None else []
    if not all(url.isLocalFile() for url in urls):
        return []
    return [Path(url.toLocalFile()) for url in urls]

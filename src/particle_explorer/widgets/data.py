"""The Particles dock: open a stack, see what is in it, prepare it, and the named sets of a session."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import Qt, QTimer, Signal
from qtpy.QtGui import QDragEnterEvent, QDropEvent
from qtpy.QtWidgets import (
    QHBoxLayout,
    QLabel,
    QMenu,
    QPushButton,
    QSizePolicy,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.io.paths import StacksMissing
from particle_explorer.widgets.ask import ask_path, ask_paths
from particle_explorer.widgets.background import Failure, Tasks
from particle_explorer.widgets.form import Folded
from particle_explorer.widgets.job_bar import Complaint, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.looking import (
    Found,
    look_at_joined,
    look_at_layer,
    look_or_miss,
    session_lines,
)
from particle_explorer.widgets.micrograph import MicrographPanel
from particle_explorer.widgets.moving import JoinPanel
from particle_explorer.widgets.sets import SetsList
from particle_explorer.widgets.stack_page import StackPage
from particle_explorer.widgets.tour import was_seen
from particle_explorer.widgets.workspace import show_session, state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Session

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


class ParticlesDock(QWidget):
    """Open particles and prepare them."""

    prepared = Signal()

    def __init__(self, napari_viewer: napari.Viewer) -> None:
        super().__init__()
        self.viewer = unwrapped(napari_viewer)
        self.state = state_of(self.viewer)
        self.tasks = Tasks(self)
        self._layer_source: Path | None = None
        self._asked = [Path()]
        self.setAcceptDrops(True)

        self.complaint = Complaint()
        self.missing = self._build_missing()
        self.start_page = self._build_start()
        self.stack = StackPage(self.complaint)
        self.stack.imported.connect(self._on_imported)
        self.stack.open_asked.connect(self.open)
        self.stack.back_asked.connect(self._back)
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
            *(self.start_page, self.stack, self.session_page, self.join_part),
        ):
            layout.addWidget(part)
        layout.addStretch(1)

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

    def shutdown(self) -> None:
        """End all background work of this dock; jobs go on."""
        self.tasks.stop()
        self.stack.stop()
        self.micrograph.tasks.stop()
        self.join.stop()

    def _show(self, page: QWidget | None, reading: str = "") -> None:
        self.missing.setVisible(False)
        self.reading_words.setText(reading)
        self.reading.setVisible(bool(reading))
        for each in (self.start_page, self.stack, self.session_page):
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
        self.stack.leave()
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
        self.stack.show_stack(found)
        self._show(self.stack)

    # --- a session is open ------------------------------------------------------------------------

    def _on_imported(self, session: Path) -> None:
        self._hide_adopted_layers()
        show_session(self.state, self.tasks, session, shown=self._on_shown, failed=self.complain)

    def _on_shown(self) -> None:
        self._back()
        self.prepared.emit()

    def _hide_adopted_layers(self) -> None:
        # from here on the particles are seen in the layer of the session; two tiles of the same would confuse
        for layer in self.viewer.layers:
            if METADATA in layer.metadata:
                layer.visible = False

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

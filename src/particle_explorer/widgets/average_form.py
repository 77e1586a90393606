"""What to average, and how: the form above the averages, read as words of the command `average`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qtpy.QtCore import Signal
from qtpy.QtWidgets import QCheckBox, QComboBox, QHBoxLayout, QLabel, QPushButton, QVBoxLayout, QWidget

from particle_explorer.configs import AverageConfig
from particle_explorer.state import AppState
from particle_explorer.widgets.background import Failure
from particle_explorer.widgets.colours import title_of
from particle_explorer.widgets.exporting import groupings
from particle_explorer.widgets.form import ConfigForm, Folded, command_line
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.rigid_part import RigidPart

if TYPE_CHECKING:
    from particle_explorer.session import Run

SELECTION = "selection"
GRID = "grid"


class AverageForm(QWidget):
    """Particles, poses, weights and settings of the averages to make, and the buttons that make them."""

    average_asked = Signal()
    halves_asked = Signal()
    refine_asked = Signal()

    def __init__(self, state: AppState, failed: Callable[[Failure], None]) -> None:
        super().__init__()
        self.state = state
        self._busy = False
        self.what = QComboBox()
        self.what.setToolTip("Average the particles selected on the map, or one average per cluster or class")
        self.what.currentIndexChanged.connect(self.show_able)
        self.rigid_part = RigidPart(state, failed)
        self.control = QCheckBox("Noise control")
        self.control.setChecked(True)
        self.control.setToolTip(
            "<p>Also puts pure noise through the same inference of poses and the same averaging and draws its"
            " curve beside that of the average: what the alignment alone makes of nothing. Takes about as"
            " long again.</p>"
        )
        self.independent_button = QPushButton("Two independent halves")
        self.independent_button.setToolTip(
            "<p>Trains the model of this run anew on either half of the particles, averages each half by its"
            " own model, and lays the averages onto each other only then. The curves of these halves may be"
            " called a resolution. Takes about as long as training did.</p>"
        )
        self.independent_button.clicked.connect(self.halves_asked)
        self.form = ConfigForm(AverageConfig)
        self.average_button = QPushButton("Average")
        self.average_button.clicked.connect(self.average_asked)
        row = QHBoxLayout()
        row.addWidget(QLabel("Average"))
        row.addWidget(self.what, 1)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        layout.addLayout(row)
        layout.addWidget(self.average_button)
        layout.addWidget(self.rigid_part)
        layout.addWidget(self.control)
        layout.addWidget(Folded("Settings", self._build_settings()))
        layout.addWidget(self.independent_button)
        follow(self, state.features_changed, self._on_features)
        follow(self, state.selection.changed, self.show_able)

    def _build_settings(self) -> QWidget:
        page = QWidget()
        self.poses = QComboBox()
        self.poses.setToolTip("<p>Whose angles and shifts move the images back</p>")
        self.weights = QComboBox()
        for words, weighting in (
            ("every member counts once", "hard"),
            ("less the farther from the middle", "distance"),
            ("shared by the spread of positions", "posterior"),
        ):
            self.weights.addItem(words, weighting)
        self.weights.setToolTip("<p>How much a member counts in its average</p>")
        self.refine_button = QPushButton("Refine poses")
        self.refine_button.setToolTip(
            "<p>Search around the pose of every particle of the classes for a better one, against the average"
            " of the other half of its class; then average with the refined poses</p>"
        )
        self.refine_button.clicked.connect(self.refine_asked)
        self.refined_words = QLabel()
        self.refined_words.setWordWrap(True)
        self.refined_words.setVisible(False)
        layout = QVBoxLayout(page)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        row = QHBoxLayout()
        row.addWidget(QLabel("Poses"))
        row.addWidget(self.poses, 1)
        row.addWidget(self.refine_button)
        layout.addLayout(row)
        row = QHBoxLayout()
        row.addWidget(QLabel("Weights"))
        row.addWidget(self.weights, 1)
        layout.addLayout(row)
        layout.addWidget(self.refined_words)
        layout.addWidget(self.form)
        return page

    # --- what there is to average -----------------------------------------------------------------

    def _on_features(self) -> None:
        before = self.what.currentData()
        self.what.blockSignals(True)
        self.what.clear()
        self.what.addItem("the selected particles", SELECTION)
        columns = set(map(str, self.state.features.columns))
        if "z_0" in columns:
            self.what.addItem("each cell of a grid over the map", GRID)
        for name in groupings(self.state.features):
            self.what.addItem(f"each {title_of(name.partition(' ')[0])}", name)
        self._list_poses(columns)
        position = self.what.findData(before)
        grouped = self.what.itemData(self.what.count() - 1) not in (SELECTION, GRID)
        newest = self.what.count() - 1 if grouped else 0
        self.what.setCurrentIndex(position if before != SELECTION and position >= 0 else newest)
        self.what.blockSignals(False)
        self.show_able()

    def _list_poses(self, columns: set[str]) -> None:
        before, session = self.poses.currentData(), self.state.session
        self.poses.clear()
        self.poses.addItem("of this run", "run")
        if any(name.startswith("pose-refined") for name in columns):
            self.poses.addItem("of this run, refined", "refined")
        if session is not None and {"angle_deg", "shift_y_px", "shift_x_px"} <= set(session.table.columns):
            self.poses.addItem("of the particle file", "file")
        self.poses.setCurrentIndex(max(0, self.poses.findData(before)))

    def set_busy(self, busy: bool) -> None:
        """Whether averages are being made just now."""
        self._busy = busy
        self.show_able()

    def show_able(self, *_: object) -> None:
        """What cannot be done now says why."""
        run, selection, count = self.state.run, self.by == SELECTION, self.state.selection.count
        able = run is not None and not self._busy and (count > 0 or not selection)
        self.average_button.setEnabled(able)
        self.independent_button.setEnabled(run is not None and run.has_weights and not self._busy)
        if selection and not count:
            self.average_button.setToolTip("Select particles on the map first (L: lasso)")
        else:
            self.average_button.setToolTip(
                "Align the original images with the poses of this run and average them"
            )
        self.average_button.setText(
            f"Average {number(count)} selected particles" if selection and count else "Average"
        )

    # --- what is chosen ---------------------------------------------------------------------------

    @property
    def by(self) -> str:
        """`SELECTION`, `GRID` or a column; of the column of a repeated result, its result."""
        return str(self.what.currentData()).partition(" ")[0]

    def choose_selection(self) -> None:
        """Average what is selected."""
        self.what.setCurrentIndex(self.what.findData(SELECTION))

    def settings(self) -> list[str]:
        """The words of the settings alone."""
        return command_line("average", self.form.value())

    def words(self, run: Run) -> list[str]:
        """The words of everything but the particles, for averages of a run."""
        words = self.settings() + (["--held"] if self.state.held else [])
        if self.poses.currentData() not in (None, "run") and not self.state.held:
            words += ["--poses", str(self.poses.currentData())]
        if self.weights.currentData() != "hard" and self.by != SELECTION:
            words += ["--weights", str(self.weights.currentData())]
        return words + (["--noise-control"] if self.control.isChecked() and run.has_weights else [])

    def show_refined(self, words: str) -> None:
        """Poses have been refined: average with them next."""
        self.poses.setCurrentIndex(max(0, self.poses.findData("refined")))
        self.refined_words.setText(words)
        self.refined_words.setVisible(True)

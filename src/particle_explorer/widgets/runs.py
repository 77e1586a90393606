"""All runs of a session in one table; two of them compared, with a second map on the same selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QAbstractItemView,
    QDialog,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
)

from particle_explorer.latents import Agreement, agreement
from particle_explorer.widgets.background import Tasks
from particle_explorer.widgets.job_bar import duration, number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.run_list import NAMES, STATES, leak_of, leak_words
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.session import Run, Session
    from particle_explorer.widgets.train import TrainDock

HEADS = {
    "run": "Run",
    "state": "State",
    "settings": "Settings other than the default",
    "fit": "Fit",
    "speed": "Images/s",
    "took": "Took",
    "leak": "Pose in content",
    "groups": "Groups",
}
TIPS = {
    "fit": "Log-likelihood per particle over noise (higher is better), or the loss (lower is better);\n"
    "compare only runs of one kind of model",
    "leak": "How well the position on the map predicts the angle: 0 % is what one wants",
    "groups": "The newest clustering of the run",
}


@dataclass(frozen=True)
class Line:
    """One run in the table."""

    name: str
    encoded: bool
    cells: dict[str, str]


class RunsWindow(QDialog):
    """A window of its own, so that it may be as wide as a table needs; nothing waits for it."""

    def __init__(self, viewer: napari.Viewer, train: TrainDock) -> None:
        super().__init__(train)
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.train = train
        self.tasks = Tasks(self)
        self.setWindowTitle("Runs")
        self.resize(900, 340)
        self.table = QTableWidget(0, len(HEADS))
        self.table.setHorizontalHeaderLabels(list(HEADS.values()))
        for column, key in enumerate(HEADS):
            self.table.horizontalHeaderItem(column).setToolTip(TIPS.get(key, HEADS[key]))
        self.table.setSelectionBehavior(QAbstractItemView.SelectionBehavior.SelectRows)
        self.table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
        self.table.verticalHeader().setVisible(False)
        self.table.setToolTip("Choose one run to show or repeat it, two (Ctrl) to compare them")
        header = self.table.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(list(HEADS).index("settings"), QHeaderView.ResizeMode.Stretch)
        self.table.itemSelectionChanged.connect(self._show_buttons)
        self.words = QLabel()
        self.words.setWordWrap(True)
        self.show_button = QPushButton("Show its map")
        self.repeat_button = QPushButton("Duplicate its settings")
        self.go_on_button = QPushButton("Go on with other settings")
        self.compare_button = QPushButton("Compare the two")
        self.second_button = QPushButton("Second map beside")
        row = QHBoxLayout()
        for button, does in (
            (self.show_button, self.show_run),
            (self.repeat_button, self.repeat),
            (self.go_on_button, self.go_on),
            (self.compare_button, self.compare),
            (self.second_button, self.show_second),
        ):
            button.clicked.connect(does)
            row.addWidget(button)
        layout = QVBoxLayout(self)
        layout.addWidget(self.table, 1)
        layout.addWidget(self.words)
        layout.addLayout(row)
        follow(self, self.state.session_changed, self._on_session)
        follow(self, self.state.features_changed, self.read)
        self._show_buttons()

    # --- the table ----------------------------------------------------------------------------------

    def read(self) -> None:
        """Read the runs anew."""
        session = self.state.session
        if session is not None and (self.isVisible() or self.table.rowCount() == 0):
            self.tasks.run("table", lambda: lines_of(session), self._on_lines)

    def _on_lines(self, lines: list[Line]) -> None:
        chosen = set(self.chosen())
        shown = None if self.state.run is None else self.state.run.name
        self.table.setRowCount(len(lines))
        self.table.clearSelection()
        for row, line in enumerate(lines):
            for column, key in enumerate(HEADS):
                words = line.cells.get(key, "")
                item = QTableWidgetItem(f"● {words}" if key == "run" and line.name == shown else words)
                item.setData(Qt.ItemDataRole.UserRole, (line.name, line.encoded))
                item.setToolTip(words)
                self.table.setItem(row, column, item)
        mode = self.table.selectionMode()
        self.table.setSelectionMode(QAbstractItemView.SelectionMode.MultiSelection)
        for row, line in enumerate(lines):
            if line.name in chosen:
                self.table.selectRow(row)
        self.table.setSelectionMode(mode)
        self._show_buttons()

    def chosen(self) -> list[str]:
        """Names of the runs that are marked."""
        rows = sorted({index.row() for index in self.table.selectedIndexes()})
        return [str(self.table.item(row, 0).data(Qt.ItemDataRole.UserRole)[0]) for row in rows]

    def _show_buttons(self) -> None:
        rows = sorted({index.row() for index in self.table.selectedIndexes()})
        encoded = [bool(self.table.item(row, 0).data(Qt.ItemDataRole.UserRole)[1]) for row in rows]
        one, two = "Mark one run in the table", "Mark two runs that have ended (Ctrl and click)"
        for button, able, tip, need in (
            (self.show_button, encoded == [True], "Show the map of this run", one),
            (
                self.repeat_button,
                len(rows) == 1,
                "Put its settings into the tab Train, to repeat or change",
                one,
            ),
            (
                self.go_on_button,
                encoded == [True],
                "Start the next training from the weights of this run, with settings to change in the tab"
                " Train",
                one,
            ),
            (self.compare_button, encoded == [True, True], "How far the two say the same", two),
            (
                self.second_button,
                encoded == [True],
                "A second map in the window: what is selected in one is selected in both",
                one,
            ),
        ):
            button.setEnabled(able)
            button.setToolTip(tip if able else need)

    # --- what one does with them ----------------------------------------------------------------------

    def show_run(self) -> None:
        """Show the map of the run that is marked."""
        self.train.show_run(self.chosen()[0])

    def repeat(self) -> None:
        """Put the settings of the run that is marked into the form."""
        self.train.use_settings(self.chosen()[0])
        self.train.go_on_from("")
        self.state.train_shown.emit()
        self.words.setText(f"The tab Train has the settings of {self.chosen()[0]} now.")

    def go_on(self) -> None:
        """Let the next training start from the run that is marked."""
        name = self.chosen()[0]
        self.train.go_on_from(name)
        self.state.train_shown.emit()
        self.words.setText(f"In the tab Train: change what you like, and train on from {name}.")

    def compare(self) -> None:
        """Say how far the two runs that are marked agree."""
        session = self.state.session
        if session is None or len(self.chosen()) != 2:
            return
        first, second = self.chosen()
        self.words.setText("Comparing …")
        self.tasks.run(
            "compare",
            lambda: compare(session, first, second),
            lambda found: self.words.setText(agreement_words(first, second, *found)),
            lambda failure: self.words.setText(failure.sentence),
        )

    def show_second(self) -> None:
        """Show the map of the run that is marked in a dock of its own, linked by the selection."""
        self.train.second.show(self.chosen()[0])

    def _on_session(self, *_: object) -> None:
        self.table.setRowCount(0)
        self.words.clear()
        self.hide()


# --- in threads -----------------------------------------------------------------------------------


def lines_of(session: Session) -> list[Line]:
    """What the table says of every run, newest first."""
    return [_line(run) for run in session.runs()][::-1]


def _line(run: Run) -> Line:
    status, config = run.status, run.config
    metrics = run.metrics()
    fit = speed = ""
    if len(metrics):
        last = metrics.iloc[-1]
        if "negative_log_likelihood" in metrics:
            fit = f"log-likelihood {-float(last['negative_log_likelihood']):.4g}"
        elif "loss" in metrics:
            fit = f"loss {float(last['loss']):.4g}"
        if "images_per_second" in metrics:
            speed = number(round(float(metrics["images_per_second"].median())))
    took = duration(status.heartbeat - status.started) if status.is_over and status.heartbeat else ""
    leak = leak_of(run) if run.is_encoded else float("nan")
    groups = run.newest_column("cluster") or ""
    settings = [NAMES.get(config.model.kind, config.model.kind)]
    for part in (config.model, config.train):
        for name, field in type(part).model_fields.items():
            value = getattr(part, name)
            if name != "kind" and value != field.get_default():
                settings.append(f"{(field.title or name).lower()} {value}")
    if config.parent:
        settings.append(f"{'goes on from' if config.warm_start else 'of'} {config.parent}")
    if config.where:
        settings.append(f"only {config.where}")
    cells = {
        "run": run.name,
        "state": STATES.get(status.state, status.state),
        "settings": ", ".join(settings),
        "fit": fit,
        "speed": speed,
        "took": took,
        "leak": "" if np.isnan(leak) else leak_words(leak),
        "groups": groups,
    }
    return Line(run.name, run.is_encoded, cells)


def compare(session: Session, first: str, second: str) -> tuple[Agreement, str]:
    """How far two runs agree, and which clusterings were compared."""
    runs = [session.run(name) for name in (first, second)]
    latents = [run.latents() for run in runs]
    assert latents[0] is not None and latents[1] is not None
    names = [run.newest_column("cluster") for run in runs]
    groups: list[NDArray[np.integer] | None] = [None, None]
    if all(names):
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            column = run.column(str(name)).reindex(latents[0].uid).iloc[:, 0]
            groups[i] = np.asarray(column.astype("category").cat.codes.to_numpy(), np.int64)
    found = agreement(latents[0], latents[1], groups[0], groups[1])
    return found, " and ".join(str(name) for name in names) if all(names) else ""


def agreement_words(first: str, second: str, found: Agreement, clusterings: str) -> str:
    """Agreement in sentences."""
    parts = []
    if np.isfinite(found.position):
        parts.append(f"positions on one map explain {100 * found.position:.0f} % of those on the other")
    if np.isfinite(found.angle_deg):
        parts.append(
            f"angles differ by {found.angle_deg:.1f}° (median) after one common turn, by"
            f" {found.angle_along_map_deg:.1f}° where the frame may turn along the map"
        )
    if np.isfinite(found.clusters):
        parts.append(f"clusterings ({clusterings}) agree to {found.clusters:.2f} (adjusted Rand index)")
    else:
        parts.append("group both runs to compare their clusterings")
    return f"{first} and {second}, {number(found.n)} particles: " + "; ".join(parts) + "."

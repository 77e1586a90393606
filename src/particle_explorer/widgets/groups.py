"""Layouts (UMAP, t-SNE) and groups of particles: computed by a worker, then named, merged and split here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from qtpy.QtCore import QPoint, QSignalBlocker, Qt
from qtpy.QtGui import QColor, QIcon, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
    QComboBox,
    QHBoxLayout,
    QLabel,
    QLineEdit,
    QListWidgetItem,
    QMenu,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from particle_explorer.configs import ClusterConfig, EmbedConfig
from particle_explorer.state import Mask
from particle_explorer.status import Status
from particle_explorer.widgets.background import Tasks, in_turn
from particle_explorer.widgets.colours import colour_by, recoloured, rgb, title_of
from particle_explorer.widgets.exporting import groupings
from particle_explorer.widgets.form import ConfigForm
from particle_explorer.widgets.job_bar import number
from particle_explorer.widgets.lifetime import follow
from particle_explorer.widgets.sets import NAMED_COLOURS
from particle_explorer.widgets.short_list import ShortList
from particle_explorer.widgets.workspace import state_of, unwrapped

if TYPE_CHECKING:
    import napari

    from particle_explorer.widgets.explore import Worker


class GroupsPanel(QWidget):
    """One form each for layouts and clusterings, and the list of groups of the clustering that is chosen."""

    def __init__(self, viewer: napari.Viewer, worker: Worker) -> None:
        super().__init__()
        self.viewer = unwrapped(viewer)
        self.state = state_of(self.viewer)
        self.worker = worker
        self.tasks = Tasks(self)
        self.embedding = ConfigForm(EmbedConfig)
        self.embed_button = QPushButton("Lay out")
        self.embed_button.clicked.connect(self.embed)
        self.clustering = ConfigForm(ClusterConfig)
        self.on = QComboBox()
        self.on.setToolTip("What is grouped: positions on the map, or places in a layout")
        self.cluster_button = QPushButton("Group")
        self.cluster_button.clicked.connect(self.cluster)
        self.which = QComboBox()
        self.which.setToolTip("The grouping that is listed and coloured")
        self.which.activated.connect(self._on_which)
        self.groups = ShortList(7)
        self.groups.setSelectionMode(QAbstractItemView.SelectionMode.ExtendedSelection)
        self.groups.setToolTip(
            "Click a group to select its particles; Ctrl or Shift for several. Right click: its colour"
        )
        self.groups.itemSelectionChanged.connect(self._select)
        self.groups.setContextMenuPolicy(Qt.ContextMenuPolicy.CustomContextMenu)
        self.groups.customContextMenuRequested.connect(self._show_menu)
        self.name = QLineEdit()
        self.name.setPlaceholderText("Name of the group")
        self.name.returnPressed.connect(self.rename)
        self.name_button, self.merge_button, self.split_button = (
            QPushButton(words) for words in ("Name", "Merge", "Split")
        )
        self.name_button.clicked.connect(self.rename)
        self.merge_button.clicked.connect(self.merge)
        self.split_button.clicked.connect(self.split)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(4)
        on_row = QHBoxLayout()
        on_row.addWidget(QLabel("Group by"))
        on_row.addWidget(self.on, 1)
        for part in (self.embedding, self.embed_button, self.clustering):
            layout.addWidget(part)
        layout.addLayout(on_row)
        layout.addWidget(self.cluster_button)
        layout.addWidget(self.which)
        layout.addWidget(self.groups)
        layout.addWidget(self.name)
        buttons = QHBoxLayout()
        buttons.setSpacing(3)
        for button in (self.name_button, self.merge_button, self.split_button):
            buttons.addWidget(button, 1)
        layout.addLayout(buttons)
        self.clustering.valueChanged.connect(self._fit_forms)
        self.embedding.valueChanged.connect(self._fit_forms)
        follow(self, self.state.features_changed, self._on_features)
        follow(self, self.state.run_changed, self._on_features)
        worker.when_changed(self._show_buttons)
        self._fit_forms()
        self._on_features()

    def take_focus(self) -> None:
        """Let the keyboard choose how to group; a focus proxy would outlive its control under PyQt6."""
        self.clustering.editor("method").native.setFocus()

    # --- computing ----------------------------------------------------------------------------------

    def embed(self) -> None:
        """Start a layout in the background."""
        options = _flags(self.embedding.value())
        words = {"umap": "UMAP", "tsne": "t-SNE", "pca": "Components"}[self.embedding.value().method]
        self.worker.start(
            "embed", lambda run, folder: [str(run.path), *options], f"{words} …", self._on_embedded
        )

    def cluster(self) -> None:
        """Start a clustering in the background."""
        options = _flags(self.clustering.value())
        if self.on.currentData():
            options += ["--on", self.on.currentData()]
        self.worker.start(
            "cluster", lambda run, folder: [str(run.path), *options], "Grouping …", self._on_grouped
        )

    def merge(self) -> None:
        """Make the chosen groups one."""
        numbers = ",".join(str(value) for value in self._numbers())
        self._regroup(["--merge", numbers])

    def split(self) -> None:
        """Split the chosen group in two."""
        self._regroup(["--split", str(self._numbers()[0])])

    def rename(self) -> None:
        """Give the chosen group the name that was typed."""
        name, chosen = self.name.text().strip().replace(",", " ").replace("=", " "), self._numbers()
        if name and len(chosen) == 1 and self.name_button.isEnabled():
            self._regroup(["--names", f"{chosen[0]}={name}"])

    def _regroup(self, options: list[str]) -> None:
        by = self.which.currentData()
        self.worker.start(
            "regroup",
            lambda run, folder: [str(run.path), "--by", by, *options],
            "Regrouping …",
            self._on_grouped,
        )

    def _on_embedded(self, status: Status) -> None:
        name, method = status.message, self.embedding.value().method
        stem = re.sub(r"_\d+$", "", name) or method
        self.state.axes_asked.emit(f"{stem}_0", f"{stem}_1")
        self.worker.read_again()

    def _on_grouped(self, status: Status) -> None:
        self.state.colour_asked.emit(status.message)
        self._wanted = status.message
        self.worker.read_again()

    # --- groups -------------------------------------------------------------------------------------

    _wanted = ""

    def _on_features(self, *_: object) -> None:
        features, run = self.state.features, self.state.run
        there = [] if run is None else groupings(features)
        before = self._wanted if self._wanted in there else self.which.currentData()
        self._wanted = "" if self._wanted in there else self._wanted
        with QSignalBlocker(self.which):
            self.which.clear()
            for name in there:
                self.which.addItem(title_of(name), name)
            at = self.which.findData(before)
            self.which.setCurrentIndex(at if at >= 0 else len(there) - 1)
        layouts = sorted(
            {
                found[1]
                for name in map(str, features.columns)
                if (found := re.fullmatch(r"((?:umap|tsne|pca)(?:-\d+)?)_0", name))
            }
        )
        chosen = self.on.currentData()
        with QSignalBlocker(self.on):
            self.on.clear()
            self.on.addItem("positions on the map", "")
            for name in layouts:
                self.on.addItem(f"places in {title_of(f'{name}_0').rsplit(' 1', 1)[0]}", name)
            self.on.setCurrentIndex(max(0, self.on.findData(chosen)))
        self._list()

    def _on_which(self, *_: object) -> None:
        self.state.colour_asked.emit(self.which.currentData())
        self._list()

    def _list(self) -> None:
        name = self.which.currentData()
        for part in (
            self.which,
            self.groups,
            self.name,
            self.name_button,
            self.merge_button,
            self.split_button,
        ):
            part.setVisible(name is not None)
        run, features = self.state.run, self.state.features
        if name is None or run is None:
            self.tasks.forget("groups")
            self._fill([])
            return
        column = features[name]
        self.tasks.run(
            "groups", lambda: in_turn(groups_of, name, column, run.group_colours(name)), self._fill
        )

    def _fill(self, found: list[Group]) -> None:
        with QSignalBlocker(self.groups):
            self.groups.clear()
            for group in found:
                item = QListWidgetItem(group.words)
                item.setData(Qt.ItemDataRole.UserRole, group)
                item.setIcon(_swatch(group.colour))
                self.groups.addItem(item)
        self._show_buttons()

    def _numbers(self) -> list[int]:
        return [item.data(Qt.ItemDataRole.UserRole).number for item in self.groups.selectedItems()]

    def _show_menu(self, at: QPoint) -> None:
        item = self.groups.itemAt(at)
        if item is not None:
            menu = self.colour_menu(item)
            menu.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
            menu.popup(self.groups.mapToGlobal(at))

    def colour_menu(self, item: QListWidgetItem) -> QMenu:
        """The colours that a group may have."""
        menu = QMenu(self)
        group = item.data(Qt.ItemDataRole.UserRole).label
        for words, colour in NAMED_COLOURS.items():
            action = menu.addAction(_swatch(rgb([colour])[0]), words)
            action.triggered.connect(lambda _=False, colour=colour: self.recolour(group, colour))
        return menu

    def recolour(self, group: str, colour: str) -> None:
        """Give a group of the grouping that is chosen a colour, here and on the map."""
        run, name = self.state.run, self.which.currentData()
        if run is None or name is None:
            return

        def done(_: None) -> None:
            self._list()
            self.state.colour_asked.emit(name)

        self.tasks.run("colour", lambda: run.colour_group(name, group, colour), done, self.worker.fail)

    def _select(self) -> None:
        name = self.which.currentData()
        if name is None:
            return
        values = [item.data(Qt.ItemDataRole.UserRole).value for item in self.groups.selectedItems()]
        column = self.state.features[name]

        def done(mask: Mask) -> None:
            if mask.size == self.state.selection.mask.size:
                self.state.selection.set(mask)

        self.tasks.run("select", lambda: members(column, values), done)
        self._show_buttons()

    # --- look ---------------------------------------------------------------------------------------

    def _fit_forms(self, *_: object) -> None:
        method = self.embedding.value().method
        for name, needed in (("n_neighbours", "umap"), ("min_distance", "umap"), ("perplexity", "tsne")):
            self.embedding.set_applicable(name, method == needed, f"Only for {title(needed)}")
        way = self.clustering.value().method
        self.clustering.set_applicable("n_clusters", way != "hdbscan", "HDBSCAN finds the number itself")
        self.clustering.set_applicable("min_size", way == "hdbscan", "Only for HDBSCAN")
        self.clustering.set_applicable("most_clusters", way == "gmm", "Only for Gaussian mixtures")

    def _show_buttons(self) -> None:
        idle = self.state.run is not None and not self.worker.busy
        why = "" if idle else "Wait until the job above has ended"
        n = len(self.groups.selectedItems())
        for button, able, tip in (
            (
                self.embed_button,
                True,
                "Lay the particles out so that neighbours stay together, in the background",
            ),
            (self.cluster_button, True, "Sort the particles into groups, in the background"),
            (self.name_button, n == 1, "Give the group chosen in the list this name"),
            (self.merge_button, n > 1, "Make the groups chosen in the list one"),
            (self.split_button, n == 1, "Split the group chosen in the list in two"),
        ):
            button.setEnabled(idle and able)
            need = (
                "Choose one group in the list"
                if button is not self.merge_button
                else "Choose two groups or more"
            )
            button.setToolTip(why or (tip if able else need))


@dataclass(frozen=True)
class Group:
    """One group of a grouping, as it is listed."""

    words: str
    number: int
    """What `regroup` calls it"""
    value: float | str
    """What stands in the column"""
    label: str
    """What its colour is kept under"""
    colour: NDArray[np.float64]
    """`(3,)` 0..255"""


def groups_of(name: str, column: pd.Series, own: Mapping[str, str]) -> list[Group]:
    """The groups of a column with their sizes; `own` are colours they were given. A thread's work."""
    colouring = recoloured(colour_by(name, column), own)
    total, colours = max(len(column), 1), colouring.lut

    def group(i: int, words: str, number_: int, value: float | str, label: str, n: int) -> Group:
        shown = f"{words}   {number(n)}  ({100 * n / total:.0f} %)"
        return Group(shown, number_, value, label, colours[min(i, len(colours) - 1)])

    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(float)
        there, counts = np.unique(values[np.isfinite(values)], return_counts=True)
        return [
            group(i, "in no group" if value == 0 else f"{value:g}", int(value), value, f"{value:g}", n)
            for i, (value, n) in enumerate(zip(there.tolist(), counts.tolist(), strict=True))
        ]
    texts = column.astype(str).value_counts()
    # text groups are numbered in the order of their names, as `regroup` counts them
    return [
        group(i, label, i + 1, label, label, int(texts[label]))
        for i, label in enumerate(colouring.labels)
        if label in texts.index
    ]


def members(column: pd.Series, values: Sequence[float | str]) -> Mask:
    """`(n,)` particles that are in one of these groups; a thread's work."""
    if pd.api.types.is_numeric_dtype(column):
        return np.isin(column.to_numpy(float), np.asarray(values, float))
    return column.astype(str).isin([str(value) for value in values]).to_numpy()


def title(method: str) -> str:
    """What people call a method."""
    return {"umap": "UMAP", "tsne": "t-SNE", "pca": "components"}[method]


def _flags(config: EmbedConfig | ClusterConfig) -> list[str]:
    """Settings that differ from their defaults, as options."""
    options: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value != field.get_default():
            options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def _swatch(colour: object) -> QIcon:
    red, green, blue = (round(float(part)) for part in colour)  # type: ignore[attr-defined]
    picture = QPixmap(12, 12)
    picture.fill(QColor(red, green, blue))
    return QIcon(picture)

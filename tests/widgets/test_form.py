"""The form: what goes in comes out, titles and bounds are the declaration's own."""

from __future__ import annotations

import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("qtpy")

from magicgui.widgets import Container
from magicgui.widgets.bases import ValueWidget
from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import QApplication, QLabel

from particle_explorer import configs
from particle_explorer.widgets.form import ConfigForm, command_line
from particle_explorer.widgets.number_box import Number, WholeNumber

FORMS = [
    configs.PreprocessConfig,
    configs.ClassMapConfig,
    configs.SpatialVAEConfig,
    configs.TrainConfig,
    configs.EmbedConfig,
    configs.ClusterConfig,
    configs.AverageConfig,
    configs.SimulateConfig,
]


def _type(box: Number, text: str) -> None:
    box.native.lineEdit().setText(text)
    box.native.interpretText()


def _values(field: Any) -> st.SearchStrategy[Any]:
    if typing.get_origin(field.annotation) is Literal:
        return st.sampled_from(typing.get_args(field.annotation))
    if field.annotation is bool:
        return st.booleans()
    bounds = {type(bound).__name__: getattr(bound, type(bound).__name__.lower()) for bound in field.metadata}
    low, high = bounds.get("Ge", bounds.get("Gt", 0)), bounds["Le"]
    if field.annotation is int:
        return st.integers(low, high)
    return st.floats(low, high, exclude_min="Gt" in bounds)


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.__name__)
@given(data=st.data())
def test_what_goes_in_comes_out(
    qapp: QApplication, config: type[configs.Config], data: st.DataObject
) -> None:
    form = ConfigForm(config)
    assert form.value() == config()
    fields = config.model_fields.items()
    values = config(**{name: data.draw(_values(field), label=name) for name, field in fields})
    form.setValue(values)
    assert form.value() == values
    form.deleteLater()


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.__name__)
def test_every_setting_is_titled_and_explained(qapp: QApplication, config: type[configs.Config]) -> None:
    form = ConfigForm(config)
    texts = {label.text() for label in form.findChildren(QLabel)}
    for name, field in config.model_fields.items():
        if len(typing.get_args(field.annotation)) == 1:
            continue  # nothing to choose
        editor = form.editor(name)
        assert field.title in texts | {getattr(editor, "text", "")}
        assert editor.tooltip


@pytest.mark.parametrize("config", FORMS, ids=lambda config: config.__name__)
def test_every_control_is_a_magicgui_widget(qapp: QApplication, config: type[configs.Config]) -> None:
    form = ConfigForm(config)
    for name in config.model_fields:
        if len(typing.get_args(config.model_fields[name].annotation)) != 1:
            editor = form.editor(name)
            assert isinstance(editor, ValueWidget)
            assert form.isAncestorOf(editor.native)


def test_a_number_box_is_one_of_magicguis(qapp: QApplication) -> None:
    box, whole = Number(0, 1e5, "Å", "automatic"), WholeNumber(1, 2**31 - 1)
    inside = Container(widgets=[box, whole], labels=False)
    told: list[float] = []
    box.changed.connect(told.append)
    box.value = 1e-4
    box.value = 1e-4
    assert told == [1e-4]
    assert (box.min, box.max, box.step) == (0, 1e5, None)
    assert (whole.min, whole.max, whole.step) == (1, 2**31 - 1, 1)
    assert box.parent is inside
    assert box.render().shape[2] == 4
    with pytest.raises(ValueError, match="outside"):
        box.value = 2e5
    inside.close()


@given(number=st.floats(1e-12, 1e5))
def test_a_number_is_kept_exactly(qapp: QApplication, number: float) -> None:
    box = Number(0, 1e5)
    box.value = number
    assert box.value == number


@pytest.mark.parametrize(
    ("typed", "value"), [("1e-4", 1e-4), ("182.375 Å", 182.375), ("0.9 of the box", 0.0)]
)
def test_numbers_can_be_typed(qapp: QApplication, typed: str, value: float) -> None:
    box = Number(0, 1e5, "Å", "0.9 of the box")
    _type(box, typed)
    assert box.value == value


def test_nothing_silly_can_be_typed(qapp: QApplication) -> None:
    box = Number(0, 10)
    box.value = 3.0
    for typed in ("nan", "inf", "many", "11"):
        _type(box, typed)
        assert box.value == 3.0


def test_a_step_follows_the_size_of_the_number(qapp: QApplication) -> None:
    box = Number(0, 1e5, "", "automatic")
    for start, expected in ((0.0003, 0.0004), (180.0, 190.0), (0.0, 1.0)):
        box.value = start
        box.native.stepBy(1)
        assert box.value == pytest.approx(expected)


def test_zero_says_what_it_means(qapp: QApplication) -> None:
    form = ConfigForm(configs.PreprocessConfig)
    assert form.editor("box_px").native.text() == "automatic"


def test_told_once_when_set_and_not_when_equal(qapp: QApplication) -> None:
    form = ConfigForm(configs.TrainConfig)
    told: list[None] = []
    form.valueChanged.connect(lambda: told.append(None))
    form.setValue(configs.TrainConfig())
    assert not told
    form.setValue(configs.TrainConfig(n_epochs=5, seed=3))
    assert len(told) == 1
    form.editor("n_epochs").value = 6
    assert len(told) == 2


@pytest.mark.parametrize("name", ["n_epochs", "learning_rate", "precision"])
def test_scrolling_past_a_control_changes_nothing(qapp: QApplication, name: str) -> None:
    form = ConfigForm(configs.TrainConfig)
    form.show()
    editor = form.editor(name).native
    editor.clearFocus()
    event = QWheelEvent(
        QPointF(5, 5),
        QPointF(5, 5),
        QPoint(0, 120),
        QPoint(0, 120),
        Qt.MouseButton.NoButton,
        Qt.KeyboardModifier.NoModifier,
        Qt.ScrollPhase.NoScrollPhase,
        False,
    )
    QApplication.sendEvent(editor, event)
    assert form.value() == configs.TrainConfig()
    form.close()


def test_an_inapplicable_setting_is_off_and_says_why(qapp: QApplication) -> None:
    form = ConfigForm(configs.PreprocessConfig)
    form.set_applicable("ctf", False, "The file has no CTF parameters")
    assert not form.editor("ctf").enabled
    assert "no CTF" in form.editor("ctf").tooltip
    form.set_applicable("ctf", True)
    assert form.editor("ctf").enabled and "flips" in form.editor("ctf").tooltip


def test_unbounded_numbers_are_refused(qapp: QApplication) -> None:
    class Unbounded(configs.Config):
        size: float = configs.setting(1.0, "Size")
        """No bounds."""

    with pytest.raises(TypeError, match="no bounds"):
        ConfigForm(Unbounded)


def test_command_line_names_what_differs_from_the_defaults() -> None:
    train = configs.TrainConfig(n_epochs=3, learning_rate=1e-4)
    assert command_line("train", train) == ["--train.n-epochs", "3", "--train.learning-rate", "0.0001"]
    assert command_line("model", configs.ClassMapConfig(latent_dim=1)) == [
        "--model.kind",
        "class-map",
        "--model.latent-dim",
        "1",
    ]


def test_choices_are_said_in_words(qapp: QApplication) -> None:
    form = ConfigForm(configs.ClusterConfig)
    box = form.editor("method").native
    shown = [box.itemText(i) for i in range(box.count())]
    assert shown == ["k-means", "Gaussian mixture", "HDBSCAN", "Ward"]
    assert form.value().method == "kmeans"
    assert "k-means makes round groups" in form.editor("method").tooltip

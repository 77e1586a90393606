"""The form: what goes in comes out, titles and bounds are the declaration's own."""

from __future__ import annotations

import typing
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("qtpy")

from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import QApplication, QLabel

from particle_explorer import configs
from particle_explorer.widgets.form import ConfigForm, Number, command_line

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
        assert field.title in texts | {getattr(editor, "text", str)()}
        assert editor.toolTip()


@given(number=st.floats(1e-12, 1e5))
def test_a_number_is_kept_exactly(qapp: QApplication, number: float) -> None:
    box = Number(0, 1e5, "", "")
    box.set_number(number)
    assert box.number() == number


@pytest.mark.parametrize(
    ("typed", "value"), [("1e-4", 1e-4), ("182.375 Å", 182.375), ("0.9 of the box", 0.0)]
)
def test_numbers_can_be_typed(qapp: QApplication, typed: str, value: float) -> None:
    box = Number(0, 1e5, "Å", "0.9 of the box")
    box.lineEdit().setText(typed)
    box.interpretText()
    assert box.number() == value


def test_nothing_silly_can_be_typed(qapp: QApplication) -> None:
    box = Number(0, 10, "", "")
    box.set_number(3.0)
    for typed in ("nan", "inf", "many", "11"):
        box.lineEdit().setText(typed)
        box.interpretText()
        assert box.number() == 3.0


def test_a_step_follows_the_size_of_the_number(qapp: QApplication) -> None:
    box = Number(0, 1e5, "", "automatic")
    for start, expected in ((0.0003, 0.0004), (180.0, 190.0), (0.0, 1.0)):
        box.set_number(start)
        box.stepBy(1)
        assert box.number() == pytest.approx(expected)


def test_zero_says_what_it_means(qapp: QApplication) -> None:
    form = ConfigForm(configs.PreprocessConfig)
    assert form.editor("box_px").text() == "automatic"


def test_told_once_when_set_and_not_when_equal(qapp: QApplication) -> None:
    form = ConfigForm(configs.TrainConfig)
    told: list[None] = []
    form.valueChanged.connect(lambda: told.append(None))
    form.setValue(configs.TrainConfig())
    assert not told
    form.setValue(configs.TrainConfig(n_epochs=5, seed=3))
    assert len(told) == 1
    form.editor("n_epochs").setValue(6)
    assert len(told) == 2


def test_scrolling_past_a_number_changes_nothing(qapp: QApplication) -> None:
    form = ConfigForm(configs.TrainConfig)
    form.show()
    editor = form.editor("n_epochs")
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
    assert not form.editor("ctf").isEnabled()
    assert "no CTF" in form.editor("ctf").toolTip()
    form.set_applicable("ctf", True)
    assert form.editor("ctf").isEnabled() and "flips" in form.editor("ctf").toolTip()


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

"""Class sets for other programs: read by code that follows RELION's rules and nothing of the package."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile

from particle_explorer import exporting
from particle_explorer.averaging import average_classes
from particle_explorer.configs import AverageConfig
from particle_explorer.exporting import export_classes
from particle_explorer.files import UserError
from particle_explorer.io import cryosparc
from particle_explorer.io.class_files import class_numbers
from particle_explorer.io.reading import read
from particle_explorer.session import Session


@pytest.fixture
def averaged(tiny_session):
    """A session with averages of classes 1, 2 and 4, at poses that are not trivial."""
    rng = np.random.default_rng(2)
    labels = np.array([1, 2, 4])[np.arange(120) % 3]
    labels[:6] = -1
    angle, shift = rng.uniform(-180, 180, 120), rng.normal(size=(120, 2))
    averages = average_classes(tiny_session, labels, angle, shift)
    tiny_session.classes.save("three", averages, [average.label for average in averages], {"config": {}})
    return tiny_session, labels, angle, shift


def as_relion_reads(folder: Path, root: Path) -> tuple[list[np.ndarray], dict]:
    """`relion_display --class`: images of data_model_classes by row order, particles of ROOT_data.star."""
    model = starfile.read(folder / "run_it000_model.star", always_dict=True)
    images = []
    for name in model["model_classes"]["rlnReferenceImage"]:
        number, _, stack = name.partition("@")
        with mrcfile.open(root / stack) as mrc:
            assert mrc.is_image_stack()
            images.append(mrc.data[int(number) - 1].copy())
    data = str(folder / "run_it000_model.star").replace("_model.star", "_data.star")
    return images, starfile.read(data, always_dict=True)


def test_relion_s_class_display_finds_everything(averaged, tiny_stack):
    session, labels, angle, shift = averaged
    root = tiny_stack.parent
    folder = session.path.parent / "Class2D" / "job007"
    notes = export_classes(folder, session, "three", project_dir=session.path.parent)
    assert any("relion_display in" in note for note in notes)
    assert any("averaged again from what was written" in note for note in notes)
    images, data = as_relion_reads(folder, session.path.parent)
    stored = session.classes.read("three")
    assert len(images) == 4 and not images[2].any()  # class 3 is empty, not left out
    for number, image in zip((1, 2, 4), stored.images, strict=True):
        np.testing.assert_array_equal(images[number - 1], image)
    particles = data["particles"]
    assert len(particles) == 114 and (particles["rlnClassNumber"] == labels[6:]).all()
    np.testing.assert_allclose(particles["rlnAnglePsi"], -angle[6:], atol=1e-5)
    size = data["optics"]["rlnImagePixelSize"].iloc[0]
    np.testing.assert_allclose(particles["rlnOriginXAngst"], -shift[6:, 1] * size, atol=1e-5)
    model = starfile.read(folder / "run_it000_model.star", always_dict=True)
    distribution = model["model_classes"]["rlnClassDistribution"]
    np.testing.assert_allclose(distribution, np.bincount(labels[6:] - 1) / 114, atol=1e-6)
    general = starfile.read(folder / "run_it000_optimiser.star", always_dict=True)["optimiser_general"]
    for label in ("rlnModelStarFile", "rlnExperimentalDataStarFile"):
        assert (session.path.parent / general[label]).is_file()
    # what Select writes
    chosen = starfile.read(folder / "class_averages.star")
    assert [int(name.split("@")[0]) for name in chosen["rlnReferenceImage"]] == [1, 2, 4]
    assert starfile.read(folder / "backup_selection.star")["rlnSelected"].tolist() == [1, 1, 0, 1]
    assert b"\r" not in b"".join(path.read_bytes() for path in folder.glob("*.star"))
    # and its particles open here
    assert len(read(folder / "run_it000_data.star", project_dir=root)) == 114


def test_cryosparc_gets_templates(averaged):
    session, *_ = averaged
    folder = session.path.parent / "out"
    export_classes(folder, session, "three")
    records = cryosparc.load(folder / "templates.cs")
    stored = session.classes.read("three")
    with mrcfile.open(folder / "templates.mrc") as mrc:
        for record in records:
            assert record["blob/path"] == b">templates.mrc"
            np.testing.assert_array_equal(mrc.data[record["blob/idx"]], stored.images[record["blob/idx"]])
    assert records["blob/psize_A"].tolist() == [np.float32(stored.pixel_size_A)] * 3
    text = (folder / "templates.csg").read_text()
    assert "type: template.blob" in text and "num_items: 3" in text and "'>templates.cs'" in text
    assert (folder / "montage.png").read_bytes().startswith(b"\x89PNG")


def test_marks_decide_which_classes_are_chosen(averaged):
    session, *_ = averaged
    folder = session.path.parent

    def chosen(marks, name):
        session.classes.mark("three", marks)
        export_classes(folder / name, session, "three")
        names = starfile.read(folder / name / "class_averages.star", always_dict=True)[""][
            "rlnReferenceImage"
        ]
        assert len(cryosparc.load(folder / name / "templates.cs")) == len(names)
        assert len(starfile.read(folder / name / "run_it000_data.star")["particles"]) == 114, "all particles"
        return starfile.read(folder / name / "backup_selection.star")["rlnSelected"].tolist()

    assert chosen(["", "bad", ""], "a") == [1, 0, 0, 1]
    assert chosen(["", "bad", "good"], "b") == [0, 0, 0, 1]
    assert chosen(["", "", ""], "c") == [1, 1, 0, 1]
    session.classes.mark("three", ["bad"] * 3)
    with pytest.raises(UserError, match="every class of three is marked bad"):
        export_classes(folder / "d", session, "three")
    assert not (folder / "d").exists()


def test_a_class_set_is_whole_or_not_there(averaged, monkeypatch):
    session, *_ = averaged
    folder = session.path.parent / "out"
    before = sorted(path.name for path in session.path.parent.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write_templates", full)
        with pytest.raises(UserError, match="No space left on device; nothing of it was kept"):
            export_classes(folder, session, "three")
    assert sorted(path.name for path in session.path.parent.iterdir()) == before
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(UserError, match="exists already"):
        export_classes(folder, session, "three")
    with pytest.raises(UserError, match="there are: three"):
        export_classes(session.path.parent / "b", session, "four")


def test_an_average_that_is_not_that_of_its_particles_is_noticed(averaged):
    session, labels, angle, shift = averaged
    wrong = average_classes(session, labels, angle + 90, shift)
    right = session.classes.read("three")
    session.classes.save("wrong", wrong, ["1", "2", "4"], {"config": {}})
    path = session.path / "classes" / "wrong.parquet"
    right.members.to_parquet(path)  # averages at one pose, members at another
    with pytest.raises(RuntimeError, match="averages by the written poses are not"):
        export_classes(session.path.parent / "out", session, "wrong")
    assert not (session.path.parent / "out").exists()


def test_classes_keep_their_numbers():
    assert class_numbers(["1", "2", "4"]).tolist() == [1, 2, 4]
    assert class_numbers(["0", "2"]).tolist() == [1, 3]
    assert class_numbers(["open", "bent"]).tolist() == [1, 2]
    assert class_numbers(["1000000", "7"]).tolist() == [1, 2]
    assert class_numbers(["3", "3"]).tolist() == [1, 2]


def test_a_particle_of_several_averages_is_in_the_one_where_it_counts_most(tiny_session: Session):
    from particle_explorer.averaging import average_members
    from particle_explorer.summing.work import Members

    members = Members(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), np.array([0.2, 0.8, 1.0, 1.0]))
    averages = average_members(tiny_session, members, ["a", "b"], np.zeros(120), np.zeros((120, 2)))
    tiny_session.classes.save("shared", averages, ["a", "b"], {"config": {}})
    folder = tiny_session.path.parent / "out"
    export_classes(folder, tiny_session, "shared")
    table = starfile.read(folder / "run_it000_data.star", always_dict=True)["particles"]
    assert table["rlnClassNumber"].tolist() == [2, 2, 1]


def test_poses_are_compared_also_where_the_originals_are_gone(tiny_session, monkeypatch):
    n = tiny_session.n_particles
    angle, shift = np.linspace(-170, 170, n), np.zeros((n, 2))
    chosen = exporting.choose(tiny_session, np.ones(n, bool), angle_deg=angle, shift_yx_px=shift)
    found = pd.DataFrame({"angle_deg": chosen.angle_deg, "shift_y_px": 0.0, "shift_x_px": 0.0})

    def gone(self):
        raise UserError("the image stack is not there any more")

    monkeypatch.setattr(Session, "originals", gone)
    assert "not checked by averaging" in exporting.check_poses(chosen, found, AverageConfig())
    found.loc[7, "angle_deg"] += 1
    with pytest.raises(RuntimeError, match="the first is particle 8, 1° and 0 px off"):
        exporting.check_poses(chosen, found, AverageConfig())

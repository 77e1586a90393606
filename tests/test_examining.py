"""Members beside their averages, mirrors and symmetries; class sets changed by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from particle_explorer.amending import Change, amend
from particle_explorer.averaging import average_classes
from particle_explorer.configs import AverageConfig, ClassMapConfig, RunConfig
from particle_explorer.examining import examine, mirror_partners, symmetry
from particle_explorer.files import UserError
from particle_explorer.latents import Latents
from particle_explorer.pose import rotation_matrix
from particle_explorer.resampling import Scale
from particle_explorer.session import Session

N = 32


def _blobs(points: Any, angle_deg: float = 0.0, shift_yx_px: Any = (0.0, 0.0)) -> NDArray[np.float32]:
    """`(N, N)`: Gaussians at `points` `(p, 2)` (x, y) about N // 2."""
    xy = np.asarray(points, float) @ rotation_matrix(angle_deg).T + np.asarray(shift_yx_px)[::-1]
    profile = np.exp(-0.5 * ((np.arange(N) - N // 2 - xy[..., None]) / 1.6) ** 2)
    return np.einsum("iy,ix->yx", profile[:, 1], profile[:, 0]).astype(np.float32)


HOOK = [(0, 0), (4, 0), (8, 0), (8, 4), (-5, 2)]


def _around(fold: int) -> list[tuple[float, float]]:
    turns = 2 * np.pi * np.arange(fold) / fold
    return [(7 * np.cos(t), 7 * np.sin(t)) for t in turns] + [
        (9 * np.cos(t + 0.5), 9 * np.sin(t + 0.5)) for t in turns
    ]


@pytest.fixture
def set_of(tiny_session: Session) -> tuple[Session, str]:
    """A session with three averages at its true poses, and a run that places its particles."""
    session = tiny_session
    rng = np.random.default_rng(0)
    table = session.table
    label = np.arange(session.n_particles) % 3
    angle = table["true_angle_deg"].to_numpy(float)
    shift = table[["true_shift_y_px", "true_shift_x_px"]].to_numpy(float)
    run = session.new_run(RunConfig(model=ClassMapConfig(latent_dim=2), data=session.data_spec()))
    z = np.stack([label * 5.0, np.where(np.arange(len(label)) % 2, 1.0, -1.0)], 1)
    z += rng.normal(0, 0.1, z.shape)
    run.save_latents(
        Latents(session.uid, z.astype(np.float32), angle_deg=angle, shift_yx_px=shift)  # type: ignore[arg-type]
    )
    averages = average_classes(session, label, angle, shift, AverageConfig())
    how = {"run": run.name, "by": "thirds", "config": AverageConfig().model_dump(), "poses": "run"}
    return session, session.classes.save("thirds", averages, ["0", "1", "2"], how)


def test_strangers_in_a_class_stand_out(set_of: tuple[Session, str]) -> None:
    """Members whose poses are wrong fit the average of the others worse than those whose are right."""
    session, name = set_of
    members = session.classes.read(name).members.copy()
    wrong = np.arange(len(members)) % 8 == 0
    members.loc[wrong, "angle_deg"] += 120.0
    found = examine(session, members, 3)
    table = found.members
    assert table["correlation"][~wrong].median() > table["correlation"][wrong].median() + 0.1
    assert table["error"][~wrong].median() < table["error"][wrong].median()
    assert table["distance"].isna().all()
    assert found.variance.shape == found.residual.shape == (3, N, N)


def test_variance_is_where_members_differ(set_of: tuple[Session, str]) -> None:
    session, name = set_of
    members = session.classes.read(name).members
    apart = members.copy()
    apart["angle_deg"] += np.where(np.arange(len(apart)) % 2, 20.0, -20.0)
    y, x = np.indices((N, N)) - N // 2
    middle = np.hypot(y, x) < 8
    spread = [examine(session, one, 3).variance[:, middle].mean() for one in (members, apart)]
    assert spread[1] > 1.2 * spread[0] > 0


def test_what_the_model_draws_is_taken_away(set_of: tuple[Session, str]) -> None:
    """A drawing in another box and grey scale leaves noise; one that lacks something leaves that."""
    session, name = set_of
    stored = session.classes.read(name)
    size = stored.images.shape[-1]
    drawn = 3 * stored.images + 1
    left = examine(session, stored.members, 3, drawn=drawn).residual
    scale = examine(session, stored.members, 3, drawn=np.zeros_like(drawn) + np.eye(size, dtype=np.float32))
    assert np.square(left).mean() < 0.5 * np.square(scale.residual).mean()


def test_mirror_partners_are_found_and_not_merged() -> None:
    mirrored = [(x, -y) for x, y in HOOK]
    images = np.stack([_blobs(HOOK), _blobs(_around(3)), _blobs(mirrored, 70.0)])
    partners = mirror_partners(images)
    assert [partner for partner, _ in partners] == [2, 1, 0]
    assert partners[0][1] > 0.98 and partners[2][1] > 0.98


@pytest.mark.parametrize("fold", [1, 2, 3, 5])
def test_symmetry_is_told(fold: int) -> None:
    points = HOOK if fold == 1 else _around(fold)
    found, correlation = symmetry(_blobs(points, 13.0, (1.0, -1.0)))
    assert found == fold and (fold == 1 or correlation > 0.95)


def test_a_disc_is_not_called_symmetric() -> None:
    y, x = np.indices((N, N)) - N // 2
    assert symmetry(np.exp(-(y**2 + x**2) / 40.0).astype(np.float32))[0] == 1


def test_members_are_left_out_and_the_rest_is_averaged_anew(set_of: tuple[Session, str]) -> None:
    session, name = set_of
    before = session.classes.read(name)
    gone = before.members.index[before.members["average"] == 1][:5].to_numpy(np.uint64)
    after = session.classes.read(amend(session, name, Change(leave_out=gone)))
    assert [one["n"] for one in after.classes] == [40, 35, 40]
    np.testing.assert_array_equal(after.images[[0, 2]], before.images[[0, 2]])
    table, kept = session.table, after.members.index[after.members["average"] == 1]
    label = np.where(np.isin(session.uid, kept), 0, -1)
    angle, shift = table["true_angle_deg"], table[["true_shift_y_px", "true_shift_x_px"]]
    (expected,) = average_classes(session, label, angle.to_numpy(float), shift.to_numpy(float))
    np.testing.assert_allclose(after.images[1], expected.image, atol=1e-5)
    assert after.how["from"] == name and len(after.how["changed"]["left_out"]) == 5
    assert session.classes.read(name).classes == before.classes, "the old set stays"


def test_classes_are_joined_divided_renamed_and_removed(set_of: tuple[Session, str]) -> None:
    session, name = set_of
    none = np.zeros(0, np.uint64)
    joined = session.classes.read(amend(session, name, Change(none, join=((0, 2),), rename={1: "bent"})))
    assert [one["label"] for one in joined.classes] == ["0+2", "bent"]
    assert [one["n"] for one in joined.classes] == [80, 40]
    divided = session.classes.read(amend(session, name, Change(none, divide={0: 2}, remove=(2,))))
    assert [one["label"] for one in divided.classes] == ["0.1", "0.2", "1"]
    row = pd.Index(session.uid).get_indexer(divided.members.index)
    odd = row % 2
    for i in range(2):
        assert len(set(odd[divided.members["average"] == i])) == 1, "divided where the map has a gap"


def test_impossible_changes_are_refused(set_of: tuple[Session, str]) -> None:
    session, name = set_of
    none = np.zeros(0, np.uint64)
    for change, words in (
        (Change(none, join=((0, 7),)), "no average number 8"),
        (Change(none, join=((0,),)), "two classes or more"),
        (Change(none, rename={0: "1"}), "would be called '1'"),
        (Change(session.uid), "nothing would be left"),
        (Change(none, divide={0: 30}), "cannot make 30 parts"),
    ):
        with pytest.raises(UserError, match=words):
            amend(session, name, change)


def test_what_was_found_is_kept_with_the_set(set_of: tuple[Session, str]) -> None:
    from particle_explorer.cli import main

    session, name = set_of
    assert main(["examine", str(session.path), "--averages", name]) == 0
    stored = session.classes.read(name)
    assert {"correlation", "error", "distance"} <= set(stored.members)
    assert np.isfinite(stored.members["distance"]).all()
    assert all({"mirror", "symmetry", "residual_of"} <= set(one) for one in stored.classes)
    variance = session.classes.pictures(name, "variance")
    assert variance is not None and variance.shape == (3, N, N)
    listed = session.path / "out.txt"
    listed.write_text("\n".join(map(str, stored.members.index[:3])))
    command = ["amend", str(session.path), "--averages", name, "--leave-out", str(listed), "--join", "0,1"]
    assert main([*command, "--rename", "2=closed"]) == 0
    assert [one["label"] for one in session.classes.read(session.classes.newest()).classes] == [
        "0+1",
        "closed",
    ]
    assert main(["amend", str(session.path), "--averages", name, "--remove", "9"]) == 2


def test_a_report_shows_all_and_says_what_it_may(set_of: tuple[Session, str], tmp_path: Path) -> None:
    from particle_explorer.cli import main

    session, name = set_of
    session.classes.mark(name, ["good", "", "bad"])
    out = tmp_path / "report.html"
    command = ["report-classes", str(session.path), "--averages", name, "--out", str(out)]
    assert main(["examine", str(session.path), "--averages", name]) == 0
    assert main(command) == 0
    text = out.read_text(encoding="utf-8")
    assert text.count("<figure>") == 9 and text.count("<svg") == 3  # averages, variances, residuals; curves
    assert "upper bound" in text and "may be called" not in text and "not known" in text
    run = session.classes.read(name).how["run"]
    for word in (run, "latent_dim", "thirds", "classes/thirds.parquet", "good", "&quot;ctf&quot;"):
        assert word in text, word
    assert main(command) == 2, "an existing page stays"


def test_an_aligned_stack_needs_no_poses_and_turns_its_ctf(
    set_of: tuple[Session, str], tmp_path: Path
) -> None:
    """Averaged without any pose it gives the averages; the angle of the defocus is turned by psi."""
    from particle_explorer.cli import main
    from particle_explorer.configs import PreprocessConfig
    from particle_explorer.io.reading import read

    session, name = set_of
    out = tmp_path / "turned.star"
    command = ["export-aligned", str(session.path), "--averages", name, "--out", str(out)]
    assert main(command) == 0
    assert main(command) == 2, "existing files stay"
    written = read(out)
    stored = session.classes.read(name)
    table, label = written.table, written.table["class_id"].to_numpy(int) - 1
    assert len(table) == len(stored.members) and (table[["angle_deg", "shift_y_px"]] == 0).all(axis=None)
    before = session.table.sort_values("source_row")
    members = stored.members.loc[before.index]
    np.testing.assert_array_equal(label, members["average"])
    turned = before["defocus_angle_deg"].to_numpy() - members["angle_deg"].to_numpy()
    apart = (table["defocus_angle_deg"].to_numpy() - turned + 90) % 180 - 90
    np.testing.assert_allclose(apart, 0, atol=1e-3)
    for column in ("defocus_u_A", "defocus_v_A", "voltage_kV"):
        np.testing.assert_allclose(table[column], before[column], rtol=1e-4)
    again = Session.create(tmp_path / "again", written, PreprocessConfig())
    for one, image in zip(average_classes(again, label), stored.images, strict=True):
        assert np.corrcoef(one.image.ravel(), image.ravel())[0, 1] > 0.99


def test_members_of_two_pixel_sizes_are_compared_at_one() -> None:
    """The same picture in 32 px of 2 Å and 48 px of 4/3 Å: shifts in pixels of each fit both kinds alike."""
    rng = np.random.default_rng(0)
    k = 60
    fine = np.arange(k) % 2 == 1
    box, size = np.where(fine, 48, 32), np.where(fine, 4 / 3, 2.0)
    angle, shift_A = rng.uniform(-180, 180, k), rng.normal(0, 4, (k, 2))
    points = np.array(HOOK) * 2.0  # Å

    def image(i: int) -> NDArray[np.float32]:
        n = int(box[i])
        xy = (points @ rotation_matrix(angle[i]).T + shift_A[i, ::-1]) / size[i]
        profile = np.exp(-0.5 * ((np.arange(n) - n // 2 - xy[..., None]) * size[i] / 3.2) ** 2)
        picture = np.einsum("iy,ix->yx", profile[:, 1], profile[:, 0])
        return (picture + rng.normal(0, 0.2, (n, n))).astype(np.float32)

    images = [image(i) for i in range(k)]

    class Mixed:
        box_px = box

        def read(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
            return np.stack([images[i] for i in rows])[:, None]

    uid = pd.Index(np.arange(k, dtype=np.uint64), name="uid")
    session: Any = SimpleNamespace(
        table=pd.DataFrame({"box_px": box, "pixel_size_A": size, "ctf_state": "none"}, index=uid),
        plan=SimpleNamespace(sign=1, ctf="none"),
        scale=Scale(32, 2.0),
        originals=Mixed,
    )
    shift = shift_A / size[:, None]
    members = pd.DataFrame(
        {
            "average": 0,
            "weight": 1.0,
            "angle_deg": angle,
            "shift_y_px": shift[:, 0],
            "shift_x_px": shift[:, 1],
        },
        index=uid,
    )
    fit = examine(session, members, 1).members["correlation"].to_numpy()
    assert fit[fine].min() > 0.6 and fit[~fine].min() > 0.6

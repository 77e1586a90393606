"""Latents of other programs, explored like our own."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from particle_explorer import latents as latents_module
from particle_explorer.averaging import average_classes
from particle_explorer.cli import main
from particle_explorer.configs import ClusterConfig
from particle_explorer.coordinates import import_latents
from particle_explorer.files import UserError
from particle_explorer.io.reading import read
from particle_explorer.io.writing import export_particles
from particle_explorer.session import Run, Session

Z = np.random.default_rng(5).normal(size=(120, 3)).astype(np.float32)
SHUFFLED = np.random.default_rng(6).permutation(120)


def write(kind: str, folder: Path, session: Session, stack: Path) -> tuple[Path, str]:
    """Coordinates `Z` in some file, rows in another order where they can be known; (file, --columns)."""
    path = folder / f"z.{kind}"
    table = pd.DataFrame(Z, columns=["a", "b", "c"]).assign(uid=session.uid).iloc[SHUFFLED]
    if kind == "npy":
        np.save(path, Z)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "parquet":
        table.set_index("uid").to_parquet(path)
    elif kind == "star":
        names = session.table["rlnImageName"].to_numpy()
        rows = pd.DataFrame(Z, columns=["rlnA", "rlnB", "rlnC"]).assign(rlnImageName=names).iloc[SHUFFLED]
        starfile.write({"particles": rows}, path)
        return path, "rlnA,rlnB,rlnC"
    elif kind == "cs":
        records = np.zeros(120, [("uid", "<u8"), ("components/value", "<f4", (3,)), ("other", "<f4")])
        records["uid"], records["components/value"] = session.uid[SHUFFLED], Z[SHUFFLED]
        with path.open("wb") as file:
            np.save(file, records)
        return path, "components/value[0],components/value[1],components/value[2]"
    return path, ""


@pytest.mark.parametrize("kind", ["npy", "csv", "parquet", "star", "cs"])
def test_coordinates_come_from_any_table(tiny_session, tiny_stack, tmp_path, kind):
    path, columns = write(kind, tmp_path, tiny_session, tiny_stack)
    run, notes = import_latents(tiny_session, path, columns)
    assert run.state == "finished" and run.name.endswith("-imported") and not run.has_weights
    latents = Run.open(run.path).latents()
    np.testing.assert_allclose(latents.z, Z, rtol=1e-5, atol=1e-5)
    assert latents.uid.tolist() == tiny_session.uid.tolist()
    how = {"npy": "order", "star": "image name"}.get(kind, "uid")
    assert any(f"joined by {how}" in note for note in notes)


def test_they_are_explored_like_our_own(tiny_stack, tmp_path, capsys):
    """Clusters, a picture, averages by the poses of the file, export; nothing draws."""
    posed = tmp_path / "posed.star"
    rng = np.random.default_rng(1)
    angle, shift = rng.uniform(-180, 180, 120), rng.normal(size=(120, 2))
    particles = read(tiny_stack)
    export_particles(
        posed, table=particles.table, source=tiny_stack, kind="star", angle_deg=angle, shift_yx_px=shift
    )
    session = Session.create(tmp_path / "s", read(posed, project_dir=tiny_stack.parent))
    np.save(tmp_path / "z.npy", Z)

    def say(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out.strip()

    run = Run.open(Path(say("import-latents", session.path, tmp_path / "z.npy")))
    say("embed", run.path, "--method", "pca")
    say("cluster", run.path, "--n-clusters", 3)
    say("average", run.path)
    labels = latents_module.cluster(Z, ClusterConfig(n_clusters=3))
    expected = average_classes(session, labels, angle, shift)
    stored = session.classes.read("cluster-kmeans")
    for one, image in zip(expected, stored.images, strict=True):
        assert np.corrcoef(one.image.ravel(), image.ravel())[0, 1] > 0.9999
    say("export", session.path, "--out", tmp_path / "o.star", "--latents")
    assert main(["encode", str(run.path)]) == 2
    assert "coordinates from a file and no model" in capsys.readouterr().err


def test_a_pickle_is_never_opened(tiny_session, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    (tmp_path / "z.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"numpy.save\('z.npy'") as refused:
        import_latents(tiny_session, tmp_path / "z.pkl")
    assert "import z.npy" in str(refused.value) and not (tmp_path / "sprung").exists()
    # object arrays are pickles too
    np.save(tmp_path / "o.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as a table"):
        import_latents(tiny_session, tmp_path / "o.npy")
    assert not (tmp_path / "sprung").exists() and tiny_session.runs() == []


def test_what_does_not_fit_is_said(tiny_session, tmp_path):
    np.save(tmp_path / "short.npy", Z[:7])
    np.save(tmp_path / "bad.npy", np.where(np.arange(120)[:, None] == 4, np.nan, Z))
    table = pd.DataFrame(Z, columns=["a", "b", "c"]).assign(uid=tiny_session.uid, text="x")
    table.iloc[:110].to_csv(tmp_path / "part.csv", index=False)
    table.to_csv(tmp_path / "all.csv", index=False)
    twice = table.copy()
    twice.iloc[1, 3] = twice.iloc[0, 3]
    twice.to_csv(tmp_path / "twice.csv", index=False)
    for name, columns, said in (
        ("short.npy", "", "has 7 rows and the session 120 particles"),
        ("bad.npy", "", "particle 5 are not finite"),
        ("part.csv", "", "lacks 10 of the 120 particles"),
        ("twice.csv", "", "twice"),
        ("all.csv", "a,d", "no column 'd'; there are a, b, c"),
        ("all.csv", "text", "not a number"),
        ("none.csv", "", "does not exist"),
        ("z.txt", "", "give one of .npy"),
    ):
        with pytest.raises(UserError, match=said):
            import_latents(tiny_session, tmp_path / name, columns)
    assert tiny_session.runs() == []


@pytest.mark.parametrize("uid", ["abc", "", "-1", "1.5"])
def test_a_uid_that_is_none_is_named_with_its_row(tiny_session, tmp_path, uid):
    rows = [str(one) for one in tiny_session.uid[:3]]
    (tmp_path / "z.csv").write_text("uid,z_0\n" + "".join(f"{one},1\n" for one in [rows[0], uid, *rows[1:]]))
    with pytest.raises(UserError, match="row 2 of the table has the uid"):
        import_latents(tiny_session, tmp_path / "z.csv")


@pytest.mark.parametrize("name", ["empty.npy", "broken.npz"])
def test_a_damaged_table_is_said(tiny_session, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 no archive" if name.endswith("z") else b"")
    with pytest.raises(UserError, match="cannot be read as a table"):
        import_latents(tiny_session, tmp_path / name)

"""Files of other projects: each opens, or fails with a sentence that is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from particle_explorer.configs import PreprocessConfig
from particle_explorer.files import UserError
from particle_explorer.io.inspecting import summarise
from particle_explorer.io.reading import read
from particle_explorer.io.star import StarFile
from particle_explorer.io.writing import export_particles
from particle_explorer.preprocess import apply, plan

OPENS = {
    # file: (particles, box, pixel size, CTF state)
    "particles_real/aspire_sample/sample.mrcs": (17, 200, None, "none"),
    "particles_real/aspire_sample/sample_particles_relion30.star": (17, 200, 1.338, "raw"),
    "particles_real/aspire_sample/sample_particles_relion31.star": (17, 200, 1.4, "raw"),
    "particles_real/class_averages/mixture_2D.mrcs": (100, 96, None, "none"),
    "particles_real/empiar_10076/empiar_10076_7.mrc": (7, 320, None, "none"),
    "particles_real/empiar_10076/empiar_10076_7.star": (7, 320, 1.31, "raw"),
    "particles_real/empiar_10076/empiar_10076_7.cs": (7, 320, 1.31, "raw"),
    "particles_real/ribosome_tilts/ay19102021_L3_position6_ribo_it09_bin8_1.82A.mrcs": (
        220,
        64,
        None,
        "none",
    ),
    "particles_real/ribosome_tilts/sta_testing_bin8.star": (219, 64, 1.96, "raw"),
    "particles_gt/toy/toy_projections.mrcs": (1000, 30, None, "none"),
    "particles_gt/toy/toy_projections.star": (1000, 30, None, "none"),
    "particles_gt/hand/hand.mrcs": (100, 64, None, "none"),
    "reader_files/mrc/rln_proj_65.mrcs": (5, 65, None, "none"),
    "reader_files/mrc/rln_proj_65.star": (5, 65, None, "none"),
    "reader_files/mrc/Unt_050_12.00A_000001.mrcs": (37, 32, 12.0, "none"),
    "reader_files/xmipp/smallStack.mrcs": (4, 64, None, "none"),
    "reader_files/xmipp/smallStack.stk": (4, 64, None, "none"),
    "reader_files/xmipp/smallStack.hed": (4, 64, None, "none"),
    "reader_files/xmipp/smallStack.img": (4, 64, None, "none"),
    "reader_files/xmipp/sum.spi": (1, 64, None, "none"),
    "reader_files/xmipp/test2.spi": (1, 128, None, "none"),
    "stem_abf/stem_abf_data_imagestack.hspy": (5, 512, None, "none"),
    "stem_abf/abf_columns_40px.npz": (1452, 40, None, "none"),
    "galaxies/galaxies_train_1400_64.npz": (1400, 64, None, "none"),
    "galaxies/jpg": (120, 424, None, "none"),
    "mnist/mnist.npz": (60_000, 28, None, "none"),
}
FAILS = {
    "reader_files/star/FinalRefinement-OriginalParticles-PfCRT.star": "1 image stack, and 1 cannot be found: "
    "Extract/job012",
    "reader_files/star/relion31.6opticsgroups.star": "139 cannot be found: Polish/job520",
    "reader_files/star/sample_relion_one_image.star": "cannot be found: sample_one_image.mrcs",
    "reader_files/star/test_starfile.star": "cannot be found: 000000.mrcs",
    "reader_files/star/rln3.1_data_style.star": "cannot be found: 0001_sum_particles.mrcs",
    "reader_files/star/single_line_end_of_multiblock.star": "cannot be found",
    "reader_files/star/sample_data_model.star": "describes a model",
    "reader_files/star/basic_single_quote.star": "no block has the column _rlnImageName",
    "reader_files/cs/cryosparc_P12_J24_001_particles.cs": "50 cannot be found: J19/extract",
    "reader_files/cs/zvals_het-2_1k.npy": "1319×2",
    "reader_files/mrc/EMD-3197.map": "3-D map",
    "reader_files/mrc/emd_3197.map.gz": "3-D map",
    "reader_files/mrc/EMD-3197.map.bz2": "3-D map",
    "reader_files/xmipp/smallVolume.vol": "3-D map",
    "reader_files/cs/cryosparc_P12_J24_001_poses.npz": "rot 2019×3×3",
    "em_maps/lumbricus_vcem011.spi": "SPIDER volume (81 × 81 × 81)",
    "5hdb_sim/preview.png": "1322 × 496 px",
    "atomic_models/adk_open.pdb.gz": "of compressed files only MRC stacks are read",
    "mnist": "open a particle file in it: mnist.npz",
    "particles_real/aspire_sample": "open a particle file in it: sample.mrcs or one of 2 more",
}


@pytest.mark.parametrize("name", OPENS)
def test_opens_is_prepared_and_exported(data_dir: Path, tmp_path: Path, name: str) -> None:
    n, box, size, state = OPENS[name]
    particles = read(data_dir / name)
    table = particles.table
    assert (len(particles), table["box_px"].iloc[0], table["ctf_state"].iloc[0]) == (n, box, state)
    assert table["pixel_size_A"].iloc[0] == pytest.approx(
        np.nan if size is None else size, abs=1e-3, nan_ok=True
    )
    assert summarise(particles).lines()
    made = plan(table, PreprocessConfig())
    cached = apply(particles.images.read(range(min(n, 20))), table.iloc[:20], made)
    assert cached.shape[-1] == min(64, box // 2 * 2) and np.isfinite(cached).all()
    some = particles[np.arange(0, n, 2)]
    out = tmp_path / "o.star"
    what = {"table": some.table, "source": particles.source, "kind": particles.kind}
    poses = {"class_id": np.ones(len(some), int), "angle_deg": np.arange(len(some)) * 1.0}
    if particles.images.n_channels > 1:
        with pytest.raises(UserError, match="colour images cannot be exported for RELION"):
            export_particles(out, **what, **poses)
        return
    export_particles(out, **what, **poses)
    if particles.kind != "star":
        last = [len(some) - 1]
        np.testing.assert_array_equal(read(out).images.read(last), some.images.read(last))


def test_one_stack_in_four_formats_is_the_same(data_dir: Path) -> None:
    folder = data_dir / "reader_files" / "xmipp"
    wanted = read(folder / "smallStack.mrcs").images.read(range(4))
    for name in ("smallStack.stk", "smallStack.hed", "smallStack.img"):
        np.testing.assert_array_equal(read(folder / name).images.read(range(4)), wanted)


def test_labels_come_with_galaxies_and_digits(data_dir: Path) -> None:
    galaxies = read(data_dir / "galaxies" / "galaxies_train_1400_64.npz")
    assert galaxies.images.n_channels == 3 and galaxies.table["spiral"].sum() == 700
    digits = read(data_dir / "mnist" / "mnist.npz")
    assert "x_train, the largest, is read, not x_test" in digits.notes[0]
    assert sorted(digits.table["y_train"].unique()) == list(range(10))
    pictures = read(data_dir / "galaxies" / "jpg")
    assert pictures.images.n_channels == 3
    assert pictures.table["folder"].value_counts().to_dict() == {"non_spirals": 60, "spirals": 60}


@pytest.mark.parametrize("name", FAILS)
def test_fails_with_the_right_sentence(data_dir: Path, name: str) -> None:
    with pytest.raises(UserError) as caught:
        read(data_dir / name)
    assert FAILS[name] in str(caught.value) and "\n" not in str(caught.value)


def test_every_file_is_one_or_the_other(data_dir: Path) -> None:
    """Also those named nowhere above: a correct read or one sentence."""
    for folder in ("particles_real", "particles_gt", "reader_files"):
        for path in sorted((data_dir / folder).rglob("*.*")):
            try:
                assert len(read(path)) > 0
            except UserError as error:
                assert "\n" not in str(error)


def test_same_particles_in_star_and_cs_agree(data_dir: Path) -> None:
    folder = data_dir / "particles_real" / "empiar_10076"
    a, b = read(folder / "empiar_10076_7.star").table, read(folder / "empiar_10076_7.cs").table
    for column in (
        "defocus_u_A",
        "defocus_v_A",
        "voltage_kV",
        "spherical_aberration_mm",
        "amplitude_contrast",
    ):
        np.testing.assert_allclose(a[column], b[column], rtol=1e-4)
    np.testing.assert_allclose(a["defocus_angle_deg"], b["defocus_angle_deg"], atol=1e-3)
    np.testing.assert_allclose(a["pixel_size_A"], b["pixel_size_A"], rtol=1e-4)


def test_aspire_poses_in_pixels_and_angstrom_agree(data_dir: Path) -> None:
    folder = data_dir / "particles_real" / "aspire_sample"
    a = read(folder / "sample_particles_relion30.star").table
    np.testing.assert_allclose(a["angle_deg"], -a["rlnAnglePsi"], atol=1e-9)
    np.testing.assert_allclose(a["shift_x_px"], -a["rlnOriginX"], atol=1e-9)
    b = read(folder / "sample_particles_relion31.star").table
    np.testing.assert_allclose(b["shift_y_px"] * b["pixel_size_A"], -b["rlnOriginYAngst"], rtol=1e-6)


def test_six_optics_groups_join(data_dir: Path, tmp_path: Path) -> None:
    """The stacks of this star file are not there; small stand-ins are."""
    from particle_explorer.io.mrc import write_stack

    path = data_dir / "reader_files" / "star" / "relion31.6opticsgroups.star"
    star = StarFile(path)
    block = star.block("particles")
    assert block is not None
    names = star.table(block)["rlnImageName"]
    parts = names.str.split("@", expand=True)
    for stack, numbers in parts.groupby(1)[0]:
        (tmp_path / stack).parent.mkdir(parents=True, exist_ok=True)
        write_stack(tmp_path / stack, np.zeros((numbers.astype(int).max(), 4, 4)), np.nan)
    particles = read(path, project_dir=tmp_path)
    sizes = particles.table.groupby("optics_group")["pixel_size_A"].unique()
    assert len(sizes) == 6 and all(len(size) == 1 for size in sizes)
    made = plan(particles.table.assign(box_px=128), PreprocessConfig(ctf="none"))
    assert made.mixed and made.cached_pixel_size_A >= particles.table["pixel_size_A"].max()
    export_particles(tmp_path / "o.star", table=particles.table, source=path, kind="star")
    assert (tmp_path / "o.star").read_text() == path.read_text()

"""What all tests share: one thread, seeds, folders of their own, and one small simulated session."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy and torch are imported, here and in the processes that tests start: small problems run
# fastest on one thread, and sums come out the same on every machine.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

if TYPE_CHECKING:
    from particle_explorer.particles import Particles
    from particle_explorer.session import Session

hypothesis.settings.register_profile(
    "particle_explorer", deadline=None, derandomize=True, database=None, max_examples=50
)
hypothesis.settings.load_profile("particle_explorer")


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches and settings of the user are neither read nor written."""
    home = tmp_path_factory.mktemp("home")
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    os.environ["NAPARI_CONFIG"] = str(home / "napari.yaml")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    np.random.seed(0)  # what libraries without a seed of their own fall back on
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of large stacks that some tests read; they skip where it is absent."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PARTICLE_EXPLORER_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("no folder of large stacks; set PARTICLE_EXPLORER_DATA to one")
    return folder


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """`sample_data/` of the repository."""
    folder = Path(__file__).parents[1] / "sample_data"
    if not folder.is_dir():
        pytest.skip("no sample_data folder beside the tests")
    return folder


@pytest.fixture(scope="session")
def tiny_stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated stack of 120 particles, 32 px: `.star`, `.cs` and `.mrcs` side by side; the `.star`.

    Shared by all tests: read it, never write beside it.
    """
    from particle_explorer.configs import SimulateConfig
    from particle_explorer.simulate import write

    folder = tmp_path_factory.mktemp("tiny-stack")
    write(folder, SimulateConfig(n=120, box_px=32, pixel_size_A=7.0, snr=1.0, seed=1))
    return next(folder.glob("*.star"))


@pytest.fixture(scope="session")
def tiny_particles(tiny_stack: Path) -> Particles:
    """The particles of `tiny_stack`."""
    from particle_explorer.io.reading import read

    return read(tiny_stack)


@pytest.fixture(scope="session")
def _tiny_session_folder(tiny_particles: Particles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from particle_explorer.configs import PreprocessConfig
    from particle_explorer.session import Session

    folder = tmp_path_factory.mktemp("tiny-session") / "session"
    Session.create(folder, tiny_particles, PreprocessConfig())
    return folder


@pytest.fixture
def tiny_session(_tiny_session_folder: Path, tmp_path: Path) -> Session:
    """A session of `tiny_particles`, a fresh copy for each test."""
    from particle_explorer.session import Session

    folder = tmp_path / "tiny"
    shutil.copytree(_tiny_session_folder, folder)
    return Session.open(folder)

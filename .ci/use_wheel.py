"""Uses an installed wheel the way a new user does: no checkout, no window, only what was installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "napari-particle-explorer"


def installed_folder(module: str, filename: str) -> Path:
    """The folder of `module` that holds `filename`."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations is not None, f"{module} is not installed"
    [folder] = [Path(path) for path in spec.submodule_search_locations if Path(path, filename).exists()]
    assert Path(sys.prefix) in folder.parents, f"{folder} is not part of the environment"
    return folder


def main() -> None:
    """Check import time, manifest, sample, command line."""
    code = "import time; t = time.perf_counter(); import particle_explorer; print(time.perf_counter() - t)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 0.05, f"import particle_explorer takes {run.stdout.strip()} s"
    assert importlib.util.find_spec("qtpy") is None, "the headless package must not bring Qt"

    [entry] = [
        point
        for point in importlib.metadata.entry_points(group="napari.manifest")
        if point.dist is not None and point.dist.name == NAME
    ]
    module, _, filename = entry.value.partition(":")
    folder = installed_folder(module, filename)
    assert f"name: {NAME}" in (folder / filename).read_text(encoding="utf-8")

    stacks = sorted([*folder.glob("sample_data/*.star"), *folder.glob("sample_data/*.cs")])
    assert stacks, f"no stack below {folder / 'sample_data'}"
    from particle_explorer.session import Session

    with tempfile.TemporaryDirectory() as scratch:
        for stack in stacks:
            subprocess.run(["particle-explorer", "inspect", str(stack)], check=True)
            session = Path(scratch, stack.suffix.removeprefix("."))
            subprocess.run(["particle-explorer", "import", str(stack), "--session", str(session)], check=True)

            opened = Session.open(session)
            assert opened.n_particles > 0 and len(opened.images) == opened.n_particles
            print(f"{stack.name}: {opened.n_particles} particles prepared by the installed package")

        shutil.copytree(folder / "sample_data", Path(scratch, "sample"))
        trained = Session.open(Path(scratch, "sample", "particles_explorer"))
        trained.prepare_images()
        run = trained.newest_finished_run()
        assert run is not None and len(trained.images) == trained.n_particles
        print(f"{run.name}: the trained session of the sample opens")


if __name__ == "__main__":
    main()

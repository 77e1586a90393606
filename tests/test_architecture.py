"""Who imports whom: the table of layers in CONTRIBUTING.md, read off the source."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = "particle_explorer"
ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / PACKAGE

# A module imports from ranks above its own, packages their own files too.
RANKS: dict[str, int] = {
    name: rank
    for rank, names in enumerate(
        [
            ["configs", "pose", "files", "transforms", "vectors", "ctf_sums", "resampling"],
            ["particles", "ctf", "spectra", "shears", "status", "records", "devices", "layouts"],
            ["summing"],
            ["io", "models", "averaging", "preprocess", "simulate", "latents", "metrics", "movies", "report"],
            ["cache", "estimates", "selections", "class_sets"],
            ["session", "gauge", "team", "traversals", "membership", "refining", "examining"],
            ["encoding"],
            ["training", "exporting", "coordinates", "amending", "aligned", "class_report"],
            ["jobs", "state", "controls", "halves", "choosing"],
            ["demo", "commands", "plugin"],
            ["cli"],
            ["widgets"],
            ["bench"],
        ]
    )
    for name in names
}

# The command line starts everything, and opening a session in napari opens its workspace; both import
# what they start inside the function that needs it.
REACHES_ANYWHERE_INSIDE_FUNCTIONS = {"cli", "commands", "demo", "plugin"}

# Tests that open windows, beside those of tests/widgets.
WINDOWED_TESTS = {"test_journey.py", "test_plugin.py", "test_interface.py"}

# Packages that cost start-up time or a screen, and the only modules that may name them.
ALLOWED: dict[str, set[str]] = {
    "numba": {"vectors", "shears", "ctf_sums"},
    "llvmlite": {"vectors"},
    "torch": {
        "summing",
        "transforms",
        "models",
        "devices",
        "encoding",
        "training",
        "choosing",
        "team",
        "gauge",
        "demo",
        "bench",
    },
    "qtpy": {"widgets", "bench"},
    "superqt": set(),
    "magicgui": {"widgets"},
    "napari": {"widgets", "bench"},
    "vispy": {"bench"},
    "PyQt5": set(),
    "PyQt6": set(),
    "PySide2": set(),
    "PySide6": set(),
    "sklearn": {"latents", "metrics", "bench"},
    "umap": {"layouts"},
    "mrcfile": {"io"},
    "cryosparc": set(),
    "starfile": set(),
    "pydantic_settings": {"cli", "commands"},
    "imageio_ffmpeg": {"movies"},
}


class Import(NamedTuple):
    """One import statement of the package."""

    file: Path
    line: int
    owner: str
    """First part of the importing module's name inside the package: `io`, `cli` …"""
    target: str
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def _owner(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def _imports(file: Path) -> Iterator[Import]:
    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, _owner(file), alias.name, inside)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: imports are absolute"
                if child.module == PACKAGE:
                    for alias in child.names:
                        yield Import(file, child.lineno, _owner(file), f"{PACKAGE}.{alias.name}", inside)
                else:
                    yield Import(file, child.lineno, _owner(file), child.module or "", inside)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, inside or function)

    yield from visit(ast.parse(file.read_text(encoding="utf-8")), False)


FILES = sorted(file for file in SOURCE.rglob("*.py"))
IMPORTS = [item for file in FILES for item in _imports(file)]


def _inner(target: str) -> str | None:
    """`particle_explorer.io.reading` → `io`; None for other packages and the package itself."""
    parts = target.split(".")
    if parts[0] != PACKAGE or len(parts) == 1 or parts[1].startswith("__"):
        return None
    return parts[1]


def test_every_module_has_a_rank() -> None:
    unknown = {_owner(file) for file in FILES} - set(RANKS) - {"__init__", "__main__"}
    assert not unknown, f"give {unknown} a place in RANKS and in CONTRIBUTING.md"


def test_every_file_of_the_window_is_found_by_what_one_sees() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = words[words.index("In the window (`widgets/`)") : words.index("Three more rules follow")]
    named = re.findall(r"`(\w+)`", table)
    there = [file.stem for file in FILES if file.parent.name == "widgets" and file.stem != "__init__"]
    assert sorted(named) == sorted(there)


def test_every_file_of_the_class_map_is_found_by_what_is_to_be_changed() -> None:
    words = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = words[words.index("In the class map (`models/`)") : words.index("In the window (`widgets/`)")]
    named = re.findall(r"`(\w+)`", table)
    models = SOURCE / "models"
    there = [*models.glob("class_map*.py"), *models.glob("pose_posterior/[!_]*.py")]
    assert sorted(named) == sorted(["hybrid_map", "neighbours", *(file.stem for file in there)])


def test_modules_import_only_from_ranks_above() -> None:
    wrong = []
    for item in IMPORTS:
        inner = _inner(item.target)
        if inner is None or inner == item.owner or item.owner not in RANKS:
            continue
        if item.inside_function and item.owner in REACHES_ANYWHERE_INSIDE_FUNCTIONS:
            continue
        if RANKS[inner] >= RANKS[item.owner]:
            wrong.append(f"{item} (rank {RANKS[inner]}) from rank {RANKS[item.owner]}")
    assert not wrong, "\n".join(wrong)


def test_models_do_not_know_particles() -> None:
    models = [item for item in IMPORTS if item.owner == "models"]
    assert not [str(item) for item in models if _inner(item.target) == "particles"]


def test_heavy_packages_stay_where_they_belong() -> None:
    wrong = []
    for item in IMPORTS:
        allowed = ALLOWED.get(item.target.split(".")[0])
        if allowed is None or item.owner in allowed:
            continue
        if item.inside_function and item.owner in {"cli", "commands", "plugin"}:
            continue
        wrong.append(str(item))
    assert not wrong, "\n".join(wrong)


def test_package_files_do_nothing_on_import() -> None:
    """An `__init__` with imports would make the cheapest module as slow as the dearest."""
    for file in SOURCE.rglob("__init__.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr | ast.Assign) for node in body), file


def test_only_one_file_waits_for_the_end_of_widgets() -> None:
    """A function connected to `destroyed` elsewhere may be emptied by the collector before Qt calls it."""
    waiting = [file.name for file in FILES if "destroyed.connect" in file.read_text()]
    assert waiting == ["lifetime.py"]


def test_few_tests_need_a_window() -> None:
    """The others run where there is no Qt."""
    wrong = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if "widgets" in file.relative_to(ROOT).parts or file.name in WINDOWED_TESTS:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.arg):
                names = [node.arg] if node.arg in {"qtbot", "qapp", "make_napari_viewer"} else []
            for name in names:
                top = name.split(".")[0]
                if top in {"qtpy", "napari", "superqt", "magicgui", "qtbot", "qapp", "make_napari_viewer"}:
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} {name}")  # type: ignore[attr-defined]
    assert not wrong, "\n".join(wrong)


def _run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


@pytest.mark.parametrize("module", ["cli", "plugin"])
def test_importing_brings_nothing_heavy(module: str) -> None:
    loaded = _run(f"import {PACKAGE}.{module}; {LOADED}").split()
    heavy = {"qtpy", "napari", "torch", "pandas", "sklearn", "scipy", "umap", "PySide6", "PyQt6", "vispy"}
    assert not heavy & set(loaded)


def test_the_window_never_imports_torch() -> None:
    pytest.importorskip("qtpy")
    names = [
        ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts)
        for file in sorted((SOURCE / "widgets").rglob("*.py"))
        if file.name != "__init__.py"
    ]
    code = "".join(f"import {name}\n" for name in [*names, f"{PACKAGE}.session", f"{PACKAGE}.averaging"])
    loaded = _run(code + LOADED, QT_QPA_PLATFORM="offscreen").split()
    assert "torch" not in loaded


def test_importing_the_package_takes_under_50_ms() -> None:
    code = (
        "import time; start = time.perf_counter(); import particle_explorer; "
        "print(time.perf_counter() - start)"
    )
    seconds = min(float(_run(code)) for _ in range(3))
    assert seconds < 0.05

"""What is shipped: one manifest, every package, every command, settings that explain themselves."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import particle_explorer
from particle_explorer import configs

ROOT = Path(__file__).parents[1]
NAME = "napari-particle-explorer"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "napari.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def test_packages_are_complete() -> None:
    folders = {file.parent.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("*.py")}
    there = {".".join(folder.parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == there | {"particle_explorer_dist"}
    assert all((ROOT / "src" / folder / "__init__.py").exists() for folder in folders)


def test_no_code_at_the_top_of_the_repository() -> None:
    """The top is the folder of `particle_explorer_dist`, so a script here would be installed with it."""
    assert not list(ROOT.glob("*.py"))


def test_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest is not None
    assert newest[1] == particle_explorer.__version__ == importlib.metadata.version(NAME)


def test_installed_manifest_is_the_one_at_the_top(manifest: dict[str, Any]) -> None:
    [entry] = [
        point
        for point in importlib.metadata.entry_points(group="napari.manifest")
        if point.dist is not None and point.dist.name == NAME
    ]
    module, _, filename = entry.value.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations is not None
    found = [Path(folder, filename) for folder in spec.submodule_search_locations]
    assert any(path.exists() for path in found)
    assert manifest["name"] == NAME == PROJECT["project"]["name"]


def test_manifest_is_valid(manifest: dict[str, Any]) -> None:
    npe2 = pytest.importorskip("npe2")
    npe2.PluginManifest(**manifest)


def test_commands_of_the_manifest_can_be_imported(manifest: dict[str, Any]) -> None:
    pytest.importorskip("qtpy")
    targets = [command["python_name"] for command in manifest["contributions"]["commands"]]
    assert targets
    code = "import importlib, sys\nfor target in sys.argv[1:]:\n    module, _, name = target.partition(':')\n"
    code += "    assert callable(getattr(importlib.import_module(module), name)), target\n"
    done = subprocess.run(
        [sys.executable, "-c", code, *targets],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_contributions_name_commands_that_exist(manifest: dict[str, Any]) -> None:
    contributions = manifest["contributions"]
    commands = {command["id"] for command in contributions["commands"]}
    used = {
        item["command"]
        for kind in ("readers", "writers", "widgets", "sample_data")
        for item in contributions.get(kind, [])
        if "command" in item
    }
    menus = contributions.get("menus", {})
    used |= {item["command"] for items in menus.values() for item in items if "command" in item}
    assert used <= commands
    assert all(command.startswith(f"{NAME}.") for command in commands)


def _settings() -> list[Any]:
    classes = [value for value in vars(configs).values() if isinstance(value, type)]
    groups = [cls for cls in classes if issubclass(cls, configs.Config) and cls is not configs.Config]
    # written by us, never filled in by a person
    records = {configs.RunConfig, configs.DataSpec, configs.ImportedConfig}
    return [
        pytest.param(field, id=f"{cls.__name__}.{name}")
        for cls in groups
        if cls not in records
        for name, field in cls.model_fields.items()
        if name != "kind"
    ]


@pytest.mark.parametrize("field", _settings())
def test_every_setting_has_a_title_a_help_text_and_bounds(field: Any) -> None:
    assert field.title
    assert field.description and field.description.rstrip().endswith((".", ")")), field.description
    if field.annotation in (int, float):
        bounds = {type(bound).__name__ for bound in field.metadata}
        assert bounds & {"Ge", "Gt"} and bounds & {"Le", "Lt"}, f"unbounded number: {bounds}"
    else:
        assert field.annotation is not Any


def test_settings_are_closed_and_explained() -> None:
    with pytest.raises(ValueError, match="extra"):
        configs.TrainConfig(no_such_setting=1)  # type: ignore[call-arg]


def _tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_unfinished_and_no_path_of_one_computer_is_shipped() -> None:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b|(?<![\w.~*])/(home|root|work|Users)/\w")
    wrong = []
    for file in _tracked():
        if file.suffix not in {
            ".py",
            ".md",
            ".toml",
            ".yaml",
            ".yml",
            ".sh",
            ".txt",
            ".in",
            ".json",
            ".star",
        }:
            continue
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if marks.search(line) and "re.compile" not in line:
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)


def test_links_of_the_documents_lead_somewhere() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        if "://" not in link and not (document.parent / link).exists()
    ]
    assert not missing, "\n".join(missing)


def test_what_is_shipped_stays_small() -> None:
    sample = sum(file.stat().st_size for file in (ROOT / "sample_data").rglob("*") if file.is_file())
    assert sample < 12e6
    large = [file for file in _tracked() if file.stat().st_size > 8e6]
    assert not large


def test_constraints_pin_every_dependency() -> None:
    def name(line: str) -> str:
        return re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower().replace("_", "-")

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line) for line in pins), (
        "plain name==version only"
    )
    project = PROJECT["project"]
    wanted = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    assert {name(line) for line in wanted} <= {name(line) for line in pins}

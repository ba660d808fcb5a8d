"""What is released: one version, floors that are tested, and archives that are whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
#: extras that users install; the others are for those who work on softtrace
FOR_USERS = ("peft", "trl", "data", "quantised")
#: what a checkout is, but for what Git and those who work in it add
FOLDERS = ("src", "tests", "recipes", "configs", ".ci", ".github")
FILES = (
    *("pyproject.toml", "constraints.txt", "constraints-oldest.txt", "Makefile", "MANIFEST.in"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "CITATION.cff"),
    *(".gitignore", ".pre-commit-config.yaml", "mkdocs.yml"),
)


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in found}


def requirements(lines: list[str]) -> list[Requirement]:
    """Of other packages, with a floor or without."""
    found = map(Requirement, lines)
    return [each for each in found if each.name != "softtrace"]


def test_the_version_is_one() -> None:
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1].split()[0] == version


def test_the_oldest_constraints_are_the_floors() -> None:
    oldest = pins("constraints-oldest.txt")
    users = PROJECT["dependencies"] + [line for name in FOR_USERS for line in EXTRAS[name]]
    for each in requirements(users):
        floors = [Version(part.version) for part in each.specifier if part.operator == ">="]
        assert floors == [oldest[canonicalize_name(each.name)]], each


def test_the_newest_constraints_are_allowed_and_tools_are_the_same_in_both() -> None:
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    everything = PROJECT["dependencies"] + [line for lines in EXTRAS.values() for line in lines]
    for each in requirements(everything):
        name = canonicalize_name(each.name)
        if name != "pyyaml":  # a dependency of others, which they pin
            assert newest[name] in each.specifier, each
            assert oldest[name] in each.specifier, each
    lines = EXTRAS["test"] + EXTRAS["docs"] + EXTRAS["dev"]
    tools = {canonicalize_name(each.name) for each in requirements(lines)}
    assert len(tools) >= 12
    assert {name: newest[name] for name in tools} == {name: oldest[name] for name in tools}


def test_the_tools_of_development_allow_the_oldest_constraints() -> None:
    """Else nothing can be installed by them; of the other packages newer releases are here."""
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    read = 0
    for name in {name for name in oldest if oldest[name] == newest.get(name)}:
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # torchao, which lies beside the environment
            continue
        for each in map(Requirement, lines):
            wanted = oldest.get(canonicalize_name(each.name))
            if wanted is not None and (each.marker is None or each.marker.evaluate({"extra": ""})):
                read += 1
                assert wanted in each.specifier, f"{name} {oldest[name]} needs {each}"
    assert read > 10


def test_continuous_integration_covers_every_python_with_both_constraints() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["tests"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"] == {
        "python": named,
        "constraints": ["constraints.txt", "constraints-oldest.txt"],
    }
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert job["steps"][-1] == {"run": ".ci/run"}
    for name in job["strategy"]["matrix"]["constraints"]:
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", ["bug", "model"])
def test_issue_forms_ask_for_what_is_needed(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    asked = [each["attributes"]["label"] for each in form["body"]]
    assert form["name"]
    assert form["description"]
    assert len(set(asked)) == len(asked) >= 3


@pytest.mark.thorough
def test_archives_hold_what_they_need(tmp_path: Path) -> None:
    """Of a copy, since a build writes beside the sources."""
    copy = tmp_path / "copy"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    kept = {path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()}
    code = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    # not forked as other tests' processes are: torch is not imported here
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stem = f"softtrace-{PROJECT['version']}"
    with tarfile.open(copy / "dist" / f"{stem}.tar.gz") as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert kept - inside == set()  # a source distribution is tested as a checkout is
    with zipfile.ZipFile(copy / "dist" / f"{stem}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        described = wheel.read(f"{stem}.dist-info/METADATA").decode()
    source = ROOT / "src"
    for path in (source / "softtrace").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert path.relative_to(source).as_posix() in names
    assert {name.partition("/")[0] for name in names} == {"softtrace", f"{stem}.dist-info"}
    assert f"{stem}.dist-info/licenses/LICENSE" in names
    assert f"\nVersion: {PROJECT['version']}\n" in described
    for name in FOR_USERS:
        assert f"\nProvides-Extra: {name}\n" in described

"""The built wheel: its name, what it holds, and that every extra that messages name is one of it."""

from __future__ import annotations

import configparser
import email
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pipeline
from pipeline import environment

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what a checkout tracks, so that nothing is written beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    tracked = ["pyproject.toml", "README.md", "LICENSE", "pipeline", "cache_schema"]
    files = subprocess.run(["git", "ls-files", *tracked], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(out), str(source))
    (built,) = out.iterdir()
    return built


def test_the_wheel_is_redpen_opd_and_its_command_redpen(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(about))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(about.replace("METADATA", "entry_points.txt")).decode())
    assert metadata["Name"] == "redpen-opd" and metadata["Version"] == pipeline.__version__
    assert metadata["Requires-Python"].replace(" ", "") == "<3.14,>=3.11"
    assert dict(scripts["console_scripts"]) == {"redpen": "pipeline.cli:main"}
    for name in ("pipeline/recipes/toy.toml", "pipeline/report/assets/report.css", "cache_schema/SPEC.md"):
        assert name in names


def test_every_extra_is_one_of_the_wheel(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip only warns of an unknown one. Without a checkout, messages name what the extra requires."""
    extras = PROJECT["optional-dependencies"]
    asked = f"{wheel}[{','.join(extras)}]"
    done = pip("install", "--dry-run", "--no-deps", "--no-index", "--ignore-installed", asked)
    assert "Would install redpen-opd" in done.stdout and "does not provide" not in done.stderr
    with zipfile.ZipFile(wheel) as archive:
        (about,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = email.message_from_bytes(archive.read(about)).get_all("Requires-Dist")
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    monkeypatch.setattr(environment, "_ROOT", wheel.parent)
    for extra, requirements in extras.items():
        words = shlex.split(environment.install_hint(extra))
        named = words[words.index("install") + 1 :]
        assert [Requirement(word) for word in named] == [Requirement(each) for each in requirements]

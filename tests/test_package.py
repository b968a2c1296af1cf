"""The built wheel: its name, what it holds, and that every extra that messages name is one of it."""

from __future__ import annotations

import configparser
import email
import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.mark.network
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extras", [[e for e in PROJECT["optional-dependencies"] if e != "vllm"], ["vllm"]])
def test_what_the_wheel_requires_can_be_resolved(wheel: Path, extras: list[str], tmp_path: Path) -> None:
    """As in a fresh environment; of most packages pip reads the metadata alone. vLLM, which pins torch, alone."""
    options = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(tmp_path / "report.json")]
    try:
        pip("download", "--quiet", "--no-deps", "--retries", "0", "--dest", str(tmp_path), "click")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package index cannot be reached: {error.stderr.strip()[-200:]}")
    pip(*options, f"{wheel}[{','.join(extras)}]")
    found = json.loads((tmp_path / "report.json").read_text())["install"]
    names = {canonicalize_name(package["metadata"]["name"]) for package in found}
    wanted = [*PROJECT["dependencies"], *(r for extra in extras for r in PROJECT["optional-dependencies"][extra])]
    assert {"redpen-opd", *(canonicalize_name(Requirement(line).name) for line in wanted)} <= names


def test_it_is_installed_from_git(tmp_path: Path) -> None:
    """The README's line, with this checkout for URL. Nothing that is named installs the other project on PyPI."""
    (line,) = re.findall(r"^(pip install git\+URL\b)", (ROOT / "README.md").read_text(), re.M)
    if subprocess.run(["git", "-C", str(ROOT), "rev-parse"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    words = shlex.split(line.replace("URL", f"file://{ROOT}"))[2:]
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation"]
    report = tmp_path / "report.json"
    pip("install", *options, "--report", str(report), *words)
    (package,) = json.loads(report.read_text())["install"]
    assert package["metadata"]["name"] == "redpen-opd"


def test_no_line_installs_the_other_project() -> None:
    """`redpen` on PyPI is somebody else's."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pipeline").rglob("*.py")]
    wrong = [
        f"{page.name}: {line.strip()}"
        for page in pages
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.search(r"pip install [^|`]*(?<![\w./-])redpen(?![\w-])", line) and "another project" not in line
    ]
    assert wrong == []

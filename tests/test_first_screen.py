"""The commands of README's first screen, run as they stand there, with a real model. Not part of `make test`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import real_model

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
#: What a test need not do again: installing is tested in test_package, and the tests are this.
ELSEWHERE = ("make setup", "pip install", "make test")


def first_screen() -> list[str]:
    """The commands before the recipe of one's own."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").partition("In short:")[0]
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S) for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines]


def smaller(command: str, model: Path) -> str:
    """The same command with fewer prompts and tokens; a recipe's Hub id becomes the directory of the model."""
    small = ["prompts.limit=4", "rollouts.max_response_tokens=32", "train.steps=2", "eval.limit=4"]
    if "RECIPE" in command:
        small += [f"student.model={model}", f"teacher.model={model}", "eval.reread_rollouts=0"]
    return f'{command} SET="{" ".join(small)}"'


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make setup` makes, as far as commands use it: a `redpen` of this checkout."""
    venv = tmp_path_factory.mktemp("venv")
    (venv / "bin").mkdir()
    (venv / "bin/redpen").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipeline "$@"\n')
    (venv / "bin/redpen").chmod(0o755)
    (venv / "bin/python").symlink_to(sys.executable)
    (venv / ".installed").touch()  # newer than pyproject.toml: nothing to install
    return venv


def test_every_command_of_the_first_screen_works(environment: Path, tmp_path: Path) -> None:
    model = real_model.need()
    commands = [command for command in first_screen() if not command.startswith(ELSEWHERE)]
    assert "make train" in commands and "make train RECIPE=context-distillation" in commands
    for number, command in enumerate(commands):
        where = f"VENV={environment} CACHE={tmp_path}/{number}.zarr RUN={tmp_path}/run-{number}"
        made = subprocess.run(
            f"{smaller(command, model)} {where}",
            shell=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert made.returncode == 0, f"{command}: {made.stderr[-2000:]}"
        assert "prompts of toy:" in made.stdout and "reverse KL" in made.stdout, command
        assert (tmp_path / f"run-{number}/adapter").is_dir()

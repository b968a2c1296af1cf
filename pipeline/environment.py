"""Where redpen runs: environment variables, those it sets for its libraries and those of torchrun, and its extras."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from pathlib import Path

#: When this process began to load redpen, ns since 1970: the first module of all sets it.
STARTED = time.time_ns()

#: No telemetry, and no warnings of tokenizers about forks. Waiting OpenMP threads sleep: on a busy machine,
#: spinning ones made scoring on the CPU ten times slower.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's start causes warnings that users cannot act on
}

#: Number of processes in the torchrun job, and the number of this one; 1 and 0 without torchrun.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0")) if WORLD_SIZE > 1 else 0

_DISTRIBUTION = "redpen-opd"
_ROOT = Path(__file__).resolve().parent.parent


def set_environment() -> None:
    """Set what the user has not. OpenMP reads its variables when torch is imported, so this comes before."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def install_hint(extra: str) -> str:
    """The command that installs what an extra needs, for messages: of a checkout its extra, otherwise its packages.

    (`redpen` on the public index is another project.)
    """
    in_venv = os.environ.get("VIRTUAL_ENV") == sys.prefix
    command = ["pip"] if in_venv else [sys.executable, "-m", "pip"]
    if (_ROOT / "pyproject.toml").is_file():
        return shlex.join([*command, "install", "-e", f"{'.' if Path.cwd() == _ROOT else _ROOT}[{extra}]"])
    return shlex.join([*command, "install", *(needed for name, needed in _requirements() if name == extra)])


def extras() -> dict[str, list[str]]:
    """Names of the distributions that each extra requires; empty without a checkout or an installation."""
    found: dict[str, list[str]] = {}
    for extra, requirement in _requirements():
        found.setdefault(extra, []).append(re.split(r"[^\w.-]", requirement)[0])
    return found


def _requirements() -> list[tuple[str, str]]:
    """Pairs of extra and requirement, such as ("wandb", "wandb>=0.31")."""
    project = _ROOT / "pyproject.toml"
    if project.is_file():
        import tomllib

        tables = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        return [(extra, requirement) for extra, listed in tables.items() for requirement in listed]
    from importlib import metadata

    try:
        every = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    marked = (re.fullmatch(r"(.+?)\s*;\s*extra == ['\"](.+)['\"]", line) for line in every)
    return [(found[2], found[1]) for found in marked if found is not None]

"""Where redpen runs: environment variables, those it sets for its libraries and those of torchrun, and its extras."""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

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
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file():
        return shlex.join([*command, "install", "-e", f"{'.' if root == Path.cwd() else root}[{extra}]"])
    return shlex.join([*command, "install", *requirements(extra)])


def requirements(extra: str) -> list[str]:
    """What an extra of the installed distribution requires, e.g. `wandb>=0.31`. Empty if it is not installed."""
    try:
        every = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return []
    marked = (re.fullmatch(r"(.+?)\s*;\s*extra == ['\"](.+)['\"]", line) for line in every)
    return [found[1] for found in marked if found is not None and found[2] == extra]

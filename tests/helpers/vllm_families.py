"""Tries every family in vLLM, and fills in the last column of docs/models.md.

    cd tests && python -m helpers.vllm_families LOG [FAMILY ...]

A tiny random model of the family with heads that vLLM has kernels for, in fp32, and an adapter on all that redpen
trains: started as `redpen rollouts` does, the adapter's effect checked, and the log-probs that are stored compared
with plain transformers forwards. If it does not start with an adapter, it is tried without. Each family runs in a
separate process, and LOG gets a line of JSON for each; what has one there is not tried again.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedConfig

from helpers.families import FAMILIES, PAGE, RIGHT, Trial, all_alone, rows_of_page, save_model
from helpers.tiny_configs import tiny_config
from pipeline.config.recipe import TrainConfig, VllmConfig
from pipeline.engines.adapter_check import AdapterEffect
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.vllm import Engine
from pipeline.engines.vllm_sampler import VllmSampler
from pipeline.errors import RedpenError
from pipeline.models import load as models
from pipeline.models import lora

# vLLM's CPU attention takes heads of 32 dimensions and more.
_WIDER: dict[str, Any] = {"hidden_size": 128, "head_dim": 32}
# nats: vLLM's kernels against transformers' own forward
_TOLERANCE = 1e-4
# tokens, longer than any trial's rollout
_WIDE = 4096
_SECONDS = 400


def save_adapter(trial: Trial, adapter: Path) -> None:
    train = TrainConfig(lora_rank=8, lora_alpha=16)
    model = lora.make_trainable(models.load_model(trial.cfg), train)
    for parameter in lora.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    lora.save(model, lora.trainable(model), adapter, trial.cfg, "")


def apart(trial: Trial, adapter: Path | None) -> float:
    """How far the log-probs that vLLM stores are from a plain forward's, in nats. Raises `RedpenError`."""
    cfg = trial.cfg.model_copy(update={"adapter": str(adapter) if adapter else None})
    prompts = [(i, trial.ids[i][:start]) for i, start in enumerate(trial.starts)]
    effect = AdapterEffect.of(cfg, [ids for _, ids in prompts])
    settings = VllmConfig(enforce_eager=True, gpu_memory_utilization=0.1)
    with Engine(cfg, settings, max_length=128, max_sequences=16) as engine:
        if effect is not None:
            effect.check(engine, "the adapter")
        sampler = VllmSampler(engine, Sampling(1.0, 1.0, (2,), 4, 24, seed=0), batch_size=16)
        ((_, rollouts, _),) = sampler.sample([PromptBlock(0, prompts)])
    plain = trial.plain(trial.directory)
    if adapter is not None:
        plain = PeftModel.from_pretrained(plain, adapter).eval()
    return float(np.abs(rollouts.rollout_logprobs - all_alone(plain, rollouts)).max())


def try_family(family: str) -> str:
    """The family's cell."""
    model_type, settings = FAMILIES[family]
    config = tiny_config(model_type, **wider(settings))
    found, kind = in_vllm(config)
    if found > _TOLERANCE and getattr(config, "sliding_window", None):
        config.sliding_window = _WIDE
        within, kind = in_vllm(config)
        if within <= _TOLERANCE:
            return f"{kind} up to the sliding window; past it log-probs differ, here by {found:.1e} nats"
    return kind if found <= _TOLERANCE else f"log-probs differ by {found:.1e} nats"


def wider(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a model with such heads."""
    found = settings | _WIDER
    rope = found.get("rope_parameters", {})
    if "short_factor" in rope:  # LongRoPE has factors for each pair of dimensions
        n = int(found["head_dim"] * found.get("partial_rotary_factor", 1)) // 2
        found["rope_parameters"] = rope | {name: rope[name][:1] * n for name in ("short_factor", "long_factor")}
    return found


def in_vllm(config: PreTrainedConfig) -> tuple[float, str]:
    """How far a model's log-probs are from plain transformers', in nats, and its cell if that is near enough."""
    with tempfile.TemporaryDirectory() as name:
        directory, adapter = Path(name, "model"), Path(name, "adapter")
        save_model(config, directory)
        trial = Trial(directory, "float32")
        save_adapter(trial, adapter)
        try:
            found, kind = apart(trial, adapter), RIGHT
        except RedpenError as error:
            with_adapter = reason_of(error, directory)
            try:
                found, kind = apart(trial, None), f"{RIGHT}, with adapters merged ({with_adapter})"
            except RedpenError as other:
                found, kind = 0.0, f"refused: {reason_of(other, directory)}"
        print(f"{config.model_type}: {found:.1e} nats apart", file=sys.stderr)
        return found, kind


def reason_of(error: RedpenError, directory: Path) -> str:
    text = str(error).replace(str(directory), "MODEL")
    return text.rpartition("vLLM cannot run it: ")[2].replace("|", "/")[:160]


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def run(log: Path, families: list[str]) -> None:
    done = cells_of(log)
    for family in families:
        if family in done:
            continue
        started = time.perf_counter()
        command = [sys.executable, "-m", "helpers.vllm_families", "--family", family]
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            cell = last_line(made.stdout) or f"fails: {last_line(made.stderr)[:160]}"
        except subprocess.TimeoutExpired:
            cell = f"fails: no answer in {_SECONDS} s"
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([family, cell]) + "\n")
        print(f"{family}: {cell} ({time.perf_counter() - started:.1f} s)", flush=True)


def cells_of(log: Path) -> dict[str, str]:
    return dict(map(json.loads, log.read_text(encoding="utf-8").splitlines())) if log.is_file() else {}


def write_page(log: Path) -> None:
    text, known = PAGE.read_text(encoding="utf-8"), rows_of_page()
    for family, cell in cells_of(log).items():
        row, in_vllm = known[family]
        text = text.replace(f"{row} {in_vllm} |\n", f"{row} {cell} |\n")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--family":
        print(try_family(sys.argv[2]))
    else:
        run(Path(sys.argv[1]), sys.argv[2:] or list(FAMILIES))
        write_page(Path(sys.argv[1]))

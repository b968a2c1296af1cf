"""`redpen plan` beside what the steps of a round took on this machine, for `benchmarks/real.py`.

The plan is given two rates of this machine, of products of the size of a 1.5B model's: of many tokens at once, as in
scoring and training, and of a batch's tokens, as in sampling, which takes as long as reading the weights. Both are
measured when a row begins.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy_lab import curve, redpen, sampled

import cache_schema as cs

_ROWS, _COLUMNS = 8960, 1536
_MANY, _BATCH = 2048, 64


def _seconds(tokens: int, seconds: float = 2.0) -> float:
    """The median time of a bf16 product of `tokens` with a layer's weights; a new matrix each time, as in a model."""
    layers = torch.randn(16, _ROWS, _COLUMNS, dtype=torch.bfloat16)
    x = torch.randn(tokens, _COLUMNS, dtype=torch.bfloat16)
    times: list[float] = []
    while sum(times) < seconds:
        began = time.perf_counter()
        torch.nn.functional.linear(x, layers[len(times) % len(layers)])
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rates() -> dict[str, float]:
    """`tflops` of products with many tokens; `gbps`: bytes of weights a second while a batch decodes."""
    return {
        "tflops": 2 * _MANY * _ROWS * _COLUMNS / _seconds(_MANY) / 1e12,
        "gbps": 2 * _ROWS * _COLUMNS / _seconds(_BATCH) / 1e9,
    }


def beside(
    machine: dict[str, float], recipe: Path, settings: Sequence[str], cache: Path, output: str, run: Path
) -> dict[str, Any]:
    """Seconds of each step of the first round, as planned for a machine of these rates, and as they were.

    Args:
        output: what `rollouts` and `score` printed.
        run: of the training on that round.
    """
    group = cs.open(str(cache)).round(0).rollouts
    names = ("prompt_length", "response_length")
    blocks = [group.read_arrays(int(block), names) for block in np.flatnonzero(group.committed())]
    prompt, response = (float(np.concatenate([block[name] for block in blocks]).mean()) for name in names)
    lengths = ("--mean-prompt-tokens", prompt, "--mean-response-tokens", response)
    device = ("--device-tflops", machine["tflops"], "--device-gbps", machine["gbps"], "--utilisation", 1)
    steps = json.loads(redpen("plan", recipe, "--json", *lengths, *device, settings=settings).output)["cost"]["steps"]
    scored = re.findall(r"^(\w+): [^\n]*; [\d,]+ tokens in ([\d.]+) s", output, flags=re.MULTILINE)
    measured = {f"scoring, {name}": float(seconds) for name, seconds in scored}
    measured |= {"sampling": sampled(output)[1], "training": sum(step["time"]["seconds"] for step in curve(run))}
    return machine | {"seconds": {step["step"]: (step["seconds"], measured[step["step"]]) for step in steps}}


def rendered(found: dict[str, Any]) -> str:
    """A table, and the rates."""
    lines = ["| | planned, s | took, s | took / planned |", "|---" * 4 + "|"]
    lines += [
        f"| {step} | {planned:.0f} | {took:.0f} | {took / planned:.2f} |"
        for step, (planned, took) in found["seconds"].items()
    ]
    device = f"--device-tflops {found['tflops']:.2g} --device-gbps {found['gbps']:.2g} --utilisation 1"
    return f"`redpen plan` with `{device}`, measured before:\n\n" + "\n".join(lines)

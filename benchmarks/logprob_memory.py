"""Log-prob forward + backward to the hidden rows over a large vocabulary: memory and time, beside the usual forms.

    python benchmarks/logprob_memory.py [--rows 4096] [--time-rows 1024] [--repeats 5]

Each form computes the mean of the sampled token's log-prob and its gradient, in fp32 on the CPU, at hidden size 512
and 151,936 tokens. Memory is how far peak resident memory rises above what inputs and libraries take, each form in a
fresh process. Time is taken in one process, the forms in turn: the median, and the best round, which is what is left
when nothing else runs on the machine; the median ratio to the naive form is that of the rounds' own ratios.

    naive    log_softmax of the full logits, gather
    torch    F.linear_cross_entropy in chunks of as many rows as ours (torch >= 2.13)
    ours 1   chunked_head_loss at the sampled token
    ours 8   chunked_head_loss at 8 candidates and the rest, reverse KL: more than the naive form computes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, VOCABULARY, CANDIDATES = 512, 151_936, 8
FORMS = ("naive", "torch", "ours 1", "ours 8")


def prepare(form: str, rows: int, rows_per_chunk: int, vocabulary: int = VOCABULARY) -> Callable[[], None] | None:
    """The form's forward + backward over fresh tensors; None if this torch does not have it."""
    import torch
    import torch.nn.functional as F

    from pipeline.logprobs import Head, chunked_head_loss
    from pipeline.train import losses

    if form == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocabulary, HIDDEN).normal_(generator=generator)
    hidden = torch.empty(rows, HIDDEN).normal_(std=HIDDEN**-0.5, generator=generator).requires_grad_()
    ids = torch.randint(vocabulary // CANDIDATES, (rows, 1), generator=generator) * CANDIDATES
    columns = ids + torch.arange(CANDIDATES)
    teacher = torch.randn(rows, CANDIDATES + 1, generator=generator).log_softmax(1)
    head = Head(weight)

    def naive() -> torch.Tensor:
        return -(hidden @ weight.t()).log_softmax(1).gather(1, ids).mean()

    def by_torch() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk)
        return F.linear_cross_entropy(hidden, weight, ids[:, 0], options=options)

    def sampled(_: slice, logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return -logprobs.sum() / rows

    def reverse_kl(chunk: slice, logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        loss, _ = losses.reverse_kl(logprobs, rest, teacher[chunk, :-1], teacher[chunk, -1])
        return loss.sum() / rows

    loss_of: dict[str, Callable[[], torch.Tensor]] = {
        "naive": naive,
        "torch": by_torch,
        "ours 1": lambda: chunked_head_loss(hidden, head, ids, sampled, rows_per_chunk).loss,
        "ours 8": lambda: chunked_head_loss(hidden, head, columns, reverse_kl, rows_per_chunk).loss,
    }

    def run() -> None:
        hidden.grad = None
        torch.autograd.backward(loss_of[form]())

    return run


def resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at its highest so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def child_memory(form: str, rows: int, rows_per_chunk: int) -> float | None:
    """GiB that one run of the form takes at its highest, in this so far unused process."""
    warm_up = prepare(form, 8, rows_per_chunk, vocabulary=64)  # loads what is loaded on first use
    run = prepare(form, rows, rows_per_chunk)
    if run is None or warm_up is None:
        return None
    warm_up()
    before = resident_bytes("VmRSS")
    run()
    return (resident_bytes("VmHWM") - before) / 2**30


def child_time(rows: int, rows_per_chunk: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each round, by form, after one round to warm up."""
    runs = {form: run for form in FORMS if (run := prepare(form, rows, rows_per_chunk)) is not None}
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for _ in range(repeats + 1):
        for form, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[form].append(time.perf_counter() - started)
    return {form: times[1:] for form, times in seconds.items()}


def in_fresh_process(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the memory measurement")
    parser.add_argument("--time-rows", type=int, default=1024, help="rows of the time measurement")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the time measurement")
    parser.add_argument("--rows-per-chunk", type=int, default=512, help="rows whose logits exist at the same time")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, *numbers = options.child
        child = child_time if what == "time" else lambda *sizes: child_memory(what, *sizes)
        print(json.dumps(child(*map(int, numbers))))
        return

    import torch

    chunk = options.rows_per_chunk
    gib: dict[str, float] = {form: in_fresh_process(form, options.rows, chunk) for form in FORMS}
    seconds: dict[str, list[float]] = in_fresh_process("time", options.time_rows, chunk, options.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, hidden {HIDDEN}, {VOCABULARY} tokens, fp32")
    print(f"chunks of {chunk} rows, median of {options.repeats} rounds")
    row = "{:8} {:>12} {:>8} {:>12} {:>8} {:>8} {:>8}"
    print(
        row.format(
            "", f"GiB at {options.rows}", "x naive", f"s at {options.time_rows}", "x naive", "best s", "x naive"
        )
    )
    for form in FORMS:
        if form not in seconds:
            print(f"{form:8} is not in this torch")
            continue
        memory, times, naive = gib[form], seconds[form], seconds["naive"]
        ratio = statistics.median(a / b for a, b in zip(times, naive, strict=True))
        numbers = memory, memory / gib["naive"], statistics.median(times), ratio, min(times), min(times) / min(naive)
        print(row.format(form, *(f"{number:.3f}" for number in numbers)))


if __name__ == "__main__":
    main()

"""Log-prob forward + backward to the hidden rows over a large vocabulary: memory and time, beside the usual forms.

    python benchmarks/logprob_memory.py [--rows 4096] [--time-rows 1024] [--repeats 5]

Each form computes the mean of the sampled token's log-prob and its gradient, fp32 on the CPU, hidden size 512 and 151,936
tokens. Memory is the growth of peak resident memory, each form in a fresh process. Time is taken in one process, the
forms in turn, as the median of each round's ratio to the naive form (neighbours on the machine disturb a round alike).

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

HIDDEN, VOCABULARY, CANDIDATES = 512, 151_936, 8
FORMS = ("naive", "torch", "ours 1", "ours 8")


def prepare(form: str, rows: int, rows_per_chunk: int) -> Callable[[], None] | None:
    """The form's forward + backward over fresh tensors; None if this torch does not have it."""
    import torch
    import torch.nn.functional as F

    from pipeline.logprobs import Head, chunked_head_loss
    from pipeline.train import losses

    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, HIDDEN).normal_(generator=generator)
    hidden = torch.empty(rows, HIDDEN).normal_(std=HIDDEN**-0.5, generator=generator).requires_grad_()
    ids = torch.randint(VOCABULARY // CANDIDATES, (rows, 1), generator=generator) * CANDIDATES
    columns = ids + torch.arange(CANDIDATES)
    teacher = torch.randn(rows, CANDIDATES + 1, generator=generator).log_softmax(1)

    def naive() -> torch.Tensor:
        return -(hidden @ weight.t()).log_softmax(1).gather(1, ids).mean()

    def by_torch() -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk)
        return F.linear_cross_entropy(hidden, weight, ids[:, 0], options=options)

    def negative_logprob(_: slice, logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        return -logprobs.sum() / rows

    def reverse_kl(chunk: slice, logprobs: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        loss, _ = losses.reverse_kl(logprobs, rest, teacher[chunk, :-1], teacher[chunk, -1])
        return loss.sum() / rows

    head = Head(weight)
    form_losses: dict[str, Callable[[], torch.Tensor]] = {
        "naive": naive,
        "torch": by_torch,
        "ours 1": lambda: chunked_head_loss(hidden, head, ids, negative_logprob, rows_per_chunk).loss,
        "ours 8": lambda: chunked_head_loss(hidden, head, columns, reverse_kl, rows_per_chunk).loss,
    }
    if form == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None

    def run() -> None:
        hidden.grad = None
        form_losses[form]().backward()

    return run


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def child_memory(form: str, rows: int, rows_per_chunk: int) -> dict[str, float] | None:
    warm, run = prepare(form, 8, rows_per_chunk), prepare(form, rows, rows_per_chunk)
    if run is None or warm is None:
        return None
    del warm
    before = peak_bytes()
    run()
    return {"gib": (peak_bytes() - before) / 2**30}


def child_time(rows: int, rows_per_chunk: int, repeats: int) -> dict[str, list[float]]:
    runs = {form: run for form in FORMS if (run := prepare(form, rows, rows_per_chunk)) is not None}
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for repeat in range(repeats + 1):
        for form, run in runs.items():
            started = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[form].append(time.perf_counter() - started)
    return seconds


def in_fresh_process(*arguments: object) -> object:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the memory measurement")
    parser.add_argument("--time-rows", type=int, default=1024, help="rows of the time measurement")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the time measurement")
    parser.add_argument("--rows-per-chunk", type=int, default=512)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *rest = options.child
        result = child_time(*map(int, rest)) if kind == "time" else child_memory(kind, *map(int, rest))
        print(json.dumps(result))
        return

    import torch

    chunk = options.rows_per_chunk
    memory = {form: in_fresh_process(form, options.rows, chunk) for form in FORMS}
    seconds = in_fresh_process("time", options.time_rows, chunk, options.repeats)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {HIDDEN} x {VOCABULARY} fp32, "
        f"chunks of {chunk} rows; {options.repeats} rounds"
    )
    print(f"{'':8} {'GiB at ' + str(options.rows):>12} {'x naive':>8} {'s at ' + str(options.time_rows):>12} {'x naive':>8}")
    for form in FORMS:
        if memory[form] is None:
            print(f"{form:8} {'not in this torch':>12}")
            continue
        gib, ratio = memory[form]["gib"], memory[form]["gib"] / memory["naive"]["gib"]
        times = seconds[form]
        relative = statistics.median(a / b for a, b in zip(times, seconds["naive"], strict=True))
        print(f"{form:8} {gib:12.2f} {ratio:8.3f} {statistics.median(times):12.2f} {relative:8.2f}")


if __name__ == "__main__":
    main()

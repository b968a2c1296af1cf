"""Head and loss over a large vocabulary, forward + backward to the hidden rows: memory and time beside other forms.

    python benchmarks/logprob_memory.py [--rows 4096] [--time-rows 1024] [--hidden 2048] [--repeats 3]

fp32 on the CPU, 151,936 tokens, the head frozen. Memory is how far peak resident memory rises above what inputs and
libraries take, each form in a fresh process. Time is taken in one process, the forms in turn: the median, and the
best round, which is what is left when nothing else runs on the machine; the median ratio to the naive form is that of
the rounds' own ratios.

    naive       log_softmax of all logits; from it 16 candidates, the rest, the entropy and reverse KL
    redpen      chunked_head_loss: the same
    torch       F.linear_cross_entropy in as many rows at a time (torch >= 2.13): the sampled token only
    trl         its chunked log-probs: the sampled token and the entropy
    trl kl      its chunked divergence: reverse KL over all tokens, and the entropy; reads the teacher's head too
    liger kl    Liger's chunked distillation: reverse KL over all tokens; reads the teacher's head too

The last two need the teacher's hidden rows and head in memory; here they are the student's own, and not counted.
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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, CANDIDATES = 151_936, 16
FORMS = ("naive", "redpen", "torch", "trl", "trl kl", "liger kl")


def prepare(
    form: str,
    rows: int,
    hidden: int,
    rows_per_chunk: int,
    vocabulary: int = VOCABULARY,
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable[[], float]:
    """The form's forward + backward over tensors of its own, giving its loss. Raises where it cannot be had."""
    import torch
    from torch import Tensor

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, std: float = 1.0) -> Tensor:
        made = torch.empty(*shape, device=device, dtype=getattr(torch, dtype))
        return made.normal_(std=std, generator=generator)

    weight, states = random(vocabulary, hidden), random(rows, hidden, std=hidden**-0.5).requires_grad_()
    ids = torch.randint(vocabulary // CANDIDATES, (rows, 1), generator=generator, device=device) * CANDIDATES
    columns = ids + torch.arange(CANDIDATES, device=device)
    teacher = torch.randn(rows, CANDIDATES + 1, generator=generator, device=device).log_softmax(1)

    def reverse_kl(chunk: slice, logprobs: Tensor, rest: Tensor) -> Tensor:
        from pipeline.train import losses

        loss = losses.reverse_kl(logprobs, rest, teacher[chunk, :-1], teacher[chunk, -1])
        return loss.sum() / rows

    def naive() -> Tensor:
        logprobs = (states @ weight.t()).float().log_softmax(1)
        rest = logprobs.scatter(1, columns, -torch.inf).logsumexp(1)
        with torch.no_grad():
            entropy = torch.special.entr(logprobs.exp()).sum(1)
        assert entropy.isfinite().all()
        return reverse_kl(slice(None), logprobs.gather(1, columns), rest)

    def redpen() -> Tensor:
        from pipeline.forward.head import Head
        from pipeline.forward.loss_head import chunked_head_loss

        return chunked_head_loss(states, Head(weight), columns, reverse_kl, rows_per_chunk, entropy=True).loss

    def by_torch() -> Tensor:
        import torch.nn.functional as F

        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows_per_chunk)
        return F.linear_cross_entropy(states, weight, ids[:, 0], options=options)

    def trl() -> Tensor:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        apply: Any = ChunkedLogProbFunction.apply
        logprobs, *_ = apply(states, weight, None, ids[:, 0], 1.0, 32_768, None, 1.0, ("entropy",))
        return -logprobs.mean()

    def trl_kl() -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        apply: Any = ChunkedDivergenceFunction.apply
        divergence, _ = apply(states, weight, None, states.detach() / 2, weight, None, 1.0)
        return divergence.mean()

    def liger_kl() -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=1.0, compiled=device == "cuda", chunk_size=rows_per_chunk)
        return loss(states, weight, states.detach() / 2, weight, ids[:, 0])

    forms = dict(zip(FORMS, (naive, redpen, by_torch, trl, trl_kl, liger_kl), strict=True))

    def run() -> float:
        states.grad = None
        loss = forms[form]()
        torch.autograd.backward(loss)
        assert states.grad is not None and states.grad.isfinite().all()
        return float(loss.detach())

    return run


def resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at its highest so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def child_memory(form: str, *sizes: int) -> dict[str, float]:
    """GiB that one run of the form takes at its highest, in this so far unused process; its loss."""
    rows, hidden, rows_per_chunk = sizes
    prepare(form, 32, 16, rows_per_chunk, vocabulary=64)()  # loads what is loaded on first use
    run = prepare(form, rows, hidden, rows_per_chunk)
    before = resident_bytes("VmRSS")
    loss = run()
    return {"GiB": (resident_bytes("VmHWM") - before) / 2**30, "loss": loss}


def child_time(forms: str, *sizes: int) -> dict[str, list[float]]:
    """Seconds of each round, by form, after one round to warm up."""
    rows, hidden, rows_per_chunk, repeats = sizes
    runs = {form: prepare(form, rows, hidden, rows_per_chunk) for form in forms.split(",")}
    seconds: dict[str, list[float]] = {form: [] for form in runs}
    for _ in range(repeats + 1):
        for form, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[form].append(time.perf_counter() - started)
    return {form: times[1:] for form, times in seconds.items()}


def in_fresh_process(*arguments: object) -> Any:
    """What a child prints; a string, the last line of its complaint, where it fails."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> str:
    """Of what is compared."""
    found = []
    for name in ("torch", "trl", "liger-kernel"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096, help="rows of the memory measurement")
    parser.add_argument("--time-rows", type=int, default=1024, help="rows of the time measurement")
    parser.add_argument("--hidden", type=int, default=2048, help="channels of a hidden row")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the time measurement")
    parser.add_argument("--rows-per-chunk", type=int, default=512, help="rows whose logits exist at the same time")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, form, *numbers = options.child
        child: Callable[..., Any] = child_time if what == "time" else child_memory
        print(json.dumps(child(form, *map(int, numbers))))
        return

    import torch

    sizes = options.hidden, options.rows_per_chunk
    print(f"{versions()}; {torch.get_num_threads()} threads, hidden {options.hidden}, {VOCABULARY} tokens, fp32")
    print(f"{CANDIDATES} candidates; chunks of {options.rows_per_chunk} rows; median of {options.repeats} rounds")
    memory = {form: in_fresh_process("memory", form, options.rows, *sizes) for form in FORMS}
    able = [form for form in FORMS if not isinstance(memory[form], str)]
    seconds = in_fresh_process("time", ",".join(able), options.time_rows, *sizes, options.repeats)
    row = "{:9} {:>12} {:>8} {:>12} {:>8} {:>8} {:>8}"
    heads = f"GiB at {options.rows}", "x naive", f"s at {options.time_rows}", "x naive", "best s", "x naive"
    print(row.format("", *heads))
    for form in FORMS:
        if form not in able:
            print(f"{form:9} cannot run here: {memory[form]}")
            continue
        gib, times, naive = memory[form]["GiB"], seconds[form], seconds["naive"]
        ratio = statistics.median(a / b for a, b in zip(times, naive, strict=True))
        numbers = gib, gib / memory["naive"]["GiB"], statistics.median(times), ratio, min(times)
        print(row.format(form, *(f"{number:.3f}" for number in (*numbers, min(times) / min(naive)))))


if __name__ == "__main__":
    main()

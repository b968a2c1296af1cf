"""Training under a 24 GiB cap: how many tokens a micro-batch may have, how fast, and whether `redpen plan` knew.

    python benchmarks/train_gpu.py [--out FILE]                     # one CUDA device, about 8 minutes
    python benchmarks/train_gpu.py --shape tiny --device cpu        # does it run?

The student has the shape of Qwen3-8B and random bf16 weights, made on the device. Each part runs in a process of its
own, its share of the card capped by torch.cuda.set_per_process_memory_fraction:

    train     StudentTrainer.update: LoRA on all linear layers, gradient checkpointing, reverse KL over 16 candidates,
              on rollouts of 256 + 768 tokens in two micro-batches; rank 32 with AdamW, rank 128 with its 8-bit
              form (where bitsandbytes is there; else AdamW, which is said). The largest micro-batch, to 1,024 tokens,
              is found by bisection; tokens/s, prompts included, and the peak are taken there
    head      the head and the loss alone, at 4,096 rows: redpen's beside the forms of benchmarks/logprob_memory.py

`peak` is what torch's allocator had handed out at most, `planned` the same by plan, CUDA's context left out of both;
`reserved` is what the allocator held, fragments included. One JSON line for each figure, then a table; all of it is
in --out too. On the CPU there is no cap: `peak` is then counted, and one size of micro-batch tried.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from logprob_memory import FORMS, prepare, versions
from streamed_gpu import CONTEXT_GIB, GIB, ROOT, synchronise

CAP_GIB, CANDIDATES, UNIT = 24.0, 16, 1024
MOST_TOKENS = 64 * UNIT


class Shape:
    """A student, and what it is trained on."""

    def __init__(self, name: str):
        tiny = name == "tiny"
        self.config: dict[str, Any] = dict(
            hidden_size=64 if tiny else 4096,
            intermediate_size=192 if tiny else 12_288,
            num_hidden_layers=3 if tiny else 36,
            num_attention_heads=4 if tiny else 32,
            num_key_value_heads=2 if tiny else 8,
            head_dim=16 if tiny else 128,
            vocab_size=512 if tiny else 151_936,
            max_position_embeddings=40_960,
            tie_word_embeddings=False,
        )
        self.head_rows = 256 if tiny else 4096
        self.prompt, self.response = UNIT // 4, UNIT - UNIT // 4

    def recipe(self, directory: str, **train: Any) -> Any:
        from pipeline.config import Recipe

        tokens = dict(max_prompt_tokens=self.prompt, max_response_tokens=self.response)
        return Recipe.from_dict(
            {
                "student": {"model": directory},
                "teacher": {"model": directory},
                "prompts": {"path": "none"},
                "rollouts": tokens,
                "score": {"candidates": CANDIDATES},
                "train": {"stop_reverse_kl": 0.0, **train},
            }
        )

    def model(self, device: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, Qwen3Config

        from pipeline.forward.attention import register_packed_attention

        register_packed_attention()
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                Qwen3Config(**self.config), dtype=torch.bfloat16, attn_implementation="redpen_packed"
            )
        return model.eval().requires_grad_(False)

    def batch(self, tokens: int) -> Any:
        """Different rollouts of `tokens` tokens in all, with scores, as training reads them from a cache."""
        import cache_schema as cs
        from pipeline.train.replay import Batch, LoadedBlock, Rollout

        rng, n = np.random.default_rng(0), self.response
        prompt = rng.integers(0, self.config["vocab_size"], self.prompt)
        rows, columns = [], []
        for sample in range(tokens // UNIT):
            first = rng.integers(0, self.config["vocab_size"] // CANDIDATES, n) * CANDIDATES
            rows.append(cs.RolloutRow(0, sample, first, np.full(n, -1.0), cs.FINISH_LENGTH))
            columns.append(first[:, None] + np.arange(CANDIDATES))
        ids = np.concatenate(columns).astype(np.int32)
        logprobs = rng.normal(size=(len(ids), CANDIDATES + 1)).astype(np.float32)
        logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
        scores = {
            "student/logprobs": logprobs[:, 0],
            "student/candidate_ids": ids,
            "teacher/logprobs": logprobs[:, 0],
            "teacher/candidate_logprobs": logprobs[:, :-1],
            "teacher/rest_logprob": logprobs[:, -1],
        }
        block = LoadedBlock(cs.RolloutBlock.from_rows([(0, prompt)], rows), scores, np.ones(len(ids), np.float32))
        return Batch(0, tuple(Rollout(block, row) for row in range(len(rows))))


# -- what runs in processes of its own -----------------------------------------------------------------------


def cap(device: str) -> None:
    import torch

    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (CAP_GIB - CONTEXT_GIB) * GIB / total))


def train(shape: Shape, device: str, rank: int) -> Iterator[dict[str, Any]]:
    """The largest micro-batch, and what it takes."""
    import torch

    import cache_schema as cs
    from pipeline.models.lora import make_trainable
    from pipeline.plan import Device, memory
    from pipeline.train.objective import DistillationObjective
    from pipeline.train.teachers import Teachers
    from pipeline.train.trainer import StudentTrainer

    cap(device)
    in_bits = rank > 32 and device == "cuda" and find_spec("bitsandbytes") is not None
    settings = dict(lora_rank=rank, optimizer="adamw_8bit" if in_bits else "adamw", gradient_checkpointing=True)
    with tempfile.TemporaryDirectory() as directory:
        from transformers import Qwen3Config

        config = Qwen3Config(**shape.config, dtype="bfloat16", architectures=["Qwen3ForCausalLM"])
        config.save_pretrained(directory)
        recipe = shape.recipe(directory, **settings)
        models = memory.Models.of(recipe)

        def planned(tokens: int) -> memory.Need:
            sized = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
            return memory.training(recipe.model_copy(update={"train": sized}), models, Device(gib=CAP_GIB))

        foreseen = planned(UNIT).largest
        yield {"what": "plan", "rank": rank, "largest": foreseen, "optimizer": recipe.train.optimizer}

        identity = cs.ModelIdentity("random", None, "0" * 32, None)
        manifest = cs.ScoresManifest(
            role="teacher", model=identity, tokenizer=cs.TokenizerIdentity("none", "0" * 32, 1), template={},
            dtype="bfloat16", quantisation=None, engine="random", tile_tokens=UNIT,
            vocab_size=shape.config["vocab_size"], candidate_kind="topk", candidates=CANDIDATES,
            sampling_temperature=None,
        )  # fmt: skip
        objective = DistillationObjective(recipe.train, Teachers({"teacher": manifest}), shape.config["vocab_size"])
        trainer = StudentTrainer(make_trainable(shape.model(device), recipe.train), objective, recipe.train)

        def update(tokens: int) -> dict[str, Any]:
            trainer.train = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
            batch = shape.batch(2 * tokens)
            synchronise(device)
            started = time.perf_counter()
            peak, reserved = _measured(trainer, batch, device)
            return {"seconds": time.perf_counter() - started, "peak": peak / GIB, "reserved": reserved / GIB}

        def fits(tokens: int) -> bool:
            try:
                update(tokens)
            except torch.OutOfMemoryError:
                return False
            finally:
                for parameter in trainer.parameters.values():
                    parameter.grad.zero_()
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            return True

        fits(UNIT)  # the optimizer has its state from here on
        largest = bisect(fits, foreseen or UNIT) if device == "cuda" else 2 * UNIT
        if not largest:
            yield {"what": "train", "rank": rank, "largest": 0}
            return
        update(largest)
        figures = [update(largest) for _ in range(2)]
    need = planned(largest)
    yield {
        "what": "train",
        "rank": rank,
        "optimizer": recipe.train.optimizer,
        "largest": largest,
        "tokens/s": 2 * largest / min(figure["seconds"] for figure in figures),
        "peak": figures[-1]["peak"],
        "planned": (need.total - need.parts["context and libraries"]) / GIB,
        "reserved": figures[-1]["reserved"],
        "parts": {name: nbytes / GIB for name, nbytes in need.parts.items()},
    }


def _measured(trainer: Any, batch: Any, device: str) -> tuple[float, float]:
    """Bytes at the highest during an update, and bytes that the allocator held."""
    import torch

    from pipeline.models.peak_memory import PeakBytes, bytes_of

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.update(batch)
        synchronise(device)
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with PeakBytes() as peak:
        trainer.update(batch)
    gradients = [parameter.grad for parameter in trainer.masters.values()]
    resting = bytes_of([list(trainer.model.parameters()), gradients, list(trainer.optimizer.state.values())])
    return peak.nbytes + resting, peak.nbytes + resting


def bisect(fits: Any, guess: int) -> int:
    """The largest multiple of UNIT up to MOST_TOKENS that fits, 0 for none; begins at a guess."""
    low, high = 0, MOST_TOKENS // UNIT
    middle = min(high, max(1, guess // UNIT))
    while low < high:
        low, high = (middle, high) if fits(middle * UNIT) else (low, middle - 1)
        middle = (low + high + 1) // 2
        if low and high - low > 4:  # the guess is mostly near
            middle = min(middle, low + 4)
    return low * UNIT


def head(shape: Shape, device: str, form: str) -> Iterator[dict[str, Any]]:
    """Memory and time of one form of the head and the loss; not capped, since the naive one would not fit."""
    import torch

    from pipeline.models.peak_memory import PeakBytes

    def made(rows: int) -> Any:
        sizes = rows, shape.config["hidden_size"], min(1024, rows)
        return prepare(form, *sizes, vocabulary=shape.config["vocab_size"], device=device, dtype="bfloat16")

    made(32)()
    run = made(shape.head_rows)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with PeakBytes() as counted:
            run()
        peak = counted.nbytes
    seconds = []
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    yield {"what": "head", "form": form, "GiB": peak / GIB, "ms": 1e3 * statistics.median(seconds)}


# -- the parent ----------------------------------------------------------------------------------------------


def in_own_process(options: argparse.Namespace, deadline: float, **job: Any) -> list[dict[str, Any]]:
    """What a part finds, printed as it comes; what goes wrong in it, and a lack of time, become a figure too."""
    left = deadline - time.monotonic()
    found: list[dict[str, Any]] = []
    if left < 15:
        found = [{**job, "failed": "no time left"}]
    else:
        command = [sys.executable, __file__, "--shape", options.shape, "--device", options.device]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                [*command, "--child", json.dumps(job)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                output, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            errors.seek(0)
            said = errors.read().strip().splitlines() or ["no message"]
        found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        if process.returncode:
            found.append({**job, "failed": "no time left" if process.returncode < 0 else said[-1]})
    for figure in found:
        print(json.dumps(figure), flush=True)
    return found


def tables(shape: Shape, found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| LoRA rank | optimizer | tokens a micro-batch, at most | plan said | tokens/s | peak, GiB | planned | "
        f"error | reserved, of {CAP_GIB - CONTEXT_GIB:g} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    foreseen = {figure["rank"]: figure["largest"] for figure in found if figure["what"] == "plan"}
    for figure in found:
        if figure["what"] == "train" and figure.get("largest"):
            error = figure["planned"] / figure["peak"] - 1
            lines.append(
                f"| {figure['rank']} | {figure['optimizer']} | {figure['largest']:,} | "
                f"{foreseen[figure['rank']]:,} | {figure['tokens/s']:,.0f} | {figure['peak']:.3g} | "
                f"{figure['planned']:.3g} | {error:+.1%} | {figure['reserved']:.3g} |"
            )
        elif figure["what"] == "train":
            lines.append(f"| {figure['rank']} | {figure.get('failed', 'does not fit')} | | | | | | | |")
    sizes = f"{shape.head_rows:,} x {shape.config['vocab_size']:,} x {shape.config['hidden_size']:,}, bf16"
    lines += ["", f"| head and loss, {sizes} | GiB | x naive | ms | x naive |", "|---|---|---|---|---|"]
    by_form = {figure["form"]: figure for figure in found if figure["what"] == "head"}
    naive = by_form.get("naive", {})
    for form, figure in by_form.items():
        if "failed" in figure:
            lines.append(f"| {form} | cannot run here: {figure['failed']} | | | |")
            continue
        ratios = (figure[key] / naive[key] if key in naive else float("nan") for key in ("GiB", "ms"))
        memory, seconds = ratios
        lines.append(f"| {form} | {figure['GiB']:.3g} | {memory:.3f} | {figure['ms']:.1f} | {seconds:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["qwen3-8b", "tiny"], default="qwen3-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(options.shape)
    if options.child:
        job = json.loads(options.child)
        run = {"train": train, "head": head}[job.pop("what")]
        for figure in run(shape, options.device, **job):
            print(json.dumps(figure), flush=True)
        return

    import torch

    deadline = time.monotonic() + 60 * options.minutes
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    found: list[dict[str, Any]] = []
    for rank in (32, 128):
        found += in_own_process(options, deadline, what="train", rank=rank)
    for form in FORMS:
        found += in_own_process(options, deadline, what="head", form=form)
    text = f"{card}; {versions()}; {options.shape}, cap {CAP_GIB:g} GiB\n\n{tables(shape, found)}"
    print(text)
    if options.out:
        options.out.write_text(json.dumps({"device": card, "figures": found, "table": text}, indent=1) + "\n")


if __name__ == "__main__":
    main()

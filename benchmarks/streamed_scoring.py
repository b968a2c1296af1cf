"""Scoring with layers streamed from disk, beside the whole model in memory and accelerate's disk offload, on the CPU.

    python benchmarks/streamed_scoring.py [--tokens 2048] [--repeats 3] [--layers 38] [--directory DIR] [--small]

A Qwen3-shaped decoder of random bf16 weights (2.3 GB, 32,768 tokens, head and embedding apart) scores the same
rollouts five ways, each run in a process of its own, the ways in turn:

    resident    pipeline.engines.resident: the model as transformers loads it, weights touched before the clock starts
    streamed    pipeline.streaming.streamed: all tiles as one wave; the system's cache of the files is emptied before
                the clock starts, so that weights come from the disk (`read`)
    accelerate  the resident scorer, the layers of its model on disk by from_pretrained(device_map=...), files cached
    fp8, awq    streamed, the layers' linear weights quantised (`benchmarks/quantising.py`) in blocks of 128 x 128, or
                to 4 bits in groups of 128, and dequantised layer by layer

Ratios are medians of those of the rounds, by the clock and by the CPU time of the process, which other work on the
machine moves less. `anonymous` is how far RssAnon rises above what it is with everything imported, sampled every 5 ms
from before the model is loaded. Pages of mapped files, which the system may drop, are not in it but in `mapped`:
transformers maps weights that it need not cast, so the resident model is there. `moved` are the bytes of layers that
a wave brings to the device. Scores of bf16 weights are compared bit for bit.

Then the toy's teacher, which is trained, quantised in the same two ways, scores rollouts of the toy's student: how
far it is from itself in bf16, in log-probs of the sampled tokens, and in KL over 64 candidates and the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from quantising import METHODS, quantised_copy

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("resident", "streamed", "accelerate", "fp8", "awq")
SHAPE = dict(hidden_size=1536, intermediate_size=4608, num_attention_heads=24, num_key_value_heads=8, head_dim=64)
LAYERS, VOCABULARY, TILE_TOKENS, ROWS_PER_CHUNK = 38, 32_768, 1024, 256
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 192


def make_model(directory: Path, small: bool, layers: int) -> None:
    """Save random weights, a layer's worth at a time, in shards as save_pretrained would."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = SHAPE | {"num_hidden_layers": layers, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    if small:
        shape |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1024}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).bfloat16()
    model.save_pretrained(directory, max_shard_size="500MB")
    for method in METHODS:
        quantised_copy(directory, directory.with_name(method), method)
    os.sync()  # only clean pages can be dropped from the cache


def rollouts(tokens: int, vocabulary: int) -> Any:
    """A block of rollouts with `tokens` tokens in all, prompts included."""
    import cache_schema as cs

    rng = np.random.default_rng(0)
    n_rows = max(1, tokens // (PROMPT_TOKENS + RESPONSE_TOKENS))
    rows = []
    for sample in range(n_rows):
        ids = rng.integers(0, vocabulary, RESPONSE_TOKENS)
        rows.append(cs.RolloutRow(0, sample, ids, np.zeros(len(ids)), cs.FINISH_LENGTH))
    return cs.RolloutBlock.from_rows([(0, rng.integers(0, vocabulary, PROMPT_TOKENS))], rows)


class Memory(threading.Thread):
    """The highest RssAnon and RssFile of this process since the start, above those at the start, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._first, self._stop_asked = self._now(), threading.Event()
        self.peak = dict.fromkeys(self._first, 0)
        self.start()

    def _now(self) -> dict[str, int]:
        status = Path("/proc/self/status").read_text()
        return {name: 1024 * int(kib) for name, kib in re.findall(r"(RssAnon|RssFile):\s+(\d+)", status)}

    def run(self) -> None:
        while not self._stop_asked.wait(0.005):
            for name, value in self._now().items():
                self.peak[name] = max(self.peak[name], value - self._first[name])

    def stop(self) -> dict[str, int]:
        self._stop_asked.set()
        self.join()
        return self.peak


def uncache(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes() -> int:
    return int(re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])  # type: ignore[index]


def child(form: str, directory: Path, tokens: int, out: Path) -> dict[str, float]:
    """Load and score once; saves the scores, returns seconds and bytes."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from pipeline.config import ModelConfig
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.scoring import ScoreOptions
    from pipeline.forward.attention import register_packed_attention
    from pipeline.models import load as models
    from pipeline.models.resolve import resolve
    from pipeline.streaming.streamed import StreamedScorer

    register_packed_attention()
    cfg = ModelConfig(model=str(directory), dtype="bfloat16", device="cpu")
    options = ScoreOptions(tile_tokens=TILE_TOKENS, rows_per_chunk=ROWS_PER_CHUNK)
    vocabulary = resolve(cfg).vocab_size
    small = {**SHAPE, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 512}
    tiny = Qwen3ForCausalLM(Qwen3Config(**small, attn_implementation="redpen_packed")).bfloat16().eval()
    ResidentScorer(tiny, options).compute_logprobs(rollouts(TILE_TOKENS, 512))  # much is loaded on first use
    batch, memory = rollouts(tokens, vocabulary), Memory()
    scorer: Any
    moved = 0
    if form in ("streamed", *METHODS):
        scorer = StreamedScorer(cfg, options, memory_gib=1.0)
        scorer.wave_tokens = max(tokens, TILE_TOKENS)
        moved = scorer.layer_bytes
    elif form == "resident":
        scorer = ResidentScorer(models.load_model(cfg), options)
    else:
        parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        with tempfile.TemporaryDirectory() as folder:
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.bfloat16,
                attn_implementation="redpen_packed",
                device_map=parts | {"model.layers": "disk"},
                offload_folder=folder,
            )
        scorer = ResidentScorer(model.eval(), options)
    scorer.compute_logprobs(rollouts(PROMPT_TOKENS + RESPONSE_TOKENS, vocabulary))  # the first touch
    if form in ("streamed", *METHODS):
        uncache(directory)
    read, started, cpu_started = disk_bytes(), time.perf_counter(), time.process_time()
    scores = scorer.compute_logprobs(batch)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    read = disk_bytes() - read
    peak = memory.stop()
    np.savez(out, **{name: value for name, value in vars(scores).items() if value is not None})
    memory_bytes = {"anonymous": peak["RssAnon"], "mapped": peak["RssFile"]}
    return {"seconds": seconds, "cpu": cpu, "read": read, "moved": moved, **memory_bytes}


def distances(folder: Path) -> None:
    """Print how far the toy's teacher, quantised, is from itself in bf16."""
    import cache_schema as cs
    import pipeline.rollouts.stage
    from pipeline.config import ModelConfig, load_recipe
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.scoring import ScoreOptions, TokenBatch
    from pipeline.models import load as models
    from pipeline.models.resolve import resolve

    recipe = load_recipe("toy", ["prompts.limit=64"])
    pipeline.rollouts.stage.run(recipe, str(folder / "toy.zarr"))
    group = cs.open(folder / "toy.zarr").round().rollouts
    block = group.read(0)
    teacher = resolve(ModelConfig(model="toy:teacher")).directory
    options = ScoreOptions(candidates=64, tile_tokens=TILE_TOKENS)

    def scored(directory: Path, candidate_ids: Any = None) -> Any:
        model = models.load_model(ModelConfig(model=str(directory), dtype="bfloat16", device="cpu"))
        return ResidentScorer(model, options).compute_logprobs(TokenBatch((block,), candidate_ids))

    own = scored(teacher)
    p, rest = np.exp(own.candidate_logprobs), np.exp(own.rest_logprob)
    print(f"\ntoy:teacher on {len(own.logprobs):,} tokens, against itself in bf16:")
    for method in METHODS:
        quantised_copy(teacher, folder / f"toy-{method}", method, size=32)
        other = scored(folder / f"toy-{method}", own.candidate_ids)
        apart = np.abs(other.logprobs - own.logprobs)
        kl = (p * (own.candidate_logprobs - other.candidate_logprobs)).sum(1)
        kl += rest * (own.rest_logprob - other.rest_logprob)
        print(
            f"{method}, blocks of 32: log-probs are {apart.mean():.4f} apart on average, {apart.max():.2f} at most; "
            f"KL {kl.mean():.1e}"
        )


def in_fresh_process(*arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="prompt and response tokens of the batch, one wave")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of the five ways")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model")
    parser.add_argument(
        "--directory", type=Path, help="where the models are written (4 GB); default: a temporary one"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        form, directory, tokens, out = options.child
        print(json.dumps(child(form, Path(directory), int(tokens), Path(out))))
        return

    import accelerate
    import torch
    import transformers

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        model = Path(folder) / "model"
        make_model(model, options.small, options.layers)
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, "
            f"accelerate {accelerate.__version__}\n"
            f"{torch.get_num_threads()} threads, {weights / 1e9:.2f} GB of bf16 weights, {options.tokens} tokens, "
            f"tiles of {TILE_TOKENS}, median of {options.repeats} rounds"
        )
        runs: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(options.repeats):
            for form in FORMS:
                where = Path(folder) / form if form in METHODS else model
                runs[form].append(in_fresh_process(form, where, options.tokens, Path(folder) / f"{form}.npz"))
        row = "{:12}{:>10}{:>12}{:>10}{:>20}{:>14}{:>10}{:>11}  {}"
        heads = ("tokens/s", "x resident", "by CPU", "anonymous", "mapped, GB", "read, GB", "moved, GB", "scores")
        print(row.format("", *heads))
        expected = np.load(Path(folder) / "resident.npz")
        for form in FORMS:

            def ratio(key: str, form: str = form) -> str:
                pairs = zip(runs["resident"], runs[form], strict=True)
                return f"{statistics.median(resident[key] / run[key] for resident, run in pairs):.3f}"

            middle = {key: statistics.median(run[key] for run in runs[form]) for key in runs[form][0]}
            scores = np.load(Path(folder) / f"{form}.npz")
            same = all(np.array_equal(scores[name], expected[name]) for name in expected.files)
            print(
                row.format(
                    form,
                    f"{options.tokens / middle['seconds']:.1f}",
                    ratio("seconds"),
                    ratio("cpu"),
                    f"{middle['anonymous'] / 1e9:.2f} GB = {middle['anonymous'] / weights:.1%}",
                    f"{middle['mapped'] / 1e9:.2f}",
                    f"{middle['read'] / 1e9:.2f}",
                    f"{middle['moved'] / 1e9:.3f}" if middle["moved"] else "",
                    "equal bits" if same else "differ",
                )
            )
        distances(Path(folder))


if __name__ == "__main__":
    main()

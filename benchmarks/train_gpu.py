"""Training steps, run by benchmarks/gpu.py: how many tokens fit, how fast, and whether `redpen plan` estimates it.

Models have random bf16 weights, made on the device.

    train     StudentTrainer.update of a Qwen3-8B shape: LoRA on all linear layers, gradient checkpointing, reverse KL
              over 16 candidates, on rollouts of 256 + 768 tokens in two micro-batches; rank 32 with AdamW, rank 128
              with its 8-bit form (with AdamW if there is no bitsandbytes, which the figure says). The process may
              take 24 GiB of the device (torch.cuda.set_per_process_memory_fraction). The largest micro-batch, to
              65,536 tokens, is found by bisection; tokens/s, prompts included, and the peak are taken there
    family    a model of another kind, saved and loaded as redpen does: layout check, resident and streamed scores of
              the same rollouts, one update
    head      the head and the loss alone, at 4,096 rows; see benchmarks/logprob_memory.py

`peak` is what torch's allocator had handed out at most, `planned` the same by `redpen plan`, CUDA's context left out
of both; `reserved` is what the allocator held, fragments included. `operations` of a token are those of
`pipeline.models.flops`. On the CPU nothing is capped: `peak` is counted, and one size of micro-batch is tried.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from logprob_memory import prepare
from streamed_gpu import CONTEXT_GIB, GIB, cap_memory, synchronise

CAP_GIB, CANDIDATES = 24.0, 16
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_DELTA = ["linear_attention", "full_attention"]


@dataclass(frozen=True)
class Shape:
    """A student, and what it is trained on.

    Attributes:
        config: transformers' class of the configuration, and its settings.
        rollout_tokens: of a rollout; a quarter is its prompt.
        most_tokens: of a micro-batch.
        head_rows: of the benchmark of the head.
    """

    config: tuple[str, dict[str, Any]]
    rollout_tokens: int = 1024
    most_tokens: int = 64 * 1024
    head_rows: int = 4096

    def make_config(self) -> Any:
        import transformers

        name, settings = self.config
        config = getattr(transformers, name)(**settings)
        config.dtype = "bfloat16"
        return config

    @property
    def vocab_size(self) -> int:
        return int(self.make_config().get_text_config().vocab_size)

    @property
    def prompt(self) -> int:
        return self.rollout_tokens // 4

    @property
    def response(self) -> int:
        return self.rollout_tokens - self.prompt

    def recipe(self, directory: str, **train: Any) -> Any:
        from pipeline.config import Recipe

        return Recipe.from_dict(
            {
                "student": {"model": directory, "dtype": "bfloat16"},
                "teacher": {"model": directory, "dtype": "bfloat16"},
                "prompts": {"path": "none"},
                "rollouts": {"max_prompt_tokens": self.prompt, "max_response_tokens": self.response},
                "score": {"candidates": CANDIDATES},
                "train": {"stop_reverse_kl": 0.0, **train},
            }
        )

    def model(self, device: str) -> Any:
        """With random weights on the device, and packed attention."""
        import torch
        from transformers import AutoModelForCausalLM

        from pipeline.forward.attention import ATTENTION, register_packed_attention

        register_packed_attention()
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                self.make_config(), dtype=torch.bfloat16, attn_implementation=ATTENTION
            )
        return model.eval().requires_grad_(False)

    def rollouts(self, tokens: int) -> Any:
        """Different rollouts of one prompt, of `tokens` tokens in all."""
        import cache_schema as cs

        rng, n = np.random.default_rng(0), self.response
        prompt = rng.integers(0, self.vocab_size, self.prompt)
        rows = []
        for sample in range(tokens // self.rollout_tokens):
            ids = rng.integers(0, self.vocab_size // CANDIDATES, n) * CANDIDATES
            rows.append(cs.RolloutRow(0, sample, ids, np.full(n, -1.0), cs.FINISH_LENGTH))
        return cs.RolloutBlock.from_rows([(0, prompt)], rows)

    def batch(self, tokens: int) -> Any:
        """The same with scores, as training reads them from a cache."""
        from pipeline.train.replay import Batch, LoadedBlock, Rollout

        rollouts, rng = self.rollouts(tokens), np.random.default_rng(1)
        ids = rollouts.token_ids[:, None] + np.arange(CANDIDATES, dtype=np.int32)
        logprobs = rng.normal(size=(len(ids), CANDIDATES + 1)).astype(np.float32)
        logprobs -= np.logaddexp.reduce(logprobs, axis=1, keepdims=True)
        scores = {
            "student/logprobs": logprobs[:, 0],
            "student/candidate_ids": ids,
            "teacher/logprobs": logprobs[:, 0],
            "teacher/candidate_logprobs": logprobs[:, :-1],
            "teacher/rest_logprob": logprobs[:, -1],
        }
        block = LoadedBlock(rollouts, scores, np.ones(len(ids), np.float32))
        return Batch(0, tuple(Rollout(block, row) for row in range(rollouts.n_rows)))

    def trainer(self, model: Any, train: Any) -> Any:
        import cache_schema as cs
        from pipeline.models.lora import make_trainable
        from pipeline.train.objective import DistillationObjective
        from pipeline.train.teachers import Teachers
        from pipeline.train.trainer import StudentTrainer

        manifest = cs.ScoresManifest(
            role="teacher",
            model=cs.ModelIdentity("random", None, "0" * 32, None),
            tokenizer=cs.TokenizerIdentity("none", "0" * 32, 1),
            template={},
            dtype="bfloat16",
            quantisation=None,
            engine="random",
            tile_tokens=self.rollout_tokens,
            vocab_size=self.vocab_size,
            candidate_kind="topk",
            candidates=CANDIDATES,
            sampling_temperature=None,
        )
        objective = DistillationObjective(train, Teachers({"teacher": manifest}), self.vocab_size)
        return StudentTrainer(make_trainable(model, train), objective, train)


#: By the name of the family and of the shape.
SHAPES = {
    ("dense", "full"): Shape(
        (
            "Qwen3Config",
            {
                "vocab_size": 151_936,
                "hidden_size": 4096,
                "intermediate_size": 12_288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 40_960,
                "tie_word_embeddings": False,
            },
        )
    ),
    # Qwen3.5-4B with 8 of its layers
    ("hybrid", "full"): Shape(
        (
            "Qwen3_5TextConfig",
            {
                "vocab_size": 248_320,
                "hidden_size": 2560,
                "intermediate_size": 9216,
                "num_hidden_layers": 8,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "tie_word_embeddings": True,
            },
        )
    ),
    # Gemma 3 4B with 8 of its layers, and a small vision tower
    ("multimodal", "full"): Shape(
        (
            "Gemma3Config",
            {
                "text_config": {
                    "vocab_size": 262_208,
                    "hidden_size": 2560,
                    "intermediate_size": 10_240,
                    "num_hidden_layers": 8,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 4,
                    "head_dim": 256,
                    "sliding_window": 512,
                },
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
            },
        )
    ),
    ("dense", "tiny"): Shape(("Qwen3Config", _TINY), 64, 256, 256),
    ("hybrid", "tiny"): Shape(
        (
            "Qwen3_5TextConfig",
            _TINY
            | {
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 16,
                "linear_value_head_dim": 16,
                "layer_types": _DELTA,
            },
        ),
        64,
        256,
    ),
    ("multimodal", "tiny"): Shape(
        (
            "Gemma3Config",
            {
                "text_config": _TINY | {"sliding_window": 32},
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
            },
        ),
        64,
        256,
    ),
}


def train(shape: str, device: str, rank: int) -> Iterator[dict[str, Any]]:
    """The largest micro-batch, and what it takes."""
    import torch

    from pipeline.models import flops
    from pipeline.plan import Device, memory

    model = SHAPES["dense", shape]
    unit = model.rollout_tokens
    cap_memory(device, CAP_GIB)
    in_bits = rank > 32 and device == "cuda" and find_spec("bitsandbytes") is not None
    settings = {"lora_rank": rank, "optimizer": "adamw_8bit" if in_bits else "adamw", "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory() as directory:
        model.make_config().save_pretrained(directory)
        recipe = model.recipe(directory, **settings)
        models = memory.PlannedModels.of(recipe)

        def planned(tokens: int) -> memory.StepMemory:
            sized = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
            return memory.training(recipe.model_copy(update={"train": sized}), models, Device(gib=CAP_GIB))

        foreseen = planned(unit).largest or 0
        yield {"what": "plan", "rank": rank, "largest": foreseen, "optimizer": recipe.train.optimizer}
        trainer = model.trainer(model.model(device), recipe.train)

        def update(tokens: int) -> dict[str, float]:
            trainer.train = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
            batch = model.batch(2 * tokens)
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
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
            return True

        fits(unit)  # the optimizer has its state from here on
        largest = bisect(fits, unit, model.most_tokens, foreseen) if device == "cuda" else 2 * unit
        if not largest:
            yield {"what": "train", "rank": rank, "largest": 0}
            return
        update(largest)
        figures = [update(largest) for _ in range(2)]
        need, weights = planned(largest), models.weights["student"]
    yield {
        "what": "train",
        "rank": rank,
        "optimizer": recipe.train.optimizer,
        "largest": largest,
        "tokens/s": 2 * largest / min(figure["seconds"] for figure in figures),
        "operations": flops.training(weights.multiplied, models.adapter, 1, recomputed=True),
        "peak": figures[-1]["peak"],
        "planned": (need.total - need.parts["context and libraries"]) / GIB,
        "reserved": figures[-1]["reserved"],
        "planned parts": {name: nbytes / GIB for name, nbytes in need.parts.items()},
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


def bisect(fits: Callable[[int], bool], unit: int, most: int, guess: int) -> int:
    """The largest multiple of `unit` up to `most` that fits, 0 for none; begins at a guess."""
    low, high = 0, most // unit
    middle = min(high, max(1, guess // unit))
    while low < high:
        low, high = (middle, high) if fits(middle * unit) else (low, middle - 1)
        middle = (low + high + 1) // 2
        if low and high - low > 4:  # the guess is mostly near
            middle = min(middle, low + 4)
    return low * unit


def family(shape: str, device: str, family: str) -> Iterator[dict[str, Any]]:
    """What redpen makes of a model: the layout of its rollouts, its scores, an update."""
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.scoring import ScoreOptions, sequences
    from pipeline.forward.packing_check import settle_layout
    from pipeline.models.load import load_model
    from pipeline.streaming.streamed import StreamedScorer

    made = SHAPES[family, shape]
    with tempfile.TemporaryDirectory() as directory:
        made.model(device).save_pretrained(directory)
        recipe = made.recipe(directory, lora_rank=32, gradient_checkpointing=True)
        cfg = recipe.student.model_copy(update={"device": device})
        model = load_model(cfg)
        n_tokens = min(16 * made.rollout_tokens, made.most_tokens)
        block = made.rollouts(n_tokens)
        yield {"what": "layout", "family": family, "found": settle_layout(model, *sequences(block, range(4)))}

        options = ScoreOptions(candidates=CANDIDATES, tile_tokens=n_tokens)
        scorer = ResidentScorer(model, options)
        scorer.compute_logprobs(block)
        synchronise(device)
        started = time.perf_counter()
        resident = scorer.compute_logprobs(block)
        seconds = time.perf_counter() - started
        yield {"what": "score", "family": family, "tokens": n_tokens, "tokens/s": n_tokens / seconds}

        streamed = StreamedScorer(cfg, options, memory_gib=CAP_GIB / 2 if shape == "full" else 1.0)
        streamed.settle_layout(*sequences(block, range(4)))
        difference = np.abs(streamed.compute_logprobs(block).logprobs - resident.logprobs)
        yield {"what": "streamed", "family": family, "different": int((difference > 0).sum()), "of": len(difference)}
        del streamed

        trainer = made.trainer(model, recipe.train)
        batch = made.batch(n_tokens)
        trainer.update(batch)
        synchronise(device)
        started = time.perf_counter()
        metrics = trainer.update(batch)
        synchronise(device)
        seconds = time.perf_counter() - started
    yield {
        "what": "update",
        "family": family,
        "tokens/s": n_tokens / seconds,
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
    }


def head(shape: str, device: str, form: str) -> Iterator[dict[str, Any]]:
    """Memory and time of one form of the head and the loss; not capped, since the naive one would not fit."""
    import torch

    from pipeline.models.peak_memory import PeakBytes

    model = SHAPES["dense", shape]
    vocabulary, hidden = model.vocab_size, model.make_config().hidden_size

    def made(rows: int) -> Any:
        return prepare(form, rows, hidden, min(1024, rows), vocabulary=vocabulary, device=device, dtype="bfloat16")

    made(32)()
    run = made(model.head_rows)
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
    yield {
        "what": "head",
        "form": form,
        "rows": model.head_rows,
        "GiB": peak / GIB,
        "ms": 1e3 * statistics.median(seconds),
    }


JOBS = {"train": train, "family": family, "head": head}


def tables(found: list[dict[str, Any]]) -> list[str]:
    """Markdown of what these jobs found, as lines."""

    def of(what: str) -> list[dict[str, Any]]:
        return [figure for figure in found if figure.get("what") == what]

    lines: list[str] = []
    rate = next((figure["TFLOPS"] for figure in of("matmul")), float("nan"))
    planned = {figure["rank"]: figure["largest"] for figure in of("plan")}
    if trained := of("train"):
        lines += [
            "| LoRA rank | optimizer | tokens a micro-batch, at most | by plan | tokens/s | of matmul | peak, GiB "
            f"| planned | error | reserved, of {CAP_GIB - CONTEXT_GIB:g} |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for figure in trained:
        if not figure["largest"]:
            lines.append(f"| {figure['rank']} | does not fit | 0 | {planned[figure['rank']]:,} | | | | | | |")
            continue
        speed, error = figure["tokens/s"], figure["planned"] / figure["peak"] - 1
        lines.append(
            f"| {figure['rank']} | {figure['optimizer']} | {figure['largest']:,} | {planned[figure['rank']]:,} | "
            f"{speed:,.0f} | {speed * figure['operations'] / rate / 1e12:.1%} | {figure['peak']:.3g} | "
            f"{figure['planned']:.3g} | {error:+.1%} | {figure['reserved']:.3g} |"
        )
    if scored := of("score"):
        lines += ["", "| family | layout | scored, tokens/s | streamed | update, tokens/s |", "|---|---|---|---|---|"]
    for figure in scored:
        name = figure["family"]
        layout, streamed, update = (
            next((f for f in of(what) if f["family"] == name), None) for what in ("layout", "streamed", "update")
        )
        same = "" if not streamed else f"{streamed['different']:,} of {streamed['of']:,} differ"
        lines.append(
            f"| {name} | {layout['found'] if layout else ''} | {figure['tokens/s']:,.0f} | "
            f"{same or '-'} | {format(update['tokens/s'], ',.0f') if update else '-'} |"
        )
    if heads := of("head"):
        lines += ["", "| head and loss, bf16 | rows | GiB | ms |", "|---|---|---|---|"]
    lines += [f"| {f['form']} | {f['rows']:,} | {f['GiB']:.3g} | {f['ms']:.1f} |" for f in heads]
    return lines

"""A 32B teacher scored under a cap, and the same model resident or offloaded by accelerate; run by benchmarks/gpu.py.

The model has the shape of Qwen3-32B and random bf16 weights: one layer is made and written 64 times, as safetensors
shards in host memory (65 GB in /dev/shm; if neither that nor the temporary directory is large enough, fewer layers
are written, which the figures show). Each way of scoring runs in a process of its own, whose memory on the device is
capped by torch.cuda.set_per_process_memory_fraction:

    resident      pipeline.engines.resident, not capped
    streamed      pipeline.streaming.streamed under 24 and 12 GiB, 0.9 of which is score.memory_gib; one tile alone,
                  then the batch
    accelerate    the resident scorer, layers offloaded to the CPU by from_pretrained(device_map=...), under the cap;
                  it moves the weights once for each tile, so it is given few tokens, and also one long tile

The batch is 65,536 tokens, rollouts of 256 + 768 in tiles of 8,192; tokens/s count prompts. A figure's `operations`
of a token are 2 for each weight of the layers, 4 for each query, key and channel, and 2 for each weight of the head
and response token. `peak` is what torch's allocator reserved at most; the cap leaves 0.75 GiB for the CUDA context.
Log-probs of the batch are compared with the resident model's.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30
CONTEXT_GIB = 0.75


class Shape:
    """A model, and how it is scored."""

    def __init__(self, name: str):
        tiny = name == "tiny"
        hidden, self.layers = (64, 4) if tiny else (5120, 64)
        self.config: dict[str, Any] = dict(
            hidden_size=hidden,
            intermediate_size=128 if tiny else 25_600,
            num_attention_heads=4 if tiny else 64,
            num_key_value_heads=2 if tiny else 8,
            head_dim=16 if tiny else 128,
            vocab_size=512 if tiny else 151_936,
            max_position_embeddings=40_960,
            tie_word_embeddings=False,
        )
        self.tile, self.prompt, self.response = (256, 16, 48) if tiny else (8192, 256, 768)
        self.caps = (0.5, 0.25) if tiny else (24, 12)
        self.accelerate_tiles = [(2 * self.tile, self.tile), (4 * self.tile, 4 * self.tile)]

    @property
    def tokens(self) -> int:
        """Of the batch that every way scores."""
        return 8 * self.tile

    def transformers_config(self, layers: int) -> Any:
        from transformers import Qwen3Config

        return Qwen3Config(
            **self.config, num_hidden_layers=layers, dtype="bfloat16", architectures=["Qwen3ForCausalLM"]
        )

    def fitting_layers(self, directory: Path) -> int:
        """As many layers as memory or disk at `directory` hold, and the host beside them."""
        layer, others = self.sizes()
        status = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line.split()[1] for line in status if line.startswith("MemAvailable:")))
        room = min(shutil.disk_usage(directory).free, available - 8 * GIB) - 2 * others - GIB
        return max(1, min(self.layers, room // (2 * layer)))

    def sizes(self) -> tuple[int, int]:
        """Parameters of a layer, and of everything else."""
        state = self.state(1)
        layer = sum(t.numel() for name, t in state.items() if ".layers." in name)
        return layer, sum(t.numel() for t in state.values()) - layer

    def state(self, layers: int) -> dict[str, Any]:
        import torch
        from transformers import Qwen3ForCausalLM

        with torch.device("meta"):
            return Qwen3ForCausalLM(self.transformers_config(layers)).state_dict()

    def operations(self, layers: int) -> float:
        """Of a token, on average."""
        in_layer, _ = self.sizes()
        rollout = self.prompt + self.response
        attention = 4 * self.config["num_attention_heads"] * self.config["head_dim"] * rollout / 2
        head = 2 * self.config["hidden_size"] * self.config["vocab_size"] * self.response / rollout
        return layers * (2 * in_layer + attention) + head

    def rollouts(self, tokens: int) -> Any:
        import cache_schema as cs

        rng = np.random.default_rng(0)
        rows = []
        for sample in range(tokens // (self.prompt + self.response)):
            ids = rng.integers(0, self.config["vocab_size"], self.response)
            rows.append(cs.RolloutRow(0, sample, ids, np.zeros(len(ids)), cs.FINISH_LENGTH))
        prompt = np.random.default_rng(1).integers(0, self.config["vocab_size"], self.prompt)
        return cs.RolloutBlock.from_rows([(0, prompt)], rows)


def write(shape: str, device: str, directory: str) -> Iterator[dict[str, Any]]:
    """One layer of random weights, under the names of each layer, and the weights outside."""
    import torch

    model, path, started = Shape(shape), Path(directory), time.perf_counter()
    layers = model.fitting_layers(path.parent)
    path.mkdir()
    model.transformers_config(layers).save_pretrained(path)

    def payload(tensors: dict[str, Any]) -> bytes:
        parts = []
        for tensor in tensors.values():
            values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
            values = values.normal_(std=0.02) if tensor.ndim > 1 else values.fill_(1.0)
            parts.append(values.cpu().view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def write_file(name: str, tensors: dict[str, Any], data: bytes) -> dict[str, str]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, tensor in tensors.items():
            start, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (path / name).open("wb", buffering=0) as file:
            for part in (len(text).to_bytes(8, "little"), text, data):
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
        return dict.fromkeys(tensors, name)

    torch.manual_seed(0)
    state = model.state(1)
    first = {name: tensor for name, tensor in state.items() if ".layers." in name}
    others = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    names = write_file("others.safetensors", others, payload(others))
    data = payload(first)

    def write_layer(index: int) -> dict[str, str]:
        renamed = {name.replace(".layers.0.", f".layers.{index}."): tensor for name, tensor in first.items()}
        return write_file(f"layer-{index:02}.safetensors", renamed, data)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for written in threads.map(write_layer, range(layers)):
            names |= written
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    n_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    yield {
        "what": "weights",
        "layers": layers,
        "of": model.layers,
        "GB": n_bytes / 1e9,
        "seconds": time.perf_counter() - started,
    }


def matmul(shape: str, device: str) -> Iterator[dict[str, Any]]:
    """Operations a second of a large bf16 product, the best of several."""
    import torch

    n, times = (8192, 10) if device == "cuda" else (256, 1)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(times):
            a @ b
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / times)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    yield {"what": "matmul", "device": name, "torch": torch.__version__, "TFLOPS": 2 * n**3 / best / 1e12}


def synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def cap_memory(device: str, gib: float | None) -> None:
    """Let this process have so much of the device, its CUDA context included."""
    import torch

    if device == "cuda" and gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - CONTEXT_GIB) * GIB / total))


def score(
    form: str, shape: str, device: str, directory: str, cap: float | None, out: str
) -> Iterator[dict[str, Any]]:
    """Time one way of scoring. The resident model's log-probs of the batch are left in `out`, for the others."""
    import torch

    from pipeline.config import ModelConfig
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.scoring import ScoreOptions
    from pipeline.forward.attention import register_packed_attention
    from pipeline.models import load as models
    from pipeline.streaming.streamed import StreamedScorer

    model, kept, started = Shape(shape), Path(out) / "resident.npy", time.perf_counter()
    cap_memory(device, cap)
    cfg = ModelConfig(model=directory, dtype="bfloat16", device=device)
    options = ScoreOptions(tile_tokens=model.tile)
    operations = model.operations(json.loads((Path(directory) / "config.json").read_text())["num_hidden_layers"])

    def loaded(**more: Any) -> dict[str, Any]:
        return {"what": "load", "form": form, "cap": cap, "seconds": time.perf_counter() - started, **more}

    def timed(scorer: Any, tokens: int, tile: int = model.tile, wave: int | None = None) -> dict[str, Any]:
        batch = model.rollouts(tokens)
        synchronise(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        scores = scorer.compute_logprobs(batch)
        seconds = time.perf_counter() - begun
        figure = {"what": "scored", "form": form, "cap": cap, "tokens": tokens, "tile": tile, "wave": wave}
        figure |= {"seconds": seconds, "tokens/s": tokens / seconds, "operations": operations}
        if device == "cuda":
            figure["peak"] = torch.cuda.max_memory_reserved() / GIB
        if tokens == model.tokens and tile == model.tile:
            if form == "resident":
                np.save(kept, scores.logprobs)
            elif kept.exists():
                difference = np.abs(scores.logprobs - np.load(kept))
                figure |= {"different": int((difference > 0).sum()), "of": len(difference)}
                figure["largest difference"] = float(difference.max())
        return figure

    if form == "streamed":
        scorer = StreamedScorer(cfg, options, memory_gib=None if cap is None else 0.9 * cap)
        yield loaded(wave=scorer.wave_tokens)
        yield timed(scorer, model.tile, wave=model.tile)
        yield timed(scorer, model.tokens, wave=min(scorer.wave_tokens, model.tokens))
    elif form == "resident":
        resident = ResidentScorer(models.load_model(cfg), options)
        yield loaded()
        timed(resident, model.tile)
        yield timed(resident, model.tokens)
    else:
        import accelerate
        from transformers import AutoModelForCausalLM

        register_packed_attention()
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        offloaded = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            attn_implementation="redpen_packed",
            device_map={**dict.fromkeys(parts, 0 if device == "cuda" else "cpu"), "model.layers": "cpu"},
        ).eval()
        yield loaded(version=accelerate.__version__)
        for tokens, tile in model.accelerate_tiles:
            yield timed(ResidentScorer(offloaded, ScoreOptions(tile_tokens=tile)), tokens, tile)


JOBS = {
    "matmul": matmul,
    "write": write,
    **{form: partial(score, form) for form in ("resident", "streamed", "accelerate")},
}


def tables(found: list[dict[str, Any]]) -> list[str]:
    """Markdown of what these jobs found, as lines."""
    scored = [figure for figure in found if figure.get("what") == "scored"]
    if not scored:
        return []
    rate = next((figure["TFLOPS"] for figure in found if figure.get("what") == "matmul"), float("nan"))
    batches = [f["tokens/s"] for f in scored if f["form"] == "resident"]
    resident = batches[0] if batches else float("nan")
    lines = [
        "",
        "| scored by | cap, GiB | tokens | tile | wave | tokens/s | x resident | of matmul | peak, GiB | log-probs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in scored:
        speed, same = f["tokens/s"], ""
        if "different" in f:
            same = f"{f['different']:,} of {f['of']:,} differ, by {f['largest difference']:.2g}"
        cells = [f["form"], f["cap"] or "-", f"{f['tokens']:,}", f"{f['tile']:,}", f["wave"] or "-", f"{speed:,.0f}"]
        cells += [f"{speed / resident:.3f}", f"{speed * f['operations'] / rate / 1e12:.1%}"]
        cells += [f"{f['peak']:.2f}" if "peak" in f else "-", same or "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    weights = next((figure for figure in found if figure.get("what") == "weights"), None)
    if weights:
        lines.append(f"\n{weights['layers']} of {weights['of']} layers, {weights['GB']:.1f} GB of weights")
    return lines

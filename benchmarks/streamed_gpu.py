"""A 32B teacher scored from a capped card, beside the same model resident and under accelerate's CPU offload.

    python benchmarks/streamed_gpu.py [--out DIR]                      # one CUDA device, about 8 minutes
    python benchmarks/streamed_gpu.py --shape tiny --device cpu        # does it run?

The model has the shape of Qwen3-32B and random bf16 weights: one layer is made and written 64 times, as safetensors
shards in host memory (65 GB in /dev/shm; where neither that nor the temporary directory is large enough, fewer layers
are, which is said). Each way of scoring runs in a process of its own, its share of the card capped by
torch.cuda.set_per_process_memory_fraction:

    resident      pipeline.engines.resident, not capped
    streamed      pipeline.streaming.streamed under 24 and 12 GiB, 0.9 of which is score.memory_gib, at several waves
    accelerate    the resident scorer, layers offloaded to the CPU by from_pretrained(device_map=...), under the cap;
                  it moves the weights once for each tile, so it is given few tokens, and also one long tile

Rollouts of 256 + 768 tokens in tiles of 8,192; tokens/s count prompts. `share` is of the bf16 matmul rate measured in
the same run, from 2 operations for each weight of the layers and token, 4 for each query, key and channel, and 2 for
each weight of the head and response token. `peak` is what torch's allocator reserved at most; the cap leaves 0.75 GiB
for the CUDA context. Log-probs are compared with the resident model's. One JSON line for each figure, then a table;
both are in --out too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
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
        self.waves = [self.tile * n for n in (1, 2, 4, 8, 16)]
        self.caps = [0.5, 0.25] if tiny else [24, 12]
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


# -- what runs in processes of its own -----------------------------------------------------------------------


def write_model(shape: Shape, directory: Path, layers: int, device: str) -> Iterator[dict[str, Any]]:
    """One layer of random weights, under the names of each layer, and the weights outside."""
    import torch

    directory.mkdir(parents=True)
    shape.transformers_config(layers).save_pretrained(directory)
    started = time.perf_counter()

    def payload(tensors: dict[str, Any]) -> bytes:
        parts = []
        for tensor in tensors.values():
            values = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
            values = values.normal_(std=0.02) if tensor.ndim > 1 else values.fill_(1.0)
            parts.append(values.cpu().view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def write(name: str, tensors: dict[str, Any], data: bytes) -> dict[str, str]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, tensor in tensors.items():
            start, end = end, end + 2 * tensor.numel()
            header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / name).open("wb", buffering=0) as file:
            for part in (len(text).to_bytes(8, "little"), text, data):
                view = memoryview(part)
                while view:
                    view = view[file.write(view) :]
        return dict.fromkeys(tensors, name)

    torch.manual_seed(0)
    state = shape.state(1)
    first = {name: tensor for name, tensor in state.items() if ".layers." in name}
    others = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    names = write("others.safetensors", others, payload(others))
    data = payload(first)

    def write_layer(index: int) -> dict[str, str]:
        renamed = {name.replace(".layers.0.", f".layers.{index}."): tensor for name, tensor in first.items()}
        return write(f"layer-{index:02}.safetensors", renamed, data)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for written in threads.map(write_layer, range(layers)):
            names |= written
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    n_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    yield {"what": "model", "layers": layers, "GB": n_bytes / 1e9, "seconds": time.perf_counter() - started}


def matmul_rate(device: str) -> Iterator[dict[str, Any]]:
    """Operations a second of a large bf16 product, the best of several."""
    import torch

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronise(device)
        started = time.perf_counter()
        for _ in range(10 if device == "cuda" else 1):
            a @ b
        synchronise(device)
        best = min(best, (time.perf_counter() - started) / (10 if device == "cuda" else 1))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    yield {"what": "matmul", "device": name, "torch": torch.__version__, "TFLOPS": 2 * n**3 / best / 1e12}


def synchronise(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def score(
    form: str, shape: Shape, directory: Path, device: str, cap: float | None, out: Path
) -> Iterator[dict[str, Any]]:
    """Time one way of scoring; saves the log-probs of the batch that all of them score."""
    import torch

    from pipeline.config import ModelConfig
    from pipeline.engines.resident import ResidentScorer
    from pipeline.engines.scoring import ScoreOptions
    from pipeline.forward.attention import register_packed_attention
    from pipeline.models import load as models
    from pipeline.streaming.streamed import StreamedScorer

    if device == "cuda" and cap is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - CONTEXT_GIB) * GIB / total))
    cfg = ModelConfig(model=str(directory), dtype="bfloat16", device=device)
    options = ScoreOptions(tile_tokens=shape.tile)
    started = time.perf_counter()

    def timed(scorer: Any, tokens: int, tile: int = shape.tile, keep: bool = False) -> dict[str, Any]:
        batch = shape.rollouts(tokens)
        synchronise(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        scores = scorer.compute_logprobs(batch)
        seconds = time.perf_counter() - begun
        if keep:
            np.save(out / f"{form}-{cap or 0:g}.npy", scores.logprobs)
        on_cuda = device == "cuda"
        return {
            "what": form,
            "cap": cap,
            "tile": tile,
            "tokens": tokens,
            "seconds": seconds,
            "tokens/s": tokens / seconds,
            "peak": torch.cuda.max_memory_reserved() / GIB if on_cuda else None,
            "allocated": torch.cuda.max_memory_allocated() / GIB if on_cuda else None,
        }

    if form == "streamed":
        scorer = StreamedScorer(cfg, options, memory_gib=None if cap is None else 0.9 * cap)
        longest = scorer.wave_tokens
        yield {"what": "load", "form": form, "cap": cap, "seconds": time.perf_counter() - started, "wave": longest}
        timed(scorer, shape.tile)
        for wave in sorted({*(wave for wave in shape.waves if wave < longest), min(longest, shape.waves[-1])}):
            scorer.wave_tokens = wave
            yield timed(scorer, wave // shape.tile * shape.tile) | {"wave": wave}
        scorer.wave_tokens = longest
        yield timed(scorer, shape.tokens, keep=True) | {"wave": min(longest, shape.tokens), "batch": True}
    elif form == "resident":
        resident = ResidentScorer(models.load_model(cfg), options)
        yield {"what": "load", "form": form, "cap": cap, "seconds": time.perf_counter() - started}
        timed(resident, shape.tile)
        yield timed(resident, shape.tokens, keep=True) | {"batch": True}
    else:
        import accelerate
        from transformers import AutoModelForCausalLM

        register_packed_attention()
        parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            attn_implementation="redpen_packed",
            device_map={**dict.fromkeys(parts, 0 if device == "cuda" else "cpu"), "model.layers": "cpu"},
        ).eval()
        yield {
            "what": "load",
            "form": f"accelerate {accelerate.__version__}",
            "cap": cap,
            "seconds": time.perf_counter() - started,
        }
        for tokens, tile in shape.accelerate_tiles:
            yield timed(ResidentScorer(model, ScoreOptions(tile_tokens=tile)), tokens, tile)


# -- the parent ----------------------------------------------------------------------------------------------


def fitting_layers(shape: Shape, directory: Path) -> int:
    """As many layers as memory or disk below `directory` hold, and the host beside them."""
    layer, others = shape.sizes()
    free = shutil.disk_usage(directory).free
    status = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line.split()[1] for line in status if line.startswith("MemAvailable:")))
    room = min(free, available - 8 * GIB) - 2 * others - GIB
    return max(1, min(shape.layers, room // (2 * layer)))


class Runner:
    """Runs the forms within the time that is left, and keeps what they measured."""

    def __init__(self, options: argparse.Namespace, out: Path):
        self._options, self._out = options, out
        self._deadline = time.monotonic() + 60 * options.minutes
        self.found: list[dict[str, Any]] = []

    def note(self, entry: dict[str, Any]) -> None:
        self.found.append(entry)
        line = json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in entry.items()})
        print(line, flush=True)
        with (self._out / "streamed_gpu.jsonl").open("a") as file:
            print(line, file=file)

    def run(self, what: str, **arguments: Any) -> None:
        """One form in its own process; what goes wrong in it, and a lack of time, become a note."""
        job = {"what": what, "shape": self._options.shape, "device": self._options.device, **arguments}
        command = [sys.executable, __file__, "--child", json.dumps(job)]
        left = self._deadline - time.monotonic()
        cap = arguments.get("cap")
        if left < 20:
            self.note({"what": "skipped", "form": what, "cap": cap, "why": "no time left"})
            return
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                output, _ = process.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
            errors.seek(0)
            said = errors.read()
        for line in output.splitlines():
            if line.startswith("{"):
                self.note(json.loads(line))
        print(
            said if process.returncode else "".join(x + "\n" for x in said.splitlines() if "streamed to" in x), end=""
        )
        if process.returncode:
            why = "no time left" if process.returncode < 0 else said.strip().splitlines()[-1]
            self.note({"what": "failed", "form": what, "cap": cap, "why": why})


def table(shape: Shape, layers: int, found: list[dict[str, Any]], out: Path) -> str:
    """Markdown."""
    rate = next((entry["TFLOPS"] for entry in found if entry["what"] == "matmul"), float("nan"))
    resident = next((e["tokens/s"] for e in found if e["what"] == "resident" and "tokens/s" in e), float("nan"))
    lines = [
        "| | cap, GiB | tokens | tile | wave | tokens/s | x resident | share of matmul | peak, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for e in found:
        if "tokens/s" not in e:
            continue
        share = e["tokens/s"] * shape.operations(layers) / rate / 1e12
        cells = [e["what"], e["cap"] or "-", e["tokens"], e["tile"], e.get("wave", "-"), f"{e['tokens/s']:,.0f}"]
        cells += [f"{e['tokens/s'] / resident:.3f}", f"{share:.1%}", f"{e['peak']:.2f}" if e["peak"] else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        f"\n{e['form']} ({e['cap'] or 'no'} cap): {e['why']}" for e in found if e["what"] in ("skipped", "failed")
    ]
    expected = out / "resident-0.npy"
    for scores in sorted(out.glob("streamed-*.npy")) if expected.exists() else []:
        difference = np.abs(np.load(scores) - np.load(expected))
        verdict = f"{(difference > 0).mean():.1%} differ" if difference.any() else "equal bits"
        lines.append(
            f"\n{scores.stem} GiB against resident: {len(difference):,} log-probs, largest difference "
            f"{difference.max():.3g} nats, {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("qwen3-32b", "tiny"), default="qwen3-32b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--directory", type=Path, help="where the model is written; default: /dev/shm or temporary")
    parser.add_argument(
        "--out", type=Path, default=os.environ.get("OUT"), help="where figures are left; default: $OUT"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="start nothing after, and kill what still runs")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = options.child
        shape, device, directory = Shape(job["shape"]), job["device"], Path(job.get("directory", "."))
        if job["what"] == "write":
            results = write_model(shape, directory, job["layers"], device)
        elif job["what"] == "matmul":
            results = matmul_rate(device)
        else:
            results = score(job["what"], shape, directory, device, job["cap"], Path(job["out"]))
        for entry in results:
            print(json.dumps(entry), flush=True)
        return

    shape = Shape(options.shape)
    places = [options.directory] if options.directory else [Path("/dev/shm"), Path(tempfile.gettempdir())]
    layers, place = max(((fitting_layers(shape, place), place) for place in places), key=lambda found: found[0])
    with tempfile.TemporaryDirectory() as unkept, tempfile.TemporaryDirectory(dir=place) as folder:
        out = options.out or Path(unkept)
        out.mkdir(parents=True, exist_ok=True)
        model = str(Path(folder) / "model")
        runner = Runner(options, out)
        if layers < shape.layers:
            runner.note(
                {"what": "note", "why": f"{layers} of {shape.layers} layers, all that {options.directory} holds"}
            )
        runner.run("matmul")
        runner.run("write", directory=model, layers=layers)
        scoring = {"directory": model, "out": str(out)}
        runner.run("streamed", cap=shape.caps[0], **scoring)
        runner.run("resident", cap=None, **scoring)
        runner.run("streamed", cap=shape.caps[1], **scoring)
        runner.run("accelerate", cap=shape.caps[0], **scoring)
        text = table(shape, layers, runner.found, out)
        print(text)
        (out / "streamed_gpu.md").write_text(text + "\n")


if __name__ == "__main__":
    main()

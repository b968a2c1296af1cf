"""A report of 10,000 rollouts of 500 tokens: seconds, memory, size of the page, and how fast it answers in Chromium.

    pip install playwright; apt install chromium
    python benchmarks/report_scale.py [--rollouts 10000] [--tokens 500] [--work DIR]

The text is Python's own library in a vocabulary of 32,000 tokens made for it; K = 8 candidates with made-up
log-probs: most tokens are nearly certain, at 2 % the teacher prefers another token. Latency is from an input to the
end of the next frame after it was handled; the highest of each kind counts. Bounds: 40 MB and 100 ms.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cache_schema as cs
from pipeline.models.identity import tokenizer_digest

VOCABULARY, K, SAMPLES, PROMPTS_PER_BLOCK, CORPUS_BYTES = 32_000, 8, 4, 64, 12_000_000
SOURCES = ("algebra", "code", "geometry", "logic", "writing")
MOST_BYTES, MOST_MS = 40_000_000, 100
RECIPE = """
[student]
model = "{tokenizer}"
[teacher]
model = "{tokenizer}"
[prompts]
path = "toy:train"
[eval]
answer_pattern = '(\\w+)\\W*$'
"""


def corpus() -> str:
    """Source text of Python's standard library."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts and size < CORPUS_BYTES:
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(parts[-1])
    return "\n".join(parts)


def make_tokenizer(text: str, path: Path) -> Any:
    """A byte-level BPE vocabulary of the text, with a stop token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(path)
    return fast


def scores(rng: np.random.Generator, ids_T: np.ndarray) -> tuple[cs.ScoreBlock, cs.ScoreBlock]:
    """Student and teacher at K candidates and a rest."""
    n = len(ids_T)
    others = np.sort(rng.integers(0, VOCABULARY // K, (n, K - 1)) + np.arange(K - 1) * (VOCABULARY // K), axis=1)
    others = np.where(others == ids_T[:, None], VOCABULARY - 1 - np.arange(K - 1), others)
    candidate_ids = np.concatenate([ids_T[:, None], others], axis=1).astype(np.int32)
    logits = rng.normal(0, 1.5, (n, K + 1))
    logits[:, 0] += rng.exponential(6, n)
    shift = rng.normal(0, 0.15, (n, K + 1))
    disagrees = rng.random(n) < 0.02
    shift[disagrees] = rng.normal(0, 4, (int(disagrees.sum()), K + 1))
    student, teacher = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, logits + shift))

    def block(logprobs: np.ndarray, **more: Any) -> cs.ScoreBlock:
        recorded = logprobs.astype(np.float32)
        entropy = (-(np.exp(logprobs) * logprobs).sum(1)).astype(np.float32)
        rest, own = np.ascontiguousarray(recorded[:, K]), np.ascontiguousarray(recorded[:, 0])
        return cs.ScoreBlock(own, entropy, np.ascontiguousarray(recorded[:, :K]), rest, **more)

    return block(student, candidate_ids=candidate_ids, sampling_logprobs=student[:, 0].astype(np.float32)), block(
        teacher
    )


def make_cache(work: Path, n_rollouts: int, n_tokens: int) -> None:
    """WORK/cache.zarr, and WORK/recipe.toml that knows half of the answers to be right."""
    text, rng = corpus(), np.random.default_rng(0)
    tokenizer = make_tokenizer(text, work / "tokenizer")
    stream = np.array(tokenizer(text, return_attention_mask=False)["input_ids"], np.int32)
    (work / "recipe.toml").write_text(RECIPE.format(tokenizer=work / "tokenizer"))
    n_prompts = n_rollouts // SAMPLES
    starts = rng.integers(0, len(stream) - n_tokens, (n_prompts, SAMPLES))
    responses = [[np.append(stream[at : at + n_tokens - 1], 0) for at in row] for row in starts]
    records = []
    for index, row in enumerate(responses):
        found = re.findall(r"\w+", tokenizer.decode(row[index % SAMPLES][-40:-1]))
        answer = found[-1] if found and index % 2 else "none"
        source = SOURCES[index % len(SOURCES)]
        records.append({"prompt": f"Question {index}: what comes next?", "answer": answer, "source": source})
    model = cs.ModelIdentity("student", None, "0" * 32)
    identity = cs.TokenizerIdentity(str(work / "tokenizer"), tokenizer_digest(tokenizer), VOCABULARY)
    manifest = cs.RoundManifest(
        student=model,
        tokenizer=identity,
        template={"kind": "none"},
        stop_token_ids=(0,),
        temperature=1.0,
        top_p=1.0,
        rollouts_per_prompt=SAMPLES,
        max_prompt_tokens=64,
        max_response_tokens=n_tokens,
        prompts_per_block=PROMPTS_PER_BLOCK,
        seed=0,
        engine="made up",
        prompts_sha256=cs.prompts_sha256(records),
        n_prompts=n_prompts,
        vocab_size=VOCABULARY,
    )
    round_ = cs.create(work / "cache.zarr").start_round(manifest, records)
    groups = [
        round_.start_scores(
            name,
            cs.ScoresManifest(
                role=role,
                model=model,
                tokenizer=identity,
                template={"kind": "none"},
                dtype="float32",
                quantisation=None,
                engine="made up",
                tile_tokens=8192,
                vocab_size=VOCABULARY,
                candidate_kind="topk",
                candidates=K,
                sampling_temperature=1.0 if role == "student" else None,
            ),
        )
        for name, role in ((cs.STUDENT, "student"), ("teacher", "teacher"))
    ]
    for block in range(round_.n_blocks):
        prompts = manifest.block_prompts(block)
        ids = [(index, tokenizer(records[index]["prompt"])["input_ids"]) for index in prompts]
        rows = [
            cs.RolloutRow(place, sample, responses[index][sample], np.zeros(n_tokens), cs.FINISH_STOP)
            for place, index in enumerate(prompts)
            for sample in range(SAMPLES)
        ]
        rollouts = cs.RolloutBlock.from_rows(ids, rows)
        round_.rollouts.write(block, rollouts)
        for group, scored in zip(groups, scores(rng, rollouts.token_ids), strict=True):
            group.write(block, scored)


def make_page(work: Path) -> Path:
    """The page by the command; prints seconds, peak memory and size."""
    page = work / "report.html"
    command = [sys.executable, "-m", "pipeline", "report", str(work / "cache.zarr"), "-o", str(page)]
    started = time.perf_counter()
    subprocess.run([*command, "--recipe", str(work / "recipe.toml")], check=True, stderr=subprocess.DEVNULL)
    seconds, size = time.perf_counter() - started, page.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    fits = ok(size < MOST_BYTES)
    print(f"redpen report: {seconds:.1f} s, peak memory {peak:.2f} GiB, page {size / 1e6:.1f} MB {fits}")
    return page


def ok(holds: bool) -> str:
    return "(ok)" if holds else "(MISSED)"


# ------------------------------------------------------------------------------------------------------------ browser

#: Keeps, by name of the event, milliseconds from the input to the end of the next frame, and every task of 50 ms.
LISTEN = """() => {
  window.measured = [];
  const channel = () => new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = done;
    port2.postMessage(0);
  });
  const after = (event) => requestAnimationFrame(() => channel().then(
    () => window.measured.push([event.type, performance.now() - event.timeStamp])));
  for (const type of ["input", "click", "keydown", "pointerover", "wheel"])
    addEventListener(type, after, { capture: true, passive: true });
  new PerformanceObserver((list) => list.getEntries().forEach((e) => window.measured.push(["task", e.duration])))
    .observe({ type: "longtask" });
}"""


def inputs(page: Any) -> Iterator[tuple[str, str]]:
    """Does everything that a reader does, a few times each; yields what was done and the event that does it."""
    for wanted in ("wrong", "right", "", "wrong", ""):
        page.select_option("#right", wanted)
        yield "filter", "input"
    for wanted in (*SOURCES[:2], ""):
        page.select_option("#source", wanted)
        yield "filter", "input"
    for wanted in ("worst", "mean", "length", "number", ""):
        page.select_option("#sort", wanted)
        yield "sort", "input"
    page.focus("#q")
    for letter in "import":
        page.keyboard.press(letter)
        yield "find", "input"
    page.fill("#q", "")
    yield "find", "input"
    for _ in range(5):
        page.locator("#list .item").nth(3).click()
        yield "open by click", "click"
    page.keyboard.press("Escape")
    page.focus("#scroll")
    for key in ("j", "j", "j", "k", "j"):
        page.keyboard.press(key)
        yield "open by key", "keydown"
    for _ in range(5):
        page.keyboard.press("n")
        yield "next mark", "keydown"
    page.hover("#scroll")
    for _ in range(10):
        page.mouse.wheel(0, 700)
        yield "scroll", "wheel"
    tokens = page.locator("#reader .t")
    for at in range(0, 60, 6):
        tokens.nth(at).hover()
        yield "hover", "pointerover"


def measure(page_file: Path) -> None:
    """Open the page in headless Chromium; prints how long it takes to open, and latencies."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium on PATH: latency is not measured")
        return
    found: dict[str, list[float]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        started = time.perf_counter()
        page.goto(page_file.resolve().as_uri())
        page.wait_for_selector("#list .item")
        print(f"opened in {time.perf_counter() - started:.1f} s")
        page.evaluate(LISTEN)
        for done, event in inputs(page):
            page.wait_for_timeout(150)  # one input at a time
            entries = page.evaluate("() => window.measured.splice(0)")
            found.setdefault(done, []).append(max((ms for name, ms in entries if name == event), default=0.0))
            found.setdefault("longest task", []).append(
                max((ms for name, ms in entries if name == "task"), default=0.0)
            )
        browser.close()
    print(f"{'input to next frame, ms':26}{'times':>7}{'median':>9}{'most':>9}")
    for done, times in found.items():
        held = ok(max(times) < MOST_MS)
        print(f"{done:26}{len(times):7}{sorted(times)[len(times) // 2]:9.0f}{max(times):9.0f}  {held}")
    print(f"errors on the console: {errors or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--work", type=Path, help="where cache and page go, or are from an earlier run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "cache.zarr").exists():
            make_cache(work, arguments.rollouts, arguments.tokens)
        measure(make_page(work))


if __name__ == "__main__":
    main()

"""What only a GPU can show, in one call of at most nine minutes.

    python benchmarks/gpu.py --out DIR [--student DIR]                # make gpu OUT=DIR STUDENT=DIR; one CUDA device
    python benchmarks/gpu.py --out DIR --shape tiny --device cpu      # does it run?
    python benchmarks/gpu.py --out DIR --parts head,accelerate        # some parts only

The parts, in this order:

    tests        pytest -m gpu
    train        a step of LoRA training, Qwen3-8B shape under 24 GiB, rank 32 and 128 (benchmarks/train_gpu.py)
    streamed     scoring, Qwen3-32B shape: streamed under 24 and 12 GiB, and resident (benchmarks/streamed_gpu.py)
    families     a hybrid (Qwen3.5) and a model inside a multimodal one (Gemma 3): layout check, scoring, a step
    student      pytest -m real: every stage with real weights, SmolLM2-135M-Instruct in --student
    head         the head and the loss alone, beside the naive form
    accelerate   the 32B shape by transformers with accelerate's CPU offload, under 24 GiB

Each step of a part runs in a process of its own, which is killed at its limit, so a hang loses that step alone. The
limit is the time that is left less what the later steps are to have; `head` and `accelerate` run only in time that
the others leave. DIR has three files: results.jsonl, a figure a line, written as they come; summary.md, written again
after every step; and log.txt. Exit code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamed_gpu
import train_gpu

ROOT = Path(__file__).resolve().parent.parent
Figure = dict[str, Any]
#: A child that would have less time is not started.
LEAST_SECONDS = 5.0
PYTEST = (sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=short")


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        seconds: what it is to have, whatever happens before it.
        job: for `run_job`; or `command`, a command line of its own.
        unable: why it cannot run here at all.
    """

    part: str
    name: str
    seconds: float
    job: Figure = field(default_factory=dict)
    command: tuple[str, ...] = ()
    unable: str = ""


def steps(shape: str, device: str, model: str, scores: str, student: Path | None = None) -> list[Step]:
    """All steps in order.

    Args:
        model: a directory that does not exist yet, for the weights that are streamed.
        scores: a directory for the log-probs of the resident model, to compare others with.
    """
    common = {"shape": shape, "device": device}

    def scored(form: str, cap: float | None = None) -> Figure:
        return common | {"what": form, "directory": model, "cap": cap, "out": scores}

    files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    wide, narrow = streamed_gpu.Shape(shape).caps
    real = "" if student else "needs --student (make gpu STUDENT=), a directory with SmolLM2-135M-Instruct"
    return [
        Step("tests", "tests", 120, command=(*PYTEST, "-m", "gpu", *files)),
        Step("train", "matmul", 15, common | {"what": "matmul"}),
        Step("train", "LoRA r32", 70, common | {"what": "train", "rank": 32}),
        Step("train", "LoRA r128", 50, common | {"what": "train", "rank": 128}),
        Step("streamed", "weights", 35, common | {"what": "write", "directory": model}),
        Step("streamed", "resident", 45, scored("resident")),
        Step("streamed", f"streamed, {wide} GiB", 50, scored("streamed", wide)),
        Step("streamed", f"streamed, {narrow} GiB", 35, scored("streamed", narrow)),
        Step("families", "hybrid", 35, common | {"what": "family", "family": "hybrid"}),
        Step("families", "multimodal", 30, common | {"what": "family", "family": "multimodal"}),
        Step("student", "student", 40, command=(*PYTEST, "-m", "real", "tests/test_real.py"), unable=real),
        Step("head", "head, redpen", 0, common | {"what": "head", "form": "redpen"}),
        Step("head", "head, naive", 0, common | {"what": "head", "form": "naive"}),
        Step("accelerate", "accelerate", 0, scored("accelerate", wide)),
    ]


def run_job(job: Figure) -> Iterator[Figure]:
    """What a step finds."""
    job = dict(job)
    jobs = train_gpu.JOBS | streamed_gpu.JOBS
    return jobs[job.pop("what")](**job)


class Results:
    """Runs steps and keeps what they find.

    Attributes:
        found: figures, each with the name of its `step`, and an entry with `ended` for every step.
    """

    def __init__(self, out: Path, about: str, student: Path | None = None):
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._about, self._student = out, about, student
        self.found: list[Figure] = []
        for name in ("results.jsonl", "log.txt"):
            (out / name).write_text("")

    def run(self, step: Step, limit: float) -> None:
        """One step, for at most `limit` seconds."""
        if step.unable:
            return self._end(step, 0.0, "did not run: " + step.unable)
        if limit < LEAST_SECONDS:
            return self._end(step, 0.0, "did not run: no time left")
        command = step.command or (sys.executable, __file__, "--child", json.dumps(step.job))
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self._student:
            environment["REDPEN_REAL_STUDENT"] = str(self._student.resolve())
        begun, killed, said = time.monotonic(), threading.Event(), ""
        with (self._out / "log.txt").open("a+") as log:
            print(f"== {step.name}", file=log, flush=True)
            start = log.tell()
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # a group of its own, to be killed as a whole
            ) as process:

                def kill() -> None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)

                timer = threading.Timer(limit, lambda: (killed.set(), kill()))
                timer.start()
                try:
                    assert process.stdout is not None
                    for line in process.stdout:
                        if line.startswith("{"):
                            self._note({"step": step.name, **json.loads(line)})
                        else:
                            print(line, end="", file=log, flush=True)
                            said = line.strip() or said
                    process.wait()
                finally:
                    timer.cancel()
                    kill()  # what it left running, too
            log.seek(start)
            tail = [line.rstrip() for line in log if line.strip()][-12:]
        seconds = time.monotonic() - begun
        if killed.is_set():
            self._end(step, seconds, f"failed: killed at its limit of {limit:.0f} s", tail)
        elif process.returncode:
            self._end(step, seconds, f"failed: {tail[-1] if tail else 'no message'}", tail)
        else:
            self._end(step, seconds, said if step.command else "done")

    def _end(self, step: Step, seconds: float, how: str, tail: Sequence[str] = ()) -> None:
        self._note({"step": step.name, "ended": how, "seconds": seconds, **({"tail": tail} if tail else {})})
        (self._out / "summary.md").write_text(summary(self.found, self._about))

    def _note(self, figure: Figure) -> None:
        self.found.append(figure)
        line = json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in figure.items()})
        print(line, flush=True)
        with (self._out / "results.jsonl").open("a") as file:
            print(line, file=file)

    @property
    def failed(self) -> bool:
        return any(figure.get("ended", "").startswith("failed") for figure in self.found)


def summary(found: list[Figure], about: str) -> str:
    """Markdown."""
    ended = [figure for figure in found if "ended" in figure]
    devices = [f"{f['device']}, torch {f['torch']}, {f['TFLOPS']:,.3g} TFLOPS" for f in found if "TFLOPS" in f]
    lines = [about, *devices, "", "| step | seconds | |", "|---|---|---|"]
    lines += [f"| {f['step']} | {f['seconds']:.0f} | {f['ended']} |" for f in ended]
    for figure in ended:
        if "tail" in figure:
            lines += ["", f"{figure['step']}:", "", *(f"    {line}" for line in figure["tail"])]
    return "\n".join([*lines, "", *train_gpu.tables(found), *streamed_gpu.tables(found)]) + "\n"


def roomiest() -> Path:
    """Where most weights can be written: host memory, or the temporary directory."""
    places = [place for place in (Path("/dev/shm"), Path(tempfile.gettempdir())) if os.access(place, os.W_OK)]
    return max(places, key=lambda place: shutil.disk_usage(place).free)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the results")
    parser.add_argument("--student", type=Path, help="SmolLM2-135M-Instruct, as transformers saves it")
    parser.add_argument("--shape", choices=["full", "tiny"], default="full")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything [default: 9]")
    parser.add_argument("--parts", help="parts, or single steps, to run, with commas between [default: all]")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for figure in run_job(options.child):
            print(json.dumps(figure), flush=True)
        return 0
    if not options.out:
        parser.error("--out: expected a directory for the results")
    if options.student and not (options.student / "config.json").is_file():
        parser.error(f"--student: expected a directory with a config.json, {options.student} has none")

    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no CUDA device; `--device cpu --shape tiny` only tries the program")

    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the weights are removed
    with tempfile.TemporaryDirectory(dir=roomiest()) as folder, tempfile.TemporaryDirectory() as scores:
        planned = steps(options.shape, options.device, f"{folder}/model", scores, options.student)
        if options.parts:
            parts = options.parts.split(",")
            known = dict.fromkeys(name for step in planned for name in (step.part, step.name))
            if unknown := set(parts) - set(known):
                parser.error(f"--parts: expected some of {', '.join(known)}, got {', '.join(unknown)}")
            if "accelerate" in parts and "streamed" not in parts:
                parts.append("weights")  # which it needs
            planned = [step for step in planned if {step.part, step.name} & set(parts)]
        results = Results(options.out, f"{options.shape} shapes on {options.device}", options.student)
        for number, step in enumerate(planned, 1):
            later = sum(after.seconds for after in planned[number:])
            results.run(step, deadline - time.monotonic() - later)
    print(summary(results.found, ""))
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())

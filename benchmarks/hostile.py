"""Damage everything that redpen reads from outside, run its commands on it, and see what they make of it.

    python benchmarks/hostile.py [--tries 2000] [--seed 0] [--family NAME ...] [--only N] [--keep DIR]

The toy pipeline is run once, small. Each try copies what it left, damages one thing, runs a command, and is one of:

    right      exit code 0, and the result is the undisturbed one, or the damage is another valid value
    refused    exit code 1 or 2 with one line that says why (`verify`: with findings)
    traceback  an exception left `main`, a signal ended the process, or a thread died
    hang       10 s of CPU time, or nothing done any more
    memory     1 GB more than the undisturbed command
    silent     exit code 0 and no warning, but another result; `verify` found nothing though something is wrong
    other      control characters or a secret shown or stored, a file outside or of a finished run changed, no line or
               several for an error

Prints a line for every fault, how to repeat it included, and a table; exits with 1 if there is any fault. Commands run
in forks of this process, which has imported everything: a try takes half a second. About 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

for _name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("REDPEN_API_KEY", "OPENAI_API_KEY"):
    os.environ.pop(_name, None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import hostile_inputs as inputs
import numpy as np
import pyarrow as pa
from hostile_inputs import ESCAPES, Damage
from pyarrow import parquet

import cache_schema as cs
from pipeline import cli

CPU_SECONDS, IDLE_SECONDS, WALL_SECONDS = 10, 8.0, 40.0
MORE_MEMORY = 2**30
MOST_ADDRESSES = 2**32  # beyond what the process has: the machine outlives what the commands do
LONGEST_LINE = 2000  # characters of an error's line
OUTCOMES = ("right", "refused", "traceback", "hang", "memory", "silent", "other")
SECRET = "S3cr3tT0ken"

SETTINGS = (
    "prompts.limit=8",
    "rollouts.rollouts_per_prompt=2",
    "rollouts.prompts_per_block=4",
    "rollouts.max_response_tokens=16",
    "rollouts.entry_prompts=0",
    "score.candidates=4",
    "score.server_retries=1",
    "score.server_timeout=3",
    "train.steps=4",
    "train.prompts_per_step=4",
    "train.lora_rank=2",
    "train.lora_alpha=2",
    "train.checkpoint_every=1",
    "train.stop_reverse_kl=0",
    "eval.limit=2",
    "eval.candidates=8",
    "eval.reread_rollouts=4",
)
ROUND = Path("c.zarr/rounds/00000")


# ------------------------------------------------------------------------------------------------------------ commands


def stdout(directory: Path, out: str) -> Any:
    """What was printed, without times, rates and sizes on disk."""
    return re.sub(r"[\d.,]+ ?([KMG]i?B|B|s|[a-z]+/s)\b", "#", out)


def contents(path: str) -> Callable[[Path, str], Any]:
    """Digests of everything a cache holds, without who wrote it and when."""

    def read(directory: Path, out: str) -> Any:
        found: dict[str, Any] = {}
        cache = cs.open(directory / path)
        for index in cache.round_indices():
            round_ = cache.round(index)
            found[f"{index} prompts"] = [json.dumps(round_.prompts[i]) for i in range(len(round_.prompts))]
            for group in [round_.rollouts, *(round_.scores(name) for name in round_.scorer_names())]:
                for block in range(group.n_blocks):
                    if group.is_committed(block):
                        record = group.read(block)
                        names = [each.name for each in dataclasses.fields(record)]
                        arrays = {name: getattr(record, name) for name in names}
                        found[f"{index} {group.name} {block}"] = {
                            name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
                            for name, array in arrays.items()
                            if array is not None
                        }
        return found

    return read


def file(path: str) -> Callable[[Path, str], Any]:
    """Digest of a file that was written."""
    return lambda directory, out: hashlib.sha256((directory / path).read_bytes()).hexdigest()


def table(path: str) -> Callable[[Path, str], Any]:
    return lambda directory, out: hashlib.sha256(
        json.dumps(parquet.read_table(directory / path).to_pydict(), default=str).encode()
    ).hexdigest()


def figures(path: str) -> Callable[[Path, str], Any]:
    """A file of figures, without seconds."""
    return lambda directory, out: {
        key: value for key, value in json.loads((directory / path).read_text()).items() if key != "seconds"
    }


@dataclass(frozen=True)
class Command:
    """Commands of redpen, one after the other, and how to see what came out: `result(directory, stdout)`."""

    arguments: tuple[str, ...]
    result: Callable[[Path, str], Any] = stdout
    then: tuple[tuple[str, ...], ...] = ()
    reads_only: bool = False

    @property
    def all(self) -> tuple[tuple[str, ...], ...]:
        return (self.arguments, *self.then)

    def __str__(self) -> str:
        return (
            " && ".join(
                "redpen " + " ".join(part if len(part) < 80 else part[:77] + "..." for part in each)
                for each in self.all
            )
            .encode("unicode_escape")
            .decode()
        )


def command(line: str, *rest: str, result: Callable[[Path, str], Any] = stdout, reads_only: bool = False) -> Command:
    return Command(tuple(line.split()), result, tuple(tuple(each.split()) for each in rest), reads_only)


STUDENT = "--set student.model=student --set prompts.limit=2"
VERIFY = command("verify c.zarr", result=contents("c.zarr"), reads_only=True)
INSPECT = command("inspect c.zarr", reads_only=True)
ROLLOUT = command("inspect c.zarr --rollout 3", reads_only=True)
DIAGNOSE = command("diagnose c.zarr --json", reads_only=True)
EXPORT = command("export-cache c.zarr -o new.parquet", result=table("new.parquet"), reads_only=True)
PAGE = command("report c.zarr -o new.html", result=file("new.html"), reads_only=True)
SCORE = command("score my.toml --cache c.zarr --only teacher", result=contents("c.zarr"))
TRAIN = command("train my.toml --cache c.zarr --run new", result=file("new/adapter/adapter_model.safetensors"))
REPAIR = command(
    "verify c.zarr --repair", "verify c.zarr", "rollouts my.toml --cache c.zarr", "score my.toml --cache c.zarr",
    "verify c.zarr", result=contents("c.zarr"),
)  # fmt: skip
RESUME = command("train my.toml --cache c.zarr --run half", result=file("half/adapter/adapter_model.safetensors"))
FINISHED = command("train my.toml --cache c.zarr --run run", result=file("run/adapter/adapter_model.safetensors"))
EVAL = command("eval run", result=figures("run/eval.json"))
EVAL_OUT = command("eval run --out new.json", result=figures("new.json"))
MERGE = command("merge run -o new", result=file("new/model.safetensors"), reads_only=True)
RUN_PAGE = command("report run -o new.html", result=file("new.html"), reads_only=True)
VERIFY_RUN = command("verify run", reads_only=True)
PLAN = command("plan my.toml --set student.model=student --set teacher.model=teacher --json")
SAMPLE = command(f"rollouts my.toml --cache new.zarr {STUDENT}", result=contents("new.zarr"))
SAMPLE_CHAT = command(
    f"rollouts my.toml --cache new.zarr {STUDENT} --set prompts.template=chat --set rollouts.max_prompt_tokens=64",
    result=contents("new.zarr"),
)
SAMPLE_SHARDS = command(
    "rollouts my.toml --cache new.zarr --set student.model=shards --set prompts.limit=2", result=contents("new.zarr")
)
SCORE_BY = command(
    "score my.toml --cache c.zarr --only teacher --set teacher.model=teacher", result=contents("c.zarr")
)
SCORE_STREAMED = command(
    "score my.toml --cache c.zarr --only teacher --set teacher.model=teacher --set score.placement=streamed",
    result=contents("c.zarr"),
)
SERVED = command(
    "score my.toml --cache c.zarr --only teacher --set score.placement=server --set teacher.served_name=teach "
    "--set teacher.url=http://127.0.0.1:PORT/v1",
    result=contents("c.zarr"),
)
PROMPTS = command("rollouts my.toml --cache new.zarr --set prompts.path=prompts.jsonl", result=contents("new.zarr"))
PROMPTS_PARQUET = command(
    "rollouts my.toml --cache new.zarr --set prompts.path=prompts.parquet", result=contents("new.zarr")
)
CHATS = command(
    "rollouts my.toml --cache new.zarr --set prompts.path=chats.jsonl --set prompts.template=chat "
    "--set rollouts.max_prompt_tokens=64",
    result=contents("new.zarr"),
)
EVAL_PROMPTS = command("eval toy:student --recipe my.toml --prompts prompts.jsonl --out new.json",
                       result=figures("new.json"))  # fmt: skip
SFT = command(
    "sft my.toml --data sft.jsonl --run new --set sft.steps=2 --set sft.examples_per_step=2",
    result=file("new/adapter/adapter_model.safetensors"),
)
IMPORT = command("import rows.jsonl my.toml --cache new.zarr", result=contents("new.zarr"))
IMPORT_PARQUET = command("import rows.parquet my.toml --cache new.zarr", result=contents("new.zarr"))
DRY_RUN = command("rollouts my.toml --dry-run")


@dataclass
class Try:
    """One try.

    Attributes:
        prepare: damages the copy in its directory.
        what: the damage, in words.
        may_differ: whether a result other than the undisturbed one can be right: the damage is another valid value.
        must_refuse: whether no result can be right.
        answers: what a served teacher's answers become; see `Served`.
        setting: run in the child before the command.
    """

    command: Command
    prepare: Callable[[Path], None]
    what: str
    may_differ: bool = False
    must_refuse: bool = False
    answers: Callable[[int, bytes], Answer] | None = None
    scale_out: bool = True
    setting: Callable[[], None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a server says: the body in pieces, with seconds to wait before each."""

    pieces: Sequence[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    wait: float = 0


@dataclass
class Ended:
    """How a command in a child ended."""

    code: int
    out: str
    err: str
    raw: bytes
    peak: int  # bytes
    result: Any
    hung: str
    changed: list[str]


# ------------------------------------------------------------------------------------------------------------ children


def in_child(directory: Path, commands: Sequence[Sequence[str]], result: Callable[[Path, str], Any], *,
             setting: Callable[[], None] = lambda: None, environment: dict[str, str] | None = None,
             meanwhile: Callable[[int], None] | None = None) -> Ended:  # fmt: skip
    """Run commands, in `directory`/in, in a fork of this process, until one fails."""
    printed = [directory / "out", directory / "err"]
    found = directory / "result"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.monotonic()
    if (pid := os.fork()) == 0:
        code = 99
        try:
            code = _child(directory, commands, result, printed, found, setting, environment or {})
        except BaseException:
            traceback.print_exc()
            code = 70
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(code)
    hung, idle_since, cpu_then = "", started, -1.0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if meanwhile is not None:
            meanwhile(pid)
        if (cpu := _cpu_seconds(pid)) > cpu_then + 0.05:
            cpu_then, idle_since = cpu, now
        if now - idle_since > IDLE_SECONDS or now - started > WALL_SECONDS:
            hung = f"nothing done for {now - idle_since:.0f} s" if now - idle_since > IDLE_SECONDS else "40 s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left running
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        hung = f"{CPU_SECONDS} s of CPU time"
    out, err = (each.read_bytes() if each.is_file() else b"" for each in printed)
    value = json.loads(found.read_text()) if found.exists() else None
    return Ended(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), out + err,
                 usage.ru_maxrss * 1024, value, hung, [])  # fmt: skip


def _child(directory: Path, commands: Sequence[Sequence[str]], result: Callable[[Path, str], Any],
           printed: Sequence[Path], found: Path, setting: Callable[[], None], environment: dict[str, str]) -> int:  # fmt: skip
    os.setpgid(0, 0)
    for standard, path in enumerate(printed, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, standard)
        os.close(handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 2))
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MOST_ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
    os.environ.update(environment)
    os.chdir(directory / "in")
    setting()
    code = 0
    for arguments in commands:
        begins = printed[0].stat().st_size
        code = cli.main(list(arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
        if code:
            return code
    try:
        value = result(directory / "in", printed[0].read_bytes()[begins:].decode("utf-8", "replace"))
    except Exception as error:
        value = f"cannot be read: {type(error).__name__}: {error}"[:300]
    found.write_text(json.dumps(value))
    return 0


def _cpu_seconds(pid: int) -> float:
    """Of a process that runs, its threads and ended children included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(answer: Callable[[int, str, bytes], Answer]) -> Iterator[int]:
    """A server on loopback, in a process of its own; gives the port. `answer(number, path, body)`."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if (pid := os.fork()) == 0:
        numbers = itertools.count()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(b"")

            def do_POST(self) -> None:
                self.reply(self.rfile.read(int(self.headers["content-length"])))

            def reply(self, body: bytes) -> None:
                said = answer(next(numbers), self.path, body)
                time.sleep(said.wait)
                self.send_response(said.status)
                length = sum(map(len, said.pieces)) if said.length is None else said.length
                if length >= 0:
                    self.send_header("content-length", str(length))
                for name, value in said.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in said.pieces:
                    self.wfile.write(piece)
                if length != sum(map(len, said.pieces)):
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        class Server(HTTPServer):
            def handle_error(self, *args: Any) -> None:
                pass

        try:
            from socketserver import ThreadingMixIn

            served = type("Threads", (ThreadingMixIn, Server), {"daemon_threads": True})(
                ("127.0.0.1", port), Handler, bind_and_activate=False
            )
            served.socket = listening
            served.serve_forever()
        finally:
            os._exit(0)
    listening.close()
    try:
        yield port
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---------------------------------------------------------------------------------------------------------------- base


class Base:
    """What an undisturbed pipeline leaves, and what each command makes of it."""

    def __init__(self, root: Path):
        self.root = root
        self.directory = root / "base"
        (self.directory / "in").mkdir(parents=True)
        self.here = self.directory / "in"
        self.known: dict[Any, Ended] = {}
        self._make()

    def run(self, line: str) -> Ended:
        ended = in_child(self.directory, [line.split()], stdout)
        if ended.code:
            raise SystemExit(f"undisturbed: redpen {line}: exit code {ended.code}\n{ended.err}")
        return ended

    def _make(self) -> None:
        from pipeline.toy import asset_path

        overrides = " ".join(f"--set {setting}" for setting in SETTINGS)
        (self.here / "my.toml").write_text(_plain(self.run(f"rollouts toy --dry-run {overrides}").out))
        self.run("rollouts my.toml --cache c.zarr")
        self.run("score my.toml --cache c.zarr")
        self.run("train my.toml --cache c.zarr --run run")
        self.run("eval run")
        self._interrupted()
        for name in ("student", "teacher"):
            shutil.copytree(asset_path(name), self.here / name)
        _shards(self.here / "student", self.here / "shards")
        prompts = [json.loads(line) for line in (asset_path("prompts") / "train.jsonl").open().readlines()[:4]]
        prompts = [prompt | {"id": f"p{n}"} for n, prompt in enumerate(prompts)]
        chats = [{"messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": p["prompt"]}],
                  "answer": p["answer"]} for p in prompts]  # fmt: skip
        texts = [{"text": "1+1=2"}, {"prompt": "2+2=", "response": "4"}, {"prompt": "1+2=", "response": "3"},
                 {"messages": [{"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6"}]}]  # fmt: skip
        self.run("export-cache c.zarr -o rows.parquet")
        columns = parquet.read_table(self.here / "rows.parquet").to_pylist()
        rows = [
            {
                "prompt": row["prompt"],
                "answer": row["answer"],
                "response_tokens": row["response_token_ids"],
                "rollout_logprobs": row["rollout_logprobs"],
                "teacher_log_probs": row["teacher.teacher.logprobs"],
                "loss_mask": [1] * len(row["response_token_ids"]),
                "finish_reason": row["finish_reason"],
                "metadata": {"source": "x"},
            }
            for row in columns[:6]
        ]
        for name, lines in (("prompts", prompts), ("chats", chats), ("sft", texts), ("rows", rows)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (self.here / f"{name}.jsonl").write_text(text)
        parquet.write_table(pa.Table.from_pylist(prompts), self.here / "prompts.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), self.here / "rows.parquet")
        self._record()

    def _interrupted(self) -> None:
        """A run that was stopped after its first steps."""
        for _ in range(20):
            shutil.rmtree(self.here / "half", ignore_errors=True)

            def stop(pid: int) -> None:
                if (self.here / "half/checkpoints/step-00000001").exists():
                    os.kill(pid, signal.SIGTERM)

            ended = in_child(self.directory, [RESUME.arguments], stdout, meanwhile=stop)
            if ended.code and (self.here / "half/run.json").exists():
                return
        raise SystemExit("undisturbed: training was never stopped before its end")

    def _record(self) -> None:
        """What a served teacher answers, both of its ways, for replay."""
        (self.root / "answers").mkdir()
        for scale_out in (True, False):
            copy = self.copy("record", scored=False)
            with serving(partial(_true_answer, self.root / "answers", scale_out)) as port:
                ended = in_child(copy, _at_port(SERVED, port), stdout)
            if ended.code:
                raise SystemExit(f"undisturbed: {SERVED}: {ended.err}")
            shutil.rmtree(copy)

    def copy(self, name: str, *, scored: bool = True) -> Path:
        directory = self.root / name
        shutil.copytree(self.here, directory / "in", symlinks=True)
        if not scored:
            shutil.rmtree(directory / "in" / ROUND / "scores/teacher")
        outside = directory / "outside"
        (outside / "canaries").mkdir(parents=True)
        for canary in (outside / "canary.txt", outside / "canaries/canary.txt"):
            canary.write_text("canary\n")
        return directory

    def undisturbed(self, wanted: Try) -> Ended | None:
        """How the command ends on what nobody damaged; None where it cannot be done at all."""
        key = (wanted.command, wanted.scale_out)
        if key not in self.known:
            tries = []
            for n in range(2):
                honest = dataclasses.replace(
                    wanted, prepare=lambda path: None, environment={}, setting=lambda: None,
                    answers=None if wanted.answers is None else lambda number, body: Answer([body]),
                )  # fmt: skip
                tries.append(run_try(self, f"honest-{n}", honest)[0])
            if any(each.code for each in tries):
                print(f"left out, fails undisturbed: {wanted.command}: {_last(tries[0].err)}")
            elif tries[0].result != tries[1].result:
                raise SystemExit(f"undisturbed twice, two results: {wanted.command}")
            self.known[key] = tries[0]
        ended = self.known[key]
        return None if ended.code else ended


def _plain(text: str) -> str:
    return "".join(line + "\n" for line in text.splitlines() if not line.lstrip().startswith("#"))


def _at_port(wanted: Command, port: int) -> list[list[str]]:
    return [[part.replace("PORT", str(port)) for part in each] for each in wanted.all]


def _shards(model: Path, directory: Path) -> None:
    """The same model in two files and an index."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(model, directory)
    (directory / "model.safetensors").unlink()
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"model-0000{n}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": sum(each.nbytes for each in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


_MODELS = {"data": [{"id": "teach", "max_model_len": 512}]}


def _true_answer(directory: Path, scale_out: bool, number: int, path: str, body: bytes) -> Answer:
    """As vLLM's server answers, with the toy teacher's log-probs; kept for replay."""
    if path.endswith("/models"):
        return Answer([json.dumps(_MODELS).encode()])
    by_ids = path == "/inference/v1/generate"
    if by_ids and not scale_out:
        return Answer([b'{"error": {"message": "Scale-out endpoints are disabled"}}'], 403)
    asked = json.loads(body)
    sampling = asked["sampling_params"] if by_ids else asked
    text = _teacher_answer(asked["token_ids"] if by_ids else asked["prompt"], sampling)
    (directory / _named(path, body)).write_bytes(text)
    return Answer([text])


def _named(path: str, body: bytes) -> str:
    return hashlib.sha256(path.encode() + json.dumps(json.loads(body), sort_keys=True).encode()).hexdigest()


def _teacher_answer(ids: list[int], asked: dict[str, Any]) -> bytes:
    import torch

    from pipeline import models
    from pipeline.config import load_recipe

    if not hasattr(_teacher_answer, "model"):
        _teacher_answer.model = models.load_model(load_recipe("toy").teacher[0], attention="sdpa")  # type: ignore
    with torch.inference_mode():
        logits = _teacher_answer.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()  # type: ignore
    logprobs, n = logits.log_softmax(-1).numpy(), asked.get("prompt_logprobs")
    positions: list[Any] = [None]
    for row, token in zip(logprobs, ids[1:], strict=True):
        told = [token, *np.argsort(-row)[: n or 0].tolist()]
        positions.append({str(i): {"logprob": float(row[i]), "rank": 1, "decoded_token": "?"} for i in told})
    choice = {"text": "?", "prompt_logprobs": None if n is None else positions, "prompt_token_ids": ids}
    if (given := asked.get("prompt_logprob_token_ids")) is None:
        return json.dumps({"choices": [choice]}).encode()
    rows = logprobs[asked["prompt_logprob_start"] :]
    array = np.where(np.array(given) < 0, -np.inf, np.take_along_axis(rows, np.maximum(given, 0), 1))
    answer = {"choices": [{}], "prompt_token_id_logprobs": _encoded(array.astype(np.float32))}
    return json.dumps(answer | {"prompt_logprobs": positions, "prompt_token_ids": ids}).encode()


def _encoded(array: Any) -> str:
    np.save(kept := io.BytesIO(), array)
    return base64.b64encode(kept.getvalue()).decode()


def _replayed(base: Base, wanted: Try, number: int, path: str, body: bytes) -> Answer:
    assert wanted.answers is not None
    if path.endswith("/models"):
        return wanted.answers(number, json.dumps(_MODELS).encode())
    if path == "/inference/v1/generate" and not wanted.scale_out:
        return Answer([b'{"error": {"message": "Scale-out endpoints are disabled"}}'], 403)
    try:
        text = (base.root / "answers" / _named(path, body)).read_bytes()
    except OSError:
        return Answer([b'{"error": {"message": "not recorded"}}'], 400)
    return wanted.answers(number, text)


# ---------------------------------------------------------------------------------------------------------------- tries


def run_try(base: Base, name: str, wanted: Try, keep: bool = False) -> tuple[Ended, Path]:
    """Copy, damage, run. The directory is left where `keep` says so."""
    scored = wanted.command not in (SCORE, SCORE_BY, SCORE_STREAMED, SERVED)
    directory = base.copy(name, scored=scored)
    try:
        wanted.prepare(directory / "in")
        before = _listing(directory)
        more = {"setting": wanted.setting, "environment": wanted.environment}
        if wanted.answers is None:
            ended = in_child(directory, wanted.command.all, wanted.command.result, **more)  # type: ignore[arg-type]
        else:
            with serving(partial(_replayed, base, wanted)) as port:
                commands = _at_port(wanted.command, port)
                ended = in_child(directory, commands, wanted.command.result, **more)  # type: ignore[arg-type]
        after = _listing(directory)
        ended.changed = [
            path
            for path in sorted(before.keys() | after.keys())
            if before.get(path) != after.get(path)
            and (path.startswith("outside") or (path in before and not path.endswith(".lock")))
        ]
        known = {path for path in before if before[path] == after.get(path)}
        ended.changed += [f"{where}: {SECRET}" for where in _with_secret(directory, known)]
        return ended, directory
    finally:
        if not keep:
            shutil.rmtree(directory)


def _listing(directory: Path) -> dict[str, Any]:
    """Every file and what would tell that it was written."""
    found = {}
    for root, directories, names in os.walk(directory):
        for name in (*directories, *names):
            path = Path(root, name)
            status = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            about = () if is_directory else (status.st_ino, status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(directory))] = (status.st_mode, *about)
    return {path: value for path, value in found.items() if path not in ("out", "err", "result")}


def _with_secret(directory: Path, before: set[str]) -> Iterator[str]:
    """Files, printed ones included, that hold the secret and were not given with it."""
    secrets = (SECRET.encode(), base64.b64encode(f"user:{SECRET}".encode()))
    for path in directory.rglob("*"):
        name = str(path.relative_to(directory))
        if path.is_file() and not path.is_symlink() and name not in before:
            content = path.read_bytes()
            if any(secret in content for secret in secrets):
                yield name


def judge(wanted: Try, ended: Ended, honest: Ended) -> tuple[str, str]:
    """The outcome, and why it is a fault; empty for right and refused."""
    said = [line for line in ended.err.splitlines() if line.strip()]
    if ended.hung:
        return "hang", ended.hung
    if ended.peak - honest.peak > MORE_MEMORY or "MemoryError" in ended.err or "DefaultCPUAllocator" in ended.err:
        return "memory", f"{(ended.peak - honest.peak) / 2**20:,.0f} MB more than undisturbed; {_where(ended.err)}"
    if ended.code == 70 or ended.code < 0 or re.search("Traceback|Exception ignored|Exception in thread", ended.err):
        return "traceback", _where(ended.err) if ended.code >= 0 else signal.Signals(-ended.code).name
    if found := [letter for letter in ("\x1b", "\x07", "\x9b", "\u202e") if letter in ended.out + ended.err]:
        return "other", f"control characters shown: {found}"
    if places := [name for name in ended.changed if name.endswith(SECRET)]:
        return "other", f"the secret is in {', '.join(places)}"
    if outside := [name for name in ended.changed if name.startswith("outside")]:
        return "other", f"changed outside: {', '.join(outside)}"
    verifies = wanted.command.arguments[0] == "verify"
    if ended.code and wanted.command.reads_only and (lost := [name for name in ended.changed if name[:3] == "in/"]):
        return "other", f"changed by a command that only reads: {', '.join(lost[:3])}"
    if ended.code:
        if ended.code in (1, 2):
            errors = [line for line in said if line.startswith(("redpen: ", "Error: "))]
            if verifies and ended.code == 1 and re.search("^findings: |^beyond repair", ended.out, re.M):
                return "refused", ""
            if len(errors) != 1 or said[-1] != errors[0]:
                return "other", f"exit code {ended.code} with {len(errors)} lines of error: {_last(ended.err)}"
            if len(errors[0]) > LONGEST_LINE:
                return "other", f"an error of {len(errors[0]):,} characters"
            return "refused", ""
        return "other", f"exit code {ended.code}: {_last(ended.err)}"
    if wanted.must_refuse:
        return "silent", f"accepted: {_last(ended.out)}"
    if ended.result == honest.result or wanted.may_differ:
        return "right", ""
    if isinstance(ended.result, str) and ended.result.startswith("cannot be read"):
        return "silent", ended.result
    if _warnings(ended.err) - _warnings(honest.err):
        return "right", ""
    if verifies and isinstance(ended.result, dict) and ended.result.items() <= honest.result.items():
        committed, before = (re.search(r"(\d+) of (\d+) blocks are committed", each.out) for each in (ended, honest))
        if committed and before and committed[1] < before[1]:
            return "right", ""  # it says that there is less
    return "silent", f"another result: {_difference(ended.result, honest.result)}"


def _warnings(err: str) -> set[str]:
    lines = re.findall(r"^warning: .*", err, re.M)
    return {re.sub(r"[\d.,]+", "#", line) for line in lines}


def _where(err: str) -> str:
    """The last place in redpen of a traceback, and the exception."""
    frames = re.findall(r'File "[^"]*/((?:pipeline|cache_schema)/[^"]+)", line (\d+), in (\S+)', err)
    place = "{}:{} in {}: ".format(*frames[-1]) if frames else ""
    return place + _last(err)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "(nothing printed)"


def _difference(result: Any, honest: Any) -> str:
    if isinstance(result, dict) and isinstance(honest, dict):
        keys = [key for key in {**honest, **result} if result.get(key) != honest.get(key)]
        return ", ".join(map(str, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    if isinstance(result, str) and isinstance(honest, str):
        pairs = itertools.zip_longest(result.splitlines(), honest.splitlines(), fillvalue="")
        return next((f"{a[:100]!r}, was {b[:100]!r}" for a, b in pairs if a != b), "")
    return f"{str(result)[:60]}, was {str(honest)[:60]}"


# -------------------------------------------------------------------------------------------------------------- families


Family = Callable[[random.Random, Base], Try]


def _changed(wanted: Command, path: str, damage: Damage, **more: Any) -> Try:
    """A file of the copy replaced by its damaged content."""
    return Try(wanted, lambda here: inputs.replace(here / path, damage.content), f"{path}: {damage.what}", **more)


def _files(base: Base, *below: str, ends: str | tuple[str, ...] = "") -> list[str]:
    """Files of the undisturbed directory, sorted."""
    return sorted(
        str(path.relative_to(base.here))
        for each in below
        for path in ([base.here / each] if (base.here / each).is_file() else (base.here / each).rglob("*"))
        if path.is_file() and path.name.endswith(ends)
    )


# What no digest of a cache covers: another value of the kind is as good as the true one.
_DECLARED = {"student", "tokenizer", "template", "temperature", "top_p", "seed", "engine", "dtype", "created_by",
             "sampler_settings", "stop_token_ids", "model", "scored_at"}  # fmt: skip


def metadata(rng: random.Random, base: Base) -> Try:
    """zarr.json of groups and arrays of a cache."""
    wanted = rng.choice((VERIFY, VERIFY, INSPECT, ROLLOUT, DIAGNOSE, SCORE, TRAIN, EXPORT, PAGE))
    files = [name for name in _files(base, "c.zarr", ends="zarr.json") if wanted != SCORE or "teacher" not in name]
    groups = [name for name in files if b'"redpen"' in (base.here / name).read_bytes()]
    path = rng.choice(groups if rng.random() < 0.6 else files)
    content = (base.here / path).read_bytes()
    ours = path in groups and rng.random() < 0.7
    damage = inputs.damaged_json(rng, content, within=("attributes", "redpen") if ours else ())
    if rng.random() < 0.05:
        return Try(wanted, lambda here: (here / path).unlink(), f"{path}: gone", must_refuse=wanted == VERIFY)
    is_ours = damage.path[:2] == ("attributes", "redpen") and len(damage.path) > 2
    valid = is_ours and damage.path[2] in _DECLARED and ((damage.same_type and _modest(damage)) or damage.old is None)
    valid = valid or (is_ours and damage.path[2] in ("template", "sampler_settings") and damage.kind == "key")
    must = wanted == VERIFY and is_ours and damage.kind in ("value", "near", "key") and not valid
    return _changed(wanted, path, damage, may_differ=valid, must_refuse=must)


def _modest(damage: Damage) -> bool:
    """A number that could be meant, or no number."""
    try:
        new = json.loads(damage.new or "null")
    except (ValueError, RecursionError):
        return False
    return not isinstance(new, int | float) or damage.kind == "near" or 0 <= new <= 1


def chunks(rng: random.Random, base: Base) -> Try:
    """Bytes of the values of a cache; `verify` must find it."""
    wanted = rng.choice((VERIFY, VERIFY, VERIFY, VERIFY, ROLLOUT, DIAGNOSE, SCORE, TRAIN, EXPORT, PAGE, INSPECT))
    path, other = _chunk(rng, base, but="teacher" if wanted == SCORE else "nothing")
    if rng.random() < 0.15:
        return Try(wanted, lambda here: (here / path).unlink(), f"{path}: gone")
    damage = inputs.damaged_bytes(rng, (base.here / path).read_bytes(), (base.here / other).read_bytes())
    return _changed(wanted, path, damage)


def _chunk(rng: random.Random, base: Base, but: str = "nothing") -> tuple[str, str]:
    """A file of values, and the same array's of another block."""
    files = [name for name in _files(base, "c.zarr") if "/c/" in name and but not in name]
    path = rng.choice(files)
    array = path.split("/c/")[0]
    return path, rng.choice([name for name in files if name.startswith(array + "/c/")])


def repair(rng: random.Random, base: Base) -> Try:
    """Several files of values damaged, taken back by one pass, and made again: equal to what was."""
    damages = []
    for _ in range(rng.randrange(1, 4)):
        path, other = _chunk(rng, base, but="prompts/")
        content = (base.here / path).read_bytes()
        damages.append((path, inputs.damaged_bytes(rng, content, (base.here / other).read_bytes())))

    def prepare(here: Path) -> None:
        for path, damage in damages:
            inputs.replace(here / path, damage.content)

    return Try(REPAIR, prepare, "; ".join(f"{path}: {damage.what}" for path, damage in damages))


_RUN_FILES = ("run/run.json", "run/metrics.jsonl", "run/ledger.json", "run/eval.json", "run/recipe.toml", "run/adapter",
              "run/reread.safetensors", "run/eval.zarr")  # fmt: skip


def runs(rng: random.Random, base: Base) -> Try:
    """Files of a finished run, and of one that goes on."""
    half = rng.random() < 0.4
    below = rng.choice(("half/run.json", "half/metrics.jsonl", "half/recipe.toml", "half/checkpoints") if half
                       else _RUN_FILES)  # fmt: skip
    path = rng.choice(_files(base, below))
    wanted = rng.choice((RESUME,) if half else (FINISHED, EVAL, EVAL_OUT, MERGE, RUN_PAGE, VERIFY_RUN))
    if rng.random() < 0.1:
        return Try(wanted, lambda here: (here / path).unlink(), f"{path}: gone",
                   may_differ="adapter_config" not in path and wanted == RUN_PAGE)  # fmt: skip
    damage = inputs.damaged(rng, path, (base.here / path).read_bytes())
    label = damage.path[:1] in (("id",), ("result",)) or damage.path[:2] == ("cache", "url")
    valid = path.endswith("run.json") and label and damage.same_type
    return _changed(wanted, path, damage, may_differ=valid)


def models(rng: random.Random, base: Base) -> Try:
    """A model's directory."""
    where = rng.choice(("student", "student", "teacher", "shards"))
    by_place = {
        "student": (SAMPLE, SAMPLE, PLAN, SAMPLE_CHAT),
        "teacher": (SCORE_BY, SCORE_STREAMED, PLAN),
        "shards": (SAMPLE_SHARDS,),
    }
    wanted = rng.choice(by_place[where])
    path = rng.choice(_files(base, where))
    if wanted == SAMPLE_CHAT and rng.random() < 0.5:
        path = f"{where}/chat_template.jinja"
    if where == "shards" and rng.random() < 0.6:
        path = "shards/model.safetensors.index.json"
    if rng.random() < 0.05:
        return Try(
            wanted, lambda here: (here / path).unlink(), f"{path}: gone", may_differ=not path.endswith("tensors")
        )
    if path.endswith("jinja") and rng.random() < 0.7:
        template = rng.choice(_TEMPLATES)
        damage = Damage(template.encode(), template[:60], "near")
        return _changed(wanted, path, damage, may_differ=True)
    damage = inputs.damaged(rng, path, (base.here / path).read_bytes())
    return _changed(wanted, path, damage, may_differ=_valid_model(damage, path), must_refuse=damage.kind == "NaN")


_TEMPLATES = (
    "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 10**100000000 }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ ('x' * 10**6) | replace('x', 'y' * 10**6) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch ../outside/escaped') }}",
    "{{ raise_exception('\x1b[31mno\nmore') }}",
    "{{ undefined.attribute }}",
    "{% for m in messages %}",
    "{{ messages[99].content }}",
    "{% include 'my.toml' %}",
    "{{ 1 / 0 }}",
    "",
    "constant",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ messages | tojson }}" * 20,
    "(" * 10000,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
)


def _valid_model(damage: Damage, path: str) -> bool:
    """Whether another model can be what the damaged file describes."""
    if damage.kind == "data":
        return True  # no digest comes with a model
    if path.endswith(("safetensors", "index.json")):
        return damage.path[:1] in (("metadata",), ("__metadata__",))
    if damage.kind == "text":
        return not path.endswith("json") and damage.content != b""
    return damage.kind in ("key", "near") or damage.old is None or (damage.same_type and _modest(damage))


def server(rng: random.Random, base: Base) -> Try:
    """Answers of a served teacher."""
    at = rng.choice((0, 1, 1, 2, 3))
    seed = rng.randrange(2**32)
    label, answer = rng.choice(_ANSWERS) if rng.random() < 0.45 else ("", None)
    scale_out = rng.random() < 0.5
    sample = sorted((base.root / "answers").iterdir())
    described = _damaged_answer(random.Random(seed), sample[0].read_bytes() if at else json.dumps(_MODELS).encode())
    valid = answer is None and (
        described.kind in ("near", "key")
        or (described.path[-1:] == ("logprob",) and (described.old is None or described.new == "null"))
        or described.same_type
    )

    def answers(number: int, body: bytes) -> Answer:
        if number < at:
            return Answer([body])
        if answer is not None:
            return answer(body)
        return Answer([_damaged_answer(random.Random(seed), body).content])

    return Try(SERVED, lambda here: None, f"answer {at}{' on' if at else ''}: {label or described.what}",
               may_differ=valid, answers=answers, scale_out=scale_out)  # fmt: skip


def _damaged_answer(rng: random.Random, body: bytes) -> Damage:
    try:
        return inputs.damaged_json(rng, body)
    except ValueError:
        return inputs.damaged_text(rng, body)


def _with(**values: Any) -> Callable[[bytes], Answer]:
    return lambda body: Answer([json.dumps(json.loads(body) | values).encode()])


_HUGE_ARRAY = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117)
    + b"\n"
)
_ANSWERS: tuple[tuple[str, Callable[[bytes], Answer]], ...] = (
    ("data: [1]", lambda body: Answer([b'{"data": [1]}'])),
    ("data: text", lambda body: Answer([b'{"data": "hostile"}'])),
    ("max_model_len as text", lambda body: Answer([b'{"data": [{"id": "teach", "max_model_len": "512"}]}'])),
    ("max_model_len: NaN", lambda body: Answer([b'{"data": [{"id": "teach", "max_model_len": NaN}]}'])),
    ("the model's name with escapes", lambda body: Answer([json.dumps({"data": [{"id": ESCAPES}]}).encode()])),
    ("ids of 2^70", _with(prompt_token_ids=[2**70])),
    ("no base64", _with(prompt_token_id_logprobs="")),
    ("half base64", _with(prompt_token_id_logprobs="AAA")),
    ("an array of 10^12", _with(prompt_token_id_logprobs=base64.b64encode(_HUGE_ARRAY).decode())),
    ("an array of text", _with(prompt_token_id_logprobs=_encoded(np.array([["a"]])))),
    ("an array of NaN", _with(prompt_token_id_logprobs=_encoded(np.full((16, 4), np.nan, np.float32)))),
    ("an array of 1", _with(prompt_token_id_logprobs=_encoded(np.float32(0)))),
    ("an array of dates", _with(prompt_token_id_logprobs=_encoded(np.zeros((16, 4), "M8[s]")))),
    ("choices: []", _with(choices=[])),
    ("choices: text", _with(choices="hostile")),
    ("prompt_logprobs: {}", _with(prompt_logprobs={})),
    ("200 MB of spaces", lambda body: Answer([b" " * 2**20] * 200 + [body])),
    ("no end", lambda body: Answer([b" " * 2**20] * 2000, length=2**40)),
    ("a gzip bomb", lambda body: Answer([_bomb()], headers={"content-encoding": "gzip"})),
    ("no gzip", lambda body: Answer([body], headers={"content-encoding": "gzip"})),
    ("nested 100,000 deep", lambda body: Answer([b"[" * 100_000 + b"]" * 100_000])),
    ("nested 100,000 deep in it", lambda body: Answer([b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"])),
    ("a number of 5,000 digits", lambda body: Answer([b'{"choices": ' + b"9" * 5000 + b"}"])),
    ("not UTF-8", lambda body: Answer([b"\xff\xfe" + body])),
    ("UTF-16", lambda body: Answer([body.decode().encode("utf-16")])),
    ("another charset", lambda body: Answer([body], headers={"content-type": "text/html; charset=hostile"})),
    ("cut", lambda body: Answer([body[: len(body) // 2]])),
    ("less than promised", lambda body: Answer([body], length=len(body) + 100)),
    ("more than promised", lambda body: Answer([body], length=len(body) // 2)),
    ("chunked, but not", lambda body: Answer([body], length=-1, headers={"transfer-encoding": "chunked"})),
    ("sent elsewhere", lambda body: Answer([b""], 302, {"location": "file:///etc/passwd"})),
    ("sent to itself", lambda body: Answer([b""], 307, {"location": "/v1/models"})),
    ("late", lambda body: Answer([body], wait=5)),
    ("400 with escapes", lambda body: Answer([json.dumps({"error": {"message": ESCAPES}}).encode()], 400)),
    ("500 with escapes", lambda body: Answer([ESCAPES.encode()], 500)),
    ("404 with 1 MB", lambda body: Answer([b"x" * 2**20], 404)),
    ("418, error: text", lambda body: Answer([b'{"error": "hostile"}'], 418)),
    ("400, error: [1]", lambda body: Answer([b'{"error": [1]}'], 400)),
    ("400, allows 10^30", lambda body: Answer([b'{"error": {"message": "max allowed: 1' + b"0" * 30 + b'"}}'], 400)),
    ("400, allows 5,000 digits", lambda body: Answer([b'{"error": {"message": "max allowed: ' + b"9" * 5000 + b'"}}'], 400)),
    ("204", lambda body: Answer([b""], 204)),
    ("an event stream", lambda body: Answer([b"data: " + body + b"\n\ndata: [DONE]\n"])),
)  # fmt: skip


def _bomb() -> bytes:
    kept = io.BytesIO()
    with gzip.open(kept, "wb", compresslevel=9) as file:
        for _ in range(1500):
            file.write(bytes(2**20))
    return kept.getvalue()


def imports(rng: random.Random, base: Base) -> Try:
    """Rows of finished rollouts."""
    if rng.random() < 0.5:
        damage = inputs.damaged_lines(rng, (base.here / "rows.jsonl").read_bytes())
        return _changed(IMPORT, "rows.jsonl", damage, may_differ=_valid_row(damage))
    if rng.random() < 0.35:
        damage = inputs.damaged_bytes(rng, (base.here / "rows.parquet").read_bytes())
        return _changed(IMPORT_PARQUET, "rows.parquet", damage, may_differ=True)  # no digest of values
    rows = parquet.read_table(base.here / "rows.parquet").to_pylist()
    name = rng.choice(list(rows[0]))
    label, array = rng.choice(_columns(rows, name))

    def prepare(here: Path) -> None:
        plain = pa.Table.from_pylist(rows)
        if label == "twice":
            changed = plain.append_column(name, array)
        elif label == "gone":
            changed = plain.drop_columns([name])
        else:
            changed = plain.set_column(plain.schema.get_field_index(name), name, array)
        parquet.write_table(changed, here / "rows.parquet")

    same = label in ("large lists", "dictionary", "chunked") or (label == "float64" and "log" in name)
    lists = name.endswith("logprobs") or name.endswith("log_probs") or name == "response_tokens"
    return Try(IMPORT_PARQUET, prepare, f"rows.parquet: column {name}: {label}",
               may_differ=(not same and not lists) or label in ("all null", "gone"))  # fmt: skip


def _columns(rows: list[dict[str, Any]], name: str) -> list[tuple[str, Any]]:
    """Columns of other types in the place of one."""
    values = [row[name] for row in rows]
    n = len(rows)
    made: list[tuple[str, Callable[[], Any]]] = [
        ("all null", lambda: pa.nulls(n)),
        ("gone", lambda: None),
        ("twice", lambda: pa.array(values)),
        ("text", lambda: pa.array(["hostile"] * n)),
        ("escapes", lambda: pa.array([ESCAPES] * n)),
        ("bytes", lambda: pa.array([b"\xff\xfe"] * n)),
        ("numbers", lambda: pa.array([7] * n)),
        ("floats", lambda: pa.array([7.0, None, float("nan"), 1.5, -1e39, 0.0][:n])),
        ("booleans", lambda: pa.array([True] * n)),
        ("timestamps", lambda: pa.array([2**62] * n, pa.timestamp("us"))),
        ("durations", lambda: pa.array([1] * n, pa.duration("s"))),
        ("lists of lists", lambda: pa.array([[[1]]] * n)),
        ("lists of nulls", lambda: pa.array([[None] * 3] * n)),
        ("lists of text", lambda: pa.array([["a"]] * n)),
        ("empty lists", lambda: pa.array([[]] * n, pa.list_(pa.int64()))),
        ("structs", lambda: pa.array([{"a": 1}] * n)),
        ("some null", lambda: pa.array([None if k == 2 else value for k, value in enumerate(values)])),
        ("another length", lambda: pa.array([v[:-1] if isinstance(v, list) else v for v in values])),
        ("ids of 2^40", lambda: pa.array([[2**40] * 16] * n)),
        ("ids of -1", lambda: pa.array([[-1] * 16] * n)),
        ("unsigned", lambda: pa.array([[2**63 + 1] * 16] * n, pa.list_(pa.uint64()))),
        ("-2^60", lambda: pa.array([[-(2**60) - 1] * 16] * n)),
        ("-1e39", lambda: pa.array([[-1e39] * 16] * n)),
        ("NaN", lambda: pa.array([[float("nan")] * 16] * n)),
        ("+1", lambda: pa.array([[1.0] * 16] * n)),
        ("-Infinity", lambda: pa.array([[float("-inf")] * 16] * n)),
        ("float16", lambda: pa.array([[np.float16(-1)] * 16] * n, pa.list_(pa.float16()))),
        ("decimals", lambda: pa.array([[1] * 16] * n).cast(pa.list_(pa.decimal128(20, 2)))),
        ("fixed lists", lambda: pa.array([[1] * 16] * n, pa.list_(pa.int32(), 16))),
        ("large lists", lambda: pa.array(values).cast(pa.large_list(pa.array(values).type.value_type))),
        ("dictionary", lambda: pa.array(values).dictionary_encode()),
        ("a map", lambda: pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64()))),
    ]
    found = []
    for label, make in made:
        with contextlib.suppress(pa.ArrowException, AttributeError, TypeError, NotImplementedError):
            found.append((label, make()))
    return found


def _valid_row(damage: Damage) -> bool:
    """Whether another rollout can be what the damaged row says."""
    if damage.kind == "text":
        return damage.what.endswith(("gone", "twice", "blank"))
    top = damage.path[:1]
    if top and top[0] in ("answer", "metadata", "prompt", "finish_reason", "source", "id"):
        return True
    if damage.kind in ("near", "key") or damage.same_type:
        return True
    return damage.new in ("null", "0", "-1") and len(damage.path) <= 2


def prompts(rng: random.Random, base: Base) -> Try:
    """Prompts, chats, and examples to fine-tune on."""
    wanted, path = rng.choice(((PROMPTS, "prompts.jsonl"), (PROMPTS, "prompts.jsonl"), (EVAL_PROMPTS, "prompts.jsonl"),
                               (CHATS, "chats.jsonl"), (SFT, "sft.jsonl"), (PROMPTS_PARQUET, "prompts.parquet")))  # fmt: skip
    content = (base.here / path).read_bytes()
    if path.endswith("parquet"):
        damage = inputs.damaged_bytes(rng, content)
        return _changed(wanted, path, damage, may_differ=True)
    if rng.random() < 0.15:
        lines = content.splitlines()
        value = json.loads(lines[0])
        key = "messages" if "messages" in value else "text" if "text" in value else "prompt"
        label, text = rng.choice((("10 MB", "x" * 10**7), ("10 MB of spaces", " " * 10**7), ("nothing", ""),
                                  ("escapes", ESCAPES), ("NULs", "\0" * 5), ("special tokens", "<|im_end|>" * 3)))  # fmt: skip
        value[key] = [{"role": "user", "content": text}, *value[key][1:]] if key == "messages" else text
        damage = Damage(
            b"\n".join((json.dumps(value).encode(), *lines[1:])) + b"\n", f"line 1: {key} = {label}", "near"
        )
        return _changed(wanted, path, damage, may_differ=True)
    damage = inputs.damaged_lines(rng, content)
    return _changed(wanted, path, damage, may_differ=_valid_prompt(damage))


def _valid_prompt(damage: Damage) -> bool:
    if damage.kind == "text":
        return damage.what.endswith(("gone", "twice", "blank"))
    top = damage.path[:1]
    if top and top[0] in ("answer", "source", "id"):
        return True
    return damage.kind in ("near", "key") or damage.same_type or damage.new == '"1"' or damage.new == "null"


def recipes(rng: random.Random, base: Base) -> Try:
    """The text of a recipe, overrides, and names of files."""
    text = (base.here / "my.toml").read_text()
    how = rng.choice(("text", "value", "value", "form", "override", "argument"))
    if how == "text":
        return _changed(DRY_RUN, "my.toml", inputs.damaged_text(rng, text.encode()), may_differ=True)
    if how == "form":
        label, form = rng.choice(_FORMS)
        damage = Damage(form(text).encode("utf-8", "surrogatepass"), label, "text")
        return _changed(DRY_RUN, "my.toml", damage, may_differ=label not in _SAME_FORMS)
    if how == "value":
        lines = text.splitlines()
        at = rng.choice([n for n, line in enumerate(lines) if "=" in line])
        label, value = rng.choice(_TOML_VALUES)
        key = lines[at].split("=")[0].strip()
        lines[at] = f"{key} = {value}"
        damage = Damage("\n".join(lines).encode(), f"{key} = {label}", "value")
        wanted = rng.choice((DRY_RUN, DRY_RUN, PLAN))
        return _changed(wanted, "my.toml", damage, may_differ=True)
    if how == "override":
        key = rng.choice(("train.steps", "prompts.skip", "prompts.path", "teacher.url", "rollouts.temperature", "x",
                          "train", "prompts.template_args.a", "track.tags", "eval.format", "train.betas"))  # fmt: skip
        label, value = rng.choice((*_TOML_VALUES, *((name[:20], name) for name in _NAMES)))
        arguments = (*DRY_RUN.arguments, "--set", f"{key}={value}")
        return Try(Command(arguments), lambda here: None, f"--set {key}={label}", may_differ=True)
    name = rng.choice(_NAMES)
    arguments = rng.choice(
        (
            ("verify", name),
            ("inspect", name),
            ("rollouts", "my.toml", "--cache", name),
            ("rollouts", name, "--cache", "new.zarr"),
            ("train", "my.toml", "--cache", "c.zarr", "--run", name),
            ("eval", name),
            ("eval", "run", "--out", name),
            ("eval", "run", "--prompts", name),
            ("merge", name, "-o", "new"),
            ("merge", "run", "-o", name),
            ("report", name),
            ("report", "c.zarr", "-o", name),
            ("import", name, "my.toml", "--cache", "new.zarr"),
            ("import", "rows.jsonl", "my.toml", "--cache", name),
            ("export-cache", "c.zarr", "-o", name),
            ("inspect", "c.zarr", "--teacher", name),
            ("inspect", "c.zarr", "--rollout", name),
            ("inspect", "c.zarr", "--rollout", "9" * 30),
            ("inspect", "c.zarr", "--round", "9" * 5000),
            ("recipes", "show", name),
            ("rollouts", "my.toml", "--cache", "new.zarr", "--set", f"prompts.path={name}"),
            ("sft", "my.toml", "--run", "new", "--data", name),
            (name,),
        )
    )
    return Try(Command(arguments), lambda here: None, "an argument", may_differ=True)


_NAMES = (
    "", " ", "a" * 300, "b" * 100_000, "\x1b[31mred", "a\nb", "\udcff", "file://host/x", "file:///tmp/../x", "s3://",
    "s3://bucket", "http://[::1", "~nobody/x", "-", "--", "..", "/proc/self/mem", "/dev/zero", "/dev/null", "/", "my.toml",
    "my.toml/x", "run", "run/adapter", "c.zarr", "c.zarr/rounds", "new/../../x/../new.zarr", "toy:", "toy:nothing",
    "toy:../student", "%s%n{0}", "\u202ecod", "🦊" * 80, "x=1=2", "=0.5", "rows.jsonl=nan", "nan", "con:", "\\\\host\\x",
)  # fmt: skip
_TOML_VALUES = (
    ("10^23", str(10**23)), ("5,000 digits", "9" * 5000), ("-1", "-1"), ("0", "0"), ("nan", "nan"), ("inf", "inf"),
    ("1e400", "1e400"), ("true", "true"), ("empty", '""'), ("text", '"hostile"'), ("NUL", '"a\\u0000b"'),
    ("escapes", '"\\u001b[31mred\\u0007\\u202e"'), ("300 letters", '"' + "a" * 300 + '"'),
    ("100,000 letters", '"' + "a" * 100_000 + '"'), ("[]", "[]"), ("[1]", "[1]"), ("{}", "{}"), ("{a = 1}", "{a = 1}"),
    ("a date", "1979-05-27"), ("a time", "07:32:00"), ("nested 3,000 deep", "[" * 3000 + "]" * 3000),
    ("tables nested 3,000 deep", "{a=" * 3000 + "1" + "}" * 3000), ("0x" + "f" * 40, "0x" + "f" * 40),
    ("a regular expression that never ends", '"(a+)+$"'), ("half a regular expression", '"("'), ("2^31", str(2**31)),
    ("2^63", str(2**63)), ("1e-320", "1e-320"), ("an emoji", '"🦊"'), ("a path upwards", '"../../../etc/passwd"'),
    ("/dev/zero", '"/dev/zero"'),
)  # fmt: skip
_SAME_FORMS = ("CRLF", "a comment", "blank lines")
_FORMS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("CRLF", lambda text: text.replace("\n", "\r\n")),
    ("a comment", lambda text: "# \u202e comment\n" + text),
    ("blank lines", lambda text: text.replace("\n\n", "\n\n\n\n")),
    ("an unknown section", lambda text: text + "\n[hostile]\na = 1\n"),
    ("an unknown setting", lambda text: text.replace("[train]", "[train]\nhostile = 1")),
    ("escapes as a setting", lambda text: text.replace("[train]", '[train]\n"\\u001b[31m" = 1')),
    ("a section twice", lambda text: text + "\n[train]\nsteps = 1\n"),
    ("a setting twice", lambda text: text.replace("[train]", "[train]\nsteps = 1")),
    ("a section as an array", lambda text: text.replace("[train]", "[[train]]")),
    ("a section as a value", lambda text: "train = 1\n" + text.replace("[train]", "[other]")),
    ("nested 5,000 deep", lambda text: text + "\nx = " + "[" * 5000 + "]" * 5000),
    ("dotted 5,000 deep", lambda text: text + "\n[" + "a." * 5000 + "b]\n"),
    ("10,000 teachers", lambda text: re.sub(r"\[teacher\](.*\n)+?\n", "", text)
     + "".join(f'[[teacher]]\nname = "t{n}"\nmodel = "toy:teacher"\n' for n in range(10_000))),
    ("4 MB of comments", lambda text: text + "# comment\n" * 400_000),
    ("a surrogate", lambda text: text + '\n[track]\nname = "\ud800"\n'),
)  # fmt: skip


def links(rng: random.Random, base: Base) -> Try:
    """Links, pipes and directories in the place of files, in the directories of a run and of a cache."""
    where, wanted = rng.choice(
        (
            ("run", FINISHED), ("run", EVAL), ("run", EVAL), ("run", MERGE), ("run", RUN_PAGE), ("run", VERIFY_RUN),
            ("half", RESUME), ("half", RESUME), ("c.zarr", VERIFY), ("c.zarr", REPAIR), ("c.zarr", TRAIN),
            ("c.zarr", SCORE), ("c.zarr", PAGE), ("c.zarr", EXPORT), ("c.zarr", DIAGNOSE), ("new", TRAIN),
            ("new.zarr", PROMPTS), ("new.html", PAGE), ("new.parquet", EXPORT), ("new", MERGE), ("new.json", EVAL_OUT),
            ("rows.jsonl", IMPORT), ("rows.parquet", IMPORT_PARQUET), ("my.toml", DRY_RUN), ("prompts.jsonl", PROMPTS),
            ("student", SAMPLE), ("teacher", SCORE_BY), ("shards", SAMPLE_SHARDS),
        )
    )  # fmt: skip
    names = [name for name in _files(base, where) if (base.here / where).exists()] or [where]
    if wanted == SCORE:
        names = [name for name in names if "teacher" not in name]
    top = [name for name in names if name.count("/") <= 1]
    if where in ("run", "half"):
        more = ("eval.json.partial", "run.json.partial", "metrics.jsonl.partial", "reread.safetensors.partial", ".lock",
                "checkpoints", "adapter", "adapter.partial", "eval.zarr", "eval.zarr.partial", "tensorboard", "recipe.toml.partial")  # fmt: skip
        names = rng.choice((names, top, [f"{where}/{name}" for name in more]))
    elif where.startswith(("c.zarr", "new")):
        beside = [f".{where}.lock", f"{where}.lock", f"{where}.partial", f".{where}.partial", where]
        inside = ["c.zarr/rounds", "c.zarr/rounds/00000", str(ROUND / "scores"), str(ROUND / "scores/teacher"),
                  str(ROUND / "rollouts"), str(ROUND / "prompts"), "c.zarr/.lock"] if where == "c.zarr" else beside  # fmt: skip
        names = rng.choice((names, beside, inside))
    path = rng.choice(names)
    what = rng.choice(inputs.NO_FILES)
    gone = what not in ("a link to the same outside",)

    def prepare(here: Path) -> None:
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        if (here / path).parent.exists():
            inputs.no_file(what, here / path, here.parent / "outside")

    # What a command does without is not missed, and the page says less.
    return Try(wanted, prepare, f"{path}: {what}", may_differ=gone and (wanted == RUN_PAGE or where == "my.toml"))


def escapes(rng: random.Random, base: Base) -> Try:
    """Control characters in whatever is shown."""
    how = rng.choice(("cache", "rows", "tokens", "run", "recipe", "model", "argument", "file name", "prompts"))
    if how == "cache":
        groups = [name for name in _files(base, "c.zarr", ends="zarr.json")]
        path = rng.choice([name for name in groups if b'"redpen"' in (base.here / name).read_bytes()])
        wanted = rng.choice((VERIFY, INSPECT, ROLLOUT, DIAGNOSE, SCORE, TRAIN, PAGE, EXPORT))
        return _escaped(rng, base, path, wanted)
    if how == "run":
        path = rng.choice(("run/run.json", "run/eval.json", "run/ledger.json", "run/adapter/adapter_config.json"))
        return _escaped(rng, base, path, rng.choice((FINISHED, EVAL, MERGE, RUN_PAGE)))
    if how == "model":
        path = rng.choice(("config", "generation_config", "tokenizer_config", "tokenizer"))
        return _escaped(rng, base, f"student/{path}.json", rng.choice((SAMPLE, PLAN)))
    if how == "recipe":
        text = (base.here / "my.toml").read_text()
        found = [match for match in re.finditer(r'"[^"\n]*"', text)]
        match = rng.choice(found)
        content = text[: match.start()] + '"\\u001b[31mred\\u0007\\u009b2J\\u202e"' + text[match.end() :]
        damage = Damage(content.encode(), f"escapes for {match[0]}", "value")
        wanted = rng.choice((DRY_RUN, PLAN, PROMPTS, TRAIN))
        return _changed(wanted, "my.toml", damage, may_differ=True)
    if how == "argument":
        arguments = rng.choice(
            (
                (ESCAPES,), ("verify", ESCAPES), ("inspect", "c.zarr", "--rollout", ESCAPES), ("report", ESCAPES),
                ("inspect", "c.zarr", "--teacher", ESCAPES), ("eval", ESCAPES), ("merge", ESCAPES, "-o", "new"),
                ("rollouts", ESCAPES, "--cache", "new.zarr"), ("rollouts", "my.toml", "--set", ESCAPES),
                ("rollouts", "my.toml", "--dry-run", "--set", f"student.model={ESCAPES}"), ("verify", "c.zarr", ESCAPES),
                ("rollouts", "my.toml", "--dry-run", "--set", f"{ESCAPES}=1"), ("recipes", "show", ESCAPES),
                ("train", "my.toml", "--cache", "c.zarr", "--run", "a\x1b[31mb"), ("eval", "run", "--tasks", ESCAPES),
                ("rollouts", "my.toml", "--cache", "a\x1b[31mb.zarr"), ("report", "c.zarr", "-o", "a\x1b[31mb.html"),
                ("export-cache", "c.zarr", "-o", "a\x1b[31mb.parquet"), ("merge", "run", "-o", "a\x1b[31mb"),
                ("import", "rows.jsonl", "my.toml", "--cache", "a\x1b[31mb.zarr"), ("train", f"--{ESCAPES}"),
                ("score", "my.toml", "--cache", "c.zarr", "--only", ESCAPES), ("eval", "run", "--teacher", ESCAPES),
                ("import", "rows.jsonl", "my.toml", "--cache", "new.zarr", "--teacher", ESCAPES),
                ("merge", "run", "-o", "new", "--dtype", ESCAPES), ("merge", "run", "-o", "new", "--base", ESCAPES),
                ("eval", "run", "--recipe", ESCAPES), ("sft", "my.toml", "--run", "new", "--data", ESCAPES),
            )
        )  # fmt: skip
        return Try(Command(arguments), lambda here: None, "escapes as an argument", may_differ=True)
    if how == "file name":
        old, *arguments = rng.choice(
            (
                ("c.zarr", "verify", "NAME"), ("c.zarr", "inspect", "NAME"), ("c.zarr", "diagnose", "NAME"),
                ("c.zarr", "train", "my.toml", "--cache", "NAME", "--run", "new"), ("run", "eval", "NAME"),
                ("run", "merge", "NAME", "-o", "new"), ("run", "report", "NAME"), ("c.zarr", "report", "NAME"),
                ("half", "train", "my.toml", "--cache", "c.zarr", "--run", "NAME"), ("my.toml", "rollouts", "NAME", "--dry-run"),
                ("student", "plan", "my.toml", "--set", "student.model=NAME"),
                ("prompts.jsonl", "rollouts", "my.toml", "--cache", "new.zarr", "--set", "prompts.path=NAME"),
                ("rows.jsonl", "import", "NAME", "my.toml", "--cache", "new.zarr"),
                ("c.zarr", "export-cache", "NAME", "-o", "new"), ("run", "train", "my.toml", "--cache", "c.zarr", "--run", "NAME"),
            )
        )  # fmt: skip
        new = f"a\x1b[31m\x07b{Path(old).suffix}"
        made = Command(tuple(part.replace("NAME", new) for part in arguments))
        return Try(made, lambda here: (here / old).rename(here / new), f"{old} renamed with escapes", may_differ=True)
    if how == "prompts":
        lines = (base.here / "prompts.jsonl").read_text().splitlines()
        value = json.loads(lines[0]) | {rng.choice(("prompt", "answer", "source", "id", "x\x1b[31m")): ESCAPES}
        content = "\n".join((json.dumps(value), *lines[1:])).encode()
        damage = Damage(content, "line 1: escapes", "value")
        after = rng.choice(
            ("inspect new.zarr --rollout 0", "inspect new.zarr", "export-cache new.zarr -o new.parquet")
        )
        made = command(
            "rollouts my.toml --cache new.zarr --set prompts.path=prompts.jsonl --set rollouts.max_prompt_tokens=99",
            after,
        )
        return _changed(made, "prompts.jsonl", damage, may_differ=True)
    lines = (base.here / "rows.jsonl").read_text().splitlines()
    value = json.loads(lines[0])
    if how == "rows":
        key = rng.choice(("prompt", "answer", "finish_reason", "source", "id", "metadata"))
        value |= {key: {"source": ESCAPES, ESCAPES: 1} if key == "metadata" else ESCAPES}
        what = f"line 1: escapes as {key}"
    else:
        first = rng.randrange(240)
        value["response_tokens"] = list(range(first, first + len(value["response_tokens"])))
        what = f"line 1: response_tokens from {first}"
    damage = Damage("\n".join((json.dumps(value), *lines[1:])).encode(), what, "value")
    after = rng.choice(("inspect new.zarr --rollout 0", "inspect new.zarr", "report new.zarr -o new.html",
                        "export-cache new.zarr -o new.parquet", "score my.toml --cache new.zarr"))  # fmt: skip
    made = command("import rows.jsonl my.toml --cache new.zarr --set rollouts.max_prompt_tokens=99", after)
    return _changed(made, "rows.jsonl", damage, may_differ=True)


def _escaped(rng: random.Random, base: Base, path: str, wanted: Command) -> Try:
    """A text of a JSON file replaced by one with escapes."""
    value = json.loads((base.here / path).read_bytes())
    found = [(place, old) for place, old in inputs.places(value) if isinstance(old, str) or old is None]
    place, _ = rng.choice(found)
    name = ".".join(map(str, place))
    content = inputs.replaced(value, place, json.dumps(ESCAPES)).encode()
    return _changed(wanted, path, Damage(content, f"{name} = escapes", "value"), may_differ=True)


def secrets(rng: random.Random, base: Base) -> Try:
    """Credentials in URLs, keys in the environment: shown nowhere, written nowhere."""
    urls = (
        f"http://user:{SECRET}@127.0.0.1:9/v1",
        f"http://:{SECRET}@127.0.0.1:9/v1",
        f"http://{SECRET}@127.0.0.1:9/v1",
        f"http://127.0.0.1:9/v1?api_key={SECRET}",
        f"http://127.0.0.1:9/v1?x=1&access_token={SECRET}",
        f"http://127.0.0.1:9/v1#key={SECRET}",
        f"https://user:{SECRET}@example.invalid/x.jsonl",
        f"s3://AKIA:{SECRET}@bucket/x",
        f"s3://bucket/x?secret={SECRET}",
        f"hf://user:{SECRET}@datasets/x",
    )
    url = rng.choice(urls)
    how = rng.choice(("key", "set", "recipe", "argument"))
    served = ("--set", "score.placement=server")
    if how == "key":
        name = rng.choice(("REDPEN_API_KEY", "OPENAI_API_KEY"))
        value = rng.choice(
            (SECRET, f"{SECRET}\n", f" {SECRET}", f"{SECRET}\u00e9", f"{SECRET}\x1b", f"a\r\nX-Evil: {SECRET}")
        )
        status = rng.choice((200, 400, 401, 403, 500))

        def answers(number: int, body: bytes) -> Answer:
            message = json.dumps({"error": {"message": f"Incorrect API key: {value} {SECRET}"}}).encode()
            return Answer([body]) if status == 200 else Answer([message], status)

        return Try(SERVED, lambda here: None, f"{name} = {value!r}, answers {status}", may_differ=True, answers=answers,
                   environment={name: value})  # fmt: skip
    setting = rng.choice(("teacher.url", "teacher.url", "teacher.model", "student.model", "prompts.path", "eval.path",
                          "student.adapter", "track.project", "teacher.served_name"))  # fmt: skip
    commands = (
        ("score", "my.toml", "--cache", "c.zarr", "--only", "teacher"),
        ("rollouts", "my.toml", "--cache", "new.zarr"),
        ("train", "my.toml", "--cache", "c.zarr", "--run", "new"),
        ("rollouts", "my.toml", "--dry-run"),
        ("plan", "my.toml"),
    )
    if how == "set":
        arguments = (*rng.choice(commands), "--set", f"{setting}={url}", *served)
        return Try(Command(arguments), lambda here: None, f"{setting} = {url}", may_differ=True)
    if how == "recipe":
        section, key = setting.split(".")
        text = (base.here / "my.toml").read_text()
        text = re.sub(rf"(\[{section}\]\n(?:[^\[]*\n)?){key} = .*\n", r"\1", text)
        text = text.replace(f"[{section}]\n", f'[{section}]\n{key} = "{url}"\n')
        damage = Damage(text.encode(), f"{setting} = {url}", "value")
        return _changed(Command((*rng.choice(commands), *served)), "my.toml", damage, may_differ=True)
    arguments = rng.choice(
        (
            ("verify", url), ("inspect", url), ("report", url), ("eval", url), ("merge", url, "-o", "new"),
            ("rollouts", "my.toml", "--cache", url), ("train", "my.toml", "--cache", url, "--run", "new"),
            ("train", "my.toml", "--cache", "c.zarr", "--run", url), ("eval", "run", "--teacher", url),
            ("eval", "run", "--prompts", url), ("import", url, "my.toml", "--cache", "new.zarr"),
            ("sft", "my.toml", "--run", "new", "--data", url), ("export-cache", "c.zarr", "-o", url),
            ("rollouts", url, "--cache", "new.zarr"), ("merge", "run", "-o", "new", "--base", url),
        )
    )  # fmt: skip
    return Try(Command(arguments), lambda here: None, f"argument {url}", may_differ=True)


def surroundings(rng: random.Random, base: Base) -> Try:
    """Output that cannot be written, other encodings, other clocks, no room."""

    def closed(standard: int) -> None:
        os.close(standard)
        setattr(sys, ("stdin", "stdout", "stderr")[standard], None)

    def full(standard: int) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), standard)

    def encoded(encoding: str) -> None:
        sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding=encoding, line_buffering=True)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding=encoding, line_buffering=True,
                                      errors="backslashreplace")  # fmt: skip

    def clock(seconds: float) -> None:
        time.time = lambda: seconds  # type: ignore[assignment]
        time.time_ns = lambda: int(seconds * 10**9)  # type: ignore[assignment]

    def no_room(n_bytes: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    label, setting = rng.choice(
        (
            ("stdout closed", lambda: closed(1)),
            ("stdin closed", lambda: closed(0)),
            ("stderr on a full disk", lambda: full(2)),
            ("stdout on a full disk", lambda: full(1)),
            ("stdout in ASCII", lambda: encoded("ascii")),
            ("stdout in Latin-1", lambda: encoded("latin-1")),
            ("stdout in UTF-16", lambda: encoded("utf-16")),
            ("a clock of 1960", lambda: clock(-3e8)),
            ("a clock of 3000", lambda: clock(3.25e10)),
            ("files of 20,000 bytes at most", lambda: no_room(20_000)),
            ("files of 300 bytes at most", lambda: no_room(300)),
            ("the directory gone", lambda: shutil.rmtree(os.getcwd())),
        )
    )
    wanted = rng.choice((VERIFY, INSPECT, ROLLOUT, DIAGNOSE, EXPORT, PAGE, SCORE, TRAIN, RESUME, EVAL_OUT, MERGE,
                         RUN_PAGE, PLAN, SAMPLE, IMPORT, DRY_RUN))  # fmt: skip
    printed = "stdout" in label and wanted.result is stdout
    return Try(
        wanted, lambda here: None, label, may_differ=printed or "clock" in label or "full" in label, setting=setting
    )


FAMILIES: dict[str, tuple[Family, int]] = {
    "metadata": (metadata, 5),
    "chunks": (chunks, 4),
    "repair": (repair, 1),
    "runs": (runs, 5),
    "models": (models, 5),
    "server": (server, 4),
    "imports": (imports, 4),
    "recipes": (recipes, 4),
    "prompts": (prompts, 3),
    "links": (links, 5),
    "escapes": (escapes, 4),
    "secrets": (secrets, 2),
    "surroundings": (surroundings, 2),
}


# ----------------------------------------------------------------------------------------------------------------- main


def preload() -> None:
    """Everything that commands import, once."""
    import logging

    import peft  # noqa: F401
    import torch
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import pipeline.diagnose.stage
    import pipeline.evaluate.stage
    import pipeline.interchange.exporting
    import pipeline.interchange.importing
    import pipeline.merge
    import pipeline.plan
    import pipeline.report.stage
    import pipeline.report.terminal
    import pipeline.rollouts.stage
    import pipeline.rollouts.transformers_sampler
    import pipeline.score.server
    import pipeline.score.stage
    import pipeline.sft.stage
    import pipeline.train.stage  # noqa: F401

    torch.set_num_threads(1)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tries", type=int, default=2000, help="in all, shared out among the families")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="only this one; repeatable")
    parser.add_argument("--only", type=int, metavar="N", help="only try N of a family")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the directories of faults here")
    arguments = parser.parse_args()
    names = arguments.family or list(FAMILIES)
    share = arguments.tries / sum(FAMILIES[name][1] for name in names)
    started = time.monotonic()
    counts = {name: Counter[str]() for name in names}
    preload()
    root = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        print(f"redpen of {Path(cli.__file__).parent.parent}, seed {arguments.seed}", flush=True)
        base = Base(root)
        for name in names:
            family, weight = FAMILIES[name]
            numbers = [arguments.only] if arguments.only is not None else range(max(round(share * weight), 1))
            for n in numbers:
                wanted = family(random.Random(f"{arguments.seed} {name} {n}"), base)
                outcome, why = one(base, name, n, wanted, arguments.keep, verbose=arguments.only is not None)
                counts[name]["tried"] += outcome != "left out"
                counts[name][outcome] += 1
                if why:
                    print(f"{outcome.upper()} {name} {n}: {wanted.command} | {wanted.what} | {why}"
                          .encode("unicode_escape").decode(), flush=True)  # fmt: skip
    finally:
        shutil.rmtree(root, ignore_errors=True)
    columns = ("tried", *OUTCOMES)
    print(f"\n{'family':14}" + "".join(f"{column:>11}" for column in columns))
    for name, count in (*counts.items(), ("in all", sum(counts.values(), Counter()))):
        print(f"{name:14}" + "".join(f"{count[column]:>11}" for column in columns))
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(count[outcome] for count in counts.values() for outcome in OUTCOMES[2:]))


def one(base: Base, name: str, n: int, wanted: Try, keep: Path | None, *, verbose: bool = False) -> tuple[str, str]:
    """A try and its outcome."""
    honest = Ended(0, "", "", b"", 0, None, "", [])
    if wanted.command in _WITH_RESULT:
        found = base.undisturbed(wanted)
        if found is None:
            return "left out", ""
        honest = found
    else:
        honest.peak = max((each.peak for each in base.known.values()), default=2**30)
    ended, directory = run_try(base, f"{name}-{n}", wanted, keep=True)
    outcome, why = judge(wanted, ended, honest)
    if verbose:
        print(f"{wanted.command}\n{wanted.what}\nexit code {ended.code}, {outcome}: {why}\n{ended.out}{ended.err}")
    if why and keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(keep / directory.name, ignore_errors=True)
        shutil.move(directory, keep / directory.name)
    shutil.rmtree(directory, ignore_errors=True)
    return outcome, why


# Commands of which it is known what they do undisturbed; the others are right whatever they print.
_WITH_RESULT = frozenset(value for value in list(globals().values()) if isinstance(value, Command))

if __name__ == "__main__":
    raise SystemExit(main())

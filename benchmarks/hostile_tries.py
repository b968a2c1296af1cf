"""Runs redpen's commands in forks, on copies that are damaged, and judges what came out: see hostile.py."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
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

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from pyarrow import parquet  # noqa: E402

import cache_schema as cs  # noqa: E402
from pipeline import cli  # noqa: E402

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
    "rollouts.format_check_prompts=0",
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


# ---------------------------------------------------------------------------------------------------------- commands


def stdout(directory: Path, out: str) -> Any:
    """What was printed, without times, rates and sizes on disk."""
    return re.sub(r"[\d.,]+ ?([KMG]i?B|B|s|[a-z]+/s)\b", "#", out)


def settings(directory: Path, out: str) -> Any:
    """A recipe as it was printed, without its comments."""
    return _plain(out)


def contents(path: str, only: str = "") -> Callable[[Path, str], Any]:
    """Digests of everything a cache holds, or of one group of it, without who wrote it and when."""

    def read(directory: Path, out: str) -> Any:
        found: dict[str, Any] = {}
        cache = cs.open(directory / path)
        for index in cache.round_indices():
            round_ = cache.round(index)
            if not only:
                found[f"{index} prompts"] = [json.dumps(round_.prompts[i]) for i in range(len(round_.prompts))]
            names = [only] if only else round_.scorer_names()
            for group in [*([] if only else [round_.rollouts]), *(round_.scores(name) for name in names)]:
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


def page(path: str) -> Callable[[Path, str], Any]:
    """A page, without sizes on disk."""

    def read(directory: Path, out: str) -> Any:
        text = stdout(directory, (directory / path).read_text(encoding="utf-8"))
        return hashlib.sha256(re.sub(r'"bytes\w*": ?[\d.]+|bytes</th><td>\d+', "", text).encode()).hexdigest()

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
PAGE = command("report c.zarr -o new.html", result=page("new.html"), reads_only=True)
SCORE = command("score my.toml --cache c.zarr --only teacher", result=contents("c.zarr", only="teacher"))
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
RUN_PAGE = command("report run -o new.html", result=page("new.html"), reads_only=True)
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
    "score my.toml --cache c.zarr --only teacher --set teacher.model=teacher",
    result=contents("c.zarr", only="teacher"),
)
SCORE_STREAMED = command(
    "score my.toml --cache c.zarr --only teacher --set teacher.model=teacher --set score.placement=streamed",
    result=contents("c.zarr", only="teacher"),
)
SERVED = command(
    "score my.toml --cache c.zarr --only teacher --set score.placement=server --set teacher.served_name=teach "
    "--set teacher.url=http://127.0.0.1:PORT/v1",
    result=contents("c.zarr", only="teacher"),
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
    "sft my.toml --data sft.jsonl --run new --set prompts.template=auto --set sft.steps=2 "
    "--set sft.examples_per_step=2",
    result=file("new/adapter/adapter_model.safetensors"),
)
IMPORT = command("import rows.jsonl my.toml --cache new.zarr", result=contents("new.zarr"))
IMPORT_PARQUET = command("import rows.parquet my.toml --cache new.zarr", result=contents("new.zarr"))
DRY_RUN = command("rollouts my.toml --dry-run", result=settings)


# Commands of which it is known what they do undisturbed; the others are right whatever they print.
COMMANDS = frozenset(value for value in list(globals().values()) if isinstance(value, Command))


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
    """What a server says: the body in pieces, after seconds to wait. `note`: how it was damaged, if it was, and
    whether it is valid all the same.
    """

    pieces: Sequence[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None
    wait: float = 0
    note: str = ""
    is_valid: bool = True


@dataclass
class Ended:
    """How a command in a child ended."""

    code: int
    out: str
    err: str
    peak: int  # bytes
    result: Any
    hung: str
    changed: list[str]


# ---------------------------------------------------------------------------------------------------------- children


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
            code = 70
            (directory / "trace").write_text(traceback.format_exc())
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            os._exit(code)
    hung, idle_since, cpu_then, group_then = "", started, -1.0, 0.0
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        if meanwhile is not None:
            meanwhile(pid)
        if (cpu := _cpu_seconds(pid)) > cpu_then + 0.05:
            cpu_then, idle_since = cpu, now
        elif now - idle_since > IDLE_SECONDS and (group := _group_cpu_seconds(pid)) > group_then + 0.05:
            group_then, idle_since = group, now  # a process that it has started is at work
        if now - idle_since > IDLE_SECONDS or now - started > WALL_SECONDS:
            hung = f"nothing done for {now - idle_since:.0f} s" if now - idle_since > IDLE_SECONDS else "40 s"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what it may have left running
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        hung = f"{CPU_SECONDS} s of CPU time"
    trace = directory / "trace"
    out, err = (each.read_bytes() if each.is_file() else b"" for each in printed)
    if trace.exists() and b"Traceback" not in err:  # stderr could not take it
        err += trace.read_bytes()
    value = json.loads(found.read_text()) if found.exists() else None
    return Ended(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"),
                 usage.ru_maxrss * 1024, value, hung, [])  # fmt: skip


def _child(
    directory: Path,
    commands: Sequence[Sequence[str]],
    result: Callable[[Path, str], Any],
    printed: Sequence[Path],
    found: Path,
    setting: Callable[[], None],
    environment: dict[str, str],
) -> int:
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


def _group_cpu_seconds(pid: int) -> float:
    """Of the processes of a group."""
    total = 0.0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            total += _cpu_seconds(int(path.name)) if os.getpgid(int(path.name)) == pid else 0.0
    return total


@contextlib.contextmanager
def serving(answer: Callable[[int, str, bytes], Answer], notes: Path) -> Iterator[int]:
    """Run a server on loopback in a separate process and yield its port; `answer(number, path, body)` responds."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if (pid := os.fork()) == 0:
        numbers = itertools.count()
        for standard in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), standard)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(b"")

            def do_POST(self) -> None:
                self.reply(self.rfile.read(int(self.headers["content-length"])))

            def reply(self, body: bytes) -> None:
                said = answer(next(numbers), self.path, body)
                if said.note:
                    with notes.open("a") as file:
                        file.write(f"{int(said.is_valid)}{json.dumps(said.note)}\n")
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


# -------------------------------------------------------------------------------------------------------------- base


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
        chat = [{"role": "user", "content": "3+3="}, {"role": "assistant", "content": "6"}]
        texts = [{"text": "1+1=2"}, {"prompt": "2+2=", "response": "4"}, {"prompt": "1+2=", "response": "3"}]
        texts += [{"messages": chat}]
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
            with serving(partial(_true_answer, self.root / "answers", scale_out), self.root / "notes") as port:
                ended = in_child(copy, _at_port(SERVED, port), stdout)
            if ended.code:
                raise SystemExit(f"undisturbed: {SERVED}: {ended.err}")
            shutil.rmtree(copy)

    def copy(self, name: str, wanted: Command | None = None, *, scored: bool = True) -> Path:
        """A new directory with what the command needs, everything by default, and one outside it."""
        directory = self.root / name
        (directory / "in").mkdir(parents=True)
        words = {word.split("=")[-1].split("/")[0] for each in wanted.all for word in each} if wanted else set()
        words |= {"c.zarr"} if words & {"run", "half"} else set()
        for path in self.here.iterdir():
            if wanted is None or path.name in words:
                copying = shutil.copytree if path.is_dir() else shutil.copy2
                copying(path, directory / "in" / path.name)
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


MODELS = {"data": [{"id": "teach", "max_model_len": 512}]}


def _true_answer(directory: Path, scale_out: bool, number: int, path: str, body: bytes) -> Answer:
    """As vLLM's server answers, with the toy teacher's log-probs; kept for replay."""
    if path.endswith("/models"):
        return Answer([json.dumps(MODELS).encode()])
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

    from pipeline.config import load_recipe
    from pipeline.models import load as models

    if not hasattr(_teacher_answer, "model"):
        _teacher_answer.model = models.load_model(load_recipe("toy").teacher[0], attention="sampling")  # type: ignore
    with torch.inference_mode():
        logits = _teacher_answer.model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()  # type: ignore
    logprobs, n = logits.log_softmax(-1).numpy(), asked.get("prompt_logprobs")
    positions: list[Any] = [None]
    for row, token in zip(logprobs, ids[1:], strict=True):
        recorded = [token, *np.argsort(-row)[: n or 0].tolist()]
        positions.append({str(i): {"logprob": float(row[i]), "rank": 1, "decoded_token": "?"} for i in recorded})
    choice = {"text": "?", "prompt_logprobs": None if n is None else positions, "prompt_token_ids": ids}
    if (given := asked.get("prompt_logprob_token_ids")) is None:
        return json.dumps({"choices": [choice]}).encode()
    rows = logprobs[asked["prompt_logprob_start"] :]
    array = np.where(np.array(given) < 0, -np.inf, np.take_along_axis(rows, np.maximum(given, 0), 1))
    answer = {"choices": [{}], "prompt_token_id_logprobs": encoded(array.astype(np.float32))}
    return json.dumps(answer | {"prompt_logprobs": positions, "prompt_token_ids": ids}).encode()


def encoded(array: Any) -> str:
    """A numpy array as a server sends it."""
    np.save(kept := io.BytesIO(), array)
    return base64.b64encode(kept.getvalue()).decode()


def _replayed(base: Base, wanted: Try, number: int, path: str, body: bytes) -> Answer:
    assert wanted.answers is not None
    if path.endswith("/models"):
        return wanted.answers(number, json.dumps(MODELS).encode())
    if path == "/inference/v1/generate" and not wanted.scale_out:
        return Answer([b'{"error": {"message": "Scale-out endpoints are disabled"}}'], 403)
    try:
        text = (base.root / "answers" / _named(path, body)).read_bytes()
    except OSError:
        return Answer([b'{"error": {"message": "not recorded"}}'], 400)
    return wanted.answers(number, text)


# ------------------------------------------------------------------------------------------------------------- tries


def run_try(base: Base, name: str, wanted: Try, keep: bool = False) -> tuple[Ended, Path]:
    """Copy, damage, run. The directory is left where `keep` says so."""
    scored = wanted.command not in (SCORE, SCORE_BY, SCORE_STREAMED, SERVED)
    directory = base.copy(name, wanted.command if wanted.command in COMMANDS else None, scored=scored)
    try:
        wanted.prepare(directory / "in")
        before = _listing(directory)
        more = {"setting": wanted.setting, "environment": wanted.environment}
        if wanted.answers is None:
            ended = in_child(directory, wanted.command.all, wanted.command.result, **more)  # type: ignore[arg-type]
        else:
            notes = base.root / f"notes-{name}"
            with serving(partial(_replayed, base, wanted), notes) as port:
                commands = _at_port(wanted.command, port)
                ended = in_child(directory, commands, wanted.command.result, **more)  # type: ignore[arg-type]
            if notes.exists():
                lines = notes.read_text().splitlines()
                wanted.what += json.loads(lines[0][1:])
                wanted.may_differ = all(line[0] == "1" for line in lines)
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
    """Every file, with its attributes that change when it is written."""
    found = {}
    for root, directories, names in os.walk(directory):
        for name in (*directories, *names):
            path = Path(root, name)
            status = path.lstat()
            is_directory = path.is_dir() and not path.is_symlink()
            about = () if is_directory else (status.st_ino, status.st_size, status.st_mtime_ns)
            found[str(path.relative_to(directory))] = (status.st_mode, *about)
    return {path: value for path, value in found.items() if path not in ("out", "err", "result", "trace")}


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

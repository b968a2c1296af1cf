# ruff: noqa: E501  (tables)
"""What hostile.py damages: one function for each kind of thing that redpen reads from outside.

Each takes a random.Random and the undisturbed files, and gives one try.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_inputs as inputs
import numpy as np
import pyarrow as pa
from hostile_inputs import ESCAPES, Damage
from hostile_tries import (
    CHATS,
    DIAGNOSE,
    DRY_RUN,
    EVAL,
    EVAL_OUT,
    EVAL_PROMPTS,
    EXPORT,
    FINISHED,
    IMPORT,
    IMPORT_PARQUET,
    INSPECT,
    MERGE,
    PAGE,
    PLAN,
    PROMPTS,
    PROMPTS_PARQUET,
    REPAIR,
    RESUME,
    ROLLOUT,
    ROUND,
    RUN_PAGE,
    SAMPLE,
    SAMPLE_CHAT,
    SAMPLE_SHARDS,
    SCORE,
    SCORE_BY,
    SCORE_STREAMED,
    SECRET,
    SERVED,
    SFT,
    TRAIN,
    VERIFY,
    VERIFY_RUN,
    Answer,
    Base,
    Command,
    Try,
    command,
    encoded,
    settings,
    stdout,
)
from pyarrow import parquet

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
             "sampler_settings", "stop_token_ids", "model", "scored_at", "tile_tokens", "quantisation", "partial"}  # fmt: skip


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
    declared = _DECLARED | ({"vocab_size"} if "scores/teacher" in path else set())
    valid = is_ours and damage.path[2] in declared and ((damage.same_type and _modest(damage)) or damage.old is None)
    valid = valid or (is_ours and len(damage.path) > 3 and damage.path[2] in ("template", "sampler_settings"))
    valid = valid or (is_ours and damage.what.endswith("given twice") and isinstance(damage.old, str))
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
        uncommitted = "/commit/" in path and wanted != VERIFY  # the block is then not there, and the result says less
        return Try(wanted, lambda here: (here / path).unlink(), f"{path}: gone", may_differ=uncommitted)
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


_RUN_FILES = ("run/run.json", "run/metrics.jsonl", "run/ledger.json", "run/eval.json", "run/recipe.toml", "run/adapter", "run/adapter/adapter_model.safetensors", "run/adapter/adapter_model.safetensors",
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
    return _changed(
        wanted,
        path,
        damage,
        may_differ=_valid_model(damage, path),
        must_refuse=damage.kind == "NaN" and wanted != PLAN,
    )


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

    def answers(number: int, body: bytes) -> Answer:
        if number < at:
            return Answer([body])
        if answer is not None:
            return answer(body)
        damage = _damaged_answer(random.Random(seed), body)
        return Answer([damage.content], note=damage.what, is_valid=_valid_answer(damage))

    what = f"answer {at}{' on' if at else ''}: {label}"
    return Try(SERVED, lambda here: None, what, answers=answers, scale_out=scale_out)


def _valid_answer(damage: Damage) -> bool:
    """Whether another teacher can have said so. Each answer is damaged separately."""
    if damage.path[-1:] in (("decoded_token",), ("rank",), ("text",)):  # which nobody reads
        return True
    if damage.kind in ("near", "key") or damage.same_type:
        return True
    return damage.path[-1:] == ("logprob",) and (damage.old is None or damage.new == "null")


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
    ("an array of text", _with(prompt_token_id_logprobs=encoded(np.array([["a"]])))),
    ("an array of NaN", _with(prompt_token_id_logprobs=encoded(np.full((16, 4), np.nan, np.float32)))),
    ("an array of 1", _with(prompt_token_id_logprobs=encoded(np.float32(0)))),
    ("an array of dates", _with(prompt_token_id_logprobs=encoded(np.zeros((16, 4), "M8[s]")))),
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
    lists = name.endswith(("logprobs", "log_probs")) or name == "response_tokens"
    return Try(IMPORT_PARQUET, prepare, f"rows.parquet: column {name}: {label}",
               may_differ=(not same and not lists) or label in ("all null", "some null", "gone"))  # fmt: skip


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


def _other_text(damage: Damage) -> bool:
    """Whether damaged JSON lines may be others: nothing has a digest of them, and a digit is as good as another."""
    blank = damage.what.endswith(("gone", "twice", "blank")) or re.fullmatch(r"line \d+: empty", damage.what)
    return bool(blank or re.search(r"\b(bit|bytes?) .*\d", damage.what))


def _valid_row(damage: Damage) -> bool:
    """Whether another rollout can be what the damaged row says."""
    if damage.kind == "text":
        return _other_text(damage)
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
        label, text = rng.choice((("4 MB", "x" * 4 * 10**6), ("4 MB of spaces", " " * 4 * 10**6), ("nothing", ""),
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
        return _other_text(damage)
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
    return Try(
        wanted,
        prepare,
        f"{path}: {what}",
        may_differ=gone and (wanted == RUN_PAGE or where == "my.toml" or "/commit/" in path),
    )


def escapes(rng: random.Random, base: Base) -> Try:
    """Control characters in whatever is shown."""
    how = rng.choice(("cache", "rows", "tokens", "run", "recipe", "model", "argument", "file name", "prompts"))
    if how == "cache":
        groups = [name for name in _files(base, "c.zarr", ends="zarr.json")]
        path = rng.choice([name for name in groups if b'"redpen"' in (base.here / name).read_bytes()])
        wanted = rng.choice((VERIFY, INSPECT, ROLLOUT, DIAGNOSE, SCORE, TRAIN, PAGE, EXPORT))
        if wanted is SCORE and "/teacher/" in path:  # which it scores anew
            wanted = VERIFY
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
    place, _ = rng.choice(found or list(inputs.places(value)))
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
            message = json.dumps({"error": {"message": f"Incorrect API key: {value}"}}).encode()
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

    def gone() -> None:
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")

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
            ("files of 3,000 bytes at most", lambda: no_room(3000)),
            ("the directory gone", gone),
        )
    )
    wanted = rng.choice((VERIFY, INSPECT, ROLLOUT, DIAGNOSE, EXPORT, PAGE, SCORE, TRAIN, RESUME, EVAL_OUT, MERGE,
                         RUN_PAGE, PLAN, SAMPLE, IMPORT, DRY_RUN))  # fmt: skip
    printed = "stdout" in label and wanted.result in (stdout, settings)
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

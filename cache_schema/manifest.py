"""Provenance: who and what made a round or its scores. Frozen records, stored in Zarr attributes as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

from .arrays import (
    ROLLOUT_ARRAYS,
    STUDENT_ARRAYS,
    ArraySpec,
    slot_size,
    teacher_arrays,
)
from .errors import CacheError

T = TypeVar("T")

#: Recorded for people, never compared: a new release may continue an old cache.
_NOT_COMPARED = frozenset({"created_by"})


@dataclass(frozen=True)
class ModelIdentity:
    """A model by what its numbers depend on.

    Attributes:
        name: Hub repository or path, for people (two paths to equal weights are the same model).
        revision: Hub commit, where known.
        digest: of the configuration and the weights.
        adapter_digest: of the PEFT adapter on top, if any.
    """

    name: str
    revision: str | None
    digest: str
    adapter_digest: str | None = None


@dataclass(frozen=True)
class TokenizerIdentity:
    """A tokenizer by the digest of its token->id map and special tokens; `vocab_size` is the highest id plus one."""

    name: str
    digest: str
    vocab_size: int


class _Manifest:
    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Parse attributes read from a store. Raises `CacheError` naming the field that is missing, unknown or of
        another type."""
        return _parsed(cls, value, f"{where}: attribute redpen")

    def differences(self, other: Self) -> list[str]:
        """Fields in which `other` differs, as `field: cached X, now Y`; models compare by digest, not name."""
        return _differences(self.to_json(), other.to_json())


def _parsed(record: type[T], value: Any, where: str) -> T:
    """A record, and the records in it, from JSON."""
    if not isinstance(value, dict):
        raise CacheError(f"{where}: expected an object, got {_short(value)}")
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    unknown = sorted(set(value) - {f.name for f in fields})
    missing = sorted({f.name for f in fields if f.default is dataclasses.MISSING} - set(value))
    if unknown or missing:
        raise CacheError(f"{where} has missing fields {missing}, unknown fields {unknown}")
    types, found = get_type_hints(record), {}
    for name, told in value.items():
        if dataclasses.is_dataclass(types[name]):
            found[name] = _parsed(types[name], told, f"{where}.{name}")
        elif _is_a(told, types[name]):
            found[name] = tuple(told) if isinstance(told, list) else told
        else:
            named = getattr(types[name], "__name__", str(types[name]))
            raise CacheError(f"{where}.{name}: expected {named}, got {_short(told)}")
    return record(**found)


def _is_a(value: Any, type_: Any) -> bool:
    """Whether JSON's `value` is of a field's type; 1 is a float too."""
    if isinstance(type_, UnionType):
        return any(_is_a(value, member) for member in get_args(type_))
    origin = get_origin(type_) or type_
    if origin is tuple:
        return isinstance(value, list) and all(_is_a(item, get_args(type_)[0]) for item in value)
    if isinstance(value, bool) or origin is bool:
        return isinstance(value, bool) and origin is bool
    return isinstance(value, int | float if origin is float else origin)


def _differences(cached: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(cached.keys() | now.keys()):
        a, b, label = cached.get(key), now.get(key), prefix + key
        if key in _NOT_COMPARED:
            continue
        if "digest" in cached and key in ("name", "revision"):
            continue  # identity is the digest; its name is told with it below
        if isinstance(a, dict) and isinstance(b, dict) and key in ("student", "model", "tokenizer"):
            inner = _differences(a, b, f"{label}.")
            if inner and a.get("name") != b.get("name"):
                inner.append(f"{label}.name: cached {a.get('name')}, now {b.get('name')}")
            found += inner
        elif a != b and not (isinstance(a, tuple | list) and isinstance(b, tuple | list) and list(a) == list(b)):
            found.append(f"{label}: cached {_short(a)}, now {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class RoundManifest(_Manifest):
    """One sampling pass by one student over one list of prompts.

    Attributes:
        vocab_size: rows of the student's output layer; token ids are below it.
        template: how prompts became text (kind, digest of the chat template, arguments).
        prompts_sha256: `prompts_sha256()` of the round's prompt records.
        engine: name of the sampler.
    """

    student: ModelIdentity
    tokenizer: TokenizerIdentity
    template: dict[str, Any]
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_p: float
    rollouts_per_prompt: int
    max_prompt_tokens: int
    max_response_tokens: int
    prompts_per_block: int
    seed: int
    engine: str
    prompts_sha256: str
    n_prompts: int
    vocab_size: int
    dtype: str = "float32"
    sampler_settings: dict[str, Any] = field(default_factory=dict)
    created_by: str = ""

    def __post_init__(self) -> None:
        for name in (
            "rollouts_per_prompt",
            "max_prompt_tokens",
            "max_response_tokens",
            "prompts_per_block",
            "n_prompts",
        ):
            if getattr(self, name) < 1:
                raise CacheError(f"round manifest: {name} must be at least 1, got {getattr(self, name)}")
        if self.slots()["token"] > 2**31 - 1:
            raise CacheError(
                f"round manifest: a block would hold {self.slots()['token']} token slots, more than 2**31 - 1; "
                "lower rollouts.prompts_per_block"
            )

    @property
    def n_blocks(self) -> int:
        return -(-self.n_prompts // self.prompts_per_block)

    def block_prompts(self, block: int) -> range:
        """Indices, in the round's prompts, of the prompts that block `block` holds."""
        start = block * self.prompts_per_block
        return range(start, min(start + self.prompts_per_block, self.n_prompts))

    def slots(self) -> dict[str, int]:
        """Capacity of each slot dimension of a block."""
        rows = self.prompts_per_block * self.rollouts_per_prompt
        return {
            "prompt": slot_size(self.prompts_per_block),
            "prompt_token": slot_size(self.prompts_per_block * self.max_prompt_tokens),
            "row": slot_size(rows),
            "token": slot_size(rows * self.max_response_tokens),
        }

    def arrays(self) -> tuple[ArraySpec, ...]:
        return ROLLOUT_ARRAYS


@dataclass(frozen=True)
class ScoresManifest(_Manifest):
    """One model's reading of a round's rollouts.

    Attributes:
        role: "student" (brings the candidates) or "teacher".
        engine: how log-probabilities were computed; tile_tokens: packing that they depend on in the last bits.
        candidate_kind: "topk" or "sampled"; candidates: K, the sampled token included; 0: a teacher that tells of the
            token itself alone, and so does not depend on the student's scores.
        sampling_temperature: of `sampling_logprobs` (student), None for a teacher.
        topk: how many of the teacher's own likeliest tokens are stored (0: none).
        entropy: whether entropies are stored.
        partial: the teacher may leave out (NaN) what it was not asked or could not tell: whole tokens, or candidates,
            which then belong to the rest.
    """

    role: str
    model: ModelIdentity
    tokenizer: TokenizerIdentity
    template: dict[str, Any]
    dtype: str
    quantisation: str | None
    engine: str
    tile_tokens: int
    vocab_size: int
    candidate_kind: str
    candidates: int
    sampling_temperature: float | None
    topk: int = 0
    entropy: bool = True
    partial: bool = False
    created_by: str = ""

    def __post_init__(self) -> None:
        if self.role not in ("student", "teacher"):
            raise CacheError(f"scores manifest: role must be student or teacher, got {self.role!r}")
        if self.candidate_kind not in ("topk", "sampled"):
            raise CacheError(f"scores manifest: candidate_kind must be topk or sampled, got {self.candidate_kind!r}")
        if self.candidates < (1 if self.role == "student" else 0):
            raise CacheError(f"scores manifest: candidates must be at least 1, got {self.candidates}")
        if self.role == "student" and (self.partial or not self.entropy):
            raise CacheError("scores manifest: the student's scores cannot be partial")

    def arrays(self) -> tuple[ArraySpec, ...]:
        if self.role == "student":
            return STUDENT_ARRAYS
        return teacher_arrays(entropy=self.entropy, candidates=self.candidates > 0, topk=self.topk > 0)

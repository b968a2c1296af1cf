"""Manifests: what made a round or its scores, as frozen dataclasses stored as JSON in Zarr attributes."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .arrays import ROLLOUT_ARRAYS, STUDENT_ARRAYS, ArraySpec, slot_size, teacher_arrays
from .errors import CacheError, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number, or of the length of a text."""

    low: float
    high: float


_INT32 = 2**31 - 1
Text = Annotated[str, Between(0, 2**16)]  # characters
Count = Annotated[int, Between(1, _INT32)]
TokenId = Annotated[int, Between(0, _INT32)]
TokensPerPosition = Annotated[int, Between(0, 2**20)]  # candidates or teacher top-k
Temperature = Annotated[float, Between(0, 1000)]

#: Limits of a round, so that its arrays fit in memory.
MOST_PROMPTS, MOST_BLOCKS, MOST_SLOT_VALUES = 2**26, 2**22, 2**34

#: Recorded but not compared, so that a new release can continue an old cache.
_NOT_COMPARED = frozenset({"created_by"})


@dataclass(frozen=True)
class ModelIdentity:
    """A model, identified by the digests of its files.

    Attributes:
        name: Hub repository or path, for display (two paths with equal weights are the same model).
        revision: Hub commit, if known.
        digest: of the configuration and the weights.
        adapter_digest: of the PEFT adapter, if any.
    """

    name: Text
    revision: Text | None
    digest: Text
    adapter_digest: Text | None = None


@dataclass(frozen=True)
class TokenizerIdentity:
    """A tokenizer, identified by the digest of its vocabulary and special tokens; `vocab_size` is the highest id plus
    one."""

    name: Text
    digest: Text
    vocab_size: Count


@dataclass(frozen=True)
class Header:
    """Attribute `redpen` of the root group: format name and version."""

    format: Text
    version: Annotated[int, Between(1, 2**31 - 1)]
    created_by: Text = ""


class _Manifest:
    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_json(cls, value: Any, where: str) -> Self:
        """Parse attributes read from a store. Raises `CacheError` naming the first field that is missing, unknown, of
        the wrong type or out of bounds."""
        return parse(cls, value, f"{where}: attribute redpen")

    def differences(self, other: Self) -> list[str]:
        """Fields that differ in `other`, as `field: cached X, now Y`; models are compared by digest, not name."""
        return _differences(self.to_json(), other.to_json())


def parse(record: type[T], value: Any, where: str) -> T:
    """A dataclass, nested ones included, from JSON. Raises `CacheError`."""
    if not isinstance(value, dict):
        raise CacheError(f"{where}: expected an object, found {shown(value)}")
    fields = dataclasses.fields(record)  # type: ignore[arg-type]
    unknown = sorted(set(value) - {f.name for f in fields})
    missing = sorted({f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING} - set(value))
    if missing:
        raise CacheError(f"{where}: expected a field {missing[0]}, found none (missing fields: {len(missing)})")
    if unknown:
        raise CacheError(f"{where}: expected no field {shown(unknown[0])}; unknown fields: {len(unknown)}")
    types, found = _types(cast(Any, record)), {}
    for name, item in value.items():
        if dataclasses.is_dataclass(types[name]):
            found[name] = parse(types[name], item, f"{where}.{name}")
        elif (expected := _expected(item, types[name])) is not None:
            raise CacheError(f"{where}.{name}: expected {expected}, found {shown(item)}")
        else:
            found[name] = tuple(item) if isinstance(item, list) else item
    try:
        return record(**found)
    except CacheError as error:  # fields that contradict each other
        raise CacheError(f"{where}: {error}") from None


@functools.cache
def _types(record: Any) -> dict[str, Any]:
    return get_type_hints(record, include_extras=True)


def _expected(value: Any, type_: Any) -> str | None:
    """What a field of this type expects if the JSON `value` does not match it, else None; 1 is also a float."""
    origin = get_origin(type_) or type_
    if origin is Annotated:
        plain, bounds = get_args(type_)
        if (expected := _expected(value, plain)) is not None:
            return expected
        if isinstance(value, str):
            return None if len(value) <= bounds.high else f"at most {bounds.high} characters"
        return None if bounds.low <= value <= bounds.high else f"a number from {bounds.low} to {bounds.high}"
    if origin in (Union, UnionType):
        problems = [_expected(value, member) for member in get_args(type_)]
        return None if None in problems else " or ".join(str(problem) for problem in problems)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return "a list"
        problems = [_expected(item, get_args(type_)[0]) for item in value]
        return next((f"each to be {problem}" for problem in problems if problem is not None), None)
    names = {int: "int", float: "a number", str: "text", bool: "true or false", dict: "an object", type(None): "null"}
    is_one = isinstance(value, int | float if origin is float else origin)
    if is_one and isinstance(value, bool) == (origin is bool):
        return None
    return names[origin]


def _check(record: Any, name: str) -> None:
    """Raise `CacheError` if a field is out of bounds."""
    for field_, type_ in _types(record.__class__).items():
        value = getattr(record, field_)
        if not dataclasses.is_dataclass(value) and (expected := _expected(value, type_)) is not None:
            raise CacheError(f"{name} manifest: {field_}: expected {expected}, found {shown(value)}")


def _differences(cached: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(cached.keys() | now.keys()):
        a, b, label = cached.get(key), now.get(key), prefix + key
        if key in _NOT_COMPARED:
            continue
        if "digest" in cached and key in ("name", "revision"):
            continue  # only the digest is compared; a different name is added below
        if isinstance(a, dict) and isinstance(b, dict) and key in ("student", "model", "tokenizer"):
            inner = _differences(a, b, f"{label}.")
            if inner and a.get("name") != b.get("name"):
                inner.append(f"{label}.name: cached {a.get('name')}, now {b.get('name')}")
            found += inner
        elif isinstance(a, dict) and isinstance(b, dict) and key in ("sampler_settings", "environment"):
            found += _differences(a, b, f"{label}.")
        elif a != b and not (isinstance(a, tuple | list) and isinstance(b, tuple | list) and list(a) == list(b)):
            found.append(f"{label}: cached {shown(a)}, now {shown(b)}")
    return found


@dataclass(frozen=True)
class RoundManifest(_Manifest):
    """What a round was sampled from and with.

    Attributes:
        vocab_size: rows of the student's output layer; token ids are below it.
        template: how prompts became text (kind, digest of the chat template, arguments).
        prompts_sha256: `prompts_sha256()` of the round's prompt records.
        engine: name of the sampler.
    """

    student: ModelIdentity
    tokenizer: TokenizerIdentity
    template: dict[str, Any]
    stop_token_ids: tuple[TokenId, ...]
    temperature: Temperature
    top_p: Annotated[float, Between(0, 1)]
    rollouts_per_prompt: Count
    max_prompt_tokens: Count
    max_response_tokens: Count
    prompts_per_block: Count
    seed: Annotated[int, Between(-(2**63), 2**64)]
    engine: Text
    prompts_sha256: Text
    n_prompts: Annotated[int, Between(1, MOST_PROMPTS)]
    vocab_size: Count
    dtype: Text = "float32"
    sampler_settings: dict[str, Any] = field(default_factory=dict)
    created_by: Text = ""

    def __post_init__(self) -> None:
        _check(self, "round")
        if self.n_blocks > MOST_BLOCKS:
            raise CacheError(
                f"round manifest: prompts_per_block: expected at most {MOST_BLOCKS:,} blocks, found "
                f"{self.n_blocks:,} of {self.prompts_per_block} prompts; raise rollouts.prompts_per_block"
            )
        for name, size in self.slots().items():
            if size > _INT32:
                raise CacheError(
                    f"round manifest: a block would hold {size} {name} slots, more than 2**31 - 1; "
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
    """How one model scored a round's rollouts.

    Attributes:
        role: "student" (chooses the candidates) or "teacher".
        engine: what computed the log-probabilities; tile_tokens: tokens in one forward pass, which affect the
            last bits of a score.
        candidate_kind: "topk" or "sampled"; candidates: K, the sampled token included. 0: a teacher with log-probs of
            the sampled tokens only, which does not depend on the student's scores.
        sampling_temperature: of `sampling_logprobs` (student), None for a teacher.
        topk: how many of the teacher's most likely tokens are stored (0: none).
        entropy: whether entropies are stored.
        partial: values may be missing (NaN): of whole tokens, or of candidates, which then count as part of the rest.
    """

    role: Text
    model: ModelIdentity
    tokenizer: TokenizerIdentity
    template: dict[str, Any]
    dtype: Text
    quantisation: Text | None
    engine: Text
    tile_tokens: Annotated[int, Between(0, 2**40)]
    vocab_size: Count
    candidate_kind: Text
    candidates: TokensPerPosition
    sampling_temperature: Temperature | None
    topk: TokensPerPosition = 0
    entropy: bool = True
    partial: bool = False
    created_by: Text = ""

    def __post_init__(self) -> None:
        _check(self, "scores")
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

"""The redpen cache, format version 2: rollouts of a student and per-token scores by any number of models.

A Zarr v3 hierarchy, described in `SPEC.md`. Reading, writing and verifying need only numpy, xxhash and zarr:

    import cache_schema as cs

    cache = cs.open("cache/toy.zarr")
    round_ = cache.round()                             # the latest
    rollouts = round_.rollouts.read(0)                 # RolloutBlock: prompts and responses of block 0
    teacher = round_.scores("teacher").read(0)         # ScoreBlock over the same tokens
    student = round_.scores("student").read(0)
    (student.logprobs - teacher.logprobs)[rollouts.response_slice(row=3)]
"""

from .ahead import read_ahead
from .arrays import (
    COMMIT_FIELDS,
    FINISH_LENGTH,
    FINISH_NAMES,
    FINISH_OTHER,
    FINISH_STOP,
    ROLLOUT_ARRAYS,
    STUDENT_ARRAYS,
    TIME_FIELDS,
    TOPK_ARRAYS,
    ArraySpec,
    teacher_arrays,
)
from .blocks import InvalidBlockError, RolloutBlock, RolloutRow, ScoreBlock
from .cache import STUDENT, Cache, Round, create, open
from .digests import VERSION
from .errors import (
    CacheError,
    CacheLockedError,
    CorruptBlockError,
    FormatVersionError,
    NotACacheError,
    ProvenanceError,
    StorageError,
    UncommittedError,
)
from .group import BlockGroup
from .hub import HUB_URL
from .manifest import ModelIdentity, RoundManifest, ScoresManifest, TokenizerIdentity
from .prompts import PromptTable, encode_prompts, prompts_sha256
from .verify import Finding, block_groups, repair, verify

__all__ = [
    "COMMIT_FIELDS",
    "FINISH_LENGTH",
    "FINISH_NAMES",
    "FINISH_OTHER",
    "FINISH_STOP",
    "HUB_URL",
    "ROLLOUT_ARRAYS",
    "STUDENT",
    "STUDENT_ARRAYS",
    "TIME_FIELDS",
    "TOPK_ARRAYS",
    "VERSION",
    "ArraySpec",
    "BlockGroup",
    "Cache",
    "CacheError",
    "CacheLockedError",
    "CorruptBlockError",
    "Finding",
    "FormatVersionError",
    "InvalidBlockError",
    "ModelIdentity",
    "NotACacheError",
    "PromptTable",
    "ProvenanceError",
    "RolloutBlock",
    "RolloutRow",
    "Round",
    "RoundManifest",
    "ScoreBlock",
    "ScoresManifest",
    "StorageError",
    "TokenizerIdentity",
    "UncommittedError",
    "block_groups",
    "create",
    "encode_prompts",
    "open",
    "prompts_sha256",
    "read_ahead",
    "repair",
    "teacher_arrays",
    "verify",
]

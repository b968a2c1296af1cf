"""Small random but valid caches for tests: real stores, made-up numbers."""

from __future__ import annotations

import numpy as np

import cache_schema as cs

VOCAB = 40
EOS = 7


def prompts(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i} \u00e9\U0001f600", "answer": str(i), "source": "test"} for i in range(n)]


def round_manifest(records: list[dict[str, str]], **changes: object) -> cs.RoundManifest:
    values: dict[str, object] = dict(
        student=cs.ModelIdentity("student", None, "s" * 16),
        tokenizer=cs.TokenizerIdentity("student", "t" * 16, VOCAB),
        template={"kind": "none"},
        stop_token_ids=(EOS,),
        temperature=1.0,
        top_p=1.0,
        rollouts_per_prompt=3,
        max_prompt_tokens=6,
        max_response_tokens=9,
        prompts_per_block=4,
        seed=0,
        engine="test",
        prompts_sha256=cs.prompts_sha256(records),
        n_prompts=len(records),
        vocab_size=VOCAB,
    )
    return cs.RoundManifest(**(values | changes))  # type: ignore[arg-type]


def scores_manifest(role: str = "student", **changes: object) -> cs.ScoresManifest:
    values: dict[str, object] = dict(
        role=role,
        model=cs.ModelIdentity(role, None, role[0] * 16),
        tokenizer=cs.TokenizerIdentity("student", "t" * 16, VOCAB),
        template={"kind": "none"},
        dtype="float32",
        quantisation=None,
        engine="resident",
        tile_tokens=8192,
        vocab_size=VOCAB,
        candidate_kind="topk",
        candidates=4,
        sampling_temperature=1.0 if role == "student" else None,
    )
    return cs.ScoresManifest(**(values | changes))  # type: ignore[arg-type]


def rollout_block(manifest: cs.RoundManifest, block: int, rng: np.random.Generator) -> cs.RolloutBlock:
    indices = manifest.block_prompts(block)
    pairs = [(i, rng.integers(0, VOCAB, rng.integers(1, manifest.max_prompt_tokens + 1))) for i in indices]
    rows = []
    for local in range(len(indices)):
        for sample in range(manifest.rollouts_per_prompt):
            length = int(rng.integers(1, manifest.max_response_tokens + 1))
            ids = rng.integers(EOS + 1, VOCAB, length)
            reason = int(rng.integers(0, 3))
            if reason == cs.FINISH_STOP:
                ids[-1] = EOS
            rows.append(cs.RolloutRow(local, sample, ids, -rng.exponential(size=length), reason))
    rng.shuffle(rows)  # type: ignore[arg-type]
    return cs.RolloutBlock.from_rows(pairs, rows)


def score_block(
    manifest: cs.ScoresManifest,
    rollouts: cs.RolloutBlock,
    rng: np.random.Generator,
    candidate_ids: np.ndarray | None = None,
) -> cs.ScoreBlock:
    """Scores from random logits, so that they mean something. A teacher needs the student's `candidate_ids`."""
    t = rollouts.n_tokens
    logits = rng.normal(size=(t, VOCAB)) * 2
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    every = np.arange(t)
    if candidate_ids is None:
        others = logits.copy()
        others[every, rollouts.token_ids] = np.inf
        candidate_ids = np.argsort(-others, axis=-1)[:, : manifest.candidates].astype(np.int32)
    chosen = np.zeros((t, VOCAB), bool)
    np.put_along_axis(chosen, candidate_ids, True, axis=-1)

    def rest(mask: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(np.where(mask, 0, np.exp(logp)).sum(-1)).astype(np.float32)

    arrays: dict[str, np.ndarray] = dict(
        logprobs=logp[every, rollouts.token_ids].astype(np.float32),
        entropy=(-(np.exp(logp) * logp).sum(-1)).astype(np.float32),
        candidate_logprobs=np.take_along_axis(logp, candidate_ids, -1).astype(np.float32),
        rest_logprob=rest(chosen),
    )
    if manifest.role == "student":
        arrays |= dict(candidate_ids=candidate_ids, sampling_logprobs=arrays["logprobs"].copy())
    elif manifest.topk:
        top = np.argsort(-logp, axis=-1)[:, : manifest.topk].astype(np.int32)
        np.put_along_axis(chosen, top, True, axis=-1)
        arrays |= dict(
            topk_ids=top,
            topk_logprobs=np.take_along_axis(logp, top, -1).astype(np.float32),
            topk_rest_logprob=rest(chosen),
        )
    return cs.ScoreBlock(**arrays)


def filled(location: object, n_prompts: int = 10, seed: int = 0, topk: int = 0, **changes: object) -> cs.Cache:
    """A finished cache of one round: rollouts, student, one teacher."""
    rng = np.random.default_rng(seed)
    cache = cs.create(location)  # type: ignore[arg-type]
    records = prompts(n_prompts)
    round_ = cache.start_round(round_manifest(records, **changes), records)
    student = round_.start_scores("student", scores_manifest("student"))
    teacher = round_.start_scores("teacher", scores_manifest("teacher", topk=topk))
    for block in range(round_.n_blocks):
        rollouts = rollout_block(round_.manifest, block, rng)
        round_.rollouts.write(block, rollouts)
        scored = score_block(student.manifest, rollouts, rng)
        student.write(block, scored)
        teacher.write(block, score_block(teacher.manifest, rollouts, rng, scored.candidate_ids))
    return cache

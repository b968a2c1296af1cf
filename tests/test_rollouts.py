"""Sampling: the distribution, its log-probs, and what a rollout depends on. Oracles are float64 full-logit
forwards.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cache_schema as cs
from helpers.sampling import STOP, VOCAB, oracle_logits, processed_logprobs, prompt_block, sampling
from pipeline.config import Recipe, load_recipe
from pipeline.engines.sampling import PromptBlock
from pipeline.engines.transformers_sampler import TransformersSampler, draw
from pipeline.errors import ConfigError, Interrupted
from pipeline.models import load as models
from pipeline.models.resolve import resolve
from pipeline.rollouts import stage

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.4,
    attn_implementation="sdpa",
)
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral, window": (MistralConfig, MistralForCausalLM, {"sliding_window": 6}),
    "gemma2, window, soft cap": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {"sliding_window": 6, "final_logit_softcapping": 2.0},
    ),
}


def tiny(family: str = "qwen3") -> PreTrainedModel:
    """A random model whose distributions are far from flat and from certain."""
    config, cls, extra = FAMILIES[family]
    attention = {"attn_implementation": "eager"} if cls is Gemma2ForCausalLM else {}
    torch.manual_seed(1)
    model = cls(config(**(SHAPE | extra | attention))).eval()
    # none of this may have a part in sampling
    model.generation_config = GenerationConfig(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=3.0)
    return model


def same(a: cs.RolloutBlock, b: cs.RolloutBlock) -> bool:
    """Equal ids everywhere, and log-probs equal up to rounding."""
    return all(
        x.shape == y.shape and (np.allclose(x, y, atol=1e-5) if x.dtype.kind == "f" else np.array_equal(x, y))
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


# -- the distribution ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_own(family: str) -> None:
    model, block = tiny(family), prompt_block()
    rollouts = TransformersSampler(model, sampling(), batch_size=7).sample_block(block)
    assert rollouts.n_rows == 20
    for row in range(rollouts.n_rows):
        response = rollouts.response(row)
        expected = processed_logprobs(oracle_logits(model, rollouts.prompt(row), response), 1.0, 1.0)
        got = rollouts.rollout_logprobs[rollouts.response_slice(row)]
        np.testing.assert_allclose(got, expected[np.arange(len(response)), response], atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (1.7, 1.0), (1.0, 0.6), (0.8, 0.9)])
def test_temperature_and_top_p_are_in_the_logprobs(temperature: float, top_p: float) -> None:
    model, settings = tiny(), sampling(temperature=temperature, top_p=top_p)
    rollouts = TransformersSampler(model, settings).sample_block(prompt_block())
    for row in range(rollouts.n_rows):
        response = rollouts.response(row)
        logits = oracle_logits(model, rollouts.prompt(row), response)
        expected = processed_logprobs(logits, temperature, top_p)[np.arange(len(response)), response]
        assert np.isfinite(expected).all()  # nothing from outside the nucleus
        got = rollouts.rollout_logprobs[rollouts.response_slice(row)]
        np.testing.assert_allclose(got, expected, atol=1e-5 / min(temperature, 1))


def test_tokens_come_as_often_as_they_should() -> None:
    """Chi-square over the first and, given the likeliest first token, the second position of 4,000
    rollouts.
    """
    model, n = tiny(), 4000
    settings = sampling(rollouts_per_prompt=n, max_response_tokens=2, stop_token_ids=())
    block = PromptBlock(0, [(0, np.array([9, 8, 7], np.int32))])
    rollouts = TransformersSampler(model, settings, batch_size=n).sample_block(block)
    pairs = rollouts.token_ids.reshape(n, 2)
    first = np.bincount(pairs[:, 0], minlength=VOCAB)
    likeliest = int(first.argmax())
    second = np.bincount(pairs[pairs[:, 0] == likeliest, 1], minlength=VOCAB)
    logits = oracle_logits(model, block.prompts[0][1], np.array([likeliest, 0]))
    for observed, p in zip((first, second), np.exp(processed_logprobs(logits, 1.0, 1.0)), strict=True):
        expected = p * observed.sum()
        assert observed.sum() > 500
        large = expected >= 5
        observed = np.append(observed[large], observed[~large].sum())
        expected = np.append(expected[large], expected[~large].sum())
        chi_square = ((observed - expected) ** 2 / expected).sum()
        freedom = len(observed) - 1
        assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # about 1 in 10,000 under the right distribution


def test_an_adapter_takes_part() -> None:
    base, block = tiny(), prompt_block()
    torch.manual_seed(2)
    adapted = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    rollouts = TransformersSampler(adapted, sampling()).sample_block(block)
    assert not same(rollouts, TransformersSampler(base, sampling()).sample_block(block))
    merged = adapted.merge_and_unload()
    for row in range(rollouts.n_rows):
        response = rollouts.response(row)
        expected = processed_logprobs(oracle_logits(merged, rollouts.prompt(row), response), 1.0, 1.0)
        got = rollouts.rollout_logprobs[rollouts.response_slice(row)]
        np.testing.assert_allclose(got, expected[np.arange(len(response)), response], atol=1e-4)


def test_greedy_is_the_likeliest_token_with_certainty() -> None:
    model, block = tiny(), prompt_block()
    rollouts = TransformersSampler(model, sampling(temperature=0.0, rollouts_per_prompt=1)).sample_block(block)
    assert not rollouts.rollout_logprobs.any()
    for row in range(rollouts.n_rows):
        logits = oracle_logits(model, rollouts.prompt(row), rollouts.response(row))
        np.testing.assert_array_equal(rollouts.response(row), logits.argmax(1))


def test_no_token_of_probability_zero_is_drawn() -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 1.0, 0.0, -torch.inf]]).repeat(4, 1)
    uniforms = torch.tensor([0.0, 0.5, 0.999, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, sampling())
    assert tokens.tolist() == [2, 2, 3, 3] and logprobs.isfinite().all()
    tokens, logprobs = draw(logits, uniforms, sampling(top_p=0.5))
    assert tokens.tolist() == [2, 2, 2, 2] and not logprobs.any()


# -- what a rollout depends on -------------------------------------------------------------------------------


def test_a_rollout_depends_on_its_prompt_and_key_alone() -> None:
    model, block = tiny(), prompt_block()
    reference = TransformersSampler(model, sampling(), batch_size=256).sample_block(block)
    for batch_size in (1, 3, 8):
        assert same(TransformersSampler(model, sampling(), batch_size=batch_size).sample_block(block), reference)
    alone = TransformersSampler(model, sampling()).sample_block(PromptBlock(0, block.prompts[2:3]))
    rows = np.flatnonzero(reference.row_prompt == 2)
    assert [alone.response(i).tolist() for i in range(5)] == [reference.response(row).tolist() for row in rows]

    responses = {tuple(reference.response(row)) for row in rows}
    assert len(responses) == len(rows)  # samples of one prompt differ
    for other in (sampling(seed=8), sampling(round_index=1)):
        assert not same(TransformersSampler(model, other).sample_block(block), reference)


def test_blocks_do_not_depend_on_one_another() -> None:
    model, blocks = tiny(), [prompt_block(block=b) for b in range(3)]
    together = {b: rollouts for b, rollouts, _ in TransformersSampler(model, sampling()).sample(blocks)}
    assert list(together) == [0, 1, 2]
    ((block, alone, seconds),) = TransformersSampler(model, sampling()).sample(blocks[2:])
    assert block == 2 and seconds > 0
    for name, value in vars(alone).items():
        np.testing.assert_array_equal(value, getattr(together[2], name))


def test_uniforms_are_a_fixed_function_of_the_key() -> None:
    settings = sampling()
    u = settings.uniforms(3, 1)
    assert u.shape == (12,) and u.dtype == np.float64 and u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(sampling(max_response_tokens=4).uniforms(3, 1), u[:4])
    assert not np.array_equal(settings.uniforms(1, 3), u)
    # caches that were begun must be continued with the same numbers
    assert u[:3].tolist() == [0.4755438457453086, 0.34693491103992136, 0.3958750895788993]


def test_responses_end_with_a_stop_token_or_at_the_limit() -> None:
    limit = 12
    rollouts = TransformersSampler(tiny(), sampling(rollouts_per_prompt=30)).sample_block(prompt_block())
    reasons = set()
    for row in range(rollouts.n_rows):
        response, reason = rollouts.response(row), rollouts.finish_reason[row]
        assert not np.isin(response[:-1], STOP).any()
        assert (response[-1] in STOP) == (reason == cs.FINISH_STOP)
        assert reason == cs.FINISH_STOP or len(response) == limit
        reasons.add((int(reason), int(response[-1]) if reason == cs.FINISH_STOP else None))
    assert reasons == {(cs.FINISH_STOP, 3), (cs.FINISH_STOP, 5), (cs.FINISH_LENGTH, None)}


def test_progress_counts_every_rollout_and_token_and_can_stop_it() -> None:
    counted = np.zeros(2, np.int64)

    def count(rollouts: int, tokens: int) -> None:
        counted[:] += rollouts, tokens

    rollouts = TransformersSampler(tiny(), sampling(), batch_size=7, on_step=count).sample_block(prompt_block())
    assert counted.tolist() == [rollouts.n_rows, rollouts.n_tokens]

    def refuse(rollouts: int, tokens: int) -> None:
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        next(TransformersSampler(tiny(), sampling(), on_step=refuse).sample([prompt_block()]))


# -- the stage -----------------------------------------------------------------------------------------------


def recipe(*overrides: str) -> Recipe:
    return load_recipe("toy", ["prompts.limit=12", "rollouts.prompts_per_block=4", *overrides])


def test_the_stage_fills_a_round_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "toy.zarr")
    assert stage.run(recipe(), url) == 0
    out, err = capsys.readouterr()
    assert "12 prompts x 4" in out and "rollouts/s" in out and f"next: redpen score RECIPE --cache {url}" in err
    cache = cs.open(url)
    round_ = cache.round()
    assert round_.rollouts.committed().all() and round_.n_blocks == 3 and not list(cs.verify(cache))
    assert round_.manifest.stop_token_ids == (256, 258) and round_.manifest.vocab_size == 259
    tokenizer = resolve(recipe().student).tokenizer
    for block in range(3):
        rollouts = round_.rollouts.read(block)
        for row in range(rollouts.n_rows):
            record = round_.prompts[int(rollouts.prompt_index[rollouts.row_prompt[row]])]
            assert tokenizer.decode(rollouts.prompt(row)) == record["prompt"]
        assert (rollouts.finish_reason == cs.FINISH_STOP).mean() > 0.9

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_model", forbidden)
    assert stage.run(recipe(), url) == 0
    assert capsys.readouterr().out.strip().endswith("nothing to do")


def test_another_setting_is_another_round(tmp_path: Path) -> None:
    url = str(tmp_path / "toy.zarr")
    stage.run(recipe("prompts.limit=4"), url)
    with pytest.raises(cs.ProvenanceError, match=r"temperature: cached 1\.0, now 0\.5.*--round 1"):
        stage.run(recipe("prompts.limit=4", "rollouts.temperature=0.5"), url)
    stage.run(recipe("prompts.limit=4", "rollouts.temperature=0.5"), url, round_index=1)
    rounds = [cs.open(url).round(index) for index in (0, 1)]
    assert [r.manifest.temperature for r in rounds] == [1.0, 0.5] and all(
        r.rollouts.committed().all() for r in rounds
    )


def test_cut_responses_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = recipe("prompts.limit=4", "rollouts.max_response_tokens=3", "rollouts.format_check_prompts=0")
    stage.run(short, str(tmp_path / "toy.zarr"))
    out, err = capsys.readouterr()
    assert "100.0% cut at 3" in out and "100% of the responses were cut at rollouts.max_response_tokens = 3" in err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollouts.max_response_tokens=510",
            r"max_response_tokens: expected at most 50\d .*context of 512.*got 510",
        ),
        ("rollouts.stop_token_ids=[400]", r"rollouts\.stop_token_ids: expected ids below 259, got 400"),
    ],
)
def test_what_does_not_fit_the_student_is_refused_before_it_starts(
    tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stage.run(recipe(override), str(tmp_path / "toy.zarr"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - 5000, 5000))
    with pytest.raises(
        cs.StorageError, match=r"at full length, may need 13\.5 KiB, 4\.9 KiB are free; free some space"
    ):
        stage.run(recipe(), str(tmp_path / "toy.zarr"))
    monkeypatch.undo()
    assert stage.run(recipe(), str(tmp_path / "toy.zarr")) == 0


def test_a_locked_cache_names_who_holds_it(tmp_path: Path) -> None:
    url = str(tmp_path / "toy.zarr")
    with (
        cs.create(url).lock("redpen train"),
        pytest.raises(cs.CacheLockedError, match=r"being written by `redpen train` \(process \d+ on "),
    ):
        stage.run(recipe("prompts.limit=4"), url)

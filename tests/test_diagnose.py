"""Diagnosis: every planted fault is the first finding, a healthy pair has none, with room to every bound."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cache_schema as cs
import pipeline.models.load
import pipeline.rollouts.stage
import pipeline.score.stage
from helpers.caches import make_cache, small_recipe
from pipeline.cli import main
from pipeline.config import Recipe
from pipeline.diagnose import read, stage
from pipeline.diagnose.read import RoundSample
from pipeline.diagnose.rollout_checks import check_rollouts
from pipeline.diagnose.show import show
from pipeline.errors import RedpenError
from pipeline.models.resolve import resolve
from pipeline.text.detokenize import local_tokenizer
from pipeline.text.prompts import load_prompts
from pipeline.text.rendering import render_all
from pipeline.toy import asset_path, build

Model = Any
END, IM_END = build.END_OF_TEXT_ID, build.IM_END_ID
#: In one block, which is faster, and without sampling's own look at the form of the first responses.
UNCHECKED = ("rollouts.prompts_per_block=24", "rollouts.format_check_prompts=0")


def diagnosed(cache: Path, teachers: Sequence[str] = ("teacher",)) -> dict[str, Any]:
    seen = read.read_round(cs.open(str(cache)).round(), teachers)
    assert seen is not None
    return stage.diagnosis(seen)


def keys(found: dict[str, Any]) -> list[str]:
    return [finding["key"] for finding in found["findings"]]


# -------------------------------------------------------------------------------------------------- planting teachers


def toy_teacher() -> Model:
    return AutoModelForCausalLM.from_pretrained(asset_path("teacher"), dtype=torch.float32)


def with_rows(order: torch.Tensor, *, only_head: bool = False) -> Model:
    """The teacher with its vocabulary in another order, while its tokenizer stays."""
    model = toy_teacher()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[order].clone())
        if not only_head:
            model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[order].clone())
    return model


def shuffle() -> torch.Tensor:
    return torch.randperm(build.VOCABULARY, generator=torch.Generator().manual_seed(0))


def with_another_end() -> Model:
    """Taught to end with <|im_end|> where the student ends with <|endoftext|>."""
    order = torch.arange(build.VOCABULARY)
    order[[END, IM_END]] = order[[IM_END, END]]
    return with_rows(order, only_head=True)


def with_random_weights() -> Model:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(toy_teacher().config)


def taught_prose() -> Model:
    """Taught English, and no arithmetic."""
    text = torch.tensor(list((Path(__file__).parent.parent / "cache_schema/SPEC.md").read_bytes()))
    torch.manual_seed(4)
    model = build.build_model(64, 192, 2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(60):
        starts = torch.randint(len(text) - 33, (32,))
        rows = torch.stack([text[start : start + 33] for start in starts])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def saved(model: Model, directory: Path) -> Path:
    model.save_pretrained(directory)
    for file in asset_path("teacher").iterdir():
        if not (directory / file.name).exists():
            shutil.copy(file, directory / file.name)
    return directory


def rescored(toy_cache: Path, cache: Path, *overrides: str) -> Path:
    """The toy cache, its rollouts read by another teacher."""
    shutil.copytree(toy_cache, cache)
    shutil.rmtree(cache / "rounds/00000/scores/teacher")
    assert pipeline.score.stage.run(small_recipe(*overrides), str(cache), only="teacher") == 0
    return cache


@pytest.mark.parametrize(
    ("plant", "key", "exit_code"),
    [
        (lambda: with_rows(shuffle()), "vocabulary", 1),
        (lambda: with_rows(shuffle(), only_head=True), "vocabulary", 1),
        (with_random_weights, "unrelated", 1),
        (taught_prose, "unrelated", 1),
        (with_another_end, "eos", 0),
    ],
    ids=["rows shuffled", "head shuffled", "random weights", "another subject", "another end"],
)
def test_a_planted_teacher_is_named_first(
    plant: Callable[[], Model], key: str, exit_code: int, toy_cache: Path, tmp_path: Path, capsys: Any
) -> None:
    teacher = saved(plant(), tmp_path / "model")
    cache = rescored(toy_cache, tmp_path / "c.zarr", f"teacher.model={teacher}")
    found = diagnosed(cache)
    assert keys(found) == [key]
    capsys.readouterr()
    assert main(["diagnose", str(cache)]) == exit_code
    out = capsys.readouterr().out
    assert ("will not work" in out) == (exit_code == 1)
    assert f"({key})" in out and out.index(f"({key})") < out.index("key figures")


def test_the_teachers_own_stop_token_is_named_if_its_top_k_is_stored(toy_cache: Path, tmp_path: Path) -> None:
    teacher = saved(with_another_end(), tmp_path / "model")
    cache = rescored(toy_cache, tmp_path / "c.zarr", f"teacher.model={teacher}", "score.teacher_topk=4")
    (finding,) = diagnosed(cache)["findings"]
    assert "'<|endoftext|>'" in finding["evidence"][0] and "'<|im_end|>' (100%)" in finding["evidence"][2]
    assert finding["explains"] > 0.5 and "select.eos = false" in finding["remedy"]
    seen = read.read_round(cs.open(str(cache)).round(), ["teacher"])
    assert seen is not None
    pair = seen.pairs["teacher"]
    short = replace(pair.tokens, position=np.where(pair.tokens.stop, 1, pair.tokens.position))
    pairs = {"teacher": replace(pair, tokens=short)}  # as of responses of a word: the end is not the prompt's fault
    assert keys(stage.diagnosis(replace(seen, pairs=pairs))) == ["eos"]


def test_a_shuffled_tokenizer_is_aligned_and_no_fault(toy_cache: Path, tmp_path: Path) -> None:
    order = shuffle()
    directory = saved(with_rows(order), tmp_path / "model")
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    place = {int(old): new for new, old in enumerate(order)}  # row `new` of the weights is what was row `old`
    tokenizer["model"]["vocab"] = {token: place[index] for token, index in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = tokenizer["model"]["vocab"][token["content"]] = place[token["id"]]
    file.write_text(json.dumps(tokenizer))
    cache = rescored(toy_cache, tmp_path / "c.zarr", f"teacher.model={directory}")
    scored = cs.open(str(cache)).round().scores("teacher").manifest
    assert scored.tokenizer.digest != cs.open(str(toy_cache)).round().manifest.tokenizer.digest
    assert diagnosed(cache)["findings"] == []


def read_in_a_chat_template(toy_cache: Path, cache: Path, *, recorded: bool) -> Path:
    """The toy's rollouts, to prompts without a template, read by the teacher in its chat template."""
    recipe = small_recipe("prompts.template=chat", "rollouts.max_prompt_tokens=64")
    records, tokenizer = load_prompts(recipe.prompts), resolve(recipe.student).tokenizer
    prompts = render_all(records, tokenizer, recipe.prompts, 64)
    original = cs.open(str(toy_cache)).round()
    manifest = replace(original.manifest, max_prompt_tokens=64)
    if recorded:
        manifest = replace(manifest, template=pipeline.text.rendering.template_identity(tokenizer, recipe.prompts))
    other = cs.create(str(cache.with_suffix(".chat"))).start_round(manifest, records)
    student = other.start_scores("student", replace(original.scores("student").manifest, template=manifest.template))
    for block in range(original.n_blocks):
        read = original.rollouts.read(block)
        lengths = [len(prompts[index]) for index in read.prompt_index]
        rendered = replace(
            read,
            prompt_token_ids=np.concatenate([prompts[index] for index in read.prompt_index]),
            prompt_start=np.cumsum([0, *lengths[:-1]]).astype(np.int32),
            prompt_length=np.array(lengths, np.int32),
        )
        other.rollouts.write(block, rendered)
        student.write(block, original.scores("student").read(block))
    assert pipeline.score.stage.run(recipe, other.cache.url, only="teacher") == 0
    shutil.copytree(toy_cache, cache)
    shutil.rmtree(cache / "rounds/00000/scores/teacher")
    target = cs.open(str(cache), writable=True).round().start_scores("teacher", other.scores("teacher").manifest)
    for block in range(original.n_blocks):
        target.write(block, other.scores("teacher").read(block))
    return cache


@pytest.mark.parametrize("recorded", [True, False])
def test_a_wrong_template_of_the_teacher_is_named_first(recorded: bool, toy_cache: Path, tmp_path: Path) -> None:
    found = diagnosed(read_in_a_chat_template(toy_cache, tmp_path / "c.zarr", recorded=recorded))
    (finding,) = found["findings"]
    assert (finding["key"], finding["severity"]) == ("template", "blocks")
    said = "the student sampled with plain text, teacher scored with a chat template"
    assert finding["evidence"][-1].startswith(said) == recorded
    assert found["figures"]["teacher"]["reverse_kl_first_tokens"] > 3 * 2.0


def test_a_template_that_neither_was_taught_is_named_first(tmp_path: Path) -> None:
    """And where the teacher's tokenizer has another one, that is said."""
    teacher = saved(toy_teacher(), tmp_path / "model")
    (teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    chat = ("prompts.template=chat", "rollouts.max_prompt_tokens=64", f"teacher.model={teacher}")
    found = diagnosed(make_cache(tmp_path / "c.zarr", small_recipe(*chat, *UNCHECKED)))
    assert keys(found) == ["template", "empty"]
    assert "own chat template renders 8 of 8 prompts differently" in found["findings"][0]["evidence"][-1]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("rollouts.temperature=0", ["deterministic"]),
        ("rollouts.temperature=0.3", ["temperature"]),
        ("rollouts.max_response_tokens=10", ["truncated", "nothing-to-learn"]),
    ],
)
def test_a_fault_of_the_rollouts_is_named_first(setting: str, expected: list[str], tmp_path: Path) -> None:
    found = diagnosed(make_cache(tmp_path / "c.zarr", small_recipe(setting, *UNCHECKED)))
    assert keys(found) == expected
    assert {finding["severity"] for finding in found["findings"]} == {"harms"}
    assert setting.partition("=")[0] in found["findings"][0]["evidence"][0] + found["findings"][0]["remedy"]


def test_repeats_of_a_nucleus_are_no_fault(tmp_path: Path) -> None:
    """The student is surer there than its log-probs over the whole vocabulary say."""
    found = diagnosed(make_cache(tmp_path / "c.zarr", small_recipe("rollouts.top_p=0.7", *UNCHECKED)))
    assert "top-p" in keys(found) and "deterministic" not in keys(found)


def test_a_student_as_its_own_teacher_has_nothing_to_learn(toy_cache: Path, tmp_path: Path) -> None:
    assert keys(diagnosed(rescored(toy_cache, tmp_path / "c.zarr", "teacher.model=toy:student"))) == [
        "nothing-to-learn"
    ]


def test_a_student_that_reads_more_than_itself(toy_cache: Path, tmp_path: Path) -> None:
    """What the other prompt changes is the difference of its own log-probs with and without."""
    own = ("teacher.model=toy:student", "teacher.prompt={{ prompt }}{{ prompt }}")
    cache = rescored(toy_cache, tmp_path / "c.zarr", *own)
    found = {finding["key"]: finding for finding in diagnosed(cache)["findings"]}
    assert found["itself"]["severity"] == "note"
    round_ = cs.open(cache).round()
    with_it, without = (
        np.concatenate([round_.scores(name).read(block).logprobs for block in range(round_.n_blocks)])
        for name in ("teacher", "student")
    )
    change = with_it - without
    read, figures = found["itself"]["evidence"]
    assert "{{ prompt }}{{ prompt }}" in read
    assert f"mean {change.mean(dtype=np.float64):+.4f} nats" in figures
    assert f"50 % {np.median(change):+.3f}" in figures and f"99 % {np.percentile(change, 99):+.3f}" in figures


# ------------------------------------------------------------------------------------------------------------- health


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_wrong_with_the_toy_pair(seed: int, toy_cache: Path, tmp_path: Path) -> None:
    """Whatever was sampled, and far from every bound."""
    cache = (
        toy_cache if seed == 0 else make_cache(tmp_path / "c.zarr", small_recipe(f"rollouts.seed={seed}", *UNCHECKED))
    )
    found = diagnosed(cache)
    assert found["findings"] == []
    figures = found["figures"]["teacher"]
    assert 0.05 < figures["reverse_kl"] < 0.3 and figures["half_in"] < 0.03
    assert figures["reverse_kl_first_tokens"] < 0.05  # template: 2
    assert figures["shared_median"] > 0.99 and figures["agreement"] > 0.9  # other tokens: 0.5, 0.3
    assert figures["stop_logprob"] > -0.1  # eos: -6.9
    assert figures["unlikely"] < 0.01 and figures["wide"] < 0.08  # 0.02, 0.25
    assert figures["entropy"] < figures["student_entropy"] + 0.05  # less sure: 0.1
    share = sum(item["share"] for item in found["corrected"]["teacher"])
    assert share > 0.5 and all(item["token"].strip("'").isdigit() for item in found["corrected"]["teacher"])


def large_model(vocabulary: int, seed: int, spread: float) -> Model:
    """Random weights whose logits spread by so many nats: 6 and more is sure of a few tokens, 0.1 of none."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, spread / 32**0.5)
    return model


def test_bounds_do_not_depend_on_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    """As measured on the toy's 259 tokens: on 8,192 (and, by hand, on 4,096, 32,768 and 151,936) they are as far."""
    vocabulary, spread = 8192, 6.5
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(tokenizer_models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    student, near, shuffled = (large_model(vocabulary, 0, spread) for _ in range(3))
    with torch.no_grad():
        near.lm_head.weight.add_(0.1 * spread / 32**0.5 * torch.randn_like(near.lm_head.weight))
        order = torch.randperm(vocabulary)
        for matrix in (shuffled.lm_head.weight, shuffled.model.embed_tokens.weight):
            matrix.copy_(matrix[order].clone())
    models = {"student": student, "near": near, "shuffled": shuffled, "flat": large_model(vocabulary, 7, 0.1)}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(tmp_path / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{7 * i + 2} w{11 * i + 3}"}) + "\n" for i in range(8)))
    recipe = Recipe.from_dict(
        {
            "student": {"model": str(tmp_path / "student"), "dtype": "float32"},
            "teacher": [
                {"name": name, "model": str(tmp_path / name), "dtype": "float32"}
                for name in ("near", "shuffled", "flat")
            ],
            "prompts": {"path": str(prompts)},
            "rollouts": {"stop_token_ids": list(range(1, vocabulary, 16)), "max_response_tokens": 64}
            | {"rollouts_per_prompt": 6},
            "score": {"candidates": 16, "rows_per_chunk": 128},
        }
    )
    cache = make_cache(tmp_path / "c.zarr", recipe)
    found = diagnosed(cache, teachers=["near", "shuffled", "flat"])
    blocked = {finding["teacher"]: finding["key"] for finding in found["findings"] if finding["severity"] == "blocks"}
    assert blocked == {"shuffled": "vocabulary", "flat": "unrelated"}
    assert [finding for finding in found["findings"] if finding["teacher"] == "near"] == []
    units = {name: -figures["logprob"] / np.log(vocabulary) for name, figures in found["figures"].items()}
    assert units["shuffled"] > 2 and 0.9 < units["flat"] < 1.1  # distinguished at 1.3


# ---------------------------------------------------------------------------------------------------- single checks


@pytest.fixture(scope="module")
def healthy(toy_cache: Path) -> RoundSample:
    seen = read.read_round(cs.open(str(toy_cache)).round(), ["teacher"])
    assert seen is not None
    return seen


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("sampler", lambda look: replace(look, log_ratio=look.log_ratio - 0.2)),
        ("loops", lambda look: with_responses(look, loops=look.responses.loops | (look.responses.prompt < 2))),
        ("empty", lambda look: with_responses(look, length=np.ones_like(look.responses.length))),
        # no response is likely, yet all of a prompt's are equal
        ("deterministic", lambda look: with_responses(
            look, response=look.responses.prompt, logprob=look.responses.logprob - 20)),
        ("not-own", lambda look: with_responses(look, surprise=look.responses.surprise - 5)),
    ],
)  # fmt: skip
def test_problems_of_responses_are_reported(
    key: str, change: Callable[[RoundSample], RoundSample], healthy: RoundSample
) -> None:
    assert check_rollouts(healthy) == []
    (finding,) = check_rollouts(change(healthy))
    assert finding.key == key and finding.severity == "harms"


def with_responses(look: RoundSample, **changes: Any) -> RoundSample:
    return replace(look, responses=replace(look.responses, **changes))


def test_the_surprise_of_own_samples_is_a_few_standard_deviations_at_most(healthy: RoundSample) -> None:
    responses = healthy.responses
    assert abs(responses.surprise.sum()) < 4 * responses.spread.sum() ** 0.5
    assert responses.spread.sum() > 0.1 * responses.entropy.sum() > 0


def test_the_spread_is_the_variance_of_the_log_prob() -> None:
    p = np.array([0.5, 0.3, 0.2])
    candidates = np.array([[0, 0, 1]], np.int32)  # drawn, so repeated; token 2 is the rest
    student = cs.ScoreBlock(
        logprobs=np.log(p[:1]).astype(np.float32),
        entropy=-(p * np.log(p)).sum(keepdims=True).astype(np.float32),
        candidate_ids=candidates,
        candidate_logprobs=np.log(p)[candidates].astype(np.float32),
        rest_logprob=np.log(p[2:]).astype(np.float32),
    )
    expected = (p * np.log(p) ** 2).sum() - (p * np.log(p)).sum() ** 2
    np.testing.assert_allclose(read.spread(student), [expected], rtol=1e-5)


def test_of_few_tokens_nothing_is_concluded(healthy: RoundSample, capsys: Any) -> None:
    """A token that the teacher finds impossible is 1 of 6, and proves nothing."""
    pair, first = healthy.pairs["teacher"], slice(0, 6)
    tokens = type(pair.tokens)(**{name: value[first] for name, value in vars(pair.tokens).items()})
    lost = replace(tokens, logprob=tokens.logprob - 30, reverse_kl=tokens.reverse_kl + 30)
    found = stage.diagnosis(replace(healthy, pairs={"teacher": replace(pair, tokens=lost)}))
    assert keys(found) == ["few-tokens"] and found["corrected"] == {}
    show(found)
    assert capsys.readouterr().out.startswith("Too few tokens to say whether this pair will work.")
    responses = {name: value[first] for name, value in vars(healthy.responses).items()}
    cut = responses | {
        "length": np.ones(6, np.int64),
        "finish": np.full(6, cs.FINISH_LENGTH),
        "loops": np.ones(6, bool),
    }
    few = replace(healthy, responses=type(healthy.responses)(**cut), log_ratio=healthy.log_ratio[first] - 1)
    assert check_rollouts(few) == []


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5, *[1, 2, 3] * 8], True),
        ([7] * 24, True),
        ([7] * 23, False),
        ([*range(30)], False),
        ([*[1, 2, 3] * 8, 9], False),
        ([*range(20)] * 4, True),
        ([*range(20)] * 3, False),
    ],
)
def test_loops(ids: list[int], expected: bool) -> None:
    assert read.ends_in_a_loop(np.array(ids, np.int32)) == expected


def test_tokens_that_the_teacher_never_writes_are_named(toy_cache: Path, tmp_path: Path) -> None:
    model = toy_teacher()
    with torch.no_grad():  # the teacher ends its steps with `<|im_start|>` instead of `;`
        model.lm_head.weight[[ord(";"), build.IM_START_ID]] = model.lm_head.weight[[build.IM_START_ID, ord(";")]]
    teacher = saved(model, tmp_path / "model")
    (finding, *_) = diagnosed(rescored(toy_cache, tmp_path / "c.zarr", f"teacher.model={teacher}"))["findings"]
    assert finding["key"] == "impossible" and finding["evidence"][0].startswith("';': ")


def test_overlap_is_of_equally_many_of_both(toy_cache: Path, tmp_path: Path) -> None:
    cache = rescored(toy_cache, tmp_path / "c.zarr", "teacher.model=toy:student", "score.teacher_topk=8")
    assert diagnosed(cache)["figures"]["teacher"]["overlap"] > 0.99  # of itself; a rare sampled token is not among 8


# ------------------------------------------------------------------------------------------------------- the command


def test_json_is_what_is_shown(toy_cache: Path, capsys: Any) -> None:
    assert main(["diagnose", str(toy_cache), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(diagnosed(toy_cache)))
    assert main(["diagnose", str(toy_cache), "--teacher", "teacher", "--round", "0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("This pair can work. Nothing wrong was found.")
    assert "What teacher would correct" in shown and max(map(len, shown.splitlines())) <= 160


def test_several_teachers_stand_side_by_side(toy_cache: Path, tmp_path: Path, capsys: Any) -> None:
    blank = saved(with_random_weights(), tmp_path / "model")
    cache = shutil.copytree(toy_cache, tmp_path / "c.zarr")
    data = small_recipe().model_dump()
    data["teacher"] = [*data["teacher"], data["teacher"][0] | {"name": "blank", "model": str(blank)}]
    assert pipeline.score.stage.run(Recipe.from_dict(data), str(cache), only="blank") == 0
    capsys.readouterr()
    assert main(["diagnose", str(cache)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("With blank this will not work; see below for the others.")
    assert "[blank] (unrelated)" in " ".join(shown.split()) and "What teacher would correct" in shown
    assert main(["diagnose", str(cache), "--teacher", "teacher"]) == 0


def test_what_cannot_be_looked_at_is_one_line(toy_cache: Path, tmp_path: Path) -> None:
    def refused(cache: Path, **options: Any) -> str:
        with pytest.raises((RedpenError, cs.CacheError)) as caught:
            stage.run(str(cache), **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "expected one of teacher in" in refused(toy_cache, teacher="nobody")
    cache = shutil.copytree(toy_cache, tmp_path / "c.zarr")
    shutil.rmtree(cache / "rounds/00000/scores/student")
    assert "no block is scored by both the student and teacher" in refused(cache)
    shutil.rmtree(cache / "rounds/00000/scores/teacher")
    assert "no teacher has scored it" in refused(cache) and "redpen score" in refused(cache)


def test_part_of_a_round_is_looked_at_and_said(
    toy_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(read, "TOKENS", 700)
    assert main(["diagnose", str(toy_cache)]) == 0
    assert "of 2 evenly spaced blocks" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    cache = shutil.copytree(toy_cache, tmp_path / "c.zarr")
    cs.open(str(cache), writable=True).round().scores("teacher").uncommit(0)
    assert main(["diagnose", str(cache)]) == 0
    assert "teacher has scored 5 of 6 blocks" in capsys.readouterr().err


def test_scores_without_candidates_are_enough_for_a_diagnosis(healthy: RoundSample) -> None:
    """A teacher that scored the sampled token alone, as from an imported file."""
    scored = healthy.pairs["teacher"]
    nothing = np.full(len(scored.tokens.token), np.nan)
    alone = replace(scored.tokens, shared=nothing, agrees=nothing, entropy=nothing)
    pairs = {"teacher": replace(scored, tokens=alone)}
    found = stage.diagnosis(replace(healthy, pairs=pairs))
    assert found["findings"] == [] and found["figures"]["teacher"]["shared"] is None
    lost = replace(alone, logprob=alone.logprob - 18, reverse_kl=alone.reverse_kl + 18)
    pairs = {"teacher": replace(scored, tokens=lost)}
    assert keys(stage.diagnosis(replace(healthy, pairs=pairs))) == ["vocabulary"]


def test_without_its_tokenizer_tokens_are_ids(
    toy_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise OSError

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    local_tokenizer.cache_clear()
    assert main(["diagnose", str(toy_cache)]) == 0
    captured = capsys.readouterr()
    assert f"<{ord('9')}>" in captured.out and "is not on this machine" in captured.err
    local_tokenizer.cache_clear()

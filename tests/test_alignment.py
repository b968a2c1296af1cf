"""Teachers with other ids, or another view of the prompt: scored as if nothing were different, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cache_schema as cs
from pipeline.config import Recipe
from pipeline.errors import ModelError
from pipeline.evaluate import stage as evaluate
from pipeline.models import model_card
from pipeline.models.identity import own_prompt
from pipeline.report import document, inspect
from pipeline.runs.directory import Result
from pipeline.score import stage
from pipeline.toy import asset_path

N_TOKENS = 259
PADDED = 272


@pytest.fixture
def scored(toy_cache: Path, tmp_path: Path) -> Callable[[Recipe], cs.Round]:
    """The round of the toy cache, with the scores of a recipe's teacher, whatever its name, added."""

    def score(recipe: Recipe) -> cs.Round:
        path = tmp_path / "cache.zarr"
        if not path.exists():
            shutil.copytree(toy_cache, path)
        assert stage.run(recipe, str(path), recipe.teacher[-1].name) == 0
        assert not list(cs.verify(cs.open(path)))
        return cs.open(path).round()

    return score


def teacher_with(path: Path, new: np.ndarray[Any, Any], *, lacking: str | None = None) -> Path:
    """The toy teacher, its token i with id `new[i]` in tokenizer and weights, and padded: the same distribution."""
    shutil.copytree(asset_path("teacher"), path)
    data = json.loads((path / "tokenizer.json").read_text())
    model = data["model"]
    model["vocab"] = {token: int(new[index]) for token, index in model["vocab"].items() if token != lacking}
    for added in data["added_tokens"]:
        added["id"] = model["vocab"][added["content"]] = int(new[added["id"]])
    (path / "tokenizer.json").write_text(json.dumps(data))
    weights = load_file(path / "model.safetensors")
    order = np.concatenate([new, np.setdiff1d(np.arange(PADDED), new)])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = weights[name]
        padding = old[:1].expand(PADDED - N_TOKENS, -1)  # as unlikely as "!"
        weights[name] = torch.empty(PADDED, old.shape[1], dtype=old.dtype)
        weights[name][torch.from_numpy(order)] = torch.cat([old, padding])
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    eos = int(new[256])
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps(config | {"vocab_size": PADDED, "eos_token_id": eos, "pad_token_id": eos})
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return path


def read(round_: cs.Round, name: str) -> dict[str, np.ndarray[Any, Any]]:
    scores = [round_.scores(name).read(block) for block in range(round_.n_blocks)]
    present = {field for field, value in vars(scores[0]).items() if value is not None}
    return {field: np.concatenate([getattr(block, field) for block in scores]) for field in present}


SHIFTED = np.random.default_rng(0).permutation(N_TOKENS) + 5


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_permuted_and_padded_ids_change_nothing(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], tmp_path: Path, placement: str
) -> None:
    straight = teacher_with(tmp_path / "straight", np.arange(N_TOKENS))
    permuted = teacher_with(tmp_path / "permuted", SHIFTED)
    for name, model in (("straight", straight), ("permuted", permuted)):
        settings = (f"teacher.model={model}", f"teacher.name={name}", "score.teacher_topk=6")
        round_ = scored(recipe(*settings, f"score.placement={placement}"))
    expected, found = read(round_, "straight"), read(round_, "permuted")
    for field in ("logprobs", "candidate_logprobs", "rest_logprob", "entropy", "topk_rest_logprob"):
        np.testing.assert_allclose(found[field], expected[field], atol=1e-6, rtol=1e-6, err_msg=field)
    np.testing.assert_allclose(np.exp(found["topk_logprobs"]), np.exp(expected["topk_logprobs"]), atol=1e-6)
    sure = expected["topk_logprobs"] > np.log(1e-4)  # ties below may go either way
    np.testing.assert_array_equal(found["topk_ids"][sure], expected["topk_ids"][sure])
    assert (found["topk_ids"] < N_TOKENS).all(), "padding is nobody's likeliest token"


@pytest.mark.parametrize("new", [SHIFTED, np.arange(N_TOKENS)], ids=["other ids", "the same ids"])
def test_a_token_that_the_teacher_lacks_has_no_score(
    new: np.ndarray[Any, Any],
    toy_cache: Path,
    scored: Callable[[Recipe], cs.Round],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    round_ = cs.open(toy_cache).round()
    student = read(round_, cs.STUDENT)["candidate_ids"]
    tokenizer = AutoTokenizer.from_pretrained(asset_path("teacher"))
    written = np.concatenate([[ord("+"), ord("*"), 256], *(round_.rollouts.read(b).token_ids for b in range(6))])
    least = int(np.setdiff1d(student, np.append(written, np.arange(256, N_TOKENS)))[0])
    straight = teacher_with(tmp_path / "straight", np.arange(N_TOKENS))
    lacking = teacher_with(tmp_path / "lacking", new, lacking=tokenizer.convert_ids_to_tokens(least))
    for name, model in (("straight", straight), ("lacking", lacking)):
        round_ = scored(recipe(f"teacher.model={model}", f"teacher.name={name}"))
    manifest = round_.scores("lacking").manifest
    assert isinstance(manifest, cs.ScoresManifest) and manifest.partial
    expected, found = read(round_, "straight"), read(round_, "lacking")
    absent, recorded = student == least, found["candidate_logprobs"]
    assert absent.any() and np.isnan(recorded[absent]).all()
    np.testing.assert_allclose(recorded[~absent], expected["candidate_logprobs"][~absent], atol=1e-5)
    rest = np.logaddexp(expected["rest_logprob"], np.where(absent, expected["candidate_logprobs"], -np.inf).max(1))
    np.testing.assert_allclose(np.exp(found["rest_logprob"]), np.exp(rest), atol=1e-6)


def test_another_tokenizer_is_refused(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    teacher = Path(shutil.copytree(asset_path("teacher"), tmp_path / "teacher"))
    data = json.loads((teacher / "tokenizer.json").read_text())
    data["model"]["vocab"]["12"] = 259
    data["model"]["merges"] = [["1", "2"]]
    data["model"]["vocab"]["0"], data["model"]["vocab"]["1"] = (
        data["model"]["vocab"]["1"],
        data["model"]["vocab"]["0"],
    )
    (teacher / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"tokenizes text differently from .* choose a teacher") as caught:
        scored(recipe(f"teacher.model={teacher}", "teacher.name=other"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_joins_further_is_refused_though_every_id_is_the_same(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """The student's own tokens are not how such a teacher writes, so it would find right answers impossible."""
    teacher = Path(shutil.copytree(asset_path("teacher"), tmp_path / "teacher"))
    data = json.loads((teacher / "tokenizer.json").read_text())
    data["model"]["vocab"] |= {added["content"]: added["id"] for added in data["added_tokens"]} | {"12": 259}
    data["model"]["merges"] = [["1", "2"]]
    (teacher / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
    weights = load_file(teacher / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:1]])
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    ours, theirs = (AutoTokenizer.from_pretrained(path).get_vocab() for path in (asset_path("student"), teacher))
    assert theirs == ours | {"12": 259}
    with pytest.raises(ModelError, match=r"\(of 259 tokens 0 differ, and it has 1 more\)"):
        scored(recipe(f"teacher.model={teacher}", "teacher.name=other"))


def by_hand(
    prompt: str, response: list[int], prefix_ids: list[int] | None = None, path: Path | None = None
) -> np.ndarray[Any, Any]:
    """The toy teacher's, or another's, log-probs of a response after a prompt, by one plain forward."""
    path = path or asset_path("teacher")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(prompt)["input_ids"] if prefix_ids is None else prefix_ids
    with torch.no_grad():
        logprobs = model(torch.tensor([ids + response])).logits.double().log_softmax(-1)[0]
    return logprobs[torch.arange(len(ids) - 1, len(ids) + len(response) - 1), response].numpy()


@pytest.mark.parametrize("kind", ["prefix", "chat"])
def test_a_teacher_reads_prompts_in_its_own_way(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], kind: str
) -> None:
    if kind == "prefix":
        own = ("teacher.prompt_prefix=11+2*2=2*2=4;11+4=15;",)
    else:
        own = ("teacher.template=chat", "teacher.system=add with care")
    own_recipe = recipe("teacher.name=own", *own)
    round_ = scored(own_recipe)
    tokenizer = AutoTokenizer.from_pretrained(asset_path("teacher"))
    block, recorded = round_.rollouts.read(0), round_.scores("own").read(0)
    for row in (0, 5, block.n_rows - 1):
        prompt = round_.prompts[int(block.prompt_index[block.row_prompt[row]])]["prompt"]
        ids = None
        if kind == "chat":
            messages = [{"role": "system", "content": "add with care"}, {"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            prompt = "11+2*2=2*2=4;11+4=15;" + prompt
        expected = by_hand(prompt, block.response(row).tolist(), ids)
        np.testing.assert_allclose(recorded.logprobs[block.response_slice(row)], expected, atol=2e-5)
    template = round_.scores("own").manifest.template  # type: ignore[union-attr]
    assert template.get("prefix", template.get("system")), template
    # and `inspect`, the page and the card say so
    read = 'before every prompt "11+2*2=' if kind == "prefix" else 'its chat template, system message "add with care"'
    (summary,) = inspect.summary(round_.cache)["rounds"]
    assert {score["name"]: score["read"] for score in summary["scores"]}["own"].startswith(read)
    assert dict(map(tuple, document.provenance(round_)))["own: read"].startswith(read)
    card = model_card.run_card(own_recipe, round_, ("own",), Result(1, "done", 0))
    assert f", which read {read}" in card and "with a prompt of its own" in card
    assert own_prompt(round_, "teacher") is None


def test_the_students_eos_is_read_as_the_teachers_own(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A base student ends with <|endoftext|>, an instruct teacher with <|im_end|>: the same thing."""
    teacher = Path(shutil.copytree(asset_path("teacher"), tmp_path / "instruct"))
    weights = load_file(teacher / "model.safetensors")
    ends = torch.tensor([256, 258])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][ends] = weights[name][ends.flip(0)]
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    round_ = scored(recipe(f"teacher.model={teacher}", "teacher.name=blind"))
    round_ = scored(recipe(f"teacher.model={teacher}", "teacher.name=aligned", "teacher.stop_token=<|im_end|>"))
    expected, blind, aligned = (read(round_, name) for name in ("teacher", "blind", "aligned"))
    ids = np.concatenate([round_.rollouts.read(block).token_ids for block in range(round_.n_blocks)])
    assert np.median(blind["logprobs"][ids == 256]) < -5 and np.median(aligned["logprobs"][ids == 256]) > -0.01
    for field in ("logprobs", "candidate_logprobs", "rest_logprob"):
        np.testing.assert_allclose(aligned[field], expected[field], atol=1e-5, err_msg=field)
    with pytest.raises(ModelError, match=r"teacher\.stop_token = '<eos>': expected a token of .*<\|endoftext\|>"):
        scored(recipe("teacher.name=third", "teacher.stop_token=<eos>"))


def test_a_base_student_of_an_instruct_teacher(
    scored: Callable[[Recipe], cs.Round], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Other ids, another template with a system message that the student never sees, another end: all at once."""
    path = teacher_with(tmp_path / "instruct", SHIFTED)
    weights = load_file(path / "model.safetensors")
    ends = torch.from_numpy(SHIFTED[[256, 258]])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name][ends] = weights[name][ends.flip(0)]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{{ ';' if m['role'] == 'system' }}{% endfor %}"
    )
    own = ("teacher.template=chat", "teacher.system=11+2*2=2*2=4;11+4=15", "teacher.stop_token=<|im_end|>")
    round_ = scored(recipe(f"teacher.model={path}", "teacher.name=own", *own))
    tokenizer = AutoTokenizer.from_pretrained(path)
    block, recorded = round_.rollouts.read(1), round_.scores("own").read(1)
    for row in (0, 5, block.n_rows - 1):
        prompt = round_.prompts[int(block.prompt_index[block.row_prompt[row]])]["prompt"]
        response = block.response(row).tolist()
        assert response[-1] == 256
        theirs = [*tokenizer(bytes(response[:-1]).decode())["input_ids"], int(SHIFTED[258])]
        assert tokenizer.convert_ids_to_tokens(theirs[-1]) == "<|im_end|>"
        ids = tokenizer("11+2*2=2*2=4;11+4=15;" + prompt)["input_ids"]
        expected = by_hand("", theirs, ids, path)
        np.testing.assert_allclose(recorded.logprobs[block.response_slice(row)], expected, atol=2e-5)
        assert expected[-1] > -0.1, "the end is the end"


def test_evaluation_reads_by_such_a_teacher_too(tmp_path: Path) -> None:
    found = []
    for name, ids in (("straight", np.arange(N_TOKENS)), ("permuted", SHIFTED)):
        teacher, out = teacher_with(tmp_path / name, ids), tmp_path / f"{name}.json"
        assert evaluate.run("toy:student", teacher=str(teacher), overrides=("eval.limit=12",), out=out) == 0
        found.append(json.loads(out.read_text())["model"]["reverse_kl"]["value"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0.01

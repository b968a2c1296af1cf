"""A teacher with another tokenizer: refused unless asked for, and then compared over the spans that both share."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import cache_schema as cs
import pipeline.score.stage
from helpers.caches import small_recipe
from pipeline.cli import main
from pipeline.errors import ConfigError, ModelError
from pipeline.evaluate import stage as evaluate
from pipeline.teachers import spans
from pipeline.teachers.prompts import TeacherPrompts
from pipeline.teachers.spans import Spans, span_view, spread_over_tokens
from pipeline.toy import asset_path, build

END = build.END_OF_TEXT_ID
#: What the teacher writes in one token: pieces of sums, and beyond the toy's bytes a letter of two bytes.
MERGED = ("12", "4;", "=1", "2;", "+1", "+12", "é", "ab", "abc")


def merging_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as the toy's, and longer pieces; ids in another order."""
    letters = bytes_to_unicode()
    pieces = ["".join(letters[byte] for byte in text.encode()) for text in MERGED]
    vocab = {"<|end|>": 0} | {letter: 256 - byte for byte, letter in letters.items()}
    merges = []
    for piece in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and piece not in vocab:
                merges.append((left, right))
                vocab[piece] = len(vocab)
    assert len(vocab) == 257 + len(MERGED)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights over that vocabulary."""
    path = tmp_path_factory.mktemp("teacher")
    tokenizer = merging_tokenizer()
    torch.manual_seed(0)
    model = build.build_model(32, 64, 2, 2)
    model.resize_token_embeddings(len(tokenizer))
    model.config.eos_token_id = model.config.pad_token_id = 0
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def scored(teacher: Path, toy_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spans") / "c.zarr"
    shutil.copytree(toy_cache, path)
    assert pipeline.score.stage.run(small_recipe(*spelt(teacher)), str(path), "other") == 0
    return path


def spelt(teacher: Path) -> tuple[str, ...]:
    return ("teacher.name=other", f"teacher.model={teacher}", "score.alignment=spans")


def by_bytes(tokens: list[bytes], others: list[bytes]) -> list[tuple[range, range]]:
    """Spans of two ways to write the same bytes."""
    ends = [np.cumsum([0, *map(len, side)]).tolist() for side in (tokens, others)]
    assert ends[0][-1] == ends[1][-1]
    cuts = sorted(set(ends[0]) & set(ends[1]))
    return [
        tuple(range(side.index(a), side.index(b)) for side in ends)  # type: ignore[misc]
        for a, b in itertools.pairwise(cuts)
    ]


def test_scores_are_those_by_hand(teacher: Path, scored: Path) -> None:
    """In float64, every rollout alone, over spans that are found from the tokens' bytes."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    round_, n_several = cs.open(scored).round(), 0
    assert not list(cs.verify(cs.open(scored)))
    for block in range(2):
        rollouts = round_.rollouts.read(block)
        found, student = (round_.scores(name).read(block).logprobs for name in ("other", "student"))
        for row in range(rollouts.n_rows):
            response = rollouts.response(row).tolist()
            assert response[-1] == END
            text = bytes(response[:-1])
            prompt = tokenizer(bytes(rollouts.prompt(row).tolist()).decode())["input_ids"]
            theirs = tokenizer(text.decode())["input_ids"]
            written = [tokenizer.decode([token]).encode() for token in theirs]
            ids = torch.tensor([[*prompt, *theirs, 0]])
            with torch.no_grad():
                logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(1)
            recorded = logp.gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()
            here = rollouts.response_slice(row)
            ours = found[here].astype(np.float64)
            the_end = (range(len(text), len(text) + 1), range(len(theirs), len(theirs) + 1))
            for a, b in [*by_bytes([bytes([token]) for token in response[:-1]], written), the_end]:
                total = recorded[b.start : b.stop].sum()
                assert ours[a.start : a.stop].sum() == pytest.approx(total, abs=2e-4)
                gap = ours[a.start : a.stop] - student[here][a.start : a.stop]
                np.testing.assert_allclose(gap, gap[0], atol=2e-5)
                n_several += len(a) > 1
    assert n_several > 20


@given(data=st.data())
def test_shares_of_a_span_add_up_to_it(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5))
    of_student = np.repeat(np.arange(len(lengths)), [a for a, _ in lengths])
    of_teacher = np.repeat(np.arange(len(lengths)), [b for _, b in lengths])
    left_out = data.draw(st.sampled_from([-2, *range(len(lengths))]))
    of_student[of_student == left_out] = of_teacher[of_teacher == left_out] = -1
    rng = np.random.default_rng(0)
    scale = data.draw(st.sampled_from([0.1, 1.0, 10.0]))  # of the teacher's: likelier than the student's, or less
    own = (-(rng.random(len(of_student)) ** 4)).astype(np.float32)
    recorded = (-scale * rng.random(len(of_teacher))).astype(np.float32)
    found = spread_over_tokens([Spans(np.zeros(len(recorded), np.int32), of_student, of_teacher)], own, recorded)
    for span in range(len(lengths)):
        if span == left_out:
            continue
        shares = found[of_student == span]
        assert shares.sum() == pytest.approx(recorded[of_teacher == span].sum(), abs=1e-5)
        shift = (shares - own[of_student == span])[shares < 0]
        np.testing.assert_allclose(shift, shift[0], atol=1e-5)
        assert (shares <= 0).all() and (own[of_student == span][shares == 0] + shift[0] >= -1e-5).all()
    assert (np.isnan(found) == (of_student == -1)).all()


def test_letters_of_several_bytes_and_text_that_is_none() -> None:
    student = AutoTokenizer.from_pretrained(asset_path("student"))
    view = span_view(student, merging_tokenizer(), "m", TeacherPrompts([]), [END], 0)

    def spans(response: bytes) -> Spans:
        return view._spans(np.array([*response, END], np.int32))

    found = spans("aéb".encode())
    assert found.of_student.tolist() == [0, 1, 1, 2, 3] and found.of_teacher.tolist() == [0, 1, 2, 3]
    found = spans(b"abc")
    assert found.of_student.tolist() == [0, 0, 0, 1] and found.of_teacher.tolist() == [0, 1]
    for another in (
        b"a\xff",
        b"a<|end|>b",
    ):  # half a letter, and what is the teacher's end: it would read another text
        assert spans(another).of_student.tolist() == [*[-1] * len(another), 0]


def test_text_that_a_tokenizer_changes_is_in_no_span() -> None:
    student = AutoTokenizer.from_pretrained(asset_path("student"))
    lower = merging_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    view = span_view(student, lower, "m", TeacherPrompts([]), [END], 0)
    for text, of_student in ((b"ab", [0, 0, 1]), (b"aB", [-1, -1, 0])):
        assert view._spans(np.array([*text, END], np.int32)).of_student.tolist() == of_student
    spaced = merging_tokenizer()
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    with pytest.raises(
        ModelError, match=r"reads .*a' for 'a', so a response would begin with what the student did not"
    ):
        span_view(student, spaced, "m", TeacherPrompts([]), [END], 0)


def test_a_teacher_with_another_tokenizer_reads_its_own_text(teacher: Path, toy_cache: Path, tmp_path: Path) -> None:
    """As with a prefix, whose scores are tried by hand elsewhere."""
    path = Path(shutil.copytree(toy_cache, tmp_path / "c.zarr"))
    for name, own in (("a", "prompt_prefix=12;"), ("b", "prompt=12;{{ prompt }}"), ("c", "prompt={{ prompt }}")):
        made = small_recipe(*spelt(teacher)[1:], f"teacher.name={name}", f"teacher.{own}")
        assert pipeline.score.stage.run(made, str(path), name) == 0
    round_ = cs.open(path).round()
    a, b, c = (round_.scores(name).read(0).logprobs for name in "abc")
    assert np.array_equal(a, b, equal_nan=True) and not np.allclose(a, c, equal_nan=True)
    assert round_.scores("b").manifest.template["columns"] == ["prompt"]


def test_spans_are_trained_on_and_reported(
    teacher: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = cs.open(scored).round().scores("other").manifest
    assert isinstance(manifest, cs.ScoresManifest)
    assert manifest.template["alignment"] == "spans" and (manifest.candidates, manifest.partial) == (0, True)
    for loss in ("reverse_kl", "importance_sampling"):
        settings = ("train.teacher=other", f"train.loss={loss}", "train.steps=2", "train.stop_reverse_kl=0")
        arguments = [part for setting in settings for part in ("--set", setting)]
        run = tmp_path / loss
        assert main(["train", "toy", "--cache", str(scored), "--run", str(run), *arguments]) == 0
        assert all(np.isfinite(json.loads(line)["loss"]) for line in (run / "metrics.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert main(["diagnose", str(scored), "--teacher", "other"]) in (0, 1)
    assert "fraction of the student's tokens" not in capsys.readouterr().out  # it scored all of them
    recipe = tmp_path / "spans.toml"
    recipe.write_text(small_recipe(*spelt(teacher)).to_toml())
    assert evaluate.run("toy:student", recipe=str(recipe), teacher=str(teacher), overrides=("eval.limit=8",)) == 0
    assert "tokenizes text differently from the student, so reverse KL to it is left out" in capsys.readouterr().err


def test_the_fraction_of_tokens_covered_is_reported(
    teacher: Path,
    toy_cache: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With spans of one token only, what the teacher merges is left out."""
    monkeypatch.setattr(spans, "LONGEST", 1)
    cache = tmp_path / "c.zarr"
    shutil.copytree(toy_cache, cache)
    assert pipeline.score.stage.run(small_recipe(*spelt(teacher)), str(cache), "other") == 0
    round_ = cs.open(cache).round()
    recorded = np.isfinite(np.concatenate([round_.scores("other").read(b).logprobs for b in range(round_.n_blocks)]))
    share = f"{recorded.mean():.1%}"
    assert 0.5 < recorded.mean() < 0.95
    assert f"{share} of tokens scored (in spans that both tokenizers share)" in capsys.readouterr().out
    assert main(["diagnose", str(cache), "--teacher", "other"]) in (0, 1)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fraction of the student's tokens" in line)
    assert line.split()[-1] == f"{recorded.mean():.0%}"


def test_it_is_refused_with_the_option_and_where_it_cannot_be(teacher: Path, toy_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.zarr"
    shutil.copytree(toy_cache, cache)
    with pytest.raises(ModelError, match=r'set score\.alignment = "spans" to compare the spans of text'):
        pipeline.score.stage.run(small_recipe(*spelt(teacher)[:2]), str(cache), "other")
    with pytest.raises(ConfigError, match=r'score\.alignment = "spans" needs placement "resident" or "streamed"'):
        small_recipe(*spelt(teacher), "teacher.placement=vllm")


def test_streamed_says_the_same(teacher: Path, toy_cache: Path, scored: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.zarr"
    shutil.copytree(toy_cache, cache)
    assert (
        pipeline.score.stage.run(small_recipe(*spelt(teacher), "score.placement=streamed"), str(cache), "other") == 0
    )
    for block in range(2):
        found, expected = (cs.open(path).round().scores("other").read(block).logprobs for path in (cache, scored))
        np.testing.assert_array_equal(found, expected)

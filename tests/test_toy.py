"""The toy world, its tokenizer, and the shipped teacher and student."""

import json
from pathlib import Path

import pytest

from pipeline.toy import ASSETS, asset_names, asset_path, world

HELDOUT_SAMPLE = 256


def read_records(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in asset_path(name).read_text(encoding="utf-8").splitlines()]


def test_world_sums() -> None:
    problem = world.Problem(487, 3, 5)
    assert problem.prompt == "487+3*5="
    assert world.solve(problem) == ("3*5=15;487+15=502", 502)
    assert world.misconception(problem) == ("3*5=15;487+15=492", 492)
    assert world.Problem.parse("487+3*5=") == problem


@pytest.mark.parametrize(
    ("x", "y", "expected"), [(0, 0, 0), (7, 5, 2), (95, 25, 10), (990, 10, 900), (999, 25, 914), (50, 12, 62)]
)
def test_addition_without_carry(x: int, y: int, expected: int) -> None:
    assert world.add_without_carry(x, y) == world.add_without_carry(y, x) == expected


@pytest.mark.parametrize("prompt", ["", "487+3=", "487+3*=", "a+b*c=", "1+2*3*4="])
def test_parse_refuses_other_text(prompt: str) -> None:
    with pytest.raises(ValueError, match="expected the form"):
        world.Problem.parse(prompt)


def test_misconception_differs_exactly_where_a_column_overflows() -> None:
    def overflows(x: int, y: int) -> bool:
        return any(int(a) + int(b) > 9 for a, b in zip(f"{x:04d}", f"{y:04d}", strict=True))

    everything = list(world.problems())
    carries = 0
    for problem in everything:
        carry = overflows(problem.addend, problem.left * problem.right)
        assert (world.solve(problem)[1] != world.misconception(problem)[1]) == carry == problem.has_carry
        carries += carry
    assert 0.57 < 1 - carries / len(everything) < 0.59


@pytest.mark.parametrize(
    ("response", "answer"),
    [("3*5=15;487+15=502", 502), ("=0", 0), ("", None), ("3*5=", None), ("=5x", None), ("7", 7)],
)
def test_read_answer(response: str, answer: int | None) -> None:
    assert world.read_answer(response) == answer


def test_splits_cover_the_world_once() -> None:
    train, heldout = set(world.problems("train")), set(world.problems("heldout"))
    assert not train & heldout
    assert len(train) >= 8192 and len(heldout) >= 2048
    assert train | heldout == set(world.problems())


def test_sample_is_seeded_and_bounded() -> None:
    assert world.sample("train", 100, 3) == world.sample("train", 100, 3) != world.sample("train", 100, 4)
    with pytest.raises(ValueError, match="expected at most"):
        world.sample("heldout", 10**6, 0)


def test_shipped_prompts() -> None:
    train, heldout = read_records("prompts/train.jsonl"), read_records("prompts/heldout.jsonl")
    assert (len(train), len(heldout)) == (8192, 2048)
    assert len({record["prompt"] for record in train + heldout}) == 8192 + 2048
    for split, records in (("train", train), ("heldout", heldout)):
        for record in records:
            problem = world.Problem.parse(record["prompt"])
            assert problem.split == split
            assert record == world.prompt_record(problem)


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 5_500_000


def test_asset_path_names_what_exists() -> None:
    assert all(asset_path(name).exists() for name in asset_names())
    with pytest.raises(FileNotFoundError, match="expected one of student, teacher"):
        asset_path("tutor")


@pytest.mark.parametrize("name", ["student", "teacher", "reader"])
def test_tokenizer_round_trips_any_text(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(asset_path(name))
    texts = [
        "487+3*5=",
        " spaces  , kept ! isn't it \n\t ",
        "👩‍🚀 naïve 漢字 \u2028\ufeff",
        "".join(map(chr, range(32))) + "\x7f",
    ]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [256, 257, 258]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (256, 256, None)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1*1="}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\n1+1*1=<|im_end|>\n<|im_start|>assistant\n"


def test_shipped_tokenizer_is_the_built_one(tmp_path: Path) -> None:
    from pipeline.toy.build import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path)
    for name in ("student", "teacher", "reader"):
        built = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        assert json.loads((asset_path(name) / "tokenizer.json").read_text(encoding="utf-8")) == built


def test_encoded_rows_label_the_response_and_its_end() -> None:
    from pipeline.toy.build import END_OF_TEXT_ID, IGNORED, ROW_TOKENS, encode

    problems = [world.Problem(10, 1, 1), world.Problem(999, 5, 5), world.Problem(487, 3, 5)]
    ids, labels = encode(problems, world.misconception)
    assert ids.shape == labels.shape == (3, ROW_TOKENS)
    for problem, row, row_labels in zip(problems, ids.tolist(), labels.tolist(), strict=True):
        prompt, response = problem.prompt.encode(), world.misconception(problem)[0].encode()
        text = [*prompt, *response]
        assert row == text + [END_OF_TEXT_ID] * (ROW_TOKENS - len(text))
        wanted = [IGNORED] * len(prompt) + [*response, END_OF_TEXT_ID]
        assert row_labels == wanted + [IGNORED] * (ROW_TOKENS - len(wanted))


def test_rows_after_their_solution() -> None:
    from pipeline.toy.build import END_OF_TEXT_ID, IGNORED, ROW_TOKENS, SHOWN_TOKENS, encode

    problem = world.Problem(999, 5, 5)
    width = ROW_TOKENS + SHOWN_TOKENS
    ids, labels = encode([problem], world.solve, width=width, shown=True)
    shown, response = f"{world.solve(problem)[0]}\n{problem.prompt}", world.solve(problem)[0]
    assert problem.with_solution == shown and len(shown) + len(response) + 1 == width
    assert ids[0].tolist() == [*shown.encode(), *response.encode(), END_OF_TEXT_ID]
    assert labels[0].tolist() == [IGNORED] * len(shown) + [*response.encode(), END_OF_TEXT_ID]


@pytest.mark.parametrize(
    ("name", "shown", "low", "high"),
    [
        ("teacher", False, 0.95, 1.0),
        ("student", False, 0.50, 0.66),
        ("reader", False, 0.5, 0.66),
        ("reader", True, 0.99, 1),
    ],
)
def test_shipped_models_have_the_documented_accuracy(name: str, shown: bool, low: float, high: float) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from pipeline.toy.build import mark, respond

    model = AutoModelForCausalLM.from_pretrained(asset_path(name), dtype=torch.float32).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.max_position_embeddings >= 256
    assert model.generation_config.eos_token_id == [256, 258]
    problems = [world.Problem.parse(record["prompt"]) for record in read_records("prompts/heldout.jsonl")]
    marks = mark(problems[:HELDOUT_SAMPLE], respond(model, problems[:HELDOUT_SAMPLE], shown=shown))
    assert low <= marks.right <= high
    if high < 1:
        assert marks.misconception_of_wrong >= 0.9

"""Recipes: shipped ones parse, whatever is wrong is one line, and what is written reads back."""

from __future__ import annotations

import random
import re
import time
import tomllib
from pathlib import Path
from typing import get_args

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from pipeline.config import Recipe, load_recipe, load_stored_recipe, recipe_names, recipe_text, schema
from pipeline.errors import ConfigError
from pipeline.train.checks import check_single_pass

MINIMAL = {"student": {"model": "a"}, "teacher": {"model": "b"}, "prompts": {"path": "p.jsonl"}}
TWO_TEACHERS = MINIMAL | {"teacher": [{"model": "b", "name": "big"}, {"model": "c", "name": "code"}]}


def all_fields() -> list[tuple[str, object]]:
    names = schema.known_settings(Recipe)
    return [(name, schema.find_setting(Recipe, name.split("."))) for name in names]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_parses_and_survives_being_written(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    explained = recipe.to_toml(explained=True)
    assert Recipe.from_dict(tomllib.loads(explained)) == recipe
    for setting in (name for name in schema.known_settings(Recipe) if name.count(".") == 1):
        key = setting.partition(".")[2]
        assert any(f"\n{start}" in explained for start in (f"{key} = ", f"# {key} = ", f"[[{setting}]]"))
    assert recipe_text(name).startswith("# "), "its first line is shown by `redpen recipes`"


def test_shipped_recipes_are_what_they_are_named_for() -> None:
    toy, ours, source = (load_recipe(name) for name in ("toy", "qwen3-8b-from-32b", "qwen3-8b-source"))
    assert toy.student.model == "toy:student" and toy.prompts.limit == 512 and not toy.warnings()
    train = ours.train
    assert (train.lora_rank, train.learning_rate, train.steps, train.prompts_per_step) == (64, 1e-4, 150, 64)
    assert ours.rollouts.temperature == 1 and ours.rollouts.rollouts_per_prompt == 4 and not ours.warnings()
    assert (source.rollouts.temperature, source.train.learning_rate) == (0.3, 5e-7)
    assert source.train.loss == "importance_sampling"
    recorded = " ".join(source.warnings())
    assert all(
        key in recorded for key in ("rollouts.temperature", "train.learning_rate", 'train.advantage = "cached"')
    )
    check_single_pass(source, 9600)


@pytest.mark.parametrize(("name", "field"), all_fields())
def test_every_setting_says_what_it_means(name: str, field: FieldInfo) -> None:
    assert field.description
    if type(None) in get_args(field.annotation):  # TOML has no null, so leaving a setting out must mean None
        assert field.default is None, name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "--set train.learning_rat is not a setting; did you mean train.learning_rate?"),
        ("rollouts.learning_rate=1", "did you mean train.learning_rate?"),
        ("trian.steps=3", "--set trian is not a setting; did you mean train?"),
        ("learning_rate=1", 'expected section.key=value, got "learning_rate=1"; did you mean train.learning_rate?'),
        ("train.zzz=1", "--set train.zzz is not a setting; [train] has loss, "),
        ("zzz.zzz=1", "--set zzz is not a setting; a recipe has student, teacher, "),
        ("train.steps", 'expected section.key=value, got "train.steps"'),
        ("train..steps=1", "expected section.key=value"),
        ("train.steps=ten", '--set train.steps must be an integer >= 1, got "ten"'),
        ("train.steps=1.5", "--set train.steps must be an integer >= 1, got 1.5"),
        ("train.steps=0", "--set train.steps must be an integer >= 1, got 0"),
        ("train.steps.x=1", "train.steps is not a table"),
        ("train.learning_rate=nan", "must be a number > 0 and <= 1, got NaN"),
        ("train.betas=[0.9]", "--set train.betas must be a list of 2 numbers >= 0 and < 1, got too few"),
        ("train.lora_targets=3", '--set train.lora_targets must be "all-linear" or a list of strings, got 3'),
        ("train.loss=forward", '"cross_entropy", got "forward"'),
        ("student.dtype=int8", '"float32", got "int8"'),
        ("student.trust_remote_code=1", "must be true or false, got 1"),
        ("student.model=", "student.model is missing: expected a non-empty string (Hub id, "),
        ('student.model=""', 'must be a non-empty string, got ""'),
        ("teacher.name=a/b", "teacher.name must be letters, digits"),
        ("teacher.name=student", "teacher.name must be letters, digits"),
        ("rollouts.stop_token_ids=[-1]", "must be a non-empty list of integers >= 0, got -1"),
        ("rollouts.top_p=0", "must be a number > 0 and <= 1, got 0"),
        ("prompts.template_args=3", "prompts.template_args must be a table, got 3"),
        ("prompts.template_args.day=2020-01-01", "prompts.template_args must hold only text, numbers"),
        ("eval.answer_pattern=(", "eval.answer_pattern must be a regular expression: missing )"),
        ("eval.answer_pattern=a", "must hold exactly one group (...), it holds 0"),
        ("score.candidates=0", "must be an integer >= 1 and <= 4096, got 0"),
        ("train.advantage=cached", 'belongs to train.loss = "importance_sampling"'),
        ("student.model=\udcff", "expected UTF-8 text"),
        ("prompts.skip=" + "9" * 23, "prompts.skip"),
        ("prompts.skip=" + "9" * 5000, "prompts.skip"),
        ("prompts.template_args.x=" + "[" * 5000, "prompts.template_args.x"),
        ("prompts.template_args." + "x." * 50 + "x=1", "prompts.template_args.x.x"),
        ("prompts.template_args." + "x." * 5000 + "x=1", "--set"),
        ("x" * 100_000 + ".x=1", "--set"),
        ("x" * 900 + ".x=1", "is not a setting"),
        ('prompts.path="a\\u0000b"', "prompts.path"),
        ("prompts.path=" + "x" * 100_000, "prompts.path"),
        ("teacher.name=" + "x" * 300, "teacher.name"),
        ("train.steps=4294967296", "train.steps must be an integer >= 1 and <= 2147483647"),
        ("train.max_grad_norm=1e300", "train.max_grad_norm"),
        ("prompts.template_args.add_generation_prompt=true", "add_generation_prompt is set by redpen"),
        ("teacher.template_args.day=2020-01-01", "teacher.template_args must hold only text"),
        ("eval.format=a{99999999999999999999}", "eval.format must be"),
        ("eval.answer_pattern=" + "(" * 5000 + ")" * 5000, "eval.answer_pattern must be"),
    ],
)
def test_bad_override_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("toy", [override])
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_every_number_has_an_upper_bound() -> None:
    """Which is no decoration: 2^31 of everything at once is what the largest array shapes still hold."""
    for name, field in all_fields():
        assert isinstance(field, FieldInfo)
        if {int, float} & {field.annotation, *get_args(field.annotation)}:
            bounds = [getattr(one, "le", None) or getattr(one, "lt", None) for one in field.metadata]
            assert any(bound is not None and bound < 2**31 for bound in bounds), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "recipe: student is missing: expected a table with model, "),
        (MINIMAL | {"student": 3}, "recipe: student must be a table with model, "),
        (
            {"student": {"modle": "a"}},
            "recipe: student.modle is not a setting; did you mean student.model? (and 3 more: ",
        ),
        (MINIMAL | {"teacher": []}, "recipe: teacher must be a non-empty list of tables"),
        (MINIMAL | {"teacher": [3, 4]}, "recipe: teacher must be a non-empty list of tables"),
        (MINIMAL | {"teacher": [{"model": "a"}] * 2}, "two teachers are named 'teacher'"),
        (MINIMAL | {"teacher": [{"model": "a", "name": "x"}, {"model": 3, "name": "y"}]}, "teacher.y.model must be"),
        (
            MINIMAL | {"train": {"step": 1, "lora_rnk": 2}},
            "train.step is not a setting; did you mean train.steps? (and 1",
        ),
        (
            MINIMAL | {"train": {"loss": "importance_sampling"}, "rollouts": {"top_p": 0.9}},
            'rollouts.top_p must be 1 for train.loss = "importance_sampling", got 0.9',
        ),
        (MINIMAL | {"prompts": {"path": "p", "template": "none", "system": "s"}}, "need a chat template"),
    ],
)
def test_bad_recipe_is_one_line(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.from_dict(data)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("toi", None, "recipe toi: no such file; expected a TOML file or one of company, context-distillation, "
                      "qwen3-8b-from-32b, qwen3-8b-source, self-distillation, toy, toy-ensemble, toy-grpo, toy-self; "
                      "did you mean toy?"),
        ("my.toml", b"a = ", "my.toml: not valid TOML: "),
        ("my.toml", b"a = '\xff'", "my.toml: expected UTF-8 text, found byte 0xff at 5"),
        ("my.toml", b"[student]\nmodel = 1", "my.toml: student.model must be a non-empty string, got 1"),
        ("", None, "recipe : no such file"),
        ("my.toml", b"\xef\xbb\xbf[student]\nmodel = 1", "student.model must be"),
        ("my.toml", b"a = " + b"[" * 5000 + b"]" * 5000, "my.toml: "),
        ("my.toml", b".".join([b"a"] * 5000) + b" = 1", "my.toml: a.a."),
        ("my.toml", b"a = " + b"9" * 5000, "my.toml: not valid TOML"),
        ("my.toml", b"[prompts]\nskip = " + b"9" * 23, "my.toml: prompts.skip"),
        ("my.toml", b"a = 2020-02-31", "my.toml: not valid TOML"),
        ("my.toml", b"#" * 2**21, "my.toml: expected at most"),
        ("x" * 300, None, "cannot be read"),
        ("x" * 100_000, None, "cannot be read"),
        ("a\0b", None, "no such file"),
        (".", None, "directory"),
    ],
)  # fmt: skip
def test_bad_file_is_one_line(
    tmp_path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(name)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_overrides() -> None:
    recipe = load_recipe(
        "toy",
        [
            "train.learning_rate=5e-4",
            "train.loss=importance_sampling",
            "student.revision=2024",
            "teacher.model=my/teacher",
            "prompts.template=chat",
            "prompts.template_args.enable_thinking=false",
            "prompts.limit=",
            "train.lora_targets=['q_proj', 'v_proj']",
            "eval.answer_pattern=answer: (.*)",
        ],
    )
    assert recipe.train.learning_rate == 5e-4 and recipe.train.loss == "importance_sampling"
    assert recipe.student.revision == "2024" and recipe.teacher[0].model == "my/teacher"
    assert recipe.prompts.template_args == {"enable_thinking": False} and recipe.prompts.limit is None
    assert recipe.train.lora_targets == ["q_proj", "v_proj"] and recipe.eval.answer_pattern == "answer: (.*)"


def test_overrides_of_several_teachers() -> None:
    recipe = Recipe.from_dict(TWO_TEACHERS, overrides=["teacher.code.dtype=float16"])
    assert [teacher.dtype for teacher in recipe.teacher] == ["bfloat16", "float16"]
    assert Recipe.from_dict(MINIMAL, overrides=["teacher.teacher.dtype=float16"]).teacher[0].dtype == "float16"
    for wrong in ("teacher.dtype=float16", "teacher.third.dtype=float16"):
        with pytest.raises(ConfigError, match=r"expected teacher\.NAME\.dtype with NAME one of big, code"):
            Recipe.from_dict(TWO_TEACHERS, overrides=[wrong])
    with pytest.raises(ConfigError, match=r"teacher\.code\.dtyp is not a setting; did you mean teacher\.dtype"):
        Recipe.from_dict(TWO_TEACHERS, overrides=["teacher.code.dtyp=x"])
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_recipe_data_is_not_changed_by_overrides() -> None:
    data = {"student": {"model": "a"}, "teacher": {"model": "b"}, "prompts": {"path": "p"}}
    Recipe.from_dict(data, overrides=["student.model=x", "train.steps=1"])
    assert data == {"student": {"model": "a"}, "teacher": {"model": "b"}, "prompts": {"path": "p"}}


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)))
names = texts.map(lambda name: f"{name}_")  # which is nothing that apply_chat_template takes itself
json_values = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@hypothesis.settings(deadline=None)  # a busy machine is no failure
@given(path=names, args=st.dictionaries(names, json_values, max_size=3), rate=st.floats(1e-30, 1))
def test_whatever_a_recipe_holds_reads_back(path: str, args: dict[str, object], rate: float) -> None:
    data = MINIMAL | {"prompts": {"path": path, "template_args": args}, "train": {"learning_rate": rate}}
    recipe = Recipe.from_dict(data)
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe


def test_a_removed_setting_is_named_and_its_default_read(tmp_path: Path) -> None:
    """Recipes stored in runs hold every setting, defaults included."""
    recipe, path = load_recipe("toy"), tmp_path / "recipe.toml"
    for value in ("false", "true"):
        path.write_text(recipe.to_toml().replace("[train]\n", f"[train]\nresidual_baseline = {value}\n"))
        if value == "false":
            assert load_recipe(str(path)) == recipe
    with pytest.raises(ConfigError, match=r"recipe\.toml: train\.residual_baseline was removed"):
        load_recipe(str(path))
    with pytest.raises(ConfigError, match=r"^--set train\.residual_baseline was removed"):
        load_recipe("toy", ["train.residual_baseline=true"])


def mutated(rng: random.Random, text: str) -> str:
    """A recipe with a few lines that somebody mistyped, or made to do harm."""
    values = [
        *(
            "true",
            "-1",
            "0",
            "1e400",
            "nan",
            "[]",
            "{}",
            '""',
            "[[1]]",
            "2020-01-01",
            "[1, 'a']",
            "{ a = { b = 1 } }",
        ),
        *(
            "9" * 30,
            "9" * 5000,
            f'"{"x" * 5000}"',
            "[" * 3000 + "]" * 3000,
            '"\\u0000"',
            '"\\u202e"',
            '"é"',
            "''\n[x]",
        ),
        *("0x7fffffffffffffff", "2147483648", "-9223372036854775808", "{ name = 'a' }", "[{ model = 'a' }]"),
    ]
    lines = text.splitlines()
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        key, equals, value = lines[place].partition("=")
        match rng.randrange(6):
            case 0 | 1 | 2:
                lines[place] = f"{key}= {rng.choice(values)}"
            case 3:
                lines.insert(place, lines[rng.randrange(len(lines))])
            case 4:
                lines[place] = key.strip() + rng.choice(["s", "." * 3, ".a" * 40, "x" * 3000]) + equals + value
            case _:
                lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)]
    return "\n".join(lines)


def test_a_mutated_recipe_is_one_line_or_a_recipe(tmp_path: Path) -> None:
    rng, path, refused = random.Random(0), tmp_path / "my.toml", 0
    texts = [load_recipe(name).to_toml() for name in recipe_names()]
    for _ in range(300):
        path.write_text(mutated(rng, rng.choice(texts)), encoding="utf-8")
        try:
            recipe = load_recipe(str(path))
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000 + len(str(path))
        else:
            assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
            recipe.warnings()
    assert 30 < refused < 300


@pytest.mark.parametrize("value", [32, 0])
def test_a_renamed_setting_is_named_and_read_from_runs(tmp_path: Path, value: int) -> None:
    recipe, path = load_recipe("toy", [f"rollouts.format_check_prompts={value}"]), tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml().replace("format_check_prompts", "entry_prompts"))
    assert load_stored_recipe(path) == recipe
    with pytest.raises(ConfigError, match=r"entry_prompts .* use rollouts\.format_check_prompts"):
        load_recipe(str(path))
    for read in (lambda *args: load_recipe("toy", *args), lambda *args: load_stored_recipe(path, *args)):
        with pytest.raises(ConfigError, match=r"^--set rollouts\.entry_share .* use rollouts\.format_check_min"):
            read(["rollouts.entry_share=0.5"])


COMMENTED = """\
# what this is for
[student] # small
# above
model = "toy:student" # beside

[[teacher]]
name = "one"
model = "toy:teacher"
template_args.x = 1 # dotted
# the other
[[teacher]]
name = "two" # second
model = "b"

[prompts]
path = 'p' # hf_0123456789abcdefghijABCDEFGHIJ012345

[train.route] # by source
math = "one" # sums
'*' = "two"

[train]
betas = [ # of AdamW
    0.9,
    0.95, # usual
]

[[sft.data]]
path = "d.jsonl" # documents
[[sft.data]]
# chats
path = "c.jsonl"
# the end
"""


def test_comments_are_kept_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(COMMENTED)
    written = load_recipe(str(path), ["train.steps=7"]).to_toml()
    assert Recipe.from_dict(tomllib.loads(written)) == load_recipe(str(path), ["train.steps=7"])
    for together in (
        "# what this is for\n# small\n[student]\n# above\n# beside\nmodel = ",
        "# dotted\ntemplate_args = {x = 1}",
        '# the other\n[[teacher]]\nmodel = "b"',
        '# second\nname = "two"',
        "# ***\npath = 'p'",
        "# by source\n# sums\nroute = ",
        "betas = [ # of AdamW\n    0.9,\n    0.95, # usual\n]",
        '# documents\npath = "d.jsonl"',
        '[[sft.data]]\n# chats\npath = "c.jsonl"',
    ):
        assert together in written, together
    assert written.endswith("# the end") and load_recipe(str(path)).to_toml(explained=True).count("# usual") == 1
    path.write_text(written)
    assert load_recipe(str(path)).to_toml() == written


def test_explanations_are_not_taken_for_comments(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    explained = load_recipe("toy").to_toml(explained=True)
    path.write_text(explained)
    assert load_recipe(str(path)).to_toml(explained=True) == explained
    assert "most likely tokens" not in load_recipe(str(path)).to_toml()


def test_comments_make_no_difference(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(f"# mine\n{load_recipe('toy').to_toml()}")
    assert load_recipe(str(path)) == load_recipe("toy")
    assert load_recipe(str(path)).model_copy(update={}).to_toml().startswith("# mine\n")


def test_many_tables_are_written_in_time(tmp_path: Path) -> None:
    """Comments are looked up: to search them for each setting took minutes for some thousand teachers."""
    path, toy = tmp_path / "r.toml", re.sub(r"\[teacher\](.*\n)+?\n", "", recipe_text("toy"))
    teachers = "".join(f'[[teacher]] # {n}\nname = "t{n}"\nmodel = "toy:teacher"\n' for n in range(1500))
    path.write_text(toy.replace("[prompts]", teachers + "\n[prompts]"))
    recipe, started = load_recipe(str(path)), time.process_time()
    written = recipe.to_toml()
    assert time.process_time() - started < 5
    assert written.count("[[teacher]]") == 1500 and "# 1499" in written

"""Tasks of lm-evaluation-harness, by the real harness: a task of our own on sums that the toy student answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.caches import small_recipe
from pipeline.config import Recipe
from pipeline.errors import ConfigError, PromptError, RedpenError
from pipeline.evaluate import harness, stage
from pipeline.models import load as models
from pipeline.models.resolve import resolve
from pipeline.text import chat_template
from pipeline.text.prompts import load_prompts

N = 12
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
metadata: {{version: 1.0}}
"""
GENERATED = """
generation_kwargs: {until: ["\\n"]}
filter_list:
  - name: last
    filter:
      - {function: regex, regex_pattern: '=(\\d+)\\s*$', group_select: -1}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_choice: ["first", "second"]
doc_to_target: 0
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks: sums to write, one to choose in, one whose data are not there."""
    path = tmp_path_factory.mktemp("tasks")
    heldout = small_recipe().prompts.model_copy(update={"path": "toy:heldout", "limit": N})
    data = path / "sums.jsonl"
    records = [
        record | {"loaded": int(n == 0)} for n, record in enumerate(load_prompts(heldout))
    ]  # with `loaded` at the one that the harness tries when it loads them
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    generated = TASK.format(name="sums", data=data, kind="generate_until") + GENERATED
    chosen = TASK.format(name="choice", data=data, kind="multiple_choice").replace(
        'doc_to_target: "{{answer}}"\n', ""
    )
    (path / "sums.yaml").write_text(generated)
    (path / "choice.yaml").write_text(chosen + CHOSEN)
    (path / "broken.yaml").write_text(
        generated.replace("task: sums", "task: broken").replace(
            "{{prompt}}", "{{prompt if loaded == 1 else prompt + 1}}"
        )
    )
    (path / "lost.yaml").write_text(generated.replace("task: sums", "task: lost").replace("sums.jsonl", "lost.jsonl"))
    return path


@pytest.fixture(scope="module", autouse=True)
def once(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The harness looks for our tasks alone, not for its own ten thousand; `datasets` keeps no copies of ours."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        manager = harness.TaskManager(include_path=str(directory), include_defaults=False)
        patch.setattr(harness, "TaskManager", lambda include_path: manager)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def recipe_with(directory: Path, *tasks: str, more: tuple[str, ...] = ()) -> Recipe:
    settings = (f"eval.tasks={json.dumps(tasks)}", f"eval.task_path={directory}", "rollouts.max_response_tokens=24")
    return small_recipe(*settings, *more)


def test_before_and_after_beside_the_held_out_prompts(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same sums by the harness and by redpen: equal accuracy, and the harness's standard error."""
    out, settings = tmp_path / "eval.json", (f"eval.limit={N}", f"eval.task_path={directory}")
    assert stage.run("toy:student", tasks=["sums"], overrides=[*settings, "eval.batch_size=5"], out=out) == 0
    measured = json.loads(out.read_text())["model"]
    score, p = measured["tasks"]["sums"]["exact_match, last"], measured["greedy"]["value"]
    assert score["value"] == pytest.approx(p) and 0 < p < 1
    assert score["stderr"] == pytest.approx((p * (1 - p) / (N - 1)) ** 0.5)
    said = capsys.readouterr()
    (row,) = (line for line in said.out.splitlines() if line.startswith("sums: exact_match, last"))
    assert f"{p:.4f} ± {score['stderr']:.4f}" in row
    assert "it/s" not in said.err and "model: sums by lm-evaluation-harness" in said.err


def test_a_task_that_fails_takes_nothing_from_what_was_measured(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RedpenError("eval.tasks: the harness refuses")

    monkeypatch.setattr(harness, "measure", refuse)
    out = tmp_path / "eval.json"
    settings = ["eval.limit=4", f"eval.task_path={directory}", "eval.task_limit=1"]
    with pytest.raises(RedpenError, match="the harness refuses"):
        stage.run("toy:student", tasks=["sums"], overrides=settings, out=out)
    assert "greedy" in json.loads(out.read_text())["model"]


def test_a_task_whose_responses_do_not_fit_is_refused_first(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"'sums'.*eval\.max_response_tokens is 600.*context of 512"):
        harness.load_tasks(recipe_with(directory, "sums", more=("eval.max_response_tokens=600",)).eval, 512)


def test_prompts_that_the_harness_shortens_are_reported(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_with(directory, "sums", more=("eval.max_response_tokens=508", "eval.task_limit=2"))
    model = models.load_model(recipe.student)
    harness.measure(model, resolve(recipe.student), recipe, harness.load_tasks(recipe.eval, 512))
    assert "2 prompts lost their beginning" in capsys.readouterr().err


def test_a_model_with_an_adapter_as_training_loads_it(directory: Path) -> None:
    """Packed attention and train mode on the way in and out; the second time gives what the first gave."""
    from pipeline.models.lora import add_lora

    recipe = recipe_with(directory, "sums", "choice", more=("eval.task_limit=4",))
    tasks = harness.load_tasks(recipe.eval)
    model = add_lora(models.load_model(recipe.student), recipe.train)
    model.train()
    first, second = (harness.measure(model, resolve(recipe.student), recipe, tasks) for _ in range(2))
    assert first == second and set(first) == {"sums", "choice"}
    assert first["choice"]["acc"]["value"] in (0, 0.25, 0.5, 0.75, 1)
    assert model.training and model.config._attn_implementation == "redpen_packed"


def test_the_chat_template_is_applied_where_the_recipe_does(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []
    real = harness._Student.tok_batch_encode

    def noted(self: Any, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        prompts.extend(strings)
        return real(self, strings, *args, **kwargs)

    monkeypatch.setattr(harness._Student, "tok_batch_encode", noted)
    for template in ("prompts.template=none", "prompts.template=chat"):
        system = () if template.endswith("none") else ("prompts.system=Add.",)
        recipe = recipe_with(directory, "sums", more=("eval.task_limit=1", template, *system))
        tokenizer = resolve(recipe.student).tokenizer
        model = models.load_model(recipe.student)
        harness.measure(model, resolve(recipe.student), recipe, harness.load_tasks(recipe.eval))
    plain, chat = prompts
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": plain}]
    assert chat == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1= "}]
TEMPLATES = {
    "plain": "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
    "stripping": "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>\n{% endfor %}",
    "without a system": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</>{% endfor %}",
}


@pytest.fixture(scope="module")
def evaluated(directory: Path) -> harness._Student:
    recipe = recipe_with(directory)
    return harness._Student(models.load_model(recipe.student), resolve(recipe.student).tokenizer, recipe)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("begun", [None, "2 ", "2"])
def test_chats_are_the_harness_s_text(
    evaluated: harness._Student,
    template: str,
    begun: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        evaluated.tokenizer, "chat_template", TEMPLATES[template] + "{{ '>' * add_generation_prompt }}"
    )
    monkeypatch.setattr(evaluated, "_warned", False)
    chat = CHAT if begun is None else [*CHAT, {"role": "assistant", "content": begun}]
    expected = harness.HFLM.apply_chat_template(evaluated, chat, add_generation_prompt=begun is None)
    assert evaluated.apply_chat_template(chat, add_generation_prompt=begun is None) == expected
    assert ("refuses system messages" in capsys.readouterr().err) == (template == "without a system")


def test_a_template_without_end_ends(evaluated: harness._Student, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "renderer", lambda: renderer)
    monkeypatch.setattr(evaluated.tokenizer, "chat_template", "{{ '%0999999999d' % 1 }}")
    renderer = chat_template.Renderer(0.5)
    try:
        with pytest.raises(PromptError, match="the chat template"):
            evaluated.apply_chat_template(CHAT)
    finally:
        renderer.close()


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("sum_s", ConfigError, r"^eval\.tasks: 'sum_s' is no task .* did you mean sums\?$"),
        ("lost", RedpenError, r"^eval\.tasks: 'lost' or its data set is not available \(\w+: .*lost\.jsonl.*\)$"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(
    directory: Path, task: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        harness.load_tasks(recipe_with(directory, task).eval)


def test_a_task_longer_than_the_context_names_the_setting(directory: Path) -> None:
    recipe = recipe_with(directory, "sums", more=("eval.max_response_tokens=600", "eval.task_limit=1"))
    model = models.load_model(recipe.student)
    with pytest.raises(RedpenError, match=r"refuses \(AssertionError: .*\); .*set eval\.max_response_tokens$"):
        harness.measure(model, resolve(recipe.student), recipe, harness.load_tasks(recipe.eval))


def test_an_error_in_a_task_s_code_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_with(directory, "broken", more=("eval.task_limit=2",))
    model = models.load_model(recipe.student)
    with pytest.raises(RedpenError, match=r"^eval\.tasks: the code of a task fails \(TypeError: .*\)$"):
        harness.measure(model, resolve(recipe.student), recipe, harness.load_tasks(recipe.eval))
    # an error of redpen's own is not called one
    monkeypatch.setattr(harness._Student, "apply_chat_template", None)
    monkeypatch.setattr(harness._Student, "max_length", property(lambda self: {}["absent"]))
    sums = recipe_with(directory, "sums", more=("eval.task_limit=1",))
    with pytest.raises(KeyError, match="absent"):
        harness.measure(model, resolve(recipe.student), sums, harness.load_tasks(sums.eval))


def test_a_missing_extra_or_directory_is_one_line(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.task_path = 'nowhere': expected a directory"):
        harness.load_tasks(recipe_with(Path("nowhere"), "sums").eval)
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e .*\[eval\]'?$"):
        stage.run("toy:student", tasks=["sums"], overrides=["eval.limit=2"])

"""Runs as records and as a table, and the charts of their curves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.caches import small_recipe
from pipeline.errors import RedpenError
from pipeline.report import charts, page, runs, terminal

STEPS = 12
SENTENCE = "max steps: 12 done; reverse KL on the cached rollouts is 0.01 nats a token"


def kl(step: int) -> float:
    return 0.5 / step if step != 9 else 0.01


def make_run(path: Path, *overrides: str, digest: str = "d", evaluated: bool = True) -> Path:
    """A finished run, as `redpen train` and `redpen eval` leave it."""
    path.mkdir()
    (path / "recipe.toml").write_text(small_recipe(*overrides).to_toml())
    lines = [
        {
            "step": step,
            "reverse_kl": kl(step),
            "ess": 1 - step / 100,
            "tokens": 40,
            "rows": 8,
            "tokens_read": 50,
            "time": {"seconds": 0.5, "tokens_per_second": 100.0},
        }
        | ({"heldout_accuracy": step / 20} if step % 4 == 0 else {})
        for step in range(1, STEPS + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = {"url": "c.zarr", "round": 0, "teacher": "teacher", "rollouts digest": digest}
    result = {"step": STEPS, "sentence": SENTENCE, "exit_code": 0}
    (path / "run.json").write_text(json.dumps({"cache": cache, "result": result}))
    ledger = {"rollouts": {"seconds": 1, "tokens": 2, "flops": 3e9}, "train": {"seconds": 6, "flops": 4e9}}
    (path / "ledger.json").write_text(json.dumps(ledger))
    if evaluated:
        estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
        tasks = {"ifeval": {"acc": {"value": 0.25, "stderr": 0.125}}}
        figures = {"greedy": estimate, "pass_at": {"1": estimate, "4": estimate}, "reverse_kl": estimate}
        figures |= {"tasks": tasks, "response_tokens": 3.0}
        about = {"prompts": {"path": "toy:heldout", "count": 1000}}
        (path / "eval.json").write_text(json.dumps(about | {"before": figures, "after": figures}))
    return path


# ----------------------------------------------------------------------------------------------------------- records


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = runs.read_run(make_run(tmp_path / "a"))
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert (run["sentence"], run["exit_code"]) == (SENTENCE, 0)
    assert run["recipe"]["train.lora_rank"] == 4 and run["recipe"]["teacher.model"] == "toy:teacher"
    assert run["curves"]["reverse_kl"] == [[step, kl(step)] for step in range(1, STEPS + 1)]
    assert run["curves"]["heldout_accuracy"] == [[4, 0.2], [8, 0.4], [12, 0.6]]
    assert run["curves"]["response_tokens"][0] == [1, 5.0] and "entropy" not in run["curves"]
    assert run["figures"] == {
        "steps": STEPS,
        "reverse_kl": pytest.approx(sum(map(kl, range(8, 13))) / 5),
        "ess": pytest.approx(0.9),
        "best_reverse_kl": [9, 0.01],
        "best_heldout_accuracy": [12, 0.6],
        "seconds": 6.0,
        "tokens_per_second": 100.0,
        "train_flops": 4e9,
        "flops": 7e9,
    }
    assert ["cache", "c.zarr, round 0"] in run["card"] and ["student", "toy:student"] in run["card"]
    assert ["teacher", "toy:teacher"] in run["card"]


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ({"teacher": "far"}, "far (large-model)"),
        ({"teacher": "far, hub"}, "far (large-model), hub (org/name)"),
        ({"teacher": ["hub"]}, "hub (org/name)"),  # of `redpen distill`
        ({"teacher": None}, "far (large-model), hub (org/name)"),
        ({"teacher": ""}, None),  # rewards alone
    ],
)
def test_the_card_names_the_teachers_learned_from(
    cache: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "a")
    sections = {"far": "/models/large-model/", "hub": "org/name"}
    tables = "".join(f'[[teacher]]\nname = "{name}"\nmodel = "{model}"\n' for name, model in sections.items())
    (path / "recipe.toml").write_text('[student]\nmodel = "/models/small"\n' + tables)
    (path / "run.json").write_text(json.dumps({"cache": {"url": "c.zarr", "round": 0} | cache, "result": None}))
    card = dict(runs.read_run(path)["card"])
    assert card["student"] == "small" and card.get("teacher") == expected


def test_an_unfinished_run_is_read_as_far_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path / "a", evaluated=False)
    (path / "ledger.json").unlink()
    (path / "run.json").write_text(json.dumps({"cache": {"url": "c.zarr", "round": 0}, "result": None}))
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "reverse_')
    run = runs.read_run(path)
    assert run["sentence"] is None and run["eval"] is None and run["figures"]["steps"] == STEPS
    assert capsys.readouterr().err == "", "a line that is being written is no damage"
    terminal.compare_runs([run])
    assert "has not ended, 12 of 5 steps done" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["run.json", "recipe.toml", "metrics.jsonl", "ledger.json", "eval.json"])
def test_a_damaged_file_is_left_out_with_a_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "a")
    whole = runs.read_run(path)
    (path / name).write_bytes(b"\xff[}\n" * 2)
    run = runs.read_run(path)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and f"{name}" in err
    assert sum(run[key] != whole[key] for key in run if key not in ("figures", "card", "notes")) <= 3
    terminal.compare_runs([run])
    (path / name).write_text("[1]")
    terminal.compare_runs([runs.read_run(path)])


@pytest.mark.parametrize(
    "found",
    [
        {"before": 5},
        {"after": {"pass_at": [1]}},
        {"after": {"tasks": {"ifeval": 3}}},
        {"prompts": {"count": "20", "path": 3}},
        {"prompts": "toy:heldout"},
    ],
    ids=str,
)
def test_figures_of_another_form_are_left_out(
    found: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "a")
    (path / "eval.json").write_text(json.dumps(found))
    run = runs.read_run(path)
    (line,) = capsys.readouterr().err.splitlines()
    assert run["eval"] is None and str(path / "eval.json") in line
    terminal.compare_runs([run])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RedpenError, match=r"expected a directory that `redpen train` made"):
        runs.read_run(tmp_path)


def test_values_that_are_no_numbers_are_not_in_curves(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    (path / "metrics.jsonl").write_text('{"step": 1, "reverse_kl": NaN, "ess": Infinity, "lr": "x", "loss": 1}\n')
    assert runs.read_run(path)["curves"] == {"loss": [[1, 1.0]]}


# ------------------------------------------------------------------------------------------------------------- table


def test_runs_are_compared_by_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "train.lora_rank=8", 'track.trackers=["wandb"]', digest="e", evaluated=False)
    found = runs.read_runs([tmp_path / "a", tmp_path / "b"])
    assert found[0]["differs"] == ["cache", "train.lora_rank"]
    terminal.compare_runs(found)
    lines = capsys.readouterr().out.splitlines()
    cells = {line[:24].strip(): line[24:].split() for line in lines if line[24:].strip()}
    assert cells["train.lora_rank"] == ["4", "8"] and cells["tokens/s"] == ["100", "100"]
    assert cells["greedy accuracy, before"] == ["50.0%", "(40.0", "to", "60.0)", "-"]
    assert cells["pass@4, before"][0] == "50.0%" and cells["ifeval: acc, before"][:3] == ["0.2500", "±", "0.1250"]
    assert cells["lowest"] == ["0.01000", "at", "9"] * 2
    assert "train.steps" not in cells and "track.trackers" not in cells


@pytest.mark.parametrize("n", [1, 3, 4, 11])
def test_any_number_of_runs_fits_a_page(n: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_run(tmp_path / f"run\x1b[2J{i}", f"train.lora_rank={i + 1}") for i in range(n)]
    terminal.compare_runs([run | {"name": Path(run["name"]).name} for run in runs.read_runs(paths)])
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if SENTENCE not in line]
    assert max(map(len, table)) <= 100 and "\x1b" not in out
    assert sum(line.count("run\\x1b[2J") for line in table) == n
    assert sum(line.startswith("steps ") for line in table) == math.ceil(n / 3)


# ------------------------------------------------------------------------------------------------------------ charts


def parsed(chart: str) -> ElementTree.Element:
    return ElementTree.fromstring(chart)


def drawn(chart: str) -> list[list[tuple[float, float]]]:
    """The points of every line, back from pixels to values by the ticks of the axes."""
    tree = parsed(chart)
    texts = [(t.get("class"), float(t.get("x", 0)), float(t.get("y", 0)), t.text) for t in tree.iter("text")]
    y_ticks = [(y - 4, float(text)) for kind, _, y, text in texts if kind == "end" and text]
    x_ticks = [(x, float(text)) for kind, x, _, text in texts if kind == "middle" and text and text != "step"]

    def value(pixel: float, ticks: Sequence[tuple[float, float]]) -> float:
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        return v0 + (pixel - p0) * (v1 - v0) / (p1 - p0)

    paths = [
        p.get("d", "")
        for p in tree.iter("path")
        if (p.get("class") or "").startswith("line") and "L" in p.get("d", "")
    ]
    pairs = [[tuple(map(float, pair.split())) for pair in path[1:].split("L")] for path in paths]
    return [[(value(x, x_ticks), value(y, y_ticks)) for x, y in pair] for pair in pairs]


def test_a_line_is_where_its_values_are() -> None:
    points = {"a": [[step, 0.3 / step] for step in range(1, 41)], "b": [[5, 0.2], [40, 0.1]]}
    lines = drawn(charts.line_chart("KL", points, x_label="step", y_label="nats"))
    for label, line in zip(points, lines, strict=True):
        for (x, y), (step, value) in zip(line, points[label], strict=True):
            assert x == pytest.approx(step, abs=0.02) and y == pytest.approx(value, abs=0.0003)


def test_a_chart_is_described_in_text_too() -> None:
    label = "<b>&\x1b]0;"
    chart = charts.line_chart("T", {label: [[n, n * n] for n in range(100)]}, x_label="step", y_label="y")
    tree = parsed(chart)
    svg = tree.find("svg")
    assert svg is not None and svg.get("role") == "img"
    ids = {element.get("id") for element in tree.iter() if element.get("id")}
    assert set((svg.get("aria-labelledby") or "").split()) <= ids and svg.findtext("title") == "T"
    assert "from 0 at step 0 to 9801 at 99; lowest 0 at 0, highest 9801 at 99" in (svg.findtext("desc") or "")
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows[0] == ["step", "<b>&\\x1b]0;"] and rows[1] == ["0", "0"] and rows[-1] == ["99", "9801"]
    assert all(float(x) ** 2 == float(y) for x, y in rows[1:]) and len(rows) == charts.TABLE_ROWS + 1
    assert "style=" not in chart and not re.search(r"\son\w+=", chart) and "<b>" not in chart


def test_series_differ_by_more_than_colour() -> None:
    names = [f"run {n}" for n in range(6)]
    points = {name: [[1, n], [2, n + 1.0]] for n, name in enumerate(names)} | {"run 1": []}
    tree = parsed(charts.line_chart("T", points, x_label="step", y_label="y"))
    lines = [p for p in tree.iter("path") if (p.get("class") or "").startswith("line") and "L" in p.get("d", "")]
    assert [line.get("class") for line in lines] == [f"line s{n}" for n in (0, 2, 3, 4, 5)]
    marks = {p.get("class"): p.get("d") for p in tree.iter("path") if (p.get("class") or "").startswith("mark")}
    without_colour = {(p.get("stroke-dasharray"), marks[f"mark {(p.get('class') or '')[5:]}"]) for p in lines}
    assert len(without_colour) == 5
    legend = [text.text for text in tree.iter("text") if text.text in names]
    assert legend == [name for name in names if name != "run 1"]


def test_a_line_is_named_where_others_might_have_been() -> None:
    chart = charts.line_chart("T", {"a": [[1, 2.0]], "b": []}, x_label="step", y_label="y")
    alone = charts.line_chart("T", {"a": [[1, 2.0]]}, x_label="step", y_label="y")
    assert ["a" in [text.text for text in parsed(svg).iter("text")] for svg in (chart, alone)] == [True, False]


@pytest.mark.parametrize("points", [[], [[1, math.nan]], [[math.inf, 1]]])
def test_nothing_is_no_chart(points: list[Any]) -> None:
    assert charts.line_chart("T", {"a": points}, x_label="step", y_label="y") == ""
    assert charts.bar_chart("T", ["0"], {"a": [None]}, x_label="x", y_label="y") == ""


def test_bars_stand_for_their_values() -> None:
    names = ["0", "1", "2-3"]
    tree = parsed(charts.bar_chart("T", names, {"a": [0.4, 0.2, None], "b": [0.1, 0, 0.4]}, x_label="x", y_label="y"))
    bars = [rect for rect in tree.iter("rect") if rect.find("title") is not None]
    heights = {rect.findtext("title"): float(rect.get("height", 0)) for rect in bars}
    assert heights["a, x 0: 0.4"] == pytest.approx(2 * heights["a, x 1: 0.2"], abs=0.2)
    assert heights["b, x 2-3: 0.4"] == heights["a, x 0: 0.4"] and heights["b, x 1: 0"] == 0 and len(bars) == 5
    fills = {rect.get("fill") for rect in bars}
    assert fills == {f"url(#{pattern.get('id')})" for pattern in tree.iter("pattern")} and len(fills) == 2
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows == [["x", "a", "b"], ["0", "0.4", "0.1"], ["1", "0.2", "0"], ["2-3", "", "0.4"]]


@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False), min_size=1, max_size=300),
    st.sampled_from([2, 3, 10, 51, 400]),
)
def test_thinning_keeps_ends_and_extremes(values: list[float], limit: int) -> None:
    points = list(enumerate(values))
    kept = charts.thin(points, limit)
    assert kept == sorted(set(kept)) and set(kept) <= set(points) and len(kept) <= max(limit, 2)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    if limit > 3 or len(points) <= limit:
        assert {min(values), max(values)} <= {value for _, value in kept}


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e12, 1e12)), min_size=1, max_size=20))
def test_any_values_make_a_chart(points: list[tuple[float, float]]) -> None:
    chart = charts.line_chart("T", {"a": sorted(points)}, x_label="x", y_label="y")
    (line,) = [p.get("d", "") for p in parsed(chart).iter("path") if p.get("class") == "line s0"]
    numbers = [tuple(map(float, pair.split())) for pair in line[1:].split("L")]
    assert all(0 <= x <= 460 and 0 <= y <= 270 for x, y in numbers)


def test_what_json_and_toml_lack_does_not_stop_a_page(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"result": {"step": 1, "sentence": "done", "exit_code": 0}}')
    (run / "recipe.toml").write_text("[train]\nlearning_rate = inf\n")
    tasks = '{"ifeval": {"strict": {"value": 0.25, "stderr": 0.0625}, "lost": {"value": NaN, "stderr": null}}}'
    measured = f'{{"greedy": 5, "truncated": 0.125, "tasks": {tasks}}}'
    (run / "eval.json").write_text(f'{{"prompts": null, "before": {measured}, "after": {measured}}}')
    (run / "ledger.json").write_text('{"train": {"seconds": "long", "tokens": NaN, "flops": 1e9}}')
    found = runs.read_run(run)
    document = {"title": "t", "created_by": "c", "sets": [], "runs": [found], "cache": None, "notes": []}
    text = page.render(document)
    assert (
        "ifeval: strict" in text and "0.2500 \u00b1 0.0625" in text and "12.5%" in text and "ifeval: lost" not in text
    )
    assert found["recipe"]["train.learning_rate"] == "inf"

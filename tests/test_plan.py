"""Plans against what is measured here: real models, real micro-batches, a real cache, a real run."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen3Config,
)

import cache_schema as cs
from helpers.caches import small_recipe
from helpers.models import FAMILIES
from pipeline import cli, plan
from pipeline.config import ModelConfig, Recipe, TrainConfig, load_recipe
from pipeline.forward.attention import register_packed_attention
from pipeline.forward.head import Head
from pipeline.forward.loss_head import chunked_head_loss
from pipeline.forward.packing import pack, packed_hidden
from pipeline.models import flops, meta_model
from pipeline.models.load import load_model
from pipeline.models.lora import checkpoint_gradients, make_trainable, trainable, training_mode
from pipeline.models.peak_memory import PeakBytes
from pipeline.plan import Device, cost, memory, table
from pipeline.plan.assumed import Lengths, n_prompts
from pipeline.train import stage

# As published on the Hub; the counts that these are known to have are in the tests.
QWEN3: dict[str, Any] = dict(
    vocab_size=151_936,
    head_dim=128,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    dtype="bfloat16",
    architectures=["Qwen3ForCausalLM"],
)
SHAPES: dict[str, dict[str, Any]] = {
    "8b": dict(num_hidden_layers=36, hidden_size=4096, intermediate_size=12_288, num_attention_heads=32),
    "32b": dict(num_hidden_layers=64, hidden_size=5120, intermediate_size=25_600, num_attention_heads=64),
}
TINY: dict[str, Any] = dict(
    vocab_size=71,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
#: where depth does not matter
SHALLOW = 2


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories "8b" and "32b", and "shallow-" of them, that hold a config.json and nothing else."""
    root = tmp_path_factory.mktemp("configs")
    for name, shape in SHAPES.items():
        Qwen3Config(**QWEN3, **shape).save_pretrained(root / name)
        Qwen3Config(**QWEN3, **shape | {"num_hidden_layers": SHALLOW}).save_pretrained(root / f"shallow-{name}")
    return root


Planned = Callable[..., tuple[Recipe, memory.PlannedModels]]


@pytest.fixture(scope="session")
def planned(configs: Path) -> Planned:
    """`planned(*overrides)`: the recipe of a Qwen3-8B that learns from a Qwen3-32B, and their meta_models."""

    @functools.cache
    def plan(*overrides: str, depth: str = "shallow-") -> tuple[Recipe, memory.PlannedModels]:
        names = [f"student.model={configs / f'{depth}8b'}", f"teacher.model={configs / f'{depth}32b'}"]
        recipe = load_recipe("qwen3-8b-from-32b", [*names, *overrides])
        return recipe, memory.PlannedModels.of(recipe)

    return plan


# -- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model_itself(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config)
    counted = meta_model.Weights.of(meta_model.load_meta_model(ModelConfig(model=str(tmp_path), dtype="float32")))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.nbytes == 4 * counted.parameters


def test_parameters_of_the_toy_are_those_in_its_files() -> None:
    student = ModelConfig(model="toy:student", dtype="float32")
    counted, model = meta_model.Weights.of(meta_model.load_meta_model(student)), load_model(student)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted == meta_model.Weights.of(model)


def test_qwen3_has_the_number_of_parameters_that_its_authors_state(planned: Planned) -> None:
    """8.2 B of which 6.95 B are no embeddings; 32.8 B, 31.2 B. The head multiplies, the input embedding does not."""
    weights = planned(depth="")[1].weights
    assert weights["student"].parameters == 8_190_735_360
    assert weights["student"].multiplied == 8_190_735_360 - 151_936 * 4096
    assert weights["teacher"].parameters == 32_762_123_264
    assert weights["teacher"].parameters - 2 * 151_936 * 5120 == pytest.approx(31.2e9, rel=0.002)


def test_a_token_is_multiplied_by_the_chosen_experts_only(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    def multiplied(chosen: int) -> int:
        config = Qwen3MoeConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
            moe_intermediate_size=24, num_experts=8, num_experts_per_tok=chosen, vocab_size=100,
        )  # fmt: skip
        config.save_pretrained(tmp_path)
        return meta_model.Weights.of(meta_model.load_meta_model(ModelConfig(model=str(tmp_path)))).multiplied

    an_expert = 3 * 32 * 24
    assert multiplied(3) - multiplied(2) == 2 * an_expert


@pytest.mark.parametrize(("rank", "parameters"), [(32, 87_293_952), (128, 349_175_808)])
def test_lora_on_qwen3_has_the_parameters_that_others_count(configs: Path, rank: int, parameters: int) -> None:
    student = make_trainable(
        meta_model.load_meta_model(ModelConfig(model=str(configs / "8b"))), TrainConfig(lora_rank=rank)
    )
    assert sum(p.numel() for p in trainable(student).values()) == parameters


def test_a_trained_weight_takes_16_bytes_and_10_with_an_8_bit_adam(planned: Planned) -> None:
    """Weight, gradient and Adam's moments in fp32; moments of a byte each, and an fp32 for 256 of them."""
    recipe, models = planned()
    parts = memory.training(recipe, models, Device()).parts
    fp32 = [parts["adapter, fp32"], parts["gradients, fp32"], parts["optimizer, adamw"]]
    assert models.adapter and sum(fp32) == 16 * models.adapter
    in_bits = recipe.train.model_copy(update={"optimizer": "adamw_8bit"})
    parts = memory.training(recipe.model_copy(update={"train": in_bits}), models, Device()).parts
    assert parts["optimizer, adamw_8bit"] == 2 * models.adapter * (1 + 4 / 256)


def test_nf4_leaves_embedding_and_head_as_they_are(planned: Planned) -> None:
    """Per linear weight 4.127 bits (arXiv 2305.14314, section 3)."""
    weights = planned("student.quantisation=nf4")[1].weights["student"]
    outside = 2 * 2 * 151_936 * 4096
    linear = weights.parameters - 2 * 151_936 * 4096
    assert (weights.nbytes - outside) / linear * 8 == pytest.approx(4.127, rel=1e-3)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_of_a_real_micro_batch(dtype: str, checkpointing: bool, tmp_path: Path) -> None:
    """Of a small Qwen3 with a LoRA, on the CPU, by redpen's own packed forward; kept, and at the highest."""
    shape: dict[str, Any] = dict(vocab_size=500, hidden_size=64, intermediate_size=192, num_attention_heads=4)
    config = Qwen3Config(**QWEN3 | shape, num_hidden_layers=3)
    config.num_key_value_heads, config.head_dim = 2, 16
    config.save_pretrained(tmp_path)
    train = TrainConfig(lora_rank=8, gradient_checkpointing=checkpointing)
    register_packed_attention()
    real: Any = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="redpen_packed"
    )
    shade = meta_model.load_meta_model(ModelConfig(model=str(tmp_path), dtype=dtype))  # type: ignore[arg-type]
    for model in (real, shade):
        make_trainable(model.eval().requires_grad_(False), train)
        if checkpointing:
            checkpoint_gradients(model)
        training_mode(model)
    predicted = meta_model.training_bytes(shade, 512)

    for parameter in trainable(real).values():
        parameter.grad = torch.zeros_like(parameter)
    packed = pack([np.zeros(128, np.int32)] * 4, [1] * 4)
    with PeakBytes() as peak:
        hidden = packed_hidden(real, packed)
        kept, peak.nbytes = peak.alive(), 0
        torch.autograd.backward(hidden, torch.ones_like(hidden))
    assert predicted.kept == pytest.approx(kept, rel=0.02)
    assert predicted.backward == pytest.approx(peak.nbytes, rel=0.02)


@pytest.mark.parametrize("trained", [False, True])
def test_head_takes_what_is_planned(trained: bool, tmp_path: Path) -> None:
    """In fp32 on the CPU, where it does the same as on CUDA; the rows that predict are there beforehand."""
    rows, vocabulary, hidden = 600, 40_000, 32
    config = Qwen3Config(**QWEN3 | dict(vocab_size=vocabulary), hidden_size=hidden, num_hidden_layers=1)
    config.save_pretrained(tmp_path)
    model = meta_model.load_meta_model(ModelConfig(model=str(tmp_path), dtype="float32"))
    model.get_output_embeddings().weight.requires_grad_(trained)
    planned = memory.head_bytes(model, TrainConfig(rows_per_chunk=256), rows)

    weight = torch.randn(vocabulary, hidden, requires_grad=trained)
    states = torch.randn(rows, hidden, requires_grad=True)
    columns = torch.arange(16).expand(rows, 16)
    with PeakBytes() as peak:
        loss = chunked_head_loss(
            states * 1, Head(weight), columns, lambda _, c, r: (c.exp() * c).sum() + r.sum(), 256, entropy=True
        ).loss
        torch.autograd.backward(loss)
    assert peak.nbytes == pytest.approx(planned, rel=0.02)


def test_cache_of_a_rollout_is_its_keys_and_values(planned: Planned) -> None:
    model = planned()[1].meta_models["student"]
    assert meta_model.cache_bytes(model, 100) == 100 * SHALLOW * 2 * 8 * 128 * 2


def test_largest_micro_batch_is_the_last_that_fits(planned: Planned) -> None:
    recipe, models = planned("train.optimizer=adamw_8bit")
    largest = memory.training(recipe, models, Device(gib=8)).largest
    assert largest and largest >= 3072

    def total(tokens: int) -> float:
        train = recipe.train.model_copy(update={"tokens_per_microbatch": tokens})
        return memory.training(recipe.model_copy(update={"train": train}), models, Device(gib=8)).total / memory.GIB

    assert total(largest) <= 8 < total(largest + 512)


def test_a_later_turn_reads_every_rollout_from_its_start(planned: Planned) -> None:
    """Where a first turn reads a prompt once for all of its rollouts."""
    settings = ["rollouts.engine=transformers", "rollouts.batch_size=64", "rollouts.rollouts_per_prompt=4"]
    settings += ["rollouts.max_prompt_tokens=1000", "rollouts.max_response_tokens=3000"]

    def activations(*overrides: str) -> tuple[float, int, int]:
        recipe, models = planned(*settings, *overrides)
        model = models.meta_models["student"]
        found = next(need for need in memory.by_step(recipe, models, Device()) if need.step == "sampling")
        first, later = (meta_model.forward_bytes(model, tokens) for tokens in (16 * 1000, 64 * 4000))
        assert later > first
        return found.parts["activations"], first, later

    found, first, _ = activations()
    assert found == first
    found, _, later = activations("rollouts.environment=a:b")
    assert found == later
    recipe, models = planned(*settings, "rollouts.environment=a:b")
    lines = table.assumptions(recipe, models, Device(), Lengths.of(recipe, None, None))
    assert any(line.startswith("rollouts.environment: its time to reply") for line in lines)


def test_too_small_a_gpu_is_reported_with_what_would_help(planned: Planned) -> None:
    recipe, models = planned("train.tokens_per_microbatch=8192")
    device = Device(gib=6)
    found = {need.step: table.advice(need, device, recipe, models) for need in memory.by_step(recipe, models, device)}
    assert found["scoring, teacher, streamed"].startswith("scoring, teacher, streamed: fits 6 GiB")
    assert "does not fit 6 GiB" in found["training"] and "up to" in found["training"]
    found = {
        need.step: table.advice(need, Device(gib=4), recipe, models)
        for need in memory.by_step(recipe, models, device)
    }
    assert 'score.placement = "streamed"' in found["scoring, student"]
    hopeless = memory.training(recipe, models, Device(gib=4))
    assert hopeless.largest == 0 and "adamw_8bit" in table.advice(hopeless, Device(gib=4), recipe, models)
    refused = memory.by_step(recipe, models, Device(gib=1))[2]
    assert refused.refused and "to stream this model" in table.advice(refused, Device(gib=1), recipe, models)


def test_fsdp_divides_what_it_shards(planned: Planned) -> None:
    """All of a full fine-tuning but what is gathered; of a LoRA, which every rank holds whole, the base only."""
    for method, divided in (("full", True), ("lora", False)):
        recipe, models = planned(f"train.method={method}", "train.parallel=fsdp")
        alone, spread = (memory.training(recipe, models, Device(gpus=n)).parts for n in (1, 4))
        assert spread["weights"] == alone["weights"] / 4
        assert spread["gradients, fp32"] == alone["gradients, fp32"] / (4 if divided else 1)
        assert spread["optimizer, adamw"] == alone["optimizer, adamw"] / (4 if divided else 1)
        assert "weights gathered from other ranks" in spread
    parts = memory.training(*planned("train.method=full"), Device()).parts
    assert parts["fp32 copies of the weights"] == parts["optimizer, adamw"] / 2 == 2 * parts["weights"]


def test_full_fine_tuning_that_fits_when_sharded(planned: Planned) -> None:
    """On eight cards that hold the sharded student and little more."""
    recipe, models = planned("train.method=full")
    sharded, _ = planned("train.method=full", "train.parallel=fsdp")
    total = memory.training(sharded, models, Device(gpus=8)).total / memory.GIB
    device = Device(gib=total + 0.1, gpus=8)
    need = memory.training(recipe, models, device)
    said = table.advice(need, device, recipe, models)
    assert "does not fit" in said and f'with train.parallel = "fsdp" it fits, {total:.1f} GiB at most' in said
    assert "lora" not in said
    alone = table.advice(need, Device(gib=device.gib), recipe, models)
    assert "fsdp" not in alone and 'train.method = "lora"' in alone


def test_the_shipped_recipe_leaves_room_on_its_card(planned: Planned) -> None:
    recipe, models = planned(depth="")
    needs = memory.by_step(recipe, models, Device())
    for need in needs:
        assert need.total <= 22.5 * memory.GIB and "barely" not in table.advice(need, Device(), recipe, models)
    tight = Device(gib=needs[-1].total / memory.GIB + 1)  # training
    assert needs[-1].step == "training" and "barely fits" in table.advice(needs[-1], tight, recipe, models)


# -- cost ----------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_source() -> None:
    """On-policy distillation, 77 k prompts x 4: 8.4e19 by the teacher and 8.2e19 by the student, whose whole weights
    it trained; the length that explains the one, 4.1 k tokens, explains the other."""
    student, teacher, tokens = 8.19e9, 32.8e9, 77e3 * 4 * 4096
    assert flops.forward(teacher, tokens) == pytest.approx(8.4e19, rel=0.03)
    ours = flops.forward(student, tokens) + flops.training(student, None, tokens, recomputed=False)
    assert ours == pytest.approx(8.2e19, rel=0.03)


def test_cost_is_what_a_run_then_enters_in_its_ledger(toy_cache: Path, tmp_path: Path) -> None:
    """With the cache's own mean lengths; an epoch, in which no rollout of a step is read once for several."""
    round_ = cs.open(toy_cache).round()
    blocks = [round_.rollouts.read(block) for block in range(round_.n_blocks)]
    prompt = sum(int(b.prompt_length.sum()) for b in blocks) / 24
    response = sum(b.n_tokens for b in blocks) / 96
    recipe = small_recipe("train.steps=6")
    models = memory.PlannedModels.of(recipe)
    lengths, device = Lengths.of(recipe, prompt, response), Device()
    planned = cost.costs(recipe, models, device, lengths, memory.by_step(recipe, models, device))
    stage.run(recipe, str(toy_cache), str(tmp_path / "run"))
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    by_step = {entry.step: entry for entry in planned.steps}
    for step, name in (("sampling", "rollouts"), ("scoring, student", "score student")):
        assert by_step[step].tokens == pytest.approx(ledger[name]["tokens"])
        assert by_step[step].flops == pytest.approx(ledger[name]["flops"])
    assert by_step["scoring, teacher"].flops == pytest.approx(ledger["score teacher"]["flops"])
    spent, foreseen = ledger["train"], by_step["training"]
    assert spent["tokens"] <= foreseen.tokens + 1e-6
    assert foreseen.flops / foreseen.tokens == pytest.approx(spent["flops"] / spent["tokens"])
    assert planned.epochs == 1 and planned.rollouts == 96


def test_prompts_that_are_here_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\n\n' * 24)
    for settings, expected in (
        ([f"prompts.path={file}"], 24),
        ([f"prompts.path={file}", "prompts.limit=9600"], 24),
        ([f"prompts.path={file}", "prompts.limit=5"], 5),
        ([f"prompts.path={file}", "prompts.skip=20"], 4),
        (["prompts.path=gone.jsonl", "prompts.limit=7"], 7),
        (["prompts.path=gone.jsonl", "train.steps=6"], 24),
    ):
        count, how = n_prompts(load_recipe("toy", ["train.prompts_per_step=4", *_unlimited(settings)]))
        assert count == expected and ("not here" in how) == ("gone.jsonl" in settings[0])


def test_what_a_teacher_reads_of_its_own_takes_time_and_memory(tmp_path: Path) -> None:
    """Of the toys a token is a byte. The student reads what it did, and so is trained for as long."""
    rows = [{"prompt": f"{n}+2*3=", "hint": "7" * n} for n in (11, 200)]
    own = [row | {"teacher_prompt": "x" * len(str(row["hint"])) + str(row["prompt"])} for row in rows]
    file, with_rows = tmp_path / "p.jsonl", tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with_rows.write_text("".join(json.dumps(row) + "\n" for row in own))
    lengths, tile = [11 + 7, 200 + 8], "score.tile_tokens=64"

    def planned(path: Path, *settings: str) -> tuple[memory.PlannedModels, dict[str, Any], dict[str, Any]]:
        recipe = load_recipe("toy", [f"prompts.path={path}", "prompts.limit=", tile, *settings])
        models = memory.PlannedModels.of(recipe)
        needs = memory.by_step(recipe, models, Device())
        steps = cost.costs(recipe, models, Device(), Lengths.of(recipe, None, None), needs).steps
        assumed = "".join(table.assumptions(recipe, models, Device(), Lengths.of(recipe, None, None)))
        assert ("113 tokens on average, at most 208, in the first 2" in assumed) == bool(models.own_prompts)
        return models, {need.step: need for need in needs}, {step.step: step for step in steps}

    _, needs, steps = planned(file)
    assert "activations of a tile of 64 tokens" in needs["scoring, teacher"].parts
    for path, *settings in ((file, "teacher.prompt={{ hint }}{{ prompt }}"), (with_rows,)):
        models, own_needs, own_steps = planned(path, *settings)
        scoring = "scoring, teacher"
        assert own_steps[scoring].tokens == 4 * (sum(lengths) + 2 * 32)
        assert own_steps[scoring].flops > 2 * steps[scoring].flops
        forward = meta_model.forward_bytes(models.meta_models["teacher"], max(lengths) + 32)
        assert own_needs[scoring].parts["activations of a tile of 240 tokens"] == forward
        for same in ("sampling", "scoring, student", "training"):
            assert own_steps[same] == steps[same] and own_needs[same] == needs[same]


def test_own_prompts_that_are_not_here_are_stated(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["prompts.path=gone.jsonl", "prompts.limit=9", "teacher.prompt_prefix=Think."]
    assert cli.main(["plan", "toy", *(part for setting in settings for part in ("--set", setting))]) == 0
    assert "gone.jsonl is not here to measure them" in capsys.readouterr().out


def _unlimited(settings: list[str]) -> list[str]:
    return settings if any("limit" in setting for setting in settings) else [*settings, "prompts.limit="]


def test_cache_bytes_are_those_that_a_cache_holds(toy_cache: Path) -> None:
    """Every array with an entry for each token, as read back."""
    round_ = cs.open(toy_cache).round()
    n_tokens, held = 0, {"rollouts": 0, "student": 0, "teacher": 0}
    for block in range(round_.n_blocks):
        rollouts = round_.rollouts.read(block)
        n_tokens += rollouts.n_tokens
        held["rollouts"] += rollouts.token_ids.nbytes + rollouts.rollout_logprobs.nbytes + rollouts.trained.nbytes
        for name in ("student", "teacher"):
            values = vars(round_.scores(name).read(block)).values()
            held[name] += sum(value.nbytes for value in values if isinstance(value, np.ndarray))
    assert cost.cache_bytes(small_recipe(), n_tokens, 0) == held


def test_time_follows_from_the_device(planned: Planned) -> None:
    recipe, models = planned("prompts.limit=64")
    lengths = Lengths.of(recipe, None, 500)

    def seconds(device: Device) -> dict[str, float]:
        needs = memory.by_step(recipe, models, device)
        found = cost.costs(recipe, models, device, lengths, needs).steps
        return {step.step: step.seconds or 0.0 for step in found}

    usual, twice = seconds(Device()), seconds(Device(tflops=330))
    assert twice["training"] == usual["training"] / 2 and twice["sampling"] == usual["sampling"]
    assert seconds(Device(gbps=1008 / 2))["sampling"] == pytest.approx(2 * usual["sampling"])
    assert seconds(Device(gpus=2))["training"] == usual["training"] / 2
    slow = replace(Device(), link_gbps=1e-3)
    assert seconds(slow)["scoring, teacher"] > 10 * usual["scoring, teacher"]


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=71, n_embd=32, n_layer=2, n_head=4),
        MixtralConfig(**TINY),
        PhimoeConfig(**TINY),
        Phi3Config(
            **TINY,
            pad_token_id=0,
            original_max_position_embeddings=64,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("quantised", [False, True])
def test_any_decoder_that_can_be_trained_can_be_planned(
    config: PreTrainedConfig, quantised: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mixtures with LoRA, layers of GPT-2's own, frequencies that depend on a length."""
    config.save_pretrained(tmp_path)
    wanted = [f"student.model={tmp_path}", f"teacher.model={tmp_path}"]
    if quantised:
        wanted.append('student.quantisation="nf4"')
    else:
        wanted.append('score.placement="streamed"')
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        plan.run(load_recipe("toy", wanted), Device(), as_json=True)
    steps = {need["step"]: need["total"] for need in json.loads(capsys.readouterr().out)["memory"]}
    assert steps["training"] > 0 and any(step.startswith("scoring, teacher") and steps[step] > 0 for step in steps)


def test_the_command_prints_all_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "toy", "--mean-response-tokens", "15"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "optimizer, adamw",
        "cache of 256 rollouts of 48 tokens",
        "teacher FLOP",
        "assumed:",
        "training: fits",
    ):
        assert text in shown, text


def test_the_command_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "toy", "--json", "--gpu-memory", "8", "--gpus", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["student"]["parameters"] == 230_592
    assert [need["step"] for need in found["memory"]] == [
        "sampling", "scoring, student", "scoring, teacher", "training"
    ]  # fmt: skip
    assert found["device"]["gib"] == 8 and found["device"]["gpus"] == 2 and found["lengths"]["bound"]
    assert sum(step["flops"] for step in found["cost"]["steps"]) == pytest.approx(
        found["cost"]["student_flops"] + found["cost"]["teacher_flops"]
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("plan toy --mean-response-tokens 99", "--mean-response-tokens: expected more than 0 and at most rollouts"),
        ("plan toy --set student.model=./nothing", "student.model = './nothing': there is no such directory"),
    ],
)
def test_mistake_is_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args.split()) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err and captured.out == ""

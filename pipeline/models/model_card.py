"""The model card of trained weights: what they are, how they were made, how to load them."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cache_schema as cs
from pipeline.config import Recipe, TrainConfig
from pipeline.console import suggest
from pipeline.credentials import mask
from pipeline.models.identity import DATA, created_by, own_prompt
from pipeline.models.paths import base_name
from pipeline.runs.directory import Result, RunDirectory

#: Heading of the part that a merged model's card takes over.
TRAINING = "## How it was trained"
#: Tags on the Hub.
DISTILLED = ("distillation", "on-policy-distillation")

# What vLLM's --max-lora-rank accepts.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def run_card(recipe: Recipe, round_: cs.Round, teachers: tuple[str, ...], result: Result) -> str:
    """The card of what a run made on a round: an adapter, or a whole model."""
    base = base_name(recipe.student)
    is_adapter = recipe.train.method == "lora"
    loading = _load_adapter(base, recipe) if is_adapter else load_model("THIS_DIRECTORY", recipe.student.dtype)
    made, how = (
        f"distilled from {_names(round_, teachers)}",
        "on-policy distillation from cached log-probs of its teacher",
    )
    tags: tuple[str, ...] = DISTILLED
    if recipe.train.advantage == "constant":
        tags, made, how = (), "trained away from unlikely tokens", "a policy gradient without a teacher, a control"
    elif not teachers and recipe.train.loss != "cross_entropy":
        tags, made, how = ("reinforcement-learning",), "trained on rewards", "a policy gradient on verified answers"
    elif not teachers:
        tags = ("sft",)
        made, how = "fine-tuned", "supervised fine-tuning on documents and chats"
    about = f"A LoRA adapter of `{base}`" if is_adapter else f"`{base}` with all of its weights trained"
    about += f", made by {how}."
    text = "\n".join(
        [
            front_matter(base, "peft" if is_adapter else "transformers", recipe.student.quantisation, tags),
            f"# {Path(base).name} {made}",
            "",
            about,
            "",
            LICENCE,
            "",
            "## How to load it",
            "",
            loading,
            "With the run at hand, `redpen chat RUN` talks to the model before and after training.",
            "",
            TRAINING,
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in _facts(recipe, round_, teachers, result).items()),
            "",
        ]
    )
    return mask(text)


LICENCE = (
    "No licence is stated here: the base model's holds for what is made from it, and may want a `license:` above."
)


def front_matter(base: str, library: str, quantisation: str | None = None, tags: tuple[str, ...] = DISTILLED) -> str:
    """The metadata block of the Hub, YAML between dashes."""
    metadata: dict[str, Any] = {"base_model": base, "library_name": library, "pipeline_tag": "text-generation"}
    metadata["tags"] = [*tags, "redpen", *(["lora"] if library == "peft" else [])]
    if quantisation is not None:
        metadata["base_model_quantisation"] = quantisation
    # JSON values are YAML
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()), "---", ""])


def load_model(where: str, dtype: str) -> str:
    """How transformers and vLLM load a whole model."""
    return _code(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{where}", dtype="{dtype}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
    ) + _code("bash", f"vllm serve {where} --dtype {dtype}")


def _load_adapter(base: str, recipe: Recipe) -> str:
    dtype = recipe.student.dtype
    quantised = ""
    if recipe.student.quantisation == "nf4":
        quantised = (
            "It was trained on a base in NF4, which this loads unquantised; for the very model that was trained "
            f'add `quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}")`.\n\n'
        )
    text = quantised + _code(
        "python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}")',
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
    )
    if (command := serve_command(recipe, "THIS_DIRECTORY")) is not None:
        text += _code("bash", command)
    return text + "As one model without an adapter: `redpen merge THIS_DIRECTORY -o DIR`.\n"


def serve_command(recipe: Recipe, trained: str) -> str | None:
    """The command by which vLLM serves what a run trained; None for an adapter of a rank that it does not support."""
    dtype, rank = recipe.student.dtype, recipe.train.lora_rank
    if recipe.train.method != "lora":
        return f"vllm serve {trained} --dtype {dtype}"
    allowed = next((allowed for allowed in _VLLM_RANKS if allowed >= rank), None)
    if allowed is None:
        return None
    base = base_name(recipe.student)
    lora = f"--enable-lora --max-lora-rank {allowed} --lora-modules trained={trained}"
    return f"vllm serve {base} --dtype {dtype} {lora}"


def suggest_uses(recipe: Recipe, run: RunDirectory) -> None:
    """Print what can be done with a finished run."""
    suggest(
        f"`redpen eval {run.path}` for scores, `redpen chat {run.path}` to talk to it, "
        f"`redpen report {run.path}` for a per-token view"
    )
    if not recipe.student.model.startswith("toy:") and (command := serve_command(recipe, str(run.trained))):
        suggest(f"`{command}`")


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", "", ""])


def _facts(recipe: Recipe, round_: cs.Round, teachers: tuple[str, ...], result: Result) -> dict[str, str]:
    student, train, sampled = recipe.student, recipe.train, round_.manifest
    facts = {"base": f"{_identity(sampled.student)}, in {student.quantisation or student.dtype}"}
    for name in teachers:
        scores = round_.scores(name).manifest
        assert isinstance(scores, cs.ScoresManifest)
        method = f" ({scores.quantisation})" if scores.quantisation else ""
        read = own_prompt(round_, name)
        other = "" if read is None else f", which read {read}".replace("|", "\\|")  # a cell of a table
        facts["teacher" if len(teachers) == 1 else f"teacher {name}"] = f"{_identity(scores.model)}{method}{other}"
    rollouts = (
        f"{round_.n_prompts:,} prompts x {sampled.rollouts_per_prompt} of round {round_.index}, sampled at "
        f"temperature {sampled.temperature:g}, top-p {sampled.top_p:g}"
    )
    if sampled.engine == DATA:
        rollouts = f"{round_.n_prompts:,} documents and chats"
    return facts | {
        "learnt from": rollouts,
        "loss": f"`{train.loss}`",
        "steps": f"{result.step} of {train.steps} at most, {train.prompts_per_step} prompts each",
        "how it ended": result.sentence,
        "optimizer": f"`{train.optimizer}`, learning rate {train.learning_rate:g}, schedule {train.schedule}, "
        f"{train.warmup_steps} steps of warm-up, weight decay {train.weight_decay:g}",
        "trained weights": _trained(train),
        "software": f"{created_by()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")),
    }


def _trained(train: TrainConfig) -> str:
    if train.method == "full":
        return "all"
    targets = train.lora_targets if isinstance(train.lora_targets, str) else ", ".join(train.lora_targets)
    return f"LoRA of rank {train.lora_rank}, alpha {train.lora_alpha:g}, dropout {train.lora_dropout:g}, on {targets}"


def _names(round_: cs.Round, teachers: tuple[str, ...]) -> str:
    manifests = [round_.scores(name).manifest for name in teachers]
    names = [Path(scores.model.name).name for scores in manifests if isinstance(scores, cs.ScoresManifest)]
    own = ["" if own_prompt(round_, name) is None else " with a prompt of its own" for name in teachers]
    return ", ".join(name + suffix for name, suffix in zip(names, own, strict=True))


def _identity(model: cs.ModelIdentity) -> str:
    adapter = "" if model.adapter_digest is None else f", adapter `{model.adapter_digest}`"
    at = model.revision or model.digest
    return f"`{model.name}` at `{at}`{adapter}"

"""Merge an adapter into its base model: `redpen merge RUN_OR_ADAPTER -o DIR`.

Each layer with an adapter becomes W' = round(W + B A alpha / r), computed in fp32 and rounded once to the dtype of
the result. The base is loaded on the CPU in the dtype of its checkpoint and converted to fp32 layer by layer, so host
memory has to hold the model once (in the larger of both dtypes), the adapter, and one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError

from pipeline.config import ModelConfig
from pipeline.console import show, warn
from pipeline.credentials import mask
from pipeline.errors import ModelError, ModelNotFoundError, RedpenError, shorten
from pipeline.files import atomic_directory, read_text, write_atomically
from pipeline.forward.head import unwrapped
from pipeline.models import load as models
from pipeline.models.files import read_adapter_config, shortened
from pipeline.models.lora import bypassed, check_saves_whole, shared_weights
from pipeline.models.model_card import LICENCE, TRAINING, front_matter, load_model
from pipeline.models.paths import base_name
from pipeline.models.resolve import resolve
from pipeline.runs.files import MODEL, RECIPE, read_recipe
from pipeline.runs.trained_student import trained_student


def run(target: str, output: str, *, base: str | None = None, dtype: str | None = None) -> int:
    """Write the merged model, its tokenizer and a model card to `output`, all at once; returns exit code 0.

    Args:
        target: a run, or a PEFT adapter's directory or Hub id.
        base: the base model; by default the one in the adapter's config.
        dtype: "bfloat16", "float16" or "float32"; by default the base model's.

    Raises:
        RedpenError: `output` is not empty, or there is no adapter that can be merged into this base.
    """
    to = Path(output)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RedpenError(f"--output {output}: expected a new or empty directory; choose another, or remove it first")
    cfg = _with_adapter(target, base)
    try:
        facts = resolve(cfg)
        source = facts.directory
    except ModelNotFoundError as error:
        raise ModelError(f"--base: {error}") from error
    if facts.quantisation is not None:
        raise ModelError(
            f"--base = {cfg.model!r}: expected an unquantised model, its weights are in {facts.quantisation} "
            "and rounding would lose the adapter; give the model that it was quantised from"
        )
    card = _card_of(cfg)
    if card and (quantisation := card.data.get("base_model_quantisation")):
        warn(
            f"{target}: was trained on a base in {quantisation} and is merged into the unquantised one; the merged "
            "model differs from the trained one by the rounding of the base (`redpen eval` measures how much)"
        )
    name = dtype or facts.dtype
    merged = merge(models.load_model(cfg), getattr(torch, name))
    try:
        with atomic_directory(to) as partial:
            models.save_model(merged, partial, source)
            write_atomically(partial / "README.md", mask(_merged_card(base_name(cfg), name, card)))
    except (OSError, SafetensorError) as error:
        raise RedpenError(
            f"--output {output}: cannot be written ({shorten(error)}); make room or choose another"
        ) from error
    show(f"model: {to}")
    return 0


def merge(model: Any, dtype: torch.dtype) -> Any:
    """Merge a PEFT model's adapter, in place, and return the transformers model with all weights in `dtype`.

    Raises:
        ModelError: adapters of this kind cannot be merged, the weights are not finite, or transformers would not load
            the merged model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    check_saves_whole(model)
    base, loaded = unwrapped(model), model.dtype
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if ends[0].weight is ends[1].weight and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ModelError(
            "adapter: it changes the embeddings or the head, which are one tensor in this model, so it cannot be "
            "merged into one without changing the other"
        )
    if shared := shared_weights(base):
        raise ModelError(
            f"adapter: cannot be merged, since layers that share a weight have different adapters "
            f"({shortened(shared, 1)}); apply it with peft instead"
        )
    without_effect = bypassed(base)
    try:
        for name, module in base.named_modules():
            if isinstance(module, BaseTunerLayer) and f"{name}.base_layer" not in without_effect:
                layer = module.get_base_layer().float()
                module.merge(safe_merge=True)
                layer.to(dtype)
        whole = model.unload()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"adapter: cannot be merged ({shorten(error)})") from error
    for parameter in whole.parameters():
        if parameter.dtype == loaded:  # models keep some parameters in fp32
            parameter.data = parameter.data.to(dtype)
    return whole


def _with_adapter(target: str, base: str | None) -> ModelConfig:
    """The config of the base model with the adapter in `target`."""
    run = Path(target)
    if (run / RECIPE).is_file():
        recipe = read_recipe(run)
        if recipe.train.method == "full":
            raise RedpenError(f"run {target}: trained all weights, so {run / MODEL} is a whole model already")
        trained = trained_student(recipe.student, run)
        if trained is None:
            raise RedpenError(f"run {target}: has no adapter yet; repeat the command that started it")
        if trained == recipe.student:
            raise RedpenError(f"run {target}: its result is the student of the recipe, so there is nothing to merge")
        cfg: ModelConfig = trained.model_copy(update={"quantisation": None})
    else:
        directory = resolve(ModelConfig(model="-", adapter=target)).adapter_directory
        assert directory is not None
        settings = read_adapter_config(directory)
        name = base or settings.base_model_name_or_path
        if not name:
            raise ModelError(f"{target}: its adapter_config.json names no base model; set --base")
        cfg = ModelConfig(model=name, revision=settings.revision, adapter=target)
    if base is not None:
        cfg = cfg.model_copy(update={"model": base, "revision": None})
    return cfg.model_copy(update={"dtype": "auto", "device": "cpu"})


def _card_of(cfg: ModelConfig) -> ModelCard | None:
    """The adapter's model card, or None if there is none that can be read."""
    directory = resolve(cfg).adapter_directory
    assert directory is not None
    try:
        return ModelCard(read_text(directory / "README.md"))
    except (OSError, ValueError):
        return None


def _merged_card(base: str, dtype: str, card: ModelCard | None) -> str:
    """The merged model's card, with the training section of the adapter's card."""
    _, heading, training = (card.text if card else "").partition(f"{TRAINING}\n")
    return "\n".join(
        [
            front_matter(base, "transformers"),
            f"# {Path(base).name}, distilled",
            "",
            f"`{base}` with a LoRA adapter merged into it in {dtype}, made by on-policy distillation.",
            "",
            LICENCE,
            "",
            "## How to load it",
            "",
            load_model("THIS_DIRECTORY", dtype) + heading + training.rstrip("\n"),
            "",
        ]
    )

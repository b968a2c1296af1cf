"""An adapter and its base as one model: `redpen merge RUN_OR_ADAPTER -o DIR`.

For every layer with an adapter, W' = round(W + B A alpha / r), added up in fp32 and rounded once, to the dtype of the
result. The base is loaded on the CPU in its own dtype and one layer at a time is in fp32, so host memory has to hold
the model once (in the larger of both dtypes), the adapter, and that layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from pydantic import BaseModel
from safetensors import SafetensorError

from pipeline.config import ModelConfig, load_stored_recipe
from pipeline.console import show, warn
from pipeline.credentials import mask
from pipeline.errors import ModelError, ModelNotFoundError, RedpenError
from pipeline.files import atomic_directory, write_atomically
from pipeline.forward.head import unwrapped
from pipeline.models import load as models
from pipeline.models.files import read_adapter_config
from pipeline.models.model_card import LICENCE, TRAINING, front_matter, load_model


class _AdapterConfig(BaseModel):
    """What adapter_config.json says of the base model."""

    base_model_name_or_path: str | None = None
    revision: str | None = None


def run(target: str, output: str, *, base: str | None = None, dtype: str | None = None) -> int:
    """Write the merged model, its tokenizer and a model card to `output`, all at once; the exit code.

    Args:
        target: a run, or a PEFT adapter's directory or Hub id.
        base: what it goes on; by default what the adapter's config names.
        dtype: "bfloat16", "float16" or "float32"; by default the base model's.

    Raises:
        RedpenError: `output` is not empty, there is no adapter, it is not one that can be merged, or it does not fit
            its base.
    """
    to = Path(output)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise RedpenError(f"--output {output}: expected a new or empty directory; choose another, or remove it first")
    cfg = _with_adapter(target, base)
    try:
        source, facts = models.model_directory(cfg), models.model_facts(cfg)
    except ModelNotFoundError as error:
        raise ModelError(f"--base: {error}") from error
    if facts.quantisation is not None:
        raise ModelError(
            f"--base = {cfg.model!r}: its weights are quantised ({facts.quantisation}), and what is merged into them "
            "would be rounded away; give the model as it was before"
        )
    card = _card_of(cfg)
    if card and (quantisation := card.data.get("base_model_quantisation")):
        warn(
            f"{target}: was trained on a base in {quantisation} and is merged into the unquantised one; what comes "
            "out differs from what was trained by the rounding of the base, and `redpen eval` measures it"
        )
    name = dtype or facts.dtype
    merged = merge(models.load_model(cfg), getattr(torch, name))
    try:
        with atomic_directory(to) as partial:
            models.save_model(merged, partial, source)
            write_atomically(partial / "README.md", mask(_merged_card(models.base_name(cfg), name, card)))
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RedpenError(f"--output {output}: cannot be written ({reason}); make room or choose another") from error
    show(f"model: {to}")
    return 0


def merge(model: Any, dtype: torch.dtype) -> Any:
    """The transformers model within a PEFT model, its adapter merged, all weights in `dtype`. Changes `model`.

    Raises:
        ModelError: the adapter is of a kind that cannot be merged, or its weights are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base, loaded = unwrapped(model), model.dtype
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if ends[0].weight is ends[1].weight and any(isinstance(end, BaseTunerLayer) for end in ends):
        raise ModelError(
            "adapter: it is on the embeddings or on the head, which are one tensor in this model, so what it does to "
            "one of them cannot be merged without changing the other"
        )
    try:
        for module in base.modules():
            if isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer().float()
                module.merge(safe_merge=True)
                layer.to(dtype)
        whole = model.unload()
    except (ValueError, NotImplementedError, AttributeError) as error:
        raise ModelError(f"adapter: cannot be merged ({' '.join(str(error).split())[:200]})") from error
    for parameter in whole.parameters():
        if parameter.dtype == loaded:  # and not one of those that a model keeps in fp32
            parameter.data = parameter.data.to(dtype)
    return whole


def _with_adapter(target: str, base: str | None) -> ModelConfig:
    """The base with the adapter that `target` is or holds."""
    run = Path(target)
    if (run / "recipe.toml").is_file():
        recipe = load_stored_recipe(run / "recipe.toml")
        if recipe.train.method == "full":
            raise RedpenError(
                f"{target}: all weights were trained, {run / 'model'} is a whole model, nothing to merge"
            )
        made = models.made_student(recipe.student, run)
        if made is None:
            raise RedpenError(f"run {target}: has no adapter yet; finish it with the command that began it")
        if made == recipe.student:
            raise RedpenError(f"run {target}: its result is the student as it was, so there is nothing to merge")
        cfg: ModelConfig = made.model_copy(update={"quantisation": None})
    else:
        directory = models.adapter_directory(ModelConfig(model="-", adapter=target))
        assert directory is not None
        settings = read_adapter_config(directory)
        name = base or settings.base_model_name_or_path
        if not name:
            raise ModelError(f"{target}: its adapter_config.json names no base model; give it with --base")
        cfg = ModelConfig(model=name, revision=settings.revision, adapter=target)
    if base is not None:
        cfg = cfg.model_copy(update={"model": base, "revision": None})
    return cfg.model_copy(update={"dtype": "auto", "device": "cpu"})


def _card_of(cfg: ModelConfig) -> ModelCard | None:
    """The adapter's model card, if it has one that can be read."""
    directory = models.adapter_directory(cfg)
    assert directory is not None
    try:
        card: ModelCard = ModelCard.load(directory / "README.md")
        return card
    except (OSError, ValueError):
        return None


def _merged_card(base: str, dtype: str, card: ModelCard | None) -> str:
    """The merged model's own card, which keeps what the adapter's says of its training."""
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

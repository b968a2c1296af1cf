"""A plan as tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pipeline.config import Recipe
from pipeline.console import escape_control, results
from pipeline.disk import readable
from pipeline.models.load import model_facts
from pipeline.plan.assumed import Device, Lengths
from pipeline.plan.cost import Costs
from pipeline.plan.memory import GIB, Models, Need

# Beyond this share of a card its memory's fragments may decide.
_TIGHT = 0.95


def show(
    recipe: Recipe, models: Models, device: Device, lengths: Lengths, needs: Sequence[Need], costs: Costs
) -> None:
    """Print parameters, memory with its verdicts, cost and what was assumed."""
    out = results()
    tables = [
        _parameters(models),
        _memory(needs, device),
        _cost(costs),
        _as_the_source(costs),
        _cache(costs),
    ]
    for table in tables:
        out.print(table)
        out.print()
    verdicts = [verdict(need, device, recipe) for need in needs]
    for line in [*verdicts, "", "assumed:", *(f"  {line}" for line in assumptions(recipe, models, device, lengths))]:
        out.print(Text(escape_control(line)), soft_wrap=True)


def verdict(need: Need, device: Device, recipe: Recipe) -> str:
    """One sentence on a step: whether it fits, and what would."""
    card = f"{device.gib:g} GiB"
    if need.refused:
        return f"{need.step}: does not fit {card}: {need.refused}"
    taken = need.total / GIB
    fits = taken <= device.gib
    line = f"{need.step}: {'fits' if fits else 'does not fit'} {card}, {taken:.1f} GiB at most"
    if need.wave:  # as long as its memory allows
        return f"{line}; waves of {need.wave:,} tokens"
    if fits and taken > _TIGHT * device.gib:
        line = f"{need.step}: barely fits {card}, {taken:.1f} GiB at most; fragments of free memory may decide"
    if need.largest:
        line += f"; train.tokens_per_microbatch up to {need.largest:,} fits"
    elif need.largest == 0:
        line += "; not with any train.tokens_per_microbatch that holds the longest rollout" + _remedies(recipe)
    elif not fits and need.step == "sampling":
        line += "; lower rollouts.batch_size"
    elif not fits:
        line += '; lower score.tile_tokens, or set score.placement = "streamed"'
    return line


def _remedies(recipe: Recipe) -> str:
    train = recipe.train
    found = [] if train.gradient_checkpointing else ["train.gradient_checkpointing = true"]
    if train.optimizer == "adamw":
        found.append('train.optimizer = "adamw_8bit"')
    if train.method == "full":
        found.append('train.method = "lora"')
    elif recipe.student.quantisation is None:
        found += ['student.quantisation = "nf4"', "a smaller train.lora_rank"]
    return f"; try {' or '.join(found)}" if found else ""


def assumptions(recipe: Recipe, models: Models, device: Device, lengths: Lengths) -> list[str]:
    """What the figures rest on, a line each."""
    rollouts, train = recipe.rollouts, recipe.train
    longest = "the longest allowed, so all of this is an upper bound" if lengths.bound else "as told"
    found = [
        f"a prompt has {lengths.prompt:,.0f} tokens and a response {lengths.response:,.0f}: {longest}",
        "memory is always that of the longest prompts and responses, activations with flash attention in CUDA's "
        "half precision kernels; what torch's allocator cannot use for its fragments comes on top",
        f"{device.gpus} x {device.tflops:g} TFLOP/s, of which {device.utilisation:.0%} are reached; "
        f"sampling reads weights and cache at {device.gbps:,.0f} GB/s, streamed weights come at "
        f'{device.link_gbps:g} GB/s; start-up, and the Python of rollouts.engine = "transformers", are left out',
        "FLOPs: 2 for each weight and token that is read or sampled; attention's own products are left out",
        "cache: before compression",
    ]
    if recipe.prompts.limit is None:
        found.append(
            f"prompts.limit is not set: {train.steps} steps x {train.prompts_per_step} prompts, each used once"
        )
    if rollouts.engine == "vllm":
        share = recipe.vllm.gpu_memory_utilization or 0.9
        found.append(f"vLLM takes {share:.0%} of the card whatever it needs, and uses it for more cache")
    for name, cfg in models.configs.items():
        if cfg.quantisation is None and (method := model_facts(cfg).quantisation):
            found.append(f"{name}: its checkpoint is quantised ({method}); its weights are counted as {cfg.dtype}")
        if cfg.adapter and name != "student":
            found.append(f"{name}: its adapter is not counted")
    return found


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _parameters(models: Models) -> Table:
    table = _table("model", "parameters", "multiply a token", "weights")
    for name, weights in models.weights.items():
        table.add_row(name, f"{weights.parameters:,}", f"{weights.multiplied:,}", readable(weights.nbytes))
    if models.adapter is not None:
        table.add_row("LoRA", f"{models.adapter:,}", f"{models.adapter:,}", readable(4 * models.adapter))
    return table


def _memory(needs: Sequence[Need], device: Device) -> Table:
    table = _table("memory of a card", "at most")
    for need in needs:
        table.add_row(Text(need.step, "bold"), "")
        for name, nbytes in need.parts.items():
            table.add_row(f"  {name}", readable(nbytes))
        table.add_row(f"  in all, of {device.gib:g} GiB", readable(need.total))
    return table


def _cost(costs: Costs) -> Table:
    table = _table("step", "tokens", "FLOP", "time")
    for cost in costs.steps:
        table.add_row(
            cost.step,
            f"{cost.tokens:,.0f}",
            f"{cost.flops:.1e}",
            "elsewhere" if cost.seconds is None else _time(cost.seconds),
        )
    total = sum(cost.seconds or 0.0 for cost in costs.steps)
    table.add_row("in all", "", f"{costs.student_flops + costs.teacher_flops:.1e}", _time(total))
    return table


def _as_the_source(costs: Costs) -> Table:
    table = _table("samples", "teacher FLOP", "student FLOP", "each trained on")
    samples = f"{costs.prompts:,} x {costs.rollouts // costs.prompts}"
    table.add_row(samples, f"{costs.teacher_flops:.1e}", f"{costs.student_flops:.1e}", f"{costs.epochs:.2g} times")
    return table


def _cache(costs: Costs) -> Table:
    table = _table("cache", "bytes")
    for name, nbytes in costs.cache.items():
        table.add_row(name, readable(nbytes))
    table.add_row("in all", readable(sum(costs.cache.values())))
    return table


def _time(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"

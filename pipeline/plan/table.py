"""Print a plan as tables, with advice on what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from pipeline.config import Recipe
from pipeline.console import escape_control, results
from pipeline.disk import readable
from pipeline.models.resolve import resolve
from pipeline.plan.assumed import Device, Lengths, n_prompts
from pipeline.plan.cost import RecipeCost
from pipeline.plan.memory import GIB, PlannedModels, StepMemory, training

# Below this much left of the GPU's memory, fragmentation or a display may decide whether it fits.
_SPARE_GIB = 1.5


def show(
    recipe: Recipe,
    models: PlannedModels,
    device: Device,
    lengths: Lengths,
    needs: Sequence[StepMemory],
    costs: RecipeCost,
) -> None:
    """Print parameters, memory with advice, cost and assumptions."""
    out = results()
    tables = [
        _parameters(models),
        _memory(needs, device),
        _cost(costs),
        _totals(costs),
        _cache(costs),
    ]
    for table in tables:
        out.print(table)
        out.print()
    lines = [advice(need, device, recipe, models) for need in needs]
    for line in [*lines, "", "assumed:", *(f"  {line}" for line in assumptions(recipe, models, device, lengths))]:
        out.print(Text(escape_control(line)), soft_wrap=True)


def advice(need: StepMemory, device: Device, recipe: Recipe, models: PlannedModels) -> str:
    """One sentence on whether a step fits, and which setting to change if it does not."""
    card = f"{device.gib:g} GiB"
    if need.refused:
        return f"{need.step}: does not fit {card}: {need.refused}"
    taken = need.total / GIB
    fits = taken <= device.gib
    line = f"{need.step}: {'fits' if fits else 'does not fit'} {card}, {taken:.1f} GiB at most"
    if need.wave:  # sized to the memory
        return f"{line}; waves of {need.wave:,} tokens"
    if fits and taken > device.gib - _SPARE_GIB:
        line = f"{need.step}: barely fits {card}, {taken:.1f} GiB at most; fragmentation may decide"
    if need.largest:
        line += f"; train.tokens_per_microbatch up to {need.largest:,} fits"
    elif need.largest == 0:
        line += "; no train.tokens_per_microbatch that holds the longest rollout fits" + _remedies(
            recipe, device, models
        )
    elif not fits and need.step == "sampling":
        line += "; lower rollouts.batch_size"
    elif not fits:
        line += '; lower score.tile_tokens, or set score.placement = "streamed"'
    return line


def _remedies(recipe: Recipe, device: Device, models: PlannedModels) -> str:
    train = recipe.train
    if device.gpus > 1 and train.parallel != "fsdp" and recipe.student.quantisation is None:
        sharded = train.model_copy(update={"parallel": "fsdp", "optimizer": "adamw"})
        need = training(recipe.model_copy(update={"train": sharded}), models, device)
        if need.largest and need.total <= device.gib * GIB:
            also = "" if train.optimizer == "adamw" else ' and train.optimizer = "adamw"'
            return f'; with train.parallel = "fsdp"{also} it fits, {need.total / GIB:.1f} GiB at most'
    found = [] if train.gradient_checkpointing else ["train.gradient_checkpointing = true"]
    if train.optimizer == "adamw":
        found.append('train.optimizer = "adamw_8bit"')
    if train.method == "full":
        found.append('train.method = "lora"')
    elif recipe.student.quantisation is None:
        found += ['student.quantisation = "nf4"', "a smaller train.lora_rank"]
    return f"; try {' or '.join(found)}" if found else ""


def assumptions(recipe: Recipe, models: PlannedModels, device: Device, lengths: Lengths) -> list[str]:
    """The assumptions behind the figures, one a line."""
    rollouts = recipe.rollouts
    longest = "the longest allowed, so all figures are upper bounds" if lengths.bound else "as given"
    found = [
        f"a prompt has {lengths.prompt:,.0f} tokens and a response {lengths.response:,.0f}: {longest}",
        "memory is that of the longest prompts and responses, with flash attention in CUDA's half precision kernels; "
        "fragmentation in torch's allocator comes on top",
        f"{device.gpus} x {device.tflops:g} TFLOP/s at {device.utilisation:.0%} utilisation; sampling reads weights "
        f"and KV cache at {device.gbps:,.0f} GB/s, streamed weights arrive at {device.link_gbps:g} GB/s; start-up, "
        'and the Python overhead of rollouts.engine = "transformers", are left out',
        "FLOPs: 2 for each weight and token; the products of attention scores are left out",
        "cache: before compression",
        n_prompts(recipe)[1],
    ]
    if rollouts.environment is not None:
        found.append(
            "rollouts.environment: its time to reply is left out, and so is reading a rollout again in each turn"
        )
    if rollouts.engine == "vllm":
        fraction = recipe.vllm.gpu_memory_utilization or 0.9
        found.append(f"vLLM reserves {fraction:.0%} of the GPU in any case, and uses the rest for more KV cache")
    for name, own in models.own_prompts.items():
        line = f"{name} reads prompts of its own: "
        if own is None:
            line += f"{recipe.prompts.path} is not here to measure them, so they are counted as the student's"
        else:
            line += f"{own.mean:,.0f} tokens on average, at most {own.longest:,}, in the first {own.rendered:,}"
        found.append(line)
    for name, cfg in models.configs.items():
        if cfg.quantisation is None and (method := resolve(cfg).quantisation):
            found.append(f"{name}: its checkpoint is quantised ({method}), its weights are counted as {cfg.dtype}")
        if cfg.adapter and name != "student":
            found.append(f"{name}: its adapter is not counted")
    return found


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _parameters(models: PlannedModels) -> Table:
    table = _table("model", "parameters", "active", "weights")
    for name, weights in models.weights.items():
        table.add_row(name, f"{weights.parameters:,}", f"{weights.multiplied:,}", readable(weights.nbytes))
    if models.adapter is not None:
        table.add_row("LoRA", f"{models.adapter:,}", f"{models.adapter:,}", readable(4 * models.adapter))
    return table


def _memory(needs: Sequence[StepMemory], device: Device) -> Table:
    table = _table("GPU memory", "at most")
    for need in needs:
        table.add_row(Text(need.step, "bold"), "")
        for name, nbytes in need.parts.items():
            table.add_row(f"  {name}", readable(nbytes))
        table.add_row(f"  in all, of {device.gib:g} GiB", readable(need.total))
    return table


def _cost(costs: RecipeCost) -> Table:
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


def _totals(costs: RecipeCost) -> Table:
    table = _table("samples", "teacher FLOP", "student FLOP", "each trained on")
    samples = f"{costs.prompts:,} x {costs.rollouts // costs.prompts}"
    table.add_row(samples, f"{costs.teacher_flops:.1e}", f"{costs.student_flops:.1e}", f"{costs.epochs:.2g} times")
    return table


def _cache(costs: RecipeCost) -> Table:
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

"""Runs TRL's online `DistillationTrainer` in a separate process, to compare redpen with it. Needs trl.

It minimises reverse KL over the full vocabulary on new rollouts at every step, with a LoRA on all linear layers and a
constant learning rate, on the CPU.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from toy_lab import Cost, measured


@dataclass(frozen=True)
class TrlRun:
    """What to train.

    Attributes:
        student, teacher: directories or Hub ids.
        prompts: JSONL with a `prompt` a row, text or a chat; as many rows as TRL may need before it repeats them.
        rollouts: of a step. rank: of the LoRA, and its alpha.
    """

    student: str
    teacher: str
    dtype: str
    prompts: str
    rollouts: int
    max_response_tokens: int
    rank: int
    learning_rate: float
    steps: int
    seed: int
    gradient_checkpointing: bool = False


def train(out: Path, run: TrlRun) -> Cost:
    """Train, and leave `out/adapter` and what `step_seconds` reads."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(asdict(run)))
    return measured(__file__, out)


def step_seconds(out: Path) -> list[float]:
    """Seconds of every step that `train` did."""
    seconds: list[float] = json.loads((out / "steps.json").read_text())
    return seconds


def _train_here(out: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    run = TrlRun(**json.loads((out / "run.json").read_text()))
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, run.dtype))
        for name in (run.student, run.teacher)
    )
    rows = [{"prompt": json.loads(line)["prompt"]} for line in Path(run.prompts).read_text().splitlines()]
    config = DistillationConfig(
        output_dir=str(out),
        max_steps=run.steps,
        per_device_train_batch_size=run.rollouts,
        max_completion_length=run.max_response_tokens,
        learning_rate=run.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        beta=1.0,
        bf16=False,
        gradient_checkpointing=run.gradient_checkpointing,
        use_cpu=True,
        seed=run.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.append(time.perf_counter())
            (out / "steps.json").write_text(json.dumps([b - a for a, b in pairwise(clock)]))

    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(run.student),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=run.rank, lora_alpha=run.rank, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))


if __name__ == "__main__":
    _train_here(Path(sys.argv[1]))

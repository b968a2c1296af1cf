"""On-policy distillation in a loop of your own: the toy student learns to carry, in a minute or so on two cores.

    python docs/plain_loop.py [--passes 60] [--adapter DIR]

Each pass samples new answers from the student as it now is and has both models read them. Four lines are the method.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from pipeline.api import Student, Teacher, Trainer
from pipeline.config import ModelConfig, RolloutsConfig, TrainConfig
from pipeline.toy import asset_path

SAMPLED = RolloutsConfig(rollouts_per_prompt=4, temperature=1.0, max_response_tokens=32)
GREEDY = RolloutsConfig(rollouts_per_prompt=1, temperature=0.0, max_response_tokens=32)


def problems(name: str) -> list[dict[str, str]]:
    """The toy's sums: `prompt` and `answer`."""
    return [json.loads(line) for line in asset_path(f"prompts/{name}.jsonl").read_text().splitlines()]


def accuracy(student: Student, heldout: list[dict[str, str]]) -> float:
    """The fraction of sums whose greedy answer, the text after the last `=`, is right."""
    texts = student.sample([problem["prompt"] for problem in heldout], GREEDY).texts
    right = [text.rpartition("=")[2] == problem["answer"] for text, problem in zip(texts, heldout, strict=True)]
    return sum(right) / len(right)


def main(
    passes: int, adapter: Path | None = None, prompts_per_pass: int = 64, heldout_prompts: int = 512
) -> tuple[float, float]:
    """Train, save what was learned to `adapter`; held-out accuracy before and after."""
    student = Student(ModelConfig(model="toy:student", dtype="float32"), template="none")
    teacher = Teacher(ModelConfig(model="toy:teacher", dtype="float32"))
    trainer = Trainer(
        student,
        TrainConfig(learning_rate=1e-3, lora_rank=32, lora_alpha=32, gradient_checkpointing=False),
    )
    prompts = [problem["prompt"] for problem in problems("train")]
    heldout = problems("heldout")[:heldout_prompts]
    chosen = random.Random(0)

    before = accuracy(student, heldout)
    print(f"before: {before:.1%} of {len(heldout)} held-out sums are right")
    for number in range(1, passes + 1):
        rollouts = student.sample(chosen.sample(prompts, prompts_per_pass), SAMPLED)

        teacher_logp = teacher.compute_logprobs(rollouts)
        student_logp = rollouts.logprobs
        advantage = -(student_logp - teacher_logp)
        trainer.update(rollouts, advantage, loss_fn="importance_sampling")

        if number % 10 == 0:
            # On fresh tokens the mean of -advantage estimates KL(student || teacher), in nats a token.
            print(f"pass {number}: reverse KL about {-advantage.mean():.3f}")
    after = accuracy(student, heldout)
    print(f"after {passes} passes: {after:.1%}")
    if adapter is not None:
        student.model.save_pretrained(adapter)
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=60, help="passes over fresh rollouts (default: 60)")
    parser.add_argument("--adapter", type=Path, help="directory for what was learned, in PEFT's format")
    arguments = parser.parse_args()
    main(arguments.passes, arguments.adapter)

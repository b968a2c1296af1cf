"""On-policy distillation from Python, for custom training loops.

    student = Student(ModelConfig(model="Qwen/Qwen3-8B"))
    teacher = Teacher(ModelConfig(model="Qwen/Qwen3-32B"))
    trainer = Trainer(student, TrainConfig(learning_rate=1e-4))

    for prompts in batches:
        rollouts = student.sample(prompts)

        teacher_logp = teacher.compute_logprobs(rollouts)
        student_logp = rollouts.logprobs
        advantage = -(student_logp - teacher_logp)
        trainer.update(rollouts, advantage, loss_fn="importance_sampling")

Sampler, scorer and trainer are the ones that the commands use. Student and teacher share memory here; if they do not
fit, `Student.cached` reads rollouts from the cache of `redpen rollouts` and `redpen score`.

Shapes: T response tokens of all rollouts end to end, K candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline import credentials
from pipeline.config import ModelConfig, PromptsConfig, RolloutsConfig, TeacherConfig, TrainConfig
from pipeline.engines.heldout import generating
from pipeline.engines.resident import ResidentScorer
from pipeline.engines.sampling import PromptBlock, Sampling, require_room
from pipeline.engines.scoring import ScoreOptions, TokenBatch, sequences
from pipeline.engines.transformers_sampler import TransformersSampler
from pipeline.errors import ConfigError, ModelError, PromptError, RedpenError
from pipeline.forward.packing_check import choose_checked, settle_layout
from pipeline.models import load as models
from pipeline.models.lora import make_trainable, training_mode
from pipeline.models.resolve import resolve
from pipeline.teachers.alignment import View, align
from pipeline.text.detokenize import response_texts
from pipeline.text.records import check_record
from pipeline.text.rendering import render_all
from pipeline.train import in_memory, trainer
from pipeline.train.objective import DistillationObjective

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Float32 = npt.NDArray[np.float32]
Prompt = str | list[dict[str, str]]
LossFn = Literal["importance_sampling", "reverse_kl"]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """Responses that a student sampled, with its own log-probs of every token.

    Attributes:
        block: token ids, exactly as sampled: prompts, responses, lengths.
        scores: the student's log-probs and candidates by the forward pass that also trains, in nats at temperature 1,
            whatever the sampling temperature was.
        top_p: used for sampling.
        vocab_size: of the student's head.
    """

    block: cs.RolloutBlock
    scores: cs.ScoreBlock
    tokenizer: PreTrainedTokenizerBase
    top_p: float
    vocab_size: int

    @property
    def logprobs(self) -> Float32:
        """f4 [T]: log p_S(x_t | x_<t) by the student that sampled, at temperature 1."""
        return self.scores.logprobs

    @property
    def texts(self) -> list[str]:
        """Every response without special tokens, of several turns the last; those of one prompt are adjacent."""
        return response_texts(self.block, self.tokenizer)

    def __len__(self) -> int:
        return self.block.n_rows


class Student:
    """The model that samples and learns. `Trainer` updates it in place, and it samples with its current weights.

    Attributes:
        model: the transformers model, wrapped by PEFT once a `Trainer` has added a LoRA; `model.save_pretrained(DIR)`
            then writes the adapter, for `ModelConfig(adapter=DIR)`, plain peft and vLLM.

    Args:
        model: a path or Hub id, or its whole configuration (dtype, adapter, device, ...).
        template, template_args: how prompts are tokenized, as in a recipe's [prompts].
        candidates: K, the sampled token and the student's likeliest others, which "reverse_kl" compares.
        tile_tokens: prompt and response tokens in one forward pass while scoring.

    Raises:
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | ModelConfig,
        *,
        template: Literal["auto", "chat", "none"] = "auto",
        template_args: dict[str, Any] | None = None,
        candidates: int = 8,
        tile_tokens: int = 8192,
    ):
        self.config = _config(model)
        self._facts = resolve(self.config)
        self.tokenizer = self._facts.tokenizer
        self.model: Any = models.load_model(self.config, trainable=True)
        self._prompts = PromptsConfig(path="prompts", template=template, template_args=template_args or {})
        self._options = ScoreOptions(
            candidates=candidates, candidate_vocab=self._facts.known_tokens, tile_tokens=tile_tokens
        )
        self._passes = 0

    def sample(self, prompts: Sequence[Prompt], settings: RolloutsConfig = RolloutsConfig()) -> Rollouts:  # noqa: B008
        """Sample responses with the current weights. Each call draws new ones; repeating the calls repeats the draws.

        Args:
            prompts: texts, or lists of messages (`{"role": ..., "content": ...}`).
            settings: rollouts for each prompt, lengths, seed, top_p, and temperature, which should be 1 for
                importance sampling.

        Raises:
            PromptError, ConfigError: a prompt, alone or with the longest response, exceeds the student's context.
        """
        if settings.engine != "transformers":
            raise ConfigError(
                f'rollouts.engine = {settings.engine!r}: expected "transformers", vLLM cannot sample a student that '
                "is being trained"
            )
        if settings.environment is not None:
            raise ConfigError(
                "rollouts.environment: expected none, sample() takes one turn; use `redpen rollouts`, whose rounds "
                "`Student.cached` reads"
            )
        if not prompts:
            raise PromptError("prompts: expected at least one, got none")
        records = [check_record({"prompt": prompt}, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        context = self._facts.context
        ids = render_all(records, self.tokenizer, self._prompts, settings.max_prompt_tokens, context)
        require_room(ids, settings.max_response_tokens, context, "rollouts.max_response_tokens")
        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            stop_token_ids=self._facts.stop_token_ids(settings),
            rollouts_per_prompt=settings.rollouts_per_prompt,
            max_response_tokens=settings.max_response_tokens,
            seed=settings.seed,
            round_index=self._passes,
        )
        with generating(self.model):
            sampler = TransformersSampler(self.model, sampling, batch_size=settings.batch_size)
            block = sampler.sample_block(PromptBlock(0, list(enumerate(ids))))
        self._passes += 1
        scores = _score(self.model, TokenBatch((block,)), self._options)
        return self._rollouts(block, scores, settings.top_p)

    def compute_logprobs(self, rollouts: Rollouts) -> Float32:
        """f4 [T]: log-probs by the *current* student; `rollouts.logprobs` are those of the student that sampled."""
        return _score(
            self.model, TokenBatch((rollouts.block,), rollouts.scores.candidate_ids), self._options
        ).logprobs

    def cached(self, round_: cs.Round, block: int) -> Rollouts:
        """Rollouts from a block of a cache; `round_.scores(TEACHER).read(block).logprobs` are a teacher's log-probs.

        Raises:
            CacheError: the block is not sampled or not scored yet, or damaged.
            ModelError: a different student sampled it, or its candidates were drawn at random, which only
                `redpen train` can learn from.
        """
        cached, own = round_.manifest.student, self._facts.identity
        read = round_.scores(cs.STUDENT)
        if (cached.digest, cached.adapter_digest) != (own.digest, own.adapter_digest):
            raise ModelError(
                f"round {round_.index} of {round_.cache.url} was sampled by a different student, {cached.name}; "
                f"load that one, or sample a round with {own.name}"
            )
        if read.manifest.candidate_kind != "topk":
            raise ModelError(
                f'round {round_.index} of {round_.cache.url}: expected candidates of kind "topk", got '
                f'"{read.manifest.candidate_kind}"; use `redpen train`'
            )
        return self._rollouts(round_.rollouts.read(block), read.read(block), round_.manifest.top_p)

    def _rollouts(self, block: cs.RolloutBlock, scores: cs.ScoreBlock, top_p: float) -> Rollouts:
        return Rollouts(block, scores, self.tokenizer, top_p, self._facts.vocab_size)


class Teacher:
    """A model that scores what the student sampled.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: it should read other prompts than the student.
    """

    def __init__(self, model: str | ModelConfig, *, tile_tokens: int = 8192):
        self.config = TeacherConfig(**_config(model).model_dump())
        if self.config.renders:
            raise ConfigError(
                "teacher.prompt, prompt_prefix, system and template need a cache, since a Teacher here scores the "
                "student's own prompts; use `redpen score`"
            )
        self.tokenizer = resolve(self.config).tokenizer
        self.model = models.load_model(self.config)
        self._options = ScoreOptions(tile_tokens=tile_tokens)
        self._aligned_with: PreTrainedTokenizerBase | None = None
        self._view = View()

    def compute_logprobs(self, rollouts: Rollouts) -> Float32:
        """f4 [T]: log p_T(x_t | x_<t) in nats, at temperature 1, token by token beside `rollouts.logprobs`.

        Raises:
            ModelError: the teacher tokenizes text differently from the student (different ids are fine), or its
                architecture does not support packing.
        """
        return self.compute_scores(rollouts).logprobs

    def compute_scores(self, rollouts: Rollouts) -> cs.ScoreBlock:
        """The same, with log-probs [T, K] of the student's candidates (NaN for tokens that the teacher lacks) and of
        all other tokens together, for "reverse_kl".
        """
        student, batch = rollouts.tokenizer, TokenBatch((rollouts.block,), rollouts.scores.candidate_ids)
        if self._aligned_with is not student:
            sizes = max(rollouts.vocab_size, len(student)), resolve(self.config).vocab_size
            alignment = align(student, self.tokenizer, ("the student", self.config.model), sizes)
            self._view = View(alignment=None if alignment.is_identity(student) else alignment)
            (theirs,) = self._view.of(batch).blocks
            checked = choose_checked(theirs.rollout_length.tolist(), self.model.device)
            settle_layout(self.model, *sequences(theirs, checked))
            self._aligned_with = student
        return self._view.back(_score(self.model, self._view.of(batch), self._options), batch)


class Trainer:
    """Trains a student, one optimizer step at a time.

    Args:
        student: gets a LoRA, or what `train.method` asks for, and samples with it from then on.
        train: settings as in a recipe's [train]. `update` chooses the loss; settings that concern the replay of a
            cache (batch sizes, order, stops, checkpoints) are ignored.
    """

    def __init__(self, student: Student, train: TrainConfig = TrainConfig()):  # noqa: B008  frozen
        self.student = student
        self._train = train
        student.model = make_trainable(student.model, train)
        self._trainer = trainer.StudentTrainer(student.model, self._objective("importance_sampling"), train)
        self._used: set[bytes] = set()

    @property
    def step(self) -> int:
        """Updates done."""
        return self._trainer.step

    def update(
        self, rollouts: Rollouts, signal: npt.ArrayLike | cs.ScoreBlock, loss_fn: LossFn = "importance_sampling"
    ) -> dict[str, float]:
        """One optimizer step on the mean loss over all trained tokens of the rollouts.

        importance_sampling    -exp(log p_S(x_t) - log p_old(x_t)) A_t, with p_old the student that sampled
        reverse_kl             sum over candidates and rest of p_S (log p_S - log p_T)

        Args:
            signal: the advantage A [T] in nats, clipped to +-`train.advantage_clip`; for "reverse_kl" the result of
                `Teacher.compute_scores`.

        Returns:
            Metrics before the step: loss, grad_norm, lr, entropy, and the drift from the student that sampled
            (ratio_mean, ratio_std, ratio_max, ess, chi_square).

        Raises:
            RedpenError: the same advantage was used for the same rollouts before, the signal is not finite or
                belongs to different rollouts, or importance sampling meets top_p < 1. No weight has changed then.
        """
        if loss_fn == "importance_sampling":
            if rollouts.top_p < 1:
                raise RedpenError(
                    f"importance_sampling: the rollouts were sampled at top_p {rollouts.top_p:g}, and tokens outside "
                    'the nucleus have no ratio; sample at top_p 1, or use loss_fn="reverse_kl"'
                )
            advantage = in_memory.read_advantage(signal, rollouts.block)
            use = _digest(rollouts, advantage)
            if use in self._used:
                raise RedpenError(
                    "advantage: these rollouts were trained on with the same advantage before. It compares the "
                    "teacher with the student that sampled, so it is right for one pass only: replayed, its optimum "
                    "is a point mass on the best rollout. Sample again, or recompute the advantage with "
                    "student.compute_logprobs(rollouts)"
                )
            metrics = self._update(
                rollouts, in_memory.as_teacher(advantage, rollouts.block, rollouts.logprobs), loss_fn
            )
            self._used.add(use)
            del metrics["reverse_kl"]  # an advantage covers the sampled token only
            return metrics
        if loss_fn == "reverse_kl":
            assert rollouts.scores.candidate_ids is not None
            return self._update(rollouts, in_memory.at_candidates(signal, rollouts.scores.candidate_ids), loss_fn)
        raise RedpenError(f'loss_fn: expected "importance_sampling" or "reverse_kl", got {loss_fn!r}')

    def _update(self, rollouts: Rollouts, columns: in_memory.Columns, loss_fn: LossFn) -> dict[str, float]:
        batch = in_memory.batch(self.step, rollouts.block, rollouts.logprobs, columns)
        if self.step == 0:
            self._trainer.check(batch.rollouts)
        self._trainer.objective = self._objective(loss_fn)
        training_mode(self.student.model)
        return self._trainer.update(batch)

    def _objective(self, loss_fn: LossFn) -> DistillationObjective:
        train = self._train.model_copy(update={"loss": loss_fn, "advantage": "cached"})
        return DistillationObjective(train, in_memory.InMemoryTeacher({}), resolve(self.student.config).vocab_size)


def _config(model: str | ModelConfig) -> ModelConfig:
    found = ModelConfig(model=model, dtype="auto") if isinstance(model, str) else model
    for path, text in credentials.in_settings(found.model_dump()):
        credentials.refuse(text, path)
    return found


def _score(model: PreTrainedModel, batch: TokenBatch, options: ScoreOptions) -> cs.ScoreBlock:
    model.eval()
    return ResidentScorer(model, options).compute_logprobs(batch)


def _digest(rollouts: Rollouts, advantage: Float32) -> bytes:
    """Equal for equal rollouts with equal advantages, even if both are read from a cache again."""
    block = rollouts.block
    arrays = (block.prompt_token_ids, block.prompt_length, block.token_ids, block.response_length, advantage)
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=16).digest()

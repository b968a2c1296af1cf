"""What must fit together before anything is loaded: the round, its scores, the student and the recipe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe, TrainConfig
from pipeline.config.messages import did_you_mean
from pipeline.console import warn
from pipeline.errors import ConfigError, ModelError
from pipeline.models import load as models
from pipeline.models.identity import IMPORTED
from pipeline.text.answers import Checker
from pipeline.train.likelihood import CrossEntropy
from pipeline.train.mixture import Teachers
from pipeline.train.objective import Objective
from pipeline.train.order import Order
from pipeline.train.policy_gradient import PolicyGradient
from pipeline.train.replay import Derived, Replay, behaviour
from pipeline.train.reward import Rewards, check_answers, check_comparable
from pipeline.train.selection import Selection

Learnt = Objective | CrossEntropy | PolicyGradient


def teacher_names(recipe: Recipe, round_: cs.Round, cache_url: str) -> tuple[str, ...]:
    """The scores to learn from: those routed to, or `train.teacher`, or the only ones there are; none where the
    tokens themselves are learnt, or from rewards alone.

    Raises `CacheError` where nothing is scored, `ConfigError` where the settings name other teachers, or fit none.
    """
    train, scored = recipe.train, round_.teacher_names()
    if train.loss == "cross_entropy" or recipe.reward.teacher_weight == 0:
        return ()
    where = f"cache {cache_url} round {round_.index}"
    if cs.STUDENT not in round_.scorer_names() or not scored:
        raise cs.CacheError(f"{where}: not scored yet; run `redpen score RECIPE --cache {cache_url}`")
    wanted = [train.teacher] if isinstance(train.teacher, str) else train.teacher
    setting = "train.teacher"
    if train.route:
        routed = sorted(set(train.route.values()))
        if wanted is not None and sorted(wanted) != routed:
            raise ConfigError(
                f"train.teacher: train.route sends prompts to {', '.join(routed)}, so it must be those or left out, "
                f"got {', '.join(wanted)}"
            )
        wanted, setting = routed, "train.route"
    if wanted is None and len(scored) > 1:
        raise ConfigError(
            f"train.teacher: {where} is scored by {', '.join(scored)}; say which one to learn from, or list several"
        )
    names = scored if wanted is None else wanted
    for name in names:
        if name not in scored:
            raise ConfigError(
                f"{setting} = {name!r}: {where} is scored by {', '.join(scored)}; "
                f"run `redpen score RECIPE --cache {cache_url} --only {name}`"
            )
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"train.teacher: expected one name or a list of different ones, got {names}")
    _check_weights(train, names)
    return tuple(name for name in names if train.teacher_weights.get(name, 1.0) > 0)


def _check_weights(train: TrainConfig, names: Sequence[str]) -> None:
    given = train.teacher_weights
    if train.route or len(names) == 1:
        if given or train.mixture != TrainConfig().mixture:
            raise ConfigError(
                f"train.{'teacher_weights' if given else 'mixture'}: belongs to several teachers of a prompt, got "
                f"{'train.route' if train.route else f'the one teacher {names[0]!r}'}"
            )
        return
    for name in given:
        if name not in names:
            raise ConfigError(
                f"train.teacher_weights: {name!r} is not among the teachers {', '.join(names)}"
                + did_you_mean(name, names)
            )
    if given and (missing := [name for name in names if name not in given]):
        raise ConfigError(f"train.teacher_weights: expected a weight of every teacher, got none of {missing[0]!r}")
    if given and not any(given.values()):
        raise ConfigError("train.teacher_weights: expected one above 0, got 0 for every teacher")


def teachers(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> Teachers:
    """The teachers of `teacher_names`, with what each is for. Raises `ConfigError` for a prompt without a route."""
    train = recipe.train
    manifests = {name: round_.scores(name).manifest for name in names}
    scores = {name: manifest for name, manifest in manifests.items() if isinstance(manifest, cs.ScoresManifest)}
    if train.route:
        return Teachers(scores, route_P=_route(train, round_, names))
    weights = [train.teacher_weights.get(name, 1.0) for name in names]
    return Teachers(scores, tuple(weight / sum(weights) for weight in weights), train.mixture)


def _route(train: TrainConfig, round_: cs.Round, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """[n_prompts]: the number of each prompt's teacher."""
    route_P = np.empty(round_.n_prompts, np.int64)
    for prompt in range(round_.n_prompts):
        source = round_.prompts[prompt].get("source")
        name = train.route.get("*") if source is None else train.route.get(str(source), train.route.get("*"))
        if name is None:
            told = "has no source" if source is None else f"is from {source!r}"
            raise ConfigError(
                f"train.route: prompt {prompt} of round {round_.index} {told}, which has no route; add "
                + ("" if source is None else f"{source!r} or ")
                + "'*', the teacher of all others"
            )
        route_P[prompt] = names.index(name)
    return route_P


def objective(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> Learnt:
    """What is minimised on this round."""
    if names:
        return _of_teachers(recipe, round_, names)
    return CrossEntropy() if recipe.train.loss == "cross_entropy" else PolicyGradient(recipe.train, recipe.reward)


def _of_teachers(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> Objective:
    student = round_.scores(cs.STUDENT).manifest
    assert isinstance(student, cs.ScoresManifest)
    draws = student.candidates - 1 if student.candidate_kind == "sampled" else 0
    told = teachers(recipe, round_, names)
    return Objective(recipe.train, told, round_.manifest.vocab_size, draws, recipe.reward)


def replay(recipe: Recipe, round_: cs.Round, learnt: Learnt) -> Replay:
    """The batches that `learnt` is minimised on. Raises `ConfigError` where every prompt is held back."""
    train, select = recipe.train, recipe.select
    stop_ids, special_ids = round_.manifest.stop_token_ids, ()
    if not select.special_tokens:
        special_ids = tuple(set(models.load_tokenizer(recipe.student).all_special_ids) - set(stop_ids))
    order = Order(
        round_.n_prompts,
        round_.manifest.prompts_per_block,
        train.prompts_per_step,
        train.shuffle_window_blocks,
        train.seed,
        held_back(recipe),
    )
    selection = Selection(select, stop_ids, special_ids)
    taught = learnt.teachers.taught if isinstance(learnt, Objective) else {}
    derived: list[Derived] = []
    if recipe.reward.coefficient:
        tokenizer, checker = models.load_tokenizer(recipe.student), Checker.of(recipe.eval)
        derived.append(Rewards(round_, tokenizer, checker, recipe.reward).columns)
    if train.behaviour_correction:
        derived.append(behaviour)
    return Replay(round_, learnt.arrays, order, selection=selection, taught=taught, derived=derived)


def held_back(recipe: Recipe) -> int:
    """How many prompts at the round's end are measured on instead of trained on."""
    return recipe.train.heldout_prompts if recipe.train.heldout_metric == "reverse_kl" else 0


def check_scored(loss: str, round_: cs.Round, names: Sequence[str], cache_url: str) -> None:
    """Training needs every block of the rollouts and, unless it learns the tokens, of the student's scores and the
    teachers'."""
    scorers = () if loss == "cross_entropy" else (cs.STUDENT, *names)
    groups = {"rollouts": round_.rollouts} | {name: round_.scores(name) for name in scorers}
    for name, group in groups.items():
        done = int(group.committed().sum())
        if done < round_.n_blocks:
            what = "sampled" if name == "rollouts" else f"scored by {name!r}"
            command = "rollouts" if name == "rollouts" else "score"
            raise cs.UncommittedError(
                f"cache {cache_url} round {round_.index}: {done} of {round_.n_blocks} blocks are {what}; "
                f"`redpen {command} RECIPE --cache {cache_url}` does the rest"
            )


def check_teachers(recipe: Recipe, round_: cs.Round, names: Sequence[str]) -> None:
    """Every prompt needs a teacher, and a divergence over candidates what the teachers say of them: of all of them
    where they are draws."""
    if not names:
        return
    learnt = _of_teachers(recipe, round_, names)
    loss, scores = recipe.train.loss, learnt.teachers.scores
    for name, taught_P in learnt.teachers.taught.items():
        if not taught_P.any():
            warn(f"train.route: no prompt of round {round_.index} goes to {name!r}")
    if learnt.teachers.only_sampled:
        name = next(name for name, told in scores.items() if not told.candidates)
        alone = f"the scores by {name!r} hold no candidates (engine {scores[name].engine})"
        if loss not in ("reverse_kl", "importance_sampling"):
            raise ConfigError(
                f'train.loss = "{loss}": {alone}; set it to "reverse_kl" or "importance_sampling", or let the '
                "teacher score the cache itself under another name"
            )
        if loss == "reverse_kl":
            check_sampling(recipe, round_, "reverse_kl without candidates")
            alone += ", so reverse_kl is differentiated at the sampled token alone (k2)"
        warn(
            f"{alone}; reverse KL is measured over the sampled token and everything else, a low bound; set "
            "train.stop_reverse_kl = 0 to train through"
        )
    elif learnt.draws and loss != "importance_sampling":
        if partial := next((name for name, told in scores.items() if told.partial or not told.candidates), None):
            raise ConfigError(
                f'train.loss = "{loss}": the candidates were drawn from the student, and the scores by {partial!r} '
                "do not tell all of them, which would bias the mean over draws; use score.candidate_kind = "
                '"topk", or train.loss = "importance_sampling"'
            )
        if learnt.teachers.mixed and learnt.teachers.mixture == "geometric":
            raise ConfigError(
                f'train.mixture = "geometric": the candidates were drawn from the student, and train.loss = "{loss}" '
                'over draws needs probabilities of the whole vocabulary; use "arithmetic"'
            )


def check_replay(recipe: Recipe, round_: cs.Round) -> None:
    """What the loss needs of how this round was sampled, whatever the recipe says of sampling."""
    recipe.check_single_use(round_.n_prompts - held_back(recipe))
    if recipe.train.loss == "importance_sampling":
        check_sampling(recipe, round_, "importance_sampling")
    elif recipe.reward.coefficient:
        check_sampling(recipe, round_, "a reward's policy gradient")
    if recipe.reward.coefficient:
        check_comparable(round_)
        check_answers(round_, recipe.reward)
    if recipe.train.behaviour_correction:
        check_behaviour(round_)


def check_sampling(recipe: Recipe, round_: cs.Round, loss: str) -> None:
    """Importance ratios need tokens of the whole distribution, and want them of the student's own."""
    sampled, where = round_.manifest, f"round {round_.index} of the cache was sampled at"
    if sampled.top_p < 1:
        raise ConfigError(
            f"train.loss: {where} top_p {sampled.top_p:g}, and tokens outside the nucleus have no ratio, which "
            f'{loss} needs; set it to "reverse_kl" over candidates, or sample a round at top_p 1'
        )
    corrected, known = recipe.train.behaviour_correction, recipe.rollouts.temperature != 1  # the recipe has warned
    if sampled.temperature != 1 and not corrected and not known:
        warn(f"{where} temperature {sampled.temperature:g}: {loss} then raises the on-policy reverse KL")


def check_behaviour(round_: cs.Round) -> None:
    """`behaviour_correction` divides by what each token was sampled with."""
    if round_.manifest.temperature == 0:
        raise ConfigError(
            f"train.behaviour_correction: round {round_.index} of the cache was decoded greedily, which is no "
            "distribution over tokens; set it to false, or sample a round at a temperature"
        )
    if round_.manifest.engine != IMPORTED:
        return
    for block in range(round_.n_blocks):
        found = round_.rollouts.read_arrays(block, ["rollout_logprobs", "trained"])
        unknown = int((np.isnan(found["rollout_logprobs"]) & (found["trained"] == 1)).sum())
        if unknown:
            raise ConfigError(
                f"train.behaviour_correction: block {block} of the imported round {round_.index} does not know the "
                f"rollout_logprobs of {unknown} tokens; set it to false, or import the rollouts with them"
            )


def check_student(recipe: Recipe, round_: cs.Round, cache_url: str) -> None:
    """The student must be the one that sampled the rollouts, and should be read in the type it was scored in."""
    cached, now = round_.manifest.student, models.model_identity(recipe.student)
    differing = [
        f"student.{field} {getattr(cached, field)} ({cached.name}), the recipe's {getattr(now, field)} ({now.name})"
        for field in ("digest", "adapter_digest")
        if getattr(cached, field) != getattr(now, field)
    ]
    if differing:
        raise ModelError(
            f"cache {cache_url} round {round_.index} is another student's: it has {'; '.join(differing)}; "
            "set student.model and student.adapter to that student, or sample a cache of this one"
        )
    if recipe.train.loss == "cross_entropy":
        return
    facts, scores = models.model_facts(recipe.student), round_.scores(cs.STUDENT).manifest
    assert isinstance(scores, cs.ScoresManifest)
    if scores.quantisation != facts.quantisation:
        raise ModelError(
            f"student.quantisation: the student was scored {_quantised(scores.quantisation)} and would be trained "
            f"{_quantised(facts.quantisation)}, which is another model; set it to what it was, or score the rollouts "
            "again in another cache"
        )
    scored, dtype = scores.dtype, facts.dtype
    if scored != dtype:
        warn(
            f"student.dtype: the student was scored in {scored} and is trained in {dtype}; "
            "importance ratios then also hold the difference of their roundings"
        )


def _quantised(method: str | None) -> str:
    return "unquantised" if method is None else f"in {method}"

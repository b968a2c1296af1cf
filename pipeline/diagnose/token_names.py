"""Names of tokens, and other prompt templates, by the tokenizers on this machine.

Nothing is downloaded: without a tokenizer, tokens are ids and templates are not compared.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.config import PromptsConfig
from pipeline.diagnose.read import PairScores
from pipeline.errors import PromptError
from pipeline.models.identity import other_prompt
from pipeline.text.detokenize import labels, load_decoder, local_tokenizer
from pipeline.text.rendering import render

#: Prompts of the round that are rendered again by a teacher's own tokenizer.
RENDERED_PROMPTS = 8


class TokenNames:
    """Text of tokens for people; tokenizers are loaded when they are needed."""

    def __init__(self, round_: cs.Round):
        self._round = round_

    def __call__(self, token: int) -> str:
        """A token's text in quotes, or its id."""
        text = self._label(token)
        return text if text == f"<{token}>" else f"'{text}'"

    def is_special(self, token: int) -> bool:
        """Whether it is a special or an added token of the student's tokenizer."""
        tokenizer = self._student
        return tokenizer is not None and token in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def own_stop(self, pair: PairScores) -> int | None:
        """The student's id of the token that ends a text for the teacher's tokenizer."""
        tokenizer = _tokenizer_of(pair)
        if tokenizer is None or tokenizer.eos_token is None or self._student is None:
            return None
        found = self._student.get_vocab().get(tokenizer.eos_token)
        return None if found is None else int(found)

    def other_renderings(self, pair: PairScores) -> list[str]:
        """Differences between the prompts of teacher and student, a line each."""
        sampled, scored = pair.sampled.template, pair.scored.template
        if sampled != scored:
            read = other_prompt(pair.scored, pair.sampled)
            return [
                f"the student sampled with {_template(sampled)}, {pair.teacher} scored with {_template(scored)}"
                + ("" if read is None else f": it read {read}")
            ]
        tokenizer = _tokenizer_of(pair)
        student = self._student
        if tokenizer is None or student is None:
            return [f"the tokenizer of {pair.scored.model.name} is not on this machine, so its template is not known"]
        if sampled["kind"] == "chat":
            return self._rendered_by(student, tokenizer, sampled)
        if tokenizer.chat_template:
            return ['prompts are plain text (prompts.template = "none"), and the teacher has a chat template']
        return []

    def _rendered_by(self, student: Any, tokenizer: Any, template: dict[str, Any]) -> list[str]:
        if not tokenizer.chat_template:
            return ["prompts are in a chat template, and the teacher's own tokenizer has none"]
        cfg = PromptsConfig(
            path="prompts", template="chat", template_args=template.get("args", {}), system=template.get("system")
        )
        block = self._round.rollouts.read(int(np.flatnonzero(self._round.rollouts.committed())[0]))
        n = min(RENDERED_PROMPTS, block.n_prompts)
        other = 0
        for prompt in range(n):
            record = self._round.prompts[int(block.prompt_index[prompt])]
            try:
                ids = render(record, tokenizer, cfg, self._round.manifest.max_prompt_tokens)
            except PromptError:
                ids = []
            ours = student.convert_ids_to_tokens(block.prompt_ids(prompt).tolist())
            other += tokenizer.convert_ids_to_tokens(ids) != ours
        return [f"the teacher's own chat template renders {other} of {n} prompts differently"] if other else []

    @functools.cached_property
    def _student(self) -> Any | None:
        manifest = self._round.manifest
        return local_tokenizer(manifest.tokenizer.name, manifest.student.revision)

    @functools.cached_property
    def _label(self) -> Any:
        return labels(load_decoder(self._round.manifest))


def _tokenizer_of(pair: PairScores) -> Any | None:
    return local_tokenizer(pair.scored.tokenizer.name, pair.scored.model.revision)


def _template(template: dict[str, Any]) -> str:
    if template["kind"] == "none":
        return "plain text"
    args = json.dumps(template["args"]) if template.get("args") else ""
    system = " with a system message" if template.get("system") else ""
    return f"a chat template ({str(template.get('sha256', ''))[:8]}{', ' + args if args else ''}){system}"

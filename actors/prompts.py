"""Prompts become token ids, and a stream that can be resumed at any step.

Data flow: RawPrompt -> render_prompt (chat template) -> tokenize_prompts -> Prompt -> PromptStream.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors.config import DataConfig
from actors.datasets import RawPrompt
from actors.fingerprint import template_fingerprint
from actors.trajectory import Message, Prompt

__all__ = ["PromptStream", "render_prompt", "template_fingerprint", "tokenize_prompts"]

logger = logging.getLogger(__name__)


def render_prompt(raw: RawPrompt, tokenizer: Any) -> str:
    """The text that a prompt is encoded from.

    A plain text is itself. A dialogue goes through the tokenizer's chat template, up to where the
    assistant's turn starts.

    Raises:
        ValueError: The tokenizer has no chat template, or the template refuses the dialogue.
    """
    from jinja2.exceptions import TemplateError

    if not raw.messages:
        return raw.text
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompt {raw.prompt_id!r} is a dialogue but the tokenizer has no chat template: use a "
            "model whose tokenizer has one, or plain-text prompts without data.chat_template"
        )
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(raw.messages), tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"prompt {raw.prompt_id!r}: the chat template refuses the dialogue: {error}"
        ) from None
    return rendered


def tokenize_prompts(raw: Sequence[RawPrompt], tokenizer: Any, config: DataConfig) -> list[Prompt]:
    """Token ids of prompts, as the engine will be given them.

    A plain text gets the special tokens that the tokenizer adds by itself (a BOS, usually),
    except for a trailing EOS, which would end the text before it began. A rendered dialogue gets
    none: its template has written them. With ``config.chat_template`` a plain text is a dialogue
    of one user's turn.

    Args:
        raw: Prompts with unique ids.
        tokenizer: A Hugging Face tokenizer.
        config: ``chat_template``, ``max_prompt_tokens`` and ``overlong_prompts`` are read. With
            ``"truncate_left"`` a leading BOS is kept and ``text`` becomes what the kept ids say;
            ``messages`` stay whole. How many prompts were cut or skipped is logged.

    Raises:
        ValueError: A prompt is too long, is refused by the chat template or has no tokens, an id
            occurs twice, or no prompt is left.
    """
    prompts: list[Prompt] = []
    seen: set[str] = set()
    overlong = 0
    for given in raw:
        prompt = given
        if prompt.prompt_id in seen:
            raise ValueError(f"prompt id {prompt.prompt_id!r} occurs twice: ids must be unique")
        seen.add(prompt.prompt_id)
        if config.chat_template and not prompt.messages:
            user = Message(role="user", content=prompt.text)
            prompt = replace(prompt, text="", messages=(user,))
        text = render_prompt(prompt, tokenizer)
        ids = _encode(text, tokenizer, special=not prompt.messages)
        if len(ids) > config.max_prompt_tokens:
            overlong += 1
            if config.overlong_prompts == "error":
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} has {len(ids)} tokens, data.max_prompt_tokens is "
                    f"{config.max_prompt_tokens}: raise it, or set data.overlong_prompts to skip "
                    "or truncate_left"
                )
            if config.overlong_prompts == "skip":
                continue
            ids, text = _cut_left(ids, tokenizer, config.max_prompt_tokens)
        prompts.append(
            Prompt(
                prompt_id=prompt.prompt_id,
                token_ids=np.array(ids, np.int32),
                text=text,
                messages=prompt.messages,
                meta=prompt.meta,
            )
        )
    if overlong:
        logger.warning(
            "%d of %d prompts have more than %d tokens: %s",
            overlong,
            len(raw),
            config.max_prompt_tokens,
            "skipped" if config.overlong_prompts == "skip" else "cut at the left",
        )
    if not prompts:
        raise ValueError(
            f"no prompt is left of {len(raw)}: {overlong} have more than data.max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens"
        )
    return prompts


def _encode(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if special and ids[1:] and ids[-1] == eos:
        ids.pop()
    if special and len(ids) > 1 and ids[0] == ids[1] == bos:
        del ids[0]  # the text spelt out the BOS that the tokenizer adds
    return ids


def _cut_left(ids: list[int], tokenizer: Any, limit: int) -> tuple[list[int], str]:
    """The last ``limit`` ids behind a kept BOS, and the text that they say (without that BOS)."""
    head = ids[:1] if limit > 1 and ids[0] == tokenizer.bos_token_id else []
    kept = ids[len(ids) - (limit - len(head)) :]
    return head + kept, str(tokenizer.decode(kept))


class PromptStream:
    """An endless, reshuffled sequence of prompts, cut into one batch per step.

    The batch of a step depends on the prompts, the seed and the step alone, so a run resumes by
    its step number and nothing needs saving. Epochs follow each other without a gap: every prompt
    comes exactly once per epoch, a batch may span two epochs, and never holds a prompt twice.

        >>> PromptStream(prompts, prompts_per_step=64, seed=0).batch(17)
    """

    def __init__(self, prompts: Sequence[Prompt], prompts_per_step: int, seed: int) -> None:
        if not 1 <= prompts_per_step <= len(prompts):
            raise ValueError(
                f"ppo.prompts_per_step is {prompts_per_step} but there are {len(prompts)} prompts: "
                "lower it (sampling.samples_per_prompt adds samples), or give more prompts"
            )
        self._prompts = tuple(prompts)
        self._per_step = prompts_per_step
        self._seed = seed
        self._epoch = 0
        self._order = self._shuffled(0)

    def batch(self, step: int) -> list[Prompt]:
        """The ``prompts_per_step`` prompts of a step, counted from 0."""
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        size, start = len(self._prompts), step * self._per_step
        epoch, offset = divmod(start, size)
        indices = self._order_of(epoch)[offset : offset + self._per_step]
        missing = self._per_step - len(indices)
        if missing:
            indices = indices + self._order_of(epoch + 1)[:missing]
        return [self._prompts[i] for i in indices]

    def replacements(self, step: int, start: int, count: int) -> list[Prompt]:
        """``count`` prompts that a step may ask beyond its batch, from position ``start`` on.

        Each step has a sequence of its own for this: every prompt that is not in its batch once,
        in an order that depends on the seed and the step alone. So a resumed run asks what the
        first would have asked, and the batches of later steps are not moved by it. At the end of
        the sequence there are fewer than ``count``, or none.
        """
        held = {prompt.prompt_id for prompt in self.batch(step)}
        others = [prompt for prompt in self._prompts if prompt.prompt_id not in held]
        random.Random(f"replacements/{self._seed}/{step}").shuffle(others)
        return others[start : start + count]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
        return order

    def _order_of(self, epoch: int) -> list[int]:
        """Order of an epoch: a shuffle, amended by what the epoch before it ended with.

        The last batch of an epoch is filled up from the next one. Prompts that it already holds
        wait until it is full; that is why orders are worked out one after the other.
        """
        if epoch < self._epoch:
            self._epoch, self._order = 0, self._shuffled(0)
        while self._epoch < epoch:
            tail = (self._epoch + 1) * len(self._prompts) % self._per_step
            held = set(self._order[len(self._order) - tail :])
            shuffled = self._shuffled(self._epoch + 1)
            free = [i for i in shuffled if i not in held]
            fill = free[: self._per_step - tail] if tail else []
            taken = set(fill)
            self._order = fill + [i for i in shuffled if i not in taken]
            self._epoch += 1
        return self._order

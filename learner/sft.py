"""Supervised fine-tuning: next-token loss on responses and the EOS that ends them, never prompts.

A demonstration becomes the ids that a rollout would see: the prompt exactly as prompts are
tokenised for generation, then the response, then EOS.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.trajectory import Demonstration, Message
from learner import hf_directory
from learner.config import SFTConfig
from learner.stage import finish, identity_of, split
from learner.supervised import OnStep, TrainingResult, train
from learner.supervised_losses import nll
from learner.token_batches import Ids, IntArray, pad_right

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTReport:
    """What was trained on and what came of it; saved as ``training_report.json``."""

    parameters: int
    demonstrations: int
    held_out_demonstrations: int
    skipped: int
    """Demonstrations longer than the context."""
    response_tokens: int
    """Trained tokens of one pass, EOS included."""
    held_out_nll: float
    """Nats per response token on demonstrations that were not trained on."""
    training: TrainingResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A tokenised demonstration: ``ids[prompt_length:]`` is trained."""

    ids: Ids
    prompt_length: int


class ResponseLoss:
    """Next-token loss of responses: states before them give no logits at all."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self.lengths: IntArray = np.array([len(e.ids) for e in examples], np.int64)
        self.rows: IntArray = np.ones(len(examples), np.int64)
        self._prompts: IntArray = np.array([e.prompt_length for e in examples], np.int64)

    def weight(self, items: IntArray) -> float:
        return float((self.lengths - self._prompts)[items].sum())

    def loss(self, model: Any, items: IntArray) -> tuple[Tensor, dict[str, float]]:
        device = next(model.parameters()).device
        ids = pad_right([self._examples[i].ids for i in items], device)  # [B, T]
        lengths = torch.from_numpy(self.lengths[items]).to(device)[:, None]
        prompts = torch.from_numpy(self._prompts[items]).to(device)[:, None]
        # State t predicts token t + 1, which is trained when it belongs to the response.
        target = torch.arange(1, ids.shape[1], device=device)[None]
        trained = (target >= prompts) & (target < lengths)  # [B, T - 1]
        states = hf_directory.backbone_states(model, ids)[:, :-1][trained]  # [n, H]
        return nll(model.get_output_embeddings()(states), ids[:, 1:][trained]), {}


def train_sft(
    config: SFTConfig,
    demonstrations: Sequence[Demonstration],
    model_dir: Path | str,
    output_dir: Path,
    *,
    seed: int,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume: bool = False,
) -> SFTReport:
    """Fine-tune a causal language model and write it as a plain Hugging Face directory.

    Args:
        config: Batch shape, epochs, optimizer, what to do with overlong demonstrations.
        demonstrations: Prompts and responses. The held-out share is split off by prompt.
        model_dir: Directory (or hub name) of any Hugging Face causal language model.
        output_dir: Becomes the model directory.
        seed: Of the held-out split and the order.
        on_step: Told (step, total, metrics) after every step.
        should_stop: Asked after every step; ``Interrupted`` is raised when it says so.
        resume: Go on from the state that an interrupted call left in ``output_dir``.

    Raises:
        ValueError: No demonstrations, none that fits the context, or a wrong model.
        FileNotFoundError: ``model_dir`` is no model directory.
        RuntimeError: Training diverged.
    """
    if len(demonstrations) < 2:
        raise ValueError(
            f"there are {len(demonstrations)} demonstrations: at least 2 are needed, one to train "
            "on and one held out"
        )
    tokenizer = hf_directory.load_tokenizer(model_dir)
    model = hf_directory.load_causal_lm(model_dir)
    hf_directory.check_vocabulary(model, tokenizer, str(model_dir))
    context = hf_directory.context_length(model, tokenizer)
    eos_ids = frozenset(hf_directory.eos_token_ids(model, tokenizer))
    examples, prompts, skipped = _encode_all(config, demonstrations, tokenizer, eos_ids, context)
    trained, held_out = _split_by_prompt(examples, prompts, config.held_out_share, seed)
    objective = ResponseLoss(trained)
    result = train(
        model,
        objective,
        config,
        output_dir=output_dir,
        seed=seed,
        identity=identity_of(config, seed, [e.ids for e in trained]),
        held_out=ResponseLoss(held_out),
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )
    hf_directory.save(model, tokenizer, output_dir)
    report = SFTReport(
        parameters=sum(p.numel() for p in model.parameters()),
        demonstrations=len(trained),
        held_out_demonstrations=len(held_out),
        skipped=skipped,
        response_tokens=int(objective.weight(np.arange(len(trained)))),
        held_out_nll=result.held_out["loss"],
        training=result,
    )
    finish(output_dir, report)
    return report


def encode_demonstration(
    tokenizer: Any,
    prompt: str,
    messages: Sequence[Message],
    response: str,
    eos_ids: frozenset[int],
) -> Example:
    """Ids of a prompt, its response and one EOS.

    Plain text: the response's ids are what joint tokenisation gives after the prompt's ids; where
    a token would span the border, which a rollout can never produce, the response is tokenised by
    itself. Dialogue: the template with a generation prompt, then the assistant's turn up to and
    including its end.

    Raises:
        ValueError: A dialogue, but the tokenizer has no chat template; a prompt without tokens.
    """
    if messages:
        if not tokenizer.chat_template:
            raise ValueError(
                "the demonstration is a dialogue but the tokenizer has no chat template: train "
                "from a model with a template, or use plain-text prompts"
            )
        prompt = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        turns = [*messages, Message(role="assistant", content=response)]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        if whole.startswith(prompt):
            response = whole[len(prompt) :]
        special = False  # the template has written BOS where the model wants one
    else:
        special = True
    prompt_ids = _prompt_ids(tokenizer, prompt, special=special)
    response_ids = _after(tokenizer, prompt, prompt_ids, response, special=special)
    end = int(tokenizer.eos_token_id)
    if messages:
        response_ids = _up_to_eos(response_ids, eos_ids)
    while response_ids and response_ids[-1] in eos_ids:
        # The template may end turns with another EOS than the tokenizer's: that one is trained.
        last = response_ids.pop()
        end = last if messages else end
    if not prompt_ids:
        raise ValueError("a demonstration's prompt has no tokens: give it text")
    ids = np.array([*prompt_ids, *response_ids, end], np.int32)
    return Example(ids=ids, prompt_length=len(prompt_ids))


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _after(
    tokenizer: Any, prompt: str, prompt_ids: list[int], response: str, *, special: bool
) -> list[int]:
    """Ids of ``response`` behind ``prompt_ids``."""
    whole = _prompt_ids(tokenizer, prompt + response, special=special)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    # A line break in front keeps tokenizers that prepend a space to every text from doing so here.
    anchor = _encode(tokenizer, "\n", special=False)
    alone = _encode(tokenizer, "\n" + response, special=False)
    if alone[: len(anchor)] == anchor:
        return alone[len(anchor) :]
    return _encode(tokenizer, response, special=False)


def _prompt_ids(tokenizer: Any, prompt: str, *, special: bool) -> list[int]:
    """As ``actors.prompts`` encodes: no trailing EOS, and one BOS when the text spells it out."""
    ids = _encode(tokenizer, prompt, special=special)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if special and len(ids) > 1 and ids[-1] == eos:
        ids.pop()
    if special and len(ids) > 1 and ids[0] == ids[1] == bos:
        del ids[0]
    return ids


def _up_to_eos(ids: list[int], eos_ids: frozenset[int]) -> list[int]:
    """Up to and including the last EOS: templates may put a line break behind the end of a turn."""
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[-1] + 1] if ends else ids


def _encode_all(
    config: SFTConfig,
    demonstrations: Sequence[Demonstration],
    tokenizer: Any,
    eos_ids: frozenset[int],
    context: int,
) -> tuple[list[Example], list[str], int]:
    """Examples that fit the context, the prompt of each, and how many did not fit."""
    examples: list[Example] = []
    prompts: list[str] = []
    too_long: list[tuple[str, int]] = []
    for demo in demonstrations:
        example = encode_demonstration(
            tokenizer, demo.prompt, demo.messages, demo.response, eos_ids
        )
        if len(example.ids) > context:
            too_long.append((demo.example_id, len(example.ids)))
        else:
            examples.append(example)
            prompts.append(str(demo.messages) if demo.messages else demo.prompt)
    if too_long:
        name, tokens = too_long[0]
        message = (
            f"{len(too_long)} of {len(demonstrations)} demonstrations are longer than the context "
            f"of {context} tokens (the first is {name!r} with {tokens})"
        )
        if config.overlong == "error" or len(examples) < 2:
            raise ValueError(
                f"{message}: shorten them, set sft.overlong to 'skip', or use a model with a "
                "longer context"
            )
        logger.warning("%s and are skipped", message)
    return examples, prompts, len(too_long)


def _split_by_prompt(
    examples: Sequence[Example], prompts: Sequence[str], held_out_share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(trained, held out); no prompt is in both unless there is only one."""
    names = list(dict.fromkeys(prompts))
    if len(names) < 2:
        held, _ = split(len(examples), held_out_share, seed)
        chosen = {int(i) for i in held}
    else:
        held, _ = split(len(names), held_out_share, seed)
        held_names = {names[i] for i in held}
        chosen = {i for i, prompt in enumerate(prompts) if prompt in held_names}
    return (
        [e for i, e in enumerate(examples) if i not in chosen],
        [examples[i] for i in sorted(chosen)],
    )

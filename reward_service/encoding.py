"""The one place that says how a prompt and a response become a reward model's input.

Training (``learner.reward_model``) and scoring (``reward_service.model``) both call ``encode``,
so the two cannot drift apart; ``RewardHead``, the checkpoint's ``reward_head.json``, carries the
fingerprint that guards the tokenizer underneath, and the normalisation of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.trajectory import Message

Truncation = Literal["error", "left"]

HEAD_FILE = "reward_head.json"


class RewardHead(BaseModel):
    """What a reward-model checkpoint says beside its weights.

    ``score = activation(gain * raw + bias)``; a classifier's score is the probability that a text
    is flagged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    gain: float
    bias: float
    activation: Literal["identity", "sigmoid"] = "identity"
    fingerprint: str = Field(min_length=1, description="of tokenizer and chat template")
    eos_appended: bool = Field(
        True, description="the score is read at one EOS after the text, not at its last token"
    )
    base: str = Field("", description="the model that training started from")
    info: dict[str, Any] = Field(default_factory=dict, description="accuracy and the like")

    def score(self, raw: float) -> float:
        """The normalised score of the network's raw output; NaN stays NaN."""
        value = self.gain * raw + self.bias
        if self.activation == "identity":
            return value
        return 1.0 / (1.0 + math.exp(-value)) if value > -500 else 0.0

    def save(self, directory: Path) -> None:
        path = directory / HEAD_FILE
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> RewardHead:
        """Read it back. Raises FileNotFoundError or ValueError that name the file."""
        path = directory / HEAD_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} has no {HEAD_FILE}, so it is not a reward model of ours: "
                "train one with 'rlhf reward', or make one of a finished model with 'rlhf adopt'"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(f"{path}: {field}: {first['msg']}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A reward model's input: ``[T]`` ids, and the index of the response's first token.

    ``response_start`` is None where the tokenizer does not tell which characters a token covers,
    or the chat template rewrites the response.
    """

    ids: list[int]
    response_start: int | None

    def __len__(self) -> int:
        return len(self.ids)


def encode(
    tokenizer: Any,
    prompt: str,
    messages: Sequence[Message],
    response: str,
    *,
    max_tokens: int | None = None,
    truncation: Truncation = "error",
) -> list[int]:
    """Token ids of a prompt with its response; see ``encode_text``."""
    return encode_text(
        tokenizer, prompt, messages, response, max_tokens=max_tokens, truncation=truncation
    ).ids


def encode_text(
    tokenizer: Any,
    prompt: str,
    messages: Sequence[Message],
    response: str,
    *,
    append_eos: bool = True,
    max_tokens: int | None = None,
    truncation: Truncation = "error",
) -> Encoded:
    """Token ids of a prompt with its response, at the last of which the score is read.

    That is exactly one EOS, whether or not the sampled response had ended by itself.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        prompt: The prompt's text; ignored when ``messages`` is not empty.
        messages: The dialogue before the response, or empty for plain text.
        response: The response's text without special tokens.
        append_eos: ``False`` for models whose score is read where the text, or the chat template,
            ends: nothing is added and nothing dropped.
        max_tokens: The model's context; ``None`` for no limit.
        truncation: What happens beyond ``max_tokens``: ``"error"``, or ``"left"``, which drops
            the oldest tokens and keeps a leading BOS.

    Returns:
        Plain text: what the tokenizer makes of ``prompt + response``, with the BOS that it adds
        by itself. Dialogue: the chat template with the response as the assistant's turn.

    Raises:
        ValueError: No EOS token, no chat template for a dialogue or one that refuses it, too
            many tokens, or text that is not valid Unicode.
    """
    eos = _eos(tokenizer) if append_eos else None
    if messages:
        text = _render_dialogue(tokenizer, messages, response)
        begins = text.rfind(response.strip())
    else:
        text, begins = prompt + response, len(prompt)
    # Rendered dialogues often have a line break after the end-of-turn token; the score is read
    # at EOS.
    if eos is not None and text.rstrip().endswith(eos):
        text = text.rstrip()
    # A template writes BOS itself where the model wants one; so does a client that renders one.
    bos = tokenizer.bos_token
    has_bos = bool(messages) or (bos is not None and text.startswith(bos))
    tokens = tokenizer(
        text, add_special_tokens=not has_bos, return_offsets_mapping=tokenizer.is_fast
    )
    ids = list(tokens["input_ids"])
    start = None
    if tokenizer.is_fast and begins >= 0:  # a template may rewrite what it is given
        start = _first_token_after(tokens["offset_mapping"], begins)
    return _finished(tokenizer, ids, start, append_eos, max_tokens, truncation)


def encode_ids(
    tokenizer: Any,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    vocabulary: int,
    append_eos: bool = True,
    max_tokens: int | None = None,
    truncation: Truncation = "error",
) -> Encoded:
    """Ids of the reward model's own tokenizer as its input: as given, with one EOS at the end
    if ``append_eos``.

    Raises:
        ValueError: An id that is not in the vocabulary, or too many of them.
    """
    if append_eos:
        _eos(tokenizer)
    ids = [*prompt_ids, *response_ids]
    for position, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"token id {token} at position {position} is not in the reward model's vocabulary "
                f"of {vocabulary}: send ids of its own tokenizer, or text"
            )
    return _finished(tokenizer, ids, len(prompt_ids), append_eos, max_tokens, truncation)


def _eos(tokenizer: Any) -> str:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the reward model's tokenizer has no EOS token, and the score is read there: "
            "set tokenizer.eos_token and save the tokenizer again"
        )
    eos: str = tokenizer.eos_token
    return eos


def _finished(
    tokenizer: Any,
    ids: list[int],
    response_start: int | None,
    append_eos: bool,
    max_tokens: int | None,
    truncation: Truncation,
) -> Encoded:
    """One EOS at the end if it is wanted, and within the context."""
    if append_eos:
        eos_id: int = tokenizer.eos_token_id
        while ids and ids[-1] == eos_id:
            ids.pop()
        ids.append(eos_id)
    elif not ids:
        raise ValueError("there is nothing to score: the text has no tokens")
    start = None if response_start is None else min(response_start, len(ids) - 1)
    if max_tokens is None or len(ids) <= max_tokens:
        return Encoded(ids=ids, response_start=start)
    if truncation == "error":
        raise ValueError(
            f"prompt and response have {len(ids)} tokens, the reward model's context is "
            f"{max_tokens}: shorten them, or choose truncation 'left'"
        )
    keep_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    head = ids[:1] if keep_bos and max_tokens > 1 else []
    dropped = len(ids) - max_tokens
    kept = head + ids[len(head) + dropped :]
    return Encoded(
        ids=kept, response_start=None if start is None else max(len(head), start - dropped)
    )


def _first_token_after(offsets: Sequence[tuple[int, int]], begins: int) -> int:
    """The first token that covers a character at or after ``begins``; their number if none."""
    for index, (first, last) in enumerate(offsets):
        if last > begins and last > first:
            return index
    return len(offsets)


def _render_dialogue(tokenizer: Any, messages: Sequence[Message], response: str) -> str:
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            "the prompt is a dialogue but the reward model's tokenizer has no chat template: "
            "use plain-text prompts, or train the reward model from a model with a template"
        )
    turns = [*messages, Message(role="assistant", content=response)]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the dialogue: {error}") from None
    return text

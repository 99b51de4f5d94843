"""The one place that says how a prompt and a response become a reward model's input.

Training (``learner.reward_model``) and scoring (``reward_service.model``) both call ``encode``,
so the two cannot drift apart; ``RewardHead``, the checkpoint's ``reward_head.json``, carries the
fingerprint that guards the tokenizer underneath, and the normalisation of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from actors.trajectory import Message

Truncation = Literal["error", "left"]

HEAD_FILE = "reward_head.json"


class RewardHead(BaseModel):
    """What a reward-model checkpoint says beside its weights: ``score = gain * raw + bias``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    gain: float
    bias: float
    fingerprint: str = Field(min_length=1, description="of tokenizer and chat template")
    eos_appended: Literal[True] = True
    base: str = Field("", description="the model that training started from")
    info: dict[str, Any] = Field(default_factory=dict, description="accuracy and the like")

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
                "train one with 'rlhf reward'"
            )
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise ValueError(f"{path}: {field}: {first['msg']}") from None


def encode(
    tokenizer: Any,
    prompt: str,
    messages: Sequence[Message],
    response: str,
    *,
    max_tokens: int | None = None,
    truncation: Truncation = "error",
) -> list[int]:
    """Token ids of a prompt with its response; the last id is always EOS.

    The score is read at that last token, so there is exactly one EOS at the end whether or not
    the sampled response had ended by itself.

    Args:
        tokenizer: A Hugging Face tokenizer with an EOS token.
        prompt: The prompt's text; ignored when ``messages`` is not empty.
        messages: The dialogue before the response, or empty for plain text.
        response: The response's text without special tokens.
        max_tokens: The model's context; ``None`` for no limit.
        truncation: What happens beyond ``max_tokens``: ``"error"``, or ``"left"``, which drops
            the oldest tokens and keeps a leading BOS.

    Returns:
        ``[T]`` ids. Plain text: what the tokenizer makes of ``prompt + response``, with the BOS
        that it adds by itself. Dialogue: the chat template with the response as the assistant's
        turn.

    Raises:
        ValueError: No EOS token, no chat template for a dialogue or one that refuses it, too
            many tokens, or text that is not valid Unicode.
    """
    eos_id: int | None = tokenizer.eos_token_id
    if eos_id is None:
        raise ValueError(
            "the reward model's tokenizer has no EOS token, and the score is read there: "
            "set tokenizer.eos_token and save the tokenizer again"
        )
    if messages:
        ids = _encode_dialogue(tokenizer, messages, response)
    else:
        ids = list(tokenizer(prompt + response, add_special_tokens=True)["input_ids"])
    while ids and ids[-1] == eos_id:
        ids.pop()
    ids.append(eos_id)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    if truncation == "error":
        raise ValueError(
            f"prompt and response have {len(ids)} tokens, the reward model's context is "
            f"{max_tokens}: shorten them, or choose truncation 'left'"
        )
    keep_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    head = ids[:1] if keep_bos and max_tokens > 1 else []
    return head + ids[len(ids) - (max_tokens - len(head)) :]


def _encode_dialogue(tokenizer: Any, messages: Sequence[Message], response: str) -> list[int]:
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
    # Many templates put a line break after the end-of-turn token; the score is read at EOS.
    if text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    # The template writes BOS itself where the model wants one.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])

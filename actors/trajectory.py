"""Records of generation: the prompt that went in, and the trajectory that came out.

Token in, token out: a trajectory keeps the ids that the engine saw and produced, so nothing is
ever decoded and tokenised again before it is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


MAX_LOGPROB = 1e-3
"""A log-probability is at most 0; rounding, in bfloat16 above all, may lift it a little."""


class Message(TypedDict):
    """One turn of a dialogue, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompt:
    """What a policy is asked to continue.

    Example:
        >>> Prompt(prompt_id="news:17", token_ids=np.array([5, 9], np.int32), text="Storm ...")

    Attributes:
        prompt_id: Identity, unique and stable within a data set.
        token_ids: ``[P]`` ids the engine is given, special tokens included.
        text: The rendered prompt that ``token_ids`` encode.
        messages: The dialogue behind ``text`` when it came through a chat template.
        meta: Anything the data carries along (facts of a generated article, labels).
    """

    prompt_id: str
    token_ids: Int32Array
    text: str
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or len(self.token_ids) == 0:
            raise ValueError(
                f"prompt {self.prompt_id!r} has no tokens: give it text, or a tokenizer with a BOS"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trajectory:
    """One sampled response with everything PPO must know of how it was sampled.

    Attributes:
        prompt: The prompt it continues.
        sample_index: 0 .. samples_per_prompt - 1.
        response_ids: ``[R]``, R >= 1; the EOS token is included when one was sampled.
        response_logprobs: ``[R]`` the engine's log-probability of each id, in nats, at the
            sampling temperature.
        policy_versions: ``[R]`` the weight version that produced each token.
        response_text: The decoded response without special tokens. May be empty.
        finish_reason: ``"stop"`` at an EOS token, ``"length"`` when cut off.
        seed: Seed of this one sample.
    """

    prompt: Prompt
    sample_index: int
    response_ids: Int32Array
    response_logprobs: Float32Array
    policy_versions: Int32Array
    response_text: str
    finish_reason: Literal["stop", "length"]
    seed: int

    def __post_init__(self) -> None:
        lengths = {
            "response_ids": len(self.response_ids),
            "response_logprobs": len(self.response_logprobs),
            "policy_versions": len(self.policy_versions),
        }
        if len(set(lengths.values())) != 1 or not len(self.response_ids):
            raise ValueError(f"sample {self.sample_id}: lengths must be equal and > 0: {lengths}")
        if not np.isfinite(self.response_logprobs).all():
            raise ValueError(f"sample {self.sample_id}: the engine gave a log-probability of NaN")
        if (self.response_logprobs > MAX_LOGPROB).any():
            raise ValueError(
                f"sample {self.sample_id}: the engine gave a log-probability of "
                f"{self.response_logprobs.max():g}, which no probability has"
            )
        if int(self.policy_versions.min()) < 0:
            raise ValueError(
                f"sample {self.sample_id}: the engine did not say which weight version sampled"
                f" token {int(np.argmin(self.policy_versions))} of the response"
            )

    @property
    def sample_id(self) -> str:
        return f"{self.prompt.prompt_id}#{self.sample_index}"

    @property
    def text(self) -> str:
        """Prompt and response as one text."""
        return self.prompt.text + self.response_text


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleFailure:
    """A sample that could not be generated or scored, and why.

    Attributes:
        attempts: How often it was tried.
        response: The response that could not be scored; ``None`` when there is none.
    """

    prompt: Prompt
    sample_index: int
    stage: Literal["generation", "scoring"]
    reason: str
    attempts: int = 1
    response: str | None = None

    @property
    def sample_id(self) -> str:
        return f"{self.prompt.prompt_id}#{self.sample_index}"


def sample_seed(run_seed: int, prompt_id: str, sample_index: int, round_index: int = 0) -> int:
    """Seed of one sample: depends on what is sampled, never on which actor samples it.

    ``round_index`` tells visits to the same prompt apart (the PPO step, say).
    """
    key = f"{run_seed}/{round_index}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """A prompt and the response that supervised fine-tuning should learn from it."""

    example_id: str
    prompt: str
    response: str
    messages: tuple[Message, ...] = ()

"""What a generation engine is asked and answers, and the protocol that every engine follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from actors.trajectory import Float32Array, Int32Array
from actors.weights import Probe, UpdateConfirmation, WeightUpdate

UNKNOWN_VERSION = -1

# vLLM's weight-transfer interface, in the order in which a trainer calls it.
ControlCall = Literal[
    "init_weight_transfer_engine",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleRequest:
    """One response to sample.

    Attributes:
        request_id: Unique among the requests in flight.
        token_ids: ``[P]`` prompt.
        temperature: 0 is greedy.
        seed: Of this one sample, 0 <= seed < 2**63.
    """

    request_id: str
    token_ids: Int32Array
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Completion:
    """A finished response.

    Attributes:
        token_ids: ``[R]`` with the EOS token when one was sampled.
        logprobs: ``[R]`` log-probability of each id at the sampling temperature; at
            temperature 1 for greedy ones.
        versions: ``[R]`` weight version that each token was sampled with, as the engine labels it;
            ``UNKNOWN_VERSION`` where it gave no label.
        text: Decoded without special tokens; engines leave it empty, actors fill it in.
    """

    request_id: str
    token_ids: Int32Array
    logprobs: Float32Array
    finish_reason: Literal["stop", "length"]
    versions: Int32Array
    text: str = ""


class EngineLost(RuntimeError):
    """The engine failed while it worked; nothing but a new process mends it."""


class Engine(Protocol):
    """One model being generated from. Synchronous, and used by one thread."""

    @property
    def version(self) -> int:
        """Version of the weights last loaded, whether confirmed or not; 0 is the checkpoint."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens that prompt and response may have together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        ...

    def add(self, request: SampleRequest) -> None:
        """Queue one sample.

        Raises:
            ValueError: an id is outside the vocabulary, or the prompt leaves no room.
            WeightError: the engine has not confirmed its weights.
        """

    def step(self) -> list[Completion]:
        """Decode one token of every running request; returns what finished by it.

        Raises:
            EngineLost: decoding failed.
        """
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored."""

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """``[T_s - 1]`` log-probabilities, at temperature 1, of ids 1, 2, ... of each sequence.

        Raises:
            ValueError: a sequence has fewer than two ids, more than the context holds, or an id
                outside the vocabulary.
            WeightError: the engine has not confirmed its weights.
        """
        ...

    def load(self, update: WeightUpdate, tolerance: float) -> UpdateConfirmation:
        """Make ``update``, whose tensors must be here, the weights that are generated from.

        Raises:
            WeightMismatch: the update is of another architecture; nothing was touched.
            WeightError: a tensor is corrupt, or the probe disagrees by more than ``tolerance``
                nats; the message names the tensors. In every case the engine refuses to generate
                until a good update mends it.
            RuntimeError: requests are in flight.
            EngineLost: loading failed halfway.
        """
        ...

    def control(self, call: ControlCall, payload: Mapping[str, Any]) -> None:
        """One call of the weight-transfer interface; :meth:`confirm` must follow the last.

        Raises:
            RuntimeError: requests are in flight.
            EngineLost: the call failed halfway.
        """

    def confirm(self, version: int, probe: Probe | None, tolerance: float) -> tuple[float, float]:
        """Drop what was computed from older weights, prove the new ones, and serve them.

        Returns:
            Largest and mean ``|Δ log p|`` of the probe, in nats (NaN without a probe).

        Raises:
            WeightError: the largest is over ``tolerance``, or not a number.
        """
        ...

    def shutdown(self) -> None:
        """Release what the engine holds."""


def check_prompt(token_ids: Int32Array, context_length: int, vocab_size: int, name: str) -> None:
    """Refuse what an engine would crash on, or answer with nothing.

    Raises:
        ValueError: the prompt fills the context, or holds an id outside the vocabulary.
    """
    if len(token_ids) >= context_length:
        raise ValueError(
            f"prompt {name!r} has {len(token_ids)} tokens and leaves no room in the context of"
            f" {context_length}: shorten it (data.max_prompt_tokens)"
        )
    low, high = int(token_ids.min()), int(token_ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"prompt {name!r} holds token id {low if low < 0 else high}, outside the model's"
            f" vocabulary of {vocab_size}: was it tokenized with another model's tokenizer?"
        )

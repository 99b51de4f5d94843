"""A generation engine: the protocol that rollout actors drive, and vLLM behind it.

The engine is synchronous and belongs to one thread: ``add`` requests, ``step`` until they are
finished, ``load`` new weights between steps. vLLM runs inside this process (no children), so a
weight update is an ordinary call between two steps.

An engine generates only from weights that it has confirmed. ``load`` checks every tensor's
checksum, loads through vLLM's weight-transfer interface, drops the prefix cache and then proves
the result: its log-probabilities of the learner's probe sequences must agree. Until that
succeeds every request is refused.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from actors.config import EngineConfig
from actors.trajectory import Float32Array, Int32Array
from actors.weights import (
    Probe,
    UpdateConfirmation,
    WeightError,
    WeightUpdate,
    checkpoint_shapes,
    require_same_shapes,
    tensors_of,
)

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
        logprobs: ``[R]`` log-probability of each id at the sampling temperature; greedy ones
            at temperature 1.
        version: Weight version that produced it.
        text: Decoded without special tokens; empty in an engine, filled in by the actor.
    """

    request_id: str
    token_ids: Int32Array
    logprobs: Float32Array
    finish_reason: Literal["stop", "length"]
    version: int
    text: str = ""


class EngineLost(RuntimeError):
    """The engine failed while it worked; nothing but a new process mends it."""


class Engine(Protocol):
    """What a rollout actor needs of an engine. Not thread-safe."""

    @property
    def version(self) -> int:
        """Version of the weights last loaded, whether confirmed or not."""
        ...

    @property
    def context_length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        ...

    def add(self, request: SampleRequest) -> None: ...

    def step(self) -> list[Completion]: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def load(self, update: WeightUpdate, tolerance: float) -> UpdateConfirmation: ...

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]: ...

    def control(self, call: ControlCall, payload: Mapping[str, Any]) -> None: ...

    def confirm(
        self, version: int, probe: Probe | None, tolerance: float
    ) -> tuple[float, float]: ...

    def shutdown(self) -> None: ...


class VLLMEngine:
    """vLLM's ``LLMEngine`` in this process.

    Args:
        model_dir: Hugging Face directory with safetensors weights.
        eos_token_ids: Ids that end a response; the one sampled is kept in the response.
        name: Who confirms weight updates.

    Raises:
        FileNotFoundError: ``model_dir`` is not a checkpoint.
        RuntimeError: vLLM is not installed.
    """

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        *,
        eos_token_ids: Sequence[int],
        name: str = "engine",
    ) -> None:
        self.name = name
        self._eos = list(eos_token_ids)
        self._shapes = checkpoint_shapes(model_dir)
        self._llm = _build(model_dir, config)
        model_config = self._llm.model_config
        self._context_length = int(model_config.max_model_len)
        self._vocab_size = int(model_config.get_vocab_size())
        tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self._optional = ("lm_head.weight",) if tied else ()
        self._version = 0
        # Why nothing may be generated now; None when the weights are confirmed.
        self._refusal: str | None = None
        self._finished: list[Completion] = []
        self._scored: dict[str, Float32Array] = {}
        self._scoring: dict[str, int] = {}
        self._counter = itertools.count()

    @property
    def version(self) -> int:
        return self._version

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def busy(self) -> bool:
        return bool(self._llm.has_unfinished_requests()) or bool(self._finished)

    def add(self, request: SampleRequest) -> None:
        """Queue one sample.

        Raises:
            ValueError: an id is outside the vocabulary, or the prompt leaves no room.
            WeightError: the engine has not confirmed its weights.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._require_confirmed()
        check_prompt(request.token_ids, self._context_length, self._vocab_size, request.request_id)
        params = SamplingParams(
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            # Neutral filters: the sampled distribution is the policy's own.
            top_p=1.0,
            top_k=0,
            stop_token_ids=self._eos,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._llm.add_request(request.request_id, _tokens(request.token_ids), params)

    def step(self) -> list[Completion]:
        """Decode one token of every running request; returns what finished by it."""
        self._advance()
        finished, self._finished = self._finished, []
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        self._llm.abort_request(list(request_ids))
        gone = set(request_ids)
        self._finished = [c for c in self._finished if c.request_id not in gone]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """``[T_s - 1]`` log-probabilities, at temperature 1, of ids 1, 2, ... of each sequence.

        Raises:
            ValueError: a sequence has fewer than two ids, more than the context holds, or an id
                outside the vocabulary.
            WeightError: the engine has not confirmed its weights.
        """
        self._require_confirmed()
        return self._score(sequences)

    def load(self, update: WeightUpdate, tolerance: float) -> UpdateConfirmation:
        """Make ``update``, whose tensors must be here, the weights that are generated from.

        Raises:
            WeightError: a tensor is corrupt or of another architecture (the engine keeps its old
                weights but refuses to generate), or the probe disagrees by more than
                ``tolerance`` nats. Either way a good update mends it.
            RuntimeError: requests are in flight.
            EngineLost: vLLM failed while loading.
        """
        if self.busy:
            raise RuntimeError(
                f"{self.name} cannot load weights with"
                f" {self._llm.get_num_unfinished_requests()} requests in flight: finish or abort"
                " them first"
            )
        self._refusal = f"weight update {update.version} was begun and not confirmed"
        started = time.perf_counter()
        require_same_shapes(update, self._shapes, self._optional)
        tensors = tensors_of(update)
        verified = time.perf_counter()
        self.control("start_weight_update", {})
        self.control("update_weights", {"tensors": tensors})
        self.control("finish_weight_update", {})
        loaded = time.perf_counter()
        max_error, mean_error = self.confirm(update.version, update.probe, tolerance)
        return UpdateConfirmation(
            actor=self.name,
            version=update.version,
            probe_max_error=max_error,
            probe_mean_error=mean_error,
            seconds_verify=verified - started,
            seconds_load=loaded - verified,
            seconds_probe=time.perf_counter() - loaded,
        )

    def control(self, call: ControlCall, payload: Mapping[str, Any]) -> None:
        """One call of vLLM's weight-transfer interface; ``confirm`` must follow the last."""
        if call == "init_weight_transfer_engine":
            self._llm.collective_rpc(call, kwargs={"init_info": dict(payload)})
            return
        self._refusal = "a weight update was begun and not confirmed"
        arguments = {"update_info": dict(payload)} if call == "update_weights" else {}
        try:
            self._llm.collective_rpc(call, kwargs=arguments)
        except Exception as error:
            # From start to finish the parameters are in pieces.
            raise EngineLost(f"{self.name}: {call} failed in vLLM: {error}") from error

    def confirm(self, version: int, probe: Probe | None, tolerance: float) -> tuple[float, float]:
        """Drop what was computed from older weights, prove the new ones, and serve them.

        Returns:
            Largest and mean ``|Δ log p|`` of the probe, in nats (NaN without a probe).

        Raises:
            WeightError: the largest is over ``tolerance``, or not a number.
        """
        self._version = version
        self._refusal = f"weight version {version} was not confirmed"
        self._llm.set_weight_version(str(version))
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(f"{self.name}: vLLM did not drop the prefix cache of old weights")
        if probe is None:
            self._refusal = None
            return math.nan, math.nan
        ours = self._score(probe.token_ids)
        errors = np.concatenate(
            [np.abs(a - b) for a, b in zip(ours, probe.logprobs, strict=True)], dtype=np.float64
        )
        largest, mean = float(errors.max()), float(errors.mean())
        if not largest <= tolerance:  # written so that NaN is refused
            self._refusal = (
                f"weight version {version} is not what the learner has: log-probabilities of the"
                f" probe differ by up to {largest:.3g} nats (mean {mean:.3g}), allowed"
                f" {tolerance:.3g} (rollout.probe_tolerance)"
            )
            self._require_confirmed()
        self._refusal = None
        return largest, mean

    def shutdown(self) -> None:
        self._llm.engine_core.shutdown()

    def _require_confirmed(self) -> None:
        if self._refusal is not None:
            raise WeightError(f"{self.name} does not generate: {self._refusal}")

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """Prompt log-probabilities of all ids but the last, which is scored as if sampled: so
        a sequence may fill the context, and the sampler's own use of the head is covered."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        batch = next(self._counter)
        names = [f"score-{batch}-{i}" for i in range(len(sequences))]
        for name, ids in zip(names, sequences, strict=True):
            if len(ids) < 2 or len(ids) > self._context_length:
                raise ValueError(
                    f"{name}: a sequence of {len(ids)} ids cannot be scored; it needs 2 to"
                    f" {self._context_length} (the context)"
                )
            check_prompt(np.asarray(ids, np.int32), len(ids) + 1, self._vocab_size, name)
        for name, ids in zip(names, sequences, strict=True):
            params = SamplingParams(
                max_tokens=1,
                temperature=1.0,
                prompt_logprobs=0,
                logprobs=1,
                logprob_token_ids=[int(ids[-1])],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._scoring[name] = int(ids[-1])
            self._llm.add_request(name, _tokens(ids[:-1]), params)
        while self._scoring.keys() & set(names):
            self._advance()
        return [self._scored.pop(name) for name in names]

    def _advance(self) -> None:
        try:
            outputs = self._llm.step()
        except Exception as error:
            raise EngineLost(
                f"{self.name}: vLLM failed while decoding: {type(error).__name__}: {error}"
            ) from error
        for output in outputs:
            if not output.finished:
                continue
            sample = output.outputs[0]
            last_id = self._scoring.pop(output.request_id, None)
            if last_id is not None:
                prompt = [
                    entry[token].logprob
                    for token, entry in zip(
                        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
                    )
                ]
                last = sample.logprobs[0][last_id].logprob
                self._scored[output.request_id] = np.array([*prompt, last], np.float32)
            elif sample.finish_reason in ("stop", "length"):
                flat = sample.logprobs
                self._finished.append(
                    Completion(
                        request_id=output.request_id,
                        token_ids=np.asarray(sample.token_ids, np.int32),
                        # With logprobs=0 a position's only entry is the sampled id.
                        logprobs=np.asarray(
                            [flat.logprobs[start] for start in flat.start_indices], np.float32
                        ),
                        finish_reason=sample.finish_reason,
                        version=self._version,
                    )
                )


def check_prompt(token_ids: Int32Array, context_length: int, vocab_size: int, name: str) -> None:
    """Refuse what vLLM would crash on, or answer with nothing.

    Raises:
        ValueError: the prompt fills the context, or holds an id outside the vocabulary.
    """
    if len(token_ids) >= context_length:
        raise ValueError(
            f"prompt {name!r} has {len(token_ids)} tokens and leaves no room in the context of"
            f" {context_length}: shorten it (data.max_prompt_tokens)"
        )
    if (low := int(token_ids.min())) < 0 or (high := int(token_ids.max())) >= vocab_size:
        raise ValueError(
            f"prompt {name!r} holds token id {low if low < 0 else high}, outside the model's"
            f" vocabulary of {vocab_size}: was it tokenized with another model's tokenizer?"
        )


def _tokens(token_ids: Sequence[int] | Int32Array) -> Any:
    return {"prompt_token_ids": [int(i) for i in token_ids]}


def _build(model_dir: Path, config: EngineConfig) -> Any:
    # One process: no children to orphan, and an update runs between two steps.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It knows whole GiB only and would override rollout.engine.kv_cache_gib.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise RuntimeError(
            f"vLLM cannot be imported ({error}): install requirements/cpu.txt, or the gpu extra"
        ) from error
    backend: str = config.weight_transfer
    if backend == "ray":
        from actors.weight_transfer import register

        backend = register()
    memory: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if current_platform.is_cpu():
        memory = {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}
    build: Callable[[Any], Any] = LLMEngine.from_engine_args
    return build(
        EngineArgs(
            model=str(model_dir),
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel_size,
            enforce_eager=config.enforce_eager,
            skip_tokenizer_init=True,
            # Log-probabilities of the distribution that is sampled from, temperature included.
            logprobs_mode="processed_logprobs",
            # Ignore the checkpoint's own top-k, top-p and the like.
            generation_config="vllm",
            weight_transfer_config={"backend": backend},
            disable_log_stats=True,
            **memory,
        )
    )

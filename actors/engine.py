"""vLLM as a generation engine.

vLLM runs inside this process (no children), so a weight update is an ordinary call between two
steps: ``add`` requests, ``step`` until they are finished, ``load`` new weights.

An engine generates only from weights that it has confirmed. ``load`` checks every tensor's
checksum, loads through vLLM's weight-transfer interface, drops the prefix cache and then proves
the result: its log-probabilities of the learner's probe sequences must agree. Until that
succeeds every request is refused; when the probe disagrees, the tensors at fault are named.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import EngineConfig
from actors.generation import (
    UNKNOWN_VERSION,
    Completion,
    ControlCall,
    EngineLost,
    SampleRequest,
    check_prompt,
)
from actors.head_padding import HeadPadding, head_padding
from actors.trajectory import Float32Array, Int32Array
from actors.weights import (
    Probe,
    UpdateConfirmation,
    WeightError,
    WeightUpdate,
    checkpoint_shapes,
    read_checkpoint,
    require_same_shapes,
    tensors_of,
)


class VLLMEngine:
    """vLLM's ``LLMEngine``; follows :class:`actors.generation.Engine`.

    Args:
        model_dir: Hugging Face directory with safetensors weights.
        eos_token_ids: Ids that end a response; the one sampled is kept in the response.
        name: Who confirms weight updates.
        arguments: Arguments of vLLM's ``EngineArgs`` that replace this project's own, to find out
            what one of them does.

    Raises:
        FileNotFoundError: ``model_dir`` is not a checkpoint.
        RuntimeError: vLLM is not installed, or cannot serve the model.
    """

    def __init__(
        self,
        model_dir: Path,
        config: EngineConfig,
        *,
        eos_token_ids: Sequence[int],
        name: str = "engine",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._eos = list(eos_token_ids)
        self._shapes = checkpoint_shapes(model_dir)
        self._llm, self._padding = _build(model_dir, config, arguments or {})
        model_config = self._llm.model_config
        self._context_length = int(model_config.max_model_len)
        self._vocab_size = int(model_config.get_vocab_size())
        tied = bool(getattr(model_config.hf_text_config, "tie_word_embeddings", False))
        self._optional = ("lm_head.weight",) if tied else ()
        self._version = 0
        # Why nothing may be generated now; None while the weights are confirmed.
        self._refusal: str | None = None
        self._finished: list[Completion] = []
        self._scoring: dict[str, int] = {}  # last id of each sequence being scored
        self._scored: dict[str, Float32Array] = {}
        self._batches = itertools.count()
        self._llm.set_weight_version("0")
        if self._padding is not None:  # built with placeholders
            self.load(read_checkpoint(model_dir, version=0), tolerance=0.0)

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
        self._llm.add_request(request.request_id, _as_prompt(request.token_ids), params)

    def step(self) -> list[Completion]:
        self._advance()
        finished, self._finished = self._finished, []
        return finished

    def abort(self, request_ids: Sequence[str]) -> None:
        self._llm.abort_request(list(request_ids))
        gone = set(request_ids)
        self._finished = [c for c in self._finished if c.request_id not in gone]

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        self._require_confirmed()
        return self._score(sequences)

    def load(self, update: WeightUpdate, tolerance: float) -> UpdateConfirmation:
        self._require_idle()
        self._refusal = f"weight update {update.version} was begun and not confirmed"
        started = time.perf_counter()
        require_same_shapes(update, self._shapes, self._optional)
        tensors = tensors_of(update)
        verified = time.perf_counter()
        if self._padding is not None:
            tensors = self._padding(tensors)
        self.control("start_weight_update", {})
        self.control("update_weights", {"tensors": tensors})
        self.control("finish_weight_update", {})
        loaded = time.perf_counter()
        try:
            max_error, mean_error = self.confirm(update.version, update.probe, tolerance)
        except WeightError as error:
            self._refusal = f"{self._refusal}; {self._diagnosis(tensors)}"
            raise WeightError(f"{self.name} does not generate: {self._refusal}") from error
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
        if call == "init_weight_transfer_engine":
            self._llm.collective_rpc(call, kwargs={"init_info": dict(payload)})
            return
        self._require_idle()
        self._refusal = "a weight update was begun and not confirmed"
        arguments = {"update_info": dict(payload)} if call == "update_weights" else {}
        try:
            self._llm.collective_rpc(call, kwargs=arguments)
        except Exception as error:
            # From start to finish the parameters are in pieces.
            raise EngineLost(f"{self.name}: {call} failed in vLLM: {error}") from error

    def confirm(self, version: int, probe: Probe | None, tolerance: float) -> tuple[float, float]:
        self._version = version
        self._refusal = f"weight version {version} was not confirmed"
        self._llm.set_weight_version(str(version))
        if not self._llm.reset_prefix_cache():
            raise EngineLost(f"{self.name}: vLLM did not drop the prefix cache of old weights")
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

    def _diagnosis(self, tensors: Mapping[str, Any]) -> str:
        """Which tensors the engine does not compute with as they were sent, in words."""
        if self._llm.vllm_config.parallel_config.world_size > 1:
            return "its shards on several devices are not compared tensor by tensor"
        from actors.weight_diagnosis import diagnose

        (found,) = self._llm.apply_model(partial(diagnose, tensors=tensors))
        return str(found)

    def shutdown(self) -> None:
        self._llm.engine_core.shutdown()

    def _require_confirmed(self) -> None:
        if self._refusal is not None:
            raise WeightError(f"{self.name} does not generate: {self._refusal}")

    def _require_idle(self) -> None:
        if self.busy:
            raise RuntimeError(
                f"{self.name} cannot load weights with {self._llm.get_num_unfinished_requests()}"
                " requests in flight: finish or abort them first"
            )

    def _score(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """Log-probabilities of given ids: of the last as if it were sampled, of the others as
        ids of a prompt. So a sequence may fill the context, and both ways through vLLM to the
        LM head are taken."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        batch = next(self._batches)
        names = [f"score-{batch}-{i}" for i in range(len(sequences))]
        for name, ids in zip(names, sequences, strict=True):
            if len(ids) < 2 or len(ids) > self._context_length:
                raise ValueError(
                    f"a sequence of {len(ids)} ids cannot be scored: it needs 2 to"
                    f" {self._context_length} (the context)"
                )
            check_prompt(np.asarray(ids), self._context_length + 1, self._vocab_size, name)
        for name, ids in zip(names, sequences, strict=True):
            self._scoring[name] = int(ids[-1])
            params = SamplingParams(
                max_tokens=1,
                temperature=1.0,
                prompt_logprobs=0,
                logprobs=1,
                logprob_token_ids=[self._scoring[name]],
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._llm.add_request(name, _as_prompt(ids[:-1]), params)
        while self._scoring:
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
            last_id = self._scoring.pop(output.request_id, None)
            if last_id is not None:
                self._scored[output.request_id] = _scores(output, last_id)
            elif output.outputs[0].finish_reason in ("stop", "length"):
                self._finished.append(_completion(output))


def _scores(output: Any, last_id: int) -> Float32Array:
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    last = output.outputs[0].logprobs[0][last_id].logprob
    return np.array([*(entry[token].logprob for token, entry in prompt), last], np.float32)


def _completion(output: Any) -> Completion:
    sample = output.outputs[0]
    versions = np.full(len(sample.token_ids), UNKNOWN_VERSION, np.int32)
    for span in sample.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    flat = sample.logprobs  # with logprobs=0 the only entry of a position is the sampled id
    return Completion(
        request_id=output.request_id,
        token_ids=np.asarray(sample.token_ids, np.int32),
        logprobs=np.asarray([flat.logprobs[i] for i in flat.start_indices], np.float32),
        finish_reason=sample.finish_reason,
        versions=versions,
    )


def _as_prompt(token_ids: Sequence[int] | Int32Array) -> dict[str, list[int]]:
    return {"prompt_token_ids": [int(i) for i in token_ids]}


# What every engine is started with, whatever the configuration.
FIXED_ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    # Of the distribution that is sampled from, temperature included.
    "logprobs_mode": "processed_logprobs",
    # The checkpoint's own top-k, top-p and the like are ignored.
    "generation_config": "vllm",
    "disable_log_stats": True,
}


def _build(
    model_dir: Path, config: EngineConfig, replaced: Mapping[str, Any]
) -> tuple[Any, HeadPadding | None]:
    # One process: no children to orphan, and an update runs between two steps.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It knows whole GiB only and would override rollout.engine.kv_cache_gib.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    try:
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from actors.weight_transfer import register
    except ImportError as error:
        raise RuntimeError(
            f"vLLM cannot be imported ({error}): install requirements/cpu.txt, or the gpu extra"
        ) from error
    padding = None
    arguments: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        arguments = {
            "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30),
            # A prompt cut into chunks draws from its seeded generator once too often, and vLLM
            # cannot rewind a generator of the CPU ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
        }
        _import_model_class(model_dir)
        padding = head_padding(model_dir, CPUAttentionBackend.get_supported_head_sizes())
    if padding is not None:
        arguments |= {"hf_overrides": {"head_dim": padding.wide}, "load_format": "dummy"}
    build: Callable[[Any], Any] = LLMEngine.from_engine_args
    try:
        llm = build(
            EngineArgs(
                model=str(model_dir),
                dtype=config.dtype,
                max_model_len=config.max_model_len,
                max_num_seqs=config.max_num_seqs,
                tensor_parallel_size=config.tensor_parallel_size,
                enforce_eager=config.enforce_eager,
                weight_transfer_config={"backend": register(config.weight_transfer)},
                **(FIXED_ARGUMENTS | arguments | dict(replaced)),
            )
        )
    except Exception as error:
        raise RuntimeError(f"vLLM cannot serve {model_dir}: {error}") from error
    return llm, padding


def _import_model_class(model_dir: Path) -> None:
    """Have vLLM look at the model's class in this process.

    It would start another one to look from, for half a minute at the first start on a machine,
    because a class may touch CUDA when it is imported. Without CUDA there is no need.
    """
    from vllm import ModelRegistry

    config = json.loads((model_dir / "config.json").read_text())
    for architecture in config.get("architectures") or []:
        registered = ModelRegistry.models.get(architecture)
        if registered is not None:
            ModelRegistry.register_model(architecture, registered.load_model_cls())

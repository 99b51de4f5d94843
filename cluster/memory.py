"""How much host memory the processes of a run will need at their peak."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import RunConfig
from learner.config import PretrainConfig

GIB = 2**30

# Resident memory of each kind of process with a model of no size, measured on Linux with the
# pinned versions (Ray 2.60, vLLM 0.32, torch 2.13 on the CPU).
RAY_GIB = 0.45
DRIVER_GIB = 0.6
ENGINE_GIB = 1.1
LEARNER_GIB = 0.8
REPLICA_GIB = 0.9
SERVE_GIB = 0.65

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """GiB of host memory by kind of process."""

    parts: dict[str, float]

    @property
    def total_gib(self) -> float:
        return sum(self.parts.values())


def total_memory_gib() -> float:
    """Memory of this machine, or of its container when that is less."""
    limit = float(psutil.virtual_memory().total)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = min(limit, float(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return limit / GIB


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Host memory by kind of process, as :func:`process_memory` has it."""
    parts: dict[str, float] = {}
    for process in process_memory(config, model_shape(config)):
        parts[process.kind] = parts.get(process.kind, 0.0) + process.count * process.host_gib
    return MemoryEstimate(parts=parts)


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """GiB that one process of a kind needs at its peak, and how many of them there are.

    Attributes:
        host_gib: Of the machine's memory.
        device_gib: Of the accelerator's; 0 without one.
    """

    kind: str
    count: int
    host_gib: float
    device_gib: float = 0.0


def process_memory(config: RunConfig, shape: ModelShape) -> list[ProcessMemory]:
    """Estimate from the model's shape: weights, Adam moments, gradients and the largest logits.

    A process with an accelerator keeps its tensors there, and on the host what it is without a
    model and one copy of the weights, for the exchange of weights and for checkpoints.
    """
    weights = shape.parameters * 4 / GIB
    ppo = config.ppo
    tokens = ppo.tokens_per_micro_batch if ppo else 0
    logits = tokens * shape.vocab_size * 4 * 3 / GIB
    # Per token and layer a transformer keeps about 34 x hidden values of two bytes for backward
    # (Korthikanti et al., arXiv 2205.05198, equation 1, without the attention matrix).
    activations = tokens * shape.layers * shape.hidden_size * 34 * 2 / GIB
    rollout, service = config.rollout, config.reward.service
    own = weights * BYTES[rollout.engine.dtype] / 4
    on_gpu = rollout.num_gpus_per_actor > 0
    cache = kv_cache_gib(config, shape) if on_gpu else rollout.engine.kv_cache_gib
    processes = [
        ProcessMemory(
            kind="Ray and driver",
            count=1,
            host_gib=RAY_GIB + DRIVER_GIB + config.cluster.object_store_gib,
        ),
        _process("engines", rollout.most_actors, ENGINE_GIB, own, own + cache, on_gpu),
        ProcessMemory(kind="reward service", count=1, host_gib=SERVE_GIB),
        _process(
            "reward service",
            service.num_replicas,
            REPLICA_GIB,
            weights,
            weights,
            service.num_gpus_per_replica > 0,
        ),
    ]
    if ppo is not None:
        # Policy and critic: weights, gradients and two moments each; the reference: weights.
        states = weights * (9 if ppo.has_critic else 5)
        processes.append(
            _process(
                "learners",
                max(1, config.learners.num_learners),
                LEARNER_GIB,
                weights,
                states + logits + activations,
                config.learners.num_gpus_per_learner > 0,
            )
        )
    return processes


def _process(
    kind: str, count: int, bare: float, copy: float, tensors: float, on_gpu: bool
) -> ProcessMemory:
    if on_gpu:
        return ProcessMemory(kind=kind, count=count, host_gib=bare + copy, device_gib=tensors)
    return ProcessMemory(kind=kind, count=count, host_gib=bare + tensors)


def kv_cache_gib(config: RunConfig, shape: ModelShape) -> float:
    """Keys and values of as many longest sequences as an engine decodes at once."""
    engine, length = config.rollout.engine, longest_sequence(config)
    per_token = 2 * shape.layers * shape.kv_size * BYTES[engine.dtype]
    return engine.max_num_seqs * length * per_token / GIB


def longest_sequence(config: RunConfig) -> int:
    """Tokens of the longest prompt and response together."""
    return config.data.max_prompt_tokens + config.sampling.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What memory and time of a decoder depend on.

    Attributes:
        parameters: All of them.
        body_parameters: Those of the layers, without embeddings and output head.
        kv_size: Width of the keys of a token in one layer.
    """

    parameters: int
    body_parameters: int
    hidden_size: int
    layers: int
    vocab_size: int
    kv_size: int


def model_shape(config: RunConfig) -> ModelShape:
    """Shape of the run's model, from its pretrain section or its config.json.

    Raises:
        FileNotFoundError: The model is not a local directory.
    """
    scratch = config.pretrain
    if scratch is not None and scratch.init_from is None:
        return _shape_from_scratch(scratch)
    path = Path(scratch.init_from) if scratch and scratch.init_from else config.base_model
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json in {path}: the model must be a local Hugging Face directory to "
            "estimate its memory (download it first with `hf download`)"
        )
    return _shape_from_json(json.loads(file.read_text(encoding="utf-8")))


def _shape_from_scratch(config: PretrainConfig) -> ModelShape:
    return _shape_from_json(
        {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_embeddings,
        }
    )


def _shape_from_json(values: dict[str, Any]) -> ModelShape:
    """Parameters of a Llama-like decoder: attention, gated MLP, embeddings, norms."""
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    heads = values["num_attention_heads"]
    head = values.get("head_dim") or hidden // heads
    kv = (values.get("num_key_value_heads") or heads) * head
    inner, vocab = values.get("intermediate_size", 4 * hidden), values["vocab_size"]
    attention = 2 * hidden * heads * head + 2 * hidden * kv
    per_layer = attention + 3 * hidden * inner + 2 * hidden
    tables = vocab * hidden * (1 if values.get("tie_word_embeddings", False) else 2)
    return ModelShape(
        parameters=layers * per_layer + tables + hidden,
        body_parameters=layers * per_layer + hidden,
        hidden_size=hidden,
        layers=layers,
        vocab_size=vocab,
        kv_size=kv,
    )

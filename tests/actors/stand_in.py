"""A rollout actor without vLLM: the same calls, samples that are functions of seed and version.

What is real around it is the pool, its fleet and its accounting, Ray, its processes and nodes; a
start costs what a Python process costs. Samples of prompts that are named ``late...`` end when the
file ``gate`` in the model directory exists.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from actors.generation import Completion, SampleRequest
from actors.rollout_actor import EngineInfo
from actors.trajectory import Prompt, Trajectory, sample_seed
from actors.weights import UpdateConfirmation, WeightsLost, WeightUpdate

RUN_SEED = 3


def response_of(seed: int, version: int) -> list[int]:
    rng = np.random.default_rng([seed, version])
    return rng.integers(3, 100, int(rng.integers(2, 9))).tolist()  # type: ignore[no-any-return]


class StandIn:
    """In place of :class:`actors.rollout_actor.RolloutActor`."""

    def __init__(self, name: str, model_dir: str, *_: Any) -> None:
        self._name, self._gate = name, Path(model_dir) / "gate"
        self._version = 0

    async def start(self) -> EngineInfo:
        return EngineInfo(
            context_length=64,
            vocab_size=100,
            eos_token_ids=(2,),
            pid=os.getpid(),
            created=psutil.Process().create_time(),
            node_id=ray.get_runtime_context().get_node_id(),
        )

    async def ping(self) -> None:
        pass

    async def abort(self) -> None:
        pass

    async def load(self, update: WeightUpdate) -> UpdateConfirmation:
        try:
            tensors = await update.tensors
        except ray.exceptions.ObjectLostError as error:
            raise WeightsLost(f"version {update.version} is gone") from error
        assert int(tensors["version"]) == update.version
        self._version = update.version
        return UpdateConfirmation(
            actor=self._name,
            version=update.version,
            probe_max_error=0.0,
            probe_mean_error=0.0,
            seconds_verify=0.0,
            seconds_load=0.0,
            seconds_probe=0.0,
        )

    async def generate(self, requests: Sequence[SampleRequest]) -> AsyncIterator[list[Completion]]:
        for request in requests:
            while request.request_id.startswith("late") and not self._gate.exists():
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.02)
            ids = response_of(request.seed, self._version)
            yield [
                Completion(
                    request_id=request.request_id,
                    token_ids=np.array(ids, np.int32),
                    logprobs=np.full(len(ids), -1.0, np.float32),
                    finish_reason="stop",
                    versions=np.full(len(ids), self._version, np.int32),
                    text=self._name,
                )
            ]


@ray.remote(num_cpus=0, resources={"head": 0.01})
class Publisher:
    """Holds weights as a learner does: they are gone when it is. On a node that stays."""

    def publish(self, version: int) -> WeightUpdate:
        tensors = {"version": np.array(version)}
        return WeightUpdate(version=version, manifest={}, tensors=tensors, probe=None).publish()


def prompts(early: int, late: int) -> list[Prompt]:
    names = [f"early{i}" for i in range(early)] + [f"late{i}" for i in range(late)]
    return [Prompt(prompt_id=n, token_ids=np.array([5], np.int32), text="") for n in names]


def wrong_samples(records: Iterable[Any], asked: Sequence[Prompt], version: int) -> list[str]:
    """What is wrong with one generation: each sample must be there once, with its own tokens."""
    wrong = []
    left = {prompt.prompt_id: sample_seed(RUN_SEED, prompt.prompt_id, 0, 0) for prompt in asked}
    for record in records:
        seed = left.pop(record.prompt.prompt_id, None)
        if seed is None:
            wrong.append(f"{record.sample_id} came twice")
        elif not isinstance(record, Trajectory):
            wrong.append(f"{record.sample_id} failed: {record.reason}")
        elif record.response_ids.tolist() != response_of(seed, version):
            wrong.append(f"{record.sample_id} has other tokens")
    return wrong + [f"{name} never came" for name in left]

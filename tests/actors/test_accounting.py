"""What a sample is charged with, worked out without actors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from actors.accounting import Generation, _Stream
from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.fleet import Fleet
from actors.trajectory import Prompt, SampleFailure
from actors.worker import Worker


def generation(max_retries: int = 2) -> Generation:
    """Six samples p0 ... p5 of an engine that runs three at a time."""
    return Generation(
        [Prompt(prompt_id=f"p{i}", token_ids=np.array([1], np.int32), text="") for i in range(6)],
        SamplingConfig(max_new_tokens=4, samples_per_prompt=1),
        run_seed=0,
        round_index=0,
        fleet=cast(Fleet, SimpleNamespace(version=0, workers=[])),
        config=RolloutConfig(max_retries=max_retries, engine=EngineConfig(max_num_seqs=3)),
    )


def send(generation: Generation, worker: Worker, count: int) -> None:
    """Put the next samples in flight on a worker, as one stream."""
    batch = [generation._queue.popleft() for _ in range(count)]
    samples = {sample.prompt.prompt_id: sample for sample in batch}
    generation._streams.append(_Stream(worker, samples, None))


def waiting(generation: Generation) -> dict[str, int]:
    """Failures of the queued samples, in order."""
    return {sample.prompt.prompt_id: sample.failures for sample in generation._queue}


def test_only_what_can_have_been_running_is_charged_with_the_loss_of_an_engine() -> None:
    ours, lost, other = (
        generation(),
        Worker(name="lost", reason="a kernel failed"),
        Worker(name="o"),
    )
    send(ours, lost, 2)
    send(ours, other, 1)
    send(ours, lost, 2)
    del ours._streams[0].samples["p0"]  # finished before
    assert list(ours._recover(lost)) == []
    # p1, p3 and p4 can have been running side by side; p5 had not been sent.
    assert waiting(ours) == {"p1": 1, "p3": 1, "p4": 1, "p5": 0}
    assert [list(stream.samples) for stream in ours._streams] == [["p2"]]

    send(ours, lost, 4)
    assert list(ours._recover(lost)) == []
    assert waiting(ours) == {"p1": 2, "p3": 2, "p4": 2, "p5": 0}


def test_a_sample_that_was_running_in_every_engine_that_was_lost_is_given_up() -> None:
    ours, lost = generation(max_retries=0), Worker(name="lost", reason="a kernel failed")
    send(ours, lost, 6)
    records: list[Any] = list(ours._recover(lost))
    assert all(isinstance(record, SampleFailure) for record in records)
    assert sorted(record.prompt.prompt_id for record in records) == ["p0", "p1", "p2"]
    assert {record.reason for record in records} == {"failed 1 times, last: a kernel failed"}
    assert waiting(ours) == {"p3": 0, "p4": 0, "p5": 0}

"""Learners are killed in the middle of a run: it goes on by itself and ends with the same bits.

The pipeline, two learners in processes of their own, checkpoints and files are real; the engine is
the small sampler of ``tests/kill_points.py``, which costs no start.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

import cluster.pipeline
from actors.weights import WeightsLost, WeightUpdate
from cluster.config import load_config
from cluster.metrics import read_metrics
from learner.group import PPOLearners
from tests.kill_points import OPTIONS, SmallSampler, SmallSession
from tests.same_run import differences, write_config

STEPS = 6


@pytest.fixture(autouse=True)
def small_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.pipeline, "Session", SmallSession)


def configure(
    place: Path, model: Path, name: str, *, max_staleness: int = 0, **learners: Any
) -> Path:
    small = {"steps": STEPS, "checkpoint_every": 3, "prompts_per_step": 4}
    small["max_staleness"] = max_staleness
    group = {"num_learners": 2, "threads": 1, "timeout_s": 120.0} | learners
    short = {"max_new_tokens": 4}
    return write_config(
        place, place / name, model, ppo=OPTIONS | small, learners=group, sampling=short
    )


def run(config: Path) -> None:
    cluster.pipeline.Pipeline(load_config(config), resume=False, overwrite=False).run("ppo")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is done at a numbered call of a method of ``PPOLearners`` or of the sampler."""
    planned: dict[tuple[str, int], Any] = {}

    def plan(owner: type, name: str) -> None:
        original, calls = getattr(owner, name), [0]

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            calls[0] += 1
            if fault := planned.get((name, calls[0])):
                fault(self, *args)
            return original(self, *args, **options)

        monkeypatch.setattr(owner, name, wrapped)

    plan(PPOLearners, "update")
    plan(PPOLearners, "export_weights")
    plan(SmallSampler, "load")
    return planned  # type: ignore[return-value]


def die_in_the_update(learner: Any) -> None:
    """Runs in a learner: it kills itself between the annotation of the batch and its first step."""
    learner._targets = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def kill_one_in_the_update(learners: PPOLearners, *_: Any) -> None:
    ray.get(learners._group._workers[1].apply.remote(die_in_the_update))


def kill_all(learners: PPOLearners, *_: Any) -> None:
    for pid in learners.process_ids():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("staleness", [0, 1])
def test_killed_learners_change_nothing_in_the_result(
    tiny_llama: Path,
    tmp_path: Path,
    faults: Any,
    capfd: pytest.CaptureFixture[str],
    staleness: int,
) -> None:
    """One of two in the second step, when there is no checkpoint yet; later all of them at once."""
    run(configure(tmp_path, tiny_llama, "reference", max_staleness=staleness))
    # The reference made six calls of each. The group that is lost in step 2 begins with step 1.
    faults["update", STEPS + 2] = kill_one_in_the_update
    # Steps 1 to 4 again: the checkpoint of step 3 is there.
    faults["export_weights", STEPS + 1 + 4] = kill_all
    run(configure(tmp_path, tiny_llama, "disturbed", max_staleness=staleness))

    assert differences(tmp_path / "reference", tmp_path / "disturbed") == []
    counts = read_metrics(tmp_path / "disturbed" / "ppo")["recovery/learner_restarts"]
    assert counts.tolist() == [1, 1, 1, 2, 2, 2]
    said = capfd.readouterr().err
    assert "learner 1 of 2 failed in update: its process died" in said
    assert "The learners are built anew and go on from the last checkpoint (loss 1 of 3" in said
    assert "learner 0 of 2 failed in export_policy: its process died" in said
    assert said.count("going on after step 3") == 1


def test_weights_that_died_with_their_learner_are_made_again(
    tiny_llama: Path, tmp_path: Path, faults: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """It ended after it had exported them, and before the engines had them."""

    def gone(_: SmallSampler, update: WeightUpdate) -> None:
        raise WeightsLost(f"weight version {update.version} is gone")

    run(configure(tmp_path, tiny_llama, "reference", num_learners=0))
    faults["load", STEPS + 5] = gone
    run(configure(tmp_path, tiny_llama, "disturbed", num_learners=0))
    assert differences(tmp_path / "reference", tmp_path / "disturbed") == []
    assert "weight version 5 is gone. The learners are built anew" in capfd.readouterr().err

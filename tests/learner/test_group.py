"""The group of learners: the same result for any number of them, exact state, loud failures."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.weights import tensors_of
from learner.config import KLConfig, LearnersConfig, OptimizerConfig, PPOConfig
from learner.group import LearnerGroupFailed, PPOLearners
from learner.learner_state import read_state
from tests.learner.ppo_samples import in_process, random_batch, weights

STEADY = OptimizerConfig(learning_rate=1e-2, betas=(0.9, 0.999), eps=1e-2, max_grad_norm=0.5)
# Steps of 3, 2 and 2 samples: with two learners the shares are unequal, and a small budget gives
# them different numbers of micro-batches.
PPO = PPOConfig(
    minibatches=3,
    epochs=2,
    policy=STEADY,
    critic=STEADY,
    tokens_per_micro_batch=40,
    kl=KLConfig(adaptive=True, coef=0.15),
)


def start(learners: int, model: Path, threads: int = 1, ppo: PPOConfig = PPO) -> PPOLearners:
    config = LearnersConfig(num_learners=learners, threads=threads, timeout_s=60)
    return PPOLearners(ppo, config, model, model, None, temperature=0.8, total_steps=10, seed=0)


def gone(pids: list[int], within_s: float = 15.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def alone(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights after two iterations in this process, in one micro-batch per step."""
    learners = in_process(
        PPO.model_copy(update={"tokens_per_micro_batch": 10_000}), tiny_llama, temperature=0.8
    )
    for update in range(2):
        learners.update(random_batch(7, seed=update))
    return weights(learners, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def alone_alike(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The same in the micro-batches that a remote learner makes."""
    learners = in_process(PPO, tiny_llama, temperature=0.8)
    for update in range(2):
        learners.update(random_batch(7, seed=update))
    return weights(learners, tmp_path_factory.mktemp("alone_alike"))


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("count", "threads"), [(1, 1), (2, 2), (3, 1)])
def test_remote_learners_give_the_same_as_one_in_this_process(
    count: int,
    threads: int,
    tiny_llama: Path,
    alone: dict[str, torch.Tensor],
    alone_alike: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    """And their state, exported weights and saved policy are what they trained.

    Three learners share steps of 3, 2 and 2 samples: in two of them one learner has nothing.
    """
    with start(count, tiny_llama, threads=threads) as learners:
        for update in range(2):
            metrics = learners.update(random_batch(7, seed=update))
        got = weights(learners, tmp_path / "state")
        for name, expected in alone.items():
            torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)
            if count == 1:  # the same operations in the same order
                assert torch.equal(got[name], alone_alike[name]), name
        assert metrics["ppo/kl_coef"] == pytest.approx(0.15 * (1 - 0.2 * 7 / 10_000))

        sequences = [[1, 5, 9, 30], [4, 4], [7, 100, 2]]
        exported = learners.export_weights(3, sequences[:2])
        assert exported.version == 3
        assert exported.published
        assert exported.probe is not None
        tensors = tensors_of(_fetched(exported))
        learners.save_policy(tmp_path / "policy")
        _check_policy_directory(tmp_path / "policy", tiny_llama, tensors, learners, sequences)
        for row in range(2):
            np.testing.assert_allclose(
                exported.probe.logprobs[row], learners.logprobs(sequences)[row], atol=5e-6
            )

        # Going back and on again gives the same bits.
        learners.update(random_batch(7, seed=2))
        once = weights(learners, tmp_path / "once")
        learners.restore(tmp_path / "state")
        learners.update(random_batch(7, seed=2))
        again = weights(learners, tmp_path / "again")
        assert all(torch.equal(once[name], again[name]) for name in once)
        pids = learners.process_ids()
    assert gone(pids)


@pytest.mark.usefixtures("ray_session")
def test_two_learners_without_a_critic_give_the_same_as_one(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Groups and the means over responses are those of the step, not of a learner's share."""
    changes = {"advantage": "reinforce_plus_plus_baseline", "loss_aggregation": "sequence_mean"}
    config = PPOConfig.model_validate(PPO.model_dump() | changes)
    alone = in_process(config, tiny_llama, temperature=0.8)
    with start(2, tiny_llama, ppo=config) as learners:
        metrics = [group.update(random_batch(7, seed=0)) for group in (alone, learners)]
        got = weights(learners, tmp_path / "two")
    for name, expected in weights(alone, tmp_path / "one").items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-5)
    assert metrics[0].keys() == metrics[1].keys()
    assert metrics[1]["ppo/loss_policy"] == pytest.approx(metrics[0]["ppo/loss_policy"], abs=1e-5)


def _fetched(update: Any) -> Any:
    from dataclasses import replace

    import ray

    return replace(update, tensors=ray.get(update.tensors))


def _check_policy_directory(
    directory: Path,
    start_dir: Path,
    tensors: dict[str, torch.Tensor],
    learners: PPOLearners,
    sequences: list[list[int]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name])
    before, after = (AutoTokenizer.from_pretrained(d) for d in (start_dir, directory))
    assert after("storm in Riverton").input_ids == before("storm in Riverton").input_ids
    assert after.eos_token == before.eos_token
    assert (directory / "generation_config.json").is_file()
    for sequence, got in zip(sequences, learners.logprobs(sequences), strict=True):
        ids = torch.tensor([sequence])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        want = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


def test_restore_is_bit_exact_in_a_new_group(tiny_llama: Path, tmp_path: Path) -> None:
    first = in_process(PPO, tiny_llama)
    first.update(random_batch(7, seed=0))
    first.save(tmp_path / "state")
    first.update(random_batch(7, seed=1))
    second = in_process(PPO, tiny_llama)
    second.restore(tmp_path / "state")
    metrics = second.update(random_batch(7, seed=1))
    expected, got = weights(first, tmp_path / "a"), weights(second, tmp_path / "b")
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert metrics["ppo/learning_rate_policy"] == pytest.approx(9e-3)
    a, b = (read_state(tmp_path / name, torch.device("cpu")) for name in ("a", "b"))
    assert a.counters == b.counters
    assert (a.counters.updates, a.counters.seed) == (2, 0)
    assert {name.split("/")[1] for name in a.moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert {name.split("/")[0] for name in a.moments} == {"policy", "critic"}
    assert all(torch.equal(a.moments[name], b.moments[name]) for name in a.moments)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    learners = in_process(PPO, tiny_llama)
    before = weights(learners, tmp_path / "good")
    shared = in_process(PPO.model_copy(update={"shared_trunk": True}), tiny_llama)
    shared.save(tmp_path / "shared")
    in_process(PPO, tiny_llama, seed=1).save(tmp_path / "seed")
    for name in ("broken", "narrow"):
        shutil.copytree(tmp_path / "good", tmp_path / name)
    file = tmp_path / "broken" / "optimizers.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    file = tmp_path / "narrow" / "critic.safetensors"
    tensors = load_file(file)
    tensors["critic/value_head.weight"] = tensors["critic/value_head.weight"][:, :32].contiguous()
    save_file(tensors, file)
    cases: list[tuple[str, type[Exception], str]] = [
        ("nowhere", FileNotFoundError, "nowhere/learner.json does not exist"),
        ("shared", ValueError, r"it holds \['policy'\], this run trains \['critic', 'policy'\]"),
        ("narrow", ValueError, r"tensor critic/value_head.weight is \(1, 32\) there and \(1, 64\)"),
        ("seed", ValueError, "of a run with seed 1, this run has seed 0"),
        ("broken", ValueError, "cannot be read"),
    ]
    for name, kind, message in cases:
        with pytest.raises(kind, match=message):
            learners.restore(tmp_path / name)
    after = weights(learners, tmp_path / "after")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("allowed", [300_000, 1_200_000])
def test_a_full_disk_is_an_error_of_the_system_whatever_was_being_written(
    tiny_llama: Path, tmp_path: Path, allowed: int
) -> None:
    """The policy and the moments in turn; the learner lives on."""
    learners = in_process(PPO, tiny_llama)
    learners.update(random_batch(7, seed=0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            learners.save(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.errno == errno.EFBIG
    learners.save(tmp_path / "room")
    in_process(PPO, tiny_llama).restore(tmp_path / "room")


@pytest.fixture
def pair(ray_session: None, tiny_llama: Path) -> Iterator[PPOLearners]:
    with start(2, tiny_llama) as learners:
        yield learners


def failure(call: Callable[[], object]) -> tuple[str, float]:
    started = time.monotonic()
    with pytest.raises(LearnerGroupFailed) as raised:
        call()
    return str(raised.value), time.monotonic() - started


def test_a_learner_killed_in_an_update_raises_within_seconds(pair: PPOLearners) -> None:
    pids = pair.process_ids()
    # A checkpoint that no learner can use is refused by both, and both live on.
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pair.restore(Path("/nonexistent"))
    pair.update(random_batch(7, seed=0))
    killed_at: list[float] = []

    def kill() -> None:
        killed_at.append(time.monotonic())
        os.kill(pids[1], signal.SIGKILL)

    threading.Timer(0.5, kill).start()
    message, _ = failure(lambda: pair.update(random_batch(1500, seed=1, longest=60)))
    assert time.monotonic() - killed_at[0] < 15
    assert "learner 1 of 2 failed in update: its process died" in message
    assert gone(pids)
    message, seconds = failure(lambda: pair.update(random_batch(7, seed=0)))
    assert "after they were shut down" in message
    assert seconds < 1


def test_an_error_on_one_learner_is_the_error_that_is_raised(pair: PPOLearners) -> None:
    """Learner 1 raises, learner 0 waits for it in a collective operation."""
    import ray

    pids = pair.process_ids()
    ray.get(pair._group._workers[1].apply.remote(_poison))
    message, seconds = failure(lambda: pair.update(random_batch(7, seed=0)))
    assert "learner 1 of 2 failed in update: ArithmeticError: poisoned" in message
    assert seconds < 15
    assert gone(pids)


def _poison(learner: Any) -> None:
    def raise_error(*_: Any) -> None:
        raise ArithmeticError("poisoned")

    learner._targets = raise_error

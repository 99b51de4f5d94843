"""The pool: exact accounting, weights on every actor, faults, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.environment import cache_dir
from actors.rollout import RolloutPool
from actors.rollout_actor import eos_token_ids, response_text
from actors.trajectory import Prompt, SampleFailure, Trajectory, sample_seed
from actors.weights import Probe, WeightError, WeightUpdate, pack_weights
from actors.worker import State

CONFIG = RolloutConfig(
    num_actors=2,
    sample_timeout_s=30,
    engine=EngineConfig(max_num_seqs=8, kv_cache_gib=0.1),
)
SAMPLING = SamplingConfig(max_new_tokens=24, temperature=1.0, samples_per_prompt=3)
PROMPTS = [
    Prompt(
        prompt_id=f"p{i}",
        token_ids=np.array([1, *((31 * i + 7 * j) % 400 + 60 for j in range(4 + 3 * i))], np.int32),
        text="",
    )
    for i in range(12)
]
PROBED = [p.token_ids.tolist() for p in PROMPTS[1:3]]


class Learner:
    """The learner's side, in an actor of its own as in a run."""

    def __init__(self, model_dir: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        scored = []
        for ids in sequences:
            with torch.no_grad():
                logits = self.model(torch.tensor([list(ids)])).logits[0, :-1]
            chosen = torch.tensor(list(ids)[1:])[:, None]
            scored.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].numpy())
        return scored

    def train(self, version: int) -> WeightUpdate:
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.2)
        probe = Probe(token_ids=PROBED, logprobs=self.logprobs(PROBED))
        return pack_weights(self.model.named_parameters(), version, probe).publish()


@pytest.fixture(scope="module")
def pool(ray_session: None, tiny_llama: Path) -> Iterator[RolloutPool]:
    pool = RolloutPool(tiny_llama, CONFIG, name="tested")
    with pool:
        yield pool
        processes = [psutil.Process(pid) for pid in pids(pool)]
    assert not any(process.is_running() for process in processes)
    pool.shutdown()  # may be called again


@pytest.fixture(scope="module")
def learner(ray_session: None, tiny_llama: Path) -> Any:
    return ray.remote(num_cpus=1)(Learner).remote(tiny_llama)


def pids(pool: RolloutPool) -> list[int]:
    return [worker.info.pid for worker in pool._fleet.workers if worker.info]


def generate(
    pool: RolloutPool, prompts: Sequence[Prompt] = PROMPTS, sampling: SamplingConfig = SAMPLING
) -> dict[str, Trajectory]:
    records = list(pool.generate(prompts, sampling, run_seed=3, round_index=0))
    assert all(isinstance(record, Trajectory) for record in records)
    by_id = {record.sample_id: record for record in records}
    assert len(by_id) == len(records) == len(prompts) * sampling.samples_per_prompt
    return by_id  # type: ignore[return-value]


def tokens(trajectories: dict[str, Trajectory]) -> dict[str, list[int]]:
    return {name: t.response_ids.tolist() for name, t in sorted(trajectories.items())}


def test_every_sample_arrives_once_with_everything_it_needs(
    pool: RolloutPool, tiny_llama: Path
) -> None:
    told: list[tuple[int, int]] = []
    records = list(
        pool.generate(
            PROMPTS, SAMPLING, run_seed=3, round_index=0, progress=lambda *x: told.append(x)
        )
    )
    assert told == [(i + 1, 36) for i in range(36)]
    assert {r.sample_id for r in records} == {f"p{i}#{k}" for i in range(12) for k in range(3)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    for record in records:
        assert isinstance(record, Trajectory)
        assert record.seed == sample_seed(3, record.prompt.prompt_id, record.sample_index)
        assert (record.policy_versions == 0).all()
        assert record.response_text == tokenizer.decode(
            record.response_ids, skip_special_tokens=True
        )
        stopped = record.response_ids[-1] == 2
        assert record.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(record.response_ids) == 24


def test_samples_of_a_prompt_differ_and_so_do_rounds(pool: RolloutPool) -> None:
    first = tokens(generate(pool))
    assert len({tuple(ids) for ids in first.values()}) == 36
    other = pool.generate(PROMPTS[:1], SAMPLING, run_seed=3, round_index=1)
    assert all(r.response_ids.tolist() != first[r.sample_id] for r in other)


def test_a_sample_does_not_depend_on_actor_or_batch(pool: RolloutPool) -> None:
    together = generate(pool)
    # Another order sends prompts to the other actor; alone, a prompt has a batch of its own.
    assert tokens(generate(pool, PROMPTS[::-1])) == tokens(together)
    for prompt in PROMPTS[:4]:
        for name, alone in generate(pool, [prompt]).items():
            assert alone.response_ids.tolist() == together[name].response_ids.tolist()
            np.testing.assert_allclose(
                alone.response_logprobs, together[name].response_logprobs, atol=1e-5
            )


def test_a_sample_does_not_depend_on_the_number_of_actors(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_two = generate(pool)
    first = pool._fleet.workers[0]
    everyone = pool._fleet.of_state
    monkeypatch.setattr(  # for what is given work
        pool._fleet,
        "of_state",
        lambda *states: [first] if states == (State.HEALTHY,) else everyone(*states),
    )
    by_one = generate(pool)
    assert tokens(by_one) == tokens(by_two)
    for name, sample in by_one.items():
        np.testing.assert_allclose(
            sample.response_logprobs, by_two[name].response_logprobs, atol=1e-5
        )


def test_completions_come_in_the_order_in_which_they_finish(pool: RolloutPool) -> None:
    """A response that fills the rest of the context arrives after many short ones."""
    long = Prompt(prompt_id="long", token_ids=PROMPTS[0].token_ids, text="")
    short = [
        Prompt(prompt_id=f"s{i}", token_ids=np.full(250, 70 + i, np.int32), text="")
        for i in range(6)
    ]
    sampling = SamplingConfig(max_new_tokens=240)
    records = list(pool.generate([long, *short], sampling, run_seed=1, round_index=0))
    lengths = [len(r.response_ids) for r in records if isinstance(r, Trajectory)]
    assert records[-1].prompt.prompt_id == "long"
    assert lengths[-1] > 20
    assert max(lengths[:-1]) <= 6


def test_greedy_samples_are_all_alike(pool: RolloutPool) -> None:
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0, samples_per_prompt=2)
    done = tokens(generate(pool, PROMPTS[:2], greedy))
    assert done["p0#0"] == done["p0#1"]
    assert done["p0#0"] != done["p1#0"]


def test_log_probabilities_come_in_the_order_asked(pool: RolloutPool, learner: Any) -> None:
    sequences = [prompt.token_ids.tolist() for prompt in PROMPTS]
    for ours, theirs in zip(
        pool.logprobs(sequences), ray.get(learner.logprobs.remote(sequences)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert pool.logprobs([]) == []


def test_bad_prompts_are_refused_before_anything_is_generated(pool: RolloutPool) -> None:
    full = Prompt(prompt_id="full", token_ids=np.full(256, 5, np.int32), text="")
    with pytest.raises(ValueError, match="'full' has 256 tokens and leaves no room"):
        pool.generate([*PROMPTS, full], SAMPLING, run_seed=0, round_index=0)
    alien = Prompt(prompt_id="alien", token_ids=np.array([4, 600], np.int32), text="")
    with pytest.raises(ValueError, match="'alien' holds token id 600"):
        pool.generate([alien], SAMPLING, run_seed=0, round_index=0)


def test_weights_reach_every_actor_and_are_proved(pool: RolloutPool, learner: Any) -> None:
    before = tokens(generate(pool))
    confirmations = pool.load(ray.get(learner.train.remote(1)))
    assert [(c.actor, c.version) for c in confirmations] == [("tested-0", 1), ("tested-1", 1)]
    assert all(0 < c.probe_max_error < 1e-4 for c in confirmations)
    assert pool.version == 1
    after = generate(pool)
    assert all((t.policy_versions == 1).all() for t in after.values())
    assert tokens(after) != before
    sequences = [[*t.prompt.token_ids, *t.response_ids] for t in after.values()]
    reference = ray.get(learner.logprobs.remote(sequences))
    for trajectory, expected in zip(after.values(), reference, strict=True):
        of_response = expected[len(trajectory.prompt.token_ids) - 1 :]
        np.testing.assert_allclose(trajectory.response_logprobs, of_response, atol=1e-4)


def test_weights_that_are_refused_stop_generation_until_good_ones_come(
    pool: RolloutPool, learner: Any
) -> None:
    good: WeightUpdate = ray.get(learner.train.remote(2))
    tensors = dict(ray.get(good.tensors))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name] + np.float32(1e-6)
    with pytest.raises(WeightError, match=f"^twice: .*update 2: tensor '{name}' is corrupt"):
        pool.load(replace(good, tensors=tensors))
    with pytest.raises(WeightError, match="is corrupt"):
        pool.generate(PROMPTS, SAMPLING, run_seed=0, round_index=0)
    assert good.probe is not None
    wrong = Probe(token_ids=PROBED, logprobs=[x + np.float32(0.01) for x in good.probe.logprobs])
    with pytest.raises(WeightError, match=r"^twice: .*version 2 is not what the learner has"):
        pool.load(replace(good, probe=wrong))
    confirmed = pool.load(good)
    assert {c.version for c in confirmed} == {2}
    assert {c.refusal for c in confirmed} == {""}
    assert len(generate(pool)) == 36


SPOILT = "model.layers.1.self_attn.k_proj.weight"


def spoil_loads(actor: Any, times: int) -> None:
    """Runs in an actor: one tensor goes wrong behind the checksums in the next so many loads."""
    from actors.weight_transfer import ObjectStoreTransfer

    receive, left = ObjectStoreTransfer.receive_weights, [times]

    def spoilt(self: Any, update_info: Any) -> None:
        tensors = dict(update_info.tensors)
        if left[0]:
            left[0] -= 1
            tensors[SPOILT] = tensors[SPOILT] * 2
        receive(self, replace(update_info, tensors=tensors))

    ObjectStoreTransfer.receive_weights = spoilt  # type: ignore[method-assign]


def test_a_passing_fault_is_mended_by_loading_again_and_told(
    pool: RolloutPool, learner: Any
) -> None:
    ray.get(pool.handles[1].__ray_call__.remote(spoil_loads, 1))
    fine, mended = pool.load(ray.get(learner.train.remote(50)))
    assert fine.refusal == ""
    assert f"sent: '{SPOILT}' by up to" in mended.refusal
    assert mended.probe_max_error < 1e-4
    assert len(generate(pool)) == 36


def test_a_lasting_fault_is_an_error_that_names_the_tensor(pool: RolloutPool, learner: Any) -> None:
    ray.get(pool.handles[0].__ray_call__.remote(spoil_loads, 2))
    update = ray.get(learner.train.remote(51))
    with pytest.raises(WeightError, match=f"^twice: tested-0 does not.* sent: '{SPOILT}' by up"):
        pool.load(update)
    assert [worker.state for worker in pool._fleet.workers] == [State.REFUSING, State.HEALTHY]
    assert {c.refusal for c in pool.load(update)} == {""}


def relabel(actor: Any, version: int) -> None:
    """Runs in an actor: vLLM labels what it samples with another weight version."""
    actor._engine.call(lambda engine: engine._llm.set_weight_version(str(version))).result()


def test_tokens_of_another_version_are_never_handed_out(pool: RolloutPool, learner: Any) -> None:
    """An engine that generates with other weights than it confirmed starts anew with the right."""
    pool.load(ray.get(learner.train.remote(52)))
    undisturbed = tokens(generate(pool))
    before = pids(pool)
    ray.get(pool.handles[0].__ray_call__.remote(relabel, 51))
    records = generate(pool)
    assert tokens(records) == undisturbed
    assert all((t.policy_versions == 52).all() for t in records.values())
    pool.logprobs(PROBED)  # has every actor back
    assert pids(pool)[0] != before[0]
    assert pids(pool)[1] == before[1]


def test_a_checkpoint_directory_can_be_loaded(
    pool: RolloutPool, tiny_llama: Path, tmp_path: Path
) -> None:
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(-1)
    other.save_pretrained(tmp_path)
    original = tokens(generate_after_loading(pool, tiny_llama, 3))
    assert tokens(generate_after_loading(pool, tmp_path, 4)) != original
    assert tokens(generate_after_loading(pool, tiny_llama, 5)) == original
    with pytest.raises(FileNotFoundError):
        pool.load_checkpoint(tmp_path / "nowhere", version=6)


def generate_after_loading(
    pool: RolloutPool, model_dir: Path, version: int
) -> dict[str, Trajectory]:
    (first, _) = pool.load_checkpoint(model_dir, version=version)
    assert first.version == pool.version == version
    assert np.isnan(first.probe_max_error)
    return generate(pool)


def test_closing_early_leaves_the_actors_idle(pool: RolloutPool, learner: Any) -> None:
    long = SamplingConfig(max_new_tokens=200, samples_per_prompt=4)
    iterator = pool.generate(PROMPTS, long, run_seed=0, round_index=0)
    next(iterator)
    with pytest.raises(RuntimeError, match="while samples are in flight"):
        pool.load(ray.get(learner.train.remote(7)))
    iterator.close()
    pool.load(ray.get(learner.train.remote(8)))  # engines refuse weights while they decode
    assert len(generate(pool)) == 36


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_lost_while_generating_costs_no_sample(
    pool: RolloutPool, learner: Any, how: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed or hanging, it is replaced; every sample arrives once, with the same tokens, and
    the new actor has the current weights."""
    version = 10 + how
    pool.load(ray.get(learner.train.remote(version)))
    undisturbed = tokens(generate(pool))
    if how is signal.SIGSTOP:  # no use in waiting long for what was stopped
        quick = CONFIG.model_copy(update={"sample_timeout_s": 5.0})
        monkeypatch.setattr(pool, "_config", quick)
    lost = pids(pool)[0]
    records = []
    for record in pool.generate(PROMPTS, SAMPLING, run_seed=3, round_index=0):
        if not records:
            os.kill(lost, how)
        records.append(record)
    assert max(Counter(r.sample_id for r in records).values()) == 1
    assert tokens({r.sample_id: r for r in records}) == undisturbed  # type: ignore[misc]
    assert not psutil.pid_exists(lost)
    sequences = [prompt.token_ids.tolist() for prompt in PROMPTS]
    ours = pool.logprobs(sequences)
    assert lost not in pids(pool)
    assert {worker.state for worker in pool._fleet.workers} == {State.HEALTHY}
    assert {worker.confirmation.version for worker in pool._fleet.workers} == {version}
    for a, b in zip(ours, ray.get(learner.logprobs.remote(sequences)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert tokens(generate(pool)) == undisturbed


def break_engine(actor: Any) -> None:
    """Runs in an actor: its engine's next step raises, as a failed kernel would."""

    def fail() -> None:
        raise RuntimeError("a kernel failed")

    actor._engine.call(lambda engine: setattr(engine._llm, "step", fail)).result()


def test_an_actor_whose_engine_breaks_is_replaced(pool: RolloutPool, learner: Any) -> None:
    pool.load(ray.get(learner.train.remote(40)))
    undisturbed = tokens(generate(pool))
    before = pids(pool)
    broken = pool.handles[1]
    ray.get(broken.__ray_call__.remote(break_engine))
    assert tokens(generate(pool)) == undisturbed
    assert tokens(generate(pool)) == undisturbed
    assert pids(pool)[0] == before[0]
    assert pids(pool)[1] != before[1]


def test_a_sample_that_fails_every_time_is_set_aside_with_its_reason(
    pool: RolloutPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log-probability that is not finite cannot be trained on."""
    real = Trajectory.__post_init__

    def refuse_one(self: Trajectory) -> None:
        real(self)
        if self.sample_id == "p3#1":
            raise ValueError("the engine gave a log-probability of NaN")

    monkeypatch.setattr(Trajectory, "__post_init__", refuse_one)
    records = list(pool.generate(PROMPTS, SAMPLING, run_seed=3, round_index=0))
    assert len({r.sample_id for r in records}) == len(records) == 36
    (failure,) = [r for r in records if isinstance(r, SampleFailure)]
    assert (failure.sample_id, failure.stage) == ("p3#1", "generation")
    assert failure.reason == "failed 3 times, last: the engine gave a log-probability of NaN"


def test_actors_have_the_environment_that_engines_need(pool: RolloutPool) -> None:
    environment = psutil.Process(pids(pool)[0]).environ()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["PYTHONDONTWRITEBYTECODE"] == ""
    expected = os.environ.get("VLLM_CACHE_ROOT", str(cache_dir() / "vllm"))
    assert environment["VLLM_CACHE_ROOT"] == expected
    # vLLM lives in the actor itself: no child that could be orphaned.
    assert psutil.Process(pids(pool)[0]).children() == []


def test_an_actor_without_room_says_what_it_waits_for(ray_session: None, tiny_llama: Path) -> None:
    greedy = CONFIG.model_copy(
        update={"num_cpus_per_actor": 99.0, "num_actors": 1, "start_timeout_s": 1.0}
    )
    with pytest.raises(
        TimeoutError, match=r"rollout-0 was not ready within 1 s.*asks for 99 CPU.*has 16 CPU"
    ):
        RolloutPool(tiny_llama, greedy).start()


def test_models_that_cannot_be_served_are_refused(
    ray_session: None, tiny_llama: Path, tmp_path: Path
) -> None:
    one = CONFIG.model_copy(update={"num_actors": 1})
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        RolloutPool(tmp_path, one)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    with (
        pytest.raises(FileNotFoundError, match="holds no tokenizer"),
        RolloutPool(tmp_path, one),
    ):
        pass


def test_a_response_ends_at_every_eos_that_the_model_names(tmp_path: Path) -> None:
    class WithEos:
        eos_token_id = 9

    assert eos_token_ids(tmp_path, WithEos()) == (9,)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert eos_token_ids(tmp_path, WithEos()) == (2, 7, 9)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert eos_token_ids(tmp_path, WithEos()) == (2, 7, 9)


def test_a_response_keeps_the_space_that_parts_it_from_its_prompt() -> None:
    """SentencePiece tokenizers drop the space that a decoded text begins with."""
    vocabulary = {"<s>": 0, "▁the": 1, "▁storm": 2, "s": 3, "</s>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    assert fast.decode([2]) == "storm"
    prompt = np.array([0, 1], np.int32)
    assert response_text(fast, prompt, np.array([2, 3, 4], np.int32)) == " storms"
    assert response_text(fast, prompt, np.array([3], np.int32)) == "s"
    assert response_text(fast, prompt, np.array([4], np.int32)) == ""

"""vLLM in a process of its own, held against Hugging Face: samples, updates, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actors.config import EngineConfig
from actors.engine import VLLMEngine
from actors.environment import engine_environment
from actors.generation import Completion, SampleRequest
from actors.head_padding import HeadPadding, head_padding
from actors.weights import Probe, WeightError, WeightUpdate, pack_weights, tensors_of

EOS = (2, *range(40, 60))  # many, so that random models end some responses
SEQUENCES = [[1 + (37 * i + 11 * j) % 500 for j in range(9 + 5 * i)] for i in range(4)]
SEQUENCES.append([3 + 7 * j % 500 for j in range(256)])  # fills the context


class EngineProcess:
    """An engine in a process with the environment that actors have."""

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        self.engine = VLLMEngine(model_dir, config, eos_token_ids=EOS, name="engine")

    def run(self, command: Callable[[VLLMEngine], Any]) -> Any:
        return command(self.engine)


class Box:
    """The driver's side of an :class:`EngineProcess`, and the learner's model."""

    def __init__(self, model_dir: Path, config: EngineConfig) -> None:
        self.learner = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self.process = (
            ray.remote(EngineProcess)
            .options(num_cpus=1, runtime_env={"env_vars": engine_environment(config)})
            .remote(model_dir, config)
        )

    def run(self, command: Callable[[VLLMEngine], Any]) -> Any:
        try:
            return ray.get(self.process.run.remote(command), timeout=240)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def sample(self, requests: Sequence[SampleRequest]) -> dict[str, Completion]:
        def command(engine: VLLMEngine) -> dict[str, Completion]:
            for request in requests:
                engine.add(request)
            done = {}
            while engine.busy:
                done.update({c.request_id: c for c in engine.step()})
            return done

        return self.run(command)  # type: ignore[no-any-return]

    def reference(self, ids: Sequence[int], temperature: float = 1.0) -> np.ndarray:
        """Hugging Face's log-probabilities of ids 1, 2, ..."""
        tokens = torch.tensor([list(map(int, ids))])
        with torch.no_grad():
            logits = self.learner(tokens).logits[0, :-1] / temperature
        return logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].numpy()

    def train(self, version: int, *, probe: bool = True) -> WeightUpdate:
        """Move the learner's weights a good way and pack them."""
        torch.manual_seed(version)
        with torch.no_grad():
            for parameter in self.learner.parameters():
                noise = torch.randn_like(parameter)
                parameter.add_(noise * (0.3 * parameter.std() + 0.01))
        told = Probe(
            token_ids=SEQUENCES[:3], logprobs=[self.reference(ids) for ids in SEQUENCES[:3]]
        )
        # A copy: the process is sent it by value, while the learner goes on.
        tensors = [(name, p.detach().clone()) for name, p in self.learner.named_parameters()]
        return pack_weights(tensors, version, told if probe else None)

    def load(self, update: WeightUpdate, tolerance: float = 1e-3) -> Any:
        return self.run(lambda engine: engine.load(update, tolerance))

    def errors(self) -> np.ndarray:
        ours = self.run(lambda engine: engine.logprobs(SEQUENCES))
        return np.concatenate(
            [np.abs(a - self.reference(ids)) for a, ids in zip(ours, SEQUENCES, strict=True)]
        )


def narrow_llama(path: Path) -> Path:
    """A Llama with heads of width 8, as small models have, and biases."""
    torch.manual_seed(5)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            attention_bias=True,
            tie_word_embeddings=False,
            initializer_range=0.3,
        )
    ).save_pretrained(path)
    return path


def request(name: str, prompt: Sequence[int], **changes: Any) -> SampleRequest:
    defaults: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "seed": 5}
    ids = np.array(prompt, np.int32)
    return SampleRequest(request_id=name, token_ids=ids, **(defaults | changes))


@pytest.fixture(scope="module")
def boxes(
    ray_session: None,
    tiny_llama: Path,
    tiny_llama_untied: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Box]]:
    config = EngineConfig(max_num_seqs=16, kv_cache_gib=0.1)
    scarce = config.model_copy(update={"kv_cache_gib": 0.002})  # 16 blocks of 128 tokens
    narrow = narrow_llama(tmp_path_factory.mktemp("narrow"))
    started = {
        "tied": Box(tiny_llama, config),
        "untied": Box(tiny_llama_untied, scarce),
        "narrow": Box(narrow, config.model_copy(update={"weight_transfer": "nccl"})),
    }
    yield started
    for box in started.values():
        ray.kill(box.process)


@pytest.fixture(params=["tied", "untied", "narrow"])
def box(boxes: dict[str, Box], request: pytest.FixtureRequest) -> Box:
    return boxes[request.param]


@pytest.fixture
def tied(boxes: dict[str, Box]) -> Box:
    return boxes["tied"]


def test_log_probabilities_are_those_of_hugging_face(box: Box) -> None:
    errors = box.errors()
    assert errors.mean() < 1e-5
    assert errors.max() < 1e-4


def test_after_each_update_they_are_those_of_the_learner(box: Box) -> None:
    before = box.run(lambda engine: engine.logprobs(SEQUENCES))
    for version in (1, 2, 3):
        confirmation = box.load(box.train(version))
        assert (confirmation.actor, confirmation.version) == ("engine", version)
        errors = box.errors()
        assert errors.mean() < 1e-5
        assert confirmation.probe_mean_error < 1e-5
        assert 0 < confirmation.probe_max_error < 1e-4
    after = box.run(lambda engine: engine.logprobs(SEQUENCES))
    assert max(np.abs(a - b).max() for a, b in zip(after, before, strict=True)) > 0.5


def test_samples_carry_the_log_probabilities_they_were_sampled_with(box: Box) -> None:
    box.load(box.train(4))
    for temperature in (1.0, 0.7):
        requests = [
            request(f"r{i}", p, temperature=temperature) for i, p in enumerate(SEQUENCES[:4])
        ]
        done = box.sample(requests)
        for asked in requests:
            completion = done[asked.request_id]
            ids = [*asked.token_ids, *completion.token_ids]
            expected = box.reference(ids, temperature)[len(asked.token_ids) - 1 :]
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
            assert completion.versions.tolist() == [4] * len(completion.token_ids)


def test_a_version_travels_with_every_token(tied: Box) -> None:
    tied.load(tied.train(16))
    tried = [request(f"{s}", SEQUENCES[0], max_new_tokens=9, seed=s) for s in range(16)]
    whole = next(name for name, c in tied.sample(tried).items() if len(c.token_ids) == 9)

    def command(engine: VLLMEngine) -> list[int]:
        engine.add(request("r", SEQUENCES[0], max_new_tokens=9, seed=int(whole)))
        done: list[Completion] = []
        for _ in range(3):
            done += engine.step()
        engine._llm.set_weight_version("17")  # as if new weights came in between two steps
        while engine.busy:
            done += engine.step()
        engine._llm.set_weight_version("16")
        return done[0].versions.tolist()

    versions = tied.run(command)
    assert versions[:3] == [16] * 3
    assert set(versions[3:]) == {17}


def test_greedy_takes_the_likeliest_token(box: Box) -> None:
    asked = request("greedy", SEQUENCES[2], temperature=0.0)
    completion = box.sample([asked])["greedy"]
    ids = torch.tensor([[*asked.token_ids, *completion.token_ids]])
    with torch.no_grad():
        likeliest = box.learner(ids).logits[0, len(asked.token_ids) - 1 : -1].argmax(-1)
    assert likeliest.tolist() == completion.token_ids.tolist()
    expected = box.reference(ids[0].tolist())[len(asked.token_ids) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_sampling_follows_the_distribution(tied: Box) -> None:
    """First tokens of 3,000 samples against Hugging Face's probabilities, by chi-square."""
    prompt, temperature, n = SEQUENCES[1], 0.8, 3000
    done = tied.sample(
        [
            request(str(i), prompt, max_new_tokens=1, temperature=temperature, seed=i)
            for i in range(n)
        ]
    )
    counts = np.bincount([c.token_ids[0] for c in done.values()], minlength=512)
    with torch.no_grad():
        logits = tied.learner(torch.tensor([prompt])).logits[0, -1] / temperature
    expected = logits.double().softmax(-1).numpy() * n
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_a_sample_depends_on_its_seed_and_on_nothing_beside_it(tied: Box) -> None:
    requests = [request(f"{i}-{k}", p, seed=k) for i, p in enumerate(SEQUENCES[:4]) for k in (1, 2)]
    together = tied.sample(requests)
    backwards = tied.sample(requests[::-1])
    for asked in requests:
        name = asked.request_id
        alone = tied.sample([asked])[name]
        assert alone.token_ids.tolist() == together[name].token_ids.tolist()
        assert alone.token_ids.tolist() == backwards[name].token_ids.tolist()
        np.testing.assert_allclose(alone.logprobs, together[name].logprobs, atol=1e-5)
    assert together["0-1"].token_ids.tolist() != together["0-2"].token_ids.tolist()


def test_more_prompts_than_one_step_can_take_leave_samples_as_they_are(tied: Box) -> None:
    """16 x 250 tokens exceed a step's budget; a seeded prompt must not be taken in pieces."""
    prompts = [[1 + (13 * i + 7 * j) % 500 for j in range(250)] for i in range(16)]
    requests = [request(f"{i}", p, seed=i, max_new_tokens=5) for i, p in enumerate(prompts)]
    together = tied.sample(requests)
    for asked in requests[::5]:
        alone = tied.sample([asked])[asked.request_id]
        assert alone.token_ids.tolist() == together[asked.request_id].token_ids.tolist()


def test_samples_that_are_preempted_come_out_the_same(boxes: dict[str, Box]) -> None:
    """With memory for 16 blocks, responses that grow into a second block displace others."""
    prompts = [[1 + (13 * i + 7 * j) % 500 for j in range(122)] for i in range(16)]
    requests = [request(f"{i}", p, seed=i, max_new_tokens=60) for i, p in enumerate(prompts)]

    def command(engine: VLLMEngine) -> tuple[dict[str, Completion], int]:
        scheduler = engine._llm.engine_core.engine_core.scheduler
        preempt, count = scheduler._preempt_request, [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted
        for asked in requests:
            engine.add(asked)
        done = {}
        while engine.busy:
            done.update({c.request_id: c for c in engine.step()})
        scheduler._preempt_request = preempt
        return done, count[0]

    crowded, preemptions = boxes["untied"].run(command)
    assert preemptions > 0
    for asked in requests:
        alone = boxes["untied"].sample([asked])[asked.request_id]
        assert alone.token_ids.tolist() == crowded[asked.request_id].token_ids.tolist()
        np.testing.assert_allclose(alone.logprobs, crowded[asked.request_id].logprobs, atol=1e-5)


def test_a_response_ends_at_any_of_the_eos_ids_and_keeps_it(tied: Box) -> None:
    done = tied.sample(
        [
            request(f"{i}", SEQUENCES[1], seed=i, temperature=1.5, max_new_tokens=40)
            for i in range(40)
        ]
    )
    ended = [c for c in done.values() if c.finish_reason == "stop"]
    full = [c for c in done.values() if c.finish_reason == "length"]
    assert {int(c.token_ids[-1]) in EOS for c in ended} == {True}
    assert len({int(c.token_ids[-1]) for c in ended}) > 2
    assert not any(set(c.token_ids[:-1]) & set(EOS) for c in ended)
    assert all(len(c.token_ids) == 40 and not set(c.token_ids) & set(EOS) for c in full)
    assert all(len(c.logprobs) == len(c.token_ids) for c in done.values())


def test_a_response_ends_where_the_context_does(tied: Box) -> None:
    done = tied.sample([request("c", SEQUENCES[4][:250], max_new_tokens=24, seed=0)])
    assert len(done["c"].token_ids) <= 6
    assert done["c"].finish_reason in ("length", "stop")


def test_prompts_that_cannot_be_continued_are_refused(tied: Box) -> None:
    with pytest.raises(ValueError, match="'full' has 256 tokens and leaves no room"):
        tied.sample([request("full", [5] * 256)])
    with pytest.raises(ValueError, match=r"'alien' holds token id 512, outside .* of 512"):
        tied.sample([request("alien", [5, 512])])
    with pytest.raises(ValueError, match="holds token id -1"):
        tied.sample([request("alien", [-1, 5])])
    for ids in [[5]], [5] * 257:
        with pytest.raises(ValueError, match=f"a sequence of {len(ids)} ids cannot be scored"):
            tied.run(lambda engine, ids=ids: engine.logprobs([ids]))
    assert tied.errors().mean() < 1e-5  # none of it did harm


def test_aborted_requests_are_forgotten(tied: Box) -> None:
    def command(engine: VLLMEngine) -> tuple[bool, bool]:
        for i in range(4):
            engine.add(request(f"a{i}", SEQUENCES[0]))
        engine.step()
        busy = engine.busy
        engine.abort([f"a{i}" for i in range(4)])
        return busy, engine.busy

    assert tied.run(command) == (True, False)


def test_weights_are_not_changed_under_a_request(tied: Box) -> None:
    update = tied.train(5)

    def command(engine: VLLMEngine) -> None:
        engine.add(request("a", SEQUENCES[0]))
        engine.step()
        try:
            engine.load(update, 1e-3)
        finally:
            engine.abort(["a"])

    with pytest.raises(RuntimeError, match="with 1 requests in flight"):
        tied.run(command)
    assert tied.load(update).version == 5


def test_what_was_cached_for_older_weights_is_not_used(tied: Box) -> None:
    prompt = SEQUENCES[4][:200]  # more than a block of 128, so that it is cached
    tied.load(tied.train(6))
    tied.sample([request("old", prompt)])
    tied.load(tied.train(7, probe=False))
    new = tied.sample([request("new", prompt)])["new"]
    expected = tied.reference([*prompt, *new.token_ids])[len(prompt) - 1 :]
    tempered = tied.reference([*prompt, *new.token_ids], 0.7)[len(prompt) - 1 :]
    assert np.abs(expected - tempered).max() > 0.1
    np.testing.assert_allclose(new.logprobs, tempered, atol=1e-4)


def test_a_corrupt_tensor_is_refused_by_name_and_a_good_update_mends_it(tied: Box) -> None:
    update = tied.train(8)
    name = "model.layers.1.mlp.down_proj.weight"
    damaged = dict(update.tensors)
    damaged[name] = damaged[name].copy()
    damaged[name][3, 4] += 0.001
    with pytest.raises(WeightError, match=f"'{name}' is corrupt"):
        tied.load(replace(update, tensors=damaged))
    with pytest.raises(WeightError, match="update 8 was begun and not confirmed"):
        tied.sample([request("a", SEQUENCES[0])])
    assert tied.load(update).probe_max_error < 1e-4
    assert len(tied.sample([request("a", SEQUENCES[0])])) == 1


def test_an_update_of_another_model_is_refused(tied: Box, boxes: dict[str, Box]) -> None:
    with pytest.raises(WeightError, match="not of the engine's architecture"):
        tied.load(boxes["narrow"].train(9))
    with pytest.raises(WeightError, match=r"it lacks 'lm_head\.weight'"):
        boxes["untied"].load(tied.train(9))
    for mended in (tied, boxes["untied"]):
        assert mended.load(mended.train(9)).version == 9


def test_the_probe_catches_a_stale_head_that_checksums_do_not_show(tied: Box) -> None:
    """A tied head multiplies with a packed copy of its weight, which a reload leaves behind."""
    update = tied.train(10)
    tensors_of(update)  # every checksum is right

    def without_repair(engine: VLLMEngine) -> None:
        from actors.weight_transfer import ObjectStoreTransfer

        repair = ObjectStoreTransfer.repack_heads
        ObjectStoreTransfer.repack_heads = lambda self: None  # type: ignore[method-assign]
        try:
            engine.load(update, 1e-3)
        finally:
            ObjectStoreTransfer.repack_heads = repair  # type: ignore[method-assign]

    with pytest.raises(
        WeightError, match=r"version 10 is not what the learner has.* allowed 0.001"
    ) as refused:
        tied.run(without_repair)
    assert (
        "the engine does not compute with the tensors that it was sent:"
        " 'model.embed_tokens.weight' as the tied output layer 'lm_head' by up to"
    ) in str(refused.value)
    with pytest.raises(WeightError, match="does not generate"):
        tied.sample([request("a", SEQUENCES[0])])
    assert tied.load(update).probe_max_error < 1e-4


def spoil(engine: VLLMEngine, name: str, update: WeightUpdate) -> Any:
    """Load ``update``; one element of tensor ``name`` goes wrong behind the checksums."""
    from actors.weight_transfer import NcclTransfer, ObjectStoreTransfer

    backend: Any = NcclTransfer if engine._padding else ObjectStoreTransfer
    receive = backend.receive_weights

    def spoilt(self: Any, update_info: Any) -> None:
        tensors = dict(update_info.tensors)
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] += 4.0
        receive(self, replace(update_info, tensors=tensors))

    backend.receive_weights = spoilt
    try:
        return engine.load(update, 1e-3)
    finally:
        backend.receive_weights = receive


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("untied", "model.layers.1.mlp.down_proj.weight"),
        ("untied", "model.layers.0.mlp.up_proj.weight"),  # the second half of a fused layer
        ("untied", "model.layers.0.post_attention_layernorm.weight"),
        ("untied", "lm_head.weight"),
        ("narrow", "model.layers.0.self_attn.v_proj.weight"),  # the last third, padded
        ("narrow", "model.layers.1.self_attn.o_proj.bias"),
    ],
)
def test_a_probe_that_disagrees_names_the_one_tensor_at_fault(
    boxes: dict[str, Box], which: str, name: str
) -> None:
    box = boxes[which]
    update = box.train(13)
    with pytest.raises(WeightError) as refused:
        box.run(lambda engine: spoil(engine, name, update))
    told = str(refused.value)
    assert f"tensors that it was sent: '{name}' by up to 4 (its largest element" in told
    assert told.count("by up to") == 2  # the probe's error, and this one tensor's
    assert box.load(update).probe_max_error < 1e-4


def test_an_embedding_that_changes_after_it_was_loaded_is_named(tied: Box) -> None:
    update = tied.train(14)
    tied.load(update)

    def change(engine: VLLMEngine) -> None:
        (weight,) = engine._llm.apply_model(lambda model: model.model.embed_tokens.weight)
        weight.data[SEQUENCES[0][0], 3] += 1.0
        assert update.probe is not None
        engine.confirm(14, update.probe, 1e-3)

    with pytest.raises(WeightError, match="version 14 is not what the learner has"):
        tied.run(change)
    found = tied.run(lambda engine: engine._diagnosis(tensors_of(update)))
    assert "sent: 'model.embed_tokens.weight' by up to 1 (its largest" in found
    tied.load(update)


def test_when_every_tensor_is_right_the_diagnosis_says_so(tied: Box) -> None:
    update = tied.train(15)
    assert update.probe is not None
    wrong = Probe(
        token_ids=update.probe.token_ids,
        logprobs=[x + np.float32(0.01) for x in update.probe.logprobs],
    )
    # 2 x (q k v o gate up down, two norms), embedding, last norm, and the tied output layer.
    with pytest.raises(WeightError, match=r"all 21 tensors are in the engine as they were sent, "):
        tied.load(replace(update, probe=wrong))
    tied.load(update)


def test_a_probe_of_nan_is_refused(tied: Box) -> None:
    update = tied.train(11)
    assert update.probe is not None
    nan = Probe(
        token_ids=update.probe.token_ids,
        logprobs=[np.full_like(x, np.nan) for x in update.probe.logprobs],
    )
    with pytest.raises(WeightError, match="differ by up to nan"):
        tied.load(replace(update, probe=nan))
    assert tied.load(update).version == 11


def test_the_four_calls_of_a_trainer_lead_to_weights_that_must_be_confirmed(
    boxes: dict[str, Box],
) -> None:
    """As vLLM's trainers drive it, in two buckets; the backend is the one that knows NCCL."""
    update = boxes["narrow"].train(12)

    def calls(engine: VLLMEngine) -> str:
        assert engine._padding is not None
        tensors = list(engine._padding(tensors_of(update)).items())
        engine.control("start_weight_update", {})
        engine.control("update_weights", {"tensors": dict(tensors[:4])})
        engine.control("update_weights", {"tensors": dict(tensors[4:])})
        engine.control("finish_weight_update", {})
        try:
            engine.logprobs(SEQUENCES)
        except WeightError as error:
            return str(error)
        return ""

    refusal = boxes["narrow"].run(calls)
    assert refusal == "engine does not generate: a weight update was begun and not confirmed"
    largest, mean = boxes["narrow"].run(lambda e: e.confirm(12, update.probe, 1e-3))
    assert 0 <= mean <= largest < 1e-4
    assert boxes["narrow"].errors().mean() < 1e-5


def test_nccl_is_asked_for_its_rendezvous(boxes: dict[str, Box]) -> None:
    with pytest.raises(ValueError, match="Invalid init_info for NcclTransfer"):
        boxes["narrow"].run(lambda e: e.control("init_weight_transfer_engine", {"nonsense": 1}))


def test_padded_heads_compute_the_same(tmp_path: Path) -> None:
    path = narrow_llama(tmp_path)
    padding = head_padding(path, supported=[32, 64])
    assert padding == HeadPadding(narrow=8, wide=32)
    narrow = LlamaForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        for parameter in narrow.parameters():  # biases begin at zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    wide = LlamaForCausalLM(LlamaConfig.from_pretrained(path, head_dim=32)).eval()
    wide.load_state_dict(padding(narrow.state_dict()))
    ids = torch.tensor(SEQUENCES[4:])
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, narrow(ids).logits, atol=1e-4, rtol=1e-4)
    assert head_padding(path, supported=[8]) is None


def test_heads_that_cannot_be_padded_are_refused(tmp_path: Path) -> None:
    config = {"architectures": ["GPTNeoXForCausalLM"], "hidden_size": 48, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(str(config).replace("'", '"'))
    with pytest.raises(ValueError, match=r"heads of width 12 \(GPTNeoXForCausalLM\)"):
        head_padding(tmp_path, supported=[32, 64])

"""``rlhf bench``: this system against its own floor, both measured in one run.

Absolute times depend on the machine and on what else it does; the ratio of two measurements made
minutes apart in one run hardly does. So every benchmark ends with a ratio.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.prompts import PromptStream
from actors.trajectory import Prompt
from cluster.calibration import bench_plan
from cluster.config import RunConfig
from cluster.cost_model import default_path
from cluster.progress import Reporter
from cluster.session import Parts, Session
from cluster.step import PROBE_SEQUENCES, PROBE_TOKENS
from cluster.stop import StopRequest
from cluster.train import take_steps
from learner.config import LearnersConfig, OptimizerConfig, PPOConfig
from learner.group import PPOLearners, cpu_has_bfloat16
from reward_service.config import RewardConfig, RewardServiceConfig, RewardTerm

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 32, 128
PHASES = ("generate", "learn", "broadcast")
WARM_UP_UPDATES, UPDATES_PER_REPEAT = 4, 5


def run_benchmark(
    what: str, *, as_json: bool, repeats: int, constants: Path | None = None, bf16: bool = False
) -> None:
    """Run one benchmark and print its table, or one JSON line.

    Args:
        constants: Where ``plan`` writes what it has measured; by default the user's cache.
        bf16: Precision of the learners that ``plan`` measures.
    """
    from cluster.bench_overlap import bench_overlap

    path = constants or default_path()
    say = Reporter().say
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as directory:
        place = Path(directory)
        benchmarks: dict[str, Callable[[Path, int], dict[str, Any]]] = {
            "ppo": bench_ppo,
            "overlap": bench_overlap,
            "weights": bench_weights,
            "start": bench_start,
            "reward": bench_scoring,
            "plan": lambda at, _: bench_plan(at, path, say, bf16=bf16),
        }
        result = benchmarks[what](place, repeats)
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<34} {value:.3f}" if isinstance(value, float) else f"{name:<34} {value}")


def bench_ppo(place: Path, repeats: int) -> dict[str, Any]:
    """One PPO iteration (generate, score, learn, broadcast) against bare vLLM and bare torch.

    The floor is measured on the same prompts and batch: bare ``LLM.generate`` with one and with
    two threads, and bare torch forwards, backwards and steps in float32 and, where the CPU has
    instructions for it, in bfloat16; the best of each counts. Scoring and the weight update have
    no floor: they are ours to pay.
    """
    model, reward_model = build_models(place, hidden=256, layers=6)
    bf16 = cpu_has_bfloat16()
    prompts = random_prompts()
    floor = _floor(place, model, prompts)
    config = bench_config(place, model, reward_model, steps=repeats + 1, bf16=bf16)
    steps = run_steps(config, model, reward_model, prompts)[1:]
    median = {phase: median_of(steps, f"seconds/{phase}") for phase in (*PHASES, "step")}
    inside = {
        f"seconds_learn_{part}": median_of(steps, f"ppo/seconds_{part}")
        for part in ("annotate", "forward_backward", "optimizer")
    }
    floor_total = floor["generate"] + floor["learn"]
    return {
        "ratio_to_floor": median["step"] / floor_total,
        "ratio_generate": median["generate"] / floor["generate"],
        "ratio_learn": median["learn"] / floor["learn"],
        "seconds_step": median["step"],
        **{f"seconds_{phase}": median[phase] for phase in PHASES},
        **inside,
        "floor_seconds": floor_total,
        "floor_seconds_generate": floor["generate"],
        "floor_seconds_learn": floor["learn"],
        "floor_settings": floor["settings"],
        "response_tokens_per_second": median_of(steps, "tokens/per_second"),
        "engine_delta_mean_max": max(s["ppo/engine_delta_mean"] for s in steps),
        "verify_share": median_of(steps, "weights/verify_share"),
        "seconds_checksum": median_of(steps, "weights/seconds_checksum"),
        "seconds_probe": median_of(steps, "weights/seconds_probe"),
        "bf16_autocast": bf16,
        "iterations": len(steps),
    }


def bench_weights(place: Path, repeats: int) -> dict[str, Any]:
    """A verified weight update of a 25-million-parameter model against copying its bytes.

    Updates and copies take turns, so that whatever else the machine does slows both. The first
    updates of a run are slower, as the object store and the engine take memory that they keep:
    they are reported by ``ratio_first``, and warmed up past before anything else is measured.
    """
    model, _ = build_models(place, hidden=512, layers=8)
    config = bench_config(place, model, None, steps=1, bf16=False)
    reporter = Reporter()
    rows: list[dict[str, float]] = []
    with Session(config, reporter, StopRequest(reporter.say)) as session:
        parts = session.parts(
            model, config.reward.terms, lambda: bench_learners(config, model, None)
        )
        probe = [p.token_ids.tolist()[-PROBE_TOKENS:] for p in random_prompts()[:PROBE_SEQUENCES]]
        for version in range(1, 1 + WARM_UP_UPDATES + UPDATES_PER_REPEAT * repeats):
            rows.append(_time_update(parts, version, probe))
    ratios = [row["update"] / row["copy"] for row in rows]
    steady = rows[WARM_UP_UPDATES:]
    return {
        "ratio_to_copy": statistics.median(ratios[WARM_UP_UPDATES:]),
        "ratio_first": ratios[0],
        **{f"seconds_{part}": median_of(steady, part) for part in rows[0]},
        "updates": len(steady),
    }


def _time_update(parts: Parts, version: int, probe: list[list[int]]) -> dict[str, float]:
    """Seconds of one update and its parts, and of copying the same bytes into fresh memory."""
    started = time.perf_counter()
    update = parts.learners.export_weights(version, probe)
    exported = time.perf_counter()
    (confirmation,) = parts.rollouts.load(update)
    done = time.perf_counter()
    return {
        "update": done - started,
        "copy": _copy_seconds(ray.get(update.tensors)),
        "export": exported - started,
        "export_checksum": update.seconds_checksum,
        "export_probe": update.seconds_probe,
        "verify": confirmation.seconds_verify,
        "load": confirmation.seconds_load,
        "probe": confirmation.seconds_probe,
    }


def bench_start(place: Path, repeats: int) -> dict[str, Any]:
    """Seconds from starting every part of a PPO run to its first finished sample."""
    model, reward_model = build_models(place, hidden=256, layers=6)
    prompts = random_prompts()
    config = bench_config(place, model, reward_model, steps=1, bf16=False)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        reporter = Reporter()
        with Session(config, reporter, StopRequest(reporter.say)) as session:
            parts = session.parts(
                model, config.reward.terms, lambda: bench_learners(config, model, reward_model)
            )
            next(parts.rollouts.generate(prompts, config.sampling, run_seed=0, round_index=0))
            seconds.append(time.perf_counter() - started)
    return {"seconds_to_first_sample": statistics.median(seconds), "all": seconds}


def bench_scoring(place: Path, repeats: int) -> dict[str, Any]:
    """The reward service with a 5-million-parameter model against bare torch."""
    from cluster.bench_reward import bench_reward

    _, reward_model = build_models(place, hidden=256, layers=6)
    return bench_reward(reward_model, repeats)


def build_models(place: Path, *, hidden: int, layers: int) -> tuple[Path, Path]:
    """A random Llama with a tokenizer, and a random reward model of the same shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from actors.fingerprint import template_fingerprint
    from learner.tokenizer import train_tokenizer
    from reward_service.encoding import RewardHead

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.02,
        num_labels=1,
    )
    tokenizer = train_tokenizer(["benchmark"], 2048, context=512)
    model, reward_model = place / f"model-{hidden}", place / f"reward-{hidden}"
    LlamaForCausalLM(shape).save_pretrained(model)
    LlamaForSequenceClassification(shape).save_pretrained(reward_model)
    for directory in (model, reward_model):
        tokenizer.save_pretrained(directory)
    RewardHead(gain=1.0, bias=0.0, fingerprint=template_fingerprint(tokenizer)).save(reward_model)
    return model, reward_model


def random_prompts(count: int = PROMPTS, tokens: int = PROMPT_TOKENS) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            prompt_id=f"bench:{i}",
            token_ids=rng.integers(3, 259, tokens).astype(np.int32),
            text=f"benchmark {i}",
        )
        for i in range(count)
    ]


def run_steps(
    config: RunConfig, model: Path, reward_model: Path, prompts: list[Prompt]
) -> list[Mapping[str, float]]:
    """What each step of a run reports, with parts that are started for it."""
    assert config.ppo is not None
    reporter = Reporter()
    with Session(config, reporter, StopRequest(reporter.say)) as session:
        parts = session.parts(
            model, config.reward.terms, lambda: bench_learners(config, model, reward_model)
        )
        return take_steps(
            config.ppo,
            config.sampling,
            prompts=PromptStream(prompts, PROMPTS, seed=0),
            rollouts=parts.rollouts,
            reward=parts.reward,
            learners=parts.learners,
            seed=0,
            warn=reporter.warn,
        ).steps


def bench_config(
    place: Path, model: Path, reward_model: Path | None, *, steps: int, bf16: bool
) -> RunConfig:
    cores = len(os.sched_getaffinity(0))
    tiny = OptimizerConfig(learning_rate=1e-5, betas=(0.9, 0.999))
    terms = (RewardTerm(name="reward", model=str(reward_model)),) if reward_model else ()
    return RunConfig(
        run_dir=place / "run",
        model=str(model),
        sampling=SamplingConfig(max_new_tokens=NEW_TOKENS),
        rollout=RolloutConfig(engine=EngineConfig(max_num_seqs=PROMPTS, threads=cores)),
        reward=RewardConfig(
            terms=terms or (RewardTerm(name="none", function="reward_service.examples:new_words"),),
            service=RewardServiceConfig(port=0, threads=cores),
        ),
        learners=LearnersConfig(num_learners=1, threads=cores),
        ppo=PPOConfig(
            steps=steps,
            prompts_per_step=PROMPTS,
            epochs=4,
            minibatches=4,
            bf16=bf16,
            policy=tiny,
            critic=tiny,
        ),
    )


def bench_learners(config: RunConfig, model: Path, critic: Path | None) -> PPOLearners:
    assert config.ppo is not None
    return PPOLearners(
        config.ppo,
        config.learners,
        policy_dir=model,
        reference_dir=model,
        critic_dir=critic,
        temperature=1.0,
        total_steps=config.ppo.steps,
        seed=0,
    )


def _floor(place: Path, model: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The best bare generation and the best bare learning, each in a process of its own."""
    ids = [p.token_ids.tolist() for p in prompts]
    cores = len(os.sched_getaffinity(0))
    request = {"model": str(model), "prompts": ids, "new_tokens": NEW_TOKENS, "dtype": "float32"}
    generations = {
        threads: _bare("generate", place, request, threads) for threads in sorted({1, cores})
    }
    threads, best = min(generations.items(), key=lambda item: item[1]["seconds"])
    request = {"model": str(model), "prompts": ids, "responses": best["responses"]}
    learnings = {
        bf16: _bare("learn", place, request | {"bf16": bf16}, cores)["seconds"]
        for bf16 in ([False, True] if cpu_has_bfloat16() else [False])
    }
    bf16, learn = min(learnings.items(), key=lambda item: item[1])
    return {
        "generate": best["seconds"],
        "learn": learn,
        "settings": f"generation {threads} threads, learning {'bfloat16' if bf16 else 'float32'}",
    }


def _bare(what: str, place: Path, request: dict[str, Any], threads: int) -> dict[str, Any]:
    path = place / "request.json"
    path.write_text(json.dumps(request), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, "-m", "cluster.bench_floor", what, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        env=environment,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the floor ({what}) could not be measured: {done.stderr[-800:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _copy_seconds(tensors: Mapping[str, np.ndarray[Any, Any]]) -> float:
    """Copying tensors, one after the other, into memory that has never been touched."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    with mmap.mmap(-1, size) as memory:
        fresh = np.frombuffer(memory, np.uint8)
        started, at = time.perf_counter(), 0
        for tensor in tensors.values():
            fresh[at : at + tensor.nbytes] = tensor.reshape(-1).view(np.uint8)
            at += tensor.nbytes
        seconds = time.perf_counter() - started
        del fresh  # a mapping that is looked at cannot be closed
    return seconds


def median_of(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.median(step[name] for step in steps)

"""Kills runs at chosen points of the program and resumes them: ``python -m tests.kill_points DIR``.

What is killed is the real pipeline with its own loop, learner, reward, checkpoints and files; only
the engine is a small sampler of this file, so that a start costs half a second. Every run is a
fork of this process, which has imported everything and started nothing. Prints one JSON line for
each point: its name, and how the result differs from the run that nobody killed. With ``all`` as a
second argument, points that resemble others are tried as well.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.utils.tensorboard

import cluster.pipeline
import cluster.ppo_stage
from actors.config import SamplingConfig
from actors.trajectory import Prompt, Trajectory, sample_seed
from actors.weights import UpdateConfirmation, WeightUpdate, tensors_of
from cluster import checkpoint, step_lines
from cluster.config import load_config
from cluster.session import Parts
from learner import learner_state, supervised, training_state
from learner.group import PPOLearners
from learner.hf_directory import load_causal_lm, load_tokenizer
from learner.trainer import ModuleTrainer
from reward_service.model import RewardModel
from reward_service.rewards import FunctionReward, build_reward
from tests.conftest import make_llama
from tests.reward_service.conftest import write_reward_model
from tests.same_run import WORDS, differences, metrics_differences, write_config

EOS = 2


class SmallSampler:
    """Stands in for ``RolloutPool``: the same calls, one token at a time, arrivals in disorder."""

    def __init__(self, model_dir: Path) -> None:
        self._model = load_causal_lm(model_dir)
        self._tokenizer = load_tokenizer(model_dir)
        self._version = 0

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """All of them fit."""

    def load(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        if update.published:
            import ray

            update = replace(update, tensors=ray.get(update.tensors))
        tensors = tensors_of(update)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(tensors[name])
        self._version = update.version
        return [
            UpdateConfirmation(
                actor="small",
                version=update.version,
                probe_max_error=0.0,
                probe_mean_error=0.0,
                seconds_verify=0.0,
                seconds_load=0.0,
                seconds_probe=0.0,
            )
        ]

    @property
    def states(self) -> dict[str, str]:
        return {"small": "healthy"}

    def figures(self) -> dict[str, float]:
        return {"rollout/engines": 1, "recovery/engines_lost": 0, "recovery/samples_again": 0}

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        run_seed: int,
        round_index: int,
        busy: object = None,
        stop: object = None,
    ) -> Iterator[Trajectory]:
        wanted = [(p, i) for p in prompts for i in range(sampling.samples_per_prompt)]
        random.Random(os.urandom(8)).shuffle(wanted)
        for prompt, index in wanted:
            seed = sample_seed(run_seed, prompt.prompt_id, index, round_index)
            yield self._sample(prompt, index, seed, sampling.max_new_tokens)

    @torch.no_grad()
    def _sample(self, prompt: Prompt, index: int, seed: int, longest: int) -> Trajectory:
        generator = torch.Generator().manual_seed(seed)
        ids, logprobs = prompt.token_ids.tolist(), []
        while len(logprobs) < longest and (not logprobs or ids[-1] != EOS):
            row = torch.log_softmax(self._model(torch.tensor([ids])).logits[0, -1], -1)
            ids.append(int(torch.multinomial(row.exp(), 1, generator=generator)))
            logprobs.append(float(row[ids[-1]]))
        response = ids[len(prompt.token_ids) :]
        return Trajectory(
            prompt=prompt,
            sample_index=index,
            response_ids=np.array(response, np.int32),
            response_logprobs=np.array(logprobs, np.float32),
            policy_versions=np.full(len(response), self._version, np.int32),
            response_text=self._tokenizer.decode(response, skip_special_tokens=True),
            finish_reason="stop" if response[-1] == EOS else "length",
            seed=seed,
        )


class SmallSession:
    """Stands in for ``Session``: no Ray, nothing to end."""

    def __init__(self, config: Any, *_: Any) -> None:
        self._config = config

    def __enter__(self) -> SmallSession:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def parts(self, model: Path, terms: Sequence[Any], make_learners: Callable[[], Any]) -> Parts:
        scorers = {t.name: RewardModel.load(t.model) for t in terms if t.model is not None}
        return Parts(
            rollouts=SmallSampler(model),  # type: ignore[arg-type]
            reward=build_reward(self._config.reward, scorers),
            learners=make_learners(),
        )

    def score_references(self) -> dict[str, list[float]]:
        return {}

    def forget_weights(self) -> None:
        pass


# ---- where a run ends itself -------------------------------------------------------------------


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def before(owner: Any, name: str, when: Callable[..., bool]) -> Callable[[], None]:
    """Kill the process as ``owner.name`` is called for the first time that ``when`` is true."""

    def install() -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **options: Any) -> Any:
            if when(*args, **options):
                die()
            return original(*args, **options)

        setattr(owner, name, wrapped)

    return install


def nth(number: int) -> Callable[..., bool]:
    """True at the n-th call."""
    calls = iter(range(1, sys.maxsize))
    return lambda *_, **__: next(calls) == number


def torn_line() -> None:
    """Half of the seventh line of metrics or failures is written."""
    count = nth(7)
    original = step_lines.StepLines.append

    def append(self: Any, rows: Any) -> None:
        rows = list(rows)
        if rows and count():
            data = json.dumps(rows[0]).encode()
            self._file.write(data[: len(data) // 2])
            die()
        original(self, rows)

    step_lines.StepLines.append = append  # type: ignore[method-assign]


def full_disk() -> None:
    """No file may grow beyond what the moments of the second checkpoint need."""
    original, count = checkpoint.CheckpointStore.save, nth(2)

    def save(self: Any, *args: Any, **options: Any) -> Any:
        if count():
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        return original(self, *args, **options)

    checkpoint.CheckpointStore.save = save  # type: ignore[method-assign]


def torn_training_state() -> None:
    """A supervised stage is killed within its fourth save."""
    count = nth(4)
    original = training_state.save_file

    def save(tensors: Any, path: Path, **options: Any) -> None:
        if count():
            path.write_bytes(b"half a state")
            die()
        original(tensors, path, **options)

    training_state.save_file = save  # type: ignore[assignment]


POINTS: dict[str, Callable[[], None]] = {
    "while generating": before(SmallSampler, "_sample", nth(36)),
    "while scoring": before(FunctionReward, "_score_one", nth(28)),
    "in an optimizer step": before(ModuleTrainer, "_step", nth(27)),
    "within a line": torn_line,
    "before a checkpoint": before(checkpoint.CheckpointStore, "save", nth(2)),
    "within a checkpoint": before(learner_state, "save_file", nth(4)),
    "before a checkpoint is described": before(checkpoint, "_describe", nth(2)),
    "while a checkpoint is flushed": before(checkpoint, "_flush", nth(18)),
    # The best is the latest here, so that the third checkpoint ends the first one.
    "before old checkpoints go": before(checkpoint.CheckpointStore, "best", nth(2)),
    "while an old checkpoint goes": before(
        checkpoint.shutil, "rmtree", lambda path, **_: str(path).endswith(".deleted")
    ),
    "while the result is written": before(
        cluster.ppo_stage.shutil, "rmtree", lambda path, **_: Path(path).name == "final"
    ),
    "on a full disk": full_disk,
}

KILLED_AHEAD = ("while scoring", "in an optimizer step", "within a checkpoint")
"""Points at which runs are killed that generate the next step while this one is learned."""

SUPERVISED: dict[str, Callable[[], None]] = {
    "in a step": before(supervised._Loop, "_train_step", nth(5)),
    "within a save": torn_training_state,
    "while the model is written": before(supervised, "remove_state", nth(1)),
}


RESEMBLE_OTHERS = {
    "before a checkpoint is described",
    "while a checkpoint is flushed",
    "before old checkpoints go",
    "pretrain, in a step",
    "pretrain, while the model is written",
    "reward, in a step",
    "reward, while the model is written",
}


# ---- running -----------------------------------------------------------------------------------


def forked(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a child; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 2)
                work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_of(config: Path) -> str:
    """The end of a run's log: enough for a whole chain of tracebacks."""
    return config.with_suffix(".log").read_text()[-20_000:]


def run(config: Path, stage: Any, *, resume: bool, kill: Callable[[], None] | None = None) -> int:
    def work() -> None:
        cluster.pipeline.Session = SmallSession  # type: ignore[misc, assignment]
        if kill is not None:
            kill()
        pipeline = cluster.pipeline.Pipeline(load_config(config), resume=resume, overwrite=False)
        pipeline.run(only=stage)

    return forked(work, config.with_suffix(".log"))


def damage(run_dir: Path) -> None:
    """Flip one bit in the middle of the newest checkpoint's moments."""
    newest = max((run_dir / "ppo" / "checkpoints").glob("step_*"))
    file = newest / "optimizers.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def ppo_points(place: Path, skip: set[str]) -> Iterator[tuple[str, list[str]]]:
    model = make_llama(place / "model", tied=True)
    scorer = write_reward_model(model, place / "scorer", seed=1, gain=1.0, bias=0.0)
    terms = [
        {"name": "picky", "function": "tests.same_run:picky"},
        {"name": "scorer", "model": str(scorer), "weight": 0.1},
    ]

    def configure(name: str, *, staleness: int = 0, **cluster: Any) -> Path:
        reward = {"terms": terms, "retry": {"pause_s": 0.0}}
        small = {"steps": 6, "checkpoint_every": 2, "prompts_per_step": 4}
        ppo = OPTIONS | small | {"max_staleness": staleness}
        short = {"max_new_tokens": 4}
        sections = {"reward": reward, "ppo": ppo, "sampling": short, "cluster": cluster}
        return write_config(place, place / name, model, **sections)

    def killed(name: str, number: int, staleness: int) -> list[str]:
        prefix = "ahead_" if staleness else ""
        config = configure(f"{prefix}run{number}", staleness=staleness)
        wrong = []
        code = run(config, "ppo", resume=False, kill=POINTS[name])
        if code != (1 if name == "on a full disk" else -signal.SIGKILL):
            wrong.append(f"the run ended with {code}")
        if run(config, "ppo", resume=True):
            wrong.append(end_of(config))
        return wrong + differences(place / f"{prefix}reference", place / config.stem)

    for staleness, name in enumerate(("reference", "ahead_reference")):
        reference = configure(name, staleness=staleness)
        if code := run(reference, "ppo", resume=False):
            raise RuntimeError(f"{reference.with_suffix('.log').read_text()}\nexit code {code}")
    for number, name in enumerate(POINTS):
        if name not in skip:
            yield name, killed(name, number, staleness=0)
        if name in KILLED_AHEAD:
            yield f"generated ahead, {name}", killed(name, number, staleness=1)
    yield "a flipped bit, twice killed", twice(configure("twice"), place)
    yield "generated ahead, asked to stop", stopped(configure("stopped", staleness=1), place)
    storage = f"file://{place}/copy"
    yield "killed, with its directory lost", moved(configure("moved", storage=storage), place)


OPTIONS = {
    "keep_checkpoints": 2, "keep_best": "samples/submitted",
    "epochs": 2, "minibatches": 2, "tokens_per_micro_batch": 64,
    "kl": {"adaptive": True, "coef": 0.1},
    "policy": {"learning_rate": 3e-3, "warmup_share": 0.2},
    "critic": {"learning_rate": 3e-3, "schedule": "cosine"},
}  # fmt: skip


def stop_in_the_third_step() -> None:
    """Somebody asks for it while the learners work, between two checkpoints."""
    original, count, asked = PPOLearners.update, nth(3), []

    def update(self: Any, batch: Any) -> Any:
        if count():
            asked.append(True)
        return original(self, batch)

    PPOLearners.update = update  # type: ignore[method-assign]
    cluster.pipeline.StopRequest.__call__ = lambda _: bool(asked)  # type: ignore[method-assign]


def stopped(config: Path, place: Path) -> list[str]:
    """It saves what it has, the samples of the next step among it, and goes on from there."""
    ended = [run(config, "ppo", resume=False, kill=stop_in_the_third_step)]
    held = place / config.stem / "ppo" / "checkpoints" / "step_000003" / "ahead.json"
    wrong = [] if held.exists() else [f"no {held.name} at step 3: {end_of(config)}"]
    ended.append(run(config, "ppo", resume=True))
    if ended != [1, 0] or "PPO after step 3" not in end_of(config):
        wrong.append(f"the runs ended with {ended}: {end_of(config)}")
    return wrong + differences(place / "ahead_reference", place / config.stem)


def twice(config: Path, place: Path) -> list[str]:
    """Killed in step 5, resumed from a damaged checkpoint, killed in what is done again."""
    run_dir = place / config.stem
    ended = [run(config, "ppo", resume=False, kill=before(ModuleTrainer, "_step", nth(37)))]
    damage(run_dir)
    ended.append(run(config, "ppo", resume=True, kill=before(ModuleTrainer, "_step", nth(13))))
    ended.append(run(config, "ppo", resume=True))
    log = end_of(config)
    wrong = [] if ended == [-9, -9, 0] else [f"the runs ended with {ended}: {log}"]
    if "is damaged (optimizers.safetensors does not match its checksum)" not in log:
        wrong.append(f"the flipped bit was not reported: {log}")
    return wrong + differences(place / "reference", run_dir)


def moved(config: Path, place: Path) -> list[str]:
    """Killed in step 5, on a machine that takes its disk along; the copy is all there is."""
    run_dir = place / config.stem
    ended = [run(config, "ppo", resume=False, kill=before(ModuleTrainer, "_step", nth(37)))]
    shutil.rmtree(run_dir)
    ended.append(run(config, "ppo", resume=True))
    log = config.with_suffix(".log").read_text()
    wrong = [] if ended == [-9, 0] else [f"the runs ended with {ended}: {log[-2000:]}"]
    if "going on after step 4" not in log:
        wrong.append(f"it began anew: {log[-2000:]}")
    wrong += differences(place / "reference", run_dir)
    return wrong + [f"copy: {text}" for text in differences(run_dir, place / "copy")]


def supervised_points(place: Path, skip: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Base model, fine-tuning and reward model, each from its own data."""
    model = make_llama(place / "start", tied=True)
    texts = [" ".join(WORDS[(i * 3 + j * j) % 8] for j in range(4 + i % 9)) for i in range(48)]
    rows = [{"id": f"r{i}", "text": t, "prompt": t[:9], "response": t[9:], "chosen": t[9:],
             "rejected": texts[i - 1]} for i, t in enumerate(texts)]  # fmt: skip
    data = place / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"tokens_per_step": 96, "evaluations": 2, "checkpoint_seconds": 1e-6, "threads": 1}
    small = {"hidden_size": 32, "layers": 1, "vocab_size": 300, "intermediate_size": 32}
    sections: dict[str, dict[str, Any]] = {
        "pretrain": {"pretrain": common | small},
        "sft": {"sft": common},
        "reward": {"reward_model": common, "collect": {"source": "preferences", "pairs": 40}},
    }
    outputs = {"pretrain": "base", "sft": "sft", "reward": "reward_model"}
    for stage, section in sections.items():
        sources = dict.fromkeys(("corpus", "sft", "preferences"), str(data))

        def configure(
            name: str, stage: str = stage, section: Any = section, sources: Any = sources
        ) -> Path:
            run_dir = place / f"{stage}_{name}"
            path = write_config(place, run_dir, model, data=sources, **section)
            if stage == "pretrain":
                path.write_text(path.read_text().replace(f"model: {model}\n", ""))
            elif stage == "reward" and run(path, "collect", resume=False):
                raise RuntimeError(path.with_suffix(".log").read_text())
            return path

        reference = configure("reference")
        if run(reference, stage, resume=False):
            raise RuntimeError(reference.with_suffix(".log").read_text())
        for name, kill in SUPERVISED.items():
            if f"{stage}, {name}" in skip:
                continue
            config = configure(name.replace(" ", "_"))
            ended = [run(config, stage, resume=False, kill=kill), run(config, stage, resume=True)]
            wrong = [] if ended == [-9, 0] else [end_of(config)]
            a, b = (place / c.stem / outputs[stage] for c in (reference, config))
            if (a / "model.safetensors").read_bytes() != (b / "model.safetensors").read_bytes():
                wrong.append("model.safetensors differs")
            yield f"{stage}, {name}", wrong + metrics_differences(a, b)


def main(place: Path, skip: set[str]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for part, points in (("ppo", ppo_points), ("supervised", supervised_points)):
        for name, wrong in points(place / part, skip):
            print(json.dumps([name, wrong]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), set() if "all" in sys.argv[2:] else RESEMBLE_OTHERS)

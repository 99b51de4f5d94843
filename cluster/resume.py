"""Whether a run that is resumed is still the same run.

A resumed run ends with the same bits as one never interrupted as long as it is given the same
configuration, models and packages. What has changed since its checkpoint was written is said:
settings may be changed on purpose, so they are a warning with the old and the new value; other
models under the same name are an error, because nobody means that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash

from cluster.checkpoint import Checkpoint, package_versions
from cluster.config import RunConfig

WITHOUT_EFFECT = (
    "run_dir", "cluster.*", "evaluate.*", "loop*",
    # Stages that were finished before PPO began, and their data.
    "pretrain*", "sft*", "collect*", "reward_model*",
    "data.corpus", "data.sft", "data.preferences", "data.response_field", "data.text_field",
    "data.chosen_field", "data.rejected_field", "data.label_field",
    # When to write, wait, try again and give up.
    "ppo.checkpoint_every", "ppo.keep_*", "ppo.min_trained_share", "ppo.max_skipped_steps",
    "ppo.drift*",
    "rollout.*_timeout_s", "rollout.max_retries", "rollout.retry_pause_s",
    "rollout.probe_tolerance", "rollout.num_cpus_per_actor", "rollout.resources_per_actor*",
    "rollout.engine.gpu_memory*", "learners.resources_per_learner*",
    "rollout.engine.weight_transfer", "learners.*timeout_s", "learners.max_restarts",
    "learners.num_cpus_per_learner",
    "reward.retry.*", "reward.service.host", "reward.service.port",
    "reward.service.num_replicas", "reward.service.num_cpus_per_replica",
    "reward.service.resources_per_replica*",
    "reward.service.batch_wait_s", "reward.service.max_*", "reward.service.*timeout_s",
)  # fmt: skip
"""Settings of which the result of PPO does not depend on a single bit."""

ROUNDING_ONLY = (
    "rollout.*_actors", "rollout.num_gpus_per_actor",
    "rollout.engine.dtype", "rollout.engine.max_num_seqs", "rollout.engine.threads",
    "rollout.engine.kv_cache_gib", "rollout.engine.enforce_eager",
    "rollout.engine.tensor_parallel_size", "learners.*", "ppo.tokens_per_micro_batch",
    "reward.service.*",
)  # fmt: skip
"""Settings that change the device, or the order in which numbers are added up, and nothing else."""


def differences(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Sentences about settings and packages that keep the bits from being the same.

    More ``ppo.steps`` are no difference where the learning rates are constant, unless samples may
    be stale and the run had come to its end. Where rates decay, they decay towards the new end
    from here on.
    """
    changed = _changed(checkpoint, config)
    steps = changed.pop("ppo.steps", None)
    others = changed_results(checkpoint, config)
    rounding = [text for key, text in changed.items() if _matches(key, ROUNDING_ONLY)]
    packages = [
        f"{name} {checkpoint.versions.get(name)} -> {version}"
        for name, version in package_versions().items()
        if checkpoint.versions.get(name) != version
    ]
    found = []
    if others:
        found.append(f"settings that change the result have changed: {', '.join(others)}")
    if steps and not _constant(config):
        found.append(f"the learning rates now decay towards another last step: {steps}")
    elif steps and _ended_without_more(checkpoint, config):
        found.append(f"nothing was generated ahead of what was the last step: {steps}")
    if rounding:
        found.append(f"settings that change how numbers are rounded: {', '.join(rounding)}")
    if packages:
        found.append(f"packages that may round otherwise: {', '.join(packages)}")
    return found


def changed_results(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Settings, with both values, by which samples or what is learned from them are others now;
    the number of steps apart."""
    changed = _changed(checkpoint, config)
    changed.pop("ppo.steps", None)
    return [text for key, text in changed.items() if not _matches(key, ROUNDING_ONLY)]


def _changed(checkpoint: Checkpoint, config: RunConfig) -> dict[str, str]:
    old, new = dict(_flat(checkpoint.config)), dict(_flat(as_json(config)))
    return {
        key: f"{key} {old.get(key, 'unset')!r} -> {new.get(key, 'unset')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _matches(key, WITHOUT_EFFECT)
    }


def _ended_without_more(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Whether the samples of a next step would be there, had the run been meant to have one."""
    assert config.ppo is not None
    last = checkpoint.config["ppo"]["steps"]
    return bool(config.ppo.max_staleness and last <= checkpoint.step < config.ppo.steps)


def input_digests(config: RunConfig, reward_models: Mapping[str, Path]) -> dict[str, str]:
    """A digest of every model that PPO reads, by what it is to the run."""
    models = {"policy model": config.policy_model} | {
        f"reward model {name!r}": path for name, path in reward_models.items()
    }
    for name, path in models.items():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"the {name} of this run is not there: {path} has no config.json. Run the stage"
                " that makes it first (`rlhf sft`, `rlhf reward`), or name one that is there:"
                " model=DIR with pretrain=null sft=null, or"
                " 'reward.terms=[{name: quality, model: DIR}]'"
            )
    return {name: _digest(path) for name, path in models.items()}


def check_inputs(checkpoint: Checkpoint, now: Mapping[str, str]) -> None:
    """Raises ValueError when a model was replaced by another one under the same name."""
    before: Mapping[str, str] = checkpoint.state["inputs"]
    replaced = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if replaced:
        raise ValueError(
            f"the {' and the '.join(replaced)} of this run have other weights than when its "
            f"checkpoint {checkpoint.path} was written: put the old ones back, or start anew with "
            "--overwrite"
        )


def as_json(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _digest(model_dir: Path) -> str:
    digest = xxhash.xxh3_128()
    for file in [model_dir / "config.json", *sorted(model_dir.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return str(digest.hexdigest())


def _constant(config: RunConfig) -> bool:
    assert config.ppo is not None
    return all(
        options.schedule == "constant" and options.warmup_share == 0
        for options in (config.ppo.policy, config.ppo.critic)
    )


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of every leaf."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{number}")
    else:
        yield key, value

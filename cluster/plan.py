"""``rlhf plan``: will a run fit, how long will a step take, and who should be where.

Memory is estimated from the model's shape (:mod:`cluster.memory`), time from constants that were
measured on one machine (:mod:`cluster.cost_model`). The cluster is made of equal devices: its
machines, or the accelerators in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import RunConfig, load_config, override_config
from cluster.cost_model import (
    Calibration,
    Layout,
    Prediction,
    StepShape,
    default_path,
    read_calibration,
)
from cluster.memory import (
    BYTES,
    ModelShape,
    ProcessMemory,
    kv_cache_gib,
    longest_sequence,
    model_shape,
    process_memory,
    total_memory_gib,
)
from cluster.presets import quickstart_config

USABLE = 0.9
"""Share of a device's memory that may be planned with: allocators need room."""


@dataclass(frozen=True, kw_only=True)
class ClusterShape:
    """Equal machines. Memory is what each of them, and each accelerator, has in GiB."""

    nodes: int = 1
    gpus_per_node: int = 0
    memory_gib: float
    gpu_memory_gib: float = 80.0
    network_gbit: float = 10.0

    @property
    def devices(self) -> int:
        """What engines and learners compute on: accelerators, or machines that have none."""
        return self.nodes * (self.gpus_per_node or 1)

    @property
    def device_gib(self) -> float:
        return self.gpu_memory_gib if self.gpus_per_node else self.memory_gib

    @property
    def network_bytes_per_s(self) -> float:
        return self.network_gbit * 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Engines and learners on devices: ``together`` they take turns on the same ones.

    Attributes:
        used_gib: Of the fullest device.
        seconds: Of a step, where there are constants.
    """

    how: Literal["together", "apart"]
    engines: int
    learners: int
    used_gib: float
    fits: bool
    seconds: float | None = None

    def describe(self) -> str:
        where = "on the same devices, by turns" if self.how == "together" else "on devices apart"
        return f"{self.engines} engines and {self.learners} learners {where}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked, and what comes of it."""

    model: ModelShape
    cluster: ClusterShape
    step: StepShape
    processes: tuple[ProcessMemory, ...]
    cache_gib: float
    cache_needed_gib: float
    configured: Placement
    prediction: Prediction | None
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]
    error: float | None

    @property
    def suggested(self) -> Placement | None:
        """The fastest placement that fits; without constants the one with least memory."""
        fitting = [one for one in self.placements if one.fits]
        return min(fitting, key=lambda one: (one.seconds or 0.0, one.used_gib), default=None)


def plan_from_options(
    *,
    config: Path | None,
    model: Path | None,
    nodes: int,
    gpus_per_node: int,
    memory_gib: float | None,
    gpu_memory_gib: float,
    network_gbit: float,
    prompt_tokens: float | None,
    response_tokens: float | None,
    calibration: Path | None,
    overrides: Sequence[str],
) -> Plan:
    """A plan from what the command line was given.

    Raises:
        ValueError: A setting is wrong; FileNotFoundError: a file is missing that was asked for.
    """
    if config is not None:
        run = load_config(config, overrides)
    else:
        preset = quickstart_config(run_dir=Path("runs/plan"))
        run = override_config(preset, overrides, "the command line")
    if model is not None:
        run = run.model_copy(update={"model": str(model), "pretrain": None, "sft": None})
    path = calibration or default_path()
    known = read_calibration(path) if calibration or path.is_file() else None
    cluster = ClusterShape(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        memory_gib=memory_gib or total_memory_gib(),
        gpu_memory_gib=gpu_memory_gib,
        network_gbit=network_gbit,
    )
    return make_plan(
        run, cluster, known, prompt_tokens=prompt_tokens, response_tokens=response_tokens
    )


def make_plan(
    config: RunConfig,
    cluster: ClusterShape,
    calibration: Calibration | None,
    *,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> Plan:
    """Plan a run of ``config`` on ``cluster``.

    Args:
        prompt_tokens, response_tokens: Means; by default the longest that the configuration
            allows, which is what memory is planned for in any case.

    Raises:
        ValueError: The configuration has no PPO section, or a mean is beyond its limit.
        FileNotFoundError: The model is not a local directory.
    """
    model = model_shape(config)
    step = step_shape(config, model, prompt_tokens, response_tokens)
    processes = tuple(process_memory(as_placed(config, cluster), model))
    engines, learners = config.rollout.num_actors, max(1, config.learners.num_learners)
    layout = Layout(
        engines=engines,
        learners=learners,
        engines_per_device=-(-engines // cluster.devices),
        network_bytes_per_s=cluster.network_bytes_per_s,
    )
    prediction = calibration.predict(step, layout) if calibration else None
    needed = kv_cache_gib(config, model)
    on_gpu = cluster.gpus_per_node > 0
    cache = needed if on_gpu else config.rollout.engine.kv_cache_gib
    return Plan(
        model=model,
        cluster=cluster,
        step=step,
        processes=processes,
        cache_gib=cache,
        cache_needed_gib=needed,
        configured=_as_configured(config, processes, cluster, prediction),
        prediction=prediction,
        placements=tuple(
            placements(processes, cluster, step, calibration, overlap=overlaps(config))
        ),
        notes=tuple(_notes(config, cluster, calibration, needed, cache)),
        error=calibration.error if calibration else None,
    )


def step_shape(
    config: RunConfig,
    model: ModelShape,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> StepShape:
    """What a step of a configuration has to do."""
    ppo = config.ppo
    if ppo is None:
        raise ValueError("the configuration has no `ppo` section: a plan is of PPO steps")
    longest = config.sampling.max_new_tokens
    prompt = config.data.max_prompt_tokens if prompt_tokens is None else prompt_tokens
    response = longest if response_tokens is None else response_tokens
    if response > longest:
        raise ValueError(
            f"a mean response of {response:g} tokens is beyond sampling.max_new_tokens {longest}"
        )
    if prompt > config.data.max_prompt_tokens:
        raise ValueError(
            f"a mean prompt of {prompt:g} tokens is beyond data.max_prompt_tokens"
            f" {config.data.max_prompt_tokens}"
        )
    scored = any(term.members for term in config.reward.terms) or not config.reward.terms
    return StepShape(
        model=model,
        samples=ppo.prompts_per_step * config.sampling.samples_per_prompt,
        prompt_tokens=prompt,
        response_tokens=response,
        longest_response=longest,
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        trained_models=2 if ppo.has_critic else 1,
        scored=scored,
        weight_bytes_each=BYTES[config.rollout.engine.dtype],
        sequences_at_once=config.rollout.engine.max_num_seqs,
        tokens_per_micro_batch=ppo.tokens_per_micro_batch,
    )


def as_placed(config: RunConfig, cluster: ClusterShape) -> RunConfig:
    """The configuration with a whole accelerator for every process, where there are some."""
    if not cluster.gpus_per_node:
        return config
    rollout = config.rollout.model_copy(update={"num_gpus_per_actor": 1.0})
    learners = config.learners.model_copy(update={"num_gpus_per_learner": 1.0})
    return config.model_copy(update={"rollout": rollout, "learners": learners})


def overlaps(config: RunConfig) -> bool:
    """Whether the next step is generated while this one is learned."""
    return config.ppo is not None and config.ppo.max_staleness > 0


def _seconds(
    prediction: Prediction | None, how: Literal["together", "apart"], *, overlap: bool
) -> float | None:
    """Of a step; those that share their devices gain nothing from working at the same time."""
    if prediction is None:
        return None
    return prediction.overlapped if overlap and how == "apart" else prediction.total


def placements(
    processes: Sequence[ProcessMemory],
    cluster: ClusterShape,
    step: StepShape,
    calibration: Calibration | None,
    *,
    overlap: bool = False,
) -> list[Placement]:
    """Ways to use all devices, the fastest first: all of them by turns, or shared out."""
    total = cluster.devices
    splits: list[tuple[Literal["together", "apart"], int, int]] = [("together", total, total)]
    learners = 1
    while learners < total:
        splits.append(("apart", total - learners, learners))
        learners *= 2
    found = []
    for how, engines, learners in splits:
        used = _fullest(processes, cluster, together=how == "together")
        layout = Layout(
            engines=engines, learners=learners, network_bytes_per_s=cluster.network_bytes_per_s
        )
        found.append(
            Placement(
                how=how,
                engines=engines,
                learners=learners,
                used_gib=used,
                fits=used <= USABLE * cluster.device_gib,
                seconds=_seconds(
                    calibration.predict(step, layout) if calibration else None,
                    how,
                    overlap=overlap,
                ),
            )
        )
    return sorted(found, key=lambda one: (not one.fits, one.seconds or 0.0, one.used_gib))


def _fullest(processes: Sequence[ProcessMemory], cluster: ClusterShape, *, together: bool) -> float:
    """GiB on the fullest device, with one process of a kind on each at most."""
    each = _each(processes, cluster)
    shared = each["engines"] + each["learners"]
    used = shared if together else max(each["engines"], each["learners"])
    # Without accelerators the head shares its memory with the driver and the reward service.
    others = 0.0 if cluster.gpus_per_node else each["Ray and driver"] + each["reward service"]
    return used + others


def _each(processes: Sequence[ProcessMemory], cluster: ClusterShape) -> dict[str, float]:
    """GiB of one process by kind; all of the reward service and of the driver."""
    found: dict[str, float] = {}
    for one in processes:
        gib = one.device_gib if cluster.gpus_per_node else one.host_gib
        if one.kind in ("engines", "learners"):
            found[one.kind] = gib
        else:
            found[one.kind] = found.get(one.kind, 0.0) + one.count * gib
    return found


def _as_configured(
    config: RunConfig,
    processes: Sequence[ProcessMemory],
    cluster: ClusterShape,
    prediction: Prediction | None,
) -> Placement:
    """The configuration's own numbers, spread evenly over the devices."""
    engines, learners = config.rollout.num_actors, max(1, config.learners.num_learners)
    each = _each(processes, cluster)
    devices = cluster.devices
    together = engines + learners > devices
    per_device = -(-engines // devices), -(-learners // devices)
    used = per_device[0] * each["engines"] + per_device[1] * each["learners"]
    if not together:
        used = max(each["engines"], each["learners"])
    if not cluster.gpus_per_node:
        used += each["Ray and driver"] + each["reward service"]
    how: Literal["together", "apart"] = "together" if together else "apart"
    return Placement(
        how=how,
        engines=engines,
        learners=learners,
        used_gib=used,
        fits=used <= USABLE * cluster.device_gib,
        seconds=_seconds(prediction, how, overlap=overlaps(config)),
    )


def _notes(
    config: RunConfig,
    cluster: ClusterShape,
    calibration: Calibration | None,
    needed: float,
    cache: float,
) -> list[str]:
    notes = []
    if cache < needed:
        notes.append(
            f"the KV cache of an engine holds {cache / needed:.0%} of"
            f" {config.rollout.engine.max_num_seqs} sequences of {longest_sequence(config)} tokens:"
            " vLLM will pause some of them; raise rollout.engine.kv_cache_gib"
        )
    if calibration is None:
        notes.append("no seconds: measure this machine's constants with `rlhf bench plan`")
        return notes
    assert config.ppo is not None
    if calibration.bf16 != config.ppo.bf16:
        notes.append(
            f"the constants were measured with bf16={calibration.bf16}, the configuration has"
            f" ppo.bf16={config.ppo.bf16}"
        )
    if cluster.devices > 1:
        notes.append(
            f"more than one device was not measured: the network is taken as"
            f" {cluster.network_gbit:g} Gbit/s, fully used"
        )
    return notes

"""Where the design stops scaling: a PPO step simulated on up to thousands of nodes.

The cluster grows and each node keeps its share of the samples (weak scaling), so that without any
loss a step would take as long on a thousand nodes as on one. What makes it longer is drawn at
random, step by step: stragglers, failures, and what goes through one process or one network link
whatever the number of nodes. The assumptions are the fields of :class:`Assumptions`; docs/plan.md
says where their defaults come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
GIB = 2**30

CAUSES = ("work", "stragglers", "driver", "exchange", "broadcast", "failures")
"""What the time of a step goes to. ``exchange`` is between learners, ``broadcast`` of weights."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a step is made of, and what goes wrong. Seconds, bytes and GiB.

    Attributes:
        samples_per_node: Of a step.
        sample_seconds: Median time of one sample; samples of a node are generated side by side.
        sample_sigma: Of the logarithm of a sample's time: lengths differ that much.
        longest_over_median: Sampling stops at so many times the median (``max_new_tokens``).
        node_sigma: Of the logarithm of a node's speed, anew in each step.
        learner_share: Of the nodes; the others generate.
        learn_seconds: Of a learner's own share of a step, without the others.
        optimizer_steps: Exchanges of gradients in a step.
        weight_gib: Of the policy as the engines hold it.
        gradient_gib: Of what learners exchange in one optimizer step.
        network_gib_per_s: Of one node.
        hop_seconds: Of a message between two nodes.
        load_seconds: Verifying and loading an update, in every engine at once.
        driver_seconds_per_sample: What the one driver does with a sample while others are still
            generated.
        driver_serial_seconds_per_sample: What it does when all are there: accounts, batch, metrics.
        learner_seconds_per_sample: What every learner does for each sample of the whole batch,
            since every learner gets all of it.
        sample_bytes: Of a sample in the batch that goes to every learner.
        node_mtbf_hours: Mean time between failures of one node.
        engine_restart_seconds: Until a lost engine serves again.
        learner_restart_seconds: Until lost learners are at their last checkpoint again.
        checkpoint_every: Steps; on average half of them are done again when a learner is lost.
    """

    samples_per_node: int = 32
    sample_seconds: float = 30.0
    sample_sigma: float = 0.6
    longest_over_median: float = 4.0
    node_sigma: float = 0.03
    learner_share: float = 0.25
    learn_seconds: float = 30.0
    optimizer_steps: int = 8
    weight_gib: float = 14.0
    gradient_gib: float = 28.0
    network_gib_per_s: float = 40.0
    hop_seconds: float = 2e-5
    load_seconds: float = 2.0
    driver_seconds_per_sample: float = 1e-3
    driver_serial_seconds_per_sample: float = 1e-4
    learner_seconds_per_sample: float = 2e-5
    sample_bytes: float = 1e4
    node_mtbf_hours: float = 6_300.0
    engine_restart_seconds: float = 60.0
    learner_restart_seconds: float = 180.0
    checkpoint_every: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.learner_share < 1:
            raise ValueError(f"learner_share is {self.learner_share}, between 0 and 1 is possible")
        if self.samples_per_node < 1 or self.node_mtbf_hours <= 0:
            raise ValueError("a node needs at least one sample, and a time between failures > 0")


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Simulated steps on each number of nodes.

    Attributes:
        nodes: ``[N]``.
        seconds: ``[N, S]`` of each simulated step.
        causes: ``[N, C]`` mean seconds of a step by cause, in the order of ``CAUSES``.
        samples: ``[N]`` of a step.
    """

    nodes: Array
    seconds: Array
    causes: Array
    samples: Array

    @property
    def throughput(self) -> Array:
        """``[N]`` samples a second."""
        return np.asarray(self.samples / self.seconds.mean(axis=1), dtype=np.float64)

    @property
    def efficiency(self) -> Array:
        """``[N]`` samples a second and node, over those of the smallest cluster."""
        each = self.throughput / self.nodes
        return np.asarray(each / each[0], dtype=np.float64)

    def half(self) -> tuple[int, str] | None:
        """The first number of nodes at which half of the throughput is lost, and what has grown
        most by then; ``None`` when that never is."""
        below = np.flatnonzero(self.efficiency < 0.5)
        if not len(below):
            return None
        at = int(below[0])
        grown = self.causes[at] - self.causes[0]
        return int(self.nodes[at]), CAUSES[int(np.argmax(grown))]


def default_nodes(largest: int = 8192) -> list[int]:
    """4, 8, 16, ...: the smallest cluster with both kinds of nodes, doubled."""
    return [2**k for k in range(2, int(math.log2(largest)) + 1)]


def simulate(
    assumptions: Assumptions, nodes: Sequence[int], *, steps: int = 2000, seed: int = 0
) -> Scaling:
    """Simulate ``steps`` steps on every number of nodes.

    Raises:
        ValueError: A cluster of fewer than two nodes, which cannot hold both kinds.
    """
    if min(nodes) < 2:
        raise ValueError(f"a cluster of {min(nodes)} nodes has no room for engines and learners")
    rng = np.random.default_rng(seed)
    found = [_simulate_one(assumptions, n, steps, rng) for n in nodes]
    return Scaling(
        nodes=np.array(nodes, dtype=np.float64),
        seconds=np.stack([parts.sum(axis=0) for parts in found]),
        causes=np.stack([parts.mean(axis=1) for parts in found]),
        samples=np.array([n * assumptions.samples_per_node for n in nodes], dtype=np.float64),
    )


def _simulate_one(a: Assumptions, nodes: int, steps: int, rng: np.random.Generator) -> Array:
    """``[C, S]`` seconds of every step by cause."""
    learners = max(1, round(a.learner_share * nodes))
    engines = nodes - learners
    samples = nodes * a.samples_per_node
    # Nobody waits for anybody: the work of the mean sample and of the learners' own share. With
    # as many samples a node whatever their number, both are the same on every cluster.
    mean_sample = _mean_of_capped(a)
    work = np.full(steps, mean_sample + a.learn_seconds)
    generated = _slowest(a, samples, steps, rng) * _slowest_node(a, engines, steps, rng)
    learned = a.learn_seconds * _slowest_node(a, learners, steps, rng)
    stragglers = np.maximum(generated + learned - work, 0.0)
    # The driver takes samples in while others are generated: only what is beyond that is waited.
    taken_in = samples * a.driver_seconds_per_sample
    driver = np.maximum(taken_in - generated, 0.0) + samples * a.driver_serial_seconds_per_sample
    exchange = np.full(steps, _exchange(a, learners, samples))
    broadcast = np.full(steps, _broadcast(a, engines))
    undisturbed = work + stragglers + driver + exchange + broadcast
    failures = _failures(a, engines, learners, undisturbed, mean_sample, rng)
    return np.stack([work, stragglers, driver, exchange, broadcast, failures])


def _mean_of_capped(a: Assumptions) -> float:
    """Mean of a log-normal time that is cut off, in closed form."""
    sigma, cap = a.sample_sigma, a.longest_over_median
    if sigma == 0:
        return a.sample_seconds * min(1.0, cap)
    edge = math.log(cap) / sigma
    below = math.exp(sigma**2 / 2) * _normal(edge - sigma)
    return a.sample_seconds * (below + cap * (1 - _normal(edge)))


def _normal(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def _slowest(a: Assumptions, samples: int, steps: int, rng: np.random.Generator) -> Array:
    """``[S]`` time of the last of ``samples``."""
    factors = np.exp(a.sample_sigma * _largest_normal(samples, steps, rng))
    return np.asarray(a.sample_seconds * np.minimum(factors, a.longest_over_median))


def _slowest_node(a: Assumptions, nodes: int, steps: int, rng: np.random.Generator) -> Array:
    """``[S]`` by which factor the slowest of the nodes is slower than the median."""
    slowest = np.maximum(_largest_normal(nodes, steps, rng), 0.0)
    return np.asarray(np.exp(a.node_sigma * slowest))


def _largest_normal(count: int, steps: int, rng: np.random.Generator) -> Array:
    """``[S]`` largest of ``count`` standard normal draws, from one uniform draw each.

    The largest is below x with probability ``Phi(x)**count``. Written by the upper tail, where
    ``Phi`` itself is 1 to the last digit.
    """
    from scipy.special import ndtri

    tail = -np.expm1(np.log(rng.uniform(size=steps)) / count)
    return np.asarray(-ndtri(tail), dtype=np.float64)


def _exchange(a: Assumptions, learners: int, samples: int) -> float:
    """Gradients go round a ring in every optimizer step; every learner gets the whole batch."""
    ring = 2 * (learners - 1) / learners * a.gradient_gib / a.network_gib_per_s
    hops = 2 * (learners - 1) * a.hop_seconds
    batch = _doublings(learners) * samples * a.sample_bytes / GIB / a.network_gib_per_s
    return a.optimizer_steps * (ring + hops) + batch + samples * a.learner_seconds_per_sample


def _broadcast(a: Assumptions, engines: int) -> float:
    """Who has the weights passes them on: the number of nodes that have them doubles each time."""
    return (
        _doublings(engines) * (a.weight_gib / a.network_gib_per_s + a.hop_seconds) + a.load_seconds
    )


def _doublings(nodes: int) -> int:
    """Until one that has something has given it to ``nodes`` others, each of which passes it on."""
    return math.ceil(math.log2(nodes + 1))


def _failures(
    a: Assumptions,
    engines: int,
    learners: int,
    undisturbed: Array,
    sample_seconds: float,
    rng: np.random.Generator,
) -> Array:
    """``[S]`` seconds lost; times between failures of a node are exponential.

    A lost engine's samples are generated again elsewhere and the step waits until it serves; lost
    learners, or a lost driver, go back to the last checkpoint.
    """
    rate = undisturbed / (a.node_mtbf_hours * 3600)
    lost_engines = rng.poisson(rate * engines)
    lost_learners = rng.poisson(rate * (learners + 1))  # the head with the driver is one more
    again = np.where(lost_engines > 0, a.engine_restart_seconds + sample_seconds, 0.0)
    redone = rng.uniform(0, a.checkpoint_every, len(rate)) * undisturbed
    return again + lost_learners * (a.learner_restart_seconds + redone)


def describe(scaling: Scaling) -> str:
    """A table: nodes, seconds of a step, efficiency, and the share of each cause."""
    lines = ["  nodes  s a step  efficiency  " + "  ".join(f"{cause:>10}" for cause in CAUSES)]
    for row, nodes in enumerate(scaling.nodes):
        mean = scaling.seconds[row].mean()
        shares = "  ".join(f"{value / mean:>10.1%}" for value in scaling.causes[row])
        lines.append(f"{nodes:>7.0f}{mean:>10.1f}{scaling.efficiency[row]:>12.0%}  {shares}")
    half = scaling.half()
    if half is None:
        lines.append(f"more than half of the throughput is left at {scaling.nodes[-1]:.0f} nodes")
    else:
        lines.append(f"half of the throughput is lost at {half[0]} nodes, most of it to {half[1]}")
    return "\n".join(lines)

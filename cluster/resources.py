"""Who gets which CPU and GPU: connecting to Ray, and waiting for room in the open.

Each long-lived actor asks Ray for its own CPUs and GPUs. Before anything is started,
:func:`wait_for_room` asks for room for all of it at once, which is what an autoscaler acts upon,
and says what it waits for.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, RunConfig
from cluster.stop import Stopped

LOOK_EVERY_S, SAY_EVERY_S = 1, 15
"""While there is no room: how often Ray is asked, and how often the user is told."""


Asks = Mapping[str, tuple[int, Mapping[str, float]]]
"""Who asks for room: how many of a kind, and what each of them reserves."""


def asks(
    config: RunConfig,
    *,
    learners: bool,
    actors: int | None = None,
    replicas: bool = True,
) -> Asks:
    """What the actors of a run reserve at the same time, by what they are.

    Args:
        learners: Whether learners are among them.
        actors: How many rollout actors are; default: ``rollout.num_actors``.
        replicas: Whether replicas of the reward service are, as many as there may be.
    """
    rollout, service, group = config.rollout, config.reward.service, config.learners
    served = sum(len(term.members) for term in config.reward.terms)
    if not config.reward.terms and config.reward_model is not None:
        served = 1
    return {
        "rollout actors": (
            rollout.num_actors if actors is None else actors,
            rollout.actor_resources,
        ),
        "reward replicas": (
            served * service.most_replicas if replicas else 0,
            service.replica_resources,
        ),
        "learners": (group.num_learners if learners else 0, group.learner_resources),
    }


def demand(config: RunConfig, *, learners: bool, actors: int | None = None) -> dict[str, float]:
    """All CPUs, GPUs and custom resources of :func:`asks`."""
    return _total(asks(config, learners=learners, actors=actors))


def _total(asked: Asks) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for count, each in asked.values():
        for name, amount in each.items():
            total[name] += count * amount
    return dict(total)


@contextmanager
def ray_session(config: RunConfig) -> Iterator[bool]:
    """Connect to the configured cluster, or start Ray on this machine and end it afterwards.

    Yields whether Ray was not connected before, so that this session is the only one that uses it.

    The local Ray's CPUs are logical: the stages of a PPO step take turns on the cores, so a
    laptop's two cores may hold generators, learners and the reward service at once.
    """
    import ray

    cluster = config.cluster
    started_here = not ray.is_initialized()
    if started_here:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray turns token authentication on for what it starts, unless RAY_AUTH_MODE says
        # otherwise; that is what we want, not news.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        # On a busy machine Serve's proxy needs longer than the five seconds after which its
        # controller would replace it, again and again.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        if ray_address(cluster) is None:  # a cluster that is there has its token already
            _give_token_without_home()
        with _process_groups_of_their_own():
            ray.init(**_init_arguments(cluster, demand(config, learners=True)["CPU"]))
    try:
        yield started_here
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _process_groups_of_their_own() -> Iterator[None]:
    """Whoever signals this process's group (``timeout``, a shell's ``kill``) means this process,
    which then ends Ray's in order: they must not be in that group. There is no public switch.

    Only on Linux, where Ray's processes die with their parent; elsewhere Ray finds them by group.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    from ray._private import services

    original = services.ConsolePopen
    services.ConsolePopen = partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


def _give_token_without_home() -> None:
    """Ray keeps the token in the home directory; without one this session gets its own."""
    named = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if os.access(Path.home(), os.W_OK) or any(name in os.environ for name in named):
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def ray_address(cluster: ClusterConfig) -> str | None:
    """The cluster to use: the configured one, else ``RAY_ADDRESS``, which every Ray job has.

    Raises:
        ValueError: It is the address that jobs are submitted to.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise ValueError(
            f"{address} is where jobs are submitted (RAY_ADDRESS or cluster.address), which a "
            "driver cannot use: run this by `ray job submit ... -- rlhf ...`, or unset it to start "
            "Ray on this machine"
        )
    return address


def _init_arguments(cluster: ClusterConfig, cpus: float) -> dict[str, Any]:
    common: dict[str, Any] = {"logging_level": "warning", "log_to_driver": False}
    if address := ray_address(cluster):
        return common | {"address": address}
    # Serve's proxy and controller, and headroom for tasks, on top of the run's own actors.
    logical = max(os.cpu_count() or 1, int(cpus + 0.999) + 2)
    return common | {
        "address": "local",  # not whatever Ray somebody else has started on this machine
        "num_cpus": logical,
        "include_dashboard": False,
        "object_store_memory": int(cluster.object_store_gib * 2**30),
    }


def wait_for_room(
    asked: Asks,
    timeout_s: float,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Return when all that is asked for would find room at the same time.

    It is asked of Ray as one placement group: Ray reserves all of it or nothing, and an autoscaler
    starts nodes for all of it at once. The reservation is given up again for those that asked; one
    that dies later may then come back wherever there is room.

    Raises:
        TimeoutError: There was not enough room in time; names what is there and what is missing.
        Stopped: ``stop`` asked to end.
    """
    import ray

    bundles = [
        bundle
        for count, each in asked.values()
        if (bundle := {name: amount for name, amount in each.items() if amount})
        for _ in range(count)
    ]
    if not bundles:
        return
    deadline = time.monotonic() + timeout_s
    told = 0.0
    group = ray.util.placement_group(bundles, strategy="PACK")
    try:
        while not group.wait(LOOK_EVERY_S):
            if stop():
                raise Stopped("while waiting for resources; go on with --resume")
            now = time.monotonic()
            if now - told > SAY_EVERY_S:
                told = now
                left = max(0.0, deadline - now)
                say(f"waiting for resources: {_shortage(asked)} ({left:.0f} s left)")
            if now >= deadline:
                raise TimeoutError(
                    f"{_shortage(asked)} after {timeout_s:.0f} s: add nodes, lower "
                    "rollout.num_actors or learners.num_learners, or raise "
                    "cluster.placement_timeout_s"
                )
    finally:
        ray.util.remove_placement_group(group)


def _shortage(asked: Asks) -> str:
    """What is asked for, what there is, and what is missing."""
    import ray

    need, there = _total(asked), ray.cluster_resources()
    free = ray.available_resources()
    names = [name for name, amount in need.items() if amount]
    who = " + ".join(
        f"{count} {kind} of {_amounts(each)}" for kind, (count, each) in asked.items() if count
    )
    beyond = {name: need[name] - there.get(name, 0.0) for name in names}
    taken = {name: need[name] - free.get(name, 0.0) for name in names}
    if any(amount > 0 for amount in beyond.values()):
        missing = f"{_amounts(_positive(beyond))} missing"
    elif any(amount > 0 for amount in taken.values()):
        missing = f"{_amounts(_positive(taken))} of it in use by others"
    else:
        missing = "enough in all, but no node has room for one of them"
    has = _amounts({name: there.get(name, 0.0) for name in names})
    return f"the run needs {_amounts(need)} ({who}), the cluster has {has}: {missing}"


def _positive(amounts: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if amount > 0}


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "none"


def stop_listening_to_ray() -> None:
    """Stop Ray from reporting errors on this driver, just before it is shut down.

    Serve ends its controller by killing it, and Ray reports each of its open calls as a failed
    task that it will retry; nothing is wrong and nothing is retried. There is no public switch.
    """
    from ray._private.worker import global_worker

    global_worker.threads_stopped.set()
    global_worker.gcs_error_subscriber.close()

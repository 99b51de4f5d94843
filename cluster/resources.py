"""Who gets which CPU and GPU: connecting to Ray, and waiting for room in the open.

Each long-lived actor asks Ray for its own CPUs and GPUs; Ray's scheduler places them and an
autoscaler sees what is missing. Before anything is started, :func:`wait_for_room` compares the
whole demand with the cluster and says what it waits for.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig, RunConfig
from cluster.stop import Stopped


def demand(config: RunConfig, *, learners: bool, actors: int | None = None) -> dict[str, float]:
    """CPUs, GPUs and custom resources that the actors of a run reserve at the same time.

    Args:
        learners: Whether learners are among them.
        actors: How many rollout actors are; default: ``rollout.num_actors``.
    """
    rollout, service, group = config.rollout, config.reward.service, config.learners
    actors = rollout.num_actors if actors is None else actors
    served = sum(len(term.members) for term in config.reward.terms)
    if not config.reward.terms and config.reward_model is not None:
        served = 1
    total: defaultdict[str, float] = defaultdict(float)
    for count, each in (
        (actors, rollout.actor_resources),
        (served * service.most_replicas, service.replica_resources),
        (group.num_learners if learners else 0, group.learner_resources),
    ):
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
        ray.init(**_init_arguments(cluster, demand(config, learners=True)["CPU"]))
    try:
        yield started_here
    finally:
        if started_here:
            ray.shutdown()


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
    need: Mapping[str, float],
    timeout_s: float,
    say: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Return when the cluster is large enough for ``need``.

    Raises:
        TimeoutError: It did not become large enough; names what is there and what is missing.
        Stopped: ``stop`` asked to end.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    told = 0.0
    while True:
        there = ray.cluster_resources()
        missing = {
            name: amount - there.get(name, 0.0)
            for name, amount in need.items()
            if amount > there.get(name, 0.0)
        }
        if not missing:
            return
        message = (
            f"the run needs {_amounts(need)}, the cluster has "
            f"{_amounts({name: there.get(name, 0.0) for name in need})}: "
            f"{_amounts(missing)} missing"
        )
        if stop():
            raise Stopped("while waiting for resources; go on with --resume")
        now = time.monotonic()
        if now >= deadline:
            raise TimeoutError(
                f"{message} after {timeout_s:.0f} s: add nodes, lower rollout.num_actors or "
                "learners.num_learners, or raise cluster.placement_timeout_s"
            )
        if now - told > 15:
            told = now
            say(f"waiting for resources: {message} ({deadline - now:.0f} s left)")
        time.sleep(1.0)


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

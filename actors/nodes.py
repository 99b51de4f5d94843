"""The nodes that a pool of rollout actors may use: which are leaving, and where there is room."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import ray
from ray._private import state as ray_state  # no public call tells of drained nodes
from ray.util.client import ray as ray_client


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A node that is alive, as the cluster's control store sees it.

    Attributes:
        total, free: Amounts by resource (``CPU``, ``GPU``, custom ones).
        draining: It takes nothing new and will be gone soon (scaled down, pre-empted).
    """

    total: Mapping[str, float]
    free: Mapping[str, float]
    draining: bool = False


Nodes = Mapping[str, Node]
"""By Ray's node id."""


def read_nodes() -> dict[str, Node]:
    """All nodes that are alive. A Ray client (``ray://``) knows neither what is free nor what is
    draining: there a pool neither grows nor leaves a node before it is gone."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if ray_client.is_connected():
        return {node["NodeID"]: Node(total=node["Resources"], free={}) for node in alive}
    free = ray_state.available_resources_per_node()
    draining = ray_state.state.get_draining_nodes()
    return {
        node["NodeID"]: Node(
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            draining=node["NodeID"] in draining,
        )
        for node in alive
    }


def why_leave(nodes: Nodes, node_id: str) -> str:
    """Why an actor on a node cannot stay there; empty when it can."""
    if node_id not in nodes:
        return f"its node {node_id[:8]} is gone"
    return f"its node {node_id[:8]} is being drained" if nodes[node_id].draining else ""


def room(nodes: Nodes, ask: Mapping[str, float], reserve: Mapping[str, float], actors: int) -> int:
    """How many further actors there is room for, now and without waiting.

    Each must fit whole on a node; and what all nodes have must be enough for them beside the
    actors that there are and ``reserve``, which is kept for others even while they are not up
    (learners that are being built anew, a replica that is restarted).

    Args:
        ask: What one actor reserves.
        reserve: What must be left for others, of the whole cluster.
        actors: How many there are already.
    """
    ask = {name: amount for name, amount in ask.items() if amount > 0}
    usable = [node for node in nodes.values() if not node.draining]
    if not ask:
        return sys.maxsize if usable else 0
    fitting = sum(
        min(int(node.free.get(name, 0.0) / amount + 1e-6) for name, amount in ask.items())
        for node in usable
    )
    left = min(
        int((sum(n.total.get(name, 0.0) for n in usable) - reserve.get(name, 0.0)) / amount + 1e-6)
        for name, amount in ask.items()
    )
    return max(0, min(fitting, left - actors))


def compare(ask: Mapping[str, float]) -> str:
    """What one actor asks for beside what the cluster has, as a sentence."""
    there, free = ray.cluster_resources(), ray.available_resources()
    asked = {name: amount for name, amount in ask.items() if amount}
    has = [f"{there.get(n, 0):g} {n} ({free.get(n, 0):g} free)" for n in asked]
    wants = [f"{amount:g} {name}" for name, amount in asked.items()]
    return f"It asks for {', '.join(wants)}; the cluster has {', '.join(has)}"

"""Where a pool may grow, worked out by hand."""

from __future__ import annotations

import sys

from actors.nodes import Node, room, why_leave

CPU = {"CPU": 1.0}
NOTHING: dict[str, float] = {}


def node(total: float, free: float, *, draining: bool = False, **others: float) -> Node:
    """A node with CPUs; ``others`` are wholly free."""
    return Node(total={"CPU": total, **others}, free={"CPU": free, **others}, draining=draining)


def test_each_actor_must_fit_whole_on_a_node() -> None:
    nodes = {"a": node(4, 2.5), "b": node(4, 0.9)}
    assert room(nodes, {"CPU": 2.0}, NOTHING, 0) == 1
    assert room(nodes, CPU, NOTHING, 0) == 2
    assert room(nodes, {"CPU": 0.1}, NOTHING, 0) == 25 + 9


def test_what_others_need_is_left_to_them_even_while_they_are_not_up() -> None:
    """Six CPUs, learners of two that are being built anew, two actors of one: two more."""
    nodes = {"a": node(3, 2), "b": node(3, 2)}
    assert room(nodes, CPU, {"CPU": 2.0}, 2) == 2
    assert room(nodes, CPU, {"CPU": 4.0}, 2) == 0
    assert room(nodes, CPU, {"CPU": 9.0}, 2) == 0


def test_every_resource_counts() -> None:
    nodes = {"a": node(8, 8), "b": node(8, 8, GPU=2.0)}
    assert room(nodes, {"CPU": 1.0, "GPU": 1.0}, NOTHING, 0) == 2
    assert room(nodes, {"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}, 0) == 1
    assert room(nodes, {"CPU": 1.0, "GPU": 0.0}, NOTHING, 0) == 16
    assert room(nodes, {"generator": 1.0}, NOTHING, 0) == 0


def test_a_node_that_is_drained_takes_nothing_new() -> None:
    nodes = {"a": node(4, 4, draining=True), "b": node(1, 1)}
    assert room(nodes, CPU, NOTHING, 0) == 1
    assert room({"a": nodes["a"]}, CPU, NOTHING, 0) == 0


def test_an_actor_that_asks_for_nothing_fits_anywhere() -> None:
    assert room({"a": node(1, 0)}, {"CPU": 0.0}, NOTHING, 5) == sys.maxsize
    assert room({}, {"CPU": 0.0}, NOTHING, 5) == 0


def test_why_an_actor_leaves_its_node() -> None:
    nodes = {"a" * 56: node(1, 0), "b" * 56: node(1, 0, draining=True)}
    assert why_leave(nodes, "a" * 56) == ""
    assert why_leave(nodes, "b" * 56) == "its node bbbbbbbb is being drained"
    assert why_leave(nodes, "c" * 56) == "its node cccccccc is gone"

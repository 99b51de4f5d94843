"""What a fleet does about losses, drained nodes and room: no Ray, processes are names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

import actors.fleet
from actors.config import EngineConfig, RolloutConfig
from actors.fleet import REST_S, Fleet
from actors.nodes import Node
from actors.weights import WeightError, WeightsLost
from actors.worker import Event, State, Worker


class PaperFleet(Fleet):
    """Its workers come up when :meth:`settle` is called, on the newest node that has room."""

    def __init__(self, nodes: dict[str, float], reserve: float = 0.0, **config: Any) -> None:
        self.cpus = nodes
        self.drained: set[str] = set()
        self.told: list[str] = []
        super().__init__(
            Path("model"),
            RolloutConfig(**config),
            name="w",
            reserve={"CPU": reserve},
            tell=self.told.append,
            look=self._paper_nodes,
        )

    def _paper_nodes(self) -> dict[str, Node]:
        return {
            name: Node(
                total={"CPU": cpus}, free={"CPU": self.free(name)}, draining=name in self.drained
            )
            for name, cpus in self.cpus.items()
        }

    def free(self, node: str) -> float:
        return self.cpus[node] - sum(
            w.info is not None and w.info.node_id == node for w in self.workers
        )

    def _spawn(self, worker: Worker) -> None:
        worker.on(Event.SPAWNED)

    def settle(self) -> dict[str, str]:
        """One turn of the owner; then those that find room come up. Node by name of worker."""
        self._looked = -1e9
        self.check()
        self.respawn()
        for worker in self.of_state(State.RESTARTING):
            nodes = [n for n in self.cpus if n not in self.drained and self.free(n) >= 1]
            if nodes:
                worker.info = cast(Any, SimpleNamespace(node_id=nodes[-1]))
                worker.on(Event.BUILT)
                self._confirmed(worker)
        return {w.name: w.info.node_id for w in self.of_state(State.HEALTHY) if w.info}


@pytest.fixture(autouse=True)
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(workers: list[Worker], timeout_s: float) -> None:
        for worker in workers:
            worker.info = None

    monkeypatch.setattr(actors.fleet, "end", end)


def died(worker: Worker, fleet: Fleet) -> None:
    fleet.lose(worker, f"{worker.name} died", ActorDiedError())


def test_a_fixed_pool_wants_all_of_its_workers() -> None:
    fleet = PaperFleet({"a": 1}, num_actors=2)
    assert fleet.settle() == {"w-0": "a"}
    assert not fleet.enough
    fleet.lose(fleet.workers[1], "w-1 was not ready within 300 s", TimeoutError("no room"))
    with pytest.raises(TimeoutError, match="no room"):
        fleet.respawn()


def test_a_worker_without_room_does_not_end_what_others_do() -> None:
    fleet = PaperFleet({"a": 1}, num_actors=2, min_actors=1)
    fleet.settle()
    assert fleet.enough
    waiting = fleet.workers[1]
    assert waiting.state is State.RESTARTING  # asked of Ray, so that an autoscaler sees it
    fleet.lose(waiting, "w-1 was not ready within 300 s", TimeoutError("no room"))
    fleet.respawn()
    assert waiting.state is State.DEAD
    assert fleet.told[-1] == f"1 others serve; w-1 is tried again in {REST_S:g} s"
    waiting.rests_until = 0.0
    fleet.cpus["b"] = 1
    assert fleet.settle() == {"w-0": "a", "w-1": "b"}
    assert fleet.told[-1] == "w-1 serves, with weight version 0"


def test_nobody_rests_when_too_few_serve() -> None:
    fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=1)
    fleet.settle()
    one, other = fleet.workers
    one.rests_until = 1e12
    died(one, fleet)
    fleet.respawn()
    assert one.state is State.DEAD
    died(other, fleet)
    fleet.respawn()
    assert [one.state, other.state] == [State.RESTARTING, State.RESTARTING]


def test_a_worker_that_keeps_dying_ends_a_pool_that_needs_it() -> None:
    for fewest in (2, 1):
        fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=fewest, max_retries=2)
        fleet.settle()
        for _ in range(2):
            died(fleet.workers[1], fleet)
            fleet.respawn()
        died(fleet.workers[1], fleet)
        if fewest == 1:
            fleet.respawn()
            assert fleet.workers[1].state is State.DEAD
        else:
            with pytest.raises(RuntimeError, match=r"w-1 failed 3 times in a row .*last: w-1 died"):
                fleet.respawn()


def test_a_pool_grows_where_there_is_room_and_not_into_that_of_others() -> None:
    fleet = PaperFleet({"a": 3}, reserve=2, num_actors=1, max_actors=3)
    assert fleet.settle() == {"w-0": "a"}
    assert fleet.settle() == {"w-0": "a"}  # two CPUs are free, and the learners'
    fleet.cpus["b"] = 1
    fleet.settle()
    assert fleet.settle() == {"w-0": "a", "w-1": "b"}
    assert "there is room for one more: starting w-1" in fleet.told
    fleet.cpus["c"] = 5
    for _ in range(3):
        fleet.settle()
    assert len(fleet.workers) == 3  # max_actors
    del fleet.cpus["b"]
    fleet.settle()
    assert "lost: w-1: its node b is gone" in fleet.told
    for _ in range(3):
        found = fleet.settle()
    assert sorted(found) == ["w-0", "w-2", "w-3"]  # room on c
    assert {found["w-2"], found["w-3"]} == {"c"}


def test_nobody_more_is_started_while_one_waits_for_room() -> None:
    fleet = PaperFleet({"a": 1}, num_actors=2, min_actors=1, max_actors=4)
    fleet.settle()
    fleet.settle()
    assert [w.state for w in fleet.workers] == [State.HEALTHY, State.RESTARTING]


def test_workers_leave_a_node_that_is_drained_without_blame() -> None:
    fleet = PaperFleet({"a": 1, "b": 1, "c": 1}, num_actors=2, max_retries=0)
    first = fleet.settle()
    (drained,) = {"w-0"} & first.keys()
    fleet.drained.add(first[drained])
    second = fleet.settle()
    assert second.keys() == first.keys()
    assert first[drained] not in second.values()
    assert fleet.losses == 1
    assert f"lost: w-0: its node {first[drained]} is being drained" in fleet.told


@pytest.mark.parametrize(
    ("error", "blameless"),
    [(ActorUnavailableError("no route", b"0" * 16), True), (ActorDiedError(), False)],
)
def test_who_is_cut_off_is_not_to_blame(error: Exception, blameless: bool) -> None:
    fleet = PaperFleet({"a": 1}, num_actors=1)
    fleet.settle()
    (worker,) = fleet.workers
    fleet.lose(worker, "gone", error)
    assert (worker.blameless, worker.failures) == (blameless, 0 if blameless else 1)
    fleet.settle()
    assert (worker.state, worker.blameless, worker.failures) == (State.HEALTHY, False, 0)


def test_weights_that_are_gone_are_no_corrupt_weights() -> None:
    fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=1)
    fleet.settle()
    for worker, error in zip(
        fleet.workers, (WeightError("corrupt"), WeightsLost("gone")), strict=True
    ):
        worker.state, worker.refusal = State.STALE, "once before"
        fleet._refused(worker, error)
    with pytest.raises(WeightsLost, match="twice: corrupt; twice: gone"):
        fleet.require_hope()
    fleet.workers[1].state = State.HEALTHY
    fleet.require_hope()


def test_bounds_must_fit() -> None:
    for bad in ({"min_actors": 3}, {"max_actors": 1}):
        with pytest.raises(ValueError, match=r"rollout\.num_actors is 2, which is not between"):
            RolloutConfig(num_actors=2, **bad)
    with pytest.raises(ValueError, match="'nccl' reaches the actors that there are"):
        RolloutConfig(max_actors=2, engine=EngineConfig(weight_transfer="nccl"))
    assert RolloutConfig(num_actors=3).fewest_actors == RolloutConfig(num_actors=3).most_actors == 3

"""What a fleet does about losses, drained nodes and room. Processes are names and there is no Ray,
but for the tests at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

import actors.fleet
from actors.config import EngineConfig, RolloutConfig, SamplingConfig
from actors.fleet import REST_S, SETTLE_S, Fleet
from actors.nodes import Node
from actors.rollout import RolloutPool
from actors.weights import WeightError, WeightsLost
from actors.worker import Event, State, Worker
from tests.actors.stand_in import StandIn, prompts


class PaperFleet(Fleet):
    """Its workers come up when :meth:`settle` is called, on the newest node that has room."""

    def __init__(self, nodes: dict[str, float], reserve: float = 0.0, **config: Any) -> None:
        self.cpus = nodes
        self.drained: set[str] = set()
        self.told: list[str] = []
        self.requested = self.waits = 0
        self.learners = 0
        """CPUs of node ``a`` that learners hold now."""
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
        taken = sum(w.info is not None and w.info.node_id == node for w in self.workers)
        return self.cpus[node] - taken - (self.learners if node == "a" else 0)

    def _spawn(self, worker: Worker) -> None:
        worker.on(Event.SPAWNED)
        self._moved = time.monotonic()

    def _request(self, count: int) -> None:
        self.requested = count

    def wait(self, streams: Sequence[Any], timeout_s: float) -> list[Any]:
        self.waits += 1
        assert self.waits < 99, "it waits for ever"
        return []

    def turn(self) -> None:
        """One of the owner, a while later: the nodes show all that was before."""
        self._looked, self._moved = -1e9, self._moved - SETTLE_S
        self.check()
        self.respawn()

    def settle(self) -> dict[str, str]:
        """A turn; then those that find room come up. Node by name of worker."""
        self.turn()
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
    assert fleet.settle() == {"w-0": "a"}
    assert fleet.workers[1].state is State.DEAD
    assert fleet.requested == 1  # so that an autoscaler sees it
    fleet.cpus["b"] = 1
    assert fleet.settle() == {"w-0": "a", "w-1": "b"}
    fleet.settle()
    assert fleet.requested == 0


def test_a_worker_that_cannot_be_built_rests_while_others_serve() -> None:
    fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=1)
    fleet.settle()
    assert fleet.settle() == {"w-0": "a", "w-1": "a"}
    broken = fleet.workers[1]
    fleet.lose(broken, "w-1 was not ready within 300 s", TimeoutError("slow"))
    fleet.respawn()
    assert broken.state is State.DEAD
    assert fleet.told[-1] == f"1 others serve; w-1 is tried again in {REST_S:g} s"
    broken.rests_until = 0.0
    assert fleet.settle() == {"w-0": "a", "w-1": "a"}
    assert fleet.told[-1] == "w-1 serves, with weight version 0"


def test_those_beyond_the_fewest_leave_the_room_of_learners_that_are_not_up() -> None:
    """Four CPUs, two of them for learners, which start later: four are wanted, two must serve."""
    fleet = PaperFleet({"a": 4}, reserve=2, num_actors=4, min_actors=2)
    for _ in range(3):
        assert fleet.settle().keys() == {"w-0", "w-1"}
    assert fleet.requested == 0  # it would be given the learners' room
    fleet.learners = 2
    fleet.settle()
    assert fleet.requested == 2
    died(fleet.workers[0], fleet)  # one of the fewest does not wait
    fleet.respawn()
    assert fleet.workers[0].state is State.RESTARTING
    fleet.settle()
    fleet.cpus["b"] = 1
    assert fleet.settle().keys() == {"w-0", "w-1", "w-2"}
    assert fleet.settle().keys() == {"w-0", "w-1", "w-2"}
    assert fleet.requested == 1
    fleet.learners = 0
    assert fleet.settle().keys() == {"w-0", "w-1", "w-2"}
    assert fleet.requested == 0


def test_room_is_looked_at_again_after_what_was_started_in_it_is_seen() -> None:
    fleet = PaperFleet({"a": 4}, num_actors=3, min_actors=1)
    fleet.check()
    fleet.respawn()
    fleet.respawn()
    assert [w.state for w in fleet.workers] == [State.RESTARTING, State.DEAD, State.DEAD]
    fleet.settle()
    assert len(fleet.of_state(State.HEALTHY)) == 3


def test_nobody_rests_when_too_few_serve() -> None:
    fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=1)
    fleet.settle()
    fleet.settle()
    one, other = fleet.workers
    one.rests_until = 1e12
    died(one, fleet)
    fleet.respawn()
    assert one.state is State.DEAD
    died(other, fleet)
    fleet.respawn()
    assert one.state is State.RESTARTING
    fleet.settle()
    assert [one.state, other.state] == [State.HEALTHY, State.HEALTHY]


def test_a_worker_that_keeps_dying_ends_a_pool_that_needs_it() -> None:
    for fewest in (2, 1):
        fleet = PaperFleet({"a": 2}, num_actors=2, min_actors=fewest, max_retries=2)
        fleet.settle()
        fleet.settle()
        for _ in range(2):
            died(fleet.workers[1], fleet)
            fleet.turn()
            assert fleet.workers[1].state is State.RESTARTING
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
    assert [w.state for w in fleet.workers] == [State.HEALTHY, State.DEAD]
    assert fleet.requested == 1


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


def test_the_wait_for_workers_ends_when_asked() -> None:
    fleet = PaperFleet({"a": 1}, num_actors=2)
    asked = iter([False, True])
    assert not fleet.bring_up(lambda: next(asked))
    fleet.settle()
    fleet.cpus["a"] = 2
    fleet.settle()
    assert fleet.bring_up(lambda: True)  # nothing is waited for


def test_a_generation_that_waits_for_workers_ends_when_asked(tmp_path: Path) -> None:
    """As one does that was stopped before its first sample."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"{}")
    pool = RolloutPool(tmp_path, RolloutConfig(num_actors=2))
    fleet = pool._fleet = PaperFleet({"a": 1}, num_actors=2)
    fleet.settle()
    asked = iter([False, True, True])
    sampling = SamplingConfig(max_new_tokens=8)
    samples = pool.generate(
        prompts(3, 0), sampling, run_seed=0, round_index=0, stop=lambda: next(asked)
    )
    assert list(samples) == []
    assert fleet.waits == 1
    assert not pool.start(lambda: True)


@pytest.fixture
def one_actor_has_room(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Callable[..., Fleet], Callable[[], None]]]:
    """What makes a fleet of stand-ins, on a Ray with room for one of them, and what frees room for
    another."""
    monkeypatch.undo()  # processes are real
    monkeypatch.setattr(actors.fleet, "RolloutActor", StandIn)
    deadline = time.monotonic() + 30  # whoever was here before may just be leaving
    while ray.available_resources() != ray.cluster_resources() and time.monotonic() < deadline:
        time.sleep(0.1)
    free = int(ray.available_resources()["CPU"])
    groups = [ray.util.placement_group([{"CPU": cpus}]) for cpus in (free - 2, 1)]
    assert all(group.wait(10) for group in groups)
    fleets: list[Fleet] = []

    def make(reserve: float) -> Fleet:
        config = RolloutConfig(num_actors=2, min_actors=1)
        fleets.append(Fleet(Path("model"), config, name="w", reserve={"CPU": reserve}))
        return fleets[-1]

    yield make, lambda: ray.util.remove_placement_group(groups[1])
    for fleet in fleets:
        fleet.shutdown()
    assert requests() == []
    for group in groups:
        ray.util.remove_placement_group(group)


def requests() -> list[str]:
    """States of the placement groups that a fleet has asked for."""
    tables = ray.util.placement_group_table().values()
    waiting = [t for t in tables if t["state"] != "REMOVED" and t["bundles"] == {0: {"CPU": 1.0}}]
    return sorted(t["state"] for t in waiting)


def turns(fleet: Fleet, until: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not until() and time.monotonic() < end:
        fleet.check()
        fleet.respawn()
        fleet.wait([], 0.2)
    return until()


@pytest.mark.parametrize("kept", [False, True])
def test_room_is_asked_of_ray_and_what_is_kept_for_others_is_given_back(
    one_actor_has_room: tuple[Callable[..., Fleet], Callable[[], None]], kept: bool
) -> None:
    """An actor that waited in Ray would have taken what a learner has left."""
    make, free_one = one_actor_has_room
    total = ray.cluster_resources()["CPU"]
    fleet = make(total - 1 if kept else 0)
    assert fleet.bring_up()
    assert turns(fleet, lambda: "PENDING" in requests(), 10)
    free_one()
    if kept:
        free = turns(
            fleet, lambda: not requests() and ray.available_resources().get("CPU") == 1, 30
        )
        assert free
        assert not turns(fleet, lambda: fleet.workers[1].state is not State.DEAD, 5)
    else:
        assert turns(fleet, lambda: len(fleet.of_state(State.HEALTHY)) == 2, 60)
    fleet.withdraw()
    assert requests() == []

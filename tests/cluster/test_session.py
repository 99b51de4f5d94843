"""What a session starts, in which order, and what it refuses. Nothing here starts anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cluster.session
from cluster.config import RunConfig, build_config, load_config
from cluster.progress import Reporter
from cluster.session import Session
from cluster.stop import Stopped, StopRequest

ROOT = Path(__file__).resolve().parents[2]
DONE: list[str] = []


class Pool:
    """In place of ``RolloutPool``: one that is not up before it is asked to end."""

    def __init__(self, *_: Any, **__: Any) -> None:
        DONE.clear()

    def start(self, stop: Callable[[], bool]) -> bool:
        return not stop()

    def withdraw(self) -> None:
        DONE.append("withdraw")

    def shutdown(self) -> None:
        DONE.append("shutdown")


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> StopRequest:
    monkeypatch.setattr(cluster.session, "RolloutPool", Pool)
    monkeypatch.setattr(cluster.session, "wait_for_room", lambda *_: DONE.append("wait for room"))
    monkeypatch.setattr(Session, "_connect", lambda _: None)
    return StopRequest(lambda _: None)


def test_a_start_of_engines_ends_when_asked(stop: StopRequest) -> None:
    stop._asked.set()
    with (
        Session(RunConfig(run_dir=Path("x")), Reporter(), stop) as session,
        pytest.raises(Stopped, match="rollout actors were starting; go on with --resume"),
    ):
        session.rollouts(Path("model"))
    assert DONE == ["shutdown"]


def test_the_pool_asks_for_nothing_while_others_wait_for_room(stop: StopRequest) -> None:
    with Session(RunConfig(run_dir=Path("x")), Reporter(), stop) as session:
        session.rollouts(Path("model"))
        session._make_room(learners=True)
    assert DONE == ["withdraw", "wait for room", "shutdown"]


def test_weights_by_nccl_are_refused_as_nothing_would_send_them(stop: StopRequest) -> None:
    config = build_config(
        {"run_dir": "x", "rollout": {"engine": {"weight_transfer": "nccl"}}}, "test"
    )
    with pytest.raises(ValueError, match=r"weight_transfer is 'nccl', .* set it to 'ray'"):
        Session(config, Reporter(), stop)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_configurations_that_come_with_it_are_taken(
    path: Path, stop: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_DATA", "/data")
    Session(load_config(path), Reporter(), stop)

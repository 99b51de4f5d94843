"""Retries and deadlines of a call, and reloads of a replica, without Serve."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from reward_service import client
from reward_service import replica as replicas
from reward_service.config import RewardServiceConfig
from reward_service.dispatch import Dispatcher, asked_again
from reward_service.http_api import RequestError
from reward_service.model import RewardModel
from reward_service.replica import ModelReplica, ReloadTarget
from reward_service.score import ModelScores, NotLoaded, ScoreCall, ScoreItem
from reward_service.statistics import ModelStatus

ANSWER = ModelScores(
    model="m", version="v", fingerprint="f", scores=(1.0,), tokens=(1,), errors=(None,)
)
ITEMS = [ScoreItem(prompt="storm ", response=" rain" * (1 + n)) for n in range(8)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_PAUSES_S", (0.01,))
    monkeypatch.setattr(replicas, "NOT_LOADED_S", 0.0)


def failing(*errors: Exception) -> tuple[list[int], Callable[[], Any]]:
    """A replica that raises each of the errors and then answers; and the tries so far."""
    tries: list[int] = []

    async def ask() -> ModelScores:
        tries.append(len(tries))
        if len(tries) <= len(errors):
            raise errors[len(tries) - 1]
        return ANSWER

    return tries, ask


def asked(ask: Callable[[], Any], *, timeout_s: float = 10.0, max_retries: int = 3) -> ModelScores:
    call = ScoreCall(model="m", items=(), timeout_s=timeout_s)
    return asyncio.run(asked_again(ask, call, max_retries, "model m"))


def refused(ask: Callable[[], Any], **how: Any) -> tuple[int, str, int]:
    with pytest.raises(RequestError) as caught:
        asked(ask, **how)
    return caught.value.status, caught.value.code, caught.value.retry_after_s


def test_a_call_is_asked_again_when_its_replica_dies() -> None:
    tries, ask = failing(RayActorError(), DeploymentUnavailableError.__new__(
        DeploymentUnavailableError), RayActorError())  # fmt: skip
    assert asked(ask) == ANSWER
    assert len(tries) == 4
    _, ask = failing(*[RayActorError()] * 4)
    assert refused(ask) == (503, "unavailable", 5)


def test_a_full_queue_is_told_and_not_asked_again() -> None:
    tries, ask = failing(BackPressureError(num_queued_requests=9, max_queued_requests=9))
    assert refused(ask) == (503, "overloaded", 2)
    assert len(tries) == 1


def test_the_deadline_ends_slow_calls_and_retries() -> None:
    async def slow() -> ModelScores:
        await asyncio.sleep(30)
        return ANSWER

    assert refused(slow, timeout_s=0.05) == (504, "timeout", 0)
    _, ask = failing(*[RayActorError()] * 100)
    assert refused(ask, timeout_s=0.05, max_retries=1000)[1] in ("timeout", "unavailable")


def test_a_model_that_fails_is_a_500() -> None:
    cause = RuntimeError("out of memory")
    _, ask = failing(RayTaskError("score_batch", "trace", cause))
    assert refused(ask) == (500, "model_failed", 0)


def test_a_replica_without_a_model_is_like_one_that_is_lost() -> None:
    cause = NotLoaded("no.safetensors cannot be read")
    tries, ask = failing(*[RayTaskError("score_batch", "trace", cause)] * 2)
    assert asked(ask) == ANSWER
    assert len(tries) == 3
    _, ask = failing(*[RayTaskError("score_batch", "trace", cause)] * 9)
    with pytest.raises(RequestError, match="is not loaded") as raised:
        asked(ask)
    assert raised.value.status == 503


def test_an_error_travels_between_processes() -> None:
    error = RequestError(503, "overloaded", "later", param="x", retry_after_s=2)
    again = copy.copy(error)  # by the same protocol as pickle
    assert (again.status, again.code, again.message) == (503, "overloaded", "later")
    assert (again.param, again.retry_after_s) == ("x", 2)


class Store(dict[str, ReloadTarget]):
    """Stands for Ray's key-value store."""


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(ReloadTarget, "read", staticmethod(store.get))
    monkeypatch.setattr(ReloadTarget, "write", lambda self, key: store.update({key: self}))
    return store


def replica(config: RewardServiceConfig | None = None) -> ModelReplica:
    return ModelReplica("m", config or RewardServiceConfig(), "d")


def test_an_answer_is_of_the_version_that_it_began_with(
    store: Store, reward_dir: Path, second_reward_dir: Path
) -> None:
    old, new = RewardModel.load(reward_dir), RewardModel.load(second_reward_dir)

    async def run() -> None:
        one = replica(RewardServiceConfig(batch_wait_s=0.3))
        await one.reconfigure({"directory": str(reward_dir)})
        begun = asyncio.create_task(one.score_batch(ITEMS, "error"))
        await asyncio.sleep(0.05)  # it waits in the old version's queue
        assert await one.prepare(str(second_reward_dir)) == (new.version, "")
        assert (await one.score_batch(ITEMS, "error")).version == old.version
        status = await one.switch(str(second_reward_dir), new.version)
        assert status.version == new.version
        later = await one.score_batch(ITEMS, "error")
        answer = await begun
        assert (answer.version, answer.scores) == (old.version, old.score(ITEMS).scores)
        assert (later.version, later.scores) == (new.version, new.score(ITEMS).scores)
        counts = {s.version: s.count for s in (await one.status()).statistics}
        assert counts == {old.version: 2 * len(ITEMS), new.version: len(ITEMS)}

    asyncio.run(run())


def test_what_cannot_be_loaded_keeps_the_old(
    store: Store, reward_dir: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(reward_dir, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"\0" * 100)

    async def run() -> None:
        one = replica()
        await one.reconfigure({"directory": str(reward_dir)})
        before = await one.status()
        version, why = await one.prepare(str(broken))
        assert (version, "weights cannot be loaded" in why) == ("", True)
        await one.reconfigure({"directory": str(tmp_path / "nowhere")})
        after = await one.status()
        assert (after.version, after.error) == (before.version, None)
        assert "nowhere is not a directory" in (after.reload_error or "")
        await one.reconfigure({"directory": str(reward_dir)})
        assert (await one.status()).reload_error is None

    asyncio.run(run())


def test_a_replica_that_never_loaded_says_so_and_tries_again(
    store: Store, reward_dir: Path, tmp_path: Path
) -> None:
    async def run() -> None:
        one = replica()
        await one.reconfigure({"directory": str(tmp_path / "nowhere")})
        assert "nowhere is not a directory" in ((await one.status()).error or "")
        with pytest.raises(NotLoaded, match="nowhere is not a directory"):
            await one.score_batch(ITEMS, "error")
        shutil.copytree(reward_dir, tmp_path / "nowhere")  # the storage is back
        for _ in range(100):
            await one.check_health()
            if (await one.status()).error is None:
                break
            await asyncio.sleep(0.05)
        assert (await one.score_batch(ITEMS, "error")).scores[0] is not None

    asyncio.run(run())


def test_files_that_were_changed_in_place_are_not_served_for_another_version(
    store: Store, reward_dir: Path, second_reward_dir: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(reward_dir, tmp_path / "place"))
    version = RewardModel.load(place).version
    store["d/m"] = ReloadTarget(
        configured=str(second_reward_dir), directory=str(place), version=version
    )
    shutil.copytree(second_reward_dir, place, dirs_exist_ok=True)

    async def run() -> None:
        alone = replica()  # nobody else serves: what is configured is better than nothing
        await alone.reconfigure({"directory": str(second_reward_dir)})
        assert (await alone.status()).version == RewardModel.load(second_reward_dir).version
        one = replica(RewardServiceConfig(num_replicas=2))  # others serve the target's version
        await one.reconfigure({"directory": str(second_reward_dir)})
        for _ in range(3):
            await one.check_health()
            await asyncio.sleep(0.05)
        assert "was changed after it was loaded elsewhere" in ((await one.status()).error or "")
        with pytest.raises(NotLoaded):
            await one.score_batch(ITEMS, "error")
        loaded, _ = await one.prepare(str(place))  # loaded again, it is everybody's
        await one.target(str(place), loaded)
        assert (await one.switch(str(place), loaded)).version == loaded != version

    asyncio.run(run())


def test_replicas_learn_of_a_reload_that_they_missed(
    store: Store, reward_dir: Path, second_reward_dir: Path, tmp_path: Path
) -> None:
    version = RewardModel.load(second_reward_dir).version

    async def health_until(one: ModelReplica, wanted: str) -> None:
        for _ in range(100):
            await one.check_health()
            if (await one.status()).version == wanted:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(await one.status())

    async def run() -> None:
        first, second = replica(), replica()
        for one in (first, second):
            await one.reconfigure({"directory": str(reward_dir)})
        await first.target(str(second_reward_dir), version)
        await health_until(second, version)  # was there, and missed the call
        third = replica()  # starts later
        await third.reconfigure({"directory": str(reward_dir)})
        assert (await third.status()).version == version
        # a later configuration overrules the reload
        moved = shutil.copytree(reward_dir, tmp_path / "moved")
        await third.reconfigure({"directory": str(moved)})
        assert (await third.status()).version == RewardModel.load(reward_dir).version
        # a target that is gone is tried once, and the configured model serves
        store["d/m"] = ReloadTarget(
            configured=str(moved), directory=str(tmp_path / "gone"), version="x"
        )
        for _ in range(3):
            await third.check_health()
            await asyncio.sleep(0.05)
        assert "gone is not a directory" in ((await third.status()).reload_error or "")
        assert (await third.score_batch(ITEMS, "error")).scores[0] is not None

    asyncio.run(run())


class Replicas:
    """A handle whose first broadcasts meet only replicas that have just gone."""

    def __init__(self, gone: int) -> None:
        self.gone = gone
        self.asked: list[str] = []

    def broadcast(self, method: str, *_: str) -> Any:
        self.asked.append(method)
        if self.gone:
            self.gone -= 1
            found: list[Any] = [RayActorError()]
        else:
            found = [("v2", "") if method == "prepare" else ModelStatus(model="m", version="v2")]

        async def results(**_: Any) -> list[Any]:
            return found

        return SimpleNamespace(results_async=results)


def test_a_reload_asks_the_replicas_that_come_after_one_that_went() -> None:
    replicas = Replicas(gone=2)
    dispatcher = Dispatcher(RewardServiceConfig(), {"m": cast("Any", replicas)})
    assert asyncio.run(dispatcher.load("m", Path("two"))).version == "v2"
    assert replicas.asked == ["prepare"] * 3 + ["target", "switch"]
    nobody = Dispatcher(RewardServiceConfig(), {"m": cast("Any", Replicas(gone=99))})
    with pytest.raises(RequestError, match="no replica is up"):
        asyncio.run(nobody.load("m", Path("two")))

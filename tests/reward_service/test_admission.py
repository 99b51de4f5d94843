"""Room for scores, room for everything else, and a door that closes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx

from reward_service.config import RewardServiceConfig
from reward_service.http_api import build_app
from reward_service.http_middleware import Door
from reward_service.score import ModelScores, ScoreCall
from tests.reward_service.test_http_api import StubBackend

CONFIG = RewardServiceConfig(max_ongoing_requests=2, max_queued_requests=1)
BODY = {"items": [{"text": "rain"}]}


class SlowBackend(StubBackend):
    """Scores when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Semaphore(0)
        self.go_on = asyncio.Event()

    async def score(self, call: ScoreCall) -> ModelScores:
        self.asked.release()
        await self.go_on.wait()
        return await super().score(call)


Story = Callable[[SlowBackend, Door, httpx.AsyncClient], Awaitable[None]]


def told(story: Story) -> None:
    async def tell() -> None:
        backend, door = SlowBackend(), Door(CONFIG.most_requests)
        transport = httpx.ASGITransport(build_app(backend, CONFIG, door=door))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await asyncio.wait_for(story(backend, door, client), 30)

    asyncio.run(tell())


def test_scores_beyond_the_room_are_refused_and_a_reload_is_not() -> None:
    async def story(backend: SlowBackend, _: Door, client: httpx.AsyncClient) -> None:
        calls = [asyncio.create_task(client.post("/v1/score", json=BODY)) for _ in range(3)]
        for _ in calls:
            await backend.asked.acquire()
        for path in ("/v1/score", "/get_reward"):
            busy = await client.post(path, json=BODY)
            assert (busy.status_code, busy.json()["error"]["code"]) == (503, "overloaded")
            assert int(busy.headers["Retry-After"]) >= 1
        reloaded = await client.put("/v1/models/first", json={"directory": "good"})
        assert (reloaded.status_code, reloaded.json()["version"]) == (200, "v2")
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert (await client.get(path)).status_code == 200
        backend.go_on.set()
        assert [(await call).status_code for call in calls] == [200, 200, 200]
        assert (await client.post("/v1/score", json=BODY)).status_code == 200

    told(story)


def test_a_closed_door_lets_out_but_not_in() -> None:
    async def story(backend: SlowBackend, door: Door, client: httpx.AsyncClient) -> None:
        inside = asyncio.create_task(client.post("/v1/score", json=BODY))
        await backend.asked.acquire()
        closing = asyncio.create_task(door.close())
        await asyncio.sleep(0)
        refused = await client.post("/v1/score", json=BODY)
        assert refused.status_code == 503
        assert refused.json()["error"]["message"] == "the server is shutting down"
        assert not closing.done()
        backend.go_on.set()
        assert (await inside).status_code == 200
        await closing
        await door.close()  # again is harmless

    told(story)

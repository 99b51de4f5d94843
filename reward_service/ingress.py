"""The HTTP processes before the replicas, and the one that scores keyed requests once for all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve

from reward_service.config import RewardServiceConfig
from reward_service.dispatch import Dispatcher, Handle, asked_again
from reward_service.http_api import RequestError, build_app
from reward_service.http_metrics import ServiceMetrics
from reward_service.http_middleware import Door
from reward_service.score import ModelScores, ScoreCall
from reward_service.security import check_binding
from reward_service.statistics import ModelStatus

if TYPE_CHECKING:
    from fastapi import FastAPI


ON_ITS_WAY_S = 0.2
"""What an ingress has answered is still on its way through the proxy."""


class KeyedRequests:
    """Scores what carries an idempotency key, when there are several ingress replicas.

    A retry may come in at another ingress than the request that it repeats, so they share this
    one process. When it dies its memory is lost, and a retry is scored again.
    """

    def __init__(self, config: RewardServiceConfig, handles: Mapping[str, Handle]) -> None:
        self._dispatcher = Dispatcher(config, handles)

    async def score(self, call: ScoreCall) -> ModelScores | RequestError:
        """An error is returned, not raised: it is the caller's, not this process's."""
        try:
            return await self._dispatcher.score(call)
        except RequestError as error:
            return error


@serve.ingress()
class Ingress:
    """The HTTP side. Holds no model and no torch.

    Args:
        config: Of the service.
        token_digests: Digests of the tokens, of which a request must carry one.
        handles: Of the models, by name.
        keyed: Where keyed requests go, with several ingress replicas.
    """

    def __init__(
        self,
        config: RewardServiceConfig,
        token_digests: tuple[str, ...],
        handles: dict[str, Handle],
        keyed: Handle | None = None,
    ) -> None:
        # Here too, as Serve may have been started by someone else, with another host.
        check_binding(_proxy_host(), token_digests)
        self._config = config
        self._token_digests = token_digests
        self._dispatcher = Dispatcher(config, handles)
        self._keyed = keyed
        self._door = Door(config.most_requests)

    def __serve_build_asgi_app__(self) -> FastAPI:
        replica = serve.get_replica_context().replica_id.unique_id
        return build_app(
            self,
            self._config,
            token_digests=self._token_digests,
            metrics=ServiceMetrics(ingress=replica),
            door=self._door,
        )

    async def close(self) -> None:
        """Refuse further requests for scores; return when those under way are answered."""
        await self._door.close()
        await asyncio.sleep(ON_ITS_WAY_S)

    @property
    def model_names(self) -> list[str]:
        return self._dispatcher.model_names

    async def score(self, call: ScoreCall) -> ModelScores:
        keyed = self._keyed
        if keyed is None or not call.key:
            return await self._dispatcher.score(call)
        answer: ModelScores | RequestError = await asked_again(
            lambda: keyed.score.remote(call), call, self._config.max_retries, "the keyed requests"
        )
        if isinstance(answer, RequestError):
            raise answer
        return answer

    async def statuses(self) -> dict[str, ModelStatus]:
        return await self._dispatcher.statuses()

    async def reload(self, model: str, directory: str) -> ModelStatus:
        return await self._dispatcher.reload(model, directory)


def _proxy_host() -> str:
    # Serve has no public way to ask.
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    return str(client.http_config.host or "127.0.0.1")

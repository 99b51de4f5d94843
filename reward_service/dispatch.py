"""From a checked call to a replica: deadlines, retries, ensembles, and each key scored once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle

from reward_service.client import retry_pause
from reward_service.config import RewardServiceConfig
from reward_service.ensemble import combine_answers
from reward_service.http_api import RequestError
from reward_service.idempotency import KeyReusedError, OnceForEachKey
from reward_service.score import ModelScores, NotLoaded, ScoreCall
from reward_service.security import inside
from reward_service.statistics import ModelStatus, merged_status

logger = logging.getLogger(__name__)

STATUS_TIMEOUT_S = 5.0

Handle: TypeAlias = DeploymentHandle[Any]


class Dispatcher:
    """Asks the replicas of each model; the backend of the HTTP application."""

    def __init__(self, config: RewardServiceConfig, handles: Mapping[str, Handle]) -> None:
        self._config = config
        self._handles = dict(handles)
        self._once: OnceForEachKey[ModelScores] = OnceForEachKey(
            seconds=config.idempotency_seconds, entries=config.idempotency_entries
        )
        self._reloading = asyncio.Lock()

    @property
    def model_names(self) -> list[str]:
        return [*self._handles, *self._config.ensembles]

    async def score(self, call: ScoreCall) -> ModelScores:
        """The answer; one call for all that carry the same key. Raises RequestError."""
        if not call.key:
            return await self._score(call)
        try:
            return await asyncio.wait_for(
                self._once.call(call.key, call.content(), lambda: self._score(call)),
                call.timeout_s,
            )
        except TimeoutError:
            raise _too_late(call) from None
        except KeyReusedError as error:
            raise RequestError(422, "key_reused", str(error), param="Idempotency-Key") from None

    async def _score(self, call: ScoreCall) -> ModelScores:
        ensemble = self._config.ensembles.get(call.model)
        if ensemble is None:
            return await self._ask(call.model, call)
        if call.per_token:
            raise RequestError(
                422,
                "invalid_request",
                f"the ensemble {call.model} has no per-token values: ask one of its members "
                f"({', '.join(ensemble.members)})",
                param="per_token",
            )
        answers = await asyncio.gather(*(self._ask(name, call) for name in ensemble.members))
        return combine_answers(call.model, answers, ensemble)

    async def _ask(self, model: str, call: ScoreCall) -> ModelScores:
        handle = self._handles[model]
        return await asked_again(
            lambda: handle.score_batch.remote(list(call.items), call.truncation, call.per_token),
            call,
            self._config.max_retries,
            what=f"model {model}",
        )

    async def statuses(self) -> dict[str, ModelStatus]:
        found = await asyncio.gather(*(self._status(name) for name in self._handles))
        statuses = dict(zip(self._handles, found, strict=True))
        for name, ensemble in self._config.ensembles.items():
            members = [statuses[member] for member in ensemble.members]
            errors = [f"{m.model}: {m.error}" for m in members if m.error is not None]
            statuses[name] = ModelStatus(
                model=name,
                version="+".join(m.version for m in members),
                fingerprint="+".join(m.fingerprint for m in members),
                context=min((m.context for m in members if m.context is not None), default=None),
                error=errors[0] if errors else None,
                replicas=0,
            )
        return statuses

    async def _status(self, name: str) -> ModelStatus:
        try:
            found = await asyncio.wait_for(
                self._handles[name]
                .broadcast("status")
                .results_async(timeout_s=STATUS_TIMEOUT_S, return_exceptions=True),
                STATUS_TIMEOUT_S,
            )
        except (TimeoutError, RayActorError, RayTaskError, RayServeException) as error:
            return ModelStatus(model=name, error=f"no answer ({type(error).__name__})", replicas=0)
        statuses = [s for s in found if isinstance(s, ModelStatus)]
        if not statuses:
            return ModelStatus(model=name, error="no replica answers", replicas=0)
        return merged_status(statuses)

    async def reload(self, model: str, directory: str) -> ModelStatus:
        """As ``load``, with a directory that must lie inside the models root."""
        root = self._config.models_root
        if root is None:
            raise RequestError(
                403,
                "reload_off",
                "this server loads no other models over HTTP: start it with a models root "
                "(reward.service.models_root, rlhf serve --models-root)",
            )
        try:
            path = await asyncio.to_thread(inside, root, directory)
        except ValueError as error:
            raise RequestError(422, "no_such_model", str(error), param="directory") from None
        return await self.load(model, path)

    async def load(self, model: str, directory: Path) -> ModelStatus:
        """Load a version into every replica, then switch all of them.

        Each replica loads it beside the one that serves; only when all have it do they switch,
        so a version that one of them cannot load is never served.

        Raises:
            RequestError: An ensemble or an unknown name, or a replica cannot load it: the one
                before it still serves.
        """
        if model not in self._handles:
            raise RequestError(
                422, "not_loadable", f"{model} is put together from other models", param="name"
            )
        handle, path = self._handles[model], str(directory)
        deadline = time.monotonic() + self._config.reload_timeout_s
        async with self._reloading:
            loaded = await self._everywhere(handle, deadline, "prepare", path)
            versions = {version for version, _ in loaded}
            problem = next((error for _, error in loaded if error), "")
            if not problem and len(versions) != 1:
                problem = f"{directory}: its files changed while they were read"
            if problem:
                await self._everywhere(handle, deadline, "abandon", problem)
                raise RequestError(
                    422, "reload_refused", f"the model before it still serves: {problem}"
                )
            (version,) = versions
            # First what later replicas should serve, then those that are there. Broadcasts do not
            # wait behind requests, so a reload works under any load.
            await self._everywhere(handle, deadline, "target", path, version)
            statuses = await self._everywhere(handle, deadline, "switch", path, version)
        logger.info("reward model %s is now version %s", model, version)
        return merged_status(statuses)

    async def _everywhere(
        self, handle: Handle, deadline: float, method: str, *arguments: str
    ) -> list[Any]:
        """Results of all live replicas; one that dies meanwhile reads the target when it starts.

        While replicas come and go, the only one that is known here may be one that has just gone:
        the others are asked then.
        """
        for tries in range(self._config.max_retries + 1):
            left = max(0.0, deadline - time.monotonic())
            try:
                found = await handle.broadcast(method, *arguments).results_async(
                    timeout_s=left, return_exceptions=True
                )
            except TimeoutError:
                raise RequestError(
                    504, "timeout", f"not loaded within {self._config.reload_timeout_s:g} s"
                ) from None
            except DeploymentUnavailableError:
                found = []
            for error in found:
                if isinstance(error, BaseException) and not isinstance(error, RayActorError):
                    raise error
            if results := [f for f in found if not isinstance(f, BaseException)]:
                return results
            await asyncio.sleep(retry_pause(tries, deadline))
        raise RequestError(503, "unavailable", "no replica is up: try again", retry_after_s=5)


async def asked_again(
    ask: Callable[[], Awaitable[ModelScores]], call: ScoreCall, max_retries: int, what: str
) -> ModelScores:
    """The answer to ``ask``, asked again when a process dies under it, until the deadline."""
    deadline = time.monotonic() + call.timeout_s
    why = "has no live replica"
    for tries in range(max_retries + 1):
        try:
            return await asyncio.wait_for(ask(), max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise _too_late(call) from None
        except BackPressureError as error:
            raise RequestError(
                503, "overloaded", "too many requests wait: try again", retry_after_s=2
            ) from error
        except (RayActorError, DeploymentUnavailableError):
            await asyncio.sleep(retry_pause(tries, deadline))
        except RayTaskError as error:
            if isinstance(error.cause, NotLoaded):
                why = f"is not loaded ({error.cause})"
                await asyncio.sleep(retry_pause(tries, deadline))
                continue
            logger.exception("%s failed", what)
            raise RequestError(500, "model_failed", f"{what} failed") from error
    raise RequestError(503, "unavailable", f"{what} {why}: try again", retry_after_s=5)


def _too_late(call: ScoreCall) -> RequestError:
    return RequestError(504, "timeout", f"not scored within {call.timeout_s:g} s")

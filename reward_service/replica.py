"""One process with one reward model: scores lists, and loads another version while it serves.

A loaded version is one object, its own queue included. A call takes the version that is there
when it comes and is answered by it to the end; a reload only replaces the object for the calls
that come after. So no answer ever mixes two versions, and nothing waits.

What should be served outlives a process: the target of the last reload is kept in Ray's
key-value store, where a replica that starts later, or that missed the call, finds it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.experimental import internal_kv

from reward_service.batcher import TokenBudgetBatcher
from reward_service.config import RewardServiceConfig
from reward_service.encoding import Truncation
from reward_service.score import ModelScores, NotLoaded, ScoreItem
from reward_service.statistics import ModelStatus, VersionStatistics

if TYPE_CHECKING:
    from reward_service.model import ModelInput, RewardModel, Values

logger = logging.getLogger(__name__)

LOAD_ERRORS = (ValueError, OSError, RuntimeError)
NAMESPACE = b"rlhf_reward_service"
NOT_LOADED_S = 1.0
"""How long a replica without a model keeps a call: one that failed at once would always have the
shortest queue, and be asked again before those that can answer."""


@dataclass(frozen=True, kw_only=True)
class ReloadTarget:
    """What every replica of a model should serve.

    It holds for as long as the configured directory is ``configured``: a later configuration
    overrules an earlier reload.
    """

    configured: str
    directory: str
    version: str

    @classmethod
    def read(cls, key: str) -> ReloadTarget | None:
        found = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        return None if found is None else cls(**json.loads(found))

    def write(self, key: str) -> None:
        internal_kv._internal_kv_put(key, json.dumps(vars(self)), namespace=NAMESPACE)

    @staticmethod
    def forget(prefix: str) -> None:
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


class OtherVersionError(ValueError):
    """A directory no longer holds the version that the other replicas serve."""


@dataclass(frozen=True, eq=False)
class _Loaded:
    """One version: the model, where it came from, and the queue before it."""

    model: RewardModel
    directory: str
    batcher: TokenBudgetBatcher[ModelInput, Values]


class ModelReplica:
    """Scores lists for the ingress and for PPO alike.

    Args:
        name: What the model is called.
        config: Of the service.
        deployment_id: New for each deployment of the application.
    """

    def __init__(self, name: str, config: RewardServiceConfig, deployment_id: str) -> None:
        self._name = name
        self._config = config
        self._key = f"{deployment_id}/{name}"
        self._configured = ""
        self._loaded: _Loaded | None = None
        self._prepared: _Loaded | None = None
        self._error: str | None = "not loaded yet"
        self._reload_error: str | None = None
        self._refused_target: ReloadTarget | None = None
        self._catching_up: asyncio.Task[None] | None = None
        self._statistics: dict[str, VersionStatistics] = {}

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it at the start, and again when the configured directory changes.

        It never raises: Serve would kill the replica, and with it the model that works.
        """
        self._configured = str(user_config["directory"])
        target = await asyncio.to_thread(ReloadTarget.read, self._key)
        wanted = [(self._configured, "")]
        if target is not None and target.configured == self._configured:
            wanted.insert(0, (target.directory, target.version))
        for directory, version in wanted:
            try:
                self._use(await self._load(directory, version))
                return
            except OtherVersionError as error:
                self._refuse(str(error))
                if self._config.most_replicas > 1:
                    return  # two versions side by side are worse than a replica less
            except LOAD_ERRORS as error:
                self._refuse(str(error))

    async def score_batch(
        self, items: Sequence[ScoreItem], truncation: Truncation, per_token: bool = False
    ) -> ModelScores:
        """Score a list in order. An item that cannot be encoded never joins a batch."""
        loaded = self._loaded
        if loaded is None:
            await asyncio.sleep(NOT_LOADED_S)
            loaded = self._loaded
        if loaded is None:
            raise NotLoaded(self._error)
        model = loaded.model
        inputs, errors = await asyncio.to_thread(
            model.encode_all,
            items,
            truncation,
            per_token=per_token,
            max_tokens=self._config.max_tokens,
        )
        values = await loaded.batcher.submit([i for i in inputs if i is not None])
        answer = model.answer(inputs, values, errors)
        seen = self._statistics.get(model.version, VersionStatistics(version=model.version))
        self._statistics[model.version] = seen.with_scores(answer.scores)
        if self._config.log_texts:
            for item, score in zip(items, answer.scores, strict=True):
                logger.warning("%s@%s %s %r", self._name, model.version, score, item)
        return answer

    async def status(self) -> ModelStatus:
        statistics = tuple(self._statistics.values())
        if self._loaded is None:
            return ModelStatus(model=self._name, error=self._error, reload_error=self._reload_error)
        model = self._loaded.model
        return ModelStatus(
            model=self._name,
            version=model.version,
            fingerprint=model.fingerprint,
            context=model.context,
            vocabulary=model.vocabulary,
            reload_error=self._reload_error,
            reference=tuple(model.head.info.get("reference_quantiles") or ()),
            statistics=statistics,
        )

    async def prepare(self, directory: str) -> tuple[str, str]:
        """Load a version beside the one that serves; gives its version, or "" and why not."""
        try:
            self._prepared = await self._load(directory)
        except LOAD_ERRORS as error:
            self._refuse(str(error))
            return "", str(error)
        return self._prepared.model.version, ""

    async def switch(self, directory: str, version: str) -> ModelStatus:
        """Serve what ``prepare`` loaded; a replica that started in between loads it now."""
        if self._prepared is not None and self._prepared.model.version == version:
            self._use(self._prepared)
        else:
            await self._catch_up(
                ReloadTarget(configured=self._configured, directory=directory, version=version)
            )
        return await self.status()

    async def abandon(self, reason: str) -> None:
        """Drop what ``prepare`` loaded, as a replica could not load it; the old one serves on."""
        self._refuse(reason)

    async def target(self, directory: str, version: str) -> None:
        """Note in the key-value store what all replicas should serve from now on."""
        target = ReloadTarget(configured=self._configured, directory=directory, version=version)
        await asyncio.to_thread(target.write, self._key)

    async def check_health(self) -> None:
        """Serve asks every few seconds; a replica that missed a reload, or whose files could not
        be read when it started, tries again here."""
        if self._catching_up is not None and not self._catching_up.done():
            return
        if self._loaded is None and self._configured:
            again = self.reconfigure({"directory": self._configured})
            self._catching_up = asyncio.create_task(again)
            return
        target = await asyncio.to_thread(ReloadTarget.read, self._key)
        if (
            target is None
            or target.configured != self._configured
            or (self._loaded is not None and target.version == self._loaded.model.version)
            or target == self._refused_target
        ):
            return
        self._catching_up = asyncio.create_task(self._catch_up(target))

    async def _catch_up(self, target: ReloadTarget) -> None:
        try:
            self._use(await self._load(target.directory, target.version))
        except LOAD_ERRORS as error:
            self._refused_target = target
            self._refuse(str(error))

    async def _load(self, directory: str, version: str = "") -> _Loaded:
        """Raises one of ``LOAD_ERRORS``, also when it is not the version that was wanted."""
        model = await asyncio.to_thread(_load_model, self._name, directory, self._config)
        if version and model.version != version:
            raise OtherVersionError(
                f"{directory} was changed after it was loaded elsewhere: it is version "
                f"{model.version} now, the other replicas serve {version}; load it again"
            )
        batcher = TokenBudgetBatcher(
            model.values, token_budget=self._config.token_budget, wait_s=self._config.batch_wait_s
        )
        return _Loaded(model=model, directory=directory, batcher=batcher)

    def _use(self, loaded: _Loaded) -> None:
        self._loaded, self._prepared = loaded, None
        self._error = self._reload_error = None

    def _refuse(self, reason: str) -> None:
        self._prepared = None
        self._reload_error = reason
        if self._loaded is None:
            self._error = reason


def _load_model(name: str, directory: str, config: RewardServiceConfig) -> RewardModel:
    import torch
    import transformers

    from reward_service.model import RewardModel

    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    return RewardModel.load(
        Path(directory),
        name=name,
        device="cuda" if config.num_gpus_per_replica > 0 else "cpu",
        token_budget=config.token_budget,
        one_by_one=config.one_by_one,
    )

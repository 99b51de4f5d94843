"""The Ray Serve application: an HTTP ingress before replicas of each reward model.

    client ──HTTP──> proxy ──> Ingress ──handle──> ModelReplica "model-<name>" (1 .. n each)
    PPO ─────────────────────────────handle───────────^

The ingress checks requests (``http_api``) and retries what a dying replica lost; a replica
encodes, batches across callers by token budget and scores. ``RewardService`` starts all of it
from a driver that has connected to Ray, and takes it down again.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle

from reward_service.batcher import TokenBudgetBatcher
from reward_service.checkpoint import check_files
from reward_service.client import RETRY_PAUSES_S, HandleScorer
from reward_service.config import RewardServiceConfig
from reward_service.encoding import Truncation
from reward_service.http_api import ModelStatus, RequestError, build_app
from reward_service.score import ModelScores, ScoreItem

if TYPE_CHECKING:
    from fastapi import FastAPI

    from reward_service.model import RewardModel

logger = logging.getLogger(__name__)

CONCURRENT_CALLS = 256
"""Requests that a replica or ingress holds at once; the rest wait in the caller's queue."""


class ModelReplica:
    """One process with one reward model. Scores lists for the ingress and for PPO alike."""

    def __init__(self, name: str, directory: str, config: RewardServiceConfig) -> None:
        self._name = name
        self._model: RewardModel | None = None
        self._error: str | None = None
        try:
            self._model = _load(name, directory, config)
        except (ValueError, OSError, RuntimeError) as error:
            # Raising would only make Serve start the replica again and again. ``status`` tells.
            self._error = str(error)
            return
        self._batcher = TokenBudgetBatcher(
            self._model.score_ids, token_budget=config.token_budget, wait_s=config.batch_wait_s
        )

    async def score_batch(self, items: list[ScoreItem], truncation: Truncation) -> ModelScores:
        """Score a list in order. An item that cannot be encoded never joins a batch."""
        if self._model is None:
            raise RuntimeError(self._error)
        model = self._model
        encoded, errors = await asyncio.to_thread(model.encode_all, items, truncation)
        found = iter(await self._batcher.submit([ids for ids in encoded if ids is not None]))
        scores = [None if ids is None else next(found) for ids in encoded]
        return model.answer(scores, [len(ids or ()) for ids in encoded], errors)

    async def status(self) -> ModelStatus:
        if self._model is None:
            return ModelStatus(model=self._name, error=self._error)
        return ModelStatus(
            model=self._name,
            version=self._model.version,
            fingerprint=self._model.fingerprint,
            context=self._model.context,
        )


def _load(name: str, directory: str, config: RewardServiceConfig) -> RewardModel:
    import torch
    import transformers

    from reward_service.model import RewardModel

    torch.set_num_threads(config.threads)
    transformers.utils.logging.disable_progress_bar()
    return RewardModel.load(
        directory,
        name=name,
        device="cuda" if config.num_gpus_per_replica > 0 else "cpu",
        token_budget=config.token_budget,
        one_by_one=config.one_by_one,
    )


@serve.ingress()
class Ingress:
    """The HTTP side. Holds no model and no torch."""

    def __init__(
        self, config: RewardServiceConfig, handles: dict[str, DeploymentHandle[Any]]
    ) -> None:
        self._config = config
        self._handles = handles

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self, self._config)

    @property
    def model_names(self) -> list[str]:
        return list(self._handles)

    async def score(
        self, model: str, items: Sequence[ScoreItem], truncation: Truncation
    ) -> ModelScores:
        """Ask a replica; ask again when it dies, until the deadline."""
        handle = self._handles[model]
        deadline = time.monotonic() + self._config.timeout_s
        for tries in range(self._config.max_retries + 1):
            try:
                return await asyncio.wait_for(
                    handle.score_batch.remote(list(items), truncation),
                    max(0.0, deadline - time.monotonic()),
                )
            except TimeoutError:
                raise RequestError(
                    504, "timeout", f"not scored within {self._config.timeout_s:g} s"
                ) from None
            except BackPressureError as error:
                raise RequestError(
                    503, "overloaded", "too many requests wait: try again", retry_after_s=2
                ) from error
            except (RayActorError, DeploymentUnavailableError):
                await asyncio.sleep(RETRY_PAUSES_S[min(tries, len(RETRY_PAUSES_S) - 1)])
            except RayTaskError as error:
                logger.exception("reward model %s failed", model)
                raise RequestError(500, "model_failed", f"model {model} failed") from error
        raise RequestError(
            503, "unavailable", f"model {model} has no live replica: try again", retry_after_s=5
        )

    async def statuses(self) -> dict[str, ModelStatus]:
        return {name: await self._status(name) for name in self._handles}

    async def _status(self, name: str) -> ModelStatus:
        try:
            status: ModelStatus = await asyncio.wait_for(self._handles[name].status.remote(), 5.0)
            return status
        except (TimeoutError, RayActorError, RayTaskError, RayServeException) as error:
            return ModelStatus(model=name, error=f"no answer ({type(error).__name__})")


class RewardService:
    """The application as its driver sees it.

    Example:
        >>> with RewardService.start(config, {"quality": Path("runs/x/reward_model")}) as service:
        ...     service.scorer("quality").score([ScoreItem(prompt="...", response="...")])
        ...     print(service.url)

    ``start(wait=False)`` returns before processes are up, so that their start overlaps with other
    work; call ``wait_ready`` before scoring.
    """

    def __init__(
        self, config: RewardServiceConfig, models: Mapping[str, Path], app_name: str, url: str
    ) -> None:
        self._config = config
        self._models = dict(models)
        self._app_name = app_name
        self.url = url
        self._statuses: dict[str, ModelStatus] = {}

    @classmethod
    def start(
        cls,
        config: RewardServiceConfig,
        models: Mapping[str, Path],
        *,
        app_name: str = "reward",
        wait: bool = True,
    ) -> RewardService:
        """Deploy the application on the Ray instance that the driver is connected to.

        Where Serve runs in the cluster already, its proxy is shared and the application answers
        under ``/<app_name>``; an application of that name left by a dead driver is replaced.

        Raises:
            FileNotFoundError, ValueError: A directory is not a reward model.
            RuntimeError: The port is taken, or a model cannot be loaded.
            TimeoutError: Not ready within ``start_timeout_s``.
        """
        if not models:
            raise ValueError("the reward service was given no model to serve")
        for directory in models.values():
            check_files(Path(directory))
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        address, prefix = _join_or_start_serve(config, app_name)
        service = cls(config, models, app_name, f"http://{address}{prefix.rstrip('/')}")
        try:
            serve.run_many(
                [serve.RunTarget(_application(config, models), app_name, prefix)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
            if wait:
                service.wait_ready()
        except BaseException:
            service.shutdown()
            raise
        return service

    def wait_ready(self) -> None:
        """Return once every model is loaded; raises as ``start`` does, after taking it down."""
        try:
            self._wait_running(time.monotonic() + self._config.start_timeout_s)
        except BaseException:
            self.shutdown()
            raise

    def _wait_running(self, deadline: float) -> None:
        while True:
            app = serve.status().applications.get(self._app_name)
            state = app.status.value if app else "not deployed"
            if app and state == "RUNNING":
                break
            if state == "DEPLOY_FAILED" or time.monotonic() > deadline:
                parts = app.deployments.items() if app else ()
                seen = "; ".join(f"{n}: {d.status.value} {d.message}".strip() for n, d in parts)
                kind = RuntimeError if state == "DEPLOY_FAILED" else TimeoutError
                raise kind(
                    f"the reward service is {state} after up to {self._config.start_timeout_s:g} "
                    f"s ({seen or 'nothing deployed'}); free in the cluster: "
                    f"{_free_resources()}: lower reward.service.num_cpus_per_replica or "
                    "num_replicas, or raise start_timeout_s"
                )
            time.sleep(0.1)
        for name in self._models:
            status = (
                self._handle(name)
                .status.remote()
                .result(timeout_s=max(1.0, deadline - time.monotonic()))
            )
            if status.error is not None:
                raise RuntimeError(f"reward model {name!r} cannot be served: {status.error}")
            self._statuses[name] = status

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """Version and fingerprint of each model, as they were when it became ready."""
        return self._statuses

    def scorer(self, name: str) -> HandleScorer:
        """A scorer over the handle of one model. Raises ValueError for an unknown name."""
        if name not in self._models:
            raise ValueError(f"no model is served as {name!r}; served: {sorted(self._models)}")
        return HandleScorer(
            self._handle(name),
            model=name,
            num_replicas=self._config.num_replicas,
            timeout_s=self._config.timeout_s,
            max_retries=self._config.max_retries,
        )

    def scorers(self) -> dict[str, HandleScorer]:
        return {name: self.scorer(name) for name in self._models}

    def shutdown(self) -> None:
        """Take the application down, and Serve with it when nothing else is deployed."""
        if not ray.is_initialized():
            return
        if _serve_client() is None:
            return
        if set(serve.status().applications) <= {self._app_name}:
            serve.shutdown()
        else:
            serve.delete(self._app_name)

    def _handle(self, name: str) -> DeploymentHandle[Any]:
        return serve.get_deployment_handle(_deployment_name(name), self._app_name)

    def __enter__(self) -> RewardService:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


def _deployment_name(model: str) -> str:
    return f"model-{model}"


def _application(config: RewardServiceConfig, models: Mapping[str, Path]) -> serve.Application:
    environment = {
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads would starve engine and learner
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "",  # bytecode halves the next start
        "HF_HUB_OFFLINE": "1",
    }
    limits = {
        "max_ongoing_requests": CONCURRENT_CALLS,
        "max_queued_requests": config.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=2),
        "graceful_shutdown_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    replica = serve.deployment(ModelReplica).options(
        num_replicas=config.num_replicas,
        ray_actor_options={
            "num_cpus": config.num_cpus_per_replica,
            "num_gpus": config.num_gpus_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        **limits,
    )
    handles = {
        name: replica.options(name=_deployment_name(name)).bind(
            name, str(Path(directory).resolve()), config
        )
        for name, directory in models.items()
    }
    ingress = serve.deployment(Ingress).options(
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": environment}}, **limits
    )
    return ingress.bind(config, handles)


def _join_or_start_serve(config: RewardServiceConfig, app_name: str) -> tuple[str, str]:
    """``host:port`` of the proxy and our route prefix there; starts Serve when it does not run."""
    client = _serve_client()
    if client is not None:
        options = client.http_config
        alone = set(serve.status().applications) <= {app_name}
        return _address(options.host, options.port), "/" if alone else f"/{app_name}"
    port = _free_port(config.host, config.port)
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return _address(config.host, port), "/"


def _address(host: str, port: int) -> str:
    """Where a client on this machine reaches a server that listens on ``host``."""
    if host in ("0.0.0.0", "::"):  # every interface, loopback too
        host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _serve_client() -> Any:
    """The client of a Serve instance that runs in this cluster, or ``None``."""
    # Serve has no public way to ask; ``serve.start`` would start one.
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _free_port(host: str, port: int) -> int:
    """``port`` when it can be listened on, or any free one for 0. Raises RuntimeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise RuntimeError(
                f"the reward service cannot listen on {host}:{port} ({error.strerror}): end what "
                "uses that port, or set reward.service.port to another one (0 picks a free one)"
            ) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _free_resources() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free[k]:g} {k}" for k in ("CPU", "GPU") if k in free) or "nothing"

"""The Ray Serve application: HTTP ingresses before replicas of each reward model.

    client ──HTTP──> proxy ──> Ingress ──handle──> ModelReplica "model-<name>" (1 .. n each)
    PPO ─────────────────────────────handle───────────^

The ingress checks requests (``http_api``) and retries what a dying replica lost (``dispatch``); a
replica encodes, batches across callers by token budget and scores (``replica``).
``RewardService`` starts all of it from a driver that has connected to Ray, and takes it down
again; ``application`` is what ``serve deploy`` builds from a file.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from reward_service.checkpoint import check_files
from reward_service.client import HandleScorer
from reward_service.config import RewardServiceConfig, ServeApplicationConfig, check_names
from reward_service.dispatch import Dispatcher
from reward_service.ensemble import EnsembleScorer
from reward_service.http_api import RequestError
from reward_service.ingress import Ingress, KeyedRequests
from reward_service.replica import ModelReplica, ReloadTarget
from reward_service.score import Scorer
from reward_service.security import check_binding, read_token_digests
from reward_service.statistics import ModelStatus

logger = logging.getLogger(__name__)

ROOM_BESIDE_SCORES = 64
"""Requests of other kinds that an ingress holds at once, and those that it is just refusing."""


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
        self,
        config: RewardServiceConfig,
        models: Mapping[str, Path],
        app_name: str,
        url: str,
        deployment_id: str,
    ) -> None:
        self._deployment_id = deployment_id
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
            FileNotFoundError, ValueError: A directory is not a reward model, an ensemble has a
                member that is not served, or others could reach the service without a token.
            RuntimeError: The port is taken, or a model cannot be loaded.
            TimeoutError: Not ready within ``start_timeout_s``.
        """
        if not models:
            raise ValueError("the reward service was given no model to serve")
        check_names(models, config)
        for directory in models.values():
            check_files(Path(directory))
        token_digests = read_token_digests(config.tokens_file)
        check_binding(config.host, token_digests)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        address, prefix = _join_or_start_serve(config, app_name)
        deployment_id = uuid.uuid4().hex
        built = _application(config, models, token_digests, deployment_id)
        url = f"http://{address}{prefix.rstrip('/')}"
        service = cls(config, models, app_name, url, deployment_id)
        try:
            serve.run_many(
                [serve.RunTarget(built, app_name, prefix)],
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

    def scorer(self, name: str) -> Scorer:
        """A scorer over the handles of one model or ensemble. Raises ValueError for others."""
        ensemble = self._config.ensembles.get(name)
        if ensemble is not None:
            members = [self.scorer(member) for member in ensemble.members]
            return EnsembleScorer(name, members, ensemble)
        if name not in self._models:
            raise ValueError(f"no model is served as {name!r}; served: {sorted(self._models)}")
        autoscaling = self._config.autoscaling
        return HandleScorer(
            self._handle(name),
            model=name,
            num_replicas=autoscaling.min_replicas if autoscaling else self._config.num_replicas,
            timeout_s=self._config.timeout_s,
            max_retries=self._config.max_retries,
        )

    def scorers(self) -> dict[str, Scorer]:
        return {name: self.scorer(name) for name in [*self._models, *self._config.ensembles]}

    def reload(self, name: str, directory: Path) -> ModelStatus:
        """Load another version of a model while it serves; returns when all replicas have it.

        Raises:
            ValueError: It cannot be loaded; the version before it still serves.
            TimeoutError: Not done within ``reload_timeout_s``.
        """
        if name not in self._models:
            raise ValueError(f"no model is served as {name!r}; served: {sorted(self._models)}")
        # Straight to the replicas: the ingresses may be full of requests.
        dispatcher = Dispatcher(self._config, {name: self._handle(name)})
        try:
            status = asyncio.run(dispatcher.load(name, directory.resolve()))
        except RequestError as error:
            kind = TimeoutError if error.status == 504 else ValueError
            raise kind(f"reward model {name!r} was not reloaded: {error.message}") from None
        self._statuses[name] = status
        return status

    def shutdown(self) -> None:
        """Take the application down, and Serve with it when nothing else is deployed.

        Requests under way are answered before, for at most ``shutdown_timeout_s``.
        """
        if not ray.is_initialized():
            return
        if _serve_client() is None:
            return
        if self._statuses:  # it was ready once
            self._close_ingresses()
        ReloadTarget.forget(self._deployment_id)
        if set(serve.status().applications) <= {self._app_name}:
            serve.shutdown()
        else:
            serve.delete(self._app_name)

    def _close_ingresses(self) -> None:
        # Serve kills its proxies at once when it shuts down, and with them what they wait for.
        ingresses = serve.get_deployment_handle("Ingress", self._app_name)
        self._statuses = {}
        try:
            ingresses.broadcast("close").results(timeout_s=self._config.shutdown_timeout_s)
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning(
                "the reward service is taken down with requests under way (%s)", repr(error)
            )

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


def application(args: dict[str, Any]) -> serve.Application:
    """What ``serve deploy`` builds: ``import_path: reward_service.service:application``, with
    ``args`` as in ``deploy/serve.yaml``. A model's directory can be changed while it serves, in
    ``user_config`` of the deployment ``model-<name>``.

    Raises:
        FileNotFoundError, ValueError: A directory is not a reward model, or a name or a setting
            is wrong.
    """
    config = ServeApplicationConfig.model_validate(args)
    check_names(config.models, config.service)
    for directory in config.models.values():
        check_files(directory)
    token_digests = read_token_digests(config.service.tokens_file)
    return _application(config.service, config.models, token_digests, uuid.uuid4().hex)


def _application(
    config: RewardServiceConfig,
    models: Mapping[str, Path],
    token_digests: tuple[str, ...],
    deployment_id: str,
) -> serve.Application:
    environment = {
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads would starve engine and learner
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "",  # bytecode halves the next start
        "HF_HUB_OFFLINE": "1",
    }
    limits: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=503, retry_after_s=2),
        "graceful_shutdown_timeout_s": config.shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": 5,
        "health_check_timeout_s": 60,
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
    }
    replica = serve.deployment(ModelReplica).options(
        **_replica_count(config),
        ray_actor_options={
            "num_cpus": config.num_cpus_per_replica,
            "num_gpus": config.num_gpus_per_replica,
            "resources": config.resources_per_replica,
            "runtime_env": {"env_vars": environment},
        },
        **limits,
    )
    handles = {
        name: replica.options(
            name=_deployment_name(name), user_config={"directory": str(Path(directory).resolve())}
        ).bind(name, config, deployment_id)
        for name, directory in models.items()
    }
    light = limits | {
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": environment}}
    }
    keyed = None
    if config.ingress_replicas > 1:
        keyed = serve.deployment(KeyedRequests).options(**light).bind(config, handles)
    # The ingress itself refuses what is too much, so that reloads and probes always find room.
    room = light | {"max_ongoing_requests": config.most_requests + ROOM_BESIDE_SCORES}
    ingress = serve.deployment(Ingress).options(num_replicas=config.ingress_replicas, **room)
    return ingress.bind(config, token_digests, handles, keyed)


def _replica_count(config: RewardServiceConfig) -> dict[str, Any]:
    wanted = config.autoscaling
    if wanted is None:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": wanted.min_replicas,
            "max_replicas": wanted.max_replicas,
            "target_ongoing_requests": wanted.target_ongoing_requests,
            "upscale_delay_s": wanted.upscale_delay_s,
            "downscale_delay_s": wanted.downscale_delay_s,
            "look_back_period_s": wanted.look_back_s,
            "metrics_interval_s": min(10.0, wanted.look_back_s / 2),
        }
    }


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
                "uses that port, or choose another one (--port of `rlhf serve`, or "
                "reward.service.port; 0 picks a free one)"
            ) from None
        chosen: int = probe.getsockname()[1]
        return chosen


def _free_resources() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free[k]:g} {k}" for k in ("CPU", "GPU") if k in free) or "nothing"

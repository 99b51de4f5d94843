"""The rollout actors of a pool: started, kept alive, and never serving stale weights.

Each worker is in one state::

    STARTING --built--> LOADING --confirmed--> SERVING
        ^                |  ^  ^                  |
        |                |  |  +--- new weights --+
        |                |  +--- refused: the same weights once more
        |          refused twice
        |                v
        |               REFUSING   (waits for the next weights)
        +-- respawned -- DEAD  <-- died, hung, or lost its engine, from any state

A worker that refuses weights (a corrupt tensor, a probe that disagrees) is given them once more,
since what spoilt them may have been passing; its confirmation says so. A worker that comes back
from DEAD passes LOADING with the fleet's current weights before it serves. Nothing here runs in
the background: the owner calls :meth:`Fleet.wait`, which advances the workers and returns what
has arrived.
"""

from __future__ import annotations

import enum
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config import RolloutConfig
from actors.environment import engine_environment
from actors.generation import EngineLost
from actors.rollout_actor import EngineInfo, RolloutActor
from actors.weights import UpdateConfirmation, WeightError, WeightMismatch, WeightUpdate


class State(enum.Enum):
    STARTING = "starting"
    LOADING = "loading weights"
    SERVING = "serving"
    REFUSING = "refusing to generate"
    DEAD = "dead"


@dataclass(eq=False)
class Worker:
    """One rollout actor as the driver sees it.

    Attributes:
        name: Also the actor's name in Ray's dashboard.
        pending: What STARTING or LOADING waits for, until ``deadline`` (monotonic seconds).
        loading: The update that it was last given.
        refusal: Why it refused that update the first time; empty if it did not.
        failures: Deaths since it last came to SERVING.
        reason: Why it is DEAD or REFUSING.
    """

    name: str
    state: State = State.DEAD
    handle: Any = None
    pending: Any = None
    deadline: float = 0.0
    failures: int = 0
    reason: str = "not started"
    info: EngineInfo | None = None
    loading: WeightUpdate | None = None
    refusal: str = ""
    confirmation: UpdateConfirmation | None = None
    error: Exception | None = field(default=None, repr=False)


class Fleet:
    """All workers of one pool. Not thread-safe."""

    def __init__(
        self, model_dir: Path, config: RolloutConfig, *, name: str, placement_group: Any = None
    ) -> None:
        self.workers = [Worker(name=f"{name}-{i}") for i in range(config.num_actors)]
        # What a worker must have loaded to serve; nothing of it can be replayed when the
        # update is None though the version is not 0, the checkpoint's.
        self.version = 0
        self.update: WeightUpdate | None = None
        self.info: EngineInfo | None = None  # of any worker: they are all alike
        self._model_dir = model_dir
        self._config = config
        self._placement_group = placement_group

    def of_state(self, *states: State) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in states]

    def bring_up(self) -> None:
        """Return when every worker serves, starting those that are dead.

        Raises:
            TimeoutError: a worker was not ready in time.
            WeightError: a worker refuses the current weights.
            RuntimeError: a worker keeps dying, or cannot be built.
        """
        while True:
            self.respawn()
            if not self.of_state(State.STARTING, State.LOADING):
                break
            self.wait([], 1.0)
        if refusing := self.of_state(State.REFUSING):
            raise WeightError(refusing[0].reason)

    def respawn(self) -> None:
        """Start every dead worker anew; returns at once.

        Raises:
            RuntimeError: it died too often in a row.
            Exception: what it died of, when a restart would not mend that.
        """
        for worker in self.of_state(State.DEAD):
            error, failures = worker.error, worker.failures
            mendable = error is None or isinstance(error, RayActorError | EngineLost)
            if mendable and failures <= self._config.max_retries:
                self._spawn(worker)
                continue
            worker.error, worker.failures = None, 0  # whoever tries again starts afresh
            if error is not None and not mendable:
                raise error
            raise RuntimeError(
                f"{worker.name} failed {failures} times in a row (rollout.max_retries is"
                f" {self._config.max_retries}); last: {worker.reason}"
            ) from error

    def require_hope(self) -> None:
        """Raise when no worker serves or is about to.

        Raises:
            WeightError: they all refuse the current weights.
        """
        if not self.of_state(State.STARTING, State.LOADING, State.SERVING):
            raise WeightError("; ".join(w.reason for w in self.of_state(State.REFUSING)))

    def wait(self, streams: Sequence[Any], timeout_s: float) -> list[Any]:
        """Advance workers that start or load; return the streams that have something to read."""
        pending = {
            worker.pending: worker for worker in self.of_state(State.STARTING, State.LOADING)
        }
        waited = [*pending, *streams]
        if not waited:
            return []
        until = min([w.deadline - time.monotonic() for w in pending.values()], default=timeout_s)
        ready, _ = ray.wait(
            waited,
            num_returns=1,
            timeout=max(0.0, min(timeout_s, until)),
            fetch_local=False,
        )
        if ready:  # whatever else is there by now
            ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0.0, fetch_local=False)
        for ref in ready:
            if ref in pending:
                self._advance(pending.pop(ref))
        for worker in pending.values():
            if time.monotonic() > worker.deadline:
                self._overdue(worker)
        return [stream for stream in streams if stream in ready]

    def broadcast(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        """Load ``update`` into every worker; all serve it afterwards, or an error is raised.

        Raises:
            WeightError: a worker refused it twice. Those that refuse do so until the next good
                update.
            TimeoutError: a worker did not confirm within ``update_timeout_s``.
        """
        self.version, self.update = update.version, update
        for worker in self.of_state(State.SERVING, State.REFUSING):
            self._load(worker)
        self.bring_up()
        return [cast(UpdateConfirmation, worker.confirmation) for worker in self.workers]

    def lose(self, worker: Worker, reason: str, error: Exception | None = None) -> None:
        """Declare a worker dead and make sure that its process is."""
        worker.state, worker.reason, worker.error = State.DEAD, reason, error
        worker.failures += 1
        worker.pending = worker.confirmation = None
        _end([worker], timeout_s=10.0)

    def shutdown(self, timeout_s: float = 20.0) -> None:
        """End every actor and return when the processes of this node are gone."""
        if not ray.is_initialized():
            return  # they went with it
        alive = [worker for worker in self.workers if worker.handle is not None]
        for worker in alive:
            worker.state, worker.reason, worker.pending = State.DEAD, "shut down", None
        if left := _end(alive, timeout_s):
            raise TimeoutError(f"rollout actors with process ids {left} live on")

    def _spawn(self, worker: Worker) -> None:
        config = self._config
        strategy = (
            PlacementGroupSchedulingStrategy(self._placement_group)
            if self._placement_group is not None
            else "DEFAULT"
        )
        actor = ray.remote(RolloutActor).options(
            # A name is taken until Ray has buried its last bearer, so each bearer's is new.
            name=f"{worker.name}-{uuid.uuid4().hex[:6]}",
            num_cpus=config.num_cpus_per_actor,
            num_gpus=config.num_gpus_per_actor,
            resources=config.resources_per_actor,
            max_restarts=0,  # Ray would bring it back with the weights of the checkpoint
            scheduling_strategy=strategy,
            runtime_env={"env_vars": engine_environment(config.engine)},
        )
        worker.handle = actor.remote(
            worker.name, str(self._model_dir), config.engine, config.probe_tolerance
        )
        worker.state, worker.error = State.STARTING, None
        worker.pending = worker.handle.start.remote()
        worker.deadline = time.monotonic() + config.start_timeout_s

    def _load(self, worker: Worker, refusal: str = "") -> None:
        """Give a worker the current weights; ``refusal`` is why it has refused them before."""
        worker.state, worker.confirmation = State.LOADING, None
        worker.loading, worker.refusal = self.update, refusal
        worker.pending = worker.handle.load.remote(self.update)
        worker.deadline = time.monotonic() + self._config.update_timeout_s

    def _advance(self, worker: Worker) -> None:
        """Take the answer that STARTING or LOADING was waiting for."""
        starting, ref = worker.state is State.STARTING, worker.pending
        outdated = worker.loading is not self.update
        worker.pending = None
        try:
            answer = ray.get(ref)
        except RayActorError as error:
            self.lose(
                worker, f"{worker.name} died while {worker.state.value}: {brief(error)}", error
            )
        except RayTaskError as error:
            cause = cast(Exception, error.cause)
            if isinstance(cause, WeightError) and outdated:
                self._load(worker)
            elif isinstance(cause, WeightError):
                self._refused(worker, cause)
            else:
                self.lose(worker, f"{worker.name}: {cause}", cause)
        else:
            if starting:
                worker.info = self.info = answer
            else:
                worker.confirmation = replace(answer, refusal=worker.refusal)
            if self.update is not None and (starting or outdated):
                self._load(worker)
            elif starting and self.version != 0:
                worker.state = State.REFUSING
                worker.reason = (
                    f"{worker.name} was restarted and weight version {self.version} came by NCCL,"
                    " so it cannot be replayed: send it again"
                )
            else:
                worker.state, worker.reason, worker.failures = State.SERVING, "", 0

    def _refused(self, worker: Worker, error: WeightError) -> None:
        """Give the same weights once more; stop at the second refusal."""
        if not worker.refusal and not isinstance(error, WeightMismatch):
            self._load(worker, refusal=str(error))
            return
        twice = "twice: " if worker.refusal else ""
        worker.state, worker.reason = State.REFUSING, f"{twice}{error}"

    def _overdue(self, worker: Worker) -> None:
        config = self._config
        if worker.state is State.STARTING:
            there, free = ray.cluster_resources(), ray.available_resources()
            reason = (
                f"{worker.name} was not ready within {config.start_timeout_s:g} s"
                f" (rollout.start_timeout_s). It asks for {config.num_cpus_per_actor:g} CPU and"
                f" {config.num_gpus_per_actor:g} GPU; the cluster has {there.get('CPU', 0):g} CPU"
                f" ({free.get('CPU', 0):g} free) and {there.get('GPU', 0):g} GPU"
                f" ({free.get('GPU', 0):g} free)"
            )
        else:
            reason = (
                f"{worker.name} did not confirm weight version {self.version} within"
                f" {config.update_timeout_s:g} s (rollout.update_timeout_s)"
            )
        self.lose(worker, reason, TimeoutError(reason))


def brief(error: Exception) -> str:
    """The telling lines of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if line.startswith(("The actor is dead because", "Worker exit"))
    ]
    return " ".join(dict.fromkeys([*lines[:1], *telling]))


def _end(workers: Sequence[Worker], timeout_s: float) -> list[int]:
    """End actors and their processes; returns ids of those on this node that live on.

    Ray asks a process to end; one that hangs does not hear it and is killed.
    """
    processes = [process for worker in workers if (process := _process_here(worker.info))]
    for worker in workers:
        if worker.handle is not None:
            ray.kill(worker.handle, no_restart=True)
        worker.handle = worker.info = None
    _, deaf = psutil.wait_procs(processes, timeout=min(3.0, timeout_s))
    for process in deaf:
        process.kill()
    _, left = psutil.wait_procs(deaf, timeout=timeout_s)
    return [process.pid for process in left]


def _process_here(info: EngineInfo | None) -> Any:
    """The process of an actor (a ``psutil.Process``) if it lives on this node."""
    if info is None or info.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        process = psutil.Process(info.pid)
    except psutil.NoSuchProcess:
        return None
    return process if process.create_time() == info.created else None

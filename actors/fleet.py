"""The rollout actors of a pool: started, kept alive, and never serving stale weights.

:mod:`actors.worker` has the states of each. A worker that refuses weights (a corrupt tensor, a
probe that disagrees) is given them once more, since what spoilt them may have been passing; its
confirmation says so. A worker that is lost is started anew, wherever there is room, and is given
the fleet's current weights before it serves.

How many there are follows the cluster. ``num_actors`` are always asked for, which is what an
autoscaler sees; while ``min_actors`` of them serve, the others may be away, and come when there is
room that nothing else of the run needs. Up to ``max_actors`` are there as long as nodes have such
room. Workers leave a node that is being drained at once.

Nothing here runs in the background: the owner calls :meth:`Fleet.check`, :meth:`Fleet.respawn` and
:meth:`Fleet.wait` in turn. The last advances the workers and returns what has arrived.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from actors.config import RolloutConfig
from actors.environment import engine_environment
from actors.generation import EngineLost
from actors.nodes import Nodes, compare, read_nodes, room, why_leave
from actors.processes import brief, end
from actors.rollout_actor import EngineInfo, RolloutActor
from actors.room_requests import RoomRequests
from actors.weights import (
    UpdateConfirmation,
    WeightError,
    WeightMismatch,
    WeightsLost,
    WeightUpdate,
)
from actors.worker import Event, State, Worker, judge_silence

COMING = State.RESTARTING, State.STALE, State.HEALTHY, State.SUSPECT
"""Those that serve or will without being started."""

LOOK_EVERY_S = 1.0
"""How often the nodes of the cluster are looked at: one call to its control store."""
SETTLE_S = 2.0
"""How long nodes may not show yet what was started, ended or given back."""
ASK_EVERY_S = 2.0
"""How long a worker that has samples may be silent before it is asked whether it lives."""
REST_S = 30.0
"""How long a worker that could not be started rests while enough others serve."""


class Fleet:
    """All workers of one pool. Not thread-safe.

    Args:
        reserve: Resources of the cluster that workers beyond ``min_actors`` leave to others.
        tell: Called with a sentence for every worker that is lost, and that joins.
        look: Replaced in tests.
    """

    def __init__(
        self,
        model_dir: Path,
        config: RolloutConfig,
        *,
        name: str,
        reserve: Mapping[str, float] | None = None,
        tell: Callable[[str], None] = lambda _: None,
        look: Callable[[], Nodes] = read_nodes,
    ) -> None:
        self._names = (f"{name}-{i}" for i in itertools.count())
        self.workers = [Worker(name=next(self._names)) for _ in range(config.num_actors)]
        # What a worker must have loaded to serve; nothing of it can be replayed when the
        # update is None though the version is not 0, the checkpoint's.
        self.version = 0
        self.update: WeightUpdate | None = None
        self.info: EngineInfo | None = None  # of any worker: they are all alike
        self.losses = 0
        """Workers lost since the fleet was made."""
        self._model_dir = model_dir
        self._config = config
        self._ask = config.actor_resources
        self._reserve = reserve or {}
        self._tell = tell
        self._look = look
        self._nodes: Nodes = {}
        self._looked = -LOOK_EVERY_S
        self._moved = -SETTLE_S  # when this fleet last took or gave back room
        self._requests = RoomRequests(self._ask)

    def of_state(self, *states: State) -> list[Worker]:
        return [worker for worker in self.workers if worker.state in states]

    @property
    def enough(self) -> bool:
        """Whether as many have the current weights as must."""
        return len(self.of_state(State.HEALTHY, State.SUSPECT)) >= self._config.fewest_actors

    def bring_up(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Return when all workers serve or, where fewer may, those that are not being started.

        False when ``stop``, looked at about once a second, ended the wait for them.

        Raises:
            TimeoutError: a worker was not ready in time.
            WeightError: a worker refuses the current weights.
            RuntimeError: a worker keeps dying, or cannot be built.
        """
        while True:
            self.check()
            self.respawn()
            hope = self.of_state(State.RESTARTING) and not self._weights_lost
            if not self.of_state(State.STALE) and (self.enough or not hope):
                break
            if stop():
                return False
            self.wait([], 1.0)
        if not self.enough:
            raise self._refusal()
        return True

    def check(self) -> None:
        """Give up workers whose node is gone or leaves, and free what was asked for and is there,
        to see whose it is."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._nodes, self._looked = self._look(), time.monotonic()
        for worker in self.workers:
            if worker.info is not None and (why := why_leave(self._nodes, worker.info.node_id)):
                self.lose(worker, f"{worker.name}: {why}", blameless=True)
        if self._requests.give_back():
            self._moved = time.monotonic()

    def respawn(self) -> None:
        """Start dead workers anew, those beyond the fewest and more while there is room; returns at
        once.

        Raises:
            RuntimeError: one died too often in a row, and too few others serve.
            Exception: what it died of, when a restart would not mend that.
        """
        waiting = []
        for worker in self.of_state(State.DEAD):
            error, failures = worker.error, worker.failures
            mendable = error is None or isinstance(error, RayError | EngineLost)
            others = len(self.of_state(State.STALE, State.HEALTHY, State.SUSPECT))
            if worker.extra:
                self.workers.remove(worker)
            elif others >= self._config.fewest_actors and time.monotonic() < worker.rests_until:
                continue
            elif mendable and failures <= self._config.max_retries:
                if len(self.of_state(*COMING)) < self._config.fewest_actors:
                    self._spawn(worker)
                else:
                    waiting.append(worker)
            elif others >= self._config.fewest_actors:
                worker.error, worker.failures = None, self._config.max_retries  # one more try
                worker.rests_until = time.monotonic() + REST_S
                self._tell(f"{others} others serve; {worker.name} is tried again in {REST_S:g} s")
            else:
                worker.error, worker.failures = None, 0  # whoever tries again starts afresh
                if error is not None and not mendable:
                    raise error
                raise RuntimeError(
                    f"{worker.name} failed {failures} times in a row (rollout.max_retries is"
                    f" {self._config.max_retries}); last: {worker.reason}"
                ) from error
        self._place(waiting)
        self._grow()

    def withdraw(self) -> None:
        """Ask for no room until the next :meth:`respawn`."""
        self._requests.keep(0)
        self._moved = time.monotonic()

    def require_hope(self) -> None:
        """Raise when no worker serves or is about to.

        Raises:
            WeightError: they all refuse the current weights.
        """
        serving = self.of_state(State.STALE, State.HEALTHY, State.SUSPECT)
        if not serving and (self._weights_lost or not self.of_state(State.RESTARTING)):
            raise self._refusal()

    def wait(self, streams: Sequence[Any], timeout_s: float) -> list[Any]:
        """Advance workers that start or load; return the streams that have something to read."""
        pending = {
            worker.pending: worker for worker in self.of_state(State.RESTARTING, State.STALE)
        }
        waited = [*pending, *streams]
        if not waited:
            time.sleep(min(timeout_s, 0.1))
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

    def listen(self, busy: Iterable[Worker]) -> None:
        """Ask those that have samples, and were not heard of for a while, whether they live.

        Who does not answer is suspected, and then lost: a process that hangs, a node whose network
        is cut. A long decoding step is no reason: the actor answers beside it.
        """
        for worker in dict.fromkeys([*busy, *self.of_state(State.SUSPECT)]):
            now = time.monotonic()
            if worker.ping is None:
                if now - worker.heard > ASK_EVERY_S:
                    worker.ping = worker.handle.ping.remote()
                    worker.silent_since = now
                continue
            if ray.wait([worker.ping], timeout=0.0)[0]:
                try:
                    ray.get(worker.ping)
                except RayError as error:
                    self.lose(worker, f"{worker.name} died: {brief(error)}", error)
                else:
                    self.heard(worker)
                continue
            assert worker.silent_since is not None
            limit = self._config.heartbeat_timeout_s
            event = judge_silence(now - worker.silent_since, limit)
            if event is Event.LOST:
                self.lose(
                    worker,
                    f"{worker.name} did not answer for {limit:g} s (rollout.heartbeat_timeout_s)",
                )
            elif event is not None:
                worker.on(event)

    def heard(self, worker: Worker) -> None:
        """A worker that has samples, or is given some, gave a sign of life."""
        worker.heard, worker.ping, worker.silent_since = time.monotonic(), None, None
        worker.on(Event.HEARD)

    def broadcast(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        """Load ``update`` into every worker; those that are up serve it afterwards, or an error is
        raised. Returns their confirmations.

        Raises:
            WeightError: a worker refused it twice. Those that refuse do so until the next good
                update.
            RuntimeError: a worker did not confirm within ``update_timeout_s``, time and again.
        """
        self.version, self.update = update.version, update
        for worker in self.of_state(State.HEALTHY, State.SUSPECT, State.REFUSING):
            self._load(worker)
        self.bring_up()
        serving = self.of_state(State.HEALTHY)
        return [cast(UpdateConfirmation, worker.confirmation) for worker in serving]

    def lose(
        self,
        worker: Worker,
        reason: str,
        error: Exception | None = None,
        *,
        blameless: bool = False,
    ) -> None:
        """Declare a worker dead and make sure that its process is."""
        worker.on(Event.LOST)
        worker.reason, worker.error = reason, error
        worker.blameless = blameless or isinstance(error, ActorUnavailableError)
        worker.failures += not worker.blameless
        worker.pending = worker.confirmation = worker.ping = worker.silent_since = None
        self.losses += 1
        self._tell(f"lost: {reason}")
        end([worker], timeout_s=10.0)
        self._moved = time.monotonic()

    def shutdown(self, timeout_s: float = 20.0) -> None:
        """End every actor and return when the processes of this node are gone."""
        if not ray.is_initialized():
            return  # they went with it
        self.withdraw()
        alive = [worker for worker in self.workers if worker.handle is not None]
        for worker in alive:
            worker.state, worker.reason, worker.pending = State.DEAD, "shut down", None
        if left := end(alive, timeout_s):
            raise TimeoutError(f"rollout actors with process ids {left} live on")

    def _place(self, waiting: Sequence[Worker]) -> None:
        """Start as many of those beyond the fewest as there is room for, and ask for the others.

        Nothing is asked for while one would fit into what is kept for others: it would get that.
        """
        if self._looked < self._moved + SETTLE_S:
            return
        fit = room(self._nodes, self._ask, {}, 0)
        present = len(self.workers) - len(self.of_state(State.DEAD))
        started = waiting[: room(self._nodes, self._ask, self._reserve, present)]
        for worker in started:
            self._spawn(worker)
        known = any(node.free for node in self._nodes.values())  # not through ray://
        self._request(len(waiting) - len(started) if known and len(started) == fit else 0)

    def _request(self, count: int) -> None:
        if count and not self._requests:
            self._tell(f"{count} more of the wanted actors wait for room. {compare(self._ask)}")
        self._requests.keep(count)

    def _grow(self) -> None:
        """Start as many more workers as there is room for, once all others have theirs."""
        spare = self._config.most_actors - len(self.workers)
        if spare <= 0 or self.of_state(State.DEAD, State.RESTARTING) or not self._nodes:
            return
        for _ in range(min(spare, room(self._nodes, self._ask, self._reserve, len(self.workers)))):
            worker = Worker(name=next(self._names), extra=True)
            self.workers.append(worker)
            self._spawn(worker)
            self._tell(f"there is room for one more: starting {worker.name}")

    def _spawn(self, worker: Worker) -> None:
        config = self._config
        actor = ray.remote(RolloutActor).options(
            # A name is taken until Ray has buried its last bearer, so each bearer's is new.
            name=f"{worker.name}-{uuid.uuid4().hex[:6]}",
            num_cpus=config.num_cpus_per_actor,
            num_gpus=config.num_gpus_per_actor,
            resources=config.resources_per_actor,
            max_restarts=0,  # Ray would bring it back with the weights of the checkpoint
            runtime_env={"env_vars": engine_environment(config.engine)},
        )
        worker.handle = actor.remote(
            worker.name, str(self._model_dir), config.engine, config.probe_tolerance
        )
        worker.on(Event.SPAWNED)
        worker.error = None
        worker.pending = worker.handle.start.remote()
        self._moved = time.monotonic()
        worker.deadline = self._moved + config.start_timeout_s

    def _load(self, worker: Worker, refusal: str = "") -> None:
        """Give a worker the current weights; ``refusal`` is why it has refused them before."""
        worker.on(Event.NEW_WEIGHTS)
        worker.confirmation = worker.ping = worker.silent_since = None
        worker.loading, worker.refusal = self.update, refusal
        worker.pending = worker.handle.load.remote(self.update)
        worker.deadline = time.monotonic() + self._config.update_timeout_s

    def _advance(self, worker: Worker) -> None:
        """Take the answer that RESTARTING or STALE was waiting for."""
        starting, ref = worker.state is State.RESTARTING, worker.pending
        outdated = worker.loading is not self.update
        worker.pending = None
        try:
            answer = ray.get(ref)
        except RayTaskError as error:
            cause = cast(Exception, error.cause)
            if isinstance(cause, WeightError) and outdated:
                self._load(worker)
            elif isinstance(cause, WeightError):
                self._refused(worker, cause)
            else:
                self.lose(worker, f"{worker.name}: {cause}", cause)
        except RayError as error:
            self.lose(
                worker, f"{worker.name} died while {worker.state.value}: {brief(error)}", error
            )
        else:
            if starting:
                worker.info = self.info = answer
                worker.on(Event.BUILT)
            else:
                worker.confirmation = replace(answer, refusal=worker.refusal)
            if self.update is not None and (starting or outdated):
                self._load(worker)
            elif starting and self.version != 0:
                worker.on(Event.REFUSED)
                worker.reason = (
                    f"{worker.name} was restarted and weight version {self.version} came by NCCL,"
                    " so it cannot be replayed: send it again"
                )
                worker.error = WeightError(worker.reason)
            else:
                self._confirmed(worker)

    def _confirmed(self, worker: Worker) -> None:
        worker.on(Event.CONFIRMED)
        if worker.failures or worker.blameless or (worker.extra and worker.reason):
            self._tell(f"{worker.name} serves, with weight version {self.version}")
        worker.reason, worker.error, worker.failures, worker.blameless = "", None, 0, False
        worker.heard = time.monotonic()

    def _refused(self, worker: Worker, error: WeightError) -> None:
        """Give the same weights once more; stop at the second refusal."""
        if not worker.refusal and not isinstance(error, WeightMismatch | WeightsLost):
            self._load(worker, refusal=str(error))
            return
        twice = "twice: " if worker.refusal else ""
        worker.on(Event.REFUSED)
        worker.reason, worker.error = f"{twice}{error}", error
        self._tell(f"{worker.name} refuses weight version {self.version}: {worker.reason}")

    def _refusal(self) -> WeightError:
        """Why there are too few that serve: what those that refuse say."""
        kind = WeightsLost if self._weights_lost else WeightError
        reasons = [worker.reason for worker in self.of_state(State.REFUSING)]
        return kind("; ".join(dict.fromkeys(reasons)))

    @property
    def _weights_lost(self) -> bool:
        """Whether nobody more can get the current weights."""
        return any(isinstance(w.error, WeightsLost) for w in self.of_state(State.REFUSING))

    def _overdue(self, worker: Worker) -> None:
        config = self._config
        if worker.state is State.STALE:
            self.lose(
                worker,
                f"{worker.name} did not confirm weight version {self.version} within"
                f" {config.update_timeout_s:g} s (rollout.update_timeout_s)",
            )
            return
        reason = (
            f"{worker.name} was not ready within {config.start_timeout_s:g} s"
            f" (rollout.start_timeout_s). {compare(self._ask)}"
        )
        self.lose(worker, reason, TimeoutError(reason))

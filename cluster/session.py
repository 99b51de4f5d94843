"""The long-lived parts of a run, started when first needed and ended together.

Ray, the rollout pool, the reward service and the learners each take seconds to start; stages that
follow each other in one process share them. The pool serves several checkpoints of one
architecture: their weights are loaded into it, never another engine started beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from actors.rollout import RolloutPool
from cluster.config import RunConfig
from cluster.progress import Reporter
from cluster.resources import (
    asks,
    demand,
    ray_address,
    ray_session,
    stop_listening_to_ray,
    wait_for_room,
)
from cluster.stop import Stopped, StopRequest
from learner.group import PPOLearners
from reward_service.config import RewardConfig, RewardTerm
from reward_service.rewards import Reward, build_reward
from reward_service.service import RewardService


class Session:
    """Owns what a run has started; leaving the ``with`` block ends all of it, newest first.

    Raises:
        ValueError: The configuration asks for weights by NCCL, which nothing here sends.
    """

    def __init__(self, config: RunConfig, reporter: Reporter, stop: StopRequest) -> None:
        if config.rollout.engine.weight_transfer != "ray":
            raise ValueError(
                "rollout.engine.weight_transfer is 'nccl', which is for a trainer of your own that"
                " drives RolloutPool.handles; the weights of a run go through Ray's object store:"
                " leave it out, or set it to 'ray'"
            )
        self._config = config
        self._reporter = reporter
        self._stop = stop
        self._stack = ExitStack()
        self._connected = False
        self._owns_ray = False
        self._pool: RolloutPool | None = None
        self._loaded: Path | None = None
        self._service: RewardService | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def end(self) -> None:
        """End everything that was started; what is needed later starts anew."""
        self._stack.close()
        self._connected = self._owns_ray = False
        self._pool = self._loaded = self._service = None

    def rollouts(self, model: Path) -> RolloutPool:
        """The pool, generating from the weights of ``model`` as version 0 (no PPO step yet).

        Raises:
            Stopped: Somebody asked for it while room was awaited or the actors were starting.
        """
        self._make_room(actors=True)
        return self._rollouts(model)

    def _connect(self) -> None:
        if self._connected:
            return
        if address := ray_address(self._config.cluster):
            self._reporter.say(f"using the Ray cluster at {address}")
        self._owns_ray = self._stack.enter_context(ray_session(self._config))
        self._connected = True
        # Ended last, just before Ray: its long polls would complain in between.
        self._stack.callback(self._end_service)
        # Only now: ray.init installs a SIGTERM handler of its own.
        self._stop.install()

    def _make_room(
        self, *, actors: bool = False, replicas: bool = False, learners: bool = False
    ) -> None:
        """Connect, and wait for room for what is about to start and is not there yet."""
        self._connect()
        if self._pool is not None:
            self._pool.withdraw()
        wait_for_room(
            asks(
                self._config,
                learners=learners,
                actors=self._config.rollout.fewest_actors * (actors and self._pool is None),
                replicas=replicas and self._service is None,
            ),
            self._config.cluster.placement_timeout_s,
            self._reporter.say,
            self._stop,
        )

    def _rollouts(self, model: Path) -> RolloutPool:
        if self._pool is None:
            pool = RolloutPool(
                model,
                self._config.rollout,
                reserve=demand(self._config, learners=True, actors=0),
                tell=self._reporter.warn,
            )
            self._stack.callback(pool.shutdown)
            if not pool.start(self._stop):
                raise Stopped("while rollout actors were starting; go on with --resume")
            self._pool, self._loaded = pool, model
        elif self._loaded != model:
            self._pool.load_checkpoint(model, version=0)
            self._loaded = model
        return self._pool

    def forget_weights(self) -> None:
        """The pool now holds weights that no directory has (PPO has been loading its own)."""
        self._loaded = None

    def reward(self, terms: Sequence[RewardTerm]) -> Reward:
        """The weighted sum of ``terms``; starts the reward service if one of them is a model."""
        if any(term.members for term in terms):
            self._make_room(replicas=True)
        return self._reward(terms)

    def _reward(self, terms: Sequence[RewardTerm]) -> Reward:
        models = {n: Path(path) for term in terms for n, path in term.members.items()}
        if models and self._service is None:
            self._service = RewardService.start(self._config.reward.service, models)
            self._reporter.say(f"reward service: {self._service.url}")
        scorers = self._service.scorers() if self._service is not None else {}
        config = RewardConfig(terms=tuple(terms), service=self._config.reward.service)
        return build_reward(config, scorers)

    def score_references(self) -> dict[str, tuple[float, ...]]:
        """For each served model that knows them, quantiles of the scores it was normalised on."""
        if self._service is None:
            return {}
        return {n: s.reference for n, s in self._service.statuses.items() if s.reference}

    def parts(
        self,
        model: Path,
        terms: Sequence[RewardTerm],
        make_learners: Callable[[], PPOLearners],
    ) -> Parts:
        """Start everything that PPO needs, at once: most of it is imports in other processes.

        Raises:
            The first error of any part, once all have ended their start.
        """
        self._make_room(actors=True, replicas=True, learners=True)
        with ThreadPoolExecutor(max_workers=3) as executor:
            rollouts = executor.submit(self._rollouts, model)
            reward = executor.submit(self._reward, terms)
            learners = executor.submit(self._own, make_learners)
        return Parts(rollouts=rollouts.result(), reward=reward.result(), learners=learners.result())

    def _end_service(self) -> None:
        if self._service is not None:
            if self._owns_ray:
                stop_listening_to_ray()
            self._service.shutdown()

    def _own(self, make_learners: Callable[[], PPOLearners]) -> PPOLearners:
        learners = make_learners()
        self._stack.callback(learners.shutdown)
        return learners


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What PPO works with; the session ends them."""

    rollouts: RolloutPool
    reward: Reward
    learners: PPOLearners

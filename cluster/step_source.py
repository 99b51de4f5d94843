"""Where the loop gets a step's samples from: generated, scored while others are still generated,
and filtered.

With ``ppo.max_staleness`` 1 the samples of the next step are made while the learners work on this
one::

    rollout actors   | step 1, v0 | step 2, v0 | step 3, v1 | step 4, v2 |
    learners                      |   step 1   |   step 2   |   step 3   | ...
                                             v1           v2           v3   loaded in between

New weights are loaded when both are done, so all samples of a step are of one version, which is
known beforehand: the result does not depend on who was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from threading import Event
from typing import Protocol, Self

from actors.config import SamplingConfig
from actors.prompts import PromptStream
from actors.rollout import RolloutPool
from cluster.step import Measure, Step, collect, sample_ids
from cluster.timeline import Clock
from learner.batch import ScoreScale
from learner.config import PPOConfig
from learner.group import LearnersLost, PPOLearners
from reward_service.config import RetryConfig
from reward_service.rewards import Reward
from reward_service.scoring import score_stream

LOOK_UP_S = 0.5
"""How often the loop looks, while it waits for samples, whether the learners live."""


class Memory(Protocol):
    """What a source needs to go on where another left off.

    Attributes:
        scale: Of the run's scores; known from its first step on.
        ahead: The samples of the step after this one, when they are there already.
    """

    scale: ScoreScale | None
    ahead: Step | None


class StepSource:
    """Makes the samples of one step after the other. For one thread, like the pool."""

    def __init__(
        self,
        config: PPOConfig,
        sampling: SamplingConfig,
        *,
        prompts: PromptStream,
        rollouts: RolloutPool,
        reward: Reward,
        learners: PPOLearners,
        memory: Memory,
        seed: int,
        measure: Measure,
        stop: Callable[[], bool],
        retry: RetryConfig | None = None,
    ) -> None:
        self._config = config
        self._sampling = sampling
        self._prompts = prompts
        self._rollouts = rollouts
        self._reward = reward
        self._learners = learners
        self._memory = memory
        self._seed = seed
        self._measure = measure
        self._stop = stop
        self._retry = retry
        self._failed: BaseException | None = None
        self._cancelled = Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._thread.shutdown()

    def take(self, number: int) -> Step:
        """A step, counted from 0, of which nothing is generated unless it was generated ahead."""
        step = self._memory.ahead
        if step is None:
            return self._begin(number)
        step.clock = Clock()
        return step

    def fill(self, step: Step, number: int) -> bool:
        """Generate, score and filter the samples of a step unless it has them; false when ``stop``
        asked to end early.

        Raises:
            LearnersLost: A learner died meanwhile; there is no need to generate to the end.
            Whatever stopped the generation or scoring of this step, ahead or now.
        """
        if self._stop():  # what was generated ahead stays in the memory, for a checkpoint
            return False
        if self._failed is not None:
            raise self._failed
        if step is self._memory.ahead:
            self._memory.ahead = None
            return True
        with step.timed("generate"):
            self._generate(step, number, step.clock, self._stop_or_lost)
        return not self._stop()

    @contextmanager
    def next_meanwhile(self, step: Step, number: int) -> Iterator[None]:
        """While the block works on ``step``, the samples of step ``number`` are made; the end of
        the block waits for them. Does nothing where samples may not be stale, or after the last
        step.

        Neither a request to stop nor an error of the next step ends anything here, as ``step`` has
        just been learned and is to be saved: both are for ``fill``.

        Raises:
            LearnersLost: A learner died while samples were awaited.
        """
        if not self._config.max_staleness:
            yield
            return
        if number >= self._config.steps:
            yield
            with step.timed("generate"):
                pass  # there is nothing to wait for, but each step has the same phases
            return
        ahead = self._begin(number)
        made = self._thread.submit(
            self._generate, ahead, number, step.clock, self._cancelled.is_set
        )
        try:
            yield
            with step.timed("generate"):
                while not wait([made], timeout=LOOK_UP_S).done:
                    self._require_learners()
        except BaseException:
            self._cancelled.set()
            raise
        self._failed = made.exception()
        if self._failed is None:
            self._memory.ahead = ahead

    def _begin(self, number: int) -> Step:
        prompts = self._prompts.batch(number)
        return Step(submitted=sample_ids(prompts, self._sampling.samples_per_prompt))

    def _generate(self, step: Step, number: int, clock: Clock, stop: Callable[[], bool]) -> None:
        asked = self._prompts.batch(number)
        while asked:
            answers = self._rollouts.generate(
                asked,
                self._sampling,
                run_seed=self._seed,
                round_index=number,
                busy=clock.generated,
                stop=stop,
            )
            scored = score_stream(
                self._reward, answers, retry=self._retry, stop=stop, busy=clock.scored
            )
            # Closed whatever happens: an error that is kept for later keeps its frames, and in
            # them the pool would be generating for ever.
            with closing(answers), closing(scored):
                collect(step, scored, self._measure, stop)
            if stop():
                return
            if self._memory.scale is None:
                self._memory.scale = ScoreScale.of_first_step(step.scores, self._config)
            step.filter(self._config, self._memory.scale)
            asked = step.replacements(
                self._prompts, number, self._config, self._sampling.samples_per_prompt
            )

    def _stop_or_lost(self) -> bool:
        self._require_learners()
        return self._stop()

    def _require_learners(self) -> None:
        if self._learners.have_lost():
            raise LearnersLost("a learner died while samples were generated")

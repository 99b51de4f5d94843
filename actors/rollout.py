"""The pool of rollout actors: prompts in, trajectories out, in the order in which they finish.

    with RolloutPool(model_dir, config) as pool:
        for sample in pool.generate(prompts, sampling, run_seed=0, round_index=step):
            ...                                     # Trajectory or SampleFailure, each sample once
        pool.load(learners.export_weights(version=step + 1, ...))

Every sample is accounted for: ``generate`` yields exactly one record for each. A sample whose
actor dies is sampled again elsewhere, with the same seed and so with the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayTaskError

from actors.accounting import Busy, Generation, Progress
from actors.config import RolloutConfig, SamplingConfig
from actors.fleet import Fleet
from actors.generation import check_prompt
from actors.rollout_actor import EngineInfo
from actors.trajectory import Float32Array, Prompt, SampleFailure, Trajectory
from actors.weights import Probe, UpdateConfirmation, WeightUpdate, read_checkpoint, weight_files
from actors.worker import State


class RolloutPool:
    """Rollout actors that serve one model. For one thread of one driver.

    Args:
        model_dir: Hugging Face directory with safetensors weights and a tokenizer, readable by
            every node that actors run on.
        name: Actors are called ``name-0``, ``name-1``, ... in Ray's dashboard and logs.
        reserve: Resources of the cluster that actors beyond ``min_actors`` leave to others.
        tell: Called with a sentence when an actor is lost, comes back, joins or leaves.
    """

    def __init__(
        self,
        model_dir: Path,
        config: RolloutConfig,
        *,
        name: str = "rollout",
        reserve: Mapping[str, float] | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        weight_files(model_dir)  # a missing checkpoint is told here, not by an actor
        self._config = config
        self._fleet = Fleet(
            model_dir,
            config,
            name=name,
            reserve=reserve,
            tell=tell,
        )
        self._again = 0
        self._version = 0
        self._generating = False

    def start(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Start the actors; returns when all of them can generate, or as many as must.

        False when ``stop``, looked at about once a second, ended the wait for them.

        Raises:
            FileNotFoundError: the model directory lacks something.
            RuntimeError: vLLM is missing, cannot serve the model, or keeps dying.
            TimeoutError: an actor was not ready within ``start_timeout_s``.
        """
        return self._fleet.bring_up(stop)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    def figures(self) -> dict[str, float]:
        """How many actors serve, and what was lost since the pool was made."""
        return {
            "rollout/engines": len(self._fleet.of_state(State.HEALTHY)),
            "recovery/engines_lost": self._fleet.losses,
            "recovery/samples_again": self._again,
        }

    @property
    def version(self) -> int:
        """Version of the weights that every actor last confirmed; 0 is the checkpoint."""
        return self._version

    @property
    def states(self) -> dict[str, str]:
        """State of every actor by its name."""
        return {worker.name: worker.state.value for worker in self._fleet.workers}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self._info().eos_token_ids

    @property
    def context_length(self) -> int:
        """Tokens that prompt and response may have together."""
        return self._info().context_length

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that no engine can continue; ``generate`` does so by itself, but a run
        wants to know before its first step, not when their turn comes.

        Raises:
            ValueError: a prompt fills the context or holds an id outside the vocabulary.
        """
        info = self._info()
        for prompt in prompts:
            check_prompt(prompt.token_ids, info.context_length, info.vocab_size, prompt.prompt_id)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        run_seed: int,
        round_index: int,
        progress: Progress | None = None,
        busy: Busy | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Generator[Trajectory | SampleFailure]:
        """Sample ``samples_per_prompt`` responses to each prompt.

        Yields one record for each sample as soon as it is there. Closing the iterator early
        aborts what is left. A response ends at an EOS token, after ``max_new_tokens``, or where
        the context is full.

        Args:
            round_index: Tells visits to the same prompt apart, such as the PPO step.
            progress: Called with the numbers of samples done and asked for.
            busy: Told in the end when each actor worked.
            stop: Looked at about once a second; when it is true the iterator ends early, as if it
                were closed. So does the wait for actors that are brought up before.

        Raises:
            ValueError: a prompt fills the context or holds an id outside the vocabulary; raised
                before anything is generated.
            WeightError: an actor has not confirmed its weights.
            RuntimeError: an actor keeps dying, or another ``generate`` is not exhausted.
            TimeoutError: an actor could not be brought back in time.
        """
        self._require_idle("generate")
        if self._fleet.bring_up(stop):
            self.check_prompts(prompts)
        generation = Generation(
            prompts,
            sampling,
            run_seed=run_seed,
            round_index=round_index,
            fleet=self._fleet,
            config=self._config,
        )
        return self._run(generation, progress, busy, stop)

    def load(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        """Make every actor generate from ``update``, verified and proved by its probe.

        Raises:
            WeightError: the update is of another architecture, or an actor was given it twice
                and each time found a corrupt tensor or a probe that disagrees. Actors that
                refuse generate again after the next good update.
            WeightsLost: the tensors are gone with the learner that held them.
            RuntimeError: samples are in flight, or an actor keeps dying or staying silent for
                ``update_timeout_s``.
        """
        self._require_idle("load weights")
        confirmations = self._fleet.broadcast(update.publish())
        self._version = update.version
        return confirmations

    def load_checkpoint(
        self, model_dir: Path, version: int, probe: Probe | None = None
    ) -> list[UpdateConfirmation]:
        """Load the weights of another Hugging Face directory of the same architecture.

        Raises:
            FileNotFoundError: the directory has no safetensors weights.
            WeightError: as :meth:`load`.
        """
        return self.load(read_checkpoint(model_dir, version, probe))

    @property
    def handles(self) -> list[Any]:
        """The actors, for vLLM's ``RayVLLMWeightSyncClient`` when weights come by NCCL."""
        return [worker.handle for worker in self._fleet.workers]

    def confirm(self, version: int, probe: Probe) -> list[tuple[float, float]]:
        """Prove and serve weights that vLLM's NCCL trainer has sent to :attr:`handles`.

        Returns:
            Largest and mean ``|Δ log p|`` of the probe for every actor, in nats.

        Raises:
            WeightError: the probe disagrees.
            TimeoutError: an actor gave no answer within ``update_timeout_s``.
        """
        self._require_idle("confirm weights")
        self._fleet.version, self._fleet.update = version, None
        calls = [handle.confirm.remote(version, probe) for handle in self.handles]
        errors = self._answers(calls, self._config.update_timeout_s, "rollout.update_timeout_s")
        self._version = version
        return errors

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Float32Array]:
        """``[T_s - 1]`` log-probabilities, at temperature 1, of ids 1, 2, ... of each sequence.

        Raises:
            ValueError: a sequence is shorter than 2 ids, longer than the context, or holds an
                id outside the vocabulary.
            TimeoutError: no answer within ``sample_timeout_s``.
        """
        self._require_idle("compute log-probabilities")
        self._fleet.bring_up()
        workers = self._fleet.of_state(State.HEALTHY)[: len(sequences)]
        shares = [range(i, len(sequences), len(workers)) for i in range(len(workers))]
        calls = [
            worker.handle.logprobs.remote([sequences[i] for i in share])
            for worker, share in zip(workers, shares, strict=True)
        ]
        answers = self._answers(calls, self._config.sample_timeout_s, "rollout.sample_timeout_s")
        by_index: dict[int, Float32Array] = {}
        for share, answer in zip(shares, answers, strict=True):
            by_index.update(zip(share, answer, strict=True))
        return [by_index[i] for i in range(len(sequences))]

    def withdraw(self) -> None:
        """Ask Ray for no more room, until actors are looked after again: before the caller waits
        for room for others, which a request of this pool could be granted instead."""
        self._fleet.withdraw()

    def shutdown(self) -> None:
        """End the actors; returns when their processes are gone. May be called again."""
        self._fleet.shutdown()

    def _answers(self, calls: list[Any], timeout_s: float, setting: str) -> list[Any]:
        """Results of actor calls, with the actor's own error when there is one."""
        done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s)
        if late:
            raise TimeoutError(
                f"{len(late)} of {len(calls)} rollout actors gave no answer within {timeout_s:g} s"
                f" ({setting}); {len(done)} did"
            )
        try:
            answers: list[Any] = ray.get(calls)
        except RayTaskError as error:
            raise error.cause from error
        return answers

    def _info(self) -> EngineInfo:
        if self._fleet.info is None:
            raise RuntimeError("the rollout pool has not been started: call start() first")
        return self._fleet.info

    def _require_idle(self, what: str) -> None:
        if self._generating:
            raise RuntimeError(
                f"cannot {what} while samples are in flight: exhaust or close the iterator of"
                " generate() first"
            )

    def _run(
        self,
        generation: Generation,
        progress: Progress | None,
        busy: Busy | None,
        stop: Callable[[], bool],
    ) -> Generator[Trajectory | SampleFailure]:
        self._require_idle("generate")
        self._generating = True
        try:
            yield from generation.run(progress, stop)
        finally:
            self._generating = False
            self._again += generation.again
            if busy is not None:
                generation.tell(busy)

"""The pool of rollout actors: prompts in, trajectories out, in the order in which they finish.

    with RolloutPool(model_dir, config) as pool:
        for sample in pool.generate(prompts, sampling, run_seed=0, round_index=step):
            ...                                     # Trajectory or SampleFailure, each sample once
        pool.load(learners.export_weights(version=step + 1, ...))

Every sample is accounted for: ``generate`` yields exactly one record for each. A sample whose
actor dies is sampled again elsewhere, with the same seed and so with the same tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.config import RolloutConfig, SamplingConfig
from actors.fleet import Fleet, State, Worker, brief
from actors.generation import Completion, SampleRequest, check_prompt
from actors.rollout_actor import EngineInfo, Outcome, Refused
from actors.trajectory import Float32Array, Prompt, SampleFailure, Trajectory, sample_seed
from actors.weights import Probe, UpdateConfirmation, WeightUpdate, read_checkpoint, weight_files

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class _Sample:
    """One sample that was asked for, until it is yielded."""

    prompt: Prompt
    index: int
    seed: int
    attempts: int = 0
    reason: str = ""


@dataclass(eq=False)
class _Stream:
    """Requests that one worker is working on, and how they come back."""

    worker: Worker
    samples: dict[str, _Sample]
    results: Any
    heard: float = field(default_factory=time.monotonic)


class RolloutPool:
    """Rollout actors that serve one model. For one thread of one driver.

    Args:
        model_dir: Hugging Face directory with safetensors weights and a tokenizer, readable by
            every node that actors run on.
        name: Actors are called ``name-0``, ``name-1``, ... in Ray's dashboard and logs.
        placement_group: Where actors are placed; anywhere when ``None``.
    """

    def __init__(
        self,
        model_dir: Path,
        config: RolloutConfig,
        *,
        name: str = "rollout",
        placement_group: Any = None,
    ) -> None:
        weight_files(model_dir)  # a missing checkpoint is told here, not by an actor
        self._config = config
        self._fleet = Fleet(model_dir, config, name=name, placement_group=placement_group)
        self._version = 0
        self._generating = False
        self._calls = 0

    def start(self) -> None:
        """Start the actors and return when all of them can generate.

        Raises:
            FileNotFoundError: the model directory lacks something.
            RuntimeError: vLLM is missing, cannot serve the model, or keeps dying.
            TimeoutError: an actor was not ready within ``start_timeout_s``.
        """
        self._fleet.bring_up()

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

    @property
    def version(self) -> int:
        """Version of the weights that every actor last confirmed; 0 is the checkpoint."""
        return self._version

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self._info().eos_token_ids

    @property
    def context_length(self) -> int:
        """Tokens that prompt and response may have together."""
        return self._info().context_length

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        run_seed: int,
        round_index: int,
        progress: Progress | None = None,
    ) -> Iterator[Trajectory | SampleFailure]:
        """Sample ``samples_per_prompt`` responses to each prompt.

        Yields one record for each sample as soon as it is there. Closing the iterator early
        aborts what is left. A response ends at an EOS token, after ``max_new_tokens``, or where
        the context is full.

        Args:
            round_index: Tells visits to the same prompt apart, such as the PPO step.
            progress: Called with the numbers of samples done and asked for.

        Raises:
            ValueError: a prompt fills the context or holds an id outside the vocabulary; raised
                before anything is generated.
            WeightError: an actor has not confirmed its weights.
            RuntimeError: an actor keeps dying, or another ``generate`` is not exhausted.
            TimeoutError: an actor could not be brought back in time.
        """
        self._require_idle("generate")
        self._fleet.bring_up()
        info = self._info()
        for prompt in prompts:
            check_prompt(prompt.token_ids, info.context_length, info.vocab_size, prompt.prompt_id)
        samples = [
            _Sample(prompt, i, sample_seed(run_seed, prompt.prompt_id, i, round_index))
            for prompt in prompts
            for i in range(sampling.samples_per_prompt)
        ]
        return self._generate(samples, sampling, progress)

    def load(self, update: WeightUpdate) -> list[UpdateConfirmation]:
        """Make every actor generate from ``update``, verified and proved by its probe.

        Raises:
            WeightError: a tensor is corrupt or of another architecture, or the probe disagrees.
                Actors that refuse generate again after the next good update.
            TimeoutError: an actor did not confirm within ``update_timeout_s``.
            RuntimeError: samples are in flight, or an actor keeps dying.
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
        workers = self._fleet.workers
        shares = [list(range(i, len(sequences), len(workers))) for i in range(len(workers))]
        calls = {
            worker.handle.logprobs.remote([sequences[i] for i in share]): share
            for worker, share in zip(workers, shares, strict=True)
            if share
        }
        answers = self._answers(
            list(calls), self._config.sample_timeout_s, "rollout.sample_timeout_s"
        )
        by_index: dict[int, Float32Array] = {}
        for share, answer in zip(calls.values(), answers, strict=True):
            by_index.update(zip(share, answer, strict=True))
        return [by_index[i] for i in range(len(sequences))]

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
            return ray.get(calls)  # type: ignore[no-any-return]
        except RayTaskError as error:
            raise error.cause from error

    def _info(self) -> EngineInfo:
        infos = [worker.info for worker in self._fleet.workers if worker.info is not None]
        if not infos:
            raise RuntimeError("the rollout pool has not been started: call start() first")
        return infos[0]

    def _require_idle(self, what: str) -> None:
        if self._generating:
            raise RuntimeError(
                f"cannot {what} while samples are in flight: exhaust or close the iterator of"
                " generate() first"
            )

    def _generate(
        self, samples: list[_Sample], sampling: SamplingConfig, progress: Progress | None
    ) -> Iterator[Trajectory | SampleFailure]:
        self._require_idle("generate")
        self._generating = True
        self._calls += 1
        queue, streams = deque(samples), list[_Stream]()
        done = 0
        try:
            while queue or streams:
                self._fleet.respawn()
                self._dispatch(queue, streams, sampling)
                by_results = {stream.results: stream for stream in streams}
                for results in self._fleet.wait(list(by_results), 1.0):
                    for record in self._collect(by_results[results], streams, queue):
                        done += 1
                        if progress is not None:
                            progress(done, len(samples))
                        yield record
                for stream in [s for s in streams if self._overdue(s)]:
                    yield from self._lost(stream, streams, queue)
        finally:
            self._generating = False
            self._abort(streams)

    def _dispatch(
        self, queue: deque[_Sample], streams: list[_Stream], sampling: SamplingConfig
    ) -> None:
        """Keep every serving worker's batch full, and no worker's queue long."""
        serving = self._fleet.of_state(State.SERVING)
        width = self._config.engine.max_num_seqs
        for worker in serving:
            in_flight = sum(len(s.samples) for s in streams if s.worker is worker)
            # A quarter more than fits the batch, so that it stays full between two dispatches;
            # a share only, so that workers finish together.
            room = width + max(1, width // 4) - in_flight
            if in_flight and room < max(1, width // 4):
                continue
            share = -(-len(queue) // len(serving)) if not in_flight else len(queue)
            batch = [queue.popleft() for _ in range(min(room, share, len(queue)))]
            if batch:
                streams.append(self._submit(worker, batch, sampling))

    def _submit(self, worker: Worker, batch: list[_Sample], sampling: SamplingConfig) -> _Stream:
        named = {
            f"{self._calls}:{s.prompt.prompt_id}#{s.index}:{s.attempts}:{i}": s
            for i, s in enumerate(batch)
        }
        requests = [
            SampleRequest(
                request_id=name,
                token_ids=sample.prompt.token_ids,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seed=sample.seed,
            )
            for name, sample in named.items()
        ]
        results = worker.handle.generate.options(num_returns="streaming").remote(requests)
        return _Stream(worker, named, results)

    def _collect(
        self, stream: _Stream, streams: list[_Stream], queue: deque[_Sample]
    ) -> Iterator[Trajectory | SampleFailure]:
        """Read what a stream has ready."""
        try:
            outcomes: list[Outcome] = ray.get(next(stream.results))
        except StopIteration:
            streams.remove(stream)
            assert not stream.samples, "an actor ended a stream before its samples"
            return
        except (RayActorError, RayTaskError) as error:
            reason = f"{stream.worker.name} died while generating: {brief(error)}"
            self._fleet.lose(stream.worker, reason, error)
            yield from self._lost(stream, streams, queue)
            return
        stream.heard = time.monotonic()
        for outcome in outcomes:
            sample = stream.samples.pop(outcome.request_id)
            if isinstance(outcome, Refused):
                if outcome.engine_lost and stream.worker.state is not State.DEAD:
                    self._fleet.lose(stream.worker, outcome.reason)
                yield from self._retry(sample, outcome.reason, queue)
            else:
                self._fleet.served(stream.worker)
                yield from self._finish(sample, outcome, queue)

    def _finish(
        self, sample: _Sample, completion: Completion, queue: deque[_Sample]
    ) -> Iterator[Trajectory | SampleFailure]:
        try:
            yield Trajectory(
                prompt=sample.prompt,
                sample_index=sample.index,
                response_ids=completion.token_ids,
                response_logprobs=completion.logprobs,
                policy_versions=np.full(len(completion.token_ids), completion.version, np.int32),
                response_text=completion.text,
                finish_reason=completion.finish_reason,
                seed=sample.seed,
            )
        except ValueError as error:
            yield from self._retry(sample, str(error), queue)

    def _retry(
        self, sample: _Sample, reason: str, queue: deque[_Sample]
    ) -> Iterator[SampleFailure]:
        """Queue a sample again, or give it up."""
        sample.attempts += 1
        if sample.attempts <= self._config.max_retries:
            queue.appendleft(sample)
            return
        yield SampleFailure(
            prompt=sample.prompt,
            sample_index=sample.index,
            stage="generation",
            reason=f"{reason} (attempt {sample.attempts} of {sample.attempts})",
        )

    def _lost(
        self, stream: _Stream, streams: list[_Stream], queue: deque[_Sample]
    ) -> Iterator[SampleFailure]:
        """Retry everything that a lost worker had in flight."""
        for other in [s for s in streams if s.worker is stream.worker]:
            streams.remove(other)
            for sample in other.samples.values():
                yield from self._retry(sample, stream.worker.reason, queue)

    def _overdue(self, stream: _Stream) -> bool:
        limit = self._config.sample_timeout_s
        if time.monotonic() - stream.heard <= limit:
            return False
        reason = (
            f"{stream.worker.name} finished no sample for {limit:g} s, with"
            f" {len(stream.samples)} in flight (rollout.sample_timeout_s)"
        )
        if stream.worker.state is not State.DEAD:
            self._fleet.lose(stream.worker, reason)
        return True

    def _abort(self, streams: list[_Stream]) -> None:
        """Leave the engines idle when an iterator is closed early."""
        workers = {s.worker.name: s.worker for s in streams if s.worker.handle is not None}
        if not workers:
            return
        calls = [worker.handle.abort.remote() for worker in workers.values()]
        ray.wait(calls, num_returns=len(calls), timeout=self._config.update_timeout_s)

"""What the group calls on a learner beside ``update``: weights out, log-probabilities, state.

Only learner 0 writes, since all learners hold the same; every learner reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.trajectory import Float32Array
from actors.weights import Probe, WeightUpdate, pack_weights
from learner.batch import micro_batches, take_rows
from learner.hf_directory import load_tokenizer, save
from learner.learner_state import CONTENTS, Counters, read_state, write_state
from learner.models import POLICY, token_logprobs
from learner.ppo import PPOLearner
from learner.tensor_files import below, load_moments, moments_of


class PPOLearnerActor(PPOLearner):
    """A ``PPOLearner`` that can be asked for its weights and its state."""

    def __repr__(self) -> str:
        """What Ray's dashboard and log lines call this actor; Ray asks before it has a number."""
        return "ppo-learner"

    @property
    def policy_model(self) -> Any:
        """The Hugging Face model that is being trained."""
        return self.module[POLICY].unwrapped().model

    def process_id(self) -> int:
        import os

        return os.getpid()

    def sees(self, file: Path) -> bool:
        return file.is_file()

    # ---- weights out ---------------------------------------------------------------------------

    def export_policy(
        self, version: int, probe_sequences: Sequence[Sequence[int]], publish: bool
    ) -> WeightUpdate:
        """The policy's weights by Hugging Face name, with the log-probabilities to prove them.

        With ``publish`` the tensors go to the object store straight from here. Without, they are
        views of the parameters, valid until the next update.
        """
        update = pack_weights(self._exported_tensors(), version, probe=None)
        if not publish:
            return self._with_probe(update, probe_sequences)
        # Copying waits for memory and the probe computes: side by side they take as long as one.
        with ThreadPoolExecutor(1, thread_name_prefix="publish") as executor:
            published = executor.submit(update.publish)
            update = self._with_probe(update, probe_sequences)
            return replace(update, tensors=published.result().tensors)

    def _with_probe(
        self, update: WeightUpdate, probe_sequences: Sequence[Sequence[int]]
    ) -> WeightUpdate:
        if not probe_sequences:
            return update
        started = time.perf_counter()
        logprobs = self.sequence_logprobs(probe_sequences)
        probe = Probe(token_ids=[list(s) for s in probe_sequences], logprobs=logprobs)
        return replace(update, probe=probe, seconds_probe=time.perf_counter() - started)

    def _exported_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters once each: a tied output layer goes by the name of its embedding."""
        yield from self.policy_model.named_parameters()

    def save_policy(self, directory: Path) -> None:
        """A plain Hugging Face directory, with the tokenizer that training started from."""
        save(self.policy_model, load_tokenizer(self.setup.policy_dir), directory)

    # ---- log-probabilities -----------------------------------------------------------------

    @torch.no_grad()
    def sequence_logprobs(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Float32Array]:
        """For each sequence, the log-probabilities ``[T - 1]`` of ids 1, 2, ... in float32,
        without autocast."""
        lengths = np.array([len(s) for s in sequences], np.int32)
        if not len(lengths):
            return []
        ids = np.zeros((len(sequences), int(lengths.max())), np.int32)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
        prompts, rests = np.ones_like(lengths), lengths - 1
        width = ids.shape[1]
        result = np.zeros((len(sequences), width), np.float32)
        budget = self.ppo.tokens_per_micro_batch
        for group in micro_batches(np.arange(len(sequences)), lengths, budget):
            inputs = self._inputs(take_rows(group, ids, prompts, rests, width))
            values = token_logprobs(self.policy_model, inputs, temperature)[0]
            result.reshape(-1)[inputs["slots"].cpu().numpy()] = values.cpu().numpy()
        return [result[row, : rests[row]] for row in range(len(sequences))]

    # ---- state ---------------------------------------------------------------------------------

    def save_state(self, directory: Path) -> dict[str, str]:
        """Write everything that the next update depends on, exactly; says what each file is.

        Shuffles are functions of (seed, update, epoch) and dropout is off, so these two numbers
        are the whole of the random state.

        Raises:
            OSError: The disk is full or read-only.
        """
        counters = Counters(
            seed=self.setup.seed,
            updates=self.updates,
            controller=self.controller.state(),
            skipped_in_a_row={n: t.skipped_in_a_row for n, t in self.trainers.items()},
            modules=sorted(self.trainers),
        )
        moments = {
            f"{name}/{key}": value
            for name, trainer in self.trainers.items()
            for key, value in moments_of(trainer.optimizer, list(self._trained(name))).items()
        }
        _, beside = self._by_file()
        write_state(directory, counters, beside, moments, self.save_policy)
        return CONTENTS

    def load_state(self, directory: Path) -> None:
        """Take back what ``save_state`` wrote, whatever the number of learners was then.

        Raises:
            FileNotFoundError: If there is no state.
            ValueError: If it is damaged, of another architecture, or of another seed. The
                learner is as it was before.
        """
        state = read_state(directory, self._device)
        counters = state.counters
        if counters.modules != sorted(self.trainers):
            raise ValueError(
                f"learner checkpoint {directory} is of another architecture: it holds "
                f"{counters.modules}, this run trains {sorted(self.trainers)}"
            )
        policy, beside = self._by_file()
        for found, expected in ((state.policy, policy), (state.beside, beside)):
            if difference := _difference(found, expected):
                raise ValueError(
                    f"learner checkpoint {directory} is of another architecture: {difference}"
                )
        if counters.seed != self.setup.seed:
            raise ValueError(
                f"learner checkpoint {directory} is of a run with seed {counters.seed}, this run "
                f"has seed {self.setup.seed}"
            )
        with torch.no_grad():
            for found, expected in ((state.policy, policy), (state.beside, beside)):
                for name, parameter in expected.items():
                    parameter.copy_(found[name])
        for name, trainer in self.trainers.items():
            # The settings are the configuration's; a checkpoint brings moments, not settings.
            load_moments(trainer.optimizer, list(self._trained(name)), below(name, state.moments))
            trainer.skipped_in_a_row = int(counters.skipped_in_a_row[name])
        self.controller.load_state(counters.controller)
        self.updates = counters.updates

    def _trained(self, module: str) -> dict[str, Tensor]:
        """Trained tensors by name, in the order in which the optimizer has them."""
        return dict(self.module[module].unwrapped().named_parameters())

    def _by_file(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Trained tensors as a state has them: those of the policy's model, and all others.

        Buffers are constants (rotary frequencies).
        """
        policy = dict(self.policy_model.named_parameters())
        mine = {id(tensor) for tensor in policy.values()}
        beside = {
            f"{module}/{name}": tensor
            for module in self.trainers
            for name, tensor in self._trained(module).items()
            if id(tensor) not in mine
        }
        return policy, beside


def _difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first tensor of the models that a checkpoint lacks or has in another shape.

    Others that it has in addition are the same by another name (a tied output layer).
    """
    for name, tensor in sorted(expected.items()):
        there = tuple(found[name].shape) if name in found else None
        if there != tuple(tensor.shape):
            return f"tensor {name} is {there} there and {tuple(tensor.shape)} here"
    return ""

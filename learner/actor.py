"""What the group calls on a learner beside ``update``: weights out, log-probabilities, state.

Only learner 0 writes, since all learners hold the same; every learner reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from learner.models import POLICY, token_logprobs
from learner.ppo import PPOLearner

STATE_FILE = "learner.pt"
STATE_FORMAT = 1


class PPOLearnerActor(PPOLearner):
    """A ``PPOLearner`` that can be asked for its weights and its state."""

    @property
    def policy_model(self) -> Any:
        """The Hugging Face model that is being trained."""
        return self.module[POLICY].unwrapped().model

    def process_id(self) -> int:
        import os

        return os.getpid()

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

    def save_state(self, directory: Path) -> None:
        """Everything that the next update depends on, exactly.

        Shuffles are functions of (seed, update, epoch) and dropout is off, so these two numbers
        are the whole of the random state.
        """
        state = {
            "format": STATE_FORMAT,
            "seed": self.setup.seed,
            "updates": self.updates,
            "controller": self.controller.state(),
            "skipped_in_a_row": {n: t.skipped_in_a_row for n, t in self.trainers.items()},
            "modules": {name: self.module[name].unwrapped().state_dict() for name in self.trainers},
            "optimizers": {n: t.optimizer.state_dict() for n, t in self.trainers.items()},
        }
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(state, directory / STATE_FILE)

    def load_state(self, directory: Path) -> None:
        """Take back what ``save_state`` wrote, whatever the number of learners was then.

        Raises:
            FileNotFoundError: If there is no state.
            ValueError: If it is damaged, of another architecture, or of another seed. The
                learner is as it was before.
        """
        path = directory / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"learner checkpoint {path} does not exist")
        try:
            state = torch.load(path, map_location=self._device, weights_only=True)
            found = {name: _shapes(tensors) for name, tensors in state["modules"].items()}
            if state["format"] != STATE_FORMAT:
                raise KeyError("format")
        except Exception as error:
            raise ValueError(
                f"learner checkpoint {path} cannot be read ({type(error).__name__}: {error}); "
                "go on from an earlier one"
            ) from error
        expected = {
            name: _shapes(self.module[name].unwrapped().state_dict()) for name in self.trainers
        }
        if found != expected:
            raise ValueError(
                f"learner checkpoint {path} is of another architecture: "
                f"{_mismatch(found, expected)}"
            )
        if state["seed"] != self.setup.seed:
            raise ValueError(
                f"learner checkpoint {path} is of a run with seed {state['seed']}, this run has "
                f"seed {self.setup.seed}"
            )
        for name, trainer in self.trainers.items():
            self.module[name].unwrapped().load_state_dict(state["modules"][name])
            trainer.optimizer.load_state_dict(state["optimizers"][name])
            # The settings are the configuration's; a checkpoint brings moments, not settings.
            trainer.optimizer.param_groups[0].update(self.optimizer_options(name))
            trainer.skipped_in_a_row = int(state["skipped_in_a_row"][name])
        self.controller.load_state(state["controller"])
        self.updates = int(state["updates"])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _mismatch(
    found: dict[str, dict[str, tuple[int, ...]]], expected: dict[str, dict[str, tuple[int, ...]]]
) -> str:
    """The first difference between the tensors of a checkpoint and those of the models."""
    if found.keys() != expected.keys():
        return f"it holds {sorted(found)}, this run trains {sorted(expected)}"
    for module, tensors in expected.items():
        for name in sorted(tensors.keys() | found[module].keys()):
            here, there = tensors.get(name), found[module].get(name)
            if here != there:
                return f"{module} tensor {name} is {there} there and {here} here"
    return "unknown"

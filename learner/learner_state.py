"""The exact state of a learner on disk: safetensors for tensors, JSON for the rest, no pickle.

policy/              Hugging Face directory of the policy, with its tokenizer
critic.safetensors   whatever else is trained: the critic, or the policy's value head
optimizers.safetensors   moments of every optimizer, "<module>/<moment>/<parameter>"
learner.json         counters and the KL controller
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.weights import weight_files
from learner.tensor_files import disk_errors

POLICY_DIR = "policy"
CRITIC_FILE = "critic.safetensors"
OPTIMIZER_FILE = "optimizers.safetensors"
COUNTERS_FILE = "learner.json"

CONTENTS = {
    POLICY_DIR: "the policy as a Hugging Face directory",
    CRITIC_FILE: "weights trained beside the policy: the critic, or the value head",
    OPTIMIZER_FILE: "optimizer moments: <module>/<moment>/<parameter>",
    COUNTERS_FILE: "seed, number of updates, KL controller, skipped steps",
}
"""What each file of a state is, for the manifest of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a learner's next update depends on beside tensors.

    Attributes:
        updates: PPO iterations done.
        controller: State of the KL controller.
        skipped_in_a_row: Optimizer steps skipped since the last good one, by module.
        modules: Names of the modules that are trained.
    """

    seed: int
    updates: int
    controller: dict[str, float]
    skipped_in_a_row: dict[str, int]
    modules: list[str]


@dataclass(frozen=True, kw_only=True)
class LearnerState:
    """All of it; ``policy`` goes by Hugging Face names, ``beside`` and ``moments`` by
    ``<module>/...``."""

    counters: Counters
    policy: Mapping[str, Tensor]
    beside: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


def write_state(
    directory: Path,
    counters: Counters,
    beside: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    write_policy: Callable[[Path], None],
) -> None:
    """Write a state.

    Raises:
        OSError: The disk is full or read-only.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with disk_errors(directory):
        write_policy(directory / POLICY_DIR)
        for name, tensors in ((CRITIC_FILE, beside), (OPTIMIZER_FILE, moments)):
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, directory / name)
    text = json.dumps(asdict(counters), indent=1)
    (directory / COUNTERS_FILE).write_text(text + "\n", encoding="utf-8")


def read_state(directory: Path, device: torch.device) -> LearnerState:
    """Read a state.

    Raises:
        FileNotFoundError: There is none, or not all of it.
        ValueError: It is damaged.
    """
    path = directory / COUNTERS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"learner checkpoint {path} does not exist")
    try:
        counters = Counters(**json.loads(path.read_text(encoding="utf-8")))
        policy: dict[str, Tensor] = {}
        for file in weight_files(directory / POLICY_DIR):
            policy |= load_file(file, device=str(device))
        return LearnerState(
            counters=counters,
            policy=policy,
            beside=load_file(directory / CRITIC_FILE, device=str(device)),
            moments=load_file(directory / OPTIMIZER_FILE, device=str(device)),
        )
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"learner checkpoint {directory} cannot be read ({type(error).__name__}: {error}); "
            "go on from an earlier one"
        ) from error

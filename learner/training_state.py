"""The state file of a supervised stage: one safetensors file, replaced as a whole.

The tensors are the weights, the moments of the optimizer and the best weights so far; everything
else is JSON in the file's metadata, beside a digest of all of it. (The archives of ``torch.save``
are pickles, and read a flipped bit without a word.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.tensor_files import digest_of, disk_errors

STATE_FILE = "training_state.safetensors"


def write_training_state(
    path: Path, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Replace the state file.

    Raises:
        OSError: The disk is full or read-only; the file from before is untouched.
    """
    partial = path.with_suffix(".partial")
    text = json.dumps(rest)
    try:
        with disk_errors(partial):
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                partial,
                metadata={"state": text, "digest": digest_of(tensors, text)},
            )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"could not write the training state to {path} ({error.strerror}): free disk space and "
            "run again with --resume; the state saved before is untouched",
        ) from error
    partial.replace(path)


def read_training_state(
    path: Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the rest.

    Raises:
        ValueError: It is damaged.
    """
    text, digest = _metadata(path)
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise _unreadable(path, error) from error
    if digest_of(tensors, text) != digest:
        raise _unreadable(path, "it does not match its checksum")
    rest: dict[str, Any] = json.loads(text)
    return tensors, rest


def saved_step(output_dir: Path) -> int | None:
    """The step that a resumed training continues after; ``None`` without a state file.

    Raises:
        ValueError: It is damaged.
    """
    path = output_dir / STATE_FILE
    if not path.is_file():
        return None
    try:
        return int(json.loads(_metadata(path)[0])["step"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise _unreadable(path, error) from error


def _metadata(path: Path) -> tuple[str, str]:
    """The JSON and the digest. Raises ValueError when there are none."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata()
        return found["state"], found["digest"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, why: object) -> ValueError:
    return ValueError(
        f"{path} cannot be read ({why}), so this training cannot be resumed: start it again "
        "without resume"
    )

"""Tensors on disk, as the states of learners and of supervised stages need them: no pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what libraries written in Rust raise for a full disk into the ``OSError`` it is.

    They have types of their own, with the system's number in the text.
    """
    try:
        yield
    except Exception as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None or isinstance(error, OSError):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def moments_of(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """``{"exp_avg/<parameter>": tensor}``.

    Args:
        names: Of the parameters, in the order of the optimizer's groups.
    """
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{moment}/{names[index]}": torch.as_tensor(value)
        for index, entry in state.items()
        for moment, value in entry.items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, names: Sequence[str], moments: Mapping[str, Tensor]
) -> None:
    """Take back what ``moments_of`` gave; settings (learning rate, betas) stay as they are."""
    index = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        state.setdefault(index[name], {})[moment] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix/``, by the rest of their name."""
    start = f"{prefix}/"
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def digest_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """XXH3-128 of the names and bytes of tensors and of a text."""
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(digest.hexdigest())

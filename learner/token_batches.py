"""Token-budget batches: rows of like length together, so that hardly anything is padded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

# A window of this many steps' items is sorted by length before it is cut into batches: hardly
# any padding, while a batch still differs from epoch to epoch.
SORTED_STEPS = 32


def plan_steps(
    lengths: IntArray, rows: IntArray, tokens_per_step: int, epochs: float, seed: int
) -> list[IntArray]:
    """The items of every optimizer step, each at most ``tokens_per_step`` padded tokens.

    A pass over the data shuffles it, sorts each window of ``SORTED_STEPS`` steps' worth by
    length, cuts it by the budget and shuffles the batches. Every item appears once per pass; of
    a fractional last pass the first part of its batches is taken. An item that is larger than
    the budget has a step of its own.
    """
    steps: list[IntArray] = []
    for epoch in range(math.ceil(epochs)):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))
        cost = np.cumsum((lengths * rows)[order])
        window = (cost - 1) // (SORTED_STEPS * tokens_per_step)
        passes: list[IntArray] = []
        for number in range(int(window[-1]) + 1):
            members = order[window == number]
            members = members[np.argsort(lengths[members], kind="stable")]
            passes += cut_by_budget(members, lengths, rows, tokens_per_step)
        passes = [passes[i] for i in rng.permutation(len(passes))]
        share = min(1.0, epochs - epoch)
        steps += passes[: max(1, round(share * len(passes)))]
    return steps


def cut_by_budget(
    items: IntArray, lengths: IntArray, rows: IntArray, tokens: int
) -> list[IntArray]:
    """Cut ``items``, in their order, into batches of at most ``tokens`` padded tokens."""
    batches: list[IntArray] = []
    start, longest, count = 0, 0, 0
    for end, item in enumerate(items):
        longest_now = max(longest, int(lengths[item]))
        if end > start and longest_now * (count + int(rows[item])) > tokens:
            batches.append(items[start:end])
            start, count = end, 0
            longest_now = int(lengths[item])
        longest, count = longest_now, count + int(rows[item])
    if start < len(items):
        batches.append(items[start:])
    return batches


def pad_right(sequences: Sequence[Ids], device: torch.device) -> Tensor:
    """``[B, T]`` ids, padded with 0 on the right: causal attention never looks at the pads."""
    ids = np.zeros((len(sequences), max(len(s) for s in sequences)), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids).to(device)

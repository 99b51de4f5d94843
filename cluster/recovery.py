"""Going on after the learners were lost: how often, and what is said.

A learner that dies takes the state of the step with it. What it needs to go on is in the last
checkpoint, so the stage restores it, in the same process and with the same engines and reward
service, and does the steps since again: the same way that ``--resume`` goes, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable


class Recovery:
    """Counts how often the learners were lost, and ends a run that does not get on.

    Args:
        limit: How many losses in a row are mended: without a step in between that is further
            than any before (``learners.max_restarts``).
        warn: Told of every loss.
    """

    def __init__(self, limit: int, warn: Callable[[str], None]) -> None:
        self.restarts = 0
        """Groups that were built anew since this process started."""
        self._limit = limit
        self._warn = warn
        self._in_a_row = 0
        self._furthest = 0

    def reached(self, step: int) -> None:
        """A step is finished, the first being 1."""
        if step > self._furthest:
            self._furthest, self._in_a_row = step, 0

    def lost(self, error: RuntimeError) -> None:
        """Return when the learners are to be built anew.

        Raises:
            RuntimeError: As ``error``; it happened too often.
        """
        self._in_a_row += 1
        if self._in_a_row > self._limit:
            raise type(error)(
                f"{error}. This was loss {self._in_a_row} in a row without a step beyond step"
                f" {self._furthest} (learners.max_restarts is {self._limit}): go on with --resume"
                " when the cause is gone"
            ) from error
        self.restarts += 1
        self._warn(
            f"{error}. The learners are built anew and go on from the last checkpoint (loss"
            f" {self._in_a_row} of {self._limit} in a row that are mended, learners.max_restarts)"
        )

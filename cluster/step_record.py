"""What others may look at while PPO runs: the timeline so far, and the workers' states."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cluster.step_lines import StepLines
from cluster.timeline import DRIVER, FILE_NAME, LEARNERS, Clock
from cluster.whole_file import replace_text

WORKERS = "workers.json"


class StepRecord:
    """Writes a line of ``timeline.jsonl``, and ``workers.json`` anew, when a step is over.

    Args:
        next_step: Step to go on with, counted from 0; lines of it and later ones are cut.
        workers: State of every rollout actor by its name.
        checkpoints: Steps of the checkpoints on disk.
    """

    def __init__(
        self,
        directory: Path,
        next_step: int,
        *,
        workers: Callable[[], Mapping[str, str]],
        checkpoints: Callable[[], Sequence[int]],
    ) -> None:
        self._directory = directory
        self._lines = StepLines(directory / FILE_NAME, resume_step=next_step)
        self._workers = workers
        self._checkpoints = checkpoints

    def __call__(self, step: int, clock: Clock) -> None:
        """Take in a step, counted from 1, all of which is done."""
        if step in self._checkpoints():  # learner 0 wrote it while the driver waited
            for span in list(clock.spans):
                if (span.lane, span.what) == (DRIVER, "save"):
                    clock.add(LEARNERS, "checkpoint", span.start, span.end)
        self._lines.append([clock.row(step)])
        state = {"step": step, "time": round(time.time(), 3), "workers": dict(self._workers())}
        replace_text(self._directory / WORKERS, json.dumps(state))

    def close(self) -> None:
        self._lines.close()

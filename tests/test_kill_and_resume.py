"""A whole run on real parts, killed once: nothing is left running, and it ends with the same bits.

``python -m tests.kill_and_resume`` does this many times, at random moments.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.kill_and_resume import KINDS, Place, Run
from tests.same_run import differences


@pytest.mark.parametrize("kind", list(KINDS)[1:2])
def test_a_killed_run_leaves_nothing_running_and_ends_with_the_same_bits(
    tmp_path: Path, kind: str
) -> None:
    place = Place(tmp_path)
    reference, step_s = place.reference(kind)
    config = place.configure(kind, "killed")
    run = Run(config, resume=False)
    run.wait_for_lines(4)  # a checkpoint is there, and a step beyond it
    time.sleep(step_s / 3)
    assert len(list(run.processes())) > 5, "driver, Ray, engine, learner, reward service"
    run.kill()
    resumed = Run(config, resume=True)
    resumed.finish()
    assert [*run.left(), *resumed.left()] == []
    assert differences(reference, run.run_dir) == []

"""How often lost learners are built anew."""

from __future__ import annotations

import pytest

from cluster.recovery import Recovery
from learner.group import LearnersLost


def test_losses_are_counted_in_a_row_and_getting_on_forgives_them() -> None:
    said: list[str] = []
    recovery = Recovery(2, said.append)
    error = LearnersLost("learner 1 of 2 failed in update: its process died")
    for step in range(1, 5):
        recovery.lost(error)
        recovery.lost(error)
        for done in range(1, step + 1):  # the steps since the checkpoint, again, and one more
            recovery.reached(done)
    assert recovery.restarts == len(said) == 8
    assert said[1].startswith(f"{error}. The learners are built anew")
    assert "loss 2 of 2 in a row" in said[1]
    recovery.lost(error)
    recovery.lost(error)
    recovery.reached(4)  # no further than before
    with pytest.raises(LearnersLost, match=r"died\. This was loss 3 in a row .* beyond step 4"):
        recovery.lost(error)


def test_none_are_mended_when_none_are_to_be() -> None:
    with pytest.raises(LearnersLost):
        Recovery(0, print).lost(LearnersLost("gone"))

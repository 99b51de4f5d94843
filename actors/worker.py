"""One rollout actor as the driver sees it: its states, and what moves it from one to another.

::

          spawned               built            confirmed           silent
    DEAD ---------> RESTARTING -------> STALE -------------> HEALTHY --------> SUSPECT
     ^                                   ^ |                  |   ^              |  |
     |                       new weights | | refused twice    |   +--- heard ----+  |
     |                                   | v                  |                     |
     |                                 REFUSING   new weights: HEALTHY and SUSPECT  |
     |                                            become STALE                      |
     +---- lost, from any state: died, hung, lost its engine, or its node leaves ---+

Only HEALTHY is given samples. A SUSPECT has samples and does not answer: it keeps them until it
answers or is lost. RESTARTING builds a process and an engine, the first time as well as later ones;
it passes STALE, with the current weights to be confirmed, before it serves.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actors.rollout_actor import EngineInfo
    from actors.weights import UpdateConfirmation, WeightUpdate


class State(enum.Enum):
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "loading weights"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    REFUSING = "refusing to generate"


class Event(enum.Enum):
    SPAWNED = "Ray was asked for its process"
    BUILT = "its engine stands"
    CONFIRMED = "it has the current weights, proved by the probe"
    REFUSED = "it refused the current weights for good"
    NEW_WEIGHTS = "it was given the current weights"
    SILENT = "it does not answer while it works"
    HEARD = "it gave a sign of life"
    LOST = "its process, its engine or its node is gone"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.DEAD, Event.SPAWNED): State.RESTARTING,
    (State.RESTARTING, Event.BUILT): State.STALE,
    (State.STALE, Event.CONFIRMED): State.HEALTHY,
    (State.STALE, Event.REFUSED): State.REFUSING,
    (State.STALE, Event.NEW_WEIGHTS): State.STALE,
    (State.HEALTHY, Event.NEW_WEIGHTS): State.STALE,
    (State.SUSPECT, Event.NEW_WEIGHTS): State.STALE,
    (State.REFUSING, Event.NEW_WEIGHTS): State.STALE,
    (State.HEALTHY, Event.SILENT): State.SUSPECT,
    (State.SUSPECT, Event.SILENT): State.SUSPECT,
    (State.HEALTHY, Event.HEARD): State.HEALTHY,
    (State.SUSPECT, Event.HEARD): State.HEALTHY,
    **{(state, Event.LOST): State.DEAD for state in State if state is not State.DEAD},
}
"""Everything that can happen; what is not here cannot."""


@dataclass(eq=False)
class Worker:
    """One rollout actor of a fleet.

    Attributes:
        name: Also the actor's name in Ray's dashboard.
        extra: Beyond ``num_actors``: it came because there was room, and leaves when it is lost.
        pending: What RESTARTING or STALE waits for, until ``deadline`` (monotonic seconds).
        loading: The update that it was last given.
        refusal: Why it refused that update the first time; empty if it did not.
        failures: Deaths since it last came to HEALTHY.
        rests_until: When it is started again, if others serve meanwhile (monotonic seconds).
        reason: Why it is DEAD or REFUSING.
        error: What it died of or refuses for, where there is an exception.
        blameless: It was lost with its node: what it was working on has nothing to do with it.
        heard: When it last gave a sign of life (monotonic seconds).
        ping: The question whether it lives, while there is no answer.
        silent_since: When it was first asked in vain.
    """

    name: str
    extra: bool = False
    state: State = State.DEAD
    handle: Any = None
    pending: Any = None
    deadline: float = 0.0
    failures: int = 0
    rests_until: float = 0.0
    reason: str = "not started"
    error: Exception | None = field(default=None, repr=False)
    blameless: bool = False
    info: EngineInfo | None = None
    loading: WeightUpdate | None = None
    refusal: str = ""
    confirmation: UpdateConfirmation | None = None
    heard: float = 0.0
    ping: Any = None
    silent_since: float | None = None

    def on(self, event: Event) -> None:
        """Move to the state that ``event`` leads to."""
        assert (self.state, event) in TRANSITIONS, f"{self.name} is {self.state} at {event}"
        self.state = TRANSITIONS[self.state, event]


def judge_silence(silent_s: float, limit_s: float) -> Event | None:
    """What it means that a worker has left a question unanswered for ``silent_s``; ``None`` for
    nothing yet. It is suspected after a third of the limit and lost after all of it."""
    if silent_s > limit_s:
        return Event.LOST
    return Event.SILENT if silent_s > limit_s / 3 else None

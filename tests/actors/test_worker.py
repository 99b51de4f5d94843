"""The states of a rollout actor, as tables: no Ray, no process."""

from __future__ import annotations

import pytest

from actors.worker import TRANSITIONS, Event, State, Worker, judge_silence

LIVES: dict[str, tuple[str, str]] = {
    "a good start": (
        "spawned built confirmed",
        "dead restarting stale healthy",
    ),
    "new weights in every step": (
        "spawned built confirmed new_weights confirmed new_weights confirmed",
        "dead restarting stale healthy stale healthy stale healthy",
    ),
    "weights that are refused twice, then good ones": (
        "spawned built new_weights refused new_weights confirmed",
        "dead restarting stale stale refusing stale healthy",
    ),
    "newer weights while older ones are loaded": (
        "spawned built new_weights new_weights confirmed",
        "dead restarting stale stale stale healthy",
    ),
    "silent for a while": (
        "spawned built confirmed silent silent heard heard",
        "dead restarting stale healthy suspect suspect healthy healthy",
    ),
    "new weights for a suspect": (
        "spawned built confirmed silent new_weights confirmed",
        "dead restarting stale healthy suspect stale healthy",
    ),
    "silent for too long, and back": (
        "spawned built confirmed silent lost spawned built new_weights confirmed",
        "dead restarting stale healthy suspect dead restarting stale stale healthy",
    ),
    "lost while it starts": ("spawned lost spawned built", "dead restarting dead restarting stale"),
    "lost while it loads": ("spawned built lost", "dead restarting stale dead"),
    "lost while it serves": ("spawned built confirmed lost", "dead restarting stale healthy dead"),
    "lost while it refuses": (
        "spawned built refused lost spawned",
        "dead restarting stale refusing dead restarting",
    ),
}


@pytest.mark.parametrize("life", LIVES)
def test_a_life(life: str) -> None:
    events, states = (text.upper().split() for text in LIVES[life])
    worker, seen = Worker(name="w"), ["DEAD"]
    for event in events:
        worker.on(Event[event])
        seen.append(worker.state.name)
    assert seen == states


def test_every_state_and_every_event_has_its_place() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)
    reached = {State.DEAD}
    while more := {TRANSITIONS[s, e] for s, e in TRANSITIONS if s in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_nothing_serves_before_its_weights_are_confirmed() -> None:
    """HEALTHY is entered by confirmation, or by a suspect that had confirmed."""
    entries = {(s, e) for (s, e), to in TRANSITIONS.items() if to is State.HEALTHY}
    assert entries == {
        (State.STALE, Event.CONFIRMED),
        (State.HEALTHY, Event.HEARD),
        (State.SUSPECT, Event.HEARD),
    }
    assert {s for (s, e), to in TRANSITIONS.items() if to is State.SUSPECT} <= {
        State.HEALTHY,
        State.SUSPECT,
    }


@pytest.mark.parametrize("state", State)
def test_what_cannot_happen_is_an_error(state: State) -> None:
    for event in Event:
        worker = Worker(name="w", state=state)
        if (state, event) in TRANSITIONS:
            worker.on(event)
        else:
            with pytest.raises(AssertionError, match="w is"):
                worker.on(event)


@pytest.mark.parametrize(
    ("silent_s", "event"),
    [(0.0, None), (10.0, None), (10.1, Event.SILENT), (30.0, Event.SILENT), (30.1, Event.LOST)],
)
def test_silence_of_half_a_minute(silent_s: float, event: Event | None) -> None:
    assert judge_silence(silent_s, 30.0) is event

"""Assignment on both databases: overlap, leases, repeats, gold, undo, flags, many at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from reward_service.comparison import Annotator, Candidate
from reward_service.config import PeopleConfig
from reward_service.feedback.assignment import Assignments, open_answers, set_paused
from reward_service.feedback.leases import NotYoursError
from reward_service.feedback.store import FeedbackStore
from reward_service.feedback.tasks import Answer, Task

PLAIN = {"repeat_share": 0.0, "gold_share": 0.0}
A: Answer = {"choice": "a", "strength": 2}


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def comparison(
    number: int, *, overlap: int = 1, priority: float = 0.0, gold: Answer | None = None
) -> Task:
    return Task(
        task_id=f"t{number}",
        kind="comparison",
        prompt_id=f"p{number}",
        prompt="?",
        candidates=(Candidate(text=f"x{number}", model="m1"), Candidate(text="y", model="m2")),
        overlap=overlap,
        priority=priority,
        gold=gold,
    )


@pytest.fixture
def desk(
    store_location: str,
) -> Callable[..., tuple[FeedbackStore, Assignments, Clock]]:
    def make(
        tasks: list[Task], people: int = 3, **config: float
    ) -> tuple[FeedbackStore, Assignments, Clock]:
        store = FeedbackStore(store_location)
        store.add_annotators(Annotator(annotator_id=f"p{n}", kind="human") for n in range(people))
        clock = Clock()
        made = Assignments(store, PeopleConfig(**{**PLAIN, **config}), clock=clock, seed=0)
        assert made.add_tasks(tasks) == len(tasks)
        return store, made, clock

    return make


def work(desk: Assignments, person: str, answer: Answer = A) -> list[str]:
    """Answer until nothing is left; the tasks in order."""
    done = []
    while (given := desk.next(person)) is not None:
        assert desk.submit(person, given.assignment_id, answer)
        done.append(given.task.task_id)
    return done


def test_each_item_goes_to_as_many_people_as_its_overlap_says(desk) -> None:
    store, assignments, _ = desk([comparison(n, overlap=2) for n in range(5)], people=3)
    seen = [work(assignments, f"p{n}") for n in range(3)]
    assert [len(set(tasks)) for tasks in seen] == [5, 5, 0]
    assert Counter(c.pair.item_id for c in store.comparisons()) == {f"t{n}": 2 for n in range(5)}
    assert store.database.read(open_answers) == (10, 10)
    assert assignments.add_tasks([comparison(0, overlap=2)]) == 0
    with pytest.raises(ValueError, match=r"what (was judged|people judge) must not change"):
        assignments.add_tasks([Task(**{**_fields(comparison(0)), "prompt": "other"})])
    store.close()


def _fields(task: Task) -> dict[str, object]:
    return {name: getattr(task, name) for name in Task.__dataclass_fields__}


def test_the_answer_is_stored_as_said_with_the_side_that_was_shown(desk) -> None:
    store, assignments, clock = desk([comparison(n) for n in range(40)])
    sides = Counter()
    while (given := assignments.next("p0")) is not None:
        clock.time += 4
        assignments.submit("p0", given.assignment_id, {"choice": "b", "strength": 3, "x": 1})
        last = store.comparisons()[-1]
        assert last.shown_first == "ab"[given.shown[0]]
        assert (last.choice, last.strength, last.seconds) == ("b", 3, 4.0)
        sides[last.shown_first] += 1
    assert min(sides.values()) > 8, "sides are random"
    store.close()


def test_what_is_least_known_comes_first_and_what_others_began(desk) -> None:
    tasks = [comparison(0), comparison(1, priority=0.9), comparison(2, overlap=2)]
    store, assignments, _ = desk([*tasks, comparison(3, priority=0.5)])
    assert work(assignments, "p0")[:2] == ["t1", "t3"]
    given = Counter(c.pair.item_id for c in store.comparisons())
    assert given == {"t0": 1, "t1": 1, "t2": 1, "t3": 1}
    assignments.set_priorities({"t2": 1.0})
    more = assignments.next("p1")
    assert more is not None
    assert more.task.task_id == "t2"
    store.close()


def test_a_lease_expires_and_a_late_answer_still_counts(desk) -> None:
    store, assignments, clock = desk([comparison(0)], lease_minutes=1)
    first = assignments.next("p0")
    assert first is not None
    assert assignments.next("p0") == first, "a reload shows the same item"
    assert assignments.next("p1") is None
    clock.time += 61
    second = assignments.next("p1")
    assert second is not None
    assert second.task.task_id == "t0"
    assert assignments.submit("p0", first.assignment_id, A)
    assert assignments.submit("p1", second.assignment_id, A)
    assert not assignments.submit("p1", second.assignment_id, A), "sent twice counts once"
    assert len(store.comparisons(history=True)) == 2
    store.close()


def test_an_expired_item_can_come_back_to_the_same_person(desk) -> None:
    store, assignments, clock = desk([comparison(0)], lease_minutes=1)
    first = assignments.next("p0")
    clock.time += 100
    again = assignments.next("p0")
    assert first is not None
    assert again is not None
    assert again.assignment_id == first.assignment_id
    assert again.shown_at == clock.time
    store.close()


def test_undo_takes_back_one_after_the_other_and_skips_too(desk) -> None:
    store, assignments, clock = desk([comparison(n) for n in range(3)])
    order = []
    for action in ("judge", "judge", "skip"):
        given = assignments.next("p0")
        assert given is not None
        order.append(given.task.task_id)
        clock.time += 1
        if action == "judge":
            assignments.submit("p0", given.assignment_id, A)
        else:
            assignments.set_aside(
                "p0", given.assignment_id, action="skip", reason="other", comment="call 13800138000"
            )
    assert assignments.next("p0") is None
    for expected, left in ((order[2], 2), (order[1], 1), (order[0], 0)):
        undone = assignments.undo("p0")
        assert undone is not None
        assert undone.task.task_id == expected
        assert assignments.next("p0") == undone
        assert len(store.comparisons()) == left
    assert assignments.undo("p0") is None
    assert len(store.comparison_history()) == 4  # two said, two taken back
    assert sorted(work(assignments, "p0", {"choice": "tie"})) == ["t0", "t1", "t2"]
    assert {c.choice for c in store.comparisons()} == {"tie"}
    store.close()


def test_flags_withhold_an_item_until_they_are_taken_back(desk) -> None:
    store, assignments, _ = desk([comparison(0, overlap=9)], people=4, flags_to_withhold=2)
    for person in ("p0", "p1"):
        given = assignments.next(person)
        assert given is not None
        assignments.set_aside(person, given.assignment_id, action="flag", reason="harmful")
    assert assignments.next("p2") is None
    assert assignments.undo("p1") is not None
    assert assignments.next("p2") is not None
    with pytest.raises(ValueError, match="reasons"):
        assignments.set_aside("p2", 1, action="flag", reason="dislike")
    store.close()


def test_repeats_swap_sides_and_gold_measures_the_person_only(desk) -> None:
    tasks = [comparison(n) for n in range(60)] + [comparison(100, gold={"choice": "b"})]
    store, assignments, _ = desk(tasks, repeat_share=0.3, repeat_gap=5, gold_share=0.2)
    shown: dict[str, list[tuple[int, ...]]] = {}
    order = []
    while (given := assignments.next("p0")) is not None:
        shown.setdefault(given.task.task_id, []).append(given.shown)
        order.append(given.task.task_id)
        assignments.submit("p0", given.assignment_id, A)
    # Whoever waits for new items is not given the old ones again.
    assert [given for given in (assignments.next("p0") for _ in range(30)) if given] == []
    repeated = [task for task, sides in shown.items() if len(sides) == 2]
    assert 8 < len(repeated) < 40
    for task in repeated:
        assert shown[task][0] == shown[task][1][::-1]
        first, second = (number for number, name in enumerate(order) if name == task)
        assert second - first > 5
    assert len(store.comparisons()) == 60  # neither the second look nor the gold item
    assert sum(e.repeat for e in store.comparison_history()) == len(repeated)
    assert store.gold_items() == {"t100"}
    assert "t100" in order
    store.close()


def test_a_known_answer_makes_an_item_gold_until_it_is_judged(desk) -> None:
    store, assignments, _ = desk([comparison(0), comparison(1)])
    known: Answer = {"choice": "b", "strength": 1}
    assert assignments.add_tasks([comparison(0, gold=known)]) == 1
    assert assignments.add_tasks([comparison(0, gold=known)]) == 0
    assert assignments.add_tasks([comparison(0)]) == 0
    assert store.gold_answers() == {"t0": known}
    with pytest.raises(ValueError, match="'t0' has another known answer already"):
        assignments.add_tasks([comparison(0, gold={"choice": "a", "strength": 1})])
    assert work(assignments, "p0") == ["t1"]
    with pytest.raises(ValueError, match="'t1' was judged as an ordinary item already"):
        assignments.add_tasks([comparison(1, gold=known)])
    assert [c.pair.item_id for c in store.comparisons()] == ["t1"]
    store.close()


def test_ratings_and_rankings(desk) -> None:
    rating = Task(
        task_id="r", kind="rating", prompt_id="p", prompt="?", candidates=(Candidate(text="x"),)
    )
    ranking = Task(
        task_id="k", kind="ranking", prompt_id="p", prompt="?",
        candidates=tuple(Candidate(text=t) for t in "xyz"), priority=-1,
    )  # fmt: skip
    store, assignments, _ = desk([rating, ranking])
    given = assignments.next("p0")
    assert given is not None
    with pytest.raises(ValueError, match="quality, diversity needs a rating"):
        assignments.submit("p0", given.assignment_id, {"ratings": {"quality": 3}})
    with pytest.raises(ValueError, match="a rating is 1 to 5, got 6"):
        assignments.submit("p0", given.assignment_id, {"ratings": {"quality": 3, "diversity": 6}})
    assignments.submit("p0", given.assignment_id, {"ratings": {"quality": 3, "diversity": 5}})
    given = assignments.next("p0")
    assert given is not None
    with pytest.raises(ValueError, match="place of its own"):
        assignments.submit("p0", given.assignment_id, {"ranking": [0, 0, 1]})
    assignments.submit("p0", given.assignment_id, {"ranking": [2, 0, 1]})
    assert {r.criterion: r.value for r in store.ratings()} == {"quality": 3, "diversity": 5}
    assert [r.ranking for r in store.rankings()] == [(2, 0, 1)]
    assert len(store.preferences()) == 3
    assignments.undo("p0")
    assignments.undo("p0")
    assert store.ratings() == []
    assert store.rankings() == []
    store.close()


def test_another_persons_item_is_out_of_reach(desk) -> None:
    store, assignments, _ = desk([comparison(0)])
    given = assignments.next("p0")
    assert given is not None
    with pytest.raises(NotYoursError):
        assignments.submit("p1", given.assignment_id, A)
    with pytest.raises(NotYoursError):
        assignments.set_aside("p1", given.assignment_id, action="skip", reason="other")
    with pytest.raises(NotYoursError):
        assignments.next("stranger")
    store.database.write(lambda c: set_paused(c, True))
    assert assignments.next("p1") is None
    store.close()


def test_many_at_once_lose_nothing_and_double_nothing(desk) -> None:
    """Twelve people on 40 items with overlap 3: exactly 120 judgements, none twice by one."""
    store, assignments, _ = desk([comparison(n, overlap=3) for n in range(40)], people=12)
    with ThreadPoolExecutor(12) as pool:
        done = list(pool.map(lambda n: work(assignments, f"p{n}"), range(12)))
    # Somebody may leave while another's transaction holds the last item: asking again finds it.
    done += [work(assignments, f"p{n}") for n in range(12)]
    assert sum(len(tasks) for tasks in done) == 120
    said = Counter((c.pair.item_id, c.annotator.annotator_id) for c in store.comparisons())
    assert len(said) == 120
    assert set(Counter(item for item, _ in said).values()) == {3}
    assert len(store.comparison_history()) == 120
    store.close()

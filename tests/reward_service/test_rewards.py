"""Function rewards, model rewards, weighted sums, and scoring while samples still come in."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from actors.trajectory import Message, SampleFailure, Trajectory
from reward_service.config import RetryConfig, RewardConfig, RewardTerm
from reward_service.encoding import Truncation
from reward_service.examples import length_and_diversity, new_words, story_quality
from reward_service.rewards import (
    FunctionReward,
    ModelReward,
    Scored,
    WeightedSum,
    build_reward,
    scoring_failure,
)
from reward_service.score import ModelScores, RewardUnavailable, Score, ScoreItem
from reward_service.scoring import score_stream

FUNCTIONS = """
import numpy as np

def length(*, response, **_):
    return len(response)

def everything(prompt, response, response_ids, meta):
    assert isinstance(response_ids, list) and isinstance(meta, dict)
    return len(prompt) + len(response) + len(response_ids) + meta.get("bonus", 0)

def per_token(*, response_ids, **_):
    return np.array(response_ids, np.float32) / 10

def one_too_many(*, response_ids, **_):
    return [0.0] * (len(response_ids) + 1)

def not_a_number(*, response, **_):
    return float("nan") if "nan" in response else 1.0

def word(*, response, **_):
    return "good"

def nothing(*, response, **_):
    return None

def always_raises(*, response, **_):
    raise KeyError("label")

def sometimes_raises(*, response, **_):
    return 1 / (len(response) - 4)

def old_signature(text):
    return 1.0

number = 3
"""


@pytest.fixture(autouse=True)
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("import no_such_library_at_all\n")
    (tmp_path / "crashing_rewards.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def only(scored: list[Scored]) -> Score:
    assert len(scored) == 1
    assert isinstance(scored[0], Score)
    return scored[0]


def reason(scored: Scored) -> str:
    assert isinstance(scored, SampleFailure)
    assert scored.stage == "scoring"
    return scored.reason


def test_a_function_gets_all_four_arguments(trajectory) -> None:
    sample = trajectory("four", prompt="abc", ids=[5, 6], meta={"bonus": 100})
    assert only(FunctionReward("my_rewards:everything").score([sample])).value == 3 + 4 + 2 + 100
    score = only(FunctionReward("my_rewards:length").score([sample]))
    assert (score.sample_id, score.value, score.per_token) == ("p0#0", 4.0, None)


def test_per_token_rewards_sum_to_the_value(trajectory) -> None:
    score = only(FunctionReward("my_rewards:per_token").score([trajectory(ids=[10, 20, 5])]))
    assert score.value == pytest.approx(3.5)
    np.testing.assert_allclose(score.per_token, [1.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one_too_many", "ValueError: it returned 4 rewards for 3 response tokens"),
        ("word", "TypeError: it must return a number or a list of numbers, not str"),
        ("nothing", "TypeError: it must return a number or a list of numbers, not NoneType"),
        ("always_raises", "KeyError: 'label'"),
    ],
)
def test_a_bad_value_is_a_failure_with_its_reason(trajectory, name: str, says: str) -> None:
    reward = FunctionReward(f"my_rewards:{name}")
    (failure,) = reward.score([trajectory()])
    assert reason(failure) == f"reward function my_rewards:{name}: {says}"
    with pytest.raises(RuntimeError, match=rf"my_rewards:{name}: .* all of the first 4 samples"):
        reward.score([trajectory(number=n) for n in range(4)])


def test_samples_that_fail_first_do_not_end_a_run_whose_others_can_be_scored(trajectory) -> None:
    """A resumed run gets its samples in another order and must not end for it."""
    texts = ["four"] * 6 + ["works"]
    reward = FunctionReward("my_rewards:sometimes_raises")
    scored = reward.score([trajectory(t, number=n) for n, t in enumerate(texts)])
    assert [isinstance(result, Score) for result in scored] == [False] * 6 + [True]


def test_one_bad_sample_does_not_harm_the_others(trajectory) -> None:
    reward = FunctionReward("my_rewards:not_a_number")
    scored = reward.score([trajectory(t, number=n) for n, t in enumerate(["a", "nan", "b"])])
    assert "NaN or infinity" in reason(scored[1])
    assert [only([scored[0]]).value, only([scored[2]]).value] == [1.0, 1.0]
    reward = FunctionReward("my_rewards:sometimes_raises")
    reward.score([trajectory("works")])
    failures = reward.score([trajectory("four", number=n) for n in range(20)])
    assert all("ZeroDivisionError" in reason(f) for f in failures)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("my_rewards.length", "must be written package.module:function"),
        ("my_rewards:lenght", "my_rewards has no 'lenght'; did you mean my_rewards:length"),
        ("my_reward:length", "no module 'my_reward'; did you mean my_rewards:length"),
        ("elsewhere.rewards:f", "no module 'elsewhere.rewards': install it, or put rewards.py"),
        ("broken_rewards:f", "itself needs the module 'no_such_library_at_all'"),
        ("crashing_rewards:f", "importing crashing_rewards raised ZeroDivisionError"),
        ("my_rewards:number", "is a int, not a function"),
        ("my_rewards:old_signature", r"its signature is \(text\)"),
    ],
)
def test_a_function_that_cannot_be_used_is_explained(path: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FunctionReward(path)


def test_example_rewards_by_hand(trajectory) -> None:
    # 8 characters; ids 2, 4, 4, 4, 5, 5, 7, 9 have the textbook deviation 2
    ids = [2, 4, 4, 4, 5, 5, 7, 9]
    assert length_and_diversity(response="12345678", response_ids=ids) == pytest.approx(1.0)
    assert new_words(response_ids=[5, 5, 6, 5]) == [0.25, 0, 0.25, 0]
    # no speech, two of three word pairs distinct, no end
    assert story_quality(response="a b a b") == pytest.approx(2 / 9)
    assert story_quality(response='"Go" she said.') == pytest.approx(1.0)
    sample = trajectory("12345678", ids=ids)
    reward = FunctionReward("reward_service.examples:length_and_diversity")
    assert only(reward.score([sample])).value == pytest.approx(1.0)


class StubScorer:
    """A scorer whose score is the length of the response."""

    def __init__(self) -> None:
        self.seen: list[tuple[Sequence[ScoreItem], Truncation]] = []

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        self.seen.append((items, truncation))
        lengths = [len(item.response) for item in items]
        return ModelScores(
            model="stub",
            version="v1",
            fingerprint="f",
            scores=tuple(float(n) if n else None for n in lengths),
            tokens=tuple(lengths),
            errors=tuple(None if n else "empty" for n in lengths),
        )


def test_a_model_reward_keeps_version_and_errors(trajectory) -> None:
    scorer = StubScorer()
    turns = (Message(role="user", content="hi"),)
    samples = [trajectory("four", messages=turns), trajectory("", number=1)]
    first, second = ModelReward(scorer).score(samples)
    assert only([first]).value == 4.0
    assert only([first]).model_version == "stub@v1"
    assert reason(second) == "empty"
    ((items, truncation),) = scorer.seen
    assert items[0] == ScoreItem(prompt="storm in Riverton", response="four", messages=turns)
    assert truncation == "left"


def test_a_weighted_sum_by_hand(trajectory) -> None:
    config = RewardConfig(
        terms=(
            RewardTerm(name="length", weight=0.5, function="my_rewards:length"),
            RewardTerm(name="model", weight=-2.0, model="some/where"),
        )
    )
    reward = build_reward(config, {"model": StubScorer()})
    score = only(reward.score([trajectory("four")]))
    assert score.value == 0.5 * 4 - 2.0 * 4
    assert score.components == {"length": 4.0, "model": 4.0}
    assert score.per_token is None
    assert score.model_version == "stub@v1"
    (failure,) = reward.score([trajectory("")])
    assert reason(failure) == "term 'model': empty"


def test_a_sum_with_per_token_rewards_puts_the_rest_on_the_last_token(trajectory) -> None:
    reward = WeightedSum(
        [
            ("tokens", 2.0, FunctionReward("my_rewards:per_token")),
            ("length", 0.5, FunctionReward("my_rewards:length")),
        ]
    )
    score = only(reward.score([trajectory("four", ids=[10, 20, 5])]))
    np.testing.assert_allclose(score.per_token, [2.0, 4.0, 1.0 + 2.0])
    assert score.value == pytest.approx(9.0)
    assert score.components == {"tokens": 3.5, "length": 4.0}


def test_terms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.terms is empty"):
        build_reward(RewardConfig())
    model_term = RewardConfig(terms=(RewardTerm(name="rm", model="x"),))
    with pytest.raises(
        ValueError, match=r"'rm' needs \['rm'\], but the reward service serves \['o'\]"
    ):
        build_reward(model_term, {"o": StubScorer()})
    function = "my_rewards:length"
    with pytest.raises(ValueError, match="two reward terms are called 'x'"):
        RewardConfig(terms=(RewardTerm(name="x", function=function),) * 2)
    with pytest.raises(ValueError, match=r"a member of an ensemble are both called 'x\.1'"):
        RewardConfig(
            terms=(
                RewardTerm(name="x", models=("a", "b")),
                RewardTerm(name="x.1", function=function),
            )
        )
    with pytest.raises(ValueError, match="must be letters"):
        RewardTerm(name="a b", function=function)


class SlowReward:
    """Scores with the sample's number; remembers when and in which thread it was called."""

    def __init__(self, seconds: float = 0.0, *, fail: bool = False) -> None:
        self.seconds, self.fail = seconds, fail
        self.calls: list[tuple[float, int]] = []
        self.threads: set[str] = set()

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        self.calls.append((time.perf_counter(), len(trajectories)))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if self.fail:
            raise RuntimeError("the server is gone")
        return [
            Score(sample_id=t.sample_id, value=float(t.prompt.prompt_id[1:])) for t in trajectories
        ]


def test_every_call_of_the_reward_is_told_with_its_time(trajectory) -> None:
    told: list[tuple[float, float]] = []
    before = time.monotonic()
    samples = [trajectory(number=n) for n in range(10)]
    stream = score_stream(
        SlowReward(0.02), samples, batch=5, busy=lambda start, end: told.append((start, end))
    )
    assert len(list(stream)) == 10
    assert len(told) == 2
    assert before <= told[0][0] < told[0][1] <= told[1][0] < told[1][1] <= time.monotonic()
    assert all(end - start >= 0.02 for start, end in told)


def test_scoring_overlaps_generation(trajectory) -> None:
    generated: list[float] = []

    def samples() -> Iterator[Trajectory | SampleFailure]:
        for n in range(10):
            time.sleep(0.05)
            generated.append(time.perf_counter())
            yield trajectory(number=n)
        yield SampleFailure(
            prompt=trajectory().prompt, sample_index=9, stage="generation", reason="died"
        )

    reward = SlowReward(0.05)
    results = list(score_stream(reward, samples(), batch=4))
    assert [size for _, size in reward.calls] == [4, 4, 2]
    assert reward.calls[0][0] < generated[5]  # the first batch is scored while others are made
    assert reward.threads == {"scoring"}
    scored = {r[0].sample_id: r[1].value for r in results if not isinstance(r, SampleFailure)}
    assert scored == {f"p{n}#0": float(n) for n in range(10)}
    assert [r.reason for r in results if isinstance(r, SampleFailure)] == ["died"]
    assert all(t.name != "scoring" for t in threading.enumerate())


def test_an_error_of_the_reward_reaches_the_caller(trajectory) -> None:
    samples = (trajectory(number=n) for n in range(100))
    with pytest.raises(RuntimeError, match="the server is gone"):
        list(score_stream(SlowReward(fail=True), samples, batch=10))
    assert all(t.name != "scoring" for t in threading.enumerate())


def test_an_abandoned_stream_leaves_no_thread(trajectory) -> None:
    reward = SlowReward(0.01)
    stream = score_stream(reward, (trajectory(number=n) for n in range(1000)), batch=10)
    next(iter(stream))
    stream.close()
    assert all(t.name != "scoring" for t in threading.enumerate())
    assert len(reward.calls) < 100


def test_when_nothing_can_be_scored_every_sample_says_why(trajectory) -> None:
    """Whether that is too much for a step is for the step to say, not for one of its rounds."""
    samples = (trajectory(number=n) for n in range(3))
    retry = RetryConfig(max_retries=0)
    failures = list(score_stream(FunctionReward("my_rewards:always_raises"), samples, retry=retry))
    assert len(failures) == 3
    assert all("KeyError: 'label'" in failure.reason for failure in failures)


def test_somebody_who_asks_to_stop_need_not_wait_for_a_server_that_is_gone(trajectory) -> None:
    class Gone:
        def score(self, trajectories):
            raise RewardUnavailable("nobody answers")

    asked = iter([False, False, True])
    retry = RetryConfig(pause_s=60.0, max_pause_s=60.0, unreachable_s=600.0)
    stream = score_stream(Gone(), [trajectory()], retry=retry, stop=lambda: next(asked))
    assert list(stream) == []  # the timeout of the test is far below the pause
    assert all(t.name != "scoring" for t in threading.enumerate())


def test_a_reward_that_loses_samples_is_named(trajectory) -> None:
    class Forgetful:
        def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
            return []

    with pytest.raises(RuntimeError, match="'Forgetful' gave 0 results for 1 samples"):
        list(score_stream(Forgetful(), [trajectory()]))
    with pytest.raises(RuntimeError, match="'term' gave 0 results"):
        WeightedSum([("term", 1.0, Forgetful())]).score([trajectory()])


# --- tried again -------------------------------------------------------------------------------

QUICK = RetryConfig(max_retries=2, pause_s=0.05, unreachable_s=0.4)


class Flaky:
    """Fails for sample n in its first n tries; is away for its first ``away`` calls."""

    def __init__(self, away: int = 0) -> None:
        self.away = away
        self.tries: dict[str, list[float]] = {}

    def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
        if self.away:
            self.away -= 1
            raise RewardUnavailable("nobody answers")
        return [self._one(trajectory) for trajectory in trajectories]

    def _one(self, trajectory: Trajectory) -> Scored:
        tries = self.tries.setdefault(trajectory.sample_id, [])
        tries.append(time.monotonic())
        number = int(trajectory.prompt.prompt_id[1:])
        if len(tries) <= number:
            return scoring_failure(trajectory, f"try {len(tries)}")
        return Score(sample_id=trajectory.sample_id, value=float(number))


def test_a_failed_score_is_tried_again_and_then_set_aside(trajectory) -> None:
    reward = Flaky()
    samples = [trajectory("text", number=n) for n in range(5)]
    results = list(score_stream(reward, samples, batch=2, retry=QUICK))
    scored = {r[0].sample_id: r[1].value for r in results if not isinstance(r, SampleFailure)}
    assert scored == {"p0#0": 0.0, "p1#0": 1.0, "p2#0": 2.0}
    failures = {r.sample_id: r for r in results if isinstance(r, SampleFailure)}
    assert sorted(failures) == ["p3#0", "p4#0"]
    assert failures["p3#0"].reason == "failed 3 times, last: try 3"
    assert (failures["p3#0"].attempts, failures["p3#0"].response) == (3, "text")
    first, second, third = reward.tries["p4#0"]
    assert second - first >= 0.05  # pauses double
    assert third - second >= 0.1
    assert len(reward.tries["p0#0"]) == 1


def test_a_reward_that_is_away_is_waited_for_and_then_an_error(trajectory) -> None:
    (result,) = score_stream(Flaky(away=2), [trajectory()], retry=QUICK)
    assert not isinstance(result, SampleFailure)
    with pytest.raises(
        RewardUnavailable, match=r"tried [2-4] times .*unreachable_s is 0.4.*nobody"
    ):
        list(score_stream(Flaky(away=99), [trajectory()], retry=QUICK))
    assert all(t.name != "scoring" for t in threading.enumerate())


def test_results_that_are_mixed_up_are_refused(trajectory) -> None:
    class Swapped(Flaky):
        def score(self, trajectories: Sequence[Trajectory]) -> list[Scored]:
            return super().score(trajectories)[::-1]

    samples = [trajectory(number=0), trajectory(number=0, ids=[1]), trajectory(number=9)]
    with pytest.raises(
        RuntimeError, match=r"mixed its results up: it gave that of p9#0 for .*p0#0"
    ):
        list(score_stream(Swapped(), samples, retry=QUICK))

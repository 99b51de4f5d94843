"""Combined scores against values worked out by hand."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from reward_service.config import (
    EnsembleConfig,
    RewardConfig,
    RewardServiceConfig,
    RewardTerm,
    check_names,
)
from reward_service.encoding import Truncation
from reward_service.ensemble import EnsembleScorer, combine_answers, combined
from reward_service.rewards import build_reward
from reward_service.score import ModelScores, Score, ScoreItem


def test_combinations_by_hand() -> None:
    assert combined([1.0, 2.0, 6.0], "mean", 1.0) == 3.0
    assert combined([1.0, 2.0, 6.0], "minimum", 1.0) == 1.0
    # deviations -2, -1, 3: squares 4 + 1 + 9 = 14, variance 14 / 2 = 7
    assert combined([1.0, 2.0, 6.0], "lower_bound", 0.5) == pytest.approx(3 - 0.5 * 7**0.5)
    assert combined([4.0, 4.0], "lower_bound", 3.0) == 4.0


class Fixed:
    """Answers with its numbers; all members must be asked at the same time."""

    def __init__(self, name: str, scores: Sequence[float | None], meet: threading.Barrier) -> None:
        self.name, self.scores, self.meet = name, scores, meet

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        self.meet.wait(10)
        return ModelScores(
            model=self.name,
            version=f"v{self.name}",
            fingerprint=f"f{self.name}",
            scores=tuple(self.scores),
            tokens=(3,) * len(items),
            errors=tuple("too long" if s is None else None for s in self.scores),
        )


def members() -> list[Fixed]:
    meet = threading.Barrier(2)
    return [Fixed("a", [1.0, 2.0, 5.0], meet), Fixed("b", [3.0, None, 5.0], meet)]


def test_an_item_that_one_member_cannot_score_has_no_score() -> None:
    config = EnsembleConfig(members=("a", "b"), combine="lower_bound", penalty=1.0)
    items = [ScoreItem(response=t) for t in "xyz"]
    answer = EnsembleScorer("both", members(), config).score(items)
    # mean 2, standard deviation sqrt(2)
    assert answer.scores[0] == pytest.approx(2 - 2**0.5)
    assert answer.scores[1:] == (None, 5.0)
    assert answer.errors == (None, "b: too long", None)
    assert (answer.model, answer.version, answer.fingerprint) == ("both", "va+vb", "fa+fb")


def test_answers_to_different_lists_do_not_combine() -> None:
    first, _ = members()
    short = ModelScores(
        model="b", version="v", fingerprint="f", scores=(1.0,), tokens=(1,), errors=(None,)
    )
    first.meet = threading.Barrier(1)
    whole = first.score([ScoreItem(response=t) for t in "xyz"])
    with pytest.raises(ValueError, match="zip"):
        combine_answers("x", [whole, short], EnsembleConfig(members=("a", "b")))


def test_a_term_of_several_models(trajectory) -> None:
    term = RewardTerm(name="rm", models=("dir/one", "dir/two"), combine="minimum")
    assert term.members == {"rm.0": "dir/one", "rm.1": "dir/two"}
    one, two = members()
    two.scores = [3.0, 0.5, 5.0]
    reward = build_reward(RewardConfig(terms=(term,)), {"rm.0": one, "rm.1": two})
    scored = reward.score([trajectory(number=n) for n in range(3)])
    assert [s.value for s in scored if isinstance(s, Score)] == [1.0, 0.5, 5.0]
    assert isinstance(scored[0], Score)
    assert scored[0].model_version == "rm@va+vb"
    # the members' own scores too, so that the drift of each can be followed
    assert scored[0].components == {"a": 1.0, "b": 3.0, "rm": 1.0}
    with pytest.raises(ValueError, match=r"needs \['rm.1'\]"):
        build_reward(RewardConfig(terms=(term,)), {"rm.0": one})


def test_wrong_ensembles_are_refused() -> None:
    both = EnsembleConfig(members=("a", "b"))
    check_names({"a": 1, "b": 2}, RewardServiceConfig(ensembles={"both": both}))
    with pytest.raises(ValueError, match=r"members that are not served: \['b'\]"):
        check_names({"a": 1}, RewardServiceConfig(ensembles={"both": both}))
    with pytest.raises(ValueError, match="both called 'a'"):
        check_names({"a": 1, "b": 2}, RewardServiceConfig(ensembles={"a": both}))
    with pytest.raises(ValueError, match=r"'\.\./x' must be letters"):
        check_names({"../x": 1}, RewardServiceConfig())
    with pytest.raises(ValueError, match="must differ"):
        EnsembleConfig(members=("a", "a"))

"""Which candidates a reward model's output is normalised on."""

from __future__ import annotations

from actors.trajectory import Message
from cluster.judgement import reference_samples
from learner.config import RewardModelConfig
from reward_service.comparison import Annotator, Candidate, Comparison, Pair

TURNS = (Message(role="user", content="storm?"),)


def comparison(a: Candidate, b: Candidate, *, number: int = 0) -> Comparison:
    return Comparison(
        pair=Pair(item_id=f"i{number}", prompt_id="p", prompt="", a=a, b=b, messages=TURNS),
        annotator=Annotator(annotator_id="otter", kind="human"),
        choice="a",
    )


def test_samples_of_the_policy_come_before_others_each_once() -> None:
    sampled, written = Candidate(text="rain", model="policy"), Candidate(text="It rained.")
    config = RewardModelConfig()
    judged = [comparison(sampled, written, number=n) for n in range(2)]
    assert reference_samples(judged, config) == [("", TURNS, "rain")]
    older = [Candidate(text="sun", model=m) for m in ("policy-old", "policy-9x", "policy-large")]
    newest = [Candidate(text=f"snow {n}", model=f"policy-{n}") for n in (2, 10)]
    judged += [comparison(c, written, number=n) for n, c in enumerate([*older, *newest], start=2)]
    assert reference_samples(judged, config) == [("", TURNS, "snow 10")]
    assert len(reference_samples([comparison(older[0], written)], config)) == 2
    other = Candidate(text="No.")
    found = reference_samples([comparison(written, other)], config)
    assert sorted(text for _, _, text in found) == ["It rained.", "No."]
    assert found[0][1] == TURNS
    assert len(reference_samples([comparison(written, other)], RewardModelConfig(
        normalize_samples=1))) == 1  # fmt: skip

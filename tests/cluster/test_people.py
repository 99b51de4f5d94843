"""Judgement by people, the run's side: tasks from samples, selection, the wait for answers."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.datasets import RawPrompt
from actors.trajectory import Trajectory
from cluster import judgement
from cluster import people as run_side
from cluster.config import RunConfig
from cluster.feedback import prioritise
from cluster.people import add_tasks, comparison_tasks, least_sure, sample_tasks, wait_for_people
from cluster.pipeline import Pipeline
from cluster.progress import Reporter
from cluster.stop import Stopped
from reward_service.comparison import Annotator, Candidate, Pair, Ranking, Rating
from reward_service.config import CollectConfig, PeopleConfig
from reward_service.feedback import people
from reward_service.feedback.agreement_words import summary
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.collect import pairs_between
from reward_service.feedback.store import Entry, FeedbackStore
from reward_service.feedback.transfer import import_entries
from reward_service.model import RewardModel
from reward_service.score import ScoreItem
from tests.reward_service.conftest import trajectory, write_reward_model  # noqa: F401


def samples(make, texts: list[str], prompt: int = 0) -> list[Trajectory]:
    return [replace(make(text, number=prompt), sample_index=n) for n, text in enumerate(texts)]


def test_samples_become_ratings_and_rankings(trajectory) -> None:  # noqa: F811
    found = samples(trajectory, ["x", "y", "x", "z"]) + samples(trajectory, ["u", "u", "v"], 1)
    config = CollectConfig(people=PeopleConfig(task="ranking"))
    (task,) = sample_tasks(found, config, model="policy-2", round_number=2)
    assert [c.text for c in task.candidates] == ["x", "y", "z"], "equal texts are ranked once"
    assert (task.task_id, task.round, task.overlap) == ("policy-2:p0#ranking", 2, 2)
    config = CollectConfig(pairs=1, people=PeopleConfig(task="rating"))
    (task,) = sample_tasks(found, config, model="policy", round_number=0)
    assert [c.text for c in task.candidates] == ["x"]


def test_policies_are_set_against_each_other_on_both_sides(trajectory) -> None:  # noqa: F811
    ours = [trajectory(f"new {n}", number=n) for n in range(4)]
    theirs = [trajectory(f"old {n}" if n else "new 0", number=n) for n in range(5)]
    pairs = pairs_between(ours, theirs, models=("policy-2", "policy-1"))
    assert [p.prompt_id for p in pairs] == ["p1", "p2", "p3"]
    for pair in pairs:
        assert {pair.a.model, pair.b.model} == {"policy-2", "policy-1"}
        assert pair.a.text.startswith("new") == (pair.a.model == "policy-2")
    assert {p.a.model for p in pairs} == {"policy-1", "policy-2"}


def test_the_least_sure_pairs_are_chosen(tiny_llama: Path, tmp_path: Path) -> None:
    model = write_reward_model(tiny_llama, tmp_path / "rm", seed=1, gain=2.0, bias=-0.5)
    words = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor"]
    pairs = [
        Pair(
            item_id=f"i{n}", prompt_id=f"p{n}", prompt="storm in",
            a=Candidate(text=f" {words[n]} rain"), b=Candidate(text=f" {words[-n]} bank 12"),
        )
        for n in range(8)
    ]  # fmt: skip
    chosen, values = least_sure(pairs, [str(model)], 3)
    loaded = RewardModel.load(model)

    def lead(pair: Pair) -> float:
        items = [ScoreItem(prompt=pair.prompt, response=s.text) for s in (pair.a, pair.b)]
        a, b = loaded.score(items).scores
        assert a is not None
        assert b is not None
        return abs(a - b)

    assert chosen == sorted(pairs, key=lead)[:3]
    assert values == sorted(values, reverse=True)
    tasks = comparison_tasks(chosen, CollectConfig(), values, 4)
    assert [t.priority for t in tasks] == values
    assert {t.round for t in tasks} == {4}
    run = tmp_path / "run"
    config = CollectConfig(people=PeopleConfig(repeat_share=0, gold_share=0))
    with FeedbackStore(run / "feedback.sqlite") as store:
        add_tasks(store, config, comparison_tasks(pairs, config, [0.0] * 8, 0))
    assert prioritise(run, [str(model)]) == 8
    with FeedbackStore(run / "feedback.sqlite") as store:
        name, _ = people.invite(store.database, days=1)
        given = Assignments(store, config.people).next(name)
        assert given is not None
        assert given.task.pair == chosen[0]


def workplace(directory: Path, stop: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        run_dir=directory,
        reporter=Reporter(),
        stop=lambda: stop,
        config=SimpleNamespace(seed=0),
    )


def test_the_wait_ends_when_people_have_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_side, "POLL_S", 0.02)
    config = CollectConfig(people=PeopleConfig(overlap=1, repeat_share=0, gold_share=0))
    pairs = [
        Pair(
            item_id=f"i{n}", prompt_id=f"p{n}", prompt="ask a@b.org",
            a=Candidate(text="x"), b=Candidate(text="y"),
        )
        for n in range(3)
    ]  # fmt: skip
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        assert add_tasks(store, config, comparison_tasks(pairs, config, [0.0] * 3, 0)) == 3
        assert {p.prompt for p in store.pairs()} == {"ask [email]"}
        with pytest.raises(Stopped, match="answers are safe"):
            wait_for_people(workplace(tmp_path, stop=True), store, config, 0)
        short = config.model_copy(
            update={"people": config.people.model_copy(update={"wait_hours": 1e-9})}
        )
        with pytest.raises(TimeoutError, match=r"given 0 of 3 answers.*wait_hours"):
            wait_for_people(workplace(tmp_path), store, short, 0)
        name, _ = people.invite(store.database, days=1)
        desk = Assignments(store, config.people)

        def judge() -> None:
            while (given := desk.next(name)) is not None:
                desk.submit(name, given.assignment_id, {"choice": "a"})

        worker = threading.Thread(target=judge)
        worker.start()
        report = wait_for_people(workplace(tmp_path), store, config, 0)
        worker.join()
        assert report["comparisons"] == 3


def test_the_report_on_the_wait_counts_ratings_and_rankings(tmp_path: Path) -> None:
    who = Annotator(annotator_id="otter", kind="human")
    texts = tuple(Candidate(text=text) for text in "xyz")
    rating = Rating(
        item_id="r", prompt_id="p", prompt="?", response=texts[0], annotator=who,
        criterion="quality", value=4,
    )  # fmt: skip
    ranking = Ranking(
        item_id="k", prompt_id="p", prompt="?", candidates=texts, annotator=who, ranking=(0, 1, 2)
    )
    config = CollectConfig()
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        store.add_ratings([rating])
        report = wait_for_people(workplace(tmp_path), store, config, 0)
        assert report["summary"] == "1 rating on quality."
        import_entries(store, [Entry(judgement=ranking)], manifest_hash="h", form="votes")
        report = wait_for_people(workplace(tmp_path), store, config, 0)
    assert (report["items"], report["rankings"], report["ratings"]["quality"]["ratings"]) == (
        3,
        1,
        1,
    )
    assert report["summary"].startswith("1 judge compared 3 pairs")
    assert report["summary"].endswith("This includes all pairs of 1 ranking. 1 rating on quality.")
    chinese = summary(report, "zh")
    assert "其中包括 1 次排序的所有文本对。" in chinese
    assert "另有 1 个评分，标准：quality。" in chinese


def test_overwrite_does_not_throw_away_what_people_said(tmp_path: Path) -> None:
    config = RunConfig(
        run_dir=tmp_path, model=str(tmp_path), collect=CollectConfig(source="people")
    )
    FeedbackStore(tmp_path / "feedback.sqlite").close()
    with pytest.raises(ValueError, match="holds what people said"):
        Pipeline(config, resume=False, overwrite=True).run(only="collect")
    assert (tmp_path / "feedback.sqlite").exists()


def test_an_interrupted_collection_keeps_what_was_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On resume the policy may write other texts: the ones that judges saw are what counts."""
    config = CollectConfig(quality="reward_service.examples:story_quality")
    work = workplace(tmp_path)
    work.config = RunConfig(run_dir=tmp_path, collect=config)
    work.data = SimpleNamespace(prompts=lambda: [RawPrompt(prompt_id="p0", text="?")])

    def candidates(texts: list[str]) -> list[Pair]:
        return [
            Pair(
                item_id=f"policy:p0#{n}", prompt_id="p0", prompt="?",
                a=Candidate(text=text), b=Candidate(text="rain rain"),
            )
            for n, text in enumerate(texts)
        ]  # fmt: skip

    written = candidates(["storm", "river"])
    monkeypatch.setattr(judgement, "candidate_pairs", lambda *_: (written, []))
    before = judgement.from_judges(work, config)
    written = candidates(["storm", "another river", "bank"])
    after = judgement.from_judges(work, config)
    assert (before["items"], after["items"]) == (2, 3)
    with judgement.open_store(work.config) as store:
        assert [p.a.text for p in store.pairs()] == ["storm", "river", "bank"]
        assert len(store.comparisons()) == after["comparisons"]

"""Import and export by the command line: four formats, both ways, with manifests and rights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection, select

from cluster.cli import main
from cluster.feedback import STORE
from reward_service.comparison import Annotator, Candidate, Comparison, Pair, Ranking, Rating
from reward_service.feedback import schema
from reward_service.feedback.agreement import Codes, cohen_kappa
from reward_service.feedback.agreement_report import agreement_report
from reward_service.feedback.store import Entry, FeedbackStore


def rlhf(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["feedback", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def pair(number: int) -> Pair:
    return Pair(
        item_id=f"i{number}", prompt_id=f"p{number}", prompt=f"Storm {number}?",
        a=Candidate(text="rain", model="m1"), b=Candidate(text="sun\n雨", model="m2"),
    )  # fmt: skip


def comparison(number: int, judge: str, choice: str) -> Comparison:
    return Comparison(
        pair=pair(number),
        annotator=Annotator(annotator_id=judge, kind="human"),
        choice=choice,  # type: ignore[arg-type]
        strength=2,
        shown_first="b",
        seconds=3.5,
        created_at=f"2026-01-01T10:00:0{number}+00:00",
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with comparisons (one taken back), a rating and no configuration file."""
    directory = tmp_path / "run"
    otter = Annotator(annotator_id="otter", kind="human")
    with FeedbackStore(directory / STORE) as store:
        store.add_comparisons([comparison(1, "otter", "a"), comparison(1, "heron", "a")])
        store.add_comparisons([comparison(2, "otter", "b"), comparison(3, "otter", "tie")])
        taken_back = comparison(4, "heron", "a")
        store.add_history(
            [Entry(judgement=taken_back), Entry(judgement=taken_back, withdrawn=True)]
        )
        store.add_ratings(
            [
                Rating(
                    item_id="r", prompt_id="p", prompt="?", response=Candidate(text="x"),
                    annotator=otter, criterion="quality", value=4,
                )
            ]
        )  # fmt: skip
    return directory


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_history_comes_back_equal(run: Path, tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"votes{ending}"
    assert "7 rows" in rlhf("export", "--run", run, file)
    other = tmp_path / "other"
    assert "7 judgements, 7 of them new" in rlhf("import", "--run", other, file)
    again = rlhf("import", "--run", other, file)
    assert "0 of them new" in again
    assert "imported before" in again
    with FeedbackStore(run / STORE) as mine, FeedbackStore(other / STORE) as theirs:
        assert theirs.comparison_history() == mine.comparison_history()
        assert theirs.rating_history() == mine.rating_history()
        assert theirs.comparisons() == mine.comparisons()
    assert "exists already" in rlhf("export", "--run", run, file, code=1)


def test_rankings_come_back_with_their_items(tmp_path: Path) -> None:
    file = tmp_path / "ranked.jsonl"
    row = {
        "kind": "ranking", "item_id": "k", "prompt": "?", "annotator_id": "otter",
        "candidates": [{"text": t} for t in "xyz"], "ranking": [1, 2, 0],
    }  # fmt: skip
    file.write_text(json.dumps(row) + "\n")
    rlhf("import", "--run", tmp_path / "run", file)
    with FeedbackStore(tmp_path / "run" / STORE) as store:
        (found,) = store.rankings()
        assert isinstance(found, Ranking)
        assert found.ranking == (1, 2, 0)
        assert [c.pair.item_id for c in store.preferences()] == ["k#0-1", "k#0-2", "k#1-2"]


def test_preference_formats_of_others_have_their_fields(run: Path, tmp_path: Path) -> None:
    trl, openrlhf = tmp_path / "trl.jsonl", tmp_path / "openrlhf.jsonl"
    rlhf("export", "--run", run, "--format", "trl", trl)
    rows = [json.loads(line) for line in trl.read_text().splitlines()]
    # the tie says nothing, and what was taken back is not there
    assert rows == [
        {
            "id": "i1", "prompt_id": "p1", "prompt": "Storm 1?", "chosen": "rain",
            "rejected": "sun\n雨",
        },
        {
            "id": "i2", "prompt_id": "p2", "prompt": "Storm 2?", "chosen": "sun\n雨",
            "rejected": "rain",
        },
    ]  # fmt: skip
    rlhf("export", "--run", run, "--format", "openrlhf", openrlhf)
    rows = [json.loads(line) for line in openrlhf.read_text().splitlines()]
    assert rows[0]["chosen"] == [
        {"role": "user", "content": "Storm 1?"},
        {"role": "assistant", "content": "rain"},
    ]
    for form, file in (("trl", trl), ("openrlhf", openrlhf)):
        other = tmp_path / form
        rlhf("import", "--run", other, "--format", form, file)
        with FeedbackStore(other / STORE) as store:
            found = {c.pair.item_id: c for c in store.comparisons()}
            assert sorted(found) == ["i1", "i2"]
            chosen = found["i2"].pair.a if found["i2"].choice == "a" else found["i2"].pair.b
            assert chosen.text == "sun\n雨"
            assert found["i1"].pair.prompt == "Storm 1?"
            assert found["i1"].pair.prompt_id == "p1"


def test_a_changed_file_and_wrong_rows_are_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    rlhf("export", "--run", run, file)
    with file.open("a") as appended:
        appended.write("\n")
    assert "is not the file that" in rlhf("import", "--run", tmp_path / "x", file, code=1)
    wrong = tmp_path / "wrong.jsonl"
    good = {"item_id": "1", "rater": "x", "vote": "a", "prompt": "?", "a": "x", "b": "y"}
    for change, message in (
        ({"vote": "maybe"}, "wrong.jsonl:2: choice must be a, b, tie or both_bad, got 'maybe'"),
        ({"rater": None}, "wrong.jsonl:2: the row has no annotator_id"),
        ({"b": None}, "wrong.jsonl:2: the row has no b"),
    ):
        wrong.write_text(f"{json.dumps(good)}\n{json.dumps({**good, **change})}\n")
        assert message in rlhf("import", "--run", tmp_path / "x", wrong, code=1)
    assert not (tmp_path / "x" / STORE).exists(), "all or none"
    wrong.write_text(json.dumps({"prompt": "?", "chosen": "x", "rejected": "x"}) + "\n")
    message = rlhf("import", "--run", tmp_path / "x", "--format", "trl", wrong, code=1)
    assert "chosen and rejected are equal" in message


def test_import_masks_texts_and_names(tmp_path: Path) -> None:
    file = tmp_path / "raw.jsonl"
    rows = [
        {
            "item_id": "1", "rater": "ana@example.org", "vote": "1", "prompt": "?",
            "a": "call 13800138000", "b": "y",
        }
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "1 pieces of personal data masked" in rlhf("import", "--run", tmp_path / "run", file)
    rlhf("import", "--run", tmp_path / "run", file)
    with FeedbackStore(tmp_path / "run" / STORE) as store:
        (found,) = store.comparisons()
        assert found.pair.a.text == "call [chinese_mobile]"
        assert found.annotator.annotator_id.startswith("person-")
        assert len(store.comparison_history()) == 1
    rlhf("import", "--run", tmp_path / "plain", "--no-mask", file)
    with FeedbackStore(tmp_path / "plain" / STORE) as store:
        assert store.comparisons()[0].annotator.annotator_id == "ana@example.org"


def test_an_erased_person_is_gone_from_tables_and_files_and_stays_away(
    run: Path, tmp_path: Path
) -> None:
    everything = tmp_path / "everything.jsonl"
    rlhf("export", "--run", run, everything)
    mine = tmp_path / "mine.json"
    assert "4 rows of heron" in rlhf("export", "--run", run, "--person", "heron", mine)
    assert len(json.loads(mine.read_text())["comparisons"]) == 3
    assert "4 rows deleted" in rlhf("erase", "--run", run, "--person", "heron", "--yes")
    with FeedbackStore(run / STORE) as store:
        assert {c.annotator.annotator_id for c in store.comparisons()} == {"otter"}
    files = [path.read_bytes() for path in run.glob(f"{STORE}*")]
    assert not any(b"heron" in content for content in files)
    assert "3 judgements of erased people left out" in rlhf("import", "--run", run, everything)
    with FeedbackStore(run / STORE) as store:
        assert "heron" not in {a.annotator_id for a in store.annotators()}
    assert "nobody called 'heron'" in rlhf(
        "erase", "--run", run, "--person", "heron", "--yes", code=1
    )
    assert "nobody called" in rlhf("export", "--run", run, "--person", "x", mine, code=1)


def test_stats_say_how_to_read_them(run: Path, tmp_path: Path) -> None:
    text = rlhf("stats", "--run", run)
    assert "2 judges compared 3 pairs" in text
    assert " 1 rating on quality." in text
    assert "quality: mean 4.00 of 1 ratings" in text
    assert json.loads(rlhf("stats", "--run", run, "--json"))["agreement"]["items"] == 3
    assert "has no judgements" in rlhf("stats", "--run", tmp_path / "none", code=1)


def test_stats_of_rankings_count_the_pairs_that_they_imply(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "ranked.jsonl"
    row = {"kind": "ranking", "item_id": "k", "prompt": "?", "candidates": ["x", "y", "z"]}
    rows = [
        {**row, "annotator_id": "otter", "ranking": [1, 2, 0]},
        {**row, "annotator_id": "heron", "ranking": [1, 0, 2]},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    rlhf("import", "--run", run, file)
    text = rlhf("stats", "--run", run)
    assert "2 judges compared 3 pairs. Two judges of a pair say the same in 67%" in text
    assert "This includes all pairs of 2 rankings." in text
    assert "shown first" not in text
    found = json.loads(rlhf("stats", "--run", run, "--json"))
    assert (found["agreement"]["items"], found["agreement"]["rankings"]) == (3, 2)
    file.write_text(json.dumps({**rows[0], "kind": "rating", "response": "x", "value": 4}))
    rlhf("import", "--run", tmp_path / "rated", file)
    text = rlhf("stats", "--run", tmp_path / "rated")
    assert text.startswith("1 rating on quality.")
    assert "compared" not in text


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_gold_items_stay_gold_in_another_store(tmp_path: Path, ending: str) -> None:
    pair = {"prompt": "?", "a": "x", "b": "y"}
    texts = {"kind": "ranking", "prompt": "?", "candidates": ["x", "y", "z"]}
    known = [
        {**pair, "id": "c", "choice": "b"},
        {**texts, "id": "k", "ranking": [2, 0, 1]},
        {
            "kind": "rating", "id": "r", "prompt": "?", "response": "x",
            "ratings": {"quality": 4, "diversity": 2},
        },
    ]  # fmt: skip
    who = {"annotator_id": "otter"}
    votes = [
        {**pair, **who, "id": "c", "choice": "a"},
        {**pair, **who, "id": "ordinary", "choice": "a"},
        {**texts, **who, "id": "k", "ranking": [0, 1, 2]},
        {**known[2], **who, "criterion": "quality", "value": 3},
    ]
    mine, other, file = tmp_path / "mine", tmp_path / "other", tmp_path / f"out{ending}"
    for form, rows in (("gold", known), ("votes", votes)):
        source = tmp_path / f"{form}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        rlhf("import", "--run", mine, "--format", form, source)
    rlhf("export", "--run", mine, file)
    assert "4 of them new" in rlhf("import", "--run", other, file)
    assert "0 of them new" in rlhf("import", "--run", other, file)
    with FeedbackStore(mine / STORE) as before, FeedbackStore(other / STORE) as after:
        assert after.gold_answers() == before.gold_answers()
        assert sorted(after.gold_answers()) == ["c", "k", "r"]
        assert [c.pair.item_id for c in after.preferences()] == ["ordinary"]
        assert after.ratings() == []
        assert {t["state"] for t in after.database.read(tasks_of)} == {"closed"}
    row = json.loads((tmp_path / "votes.jsonl").read_text().splitlines()[0])
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({**row, "gold": {"choice": "c"}}) + "\n")
    message = rlhf("import", "--run", other, wrong, code=1)
    assert "wrong.jsonl:1: the known answer (gold): choice must be" in message


def test_files_that_an_erasure_leaves_are_named(run: Path) -> None:
    (run / "round-01").mkdir()
    for name in ("feedback.json", "round-01/report.html"):
        (run / name).write_text("{}")
    text = rlhf("erase", "--run", run, "--person", "heron", "--yes")
    assert f"{run}/feedback.json, {run}/round-01/report.html may still show figures of" in text


def test_items_and_gold_become_tasks(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "items.jsonl"
    row = {"item_id": "1", "prompt": "mail a@b.org", "a": "x", "b": "y"}
    file.write_text(json.dumps(row) + "\n")
    assert "1 new items" in rlhf("import", "--run", run, "--format", "items", file)
    assert "0 new items" in rlhf("import", "--run", run, "--format", "items", file)
    file.write_text(json.dumps({**row, "item_id": "2", "choice": "B"}) + "\n")
    assert "1 new items" in rlhf("import", "--run", run, "--format", "gold", file)
    file.write_text(json.dumps({**row, "item_id": "3"}) + "\n")
    message = rlhf("import", "--run", run, "--format", "gold", file, code=1)
    assert "items.jsonl:1: the row has no choice" in message
    with FeedbackStore(run / STORE) as store:
        assert store.gold_items() == {"2"}
        assert [p.prompt for p in store.pairs()] == ["mail [email]"] * 2
    rating = {"kind": "rating", "id": "4", "prompt": "?", "response": "call +44 20 7946 0958"}
    candidates = [{"text": text} for text in "xyz"]
    ranking = {"kind": "ranking", "id": "5", "prompt": "?", "candidates": candidates}
    known = [
        {**rating, "ratings": {"quality": 4, "diversity": 2}},
        {**ranking, "ranking": [2, 0, 1]},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in known))
    assert "2 new items" in rlhf("import", "--run", run, "--format", "gold", file)
    others = [{**rating, "id": "6"}, {**ranking, "id": "7"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in others))
    assert "2 new items" in rlhf("import", "--run", run, "--format", "items", file)
    with FeedbackStore(run / STORE) as store:
        assert store.gold_items() == {"2", "4", "5"}
        rows = {r["task_id"]: r for r in store.database.read(tasks_of)}
    assert rows["4"]["gold"] == {"ratings": {"quality": 4, "diversity": 2}}
    assert rows["5"]["gold"] == {"ranking": [2, 0, 1]}
    assert rows["6"]["content"]["candidates"][0]["text"] == "call [phone]"
    assert (rows["7"]["kind"], rows["7"]["gold"]) == ("ranking", None)
    for wrong, said in (
        ({**rating, "id": "8", "ratings": {"quality": 4}}, "each of quality, diversity"),
        ({**ranking, "id": "8", "ranking": [0, 0, 1]}, "a place of its own"),
        ({**rating, "id": "8"}, "the row has no ratings"),
        ({**rating, "kind": "essay"}, "kind must be"),
    ):
        file.write_text(json.dumps(wrong) + "\n")
        message = rlhf("import", "--run", run, "--format", "gold", file, code=1)
        assert "items.jsonl:1: " in message
        assert said in message


def tasks_of(connection: Connection) -> list[dict]:
    return [dict(r) for r in connection.execute(select(schema.tasks)).mappings()]


def test_published_kappas_of_three_raters(shared_data: Path, tmp_path: Path) -> None:
    """PandaLM's README gives Cohen's kappas of .85, .88 and .86 for its three annotators."""
    directory = shared_data / "agree_pandalm"
    if not directory.is_dir():
        pytest.skip("the three raters' votes are not on this machine")
    output = rlhf(
        "import", "--run", tmp_path, "--items", directory / "items.jsonl.gz",
        directory / "votes.jsonl.gz",
    )  # fmt: skip
    assert "2997 judgements, 2997 of them new" in output
    with FeedbackStore(tmp_path / STORE) as store:
        said = store.comparisons()
    order = sorted({c.pair.item_id for c in said})
    codes: Codes = _codes(said, order)
    kappas = [cohen_kappa(codes[:, i], codes[:, j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert [round(kappa or 0, 2) for kappa in kappas] == [0.85, 0.88, 0.86]
    report = agreement_report(said)
    assert report["fleiss"]["value"] == pytest.approx(0.8642, abs=1e-4)
    assert report["alpha"]["value"] == pytest.approx(0.8642, abs=1e-4)
    assert report["cohen"]["value"] == pytest.approx(sum(k or 0 for k in kappas) / 3)
    assert report["cohen"]["low"] < report["cohen"]["value"] < report["cohen"]["high"]


def _codes(said: list[Comparison], order: list[str]) -> Codes:
    import numpy as np

    number = {item: n for n, item in enumerate(order)}
    codes = np.full((len(order), 3), -1, np.int64)
    for c in said:
        column = int(c.annotator.annotator_id[-1]) - 1
        codes[number[c.pair.item_id], column] = ["a", "b", "tie"].index(c.choice)
    return codes

"""Loaders: every supported kind of source, every view, and errors that name file, line, field."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import DataConfig
from actors.datasets import (
    load_corpus,
    load_demonstrations,
    load_preferences,
    load_prompts,
)
from actors.trajectory import Demonstration

ROWS = [
    {"id": "a", "prompt": "One, two", "response": "three\nfour", "label": 7},
    {"id": "b", "prompt": 'He said "no"', "response": "then yes", "label": 8},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return path


WRITERS: list[tuple[str, Callable[[Path, list[dict[str, Any]]], Path]]] = [
    ("rows.jsonl", write_jsonl),
    ("rows.jsonl.gz", write_jsonl),
    ("rows.csv", write_csv),
    ("rows.parquet", write_parquet),
    ("saved", write_dataset),
]


# --- kinds of sources --------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "write"), WRITERS, ids=[name for name, _ in WRITERS])
def test_the_same_rows_come_out_of_every_kind_of_source(
    tmp_path: Path, name: str, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    source = str(write(tmp_path / name, ROWS))
    config = DataConfig()
    assert load_demonstrations(source, config) == [
        Demonstration(example_id="a", prompt="One, two", response="three\nfour"),
        Demonstration(example_id="b", prompt='He said "no"', response="then yes"),
    ]
    prompts = load_prompts(source, config)
    assert [(p.prompt_id, p.text, p.messages) for p in prompts] == [
        ("a", "One, two", ()),
        ("b", 'He said "no"', ()),
    ]
    label = "7" if name.endswith("csv") else 7
    assert dict(prompts[0].meta) == {"response": "three\nfour", "label": label}
    assert [p.prompt_id for p in load_prompts(source, DataConfig(limit=1))] == ["a"]
    assert load_corpus(source, DataConfig(text_field="response")) == ["three\nfour", "then yes"]


def test_a_pattern_reads_all_files_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b_train.jsonl", [{"text": "second"}])
    write_jsonl(tmp_path / "a_train.jsonl", [{"text": "first"}])
    write_jsonl(tmp_path / "c_valid.jsonl", [{"text": "other"}])
    assert load_corpus(str(tmp_path / "*_train.jsonl"), DataConfig()) == ["first", "second"]
    with pytest.raises(FileNotFoundError, match=r"\*\.txt: no file matches"):
        load_corpus(str(tmp_path / "*.txt"), DataConfig())


def test_a_saved_dataset_dict_has_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": [{"text": "a"}], "test": [{"text": "b"}]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    ).save_to_disk(tmp_path / "both")
    source = str(tmp_path / "both")
    assert load_corpus(source, DataConfig()) == ["a"]
    assert load_corpus(source, DataConfig(split="test")) == ["b"]
    with pytest.raises(ValueError, match=r"both: no split 'dev', there is test, train"):
        load_corpus(source, DataConfig(split="dev"))


def test_a_hub_name_goes_to_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"prompt": "p"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:main", "owner/name@test", "owner/name:main@test[:9]"):
        prompts = load_prompts(source, DataConfig())
    assert [p.prompt_id for p in prompts] == ["owner/name:1"]
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", "main", "train"),
        ("owner/name", None, "test"),
        ("owner/name", "main", "test[:9]"),
    ]

    def fails(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match=r"owner/name: no such file, and .*reach the hub$"):
        load_prompts("owner/name", DataConfig())


def test_rows_without_an_id_are_named_by_their_line(tmp_path: Path) -> None:
    rows = ["", json.dumps({"prompt": "x"}), "  ", json.dumps({"prompt": "y"}), "", ""]
    source = str(write_jsonl(tmp_path / "mine.jsonl", rows))
    assert [p.prompt_id for p in load_prompts(source, DataConfig())] == ["mine:2", "mine:4"]


def test_a_csv_row_is_named_by_the_line_it_starts_on(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('\ufeffprompt,response\n"two\nlines",ok\n\nlast, \n', encoding="utf-8")
    prompts = load_prompts(str(path), DataConfig())
    assert [(p.prompt_id, p.text) for p in prompts] == [("x:2", "two\nlines"), ("x:5", "last")]
    with pytest.raises(ValueError, match=r"x\.csv:5: field 'response' is empty"):
        load_demonstrations(str(path), DataConfig())


def test_meta_can_always_be_written_as_json(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    source = write_parquet(tmp_path / "x.parquet", [{"prompt": "p", "day": day, "n": [1, 2]}])
    (prompt,) = load_prompts(str(source), DataConfig())
    assert json.loads(json.dumps(prompt.meta)) == {"day": "2024-02-29", "n": [1, 2]}


# --- dialogues, preferences, views -------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
]


@pytest.mark.parametrize("kind", ["rows.jsonl", "rows.parquet"])
def test_dialogues(tmp_path: Path, kind: str) -> None:
    answer = [{"role": "assistant", "content": "Hi."}]
    row = {"prompt": TURNS, "response": answer, "chosen": "Yes.", "rejected": answer}
    write = dict(WRITERS)[kind]
    source = str(write(tmp_path / kind, [row]))
    (prompt,) = load_prompts(source, DataConfig())
    assert (prompt.text, list(prompt.messages)) == ("", TURNS)
    (demonstration,) = load_demonstrations(source, DataConfig())
    assert demonstration.response == "Hi."
    assert list(demonstration.messages) == TURNS
    (pair,) = load_preferences(source, DataConfig())
    assert (pair.chosen, pair.rejected, pair.prompt) == ("Yes.", "Hi.", "")
    assert dict(pair.meta) == {"response": answer}


def test_a_whole_dialogue_holds_its_response(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Hi."}
    source = str(write_jsonl(tmp_path / "x.jsonl", [{"messages": [*TURNS, answer], "topic": "t"}]))
    config = DataConfig(prompt_field="messages")
    (demonstration,) = load_demonstrations(source, config)
    assert (list(demonstration.messages), demonstration.response) == (TURNS, "Hi.")
    (prompt,) = load_prompts(source, config)
    assert (list(prompt.messages), prompt.meta) == (TURNS, {"topic": "t"})
    twice = write_jsonl(tmp_path / "y.jsonl", [{"messages": [*TURNS, answer], "response": "r"}])
    with pytest.raises(
        ValueError, match=r"y\.jsonl:1: .*so it is the response, but .*'response' t"
    ):
        load_prompts(str(twice), config)
    with pytest.raises(ValueError, match=r"x\.jsonl:1: .*a prompt ends where the assistant should"):
        load_preferences(source, config)


def test_chosen_and_rejected_may_repeat_the_prompt(tmp_path: Path) -> None:
    user = {"role": "user", "content": "Hello?"}
    row = {
        "prompt": "Hello?",
        "chosen": [user, {"role": "assistant", "content": "Hi."}],
        "rejected": [user, {"role": "assistant", "content": "No."}],
    }
    source = str(write_jsonl(tmp_path / "x.jsonl", [row]))
    (pair,) = load_preferences(source, DataConfig())
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Hello?", "Hi.", "No.")
    (pair,) = load_preferences(source, DataConfig(chat_template=True))
    assert (pair.messages, pair.chosen, pair.rejected) == ((user,), "Hi.", "No.")
    other = write_jsonl(tmp_path / "y.jsonl", [row | {"prompt": "Goodbye?"}])
    with pytest.raises(ValueError, match=r"y\.jsonl:1: field 'chosen': .*the turns of the prompt"):
        load_preferences(str(other), DataConfig())


def test_with_a_chat_template_a_text_prompt_is_a_users_turn_in_every_stage(tmp_path: Path) -> None:
    row = {"prompt": "Hello?", "response": "Hi.", "chosen": "Hi.", "rejected": "No."}
    source = str(write_jsonl(tmp_path / "x.jsonl", [row]))
    config = DataConfig(chat_template=True)
    expected = ({"role": "user", "content": "Hello?"},)
    (prompt,) = load_prompts(source, config)
    (demonstration,) = load_demonstrations(source, config)
    (pair,) = load_preferences(source, config)
    assert prompt.messages == demonstration.messages == pair.messages == expected
    assert prompt.text == demonstration.prompt == pair.prompt == ""


def test_news_view(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"id": "n1", "title": "T1", "paragraphs": ["p0", "p1\nwrapped", "p2"], "date": "d"},
        {"id": "n2", "title": "T2", "paragraphs": ["only"]},
    ]
    source = str(write_jsonl(tmp_path / "news.jsonl", rows))
    config = DataConfig(news_paragraphs=1)
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(source, config)
    assert "skipped 1 of 2 rows: no more paragraphs than data.news_paragraphs = 1" in caplog.text
    assert (prompt.prompt_id, prompt.text) == ("n1", "T1\np0\n")
    assert dict(prompt.meta) == {"date": "d"}
    assert load_demonstrations(source, config) == [
        Demonstration(example_id="n1", prompt="T1\np0\n", response="p1 wrapped")
    ]
    assert load_corpus(source, config) == ["T1\np0\np1 wrapped\np2", "T2\nonly"]
    title_only = load_demonstrations(source, DataConfig(news_paragraphs=0))
    assert [(d.prompt, d.response) for d in title_only] == [("T1\n", "p0"), ("T2\n", "only")]
    with pytest.raises(ValueError, match=r"news\.jsonl: all 2 rows were skipped: no more para"):
        load_prompts(source, DataConfig(news_paragraphs=9))


def test_first_words_view(tmp_path: Path) -> None:
    story = "Once  upon a\ntime there was a bear. The end.\n"
    source = str(write_jsonl(tmp_path / "s.jsonl", [{"text": story}, {"text": "Too short here"}]))
    (demonstration,) = load_demonstrations(source, DataConfig(prompt_words=4))
    assert demonstration.prompt == "Once  upon a\ntime"
    assert demonstration.response == " there was a bear. The end."
    (prompt,) = load_prompts(source, DataConfig(prompt_words=4))
    assert prompt.text == demonstration.prompt
    assert load_corpus(source, DataConfig(prompt_words=4)) == [story, "Too short here"]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(alphabet=st.characters(codec="utf-8"), min_size=1, max_size=80),
    words=st.integers(1, 6),
)
def test_prompt_and_response_are_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, text: str, words: int
) -> None:
    path = write_jsonl(
        tmp_path_factory.mktemp("w") / "x.jsonl", [{"text": text}, {"text": "a " * 9}]
    )
    if not text.strip():
        return
    rows = load_demonstrations(str(path), DataConfig(prompt_words=words))
    assert len(rows) == 1 + (len(text.split()) > words)
    if len(rows) == 2:
        assert rows[0].prompt + rows[0].response == text.strip()
        assert len(rows[0].prompt.split()) == words


# --- errors ------------------------------------------------------------------------------------

GOOD = json.dumps({"prompt": "p", "response": "r"})

BAD_LINES = [
    ('{"prompt": "p"', r"bad\.jsonl:2: not valid JSON at column 15: Expecting"),
    ("[1, 2]", r"bad\.jsonl:2: a row must be a JSON object .*got a list"),
    ("null", r"bad\.jsonl:2: a row must be a JSON object .*got null"),
    (
        '{"promt": "p", "response": "r"}',
        r"bad\.jsonl:2: field 'prompt' is missing: did you mean 'promt'\? the row has 'promt', "
        r"'response' \(data\.prompt_field names the field\)",
    ),
    ('{"question": "p"}', r"bad\.jsonl:2: field 'prompt' is missing: the row has 'question' "),
    ("{}", r"bad\.jsonl:2: field 'prompt' is missing: the row has no fields"),
    ('{"prompt": "p", "answer": "r"}', r":2: field 'response' is missing: .*data\.response_field"),
    ('{"prompt": 7, "response": "r"}', r":2: field 'prompt' must be a text, got a number"),
    ('{"prompt": null, "response": "r"}', r":2: field 'prompt' must be a text, got null"),
    ('{"prompt": "p", "response": {}}', r":2: field 'response' must be a text, got an object"),
    ('{"prompt": "  ", "response": "r"}', r":2: field 'prompt' is empty"),
    ('{"prompt": "p", "response": ""}', r":2: field 'response' is empty"),
    (
        '{"prompt": "a\\ud83dz", "response": "r"}',
        r"'prompt' has half a surrogate.*character 2.*d83d",
    ),
    ('{"prompt": [], "response": "r"}', r":2: field 'prompt' is an empty list of messages"),
    ('{"prompt": ["x"], "response": "r"}', r"field 'prompt\[0\]' must be a message .*got a text"),
    ('{"prompt": [{"role": "user"}], "response": "r"}', r"'prompt\[0\]'.*got fields \['role'\]"),
    (
        '{"prompt": [{"role": "human", "content": "x"}], "response": "r"}',
        r"'prompt\[0\]\.role' is 'human', must be one of system, developer, user",
    ),
    (
        '{"prompt": [{"role": "user", "content": ""}], "response": "r"}',
        r"field 'prompt\[0\]\.content' is empty",
    ),
    (
        '{"prompt": [{"role": "assistant", "content": "x"}], "response": "r"}',
        r"the last message is the assistant's, so it is the response, but there is nothing before",
    ),
    (
        '{"prompt": "p", "response": [{"role": "user", "content": "x"}]}',
        r"field 'response': a response is a text, or messages that end with the assistant's turn",
    ),
    ('{"id": 1.5, "prompt": "p", "response": "r"}', r"field 'id' must be a text or a whole number"),
    ('{"id": true, "prompt": "p", "response": "r"}', r"field 'id' .*got a truth value"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = str(write_jsonl(tmp_path / "bad.jsonl", [GOOD, line, GOOD]))
    with pytest.raises(ValueError, match=message) as caught:
        load_demonstrations(source, DataConfig())
    assert str(caught.value).startswith(f"{source}:2: ")
    assert "\n" not in str(caught.value)


def test_errors_of_preferences_and_articles(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "p", "chosen": "c", "rejectd": "r"}])
    with pytest.raises(ValueError, match=r"p\.jsonl:1: field 'rejected' .*mean 'rejectd'"):
        load_preferences(str(pairs), DataConfig())
    news = write_jsonl(tmp_path / "n.jsonl", [{"title": "t", "paragraphs": ["a", ""]}])
    with pytest.raises(ValueError, match=r"n\.jsonl:1: field 'paragraphs\[1\]' is empty"):
        load_prompts(str(news), DataConfig(news_paragraphs=1))
    flat = write_jsonl(tmp_path / "f.jsonl", [{"title": "t", "paragraphs": "a"}])
    with pytest.raises(ValueError, match=r"f\.jsonl:1: field 'paragraphs' must be a list of texts"):
        load_corpus(str(flat), DataConfig(news_paragraphs=1))


def test_ids_must_be_unique_and_there_when_asked_for(tmp_path: Path) -> None:
    twice = write_jsonl(tmp_path / "t.jsonl", [{"id": "a", "prompt": "p"}] * 2)
    with pytest.raises(ValueError, match=r"t\.jsonl:2: field 'id': 'a' was already used at .*:1: "):
        load_prompts(str(twice), DataConfig())
    with pytest.raises(ValueError, match=r"t\.jsonl:1: field 'key' is missing or empty"):
        load_prompts(str(twice), DataConfig(id_field="key"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b"", r"x\.jsonl: the file is empty"),
        ("x.jsonl", b"\n\n", r"x\.jsonl: no rows"),
        (
            "x.jsonl",
            b'[{"prompt": "p"},\n',
            r"x\.jsonl:1: not valid JSON .*looks like a JSON array",
        ),
        ("x.jsonl", b'{"prompt": "p"}\n{"prompt": "\xff"}', r"x\.jsonl:2: not UTF-8: byte 0xff at"),
        ("x.jsonl.gz", b"plain text", r"x\.jsonl\.gz: damaged gzip file"),
        ("x.jsonl.gz", gzip.compress(b'{"prompt": "p"}\n' * 99)[:-9], r"damaged gzip file"),
        ("x.csv", b"prompt,response\n", r"x\.csv: no rows"),
        ("x.csv", b"prompt,response\na,b\nc,d,e\n", r"x\.csv:3: the row has 3 cells, .*2 columns"),
        ("x.csv", b"prompt,response\na,b\nc\n", r"x\.csv:3: the row has 1 cells"),
        ("x.csv", b'prompt,response\na,b\n"c,d\n', r"x\.csv:3: not valid CSV: unexpected end"),
        ("x.csv", b'prompt,response\n"c"d,e\n', r"x\.csv:2: not valid CSV"),
        ("x.csv", b"prompt,prompt\na,b\n", r"x\.csv:1: column 'prompt' occurs twice"),
        ("x.csv", b"prompt,\na,b\n", r"x\.csv:1: a column has no name"),
        ("x.csv", b"prompt,response\n\xe9,b\n", r"x\.csv:2: not UTF-8: byte 0xe9 at column 1"),
        ("x.parquet", b"PAR1 but not really", r"x\.parquet: not a readable Parquet file"),
        ("x.txt", b"text", r"x\.txt: unknown kind of file '\.txt': use \.jsonl"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(str(path), DataConfig())
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_and_foreign_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such file"):
        load_prompts("nowhere.jsonl", DataConfig())
    with pytest.raises(FileNotFoundError, match=r"/no/such/dir/x: no such file"):
        load_prompts("/no/such/dir/x", DataConfig())
    with pytest.raises(ValueError, match=r"not one saved by the datasets library"):
        load_prompts(str(tmp_path), DataConfig())
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"the data set cannot be loaded"):
        load_prompts(str(tmp_path), DataConfig())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"news_paragraphs": 1, "prompt_words": 3}, "two views"),
        ({"newswire": {}, "prompts": "x.jsonl"}, r"leave data\.prompts out"),
        ({"newswire": {}, "eval_prompts": "x.jsonl"}, r"leave data\.eval_prompts out"),
        ({"newswire": {}, "chat_template": True}, "plain-text prompts"),
        ({"prompt_feild": "x"}, "prompt_feild"),
    ],
)
def test_contradictory_settings_are_refused(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(settings_)


# --- real data, where it is present ------------------------------------------------------------


def test_real_news(shared_data: Path) -> None:
    config = DataConfig(news_paragraphs=1, limit=500)
    source = str(shared_data / "news_en" / "*_train.jsonl.gz")
    demonstrations = load_demonstrations(source, config)
    assert len(demonstrations) == 500
    assert all(d.prompt.count("\n") == 2 and "\n" not in d.response for d in demonstrations)
    assert len(load_corpus(source, DataConfig(news_paragraphs=1))) == 11_199


def test_real_stories(shared_data: Path) -> None:
    source = str(shared_data / "story_tinystories_slice" / "train.jsonl.gz")
    prompts = load_prompts(source, DataConfig(prompt_words=12))
    assert len(prompts) > 1500
    assert all(len(p.text.split()) == 12 for p in prompts)


def test_real_preferences(shared_data: Path) -> None:
    source = str(shared_data / "pref_hh_harmless" / "train.jsonl.gz")
    pairs = load_preferences(source, DataConfig())
    assert len(pairs) == 1706
    assert all(p.messages[-1]["role"] == "user" for p in pairs)


def test_real_questions(shared_data: Path) -> None:
    source = str(shared_data / "math_gsm8k" / "train.jsonl.gz")
    config = DataConfig(prompt_field="question", response_field="answer", limit=3)
    assert load_prompts(source, config)[0].meta["final"] == "72"
    assert load_demonstrations(source, config)[0].response.endswith("#### 72")

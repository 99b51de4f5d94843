"""The copy of a run at a URL: whole wherever it breaks off, and as good as the original."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.checkpoint import CheckpointStore
from cluster.config import build_config
from cluster.storage import RunMirror, _order, open_storage


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/bucket/runs/mine"
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/runs/mine"


def no_warning(text: str) -> None:
    raise AssertionError(text)


def save(run: Path, step: int, keep: int = 2) -> None:
    def write(directory: Path) -> dict[str, str]:
        (directory / "policy").mkdir()
        (directory / "policy" / "model.bin").write_bytes(bytes([step]) * 1000)
        return {"policy": "weights"}

    with (run / "ppo" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    store = CheckpointStore(run / "ppo" / "checkpoints", keep=keep)
    store.save(step, {"n": step}, write)


def begin(run: Path) -> None:
    (run / "ppo").mkdir(parents=True)
    (run / "sft").mkdir()
    (run / "sft" / "model.bin").write_bytes(b"sft")
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "stages.json").write_text('{"sft": {}}')
    (run / ".lock").write_text("1")


def files(run: Path) -> dict[str, bytes]:
    return {
        p.relative_to(run).as_posix(): p.read_bytes()
        for p in run.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def names_at(url: str) -> set[str]:
    return set(RunMirror(url, Path("/nowhere"), no_warning)._there)


def test_a_node_without_the_run_gets_all_of_it(url: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    begin(run)
    mirror = RunMirror(url, run, no_warning)
    assert not mirror.fetch(), "there is nothing yet"
    for step in (1, 2, 3):
        save(run, step)
        mirror.sync()
    assert ".lock" not in names_at(url)
    again = RunMirror(url, other, no_warning)
    assert again.fetch()
    assert files(other) == files(run)
    checkpoint = CheckpointStore(other / "ppo" / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state) == (3, {"n": 3})
    assert {n.split("/")[2] for n in names_at(url) if n.startswith("ppo/checkpoints/")} == {
        "step_000002", "step_000003",
    }  # fmt: skip
    assert not again.fetch(), "there is nothing new"


def test_the_one_that_is_further_is_gone_on_with(url: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    begin(run)
    save(run, 1)
    RunMirror(url, run, no_warning).sync()
    RunMirror(url, other, no_warning).fetch()
    save(other, 2)
    ahead = RunMirror(url, other, no_warning)
    assert not ahead.fetch(), "the copy is behind"
    ahead.sync()
    behind = RunMirror(url, run, no_warning)
    assert behind.fetch()
    assert files(run) == files(other)
    (run / "stages.json").write_text('{"sft": {}, "ppo": {}}')
    behind.sync()
    assert RunMirror(url, other, no_warning).fetch(), "a stage more"
    assert files(run) == files(other)


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_copy_that_breaks_off_anywhere_is_a_run_that_can_go_on(
    tmp_path: Path, overwritten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every single write and delete of a copy: what lies there is never half of something."""
    calls = limit = 0
    upload, delete = RunMirror._upload, RunMirror._delete

    def broken(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            if calls == limit:
                raise ConnectionError("the network is gone")
            calls += 1
            return method(*args, **kwargs)

        return call

    for limit in range(100):
        place = tmp_path / str(limit)
        run, url = place / "run", f"file://{place}/copy"
        begin(run)
        save(run, 1)
        mirror = RunMirror(url, run, no_warning)
        mirror.sync()
        before = files(run)
        save(run, 2, keep=1)
        dropped: list[str] = []
        if overwritten:
            (run / "stages.json").write_text("{}")
            shutil.rmtree(run / "sft")
            dropped = ["sft"]
        else:
            (run / "reward_model").mkdir()
            (run / "reward_model" / "model.bin").write_bytes(b"reward")
            (run / "stages.json").write_text('{"sft": {}, "reward": {}}')
        calls = 0
        monkeypatch.setattr(RunMirror, "_upload", broken(upload))
        monkeypatch.setattr(RunMirror, "_delete", broken_one_by_one(broken, delete))
        warned: list[str] = []
        mirror._warn = warned.append
        mirror.sync(dropped=dropped)
        monkeypatch.setattr(RunMirror, "_upload", upload)
        monkeypatch.setattr(RunMirror, "_delete", delete)
        other = place / "other"
        assert RunMirror(url, other, no_warning).fetch()
        stages = json.loads((other / "stages.json").read_text())
        assert ("sft" not in stages) or (other / "sft" / "model.bin").read_bytes() == b"sft"
        assert ("reward" not in stages) or (other / "reward_model" / "model.bin").is_file()
        checkpoint = CheckpointStore(other / "ppo" / "checkpoints", keep=2).latest()
        if checkpoint is not None:
            lines = (other / "ppo" / "metrics.jsonl").read_text().splitlines()
            assert len(lines) >= checkpoint.step
        else:
            assert warned, "a checkpoint is missing only when the copy broke off"
        if not warned:
            assert files(other) == files(run) != before
            return
        assert "it is whole in" in warned[0]
        # The next copy mends what this one left.
        mirror = RunMirror(url, run, no_warning)
        mirror.sync(dropped=dropped)
        shutil.rmtree(other)
        RunMirror(url, other, no_warning).fetch()
        assert files(other) == files(run)
    raise AssertionError("the copy never ended")


def broken_one_by_one(
    broken: Callable[[Callable[..., Any]], Callable[..., Any]], delete: Callable[..., Any]
) -> Callable[..., Any]:
    """Deletes in the order of ``delete``, and may break off between two files."""

    def call(mirror: RunMirror, names: Iterable[str]) -> None:
        for name in sorted(names, key=_order, reverse=True):
            broken(delete)(mirror, [name])

    return call


def test_a_failure_that_matters_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run)
    (tmp_path / "copy").write_text("a file where the directory should be")
    mirror = RunMirror(f"file://{tmp_path}/copy/run", run, no_warning)
    with pytest.raises(OSError, match=r"it is whole in .*run: run the same command with --resume"):
        mirror.sync(required=True)


def test_a_database_is_copied_whole_while_somebody_writes(url: str, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    begin(run)
    writer = sqlite3.connect(run / "feedback.sqlite")
    writer.execute("PRAGMA journal_mode=WAL")
    writer.execute("CREATE TABLE answers (n INTEGER)")
    writer.commit()
    mirror = RunMirror(url, run, no_warning)
    mirror.sync()
    writer.execute("INSERT INTO answers VALUES (7)")
    writer.commit()  # in the log only
    writer.execute("INSERT INTO answers VALUES (8)")
    mirror.sync()
    RunMirror(url, other, no_warning).fetch()
    copy = sqlite3.connect(other / "feedback.sqlite")
    assert copy.execute("SELECT n FROM answers").fetchall() == [(7,)]
    copy.close()
    writer.close()


def test_what_is_no_url_is_refused() -> None:
    for storage, message in (
        ("/shared/run", "must be a URL"),
        ("s3://", "must be a URL"),
        ("s3://KEY:SECRET@bucket/run", "holds credentials"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            build_config({"run_dir": "x", "cluster": {"storage": storage}}, "test")
        assert "SECRET" not in str(error.value)
    with pytest.raises(ValueError, match="nosuch"):
        open_storage("nosuch://bucket/run")

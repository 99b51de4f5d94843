"""Checkpoints are atomic, described, bounded in number, and refused when damaged."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointStore, RunLock, verify


def writer(text: str) -> Callable[[Path], Mapping[str, str]]:
    def write(directory: Path) -> Mapping[str, str]:
        (directory / "weights").mkdir()
        (directory / "weights" / "model.bin").write_text(text)
        return {"weights": "the weights"}

    return write


def test_save_and_latest_and_keep(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, config={"seed": 7})
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, {"note": step * 10}, writer(f"w{step}"))
    assert store.steps() == [2, 3]
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.state["note"], latest.config) == (3, 30, {"seed": 7})
    assert (latest.path / "weights" / "model.bin").read_text() == "w3"


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path, keep=1, config={"b": 1, "a": "ü"}).save(5, {}, writer("x"))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["config"]) == (2, 5, {"b": 1, "a": "ü"})
    # sha256 of '{"a":"ü","b":1}' and of 'x', by the sha256sum command
    assert manifest["config_sha256"].startswith("4e7ff4080b1a00ac")
    assert manifest["files"] == {
        "weights/model.bin": {
            "bytes": 1,
            "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
            "what": "the weights",
        }
    }
    assert {"python", "ray", "torch", "transformers"} <= manifest["versions"].keys()


def test_the_best_is_kept_beside_the_latest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, best_by="reward")
    kept = []
    for step, reward in enumerate([0.1, 0.5, 0.5, 0.2, 0.3], start=1):
        store.save(step, {}, writer("w"), {"reward": reward, "other": 1.0})
        kept.append(store.steps())
    assert kept == [[1], [1, 2], [2, 3], [3, 4], [3, 4, 5]]
    assert store.best() == 3
    with pytest.raises(ValueError, match=r"keep_best names no metric .*'reward'; did you mean"):
        store.save(6, {}, writer("w"), {"rewards": 1.0})
    assert CheckpointStore(tmp_path, keep=1, best_by="another").best() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "step"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, keep=3, warn=said.append)
    store.save(1, {}, writer("first"))
    store.save(2, {}, writer("other"))
    file = tmp_path / "step_000002" / "weights" / "model.bin"
    manifest = tmp_path / "step_000002" / "manifest.json"
    if damage == "truncate":
        file.write_text("oth")
    elif damage == "flip":
        file.write_text("othes")
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    assert verify(tmp_path / "step_000002") is not None
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert "step_000002 is damaged" in said[0]
    # It no longer counts, so the run that does step 2 again saves it again.
    assert store.steps() == [1]
    store.save(2, {}, writer("other"))
    assert verify(tmp_path / "step_000002") is None
    assert (tmp_path / "damaged_step_000002").is_dir()


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3, warn=lambda _: None)
    store.save(1, {}, writer("first"))
    (tmp_path / "step_000001" / "manifest.json").unlink()
    with pytest.raises(RuntimeError, match="every checkpoint"):
        store.latest()
    assert store.steps() == [1]


def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer("first"))

    def full(directory: Path) -> Mapping[str, str]:
        (directory / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"free disk space.*last good checkpoint: step 1"):
        store.save(2, {}, full)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


def test_what_a_killed_process_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer("first"))
    for name in (".step_000002.partial", ".step_000000.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_text("half")
    assert store.steps() == [1]
    store.save(2, {}, writer("second"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cluster.checkpoint import RunLock\n"
        "with RunLock(Path(sys.argv[1])): pass"
    )
    with RunLock(tmp_path):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert "is in use by another rlhf process" in done.stderr
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == 0

"""Checkpoints are atomic, described, bounded in number, and refused when damaged."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.checkpoint import CheckpointStore, RunLock, verify


def writer(text: str):
    def write(directory: Path) -> None:
        (directory / "weights").mkdir()
        (directory / "weights" / "model.bin").write_text(text)

    return write


def test_save_and_latest_and_keep(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.latest() is None
    for step in (1, 2, 3):
        store.save(step, {"note": step * 10}, writer(f"w{step}"))
    assert store.steps() == [2, 3]
    latest = store.latest()
    assert latest is not None
    assert (latest.step, latest.state["note"]) == (3, 30)
    assert (latest.path / "weights" / "model.bin").read_text() == "w3"


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, damage: str
) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, keep=3, warn=said.append)
    store.save(1, {}, writer("first"))
    store.save(2, {}, writer("other"))
    file = tmp_path / "step_000002" / "weights" / "model.bin"
    if damage == "truncate":
        file.write_text("oth")
    elif damage == "flip":
        file.write_text("othes")
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / "step_000002" / "manifest.json").write_text("{")
    assert verify(tmp_path / "step_000002") is not None
    latest = store.latest()
    assert latest is not None
    assert latest.step == 1
    assert "step_000002 is damaged" in said[0]


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3, warn=lambda _: None)
    store.save(1, {}, writer("first"))
    (tmp_path / "step_000001" / "state.json").unlink()
    with pytest.raises(RuntimeError, match="every checkpoint"):
        store.latest()


def test_a_full_disk_keeps_the_last_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer("first"))

    def full(directory: Path) -> None:
        (directory / "part").write_text("x")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"free disk space.*last good checkpoint: step 1"):
        store.save(2, {}, full)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


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

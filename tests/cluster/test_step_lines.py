"""JSON lines of steps: whole or not at all, and each step once after a resume."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.step_lines import StepLines, read_step_lines


def write(path: Path, steps: range, resume_step: int | None = None) -> None:
    lines = StepLines(path, resume_step=resume_step)
    for step in steps:
        lines.append([{"step": step, "n": 0}, {"step": step, "n": 1}])
    lines.close()


def test_a_resumed_run_has_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "some" / "quarantine.jsonl"
    write(path, range(1, 6))
    expected = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "rea')
    write(path, range(4, 6), resume_step=3)
    assert path.read_bytes() == expected
    write(path, range(1, 3))  # begun anew
    assert [row["step"] for row in read_step_lines(path)[0]] == [1, 1, 2, 2]


def test_any_text_survives(tmp_path: Path) -> None:
    row = {"step": 1, "response": "新闻 🙂 \u2028 \ud800 \x00 \n"}
    lines = StepLines(tmp_path / "q.jsonl", resume_step=None)
    lines.append([row])
    lines.append([])
    lines.close()
    StepLines(tmp_path / "q.jsonl", resume_step=1).close()
    assert read_step_lines(tmp_path / "q.jsonl")[0] == [row]


def test_no_room_leaves_no_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = """
import json, resource, sys
from pathlib import Path
from cluster.step_lines import StepLines
lines = StepLines(Path(sys.argv[1]), resume_step=None)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
lines.append([{"step": 1, "text": "x" * 60}])
try:
    lines.append([{"step": 2, "text": "x" * 60}])
except OSError as error:
    print(json.dumps([error.errno, error.strerror]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    number, text = json.loads(done.stdout)
    assert number == errno.EFBIG
    assert f"could not append to {path}" in text
    assert "--resume" in text
    assert path.read_text() == json.dumps({"step": 1, "text": "x" * 60}) + "\n"
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100


@pytest.mark.parametrize(("line", "why"), [("{nonsense", "Expecting"), ("[1]", "integer 'step'")])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=rf"quarantine\.jsonl:2: not a line of quarantine.*{why}"):
        StepLines(path, resume_step=3)

"""Killed at any point of the program and resumed, a run ends with the same bits.

See ``tests/kill_points.py`` for what is real in it; ``tests/test_kill_and_resume.py`` kills a
whole run with its engine and its services.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_runs_killed_at_any_point_end_with_the_same_bits(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill_points", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-20_000:]
    results = dict(json.loads(line) for line in done.stdout.splitlines())
    wrong = {name: problems for name, problems in results.items() if problems}
    # pytest would cut a log of several pages, and its end says why
    assert not wrong, "\n".join(f"{name}:\n" + "\n".join(why) for name, why in wrong.items())
    assert len(results) == 11 + 4 + 5
    # Failures of scoring were part of it.
    rows = [json.loads(x) for x in (tmp_path / "ppo/reference/ppo/quarantine.jsonl").open()]
    assert {row["stage"] for row in rows} == {"scoring"}
    assert rows[0].keys() == {
        "step", "sample_id", "prompt", "response", "stage", "reason", "attempts",
    }  # fmt: skip
    assert all("a multiple of seven" in row["reason"] and row["attempts"] == 3 for row in rows)
    steps = [json.loads(x) for x in (tmp_path / "ppo/reference/ppo/metrics.jsonl").open()]
    assert sum(step["samples/failed_scoring"] for step in steps) == len(rows) > 0
    for step in steps:
        assert step["samples/submitted"] == 8 == (
            step["samples/trained"] + step["samples/filtered"] + step["samples/failed"]
        )  # fmt: skip

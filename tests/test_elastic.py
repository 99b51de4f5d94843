"""Nodes that join, die, are drained and are cut off while samples are generated.

See ``tests/elastic.py`` for what is real in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns import unable

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, directory: Path) -> dict[str, list[str]]:
    """What was wrong, by event."""
    done = subprocess.run(
        [sys.executable, "-m", module, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_a_pool_follows_its_cluster_and_counts_every_sample_once(tmp_path: Path) -> None:
    events = run("tests.elastic", tmp_path)
    assert {name: wrong for name, wrong in events.items() if wrong} == {}
    assert len(events) == 9


def test_a_node_that_is_cut_off_is_given_up(tmp_path: Path) -> None:
    if reason := unable():
        pytest.skip(reason)
    events = run("tests.netns", tmp_path)
    assert events == {"the network of a node is cut": [], "told": []}


def test_an_autoscaler_adds_nodes_for_what_is_asked_and_takes_them_away(tmp_path: Path) -> None:
    """See ``tests/autoscaler.py``: counted are the nodes of the cluster."""
    events = run("tests.autoscaler", tmp_path)
    assert {name: wrong for name, wrong in events.items() if wrong} == {}
    assert len(events) == 6

"""The one law of the layout: actors <- reward_service <- learner <- cluster.

A package may import from the packages to its left, and there only the record modules.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["actors", "reward_service", "learner", "cluster"]
RECORDS = {
    "actors.config",
    "actors.fingerprint",
    "actors.trajectory",
    "actors.weights",
    "reward_service.comparison",
    "reward_service.config",
    "reward_service.encoding",
    "reward_service.intervals",
    "reward_service.score",
    "reward_service.statistics",
    "learner.config",
}


def imported_modules(source: str) -> list[str]:
    """Every module a file imports, at any depth, as dotted names of our packages."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction of an import"
            assert node.module is not None
            # `from actors import engine` and `from ray import serve` import modules.
            is_package = node.module in (*ORDER, "ray")
            found += [f"{node.module}.{a.name}" if is_package else node.module for a in node.names]
    return found


def violations(module_path: str, source: str) -> list[str]:
    package = module_path.split("/")[0]
    allowed_left = ORDER[: ORDER.index(package)]
    broken = []
    for name in imported_modules(source):
        target = name.split(".")[0]
        if target not in ORDER or target == package:
            continue
        if target not in allowed_left or (package != "cluster" and name not in RECORDS):
            broken.append(f"{module_path} imports {name}")
    return broken


FILES = sorted(p.relative_to(ROOT).as_posix() for d in ORDER for p in (ROOT / d).rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_follow_the_data(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


def test_a_violation_is_seen() -> None:
    assert violations("actors/x.py", "import learner.ppo")
    assert violations("actors/x.py", "from reward_service.score import Score")
    assert violations("learner/x.py", "from actors import engine")
    assert violations("learner/x.py", "def f():\n    from actors.engine import VLLMEngine")
    assert not violations("learner/x.py", "from actors.trajectory import Trajectory")
    assert not violations("cluster/x.py", "from actors.engine import VLLMEngine")


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        # The benchmark's floor is bare vLLM, by definition.
        (
            "vllm",
            (
                "actors/engine.py",
                "actors/weight_transfer.py",
                # Looks into vLLM's modules, and only when a probe disagrees.
                "actors/weight_diagnosis.py",
                "cluster/bench_floor.py",
            ),
        ),
        ("ray.serve", ("reward_service/",)),
        ("ray.rllib", ("learner/",)),
    ],
)
def test_one_home_for_each_engine(library: str, homes: tuple[str, ...]) -> None:
    """vLLM, Ray Serve and RLlib are each met in one place, so an upgrade touches one place."""
    users = []
    for path in FILES:
        names = imported_modules((ROOT / path).read_text(encoding="utf-8"))
        if any(n == library or n.startswith(library + ".") for n in names):
            users.append(path)
    assert users, f"nothing imports {library}: this test looks for the wrong name"
    assert [path for path in users if not path.startswith(homes)] == []

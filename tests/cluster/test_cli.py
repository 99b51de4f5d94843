"""The command line: help that answers at once, and errors that are one message."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.cli import main

COMMANDS = [
    "quickstart", "run", "pretrain", "sft", "collect", "reward", "ppo", "evaluate",
    "loop", "generate", "adopt", "serve", "report", "status", "timeline", "doctor", "plan", "bench",
    "feedback",
]  # fmt: skip


def test_the_commands_stand_in_the_order_of_the_loop() -> None:
    assert list(main.commands) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_without_heavy_imports(command: str) -> None:
    result = CliRunner().invoke(main, [command, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 8
    assert re.search(r"^  +(rlhf|curl) ", result.output, re.MULTILINE), "no example"


def test_help_needs_no_torch_or_ray() -> None:
    code = (
        "import sys\nfrom cluster.cli import main\n"
        "try: main(['ppo', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'pandas', 'pydantic'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert time.perf_counter() - started < 10  # a hang, not a benchmark


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ppo", "--config", "none.yaml"], "no configuration file at none.yaml"),
        (["ppo", "--config", "c.yaml", "ppo.stepss=3"], "did you mean 'ppo.steps'"),
        (["ppo", "--config", "c.yaml"], "no `ppo` section"),
        (
            ["ppo", "--config", "c.yaml", "ppo.steps=many"],
            "ppo.steps: must be a whole number, not 'many' (set by the override 'ppo.steps=many')",
        ),
        (["generate", "--model", "nowhere", "--prompt", "x"], "no model at nowhere"),
        (["generate", "--prompt", "x"], "no model: give --model DIR"),
        (["generate", "--run", "runs/x"], "no model at runs/x/ppo/final"),
        (["report", "."], ". is not a run directory"),
        (["quickstart", "ppo.steps=none"], "ppo.steps"),
    ],
)
def test_errors_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("run_dir: runs/x\n")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_used_run_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("run_dir: runs/x\nsft: {}\nmodel: somewhere\n")
    Path("runs/x/sft").mkdir(parents=True)
    Path("somewhere").mkdir()
    result = CliRunner().invoke(main, ["sft", "--config", "c.yaml"])
    assert result.exit_code == 1
    assert "already holds sft" in result.output
    assert "--resume" in result.output
    result = CliRunner().invoke(main, ["sft", "--config", "c.yaml", "--resume", "--overwrite"])
    assert result.exit_code == 2

"""A run as a Ray job: what is shipped, and a real one submitted, stopped and gone on with."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from cluster.cli import main
from cluster.config import RunConfig, build_config
from cluster.job import check_job
from cluster.resources import ray_address
from tests.cluster.ray_head import ROOT, Head, ray_head
from tests.conftest import make_llama
from tests.same_run import write_config

DOCUMENT = ROOT / "docs" / "cluster.md"
BLOCKS = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
STEPS = 500
"""More than are done before anybody can stop it."""


# ---- what is shipped ---------------------------------------------------------------------------


def packed(directory: Path, target: Path) -> zipfile.ZipFile:
    """What ``ray job submit --working-dir`` uploads, made by Ray's own code."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(
        str(directory), target, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    return zipfile.ZipFile(target)


def test_code_is_shipped_and_nothing_large(tmp_path: Path) -> None:
    target = tmp_path / "package.zip"
    with packed(ROOT, target) as package:
        names = set(package.namelist())
    assert {"cluster/cli.py", "learner/ppo.py", "configs/cluster.yaml"} <= names
    assert {"cluster/report_template.html.j2", "deploy/runtime_env.yaml"} <= names
    assert not [n for n in names if n.startswith((".git/", ".venv", "tests/", "docs/", "runs/"))]
    # Ray refuses more than 100 MiB, and each node unpacks it.
    assert target.stat().st_size < 4 << 20


def test_what_a_checkout_gathers_stays_at_home(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in (".gitignore", ".rayignore", "actors/config.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in (
        ".venv/lib/torch.so", ".git/objects/pack", ".cache/x", "runs/mine/ppo/metrics.jsonl",
        "models/quality/model.safetensors", "feedback.sqlite", "feedback.sqlite-wal",
        ".mypy_cache/x", "actors/__pycache__/config.pyc", "docs/cluster.md", "tests/test_x.py",
    ):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x")
    (checkout / "prompts.jsonl").write_text("{}")
    with packed(checkout, tmp_path / "package.zip") as package:
        files = {n for n in package.namelist() if not n.endswith("/")}
    assert files - {".gitignore", ".rayignore"} == {"actors/config.py", "prompts.jsonl"}


# ---- what a job is told ------------------------------------------------------------------------

JOB = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}


def test_a_job_is_told_what_it_would_lose() -> None:
    def config(run_dir: str) -> RunConfig:
        return build_config({"run_dir": run_dir}, "test")

    said: list[str] = []
    check_job(config("runs/mine"), said.append, {})
    assert said == [], "this is no job"
    with pytest.raises(ValueError, match=r"'runs/mine'.*thrown away.*absolute path"):
        check_job(config("runs/mine"), said.append, JOB)
    check_job(config("/shared/runs/mine"), said.append, JOB)
    assert "kill this run 3 s after" in said.pop()
    check_job(config("/shared/runs/mine"), said.append, JOB | {"RAY_JOB_STOP_WAIT_TIME_S": "60"})
    assert said == []


def test_the_address_for_jobs_is_no_address_for_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    default = build_config({"run_dir": "x"}, "test").cluster
    chosen = build_config({"run_dir": "x", "cluster": {"address": "auto"}}, "test").cluster
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address(default) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert (ray_address(default), ray_address(chosen)) == ("10.0.0.1:6379", "auto")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ValueError, match="where jobs are submitted"):
        ray_address(default)


# ---- the document ------------------------------------------------------------------------------


def commands() -> Iterator[list[str]]:
    """Every command in the document, its lines joined."""
    for block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def parse(group: click.Command, words: list[str]) -> None:
    """Parse a command line without running anything; raises what click raises."""
    with group.make_context(words[0], words[1:], resilient_parsing=False) as context:
        rest = [*context._protected_args, *context.args]
        if isinstance(group, click.Group) and rest:
            command = group.get_command(context, rest[0])
            assert command is not None, f"there is no {' '.join(words)}"
            parse(command, rest)


def test_the_commands_of_the_document_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.scripts.scripts import cli

    monkeypatch.chdir(ROOT)
    seen = []
    for words in commands():
        if words[:2] == ["ray", "job"] and "--" in words:
            own = words.index("--") + 1
            assert Path(words[own]).name in ("rlhf", "python"), words
            parse(main, ["rlhf", *words[own + (3 if words[own] == "python" else 1) :]])
        if words[0] in ("ray", "rlhf"):
            parse(cli if words[0] == "ray" else main, words)
            seen.append(" ".join(words[:3]))
        for word in words:
            if word.endswith(".yaml") and not word.startswith("/"):
                assert (ROOT / word).is_file(), word
    assert {"ray job submit", "ray job stop", "ray job logs"} <= set(seen)


# ---- a real one --------------------------------------------------------------------------------

SECRET = "a-token-that-nobody-may-read"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head({"rlhf_learner": 1, "rlhf_generator": 1}) as started:
        started.environment["RLHF_REWARD_TOKENS"] = SECRET
        yield started


def block(beginning: str) -> str:
    """The one block of the document that begins so."""
    (found,) = [text for text in BLOCKS if text.startswith(beginning)]
    return str(found)


def run_block(head: Head, text: str, config: Path) -> Any:
    """A block as it stands, but for the addresses of the reader's cluster and configuration."""
    text = text.replace("http://127.0.0.1:8265", head.url)
    return head.run("bash", "-c", text.replace("configs/cluster.yaml", str(config)))


def test_a_run_is_submitted_stopped_and_gone_on_with(head: Head, tmp_path: Path) -> None:
    assert head.get("/api/jobs/").status_code == 401
    assert head.get("/api/jobs/", token="guessed").status_code == 403
    run, copy = tmp_path / "run", tmp_path / "copy"
    config = write_config(
        tmp_path,
        run,
        make_llama(tmp_path / "model", tied=True),
        reward={"terms": [{"name": "words", "function": "reward_service.examples:new_words"}]},
        learners={"num_learners": 1, "resources_per_learner": {"rlhf_learner": 1}},
        rollout={"resources_per_actor": {"rlhf_generator": 1}},
        ppo={"steps": STEPS},
        cluster={"storage": f"file://{copy}"},
    )
    submitted = run_block(head, block("ray job submit --no-wait"), config)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_for_lines(head, run / "ppo" / "metrics.jsonl", 1)
    wait_for_gauge(head, f'ray_rlhf_reward_mean{{.*run="{run.name}"')

    # A second job that cannot begin: its exit status and its reason are to be had.
    answer = head.submit("wrong", "rlhf ppo --config nowhere.yaml", like="ppo-1")
    assert answer.status_code == 200, answer.text
    wrong = head.wait("wrong")
    assert (wrong["status"], wrong["driver_exit_code"]) == ("FAILED", 1)
    assert "error: no configuration file at nowhere.yaml" in head.logs("wrong")

    stopped = run_block(head, block("ray job stop"), config)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    job, log = head.wait("ppo-1"), head.logs("ppo-1")
    assert job["status"] == "STOPPED"
    match = re.search(r"stopped: PPO after step (\d+); go on with --resume", log)
    assert match, log
    step = int(match[1])
    assert 0 < step < STEPS
    assert {p.name for p in (copy / "ppo" / "checkpoints").iterdir()} >= {f"step_{step:06d}"}

    # Another machine goes on, to an end that is near: the directory is gone, its copy is not.
    shutil.rmtree(run)
    last = step + 2
    text = block("ray job submit --submission-id ppo-2").rstrip()
    again = run_block(head, f"{text} ppo.steps={last}", config)
    assert again.returncode == 0, again.stdout + again.stderr
    assert head.job("ppo-2")["driver_exit_code"] == 0
    log += head.logs("ppo-2")
    assert f"fetched from file://{copy}" in log
    assert f"going on after step {step}" in log
    lines = [json.loads(line) for line in (copy / "ppo" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert (copy / "ppo" / "final" / "model.safetensors").read_bytes() == (
        run / "ppo" / "final" / "model.safetensors"
    ).read_bytes()

    assert f"PPO: {last}/{last}" in log
    assert "\r" not in log, "lines, not bars"
    assert "\x1b" not in log
    for secret in (SECRET, head.token):
        told = [log, json.dumps([head.job("ppo-1"), head.job("ppo-2")]), submitted.stdout]
        told += [p.read_text(errors="replace") for p in copy.rglob("*") if p.is_file()]
        assert not [text for text in told if secret in text]


def wait_for_lines(head: Head, path: Path, count: int) -> None:
    deadline = time.monotonic() + 400
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        ended = head.job("ppo-1")["status"] not in ("PENDING", "RUNNING")
        if ended or time.monotonic() > deadline:
            raise AssertionError(head.logs("ppo-1"))
        time.sleep(0.1)


def wait_for_gauge(head: Head, pattern: str) -> None:
    """Return when Ray's own Prometheus endpoint has a line like ``pattern``."""
    deadline = time.monotonic() + 120
    while not re.search(pattern, text := head.metrics()):
        assert head.job("ppo-1")["status"] == "RUNNING", head.logs("ppo-1")
        assert time.monotonic() < deadline, text
        time.sleep(0.3)

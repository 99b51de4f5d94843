"""The whole pipeline made tiny: every stage on real parts, resumed, with nothing left running."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from cluster.cli import main
from cluster.config import override_config
from cluster.health import find
from cluster.metrics import RESERVED
from cluster.pipeline import Pipeline
from cluster.presets import quickstart_config
from tests.processes import title

TINY = [
    "data.newswire.articles=160",
    "data.newswire.held_out=12",
    "pretrain.hidden_size=64",
    "pretrain.layers=2",
    "pretrain.intermediate_size=128",
    "pretrain.epochs=1",
    "sft.epochs=0.5",
    "collect.pairs=30",
    "collect.judge.shared=1",
    "reward_model.epochs=1",
    "ppo.steps=2",
    "ppo.prompts_per_step=8",
    "ppo.epochs=1",
    "sampling.max_new_tokens=24",
    "evaluate.prompts=8",
    "rollout.engine.kv_cache_gib=0.2",
    "rollout.engine.threads=1",
    "reward.service.threads=1",
    "learners.threads=1",
]


@pytest.fixture(scope="module")
def run_dir(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    config = override_config(quickstart_config(run_dir=directory), TINY, "test")
    before = set(psutil.Process().children(recursive=True))
    Pipeline(config, resume=False, overwrite=False).run()
    started = [p for p in psutil.Process().children(recursive=True) if p not in before]
    actors = [p for p in started if "ray::" in title(p) and "IDLE" not in title(p)]
    _, left = psutil.wait_procs(actors, timeout=10)  # the last of them may be just ending
    assert left == [], "the pipeline left actors behind"
    return directory


def test_every_stage_leaves_what_the_next_needs(run_dir: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages = json.loads((run_dir / "stages.json").read_text())
    assert list(stages) == ["pretrain", "sft", "collect", "reward", "ppo", "evaluate", "report"]
    for model in ("base", "sft", "ppo/final"):
        loaded = AutoModelForCausalLM.from_pretrained(run_dir / model)
        assert len(AutoTokenizer.from_pretrained(run_dir / model)) <= loaded.config.vocab_size
    rows = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["samples/submitted"] == row["samples/trained"] + row["samples/failed"] == 8
        assert row["ppo/engine_delta_mean"] < 1e-4
        assert "measured/true_quality" in row
        assert [n for n in row if n not in RESERVED and find(n) is None] == [], (
            "see docs/metrics.md"
        )
    samples = [json.loads(x) for x in (run_dir / "ppo" / "samples" / "step_000002.jsonl").open()]
    assert len(samples) == 8
    assert {"prompt", "response", "score", "true_quality"} <= set(samples[0])
    feedback = json.loads((run_dir / "feedback.json").read_text())
    assert feedback["comparisons"] == 3 * feedback["items"] > 0
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert [c["name"] for c in evaluation["checkpoints"]] == ["sft", "ppo"]
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert 'src="http' not in page


def test_the_drift_of_the_score_is_followed_during_ppo(run_dir: Path) -> None:
    """Against the distance of SciPy, between the samples as written and the model's reference."""
    from scipy.stats import wasserstein_distance

    head = json.loads((run_dir / "reward_model" / "reward_head.json").read_text())
    reference = head["info"]["reference_quantiles"]
    rows = [json.loads(line) for line in (run_dir / "ppo" / "metrics.jsonl").open()]
    samples = [json.loads(x) for x in (run_dir / "ppo" / "samples" / "step_000002.jsonl").open()]
    scores = [sample["components"]["reward_model"] for sample in samples]
    # eight atoms there, interpolated quantiles here: a part of the spacing of the samples apart
    assert rows[1]["reward/reward_model_drift"] == pytest.approx(
        wasserstein_distance(scores, reference), rel=0.2, abs=0.3
    )
    assert rows[1]["reward/reward_model_drift"] > 0


def test_more_steps_go_on_from_the_last_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    first = (copy / "ppo" / "metrics.jsonl").read_text()
    arguments = ["-c", str(copy / "config.yaml"), "--resume", f"run_dir={copy}"]
    result = CliRunner().invoke(main, ["--debug", "ppo", *arguments])
    assert result.exit_code == 0, result.output
    assert (copy / "ppo" / "metrics.jsonl").read_text() == first, "it was finished already"
    result = CliRunner().invoke(main, ["--debug", "ppo", *arguments, "ppo.steps=3"])
    assert result.exit_code == 0, result.output
    rows = (copy / "ppo" / "metrics.jsonl").read_text()
    assert rows.startswith(first)
    assert [json.loads(row)["step"] for row in rows.splitlines()] == [1, 2, 3]

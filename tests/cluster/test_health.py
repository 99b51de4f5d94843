"""What metrics mean, when one has left its range, and that nothing a step writes is unknown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.trajectory import Prompt, Trajectory
from cluster.checkpoint import CheckpointStore
from cluster.drift_watch import STALE_NAMES
from cluster.health import TABLES, Watch, find, is_coarse, markdown_tables
from cluster.known_metrics import GROUPS
from cluster.metric import Metric
from cluster.metrics import MetricsWriter
from cluster.ppo_stage import PPOLog
from cluster.recovery import Recovery
from cluster.report import write_report
from cluster.step import Sample, Step, describe
from learner.config import PPOConfig
from reward_service.score import Score
from tests.cluster.synthetic_run import write_synthetic_run
from tests.learner.ppo_samples import in_process, random_batch
from tests.learner.test_ppo import ppo

NOT_IN_EVERY_STEP = {
    "ppo/groups_without_spread",
    "samples/extra_rounds",
    "samples/filtered_<reason>",
    "samples/failed_<stage>",
    "ppo/engine_correlation",
    "ppo/log_ratio_max",
    "recovery/engines_lost",
    "recovery/learner_restarts",
    "recovery/samples_again",
    "rollout/engines",
    "reward/<model>_drift",
    *STALE_NAMES.values(),
    "weights/megabytes",
    "weights/probe_error_max",
    "weights/reloads",
    "weights/seconds_<part>",
    "weights/verify_share",
}
"""Of groups of responses, filters, failures, stale samples, engines and served models: this step
has none."""
DOCS = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def told(watch: Watch, name: str, values: list[float]) -> list[int]:
    """The steps, from 1, at which the watch says something."""
    return [step for step, value in enumerate(values, start=1) if watch.step(step, {name: value})]


def test_the_page_of_metrics_has_the_records() -> None:
    """After a change: python -m cluster.health docs/metrics.md"""
    (tables,) = TABLES.findall(DOCS.read_text(encoding="utf-8"))
    assert tables == markdown_tables()
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(len(metrics) for _, metrics in GROUPS) > 40
    assert all(line.replace(r"\|", "").count("|") == 5 for line in rows)


def one_step() -> dict[str, float]:
    """What the driver adds to the learners' metrics in a step."""
    prompt = Prompt(prompt_id="p", token_ids=np.array([5], np.int32), text="x")
    trajectory = Trajectory(
        prompt=prompt,
        sample_index=0,
        response_ids=np.array([7, 2], np.int32),
        response_logprobs=np.zeros(2, np.float32),
        policy_versions=np.zeros(2, np.int32),
        response_text="y",
        finish_reason="stop",
        seed=0,
    )
    score = Score(sample_id="p#0", value=1.0, components={"style": 1.0, "length": 0.5})
    step = Step(submitted=["p#0"])
    for phase in ("generate", "learn", "broadcast"):
        with step.timed(phase):
            step.samples = [Sample(trajectory=trajectory, score=score, measured={"good": 1.0})]
    return describe(step)


@pytest.mark.parametrize("changes", [{}, {"shared_trunk": True}])
def test_every_metric_of_a_step_is_described(changes: dict[str, Any], tiny_llama: Path) -> None:
    metrics = in_process(ppo(**changes), tiny_llama).update(random_batch(4, seed=0)) | one_step()
    assert [name for name in metrics if find(name) is None] == []
    assert len(metrics) > 45
    seen = {found.name for name in metrics if (found := find(name))}
    recorded = {metric.name for _, metrics in GROUPS for metric in metrics}
    if not changes:  # and no record describes what no step writes
        assert recorded - seen <= NOT_IN_EVERY_STEP


def test_exact_names_come_before_patterns() -> None:
    assert (find("reward/std") or Metric).name == "reward/std"
    assert (find("reward/style") or Metric).name == "reward/<term>"
    assert (find("reward/both.0_drift") or Metric).name == "reward/<model>_drift"
    assert (find("seconds/broadcast") or Metric).name == "seconds/<phase>"
    assert find("reward/a/b") is None
    assert find("elsewhere/x") is None
    names = [metric.name for _, metrics in GROUPS for metric in metrics]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "either a range or a trend"),
        ({"low": 1.0, "remedy": "r", "trend": "t"}, "either a range or a trend"),
        ({"low": 1.0}, "no remedy"),
        ({"low": 2.0, "high": 1.0, "remedy": "r"}, "empty range, 2.0 to 1.0"),
        ({"low": 2.0, "patience": 0, "remedy": "r"}, "patience of 0"),
    ],
)
def test_records_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metric(name="x", meaning="m", **fields)


def test_ranges_in_words() -> None:
    between = Metric(name="x", meaning="m", unit="nats", low=-1, high=0.5, remedy="r")
    assert between.healthy() == "-1 to 0.5 nats"
    coarse = Metric(name="x", meaning="m", high=1e-4, coarse_high=0.03, remedy="r")
    assert (coarse.healthy(), coarse.healthy(coarse=True)) == ("at most 0.0001", "at most 0.03")
    assert Metric(name="x", meaning="m", low=0.5, remedy="r").healthy() == "at least 0.5"
    assert Metric(name="x", meaning="m", trend="rises").healthy() == "rises"


def test_an_excursion_is_told_once_and_only_when_it_lasts() -> None:
    """clip_fraction: at most 0.25, patience 3."""
    name = "ppo/clip_fraction"
    assert told(Watch(), name, [0.3, 0.3, 0.1, 0.3, 0.3, 0.25]) == []
    watch = Watch()
    assert told(watch, name, [0.1, 0.3, 0.4, 0.3, 0.3, 0.1, 0.5, 0.5, 0.5]) == [4]
    (excursion,) = watch.excursions()
    assert (excursion.since, excursion.worst, excursion.worst_step) == (2, 0.5, 7)
    assert excursion.when == "since step 2, in 7 of 9 steps"
    watch.step(10, {name: 0.2})
    assert excursion.when == "from step 2 to 9, in 7 of 10 steps; in range again"


def test_a_sentence_says_value_range_and_remedy() -> None:
    (sentence,) = Watch().step(7, {"samples/failed": 3, "samples/trained": 61, "unknown/x": 9.0})
    assert sentence.startswith("samples/failed is 3 at step 7, healthy is at most 0. The reason")


def test_what_must_never_be_is_told_at_once_and_both_ends_count() -> None:
    assert told(Watch(), "ppo/skipped_steps_critic", [0, 1, 1]) == [2]
    assert told(Watch(), "ppo/ratio_mean", [1.0, 0.8, 1.2]) == [2]
    assert told(Watch(), "ppo/kl_sequence", [-2.0] * 4) == [3]
    assert told(Watch(), "ppo/ratio_mean", [math.nan, 1.0]) == []


def test_sixteen_bits_widen_what_rounding_decides() -> None:
    name = "ppo/engine_delta_mean"
    assert told(Watch(), name, [0.01]) == [1]
    assert told(Watch(coarse=True), name, [0.01, 0.2]) == [2]
    assert [is_coarse(*x) for x in (("float32", False), ("bfloat16", False), (None, True))] == [
        False, True, True,
    ]  # fmt: skip


def test_a_resumed_run_does_not_repeat_itself(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, stage="ppo") as out:
        for step in range(1, 6):
            out.write(step, {"ppo/entropy": 0.01, "samples/failed": int(step == 5)}, total=9)
    watch = Watch()
    watch.catch_up(tmp_path, 4)
    assert watch.step(5, {"ppo/entropy": 0.01}) == []
    assert len(watch.step(5, {"samples/failed": 1})) == 1  # step 5 is done again
    fresh = Watch()
    fresh.catch_up(tmp_path / "nowhere", 4)
    fresh.catch_up(tmp_path, 0)
    assert fresh.excursions() == []


def test_a_run_says_once_what_left_its_range(tmp_path: Path) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, warn=said.append)
    config = PPOConfig(steps=50, checkpoint_every=50)
    with MetricsWriter(tmp_path, stage="ppo") as out:
        nobody: Any = None  # no learners: no step here is checkpointed
        log = PPOLog(
            tmp_path,
            config,
            nobody,
            out,
            store,
            {},
            next_step=0,
            scale=None,
            ahead=None,
            references={},
            watch=Watch(),
            warn=said.append,
            recovery=Recovery(3, said.append),
        )
        for step in range(6):
            log.finish_step(step, {"ppo/ratio_mean": 1.0 + 0.1 * step, "reward/mean": 0.0}, [])
    assert len(said) == 1
    assert said[0].startswith("ppo/ratio_mean is 1.2 at step 3, healthy is 0.9 to 1.1. Lower")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without the stages that cost drawing time."""
    run = write_synthetic_run(tmp_path_factory.mktemp("health") / "run")
    for name in ("base", "sft", "reward_model"):
        (run / name / "metrics.jsonl").unlink()
    return run


def test_the_report_begins_with_what_left_its_range(run_dir: Path) -> None:
    healthy = write_report(run_dir).read_text(encoding="utf-8")
    assert "metrics that have a healthy range stayed in it" in healthy
    assert 'class="alerts"' not in healthy
    path = run_dir / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["step"] >= 30:
            row["ppo/clip_fraction"] = 0.61
        if row["step"] == 12:
            row["samples/failed"] = 4
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(run_dir).read_text(encoding="utf-8")
    section = page[page.index('id="ppo"') :]
    alerts = section[: section.index("What changed")]
    assert "left their healthy range; 1 is still outside" in alerts
    assert alerts.index("ppo/clip_fraction") < alerts.index("samples/failed")
    for text in ("0.61", "at most 0.25", "since step 30, in 11 of 40 steps",
                 "<code>ppo.policy.learning_rate</code>", "in step 12 only"):  # fmt: skip
        assert text in alerts, text

"""A run directory as a finished quickstart leaves it, made without training anything.

The numbers follow the shapes of real runs; the texts are the newswire's own, good ones more often
after PPO than before.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actors.config import NewswireConfig
from actors.newswire import Article, generate_newswire, prompt_text, true_quality
from actors.trajectory import Prompt, Trajectory
from cluster.config import write_config
from cluster.evaluate import CheckpointSamples, evaluate_samples
from cluster.evaluation import write_evaluation
from cluster.metrics import MetricsWriter
from cluster.presets import quickstart_config
from learner.reward_model import RewardModelReport
from learner.supervised import TrainingResult
from reward_service.comparison import Annotator, Candidate, Comparison, Pair
from reward_service.feedback.agreement_report import agreement_report
from reward_service.score import Score

PPO_STEPS = 40


def write_synthetic_run(
    run_dir: Path, *, language: Literal["en", "zh"] = "en", seed: int = 0
) -> Path:
    """Everything a run directory may hold, but weights."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    write_config(
        quickstart_config(run_dir=run_dir, language=language, seed=seed), run_dir / "config.yaml"
    )
    write_supervised(run_dir, rng)
    articles = articles_of(language, seed)
    write_judgement(run_dir, articles)
    write_ppo_metrics(run_dir, rng)
    write_timeline(run_dir)
    write_ppo_samples(run_dir, articles)
    write_evaluation(run_dir, evaluation(articles))
    stages = {
        "pretrain": 142.1, "sft": 38.0, "collect": 41.7, "reward": 33.2, "ppo": 263.9,
        "evaluate": 29.4,
    }  # fmt: skip
    summary: dict[str, dict[str, Any]] = {
        name: {"seconds": seconds} for name, seconds in stages.items()
    }
    summary["pretrain"] |= {
        "training": {"tokens": 1_250_000, "tokens_per_second": 41_800.0},
        "held_out_nll": math.log(3.0),
    }
    _write_json(run_dir / "stages.json", summary)
    return run_dir


def write_supervised(run_dir: Path, rng: np.random.Generator) -> None:
    for stage, directory, steps, start, end in (
        ("pretrain", "base", 420, 6.9, 1.05),
        ("sft", "sft", 90, 1.3, 0.62),
        ("reward_model", "reward_model", 60, 0.69, 0.41),
    ):
        with MetricsWriter(run_dir / directory, stage=stage) as out:
            for step in range(1, steps + 1):
                level = end + (start - end) * math.exp(-5 * step / steps)
                metrics = {
                    "loss": level + rng.normal(0, 0.04 * level),
                    "learning_rate": 3e-3 * (1 - step / steps),
                    "gradient_norm": 0.4 + 2 * math.exp(-8 * step / steps) + rng.exponential(0.1),
                    "tokens_per_second": rng.normal(42_000, 900),
                }
                held_out = step % (steps // 6) == 0
                if held_out:
                    metrics["held_out_loss"] = 1.02 * level
                if stage == "reward_model":
                    accuracy = 0.5 + 0.32 * (1 - math.exp(-5 * step / steps))
                    metrics["agreement"] = min(1.0, accuracy + rng.normal(0, 0.05))
                    if held_out:
                        metrics["held_out_agreement"] = accuracy - 0.02
                out.write(step, metrics, total=steps)


def write_judgement(run_dir: Path, articles: tuple[Article, ...]) -> None:
    """Three of five judges on each pair: noisy, one of them swayed by what is shown first."""
    rng = random.Random(3)
    comparisons = []
    for number, article in enumerate(a for a in articles if len(a.paragraphs) > 1):
        a, b = article.paragraphs[:2]
        pair = Pair(
            item_id=f"pair:{number}",
            prompt_id=article.article_id,
            prompt=prompt_text(article),
            a=Candidate(text=a, model="sft"),
            b=Candidate(text=b, model="sft"),
        )
        better = true_quality(article.meta, a).score - true_quality(article.meta, b).score
        for judge in rng.sample(range(5), 3):
            shown_first = rng.choice(["a", "b"])
            favour = (0.25 if judge == 4 else 0.0) * (1 if shown_first == "a" else -1)
            seen = better + favour + rng.gauss(0, 0.15)
            choice = "tie" if abs(seen) < 0.05 else "a" if seen > 0 else "b"
            comparisons.append(
                Comparison(
                    pair=pair,
                    annotator=Annotator(annotator_id=f"judge-{judge}", kind="simulated"),
                    choice=choice,  # type: ignore[arg-type]
                    shown_first=shown_first,  # type: ignore[arg-type]
                    seconds=0.0,
                )
            )
    meta = {article.article_id: article.meta for article in articles}
    report = agreement_report(
        comparisons, quality=lambda prompt_id, text: true_quality(meta[prompt_id], text).score
    )
    _write_json(run_dir / "feedback.json", report)
    training = TrainingResult(
        steps=60, tokens=900_000, seconds=31.0, tokens_per_second=29_000.0, padding_share=0.04,
        train_loss=0.41,
    )  # fmt: skip
    reward_model = RewardModelReport(
        held_out_accuracy=0.84, ci_low=0.74, ci_high=0.91, n=81, judgement_accuracy=0.79,
        judgement_ci_low=0.73, judgement_ci_high=0.84, judgements=240, judge_agreement=0.88,
        judge_agreement_ci_low=0.83, judge_agreement_ci_high=0.92, judge_agreement_n=214,
        accuracy_beside_judges=0.82, length_baseline=0.58, length_prefers="longer",
        rating_correlation=None, train_pairs=510, train_judgements=1530, held_out_pairs=90,
        train_ratings=0, held_out_ratings=0, ties=130, skipped=0, gain=0.7, bias=-0.2,
        reference_samples=256, training=training,
    )  # fmt: skip
    _write_json(run_dir / "reward_model" / "report.json", asdict(reward_model))


def write_ppo_metrics(run_dir: Path, rng: np.random.Generator) -> None:
    with MetricsWriter(run_dir / "ppo", stage="ppo") as out:
        for step in range(1, PPO_STEPS + 1):
            out.write(step, ppo_metrics(step, rng), total=PPO_STEPS)


def write_timeline(run_dir: Path) -> None:
    """Two rollout actors, one of them slower; a checkpoint after every tenth step."""
    at = 1_764_000_000.0
    lines = []
    for step in range(1, PPO_STEPS + 1):
        learn, load = 2.4, 6.1
        end = 7.5 if step % 10 == 0 else 6.5
        spans = [
            ("driver", "generate", 0.0, 2.4), ("rollout-0", "generate", 0.01, 1.7),
            ("rollout-1", "generate", 0.01, 2.2), ("reward", "score", 0.9, 1.1),
            ("reward", "score", 1.8, 2.38), ("driver", "accounting", 2.4, 2.42),
            ("driver", "learn", 2.42, 6.0), ("learners", "annotate", learn, 3.2),
            ("learners", "epochs", 3.2, 5.95), ("driver", "broadcast", 6.0, 6.4),
            ("learners", "export", 6.0, 6.1), ("rollout-0", "verify", load, 6.15),
            ("rollout-0", "load", 6.15, 6.25), ("rollout-0", "probe", 6.25, 6.3),
            ("rollout-1", "verify", load, 6.15), ("rollout-1", "load", 6.15, 6.3),
            ("rollout-1", "probe", 6.3, 6.38), ("driver", "save", 6.4, end),
        ]  # fmt: skip
        if step % 10 == 0:
            spans.append(("learners", "checkpoint", 6.42, end))
        lines.append({"step": step, "time": at, "seconds": end, "spans": spans})
        at += end + 0.02
    path = run_dir / "ppo" / "timeline.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def ppo_metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    gain = 1 - math.exp(-step / 14)
    noise = rng.normal
    reward = 0.05 + 1.5 * gain + noise(0, 0.06)
    kl = 7.5 * gain**1.3 + abs(noise(0, 0.15))
    good = float(np.clip(0.28 + 0.42 * gain + noise(0, 0.03), 0, 1))
    delta = 3e-6 * (1 + abs(noise(0, 0.3)))
    seconds = {"generate": 2.1 + noise(0, 0.1), "learn": 3.9 + noise(0, 0.1),
               "broadcast": 0.3 + abs(noise(0, 0.03))}  # fmt: skip
    return {
        "reward/mean": reward, "reward/std": 1 - 0.5 * gain, "reward/min": reward - 2.4,
        "reward/max": reward + 1.2, "reward/reward_model": reward,
        "measured/good": good, "measured/true_quality": 0.5 + 0.7 * (good - 0.28),
        "response/length_mean": 41 + 5 * gain + noise(0, 1), "response/length_max": 96.0,
        "response/eos_rate": min(1.0, 0.93 + 0.06 * gain), "tokens/response": 2700.0,
        "samples/submitted": 64, "samples/trained": 64, "samples/filtered": 0, "samples/failed": 0,
        "ppo/score": reward, "ppo/score_std": 1 - 0.5 * gain,
        "ppo/reward_shaped": reward - 0.05 * kl,
        "ppo/kl_sequence": kl, "ppo/kl_token": kl / 44, "ppo/kl_coef": 0.05,
        "ppo/entropy": 0.9 - 0.35 * gain + noise(0, 0.01), "ppo/value": reward - 0.1,
        "ppo/explained_variance": 0.75 - 0.6 * math.exp(-step / 6) + noise(0, 0.03),
        "ppo/engine_delta_mean": delta, "ppo/engine_delta_max": 12 * delta,
        "ppo/effective_sample_size": 1.0, "ppo/eos_rate": 0.95, "ppo/response_length": 44.0,
        "ppo/loss_policy": -0.02 + noise(0, 0.004), "ppo/loss_value": 0.2 * (1.2 - gain),
        "ppo/clip_fraction": 0.07 + abs(noise(0, 0.01)),
        "ppo/value_clip_fraction": 0.03 + abs(noise(0, 0.005)),
        "ppo/ratio_mean": 1 + noise(0, 0.001), "ppo/ratio_max": 2.2 + abs(noise(0, 0.4)),
        "ppo/approx_kl": 0.004 + abs(noise(0, 0.0005)), "ppo/first_log_ratio_max": 0.0,
        "ppo/grad_norm_policy": 0.6 + abs(noise(0, 0.1)),
        "ppo/grad_norm_critic": 1.4 + abs(noise(0, 0.4)),
        "ppo/learning_rate_policy": 3e-4 * (1 - step / PPO_STEPS),
        "ppo/seconds_annotate": 0.7, "ppo/seconds_forward_backward": 2.8,
        "ppo/seconds_optimizer": 0.2, **{f"seconds/{k}": v for k, v in seconds.items()},
        "seconds/step": sum(seconds.values()), "tokens/per_second": 2700 / sum(seconds.values()),
    }  # fmt: skip


def articles_of(language: Literal["en", "zh"], seed: int) -> tuple[Article, ...]:
    config = NewswireConfig(language=language, articles=400, held_out=64)
    return generate_newswire(config, seed).articles


def write_ppo_samples(run_dir: Path, articles: tuple[Article, ...]) -> None:
    directory = run_dir / "ppo" / "samples"
    directory.mkdir(parents=True)
    for step in (1, 6, 11, 16, 21, 26, 31, 36, 40):
        rng = random.Random(step)
        rows = []
        for article in rng.sample(articles, 32):
            response = _paragraph(article, rng, good_share=0.28 + 0.42 * step / PPO_STEPS)
            quality = true_quality(article.meta, response)
            rows.append({
                "sample_id": f"{article.article_id}#0", "prompt_id": article.article_id,
                "prompt": prompt_text(article), "response": response,
                "score": 3 * quality.score - 1.4 + rng.gauss(0, 0.4), "components": {},
                "length": len(response) // 4, "finish_reason": "stop", "policy_version": step - 1,
                "true_quality": quality.score, "good": float(quality.good),
            })  # fmt: skip
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (directory / f"step_{step:06d}.jsonl").write_text("".join(lines), encoding="utf-8")


def evaluation(articles: tuple[Article, ...], prompts: int = 64) -> Any:
    """SFT with a share of good paragraphs of about 0.3, PPO with about 0.7."""
    chosen = [a for a in articles if any(a.faults) and not all(a.faults)][:prompts]
    checkpoints = []
    for name, good_share in (("sft", 0.3), ("ppo", 0.72)):
        rng = random.Random(name)
        trajectories, scores, kl = [], [], []
        for article in chosen:
            response = _paragraph(article, rng, good_share)
            quality = true_quality(article.meta, response)
            count = max(1, len(response) // 5)
            trajectory = Trajectory(
                prompt=Prompt(
                    prompt_id=article.article_id,
                    token_ids=np.array([1, 2], np.int32),
                    text=prompt_text(article),
                    meta=article.meta,
                ),
                sample_index=0,
                response_ids=np.zeros(count, np.int32),
                response_logprobs=np.zeros(count, np.float32),
                policy_versions=np.zeros(count, np.int32),
                response_text=response,
                finish_reason="stop" if rng.random() < 0.96 else "length",
                seed=0,
            )
            trajectories.append(trajectory)
            value = 3 * quality.score - 1.4 + rng.gauss(0, 0.4)
            scores.append(
                Score(
                    sample_id=trajectory.sample_id, value=value, components={"reward_model": value}
                )
            )
            kl.append(0.0 if name == "sft" else max(0.0, rng.gauss(6.8, 2.0)))
        checkpoints.append(
            CheckpointSamples(name=name, trajectories=trajectories, scores=scores, kl=kl)
        )
    return evaluate_samples(
        checkpoints,
        true_quality=true_quality,
        settings={"prompts": len(chosen), "temperature": 1.0, "max_new_tokens": 96},
    )


def _paragraph(article: Article, rng: random.Random, good_share: float) -> str:
    """One of the article's own paragraphs, a good one with probability ``good_share``."""
    good = [p for p, f in zip(article.paragraphs, article.faults, strict=True) if not f]
    faulty = [p for p, f in zip(article.paragraphs, article.faults, strict=True) if f]
    wanted = good if rng.random() < good_share else faulty
    return rng.choice(wanted or good or faulty)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")

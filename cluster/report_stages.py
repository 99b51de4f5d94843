"""How it came about, for the page: curves of every stage, judges and reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.charts import Chart, draw_panels, draw_phases, draw_unknown, reward_terms
from cluster.panels import HEALTH, LEARNED, SUPERVISED
from cluster.plots import Band, Line, compact, line_chart
from cluster.report_health import Health, ppo_health
from cluster.report_outcome import Interval, interval_row, span
from cluster.run_files import RunFiles, SampleFile, finite
from reward_service.intervals import Estimate

if TYPE_CHECKING:
    import pandas as pd

SECTIONS = {
    "pretrain": "pretrain",
    "sft": "sft",
    "collect": "collect",
    "reward": "reward_model",
    "ppo": "ppo",
    "evaluate": "ppo",
}
"""Stage and the section of the configuration that makes it part of a run."""


AGREEMENT: tuple[tuple[str, str, str, bool], ...] = (
    ("percent", "Two judges say the same", "of the same pair", True),
    ("cohen", "Cohen's kappa", "beyond chance, mean of pairs of judges", False),
    ("fleiss", "Fleiss' kappa", "beyond chance, all judges together", False),
    ("alpha", "Krippendorff's alpha", "beyond chance; harsh when one choice is rare", False),
    ("graded_alpha", "Alpha with strength", "'slightly' is nearer to a tie than 'by far'", False),
    ("ac1", "Gwet's AC1", "beyond chance; mild when choices are even", False),
    ("leave_one_out", "One judge and the majority of the others", "say the same", True),
    ("majority_accuracy", "The majority and true quality", "prefer the same text", True),
)
"""Figures of the agreement report: key, label, explanation, whether it is a share."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Charts of one stage. ``others`` has what no panel is made for: (name, first, last)."""

    title: str
    stage: str
    summary: str
    unfinished: bool = False
    charts: tuple[Chart, ...] = ()
    health: tuple[Chart, ...] = ()
    alarms: Health = field(default_factory=Health)
    unknown: tuple[Chart, ...] = ()
    others: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class AgreementRow:
    label: str
    value: str
    explain: str = ""
    interval: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Judges and reward model."""

    sentence: str
    """On the judges, from their agreement report."""
    verdict: str
    """On the reward model."""
    rows: tuple[AgreementRow, ...]
    judges: tuple[tuple[str, ...], ...]
    intervals: tuple[Interval, ...]
    curves: Curves
    has_feedback: bool
    has_report: bool


def belongs(run: RunFiles, stage: str) -> bool:
    """Whether the configuration makes ``stage`` part of this run; yes when there is none."""
    return run.config is None or run.config.get(SECTIONS[stage]) is not None


def ppo_section(run: RunFiles) -> Curves:
    frame = run.metrics.get("ppo")
    if frame is None:
        return Curves(title="PPO", stage="ppo", summary="")
    x_label = "PPO step"
    target = run.setting("ppo.kl.target") if run.setting("ppo.kl.adaptive") else None
    marks = {
        "KL to the reference": ((float(target), "target"),) if target else (),
        "Explained variance": ((0.0, "guessing the mean"),),
        "Engine against learner": ((1e-4, "limit of the mean"),),
    }
    learning = (*LEARNED, *reward_terms(frame))
    learned = draw_panels(frame, learning, x_label=x_label, marks=marks)
    spread = _score_quantiles(run.samples)
    if spread is not None:
        learned.append(spread)
    health = draw_panels(frame, HEALTH, x_label=x_label, marks=marks)
    phases = draw_phases(frame, x_label=x_label)
    if phases is not None:
        health.append(phases)
    unknown, others = draw_unknown(frame, (*learning, *HEALTH), x_label=x_label)
    return Curves(
        title="PPO",
        stage="ppo",
        summary=_progress(frame),
        unfinished=_steps(frame)[0] < _steps(frame)[1],
        charts=tuple(learned),
        health=tuple(health),
        alarms=ppo_health(run, frame),
        unknown=tuple(unknown),
        others=tuple(others),
    )


def supervised_sections(run: RunFiles) -> list[Curves]:
    """Base model and fine-tuning; a stage that the run does not have is left out."""
    return [
        _supervised(run, stage, directory, title)
        for stage, directory, title in (
            ("pretrain", "base", "Base model"),
            ("sft", "sft", "Supervised fine-tuning"),
        )
        if belongs(run, stage) or directory in run.metrics
    ]


def judgement_section(run: RunFiles) -> Judgement | None:
    """``None`` when the run neither collects judgements nor trains a reward model."""
    if not (belongs(run, "collect") or belongs(run, "reward") or run.feedback or run.reward_model):
        return None
    feedback, report = run.feedback or {}, run.reward_model or {}
    return Judgement(
        sentence=str(feedback.get("summary") or ""),
        rows=_agreement_rows(feedback),
        verdict=_verdict(report),
        judges=_judge_rows(feedback),
        intervals=_accuracy(feedback, report),
        curves=_supervised(run, "reward", "reward_model", "Reward model"),
        has_feedback=run.feedback is not None,
        has_report=run.reward_model is not None,
    )


def _supervised(run: RunFiles, stage: str, directory: str, title: str) -> Curves:
    frame = run.metrics.get(directory)
    if frame is None:
        return Curves(title=title, stage=stage, summary="")
    unknown, others = draw_unknown(frame, SUPERVISED, x_label="step")
    return Curves(
        title=title,
        stage=stage,
        summary=_progress(frame) + _training(run.stages.get(stage)),
        unfinished=_steps(frame)[0] < _steps(frame)[1],
        charts=tuple(draw_panels(frame, SUPERVISED, x_label="step")),
        unknown=tuple(unknown),
        others=tuple(others),
    )


def _steps(frame: pd.DataFrame) -> tuple[int, int]:
    """Steps done and steps to do."""
    done = int(frame["step"].max())
    return done, int(frame["total"].iloc[-1]) if "total" in frame else done


def _progress(frame: pd.DataFrame) -> str:
    """``40 steps`` or ``12 of 40 steps``."""
    done, total = _steps(frame)
    return f"{done} steps" if done >= total else f"{done} of {total} steps"


def _training(summary: Any) -> str:
    """What a finished stage says of its training, to go behind the number of steps."""
    if not isinstance(summary, Mapping) or not isinstance(summary.get("training"), Mapping):
        return ""
    training = summary["training"]
    parts = []
    tokens, speed = finite(training, "tokens"), finite(training, "tokens_per_second")
    if tokens is not None:
        parts.append(f"{compact(tokens)} tokens")
    if speed is not None:
        parts.append(f"{compact(speed)} tokens a second")
    nll = finite(summary, "held_out_nll")
    if nll is not None and nll < 50:
        parts.append(f"held-out loss {compact(nll)} (perplexity {compact(math.exp(nll))})")
    return "".join(f", {part}" for part in parts)


def _score_quantiles(samples: tuple[SampleFile, ...]) -> Chart | None:
    """Median and the middle 80 % of the scores, from the samples written out."""
    if len(samples) < 2:
        return None
    x = np.array([s.step for s in samples], dtype=float)
    low, middle, high = np.array([np.quantile(s.scores(), [0.1, 0.5, 0.9]) for s in samples]).T
    first, last = compact(float(middle[0])), compact(float(middle[-1]))
    return Chart(
        title="Spread of the scores",
        explain="Median and the middle 80% of the samples written out. A band that closes means"
        " that all responses come to score alike.",
        svg=line_chart(
            [Line(name="median", x=x, y=middle, dots=True)],
            label=f"Scores by PPO step: median from {first} to {last}, with the middle 80%",
            x_label="PPO step",
            band=Band(x=x, low=low, high=high),
        ),
        first=first,
        last=last,
    )


def _agreement_rows(feedback: Mapping[str, Any]) -> tuple[AgreementRow, ...]:
    """The figures of the agreement report; one that could not be told is said to be so."""
    rows = []
    for name, label, explain, percent in AGREEMENT:
        if name not in feedback:
            continue
        share = _share(feedback[name])
        if share is None:
            rows.append(AgreementRow(label=label, explain=explain, value="cannot be told"))
            continue
        value = f"{share.value:.0%}" if percent else f"{share.value:.2f}"
        interval = span(share, percent=True) if percent else f"{share.low:.2f} to {share.high:.2f}"
        if finite(feedback[name], "low") is None:
            interval = "too few to tell an interval"
        rows.append(AgreementRow(label=label, explain=explain, value=value, interval=interval))
    for name, label in (("comparisons", "Judgements"), ("items", "Pairs"), ("judges", "Judges")):
        count = finite(feedback, name)
        if count is not None:
            rows.append(AgreementRow(label=label, value=f"{count:.0f}"))
    return tuple(rows)


def _judge_rows(feedback: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """One row a judge: name, judgements, with the others, first shown, longer, ties."""
    judges = feedback.get("per_judge")
    rows = []
    for judge in judges if isinstance(judges, list) else []:
        if not isinstance(judge, Mapping):
            continue
        shares = [_share(judge.get(k)) for k in ("with_the_others", "first_share", "longer_share")]
        ties = finite(judge, "tie_share")
        rows.append(
            (
                str(judge.get("judge", "")),
                f"{finite(judge, 'judgements') or 0:.0f}",
                *("" if s is None else f"{s.value:.0%} ({span(s, percent=True)})" for s in shares),
                "" if ties is None else f"{ties:.0%}",
            )
        )
    return tuple(rows)


def _accuracy(feedback: Mapping[str, Any], report: Mapping[str, Any]) -> tuple[Interval, ...]:
    """The reward model's accuracy beside the judges' agreement and the length baseline."""
    prefers = f"Always preferring the {report.get('length_prefers') or 'longer'} text"
    rows = (
        ("Reward model, with most judges",
         _share_of(report, "held_out_accuracy", "ci_low", "ci_high", "n"), "after"),
        ("Reward model, with the other judges",
         _share_of(report, "accuracy_beside_judges", n="judge_agreement_n"), "after"),
        ("One judge, with the other judges",
         _share_of(report, "judge_agreement", "judge_agreement_ci_low", "judge_agreement_ci_high",
                   "judge_agreement_n"), "third"),
        (prefers, _share_of(report, "length_baseline"), "fifth"),
        ("Most judges, with true quality", _share(feedback.get("majority_accuracy")), "before"),
    )  # fmt: skip
    return tuple(
        interval_row(label, share, colour, f"{share.n} cases" if share.n else "")
        for label, share, colour in rows
        if share is not None
    )


def _verdict(report: Mapping[str, Any]) -> str:
    """What the reward model is worth, in a sentence."""
    accuracy = _share_of(report, "held_out_accuracy", "ci_low", "ci_high", "n")
    if accuracy is None:
        return ""
    text = (
        f"On held-out pairs the reward model prefers what most judges prefer in "
        f"{accuracy.value:.0%} of cases ({span(accuracy, percent=True)})"
    )
    length = _share_of(report, "length_baseline")
    if length is not None:
        text += f", where going by length alone is right in {length.value:.0%}" + (
            "" if accuracy.low > length.value else ": it may have learned little but length"
        )
    return text + "."


def _share_of(
    report: Mapping[str, Any], value: str, low: str = "", high: str = "", n: str = ""
) -> Estimate | None:
    """A share whose interval lies beside it in the same record."""
    parts = {"value": value, "low": low, "high": high, "n": n}
    return _share({part: report.get(name) for part, name in parts.items()})


def _share(value: Any) -> Estimate | None:
    """A share from ``{"value", "low", "high", "n"}``; without an interval its ends coincide."""
    middle = finite(value, "value") if isinstance(value, Mapping) else None
    if middle is None:
        return None
    low, high = finite(value, "low"), finite(value, "high")
    return Estimate(
        value=middle,
        low=middle if low is None else low,
        high=middle if high is None else high,
        n=int(finite(value, "n") or 0),
        method="bootstrap",
    )

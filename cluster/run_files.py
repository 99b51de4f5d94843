"""What a run directory holds, read for the report: every part may be missing or broken.

Nothing here fails because of a file: what cannot be read is ``None``, and why it cannot be read
is in ``problems``, which the page shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from cluster.evaluation import Evaluation, read_evaluation
from cluster.metrics import read_metrics
from cluster.timeline import FILE_NAME as TIMELINE
from cluster.timeline import StepTimeline, read_timeline

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")

METRICS_OF = {
    "base": "base/metrics.jsonl",
    "sft": "sft/metrics.jsonl",
    "reward_model": "reward_model/metrics.jsonl",
    "ppo": "ppo/metrics.jsonl",
}

_SECRET_LINE = re.compile(
    r"^(?P<key>\s*(?:-\s+)?[\"']?(?:\w+_)?(?:token|secret|password|passwd|credential|api_?key)"
    r"[\"']?\s*:)[ \t]*\S.*$",
    re.IGNORECASE | re.MULTILINE,
)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s\"']+@")
_SECRET_PARAMETER = re.compile(
    r"([?&](?:\w+_)?(?:token|secret|password|key)=)[^&\s\"']+", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """Samples written out at one PPO step."""

    step: int
    rows: tuple[dict[str, Any], ...]

    def scores(self) -> list[float]:
        return [float(row["score"]) for row in self.rows]


@dataclass(kw_only=True)
class RunFiles:
    """The parts of a run that are there."""

    directory: Path
    config: dict[str, Any] | None = None
    config_text: str = ""
    """``config.yaml`` as written, without secrets."""
    stages: dict[str, Any] = field(default_factory=dict)
    """Finished stages with their summaries, from ``stages.json``."""
    metrics: dict[str, pd.DataFrame] = field(default_factory=dict)
    """By stage; a stage without a line is not in it."""
    feedback: dict[str, Any] | None = None
    reward_model: dict[str, Any] | None = None
    evaluation: Evaluation | None = None
    samples: tuple[SampleFile, ...] = ()
    timeline: tuple[StepTimeline, ...] = ()
    parameters: int | None = None
    """Weights of the policy."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the directory holds nothing of a run, not even something unreadable."""
        parts = (self.config_text, self.stages, self.metrics, self.samples, self.problems)
        records = (self.feedback, self.reward_model, self.evaluation)
        return not any(parts) and all(record is None for record in records)

    def setting(self, path: str) -> Any:
        """A value of the configuration by ``section.key``, or ``None``."""
        node: Any = self.config
        for part in path.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node


def read_run(directory: Path) -> RunFiles:
    """Reads everything that the report needs.

    Raises:
        FileNotFoundError: There is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such run directory")
    run = RunFiles(directory=directory)

    def attempt(name: str, read: Callable[[Path], T]) -> T | None:
        path = directory / name
        if not path.exists():
            return None
        try:
            return read(path)
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if str(path) in str(error) else f"{path}: {error}"
            run.problems.append(text.replace(f"{directory}/", ""))
            return None

    run.config_text = without_secrets(attempt("config.yaml", _text) or "")
    run.config = attempt("config.yaml", _read_config)
    run.stages = attempt("stages.json", _json_object) or {}
    for stage, name in METRICS_OF.items():
        frame = attempt(name, read_metrics)
        if frame is not None and len(frame):
            run.metrics[stage] = frame
            if "note" in frame.attrs:
                run.problems.append(frame.attrs["note"].replace(f"{directory}/", ""))
    run.feedback = attempt("feedback.json", _json_object)
    for name in ("report.json", "training_report.json"):
        run.reward_model = run.reward_model or attempt(f"reward_model/{name}", _json_object)
    run.evaluation = attempt("evaluation.json", read_evaluation)
    files = sorted((directory / "ppo" / "samples").glob("step_*.jsonl"))
    read = [attempt(str(path.relative_to(directory)), _sample_file) for path in files]
    run.samples = tuple(samples for samples in read if samples and samples.rows)
    run.timeline = tuple(attempt(f"ppo/{TIMELINE}", read_timeline) or ())
    for model in ("ppo/final", "sft", "base"):
        run.parameters = run.parameters or attempt(f"{model}/model.safetensors", _count_weights)
    return run


def without_secrets(text: str) -> str:
    """A configuration's text with the values of secrets replaced by dots."""
    text = _SECRET_LINE.sub(r"\g<key> …", text)
    text = _SECRET_IN_URL.sub("…@", text)
    return _SECRET_PARAMETER.sub(r"\g<1>…", text)


def finite(mapping: Mapping[str, Any], *names: str) -> float | None:
    """The first of ``names`` that is a finite number, or ``None``."""
    for name in names:
        value = mapping.get(name)
        if isinstance(value, (int, float)) and abs(value) < float("inf"):
            return float(value)
    return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping")
    return values


def _json_object(path: Path) -> dict[str, Any]:
    values = json.loads(_text(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def _sample_file(path: Path) -> SampleFile:
    rows = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            float(row["score"]), str(row["prompt"]), str(row["response"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a sample: {error!r}") from None
        rows.append(row)
    return SampleFile(step=int(path.stem.removeprefix("step_")), rows=tuple(rows))


def _count_weights(path: Path) -> int:
    """Weights of a safetensors file, from its header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:
            raise ValueError(f"{path}: not a safetensors file")
        header = json.loads(file.read(length))
    total = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            count = 1
            for size in tensor["shape"]:
                count *= int(size)
            total += count
    return total

"""Records of an evaluation: what a comparison of checkpoints found, as ``evaluation.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cluster.whole_file import replace_text
from reward_service.intervals import Estimate

FILE_NAME = "evaluation.json"
Setting = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One response of one checkpoint."""

    checkpoint: str
    sample_index: int
    text: str
    reward: float
    tokens: int
    finish_reason: Literal["stop", "length"]
    components: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    quality: float | None = None
    good: bool | None = None
    quality_parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptResponses:
    """A prompt and every checkpoint's responses to it."""

    prompt_id: str
    prompt: str
    responses: tuple[Response, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointResult:
    """What one checkpoint's samples come to. ``None`` where it was not measured.

    Lengths are means; shares are of samples. ``distinct_n``, ``self_bleu`` and ``repetition`` are
    defined in ``cluster.text_statistics``.
    """

    name: str
    samples: int
    failed: int
    reward: Estimate
    kl: Estimate | None
    quality: Estimate | None
    good_share: Estimate | None
    quality_parts: dict[str, float]
    eos_rate: Estimate
    length_tokens: Estimate
    length_characters: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    self_bleu: float | None
    repetition: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One checkpoint against the baseline, over the prompts that both answered.

    Attributes:
        by: What decides which of two responses wins.
        win_rate: Share of pairs that ``name`` wins; a tie counts half. With several samples a
            prompt every response meets every response of the other checkpoint.
        wins, ties, losses: Those pairs, counted.
        difference: Mean of ``by``, ``name`` minus ``baseline``, paired by prompt.
    """

    name: str
    baseline: str
    by: Literal["reward", "quality"]
    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    difference: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The whole comparison. ``settings`` says how it was made (temperature, prompts, paths)."""

    checkpoints: tuple[CheckpointResult, ...]
    comparisons: tuple[Comparison, ...]
    prompts: tuple[PromptResponses, ...]
    settings: dict[str, Setting] = field(default_factory=dict)
    format: Literal[1] = 1

    @property
    def baseline(self) -> CheckpointResult:
        return self.checkpoints[0]

    def comparison(self, name: str, by: Literal["reward", "quality"]) -> Comparison | None:
        """``name`` against the baseline, or ``None`` when that was not measured."""
        return next((c for c in self.comparisons if c.name == name and c.by == by), None)


def display_name(checkpoint: str) -> str:
    """``sft`` and ``ppo`` are abbreviations; any other name stays as its owner wrote it."""
    return checkpoint.upper() if checkpoint in ("sft", "ppo", "rlhf", "dpo") else checkpoint


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    """Writes ``evaluation`` as strict JSON, in one atomic replacement.

    Args:
        path: The file, or a directory that gets ``evaluation.json``.
    """
    path = path / FILE_NAME if path.is_dir() else path
    text = json.dumps(asdict(evaluation), ensure_ascii=False, allow_nan=False, indent=1)
    replace_text(path, text + "\n", errors="replace", sync=True)


def read_evaluation(path: Path) -> Evaluation:
    """Reads what ``write_evaluation`` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an evaluation; the message names the first fault.
    """
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `rlhf evaluate` writes it")
    try:
        return TypeAdapter(Evaluation).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(
            f"{path}: not an evaluation: {where}: {first['msg']}; make it anew with `rlhf evaluate`"
        ) from None

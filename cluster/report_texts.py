"""Texts for the page: the same prompt answered by every checkpoint, side by side."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.evaluation import PromptResponses, Response, display_name
from cluster.plots import compact
from cluster.report_outcome import colour_of
from cluster.run_files import RunFiles, SampleFile

RANDOM_PROMPTS = 8
EXTREME_PROMPTS = 2
LONGEST_TEXT = 3000
"""Characters of a text that are shown."""
LONGEST_HEADLINE = 120

_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CJK_RUN = re.compile(rf"[{_CJK}]+")
_TOKEN = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+|\W+")
_WEIGHTY = re.compile(rf"\d+|[A-Z][^\W{_CJK}]+|[^\W{_CJK}]{{5,}}")


@dataclass(frozen=True, kw_only=True)
class ShownText:
    """A response as the page shows it. ``pieces`` are (text, stands in the prompt as well)."""

    checkpoint: str
    colour: str
    pieces: tuple[tuple[str, bool], ...]
    cut: int
    reward: str
    verdict: Literal["good", "faulty", ""]
    faults: tuple[str, ...]
    details: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShownPrompt:
    """A prompt, its short first line apart, and every checkpoint's text."""

    headline: str
    prompt: str
    texts: tuple[ShownText, ...]


@dataclass(frozen=True, kw_only=True)
class TextGroup:
    title: str
    prompts: tuple[ShownPrompt, ...]


def texts_section(run: RunFiles) -> list[TextGroup]:
    """Prompts with every checkpoint's first response: some at random, then the largest changes."""
    evaluation = run.evaluation
    if evaluation is None:
        return []
    names = [c.name for c in evaluation.checkpoints]
    whole = [p for p in evaluation.prompts if {r.checkpoint for r in p.responses} == set(names)]
    chosen = random.Random(0).sample(whole, min(RANDOM_PROMPTS, len(whole)))
    groups = [TextGroup(title="Drawn at random", prompts=_shown(chosen, names))]
    if len(names) > 1:
        rest = sorted((p for p in whole if p not in chosen), key=lambda p: _change(p, names))
        if len(rest) >= 2 * EXTREME_PROMPTS:
            for title, found in (
                ("The largest gains", rest[::-1][:EXTREME_PROMPTS]),
                ("The largest losses", rest[:EXTREME_PROMPTS]),
            ):
                groups.append(TextGroup(title=title, prompts=_shown(found, names)))
    return [group for group in groups if group.prompts]


def headline(prompt: str) -> tuple[str, str]:
    """A prompt's first line, when it is short and more follows, and the rest, cut on the left."""
    first, _, rest = prompt.strip().partition("\n")
    if rest and len(first) <= LONGEST_HEADLINE:
        return first, rest.strip()[-LONGEST_TEXT:]
    return "", prompt.strip()[-LONGEST_TEXT:]


def echoes(prompt: str, text: str) -> tuple[tuple[str, bool], ...]:
    """Cuts ``text`` into pieces, marking words of weight that stand in ``prompt`` as well.

    Words of weight are numbers, capitalised words and words of five letters or more; of CJK text,
    runs of two or more characters that the prompt has too.
    """
    known = set(_WEIGHTY.findall(prompt))
    pieces: list[tuple[str, bool]] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if _CJK_RUN.fullmatch(token):
            pieces += _common_runs(token, prompt)
        else:
            pieces.append((token, token in known))
    return tuple(_merged(pieces))


def _shown(prompts: Sequence[PromptResponses], names: Sequence[str]) -> tuple[ShownPrompt, ...]:
    return tuple(
        ShownPrompt(
            headline=headline(entry.prompt)[0],
            prompt=headline(entry.prompt)[1],
            texts=tuple(
                _shown_text(entry.prompt, _first(entry, name), colour_of(i, len(names)))
                for i, name in enumerate(names)
            ),
        )
        for entry in prompts
    )


def _shown_text(prompt: str, response: Response, colour: str) -> ShownText:
    details = [f"{response.tokens} token{'' if response.tokens == 1 else 's'}"]
    if response.finish_reason == "length":
        details.append("cut off")
    if response.kl is not None and response.kl:
        details.append(f"KL {compact(response.kl)}")
    if response.quality is not None:
        details.append(f"true quality {response.quality:.2f}")
    return ShownText(
        checkpoint=display_name(response.checkpoint),
        colour=colour,
        pieces=echoes(prompt, response.text[:LONGEST_TEXT]),
        cut=max(0, len(response.text) - LONGEST_TEXT),
        reward=compact(response.reward),
        verdict="" if response.good is None else ("good" if response.good else "faulty"),
        faults=tuple(
            name.replace("_", " ") for name, part in response.quality_parts.items() if part < 1
        ),
        details=tuple(details),
    )


def _first(entry: PromptResponses, name: str) -> Response:
    return next(r for r in entry.responses if r.checkpoint == name)


def _change(entry: PromptResponses, names: Sequence[str]) -> float:
    """How much better the last checkpoint's response is than the first's."""
    old, new = _first(entry, names[0]), _first(entry, names[-1])
    if old.quality is not None and new.quality is not None and old.quality != new.quality:
        return new.quality - old.quality
    return 0.0 if old.quality is not None else new.reward - old.reward


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One sample written out while PPO was training."""

    step: int
    headline: str
    prompt: str
    pieces: tuple[tuple[str, bool], ...]
    reward: str


def training_samples(run: RunFiles, steps: int = 5) -> list[TrainingSample]:
    """One sample each from evenly spaced steps: the one whose score is the step's median."""
    files = run.samples
    if not files:
        return []
    count = min(steps, len(files))
    chosen = sorted({round(i * (len(files) - 1) / max(1, count - 1)) for i in range(count)})
    return [_median_sample(files[i]) for i in chosen]


def _median_sample(file: SampleFile) -> TrainingSample:
    rows = sorted(file.rows, key=lambda row: float(row["score"]))
    row = rows[len(rows) // 2]
    prompt, response = str(row["prompt"]), str(row["response"])[:LONGEST_TEXT]
    return TrainingSample(
        step=file.step,
        headline=headline(prompt)[0],
        prompt=headline(prompt)[1],
        pieces=echoes(prompt, response),
        reward=compact(float(row["score"])),
    )


def _common_runs(token: str, prompt: str) -> list[tuple[str, bool]]:
    """The longest runs of ``token``, left to right, that ``prompt`` holds."""
    pieces: list[tuple[str, bool]] = []
    start = 0
    while start < len(token):
        end = start
        while end < len(token) and token[start : end + 1] in prompt:
            end += 1
        marked = end - start >= 2
        step = end - start if marked else 1
        pieces.append((token[start : start + step], marked))
        start += step
    return pieces


def _merged(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Joins neighbours of the same kind."""
    out: list[tuple[str, bool]] = []
    for text, marked in pieces:
        if out and out[-1][1] == marked:
            out[-1] = (out[-1][0] + text, marked)
        else:
            out.append((text, marked))
    return out

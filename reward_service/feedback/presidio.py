"""Presidio beside our own patterns: what needs context or a language model to be recognised.

Optional (``pip install ray-rlhf[privacy]``) and offline: only the entities asked for are looked
for, which leaves out presidio's recognisers of e-mail addresses and URLs, as those fetch a list
from the internet. Without ``spacy_pipeline`` there are patterns only; with it also names of people
and places.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

from reward_service.config import PrivacyConfig
from reward_service.feedback.privacy import Finding, Scanner, scan

LANGUAGE = "en"
"""Of presidio's patterns and their context words; our own patterns know no language."""

ONLINE = ("EMAIL_ADDRESS", "URL")


def scanner_of(config: PrivacyConfig) -> Scanner:
    """The configured scanner, ready to use: this is where a missing package is told.

    Raises:
        ValueError: The packages or the pipeline are not installed, or an entity is unknown.
    """
    if config.scanner == "patterns":
        return scan
    analyse = _analyser(config.spacy_pipeline, config.entities, config.threshold)
    return lambda text: merged(scan(text), analyse(text))


def merged(own: list[Finding], others: list[Finding]) -> list[Finding]:
    """Our own findings, and of the others those that overlap nothing before them."""
    taken = list(own)
    for finding in others:
        if all(finding.end <= old.start or old.end <= finding.start for old in taken):
            taken.append(finding)
    return sorted(taken, key=lambda finding: finding.start)


@cache
def _analyser(
    pipeline: str | None, entities: tuple[str, ...], threshold: float
) -> Callable[[str], list[Finding]]:
    """Presidio's findings in a text, the surest first. Made once: it takes seconds."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError as error:
        raise ValueError(
            f"collect.people.privacy.scanner is 'presidio', but {error.name} is not installed: "
            "pip install ray-rlhf[privacy], or set the scanner to 'patterns'"
        ) from None
    try:
        nlp = spacy.load(pipeline) if pipeline else spacy.blank(LANGUAGE)
    except OSError:
        raise ValueError(
            f"collect.people.privacy.spacy_pipeline {pipeline!r} is neither an installed spaCy "
            f"pipeline nor a directory of one: python -m spacy download {pipeline}"
        ) from None
    # It warns of each recogniser that speaks another language.
    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    engine = SpacyNlpEngine()
    engine.nlp = {LANGUAGE: nlp}  # loaded already: presidio would download one
    registry = RecognizerRegistry(supported_languages=[LANGUAGE])
    registry.load_predefined_recognizers(languages=[LANGUAGE], nlp_engine=engine)
    analyzer = AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[LANGUAGE])
    unknown = sorted(set(entities) - set(analyzer.get_supported_entities(LANGUAGE)))
    if unknown:
        raise ValueError(
            f"collect.people.privacy.entities: presidio knows no {', '.join(unknown)}; it knows "
            f"{', '.join(sorted(set(analyzer.get_supported_entities(LANGUAGE)) - set(ONLINE)))}"
        )

    def analyse(text: str) -> list[Finding]:
        found: list[Any] = analyzer.analyze(
            text, LANGUAGE, entities=list(entities), score_threshold=threshold
        )
        found.sort(key=lambda result: (-result.score, result.start - result.end, result.start))
        return [Finding(r.entity_type.lower(), r.start, r.end) for r in found]

    return analyse

"""What a language of the newswire is made of: names, and sentence templates per topic.

A template is a sentence with slots in braces. Four slots are *facts*, which a story fixes once
and every sentence of it should agree on:

    {place} {number} {org} {person}

Two are free, any value will do: ``{first}`` (a first name, in leads only) and ``{day}``.
``{org}`` is the name alone; the template adds what it is ("{org} Rail").

The words themselves are in ``newswire_english`` and ``newswire_chinese``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FACTS = ("place", "number", "org", "person")
"""The slots that must agree with the headline and lead."""

ROLES = ("event", "detail", "voice", "outlook")
"""What a sentence of a paragraph does; paragraphs keep this order."""

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """One kind of story. Every body sentence must have at least one fact slot."""

    headlines: tuple[str, ...]
    leads: tuple[str, ...]
    """One sentence each, stating all four facts."""
    event: tuple[str, ...]
    detail: tuple[str, ...]
    voice: tuple[str, ...]
    outlook: tuple[str, ...]

    def sentences(self, role: str) -> tuple[str, ...]:
        """Templates of one of ``ROLES``."""
        templates: tuple[str, ...] = getattr(self, role)
        return templates


@dataclass(frozen=True, kw_only=True, slots=True)
class Lexicon:
    """A language: what fills the slots, the topics, the fillers, and how sentences join."""

    language: Literal["en", "zh"]
    values: Mapping[str, tuple[str, ...]]
    """Slot name to the values it can take. No value repeats within a slot."""
    topics: Mapping[str, Topic]
    fillers: tuple[str, ...]
    """Whole sentences that say nothing."""
    filler_marks: tuple[str, ...]
    """Phrases that give padding away, whatever sentence they stand in."""
    joiner: str
    """Between two sentences of a paragraph: a space in English, nothing in Chinese."""
    sentence_end: str
    """Regular expression of the boundary after which the next sentence starts."""

    def fill(self, template: str, slots: Mapping[str, str]) -> str:
        """The template with its slots filled."""
        return _SLOT.sub(lambda match: slots[match.group(1)], template)

    def pattern(self, template: str) -> re.Pattern[str]:
        """A regular expression that matches exactly the fillings of a template.

        Each slot is a named group; no template uses a slot twice.
        """
        parts = _SLOT.split(template)  # text, slot, text, slot, ..., text
        pieces = [
            re.escape(part)
            if index % 2 == 0
            else f"(?P<{part}>{'|'.join(re.escape(v) for v in self.values[part])})"
            for index, part in enumerate(parts)
        ]
        return re.compile("".join(pieces))


def topic(text: str) -> Topic:
    """A topic from a list of templates, one a line.

    Six groups with a blank line between them: headlines, leads, and a group for each of ``ROLES``.
    """
    groups = [tuple(group.splitlines()) for group in text.strip().split("\n\n")]
    headlines, leads, event, detail, voice, outlook = groups
    return Topic(
        headlines=headlines, leads=leads, event=event, detail=detail, voice=voice, outlook=outlook
    )


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for readable lists."""
    return tuple(text.split())


def slots_of(template: str) -> list[str]:
    """Names of the slots in a template, in order."""
    return _SLOT.findall(template)


def lexicon(language: Literal["en", "zh"]) -> Lexicon:
    """The lexicon of a language."""
    if language == "en":
        from actors.newswire_english import ENGLISH

        return ENGLISH
    from actors.newswire_chinese import CHINESE

    return CHINESE

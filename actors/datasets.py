"""Files become validated rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.trajectory import Message


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A prompt before tokenisation: a plain text, or a dialogue.

    Attributes:
        prompt_id: Identity, unique and stable within a data set.
        text: The plain text; empty when ``messages`` are given.
        messages: The dialogue, ending where the assistant should go on.
        meta: The other columns of the row.
    """

    prompt_id: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt with a preferred and a rejected response."""

    example_id: str
    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

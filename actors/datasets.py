"""Files become validated rows: prompts, demonstrations, preferences, plain texts.

Data flow: a source and ``DataConfig`` -> ``data_files.read_rows`` -> a view of each row -> records.
Every complaint is one ValueError: ``FILE:LINE: field 'prompt' ...`` and what to do.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from actors.config import DataConfig
from actors.data_files import Row, kind_of, read_rows
from actors.trajectory import Demonstration, Message

logger = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a chat message that are accepted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPrompt:
    """A prompt before tokenisation: a plain text, or a dialogue.

    Attributes:
        prompt_id: Identity, unique and stable within a data set.
        text: The plain text; empty when ``messages`` are given.
        messages: The dialogue, ending where the assistant should go on.
        meta: The other columns of the row, JSON-able.
    """

    prompt_id: str
    text: str = ""
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt with a preferred and a rejected response. ``prompt`` is empty for a dialogue."""

    example_id: str
    prompt: str
    chosen: str
    rejected: str
    messages: tuple[Message, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Example:
    """A row seen through the configured view."""

    text: str
    messages: tuple[Message, ...]
    response: str | None
    """The response that the view itself gives, or ``None``: it is in a column."""
    used: frozenset[str]
    """Columns that became prompt or response; the others are meta."""


Record = TypeVar("Record")


def load_prompts(source: str, config: DataConfig) -> list[RawPrompt]:
    """Prompts of a source, at most ``config.limit``.

    Raises:
        FileNotFoundError, ValueError: See the module.
    """

    def record(row: Row) -> RawPrompt | None:
        example = _view(row, config)
        if example is None:
            return None
        return RawPrompt(
            prompt_id=_identity(row, config),
            text=example.text,
            messages=example.messages,
            meta=_meta(row, example.used),
        )

    return _load(source, config, record, lambda prompt: prompt.prompt_id)


def load_demonstrations(source: str, config: DataConfig) -> list[Demonstration]:
    """Prompts with the response to learn, at most ``config.limit``.

    Raises:
        FileNotFoundError, ValueError: See the module.
    """

    def record(row: Row) -> Demonstration | None:
        example = _view(row, config)
        if example is None:
            return None
        response = example.response
        if response is None:
            response = _response(
                row, config.response_field, "data.response_field", example.text, example.messages
            )
        return Demonstration(
            example_id=_identity(row, config),
            prompt=example.text,
            response=response,
            messages=example.messages,
        )

    return _load(source, config, record, lambda demonstration: demonstration.example_id)


def load_preferences(source: str, config: DataConfig) -> list[Preference]:
    """Prompts with a chosen and a rejected response, at most ``config.limit``.

    Pairs are read from columns; the views of whole articles and texts do not apply.

    Raises:
        FileNotFoundError, ValueError: See the module.
    """

    def record(row: Row) -> Preference:
        text, messages, response = _prompt(row, config)
        if response is not None:
            raise ValueError(
                f"{row.where}: field {config.prompt_field!r}: the last message is the assistant's, "
                "but a prompt ends where the assistant should go on"
            )
        used = {config.prompt_field, config.chosen_field, config.rejected_field, config.id_field}
        return Preference(
            example_id=_identity(row, config),
            prompt=text,
            chosen=_response(row, config.chosen_field, "data.chosen_field", text, messages),
            rejected=_response(row, config.rejected_field, "data.rejected_field", text, messages),
            messages=messages,
            meta=_meta(row, used),
        )

    return _load(source, config, record, lambda preference: preference.example_id)


def load_corpus(source: str, config: DataConfig) -> list[str]:
    """Whole texts to pre-train on, at most ``config.limit``.

    With ``news_paragraphs`` a text is an article: title and paragraphs, a line each. Otherwise
    it is ``text_field``.

    Raises:
        FileNotFoundError, ValueError: See the module.
    """

    def record(row: Row) -> str:
        if config.news_paragraphs is None:
            return _text(row, config.text_field, "data.text_field")
        title, paragraphs = _article(row, config)
        return "\n".join([title, *paragraphs])

    return _load(source, config, record, None)


def _load(
    source: str,
    config: DataConfig,
    record: Callable[[Row], Record | None],
    identity: Callable[[Record], str] | None,
) -> list[Record]:
    """Records of the rows that have one, with unique identities."""
    skipped, total = 0, 0
    places: dict[str, str] = {}

    def usable() -> Iterator[Record]:
        nonlocal skipped, total
        for row in read_rows(source, config.split):
            total += 1
            made = record(row)
            if made is None:
                skipped += 1
                continue
            if identity is not None:
                first = places.setdefault(identity(made), row.where)
                if first != row.where:
                    raise ValueError(
                        f"{row.where}: field {config.id_field!r}: {identity(made)!r} was already "
                        f"used at {first}: ids must be unique (data.id_field names the column)"
                    )
            yield made

    records = list(islice(usable(), config.limit))
    if skipped:
        logger.warning("%s: skipped %d of %d rows: %s", source, skipped, total, _too_short(config))
    if not records:
        reason = f"all {total} rows were skipped: {_too_short(config)}" if total else "no rows"
        raise ValueError(f"{source}: {reason}")
    return records


def _too_short(config: DataConfig) -> str:
    if config.prompt_words is not None:
        return f"no more words than data.prompt_words = {config.prompt_words}"
    return f"no more paragraphs than data.news_paragraphs = {config.news_paragraphs}"


# --- views of a row ----------------------------------------------------------------------------


def _view(row: Row, config: DataConfig) -> _Example | None:
    """Prompt, and response where the view gives one. ``None``: too short to have a response."""
    if config.news_paragraphs is not None:
        title, paragraphs = _article(row, config)
        if len(paragraphs) <= config.news_paragraphs:
            return None
        known = [title, *paragraphs[: config.news_paragraphs]]
        text = "".join(f"{line}\n" for line in known)
        response: str | None = paragraphs[config.news_paragraphs]
        used = {config.title_field, config.paragraphs_field}
    elif config.prompt_words is not None:
        whole = _text(row, config.text_field, "data.text_field").strip()
        words = list(islice(re.finditer(r"\S+", whole), config.prompt_words + 1))
        if len(words) <= config.prompt_words:
            return None
        text, response = whole[: words[-2].end()], whole[words[-2].end() :]
        used = {config.text_field}
    else:
        text, messages, response = _prompt(row, config)
        used = {config.prompt_field, config.id_field}
        return _Example(text, messages, response, frozenset(used))
    used.add(config.id_field)
    return _Example(*_as_dialogue(text, config), response, frozenset(used))


def _as_dialogue(text: str, config: DataConfig) -> tuple[str, tuple[Message, ...]]:
    """(text, messages): one of them is empty, depending on ``chat_template``."""
    if config.chat_template:
        return "", (Message(role="user", content=text),)
    return text, ()


def _prompt(row: Row, config: DataConfig) -> tuple[str, tuple[Message, ...], str | None]:
    """(text, messages, response) of the prompt column; text or messages are empty.

    A whole dialogue, which ends with the assistant's turn, holds its own response.
    """
    name, key = config.prompt_field, "data.prompt_field"
    value = _value(row, name, key)
    if not isinstance(value, list):
        return *_as_dialogue(_text(row, name, key), config), None
    messages = _messages(row, name, value)
    if messages[-1]["role"] != "assistant":
        return "", messages, None
    if len(messages) == 1 or config.response_field in row.values:
        reason = "nothing before it" if len(messages) == 1 else f"{config.response_field!r} too"
        raise ValueError(
            f"{row.where}: field {name!r}: the last message is the assistant's, so it is the "
            f"response, but there is {reason}"
        )
    return "", messages[:-1], messages[-1]["content"]


def _response(
    row: Row, name: str, key: str, text: str = "", messages: tuple[Message, ...] = ()
) -> str:
    """A response column: a text, the assistant's one message, or the prompt and then that."""
    value = _value(row, name, key)
    if not isinstance(value, list):
        return _text(row, name, key)
    *before, last = _messages(row, name, value)
    prompt = list(messages) or [Message(role="user", content=text)]
    if last["role"] != "assistant" or (before and before != prompt):
        raise ValueError(
            f"{row.where}: field {name!r}: a response is a text, or messages that end with the "
            "assistant's turn and begin with it or with the turns of the prompt"
        )
    return last["content"]


def _article(row: Row, config: DataConfig) -> tuple[str, list[str]]:
    """(title, paragraphs) of a news article; line breaks inside them become spaces."""
    title = _text(row, config.title_field, "data.title_field")
    name = config.paragraphs_field
    value = _value(row, name, "data.paragraphs_field")
    if not isinstance(value, list):
        raise ValueError(
            f"{row.where}: field {name!r} must be a list of texts, got {kind_of(value)}"
        )
    paragraphs = [_checked_text(row, f"{name}[{index}]", part) for index, part in enumerate(value)]
    return _one_line(title), [_one_line(paragraph) for paragraph in paragraphs]


def _one_line(text: str) -> str:
    return " ".join(text.split("\n")).strip()


# --- fields of a row ---------------------------------------------------------------------------


def _value(row: Row, name: str, key: str) -> Any:
    """The value of a column, which must be there; ``key`` is the setting that names it."""
    if name in row.values:
        return row.values[name]
    columns = sorted(map(str, row.values))
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"{row.where}: field {name!r} is missing: {hint}the row has "
        f"{', '.join(repr(c) for c in columns) or 'no fields'} ({key} names the field)"
    )


def _text(row: Row, name: str, key: str) -> str:
    return _checked_text(row, name, _value(row, name, key))


def _checked_text(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{row.where}: field {name!r} must be a text, got {kind_of(value)}")
    if not value.strip():
        raise ValueError(f"{row.where}: field {name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{row.where}: field {name!r} has half a surrogate pair at character "
            f"{error.start + 1}, which is no valid Unicode: repair the escape \\u"
            f"{ord(value[error.start]):04x}"
        ) from None
    return value


def _messages(row: Row, name: str, value: list[Any]) -> tuple[Message, ...]:
    if not value:
        raise ValueError(f"{row.where}: field {name!r} is an empty list of messages")
    messages = []
    for index, message in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            got = f"fields {sorted(message)}" if isinstance(message, dict) else kind_of(message)
            raise ValueError(
                f"{row.where}: field {place!r} must be a message "
                f'{{"role": ..., "content": ...}}, got {got}'
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{row.where}: field '{place}.role' is {message['role']!r}, must be one of "
                f"{', '.join(ROLES)}"
            )
        content = _checked_text(row, f"{place}.content", message["content"])
        messages.append(Message(role=message["role"], content=content))
    return tuple(messages)


def _identity(row: Row, config: DataConfig) -> str:
    """The row's own id, or its place in the file."""
    value = row.values.get(config.id_field)
    if value is None or value == "":
        if config.id_field != DataConfig.model_fields["id_field"].default:
            raise ValueError(f"{row.where}: field {config.id_field!r} is missing or empty")
        return row.default_id
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(
            f"{row.where}: field {config.id_field!r} must be a text or a whole number, "
            f"got {kind_of(value)}"
        )
    return str(value)


def _meta(row: Row, used: frozenset[str] | set[str]) -> dict[str, Any]:
    """The other columns, as JSON can hold them (dates and the like become texts)."""
    meta = {str(name): value for name, value in row.values.items() if name not in used}
    plain: dict[str, Any] = json.loads(json.dumps(meta, default=str))
    return plain

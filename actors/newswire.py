"""A small generated newswire whose quality can be computed exactly.

An article is a headline, a lead that agrees with it, and further paragraphs of mixed quality::

    state  (prompt)    headline + lead
    action (response)  the next paragraph

``generate_newswire`` writes articles; ``true_quality`` reads any text as a next paragraph and says
how good it is. True quality measures outcomes; it is never the reward that PPO trains on.

Data flow: NewswireConfig -> generate_newswire -> Newswire -> corpus (pre-training),
sft_demonstrations (fine-tuning), prompts and held_out_prompts (PPO and evaluation).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

from actors.config import NewswireConfig
from actors.datasets import RawPrompt
from actors.newswire_lexicon import FACTS, ROLES, Lexicon, lexicon, slots_of
from actors.trajectory import Demonstration

Language = Literal["en", "zh"]

FAULT_WEIGHTS = {
    "wrong_fact": 0.12,
    "off_topic": 0.1,
    "repetition": 0.1,
    "thin": 0.34,
    "padded": 0.34,
}
"""How the faults share the blame; they sum to 1.

Faults are drawn independently, fault f with probability ``1 - good_share ** weight[f]``, so the
probability of none of them is exactly ``good_share``, and every single decision (which place to
name, whether to go on) is right in most paragraphs: a model learns the right choice as its most
likely one, yet seldom makes all of them right. Thin and padded weigh most because a small reward
model sees them first; wrong facts weigh little because every one of them is a lesson not to copy.
"""

FULL_LENGTH_SHARE = 0.25
"""Share of paragraphs with all four roles; the others leave one out, but never the outlook.

So a paragraph that is not thin ends with an outlook, and a model need not count to know when.
"""

MIN_SENTENCES, MAX_SENTENCES = 3, 4
"""Sentences of a paragraph that is neither thin nor rambling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Article:
    """One generated article.

    Attributes:
        article_id: ``newswire-en:17`` or, held out, ``newswire-en-held-out:17``.
        headline: One line without a full stop.
        lead: The first paragraph: one sentence that states all facts.
        paragraphs: The paragraphs after the lead.
        faults: For each paragraph the faults it was written with; empty for a good one.
        meta: Language, topic and facts, JSON-able; what ``true_quality`` compares with.
    """

    article_id: str
    headline: str
    lead: str
    paragraphs: tuple[str, ...]
    faults: tuple[tuple[str, ...], ...]
    meta: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Newswire:
    """The generated articles and the views that the stages of training need."""

    articles: tuple[Article, ...]
    held_out: tuple[Article, ...]

    def corpus(self) -> list[str]:
        """Whole articles, one text each: what a base model is trained on."""
        return [prompt_text(a) + "\n".join(a.paragraphs) for a in self.articles]

    def sft_demonstrations(self) -> list[Demonstration]:
        """The next paragraph after headline and lead, good or not."""
        return [
            Demonstration(example_id=a.article_id, prompt=prompt_text(a), response=a.paragraphs[0])
            for a in self.articles
        ]

    def prompts(self) -> list[RawPrompt]:
        """Headline and lead of every training article."""
        return [_raw_prompt(a) for a in self.articles]

    def held_out_prompts(self) -> list[RawPrompt]:
        """Headline and lead of stories that no training article tells."""
        return [_raw_prompt(a) for a in self.held_out]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """How good a next paragraph is. Every part is in [0, 1]; see ``true_quality``."""

    on_topic: float
    consistent: float
    no_repetition: float
    length: float
    no_padding: float
    fluent: float

    @property
    def parts(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def score(self) -> float:
        """Product of the parts, so one bad part cannot be bought back by the others."""
        return math.prod(self.parts.values())

    @property
    def good(self) -> bool:
        """Whether the paragraph is without any fault."""
        return all(part == 1.0 for part in self.parts.values())


def prompt_text(article: Article) -> str:
    """Headline and lead, a line each. The next paragraph follows directly."""
    return f"{article.headline}\n{article.lead}\n"


def generate_newswire(config: NewswireConfig, seed: int) -> Newswire:
    """Write ``config.articles`` training and ``config.held_out`` held-out articles.

    The same configuration and seed give the same articles on every machine. No training article
    shares topic, place and number with a held-out one, so no held-out headline was ever seen.

    Raises:
        ValueError: ``held_out`` would use up more than half of all stories there are.
    """
    lex = lexicon(config.language)
    stories = len(lex.topics) * len(lex.values["place"]) * len(lex.values["number"])
    if config.held_out > stories // 2:
        raise ValueError(
            f"newswire.held_out is {config.held_out}, but the {config.language} newswire has only "
            f"{stories} stories: hold out at most {stories // 2}"
        )
    taken: set[tuple[str, ...]] = set()
    held_out = []
    for index in range(config.held_out):
        rng = random.Random(f"newswire/{config.language}/{seed}/held-out/{index}")
        meta = _story(rng, lex, avoid=taken)
        taken.add(_story_key(meta))
        article_id = f"newswire-{config.language}-held-out:{index}"
        held_out.append(_write_article(rng, lex, meta, article_id, config.good_share))
    articles = []
    for index in range(config.articles):
        rng = random.Random(f"newswire/{config.language}/{seed}/train/{index}")
        meta = _story(rng, lex, avoid=taken)
        article_id = f"newswire-{config.language}:{index}"
        articles.append(_write_article(rng, lex, meta, article_id, config.good_share))
    return Newswire(articles=tuple(articles), held_out=tuple(held_out))


def true_quality(meta: Mapping[str, Any], response_text: str) -> Quality:
    """Quality of ``response_text`` as the next paragraph of the story that ``meta`` tells.

    The text is split into sentences, and each is compared with the templates of the language:
    it is *topical* (fills a template of a topic), *padding* (contains a filler phrase), *old*
    (fills a lead template, which the prompt already said), or *unreadable*. Then:

    ==============  ===========================================================================
    on_topic        share of topical and old sentences that belong to the story's topic
    consistent      share of fact mentions (place, number, org, person) in them that agree
    no_repetition   share of them that say something new: not old, and not the same template
                    twice
    length          n new sentences: 1 for n = 3 or 4, n/3 below, 4/n above
    no_padding      share of all sentences that are not padding
    fluent          share of all sentences that are readable, so cut-off sentences count
    ==============  ===========================================================================

    ``score`` is their product and ``good`` means that all are 1. A text without any topical
    sentence (empty, garbage, fillers only) scores 0. Never raises on any text.

    Raises:
        ValueError: ``meta`` is not that of a newswire prompt.
    """
    try:
        language, topic = meta["language"], meta["topic"]
        facts = {name: meta[name] for name in FACTS}
    except KeyError as error:
        raise ValueError(
            f"true quality needs the meta of a newswire prompt: {error.args[0]!r} is missing, "
            f"there is {sorted(meta)}"
        ) from None
    sentences = split_sentences(language, response_text)
    read = [_read(language, sentence) for sentence in sentences]
    telling = [r for r in read if r is not None and r.kind != "filler"]
    new = {r.template for r in telling if r.kind == "body"}
    mentions = [facts[name] == value for r in telling for name, value in r.facts]
    return Quality(
        on_topic=_share(r.topic == topic for r in telling),
        consistent=_share(mentions),
        no_repetition=len(new) / len(telling) if telling else 0.0,
        length=min(len(new) / MIN_SENTENCES, 1.0, MAX_SENTENCES / max(len(new), 1)),
        no_padding=_share(not _is_padding(language, sentence) for sentence in sentences),
        fluent=_share(r is not None for r in read),
    )


def split_sentences(language: Language, text: str) -> list[str]:
    """Sentences of a text with their punctuation; an unfinished last one included."""
    return [s.strip() for s in re.split(lexicon(language).sentence_end, text) if s.strip()]


# --- writing -----------------------------------------------------------------------------------


def _story(rng: random.Random, lex: Lexicon, avoid: set[tuple[str, ...]]) -> dict[str, str]:
    """Topic and facts of a story whose (topic, place, number) is not in ``avoid``."""
    while True:
        meta = {"language": lex.language, "topic": rng.choice(list(lex.topics))}
        meta |= {name: rng.choice(lex.values[name]) for name in FACTS}
        if _story_key(meta) not in avoid:
            return meta


def _story_key(meta: Mapping[str, str]) -> tuple[str, ...]:
    return meta["topic"], meta["place"], meta["number"]


def _write_article(
    rng: random.Random, lex: Lexicon, meta: Mapping[str, str], article_id: str, good_share: float
) -> Article:
    topic = lex.topics[meta["topic"]]
    written = [_write_paragraph(rng, lex, meta, good_share) for _ in range(rng.randint(1, 3))]
    return Article(
        article_id=article_id,
        headline=_fill(rng, lex, rng.choice(topic.headlines), meta),
        lead=_fill(rng, lex, rng.choice(topic.leads), meta),
        paragraphs=tuple(text for text, _ in written),
        faults=tuple(faults for _, faults in written),
        meta=meta,
    )


def _write_paragraph(
    rng: random.Random, lex: Lexicon, meta: Mapping[str, str], good_share: float
) -> tuple[str, tuple[str, ...]]:
    """A paragraph and the faults that it was given."""
    faults = tuple(f for f, w in FAULT_WEIGHTS.items() if rng.random() < 1 - good_share**w)
    roles = list(ROLES)
    if rng.random() >= FULL_LENGTH_SHARE:
        roles.remove(rng.choice(ROLES[:-1]))
    if "thin" in faults:
        roles = roles[: rng.randint(1, MIN_SENTENCES - 1)]
    topics = [meta["topic"]] * len(roles)
    if "off_topic" in faults:
        other = rng.choice([name for name in lex.topics if name != meta["topic"]])
        start = rng.randrange(len(roles))
        stop = rng.choice((start + 1, len(roles)))
        topics[start:stop] = [other] * (stop - start)
    templates = [
        rng.choice(lex.topics[topic].sentences(role))
        for topic, role in zip(topics, roles, strict=True)
    ]
    facts = dict(meta)
    if "wrong_fact" in faults:
        mentioned = sorted({s for t in templates for s in slots_of(t) if s in FACTS})
        name = rng.choice(mentioned)
        facts[name] = rng.choice([v for v in lex.values[name] if v != meta[name]])
    sentences = [_fill(rng, lex, template, facts) for template in templates]
    if "repetition" in faults:
        source = rng.randrange(len(sentences))
        target = rng.choice((source + 1, len(sentences)))
        sentences.insert(target, sentences[source])
    if "padded" in faults:
        for filler in rng.sample(lex.fillers, rng.randint(1, 2)):
            sentences.insert(rng.randint(0, len(sentences)), filler)
    return lex.joiner.join(sentences), faults


def _fill(rng: random.Random, lex: Lexicon, template: str, facts: Mapping[str, str]) -> str:
    free = {slot: rng.choice(lex.values[slot]) for slot in slots_of(template) if slot not in FACTS}
    return lex.fill(template, {**facts, **free})


def _raw_prompt(article: Article) -> RawPrompt:
    return RawPrompt(
        prompt_id=article.article_id, text=prompt_text(article), meta=dict(article.meta)
    )


# --- reading -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sentence:
    """What a readable sentence says."""

    kind: Literal["body", "lead", "filler"]
    topic: str = ""
    template: str = ""
    facts: tuple[tuple[str, str], ...] = ()


_Pattern = tuple[re.Pattern[str], str, str, Literal["body", "lead"]]


@cache
def _patterns(language: Language) -> list[_Pattern]:
    """(pattern, topic, template, kind) of every sentence that a story can have."""
    lex = lexicon(language)
    patterns: list[_Pattern] = []
    for name, topic in lex.topics.items():
        for role in ROLES:
            patterns += [(lex.pattern(t), name, t, "body") for t in topic.sentences(role)]
        patterns += [(lex.pattern(t), name, t, "lead") for t in topic.leads]
    return patterns


@lru_cache(maxsize=65536)
def _read(language: Language, sentence: str) -> _Sentence | None:
    """What one sentence says, or ``None`` when it fills no template."""
    if sentence in lexicon(language).fillers:
        return _Sentence(kind="filler")
    for pattern, topic, template, kind in _patterns(language):
        if match := pattern.fullmatch(sentence):
            facts = tuple((k, v) for k, v in match.groupdict().items() if k in FACTS)
            return _Sentence(kind=kind, topic=topic, template=template, facts=facts)
    return None


def _is_padding(language: Language, sentence: str) -> bool:
    lowered = sentence.lower()
    return any(mark.lower() in lowered for mark in lexicon(language).filler_marks)


def _share(flags: Any) -> float:
    """Share of true flags; 0 when there are none, so that saying nothing earns nothing."""
    values = list(flags)
    return sum(values) / len(values) if values else 0.0

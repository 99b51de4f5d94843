"""The generated newswire, and the reading of paragraphs that says how good they are."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.config import NewswireConfig
from actors.newswire import (
    FAULT_WEIGHTS,
    Newswire,
    Quality,
    generate_newswire,
    prompt_text,
    split_sentences,
    true_quality,
)
from actors.newswire_lexicon import FACTS, ROLES, lexicon, slots_of

LANGUAGES = ("en", "zh")


@pytest.fixture(scope="module", params=LANGUAGES)
def newswire(request: pytest.FixtureRequest) -> Newswire:
    return generate_newswire(NewswireConfig(language=request.param, articles=2000), seed=3)


# --- the lexicons ------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_topic_has_enough_templates_and_every_sentence_a_fact(language: str) -> None:
    lex = lexicon(language)
    assert len(lex.topics) >= 8
    for topic in lex.topics.values():
        body = [t for role in ROLES for t in topic.sentences(role)]
        assert len(set(body)) == len(body) >= 10
        for template in body:
            assert set(slots_of(template)) & set(FACTS), template
            assert len(slots_of(template)) == len(set(slots_of(template))), template
        for template in topic.leads:
            assert set(FACTS) <= set(slots_of(template)), template
            assert template[-1] in ".。"
        for template in topic.headlines:
            assert {"place", "number"} <= set(slots_of(template)), template
    for values in lex.values.values():
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_filled_template_matches_itself_alone(language: str) -> None:
    """Otherwise a sentence would be read as another topic's, or with other facts."""
    lex = lexicon(language)
    templates = [
        template
        for topic in lex.topics.values()
        for group in (topic.leads, *(topic.sentences(role) for role in ROLES))
        for template in group
    ]
    patterns = [(template, lex.pattern(template)) for template in templates]
    for turn in range(3):
        facts = {name: values[turn] for name, values in lex.values.items()}
        for template in templates:
            sentence = lex.fill(template, facts)
            matches = [t for t, pattern in patterns if pattern.fullmatch(sentence)]
            assert matches == [template]
            groups = lex.pattern(template).fullmatch(sentence).groupdict()  # type: ignore[union-attr]
            assert groups == {slot: facts[slot] for slot in slots_of(template)}
            assert split_sentences(language, sentence) == [sentence]


def test_no_english_line_begins_with_a_fact() -> None:
    """At the start of a line a word is another token: the fact could not be copied as it is."""
    for topic in lexicon("en").topics.values():
        for group in (topic.headlines, topic.leads, *(topic.sentences(role) for role in ROLES)):
            for template in group:
                assert not template.startswith(tuple(f"{{{name}}}" for name in FACTS)), template


@pytest.mark.parametrize("language", LANGUAGES)
def test_fillers_are_marked_and_nothing_else_is(language: str) -> None:
    lex = lexicon(language)
    for filler in lex.fillers:
        assert any(mark in filler for mark in lex.filler_marks), filler
    for topic in lex.topics.values():
        for group in (topic.headlines, topic.leads, *(topic.sentences(role) for role in ROLES)):
            for template in group:
                assert not any(mark.lower() in template.lower() for mark in lex.filler_marks)


# --- writing -----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_articles_on_every_machine() -> None:
    """Digests taken once: they change only when words or drawing change, and then on purpose."""
    config = NewswireConfig(articles=50, held_out=10)

    def digest(language: str, seed: int) -> str:
        wire = generate_newswire(config.model_copy(update={"language": language}), seed)
        texts = wire.corpus() + [p.text for p in wire.held_out_prompts()]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]

    assert digest("en", 0) == digest("en", 0)
    assert digest("en", 0) != digest("en", 1)
    assert (digest("en", 0), digest("zh", 0)) == ("5235c58c89dd3ed6", "abdcf4760a60b3eb")


def test_a_larger_newswire_begins_with_the_smaller_one() -> None:
    small = generate_newswire(NewswireConfig(articles=20, held_out=5), 0)
    large = generate_newswire(NewswireConfig(articles=40, held_out=5), 0)
    assert large.articles[:20] == small.articles


def test_paragraphs_are_good_exactly_when_written_without_a_fault(newswire: Newswire) -> None:
    for article in newswire.articles:
        for paragraph, faults in zip(article.paragraphs, article.faults, strict=True):
            quality = true_quality(article.meta, paragraph)
            assert quality.good == (not faults), (paragraph, faults, quality)
            assert quality.fluent == 1.0


def test_each_fault_lowers_its_own_part(newswire: Newswire) -> None:
    part_of = {
        "wrong_fact": "consistent",
        "off_topic": "on_topic",
        "repetition": "no_repetition",
        "thin": "length",
        "padded": "no_padding",
    }
    seen = set()
    for article in newswire.articles:
        for paragraph, faults in zip(article.paragraphs, article.faults, strict=True):
            parts = true_quality(article.meta, paragraph).parts
            for fault in FAULT_WEIGHTS:
                assert (parts[part_of[fault]] < 1) == (fault in faults), (paragraph, faults, parts)
            seen.update(faults)
    assert seen == set(FAULT_WEIGHTS)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("good_share", [0.1, 0.3, 0.6])
def test_good_share_is_kept(language: str, good_share: float) -> None:
    config = NewswireConfig(language=language, articles=1500, held_out=1, good_share=good_share)
    faults = [f for a in generate_newswire(config, 1).articles for f in a.faults]
    share = sum(not f for f in faults) / len(faults)
    # about 3000 paragraphs: a standard error below 0.009
    assert share == pytest.approx(good_share, abs=0.035)


def test_every_single_fact_is_right_far_more_often_than_not(newswire: Newswire) -> None:
    """Copying from the headline must be the usual thing, or a model would not learn it."""
    right, total = Counter[str](), Counter[str]()
    language = newswire.articles[0].meta["language"]
    lex = lexicon(language)
    for article in newswire.articles:
        for name in FACTS:
            others = [v for v in lex.values[name] if v != article.meta[name]]
            for paragraph in article.paragraphs:
                right[name] += paragraph.count(article.meta[name])
                total[name] += sum(paragraph.count(v) for v in [article.meta[name], *others])
    for name in FACTS:
        assert right[name] / total[name] > 0.75, name


def test_headline_and_lead_agree_with_the_facts(newswire: Newswire) -> None:
    for article in newswire.articles[:300]:
        for name in FACTS:
            assert article.meta[name] in article.lead
        assert article.meta["place"] in article.headline
        assert article.meta["number"] in article.headline
        assert prompt_text(article) == f"{article.headline}\n{article.lead}\n"


def test_held_out_stories_are_not_in_the_training_set(newswire: Newswire) -> None:
    def stories(articles: tuple) -> set:  # type: ignore[type-arg]
        return {(a.meta["topic"], a.meta["place"], a.meta["number"]) for a in articles}

    assert not stories(newswire.articles) & stories(newswire.held_out)
    assert not {a.headline for a in newswire.articles} & {a.headline for a in newswire.held_out}
    assert len(stories(newswire.held_out)) == len(newswire.held_out) == 256


def test_too_many_held_out_stories_are_refused() -> None:
    with pytest.raises(ValueError, match=r"newswire\.held_out is 99999.*at most 2400"):
        generate_newswire(NewswireConfig(articles=10, held_out=99999), 0)


def test_views_of_the_newswire(newswire: Newswire) -> None:
    language = newswire.articles[0].meta["language"]
    article = newswire.articles[17]
    prompt = newswire.prompts()[17]
    assert prompt.prompt_id == f"newswire-{language}:17"
    assert newswire.held_out_prompts()[3].prompt_id == f"newswire-{language}-held-out:3"
    assert prompt.text == prompt_text(article)
    assert json.loads(json.dumps(prompt.meta)) == prompt.meta
    demonstration = newswire.sft_demonstrations()[17]
    assert demonstration.prompt == prompt.text
    assert demonstration.response == article.paragraphs[0]
    text = newswire.corpus()[17]
    assert text == prompt.text + "\n".join(article.paragraphs)
    ids = [p.prompt_id for p in newswire.prompts() + newswire.held_out_prompts()]
    assert len(set(ids)) == len(ids)


# --- reading: paragraphs labelled by hand ------------------------------------------------------

EN = {"language": "en", "topic": "storm", "place": "Dover", "number": "36", "org": "Atlas"}
EN["person"] = "Chen"
ZH = {"language": "zh", "topic": "storm", "place": "海川", "number": "36", "org": "远航"}
ZH["person"] = "王海"

RIVER = "The river in Dover broke its banks before dawn."
BOATS = "Boats from Atlas Rescue carried families to dry ground."
SHELTER = "A shelter of Atlas Rescue is open to people from the 36 homes."
OVER = "Chief Chen said the worst of the storm was over."
ROADS = "Roads in Dover should open again by Friday."
FILLER = "It is what it is, observers noted."

LABELLED = [
    # good: three or four different sentences of the topic, in any order
    (EN, f"{RIVER} {BOATS} {OVER}", {}),
    (EN, f"{OVER} {RIVER} {SHELTER} {ROADS}", {}),
    (EN, f"  {RIVER}  {BOATS} {OVER}\n", {}),
    # thin
    (EN, f"{RIVER} {BOATS}", {"length": 2 / 3}),
    (EN, RIVER, {"length": 1 / 3}),
    # rambling: five new sentences
    (EN, f"{RIVER} {BOATS} {SHELTER} {OVER} {ROADS}", {"length": 4 / 5}),
    # one of three facts wrong: river(place) boats(org) over(person)
    (EN, f"{RIVER.replace('Dover', 'York')} {BOATS} {OVER}", {"consistent": 2 / 3}),
    # river(place) shelter(org, number) over(person)
    (EN, f"{RIVER} {SHELTER.replace('36', '12')} {OVER}", {"consistent": 3 / 4}),
    (EN, f"{RIVER} {BOATS} {OVER.replace('Chen', 'Silva')}", {"consistent": 2 / 3}),
    # the same template twice, even with another free word
    (EN, f"{RIVER} {RIVER} {BOATS} {OVER}", {"no_repetition": 3 / 4}),
    (
        EN,
        f"{RIVER} {BOATS} {ROADS} {ROADS.replace('Friday', 'Monday')}",
        {"no_repetition": 3 / 4},
    ),
    (EN, f"{RIVER} {RIVER} {RIVER}", {"no_repetition": 1 / 3, "length": 1 / 3}),
    # padded; a filler does not make a thin paragraph long enough
    (EN, f"{RIVER} {FILLER} {BOATS} {OVER}", {"no_padding": 3 / 4}),
    (EN, f"{RIVER} {FILLER} {BOATS}", {"no_padding": 2 / 3, "length": 2 / 3}),
    # a filler phrase in a sentence of the model's own: padding, and not readable
    (
        EN,
        f"{RIVER} {BOATS} {OVER} Time will tell for Dover.",
        {"no_padding": 3 / 4, "fluent": 3 / 4},
    ),
    # off topic: the hospital's sentence
    (EN, f"{RIVER} {BOATS} Every patient gets a window, Chen said.", {"on_topic": 2 / 3}),
    (
        EN,
        "The old ward in Dover had become too small. "
        "The Atlas Clinic also hired nurses for the ward. Every patient gets a window, Chen said.",
        {"on_topic": 0.0},
    ),
    # the lead again: consistent, on topic, and nothing new
    (
        EN,
        f"A storm flooded 36 homes in Dover on Monday, said Anna Chen of Atlas Rescue. {RIVER} "
        f"{BOATS} {OVER}",
        {"no_repetition": 3 / 4},
    ),
    # cut off in the middle of a sentence, or of a word
    (EN, f"{RIVER} {BOATS} {OVER} Roads in Do", {"fluent": 3 / 4}),
    (EN, f"{RIVER} {BOATS} Chief Chen said the worst of", {"fluent": 2 / 3, "length": 2 / 3}),
    # a place that does not exist, a sentence glued to the next
    (EN, f"{RIVER.replace('Dover', 'Doverton')} {BOATS} {OVER} {ROADS}", {"fluent": 3 / 4}),
    (EN, f"{RIVER}{BOATS} {OVER} {SHELTER}", {"fluent": 2 / 3, "length": 2 / 3}),
    # several faults at once multiply
    (
        EN,
        f"{RIVER.replace('Dover', 'York')} {FILLER} {RIVER.replace('Dover', 'York')}",
        {"consistent": 0.0, "no_padding": 2 / 3, "no_repetition": 1 / 2, "length": 1 / 3},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。远航救援队正在为36户人家抽水。队长王海：雨来得比预想的快。",
        {},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。远航救援队用小船把居民送到高处。队长王海感谢帮忙装沙袋的居民。"
        "周五以前海川可能还有大雨。",
        {},
    ),
    (ZH, "队长王海：最坏的时候已经过去。", {"length": 1 / 3}),
    (
        ZH,
        "夜里，云泽的街道水位不断上升。远航救援队正在为36户人家抽水。队长王海：雨来得比预想的快。",
        {"consistent": 3 / 4},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。时间会说明一切。远航救援队正在为36户人家抽水。"
        "队长王海：雨来得比预想的快。",
        {"no_padding": 3 / 4},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。远航救援队正在为36户人家抽水。远航救援队正在为36户人家抽水。"
        "队长王海：雨来得比预想的快。",
        {"no_repetition": 3 / 4},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。远航救援队正在为36户人家抽水。医生王海：每个病人都有一个窗户。",
        {"on_topic": 2 / 3},
    ),
    (
        ZH,
        "夜里，海川的街道水位不断上升。远航救援队正在为36户人家抽水。队长王海：雨来得比",
        {"fluent": 2 / 3, "length": 2 / 3},
    ),
]


@pytest.mark.parametrize(("meta", "text", "imperfect"), LABELLED)
def test_quality_of_paragraphs_labelled_by_hand(
    meta: dict[str, str], text: str, imperfect: dict[str, float]
) -> None:
    expected = dict.fromkeys(Quality.__slots__, 1.0) | imperfect
    quality = true_quality(meta, text)
    assert quality.parts == pytest.approx(expected)
    product = 1.0
    for part in expected.values():
        product *= part
    assert quality.score == pytest.approx(product)
    assert quality.good == (not imperfect)


@pytest.mark.parametrize("meta", [EN, ZH], ids=LANGUAGES)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n ",
        ".",
        "...",
        "。。。",
        "the the the the",
        "36 Dover Atlas Chen",
        "\x00\ud800",
        FILLER,
        "海川36远航王海",
        "Storm floods 36 homes in Dover",
        "Dover. Dover. Dover. Dover.",
    ],
)
def test_trivial_texts_earn_nothing(meta: dict[str, str], text: str) -> None:
    quality = true_quality(meta, text)
    assert quality.score == 0.0
    assert not quality.good


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_short_way_to_a_good_paragraph(language: str) -> None:
    """One sentence however often, the prompt itself, fillers, or another story's paragraph."""
    wire = generate_newswire(NewswireConfig(language=language, articles=200, held_out=50), 0)
    goods = [a for a in wire.articles if not a.faults[0]]
    for article, other in zip(goods, [*goods[1:], goods[0]], strict=True):
        first = split_sentences(language, article.paragraphs[0])[0]
        joiner = lexicon(language).joiner
        assert true_quality(article.meta, article.paragraphs[0]).score == 1.0
        assert true_quality(article.meta, joiner.join([first] * 4)).score < 0.2
        assert true_quality(article.meta, joiner.join([article.lead] * 3)).score == 0.0
        assert not true_quality(article.meta, prompt_text(article)).good
        assert not true_quality(article.meta, other.paragraphs[0]).good


@settings(max_examples=200, deadline=None)
@given(
    meta=st.sampled_from([EN, ZH]),
    pieces=st.lists(
        st.one_of(
            st.sampled_from([RIVER, BOATS, OVER, ROADS, FILLER, "队长王海：雨来得比预想的快。"]),
            st.text(max_size=30),
        ),
        max_size=8,
    ),
    separator=st.sampled_from([" ", "", "\n", ". "]),
)
def test_any_text_has_a_quality(meta: dict[str, str], pieces: list[str], separator: str) -> None:
    quality = true_quality(meta, separator.join(pieces))
    assert all(0.0 <= part <= 1.0 for part in quality.parts.values())
    assert 0.0 <= quality.score <= 1.0
    assert quality.good == (quality.score == 1.0)


def test_meta_of_another_data_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"newswire prompt: 'language' is missing.*'answer'"):
        true_quality({"answer": "42"}, "text")

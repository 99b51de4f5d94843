"""Presidio beside our own patterns. Its own tests need the package (requirements/privacy.txt)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from reward_service.config import CollectConfig, PeopleConfig, PrivacyConfig
from reward_service.feedback import presidio
from reward_service.feedback.assignment import Assignments
from reward_service.feedback.presidio import merged, scanner_of
from reward_service.feedback.privacy import Finding, mask, scan
from reward_service.feedback.store import FeedbackStore


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    monkeypatch.setitem(sys.modules, "spacy", None)
    presidio._analyser.cache_clear()
    config = PrivacyConfig(scanner="presidio")
    with pytest.raises(ValueError, match=r"pip install ray-rlhf\[privacy\]"):
        scanner_of(config)
    with FeedbackStore(tmp_path / "f.sqlite") as store:
        with pytest.raises(ValueError, match="scanner is 'presidio'"):
            Assignments(store, PeopleConfig(privacy=config))
    assert scanner_of(CollectConfig().people.privacy) is scan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entities": ("PERSON",)}, "PERSON need privacy.spacy_pipeline"),
        ({"entities": ("URL", "CRYPTO")}, "leave out EMAIL_ADDRESS"),
    ],
)
def test_what_cannot_work_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PrivacyConfig(scanner="presidio", **values)


def test_findings_are_merged_without_overlap() -> None:
    own = [Finding("email", 5, 10)]
    others = [Finding("person", 12, 20), Finding("person", 8, 14), Finding("x", 0, 5)]
    # the second overlaps both; the last ends where ours begins
    assert merged(own, others) == [others[2], own[0], others[0]]


@pytest.fixture(scope="module")
def package() -> None:
    pytest.importorskip(
        "presidio_analyzer", reason="presidio is not here: pip install -r requirements/privacy.txt"
    )
    presidio._analyser.cache_clear()


def test_presidio_finds_what_our_patterns_cannot(package: None) -> None:
    scanner = scanner_of(PrivacyConfig(scanner="presidio"))
    text = (
        "NHS number 9434765919, DEA number BB1388568, mail a@b.org, pay to"
        " 16Yeky6GMjeNkAiNcBY7ZhrLoMSgg1BoyZ by 2024-11-25; see www.example.org"
    )
    shown = mask(text, scanner).text
    assert shown == (
        "NHS number [uk_nhs], DEA number [medical_license], mail [email], pay to"
        " [crypto] by 2024-11-25; see www.example.org"
    )
    assert mask(shown, scanner).text == shown
    assert mask(text).text == text.replace("a@b.org", "[email]")
    plain = "In 2024, 1,234,567 people paid 12.50; version 1.2.3 of 12:30."
    assert scanner(plain) == []
    assert mask("身份证号11010519491231002X", scanner).text == "身份证号[chinese_id]"


def test_names_with_a_pipeline(package: None, tmp_path: Path) -> None:
    import spacy

    nlp = spacy.blank("en")
    ruler = nlp.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Ines Varga"}])
    nlp.to_disk(tmp_path / "names")
    config = PrivacyConfig(
        scanner="presidio", entities=("PERSON",), spacy_pipeline=str(tmp_path / "names")
    )
    assert mask("Mayor Ines Varga, a@b.org.", scanner_of(config)).text == (
        "Mayor [person], [email]."
    )
    missing = config.model_copy(update={"spacy_pipeline": "no_such_pipeline"})
    with pytest.raises(ValueError, match="python -m spacy download no_such_pipeline"):
        scanner_of(missing)
    strange = PrivacyConfig(scanner="presidio", entities=("SHOE_SIZE",))
    with pytest.raises(ValueError, match=r"presidio knows no SHOE_SIZE; it knows .*US_SSN"):
        scanner_of(strange)

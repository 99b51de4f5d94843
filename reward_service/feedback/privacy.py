"""Personal data in texts: found by its form and its check digits, and masked.

E-mail addresses, telephone numbers, payment cards (Luhn's check digit), IBANs (ISO 7064 mod 97),
IP addresses, and the Chinese resident identity number (GB 11643: date and check digit) and mobile
number. Names and postal addresses have no form that a pattern could know; they are not found.
Where a number could be several things, the one with a check digit wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from ipaddress import ip_address

# Latin with accents (written either way), Greek and Cyrillic, but no script without spaces: the
# words before an address are no part of it.
_LETTERS = "A-Za-z0-9._%+\\-\u00c0-\u024f\u0300-\u052f"
_BEFORE, _AFTER = r"(?<![\dA-Za-z])", r"(?![\dA-Za-z])"


@dataclass(frozen=True, slots=True)
class Finding:
    """A piece of personal data: what it is, and where in the text."""

    kind: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with each finding replaced by ``[kind]``."""

    text: str
    findings: tuple[Finding, ...]


Scanner = Callable[[str], list[Finding]]
"""Personal data in a text, in order, without overlaps: ``scan``, or another of that form."""


def scan(text: str) -> list[Finding]:
    """Personal data in a text, in order, without overlaps."""
    taken: list[Finding] = []
    for kind, pattern, is_real in _KINDS:
        for match in pattern.finditer(text):
            start, end = match.span()
            free = all(end <= other.start or other.end <= start for other in taken)
            if free and is_real(match.group()):
                taken.append(Finding(kind, start, end))
    return sorted(taken, key=lambda finding: finding.start)


def mask(text: str, scanner: Scanner = scan) -> Masked:
    """``mail a@b.org`` becomes ``mail [email]``. Masking again changes nothing."""
    findings = tuple(scanner(text))
    return Masked("".join(_pieces(text, findings)), findings)


def _pieces(text: str, findings: tuple[Finding, ...]) -> Iterator[str]:
    end = 0
    for finding in findings:
        yield text[end : finding.start]
        yield f"[{finding.kind}]"
        end = finding.end
    yield text[end:]


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: from the right, every second digit doubled, sum divisible by 10."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _is_card(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


def _is_iban(text: str) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, mod 97 is 1."""
    plain = re.sub(r"\s", "", text).upper()
    if not 15 <= len(plain) <= 34:
        return False
    moved = plain[4:] + plain[:4]
    return int("".join(str(int(character, 36)) for character in moved)) % 97 == 1


def _is_chinese_id(text: str) -> bool:
    """GB 11643-1999: a date of birth, and a check digit over weights 2^(17 - i) mod 11."""
    try:
        born = date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    total = sum(int(digit) * (2 ** (17 - place) % 11) for place, digit in enumerate(text[:17]))
    return born.year >= 1850 and text[17].upper() == "10X98765432"[total % 11]


def _is_ip(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    """8 to 15 digits (E.164); without + or a leading 0 only when written as groups."""
    digits = re.sub(r"\D", "", text)
    if not 8 <= len(digits) <= 15 or re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        return False
    return text.startswith(("+", "(", "0")) or len(re.findall(r"\d+", text)) >= 3


def _is_dotted_phone(text: str) -> bool:
    """8 to 15 digits, and no date: dots also part decimals, versions and thousands."""
    return 8 <= len(re.sub(r"\D", "", text)) <= 15 and not re.match(
        r"\d{2}\.\d{2}\.(?:19|20)\d{2}(?!\d)", text
    )


def _always(_: str) -> bool:
    return True


# Ends of Chinese domains are named: any others would take the words that follow with them.
_TOP = (
    "xn--[A-Za-z0-9-]{2,59}|[A-Za-z]{2,24}|[\u00c0-\u024f\u0370-\u052f]{2,24}"
    "|中国|中國|公司|网络|網絡|网址|香港|台湾|台灣"
)
_EMAIL = rf"(?<![{_LETTERS}])[{_LETTERS}]{{1,64}}@(?:[\w\u0300-\u036f-]{{1,63}}\.)+(?:{_TOP})"
_IBAN = r"[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?"
_IPV4 = r"\d{1,3}(?:\.\d{1,3}){3}"
_IPV6 = (
    r"(?:[0-9A-Fa-f]{1,4}:){2,7}[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{1,4}){0,6}"
    r"|::(?:[0-9A-Fa-f]{1,4}:){0,6}[0-9A-Fa-f]{1,4}"
)
_MOBILE = r"(?:\+?86[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2}"
_PHONE = r"(?:\+|\()?\d(?:[ ()/-]{0,2}\d){6,14}"
# +1.555.123.4567 and +33 (0)1.23.45.67.89; 01.23.45.67.89; 555.123.4567 and (415) 555.2671
_DOTTED = (
    r"\+[1-9]\d{0,2}(?:[. ]?\(\d{1,4}\)[. ]?\d{1,4}(?:\.\d{2,4}){1,5}"
    r"|[. ]\d{1,4}(?:\.\d{2,4}){2,5})"
    r"|(?:\(0\d{1,4}\)[. ]?\d{2,4}|0\d{1,4}\.\d{2,4})(?:\.\d{2,4}){1,4}"
    r"|(?:1[. ])?(?:\(\d{3}\)[. ]?|\d{3}\.)\d{3}\.\d{4}"
)

_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", re.compile(_EMAIL), _always),
    ("iban", re.compile(f"{_BEFORE}{_IBAN}{_AFTER}"), _is_iban),
    ("chinese_id", re.compile(rf"{_BEFORE}[1-9]\d{{16}}[\dXx]{_AFTER}"), _is_chinese_id),
    ("card", re.compile(rf"{_BEFORE}\d(?:[ -]?\d){{12,18}}{_AFTER}"), _is_card),
    ("ip", re.compile(rf"(?<![\w.:])(?:{_IPV4}|{_IPV6})(?![\w:]|\.\d)", re.ASCII), _is_ip),
    ("chinese_mobile", re.compile(f"{_BEFORE}{_MOBILE}{_AFTER}"), _always),
    (
        "phone",
        re.compile(rf"(?<![\dA-Za-z.,]){_PHONE}(?![\dA-Za-z]|[.,]\d)"),
        _is_phone,
    ),
    (
        "phone",
        re.compile(rf"(?<![\dA-Za-z])(?<!\d[.,])(?:{_DOTTED})(?![\dA-Za-z]|[.,]\d)"),
        _is_dotted_phone,
    ),
)
"""In order of how sure their form is: kind, pattern, and whether a match is real."""

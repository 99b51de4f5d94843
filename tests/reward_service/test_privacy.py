"""The scanner on numbers with known check digits, and what it must leave alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.feedback.privacy import luhn, mask, scan


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to ana.maria+x@mail.example.org, please", "write to [email], please"),
        ("邮箱是li@example.cn。", "邮箱是[email]。"),
        # test numbers of the card networks
        ("card 4111 1111 1111 1111 ok", "card [card] ok"),
        ("5500-0000-0000-0004", "[card]"),
        ("378282246310005", "[card]"),
        # examples of the IBAN registry
        ("GB82 WEST 1234 5698 7654 32", "[iban]"),
        ("to DE89370400440532013000.", "to [iban]."),
        ("from 192.168.0.17 and 2001:db8::ff00:42:8329", "from [ip] and [ip]"),
        # the example of GB 11643-1999
        ("身份证号11010519491231002X，请保密", "身份证号[chinese_id]，请保密"),
        ("手机13800138000", "手机[chinese_mobile]"),
        ("+86 138 0013 8000", "[chinese_mobile]"),
        ("call +44 20 7946 0958 or (415) 555-2671", "call [phone] or [phone]"),
        ("Tel. 030/123456-78", "Tel. [phone]"),
        ("call +1.555.123.4567 or 555.123.4567.", "call [phone] or [phone]."),
        ("Tél.01.23.45.67.89, +33 (0)1.23.45.67.89", "Tél.[phone], [phone]"),
        ("(415) 555.2671 or +1 (415) 555.2671", "[phone] or [phone]"),
        ("write to info@müller.de or müller@example.de", "write to [email] or [email]"),
        (
            "почта@пример.рф, info@例子.中国 and a@xn--mller-kva.xn--p1ai",
            "[email], [email] and [email]",
        ),
        ("发到li@example.cn谢谢", "发到[email]谢谢"),
        ("a@b.org and a@b.org", "[email] and [email]"),
    ],
)
def test_personal_data_is_masked(text: str, masked: str) -> None:
    assert mask(text).text == masked


@pytest.mark.parametrize(
    "text",
    [
        "In 2024, 1,234,567 people paid 12.50 on 2024-11-25 at 10:30:45.",
        "4111111111111112",  # wrong check digit
        "110105194912310021",  # wrong check digit of an identity number
        "GB82 WEST 1234 5698",
        "version 1.2.3 and 300.1.1.1",
        "pi is 3.14159, +3.14159265 or 3.14159265358979; version 10.0.19041.1234",
        "on 01.02.2024, 2024.12.31 and 01.02.24; 1.234.567.890 people, +12.5 or 1,234.5678",
        "user@localhost, @handle, a@b",
        "ISBN 978 has 3 parts; order 12345678 came",
        "std::vector<int> and 12:30",
        "第20241125期，共12345678人",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert scan(text) == []


def test_luhn_of_the_standards_example() -> None:
    # ISO/IEC 7812-1: 7992739871 has the check digit 3
    assert [d for d in range(10) if luhn(f"7992739871{d}")] == [3]


@given(st.text(alphabet="0123456789 @.+-()abcX:你/", max_size=60))
def test_masking_again_changes_nothing_and_findings_are_in_order(text: str) -> None:
    once = mask(text)
    assert mask(once.text).text == once.text
    ends = [0]
    for finding in once.findings:
        assert ends[-1] <= finding.start < finding.end <= len(text)
        ends.append(finding.end)

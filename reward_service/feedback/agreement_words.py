"""How to read the figures of agreement, in plain sentences, in each language of the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Language = Literal["en", "zh"]

READINGS: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "percent": "Two judges of the same item say the same in {value:.0%} of cases; by chance"
        " alone some of that would happen too.",
        "cohen": "Of the agreement of two judges that chance leaves open, they reach {value:.0%}.",
        "fleiss": "Of the agreement of all judges that chance leaves open, they reach"
        " {value:.0%}; a rare choice makes it harsh.",
        "alpha": "1 is perfect, 0 is chance: {words}.",
        "graded_alpha": "The same with 'slightly' nearer to a tie than 'by far': {words}.",
        "ac1": "1 is perfect, 0 is chance, and a rare choice does not hurt it: {words}.",
    },
    "zh": {
        "percent": "两位评判者对同一条内容给出相同回答的比例为 {value:.0%}；其中一部分纯属偶然。",
        "cohen": "除去偶然一致后，两位评判者达到了其余部分的 {value:.0%}。",
        "fleiss": "除去偶然一致后，全体评判者达到了其余部分的 {value:.0%}；"
        "若某个选项很少见，此值偏低。",
        "alpha": "1 为完全一致，0 为偶然水平：{words}。",
        "graded_alpha": "同上，但“略好”比“好得多”更接近平局：{words}。",
        "ac1": "1 为完全一致，0 为偶然水平，不受少见选项影响：{words}。",
    },
}
"""How to read each coefficient."""

_LEVELS: Mapping[Language, tuple[str, str, str, str]] = {
    "en": (
        "judgements to rely on",
        "enough agreement for tentative conclusions",
        "agreement well beyond chance, but many pairs are matters of taste or noise",
        "hardly more agreement than chance: look at the guidelines and the pairs",
    ),
    "zh": (
        "评判可靠",
        "一致程度足以得出初步结论",
        "一致程度明显高于偶然，但许多内容取决于个人喜好或噪声",
        "几乎不高于偶然：请检查评判说明和内容",
    ),
}

_SUMMARY: Mapping[Language, Mapping[str, str]] = {
    "en": {
        "alone": "{judges} compared {items}; no pair was seen by two of them, so their agreement"
        " is unknown.",
        "percent": "{judges} compared {items}. Two judges of a pair say the same in {percent:.0%}"
        " of cases",
        "one_choice": ", but all use one choice only, so nothing was told apart.",
        "coefficients": " (Krippendorff's alpha {alpha}, Gwet's AC1 {ac1}): {words}.",
        "harsh": " One choice is so common that alpha is harsh here: AC1 is the fairer figure.",
        "ceiling": " One judge agrees with the majority of the others in {value:.0%} of pairs:"
        " about the best that a reward model can reach against single judgements.",
        "accuracy": " Where the majority prefers one, it is the truly better one in {value:.0%}.",
        "swayed": " Position or length clearly sways {names}.",
        "rankings": " This includes all pairs of {count}.",
        "ratings": " {count} on {names}.",
    },
    "zh": {
        "alone": "{judges}比较了 {items}；没有一对被两人看过，因此无法得知一致程度。",
        "percent": "{judges}比较了 {items}。两人看同一对时，{percent:.0%} 的情况回答相同",
        "one_choice": "，但所有人只用了一个选项，没有作出区分。",
        "coefficients": "（Krippendorff alpha {alpha}，Gwet AC1 {ac1}）：{words}。",
        "harsh": "某个选项过于常见，alpha 在此偏低：AC1 更为公允。",
        "ceiling": "一人与其余多数人一致的比例为 {value:.0%}："
        "奖励模型面对单个评判时大致以此为上限。",
        "accuracy": "多数人有所偏好时，{value:.0%} 的情况选中了真正更好的一篇。",
        "swayed": "位置或长度明显影响了 {names}。",
        "rankings": "其中包括 {count}的所有文本对。",
        "ratings": "另有 {count}，标准：{names}。",
    },
}


def reading(name: str, value: float, language: Language = "en") -> str:
    """How to read one coefficient of ``READINGS``."""
    return READINGS[language][name].format(value=value, words=level(value, language))


def level(alpha: float, language: Language = "en") -> str:
    """Krippendorff's own bounds: 0.8 to rely on, 0.667 for tentative conclusions."""
    reliable, tentative, noisy, chance = _LEVELS[language]
    if alpha >= 0.8:
        return reliable
    if alpha >= 0.667:
        return tentative
    return noisy if alpha >= 0.2 else chance


def summary(report: Mapping[str, Any], language: Language = "en") -> str:
    """One paragraph on an agreement report, in plain words.

    Where it has ``rankings`` and ``ratings`` (see ``store_report``), they are counted too.
    """
    say = _SUMMARY[language]
    rankings, ratings = report.get("rankings", 0), report.get("ratings", {})
    text = _compared(report, language) if report["items"] or not ratings else ""
    if rankings:
        text += say["rankings"].format(count=_number(rankings, "ranking", " 次排序", language))
    if ratings:
        count = sum(found["ratings"] for found in ratings.values())
        text += say["ratings"].format(
            count=_number(count, "rating", " 个评分", language),
            names=("、" if language == "zh" else ", ").join(ratings),
        )
    return text.strip()


def _compared(report: Mapping[str, Any], language: Language) -> str:
    say = _SUMMARY[language]
    counted = {
        "judges": _number(report["judges"], "judge", " 位评判者", language),
        "items": _number(report["items"], "pair", " 对文本", language),
    }
    percent, alpha, ac1 = report["percent"], report["alpha"], report["ac1"]
    if percent is None:
        return say["alone"].format(**counted)
    text = say["percent"].format(**counted, percent=percent["value"])
    if alpha is None:
        return text + say["one_choice"]
    text += say["coefficients"].format(
        alpha=_with_interval(alpha), ac1=_with_interval(ac1), words=level(alpha["value"], language)
    )
    if ac1["value"] - alpha["value"] > 0.2:
        text += say["harsh"]
    if report["leave_one_out"] is not None:
        text += say["ceiling"].format(value=report["leave_one_out"]["value"])
    if report["majority_accuracy"] is not None:
        text += say["accuracy"].format(value=report["majority_accuracy"]["value"])
    swayed = [judge["judge"] for judge in report["per_judge"] if _is_swayed(judge)]
    if swayed:
        text += say["swayed"].format(names=("、" if language == "zh" else ", ").join(swayed))
    return text


def _is_swayed(judge: Mapping[str, Any]) -> bool:
    first, longer = judge["first_share"], judge["longer_excess"]
    by_position = first is not None and not first["low"] <= 0.5 <= first["high"]
    return by_position or (longer is not None and not longer["low"] <= 0.0 <= longer["high"])


def _with_interval(measured: Mapping[str, Any]) -> str:
    if measured["low"] is None:
        return f"{measured['value']:.2f}"
    return f"{measured['value']:.2f} [{measured['low']:.2f}, {measured['high']:.2f}]"


def _number(count: int, noun: str, chinese: str, language: Language) -> str:
    if language == "zh":
        return f"{count}{chinese}"
    return f"{count} {noun}{'' if count == 1 else 's'}"

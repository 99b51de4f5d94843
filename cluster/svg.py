"""From a matplotlib figure to an ``<svg>`` that is part of a page: its colours, its font."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from typing import Any, Literal

Colour = Literal[
    "ink", "muted", "grid", "paper", "after", "before", "third", "fourth", "fifth", "sixth"
]

PLACEHOLDERS: dict[Colour, str] = {
    "ink": "#010a01", "muted": "#010b01", "grid": "#010c01", "paper": "#010d01",
    "after": "#020a02", "before": "#020b02", "third": "#020c02", "fourth": "#020d02",
    "fifth": "#020e02", "sixth": "#020f02",
}  # fmt: skip
"""What matplotlib is told; the page's variable takes each one's place afterwards."""

PRINT_COLOURS: dict[Colour, str] = {
    "ink": "#1c2024", "muted": "#687076", "grid": "#e6e4df", "paper": "#ffffff",
    "after": "#0b7a75", "before": "#c2570c", "third": "#4f46e5", "fourth": "#be185d",
    "fifth": "#64748b", "sixth": "#a16207",
}  # fmt: skip

WIDTH, HEIGHT = 280, 168
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's font
    "svg.hashsalt": "report",  # the same data gives the same bytes
    "font.size": 10.5,
    "axes.linewidth": 0.8,
    "path.simplify": True,
}

_COLOUR_OF = {hex_: f"var(--{name})" for name, hex_ in PLACEHOLDERS.items()}
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL), ""),
    (re.compile(r'<g id="[^"]*"'), "<g"),
    (re.compile(r' transform="rotate\(-0 [^"]*\)"'), ""),
    (re.compile(r"font-family: [^;\"]+"), "font-family: var(--sans)"),
    (re.compile(r"font: ([\d.]+)px [^;\"]+"), r"font: \1px var(--sans)"),
    (re.compile(r"\s*\n\s*"), "\n"),
)
_ID = re.compile(r'(\bid="|url\(#|href="#)')


def to_svg(figure: Any, label: str, size: tuple[float, float] = (WIDTH, HEIGHT)) -> str:
    """The figure as an ``<svg>`` to put into a page: no header, no addresses, no fixed size, ids
    that no other figure has, and the page's colours and font. ``size`` is in pixels."""
    import matplotlib
    from markupsafe import escape

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # A name may have characters that the font used for measuring lacks; the page has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in _REWRITES:
        body = pattern.sub(replacement, body)
    # matplotlib makes the same ids in every figure; a page may have each only once.
    prefix = "c" + hashlib.sha256((label + body).encode(errors="replace")).hexdigest()[:10]
    body = _ID.sub(rf"\g<1>{prefix}-", body)
    for placeholder, variable in _COLOUR_OF.items():
        body = body.replace(placeholder, variable)
    return (
        f'<svg viewBox="0 0 {size[0]:g} {size[1]:g}" role="img" aria-label="{escape(label)}">'
        f"\n{body.strip()}"
    )

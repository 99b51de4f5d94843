"""Text files that others read at any moment, and that a process may die while writing."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str, *, errors: str = "strict", sync: bool = False) -> None:
    """Put ``text`` (UTF-8) in place of the file: whoever looks sees all of the old or of the new.

    Args:
        errors: As of ``open``: "replace" where a lone surrogate must not cost the file.
        sync: Also flush to disk before it takes the old one's place.

    Raises:
        OSError: The disk is full or read-only; the old file is untouched.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors=errors) as file:
        file.write(text)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    partial.replace(path)

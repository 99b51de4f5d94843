"""What must agree between training and serving: vocabulary, chat template, special tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 (hex) over a Hugging Face tokenizer's vocabulary, merges, chat template and
    special tokens: everything that decides which ids a dialogue becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    # Truncation and padding are settings of a caller, not of the tokenizer.
    rules = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    parts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "rules": rules,
        "template": tokenizer.chat_template or "",
        "special": sorted((k, str(v)) for k, v in tokenizer.special_tokens_map.items()),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

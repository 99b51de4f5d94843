"""Record of which tokenizer and chat template turned texts into ids."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_PROBE = (
    "Storm floods 35 homes in Ashford.\n  It's 7:05 \u2014 na\u00efve caf\u00e9s, x_1 == {'a': [2]}"
    ";\t\u66b4\u96e8\u6df9\u6ca1\u4e8612\u6237\u4eba\u5bb6\uff0c\u660e\u5929\u89c1\u3002 \U0001f327"
)


def template_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of everything in a tokenizer that decides which ids a text becomes.

    That is the vocabulary, BOS and EOS, the chat template, and what the tokenizer makes of a
    fixed probe text, which shows merges, normaliser, pre-tokeniser and added special tokens
    without depending on how a library version writes them down. The padding token is left out:
    nothing relies on it, and callers may set it.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        64 hexadecimal digits; equal for a tokenizer and its saved and reloaded copy.
    """
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template,
        "probe": [
            list(tokenizer(_PROBE, add_special_tokens=s)["input_ids"]) for s in (True, False)
        ],
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()

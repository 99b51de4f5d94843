"""Train a small byte-level BPE tokenizer: any language, nothing out of vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_TEMPLATES = {"chatml": CHATML}
"""Chat templates by name."""
TURN_END = "<|im_end|>"
SMALLEST_VOCABULARY = 256 + 3
"""All bytes and the three special tokens."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, context: int, chat_template: str | None = None
) -> Any:
    """A fast Hugging Face tokenizer with pad, BOS (prepended) and EOS (never added by itself).

    A number is cut into groups of up to three digits, so that common ones are a single token,
    which a small model copies most easily. Markers of the form
    ``<|name|>`` in the chat template become special tokens; ``<|im_end|>``, which ends a turn in
    ChatML, is then the EOS token.

    Args:
        texts: What to learn the merges from.
        vocab_size: At most so many tokens; fewer when the texts give fewer merges.
        context: The model's context, remembered as ``model_max_length``.
        chat_template: Jinja template for dialogues; ``None`` for a plain-text model.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    markers = sorted(set(re.findall(r"<\|\w+\|>", chat_template or "")))
    eos = TURN_END if TURN_END in markers else EOS
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}{1,3}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, SMALLEST_VOCABULARY + len(markers)),
        special_tokens=[PAD, BOS, EOS, *markers],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=eos,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast

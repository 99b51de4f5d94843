"""Pre-training: a tokenizer and a small Llama from scratch, or more training of a given model.

Documents are not packed into blocks. Each is a row of its own (BOS, text, EOS), rows of like
length share a batch, and a longer one is cut at the context. So no token ever attends to another
document, no mask is needed, positions begin at 0 as they do in generation, attention costs the
square of the document and not of the context, and padding stays at a per cent or two.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner import hf_directory
from learner.config import PretrainConfig
from learner.stage import finish, identity_of, split
from learner.supervised import OnStep, TrainingResult, train
from learner.supervised_losses import nll
from learner.token_batches import Ids, IntArray, pad_right
from learner.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

# Of the initial attention. Found on the English newswire: others learn later, none were unstable.
EMBEDDING_STD = 0.1
QUERY_KEY_GAIN = 0.5
VALUE_OUTPUT_GAIN = 0.7


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """What was trained on and what came of it; saved as ``training_report.json``."""

    parameters: int
    vocabulary: int
    documents: int
    held_out_documents: int
    documents_cut: int
    """Documents longer than the context, cut into several rows."""
    held_out_nll: float
    """Nats per token on documents that were not trained on."""
    training: TrainingResult


class DocumentLoss:
    """Next-token loss of whole rows: every token but the first is predicted."""

    def __init__(self, rows: Sequence[Ids]) -> None:
        self._rows = rows
        self.lengths: IntArray = np.array([len(row) for row in rows], np.int64)
        self.rows: IntArray = np.ones(len(rows), np.int64)

    def weight(self, items: IntArray) -> float:
        return float((self.lengths[items] - 1).sum())

    def loss(self, model: Any, items: IntArray) -> tuple[Tensor, dict[str, float]]:
        device = next(model.parameters()).device
        ids = pad_right([self._rows[i] for i in items], device)  # [B, T]
        lengths = torch.from_numpy(self.lengths[items]).to(device)
        # State t predicts token t + 1 while that is a real one.
        trained = torch.arange(ids.shape[1], device=device)[None, :-1] < lengths[:, None] - 1
        states = hf_directory.backbone_states(model, ids)[:, :-1][trained]  # [n, H]
        return nll(model.get_output_embeddings()(states), ids[:, 1:][trained]), {}


def pretrain(
    config: PretrainConfig,
    corpus: Sequence[str],
    output_dir: Path,
    *,
    seed: int,
    chat_template: str | None = None,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
    resume: bool = False,
) -> PretrainReport:
    """Train on ``corpus`` and write a plain Hugging Face directory.

    Args:
        config: Model size (from scratch) or ``init_from``, batch shape, optimizer.
        corpus: One text a document.
        output_dir: Becomes the model directory.
        seed: Of the initial weights, the held-out split and the order.
        chat_template: For dialogues; a model from ``init_from`` keeps its own unless this is
            given.
        on_step: Told (step, total, metrics) after every step.
        should_stop: Asked after every step; ``Interrupted`` is raised when it says so.
        resume: Go on from the state that an interrupted call left in ``output_dir``.

    Raises:
        ValueError: Empty corpus, or a model that does not fit.
        FileNotFoundError: ``init_from`` is no model directory.
        RuntimeError: Training diverged.
    """
    texts = [text for text in corpus if text.strip()]
    if len(texts) < 2:
        raise ValueError(
            f"the corpus has {len(texts)} texts that are not empty: at least 2 are needed, one to "
            "train on and one held out"
        )
    model, tokenizer = _start(config, texts, seed, chat_template)
    context = hf_directory.context_length(model, tokenizer)
    documents = encode_documents(tokenizer, texts)
    cut = sum(len(document) > context for document in documents)
    if cut:
        logger.info(
            "%d of %d documents are longer than the context of %d tokens and are cut",
            cut,
            len(documents),
            context,
        )
    held_out, trained = split(len(documents), config.held_out_share, seed)
    rows = cut_documents([documents[i] for i in trained], context)
    held_out_rows = cut_documents([documents[i] for i in held_out], context)
    result = train(
        model,
        DocumentLoss(rows),
        config,
        output_dir=output_dir,
        seed=seed,
        identity=identity_of(config, seed, rows),
        held_out=DocumentLoss(held_out_rows),
        resume=resume,
        on_step=on_step,
        should_stop=should_stop,
    )
    hf_directory.save(model, tokenizer, output_dir)
    report = PretrainReport(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(tokenizer),
        documents=len(trained),
        held_out_documents=len(held_out),
        documents_cut=cut,
        held_out_nll=result.held_out["loss"],
        training=result,
    )
    finish(output_dir, report)
    return report


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """BOS (where the tokenizer has one), text, EOS of every document."""
    eos = int(tokenizer.eos_token_id)
    # verbose: no warning about texts beyond the context, they are cut later.
    encoded = tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"]
    return [np.array(ids if ids and ids[-1] == eos else [*ids, eos], np.int32) for ids in encoded]


def cut_documents(documents: Sequence[Ids], context: int) -> list[Ids]:
    """Rows of at most ``context`` tokens; parts overlap by one, so each token is predicted once."""
    rows = []
    for document in documents:
        for start in range(0, max(1, len(document) - 1), context - 1):
            rows.append(document[start : start + context])
    return [row for row in rows if len(row) > 1]


def _start(
    config: PretrainConfig, texts: Sequence[str], seed: int, chat_template: str | None
) -> tuple[Any, Any]:
    if config.init_from is not None:
        tokenizer = hf_directory.load_tokenizer(config.init_from)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        model = hf_directory.load_causal_lm(config.init_from)
        hf_directory.check_vocabulary(model, tokenizer, config.init_from)
        return model, tokenizer
    tokenizer = train_tokenizer(
        texts, config.vocab_size, context=config.context, chat_template=chat_template
    )
    return _new_llama(config, tokenizer, seed), tokenizer


def _new_llama(config: PretrainConfig, tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.kv_heads,
                max_position_embeddings=config.context,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                tie_word_embeddings=config.tie_embeddings,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                attn_implementation="sdpa",
            )
        )
        _favour_copying(model)
    return model.eval()


@torch.no_grad()
def _favour_copying(model: Any) -> None:
    """Start attention as a weak copier: it looks at what resembles the state, and repeats it.

    Mimetic initialisation (Trockman and Kolter, arXiv 2305.09828; for recall arXiv 2410.11135):
    queries and keys share a basis, and so do values and outputs, so that Q K^T and V O begin as
    multiples of a projection instead of noise. With tied embeddings the state that expects a
    name resembles the names before it, and attending to one raises its logit. A small model then
    learns to carry names and numbers from a prompt into its answer within a few hundred thousand
    tokens; from the usual initialisation it needs several times as many.
    """
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    width = model.config.hidden_size
    share = heads // kv_heads
    model.get_input_embeddings().weight.normal_(std=EMBEDDING_STD)
    for layer in model.model.layers:
        attention = layer.self_attn
        basis, carried = _orthogonal(width, kv_heads, heads), _orthogonal(width, kv_heads, heads)
        attention.k_proj.weight.copy_(QUERY_KEY_GAIN * basis.flatten(0, 1))
        attention.q_proj.weight.copy_(
            QUERY_KEY_GAIN * basis.repeat_interleave(share, dim=0).flatten(0, 1)
        )
        attention.v_proj.weight.copy_(VALUE_OUTPUT_GAIN * carried.flatten(0, 1))
        attention.o_proj.weight.copy_(
            VALUE_OUTPUT_GAIN / share * carried.repeat_interleave(share, dim=0).flatten(0, 1).T
        )


def _orthogonal(width: int, kv_heads: int, heads: int) -> Tensor:
    """``[kv_heads, width / heads, width]`` bases of a head each, orthogonal to each other."""
    whole: Tensor = torch.linalg.qr(torch.randn(width, width))[0]
    return whole.view(heads, width // heads, width)[:kv_heads]

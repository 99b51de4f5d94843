"""Hugging Face directories in and out: what the supervised stages start from and leave behind.

A directory that a stage writes holds ``config.json``, ``model.safetensors``,
``generation_config.json`` with every EOS id, and the tokenizer: ``AutoModelForCausalLM`` and
``vllm serve`` load it as it is. Weights are read from safetensors only and held in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


def load_tokenizer(model_dir: Path | str) -> Any:
    """The tokenizer of a model directory or hub name; a missing pad token becomes EOS.

    Raises:
        FileNotFoundError: No such directory, or no tokenizer in it.
        ValueError: The tokenizer has no EOS token, so a response could never end.
    """
    from transformers import AutoTokenizer

    _check_directory(model_dir)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{model_dir}: no tokenizer could be loaded ({_first_line(error)}): save it beside the "
            "model with tokenizer.save_pretrained"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{model_dir}: the tokenizer has no EOS token, so a response could never end: set "
            "tokenizer.eos_token and save it again"
        )
    if tokenizer.pad_token_id is None:
        # Pads are never looked at (masks come from lengths), so no new embedding row is needed.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(model_dir: Path | str) -> Any:
    """An ``AutoModelForCausalLM`` in float32, ready to train on right-padded batches.

    Raises:
        FileNotFoundError: No such directory, or no model in it.
        ValueError: It is a model of another kind, or its weights do not fit its architecture.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    _check_directory(model_dir)
    known = _class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    _check_architecture(model_dir, known, wanted="a causal language model")
    model, info = _load(AutoModelForCausalLM, model_dir)
    _check_complete(model_dir, model, set(info["missing_keys"]))
    _check_plain_head(model_dir, _prepare(model))
    return model


def load_scalar_model(model_dir: Path | str, tokenizer: Any) -> Any:
    """A ``...ForSequenceClassification`` with one output on the body of a causal language model.

    The new head is zero: every text starts with reward 0, and the loss with ln 2. A checkpoint
    that already has a scalar head keeps it.

    Raises:
        FileNotFoundError: No such directory, or no model in it.
        ValueError: It is a model of another kind, or its family has no such classifier.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    _check_directory(model_dir)
    causal = _class_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    scalar = _class_names(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    _check_architecture(model_dir, causal | scalar, wanted="a causal language model")
    model, info = _load(AutoModelForSequenceClassification, model_dir, num_labels=1)
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"{model_dir}: {type(model).__name__} has no linear layer 'score' on a causal model: "
            "start the reward model from a decoder-only language model (Llama, Qwen, GPT-2, ...)"
        )
    missing = set(info["missing_keys"])
    if any(key.startswith("score.") for key in missing):
        torch.nn.init.zeros_(head.weight)
    _check_complete(model_dir, model, {key for key in missing if not key.startswith("score.")})
    model.config.pad_token_id = tokenizer.pad_token_id
    return _prepare(model)


def save(model: Any, tokenizer: Any, output_dir: Path) -> None:
    """Write the model and its tokenizer as one plain Hugging Face directory.

    Raises:
        ValueError: The tokenizer has ids that the model has no embedding for.
    """
    check_vocabulary(model, tokenizer, str(output_dir))
    output_dir.mkdir(parents=True, exist_ok=True)
    model.config.use_cache = True
    model.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = eos_token_ids(model, tokenizer)
        generation.pad_token_id = tokenizer.pad_token_id
        generation.bos_token_id = tokenizer.bos_token_id
    with _quiet_transformers():
        model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)


def eos_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: the tokenizer's, and what the model already declared."""
    found: list[int] = [int(tokenizer.eos_token_id)]
    for config in (getattr(model, "generation_config", None), model.config):
        declared = getattr(config, "eos_token_id", None)
        ids = declared if isinstance(declared, list | tuple) else [declared]
        found += [int(i) for i in ids if i is not None and int(i) not in found]
    return found


def context_length(model: Any, tokenizer: Any) -> int:
    """Positions a text may take: the smaller of the model's and the tokenizer's own limit."""
    limits = [int(tokenizer.model_max_length)]
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if getattr(model.config, name, None):
            limits.append(int(getattr(model.config, name)))
    return min(limits)


def check_vocabulary(model: Any, tokenizer: Any, where: str) -> None:
    """Raises ValueError when the tokenizer can give ids that the model has no embedding for."""
    rows = int(model.get_input_embeddings().num_embeddings)
    if len(tokenizer) > rows:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens but the model has only {rows} "
            "embeddings: the two do not belong together"
        )


def backbone_states(model: Any, input_ids: Tensor) -> Tensor:
    """``[B, T, H]`` last hidden states of right-padded ids ``[B, T]``.

    No mask is given: attention is causal, so no real token sees the pads on its right, and
    scaled-dot-product attention takes its fast path.
    """
    return cast(Tensor, model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state)


def _check_directory(model_dir: Path | str) -> None:
    path = Path(model_dir)
    if path.is_dir():
        if not (path / "config.json").is_file():
            names = sorted(entry.name for entry in path.iterdir())
            found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise FileNotFoundError(
                f"{path} is not a model directory: it has no config.json (found: "
                f"{found or 'nothing'}); give a directory written by save_pretrained"
            )
        if not any(path.glob("*.safetensors")):
            raise FileNotFoundError(
                f"{path} has no .safetensors weights; other formats are not loaded because they "
                "can run code: save it again with save_pretrained"
            )
    elif path.is_absolute() or path.exists() or str(model_dir).count("/") != 1:
        raise FileNotFoundError(
            f"no model directory at {model_dir}: give a directory written by save_pretrained, or "
            "a hub name like org/model"
        )


def _check_architecture(model_dir: Path | str, known: set[str], wanted: str) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{model_dir}: the model's configuration cannot be read ({_first_line(error)}): check "
            "the name or the directory"
        ) from error
    architectures = list(config.architectures or [])
    if not any(name in known for name in architectures):
        found = ", ".join(architectures) or f"a {config.model_type} without a stated architecture"
        raise ValueError(f"{model_dir} holds {found}, but {wanted} is needed here")


def _load(auto_class: Any, model_dir: Path | str, **options: Any) -> tuple[Any, dict[str, Any]]:
    try:
        with _quiet_transformers():
            loaded = auto_class.from_pretrained(
                model_dir,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        return cast(tuple[Any, dict[str, Any]], loaded)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{model_dir}: the model cannot be loaded: {_first_line(error)}"
        ) from error


def _check_complete(model_dir: Path | str, model: Any, missing: set[str]) -> None:
    if missing:
        raise ValueError(
            f"{model_dir}: {len(missing)} weights of {type(model).__name__} are missing "
            f"({', '.join(sorted(missing)[:3])}...): the files are not this architecture's"
        )


def _prepare(model: Any) -> Any:
    model.config.use_cache = False
    # Evaluation mode leaves gradients on and switches every dropout off.
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars, as a stage shows its own; no report of a new head, which is meant."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _class_names(mapping: Any) -> set[str]:
    names: set[str] = set()
    for value in mapping.values():
        names.update(value if isinstance(value, list | tuple) else [value])
    return names


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_plain_head(model_dir: Path | str, model: Any) -> None:
    """The loss takes logits of some positions only, straight from the output layer."""
    ids = torch.arange(8)[None] % int(model.config.vocab_size)
    with torch.no_grad():
        logits = model.get_output_embeddings()(backbone_states(model, ids))
        whole = model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(logits, whole, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{model_dir}: {type(model).__name__} changes its logits after the output layer "
            "(soft-capping or scaling), which training here does not support"
        )

"""A reward model in this process: load a scalar-head checkpoint, score batches.

A checkpoint is a Hugging Face directory of a ``...ForSequenceClassification`` model with one
label, written in safetensors, with its tokenizer and ``reward_head.json`` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.fingerprint import template_fingerprint
from reward_service.batcher import batches_by_length
from reward_service.checkpoint import check_files, content_version
from reward_service.encoding import Encoded, RewardHead, Truncation, encode_ids, encode_text
from reward_service.score import ModelScores, ScoreItem


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInput:
    """An encoded item, and whether a value is wanted for each token of its response."""

    encoded: Encoded
    per_token: bool = False

    def __len__(self) -> int:
        return len(self.encoded)


Values = tuple[float, ...]
"""The score alone, or the value at each token of the response; the score is the last one."""


class RewardModel:
    """Scores texts in this process; also the ``Scorer`` of evaluation and of small scripts.

    Example:
        >>> model = RewardModel.load(Path("runs/x/reward_model"))
        >>> model.score([ScoreItem(prompt="Storm hits town", response=" Rain fell.")]).scores

    A float32 forward pass differs in its last bits with the shape of the batch. On CPU every
    sample therefore gets a pass of its own (``one_by_one``): its score is then the same bit for
    bit whatever is scored beside it, which exact resume needs. One thread loses little by it, as
    nothing is padded. On a GPU samples are padded together.
    """

    def __init__(
        self,
        *,
        network: Any,
        tokenizer: Any,
        head: RewardHead,
        name: str,
        version: str,
        token_budget: int = 8192,
        one_by_one: bool | None = None,
    ) -> None:
        self.name = name
        self.version = version
        self.head = head
        self.tokenizer = tokenizer
        self.context: int | None = getattr(network.config, "max_position_embeddings", None)
        self._network = network.eval()
        self._device = next(network.parameters()).device
        self._token_budget = token_budget
        self._one_by_one = self._device.type == "cpu" if one_by_one is None else one_by_one

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        name: str | None = None,
        device: str = "cpu",
        token_budget: int = 8192,
        one_by_one: bool | None = None,
    ) -> RewardModel:
        """Load a checkpoint directory.

        Raises:
            FileNotFoundError: The directory, its weights, tokenizer or head are missing.
            ValueError: It is no scalar-head model, its weights do not fit its configuration, or
                its tokenizer or template is not the one that it was trained with.
        """
        path = Path(directory)
        head = check_files(path)
        tokenizer = load_tokenizer(path)
        fingerprint = template_fingerprint(tokenizer)
        if fingerprint != head.fingerprint:
            raise ValueError(
                f"{path}: the tokenizer or chat template is not the one that the reward model was "
                f"trained with (fingerprint {fingerprint[:12]}, trained with "
                f"{head.fingerprint[:12]}): put the original tokenizer files back, or train again"
            )
        network = _load_network(path)
        rows = network.get_input_embeddings().num_embeddings
        if len(tokenizer) > rows:
            raise ValueError(
                f"{path}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} "
                "embeddings: the two do not belong together"
            )
        return cls(
            network=network.to(device),
            tokenizer=tokenizer,
            head=head,
            name=name or path.name,
            version=content_version(path),
            token_budget=token_budget,
            one_by_one=one_by_one,
        )

    @property
    def fingerprint(self) -> str:
        return self.head.fingerprint

    @property
    def vocabulary(self) -> int:
        """Ids below it have an embedding."""
        return int(self._network.get_input_embeddings().num_embeddings)

    def encode_all(
        self,
        items: Sequence[ScoreItem],
        truncation: Truncation = "error",
        *,
        per_token: bool = False,
        max_tokens: int | None = None,
    ) -> tuple[list[ModelInput | None], list[str | None]]:
        """Every item as an input, ``None`` with a reason for one that does not fit or is no text.

        ``max_tokens`` is a limit of the caller's, for models whose context has none.
        """
        limits = [limit for limit in (self.context, max_tokens) if limit is not None]
        limit = min(limits, default=None)
        inputs: list[ModelInput | None] = []
        errors: list[str | None] = []
        for item in items:
            try:
                encoded = self._encode(item, truncation, limit)
                if per_token and encoded.response_start is None:
                    raise ValueError(
                        "per-token values need to know where the response begins, which this "
                        "tokenizer or chat template hides: send token ids, or leave per_token out"
                    )
            except (ValueError, TypeError) as error:  # TypeError: half a surrogate pair
                inputs.append(None)
                errors.append(str(error))
            else:
                inputs.append(ModelInput(encoded=encoded, per_token=per_token))
                errors.append(None)
        return inputs, errors

    def _encode(self, item: ScoreItem, truncation: Truncation, limit: int | None) -> Encoded:
        if item.ids is not None:
            return encode_ids(
                self.tokenizer,
                item.ids.prompt,
                item.ids.response,
                vocabulary=self.vocabulary,
                append_eos=self.head.eos_appended,
                max_tokens=limit,
                truncation=truncation,
            )
        return encode_text(
            self.tokenizer,
            item.prompt,
            item.messages,
            item.response,
            append_eos=self.head.eos_appended,
            max_tokens=limit,
            truncation=truncation,
        )

    def score(
        self,
        items: Sequence[ScoreItem],
        truncation: Truncation = "error",
        *,
        per_token: bool = False,
    ) -> ModelScores:
        """Score every item in order; one that cannot be encoded gets an error, alone."""
        inputs, errors = self.encode_all(items, truncation, per_token=per_token)
        values = self.values([i for i in inputs if i is not None])
        return self.answer(inputs, values, errors)

    def answer(
        self,
        inputs: Sequence[ModelInput | None],
        values: Sequence[Values],
        errors: Sequence[str | None],
    ) -> ModelScores:
        """Wrap raw results; a value that is not finite becomes an error, never a number.

        ``values`` has one entry for each input that is not ``None``.
        """
        found = iter(values)
        rows = [None if i is None else next(found) for i in inputs]
        checked_errors = list(errors)
        for index, row in enumerate(rows):
            if row is not None and not all(map(math.isfinite, row)):
                worst = next(value for value in row if not math.isfinite(value))
                rows[index], checked_errors[index] = None, f"the reward model gave {worst}"
        wanted = any(i is not None and i.per_token for i in inputs)
        return ModelScores(
            model=self.name,
            version=self.version,
            fingerprint=self.fingerprint,
            scores=tuple(None if row is None else row[-1] for row in rows),
            tokens=tuple(0 if i is None else len(i) for i in inputs),
            errors=tuple(checked_errors),
            per_token=tuple(rows) if wanted else (),
            probability=self.head.activation == "sigmoid",
        )

    def values(self, inputs: Sequence[ModelInput]) -> list[Values]:
        """Normalised values of each input, in order; may be NaN if the weights are broken."""
        found: list[Values] = [()] * len(inputs)
        budget = 0 if self._one_by_one else self._token_budget
        for batch in batches_by_length([len(i) for i in inputs], budget):
            raw = self._forward([inputs[i] for i in batch])
            for index, row in zip(batch, raw, strict=True):
                found[index] = tuple(map(self.head.score, row))
        return found

    @torch.inference_mode()
    def _forward(self, inputs: Sequence[ModelInput]) -> list[list[float]]:
        """Raw head output of each input at the tokens that are wanted of it."""
        sequences = [i.encoded.ids for i in inputs]
        # Padding is on the right and the model is causal, so no real token sees it: any id will
        # do, and no mask is needed.
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)  # [B, T]
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        hidden = self._network.base_model(
            input_ids=ids.to(self._device), use_cache=False
        ).last_hidden_state  # [B, T, H]
        first = [(i.encoded.response_start or 0) if i.per_token else len(i) - 1 for i in inputs]
        if not any(i.per_token for i in inputs):
            last = hidden[torch.arange(len(sequences)), torch.tensor(first)]  # [B, H]
            return [[v] for v in self._network.score(last)[:, 0].float().tolist()]
        values = self._network.score(hidden)[:, :, 0].float()  # [B, T]
        return [
            values[row, start : len(sequence)].tolist()
            for row, (start, sequence) in enumerate(zip(first, sequences, strict=True))
        ]


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a directory. Raises ValueError when there is none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many types for a broken directory
        raise ValueError(f"{path}: its tokenizer cannot be loaded: {error}") from error


def _load_network(path: Path) -> Any:
    """The network in evaluation mode on the CPU, every weight found in the checkpoint."""
    from transformers import AutoModelForSequenceClassification

    try:
        network, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            dtype="auto",
        )
    except Exception as error:  # the library raises many types for a broken directory
        raise ValueError(f"{path}: its weights cannot be loaded: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise ValueError(
            f"{path}: the weights do not fit the configuration: {wrong[0]} is missing or has "
            f"another shape ({len(wrong)} such tensors)"
        )
    if network.config.num_labels != 1 or not hasattr(network, "score"):
        raise ValueError(
            f"{path}: a reward model has one output and a decoder's 'score' head; this is a "
            f"{type(network).__name__} with {network.config.num_labels} outputs"
        )
    if network.dtype == torch.float16:  # few CPUs compute in it
        network = network.float()
    return network

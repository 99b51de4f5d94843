"""A reward model in this process: load a scalar-head checkpoint, score batches.

A checkpoint is a Hugging Face directory of a ``...ForSequenceClassification`` model with one
label, written in safetensors, with its tokenizer and ``reward_head.json`` beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.fingerprint import template_fingerprint
from reward_service.batcher import batches_by_length
from reward_service.checkpoint import check_files, content_version
from reward_service.encoding import RewardHead, Truncation, encode
from reward_service.score import ModelScores, ScoreItem


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
        tokenizer = _load_tokenizer(path)
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

    def encode_all(
        self, items: Sequence[ScoreItem], truncation: Truncation = "error"
    ) -> tuple[list[list[int] | None], list[str | None]]:
        """Ids of every item, ``None`` with a reason for one that does not fit or is not text."""
        encoded: list[list[int] | None] = []
        errors: list[str | None] = []
        for item in items:
            try:
                ids = encode(
                    self.tokenizer,
                    item.prompt,
                    item.messages,
                    item.response,
                    max_tokens=self.context,
                    truncation=truncation,
                )
            except (ValueError, TypeError) as error:  # TypeError: half a surrogate pair
                encoded.append(None)
                errors.append(str(error))
            else:
                encoded.append(ids)
                errors.append(None)
        return encoded, errors

    def score(self, items: Sequence[ScoreItem], truncation: Truncation = "error") -> ModelScores:
        """Score every item in order; one that cannot be encoded gets an error, alone."""
        encoded, errors = self.encode_all(items, truncation)
        found = iter(self.score_ids([ids for ids in encoded if ids is not None]))
        scores = [None if ids is None else next(found) for ids in encoded]
        return self.answer(scores, [len(ids or ()) for ids in encoded], errors)

    def answer(
        self,
        scores: Sequence[float | None],
        tokens: Sequence[int],
        errors: Sequence[str | None],
    ) -> ModelScores:
        """Wrap raw results; a score that is not finite becomes an error, never a number."""
        checked_scores: list[float | None] = []
        checked_errors: list[str | None] = []
        for score, error in zip(scores, errors, strict=True):
            if score is not None and not math.isfinite(score):
                score, error = None, f"the reward model gave {score}"
            checked_scores.append(score)
            checked_errors.append(error)
        return ModelScores(
            model=self.name,
            version=self.version,
            fingerprint=self.fingerprint,
            scores=tuple(checked_scores),
            tokens=tuple(tokens),
            errors=tuple(checked_errors),
        )

    def score_ids(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Normalised score of each id sequence, in order; may be NaN if the weights are broken."""
        scores = [0.0] * len(sequences)
        budget = 0 if self._one_by_one else self._token_budget
        for batch in batches_by_length([len(s) for s in sequences], budget):
            raw = self._forward([sequences[i] for i in batch])
            for index, value in zip(batch, raw, strict=True):
                scores[index] = self.head.gain * value + self.head.bias
        return scores

    @torch.inference_mode()
    def _forward(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Raw head output ``[B]`` at each sequence's last token."""
        lengths = torch.tensor([len(s) for s in sequences])  # [B]
        # Padding is on the right and the model is causal, so no real token sees it: any id will
        # do, and no mask is needed.
        ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)  # [B, T]
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        hidden = self._network.base_model(
            input_ids=ids.to(self._device), use_cache=False
        ).last_hidden_state  # [B, T, H]
        last = hidden[torch.arange(len(sequences)), lengths - 1]  # [B, H]
        values: list[float] = self._network.score(last)[:, 0].float().tolist()
        return values


def _load_tokenizer(path: Path) -> Any:
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

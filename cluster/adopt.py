"""A finished reward model from elsewhere as a directory that the reward service loads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from actors.fingerprint import template_fingerprint
from actors.trajectory import Demonstration
from cluster.hub import WANTED
from learner.reward_model import normalisation
from reward_service.checkpoint import check_network_files
from reward_service.encoding import HEAD_FILE, RewardHead
from reward_service.model import RewardModel, load_tokenizer
from reward_service.score import ScoreItem
from reward_service.statistics import quantiles


def adopt_reward_model(
    source: Path,
    output: Path,
    *,
    reference: Sequence[Demonstration] = (),
    append_eos: bool = False,
    device: str = "cpu",
    name: str = "",
) -> RewardHead:
    """Copy a scalar-head model and give it the head file that says how it is to be used.

    Args:
        source: A Hugging Face directory: a ``...ForSequenceClassification`` of a decoder with one
            output, as Llama- and Qwen-based reward models are.
        output: Becomes the reward-model directory; there only once all of it is in order.
        reference: Responses that shall have scores of mean 0 and standard deviation 1. Without
            any, scores are what the model says.
        append_eos: Read the score at one EOS after the text, as models do that OpenRLHF trains.
            By default it is read where the text, or the chat template, ends.
        device: Of the forward passes over ``reference``.
        name: What is recorded as its origin; default: ``source``.

    Returns:
        What was written beside the weights.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError: Configuration, weights or tokenizer are missing.
        ValueError: Another kind of model; it has a head file already; its weights do not fit; or
            a reference cannot be scored.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another --output, or remove it")
    check_network_files(source)
    if (source / HEAD_FILE).exists():
        raise ValueError(f"{source} has a {HEAD_FILE}: it can be served as it is")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for file in sorted({f for pattern in WANTED for f in source.glob(pattern)}):
            shutil.copyfile(file, partial / file.name)
        head = RewardHead(
            gain=1.0,
            bias=0.0,
            eos_appended=append_eos,
            fingerprint=template_fingerprint(load_tokenizer(partial)),
            base=name or str(source),
        )
        head.save(partial)
        model = RewardModel.load(partial, device=device)  # what cannot be loaded is refused here
        if reference:
            head = _normalised(head, model, reference)
            head.save(partial)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return head


def _normalised(
    head: RewardHead, model: RewardModel, reference: Sequence[Demonstration]
) -> RewardHead:
    """``head`` with the gain and bias that the reference asks for."""
    items = [
        ScoreItem(prompt=r.prompt, messages=r.messages, response=r.response) for r in reference
    ]
    answer = model.score(items)
    for example, error in zip(reference, answer.errors, strict=True):
        if error is not None:
            raise ValueError(f"reference {example.example_id} cannot be scored: {error}")
    raw = np.array(answer.scores, dtype=np.float64)
    gain, bias = normalisation(raw)
    info = {
        "reference_samples": len(raw),
        "reference_quantiles": quantiles(gain * raw + bias),
    }
    return head.model_copy(update={"gain": gain, "bias": bias, "info": info})

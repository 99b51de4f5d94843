"""What a run's data configuration means: corpus, demonstrations, prompts, and their quality."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cached_property

from actors.config import DataConfig
from actors.data_files import read_rows
from actors.datasets import (
    Preference,
    RawPrompt,
    load_corpus,
    load_demonstrations,
    load_preferences,
    load_prompts,
)
from actors.newswire import Newswire, generate_newswire, true_quality
from actors.trajectory import Demonstration, Trajectory
from cluster.config import RunConfig
from reward_service.comparison import LabelledText
from reward_service.function import RewardFunction


class RunData:
    """The data of one run, each part read when it is first asked for."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._data = config.data

    @cached_property
    def _newswire(self) -> Newswire | None:
        if self._data.newswire is None:
            return None
        return generate_newswire(self._data.newswire, self._config.seed)

    def corpus(self) -> list[str]:
        if self._newswire is not None:
            return self._newswire.corpus()
        return load_corpus(_named(self._data.corpus, "corpus", "pretrain"), self._data)

    def demonstrations(self) -> list[Demonstration]:
        if self._newswire is not None:
            return self._newswire.sft_demonstrations()
        return load_demonstrations(_named(self._data.sft, "sft", "sft"), self._data)

    def preferences(self) -> list[Preference]:
        source = _named(self._data.preferences, "preferences", "collect")
        return load_preferences(source, self._data)

    def prompts(self) -> list[RawPrompt]:
        """Prompts to train on: never those kept for evaluation."""
        return self._split[0]

    def held_out_prompts(self) -> list[RawPrompt]:
        """Prompts for evaluation, at most ``evaluate.prompts`` of them."""
        return self._split[1][: self._config.evaluate.prompts]

    @cached_property
    def _split(self) -> tuple[list[RawPrompt], list[RawPrompt]]:
        if self._newswire is not None:
            return self._newswire.prompts(), self._newswire.held_out_prompts()
        source = _named(self._data.prompts, "prompts", "ppo")
        prompts = load_prompts(source, self._data)
        if self._data.eval_prompts is not None:
            return prompts, load_prompts(self._data.eval_prompts, self._data)
        # Without a held-out file a fixed tenth or less is set aside, the same in every stage.
        order = random.Random(0).sample(range(len(prompts)), len(prompts))
        kept = min(self._config.evaluate.prompts, max(1, len(prompts) // 10))
        if len(prompts) < 2:
            raise ValueError(
                f"{source} has only one prompt: give more, or held-out ones as data.eval_prompts"
            )
        return [prompts[i] for i in sorted(order[kept:])], [prompts[i] for i in order[:kept]]

    @property
    def has_true_quality(self) -> bool:
        return self._data.newswire is not None

    def measure(self, trajectory: Trajectory) -> Mapping[str, float]:
        """True quality of a sample where the data has one. Recorded, never trained on."""
        if not self.has_true_quality:
            return {}
        quality = true_quality(trajectory.prompt.meta, trajectory.response_text)
        return {"true_quality": quality.score, "good": float(quality.good)}


def load_labels(path: str, config: DataConfig) -> list[LabelledText]:
    """Rows with a text and whether it is flagged.

    The text is in ``text_field``; a row with ``prompt_field`` and ``response_field`` instead is a
    response to be judged in its place.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or a row lacks a field; names the line.
    """
    found = []
    for row in read_rows(path, config.split):
        if config.label_field not in row.values:
            raise ValueError(
                f"{row.where}: field {config.label_field!r} is missing (data.label_field names it)"
            )
        flagged = row.values[config.label_field]
        if flagged not in (0, 1):  # True and False are 1 and 0
            raise ValueError(
                f"{row.where}: field {config.label_field!r} must be true or false, got {flagged!r}"
            )
        prompt, text = "", row.values.get(config.text_field)
        if text is None:
            prompt = row.values.get(config.prompt_field, "")
            text = row.values.get(config.response_field)
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise ValueError(
                f"{row.where}: a labelled row has a text in {config.text_field!r}, or texts in "
                f"{config.prompt_field!r} and {config.response_field!r}"
            )
        text_id = str(row.values.get(config.id_field, row.default_id))
        found.append(LabelledText(text_id=text_id, text=text, flagged=bool(flagged), prompt=prompt))
    if config.limit is not None:
        found = found[: config.limit]
    return found


def judged_quality(data: RunData, function: str | None) -> Callable[[RawPrompt, str], float]:
    """What simulated judges perceive, before their noise and biases.

    Args:
        function: ``package.module:function``, called as a reward function is, without
            token ids; ``None`` for the data's true quality.

    Raises:
        ValueError: There is neither a function nor a true quality.
    """
    if function is not None:
        judge = RewardFunction.load(function)
        return lambda prompt, response: float(judge.of_text(prompt.text, response, prompt.meta))
    if not data.has_true_quality:
        raise ValueError(
            "simulated judges need something to judge by, and this data has no true quality: "
            "set collect.quality to package.module:function, or collect.source to "
            "demonstrations or preferences"
        )
    return lambda prompt, response: true_quality(prompt.meta, response).score


def _named(source: str | None, field: str, stage: str) -> str:
    if source is None:
        raise ValueError(
            f"stage {stage} needs data.{field}: set it to a JSONL, Parquet or CSV file or a "
            "dataset, or set data.newswire to generate the data"
        )
    return source

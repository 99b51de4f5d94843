"""The configuration of a run: every component's own section, read from one YAML file.

An unknown key, a wrong type or two settings that contradict each other end here, before anything
has started, with a message that names the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from actors.config import DataConfig, RolloutConfig, SamplingConfig, StrictConfig
from cluster.whole_file import replace_text
from learner.config import (
    GROUP_ESTIMATORS,
    LearnersConfig,
    PPOConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
)
from reward_service.config import CollectConfig, RewardConfig, RewardTerm


class ClusterConfig(StrictConfig):
    """Which Ray cluster to use, and how long to wait for it."""

    address: str | None = Field(
        None,
        description="'auto' or host:port; default: RAY_ADDRESS, which every Ray job has, or else"
        " Ray is started on this machine",
    )
    object_store_gib: float = Field(0.5, gt=0, description="local Ray only")
    placement_timeout_s: float = Field(600.0, gt=0, description="for resources to become free")
    storage: str | None = Field(
        None,
        description="URL of a directory for this run alone (s3://, gs://, file://, ...): the run"
        " directory is copied there after each checkpoint and stage, and fetched from there by a"
        " node that has less of it; credentials come from the environment",
    )

    @model_validator(mode="after")
    def _storage_is_a_url(self) -> ClusterConfig:
        if self.storage is None:
            return self
        scheme, found, rest = self.storage.partition("://")
        if not found or not scheme or not rest.strip("/"):
            raise ValueError(
                f"cluster.storage {self.storage!r} must be a URL with a path, as "
                "s3://bucket/runs/mine or file:///shared/runs/mine"
            )
        if "@" in rest.partition("/")[0]:
            raise ValueError(
                f"cluster.storage holds credentials (before the @ in {scheme}://...): leave them "
                "to the environment, as AWS_ACCESS_KEY_ID or a machine's own role"
            )
        return self


class EvaluateConfig(StrictConfig):
    """Comparison of checkpoints on held-out prompts."""

    prompts: int = Field(128, ge=1, description="held-out prompts")
    samples_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0, description="0 is greedy")


class LoopConfig(StrictConfig):
    """Several rounds of the whole loop (``rlhf loop``)."""

    rounds: int = Field(3, ge=1)
    earlier_policies: int = Field(
        2, ge=0, description="policies of earlier rounds that the newest is compared with"
    )
    active: bool = Field(
        True,
        description="from the second round on, judge the pairs about which the reward model of"
        " the round before is least sure",
    )


class RunConfig(StrictConfig):
    """A whole run. A stage whose section is missing is not run by the pipeline."""

    run_dir: Path = Field(description="everything the run writes goes here")
    seed: int = Field(0, ge=0)
    model: str | None = Field(
        None, description="Hugging Face model to start from, when there is no pretrain section"
    )
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig | None = None
    sft: SFTConfig | None = None
    collect: CollectConfig | None = None
    reward_model: RewardModelConfig | None = None
    reward: RewardConfig = RewardConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    learners: LearnersConfig = LearnersConfig()
    ppo: PPOConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    loop: LoopConfig = LoopConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        if self.ppo is not None:
            if self.sampling.temperature == 0:
                raise ValueError(
                    "sampling.temperature is 0 (greedy), but PPO must sample: set it to 1.0"
                )
            batch = self.ppo.prompts_per_step * self.sampling.samples_per_prompt
            if batch < self.ppo.minibatches:
                raise ValueError(
                    f"ppo.minibatches is {self.ppo.minibatches}, but a step has only {batch} "
                    "samples (ppo.prompts_per_step x sampling.samples_per_prompt)"
                )
            self._responses_fit(self.ppo)
        names = [term.name for term in self.reward.terms]
        if len(names) != len(set(names)):
            raise ValueError(f"reward.terms must have different names, got {names}")
        if self.pretrain is not None and self.model is not None:
            raise ValueError(
                "both model and pretrain are given: to continue training an existing model set "
                "pretrain.init_from, else leave one of the two out"
            )
        context = self.pretrain.context if self.pretrain else None
        need = self.data.max_prompt_tokens + self.sampling.max_new_tokens
        if context is not None and self.pretrain and not self.pretrain.init_from and need > context:
            raise ValueError(
                f"data.max_prompt_tokens {self.data.max_prompt_tokens} + sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens} is more than pretrain.context {context}"
            )
        return self

    def _responses_fit(self, ppo: PPOConfig) -> None:
        """What the advantages and the length penalty need of sampling."""
        if ppo.advantage in GROUP_ESTIMATORS and self.sampling.samples_per_prompt < 2:
            raise ValueError(
                f"ppo.advantage {ppo.advantage!r} compares the responses to a prompt, but "
                "sampling.samples_per_prompt is 1: set it to 2 or more (4 to 16 are usual), and "
                "lower ppo.prompts_per_step if the step is to stay as large as it is"
            )
        limit = self.sampling.max_new_tokens
        if ppo.length_penalty is not None and ppo.length_penalty.max_tokens > limit:
            raise ValueError(
                f"ppo.length_penalty.max_tokens is {ppo.length_penalty.max_tokens}, but no "
                f"response is longer than sampling.max_new_tokens {limit}: set it to {limit} or "
                "less"
            )

    @property
    def base_model(self) -> Path:
        """The model before fine-tuning."""
        if self.pretrain is not None:
            return self.run_dir / "base"
        if self.model is None:
            raise ValueError(
                "the configuration names no model: set `model` to a Hugging Face directory or hub "
                "name, or add a `pretrain` section"
            )
        return Path(self.model)

    @property
    def policy_model(self) -> Path:
        """What PPO starts from and keeps as its reference."""
        return self.run_dir / "sft" if self.sft is not None else self.base_model

    @property
    def policy_names(self) -> tuple[str, str]:
        """What tables call the policy before and after PPO.

        A round of ``rlhf loop`` starts from what the one before left, so its policies are numbered,
        as in the judgements: round N makes ``policy-(N+1)`` of ``policy-N``.
        """
        if self.collect is not None and self.collect.round:
            return f"policy-{self.collect.round}", f"policy-{self.collect.round + 1}"
        if self.sft is not None:
            return "sft", "ppo"
        return "base" if self.pretrain is not None else "reference", "ppo"

    @property
    def reward_terms(self) -> tuple[RewardTerm, ...]:
        """The configured terms; by default the reward model that this run trains."""
        if self.reward.terms:
            return self.reward.terms
        if self.reward_model is None:
            raise ValueError(
                "the configuration has no reward: add reward.terms, or a reward_model section"
            )
        return (RewardTerm(name="reward_model", model=str(self.run_dir / "reward_model")),)


def load_config(path: Path | None, overrides: Sequence[str] = (), **defaults: Any) -> RunConfig:
    """Read a YAML file and apply ``key.sub=value`` overrides.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not YAML, an unknown key, a wrong value. The message lists every problem.
    """
    values: dict[str, Any] = dict(defaults)
    if path is not None:
        values |= _read_yaml(path)
    for override in overrides:
        _set(values, override)
    source = str(path) if path else "the command line"
    return build_config(values, source=source, overrides=overrides)


def build_config(
    values: Mapping[str, Any], source: str, overrides: Sequence[str] = ()
) -> RunConfig:
    """Validate; turn pydantic's errors into sentences that name the override they come from."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_sentence(e, overrides)}" for e in error.errors())
        raise ValueError(f"{source}: the configuration is not valid:\n{problems}") from None


def override_config(config: RunConfig, overrides: Sequence[str], source: str) -> RunConfig:
    """A copy of ``config`` with ``key.sub=value`` overrides applied and validated again."""
    values = config.model_dump(mode="json", exclude_unset=False)
    for override in overrides:
        _set(values, override)
    return build_config(values, source=source, overrides=overrides)


def write_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration, so that a run can be repeated from its directory."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    replace_text(path, text)


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give a YAML file with --config")
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration file at {path}: give an existing YAML file with --config "
            "(examples are in configs/)"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of sections, not {type(values).__name__}")
    # A configuration may be written in terms of a folder of the user's (data, home).
    expanded: dict[str, Any] = _expand(values)
    return expanded


def _expand(value: Any) -> Any:
    """``$NAME`` and ``~`` in every string, so that a file can be shared between machines."""
    if isinstance(value, str) and ("$" in value or value.startswith("~")):
        expanded = os.path.expanduser(os.path.expandvars(value))  # noqa: PTH111
        if "$" in expanded:
            raise ValueError(f"{value!r} names an environment variable that is not set")
        return expanded
    if isinstance(value, dict):
        return {k: _expand(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v) for v in value]
    return value


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} must look like section.key=value (ppo.steps=20)")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from None


_WORDS = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be finite",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a section of keys and values",
    "model_type": "must be a section of keys and values",
    "literal_error": "must be {expected}",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
}
"""What is wrong, by pydantic's type of error; others keep pydantic's own message."""


def _sentence(error: Any, overrides: Sequence[str]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "the configuration"
    origin = next((o for o in reversed(overrides) if where.startswith(o.partition("=")[0])), "")
    origin = f" (set by the override {origin!r})" if origin else ""
    if error["type"] == "extra_forbidden":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        parents = ".".join(str(part) for part in error["loc"][:-1])
        full = f"{parents}.{near[0]}" if parents and near else "".join(near)
        hint = f"did you mean {full!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}{origin}"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}{origin}"
    if error["type"] == "missing":
        return f"{where}: is missing{origin}"
    message = _WORDS.get(error["type"], error["msg"][0].lower() + error["msg"][1:])
    return f"{where}: {message.format(**error.get('ctx', {}))}, not {error['input']!r}{origin}"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names of the fields of the section that a validation error points into."""
    model: type[BaseModel] | None = RunConfig
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part)) if model else None
        model = _section_of(field.annotation) if field else None
    return sorted(model.model_fields) if model else []


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


Stage = Literal["pretrain", "sft", "collect", "reward", "ppo", "evaluate", "report"]

"""Configuration of prompts, sampling and rollouts. Light on purpose: no torch, Ray or vLLM.

Every class is frozen and refuses keys it does not know; ``cluster.config`` composes them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class StrictConfig(BaseModel):
    """Base of every configuration class: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class NewswireConfig(StrictConfig):
    """The generated newswire: articles of mixed quality whose true quality is computable."""

    language: Literal["en", "zh"] = "en"
    articles: int = Field(6000, ge=10, description="training articles to generate")
    held_out: int = Field(256, ge=1, description="further articles kept for evaluation only")
    good_share: float = Field(
        0.3, gt=0, lt=1, description="share of next paragraphs written without any fault"
    )


class DataConfig(StrictConfig):
    """Where prompts and texts come from: the generated newswire, or the user's own files.

    A source is one of

    - a ``.jsonl``, ``.jsonl.gz``, ``.parquet`` or ``.csv`` file, or a pattern such as
      ``news/*_train.jsonl.gz``;
    - a directory saved by the ``datasets`` library;
    - a dataset on the Hugging Face hub: ``owner/name``, ``owner/name:subset``,
      ``owner/name@split`` or ``owner/name:subset@split``.

    By default a row has a prompt in ``prompt_field`` (a text, or a list of chat messages) and a
    response in ``response_field``; a list of messages that ends with the assistant's turn is both.
    Two views read other shapes of data; they apply to prompts, corpus and sft alike:
    ``news_paragraphs`` and ``prompt_words``.
    """

    newswire: NewswireConfig | None = Field(None, description="generate the data; excludes files")
    prompts: str | None = Field(None, description="prompts for generation and PPO")
    eval_prompts: str | None = Field(None, description="held-out prompts for evaluation")
    corpus: str | None = Field(None, description="plain texts for pre-training")
    sft: str | None = Field(None, description="prompt and response pairs for fine-tuning")
    preferences: str | None = Field(None, description="prompt, chosen, rejected")
    split: str = Field("train", description="split to read when the source is a dataset")
    id_field: str = Field("id", description="identity of a row; FILE:LINE where it is missing")
    prompt_field: str = "prompt"
    response_field: str = "response"
    text_field: str = Field("text", description="of a corpus, and of prompt_words")
    label_field: str = Field("flagged", description="of labelled texts: true or false, 1 or 0")
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    title_field: str = Field("title", description="of news_paragraphs")
    paragraphs_field: str = Field("paragraphs", description="of news_paragraphs: a list of texts")
    news_paragraphs: int | None = Field(
        None,
        ge=0,
        description="rows are articles: the prompt is the title and the first so many paragraphs,"
        " the response is the next paragraph",
    )
    prompt_words: int | None = Field(
        None,
        ge=1,
        description="rows are plain texts: the prompt is the first so many words (runs between"
        " white space) of text_field, the response is the rest",
    )
    chat_template: bool = Field(
        False, description="render text prompts as a user's turn of the tokenizer's chat template"
    )
    max_prompt_tokens: int = Field(256, ge=1, description="longer prompts follow overlong_prompts")
    overlong_prompts: Literal["error", "skip", "truncate_left"] = "error"
    limit: int | None = Field(None, ge=1, description="use at most this many rows of a source")

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.newswire is not None:
            files = ("prompts", "eval_prompts", "corpus", "sft")
            given = [name for name in files if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"data.newswire generates the data: leave data.{given[0]} out, or newswire"
                )
            if self.chat_template or self.news_paragraphs is not None or self.prompt_words:
                raise ValueError(
                    "data.newswire makes plain-text prompts: leave chat_template, news_paragraphs "
                    "and prompt_words out"
                )
        if self.news_paragraphs is not None and self.prompt_words is not None:
            raise ValueError(
                "data.news_paragraphs and data.prompt_words are two views of a row: choose one"
            )
        return self


class SamplingConfig(StrictConfig):
    """How responses are sampled. Neutral by default: no top-k, no top-p, no penalties, because
    PPO's ratio assumes that the sampled distribution is the policy's own."""

    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(1.0, ge=0, description="0 is greedy; PPO needs > 0")
    samples_per_prompt: int = Field(1, ge=1)


class EngineConfig(StrictConfig):
    """One vLLM engine."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_model_len: int | None = Field(None, ge=8, description="context; default: the model's own")
    max_num_seqs: int = Field(64, ge=1, description="sequences decoded at once")
    threads: int = Field(1, ge=1, description="CPU threads of the engine's process")
    kv_cache_gib: float = Field(0.5, gt=0, description="CPU only: memory for the KV cache")
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1, description="GPU only")
    tensor_parallel_size: int = Field(1, ge=1)
    enforce_eager: bool = Field(True, description="False lets vLLM compile (slower start)")
    weight_transfer: Literal["ray", "nccl"] = Field(
        "ray",
        description="ray: through the object store; nccl: from GPU to GPU, for a trainer of your"
        " own that drives RolloutPool.handles, not for a run of rlhf",
    )


class RolloutConfig(StrictConfig):
    """The pool of Ray actors that generate."""

    num_actors: int = Field(1, ge=1, description="as many are wanted, and asked of an autoscaler")
    min_actors: int | None = Field(
        None,
        ge=1,
        description="as few may generate while others are lost or lack room that learners and"
        " reward replicas do not need; default: num_actors",
    )
    max_actors: int | None = Field(
        None,
        ge=1,
        description="as many are started while nodes have room for them; default: num_actors",
    )
    num_cpus_per_actor: float = Field(1.0, ge=0)
    num_gpus_per_actor: float = Field(0.0, ge=0)
    resources_per_actor: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources of nodes for generators, as {rlhf_generator: 1}",
    )
    start_timeout_s: float = Field(300.0, gt=0, description="an engine must be ready by then")
    heartbeat_timeout_s: float = Field(
        30.0,
        gt=0,
        description="an actor that works on samples must answer by then; suspected after a third",
    )
    sample_timeout_s: float = Field(300.0, gt=0, description="no sample finished for so long")
    update_timeout_s: float = Field(120.0, gt=0, description="a weight update must confirm by then")
    max_retries: int = Field(2, ge=0, description="retries of a sample whose generation failed")
    retry_pause_s: float = Field(
        0.25, ge=0, description="before the first retry of such a sample; doubles with each"
    )
    probe_tolerance: float = Field(
        1e-3,
        gt=0,
        description="largest |Δ log p| between engine and learner on the probe after an update;"
        " 1e-3 suits float32, bfloat16 engines need about 0.1",
    )
    engine: EngineConfig = EngineConfig()

    @property
    def actor_resources(self) -> dict[str, float]:
        """What one actor asks of Ray."""
        given = {"CPU": self.num_cpus_per_actor, "GPU": self.num_gpus_per_actor}
        return given | self.resources_per_actor

    @property
    def fewest_actors(self) -> int:
        return self.num_actors if self.min_actors is None else self.min_actors

    @property
    def most_actors(self) -> int:
        return self.num_actors if self.max_actors is None else self.max_actors

    @model_validator(mode="after")
    def _bounds_fit(self) -> RolloutConfig:
        if not self.fewest_actors <= self.num_actors <= self.most_actors:
            raise ValueError(
                f"rollout.num_actors is {self.num_actors}, which is not between min_actors"
                f" {self.fewest_actors} and max_actors {self.most_actors}"
            )
        if self.engine.weight_transfer == "nccl" and self.fewest_actors != self.most_actors:
            raise ValueError(
                "rollout.engine.weight_transfer 'nccl' reaches the actors that there are when"
                " weights are sent, and no later ones: use 'ray' with min_actors or max_actors"
            )
        return self

"""Configuration of everything that takes a gradient. No torch or Ray here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from actors.config import StrictConfig


class OptimizerConfig(StrictConfig):
    """AdamW with warm-up and decay. Adam's eps is 1e-5 as in the N implementation details."""

    learning_rate: float = Field(1e-3, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_share: float = Field(0.0, ge=0, lt=1, description="share of all steps spent warming up")
    max_grad_norm: float = Field(1.0, gt=0, description="clip of the global gradient norm")


class SupervisedConfig(StrictConfig):
    """What the three supervised stages share."""

    epochs: float = Field(1.0, gt=0, description="passes over the data; 0.5 is half of it")
    tokens_per_step: int = Field(8192, ge=1, description="padded tokens of one optimizer step")
    tokens_per_micro_batch: int = Field(
        8192, ge=1, description="padded tokens held at once; on CPU 4096 stays in the cache"
    )
    bf16: bool = Field(
        False, description="bfloat16 autocast: for GPUs, and CPUs with avx512_bf16 or amx"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; default: all cores")
    checkpoint_seconds: float = Field(120.0, gt=0, description="how often a stage saves its state")
    held_out_share: float = Field(0.05, gt=0, lt=1, description="share of the data kept for eval")
    evaluations: int = Field(
        4, ge=1, description="how often the held-out loss is measured, the last at the end"
    )
    overlong: Literal["skip", "error"] = Field(
        "skip", description="examples beyond the context; pretraining cuts documents instead"
    )
    optimizer: OptimizerConfig = OptimizerConfig()


class PretrainConfig(SupervisedConfig):
    """A tokenizer and a small Llama from scratch, or ``init_from`` an existing model."""

    init_from: str | None = Field(None, description="model to continue from instead of scratch")
    vocab_size: int = Field(1024, ge=260)
    hidden_size: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    kv_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(384, ge=8)
    context: int = Field(256, ge=16, description="positions the model is built for")
    rope_theta: float = Field(
        100_000.0, gt=0, description="base of the rotary positions; large values turn slowly"
    )
    tie_embeddings: bool = True
    chat_template: str | None = Field(
        None, description="give the new tokenizer a chat template: chatml, or Jinja text"
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> PretrainConfig:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by heads {self.heads}, and heads by "
                f"kv_heads {self.kv_heads}"
            )
        return self


class SFTConfig(SupervisedConfig):
    """Fine-tuning on prompt and response pairs: only the response (and its EOS) is trained."""


class RewardModelConfig(SupervisedConfig):
    """Scalar-head reward model: Bradley-Terry on comparisons, squared error on ratings."""

    held_out_share: float = Field(
        0.2, gt=0, lt=1, description="share of the prompts kept to measure the accuracy on"
    )
    choosing_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the other prompts that chooses the best evaluation; 0 keeps the last",
    )
    strength_margin: float = Field(
        0.0, ge=0, description="lead asked of the preferred response per grade of strength above 1"
    )
    labels: Literal["votes", "weighted", "consensus"] = Field(
        "votes",
        description="votes: every judgement counts the same; weighted: by how reliable its judge"
        " is; consensus: every judgement of a pair says what the judges together probably mean"
        " (both by Dawid and Skene's model). Accuracy is always measured on the votes",
    )
    rating_weight: float = Field(1.0, ge=0, description="weight of the regression loss on ratings")
    normalize_samples: int = Field(
        256, ge=0, description="samples of the SFT model on which the output gets mean 0, std 1"
    )


class KLConfig(StrictConfig):
    """Where the KL to the reference enters, how it is estimated and controlled."""

    where: Literal["reward", "loss", "off"] = "reward"
    estimator: Literal["k1", "k2", "k3", "k3_st_k2"] = Field(
        "k1", description="Schulman's estimators; k3_st_k2 is k3 with k2's gradient"
    )
    coef: float = Field(0.05, ge=0)
    adaptive: bool = Field(False, description="adapt coef towards target (arXiv 1909.08593)")
    target: float = Field(6.0, gt=0, description="nats per sequence")
    horizon: int = Field(10_000, ge=1, description="episodes")

    @model_validator(mode="after")
    def _estimator_fits(self) -> KLConfig:
        if self.where == "loss" and self.estimator in ("k1", "k3"):
            raise ValueError(
                f"kl.estimator {self.estimator!r} has a biased gradient in the loss: "
                "use k2 or k3_st_k2"
            )
        if self.where == "reward" and self.estimator == "k3_st_k2":
            raise ValueError("kl.estimator 'k3_st_k2' is for kl.where 'loss'; use k1, k2 or k3")
        return self


class LengthPenaltyConfig(StrictConfig):
    """Soft overlong punishment (DAPO, arXiv 2503.14476, equation 13), added to the score."""

    max_tokens: int = Field(
        ge=2, description="response tokens from which on the penalty is whole: the length limit"
    )
    cache_tokens: int = Field(
        ge=1, description="it grows linearly over the last so many tokens before max_tokens"
    )
    factor: float = Field(1.0, gt=0, description="the whole penalty, in units of the score")

    @model_validator(mode="after")
    def _cache_fits(self) -> LengthPenaltyConfig:
        if self.cache_tokens >= self.max_tokens:
            raise ValueError(
                f"length_penalty.cache_tokens {self.cache_tokens} must be less than max_tokens "
                f"{self.max_tokens}: shorter responses are free of the penalty"
            )
        return self


class DynamicSamplingConfig(StrictConfig):
    """Groups whose rewards are all alike are not trained on, and further prompts are asked in
    their place (DAPO, arXiv 2503.14476, section 3.2)."""

    max_extra_rounds: int = Field(
        3,
        ge=0,
        description="rounds of further prompts in a step; then what there is is trained,"
        " unless that is less than ppo.min_trained_share",
    )
    min_spread: float = Field(
        0.0, ge=0, description="a group's rewards must differ by more than this"
    )


class LearnersConfig(StrictConfig):
    """The RLlib LearnerGroup. The result does not depend on ``num_learners``."""

    num_learners: int = Field(1, ge=0, description="remote learners; 0 trains in the driver")
    num_cpus_per_learner: float = Field(1.0, ge=0)
    num_gpus_per_learner: float = Field(0.0, ge=0)
    resources_per_learner: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources of nodes for learners, as {rlhf_learner: 1}",
    )
    threads: int = Field(1, ge=1, description="CPU threads of a learner")
    start_timeout_s: float = Field(300.0, gt=0, description="there must be room by then")
    timeout_s: float = Field(600.0, gt=0, description="deadline of one update")
    max_restarts: int = Field(
        3,
        ge=0,
        description="how often in a row lost learners are built anew, to go on from the last"
        " checkpoint; a step further than ever before begins the count anew",
    )

    @property
    def learner_resources(self) -> dict[str, float]:
        """What one learner asks of Ray."""
        given = {"CPU": self.num_cpus_per_learner, "GPU": self.num_gpus_per_learner}
        return given | self.resources_per_learner


class DriftConfig(StrictConfig):
    """How far the engine's log-probabilities may be from the learner's, over a step's tokens.

    They are computed twice from the same weights, so all that may differ is rounding. The defaults
    suit float32 on both sides (typically 1e-6 on average); bfloat16 on either side rounds to about
    0.01 nats on average and half a nat at worst (``BFLOAT16_DRIFT``).
    """

    warn_mean: float | None = Field(
        1e-4, gt=0, description="mean |Δ log p|, nats; null never warns"
    )
    abort_mean: float | None = Field(1e-2, gt=0, description="mean |Δ log p| that stops the run")
    warn_max: float | None = Field(1e-2, gt=0, description="largest |Δ log p|, nats")
    abort_max: float | None = Field(1.0, gt=0)
    warn_sample_size: float | None = Field(
        0.99, gt=0, le=1, description="effective sample size, share of the tokens: warns below"
    )
    abort_sample_size: float | None = Field(0.9, gt=0, le=1)
    warn_correlation: float | None = Field(
        0.999, gt=0, le=1, description="Pearson correlation of both log-probabilities: warns below"
    )
    abort_correlation: float | None = Field(0.9, gt=0, le=1)


FLOAT32_DRIFT = DriftConfig()
BFLOAT16_DRIFT = DriftConfig(
    warn_mean=0.05,
    abort_mean=0.3,
    warn_max=1.0,
    abort_max=5.0,
    warn_sample_size=0.95,
    abort_sample_size=0.5,
    warn_correlation=0.98,
    abort_correlation=0.7,
)
AdvantageEstimator = Literal[
    "gae", "grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
]
GROUP_ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus_baseline")
"""Those that compare a response with the other responses to its prompt."""
STALE_IMPORTANCE_CAP = 2.0
WHITENED_ESTIMATORS = ("gae", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


class PPOConfig(StrictConfig):
    """PPO for language models, and its relatives without a critic: they differ in how they
    estimate advantages (docs/advantages.md) and in nothing else. The defaults are those of
    arXiv 2403.17031 and of 'The N Implementation Details of RLHF with PPO'."""

    steps: int = Field(50, ge=1, description="PPO iterations")
    prompts_per_step: int = Field(64, ge=1)
    advantage: AdvantageEstimator = Field(
        "gae",
        description="gae is PPO with a critic; the others have none, and the settings of critic, "
        "critic_from_reward_model, value_clip and lam say nothing to them",
    )
    group_std: bool = Field(
        True, description="grpo only: divide by the group's std; false is Dr. GRPO"
    )
    epochs: int = Field(4, ge=1)
    minibatches: int = Field(4, ge=1, description="optimizer steps per epoch")
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(
        None, gt=0, description="upper clip when it differs; DAPO has 0.28 (arXiv 2503.14476)"
    )
    dual_clip: float | None = Field(
        None, gt=1, description="c of dual-clip PPO (arXiv 1912.09729), 3.0 when on"
    )
    loss_aggregation: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean",
        description="of an optimizer step: over all its tokens, or over each response's tokens "
        "and then over the responses",
    )
    value_clip: float = Field(0.2, gt=0)
    value_loss_coef: float = Field(0.1, ge=0, description="only with shared_trunk")
    shared_trunk: bool = Field(False, description="one network with two heads")
    entropy_coef: float = Field(0.0, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool | None = Field(
        None, description="over all tokens of a step; default: yes, but for grpo and rloo"
    )
    whiten_rewards: bool = Field(False, description="gae only, and without shifting the mean")
    normalize_scores: bool = Field(
        False,
        description="shift and scale scores such that those of the first step have mean 0 and "
        "standard deviation 1 (arXiv 1909.08593, section 2.1). Reward models of this project are "
        "normalised already; a function or a server whose scores are tens needs it, or the critic "
        "never comes near",
    )
    score_clip: float = Field(
        10.0, gt=0, description="scores, normalised if they are, are clipped to +- this"
    )
    truncated: Literal["score", "penalty", "fixed", "filter"] = Field(
        "score",
        description="what a response cut off by the length limit gets; filter: it is not trained "
        "on (overlong filtering of DAPO, arXiv 2503.14476, section 3.4)",
    )
    truncated_value: float = Field(-1.0, description="the fixed score, or the penalty added")
    length_penalty: LengthPenaltyConfig | None = None
    dynamic_sampling: DynamicSamplingConfig | None = None
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="1: the next step is generated while the learners work on this one, by weights"
        " that are one update behind (docs/overlap.md)",
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="cap of the truncated importance weight learner / engine; 2.0 is usual, and"
        " the default with max_staleness 1",
    )
    kl: KLConfig = KLConfig()
    policy: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.999))
    critic: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
    critic_from_reward_model: bool = True
    tokens_per_micro_batch: int = Field(8192, ge=1, description="padded tokens held at once")
    bf16: bool = Field(False, description="bfloat16 autocast in forward and backward")
    drift: DriftConfig | None = Field(
        None,
        description="thresholds of engine against learner; default: for float32, or with bf16 for"
        " bfloat16. Set it when only rollout.engine.dtype is bfloat16",
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="optimizer steps in a row whose gradient is not finite before an error"
    )
    min_trained_share: float = Field(
        0.5, gt=0, le=1, description="a step with fewer good samples than this stops the run"
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="the latest ones")
    keep_best: str | None = Field(
        "reward/mean",
        description="the checkpoint whose step had most of this metric is kept as well",
    )

    @property
    def drift_limits(self) -> DriftConfig:
        """The thresholds of drift that hold, by the learner's precision unless configured."""
        return self.drift or (BFLOAT16_DRIFT if self.bf16 else FLOAT32_DRIFT)

    @property
    def importance_limit(self) -> float | None:
        """The cap of importance weights that holds; ``None`` is no weights."""
        if self.importance_cap is None and self.max_staleness:
            return STALE_IMPORTANCE_CAP
        return self.importance_cap

    @property
    def has_values(self) -> bool:
        """Whether values are learned: by a critic, or by a head on the policy."""
        return self.advantage == "gae"

    @property
    def has_critic(self) -> bool:
        """Whether there is a value model beside the policy."""
        return self.has_values and not self.shared_trunk

    @property
    def whitens_advantages(self) -> bool:
        if self.whiten_advantages is None:
            return self.advantage in WHITENED_ESTIMATORS
        return self.whiten_advantages

    @model_validator(mode="after")
    def _estimator_fits(self) -> PPOConfig:
        name = self.advantage
        problems = {
            "shared_trunk adds a value head": self.shared_trunk and not self.has_values,
            "whiten_rewards scales what a critic must foresee": (
                self.whiten_rewards and not self.has_values
            ),
            f"gamma {self.gamma} discounts token by token": (
                self.gamma != 1 and name in ("grpo", "rloo")
            ),
            "group_std false is Dr. GRPO": not self.group_std and name != "grpo",
            "whiten_advantages false takes away what makes it REINFORCE++": (
                self.whiten_advantages is False and name.startswith("reinforce_plus_plus")
            ),
            "dynamic_sampling drops groups that only a group estimator learns nothing from": (
                self.dynamic_sampling is not None and name not in GROUP_ESTIMATORS
            ),
        }
        for problem, found in problems.items():
            if found:
                raise ValueError(f"{problem}, but ppo.advantage is {name!r}: leave it out")
        if name == "grpo" and self.group_std and self.kl.where == "reward" and self.kl.coef:
            raise ValueError(
                "ppo.advantage 'grpo' divides by the std of each group's rewards, so a KL penalty "
                "in the reward would weigh differently in every group: put it into the loss, "
                "ppo.kl: {where: loss, estimator: k3_st_k2}, or set kl.where to 'off'"
            )
        return self

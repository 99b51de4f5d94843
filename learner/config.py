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


class LearnersConfig(StrictConfig):
    """The RLlib LearnerGroup. The result does not depend on ``num_learners``."""

    num_learners: int = Field(1, ge=0, description="remote learners; 0 trains in the driver")
    num_cpus_per_learner: float = Field(1.0, ge=0)
    num_gpus_per_learner: float = Field(0.0, ge=0)
    threads: int = Field(1, ge=1, description="CPU threads of a learner")
    timeout_s: float = Field(600.0, gt=0, description="deadline of one update")


class PPOConfig(StrictConfig):
    """PPO for language models. Numbers in brackets refer to the implementation details of
    arXiv 2403.17031 and of 'The N Implementation Details of RLHF with PPO'."""

    steps: int = Field(50, ge=1, description="PPO iterations")
    prompts_per_step: int = Field(64, ge=1)
    epochs: int = Field(4, ge=1)
    minibatches: int = Field(4, ge=1, description="optimizer steps per epoch")
    clip: float = Field(0.2, gt=0)
    clip_high: float | None = Field(None, gt=0, description="upper clip when it differs")
    dual_clip: float | None = Field(None, gt=1, description="c of dual-clip PPO, 3.0 when on")
    value_clip: float = Field(0.2, gt=0)
    value_loss_coef: float = Field(0.1, ge=0, description="only with shared_trunk")
    shared_trunk: bool = Field(False, description="one network with two heads")
    entropy_coef: float = Field(0.0, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    score_clip: float = Field(10.0, gt=0, description="scores are clipped to +- this first")
    truncated: Literal["score", "penalty", "fixed"] = Field(
        "score", description="what a response cut off by the length limit gets"
    )
    truncated_value: float = Field(-1.0, description="the fixed score, or the penalty added")
    importance_cap: float | None = Field(
        None, gt=0, description="cap of the truncated importance weight learner / engine; 2.0"
    )
    kl: KLConfig = KLConfig()
    policy: OptimizerConfig = OptimizerConfig(learning_rate=3e-4, betas=(0.9, 0.999))
    critic: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, betas=(0.9, 0.999))
    critic_from_reward_model: bool = True
    tokens_per_micro_batch: int = Field(8192, ge=1, description="padded tokens held at once")
    bf16: bool = Field(False, description="bfloat16 autocast in forward and backward")
    max_skipped_steps: int = Field(
        3, ge=0, description="optimizer steps in a row whose gradient is not finite before an error"
    )
    min_trained_share: float = Field(
        0.5, gt=0, le=1, description="a step with fewer good samples than this stops the run"
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)

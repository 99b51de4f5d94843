"""Which charts the page draws, from which metrics, and what each of them means to a reader."""

from __future__ import annotations

from dataclasses import dataclass

Names = tuple[str, ...]
"""Names one figure may have, the preferred one first."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: a title, what a reader should look for, and the metrics of its curves.

    Attributes:
        lines: For each curve its legend ("" for none) and the metric's possible names.
        spread: Names of the standard deviation that shades a band around the first curve.
        marks: Horizontal lines: value and word.
        sparse: Index of a curve measured now and then only, drawn with dots.
    """

    title: str
    explain: str
    lines: tuple[tuple[str, Names], ...]
    unit: str = ""
    percent: bool = False
    log: bool = False
    spread: Names = ()
    marks: tuple[tuple[float, str], ...] = ()
    sparse: int | None = None


LEARNED: tuple[Panel, ...] = (
    Panel(
        title="Reward",
        explain="Mean score of each step's samples, and one standard deviation around it.",
        lines=(("", ("reward/mean", "ppo/score")),),
        spread=("reward/std", "ppo/score_std"),
    ),
    Panel(
        title="Good texts",
        explain="Share of samples without any fault, by true quality. Never part of the reward.",
        lines=(("", ("measured/good",)),),
        percent=True,
    ),
    Panel(
        title="True quality",
        explain="Mean true quality, 0 to 1. When the reward rises and this does not, the reward"
        " is being gamed.",
        lines=(("", ("measured/true_quality", "measured/quality")),),
    ),
    Panel(
        title="KL to the reference",
        explain="How far the policy has moved from the model it started as, per response.",
        lines=(("", ("ppo/kl_sequence",)),),
        unit="nats",
    ),
    Panel(
        title="Entropy",
        explain="Uncertainty of the next token. Falling to zero means that variety is lost.",
        lines=(("", ("ppo/entropy",)),),
        unit="nats",
    ),
    Panel(
        title="Response length",
        explain="Mean tokens of a response. A steady climb often means rambling pays.",
        lines=(("", ("response/length_mean", "ppo/response_length")),),
        unit="tokens",
    ),
    Panel(
        title="Ended by itself",
        explain="Share of responses that end with the end-of-text token instead of being cut off.",
        lines=(("", ("response/eos_rate", "ppo/eos_rate")),),
        percent=True,
    ),
    Panel(
        title="Reward after the KL penalty",
        explain="What PPO maximises: the score less the price of moving away.",
        lines=(("", ("ppo/reward_shaped",)),),
    ),
)

HEALTH: tuple[Panel, ...] = (
    Panel(
        title="Engine against learner",
        explain="Difference of the log-probabilities that vLLM sampled with and that the learner"
        " computes. Rounding only, when the weights are in step: below 1e-4 in float32.",
        lines=(("mean", ("ppo/engine_delta_mean",)), ("largest", ("ppo/engine_delta_max",))),
        log=True,
        unit="|Δ log p|",
    ),
    Panel(
        title="What an update moves",
        explain="With max_staleness 1 samples are one update older than the learner: how far that"
        " update moved the log-probabilities of their tokens.",
        lines=(("mean", ("ppo/stale_delta_mean",)), ("largest", ("ppo/stale_delta_max",))),
        log=True,
        unit="|Δ log p|",
    ),
    Panel(
        title="Clipped tokens",
        explain="Share of tokens whose update was clipped. A few per cent is usual; beyond a"
        " quarter the steps are too large.",
        lines=(
            ("policy", ("ppo/clip_fraction",)),
            ("value", ("ppo/value_clip_fraction",)),
        ),
        percent=True,
    ),
    Panel(
        title="Explained variance",
        explain="How much of the return the critic foresees: 1 is all of it, 0 none.",
        lines=(("", ("ppo/explained_variance",)),),
    ),
    Panel(
        title="Change in one step",
        explain="Approximate KL between the policy after and before an update, per token.",
        lines=(("", ("ppo/approx_kl",)),),
        unit="nats",
    ),
    Panel(
        title="Probability ratio",
        explain="Of new to old policy: the mean stays near 1, the largest shows outliers.",
        lines=(("mean", ("ppo/ratio_mean",)), ("largest", ("ppo/ratio_max",))),
        log=True,
    ),
    Panel(
        title="Gradient norm",
        explain="Before clipping. Spikes that do not come back down announce divergence.",
        lines=(
            ("policy", ("ppo/grad_norm_policy",)),
            ("critic", ("ppo/grad_norm_critic",)),
        ),
        log=True,
    ),
    Panel(
        title="Policy loss",
        explain="The clipped surrogate. Its sign and size say little; a jump says something.",
        lines=(("", ("ppo/loss_policy",)),),
    ),
    Panel(
        title="Value loss",
        explain="The critic's squared error.",
        lines=(("", ("ppo/loss_value",)),),
    ),
    Panel(
        title="KL coefficient",
        explain="The price of a nat of KL; changes only under adaptive control.",
        lines=(("", ("ppo/kl_coef",)),),
    ),
    Panel(
        title="Effective sample size",
        explain="Share of the tokens that counts when engine and learner disagree; 1 is all.",
        lines=(("", ("ppo/stale_sample_size", "ppo/effective_sample_size")),),
        percent=True,
    ),
    Panel(
        title="First minibatch",
        explain="Largest |log ratio| before the first optimizer step, where old and new policy"
        " are the same: 0 but for rounding.",
        lines=(("", ("ppo/first_log_ratio_max",)),),
    ),
    Panel(
        title="Skipped optimizer steps",
        explain="Left out because their gradient was not finite.",
        lines=(
            ("policy", ("ppo/skipped_steps_policy",)),
            ("critic", ("ppo/skipped_steps_critic",)),
        ),
    ),
    Panel(
        title="Failed samples",
        explain="Samples set aside because generating or scoring them failed.",
        lines=(("", ("samples/failed",)),),
    ),
    Panel(
        title="Filtered samples",
        explain="Scored but not trained on: cut off, or of a group whose rewards are all alike.",
        lines=(("", ("samples/filtered",)),),
    ),
    Panel(
        title="Groups without spread",
        explain="Share of the trained prompts whose responses all got the same reward: a group"
        " estimator learns nothing from them.",
        lines=(("", ("ppo/groups_without_spread",)),),
        percent=True,
    ),
    Panel(
        title="Throughput",
        explain="Response tokens generated, scored and learned from per second.",
        lines=(("", ("tokens/per_second",)),),
        unit="tokens/s",
    ),
)

SUPERVISED: tuple[Panel, ...] = (
    Panel(
        title="Loss",
        explain="On the training data, and on data kept apart. When the two part, it memorises.",
        lines=(("training", ("loss",)), ("held out", ("held_out_loss",))),
        sparse=1,
    ),
    Panel(
        title="Agreement with the judges",
        explain="Share of judgements it agrees with; a tie counts as a miss.",
        lines=(
            ("training", ("agreement", "accuracy")),
            ("held out", ("held_out_agreement", "held_out_accuracy")),
        ),
        percent=True,
        marks=((0.5, "a coin"),),
        sparse=1,
    ),
    Panel(
        title="Gradient norm",
        explain="Before clipping.",
        lines=(("", ("gradient_norm", "grad_norm")),),
        log=True,
    ),
    Panel(
        title="Throughput",
        explain="Tokens trained on per second.",
        lines=(("", ("tokens_per_second",)),),
        unit="tokens/s",
    ),
)

PHASES: tuple[tuple[str, Names], ...] = (
    ("generate and score", ("seconds/generate",)),
    ("annotate", ("ppo/seconds_annotate",)),
    ("forward and backward", ("ppo/seconds_forward_backward",)),
    ("optimizer", ("ppo/seconds_optimizer",)),
    ("broadcast weights", ("seconds/broadcast",)),
)

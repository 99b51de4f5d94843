"""What every metric of a PPO step means, where it is healthy, and what to do when it is not.

The one place for it: ``docs/metrics.md`` is made from these records, the report shows the metrics
that left their range, and a run says it once when one does. See :mod:`cluster.health`.

Ranges are of runs that learned (the quickstart and the published settings of arXiv 2403.17031 and
1909.08593), drawn wide: outside of one a person should look, inside nothing is promised.
"""

from __future__ import annotations

from cluster.metric import Metric

SLOWER = (
    "Lower `ppo.policy.learning_rate`, or take fewer `ppo.epochs`; raise `ppo.kl.coef` when the"
    " text has become worse."
)
LENGTH_REMEDY = (
    "Read samples. Short: the reward pays for saying little, or EOS is likelier than it should be"
    " (train SFT longer). Long: a reward that grows with length; subtract a price for length."
)
EOS_REMEDY = (
    "Raise `sampling.max_new_tokens`, set `ppo.truncated` to penalty or fixed, and check that the"
    " SFT data ends in EOS and that the model's EOS ids are right."
)
PRECISION_REMEDY = (
    "Engine and learner do not compute the same. Check `rollout.engine.dtype` against `ppo.bf16`,"
    " the temperature, and that weights are confirmed after every step; for 16-bit engines set"
    " `ppo.importance_cap` to 2."
)
STALE_REMEDY = (
    "The policy moves so far in one update that samples from before it say little: lower"
    " `ppo.policy.learning_rate`, or set `ppo.max_staleness` to 0."
)

REWARD = (
    Metric(
        name="reward/mean",
        meaning="Mean score of the step's samples, all terms weighted, before clipping and KL.",
        trend="rises, then levels off",
        remedy="Flat: look at `ppo/clip_fraction` and `reward/std`. Rising while the texts get"
        " worse: the reward is being gamed; raise `ppo.kl.coef` and mend the reward.",
    ),
    Metric(
        name="reward/std",
        meaning="Standard deviation of the scores over the step's samples.",
        low=1e-6,
        patience=3,
        remedy="All samples score alike, so there is nothing to learn from: look at what the reward"
        " returns, and raise `sampling.temperature` or take more varied prompts.",
    ),
    Metric(
        name="reward/min",
        meaning="Lowest score of the step.",
        trend="within a few standard deviations of the mean",
        remedy="Far below all others: an error of the reward; `ppo.score_clip` bounds it.",
    ),
    Metric(
        name="reward/max",
        meaning="Highest score of the step.",
        trend="within a few standard deviations of the mean",
        remedy="Read that sample: a score far above the others is often an exploit.",
    ),
    Metric(
        name="reward/<model>_drift",
        meaning="How far a reward model's scores have moved from those of the texts on which it was"
        " normalised, in standard deviations of those; of an ensemble, for each member.",
        trend="rises with the reward, and levels off",
        remedy="The further away, the less the scores are worth: judge samples of this policy,"
        " train the reward model again, or raise `ppo.kl.coef`.",
    ),
    Metric(
        name="reward/<term>",
        meaning="Mean of one term of the reward, before its weight; also of each member of an"
        " ensemble.",
        trend="rises, or stays, together with the others",
        remedy="One term that climbs alone is being gamed: lower its weight.",
    ),
    Metric(
        name="measured/<name>",
        meaning="Mean of a figure that is recorded and never trained on, such as true quality.",
        trend="moves with the reward",
        remedy="Reward up and this down: the reward is being gamed; stop, and judge new samples.",
    ),
    Metric(
        name="ppo/score",
        meaning="As `reward/mean`, over the samples that were trained on.",
        trend="equal to `reward/mean`",
        remedy="See `reward/mean`.",
    ),
    Metric(
        name="ppo/score_std",
        meaning="As `reward/std`, over the samples that were trained on.",
        low=1e-6,
        patience=3,
        remedy="See `reward/std`.",
    ),
    Metric(
        name="ppo/reward_shaped",
        meaning="The return that PPO maximises: clipped score less the price of KL, per sample.",
        trend="rises",
        remedy="Score up and this down: KL costs more than it brings; lower `ppo.kl.coef` or the"
        " learning rate.",
    ),
)

POLICY_CHANGE = (
    Metric(
        name="ppo/kl_sequence",
        meaning="KL to the reference summed over a response (estimator k1), mean over samples:"
        " how far the policy has moved from where it started.",
        unit="nats",
        low=-1.0,
        high=30.0,
        patience=3,
        remedy="High: raise `ppo.kl.coef` or set `ppo.kl.adaptive`, lower the learning rate."
        " Negative for several steps: samples are not the policy's own; see"
        " `ppo/engine_delta_mean`.",
    ),
    Metric(
        name="ppo/kl_token",
        meaning="KL to the reference per response token (estimator k1).",
        unit="nats",
        low=-0.05,
        high=0.5,
        patience=3,
        remedy="As for `ppo/kl_sequence`.",
    ),
    Metric(
        name="ppo/kl_coef",
        meaning="Price of a nat of KL. Changes only with `ppo.kl.adaptive`.",
        high=2.0,
        patience=3,
        remedy="The controller cannot hold its target: lower the learning rate, or raise"
        " `ppo.kl.target`.",
    ),
    Metric(
        name="ppo/entropy",
        meaning="Mean entropy of the policy's next-token distribution at response tokens.",
        unit="nats",
        low=0.05,
        patience=3,
        remedy="Variety is being lost: raise `ppo.kl.coef` or `ppo.entropy_coef`, lower the"
        " learning rate, stop earlier.",
    ),
    Metric(
        name="ppo/approx_kl",
        meaning="KL between the policy before and after the step's updates, per token (estimator"
        " k3), mean over all optimizer steps.",
        unit="nats",
        high=0.05,
        patience=2,
        remedy=SLOWER,
    ),
    Metric(
        name="ppo/clip_fraction",
        meaning="Share of tokens whose policy update was clipped.",
        high=0.25,
        patience=3,
        remedy=SLOWER,
    ),
    Metric(
        name="ppo/ratio_mean",
        meaning="Mean probability ratio of new to old policy, over all optimizer steps.",
        low=0.9,
        high=1.1,
        remedy=SLOWER,
    ),
    Metric(
        name="ppo/ratio_max",
        meaning="Largest probability ratio of new to old policy at any token. Single outliers are"
        " usual and clipped.",
        high=100.0,
        patience=3,
        remedy=f"{SLOWER} When it happens at tokens of negative advantage, set `ppo.dual_clip`.",
    ),
    Metric(
        name="ppo/log_ratio_max",
        meaning="Largest |log ratio| of new to old policy at any token: 0 at learning rate 0.",
        unit="nats",
        trend="follows `ppo/ratio_max`",
        remedy=SLOWER,
    ),
    Metric(
        name="ppo/first_log_ratio_max",
        meaning="Largest |log ratio| in the first minibatch, where old and new policy are the same:"
        " 0 but for rounding.",
        unit="nats",
        high=1e-4,
        coarse_high=0.1,
        remedy="The forward pass does not repeat itself: look for dropout, or a kernel whose result"
        " depends on the batch.",
    ),
)

CRITIC = (
    Metric(
        name="ppo/value",
        meaning="Mean value that the critic gives to the states of the step, before its updates.",
        trend="follows `ppo/reward_shaped`",
        remedy="Lagging far behind: raise `ppo.critic.learning_rate`.",
    ),
    Metric(
        name="ppo/explained_variance",
        meaning="Share of the variance of the returns that the critic foresees: 1 is all of it, 0"
        " is no better than their mean.",
        low=0.0,
        high=1.0,
        patience=5,
        remedy="Start the critic from a reward model, raise `ppo.critic.learning_rate`, or whiten"
        " rewards. Near 0 PPO still works, as REINFORCE with a constant baseline.",
    ),
    Metric(
        name="ppo/loss_value",
        meaning="The critic's loss: half of the (clipped) squared error.",
        trend="falls in the first steps, then follows the spread of the returns",
        remedy="Rising: lower `ppo.critic.learning_rate`; look for rewards far from 0.",
    ),
    Metric(
        name="ppo/value_clip_fraction",
        meaning="Share of tokens whose value update was clipped.",
        high=0.5,
        patience=5,
        remedy="Returns are large beside `ppo.value_clip`: set `ppo.normalize_scores`, or raise"
        " the clip.",
    ),
)

OPTIMIZER = (
    Metric(
        name="ppo/loss_policy",
        meaning="The clipped surrogate, mean over tokens and optimizer steps.",
        trend="small and negative; its size says little",
        remedy="A jump: see `ppo/approx_kl` and `ppo/grad_norm_policy`.",
    ),
    Metric(
        name="ppo/grad_norm_policy",
        meaning="Gradient norm of the policy before clipping, mean over optimizer steps.",
        high=20.0,
        patience=3,
        remedy="Divergence is near: lower `ppo.policy.learning_rate`, go back to an earlier"
        " checkpoint.",
    ),
    Metric(
        name="ppo/grad_norm_critic",
        meaning="Gradient norm of the critic before clipping, mean over optimizer steps.",
        high=100.0,
        patience=3,
        remedy="Rewards are large: set `ppo.normalize_scores` or lower `ppo.score_clip`; lower"
        " `ppo.critic.learning_rate`.",
    ),
    Metric(
        name="ppo/skipped_steps_policy",
        meaning="Optimizer steps of the policy left out because their gradient was not finite.",
        high=0.0,
        remedy="Lower `ppo.policy.learning_rate`; look for rewards far from 0. After"
        " `ppo.max_skipped_steps` in a row the run stops.",
    ),
    Metric(
        name="ppo/skipped_steps_critic",
        meaning="Optimizer steps of the critic left out because their gradient was not finite.",
        high=0.0,
        remedy="Lower `ppo.critic.learning_rate`; look for rewards far from 0. After"
        " `ppo.max_skipped_steps` in a row the run stops.",
    ),
    Metric(
        name="ppo/optimizer_steps",
        meaning="Optimizer steps taken: `ppo.epochs` times `ppo.minibatches`.",
        trend="constant",
        remedy="Fewer than asked for: the step had fewer samples than minibatches.",
    ),
    Metric(
        name="ppo/learning_rate_policy",
        meaning="The policy's learning rate in this step.",
        trend="follows its schedule",
    ),
    Metric(
        name="ppo/learning_rate_critic",
        meaning="The critic's learning rate in this step.",
        trend="follows its schedule",
    ),
)

AGREEMENT = (
    Metric(
        name="ppo/engine_delta_mean",
        meaning="Mean |Δ log p| between the engine that sampled and the learner, per token:"
        " rounding only, when their weights are the same.",
        unit="nats",
        high=1e-4,
        coarse_high=0.05,
        remedy=PRECISION_REMEDY,
    ),
    Metric(
        name="ppo/engine_delta_max",
        meaning="Largest |Δ log p| between engine and learner at any token.",
        unit="nats",
        high=1e-2,
        coarse_high=1.0,
        remedy=PRECISION_REMEDY,
    ),
    Metric(
        name="ppo/effective_sample_size",
        meaning="Share of the tokens that counts when they are weighted by learner over engine"
        " probability: 1 when the two agree.",
        low=0.99,
        coarse_low=0.95,
        high=1.001,
        remedy=PRECISION_REMEDY,
    ),
    Metric(
        name="ppo/engine_correlation",
        meaning="Pearson correlation of the engine's and the learner's log-probabilities.",
        low=0.999,
        coarse_low=0.98,
        high=1.001,
        remedy=PRECISION_REMEDY,
    ),
    Metric(
        name="ppo/stale_delta_mean",
        meaning="With `ppo.max_staleness` 1, mean |Δ log p| between the engine that sampled, one"
        " update ago, and the learner: how far that update moved the policy.",
        unit="nats",
        trend="as large as an update's change",
        remedy=STALE_REMEDY,
    ),
    Metric(
        name="ppo/stale_delta_max",
        meaning="The largest of those at any token.",
        unit="nats",
        trend="follows `ppo/ratio_max`",
        remedy=STALE_REMEDY,
    ),
    Metric(
        name="ppo/stale_sample_size",
        meaning="Share of the tokens that counts when samples of the update before are weighted by"
        " learner over engine probability.",
        low=0.5,
        high=1.001,
        patience=2,
        remedy=STALE_REMEDY,
    ),
    Metric(
        name="ppo/stale_correlation",
        meaning="Pearson correlation of the log-probabilities of the engine, one update ago, and"
        " of the learner.",
        low=0.9,
        high=1.001,
        patience=2,
        remedy=STALE_REMEDY,
    ),
    Metric(
        name="weights/probe_error_max",
        meaning="Largest |Δ log p| on the probe after the step's weights were loaded, of all"
        " engines.",
        unit="nats",
        high=1e-3,
        coarse_high=0.1,
        remedy="An engine does not compute with the learner's weights; beyond"
        " `rollout.probe_tolerance` it refuses to generate.",
    ),
    Metric(
        name="weights/reloads",
        meaning="Engines that refused the step's weights once and took them the second time.",
        high=0.0,
        remedy="Tensors were damaged on the way: look at the machine's memory and network. A second"
        " refusal stops the run.",
    ),
    Metric(
        name="weights/verify_share",
        meaning="Checksums and probe, as a share of the step's time: an upper bound.",
        high=0.05,
        patience=5,
        remedy="Steps are very short; nothing is wrong. More prompts per step make it smaller.",
    ),
    Metric(
        name="weights/seconds_<part>",
        meaning="Computing checksums, computing the probe, and loading, of the slowest engine.",
        unit="s",
        trend="steady",
    ),
    Metric(
        name="weights/megabytes",
        meaning="Size of a weight update.",
        unit="MB",
        trend="constant",
    ),
)

RESPONSES = (
    Metric(
        name="response/length_mean",
        meaning="Mean length of a response, with EOS.",
        unit="tokens",
        low=2.0,
        patience=3,
        remedy=LENGTH_REMEDY,
    ),
    Metric(
        name="response/length_max",
        meaning="Longest response of the step.",
        unit="tokens",
        trend="at or below `sampling.max_new_tokens`",
        remedy="Always at the limit: see `response/eos_rate`.",
    ),
    Metric(
        name="response/eos_rate",
        meaning="Share of responses that end with an EOS token instead of being cut off.",
        low=0.5,
        patience=5,
        remedy=EOS_REMEDY,
    ),
    Metric(
        name="ppo/response_length",
        meaning="As `response/length_mean`, over the samples that were trained on.",
        unit="tokens",
        low=2.0,
        patience=3,
        remedy=LENGTH_REMEDY,
    ),
    Metric(
        name="ppo/eos_rate",
        meaning="As `response/eos_rate`, over the samples that were trained on.",
        low=0.5,
        patience=5,
        remedy=EOS_REMEDY,
    ),
)

ACCOUNTING = (
    Metric(
        name="samples/submitted",
        meaning="Samples asked for: always trained + filtered + failed.",
        trend="constant",
    ),
    Metric(
        name="samples/trained",
        meaning="Samples that were trained on.",
        trend="equal to `samples/submitted`",
        remedy="See `samples/failed`; below `ppo.min_trained_share` the run stops.",
    ),
    Metric(
        name="samples/filtered",
        meaning="Samples that were generated and scored and then left out on purpose.",
        trend="0 without filters",
        remedy="Most of a step: the filters are too narrow for this policy.",
    ),
    Metric(
        name="samples/failed",
        meaning="Samples that could not be generated or scored; none of them was trained on.",
        high=0.0,
        remedy="The reason of each is in `ppo/quarantine.jsonl`; commonest are a reward that raises"
        " or returns NaN, and an engine that died.",
    ),
    Metric(
        name="samples/filtered_<reason>",
        meaning="Filtered samples by reason: cut off, or of a group whose rewards are all alike.",
        trend="falls, or steady",
        remedy="See `samples/filtered`.",
    ),
    Metric(
        name="samples/failed_<stage>",
        meaning="Failed samples by stage: generation or scoring.",
        trend="0",
        remedy="See `samples/failed`.",
    ),
    Metric(
        name="samples/extra_rounds",
        meaning="Further rounds of generation in place of groups without spread.",
        trend="few",
        remedy="Always at its limit: prompts are too easy or too hard for this policy.",
    ),
    Metric(
        name="ppo/groups_without_spread",
        meaning="Share of the trained prompts whose responses all got the same reward; a group"
        " estimator learns nothing from them.",
        high=0.9,
        patience=3,
        remedy="Take prompts of other difficulty, more samples per prompt, or dynamic sampling.",
    ),
    Metric(
        name="ppo/samples",
        meaning="Samples of the PPO batch.",
        trend="equal to `samples/trained`",
    ),
    Metric(
        name="ppo/tokens",
        meaning="Response tokens of the PPO batch.",
        trend="samples times mean length",
    ),
    Metric(
        name="tokens/response",
        meaning="Response tokens of the step.",
        trend="equal to `ppo/tokens`",
    ),
)

RECOVERY = (
    Metric(
        name="rollout/engines",
        meaning="Rollout actors that serve the step's new weights.",
        trend="`rollout.num_actors`; between `min_actors` and `max_actors` where they are set",
        remedy="Fewer: the run said which were lost and why; nodes may lack room.",
    ),
    Metric(
        name="recovery/engines_lost",
        meaning="Rollout actors lost since this process started: died, hung, or with their node.",
        trend="0; each is told when it happens",
        remedy="Often and on one node: look at its memory. Nothing is counted twice.",
    ),
    Metric(
        name="recovery/samples_again",
        meaning="Samples in flight on a lost actor, which were generated again with their seeds.",
        trend="0",
        remedy="See `recovery/engines_lost`.",
    ),
    Metric(
        name="recovery/learner_restarts",
        meaning="Learner groups built anew since this process started; each went on from a"
        " checkpoint.",
        trend="0; each is told when it happens",
        remedy="Often: look at the memory of the learners' nodes, and lower `ppo.checkpoint_every`"
        " so that fewer steps are done again.",
    ),
)

TIME = (
    Metric(
        name="tokens/per_second",
        meaning="Response tokens generated, scored and learned from per second of the step.",
        unit="tokens/s",
        trend="steady",
        remedy="Falling: see which `seconds/...` grows.",
    ),
    Metric(name="seconds/step", meaning="The whole step.", unit="s", trend="steady"),
    Metric(
        name="seconds/<phase>",
        meaning="One phase of the step: generate (with scoring), accounting, learn, broadcast.",
        unit="s",
        trend="steady; generate grows with the length of responses",
    ),
    Metric(
        name="ppo/seconds_annotate",
        meaning="Old and reference log-probabilities, and values, of the whole batch.",
        unit="s",
        trend="steady",
    ),
    Metric(
        name="ppo/seconds_forward_backward",
        meaning="Forward and backward passes of all epochs.",
        unit="s",
        trend="steady; most of learning",
    ),
    Metric(
        name="ppo/seconds_optimizer",
        meaning="Clipping and optimizer steps.",
        unit="s",
        trend="steady; small",
    ),
)

GROUPS: tuple[tuple[str, tuple[Metric, ...]], ...] = (
    ("Reward", REWARD),
    ("How far and how fast the policy moves", POLICY_CHANGE),
    ("Critic", CRITIC),
    ("Losses and optimizers", OPTIMIZER),
    ("Engine against learner", AGREEMENT),
    ("Responses", RESPONSES),
    ("Accounting", ACCOUNTING),
    ("What was lost and replaced", RECOVERY),
    ("Time", TIME),
)
"""Every metric of a PPO step, in the order of ``docs/metrics.md``. Patterns follow the names that
they would match as well."""

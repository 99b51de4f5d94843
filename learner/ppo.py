"""The PPO learner: one RLlib ``update()`` is one whole PPO iteration.

Every learner holds the whole batch. It annotates its share (old log-probabilities, reference
log-probabilities, values), and a sum over the group completes the annotations, so that every
learner computes the same advantages. Each optimizer step's rows come from a shuffle that all draw
alike, are shared out by tokens, and go through the models in token-budget micro-batches; the loss
is normalised by the response tokens of the whole step. So the number of learners and the size of
micro-batches change nothing but rounding.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from torch import Tensor, nn

from learner.advantages import gae, shape_rewards, whiten
from learner.batch import (
    Int64Array,
    MicroBatch,
    PPOBatch,
    micro_batches,
    minibatch_rows,
    split_over_ranks,
    take_rows,
)
from learner.config import OptimizerConfig, PPOConfig
from learner.hf_directory import load_causal_lm
from learner.kl import KLController, kl_estimate
from learner.losses import policy_terms, value_loss
from learner.models import CRITIC, POLICY, token_logprobs
from learner.schedule import learning_rate
from learner.ppo_setup import PPOSetup, quiet_start
from learner.statistics import TokenSums, batch_metrics

# |log ratio| that rounding may cause in the first minibatch, where old and new log-probabilities
# come from the same weights through the same operations on the same micro-batches.
FIRST_RATIO_TOLERANCE = {False: 1e-3, True: 0.2}


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is known of every response token before the first optimizer step; all ``[B, R]``."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    entropy: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.old_logprobs, self.reference_logprobs, self.values, self.entropy


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses of an iteration are computed from; all flattened to ``[B * R]``."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    engine_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


class PPOLearner(TorchLearner):  # type: ignore[misc]
    """Policy, critic and their optimizers on one device, in step with the other learners."""

    # ---- building ------------------------------------------------------------------------------

    def build(self) -> None:
        self.setup: PPOSetup = self.config.ppo_setup
        self.ppo: PPOConfig = self.setup.ppo
        torch.set_num_threads(self.setup.learners.threads)
        self.group: Any = None
        if self.distributed:
            # RLlib's own group waits half an hour for a learner that has died.
            timeout = datetime.timedelta(seconds=self.setup.learners.timeout_s)
            self.group = dist.new_group(timeout=timeout)
        with quiet_start():
            super().build()
            self.reference = load_causal_lm(self.setup.reference_dir).to(self._device)
        self.reference.requires_grad_(False)
        self.controller = KLController(self.ppo.kl)
        self.updates = 0
        self.skipped_in_a_row = dict.fromkeys(self.named_optimizers, 0)
        self.last_metrics: dict[str, float] = {}

    @property
    def rank(self) -> int:
        return int(self._learner_index)

    @property
    def world(self) -> int:
        return max(1, int(self.config.num_learners))

    @property
    def named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers by the name of the module they train."""
        return {
            module: self.get_optimizer(module)
            for module in self.module.keys()  # noqa: SIM118
        }

    def configure_optimizers_for_module(self, module_id: str, **_: Any) -> None:
        parameters = list(self._module[module_id].parameters())
        optimizer = torch.optim.AdamW(parameters, fused=True, **self.optimizer_options(module_id))
        self.register_optimizer(module_id=module_id, optimizer=optimizer, params=parameters)

    def optimizer_config(self, module_id: str) -> OptimizerConfig:
        return self.ppo.policy if module_id == POLICY else self.ppo.critic

    def optimizer_options(self, module_id: str) -> dict[str, Any]:
        """AdamW's arguments, as the configuration has them."""
        config = self.optimizer_config(module_id)
        return {
            "lr": config.learning_rate,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }

    def _make_modules_ddp_if_necessary(self) -> None:
        if self.distributed:
            for name in list(self._module.keys()):
                wrapped = TorchDDPRLModule(
                    self._module[name],
                    process_group=self.group,
                    # Buffers hold constants only (rotary frequencies).
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
                self._module.add_module(name, wrapped, override=True)

    # ---- one iteration -------------------------------------------------------------------------

    def update(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        super().update(*args, **kwargs, _no_metrics_reduce=True)
        self.metrics.reduce()
        return self.last_metrics

    def compute_loss_for_module(self, **_: Any) -> Tensor:
        raise NotImplementedError("losses here belong to micro-batches, not to an RLlib batch")

    def _convert_batch_type(self, batch: Any, *_: Any, **__: Any) -> Any:
        return batch  # rows are cut and moved to the device one micro-batch at a time

    def _update(self, batch: dict[str, Any], **_: Any) -> tuple[Any, dict[str, Tensor], Any]:
        started = time.perf_counter()
        # OpenMP keeps the number for each thread, and this may not be the one that built us.
        torch.set_num_threads(self.setup.learners.threads)
        self.batch = PPOBatch(**dict(batch[POLICY].items()))
        self._check_vocabulary()
        self._set_learning_rates()
        annotations = self._annotate()
        targets, metrics = self._targets(annotations)
        annotated = time.perf_counter()
        sums = TokenSums(self._device)
        seconds_optimizer = 0.0
        for epoch in range(self.ppo.epochs):
            for index, rows in enumerate(self._plan(epoch)):
                first = sums if epoch == 0 and index == 0 else None
                self._accumulate_gradients(rows, targets, sums)
                if first is not None:
                    self._check_first_ratio(sums)
                before = time.perf_counter()
                self._step_optimizers(sums)
                seconds_optimizer += time.perf_counter() - before
        sums.reduce(self.group)
        metrics |= sums.metrics()
        metrics["ppo/kl_coef"] = self.controller.coef
        self.controller.observe(metrics["ppo/kl_sequence"], len(self.batch))
        for name, optimizer in self.named_optimizers.items():
            metrics[f"ppo/learning_rate_{name}"] = optimizer.param_groups[0]["lr"]
        self.updates += 1
        ended = time.perf_counter()
        metrics["ppo/seconds_annotate"] = annotated - started
        metrics["ppo/seconds_optimizer"] = seconds_optimizer
        metrics["ppo/seconds_forward_backward"] = ended - annotated - seconds_optimizer
        self.last_metrics = metrics
        return {}, {}, {}

    def _check_vocabulary(self) -> None:
        known = int(self.module[POLICY].unwrapped().model.config.vocab_size)
        largest = int(self.batch.input_ids.max())
        if largest >= known:
            raise ValueError(
                f"PPO step {self.updates}: a sample holds token id {largest}, the policy's "
                f"vocabulary ends at {known - 1}: prompts and policy have different tokenizers"
            )

    def _set_learning_rates(self) -> None:
        for name, optimizer in self.named_optimizers.items():
            rate = learning_rate(self.optimizer_config(name), self.updates, self.setup.total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _plan(self, epoch: int) -> list[Int64Array]:
        """The rows of every optimizer step of an epoch, the same on every learner."""
        return minibatch_rows(
            len(self.batch),
            self.ppo.minibatches,
            seed=self.setup.seed,
            update=self.updates,
            epoch=epoch,
        )

    def _own_micro_batches(self, rows: Int64Array) -> list[dict[str, Any]]:
        """This learner's part of an optimizer step, as inputs of the modules.

        Never empty: with fewer rows than learners, a learner without rows gets one row without
        response tokens, so that it takes part in the exchange of gradients.
        """
        batch = self.batch
        lengths = batch.prompt_lengths + batch.response_lengths
        share = split_over_ranks(rows, lengths, self.world)[self.rank]
        groups = micro_batches(share, lengths, self.ppo.tokens_per_micro_batch)
        counts = batch.response_lengths
        if not groups:
            groups, counts = [rows[:1]], batch.response_lengths * 0
        width = batch.rewards.shape[1]
        return [
            self._inputs(take_rows(group, batch.input_ids, batch.prompt_lengths, counts, width))
            for group in groups
        ]

    def _inputs(self, rows: MicroBatch) -> dict[str, Any]:
        """A micro-batch as the modules take it, on this learner's device."""
        arrays = {name: getattr(rows, name) for name in rows.__slots__}
        return {k: torch.from_numpy(v).to(self._device) for k, v in arrays.items()}

    @torch.no_grad()
    def _annotate(self) -> Annotations:
        """Old and reference log-probabilities, values and entropy, completed over the group.

        Goes through the micro-batches of the first epoch, so that the first optimizer step sees
        the very numbers that it will compute itself.
        """
        shape = self.batch.rewards.shape
        notes = Annotations(*(torch.zeros(shape, device=self._device) for _ in range(4)))
        for rows in self._plan(epoch=0):
            for inputs in self._own_micro_batches(rows):
                inputs["with_entropy"] = True
                with self._autocast():
                    policy = self.module[POLICY].unwrapped()(inputs)
                    values = policy["values"]
                    if values is None:
                        values = self.module[CRITIC].unwrapped()(inputs)["values"]
                    reference = token_logprobs(self.reference, inputs, self.setup.temperature)[0]
                new = (policy["logprobs"], reference, values, policy["entropy"])
                for tensor, value in zip(notes.tensors, new, strict=True):
                    tensor.view(-1)[inputs["slots"]] = value
        for name, tensor in zip(Annotations.__slots__, notes.tensors, strict=True):
            if self.group is not None:
                dist.all_reduce(tensor, group=self.group)
            if not torch.isfinite(tensor).all():
                raise RuntimeError(
                    f"PPO step {self.updates}: {name} are not finite; a model's weights have "
                    "diverged. Go on from an earlier checkpoint with a smaller learning rate"
                )
        return notes

    def _targets(self, notes: Annotations) -> tuple[Targets, dict[str, float]]:
        """Shaped rewards, advantages and returns from the annotations, alike on every learner."""
        batch, ppo = self.batch, self.ppo
        lengths = torch.tensor(batch.response_lengths, device=self._device)
        mask = torch.arange(batch.rewards.shape[1], device=self._device) < lengths[:, None]
        rewards = torch.tensor(batch.rewards, device=self._device)
        engine = torch.tensor(batch.engine_logprobs, device=self._device)
        difference = notes.old_logprobs - notes.reference_logprobs
        kl = kl_estimate(difference, "k1" if ppo.kl.where != "reward" else ppo.kl.estimator)
        shaped = shape_rewards(rewards, kl, self.controller.in_reward, mask)
        trained = whiten(shaped, mask, shift_mean=False) if ppo.whiten_rewards else shaped
        advantages, returns = gae(trained, notes.values, mask, ppo.gamma, ppo.lam)
        if ppo.whiten_advantages:
            advantages = whiten(advantages, mask)
        metrics = batch_metrics(
            batch, mask, notes, difference=difference, engine=engine, shaped=shaped, returns=returns
        )
        flat = (notes.old_logprobs, notes.reference_logprobs, engine, notes.values)
        return Targets(*(t.reshape(-1) for t in (*flat, advantages, returns))), metrics

    def _accumulate_gradients(self, rows: Int64Array, targets: Targets, sums: TokenSums) -> None:
        """Gradients of one optimizer step over this learner's micro-batches."""
        for optimizer in self.named_optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        # DDP averages over learners, so world / tokens makes the loss a mean over all tokens.
        scale = self.world / float(self.batch.response_lengths[rows].sum())
        inputs = self._own_micro_batches(rows)
        for number, micro in enumerate(inputs):
            micro["with_entropy"] = self.ppo.entropy_coef > 0
            last = number == len(inputs) - 1
            slots = micro["slots"]
            with self._gradient_exchange(POLICY, last):
                out = self._forward(POLICY, micro)
                terms = policy_terms(
                    out["logprobs"],
                    out["entropy"],
                    old_logprobs=targets.old_logprobs[slots],
                    reference_logprobs=targets.reference_logprobs[slots],
                    engine_logprobs=targets.engine_logprobs[slots],
                    advantages=targets.advantages[slots],
                    kl_coef=self.controller.in_loss,
                    config=self.ppo,
                )
                loss = terms.loss.sum()
                if out["values"] is not None:
                    loss = loss + self.ppo.value_loss_coef * self._value_loss(
                        out["values"], targets, slots, sums
                    )
                torch.autograd.backward(loss * scale)
            sums.add_policy(terms)
            if out["values"] is None:
                with self._gradient_exchange(CRITIC, last):
                    values = self._forward(CRITIC, micro)["values"]
                    loss = self._value_loss(values, targets, slots, sums)
                    torch.autograd.backward(loss * scale)

    def _value_loss(
        self, values: Tensor, targets: Targets, slots: Tensor, sums: TokenSums
    ) -> Tensor:
        loss, clipped = value_loss(
            values, targets.old_values[slots], targets.returns[slots], self.ppo.value_clip
        )
        sums.add_value(loss, clipped)
        return loss.sum()

    def _forward(self, module: str, micro: dict[str, Any]) -> Any:
        with self._autocast():
            return self.module[module](micro)

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.ppo.bf16)

    @contextlib.contextmanager
    def _gradient_exchange(self, module: str, last: bool) -> Iterator[None]:
        """Learners exchange gradients in the last backward pass of a step, not in each."""
        wrapped = self.module[module]
        if self.distributed and not last:
            with wrapped.no_sync():
                yield
        else:
            yield

    def _check_first_ratio(self, sums: TokenSums) -> None:
        """The first step starts from the weights that gave the old log-probabilities."""
        worst = sums.log_ratio_max.clone()
        if self.group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.group)
        if not float(worst) <= FIRST_RATIO_TOLERANCE[self.ppo.bf16]:
            raise RuntimeError(
                f"PPO step {self.updates}: in the first minibatch the log-probability ratio is up "
                f"to exp({float(worst):.3g}), it must be 1: the model's forward pass does not "
                "repeat itself (dropout, or a kernel that depends on more than its input?)"
            )
        sums.first_log_ratio_max = float(worst)

    def _step_optimizers(self, sums: TokenSums) -> None:
        """Clip and step each optimizer; a gradient that is not finite skips the step.

        The norm is the same on every learner, and so is the decision.
        """
        for name, optimizer in self.named_optimizers.items():
            parameters: list[nn.Parameter] = optimizer.param_groups[0]["params"]
            limit = self.optimizer_config(name).max_grad_norm
            norm = float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))
            finite = math.isfinite(norm)
            sums.add_step(name, norm)
            self.skipped_in_a_row[name] = 0 if finite else self.skipped_in_a_row[name] + 1
            if finite:
                optimizer.step()
            elif self.skipped_in_a_row[name] > self.ppo.max_skipped_steps:
                raise RuntimeError(
                    f"PPO step {self.updates}: the gradient of the {name} was not finite in "
                    f"{self.skipped_in_a_row[name]} optimizer steps in a row "
                    "(ppo.max_skipped_steps); lower its learning rate, and look for rewards far "
                    "from 0"
                )

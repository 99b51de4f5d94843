"""One model's way through the epochs of a PPO iteration: losses, gradients, optimizer steps.

Once the advantages are fixed, policy and critic do not depend on each other until the next
iteration, so each has a trainer of its own. With a shared trunk one trainer has both losses.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from learner.config import OptimizerConfig, PPOConfig
from learner.losses import policy_terms, value_loss
from learner.models import POLICY
from learner.statistics import TokenSums

# |log ratio| that rounding may cause in the first minibatch, where old and new log-probabilities
# come from the same weights through the same operations on the same micro-batches.
FIRST_RATIO_TOLERANCE = {False: 1e-3, True: 0.2}


@dataclass(frozen=True, slots=True)
class Targets:
    """What the losses of an iteration are computed from; all flattened to ``[B * R]``."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    engine_logprobs: Tensor
    advantages: Tensor
    token_weights: Tensor
    """How much each token counts in the sum of its step (``losses.token_weights``)."""
    kl_coef: float
    """Coefficient of the KL term of the loss."""
    old_values: Tensor | None
    returns: Tensor | None
    """None where no values are learned."""


@dataclass(frozen=True, slots=True)
class Step:
    """This learner's part of one optimizer step.

    Attributes:
        micro_batches: Inputs of the module; never empty.
        divisor: Of the weighted sum of losses: response tokens or responses of the whole step,
            over all learners.
    """

    micro_batches: list[dict[str, Any]]
    divisor: int


class ModuleTrainer:
    """Trains one RLModule with its optimizer; lives as long as the learner.

    Args:
        group: Process group of the module's own, or None with a single learner. Each module has
            its own, so that two of them may exchange gradients at the same time.
    """

    def __init__(
        self,
        name: str,
        module: Any,
        optimizer: torch.optim.Optimizer,
        options: OptimizerConfig,
        ppo: PPOConfig,
        group: Any,
    ) -> None:
        self.name = name
        self.optimizer = optimizer
        self.skipped_in_a_row = 0
        self._module = module
        self._options = options
        self._ppo = ppo
        self._group = group
        self._world = dist.get_world_size(group) if group is not None else 1
        self._parameters: list[nn.Parameter] = list(module.parameters())
        self._device = self._parameters[0].device

    def train(
        self, steps: Iterable[Step], targets: Targets, update: int, stop: threading.Event
    ) -> TokenSums:
        """All optimizer steps of an iteration.

        Args:
            update: Number of the iteration, for messages.
            stop: Ends early when set: the other trainer has failed.

        Raises:
            RuntimeError: The first step does not start at ratio 1, or the gradient was not
                finite too often.
        """
        sums = TokenSums(self._device)
        for number, step in enumerate(steps):
            if stop.is_set():
                break
            started = time.perf_counter()
            self._accumulate(step, targets, sums)
            if number == 0 and self.name == POLICY:
                self._check_first_ratio(sums, update)
            accumulated = time.perf_counter()
            self._step(sums, update)
            sums.seconds_optimizer += time.perf_counter() - accumulated
            sums.seconds_forward_backward += accumulated - started
        return sums

    def _accumulate(self, step: Step, targets: Targets, sums: TokenSums) -> None:
        """Gradients of one optimizer step over this learner's micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        # DDP averages over learners, so world / divisor makes the loss a mean over the step.
        scale = self._world / step.divisor
        for number, inputs in enumerate(step.micro_batches):
            inputs["with_entropy"] = self._ppo.entropy_coef > 0
            with self._gradient_exchange(last=number == len(step.micro_batches) - 1):
                with torch.autocast(self._device.type, torch.bfloat16, enabled=self._ppo.bf16):
                    out = self._module(inputs)
                loss = self._loss(out, targets, inputs["slots"], sums)
                torch.autograd.backward(loss * scale)

    def _loss(
        self, out: dict[str, Tensor | None], targets: Targets, slots: Tensor, sums: TokenSums
    ) -> Tensor:
        """Weighted sum over the tokens of a micro-batch."""
        loss: Tensor | float = 0.0
        weights = targets.token_weights[slots]
        logprobs, values = out.get("logprobs"), out.get("values")
        if logprobs is not None:
            terms = policy_terms(
                logprobs,
                out["entropy"],
                old_logprobs=targets.old_logprobs[slots],
                reference_logprobs=targets.reference_logprobs[slots],
                engine_logprobs=targets.engine_logprobs[slots],
                advantages=targets.advantages[slots],
                kl_coef=targets.kl_coef,
                config=self._ppo,
            )
            sums.add_policy(terms)
            loss = (terms.loss * weights).sum()
        if values is not None:
            assert targets.old_values is not None
            assert targets.returns is not None
            error, clipped = value_loss(
                values, targets.old_values[slots], targets.returns[slots], self._ppo.value_clip
            )
            sums.add_value(error, clipped)
            coef = 1.0 if logprobs is None else self._ppo.value_loss_coef
            loss = loss + coef * (error * weights).sum()
        assert isinstance(loss, Tensor)
        return loss

    @contextlib.contextmanager
    def _gradient_exchange(self, *, last: bool) -> Iterator[None]:
        """Learners exchange gradients in the last backward pass of a step, not in each."""
        if self._group is not None and not last:
            with self._module.no_sync():
                yield
        else:
            yield

    def _check_first_ratio(self, sums: TokenSums, update: int) -> None:
        """The first step starts from the weights that gave the old log-probabilities."""
        worst = sums.log_ratio_max.clone()
        if self._group is not None:
            dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        if not float(worst) <= FIRST_RATIO_TOLERANCE[self._ppo.bf16]:
            raise RuntimeError(
                f"PPO step {update}: in the first minibatch the log-probability ratio is up "
                f"to exp({float(worst):.3g}), it must be 1: the model's forward pass does not "
                "repeat itself (dropout, or a kernel that depends on more than its input?)"
            )
        sums.first_log_ratio_max = float(worst)

    def _step(self, sums: TokenSums, update: int) -> None:
        """Clip and step; a gradient that is not finite skips the step.

        The norm is the same on every learner, and so is the decision.
        """
        limit = self._options.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(self._parameters, limit, foreach=True))
        sums.norms.append(norm)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.optimizer.step()
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self._ppo.max_skipped_steps:
            raise RuntimeError(
                f"PPO step {update}: the gradient of the {self.name} was not finite in "
                f"{self.skipped_in_a_row} optimizer steps in a row (ppo.max_skipped_steps); "
                "lower its learning rate, and look for rewards far from 0"
            )

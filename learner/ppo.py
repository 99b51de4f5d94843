"""The PPO learner: one RLlib ``update()`` is one whole PPO iteration.

Every learner holds the whole batch. It annotates its share (old log-probabilities, reference
log-probabilities, values), and a sum over the group completes the annotations, so that every
learner computes the same advantages. Each optimizer step's rows come from a shuffle that all draw
alike, are shared out by tokens, and go through the models in token-budget micro-batches; the loss
is normalised by the response tokens (or responses) of the whole step. So the number of learners
and the size of micro-batches change nothing but rounding.

The estimator of the advantages is a setting of this one learner. Those that need no values have no
critic: neither the model nor its optimizer exists then.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchDDPRLModule
from torch import Tensor

from learner.advantages import estimate_advantages, shape_rewards
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
from learner.lanes import Lanes
from learner.losses import loss_divisor, token_weights
from learner.models import CRITIC, POLICY, token_logprobs
from learner.ppo_setup import PPOSetup, quiet_start
from learner.schedule import learning_rate
from learner.statistics import TokenSums, batch_metrics
from learner.trainer import ModuleTrainer, Step, Targets


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is known of every response token before the first optimizer step; all ``[B, R]``."""

    old_logprobs: Tensor
    reference_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    """None where no values are learned."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in self.__slots__}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class PPOLearner(TorchLearner):  # type: ignore[misc]
    """Policy, critic and their optimizers on one device, in step with the other learners."""

    # ---- building ------------------------------------------------------------------------------

    def build(self) -> None:
        self.setup: PPOSetup = self.config.ppo_setup
        self.ppo: PPOConfig = self.setup.ppo
        torch.set_num_threads(self.setup.learners.threads)
        # RLlib's own process group waits half an hour for a learner that has died.
        self.group = self._new_process_group()
        self.module_groups: dict[str, Any] = {}
        with quiet_start():
            super().build()
            self.reference = load_causal_lm(self.setup.reference_dir).to(self._device)
        self.reference.requires_grad_(False)
        self.controller = KLController(self.ppo.kl)
        self.updates = 0
        self.trainers = {
            name: ModuleTrainer(
                name,
                self.module[name],
                self.get_optimizer(name),
                self.optimizer_config(name),
                self.ppo,
                self.module_groups.get(name),
            )
            for name in self.module.keys()  # noqa: SIM118
        }
        on_cpu = self._device.type == "cpu"
        self.lanes = Lanes(self.setup.learners.threads, parallel=on_cpu and len(self.trainers) > 1)
        self.last_metrics: dict[str, float] = {}

    @property
    def rank(self) -> int:
        return int(self._learner_index)

    @property
    def world(self) -> int:
        return max(1, int(self.config.num_learners))

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

    def _new_process_group(self) -> Any:
        if not self.distributed:
            return None
        timeout = datetime.timedelta(seconds=self.setup.learners.timeout_s)
        return dist.new_group(timeout=timeout)

    def _make_modules_ddp_if_necessary(self) -> None:
        if not self.distributed:
            return
        for name in list(self._module.keys()):
            self.module_groups[name] = self._new_process_group()
            wrapped = TorchDDPRLModule(
                self._module[name],
                process_group=self.module_groups[name],
                # Buffers hold constants only (rotary frequencies).
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
            self._module.add_module(name, wrapped, override=True)

    def shutdown(self) -> None:
        if hasattr(self, "lanes"):  # not when building failed
            self.lanes.shutdown()

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
        self.batch = PPOBatch(**dict(batch[POLICY].items()))
        self._check_vocabulary()
        targets, metrics = self._targets(self._annotate())
        annotated = time.perf_counter()
        for name, trainer in self.trainers.items():
            options = self.optimizer_config(name)
            rate = learning_rate(options, self.updates, self.setup.total_steps)
            trainer.optimizer.param_groups[0]["lr"] = rate
            metrics[f"ppo/learning_rate_{name}"] = rate
        done = self._train(targets)
        seconds = time.perf_counter() - annotated
        for name, sums in done.items():
            sums.reduce(self.group)
            metrics |= sums.metrics(name)
        metrics["ppo/kl_coef"] = self.controller.coef
        self.controller.observe(metrics["ppo/kl_sequence"], len(self.batch))
        self.updates += 1
        metrics["ppo/seconds_annotate"] = annotated - started
        # Trainers run side by side: the time that passed is shared out as they spent theirs.
        optimizer = sum(sums.seconds_optimizer for sums in done.values())
        both = optimizer + sum(sums.seconds_forward_backward for sums in done.values())
        metrics["ppo/seconds_optimizer"] = seconds * optimizer / both
        metrics["ppo/seconds_forward_backward"] = seconds * (1 - optimizer / both)
        self.last_metrics = metrics
        return {}, {}, {}

    def _check_vocabulary(self) -> None:
        known = int(self.module[POLICY].unwrapped().model.config.vocab_size)
        smallest, largest = int(self.batch.input_ids.min()), int(self.batch.input_ids.max())
        if smallest < 0 or largest >= known:
            raise ValueError(
                f"PPO step {self.updates}: a sample holds token id "
                f"{smallest if smallest < 0 else largest}, the policy's vocabulary ends at "
                f"{known - 1}: prompts and policy have different tokenizers"
            )

    def _train(self, targets: Targets) -> dict[str, TokenSums]:
        """Every trainer through all epochs, side by side when there are threads for it."""
        stop = threading.Event()

        def run(trainer: ModuleTrainer) -> TokenSums:
            steps = (
                self._step(rows) for epoch in range(self.ppo.epochs) for rows in self._plan(epoch)
            )
            try:
                return trainer.train(steps, targets, self.updates, stop)
            except BaseException:
                stop.set()
                raise

        tasks = [partial(run, trainer) for trainer in self.trainers.values()]
        return dict(zip(self.trainers, self.lanes.run(tasks), strict=True))

    def _plan(self, epoch: int) -> list[Int64Array]:
        """The rows of every optimizer step of an epoch, the same on every learner."""
        return minibatch_rows(
            len(self.batch),
            self.ppo.minibatches,
            seed=self.setup.seed,
            update=self.updates,
            epoch=epoch,
        )

    def _step(self, rows: Int64Array) -> Step:
        """This learner's part of the optimizer step on ``rows``.

        With fewer rows than learners, a learner without rows gets one row without response
        tokens, so that it takes part in the exchange of gradients.
        """
        batch = self.batch
        lengths = batch.prompt_lengths + batch.response_lengths
        share = split_over_ranks(rows, lengths, self.world)[self.rank]
        groups = micro_batches(share, lengths, self.ppo.tokens_per_micro_batch)
        counts = batch.response_lengths
        if not groups:
            groups, counts = [rows[:1]], batch.response_lengths * 0
        width = batch.rewards.shape[1]
        inputs = [
            self._inputs(take_rows(group, batch.input_ids, batch.prompt_lengths, counts, width))
            for group in groups
        ]
        divisor = loss_divisor(batch.response_lengths[rows], self.ppo.loss_aggregation)
        return Step(micro_batches=inputs, divisor=divisor)

    def _inputs(self, rows: MicroBatch) -> dict[str, Any]:
        """A micro-batch as the modules take it, on this learner's device."""
        arrays = {name: getattr(rows, name) for name in rows.__slots__}
        return {k: torch.from_numpy(v).to(self._device) for k, v in arrays.items()}

    def _annotate(self) -> Annotations:
        """Old and reference log-probabilities, values and entropy, completed over the group.

        Goes through the micro-batches of the first epoch, so that the first optimizer step sees
        the very numbers that it will compute itself.
        """
        shape = self.batch.rewards.shape
        notes = Annotations(
            old_logprobs=torch.zeros(shape, device=self._device),
            reference_logprobs=torch.zeros(shape, device=self._device),
            entropy=torch.zeros(shape, device=self._device),
            values=torch.zeros(shape, device=self._device) if self.ppo.has_values else None,
        )
        tasks = [
            partial(annotate, inputs, notes)
            for rows in self._plan(epoch=0)
            for inputs in self._step(rows).micro_batches
            for annotate in (self._annotate_policy, self._annotate_reference, self._annotate_values)
        ]
        self.lanes.run(tasks)
        for name, tensor in notes.tensors.items():
            if self.group is not None:
                dist.all_reduce(tensor, group=self.group)
            if not torch.isfinite(tensor).all():
                raise RuntimeError(
                    f"PPO step {self.updates}: {name} are not finite; a model's weights have "
                    "diverged. Go on from an earlier checkpoint with a smaller learning rate"
                )
        return notes

    def _annotate_policy(self, inputs: dict[str, Any], notes: Annotations) -> None:
        with torch.no_grad(), self._autocast():
            out = self.module[POLICY].unwrapped()(inputs | {"with_entropy": True})
        slots = inputs["slots"]
        notes.old_logprobs.view(-1)[slots] = out["logprobs"]
        notes.entropy.view(-1)[slots] = out["entropy"]
        if notes.values is not None and out["values"] is not None:
            notes.values.view(-1)[slots] = out["values"]

    def _annotate_reference(self, inputs: dict[str, Any], notes: Annotations) -> None:
        with torch.no_grad(), self._autocast():
            logprobs = token_logprobs(self.reference, inputs, self.setup.temperature)[0]
        notes.reference_logprobs.view(-1)[inputs["slots"]] = logprobs

    def _annotate_values(self, inputs: dict[str, Any], notes: Annotations) -> None:
        if notes.values is None or CRITIC not in self.trainers:
            return  # there are none, or the policy's trunk has given them
        with torch.no_grad(), self._autocast():
            values = self.module[CRITIC].unwrapped()(inputs)["values"]
        notes.values.view(-1)[inputs["slots"]] = values

    def _autocast(self) -> Any:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.ppo.bf16)

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
        groups = torch.tensor(batch.groups, dtype=torch.int64, device=self._device)
        advantages, returns = estimate_advantages(
            ppo, rewards=shaped, values=notes.values, mask=mask, groups=groups
        )
        metrics = batch_metrics(
            batch, mask, notes, difference=difference, engine=engine, shaped=shaped, returns=returns
        )
        targets = Targets(
            old_logprobs=notes.old_logprobs.view(-1),
            reference_logprobs=notes.reference_logprobs.view(-1),
            engine_logprobs=engine.view(-1),
            advantages=advantages.reshape(-1),
            token_weights=token_weights(mask, ppo.loss_aggregation).view(-1),
            kl_coef=self.controller.in_loss,
            old_values=None if notes.values is None else notes.values.view(-1),
            returns=None if returns is None else returns.reshape(-1),
        )
        return targets, metrics

"""The one supervised training loop; three stages give it three objectives.

    pretrain.py      next-token loss on whole documents
    sft.py           next-token loss on responses
    reward_model.py  Bradley-Terry on comparisons, squared error on ratings

A stage builds an :class:`Objective` (its items and their loss) and calls :func:`train`, which
owns everything else: batches by token budget, gradient accumulation, AdamW and its schedule,
clipping, the finite check, evaluation, and a state file from which an interrupted stage resumes
with the same weights bit for bit (on CPU). Everything random is a function of the seed, and the
position in a run is the number of optimizer steps taken, nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from learner.config import OptimizerConfig, SupervisedConfig
from learner.tensor_files import below, load_moments, moments_of
from learner.token_batches import IntArray, cut_by_budget, plan_steps
from learner.training_state import STATE_FILE, read_training_state, write_training_state

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, dict[str, float]], None]
"""Called after every optimizer step with (step, total steps, metrics)."""


class Interrupted(RuntimeError):
    """Training was asked to stop; its state is saved and ``resume=True`` goes on from there."""


class Objective(Protocol):
    """Items to train on and the loss of a micro-batch of them.

    Attributes:
        lengths: ``[N]`` tokens of each item's longest sequence.
        rows: ``[N]`` sequences of each item (2 for a pair).
    """

    lengths: IntArray
    rows: IntArray

    def weight(self, items: IntArray) -> float:
        """What the summed loss of these items is divided by (tokens, judgements)."""
        ...

    def loss(self, model: Any, items: IntArray) -> tuple[Tensor, dict[str, float]]:
        """Summed loss of these items, and further sums over them to report."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training says of itself. Losses are per unit of the objective's weight."""

    steps: int
    tokens: int
    """Tokens trained on, pads not counted."""
    seconds: float
    """Wall time of all parts of an interrupted training, evaluation included."""
    tokens_per_second: float
    padding_share: float
    train_loss: float
    """Mean of the last tenth of the steps."""
    held_out: dict[str, float] = field(default_factory=dict)
    """Metrics on the held-out items of the weights that were kept."""
    kept_step: int = 0
    """Step whose weights were kept: the last, or the best on the held-out loss."""


def settings_of(config: SupervisedConfig, seed: int) -> str:
    """What decides the result of a training besides its data, as text."""
    return f"{config.model_dump_json(exclude={'threads', 'checkpoint_seconds'})}/{seed}"


class OtherDataError(ValueError):
    """The state to go on from is of a training with the same settings and seed, but other data."""


def train(
    model: Any,
    objective: Objective,
    config: SupervisedConfig,
    *,
    output_dir: Path,
    seed: int,
    identity: str,
    held_out: Objective | None = None,
    keep_best: bool = False,
    resume: bool = False,
    on_step: OnStep | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        model: In evaluation mode (no dropout), float32, on any device; moved to a GPU if there
            is one.
        objective: What to train on.
        config: Batch shape, epochs, optimizer.
        output_dir: Where the state file lies while training is not finished.
        seed: Of the order of the items.
        identity: Fingerprint of data, configuration and seed; a state of another is refused.
        held_out: Measured ``config.evaluations`` times, evenly spread, the last after the end.
        keep_best: Keep the weights of the evaluation with the least loss, not the last.
        resume: Go on from the state file if there is one.
        on_step: Told about every step; ``held_out_*`` metrics appear after evaluations.
        should_stop: Asked after every step.

    Raises:
        Interrupted: ``should_stop`` said so; the state is saved.
        ValueError: The state file belongs to another training.
        RuntimeError: The loss or the gradient is not finite.
    """
    with use_threads(config.threads):
        loop = _Loop(model, objective, held_out, config, output_dir, seed, identity, keep_best)
        if resume:
            loop.restore()
        return loop.run(on_step, should_stop)


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Run torch with so many CPU threads; ``None`` for all usable cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of 0-based ``step``: linear warm-up, then decay to 0 at ``total``."""
    warmup = math.ceil(config.warmup_share * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[config.schedule]
    return config.learning_rate * factor


class _Loop:
    """State of one training: weights, optimizer, step, best weights so far."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        held_out: Objective | None,
        config: SupervisedConfig,
        output_dir: Path,
        seed: int,
        identity: str,
        keep_best: bool,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.objective = objective
        self.held_out = held_out
        self.config = config
        self.identity = identity
        self.settings = settings_of(config, seed)
        self.keep_best = keep_best and held_out is not None
        self.state_path = output_dir / STATE_FILE
        output_dir.mkdir(parents=True, exist_ok=True)
        self.steps = plan_steps(
            objective.lengths, objective.rows, config.tokens_per_step, config.epochs, seed
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _adamw(self.parameters, config.optimizer)
        self.evaluate_after = {
            max(1, round(len(self.steps) * (k + 1) / config.evaluations))
            for k in range(config.evaluations)
        }
        self.step = 0
        self.tokens = 0
        self.padded = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.held_out_now: dict[str, float] = {}
        self.best: dict[str, Any] | None = None
        if config.bf16 and not _fast_bf16(self.device):
            logger.warning(
                "bf16 is on, but this CPU has no bfloat16 instructions (avx512_bf16, amx): "
                "expect it to be many times slower than bf16: false"
            )

    def run(self, on_step: OnStep | None, should_stop: Callable[[], bool] | None) -> TrainingResult:
        total = len(self.steps)
        saved_at = time.monotonic()
        while self.step < total:
            began = time.monotonic()
            metrics = self._train_step(self.steps[self.step], total)
            self.step += 1
            if self.held_out is not None and self.step in self.evaluate_after:
                metrics |= self._evaluate()
            self.seconds += time.monotonic() - began
            if on_step is not None:
                on_step(self.step, total, metrics)
            if self.step < total and should_stop is not None and should_stop():
                self._save()
                raise Interrupted(
                    f"stopped after step {self.step} of {total}; the state is in {self.state_path}"
                    ", resume to go on"
                )
            if time.monotonic() - saved_at > self.config.checkpoint_seconds:
                self._save()
                saved_at = time.monotonic()
        return self._finish()

    def _train_step(self, items: IntArray, total: int) -> dict[str, float]:
        began = time.monotonic()
        rate = learning_rate(self.config.optimizer, self.step, total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum, sums = 0.0, dict[str, float]()
        weight = self.objective.weight(items)
        for batch in self._micro_batches(self.objective, items):
            with self._autocast():
                loss, extra = self.objective.loss(self.model, batch)
            (loss / weight).backward()  # type: ignore[no-untyped-call]
            loss_sum += float(loss.detach())
            _add(sums, extra)
            self.padded += _padded_tokens(self.objective, batch)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        )
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise RuntimeError(
                f"training diverged in step {self.step + 1} of {total}: loss {loss_sum / weight}, "
                f"gradient norm {norm}; lower optimizer.learning_rate (it is "
                f"{self.config.optimizer.learning_rate}) or raise optimizer.warmup_share"
            )
        self.optimizer.step()
        tokens = int((self.objective.lengths * self.objective.rows)[items].sum())
        self.tokens += tokens
        self.losses.append(loss_sum / weight)
        return {
            "loss": loss_sum / weight,
            **{name: value / weight for name, value in sums.items()},
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / max(1e-9, time.monotonic() - began),
        }

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        assert self.held_out is not None
        items = np.argsort(self.held_out.lengths, kind="stable")
        loss_sum, sums = 0.0, dict[str, float]()
        for batch in self._micro_batches(self.held_out, items):
            with self._autocast():
                loss, extra = self.held_out.loss(self.model, batch)
            loss_sum += float(loss)
            _add(sums, extra)
        weight = self.held_out.weight(items)
        self.held_out_now = {"loss": loss_sum / weight} | {k: v / weight for k, v in sums.items()}
        if self.keep_best and (
            self.best is None or self.held_out_now["loss"] < self.best["held_out"]["loss"]
        ):
            self.best = {
                "step": self.step,
                "held_out": dict(self.held_out_now),
                "model": {k: v.detach().cpu().clone() for k, v in self._weights().items()},
            }
        return {f"held_out_{name}": value for name, value in self.held_out_now.items()}

    def _micro_batches(self, objective: Objective, items: IntArray) -> list[IntArray]:
        budget = self.config.tokens_per_micro_batch
        return cut_by_budget(items, objective.lengths, objective.rows, budget)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)

    def _finish(self) -> TrainingResult:
        kept, held_out = self.step, self.held_out_now
        if self.best is not None:
            kept, held_out = self.best["step"], self.best["held_out"]
            if kept != self.step:
                self._load_weights(self.best["model"])
        return TrainingResult(
            steps=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            tokens_per_second=self.tokens / max(1e-9, self.seconds),
            padding_share=1 - self.tokens / max(1, self.padded),
            train_loss=float(np.mean(self.losses[-max(1, len(self.losses) // 10) :])),
            held_out=held_out,
            kept_step=kept,
        )

    def _save(self) -> None:
        best = self.best or {"step": 0, "held_out": {}, "model": {}}
        tensors = {f"model/{name}": tensor for name, tensor in self._weights().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in best["model"].items()}
        moments = moments_of(self.optimizer, self._names())
        tensors |= {f"moments/{name}": tensor for name, tensor in moments.items()}
        rest = {
            "identity": self.identity,
            "settings": self.settings,
            "step": self.step,
            "tokens": self.tokens,
            "padded": self.padded,
            "seconds": self.seconds,
            "losses": self.losses,
            "held_out_now": self.held_out_now,
            "best": {"step": best["step"], "held_out": best["held_out"]} if self.best else None,
        }
        write_training_state(self.state_path, tensors, rest)

    def restore(self) -> None:
        """Take up the state file, if there is one."""
        if not self.state_path.is_file():
            return
        tensors, state = read_training_state(self.state_path, self.device)
        if state["identity"] != self.identity:
            same_settings = state.get("settings") == self.settings
            raise (OtherDataError if same_settings else ValueError)(
                f"{self.state_path} belongs to a training with other "
                f"{'data' if same_settings else 'data, seed or settings'}: resume with the same "
                "ones, or start anew with --overwrite"
            )
        self._load_weights(below("model", tensors))
        load_moments(self.optimizer, self._names(), below("moments", tensors))
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        self.padded, self.seconds = int(state["padded"]), float(state["seconds"])
        self.losses = list(state["losses"])
        self.held_out_now = dict(state["held_out_now"])
        if state["best"] is not None:
            best = {name: tensor.cpu() for name, tensor in below("best", tensors).items()}
            self.best = state["best"] | {"model": best}

    def _weights(self) -> dict[str, Tensor]:
        """Parameters, tied ones once. Buffers are constants (rotary frequencies)."""
        return dict(self.model.named_parameters())

    @torch.no_grad()
    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self._weights().items():
            parameter.copy_(weights[name])

    def _names(self) -> list[str]:
        """Names of the trained parameters, in the order in which the optimizer has them."""
        names = {id(parameter): name for name, parameter in self._weights().items()}
        groups = self.optimizer.param_groups
        return [names[id(parameter)] for group in groups for parameter in group["params"]]


def remove_state(output_dir: Path) -> None:
    """Called by a stage when its result is safely written."""
    (output_dir / STATE_FILE).unlink(missing_ok=True)


def _adamw(parameters: list[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on norms and biases."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def _fast_bf16(device: torch.device) -> bool:
    if device.type != "cpu":
        return True
    path = Path("/proc/cpuinfo")
    return not path.is_file() or any(
        flag in path.read_text(encoding="utf-8") for flag in ("avx512_bf16", "amx_bf16", " bf16")
    )


def _padded_tokens(objective: Objective, items: IntArray) -> int:
    return int(objective.lengths[items].max() * objective.rows[items].sum())


def _add(sums: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value

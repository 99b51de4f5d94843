"""Policy, critic and frozen reference: Hugging Face models behind RLlib's RLModule.

All of them take a micro-batch as a dict of tensors (``learner.batch.MicroBatch``): rows of
right-padded ids, and the positions of the states from which response tokens are predicted. The
attention is causal, so pads on the right of a row reach no real token: no mask is built. Logits
and values exist for response tokens only.

Dropout is off in every model: RLModules here stay in evaluation mode, which leaves gradients on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import torch
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from learner.hf_directory import load_causal_lm, load_scalar_model, load_tokenizer
from reward_service.encoding import RewardHead

POLICY = "policy"
CRITIC = "critic"

# RLModuleSpec.build() insists on spaces; a language model has none.
_NO_SPACE = gym.spaces.Discrete(1)


def token_logprobs(
    model: Any, batch: dict[str, Any], temperature: float, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities of the response tokens at ``temperature``, in float32.

    Returns:
        ``(logprobs [n], entropy [n] or None, hidden [n, H])``.
    """
    hidden = response_states(model.base_model, batch)
    logits = model.get_output_embeddings()(hidden)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    logprobs = -nn.functional.cross_entropy(logits, batch["targets"], reduction="none")
    entropy = None
    if with_entropy:
        everything = torch.log_softmax(logits, dim=-1)
        entropy = -(everything.exp() * everything).sum(-1)
    return logprobs, entropy, hidden


def response_states(backbone: Any, batch: dict[str, Any]) -> Tensor:
    """``[n, H]`` last hidden states at the positions from which response tokens are predicted."""
    hidden = backbone(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return cast(Tensor, hidden.flatten(0, 1).index_select(0, batch["positions"]))


class PolicyModule(TorchRLModule):  # type: ignore[misc]
    """The language model being trained; with ``shared_trunk`` it has a value head as well."""

    def setup(self) -> None:
        config = self.model_config
        self.model = load_causal_lm(Path(config["path"]))
        self.temperature = float(config["temperature"])
        self.value_head = None
        if config["shared_trunk"]:
            self.value_head = zero_head(int(self.model.config.hidden_size))

    def train(self, mode: bool = True) -> PolicyModule:  # noqa: ARG002
        nn.Module.train(self, False)
        return self

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Tensor | None]:
        logprobs, entropy, hidden = token_logprobs(
            self.model, batch, self.temperature, batch.get("with_entropy", False)
        )
        values = None if self.value_head is None else state_values(self.value_head, hidden)
        return {"logprobs": logprobs, "entropy": entropy, "values": values}


class CriticModule(TorchRLModule):  # type: ignore[misc]
    """A value model of its own: a backbone with a scalar head.

    From a reward model it takes backbone and head, so that its first values are the reward
    model's normalised scores; else the backbone is the policy's and the head is zero.
    """

    def setup(self) -> None:
        config = self.model_config
        if config["reward_model"] is None:
            self.backbone = load_causal_lm(Path(config["path"])).base_model
            self.value_head = zero_head(int(self.backbone.config.hidden_size))
        else:
            self.backbone, self.value_head = load_reward_model(Path(config["reward_model"]))

    def train(self, mode: bool = True) -> CriticModule:  # noqa: ARG002
        nn.Module.train(self, False)
        return self

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Tensor]:
        hidden = response_states(self.backbone, batch)
        return {"values": state_values(self.value_head, hidden)}


def state_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """``[n]`` values in float32 whatever autocast does: bfloat16 is too coarse for a regression."""
    with torch.autocast(hidden.device.type, enabled=False):
        return cast(Tensor, head(hidden.float()).squeeze(-1))


def zero_head(width: int) -> nn.Linear:
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def load_reward_model(path: Path) -> tuple[Any, nn.Linear]:
    """Backbone and head of a reward model; the head includes its gain and bias.

    Raises:
        FileNotFoundError, ValueError: It is not a reward model of ours.
    """
    normalization = RewardHead.load(path)
    model = load_scalar_model(path, load_tokenizer(path))
    head = zero_head(model.score.in_features)
    with torch.no_grad():
        head.weight.copy_(model.score.weight * normalization.gain)
        head.bias.fill_(normalization.bias)
        if model.score.bias is not None:
            head.bias.add_(model.score.bias * normalization.gain)
    return model.base_model, head


def module_spec(
    policy_dir: Path,
    reward_model_dir: Path | None,
    temperature: float,
    *,
    shared_trunk: bool,
    critic: bool,
) -> MultiRLModuleSpec:
    """Policy, and critic where there is to be one, as one MultiRLModule."""
    specs = {
        POLICY: RLModuleSpec(
            module_class=PolicyModule,
            observation_space=_NO_SPACE,
            action_space=_NO_SPACE,
            model_config={
                "path": str(policy_dir),
                "temperature": temperature,
                "shared_trunk": shared_trunk,
            },
        )
    }
    if critic:
        specs[CRITIC] = RLModuleSpec(
            module_class=CriticModule,
            observation_space=_NO_SPACE,
            action_space=_NO_SPACE,
            model_config={
                "path": str(policy_dir),
                "reward_model": str(reward_model_dir) if reward_model_dir else None,
            },
        )
    return MultiRLModuleSpec(rl_module_specs=specs)

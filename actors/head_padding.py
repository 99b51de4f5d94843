"""Narrow attention heads made as wide as an engine's kernels need, without changing the model.

vLLM's CPU attention knows head widths from 32 up; small models often have 8 or 16. A head of
width d computes the same when it is spread over D = m·d dimensions and the rest is zero:

* Rotary embedding turns dimensions i and i + d/2 by the angle ``position · base^(-2i/d)``. In a
  head of width D the pair with that angle is number m·i, because ``2·m·i/D = 2i/d``.
* Scores are divided by √D instead of √d, so queries are multiplied by √m.
* Dimensions that are zero in queries, keys and values add nothing, and the output projection
  gets zero columns for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Their attention is q, k, v and o projections around plain rotary embeddings.
_ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
# Rotary variants whose angles depend on a pair's own base angle and on nothing else.
_ROPE_TYPES = {"default", "linear", "llama3"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPadding:
    """Spreads heads of width ``narrow`` over ``wide`` dimensions, ``wide % narrow == 0``."""

    narrow: int
    wide: int

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint with every attention projection widened."""
        return {name: self._widen(name, tensor) for name, tensor in tensors.items()}

    def _widen(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        parts = name.split(".")
        layer = parts[-2] if len(parts) > 1 else ""
        if layer == "o_proj" and parts[-1] == "weight":
            return self._spread(tensor.t()).t()
        if layer in ("q_proj", "k_proj", "v_proj"):
            wide = self._spread(tensor)
            return wide * math.sqrt(self.wide / self.narrow) if layer == "q_proj" else wide
        return tensor

    def _spread(self, rows: torch.Tensor) -> torch.Tensor:
        """``[heads * narrow, ...]`` to ``[heads * wide, ...]``."""
        half, step = self.narrow // 2, self.wide // self.narrow
        i = torch.arange(half) * step
        where = torch.cat([i, i + self.wide // 2])  # [narrow]
        heads = rows.reshape(-1, self.narrow, *rows.shape[1:])  # [heads, narrow, ...]
        wide = heads.new_zeros(heads.shape[0], self.wide, *heads.shape[2:])
        wide[:, where] = heads
        return wide.flatten(0, 1)


def head_padding(model_dir: Path, supported: Sequence[int]) -> HeadPadding | None:
    """The padding a checkpoint needs for kernels of the ``supported`` head widths, if any.

    Raises:
        ValueError: the width is not supported and the model cannot be padded.
    """
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text())
    if "num_attention_heads" not in config:
        return None
    narrow = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if narrow in supported:
        return None
    architecture = (config.get("architectures") or ["unknown"])[0]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", "default")
    whole = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) == 1.0
    wide = min((w for w in supported if w % narrow == 0), default=None)
    paddable = architecture in _ARCHITECTURES and rope_type in _ROPE_TYPES and whole
    if not paddable or wide is None or narrow % 2:
        raise ValueError(
            f"{model_dir}: attention heads of width {narrow} ({architecture}) are not supported by"
            f" the engine, which knows {', '.join(map(str, supported))}: choose another head_dim"
        )
    return HeadPadding(narrow=narrow, wide=wide)

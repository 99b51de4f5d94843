"""Which tensor is it? What every module of an engine computes with, against a weight update.

Called when a probe disagrees. Checksums have shown by then that the tensors arrived; what vLLM
made of them may still be wrong: fused, padded, packed for a kernel, or left behind by a reload.
Parameters alone do not show that (on CPU a packed layer has none), so a linear layer is asked
through its own ``quant_method``: fed with unit vectors it returns its weight's columns, exactly,
because products with 0 and 1 are not rounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

UNIT_VECTORS = 512
"""How many a layer is fed at once."""

# Conv1D layers, whose checkpoints hold weights transposed.
_TRANSPOSED = {"gpt2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFault:
    """A tensor that the engine does not compute with as it was sent.

    Attributes:
        name: Hugging Face parameter name, and where it is used when that is not its own module.
        error: Largest difference of an element; NaN when one is not a number.
        largest: Largest absolute element of the tensor that was sent.
    """

    name: str
    error: float
    largest: float

    def __str__(self) -> str:
        return f"{self.name} by up to {self.error:.3g} (its largest element is {self.largest:.3g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was found, worst first.

    Attributes:
        compared: How many uses of a tensor were compared.
        unknown: Tensors for which no module was found to ask.
    """

    faults: Sequence[TensorFault]
    compared: int
    unknown: Sequence[str]

    def __str__(self) -> str:
        if self.faults:
            shown = "; ".join(map(str, self.faults[:3]))
            more = f"; and {len(self.faults) - 3} more" if len(self.faults) > 3 else ""
            return f"the engine does not compute with the tensors that it was sent: {shown}{more}"
        missing = f" ({len(self.unknown)} could not be compared)" if self.unknown else ""
        return (
            f"all {self.compared} tensors are in the engine as they were sent{missing}, so the"
            " weights are right and the computation differs: dtype, attention, rotary positions or"
            " sampler settings (`rlhf doctor --drift` says which)"
        )


@dataclass(frozen=True, slots=True)
class _Use:
    """A tensor as one module uses it."""

    name: str
    sent: Tensor
    used: Tensor
    label: str


@torch.no_grad()
def diagnose(model: nn.Module, tensors: Mapping[str, Tensor]) -> Diagnosis:
    """Compare every module of a vLLM model that is on one device with the tensors of an update.

    Args:
        tensors: By Hugging Face parameter name, as ``load_weights`` was given them.
    """
    faults: list[TensorFault] = []
    seen: set[str] = set()
    compared = 0
    for use in _uses(model, tensors):
        seen.add(use.name)
        compared += 1
        sent = use.sent.to(use.used.device, use.used.dtype).double()
        error = float((use.used.double() - sent).abs().max()) if sent.numel() else 0.0
        largest = float(sent.abs().max()) if sent.numel() else 0.0
        # Products in TensorFloat-32 keep ten bits.
        exact = use.used.device.type == "cpu"
        if not error <= (1e-6 if exact else 2e-3) * largest:  # written so that NaN is a fault
            faults.append(TensorFault(name=use.label, error=error, largest=largest))
    faults.sort(key=_severity, reverse=True)
    unknown = sorted(tensors.keys() - seen)
    return Diagnosis(faults=faults, compared=compared, unknown=unknown)


def _severity(fault: TensorFault) -> float:
    if math.isnan(fault.error) or fault.largest == 0:
        return math.inf
    return fault.error / fault.largest


def _uses(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[_Use]:
    packed: Mapping[str, Sequence[str]] = getattr(model, "packed_modules_mapping", {})
    transposed = getattr(getattr(model, "config", None), "model_type", "") in _TRANSPOSED
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            yield from _of_head(name, module, model, tensors)
        elif isinstance(module, VocabParallelEmbedding):
            yield from _of_embedding(name, module, tensors)
        elif isinstance(module, LinearBase):
            yield from _of_linear(name, module, tensors, packed, transposed)
        else:
            yield from _of_parameters(name, module, tensors)


def _of_linear(
    name: str,
    module: Any,
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, Sequence[str]],
    transposed: bool,
) -> Iterator[_Use]:
    """A linear layer, whose rows are those of several tensors when vLLM fuses them."""
    parent, _, own = name.rpartition(".")
    parts = [f"{parent}.{part}" if parent else part for part in packed.get(own, [own])]
    weights = _named(tensors, [f"{part}.weight" for part in parts])
    if transposed:
        weights = {key: weight.t() for key, weight in weights.items()}
    if sum(map(len, weights.values())) == module.output_size:
        width = next(iter(weights.values())).shape[1]
        yield from _in_rows(weights, _weight_of(module, width, module.params_dtype))
    biases = _named(tensors, [f"{part}.bias" for part in parts])
    if biases and getattr(module, "bias", None) is not None:
        yield from _in_rows(biases, module.bias)


def _named(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these names, or none when one of them is not there."""
    found = {name: tensors[name] for name in names if name in tensors}
    return found if len(found) == len(names) else {}


def _in_rows(sent: Mapping[str, Tensor], used: Tensor) -> Iterator[_Use]:
    """Tensors that lie one after the other in the rows of a fused one."""
    start = 0
    for name, tensor in sent.items():
        yield _Use(name, tensor, used[start : start + len(tensor)], repr(name))
        start += len(tensor)


def _of_embedding(name: str, module: Any, tensors: Mapping[str, Tensor]) -> Iterator[_Use]:
    sent = tensors.get(f"{name}.weight")
    if sent is not None:
        ids = torch.arange(len(sent), device=module.weight.device)
        used = module.quant_method.embedding(module, ids)
        yield _Use(f"{name}.weight", sent, used, repr(f"{name}.weight"))


def _of_head(
    name: str, module: Any, model: nn.Module, tensors: Mapping[str, Tensor]
) -> Iterator[_Use]:
    """The output layer. A tied one goes by the name of the embedding whose weight it shares."""
    source, label = f"{name}.weight", repr(f"{name}.weight")
    if source not in tensors:
        shared = [
            other
            for other, embedding in model.named_modules()
            if isinstance(embedding, VocabParallelEmbedding)
            and embedding is not module
            and embedding.weight is module.weight
        ]
        if not shared or f"{shared[0]}.weight" not in tensors:
            return
        source = f"{shared[0]}.weight"
        label = f"'{source}' as the tied output layer '{name}'"
    sent = tensors[source]
    used = _weight_of(module, sent.shape[1], module.weight.dtype)[: len(sent)]
    yield _Use(source, sent, used, label)


def _of_parameters(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[_Use]:
    """Norms and whatever else computes with its parameters as they are."""
    for own, parameter in module.named_parameters(recurse=False):
        full = f"{name}.{own}" if name else own
        sent = tensors.get(full)
        if sent is not None and sent.shape == parameter.shape:
            yield _Use(full, sent, parameter, repr(full))


def _weight_of(module: Any, width: int, dtype: torch.dtype) -> Tensor:
    """``[out, width]`` the weight that a layer multiplies with, read back through the layer."""
    device = module.weight.device
    columns = []
    for start in range(0, width, UNIT_VECTORS):
        count = min(UNIT_VECTORS, width - start)
        units = torch.zeros(count, width, dtype=dtype, device=device)
        units[torch.arange(count), start + torch.arange(count)] = 1
        columns.append(module.quant_method.apply(module, units, bias=None))  # [count, out]
    return torch.cat(columns).t()

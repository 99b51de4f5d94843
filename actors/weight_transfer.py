"""Weight-transfer backends for vLLM: tensors out of Ray's object store, or by NCCL.

vLLM drives any backend through four calls: init_weight_transfer_engine, start_weight_update,
update_weights (once for every bucket), finish_weight_update. ``update_weights`` of the object
store's is handed tensors that already lie in this process's address space. The NCCL one is
vLLM's own, for its NCCL trainer to drive, and takes such tensors as well: a restarted engine and
one that is given a checkpoint have no trainer to receive from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be agreed on beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A bucket: tensors by Hugging Face parameter name."""

    tensors: Mapping[str, torch.Tensor]


class ObjectStoreTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """Loads tensors through the model's own ``load_weights``, layer by layer.

    Between start and finish the model's parameters are on the meta device: no step may run,
    and an exception leaves the engine unusable.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self.model.load_weights(iter(update_info.tensors.items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        self.repack_heads()

    def repack_heads(self) -> None:
        """Repack every LM head from its present weight.

        On CPU a layer multiplies with a packed copy of its weight. A head that is tied to the
        embedding is not itself reloaded, so its copy would stay that of the old weights: wrong
        by up to a nat, with every checksum right.
        """
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and module.weight.numel():
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


class NcclTransfer(NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL backend, which also takes tensors that are here already."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        if "tensors" in update_dict:
            return UpdateInfo(**update_dict)
        return super().parse_update_info(update_dict)

    def receive_weights(self, update_info: Any) -> None:
        if isinstance(update_info, UpdateInfo):
            self.model.load_weights(iter(update_info.tensors.items()))
        else:
            super().receive_weights(update_info)


def register(transfer: Literal["ray", "nccl"]) -> str:
    """Make a backend known to vLLM in this process; returns its name. May be called again."""
    name = f"rlhf_{transfer}"
    backend = {"ray": ObjectStoreTransfer, "nccl": NcclTransfer}[transfer]
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, backend)
    return name

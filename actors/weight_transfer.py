"""The weight-transfer backend that reads tensors out of Ray's object store, for vLLM in-process.

vLLM drives any backend through four calls: init_weight_transfer_engine, start_weight_update,
update_weights (once for every bucket), finish_weight_update. This one is handed tensors that
already lie in this process's address space; ``nccl`` on GPUs receives them itself.

Imported by vLLM when an engine of this backend is built, never before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

BACKEND = "ray_object_store"


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


def register() -> str:
    """Make the backend known to vLLM in this process; returns its name. May be called again."""
    registry: Mapping[str, Any] = WeightTransferEngineFactory._registry
    if BACKEND not in registry:
        WeightTransferEngineFactory.register_engine(BACKEND, ObjectStoreTransfer)
    return BACKEND

"""Packing, verifying and reading weights; no engine and no Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from actors.weights import (
    Probe,
    TensorInfo,
    WeightError,
    WeightUpdate,
    checkpoint_shapes,
    pack_weights,
    read_checkpoint,
    require_same_shapes,
    tensors_of,
)

TENSORS = {
    "norm": torch.tensor([1.0, -2.5, 3e-38]),
    "layers.0.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "layers.1.weight": torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "scale": torch.tensor(0.5, dtype=torch.float16),
}


def packed(version: int = 3) -> WeightUpdate:
    return pack_weights(TENSORS.items(), version, None)


def test_tensors_arrive_as_they_were() -> None:
    arrived = tensors_of(packed())
    assert arrived.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)


def test_manifest_says_what_each_tensor_is() -> None:
    update = packed()
    # XXH3-64 of no bytes, as its specification gives it.
    empty = pack_weights([("empty", torch.zeros(0, 3))], 0, None).manifest["empty"]
    assert empty == TensorInfo(dtype="float32", shape=(0, 3), checksum=0x2D06800538D394C2)
    assert update.manifest["layers.1.weight"].dtype == "bfloat16"
    assert update.manifest["layers.1.weight"].shape == (5, 2)
    assert update.nbytes == 3 * 4 + 12 * 4 + 10 * 2 + 2


def test_a_transposed_tensor_is_packed_in_its_own_order() -> None:
    weight = torch.arange(6, dtype=torch.float32).view(2, 3).t()
    assert torch.equal(tensors_of(pack_weights([("w", weight)], 0, None))["w"], weight)


def test_packing_does_not_copy() -> None:
    weight = torch.zeros(4)
    update = pack_weights([("w", weight)], 0, None)
    weight[2] = 7.0
    assert update.tensors["w"][2] == 7.0


@pytest.mark.parametrize("name", TENSORS)
def test_one_flipped_bit_is_refused_by_name(name: str) -> None:
    update = packed()
    damaged = {key: array.copy() for key, array in update.tensors.items()}
    damaged[name].reshape(-1).view(np.uint8)[-1] ^= 1
    with pytest.raises(WeightError, match=f"update 3: tensor '{name}' is corrupt"):
        tensors_of(replace(update, tensors=damaged))


def test_a_missing_an_extra_and_a_reshaped_tensor_are_refused_by_name() -> None:
    update = packed()
    without = {k: v for k, v in update.tensors.items() if k != "norm"}
    with pytest.raises(WeightError, match="'norm' are in only one of"):
        tensors_of(replace(update, tensors=without))
    with pytest.raises(WeightError, match="'extra' are in only one of"):
        tensors_of(replace(update, tensors=update.tensors | {"extra": np.zeros(1)}))
    reshaped = update.tensors | {"layers.0.weight": update.tensors["layers.0.weight"].T}
    with pytest.raises(WeightError, match=r"'layers.0.weight' is float32\[4, 3\]"):
        tensors_of(replace(update, tensors=reshaped))


def test_two_tensors_of_one_name_and_none_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="two tensors are named 'w'"):
        pack_weights([("w", torch.zeros(1)), ("w", torch.zeros(1))], 0, None)
    with pytest.raises(ValueError, match="holds no tensors"):
        pack_weights([], 0, None)


def test_another_architecture_is_refused() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    require_same_shapes(packed(), shapes)
    require_same_shapes(packed(), shapes | {"lm_head.weight": (9, 9)}, ["lm_head.weight"])
    with pytest.raises(WeightError, match=r"it lacks 'lm_head\.weight'"):
        require_same_shapes(packed(), shapes | {"lm_head.weight": (9, 9)})
    with pytest.raises(WeightError, match="the model has no 'norm'"):
        require_same_shapes(packed(), {k: v for k, v in shapes.items() if k != "norm"})
    with pytest.raises(WeightError, match=r"'norm' is \[3\], the model has \[4\]"):
        require_same_shapes(packed(), shapes | {"norm": (4,)})


def test_probe_needs_one_logprob_less_than_ids() -> None:
    Probe(token_ids=[[1, 2, 3]], logprobs=[np.zeros(2, np.float32)])
    for ids, count in ([[1, 2, 3]], 3), ([[1]], 0), ([], 0):
        with pytest.raises(ValueError, match="a probe needs"):
            Probe(token_ids=ids, logprobs=[np.zeros(count, np.float32) for _ in ids])


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_a_checkpoint_is_read_as_transformers_reads_it(
    tiny_llama: Path, tmp_path: Path, shard_size: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_size == "5GB" else 3)
    arrived = tensors_of(read_checkpoint(tmp_path, version=7))
    expected = dict(model.named_parameters())  # a tied head is there once
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], expected[name]) for name in expected)
    assert checkpoint_shapes(tmp_path) == {k: tuple(v.shape) for k, v in expected.items()}


def test_checkpoints_that_are_missing_or_damaged_say_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        read_checkpoint(tmp_path, version=0)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_checkpoint(tmp_path, version=0)
    save_file({"ids": torch.zeros(2, dtype=torch.int64)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'ids' is I64; weights must be floating point"):
        read_checkpoint(tmp_path, version=0)

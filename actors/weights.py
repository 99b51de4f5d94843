"""Weights on their way to the engines: versioned, checksummed per tensor, proved by a probe.

::

    learner                          object store                 every rollout actor
    pack_weights(...).publish()  ->  tensors, copied once   ->    tensors_of(update)   verified
         manifest + probe  ------------- by value ----------->    engine.load(update)  probed

The tensors travel as NumPy arrays, which Ray stores out of band: one copy into shared memory,
then every actor of a node reads the same pages. bfloat16, which NumPy lacks, travels as the
``uint16`` of the same bits.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from actors.trajectory import Float32Array

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

# NumPy's name of the bits that carry a dtype; every other dtype has the same name in both.
_CARRIER = {"bfloat16": "uint16"}

_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightError(RuntimeError):
    """A weight update that must not be used; the message names the tensor or the probe's error."""


class WeightMismatch(WeightError):
    """An update of another architecture, which sending it again cannot mend."""


class WeightsLost(WeightError):
    """The tensors of an update are gone with the learner, or its node, that held them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What a tensor must be on arrival.

    Attributes:
        dtype: Torch's name of it, such as ``"bfloat16"``.
        checksum: XXH3-64 of its bytes in C order.
    """

    dtype: str
    shape: tuple[int, ...]
    checksum: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Probe:
    """A few sequences and what the learner thinks of them, for the engine to agree with.

    Attributes:
        token_ids: S sequences of at least two ids; lengths ``T_s`` may differ.
        logprobs: S arrays ``[T_s - 1]``: the learner's log-probability, at temperature 1, of
            ids 1, 2, ... of the sequence given all before.
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Float32Array]

    def __post_init__(self) -> None:
        ids, logprobs = [len(x) for x in self.token_ids], [len(x) for x in self.logprobs]
        if not ids or min(ids) < 2 or logprobs != [n - 1 for n in ids]:
            raise ValueError(
                "a probe needs sequences of at least two ids and one log-probability for each id"
                f" after the first: got {ids} ids and {logprobs} log-probabilities"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WeightUpdate:
    """One version of a model's weights.

    Attributes:
        version: Grows with training; every sampled token remembers it.
        manifest: What each tensor must be on arrival, by Hugging Face parameter name.
        tensors: The tensors by name, or the Ray object (an ``ObjectRef``) that holds them.
        probe: What the engine must reproduce; ``None`` only for weights without a learner.
        seconds_checksum, seconds_probe: What verifying cost where the update was made.
    """

    version: int
    manifest: Mapping[str, TensorInfo]
    tensors: Any
    probe: Probe | None
    seconds_checksum: float = 0.0
    seconds_probe: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            int(np.prod(info.shape, dtype=np.int64)) * _carrier(info.dtype).itemsize
            for info in self.manifest.values()
        )

    @property
    def published(self) -> bool:
        return not isinstance(self.tensors, Mapping)

    def publish(self) -> WeightUpdate:
        """The same update with its tensors in the object store (their only copy on the way).

        Small enough afterwards to be passed by value through any number of processes.
        """
        import ray

        return self if self.published else replace(self, tensors=ray.put(dict(self.tensors)))


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateConfirmation:
    """An actor's word that it generates from a version.

    Attributes:
        actor: Name of the actor.
        probe_max_error: Largest ``|Δ log p|`` against the learner, in nats; NaN without a probe.
        probe_mean_error: Mean of the same.
        seconds_verify: Fetching the tensors and checking their checksums.
        seconds_load: Handing them to vLLM.
        seconds_probe: Computing the probe's log-probabilities.
        refusal: Why the actor refused the update the first time, when it had to be given it
            twice; else empty.
    """

    actor: str
    version: int
    probe_max_error: float
    probe_mean_error: float
    seconds_verify: float
    seconds_load: float
    seconds_probe: float
    refusal: str = ""

    @property
    def seconds(self) -> float:
        return self.seconds_verify + self.seconds_load + self.seconds_probe


def pack_weights(
    named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, probe: Probe | None
) -> WeightUpdate:
    """Describe tensors as an update, without copying those that are contiguous on the CPU.

    The update therefore shares memory with the parameters: ``publish()`` it before the next
    optimizer step.

    Args:
        named_tensors: Hugging Face parameter names with tensors, such as
            ``model.named_parameters()``.

    Raises:
        ValueError: two tensors of one name, or none at all.
    """
    started = time.perf_counter()
    tensors: dict[str, Array] = {}
    manifest: dict[str, TensorInfo] = {}
    for name, tensor in named_tensors:
        if name in tensors:
            raise ValueError(f"weight update {version}: two tensors are named {name!r}")
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = _as_array(tensor)
        manifest[name] = TensorInfo(
            dtype=dtype, shape=tuple(tensor.shape), checksum=_checksum(tensors[name])
        )
    if not tensors:
        raise ValueError(f"weight update {version} holds no tensors")
    return WeightUpdate(
        version=version,
        manifest=manifest,
        tensors=tensors,
        probe=probe,
        seconds_checksum=time.perf_counter() - started,
    )


def tensors_of(update: WeightUpdate) -> dict[str, torch.Tensor]:
    """The tensors of an update whose ``tensors`` are here, verified; they share its memory.

    Raises:
        WeightError: a tensor is missing, unannounced, of another dtype or shape, or its bytes
            are not those that were sent; the message names it.
    """
    import torch

    if unmatched := set(update.manifest) ^ set(update.tensors):
        raise WeightError(
            f"weight update {update.version}: tensors {_some(unmatched)} are in only one of"
            " manifest and payload"
        )
    verified: dict[str, torch.Tensor] = {}
    for name, info in update.manifest.items():
        array: Array = update.tensors[name]
        where = f"weight update {update.version}: tensor {name!r}"
        if array.shape != info.shape or array.dtype != _carrier(info.dtype):
            raise WeightError(
                f"{where} is {array.dtype}{list(array.shape)}, announced as"
                f" {info.dtype}{list(info.shape)}"
            )
        if (checksum := _checksum(array)) != info.checksum:
            raise WeightError(
                f"{where} is corrupt: its checksum is {checksum:016x}, {info.checksum:016x} was"
                " sent"
            )
        with warnings.catch_warnings():
            # Memory of the object store is read-only, and nobody writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            memory = torch.from_numpy(_bytes(array))
        verified[name] = memory.view(getattr(torch, info.dtype)).view(info.shape)
    return verified


def read_checkpoint(model_dir: Path, version: int, probe: Probe | None = None) -> WeightUpdate:
    """The weights of a Hugging Face directory as an update.

    Raises:
        FileNotFoundError: the directory has no safetensors weights.
        ValueError: a file is damaged, or holds a tensor that is not floating point.
    """
    from safetensors import SafetensorError, deserialize

    tensors: dict[str, Array] = {}
    manifest: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        try:
            entries: list[tuple[str, dict[str, Any]]] = deserialize(  # type: ignore[no-untyped-call]
                path.read_bytes()
            )
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        for name, entry in entries:
            dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
            if dtype is None:
                raise ValueError(
                    f"{path}: tensor {name!r} is {entry['dtype']}; weights must be floating point"
                )
            array = np.frombuffer(entry["data"], _carrier(dtype)).reshape(entry["shape"])
            tensors[name] = array
            manifest[name] = TensorInfo(dtype=dtype, shape=array.shape, checksum=_checksum(array))
    return WeightUpdate(version=version, manifest=manifest, tensors=tensors, probe=probe)


def checkpoint_shapes(model_dir: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a Hugging Face directory, from the files' headers alone."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(model_dir):
        with safe_open(path, framework="np") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, following its index when sharded."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    paths = [model_dir / name for name in names]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{model_dir} is not a checkpoint with safetensors weights: {missing[0]} is missing"
        )
    return paths


def require_same_shapes(
    update: WeightUpdate, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()
) -> None:
    """Refuse an update of another architecture, before anything is touched.

    vLLM itself keeps the old values of a layer that an update leaves out, with a log line only.

    Args:
        expected: Shape of every tensor that the model is made of.
        optional: Names that may come in addition or be absent (a tied ``lm_head.weight``).

    Raises:
        WeightMismatch: a tensor is missing, unknown, or of another shape.
    """
    skip = set(optional)
    sent = {name: info.shape for name, info in update.manifest.items()}
    where = f"weight update {update.version} is not of the engine's architecture"
    if missing := expected.keys() - sent.keys() - skip:
        raise WeightMismatch(f"{where}: it lacks {_some(missing)}")
    if unknown := sent.keys() - expected.keys() - skip:
        raise WeightMismatch(f"{where}: the model has no {_some(unknown)}")
    for name in expected.keys() & sent.keys():
        if sent[name] != expected[name]:
            raise WeightMismatch(
                f"{where}: {name!r} is {list(sent[name])}, the model has {list(expected[name])}"
            )


def _as_array(tensor: torch.Tensor) -> Array:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: Array = tensor.numpy()
    return array


def _carrier(dtype: str) -> np.dtype[Any]:
    return np.dtype(_CARRIER.get(dtype, dtype))


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _checksum(array: Array) -> int:
    return int(xxhash.xxh3_64_intdigest(_bytes(array).data))


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(map(repr, ordered[:3])) + more

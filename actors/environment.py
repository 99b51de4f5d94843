"""The environment that a generation engine's process must start in.

Most of these settings are read while libraries load, so they cannot be set from inside.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from actors.config import EngineConfig


def cache_dir() -> Path:
    """Where engines keep what makes their next start fast: ``$RLHF_CACHE`` or a default."""
    configured = os.environ.get("RLHF_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "ray-rlhf"


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a process that runs one engine."""
    cache = cache_dir()
    environment = {
        # Waiting threads sleep: spinning ones slow every process of a shared machine down.
        "OMP_NUM_THREADS": str(config.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # The engine lives in the actor's own process: no children to orphan.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM remembers here what it learns about a model in half a minute of inspection.
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(cache / "vllm")),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "VLLM_NO_USAGE_STATS": "1",
        # Models are local directories; nothing has to be asked of the hub.
        "HF_HUB_OFFLINE": "1",
        # An update needs memory for each layer twice, for a moment. The C library would give it
        # back to the system and take it again, page by page: half of the time of an update.
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        # Bytecode that is never written costs every start a dozen CPU-seconds.
        "PYTHONDONTWRITEBYTECODE": "",
    }
    if config.enforce_eager:
        # Even an eager engine would compile one sampling function, for half a minute.
        environment["TORCH_COMPILE_DISABLE"] = "1"
    if not _library_is_writable():
        environment["PYTHONPYCACHEPREFIX"] = str(cache / "bytecode")
    return environment


def _library_is_writable() -> bool:
    """Whether Python may keep bytecode beside vLLM's source."""
    found = importlib.util.find_spec("vllm")
    return bool(found and found.origin and os.access(Path(found.origin).parent, os.W_OK))

"""Ending actors and the processes that they live in, and Ray's errors in brief."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psutil
import ray

from actors.rollout_actor import EngineInfo
from actors.worker import Worker


def brief(error: Exception) -> str:
    """The telling lines of Ray's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines if line.startswith(("The actor is dead because", "Worker exit"))
    ]
    return " ".join(dict.fromkeys([*lines[:1], *telling]))


def end(workers: Sequence[Worker], timeout_s: float) -> list[int]:
    """End actors and their processes; returns ids of those on this node that live on.

    Ray asks a process to end; one that hangs does not hear it and is killed.
    """
    processes = [process for worker in workers if (process := _process_here(worker.info))]
    for worker in workers:
        if worker.handle is not None:
            ray.kill(worker.handle, no_restart=True)
        worker.handle = worker.info = None
    _, deaf = psutil.wait_procs(processes, timeout=min(3.0, timeout_s))
    for process in deaf:
        process.kill()
    _, left = psutil.wait_procs(deaf, timeout=timeout_s)
    return [process.pid for process in left]


def _process_here(info: EngineInfo | None) -> Any:
    """The process of an actor (a ``psutil.Process``) if it lives on this node."""
    if info is None or info.node_id != ray.get_runtime_context().get_node_id():
        return None
    try:
        process = psutil.Process(info.pid)
    except psutil.NoSuchProcess:
        return None
    return process if process.create_time() == info.created else None

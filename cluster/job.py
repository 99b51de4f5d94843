"""What is different when a run is a Ray job (``ray job submit ... -- rlhf ppo --config ...``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from cluster.config import RunConfig

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
RAY_STOP_WAIT_S = 3
"""Seconds from ``ray job stop`` to SIGKILL, unless the job's environment says otherwise."""


def check_job(
    config: RunConfig,
    warn: Callable[[str], None],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Say what would be lost in a job; returns at once outside of one.

    Raises:
        ValueError: The run directory would be thrown away with the job's copy of the code.
    """
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in environment:  # Ray's name; every job has it
        return
    if not config.run_dir.is_absolute():
        raise ValueError(
            f"run_dir is {str(config.run_dir)!r}, which in a Ray job lies in the job's own copy of "
            "the code and is thrown away with it: set an absolute path, on storage that every node "
            "sees (run_dir=/shared/runs/mine)"
        )
    if STOP_WAIT not in environment:
        warn(
            f"`ray job stop` will kill this run {RAY_STOP_WAIT_S} s after it asks it to end, most "
            "likely before a checkpoint is written: submit it with --runtime-env "
            f"deploy/runtime_env.yaml, which sets {STOP_WAIT}"
        )

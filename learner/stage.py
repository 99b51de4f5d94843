"""What the three supervised stages do alike before and after the training loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from learner.config import SupervisedConfig
from learner.supervised import remove_state, settings_of
from learner.token_batches import IntArray

REPORT_FILE = "training_report.json"
"""Written last: a directory that has it is complete."""


def split(count: int, held_out_share: float, seed: int) -> tuple[IntArray, IntArray]:
    """Indices held out and trained on, both in order and neither empty (``count`` >= 2)."""
    held = min(count - 1, max(1, round(count * held_out_share)))
    order = np.random.default_rng([seed, 0x5EED]).permutation(count)
    return np.sort(order[:held]), np.sort(order[held:])


def identity_of(config: SupervisedConfig, seed: int, rows: Sequence[npt.NDArray[Any]]) -> str:
    """Fingerprint of what decides the result, by which a state file is recognised."""
    digest = hashlib.sha256(f"{settings_of(config, seed)}/{len(rows)}".encode())
    for row in rows:
        digest.update(len(row).to_bytes(8, "big"))
        digest.update(row.tobytes())
    return digest.hexdigest()


def finish(output_dir: Path, report: Any) -> None:
    """Write the report, which marks the directory complete, and drop the training state."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False)
    partial = output_dir / (REPORT_FILE + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(output_dir / REPORT_FILE)
    remove_state(output_dir)

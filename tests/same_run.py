"""Small runs that are killed and resumed, and what it means that two of them end alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WORDS = ["storm", "Riverton", "council", "market", "rain", "bank", "river", "mayor"]

NOT_OF_THE_RESULT = (
    "time",
    "seconds/",
    "ppo/seconds",
    "weights/seconds",
    "weights/verify_share",
    "tokens/per_second",
    "tokens_per_second",
    "recovery/",
    "rollout/engines",
)
"""Keys of a line of metrics that say how long something took, or what was lost and replaced."""


def picky(*, response_ids: list[int], **_: Any) -> float:
    """A reward function that fails for one response in seven or so, the same ones every time."""
    if sum(response_ids) % 7 == 0:
        raise ArithmeticError("a multiple of seven")
    return len(set(response_ids)) / len(response_ids) + (response_ids[0] % 16) / 16


def write_config(directory: Path, run_dir: Path, model: Path, **changes: Mapping[str, Any]) -> Path:
    """A PPO run of ten small steps on ``model``; ``changes`` are merged section by section."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": " ".join(WORDS[(i + j) % 8] for j in range(1 + i % 4))}
            for i in range(24)]  # fmt: skip
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, dict[str, Any]] = {
        "data": {"prompts": str(prompts), "max_prompt_tokens": 32},
        "sampling": {"max_new_tokens": 10, "samples_per_prompt": 2},
        "rollout": {"engine": {"kv_cache_gib": 0.1, "max_num_seqs": 32}},
        "learners": {"num_learners": 0, "threads": 1},
        "reward": {
            "terms": [{"name": "picky", "function": "tests.same_run:picky"}],
            "retry": {"pause_s": 0.0},
            "service": {"port": 0},
        },
        "ppo": {
            "normalize_scores": True,
            "steps": 10,
            "prompts_per_step": 5,
            "epochs": 2,
            "minibatches": 2,
            "checkpoint_every": 3,
            "min_trained_share": 0.1,
            "tokens_per_micro_batch": 64,
            "kl": {"adaptive": True, "coef": 0.1},
            "policy": {"learning_rate": 1e-3, "warmup_share": 0.2},
            "critic": {"learning_rate": 3e-3, "schedule": "cosine"},
        },
        "evaluate": {"prompts": 2},
        "cluster": {"object_store_gib": 0.1},
    }
    for section, values in changes.items():
        config.setdefault(section, {}).update(values)
    path = directory / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump({"run_dir": str(run_dir), "model": str(model), **config}))
    return path


def differences(expected: Path, found: Path) -> list[str]:
    """What differs between two run directories of PPO, clocks left aside; nothing, when they are
    bit-identical: weights, optimizers, counters, metrics, samples, failures."""
    wrong = [
        f"{name} differs"
        for name in ("ppo/final/model.safetensors", "ppo/quarantine.jsonl")
        if _sha(expected / name) != _sha(found / name)
    ]
    for folder in ("ppo/checkpoints", "ppo/samples"):
        a, b = (_contents(run / folder) for run in (expected, found))
        wrong += [f"{folder}/{name} differs" for name in sorted(a.keys() | b.keys())
                  if a.get(name) != b.get(name)]  # fmt: skip
    return wrong + metrics_differences(expected / "ppo", found / "ppo")


def metrics_differences(expected: Path, found: Path) -> list[str]:
    a, b = (_metrics(stage / "metrics.jsonl") for stage in (expected, found))
    wrong = [] if len(a) == len(b) else [f"{len(b)} lines of metrics instead of {len(a)}"]
    for one, other in zip(a, b, strict=False):
        names = sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
        wrong += [f"step {one['step']}: {n} {one.get(n)} {other.get(n)}" for n in names]
    return wrong


def _metrics(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_OF_THE_RESULT)} for row in rows]


def _contents(folder: Path) -> dict[str, Any]:
    """Digest of every file; of a manifest, what it says of its checkpoint and not of its run."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.name == "manifest.json":
            manifest = json.loads(path.read_text())
            found[name] = [manifest[k] for k in ("step", "metrics", "state", "files", "versions")]
        elif path.is_file() and not name.startswith("damaged_"):
            found[name] = _sha(path)
    return {name: what for name, what in found.items() if not name.startswith("damaged_")}


def _sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"

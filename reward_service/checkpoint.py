"""What can be said of a reward-model directory without loading it. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from reward_service.encoding import HEAD_FILE, RewardHead


def check_files(path: Path) -> RewardHead:
    """The head of a directory that looks like a reward model.

    Raises:
        FileNotFoundError: The directory, its configuration, weights or head are missing.
        ValueError: Another kind of model, or a damaged configuration or head.
    """
    check_network_files(path)
    return RewardHead.load(path)


def check_network_files(path: Path) -> None:
    """That a directory looks like a scalar-head model, ours or not.

    Raises:
        FileNotFoundError: The directory, its configuration or weights are missing.
        ValueError: Another kind of model, or a damaged configuration.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"reward model {path} is not a directory: check the path")
    config_file = path / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{path} has no config.json, so it is not a model directory")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        architecture = str((config.get("architectures") or ["unknown model"])[0])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config_file} is not a model's configuration: {error}") from None
    if not architecture.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{path} is a {architecture}, not a reward model (a ...ForSequenceClassification with "
            "one output): train one from it with 'rlhf reward'"
        )
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{path} has no .safetensors weights; other formats are not loaded because they can "
            "run code: save it again with save_pretrained"
        )


def content_version(path: Path) -> str:
    """First 12 hex digits of a hash over weights, configuration and head."""
    digest = hashlib.sha256()
    for file in [path / "config.json", path / HEAD_FILE, *sorted(path.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            digest.update(file.name.encode())
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]

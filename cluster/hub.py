"""Models by name: a directory as it is, anything else from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from cluster.config import RunConfig

# Weights as safetensors only: a pickle from outside is never opened.
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


def with_local_model(config: RunConfig) -> RunConfig:
    """``config`` with its model as a local directory, downloaded first if it is a hub name.

    Raises:
        FileNotFoundError: Neither a directory nor a model on the hub that can be reached.
    """
    updates: dict[str, object] = {}
    if config.model is not None:
        updates["model"] = str(local_model(config.model))
    if config.pretrain is not None and config.pretrain.init_from is not None:
        start = str(local_model(config.pretrain.init_from))
        updates["pretrain"] = config.pretrain.model_copy(update={"init_from": start})
    return config.model_copy(update=updates) if updates else config


def local_model(name: str) -> Path:
    """The directory of a model."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise FileNotFoundError(
            f"no model at {name}: give a Hugging Face directory, or a hub name like owner/model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name} is not a directory here, and not to be had from the Hugging Face hub "
            f"({reason}): check the name and the network, or download it and give its directory"
        ) from error

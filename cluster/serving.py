"""``rlhf serve``: reward models over HTTP until somebody stops it, or a reload of one that runs."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.config import RunConfig
from cluster.progress import Reporter
from cluster.session import Session
from cluster.stop import StopRequest
from reward_service.config import (
    EnsembleConfig,
    RewardConfig,
    RewardServiceConfig,
    RewardTerm,
    check_names,
)
from reward_service.security import (
    TOKEN_VARIABLE,
    check_binding,
    is_loopback,
    read_token_digests,
)


def serve_until_stopped(models: Sequence[str], service: RewardServiceConfig) -> None:
    """Start the service, say where it listens, and wait for Ctrl-C or SIGTERM.

    Then requests under way are answered, further ones refused, and everything is ended.

    Raises:
        ValueError: A name is wrong, an ensemble has an unknown member, or the service would
            listen beyond this machine without tokens.
    """
    terms = [_term(model) for model in models]
    # Before Ray is started: what is wrong should be said at once.
    check_names({term.name: term for term in terms}, service)
    check_binding(service.host, read_token_digests(service.tokens_file))
    config = RunConfig(run_dir=Path(), reward=RewardConfig(terms=tuple(terms), service=service))
    reporter = Reporter()
    stop = StopRequest(reporter.say, "answering what is under way")
    with Session(config, reporter, stop) as session:
        session.reward(terms)
        reporter.say("serving until Ctrl-C")
        while not stop():
            time.sleep(0.5)


def reload_running(model: str, host: str, port: int, timeout_s: float) -> str:
    """Have the server at an address load another version of a model; gives the new version.

    The token is the first one in ``RLHF_REWARD_TOKENS``.

    Raises:
        ValueError: The server refused; its reason is passed on.
        RuntimeError: It cannot be reached.
    """
    import httpx

    name, equals, directory = model.partition("=")
    if not equals:
        raise ValueError(f"--reload {model!r} must look like name=directory")
    tokens = re.split(r"[\s,]+", os.environ.get(TOKEN_VARIABLE, "").strip())
    headers = {"Authorization": f"Bearer {tokens[0]}"} if tokens[0] else {}
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        answer = httpx.put(
            f"{address}/v1/models/{name}",
            json={"directory": str(Path(directory).resolve())},
            headers=headers,
            timeout=timeout_s,
            trust_env=not is_loopback(host),
        )
        body = answer.json()
    except (httpx.TransportError, ValueError) as error:
        raise RuntimeError(
            f"the reward server at {address} does not answer ({type(error).__name__}): check "
            "--host and --port"
        ) from None
    if answer.status_code != 200:
        raise ValueError(
            f"the reward server refused {name}={directory}: {body['error']['message']}"
        )
    return str(body["version"])


def ensembles(chosen: Sequence[str], penalty: float) -> dict[str, EnsembleConfig]:
    """``NAME=HOW:MEMBER,MEMBER`` as configurations. Raises ValueError for anything else."""
    found = {}
    for text in chosen:
        name, equals, rest = text.partition("=")
        how, colon, members = rest.partition(":")
        if not equals or not colon or how not in ("mean", "minimum", "lower_bound"):
            raise ValueError(
                f"--ensemble {text!r} must look like NAME=lower_bound:MEMBER,MEMBER (or mean, or "
                "minimum)"
            )
        found[name] = EnsembleConfig(
            members=tuple(members.split(",")), combine=how, penalty=penalty
        )
    return found


def _term(model: str) -> RewardTerm:
    name, equals, path = model.partition("=")
    if not equals:
        name, path = Path(model).resolve().name, model
    return RewardTerm(name=name, model=path)

"""``rlhf serve``: reward models over HTTP until somebody stops it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cluster.config import RunConfig
from cluster.progress import Reporter
from cluster.session import Session
from cluster.stop import StopRequest
from reward_service.config import RewardConfig, RewardServiceConfig, RewardTerm


def serve_until_stopped(models: Sequence[str], *, host: str, port: int, replicas: int) -> None:
    """Start the service, say where it listens, and wait for Ctrl-C or SIGTERM."""
    terms = [_term(model) for model in models]
    config = RunConfig(
        run_dir=Path(),
        reward=RewardConfig(
            terms=tuple(terms),
            service=RewardServiceConfig(host=host, port=port, num_replicas=replicas),
        ),
    )
    reporter = Reporter()
    stop = StopRequest(reporter.say)
    with Session(config, reporter, stop) as session:
        session.reward(terms)
        reporter.say("serving until Ctrl-C")
        while not stop():
            time.sleep(0.5)


def _term(model: str) -> RewardTerm:
    name, equals, path = model.partition("=")
    if not equals:
        name, path = Path(model).resolve().name, model
    return RewardTerm(name=name, model=path)

"""A small reward model made for these tests, and trajectories without an engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from actors.fingerprint import template_fingerprint
from actors.trajectory import Message, Prompt, Trajectory
from reward_service.encoding import RewardHead
from tests.postgres import binaries, postgres_server

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def write_reward_model(source: Path, path: Path, *, seed: int, gain: float, bias: float) -> Path:
    """A random scalar head on the body of ``source``, as training would leave it."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(path)
    fingerprint = template_fingerprint(AutoTokenizer.from_pretrained(path))
    RewardHead(gain=gain, bias=bias, fingerprint=fingerprint, base="tiny").save(path)
    return path


@pytest.fixture(scope="session")
def reward_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward_model")
    return write_reward_model(tiny_llama, path, seed=1, gain=2.0, bias=-0.5)


@pytest.fixture(scope="session")
def second_reward_dir(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("second_reward_model")
    return write_reward_model(tiny_llama, path, seed=2, gain=1.0, bias=0.0)


TrajectoryMaker = Callable[..., Trajectory]


@pytest.fixture(scope="session")
def trajectory() -> TrajectoryMaker:
    def make(
        response: str = " rain fell",
        *,
        prompt: str = "storm in Riverton",
        ids: list[int] | None = None,
        number: int = 0,
        messages: tuple[Message, ...] = (),
        meta: dict[str, object] | None = None,
    ) -> Trajectory:
        response_ids = np.array(ids if ids is not None else [7, 8, 2], np.int32)
        return Trajectory(
            prompt=Prompt(
                prompt_id=f"p{number}",
                token_ids=np.array([1, 5], np.int32),
                text=prompt,
                messages=messages,
                meta=meta or {},
            ),
            sample_index=0,
            response_ids=response_ids,
            response_logprobs=np.zeros(len(response_ids), np.float32),
            policy_versions=np.zeros(len(response_ids), np.int32),
            response_text=response,
            finish_reason="stop",
            seed=0,
        )

    return make


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """One PostgreSQL server for the whole session."""
    if binaries() is None:
        pytest.skip("no PostgreSQL here: install postgresql")
    with postgres_server() as url:
        yield url


_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh store, in a file and on a server."""
    if request.param == "sqlite":
        return str(tmp_path / "feedback.sqlite")
    from sqlalchemy import create_engine, text

    url = request.getfixturevalue("postgres_url")
    name = f"store{next(_numbers)}"
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{url.rsplit('/', 1)[0]}/{name}"

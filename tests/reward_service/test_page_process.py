"""The page as a process: people at once on both databases, and a kill in the middle."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy.exc import OperationalError

from reward_service.feedback.page import serve
from reward_service.feedback.page.serve import SECRET_VARIABLE, page_secret
from tests.reward_service.page_load import run


def test_people_at_once_and_a_kill_lose_nothing(store_location: str, tmp_path: Path) -> None:
    found = run(
        tmp_path / "run", count=8, answers=60, think_s=0.05, store=store_location, kill=True
    )
    assert found["acknowledged"] >= 60
    assert found["lost"] == 0
    assert found["doubled"] == 0
    assert found["over_overlap"] == 0
    # One that was stored may have been killed before its acknowledgement.
    assert found["acknowledged"] <= found["stored"] <= found["acknowledged"] + 8


def test_retention_outlives_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    end = threading.Event()
    turns: list[int] = []

    def expire(store: object, days: int) -> None:
        turns.append(days)
        if len(turns) == 1:
            raise OperationalError("DELETE", {}, Exception("database is locked"))
        end.set()

    monkeypatch.setattr(serve, "expire", expire)
    monkeypatch.setattr(serve, "EXPIRE_EVERY_S", 0.001)
    serve._keep_retention(SimpleNamespace(), 30, end)  # type: ignore[arg-type]
    assert turns == [30, 30]
    assert "database is locked" in caplog.text


def test_the_secret_is_kept_for_its_owner_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = page_secret(tmp_path)
    assert page_secret(tmp_path) == secret
    assert len(secret) > 40
    assert stat.S_IMODE((tmp_path / "page_secret").stat().st_mode) == 0o600
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(ValueError, match="too short"):
        page_secret(tmp_path)
    monkeypatch.setenv(SECRET_VARIABLE, "x" * 40)
    assert page_secret(tmp_path) == "x" * 40


def test_the_page_needs_neither_ray_nor_a_model() -> None:
    code = (
        "import sys, cluster.feedback, reward_service.feedback.page.serve\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'alembic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Tokens, bindings and model directories, without a server."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from reward_service.security import (
    TOKEN_VARIABLE,
    authorised,
    check_binding,
    inside,
    is_loopback,
    read_token_digests,
)

TOKEN, OTHER = "a-token-of-some-length", "another:token/with+signs="


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_tokens_come_from_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_token_digests(None) == ()
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n{TOKEN}\n")
    monkeypatch.setenv(TOKEN_VARIABLE, f"{OTHER}, {TOKEN}")
    digests = read_token_digests(file)
    assert len(digests) == 2
    assert TOKEN not in str(digests)
    for header in (f"Bearer {TOKEN}", f"bearer  {OTHER}", basic("me", OTHER), basic("", TOKEN)):
        assert authorised(header, digests)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        "Bearer",
        f"Digest {TOKEN}",
        basic(TOKEN, ""),
        basic("me", TOKEN + " "),
        "Basic not-base64!",
        "Basic " + base64.b64encode(b"\xff:\xff").decode(),
        "Bearer \udcff",
    ],
)
def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch, header: str | None) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert not authorised(header, read_token_digests(None))
    assert authorised(header, ())


def test_bad_tokens_are_named_but_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, f"{TOKEN} short")
    with pytest.raises(ValueError, match=f"{TOKEN_VARIABLE}: token 2 must have") as caught:
        read_token_digests(None)
    assert "short" not in str(caught.value)
    monkeypatch.delenv(TOKEN_VARIABLE)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="empty has no token in it"):
        read_token_digests(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no tokens file at"):
        read_token_digests(tmp_path / "nowhere")


def test_only_loopback_goes_without_tokens() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert is_loopback(host)
        check_binding(host, ())
    for host in ("0.0.0.0", "::", "10.0.0.7", "reward.example"):
        with pytest.raises(ValueError, match=rf"listen on {host}, .*{TOKEN_VARIABLE}"):
            check_binding(host, ())
        check_binding(host, ("digest",))


def test_a_model_directory_lies_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "good" / "deep").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (root / "file").write_text("")
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "way_in").symlink_to(root)
    assert inside(root, "good/deep") == root.resolve() / "good" / "deep"
    assert inside(tmp_path / "way_in", str(root / "good")) == root.resolve() / "good"
    for wanted in ("../outside", "/etc", "link", "loop", "nowhere", "file", "good/../..", "\0"):
        with pytest.raises(ValueError, match="no such model directory inside the models root"):
            inside(root, wanted)

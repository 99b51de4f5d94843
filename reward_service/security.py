"""Who may ask the reward service, and which directories it may load. No Ray, no torch.

Tokens come from a file or from the environment, never from arguments. Only their SHA-256 digests
leave the process that read them, so neither Serve's state nor a log ever holds one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

TOKEN_VARIABLE = "RLHF_REWARD_TOKENS"
"""Environment variable with the tokens, separated by spaces or commas."""

SHORTEST_TOKEN = 16


def read_token_digests(tokens_file: Path | None) -> tuple[str, ...]:
    """SHA-256 digests of the tokens in the file and in ``RLHF_REWARD_TOKENS``; none is allowed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A token is too short or has characters that no header can carry, or a file
            was given that has none.
    """
    places = [(os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE)]
    if tokens_file is not None:
        if not tokens_file.is_file():
            raise FileNotFoundError(
                f"there is no tokens file at {tokens_file}: make one with a token a line, or "
                f"set {TOKEN_VARIABLE}"
            )
        places.append((tokens_file.read_text(encoding="utf-8"), str(tokens_file)))
    digests: list[str] = []
    for text, where in places:
        tokens = re.split(r"[\s,]+", text.strip()) if text.strip() else []
        for number, token in enumerate(tokens, start=1):
            if len(token) < SHORTEST_TOKEN or not re.fullmatch(r"[\x21-\x7e]+", token):
                raise ValueError(
                    f"{where}: token {number} must have at least {SHORTEST_TOKEN} printable ASCII "
                    "characters: make one with 'openssl rand -hex 32'"
                )
            digests.append(_digest(token))
        if where == str(tokens_file) and not tokens:
            raise ValueError(f"{where} has no token in it: write one a line")
    return tuple(dict.fromkeys(digests))


def check_binding(host: str, token_digests: Sequence[str]) -> None:
    """Raises ValueError when a server would listen beyond this machine without tokens."""
    if not token_digests and not is_loopback(host):
        raise ValueError(
            f"the reward service would listen on {host}, where others can reach it, without "
            f"tokens: set {TOKEN_VARIABLE} or reward.service.tokens_file, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def authorised(header: str | None, token_digests: Sequence[str]) -> bool:
    """Whether an Authorization header carries one of the tokens; always, without tokens.

    ``Bearer TOKEN``, or ``Basic`` with the token as password: several trainers can send no header
    of their own, but a URL ``http://any:TOKEN@host`` makes their HTTP library send Basic.
    """
    if not token_digests:
        return True
    digest = _digest(_token_in(header or ""))
    # Every comparison is made, each in constant time: the time tells nothing about the tokens.
    matches = [hmac.compare_digest(digest, known) for known in token_digests]
    return any(matches)


def _token_in(header: str) -> str:
    scheme, _, rest = header.strip().partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(rest.strip(), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return ""
        return pair.partition(":")[2]
    return ""


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def inside(root: Path, wanted: str) -> Path:
    """``wanted`` as a real path inside ``root``, links followed.

    Raises:
        ValueError: It leads outside, or is no directory there.
    """
    real_root = root.resolve()
    try:
        path = (real_root / wanted).resolve()
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a NUL in the name
        path = None
    if path is None or not path.is_relative_to(real_root) or not path.is_dir():
        # The same words whether or not something lies outside: paths are not to be probed.
        raise ValueError("there is no such model directory inside the models root")
    return path

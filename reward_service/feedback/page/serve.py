"""The page as a process: until Ctrl-C, with no log of requests, and retention enforced."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import uvicorn

from reward_service.config import PeopleConfig
from reward_service.feedback.erasure import expire
from reward_service.feedback.page.app import create_app
from reward_service.feedback.people import invite_again
from reward_service.feedback.store import FeedbackStore

logger = logging.getLogger(__name__)

ADMINISTRATOR = "administrator"
SECRET_VARIABLE = "RLHF_PAGE_SECRET"
EXPIRE_EVERY_S = 3600.0


def serve_page(
    location: str, config: PeopleConfig, run_dir: Path, *, say: Callable[[str], None]
) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        location: Of the store.
        run_dir: Keeps the secret that signs sessions, unless RLHF_PAGE_SECRET gives one.
        say: Told the address and the administrator's link.

    Raises:
        OSError: The port is taken.
    """
    with FeedbackStore(location) as store:
        end = threading.Event()
        keeper = threading.Thread(
            target=_keep_retention, args=(store, config.retention_days, end), daemon=True
        )
        server_socket = _bind(config)
        port = server_socket.getsockname()[1]
        address = config.public_url or f"http://{_shown_host(config.host)}:{port}"
        app = create_app(
            store, config, secret=page_secret(run_dir), run_dir=run_dir, address=address
        )
        # A new link each time; the one before ends.
        token = invite_again(
            store.database, ADMINISTRATOR, role="administrator", days=config.invite_days
        )
        say(f"the page: {address}")
        say(f"administrator: {address.rstrip('/')}/join/{token}")
        say("stop it with Ctrl-C; judgements are stored as they come")
        keeper.start()
        try:
            # Requests are not logged and the peer's address is never read from headers.
            uvicorn.Server(
                uvicorn.Config(
                    app,
                    log_level="warning",
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    timeout_graceful_shutdown=5,
                )
            ).run(sockets=[server_socket])
        finally:
            end.set()
            server_socket.close()
            keeper.join(timeout=30)


def page_secret(run_dir: Path) -> str:
    """From the environment, or a file that only its owner can read, made when it is missing."""
    given = os.environ.get(SECRET_VARIABLE)
    if given:
        if len(given) < 32:
            raise ValueError(f"{SECRET_VARIABLE} is too short to be safe: 32 characters or more")
        return given
    path = run_dir / "page_secret"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text(encoding="ascii")
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        secret = secrets.token_urlsafe(48)
        file.write(secret)
    return secret


def _bind(config: PeopleConfig) -> socket.socket:
    try:
        return socket.create_server((config.host, config.port), backlog=256)
    except OSError as error:
        raise OSError(
            f"the page cannot listen on {config.host}:{config.port}: {error.strerror}: choose "
            "another port with --port, 0 picks a free one"
        ) from None


def _shown_host(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host


def _keep_retention(store: FeedbackStore, days: int, end: threading.Event) -> None:
    while True:
        try:
            expire(store, days)
        except Exception:  # a database that is away for a while must not end retention for good
            logger.exception("what is over its time was not deleted; tried again in an hour")
        if end.wait(EXPIRE_EVERY_S):
            return

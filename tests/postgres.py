"""A PostgreSQL server of our own for tests: in a temporary folder, on a free loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The folder of ``initdb`` and ``postgres``, on the path or where Debian puts them."""
    found = shutil.which("initdb")
    if found and shutil.which("postgres"):
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextmanager
def postgres_server() -> Iterator[str]:
    """URL of a running server; it and its files are gone afterwards. Refuses to run as root."""
    directory = binaries()
    assert directory is not None
    # PostgreSQL will not run as root.
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
    identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    with tempfile.TemporaryDirectory(
        prefix="rlhf-pg-", dir="/tmp", ignore_cleanup_errors=True
    ) as home:
        if user:
            os.chown(home, user.pw_uid, user.pw_gid)
        data = Path(home) / "data"
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "HOME": home}
        subprocess.run(
            [directory / "initdb", "-D", data, "-U", "rlhf", "-A", "trust", "--no-sync", "-E",
             "UTF8"],
            check=True, stdout=subprocess.DEVNULL, env=environment, cwd=home, **identity,
        )  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen(
            [directory / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", home,
             "-c", "max_connections=120"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=home,
            **identity,
        )  # fmt: skip
        try:
            _wait(directory / "pg_isready", port, home)
            yield f"postgresql+psycopg://rlhf@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(timeout=30)


def _wait(pg_isready: Path, port: int, home: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        ready = subprocess.run(
            [pg_isready, "-q", "-h", "127.0.0.1", "-p", str(port)], cwd=home, check=False
        )
        if ready.returncode == 0:
            return
        time.sleep(0.1)
    raise TimeoutError(f"PostgreSQL on port {port} did not answer within 60 s")

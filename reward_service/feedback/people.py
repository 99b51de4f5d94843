"""People who judge: pseudonyms, invitations, consent.

A person is a pseudonym and nothing else. An invitation is a random token in a link; only its hash
is stored, and it signs in the one person that it was made for, on any device, until it expires or
is revoked.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, func, select

from reward_service.feedback.database import Database
from reward_service.feedback.schema import annotators, assignments, consents, invites
from reward_service.feedback.store import now

Role = Literal["rater", "administrator"]

_ANIMALS = (
    "badger", "beaver", "bison", "crane", "curlew", "dormouse", "dunlin", "egret", "falcon",
    "finch", "gannet", "gecko", "hare", "hedgehog", "heron", "ibex", "jackdaw", "kestrel",
    "kingfisher", "lapwing", "lark", "lynx", "magpie", "marten", "merlin", "newt", "nightjar",
    "osprey", "otter", "owl", "petrel", "pipit", "plover", "puffin", "raven", "robin", "seal",
    "shrew", "siskin", "skylark", "squirrel", "stoat", "stork", "swallow", "swift", "teal",
    "tern", "thrush", "toad", "vole", "wagtail", "warbler", "weasel", "wren",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Person:
    """Somebody who is signed in."""

    annotator_id: str
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Invitation:
    """An invitation as the administrator sees it: without its token."""

    annotator_id: str
    role: Role
    created_at: str
    expires_at: float
    revoked: bool
    used: bool


def invite(database: Database, *, role: Role = "rater", days: float) -> tuple[str, str]:
    """A new person with an invitation: (pseudonym, token). The token is shown once, here."""
    name = f"{secrets.choice(_ANIMALS)}-{secrets.token_hex(3)}"
    return name, invite_again(database, name, role=role, days=days)


def invite_again(database: Database, name: str, *, role: Role = "rater", days: float) -> str:
    """A new token for a person, whose earlier ones end; the person is made if need be."""
    token = secrets.token_urlsafe(24)

    def write(connection: Connection) -> None:
        known = select(annotators).where(annotators.c.annotator_id == name)
        if connection.execute(known).first() is None:
            connection.execute(annotators.insert().values(annotator_id=name, kind="human"))
        connection.execute(
            invites.update().where(invites.c.annotator_id == name).values(revoked=True)
        )
        connection.execute(
            invites.insert().values(
                token_hash=hash_of(token),
                annotator_id=name,
                role=role,
                created_at=now(),
                expires_at=time.time() + days * 86_400,
                revoked=False,
            )
        )

    database.write(write)
    return token


def revoke(database: Database, name: str) -> None:
    """End a person's invitations; whoever is signed in by one is signed out."""
    database.write(
        lambda c: c.execute(
            invites.update().where(invites.c.annotator_id == name).values(revoked=True)
        )
    )


def who(database: Database, token_hash: str) -> Person | None:
    """The person whom an invitation signs in; ``None`` when it is unknown, over or revoked."""
    query = select(invites.c.annotator_id, invites.c.role).where(
        invites.c.token_hash == token_hash,
        invites.c.revoked.is_(False),
        invites.c.expires_at > time.time(),
    )
    row = database.read(lambda c: c.execute(query).first())
    return None if row is None else Person(annotator_id=row.annotator_id, role=row.role)


def invitations(database: Database) -> list[Invitation]:
    """All of them, newest first."""
    worked = select(assignments.c.annotator_id).distinct()
    query = select(invites, invites.c.annotator_id.in_(worked).label("used")).order_by(
        invites.c.created_at.desc()
    )
    rows = database.read(lambda c: c.execute(query).all())
    return [
        Invitation(
            annotator_id=row.annotator_id,
            role=row.role,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked=row.revoked,
            used=bool(row.used),
        )
        for row in rows
    ]


def agree(database: Database, name: str, *, text: str, language: str) -> None:
    """Record that a person agreed to this very text."""
    database.write(
        lambda c: c.execute(
            consents.insert().values(
                annotator_id=name, text_hash=hash_of(text), language=language, created_at=now()
            )
        )
    )


def has_agreed(database: Database, name: str, texts: list[str]) -> bool:
    """Whether the person agreed to one of these texts (the same one in several languages)."""
    hashes = [hash_of(text) for text in texts]
    query = select(func.count()).where(
        consents.c.annotator_id == name, consents.c.text_hash.in_(hashes)
    )
    return bool(database.read(lambda c: c.execute(query).scalar()))


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

"""KubeRay's own schemas, as strict as a person wants them who mistypes a key."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"


def schema_of(kind: str) -> Any:
    """The JSON schema of a resource, from its CustomResourceDefinition; skips without it."""
    path = SCHEMAS / f"{kind.lower()}s.yaml.gz"
    if not path.is_file():
        pytest.skip("KubeRay's schemas are not on this machine")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a megabyte each
    definition = yaml.load(gzip.decompress(path.read_bytes()), loader)
    assert definition["spec"]["names"]["kind"] == kind
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    return _strict(version["schema"]["openAPIV3Schema"])


def _strict(schema: Any) -> Any:
    """As the API server prunes: what is not described is refused, so that a typo shows."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        free = schema.get("x-kubernetes-preserve-unknown-fields")
        if not free and schema.get("type") == "object":
            made["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        made = {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    return made

"""The files in ``deploy/``: their settings are ours, and Kubernetes would take them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from reward_service.config import ServeApplicationConfig, check_names

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT.parent / "shared" / "schemas" / "kuberay"


def serve_configs() -> dict[str, dict[str, Any]]:
    manifest = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    return {
        "serve.yaml": yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(manifest["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", serve_configs())
def test_serve_takes_the_file_and_we_take_its_arguments(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    values = serve_configs()[name]
    schema = ServeDeploySchema.model_validate(values)
    (application,) = schema.applications
    assert application.import_path == "reward_service.service:application"
    config = ServeApplicationConfig.model_validate(application.args)
    check_names(config.models, config.service)
    assert config.service.autoscaling is not None
    deployments = {d.name: d.user_config for d in application.deployments}
    assert deployments == {
        f"model-{name}": {"directory": str(path)} for name, path in config.models.items()
    }


def test_the_manifest_fits_kuberay() -> None:
    path = SCHEMAS / "rayservices.yaml.gz"
    if not path.is_file():
        pytest.skip("KubeRay's schemas are not on this machine")
    definition = yaml.safe_load(gzip.decompress(path.read_bytes()))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    manifest = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(manifest, schema)


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

"""The files in ``deploy/``: their settings are ours, and Kubernetes would take them."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from reward_service.config import ServeApplicationConfig, check_names
from tests.kuberay import ROOT, schema_of


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
    schema = schema_of("RayService")
    manifest = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParam"] = {}
    with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
        jsonschema.validate(manifest, schema)

"""The OpenAPI document of this version on standard output: ``python -m reward_service.openapi``."""

from __future__ import annotations

import json
from typing import Any, cast

from reward_service.config import RewardServiceConfig
from reward_service.http_api import Backend, build_app


def document() -> dict[str, Any]:
    """What the server answers at ``/openapi.json``."""
    return build_app(cast(Backend, None), RewardServiceConfig()).openapi()


if __name__ == "__main__":
    print(json.dumps(document(), indent=1))

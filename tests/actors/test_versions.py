"""Every token has a weight version, and it is the one that is served."""

from __future__ import annotations

import numpy as np
import pytest

from actors.accounting import require_version
from actors.generation import UNKNOWN_VERSION, Completion
from actors.trajectory import Prompt, Trajectory


def completion(*versions: int) -> Completion:
    return Completion(
        request_id="r",
        token_ids=np.arange(len(versions), dtype=np.int32),
        logprobs=np.zeros(len(versions), np.float32),
        finish_reason="length",
        versions=np.array(versions, np.int32),
    )


def test_a_response_that_is_stale_in_one_token_is_refused() -> None:
    require_version(completion(4, 4, 4), 4)
    with pytest.raises(
        ValueError,
        match=r"token 1 of the response was sampled with weight version 3, the pool serves version"
        r" 4 \(2 of 3 tokens",
    ):
        require_version(completion(4, 3, 3), 4)
    with pytest.raises(ValueError, match="version 5, the pool serves version 4"):
        require_version(completion(5), 4)


def test_a_token_without_a_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"p#2: .*which weight version sampled token 1"):
        Trajectory(
            prompt=Prompt(prompt_id="p", token_ids=np.array([1], np.int32), text=""),
            sample_index=2,
            response_ids=np.array([5, 6], np.int32),
            response_logprobs=np.zeros(2, np.float32),
            policy_versions=np.array([0, UNKNOWN_VERSION], np.int32),
            response_text="",
            finish_reason="length",
            seed=0,
        )

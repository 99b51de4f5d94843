"""Statistics of scores against numpy, and the drift of a distribution against values by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from reward_service.statistics import (
    REFERENCE_QUANTILES,
    ModelStatus,
    VersionStatistics,
    drift,
    merged_status,
    quantiles,
)


def test_batches_merge_to_the_statistics_of_all() -> None:
    values = np.random.default_rng(0).normal(5, 3, 100)
    seen = VersionStatistics(version="v")
    for batch in np.split(values, [1, 7, 50]):
        seen = seen.with_scores([*batch.tolist(), None])
    assert seen.count == 100
    assert seen.errors == 4
    assert seen.mean == pytest.approx(values.mean())
    assert seen.std == pytest.approx(values.std())
    assert (seen.least, seen.greatest) == (values.min(), values.max())
    with pytest.raises(ValueError, match="do not merge"):
        seen.merged(VersionStatistics(version="w"))


def test_replicas_become_one_status() -> None:
    def status(version: str, scores: list[float], **more: str) -> ModelStatus:
        statistics = (VersionStatistics(version=version).with_scores(scores),)
        return ModelStatus(model="m", version=version, statistics=statistics, **more)

    merged = merged_status(
        [status("w", [1.0]), status("v", [9.0], reload_error="no"), status("w", [3.0])]
    )
    assert (merged.version, merged.replicas, merged.reload_error) == ("w", 3, "no")
    by_version = {s.version: s for s in merged.statistics}
    assert (by_version["w"].count, by_version["w"].mean) == (2, 2.0)
    assert by_version["v"].count == 1
    empty = ModelStatus(model="m", statistics=(VersionStatistics(version="v"),)).to_json()
    assert empty["statistics"][0]["mean"] is None


def test_drift_is_how_far_scores_have_moved() -> None:
    reference = np.random.default_rng(1).normal(0, 1, 5000)
    known = quantiles(reference)
    assert len(known) == REFERENCE_QUANTILES
    assert drift(reference, known) == pytest.approx(0, abs=1e-12)
    assert drift(reference + 1.5, known) == pytest.approx(1.5)
    moved = reference * 2 - 0.3
    # few quantiles see the far ends of the tails coarsely
    assert drift(moved, known) == pytest.approx(wasserstein_distance(moved, reference), rel=0.1)
    assert quantiles([]) == []

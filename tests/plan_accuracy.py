"""Is ``rlhf plan`` within 20 % of measured steps, on configurations it was not calibrated on?

    python -m tests.plan_accuracy --calibrate          # constants first, then three configurations
    python -m tests.plan_accuracy --calibration FILE   # with constants that are there

Real PPO steps through the whole system, on a machine that does nothing else: about ten minutes with
``--calibrate`` on two cores. Prints one JSON line; exit status 1 when a prediction is further off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from cluster.calibration import SHAPES, WORKLOADS, bench_plan, measure
from cluster.cost_model import default_path, read_calibration

CONFIGURATIONS: tuple[tuple[tuple[int, int], tuple[int, int, int]], ...] = (
    ((192, 5), (40, 48, 64)),
    ((320, 6), (32, 32, 40)),
    ((256, 3), (96, 64, 24)),
)
"""Hidden size and layers; samples, prompt tokens, response tokens. None is one of the calibration,
neither as a model nor as a workload."""

ALLOWED = 0.20


def check() -> None:
    """The three configurations are new to the constants."""
    assert not {shape for shape, _ in CONFIGURATIONS} & set(SHAPES)
    assert not {load for _, load in CONFIGURATIONS} & set(WORKLOADS)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    check()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calibrate", action="store_true", help="measure the constants first")
    parser.add_argument("--calibration", type=Path, default=default_path())
    parser.add_argument(
        "--small", action="store_true", help="a sixth of the work, to try the harness itself"
    )
    options = parser.parse_args()
    configurations, shapes = CONFIGURATIONS, SHAPES
    if options.small:
        shapes, configurations = ((64, 2), (128, 2)), (((96, 3), (16, 24, 16)),)
    rows: list[dict[str, Any]] = []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as directory:
        if options.calibrate:
            bench_plan(Path(directory), options.calibration, say, shapes=shapes)
        calibration = read_calibration(options.calibration)
        for shape, workload in configurations:
            (measured,) = measure(Path(directory), shape, (workload,), say, bf16=calibration.bf16)
            predicted = calibration.predict(measured.step)
            rows.append(
                {
                    "name": measured.name,
                    "measured": measured.total,
                    "predicted": predicted.total,
                    "error": predicted.total / measured.total - 1,
                    "phases": {
                        phase: [seconds, predicted.seconds(phase)]
                        for phase, seconds in measured.seconds.items()
                    },
                }
            )
            say(f"  predicted {predicted.total:.2f} s, off by {rows[-1]['error']:+.0%}")
    worst = max(abs(row["error"]) for row in rows)
    # A machine that does something else as well is not the one that was calibrated.
    print(
        json.dumps(
            {
                "worst_error": worst,
                "held_out_error": calibration.error,
                "load_before": load_before,
                "configurations": rows,
            }
        )
    )
    sys.exit(0 if worst <= ALLOWED else 1)


if __name__ == "__main__":
    main()

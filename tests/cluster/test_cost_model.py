"""The cost model: amounts of work by hand, and constants found again from what they make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.calibration import (
    SHAPES,
    WORKLOADS,
    Measured,
    calibrate,
    effective,
    expected_response,
    fit,
    phases_of,
)
from cluster.cost_model import (
    TERMS,
    Calibration,
    Layout,
    StepShape,
    exchange,
    forward_flop,
    read_calibration,
    work,
    write_calibration,
)
from cluster.memory import ModelShape

TINY = ModelShape(
    parameters=150, body_parameters=100, hidden_size=4, layers=2, vocab_size=10, kv_size=4
)
STEP = StepShape(
    model=TINY,
    samples=8,
    prompt_tokens=3,
    response_tokens=6,
    longest_response=10,
    epochs=2,
    minibatches=4,
)
# Roughly two cores: seconds per unit of work.
CONSTANTS = {
    "generate": {
        "fixed": 0.1, "layer_calls": 2e-4, "weight_bytes": 1e-10, "flop": 2e-11,
        "read_flop": 1.2e-11, "tokens": 1e-4,
    },
    "learn": {"fixed": 0.15, "flop": 8e-12, "activations": 1.5e-9, "layer_calls": 8e-4},
    "optimize": {"parameter_steps": 2e-9},
    "broadcast": {"fixed": 0.05, "weight_bytes": 1e-9},
}  # fmt: skip
TRUTH = Calibration(constants=CONSTANTS, device="by hand", bf16=False)


def llama(hidden: int, layers: int) -> ModelShape:
    """As ``rlhf bench plan`` builds them: tied embeddings, a gated MLP of 11/4 the width."""
    body = layers * (4 * hidden**2 + 3 * hidden * (hidden * 11 // 4) + 2 * hidden) + hidden
    return ModelShape(
        parameters=body + 2048 * hidden, body_parameters=body, hidden_size=hidden, layers=layers,
        vocab_size=2048, kv_size=hidden,
    )  # fmt: skip


def a_step(hidden: int, layers: int, samples: int, prompt: int, response: int) -> StepShape:
    return StepShape(
        model=llama(hidden, layers), samples=samples, prompt_tokens=prompt,
        response_tokens=expected_response(response), longest_response=response, epochs=2,
        minibatches=4,
    )  # fmt: skip


def made(step: StepShape, noise: float, rng: np.random.Generator) -> Measured:
    """What a machine with these constants would be measured to need."""
    prediction = TRUTH.predict(step)
    seconds = {
        phase: prediction.seconds(phase) * float(np.exp(rng.normal(0, noise))) for phase in TERMS
    }
    return Measured(name="made", step=step, seconds=seconds)


def test_a_forward_pass_by_hand() -> None:
    # Layers 2 x 100, attention 2 x 4 x 5 x 2 layers, head 2 x 4 x 10 where something is predicted.
    assert forward_flop(TINY, tokens=3, context=5, predicted=2) == 3 * (200 + 80) + 2 * 80


def test_the_work_of_a_step_by_hand() -> None:
    amounts = work(STEP, Layout(engines=2, learners=2))
    assert amounts["generate"] == {
        "fixed": 1.0,
        "layer_calls": 10 * 2,  # passes until the longest is done, layers
        "weight_bytes": 10 * 150 * 4,
        "flop": 24 * (200 + 16 * 12) + 24 * 80,  # 4 samples an engine, 6 tokens each
        "read_flop": 12 * (200 + 16 * 3) + 4 * 80 + 36 * (200 + 16 * 9),  # prompts, then scoring
        "tokens": 24,
    }
    # Annotated by three models, then two epochs of forward and backward (3 passes) by two.
    passes, with_head = 3 + 3 * 2 * 2, 2 + 3 * 2
    assert amounts["learn"] == {
        "fixed": 1.0,
        "flop": passes * 36 * (200 + 16 * 9) + with_head * 24 * 80,
        "activations": passes * 36 * 4 * 2,
        "layer_calls": passes * 4 * 2,
    }
    assert amounts["optimize"] == {"parameter_steps": 150 * 2 * 2 * 4}
    assert amounts["broadcast"] == {"fixed": 1.0, "weight_bytes": 600}


def test_an_engine_with_more_than_it_holds_takes_them_in_as_others_end() -> None:
    step = a_step(128, 4, samples=256, prompt=8, response=32)
    passes = work(step, Layout())["generate"]["layer_calls"] / 4
    assert passes == pytest.approx(3 * expected_response(32) + 32)
    shared = work(step, Layout(engines=2, engines_per_device=2))["generate"]
    assert shared["flop"] == pytest.approx(work(step, Layout())["generate"]["flop"])


def test_the_network_by_hand() -> None:
    layout = Layout(engines=5, learners=2, network_bytes_per_s=100.0)
    # 8 optimizer steps; half of twice the gradients of both models; 5 engines are 3 doublings off.
    assert exchange(STEP, layout) == {"gradients": 8 * 1200 / 100, "weights": 3 * 600 / 100}
    assert sum(exchange(STEP, Layout()).values()) == 0


def test_a_mean_response_of_a_model_that_ends_at_random() -> None:
    assert expected_response(2, vocabulary=2) == pytest.approx(0.5 * 1 + 0.5 * 2)
    assert expected_response(128) == pytest.approx(124.1, abs=0.1)


def test_constants_are_found_again_from_what_they_make() -> None:
    rng = np.random.default_rng(0)
    measured = [made(a_step(*shape, *load), 0.0, rng) for shape in SHAPES for load in WORKLOADS]
    found = calibrate(measured, device="by hand", bf16=False)
    assert len(found.held_out) == len(SHAPES) * len(WORKLOADS)
    assert found.error is not None
    assert found.error < 0.05
    other = a_step(192, 5, 40, 48, 64)
    assert found.predict(other).total == pytest.approx(TRUTH.predict(other).total, rel=0.03)
    assert found.constants["optimize"]["parameter_steps"] == pytest.approx(2e-9)
    assert effective(found)["broadcast_gbytes_per_s"] == pytest.approx(1.0, rel=0.01)


def test_noise_of_a_twentieth_leaves_other_configurations_within_a_fifth() -> None:
    others = [(192, 5, 40, 48, 64), (320, 6, 32, 32, 48), (128, 8, 96, 64, 32)]
    worst = 0.0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        measured = [made(a_step(*s, *load), 0.05, rng) for s in SHAPES for load in WORKLOADS]
        found = Calibration(constants=fit(measured), device="", bf16=False)
        for other in others:
            step = a_step(*other)
            worst = max(worst, abs(found.predict(step).total / TRUTH.predict(step).total - 1))
    assert 0.001 < worst < 0.2


def test_phases_of_a_step_add_up_to_it() -> None:
    metrics = {
        "seconds/generate": 2.0, "seconds/accounting": 0.1, "seconds/learn": 3.0,
        "seconds/broadcast": 0.4, "ppo/seconds_optimizer": 0.5, "seconds/step": 5.5,
    }  # fmt: skip
    phases = phases_of(metrics)
    assert phases["learn"] == 2.5
    assert sum(phases.values()) == pytest.approx(metrics["seconds/step"])


def test_the_file_of_constants(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    with pytest.raises(FileNotFoundError, match="rlhf bench plan"):
        read_calibration(path)
    known = Calibration(constants=CONSTANTS, device="d", bf16=True, held_out=(0.1, -0.15))
    write_calibration(path, known, [])
    assert read_calibration(path) == known
    assert known.error == 0.15
    path.write_text('{"format": 1, "constants": {}}')
    with pytest.raises(ValueError, match="holds no constants"):
        read_calibration(path)

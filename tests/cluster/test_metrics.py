"""metrics.jsonl and TensorBoard: what is written comes back, and nothing else gets in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.metrics import MetricsWriter, read_metrics


def _write_steps(directory: Path, steps: range, *, resume_step: int | None = None) -> None:
    with MetricsWriter(directory, stage="ppo", resume_step=resume_step) as out:
        for step in steps:
            out.write(step, {"ppo/kl_sequence": step / 4}, total=10)


def test_written_numbers_come_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, stage="sft") as out:
        out.write(1, {"loss": 2.5, "tokens": 128}, total=2)
        out.write(2, {"loss": np.float32(1.5), "held_out": torch.tensor(0.25)}, total=2)
    first, second = (json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first | {"time": 0} == {
        "stage": "sft", "step": 1, "total": 2, "time": 0, "loss": 2.5, "tokens": 128,
    }  # fmt: skip
    assert second["held_out"] == 0.25
    frame = read_metrics(tmp_path)
    assert frame["loss"].tolist() == [2.5, 1.5]
    assert math.isnan(frame["held_out"][0])
    assert "note" not in frame.attrs


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    out = MetricsWriter(tmp_path, stage="ppo")
    out.write(1, {"x": 1.0})
    assert read_metrics(tmp_path)["x"].tolist() == [1.0]
    out.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), "much", None])
def test_what_is_no_finite_number_is_refused_by_name(tmp_path: Path, bad: float) -> None:
    with MetricsWriter(tmp_path, stage="ppo") as out:
        out.write(1, {"fine": 1.0})
        with pytest.raises(ValueError, match=r"'ppo/entropy' of stage 'ppo' .* at step 2"):
            out.write(2, {"fine": 1.0, "ppo/entropy": bad})
        with pytest.raises(ValueError, match="cannot be named 'step'"):
            out.write(2, {"step": 1.0})
    assert read_metrics(tmp_path)["step"].tolist() == [1]


def test_resuming_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 8))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "ppo", "step": 8, "ppo/kl_s')
    _write_steps(tmp_path, range(6, 11), resume_step=5)
    frame = read_metrics(tmp_path)
    assert frame["step"].tolist() == list(range(1, 11))
    assert frame["ppo/kl_sequence"].tolist() == [s / 4 for s in range(1, 11)]
    assert not list(tmp_path.glob("*.part*"))


def test_without_resuming_the_file_begins_anew(tmp_path: Path) -> None:
    _write_steps(tmp_path, range(1, 4))
    _write_steps(tmp_path, range(1, 3))
    assert read_metrics(tmp_path)["step"].tolist() == [1, 2]


def test_a_torn_last_line_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    frame = read_metrics(path)
    assert frame["step"].tolist() == [1, 2]
    assert "metrics.jsonl:3: the last line is cut off" in frame.attrs["note"]
    assert "cut off" in caplog.text


@pytest.mark.parametrize(
    ("line", "why"),
    [("{nonsense", "not a line"), ("[1]", "integer 'step'"), ('{"step": 2, "x": NaN}', "NaN")],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: .*{why}"):
        read_metrics(path)


def test_no_file_and_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path).empty


def test_tensorboard_has_scalars_histograms_and_texts(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = tmp_path / "tensorboard"
    for attempt in range(2):  # the second run replaces the first one's curves
        with MetricsWriter(tmp_path / "ppo", stage="ppo", tensorboard=board) as out:
            out.write(1, {"ppo/kl_sequence": 0.5 + attempt})
            out.histogram("scores", [0.0, 1.0, 1.0], 1)
            out.text("sample", "a *text*", 1)
            with pytest.raises(ValueError, match="'scores'"):
                out.histogram("scores", [math.nan], 2)
    events = EventAccumulator(str(board / "ppo"))
    events.Reload()
    assert [e.value for e in events.Scalars("ppo/kl_sequence")] == [1.5]
    assert events.Histograms("scores")[0].histogram_value.num == 3
    (text,) = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val == [b"    a *text*"]

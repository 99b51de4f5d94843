"""The numbers of a run: written as ``metrics.jsonl`` and TensorBoard, read back as a table.

One line is one step of one stage::

    {"stage": "ppo", "step": 7, "total": 40, "time": 1764000000.1, "ppo/kl_sequence": 2.31, ...}

The file is strict JSON, so every tool reads it; it is flushed after every line, so a killed run
keeps what it had measured; and a resumed run continues it without a step appearing twice.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from cluster.step_lines import StepLines, read_step_lines

if TYPE_CHECKING:
    import pandas as pd
    from torch.utils.tensorboard.writer import SummaryWriter

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
RESERVED = ("stage", "step", "total", "time")
"""Keys of a line that are not metrics."""


class MetricsWriter:
    """Writes the metrics of one stage.

    Example:
        >>> with MetricsWriter(run / "ppo", stage="ppo", tensorboard=run / "tensorboard") as out:
        ...     out.write(1, {"ppo/kl_sequence": 0.02}, total=40)

    Args:
        directory: Where ``metrics.jsonl`` lies; made when missing.
        stage: Name of the stage, in every line.
        tensorboard: TensorBoard's log directory, of which this stage becomes one run;
            ``None`` writes none.
        resume_step: The step a resumed run continues after: lines of later steps are cut, and
            so is a line that a killed run left unfinished. ``None`` starts the file anew.

    Raises:
        ValueError: A line that is to be kept is not one of ours.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stage: str,
        tensorboard: Path | None = None,
        resume_step: int | None = None,
    ) -> None:
        self.path = directory / FILE_NAME
        self.stage = stage
        self._lines = StepLines(self.path, resume_step=resume_step)
        self._board = (
            None
            if tensorboard is None
            else _open_tensorboard(
                tensorboard / stage, purge_step=None if resume_step is None else resume_step + 1
            )
        )

    def write(self, step: int, metrics: Mapping[str, float], *, total: int | None = None) -> None:
        """Appends one line and flushes it.

        Raises:
            ValueError: A value is NaN, infinite or no number, or a name is reserved; nothing is
                written then.
        """
        values = {name: self._checked(name, value, step) for name, value in metrics.items()}
        line: dict[str, Any] = {"stage": self.stage, "step": step}
        if total is not None:
            line["total"] = total
        line["time"] = round(time.time(), 3)
        line.update(values)
        self._lines.append([line])
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            # Its curves must not lack what the file has, when the process ends here.
            self._board.flush()

    def sync(self) -> None:
        """Have the disk hold every line: a checkpoint that follows relies on it."""
        self._lines.sync()

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        """A distribution, for TensorBoard only. ``values`` must be finite."""
        array = np.asarray(values, dtype=np.float64)
        if not np.isfinite(array).all():
            self._refuse(name, "a histogram with NaN or infinity", step)
        if self._board is not None and array.size:
            self._board.add_histogram(name, array, step)

    def text(self, name: str, text: str, step: int) -> None:
        """A text sample, for TensorBoard only. It is shown as is: TensorBoard would otherwise
        render a model's output as Markdown."""
        if self._board is not None:
            indented = "\n".join("    " + line for line in text.splitlines())
            self._board.add_text(name, indented, step)

    def close(self) -> None:
        self._lines.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _checked(self, name: str, value: Any, step: int) -> float | int:
        if name in RESERVED:
            raise ValueError(f"a metric cannot be named {name!r}: every line has that key already")
        if isinstance(value, (bool, np.bool_)):
            return int(value)
        if isinstance(value, (int, np.integer)):
            return int(value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            self._refuse(name, f"{value!r}, which is not a number", step)
        if not math.isfinite(number):
            self._refuse(name, str(number), step)
        return number

    def _refuse(self, name: str, what: str, step: int) -> NoReturn:
        raise ValueError(
            f"metric {name!r} of stage {self.stage!r} is {what} at step {step}: "
            "the run has diverged or a measurement is undefined, and such a value is not recorded"
        )


def read_metrics(path: Path) -> pd.DataFrame:
    """Reads a ``metrics.jsonl`` into a table, one row a line and one column a metric.

    A metric that a line lacks is NaN there. The last line of a run that was killed while writing
    it is left out; ``frame.attrs["note"]`` and the log say so.

    Args:
        path: The file, or the directory that holds it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than an unfinished last one is not a metrics line; the message
            has the file and the line's number.
    """
    import pandas as pd

    if path.is_dir():
        path = path / FILE_NAME
    rows, note = read_step_lines(path)
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=["stage", "step"])
    if note:
        frame.attrs["note"] = note
        logger.warning(note)
    return frame


def _open_tensorboard(directory: Path, *, purge_step: int | None) -> SummaryWriter:
    # Imported late: TensorBoard costs seconds, which a command that only reads must not pay.
    from torch.utils.tensorboard.writer import SummaryWriter

    if purge_step is None:  # a stage begun anew: curves of an earlier run must not lie under it
        for stale in directory.glob("events.out.tfevents.*"):
            stale.unlink()
    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)

"""``rlhf status`` and ``rlhf timeline``: look at a run from its directory. Heavy imports wait."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("timeline")
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def timeline(run_dir: Path) -> None:
    """Write the timeline of a run's PPO steps as a Chrome trace on standard output.

    One line a worker: what it was busy with, and where it waited. Open the file at
    https://ui.perfetto.dev or in chrome://tracing. The report shows the last steps by itself.

    \b
    rlhf timeline runs/quickstart > trace.json
    """
    from cluster.timeline import export_trace

    export_trace(run_dir, click.echo)

"""Several rounds of the whole loop: generate, judge, reward model, PPO, evaluate, and again.

Every round is a run of its own in ``RUN_DIR/round-NN``, with its report; the policy it starts from
is the one that the round before left. All rounds share one store, so a reward model learns from
everything that was ever said, and new pairs set the newest policy against earlier ones as well as
against itself. Stopped anywhere, ``--resume`` goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.config import RunConfig, write_config
from cluster.feedback import STORE
from cluster.pipeline import Pipeline, read_stages
from cluster.report_outcome import Figure, headline_figures
from cluster.run_files import read_run
from cluster.whole_file import replace_text
from reward_service.feedback.aggregate import model_strengths
from reward_service.feedback.store import FeedbackStore

START = "start"
TEMPLATE = "loop_template.html.j2"

RunOne = Callable[[RunConfig, bool], None]
"""Runs all stages of a configuration; the second argument says whether to go on with it."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One line of the loop's report."""

    number: int
    directory: str
    done: bool
    judgements: int | None
    figures: tuple[Figure, ...]


def run_loop(
    config: RunConfig,
    *,
    rounds: int,
    resume: bool,
    say: Callable[[str], None],
    run_one: RunOne | None = None,
) -> Path:
    """Run the rounds that are missing; returns the path of the report.

    Args:
        run_one: Replaced in tests.

    Raises:
        ValueError: The configuration lacks a section that a round needs.
        FileExistsError: There are rounds already, and neither --resume nor another run_dir.
    """
    run_one = run_one or _run_pipeline
    missing = [name for name in ("collect", "reward_model", "ppo") if getattr(config, name) is None]
    if missing:
        raise ValueError(f"a round needs the sections {', '.join(missing)}: add them")
    if config.cluster.storage is not None:
        raise ValueError(
            "cluster.storage keeps a copy of one run, not of rounds: put run_dir on storage that "
            "outlives the machine instead"
        )
    directory = config.run_dir
    if not resume and any(directory.glob("round-*")):
        raise FileExistsError(
            f"{directory} already holds rounds: go on with --resume, or choose another run_dir"
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_config(config, directory / "config.yaml")
    start = start_config(config)
    if start is not None and not _is_done(start):
        say("\nBefore the first round")
        run_one(start, resume)
    for number in range(1, rounds + 1):
        current = round_config(config, number)
        if _is_done(current):
            say(f"\nRound {number}: already done")
            continue
        say(f"\nRound {number} of {rounds}")
        run_one(current, resume)
        write_loop_report(config, rounds)
    return write_loop_report(config, rounds)


def start_config(config: RunConfig) -> RunConfig | None:
    """Base model and fine-tuning, before the rounds; ``None`` when neither is configured."""
    if config.pretrain is None and config.sft is None:
        return None
    changes = {"run_dir": config.run_dir / START, "collect": None, "reward_model": None}
    return _changed(config, **changes, ppo=None)


def round_config(config: RunConfig, number: int) -> RunConfig:
    """The run of one round, from 1.

    Its policy is the one of the round before; the earlier ones are its opponents, the newest
    first; and the reward model of the round before says which pairs are worth asking about.
    """
    assert config.collect is not None
    policies = [policy_of(config, n) for n in range(1, number + 1)]
    earlier = list(range(number - 1, 0, -1))[: config.loop.earlier_policies]
    previous = config.run_dir / f"round-{number - 1:02d}" / "reward_model"
    active = config.loop.active and number > 1
    collect = config.collect.model_copy(
        update={
            "round": number,
            "store": config.collect.store or str(config.run_dir / STORE),
            "opponents": {f"policy-{n}": str(policies[n - 1]) for n in earlier},
            "least_sure_of": (str(previous),) if active else config.collect.least_sure_of,
        }
    )
    return _changed(
        config,
        run_dir=config.run_dir / f"round-{number:02d}",
        model=str(policies[-1]),
        pretrain=None,
        sft=None,
        collect=collect,
    )


def policy_of(config: RunConfig, number: int) -> Path:
    """The policy that writes the candidates of a round: what the round before it left."""
    if number > 1:
        return config.run_dir / f"round-{number - 1:02d}" / "ppo" / "final"
    start = start_config(config)
    return config.base_model if start is None else start.policy_model


def write_loop_report(config: RunConfig, rounds: int) -> Path:
    """``report.html`` and ``loop.json`` of all rounds so far."""
    import jinja2

    listed = [_round(config, number) for number in range(1, rounds + 1)]
    strengths = _strengths(config)
    directory = config.run_dir
    (directory / "loop.json").write_text(
        json.dumps({"rounds": [asdict(r) for r in listed], "strengths": strengths}, indent=1),
        encoding="utf-8",
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        name=directory.resolve().name,
        rounds=listed,
        labels=next(([f.label for f in r.figures] for r in listed if r.figures), []),
        strengths=strengths,
    )
    path = directory / "report.html"
    replace_text(path, page)
    return path


def _round(config: RunConfig, number: int) -> Round:
    own = round_config(config, number)
    if not own.run_dir.is_dir():
        return Round(
            number=number, directory=own.run_dir.name, done=False, judgements=None, figures=()
        )
    run = read_run(own.run_dir)
    judged = (run.feedback or {}).get("comparisons")
    return Round(
        number=number,
        directory=own.run_dir.name,
        done=_is_done(own),
        judgements=judged if isinstance(judged, int) else None,
        figures=tuple(headline_figures(run)),
    )


def _strengths(config: RunConfig) -> list[dict[str, Any]]:
    """Strengths of the policies by what judges prefer, over all rounds."""
    location = round_config(config, 1).collect
    assert location is not None
    assert location.store is not None
    if "://" not in location.store and not Path(location.store).is_file():
        return []
    with FeedbackStore(location.store) as store:
        found = model_strengths(store.preferences(), seed=config.seed)
    return [
        {"model": model, "strength": strength, "low": low, "high": high, "judgements": count}
        for model, strength, low, high, count in found
    ]


def _is_done(config: RunConfig) -> bool:
    """Whether every stage of a run is finished, the report apart."""
    from cluster.pipeline import configured_stages

    done = read_stages(config.run_dir)
    return all(stage in done for stage in configured_stages(config) if stage != "report")


def _changed(config: RunConfig, **changes: Any) -> RunConfig:
    """A copy, validated again as a whole."""
    return RunConfig.model_validate({**dict(config), **changes})


def _run_pipeline(config: RunConfig, resume: bool) -> None:
    begun = (config.run_dir / "config.yaml").is_file()
    Pipeline(config, resume=resume and begun, overwrite=False).run()

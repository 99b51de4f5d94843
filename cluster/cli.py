"""The ``rlhf`` command. Heavy imports wait until the arguments have been understood."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli_feedback import feedback
from cluster.cli_machine import bench, doctor
from cluster.cli_observe import status, timeline
from cluster.cli_plan import plan
from cluster.cli_serve import adopt, serve

if TYPE_CHECKING:
    from cluster.pipeline import Pipeline

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 96}

# What a user did wrong, or what the machine lacks: one message and no traceback.
EXPECTED_ERRORS = (ValueError, OSError, RuntimeError, ImportError)

EXIT_STOPPED = 130


class Group(click.Group):
    """Lists commands in the order of the loop, and turns errors into one message."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's)
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        from cluster.stop import Stopped

        try:
            return super().invoke(ctx)
        except Stopped as stopped:
            click.echo(f"stopped: {stopped}", err=True)
            ctx.exit(EXIT_STOPPED)
        except (click.exceptions.Exit, click.exceptions.Abort):  # RuntimeErrors of click's own
            raise
        except EXPECTED_ERRORS as error:
            if ctx.params.get("debug"):
                raise
            click.echo(f"error: {describe(error)}", err=True)
            click.echo("(rlhf --debug ... shows where it came from)", err=True)
            ctx.exit(1)


def describe(error: BaseException) -> str:
    """The message of the error itself, not of the remote call that carried it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return describe(cause)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return str(error) or type(error).__name__


@click.group(cls=Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="ray-rlhf", prog_name="rlhf")
def main(debug: bool) -> None:  # noqa: ARG001  (read from the context)
    """RLHF for language models on Ray, the whole way round.

    \b
    base model -> fine-tuning -> candidates -> judgement -> reward model -> PPO -> evaluation

    Begin with `rlhf quickstart`: ten minutes on two CPU cores, no GPU and no download.

    With your own model and data, write a configuration file (examples are in configs/) and either
    run everything with `rlhf run --config FILE`, or stage by stage with the commands below. Any
    setting can be overridden at the end of the line: `rlhf ppo --config FILE ppo.steps=20`.
    """
    # Ray and vLLM start many processes: without bytecode each of them compiles all it imports.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # Threads that spin while they wait slow every other process on the same cores down.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def stage_command(
    name: str, *, config_required: bool = True, **attributes: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command that works on a configured run: --config, --resume, --overwrite, overrides."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        command: Any = function
        for option in reversed(
            (
                click.option(
                    "--config",
                    "-c",
                    type=click.Path(path_type=Path),
                    required=config_required,
                    help="YAML file of the run; a run directory's config.yaml works too.",
                ),
                click.option(
                    "--resume",
                    is_flag=True,
                    help="Go on where an earlier run of this directory stopped.",
                ),
                click.option(
                    "--overwrite", is_flag=True, help="Throw away what this stage wrote before."
                ),
                click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
            )
        ):
            command = option(command)
        made: click.Command = main.command(name, **attributes)(command)
        return made

    return decorate


def open_pipeline(
    config: Path,
    resume: bool,
    overwrite: bool,
    overrides: tuple[str, ...],
) -> Pipeline:
    if resume and overwrite:
        raise click.UsageError("--resume keeps what is there and --overwrite throws it away")
    from cluster.config import load_config

    loaded = load_config(config, overrides)  # before anything heavy is imported
    from cluster.pipeline import Pipeline

    return Pipeline(loaded, resume=resume, overwrite=overwrite)


@main.command("quickstart")
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Where everything is written.",
)
@click.option(
    "--language",
    type=click.Choice(["en", "zh"]),
    default="en",
    show_default=True,
    help="Language of the generated newswire.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on where an earlier quickstart stopped.")
@click.option("--overwrite", is_flag=True, help="Start anew in the same directory.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def quickstart(
    run_dir: Path,
    language: str,
    seed: int,
    resume: bool,
    overwrite: bool,
    overrides: tuple[str, ...],
) -> None:
    """The whole loop on this machine in about ten minutes.

    A small language model is trained on a generated newswire, asked to continue headlines,
    judged by simulated judges, and improved by PPO with vLLM, Ray Serve and RLlib. Ends with
    three figures and one HTML page.

    \b
    rlhf quickstart
    rlhf quickstart --language zh --run-dir runs/chinese
    rlhf quickstart --seed 1 ppo.kl.coef=0.2
    """
    from cluster.config import override_config
    from cluster.presets import quickstart_config

    config = override_config(
        quickstart_config(run_dir=run_dir, language=language, seed=seed), overrides, "quickstart"
    )
    from cluster.pipeline import Pipeline

    Pipeline(config, resume=resume, overwrite=overwrite).run()


@stage_command("run")
def run(**options: Any) -> None:
    """All stages that a configuration has sections for, one after the other.

    Stopped anywhere, --resume goes on there: finished stages are kept.

    \b
    rlhf run --config configs/length_diversity.yaml
    rlhf run --config mine.yaml --resume
    """
    open_pipeline(**options).run()


@stage_command("pretrain")
def pretrain(**options: Any) -> None:
    """Train a tokenizer and a small Llama from scratch, or continue an existing model.

    Reads data.corpus (or the generated newswire); writes RUN_DIR/base, a plain Hugging Face
    directory.

    \b
    rlhf pretrain --config mine.yaml
    rlhf pretrain --config mine.yaml pretrain.epochs=2
    """
    open_pipeline(**options).run(only="pretrain")


@stage_command("sft")
def sft(**options: Any) -> None:
    """Fine-tune on prompt and response pairs; only the response is trained.

    Reads data.sft; starts from RUN_DIR/base or from `model`; writes RUN_DIR/sft.

    \b
    rlhf sft --config mine.yaml
    rlhf sft --config mine.yaml model=/models/my-base sft.epochs=1
    """
    open_pipeline(**options).run(only="sft")


@stage_command("collect", config_required=False)
@click.option("--serve", is_flag=True, help="Serve the page on which people judge, until Ctrl-C.")
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    help="With --serve: the run directory (or --config).",
)
@click.option("--host", help="With --serve. Default: collect.people.host, loopback.")
@click.option("--port", type=click.IntRange(0, 65535), help="With --serve; 0 picks a free one.")
def collect(
    serve: bool, run_dir: Path | None, host: str | None, port: int | None, **options: Any
) -> None:
    """Generate candidates and have them judged.

    The rollout actors write two candidates a prompt, judges compare them, and every judgement
    goes into RUN_DIR/feedback.sqlite. Agreement between the judges is reported.

    With collect.source=people, people judge in a browser. Two commands work together:

    \b
      rlhf collect --config FILE        writes the candidates, then waits for the answers
      rlhf collect --serve --run DIR    serves the page, and outlives everything else
    """
    config, overrides = options["config"], options["overrides"]
    if serve:
        from cluster.feedback import serve_judging

        serve_judging(config, run_dir, overrides, host=host, port=port)
        return
    if config is None:
        raise click.UsageError("Missing option '--config' / '-c' (or --serve with --run).")
    if run_dir or host or port is not None:
        raise click.UsageError("--run, --host and --port belong to --serve")
    open_pipeline(**options).run(only="collect")


@stage_command("reward")
@click.option(
    "--labels",
    metavar="FILE",
    help="Train a classifier of flagged texts instead, from rows with `text` and `flagged`.",
)
def reward(labels: str | None, **options: Any) -> None:
    """Train the reward model on the collected comparisons.

    Writes RUN_DIR/reward_model and reports held-out accuracy beside the judges' own agreement
    and the prefer-the-longer-text baseline. With --labels it writes RUN_DIR/moderation, whose
    score is the probability that a text is flagged: as a reward term with a negative weight it is
    a penalty.

    \b
    rlhf reward --config mine.yaml
    rlhf reward --config configs/moderation.yaml --labels labelled.jsonl
    """
    if labels is not None:
        open_pipeline(**options).train_moderation(labels)
    else:
        open_pipeline(**options).run(only="reward")


@stage_command("ppo")
def ppo(**options: Any) -> None:
    """Improve the policy with PPO against the reward.

    Ctrl-C saves a checkpoint and ends; --resume goes on from the last one.

    \b
    rlhf ppo --config mine.yaml ppo.steps=200
    rlhf ppo --config mine.yaml --resume
    """
    open_pipeline(**options).run(only="ppo")


@stage_command("evaluate")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=DIR",
    help="A checkpoint to compare; repeat it. The first is the baseline. "
    "Default: the policy before and after PPO.",
)
def evaluate(models: tuple[str, ...], **options: Any) -> None:
    """Compare checkpoints on held-out prompts.

    Reward, KL to the first one, win rate with a confidence interval, true quality where the data
    has it, length, distinct-n, self-BLEU and EOS rate. Writes RUN_DIR/evaluation.json.

    \b
    rlhf evaluate --config mine.yaml
    rlhf evaluate --config mine.yaml --model sft=runs/a/sft --model a=runs/a/ppo/final
    """
    chosen: dict[str, Path] = {}
    for model in models:
        name, equals, path = model.partition("=")
        if not equals:
            raise click.UsageError(f"--model {model!r} must look like name=directory")
        chosen[name] = Path(path)
    open_pipeline(**options).evaluate(chosen or None)


@stage_command("loop")
@click.option("--rounds", type=click.IntRange(1), help="Default: loop.rounds of the configuration.")
def loop(rounds: int | None, config: Path, resume: bool, overwrite: bool, overrides: Any) -> None:
    """Several rounds: generate, judge, reward model, PPO, evaluate, and again.

    Base model and fine-tuning come first, once, where they are configured. Each round starts from
    the policy that the one before left, has its own directory and report (RUN_DIR/round-01, ...),
    and learns from all judgements so far. Stopped anywhere, --resume goes on there.

    \b
    rlhf loop --config mine.yaml --rounds 3
    """
    if overwrite:
        raise click.UsageError("rounds are not overwritten: give another run_dir, or --resume")
    from cluster.config import load_config

    loaded = load_config(config, overrides)
    from cluster.loop import run_loop

    path = run_loop(loaded, rounds=rounds or loaded.loop.rounds, resume=resume, say=click.echo)
    click.echo(f"\nThe page of all rounds: {path.resolve()}")


@main.command("generate")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Hugging Face directory of the model; with --run, by default RUN_DIR/ppo/final.",
)
@click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    help="Continue the prompts that this run keeps for evaluation.",
)
@click.option("--prompt", "prompts", multiple=True, help="A prompt; repeat it for several.")
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path),
    help="File of prompts (JSONL, Parquet or CSV with a field `prompt`).",
)
@click.option("--limit", type=click.IntRange(1), help="Use at most so many of these prompts.")
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option(
    "-n",
    "samples",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Samples of each prompt.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--chat", is_flag=True, help="Put prompts through the model's chat template.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
def generate(**options: Any) -> None:
    """Write texts with a model, as JSON lines on standard output.

    The same seed gives the same texts, however many are asked for at once. A last line on
    standard error gives length and diversity.

    \b
    rlhf generate --run runs/quickstart --limit 3
    rlhf generate --model runs/quickstart/sft --prompt "Storm floods the harbour of Riverton"
    """
    from cluster.generate import generate_texts

    generate_texts(**options)


main.add_command(adopt)
main.add_command(serve)


@main.command("report")
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
def report(run_dir: Path) -> None:
    """Write RUN_DIR/report.html: one self-contained page with plots and texts.

    Works on any run directory, finished or not: a part that is missing names the command that
    makes it. The page loads nothing from elsewhere, so it can be mailed.

    \b
    rlhf report runs/quickstart
    """
    from cluster.report import write_report

    click.echo(str(write_report(run_dir)))


main.add_command(status)
main.add_command(timeline)
main.add_command(doctor)
main.add_command(plan)
main.add_command(bench)
main.add_command(feedback)


if __name__ == "__main__":
    main()

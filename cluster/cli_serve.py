"""``rlhf serve`` and ``rlhf adopt``. Heavy imports wait until the arguments are understood."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Reward-model directory (RUN_DIR/reward_model); repeat it for several.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Others need tokens.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 picks a free one.",
)
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--max-replicas",
    type=click.IntRange(1),
    help="Add replicas up to this number while the queue is long.",
)
@click.option(
    "--ingress-replicas",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="HTTP processes; with 2 one can die without an outage.",
)
@click.option(
    "--ensemble",
    "ensembles_",
    multiple=True,
    metavar="NAME=HOW:MODEL,MODEL",
    help="A model made of others; HOW is mean, minimum or lower_bound.",
)
@click.option(
    "--penalty",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Of lower_bound, in standard deviations over the members.",
)
@click.option(
    "--tokens-file",
    type=click.Path(path_type=Path),
    help="A token a line; RLHF_REWARD_TOKENS in the environment works too.",
)
@click.option(
    "--models-root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Directories inside it may be loaded while serving (PUT /v1/models/NAME, --reload).",
)
@click.option(
    "--reload",
    "reload_",
    metavar="NAME=DIR",
    help="Serve nothing: load DIR as model NAME in the server that runs at --host and --port.",
)
def serve(
    models: tuple[str, ...],
    host: str,
    port: int,
    replicas: int,
    max_replicas: int | None,
    ingress_replicas: int,
    ensembles_: tuple[str, ...],
    penalty: float,
    tokens_file: Path | None,
    models_root: Path | None,
    reload_: str | None,
) -> None:
    """Serve reward models over HTTP with Ray Serve until Ctrl-C.

    \b
    curl -s localhost:8000/v1/score -H 'content-type: application/json' \\
      -d '{"items": [{"prompt": "Storm hits Riverton", "response": "Rain fell."}]}'

    OpenRLHF, slime, verl, vLLM and SGLang clients work unchanged: see docs/reward_service.md.
    """
    from cluster.serving import ensembles, reload_running, serve_until_stopped
    from reward_service.config import AutoscalingConfig, RewardServiceConfig

    if reload_ is not None:
        version = reload_running(reload_, host, port, RewardServiceConfig().reload_timeout_s)
        click.echo(f"{reload_.partition('=')[0]} is now version {version}")
        return
    if not models:
        raise click.UsageError("give --model, or --reload for a server that runs")
    scaling = None
    if max_replicas is not None:
        scaling = AutoscalingConfig(min_replicas=replicas, max_replicas=max_replicas)
    service = RewardServiceConfig(
        host=host,
        port=port,
        num_replicas=replicas,
        autoscaling=scaling,
        ingress_replicas=ingress_replicas,
        ensembles=ensembles(ensembles_, penalty),
        tokens_file=tokens_file,
        models_root=models_root,
    )
    serve_until_stopped(models, service)


@click.command("adopt")
@click.argument("model", metavar="MODEL")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    required=True,
    help="The reward-model directory to write.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Rows of `prompt` and `response` (JSONL, Parquet, CSV) whose scores shall have mean 0 and "
    "standard deviation 1. Default: scores are what the model says.",
)
@click.option(
    "--chat-template",
    is_flag=True,
    help="Prompts of --reference are the user's turns of dialogues, as with data.chat_template.",
)
@click.option(
    "--append-eos",
    is_flag=True,
    help="The model reads its score at an EOS after the text (OpenRLHF's do), not where the chat "
    "template ends.",
)
def adopt(
    model: str, output: Path, reference: Path | None, chat_template: bool, append_eos: bool
) -> None:
    """Make a finished reward model from elsewhere ready for `rlhf serve` and PPO.

    MODEL is a Hugging Face directory or hub name of a scalar-head decoder: a
    ...ForSequenceClassification with one output, in safetensors. It is copied, with its tokenizer
    and a file that says how its scores are read and scaled.

    \b
    rlhf adopt owner/reward-model --output models/quality
    rlhf adopt ./reward-model --output models/quality --reference sft.jsonl --chat-template
    rlhf serve --model quality=models/quality
    """
    import torch

    from actors.config import DataConfig
    from actors.datasets import load_demonstrations
    from cluster.adopt import adopt_reward_model
    from cluster.hub import local_model

    data = DataConfig(chat_template=chat_template)
    head = adopt_reward_model(
        local_model(model),
        output,
        reference=[] if reference is None else load_demonstrations(str(reference), data),
        append_eos=append_eos,
        device="cuda" if torch.cuda.is_available() else "cpu",
        name=model,
    )
    scale = f"score = {head.gain:.4g} x output {head.bias:+.4g}" if reference else "scores as given"
    click.echo(f"{output}: {scale}, read at {'EOS' if append_eos else 'the end of the text'}")

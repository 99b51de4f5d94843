"""The ``rlhf feedback`` group. Heavy imports wait until the arguments have been understood."""

from __future__ import annotations

from pathlib import Path

import click

RUN = click.option(
    "--run",
    "run_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Run directory; its config.yaml says where the judgements are.",
)
FORMAT = click.option(
    "--format",
    "form",
    type=click.Choice(["votes", "trl", "openrlhf"]),
    default="votes",
    show_default=True,
    help="votes: one row a judgement, with its history; trl: prompt, chosen, rejected; "
    "openrlhf: chosen and rejected dialogues.",
)


@click.group("feedback")
def feedback() -> None:
    """Judgements in and out, their consistency, and people's rights.

    \b
    rlhf feedback import --run runs/x --format trl preferences.jsonl
    rlhf feedback stats  --run runs/x
    """


@feedback.command("import")
@RUN
@click.option(
    "--format",
    "form",
    type=click.Choice(["votes", "trl", "openrlhf", "items", "gold"]),
    default="votes",
    show_default=True,
    help="votes, trl, openrlhf: judgements, as export writes them; items: pairs, texts to rate or "
    "to rank for people to judge; gold: the same with a known answer, to measure people by.",
)
@click.option(
    "--items",
    type=click.Path(path_type=Path),
    help="File of the texts, when the votes only have the ids of items.",
)
@click.option("--no-mask", is_flag=True, help="Keep personal data in texts as it is.")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def import_command(
    run_dir: Path, form: str, items: Path | None, no_mask: bool, files: tuple[Path, ...]
) -> None:
    """Read judgements from JSONL, Parquet or CSV files, all or none.

    Personal data in texts is masked. Reading the same file again adds nothing. A manifest beside
    a file is checked.
    """
    from cluster.feedback import import_files, import_tasks

    if form in ("items", "gold"):
        new = import_tasks(run_dir, files, gold=form == "gold", masking=not no_mask)
        click.echo(f"{new} new items {'with a known answer' if form == 'gold' else 'to judge'}")
        return
    found = import_files(run_dir, files, form=form, items=items, masking=not no_mask)  # type: ignore[arg-type]
    click.echo(f"{found.rows} judgements, {found.new} of them new")
    if found.again:
        click.echo("these files were imported before")
    if found.masked:
        click.echo(f"{found.masked} pieces of personal data masked")
    if found.left_out:
        click.echo(f"{found.left_out} judgements of erased people left out")


@feedback.command("export")
@RUN
@FORMAT
@click.option("--person", help="Export what is stored of this person instead, as JSON.")
@click.argument("file", type=click.Path(path_type=Path))
def export_command(run_dir: Path, form: str, person: str | None, file: Path) -> None:
    """Write judgements to FILE (.jsonl, .jsonl.gz, .parquet) with a manifest beside it.

    With --person, everything that is stored of one person.
    """
    from cluster.feedback import export_file, export_person

    if person is not None:
        click.echo(f"{export_person(run_dir, person, file)} rows of {person} in {file}")
        return
    manifest = export_file(run_dir, file, form=form)  # type: ignore[arg-type]
    click.echo(f"{manifest['rows']} rows in {file}, SHA-256 {manifest['sha256'][:16]}")


@feedback.command("erase")
@RUN
@click.option("--person", required=True, help="The pseudonym, as `rlhf feedback stats` shows it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def erase_command(run_dir: Path, person: str, yes: bool) -> None:
    """Delete a person and all that they said, for good.

    Their judgements are not in the next training set, and an import does not bring them back.
    Models trained before still contain them: train again. Files of figures written before still
    name them; the command says which.
    """
    from cluster.feedback import erase_person, files_with_figures

    if not yes:
        click.confirm(f"Delete {person} and all that they said, for good?", abort=True)
    click.echo(f"{erase_person(run_dir, person)} rows deleted")
    written = files_with_figures(run_dir)
    if written:
        click.echo(
            f"{', '.join(map(str, written))} may still show figures of {person}, until the stages "
            "collect and report run again"
        )


@feedback.command("expire")
@RUN
@click.option("--days", type=click.IntRange(1), help="Default: collect.people.retention_days.")
def expire_command(run_dir: Path, days: int | None) -> None:
    """Delete people's judgements that are older than the retention time.

    The page does the same every hour while it runs.
    """
    from cluster.feedback import enforce_retention

    judgements, people = enforce_retention(run_dir, days)
    click.echo(f"{judgements} judgements and {people} people deleted")


@feedback.command("stats")
@RUN
@click.option("--json", "as_json", is_flag=True, help="One JSON line on standard output.")
def stats_command(run_dir: Path, as_json: bool) -> None:
    """Agreement with intervals and how to read it, and how reliable each person is."""
    from cluster.feedback import print_stats

    print_stats(run_dir, click.echo, as_json=as_json)


@feedback.command("prioritise")
@RUN
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Reward-model directory; repeat it: several say best what is worth asking.",
)
def prioritise_command(run_dir: Path, models: tuple[str, ...]) -> None:
    """Ask people next about the pairs of which reward models are least sure.

    May be repeated while people judge, with a model trained on what they have said so far.
    """
    from cluster.feedback import prioritise

    click.echo(f"{prioritise(run_dir, models)} open pairs in order")


@feedback.command("invite")
@RUN
@click.option("--name", help="A new link for this person; the old one ends.")
@click.option("--days", type=click.FloatRange(min=0, min_open=True), default=30.0)
def invite_command(run_dir: Path, name: str | None, days: float) -> None:
    """Print an access code for a new person, for the page's sign-in form.

    The administrator's page makes links that contain it.
    """
    from cluster.feedback import store_location
    from reward_service.feedback.people import invite, invite_again
    from reward_service.feedback.store import FeedbackStore

    with FeedbackStore(store_location(run_dir)) as store:
        if name:
            token = invite_again(store.database, name, days=days)
        else:
            name, token = invite(store.database, days=days)
    click.echo(f"{name}\t{token}")

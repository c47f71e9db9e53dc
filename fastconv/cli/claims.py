"""fastconv claims: what the papers claim, beside what is counted and measured here."""

import json

import click


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Timing rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--out", type=click.Path(dir_okay=False, writable=True), default=None, help="Also write the JSON to this file.")
def claims(rounds: int, as_json: bool, out: str | None) -> None:
    """Show SqueezeNet's and MobileNet's published ratios beside those of this machine. Accuracies are cited, not measured."""
    from rich.console import Console

    from fastconv.benchmarks import claims as measured
    from fastconv.cli.networks import check_folder

    if out:
        check_folder(out, "--out")
    block = measured.measure(rounds=rounds)
    text = json.dumps(block, indent=1)
    if out:
        with click.open_file(out, "w") as file:
            file.write(text + "\n")
    if as_json:
        click.echo(text)
    else:
        measured.print_table(block, Console(width=None if Console().is_terminal else 150))

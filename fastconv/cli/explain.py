"""fastconv explain: the fate of each submodule of a model."""

import click


@click.command()
@click.argument("model")
def explain(model: str) -> None:
    """Show which kernel each submodule of MODEL gets, or why it is left alone.

    MODEL is one of fastconv's own names (mobilenet_v2), torchvision:NAME or timm:NAME.
    """
    import fastconv
    from fastconv.cli import networks

    click.echo(str(fastconv.explain(fastconv.optimize(networks.build_any(model)))))

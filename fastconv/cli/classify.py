"""fastconv classify: what one network sees in your photographs."""

import click


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(exists=True, dir_okay=False))
@click.option("--model", "name", default="mobilenet_v3_large", show_default=True, help="One of fastconv.models.")
@click.option("--weights", default="DEFAULT", show_default=True, metavar="PATH|DEFAULT", help="A .pth or .safetensors file.")
@click.option("--topk", type=click.IntRange(1, 1000), default=5, show_default=True, help="Categories to show.")
def classify(images: tuple[str, ...], name: str, weights: str, topk: int) -> None:
    """Classify photographs through fastconv's kernels."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastconv.cli import networks

    networks.check_name(name)
    pictures = [networks.read_image(path) for path in images]
    model = networks.load(name, weights)
    labels = networks.categories()
    console = Console(width=None if Console().is_terminal else 150)
    for path, picture in zip(images, pictures, strict=True):
        with torch.no_grad():
            probability = model(networks.preprocess(picture, name)[None])[0].softmax(0)
        grid = Table("category", "probability", title=Text(path), title_justify="left")
        for value, index in zip(*probability.topk(min(topk, len(probability))), strict=True):
            label = labels[int(index)] if len(probability) == len(labels) else f"class {int(index)}"
            grid.add_row(label, f"{float(value):.3f}")
        console.print(grid)

"""The plain torch networks that the command compares with, their weights, and the photographs they look at."""

import contextlib
import difflib
import io
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

NAMES = ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "squeezenet1_0", "squeezenet1_1")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)  # timm trained its MobileNet V1 with this mean and standard deviation
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # the files inside scikit-image's own wheel


@dataclass
class Network:
    """A plain torch network in eval mode, and where it and its weights are from."""

    name: str
    model: torch.nn.Module
    library: str
    weights: str
    why_random: str = ""


def torchvision() -> Any:
    """The torchvision module, or None where it cannot be imported."""
    from fastconv.models._torchvision import import_torchvision

    try:
        return import_torchvision()
    except ImportError:
        return None


def timm() -> Any:
    """The timm module, or None where it cannot be imported."""
    if torchvision() is None:  # timm imports it
        return None
    try:
        import timm
    except ImportError:
        return None
    return timm


def check_name(name: str) -> str:
    """Returns the name if it is one of fastconv.models; raises click.BadParameter with the list otherwise."""
    import fastconv.models

    names = fastconv.models.list_models()
    if name not in names:
        raise click.BadParameter(f"unknown model {name!r}; models: {', '.join(names)}")
    return name


def parse_names(names: str | None) -> list[str]:
    """The networks of a comma-separated list; all six for None."""
    chosen = [check_name(name.strip()) for name in (names or ",".join(NAMES)).split(",") if name.strip()]
    if not chosen:
        raise click.BadParameter(f"no network in {names!r}; models: {', '.join(NAMES)}", param_hint="--nets")
    return list(dict.fromkeys(chosen))


def check_folder(path: str, option: str) -> None:
    """Raises click.BadParameter if the folder of a file to be written is not there."""
    if not Path(path).absolute().parent.is_dir():
        raise click.BadParameter(f"no such folder: {Path(path).parent}", param_hint=option)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Downloads give up after this many seconds of silence, instead of never."""
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)


def _construct(name: str) -> tuple[torch.nn.Module, str]:
    vision, zoo = torchvision(), timm()
    if name == "mobilenet_v1" and zoo is not None:
        return zoo.create_model("mobilenetv1_100"), "timm"
    if name != "mobilenet_v1" and vision is not None:
        return vision.models.get_model(name), "torchvision"
    import fastconv.models

    # Our class in plain torch: a trace of it knows no fused path.
    return torch.fx.symbolic_trace(fastconv.models.get_model(name).eval()), "torch"


def _published(name: str, library: str) -> tuple[str, str, str]:
    """Where the library publishes its weights: their tag, URL, and file name in torch.hub's cache."""
    if library == "timm":
        published = timm().get_pretrained_cfg("mobilenetv1_100")
        url = f"https://huggingface.co/{published.hf_hub_id}/resolve/main/pytorch_model.bin"
        return published.tag, url, f"{published.architecture}.{published.tag}.bin"
    published = torchvision().models.get_model_weights(name).DEFAULT
    return published.name, published.url, published.url.rsplit("/", 1)[-1]


def _download(url: str, file_name: str) -> dict[str, torch.Tensor]:
    with _patience(5.0), contextlib.redirect_stdout(io.StringIO()):  # torch.hub announces every attempt
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", file_name=file_name, weights_only=True, progress=False)


def randomise(model: torch.nn.Module) -> None:
    """Gives every batch norm statistics and affine parameters that folding has to get right."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.8, 1.2)
                module.bias.normal_(0, 0.1)


def build(name: str, *, pretrained: bool = True) -> Network:
    """The plain torch network of this name: torchvision's (timm's for mobilenet_v1), else our class traced to plain torch.

    With pretrained, the library's published weights if they can be downloaded or lie in torch.hub's cache. Otherwise random weights,
    seed 0, with randomised batch-norm statistics.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, library = _construct(name)
        randomise(model)
    weights, why_random = "random, seed 0", ""
    if pretrained and library == "torch":
        why_random = f"{'timm' if name == 'mobilenet_v1' else 'torchvision'} is not installed"
    elif pretrained:
        tag, url, file_name = _published(name, library)
        try:
            model.load_state_dict(_download(url, file_name))
            weights = f"{library} {tag}"
        except (OSError, RuntimeError) as problem:
            why_random = _one_line(problem)
    model.eval().requires_grad_(False)
    return Network(name, model, library, weights, why_random)


def build_any(spec: str) -> torch.nn.Module:
    """A model by one of our names, torchvision:NAME or timm:NAME, in eval mode with random weights."""
    import fastconv.models

    library, _, name = spec.rpartition(":")
    if not library:
        return fastconv.models.get_model(check_name(name)).eval()
    if library not in ("torchvision", "timm"):
        raise click.BadParameter(f"unknown library {library!r} in {spec!r}; write NAME, torchvision:NAME or timm:NAME")
    module = torchvision() if library == "torchvision" else timm()
    if module is None:
        raise click.ClickException(f"{spec}: {library} is not installed (pip install --no-deps {library})")
    names = module.models.list_models() if library == "torchvision" else module.list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5)
        raise click.BadParameter(f"{library} has no model {name!r}" + (f"; close names: {', '.join(close)}" if close else ""))
    return (module.models.get_model(name) if library == "torchvision" else module.create_model(name)).eval()


def load(name: str, weights: str) -> torch.nn.Module:
    """One of our models in eval mode with these weights; click.ClickException in one line if they cannot be loaded."""
    import fastconv.models

    if weights != "DEFAULT" and not Path(weights).is_file():
        raise click.BadParameter(f"no such file: {weights}", param_hint="--weights")
    try:
        with _patience(10.0):
            return fastconv.models.get_model(name, weights=weights).eval()
    except Exception as problem:  # a damaged file, keys of another network, no network: each library raises its own
        raise click.ClickException(f"{name}: cannot load weights {weights}: {_one_line(problem)}") from None


def categories() -> list[str]:
    """ImageNet's 1000 category names from torchvision's weights metadata; class numbers without torchvision."""
    vision = torchvision()
    if vision is None:
        return [f"class {number}" for number in range(1000)]
    return vision.models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]


def preprocess(image: Any, name: str, *, resize: int = 256, crop: int = 224) -> torch.Tensor:
    """A PIL image as the network's (3, crop, crop) input: torchvision's ImageClassification(crop_size=224, resize_size=256)."""
    from PIL import Image

    image = image.convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(resize * long / short)
    image = image.resize((resize, long) if width <= height else (long, resize), Image.Resampling.BILINEAR)
    left, top = round((image.width - crop) / 2.0), round((image.height - crop) / 2.0)
    pixels = np.array(image.crop((left, top, left + crop, top + crop)), dtype=np.float32) / 255
    mean, std = (HALF, HALF) if name == "mobilenet_v1" else (MEAN, STD)
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_image(path: str | Path) -> Any:
    """Opens an image file; click.ClickException in one line if it is not one."""
    try:
        from PIL import Image
    except ImportError:
        raise click.ClickException("reading photographs needs Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise click.ClickException(f"{path}: not a readable image ({_one_line(problem)})") from None


def photographs() -> dict[str, Any]:
    """scikit-image's sample photographs by name, from its installed files alone."""
    try:
        import skimage.data
    except ImportError:
        raise click.ClickException("the photographs come with scikit-image: pip install scikit-image") from None
    folder = Path(skimage.data.__file__).parent
    return {Path(file).stem: read_image(folder / file) for file in PHOTOGRAPHS if (folder / file).exists()}


def _one_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0][:300]

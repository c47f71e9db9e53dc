"""Defines the public operators from schemas.inc when the extension, which otherwise defines them, is missing."""

import re
from importlib.resources import files

import torch

from fastconv import reference


def define(library: torch.library.Library) -> None:
    for schema in re.findall(r'SCHEMA\("(.*)"\)', files("fastconv").joinpath("schemas.inc").read_text()):
        if hasattr(reference, schema.partition("(")[0]):
            library.define(schema)

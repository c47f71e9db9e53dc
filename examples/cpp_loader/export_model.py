"""Writes model.pt2 (compiled by AOTInductor) and, for a check, input.bin and expected.bin: python export_model.py [NAME] [FOLDER]."""

import sys
from pathlib import Path

import torch

import fastconv


def main(name: str = "squeezenet1_1", folder: str = ".") -> None:
    model = fastconv.optimize(fastconv.models.get_model(name).eval())
    x = torch.randn(2, 3, 224, 224)
    batch = torch.export.Dim("batch", min=1, max=256)
    program = torch.export.export(model, (x,), dynamic_shapes=(({0: batch},),))
    torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
    with torch.no_grad():
        model(x).numpy().tofile(Path(folder) / "expected.bin")
    x.numpy().tofile(Path(folder) / "input.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])

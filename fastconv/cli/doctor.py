"""fastconv doctor: what is installed, found and used on this machine."""

import json
import os
import platform
from typing import Any

import click
import torch


def _warnings(report: dict[str, dict[str, Any]], runtimes: list[str] | None) -> list[str]:
    lines = []
    if runtimes is not None and len(runtimes) > 1:
        lines.append(f"{len(runtimes)} OpenMP runtimes are loaded ({', '.join(runtimes)}): their threads fight for the cores; keep one")
    if "missing" in report["extension"]:
        lines.append(f"the compiled extension is missing ({report['extension']['missing']}): CPU operators run through ATen")
    if torch.get_num_threads() > (os.cpu_count() or 1):
        lines.append(f"torch uses {torch.get_num_threads()} threads on {os.cpu_count()} cores")
    return lines


def examine() -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Sections of facts, and what is wrong with them."""
    from fastconv import _extension
    from fastconv.cli import machine

    extension = machine.compiled()
    runtimes = machine.openmp_runtimes()
    packages = ("torch", "triton", "numpy", "torchvision", "timm")
    report: dict[str, dict[str, Any]] = {
        "versions": {"fastconv": machine.version(), "python": platform.python_version()}
        | {name: machine.version(name) for name in packages},
        "cpu": {"name": machine.cpu_name(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "threads": {
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
            "OpenMP runtimes": "unknown (install threadpoolctl)" if runtimes is None else runtimes or "none",
        },
        "extension": {"backend": _extension.backend()},
        "gpu": {"found": machine.gpus() or "none", "CUDA in torch": torch.version.cuda or "none", "triton": machine.triton_state()},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("FASTCONV_")},
    }
    if extension is None:
        report["extension"]["missing"] = _extension.reason or "unknown reason"
    else:
        build = extension.build_info()
        report["extension"] |= {"file": extension.__file__, "isa in use": extension.isa(), "isas supported here": extension.isas()}
        report["extension"] |= {"isas compiled" if name == "isas" else name: value for name, value in build.items()}
        report["extension"]["kernels"] = len(extension.kernels())
    return report, _warnings(report, runtimes)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> None:
    """Show versions, ISA, threads, OpenMP runtimes, the extension's, Triton's and the GPU's state."""
    report, warnings = examine()
    if as_json:
        click.echo(json.dumps(report | {"warnings": warnings}, indent=1, default=str))
        return
    for section, facts in report.items():
        click.secho(section, bold=True)
        for name, value in facts.items():
            click.echo(f"  {name:<20} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}")
        if not facts:
            click.echo("  no FASTCONV_* variable is set" if section == "environment" else "  nothing")
    for line in warnings:
        click.secho(f"warning: {line}", fg="yellow")

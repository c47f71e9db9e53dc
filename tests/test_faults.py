"""What the environment can break: memory, the built library, the compiler, a killed build, variables.

Each ends in a fallback or in a message that says what is wrong, within 30 s. Triton's cache directory: gpu/test_cache.py; a forced backend
or instruction set: test_isa.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import pytest
from core import programs
from installed import CONVOLVE, ROOT, WITHOUT_CHECKOUT

from fastconv import _extension

LIMIT = 30  # seconds
HUNG = 20 * LIMIT  # what a busy machine may make of them
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
compiles = pytest.mark.skipif(shutil.which(programs.compiler()[0]) is None, reason="compiles C++")
needs_extension = pytest.mark.skipif(not _extension.available, reason="the compiled extension is missing")


def run(script: str, *arguments: str, **environment: str) -> str:
    """What a Python prints that has to succeed."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


# Memory

FAILING = """
import ctypes, gc, itertools, sys, threading
import torch, fastconv
from fastconv import nn, ops

shim = ctypes.CDLL(None)
shim.arm.argtypes, shim.seen.restype = [ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p], ctypes.c_int64
torch.manual_seed(0)
torch.set_num_threads(2)

def attempt(call, nth, *where):
    '''In a thread of its own, which has no scratch memory yet. Returns the result or the error, and whether an allocation failed.'''
    got = []
    def body():
        assert shim.arm(nth, *where)
        try:
            got.append(call())
        except (MemoryError, RuntimeError) as error:
            got.append(error)
        got.append(0 < nth <= shim.seen())
        shim.arm(0, 0, None)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return got

def every(name, call, *where):
    '''Fails each allocation of a call in turn; the call after it gives what it gave before. Returns how many raised.'''
    wanted, raised = call(), 0
    for nth in itertools.count(1):
        got, failed = attempt(call, nth, *where)
        if not failed:
            assert torch.equal(got, wanted), name
            return raised
        if isinstance(got, torch.Tensor):  # it got by without
            assert torch.equal(got, wanted), name
        else:
            # what is around our operators in a network and in training is torch's own
            torchs = name in ("program_run", "training_") and "DefaultCPUAllocator: can't allocate memory" in str(got)
            assert torchs or (isinstance(got, MemoryError) and name in str(got) and "out of memory" in str(got)), (name, nth, got)
            raised += 1
            again, _ = attempt(call, 0, *where)
            assert isinstance(again, torch.Tensor) and torch.equal(again, wanted), (name, nth, again)

r = torch.randn
x = r(2, 24, 30, 33)  # NCHW: it is converted, too
grad = r(2, 24, 30, 33)
taps, wide, narrow, bias = r(24, 1, 3, 3), r(40, 24, 1, 1), r(24, 40, 1, 1), r(40)
net = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), nn.InvertedResidual(16, 16, 1, 2), nn.Fire(16, 8, 16, 24), torch.nn.MaxPool2d(3, 2)
).eval()
fast = fastconv.optimize(net)
image = r(3, 3, 65, 64)
layer = nn.DepthwiseSeparable(24, 40).train()
for norm in layer.modules():
    if isinstance(norm, torch.nn.BatchNorm2d):
        norm.momentum = 0.0  # the running statistics stay as they are

def gradient():
    y = x.clone().requires_grad_()
    layer(y).square().sum().backward()
    layer.zero_grad()
    return y.grad

def network():
    with torch.no_grad():
        return fast(image)

network()
[whole] = [thing for thing in gc.get_objects() if type(thing).__name__ == "Whole"]

def compiled_anew():
    number = torch.ops.fastconv.program_new(whole.weights, whole.program)
    try:
        return torch.ops.fastconv.program_run(image, number)
    finally:
        fastconv._C.program_free(number)

winograd_stem = ops.prepare_stem(wide[:, :3].expand(40, 3, 7, 7), bias, stride=2, padding=3, activation=None)
even = r(40, 32, 1, 1)
strassen = ops.prepare_pointwise(r(264, 256, 1, 1), None, activation=None)
wide_x = r(1, 256, 40, 40)

CALLS = {
    "depthwise": lambda: ops.depthwise(x, taps, activation="relu"),
    "pointwise": lambda: ops.pointwise(x, wide, bias),
    "fire_expand": lambda: ops.fire_expand(x, wide, bias, r(8, 24, 3, 3) * 0, bias[:8]),
    "fire": lambda: ops.fire(x, wide, bias, narrow, bias[:24], narrow.expand(24, 40, 3, 3), bias[:24]),
    "separable": lambda: ops.separable(x, taps, None, wide, bias),
    "inverted_residual": lambda: ops.inverted_residual(x, wide, bias, r(40, 1, 3, 3) * 0, bias, narrow, None, residual=True),
    "stem: ": lambda: ops.stem(x[:, :3], wide[:, :3].expand(40, 3, 3, 3), bias),
    "max_pool": lambda: ops.max_pool(x),
    "global_avg_pool": lambda: ops.global_avg_pool(x),
    "depthwise_backward_input": lambda: ops.depthwise_backward_input(grad, taps, (30, 33), stride=1, padding=1),
    "depthwise_backward_weight": lambda: ops.depthwise_backward_weight(grad, x, (3, 3), stride=1, padding=1),
    "pack_panels": lambda: torch.ops.fastconv.pack_panels(wide),
    "pack_winograd": lambda: torch.ops.fastconv.pack_winograd(wide.expand(40, 24, 3, 3)),
    "pack_strassen": lambda: torch.ops.fastconv.pack_strassen(even),
    "pack_digits": lambda: torch.ops.fastconv.pack_digits(even),
    "pointwise_packed": lambda: strassen(wide_x),
    "pack_stem_winograd": lambda: torch.ops.fastconv.pack_stem_winograd(wide[:, :3].expand(40, 3, 7, 7)),
    "stem": lambda: winograd_stem(x[:, :3]),
    "pack_taps": lambda: torch.ops.fastconv.pack_taps(taps),
    "program_run": network,
    "program_": compiled_anew,
    "training_": gradient,
}
"""


@pytest.fixture(scope="module")
def failing_memory(tmp_path_factory) -> str:
    """The library to preload."""
    built = tmp_path_factory.mktemp("shim") / "failing_memory.so"
    subprocess.run(
        [*programs.compiler(), "-O1", "-shared", "-fPIC", str(ROOT / "tests/core/failing_memory.cpp"), "-o", str(built)], check=True
    )
    return str(built)


@compiles
@needs_extension
@pytest.mark.skipif(sys.platform != "linux" or "musl" in SUFFIX, reason="takes glibc's allocator apart")
def test_any_allocation_may_fail(failing_memory):
    """First each of ours, of any size; then each large one that torch makes for us. The error names the operator, the next call works."""
    script = """
    for where in ((0, b"fastconv/_C"), (16384, b"libc10.so")):  # where torch allocates tensors
        for name, call in CALLS.items():
            print(name, every(name, call, *where))
    """
    lines = run(FAILING + textwrap.dedent(script), LD_PRELOAD=failing_memory).splitlines()
    counts = [(name, int(count)) for name, count in map(str.split, lines)]
    ours, torchs = counts[: len(counts) // 2], counts[len(counts) // 2 :]
    assert len(ours) == len(torchs) == 22
    assert all(count > 3 for _, count in ours), ours
    assert all(count > 0 for name, count in torchs if name not in ("pack_panels", "pack_strassen", "pack_digits", "pack_taps")), torchs


@needs_extension
def test_an_address_space_that_is_too_small():
    """A limit of the process (ulimit -v, a container's) instead of a preloaded library."""
    script = """
    import resource, torch, fastconv
    x, weight = torch.randn(1, 16, 64, 64), torch.randn(16, 1, 3, 3)
    wanted = fastconv.ops.depthwise(x, weight)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), -1))
    for large in (x[:, :, :1, :1].expand(1, 16, 4096, 4096), x.expand(1024, 16, 64, 64)):
        try:
            fastconv.ops.depthwise(large, weight)
        except MemoryError as error:
            print(error)
        assert torch.equal(fastconv.ops.depthwise(x, weight), wanted)
    """
    assert run(script) == "depthwise: out of memory\n" * 2


# The built library

# One process imports what takes long, and forks for each case: a JSON of name, variables, first folder of sys.path and code. What a case
# says is its warnings, then what its code puts into `said`, or its error.
FORKING = """
import json, os, sys, time, warnings
import torch, torch._dynamo.aot_compile
def said_by(case):
    os.environ.update(case["variables"])
    if case["site"]:
        sys.path.insert(0, case["site"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = []
        try:
            exec(case["code"], {"said": said})
        except (ImportError, RuntimeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return [str(warning.message) for warning in caught if "fastconv" in str(warning.message)] + said
for case in json.load(sys.stdin):
    read, write = os.pipe()
    started = time.monotonic()
    if os.fork() == 0:
        try:
            os.write(write, json.dumps([text[:1000] for text in said_by(case)]).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read()
    _, status, used = os.wait3(0)
    print(json.dumps([case["name"], status, used.ru_utime + used.ru_stime, said.decode()]), flush=True)
"""


def forked(cases: list[dict], prelude: str = "", **variables: str) -> dict[str, list[str]]:
    """What each case said, by name, after checking that it ended in time (the processor's: the machine may be busy)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FASTCONV_")} | variables
    command = [sys.executable, "-c", prelude + FORKING]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, env=environment, timeout=HUNG)
    assert done.returncode == 0, done.stderr[-2000:]
    said = {}
    for name, status, seconds, answer in map(json.loads, done.stdout.splitlines()):
        assert status == 0, (name, status, done.stderr[-2000:])
        assert seconds < LIMIT, name
        said[name] = json.loads(answer)
    assert said.keys() == {case["name"] for case in cases}
    return said


def other_architecture() -> bytes:
    """A library as it is built elsewhere, as far as its header goes: aarch64's, or on aarch64 x86-64's."""
    image = bytearray(Path(sys.modules["fastconv._C"].__file__).read_bytes()[:4096])
    image[18:20] = (0xB7 if os.uname().machine == "x86_64" else 0x3E).to_bytes(2, "little")
    return bytes(image)


def without_symbol(symbol: str, folder: Path) -> bytes:
    """A module that wants a function which is nowhere."""
    source, built = folder / f"{symbol}.cpp", folder / f"{symbol}.so"
    source.write_text(f'extern "C" void {symbol}(); extern "C" void* PyInit__C() {{ {symbol}(); return nullptr; }}')
    subprocess.run([*programs.compiler(), "-shared", "-fPIC", str(source), "-o", str(built)], check=True)
    return built.read_bytes()


MINE, OTHER = f"_C{SUFFIX}", "_C.cpython-37m-x86_64-linux-gnu.so"
NO_PARALLEL, NO_ERROR = "torch_parallel_for_of_2_10", "_ZN3c105ErrorC2ENS_14SourceLocationESs"
DAMAGED = {
    "never built, or a build that was killed": "it was not built$",
    "another architecture": rf"{re.escape(MINE)}: cannot open shared object file",
    "no library": "invalid ELF header",
    "empty": "file too short",
    "another Python": rf"it was built for another Python: {re.escape(OTHER)}, wanted {re.escape(MINE)}$",
    "bug 28, an older torch": rf"it does not fit torch 2\.\S+ \(2\.10 or later is needed\): .* undefined symbol: {NO_PARALLEL}$",
    "bug 28, another torch's C++": rf"it does not fit torch 2\.\S+ \(2\.10 or later is needed\): .* undefined symbol: {NO_ERROR}$",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> dict[str, list[str]]:
    """What Python says that finds the package with each of these, where it may do without, and where it may not."""
    root = tmp_path_factory.mktemp("damaged")
    content = {
        "never built, or a build that was killed": {},
        "another architecture": {MINE: other_architecture()},
        "no library": {MINE: b"version https://git-lfs.github.com/spec/v1 " * 10},
        "empty": {MINE: b""},
        "another Python": {OTHER: b""},
        "bug 28, an older torch": {MINE: without_symbol(NO_PARALLEL, root)},
        "bug 28, another torch's C++": {MINE: without_symbol(NO_ERROR, root)},
    }
    assert content.keys() == DAMAGED.keys()
    cases = []
    for number, (name, files) in enumerate(content.items()):
        package = root / str(number) / "fastconv"
        package.mkdir(parents=True)
        for path in (ROOT / "fastconv").iterdir():
            if path.suffix != ".so" and path.name not in ("kernels", "benchmarks", "__pycache__"):
                (package / path.name).symlink_to(path)
        (package / "kernels").symlink_to(ROOT / "kernels")
        for file, data in files.items():
            (package / file).write_bytes(data)
        case = {"name": name, "site": str(package.parent), "variables": {}, "code": CONVOLVE + "said.append(fastconv._extension.reason)"}
        cases += [case] + [
            case | {"name": f"{name}, {variable}={value}", "variables": {variable: value}}
            for variable, value in (("FASTCONV_BACKEND", "cpu"), ("FASTCONV_ISA", "scalar"))
        ]
    return forked(cases, WITHOUT_CHECKOUT, PYTHONPATH="", PYTHONSAFEPATH="1")


@compiles
@needs_extension
@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_extension(fault, damaged):
    """It computes, after one line of warning that says why. Where our kernels were asked for by name it is an error, never a fallback.

    Bug 28, flash-attention#1644 and pytorch#152790: "undefined symbol: c10::Error..." was the whole message."""
    warning, reason = damaged[fault]
    assert re.search(DAMAGED[fault], reason), reason
    assert warning == f"fastconv: the compiled extension is not available ({reason}); running through ATen"
    for forced in ("FASTCONV_BACKEND=cpu", "FASTCONV_ISA=scalar"):
        [error] = damaged[f"{fault}, {forced}"]
        assert error == f"RuntimeError: {forced} needs the compiled extension, fastconv._C: {reason}"


# Building

FAKE = """#!/bin/sh
# A compiler that is quick, and that takes for ever to link, with half of the file written.
while [ $# -gt 1 ]; do
  [ "$1" = -o ] && out=$2
  shift
done
case "$out" in
  *.o) : > "$out" ;;
  *) printf half > "$out"; echo > "$LINKING"; [ -e "$QUICK" ] || sleep 60 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, with a compiler that does not compile."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("csrc", "kernels", "fastconv", "benchmarks"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results", "kernels", "benchmarks")
        )
    (tmp_path / "fake").write_text(FAKE)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def start_build(checkout: Path, **environment: str) -> subprocess.Popen:
    environment = {"CXX": str(checkout / "fake"), "LINKING": str(checkout / "linking"), "QUICK": str(checkout / "quick")} | environment
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=os.environ | environment, start_new_session=True, **pipe)


@pytest.mark.parametrize("before", [None, b"the last build's"])
def test_bug_30_a_killed_build_leaves_nothing_behind(before, checkout):
    """pytorch#189245: a killed build left a lock, and every later import waited for it. There is no lock here, nothing builds at import,
    and half a library never stands where Python looks for one: whoever imports finds the last build's, or none."""
    extension = checkout / "fastconv" / f"_C{SUFFIX}"
    if before:
        extension.write_bytes(before)
    build = start_build(checkout)
    deadline = time.monotonic() + HUNG
    while not (checkout / "linking").exists():
        assert build.poll() is None, build.communicate()
        assert time.monotonic() < deadline, "it does not come to linking"
        time.sleep(0.05)
    os.killpg(build.pid, signal.SIGKILL)
    build.communicate()
    assert (extension.read_bytes() if extension.exists() else None) == before
    assert len(list((checkout / "fastconv").glob("*.so"))) == bool(before)
    (checkout / "quick").touch()
    again = start_build(checkout)
    _, errors = again.communicate(timeout=HUNG)
    assert again.returncode == 0, errors
    assert extension.read_bytes() == b"half"
    assert (checkout / "fastconv" / "libfastconv.so").read_bytes() == b"half"
    assert not list(checkout.rglob("*.part"))


def test_no_compiler(checkout):
    build = start_build(checkout, CXX="no-such-compiler -O2")
    _, errors = build.communicate(timeout=HUNG)
    assert build.returncode != 0
    assert errors.strip() == (
        "error: fastconv: no C++ compiler ('no-such-compiler' not found): install one, e.g. `apt-get install g++`, or set CXX"
    )


def test_bug_29_a_build_without_torch_without_nvcc_without_ninja(checkout):
    """flash-attention#309: "No module named torch" from an isolated build; extension-cpp#26: no CUDA_HOME."""
    required = (ROOT / "pyproject.toml").read_text().split("requires = ", 1)[1].splitlines()[0]
    assert '"torch>=2.10"' in required
    (checkout / "quick").touch()
    plain = start_build(checkout, PATH="/usr/bin:/bin", CUDA_HOME="/nowhere", CUDA_PATH="/nowhere")
    _, errors = plain.communicate(timeout=HUNG)
    assert plain.returncode == 0, errors
    code = """
    import importlib.util, sys
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
    sys.argv = ["setup.py", "-q", "build_ext"]
    exec(compile(open("setup.py").read(), "setup.py", "exec"))
    """
    environment = os.environ | {"CXX": str(checkout / "fake")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=checkout, env=environment, capture_output=True, text=True, timeout=HUNG
    )
    assert done.returncode != 0
    assert done.stderr.strip() == (
        "error: fastconv: no torch in this Python to build against: install it, then `pip install --no-build-isolation .`"
    )


# Variables

HOSTILE = ["avx2 ", "AVX512", "0", "-1", "scalar,avx2", "\n", "%s%n", "é", "\udcff", "a" * 100_000]


@needs_extension
def test_hostile_variables():
    """It imports and computes, or one line names the variable and what it may be."""
    code = """
import torch, fastconv
x = torch.ones(1, 2, 3, 3)
assert fastconv.ops.depthwise(x, torch.ones(2, 1, 3, 3))[0, 0, 1, 1] == 9
with torch.no_grad():
    fastconv.optimize(torch.nn.Conv2d(2, 2, 1).eval())(x)
said.append("fine")
"""
    read = dict.fromkeys(("FASTCONV_ISA", "FASTCONV_BACKEND", "FASTCONV_DISABLE", "FASTCONV_CUDA_GRAPHS"), HOSTILE)
    unread = dict.fromkeys(("FASTCONV_TUNED", "FASTCONV_NO_SUCH"), HOSTILE[-2:])  # the former on a GPU alone
    values = {f"{name} {number}": (name, value) for name, list_ in (read | unread).items() for number, value in enumerate(list_)}
    cases = [{"name": case, "site": "", "variables": dict([pair]), "code": code} for case, pair in values.items()]
    for case, said in forked(cases).items():
        name, value = values[case]
        if name in unread or (value == "0" and name in ("FASTCONV_DISABLE", "FASTCONV_CUDA_GRAPHS")):
            assert said == ["fine"], (name, value[:20], said)
        else:
            [error] = said
            assert re.match(rf"\w+: {name} must be .*, got ", error), (name, value[:20], error[:200])


@pytest.mark.parametrize("value", ["abc", "-5", "0", "999999999999999999999", "1,2,3", ""])
def test_hostile_thread_counts(value):
    """OMP_NUM_THREADS belongs to OpenMP, which ignores what is no number: we compute all the same."""
    run(
        """
        import torch, fastconv
        x, weight = torch.ones(1, 64, 64, 64), torch.ones(64, 64, 1, 1)
        assert bool((fastconv.ops.pointwise(x, weight) == 64).all())
        """,
        OMP_NUM_THREADS=value,
    )

"""torch.export, AOTInductor and ONNX: what is saved runs elsewhere, through the kernels, with the weights of the export."""

import functools
import gc
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from harness import using_isa
from torch import nn

import fastconv
from fastconv import _extension

pytestmark = [
    pytest.mark.skipif(not _extension.available or _extension.backend() != "auto", reason="needs the compiled extension"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # torch's own
]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def as_exports_are_packed():
    """Without the matrix unit, whose weights no export holds: for equal bits. (An export prepares in a thread of its own.)"""
    isa = _extension.isa()
    with using_isa("avx512" if isa == "amx" else isa):
        yield


EXPORTS = [(name, optimized) for name in fastconv.models.list_models() for optimized in (False, True)]
QUICK = (("mobilenet_v3_small", False), ("squeezenet1_1", True))
EXPORTS = [export if export in QUICK else slow(*export) for export in EXPORTS]
X = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(0))
BATCH, WIDTH = torch.export.Dim("batch", min=1, max=512), torch.export.Dim("width", min=32, max=512)
LIBRARY = Path(fastconv.__path__[0]) / "libfastconv.so"
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="libfastconv.so, which setup.py builds beside the extension, is missing")
EXAMPLE = Path(__file__).parents[1] / "examples" / "cpp_loader"


def small(name="mobilenet_v2"):
    return fastconv.models.get_model(name, num_classes=7, **({} if "squeeze" in name else {"width_mult": 0.25})).eval()


def export(module, x=X):
    shapes = {0: BATCH, 3: WIDTH}
    return torch.export.export(module, (x,), dynamic_shapes=((shapes,),) if hasattr(module, "plan") else (shapes,))


def calls(program):
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def run(module, *args):
    with torch.no_grad():
        return module(*args)


def python(code, *args):
    """Runs code in a fresh process, from another folder than the checkout's."""
    path = os.pathsep.join([str(Path(fastconv.__path__[0]).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "optimized"), EXPORTS, ids=str)
def test_a_model_exports_as_one_operator_for_any_batch_and_size(name, optimized):
    module = fastconv.optimize(small(name)) if optimized else small(name)
    program = export(module)
    assert calls(program) == ["fastconv.network.default", "aten.select.int", "aten.select.int"]
    for x in (X, torch.randn(1, 3, 40, 50), torch.randn(5, 3, 40, 64).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(program.module()(x), run(module, x))


LOAD = """
import sys, torch
folder, library = sys.argv[1:]
torch.ops.load_library(library) if library else __import__("fastconv")
x, expected = torch.load(folder + "/data.pt")
assert torch.equal(torch.export.load(folder + "/program.pt2").module()(x), expected)
assert bool(library) == ("fastconv" not in sys.modules)
"""


@pytest.mark.parametrize("library", [pytest.param(True, marks=needs_library), slow(False)], ids=["libfastconv.so", "import fastconv"])
def test_a_saved_program_runs_in_a_fresh_process(library, tmp_path):
    fast = fastconv.optimize(small("mobilenet_v3_small"))
    torch.export.save(export(fast), tmp_path / "program.pt2")
    torch.save((X, run(fast, X)), tmp_path / "data.pt")
    python(LOAD, tmp_path, LIBRARY if library else "")


@pytest.mark.parametrize(("optimized", "assign"), [(True, False), slow(True, True), slow(False, False), slow(False, True)])
def test_an_export_has_the_weights_of_its_time(optimized, assign):
    module = fastconv.optimize(small()) if optimized else small()
    first = export(module)
    expected = run(module, X)
    other = {key: value * 1.25 for key, value in module.state_dict().items()}
    module.load_state_dict(other, assign=assign)
    second = export(module)  # without a call between
    assert torch.equal(first.module()(X), expected)
    assert torch.equal(second.module()(X), run(module, X))
    assert not torch.equal(first.module()(X), second.module()(X))
    assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items())  # what export faked is back
    assert not any(isinstance(value, torch._subclasses.FakeTensor) for value in module.parameters())


def test_inside_the_users_network():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = small("squeezenet1_1"), nn.Linear(7, 2)

        def forward(self, x):
            return {"logits": self.head(self.body(x).tanh())}

    net = Net().eval()
    program = export(net)
    assert calls(program).count("fastconv.network.default") == 1
    assert torch.equal(program.module()(X)["logits"], run(net, X)["logits"])


def test_plans_that_end_during_an_export_leave_no_trace():
    """The garbage collector frees them whenever it likes; an operator called then would be part of the graph."""

    class Net(nn.Module):
        def forward(self, x):
            plans.clear()
            gc.collect()
            return x + 1

    plans = [fastconv.optimize(small("squeezenet1_1"))]
    assert plans[0].plan.prepare().whole is not None
    assert calls(export(Net())) == ["aten.add.Tensor"]


def test_layers_left_to_aten_stand_beside_the_kernels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, dilation=2), nn.Conv2d(8, 8, 1), nn.GELU()).eval()
    fast = fastconv.optimize(model)
    program = export(fast)
    kernels = ["fastconv.stem_packed.default", "aten.tanh.default", "aten.conv2d.default", "fastconv.pointwise_packed.default"]
    assert [name for name in calls(program) if name in kernels] == kernels
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(program.module()(x), run(model, x))


def test_several_inputs_and_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

        def forward(self, x, y):
            z = self.first(x)
            return z, {"sum": z + self.second(y)}

    fast = fastconv.optimize(Net().eval())
    program = torch.export.export(fast, (X, X + 1))
    assert calls(program).count("fastconv.stem_packed.default") == 2
    torch.testing.assert_close(program.module()(X, X + 1), run(fastconv.revert(fast), X, X + 1))


@pytest.mark.slow
def test_plain_torch_where_the_kernels_have_no_place():
    fast = fastconv.optimize(small("mobilenet_v3_small"))
    expected = run(fast, X)
    for program in (
        torch.export.export(fast, (X,), strict=True),
        torch.export.export(fast, (X.clone().requires_grad_(),)),
        torch.export.export(small("mobilenet_v3_small").train(), (X,)),
    ):
        assert not any("fastconv" in call for call in calls(program))
    assert (torch.export.export(fast, (X,), strict=True).module()(X) - expected).norm() <= 1e-5 * expected.norm()


def test_a_program_runs_under_autocast_in_float32():
    fast = fastconv.optimize(small())
    program = export(fast).module()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(program(X.bfloat16()), program(X.bfloat16().float()))


# The operator itself.


def parts():
    whole = fastconv.optimize(small("squeezenet1_1")).plan.prepare().whole
    return whole.weights, whole.program


def test_registrations():
    weights, program = parts()
    for x in (X, X.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.fastconv.network.default, (x, weights, program))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, p: (w, p.replace("fastconv 2", "fastconv 0")), "network: the program has format 'fastconv 0', this version .* export"),
        (lambda w, p: (w, ""), "network: the program has format ''"),
        (lambda w, p: (w[:-1], p), f"network: the program wants more than its {len(parts()[0]) - 1} weights"),
        (lambda w, p: ([*w, w[0]], p), f"network: the program takes {len(parts()[0])} weights, got {len(parts()[0]) + 1}"),
        (lambda w, p: (w, p.replace("stem_packed", "cosine")), "network: no operator cosine in a program"),
        (lambda w, p: (w, p.replace("stem_packed 0", "stem_packed 1")), "network: step 1 of the program reads values 1 and -1"),
        (
            lambda w, p: (w, p.replace("stem_packed 0 -1 3", "stem_packed 0 -1 x")),
            "network: wanted a number, got 'x' in 'stem_packed 0 -1 x",
        ),
        (lambda w, p: (w, p.replace("stem_packed 0 -1 3 3", "stem_packed 0 -1")), "network: (wanted a number|a step of the program ends)"),
        (lambda w, p: (w, p + " 7"), "network: a step of the program does not end: 'global_avg_pool"),
        (lambda w, p: (w, p.replace("relu", "cosine")), "activation must be None, 'relu'"),
        (lambda w, p: ([w[0].double(), *w[1:]], p), "stem: panels must be dense float32"),
        (lambda w, p: ([w[2], *w[1:]], p), "stem: "),
    ],
)
def test_a_spoilt_program_is_refused(spoil, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastconv.network(X, *spoil(*parts()))


def test_weights_are_read_where_they_lie():
    """A compiled program that is kept serves other weights of the same memory, and no other memory."""
    weights, program = parts()
    before = torch.ops.fastconv.network(X, weights, program)
    copies = [weight.clone() for weight in weights]
    assert torch.equal(torch.ops.fastconv.network(X, copies, program), before)
    copies[0].mul_(2)
    changed = torch.ops.fastconv.network(X, copies, program)
    assert not torch.equal(changed, before)
    assert torch.equal(torch.ops.fastconv.network(X, weights, program), before)
    weights[0].mul_(2)
    assert torch.equal(torch.ops.fastconv.network(X, weights, program), changed)


def test_memory_of_another_shape_is_another_program():
    memory = torch.randn(1 * 4 * 16)
    for channels, bias in ((4, 16), (4, 8)):
        panels, zeros = memory.view(1, channels, 16), torch.zeros(16)[:bias]
        y = torch.ops.fastconv.network(X.new_ones(1, channels, 5, 5), [panels, zeros], "fastconv 2;pointwise_packed 0 -1 none")
        assert y.shape == (1, bias, 5, 5)
    with pytest.raises(RuntimeError, match="pointwise: "):
        torch.ops.fastconv.network(X.new_ones(1, 8, 5, 5), [memory.view(1, 4, 16), torch.zeros(8)], "fastconv 2;pointwise_packed 0 -1 none")


@pytest.mark.slow
def test_more_programs_than_are_kept_and_threads():
    weights, program = parts()
    weights, program = weights[:2], ";".join([*program.split(";")[:2], "max_pool 1 -1 2 2 0 0 1"])
    sets = [[weight * (1 + i / 100) for weight in weights] for i in range(20)]
    expected = [torch.ops.fastconv.network(X, those, program) for those in sets]
    assert not torch.equal(expected[0], expected[19])
    wrong = []

    def call(first):
        for i in range(first, first + 20, 3):
            if not torch.equal(torch.ops.fastconv.network(X, sets[i % 20], program), expected[i % 20]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    # Weights that are gone leave room for others, at whatever address.
    for i in range(30):
        those = [weight * (2 + i) for weight in weights]
        y = torch.ops.fastconv.network(X, those, program.rpartition(";")[0])
        assert torch.equal(y, torch.ops.fastconv.stem_packed(X, *those, [3, 3], [2, 2], [0, 0], "relu"))
        del those
        gc.collect()


# AOTInductor.

RUN_PACKAGE = """
import sys, torch
folder, library = sys.argv[1:]
torch.ops.load_library(library)
x, expected = torch.load(folder + "/data.pt")
model = torch._inductor.aoti_load_package(folder + "/model.pt2")
assert torch.equal(model(x), expected)
assert torch.equal(model(x[:1]), expected[:1])
assert "fastconv" not in sys.modules
"""


@needs_library
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++").split()[0]) is None, reason="AOTInductor compiles C++")
def test_an_aotinductor_package_runs_in_a_fresh_process(tmp_path):
    layers = [
        fastconv.nn.DepthwiseSeparable(3, 16, stride=2),
        fastconv.nn.Fire(16, 4, 8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ]
    fast = fastconv.optimize(nn.Sequential(*layers).eval())
    program = export(fast)
    assert "fastconv.network.default" in calls(program)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # of the C++ around the operator
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"), inductor_configs=quick)
    torch.save((X, run(fast, X)), tmp_path / "data.pt")
    python(RUN_PACKAGE, tmp_path, LIBRARY)


@pytest.mark.slow
@needs_library
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
def test_the_cpp_loader(tmp_path):
    """examples/cpp_loader, as its README says."""
    torch_folder = Path(torch.__file__).parent
    python(
        "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')", EXAMPLE / "export_model.py", "squeezenet1_1", tmp_path
    )
    libraries = [str(torch_folder / "lib"), str(LIBRARY.parent)]
    command = ["g++", "-std=c++20", str(EXAMPLE / "main.cpp"), "-o", str(tmp_path / "loader")]
    command += [
        f"-I{torch_folder}/include",
        f"-I{torch_folder}/include/torch/csrc/api/include",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    command += [f"-L{libraries[0]}", f"-L{libraries[1]}", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--no-as-needed", "-lfastconv"]
    subprocess.run([*command, *(f"-Wl,-rpath,{folder}" for folder in libraries)], check=True)
    arguments = ["model.pt2", "input.bin", "output.bin", "2", "3", "224", "224"]
    done = subprocess.run(["./loader", *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("[2, 1000] in ")
    assert (tmp_path / "output.bin").read_bytes() == (tmp_path / "expected.bin").read_bytes()
    failed = subprocess.run(["./loader", "model.pt2", "none.bin", *arguments[2:]], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "loader: cannot read the input from none.bin" in failed.stderr


# ONNX.


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize(
    ("name", "optimized"), [("squeezenet1_1", True), slow("mobilenet_v3_small", True), slow("mobilenet_v3_small", False)]
)
def test_onnx(name, optimized, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX models are checked with onnxruntime")
    pytest.importorskip("onnx", reason="torch.onnx.export writes with onnx")
    try:
        import onnxscript  # noqa: F401

        dynamo = True
    except ImportError:
        dynamo = False  # torch's older exporter needs no onnxscript
    fast = fastconv.optimize(small(name)) if optimized else small(name)
    torch.onnx.export(fastconv.revert(fast), (X,), tmp_path / "model.onnx", dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
    assert (y - run(fast, X)).norm() <= 1e-5 * y.norm()

"""The engines a user could pick, each behind one function: a torch model and an input in, a call that gives logits out.

Models reach the other engines through ONNX (one file per network, batch and size, in `folder`), pnnx or torch.export. What an engine
lacks is an ImportError; whatever else goes wrong in it is its own exception. Both end as a reason in the report.
"""

import contextlib
import copy
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

Call = Callable[[], Tensor]


@dataclass
class Request:
    """What an engine is asked to run. x: (N, 3, H, W), NCHW as most users have it."""

    network: str
    model: nn.Module
    x: Tensor
    threads: int
    folder: Path
    files: list[Path] = field(default_factory=list)  # what the engine loads, filled in by its function

    def file(self, suffix: str, batch: bool = True) -> Path:
        size = "x".join(map(str, self.x.shape[2:]))
        return self.folder / f"{self.network}{f'-batch{len(self.x)}' if batch else ''}-{size}{suffix}"

    def saved(self, path: Path) -> Path:
        self.files.append(path)
        return path


@dataclass(frozen=True)
class Engine:
    title: str
    build: Callable[[Request], Call]
    packages: str = ""  # for pip, where it is not torch itself
    float32_only: bool = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends everything that native code prints to nowhere: ExecuTorch and MNN announce themselves on both streams."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, stream in zip(kept, (1, 2)):
            os.dup2(saved, stream)
            os.close(saved)
        os.close(nowhere)


def _tool(name: str) -> str:
    """A command that an engine's package installed beside this Python."""
    path = Path(sysconfig.get_path("scripts")) / name
    return str(path) if path.exists() else name


def _state(request: Request) -> None:
    path = request.file(".pt", batch=False)
    torch.save(request.model.state_dict(), path)
    request.saved(path)


def eager(request: Request) -> Call:
    _state(request)
    return lambda: request.model(request.x)


def eager_channels_last(request: Request) -> Call:
    _state(request)
    model = copy.deepcopy(request.model).to(memory_format=torch.channels_last)
    x = request.x.to(memory_format=torch.channels_last)
    return lambda: model(x)


def compiled(request: Request) -> Call:
    import torch._inductor.config as inductor

    _state(request)
    torch._dynamo.reset()
    model = copy.deepcopy(request.model).to(memory_format=torch.channels_last)
    x = request.x.to(memory_format=torch.channels_last)
    run = torch.compile(model)
    with inductor.patch(freezing=True):  # weights folded and packed, its best case for inference
        run(x)
    return lambda: run(x)


def fastconv(request: Request) -> Call:
    import fastconv

    _state(request)
    fast = fastconv.optimize(request.model, share=True)  # the suite's model changes no more; other engines read files of it
    return lambda: fast(request.x)


def _onnx(request: Request) -> Path:
    path = request.file(".onnx")
    if not path.exists():
        import onnx  # noqa: F401 - the exporter needs it; once the file is there, nobody does

        torch.onnx.export(request.model, (request.x,), path, dynamo=False, input_names=["x"], output_names=["y"], opset_version=17)
    return path


def onnxruntime(request: Request) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.threads
    session = onnxruntime.InferenceSession(request.saved(_onnx(request)), options, providers=["CPUExecutionProvider"])
    feed = {"x": request.x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(request: Request) -> Call:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": request.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
    }
    infer = openvino.Core().compile_model(request.saved(_onnx(request)), "CPU", options).create_infer_request()
    feed = {0: request.x.numpy()}
    return lambda: torch.from_numpy(next(iter(infer.infer(feed, share_inputs=True).values())).copy())


def xnnpack(request: Request) -> Call:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    if portable_lib._threadpool_get_thread_count() != request.threads:
        portable_lib._unsafe_reset_threadpool(request.threads)  # safe while no method is loaded, so none of another cell may be left
    path = request.saved(request.file(".pte"))
    if not path.exists():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        exported = torch.export.export(request.model, (request.x,))
        path.write_bytes(to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    method = Runtime.get().load_program(path).load_method("forward")
    return lambda: method.execute([request.x])[0]


def ncnn(request: Request) -> Call:
    import ncnn
    import numpy as np

    stem = request.file("", batch=False)
    parameters, weights = (request.saved(stem.with_name(f"{stem.name}.ncnn.{suffix}")) for suffix in ("param", "bin"))
    if not parameters.exists():
        import pnnx  # noqa: F401 - its command converts

        torch.jit.trace(request.model, request.x[:1]).save(f"{stem}.trace")
        shape = str(list(request.x[:1].shape)).replace(" ", "")
        command = [_tool("pnnx"), f"{stem.name}.trace", f"inputshape={shape}", "fp16=0"]
        done = subprocess.run(command, cwd=request.folder, capture_output=True, check=False)
        made = {path.suffixes[-1]: path for path in request.folder.glob(f"{stem.name.replace('-', '_')}*.ncnn.*")}
        for target in (parameters, weights):
            if not target.exists() and target.suffix in made:
                made[target.suffix].rename(target)
        if not parameters.exists():
            raise RuntimeError(f"pnnx failed: {done.stderr.decode(errors='replace')[-200:]}")
    net = ncnn.Net()
    net.opt.num_threads = request.threads
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
        setattr(net.opt, option, False)
    net.load_param(str(parameters))
    net.load_model(str(weights))
    arrays = [image.numpy().copy() for image in request.x]  # a Mat borrows its memory

    def run() -> Tensor:
        outputs = []
        for array in arrays:  # ncnn has no batches
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(array))
            outputs.append(np.array(extractor.extract("out0")[1]).copy())
        return torch.from_numpy(np.stack(outputs))

    return run


def mnn(request: Request) -> Call:
    import MNN.expr
    import MNN.nn
    import numpy as np

    path = request.saved(request.file(".mnn"))
    if not path.exists():
        command = [_tool("mnnconvert"), "-f", "ONNX", "--modelFile", str(_onnx(request)), "--MNNModel", str(path), "--bizCode", "x"]
        subprocess.run(command, check=True, capture_output=True)
    options = {"precision": "high", "backend": 0, "numThread": request.threads}
    net = MNN.nn.load_module_from_file(str(path), ["x"], ["y"], runtime_manager=MNN.nn.create_runtime_manager((options,)))
    expr = MNN.expr
    feed = expr.convert(expr.const(request.x.numpy(), list(request.x.shape), expr.NCHW), expr.NC4HW4)
    return lambda: torch.from_numpy(np.array(expr.convert(net.forward([feed])[0], expr.NCHW).read()))


def _cuda(mode: str | None) -> Callable[[Request], Call]:
    """Eager cuDNN (None) or torch.compile in a mode, channels_last on the GPU; a call ends when the GPU is done."""

    def build(request: Request) -> Call:
        torch.backends.cudnn.benchmark = True
        model = copy.deepcopy(request.model).to("cuda", memory_format=torch.channels_last)
        x = request.x.to("cuda", memory_format=torch.channels_last)
        run = model if mode is None else torch.compile(model, mode=mode)

        def call() -> Tensor:
            y = run(x)
            torch.cuda.synchronize()
            return y

        return call

    return build


def _cuda_fastconv(request: Request) -> Call:
    import fastconv

    fast = fastconv.optimize(request.model).to("cuda")
    x = request.x.to("cuda", memory_format=torch.channels_last)

    def call() -> Tensor:
        y = fast(x)
        torch.cuda.synchronize()
        return y

    return call


CPU = {
    "fastconv": Engine("fastconv", fastconv, float32_only=False),
    "eager": Engine("eager", eager, float32_only=False),
    "eager_channels_last": Engine("eager channels_last", eager_channels_last, float32_only=False),
    "compile": Engine("torch.compile", compiled, float32_only=False),
    "onnxruntime": Engine("ONNX Runtime", onnxruntime, "onnx onnxruntime"),
    "openvino": Engine("OpenVINO", openvino, "onnx openvino"),
    "xnnpack": Engine("XNNPACK", xnnpack, "--no-deps executorch torchao"),
    "ncnn": Engine("ncnn", ncnn, "ncnn pnnx"),
    "mnn": Engine("MNN", mnn, "onnx MNN"),
}
CUDA = {
    "fastconv": Engine("fastconv", _cuda_fastconv, float32_only=False),
    "eager_channels_last": Engine("eager cuDNN channels_last", _cuda(None), float32_only=False),
    "compile": Engine("torch.compile max-autotune", _cuda("max-autotune-no-cudagraphs"), float32_only=False),
    "compile_graphs": Engine("torch.compile max-autotune, CUDA graphs", _cuda("max-autotune"), float32_only=False),
}


def table(device: str = "cpu") -> dict[str, Engine]:
    return CUDA if device == "cuda" else CPU


def built(engine: Engine, request: Request) -> Call:
    """The engine's call. Raises RuntimeError with a reason in one line where it cannot be built."""
    if engine.float32_only and request.x.dtype != torch.float32:
        raise RuntimeError("float32 only in this suite")
    try:
        request.folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            return engine.build(request)
    except ImportError as problem:
        raise RuntimeError(f"not installed ({problem}): pip install {engine.packages}") from None
    except Exception as problem:
        raise RuntimeError((str(problem).strip() or type(problem).__name__).splitlines()[0][:300]) from problem

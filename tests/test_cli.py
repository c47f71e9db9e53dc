"""The fastconv command: what it prints, what it refuses, and with which exit code."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastconv
from fastconv.benchmarks import measure
from fastconv.cli import machine, main, networks


def invoke(*arguments: str, code: int = 0):
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


def error_line(*arguments: str) -> str:
    """The last line of a command that must fail without a traceback."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code not in (0, None), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "gradient.png"
    ramp = np.linspace(0, 255, 300 * 260 * 3).reshape(300, 260, 3).astype(np.uint8)
    Image.fromarray(ramp).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "squeezenet1_1.pth"
    torch.save(fastconv.models.squeezenet1_1().state_dict(), path)
    return path


def test_help_lists_every_command():
    output = invoke("--help").output
    for command in ("demo", "classify", "bench", "claims", "profile", "explain", "doctor"):
        assert f"\n  {command} " in output
        invoke(command, "--help")


def test_python_m_fastconv_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "fastconv", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == invoke("--version").output


@pytest.mark.parametrize("arguments", [("classify", __file__, "--model", "resnet"), ("explain", "resnet"), ("demo", "--nets", "resnet")])
def test_an_unknown_model_lists_the_known_ones(arguments):
    line = error_line(*arguments)
    assert "unknown model 'resnet'" in line
    for name in networks.NAMES:
        assert name in line


def test_an_unknown_library_or_library_model_is_one_line():
    assert "write NAME, torchvision:NAME or timm:NAME" in error_line("explain", "keras:mobilenet")
    if networks.torchvision() is not None:
        assert "mobilenet_v2" in error_line("explain", "torchvision:mobilenet_v22")


def test_a_missing_or_unreadable_image_is_one_line(tmp_path):
    assert "nowhere.jpg" in error_line("classify", str(tmp_path / "nowhere.jpg"))
    text = tmp_path / "text.jpg"
    text.write_text("not an image")
    line = error_line("classify", str(text))
    assert line.startswith("Error: ")
    assert "text.jpg: not a readable image" in line


def test_missing_damaged_and_foreign_weights_are_one_line(tmp_path, photograph, checkpoint):
    assert "no such file: nowhere.pth" in error_line("classify", str(photograph), "--weights", "nowhere.pth")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot load weights" in error_line("classify", str(photograph), "--weights", str(damaged))
    line = error_line("classify", str(photograph), "--weights", str(checkpoint), "--model", "mobilenet_v2")
    assert "mobilenet_v2: cannot load weights" in line


def test_classify_prints_the_categories_of_the_model_itself(photograph, checkpoint):
    output = invoke("classify", str(photograph), "--model", "squeezenet1_1", "--weights", str(checkpoint), "--topk", "3").output
    model = fastconv.models.squeezenet1_1(weights=str(checkpoint)).eval()
    with torch.no_grad():
        probability = torch.fx.symbolic_trace(model)(networks.preprocess(Image.open(photograph), "squeezenet1_1")[None])[0].softmax(0)
    for value, index in zip(*probability.topk(3), strict=True):
        assert networks.categories()[int(index)] in output
        assert f"{float(value):.3f}" in output


def test_explain_has_a_row_for_the_first_and_the_last_layer():
    output = invoke("explain", "mobilenet_v2").output
    assert "features.0" in output
    assert "classifier" in output


@pytest.mark.parametrize("size", [(300, 260), (260, 300), (224, 224), (640, 427)])
def test_preprocess_is_torchvisions(size):
    vision = networks.torchvision()
    if vision is None:
        pytest.skip("torchvision is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = vision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()(image)
    torch.testing.assert_close(networks.preprocess(image, "mobilenet_v2"), expected, rtol=1e-5, atol=1e-5)


def test_photographs_come_with_scikit_image():
    photographs = networks.photographs()
    assert len(photographs) == len(networks.PHOTOGRAPHS)
    assert all(image.mode == "RGB" and min(image.size) >= 224 for image in photographs.values())


def test_random_networks_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = (networks.build("mobilenet_v2", pretrained=False) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert one.weights == "random, seed 0"
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True))


def test_every_engine_takes_its_turn_in_every_round():
    calls = []
    runs = {name: lambda name=name: calls.append(name) or sum(range(20000)) for name in ("eager", "eager_channels_last", "fastconv")}
    ticks = []
    samples = measure.interleave(runs, 4, lambda: ticks.append(1))
    assert len(ticks) == 4
    assert {name: len(times) for name, times in samples.items()} == dict.fromkeys(runs, 4)
    assert all(time > 0 for times in samples.values() for time in times)


def test_a_speed_up_is_the_median_of_the_rounds_ratios():
    summary = measure.summarise({"eager": [2.0, 40.0, 9.0], "fastconv": [1.0, 10.0, 3.0]})
    assert summary["speedup"] == {"eager": 3.0}
    assert summary["median_ms"] == {"eager": 9.0, "fastconv": 3.0}


def test_relative_error_is_the_worst_rows_and_a_nan_is_infinite():
    theirs = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    ours = theirs + torch.tensor([[0.0, 0.0], [0.0, 1e-3]])
    assert measure.relative_error(ours, theirs) == pytest.approx(1e-3)
    ours[0, 0] = torch.nan
    assert measure.relative_error(ours, theirs) == float("inf")


def test_demo_measures_classifies_and_draws(tmp_path):
    chart = tmp_path / "demo.png"
    arguments = ("demo", "--random", "--nets", "squeezenet1_1,mobilenet_v3_small", "--rounds", "1", "--out", str(chart))
    output = invoke(*arguments).output
    assert "Random weights" in output
    assert "astronaut" in output
    assert Image.open(chart).size[0] > 500

    document = json.loads(invoke(*arguments, "--json").stdout)
    assert document["machine"]["torch"] == torch.__version__
    assert [result["network"] for result in document["results"]] == ["squeezenet1_1", "mobilenet_v3_small"]
    for result in document["results"]:
        assert result["error"] <= document["error_bound"] == 1e-5
        assert result["agreement"] == 1.0
        assert set(result["speedup"]) == {"eager", "eager_channels_last"}
        assert all(len(times) == 1 for times in result["samples_ms"].values())


def test_demo_fails_when_the_logits_are_wrong(tmp_path, monkeypatch):
    class Wrong(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x) * (1 + 2e-5)

    monkeypatch.setattr(fastconv, "optimize", Wrong)
    arguments = ("demo", "--random", "--nets", "squeezenet1_1", "--rounds", "1", "--out", str(tmp_path / "demo.png"))
    assert "squeezenet1_1 differ from eager's by more than 1e-05" in error_line(*arguments)


@pytest.mark.parametrize("arguments", [("demo", "--out"), ("bench", "--json")])
def test_a_folder_that_is_not_there_is_refused_before_the_work_starts(tmp_path, arguments):
    assert "no such folder" in error_line(*arguments, str(tmp_path / "nowhere" / "file.png"))


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_an_empty_list_of_networks_is_refused(command):
    assert "no network in ','; models: mobilenet_v1" in error_line(command, "--nets", ",")


def test_demo_says_so_when_weights_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(url, file_name):
        raise OSError("no route to host")

    monkeypatch.setattr(networks, "_download", offline)
    result = invoke("demo", "--nets", "squeezenet1_1", "--rounds", "1", "--out", str(tmp_path / "demo.png"))
    assert "meaningless" in result.stdout
    if networks.torchvision() is not None:
        assert "Random weights (no route to host): squeezenet1_1." in result.stdout


@pytest.mark.parametrize("name", networks.NAMES)
def test_published_weights_are_loaded_when_they_can_be_had(name, monkeypatch):
    library = networks.timm() if name == "mobilenet_v1" else networks.torchvision()
    if library is None:
        pytest.skip("torchvision or timm is not installed")
    torch.manual_seed(7)
    state, _ = networks._construct(name)
    monkeypatch.setattr(networks, "_download", lambda url, file_name: state.state_dict() if url.startswith("https://") else None)
    network = networks.build(name)
    assert not network.weights.startswith("random")
    assert all(torch.equal(a, b) for a, b in zip(network.model.state_dict().values(), state.state_dict().values(), strict=True))


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "build", interrupt)
    assert error_line("demo", "--nets", "squeezenet1_1") == "Aborted!"


def test_bench_writes_json(tmp_path):
    path = tmp_path / "times.json"
    arguments = ("bench", "--nets", "squeezenet1_1", "--batch", "2", "--size", "64", "--rounds", "2", "--threads", "1")
    threads = torch.get_num_threads()
    try:
        assert "SqueezeNet 1.1" in invoke(*arguments, "--json", str(path)).output
        alone = json.loads(invoke(*arguments, "--json", "-").stdout)
    finally:
        torch.set_num_threads(threads)
    document = json.loads(path.read_text())
    assert document.keys() == alone.keys()
    [cell] = document["cells"]
    assert (cell["batch"], cell["size"], cell["threads"]) == (2, 64, 1)
    assert cell["engines"]["fastconv"]["relative_error"] <= 1e-5
    assert len(cell["engines"]["fastconv"]["samples_ms"]) == 2


def test_doctor_reports_what_is_in_use(monkeypatch):
    monkeypatch.setenv("FASTCONV_EXAMPLE", "17")
    report = json.loads(invoke("doctor", "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["environment"]["FASTCONV_EXAMPLE"] == "17"
    extension = machine.compiled()
    if extension is not None:
        assert report["extension"]["isa in use"] == extension.isa()
    output = invoke("doctor").output
    for section in report:
        if section != "warnings":
            assert section in output


def test_doctor_warns_about_two_openmp_runtimes(monkeypatch):
    monkeypatch.setattr(machine, "openmp_runtimes", lambda: ["/a/libgomp.so.1", "/b/libiomp5.so"])
    assert "2 OpenMP runtimes are loaded (/a/libgomp.so.1, /b/libiomp5.so)" in invoke("doctor").output


def test_doctor_works_without_the_extension():
    script = "import sys; sys.modules['fastconv._C'] = None; from fastconv.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the compiled extension is missing" in done.stdout

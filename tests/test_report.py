"""The report on synthetic documents, and the counts of the claims' networks against known figures."""

import re

import pytest
import torch
from rich.console import Console

from fastconv.benchmarks import claims, report
from fastconv.benchmarks.report.view import LEVEL, LOST, WON, View

HOSTILE = '<script>alert("1")</script> $\\frac{ [bold]x[/]'


def engine(ms, **more):
    return dict(median_ms=ms, q1_ms=ms * 0.98, q3_ms=ms * 1.03, min_ms=ms * 0.95, samples_ms=[ms], **more)


def cell(network, times, ratios, **more):
    known = dict(network=network, batch=1, size=224, threads=2, dtype="float32", missing={})
    engines = {name: engine(ms) for name, ms in times.items()}
    return known | dict(engines=engines, ratios={k: dict(median=m, low=lo, high=hi) for k, (m, lo, hi) in ratios.items()}) | more


def document(**more):
    won = cell("mobilenet_v2", {"fastconv": 3.456, "openvino": 4.561}, {"openvino": (1.32, 1.29, 1.35)})
    lost = cell("squeezenet1_0", {"fastconv": 5.0, "ncnn": 4.0, "eager": 9.0}, {"ncnn": (0.80, 0.78, 0.82), "eager": (1.8, 1.7, 1.9)})
    return dict(schema=1, kind="networks", title="A run", date="2026-11-24", command="fastconv bench --nets x", cells=[won, lost]) | more


def page(document, folder):
    paths = report.write(document, folder)
    assert all(path.stat().st_size > 0 for path in paths)
    return (folder / "report.html").read_text()


def printed(document):
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    report.print_tables(document, console)
    return console.export_text()


@pytest.mark.parametrize("empty", [None, [], {}])
def test_absent_sections_leave_a_page(tmp_path, empty):
    names = ("machine", "noise", "roofline", "cells", "layers", "scaling", "claims")
    text = page(dict.fromkeys(names, empty) | {"schema": 1}, tmp_path)
    assert "No network was timed" in text
    assert printed({"schema": 1}).strip() == ""


@pytest.mark.parametrize("wrong", [{}, {"schema": 2}, []])
def test_another_document_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="wanted a benchmark document with schema 1"):
        report.write(wrong, tmp_path)


def test_a_loss_is_shown_as_plainly_as_a_win(tmp_path):
    view = View(document())
    assert view.verdicts == {WON: 1, LOST: 1, LEVEL: 0}
    assert view.headline == pytest.approx((1.32 * 0.80) ** 0.5)
    for text in (page(document(), tmp_path), printed(document())):
        assert "0.80" in text
        assert "1.32" in text
        assert "lost" in text
        assert "ncnn" in text
        assert "0.78 to 0.82" in text


def test_an_interval_that_holds_1_is_neither_won_nor_lost():
    level = [cell("mobilenet_v1", {"fastconv": 1.0, "mnn": 0.99}, {"mnn": (0.99, 0.97, 1.01)})]
    assert View(document(cells=level)).verdicts == {WON: 0, LOST: 0, LEVEL: 1}


def test_the_best_peer_is_the_hardest_to_beat():
    assert [c.best_peer for c in View(document()).cells] == ["openvino", "ncnn"]


def test_a_noisy_machine_gets_a_banner_and_fewer_digits(tmp_path):
    noisy = document(noise=dict(quiet=False, steal_percent=7.0, reasons=["steal time 7.0%"]))
    text = page(noisy, tmp_path)
    assert "steal time 7.0%" in text
    assert "The machine was noisy" in text
    assert "1.32×" not in text
    assert "1.3×" in text
    assert "3.46" not in text
    assert "noisy" in printed(noisy)
    quiet = page(document(noise=dict(quiet=True)), tmp_path)
    assert "The machine was noisy" not in quiet
    assert "1.32×" in quiet
    assert "3.46" in quiet


def test_a_missing_engine_is_named_with_its_reason(tmp_path):
    cells = document()["cells"]
    cells[0]["missing"] = {"mnn": "not installed: pip install MNN"}
    for text in (page(document(cells=cells), tmp_path), printed(document(cells=cells))):
        assert "MNN" in text
        assert "not installed: pip install MNN" in text


def test_hostile_strings_are_escaped(tmp_path):
    cells = [cell(HOSTILE, {"fastconv": 1.0, HOSTILE: 2.0}, {HOSTILE: (2.0, 1.9, 2.1)}, missing={"mnn": HOSTILE})]
    hostile = document(title=HOSTILE, command=HOSTILE, machine=dict(cpu=HOSTILE, versions={HOSTILE: HOSTILE}), cells=cells)
    text = page(hostile, tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "[bold]x[/]" in printed(hostile)


def test_the_page_is_self_contained_and_has_every_chart(tmp_path):
    layers = [
        dict(network="mobilenet_v2", layer=f"features.{i}", op="pointwise", us=9.0, share=0.1, gflops=50.0 + i, intensity=4.0 + i)
        for i in range(3)
    ]
    scaling = [dict(network="mobilenet_v2", axis="batch", value=n, engines={"fastconv": 3.0 * n, "ncnn": 4.0 * n}) for n in (1, 4, 16)]
    roofs = dict(isa={"avx512": {"fma_gflops": 249.0}}, bandwidth_gbs={"L1": 400.0, "DRAM": 20.0}, threads=1)
    text = page(document(layers=layers, scaling=scaling, roofline=roofs), tmp_path)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", text)
    assert text.count("<svg") == 2 + 2 + 2  # bars; a roofline and its key; a scaling chart and its key
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "networks-batch1-threads2-size224-float32.png",
        "roofline.png",
        "scaling-batch.png",
    }


COUNTS = {
    "alexnet": 61_100_840,
    "squeezenet1_0": 1_248_424,
    "squeezenet1_1": 1_235_496,
    "squeezenet1_1_late_pools": 1_235_496,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
}


@pytest.mark.parametrize("key", COUNTS)
def test_parameters(key):
    assert claims.parameters(claims.NETWORKS[key][1]()) == COUNTS[key]


def test_multiply_adds_are_those_of_the_papers():
    x = torch.zeros(1, 3, 224, 224)
    millions = {key: claims.multiply_adds(claims.plain(claims.NETWORKS[key][1]()), x) / 1e6 for key in ("squeezenet1_1", "mobilenet_v1")}
    assert millions["squeezenet1_1"] == pytest.approx(349, abs=1)
    assert millions["mobilenet_v1"] == pytest.approx(569, abs=1)


def test_peak_activations_of_a_chain_are_its_largest_neighbours():
    chain = claims.plain(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(inplace=True), torch.nn.Conv2d(8, 4, 1)))
    assert claims.peak_activation_bytes(chain, torch.zeros(1, 3, 10, 10)) == (3 + 8 + 4) * 100 * 4  # the caller keeps the input

"""fastconv tune and what it writes: the model's table, measured choices, and a machine without a GPU."""

import contextlib
import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from fastconv.benchmarks import blocks, tuner
from fastconv.benchmarks.tuner import worth_trying
from fastconv.cli import main
from fastconv.kernels.gpu import configs, model, tuned

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture
def fresh():
    """Choices are kept for the life of a process; here they change."""
    configs.choice.cache_clear()
    configs.config.cache_clear()
    yield
    configs.choice.cache_clear()
    configs.config.cache_clear()


def run(*arguments):
    return CliRunner().invoke(main, ["tune", *arguments])


@no_gpu
def test_without_a_gpu_it_says_so(tmp_path):
    result = run("--out", str(tmp_path / "table.json"))
    assert result.exit_code == 1
    assert "sees no GPU" in result.output
    assert isinstance(result.exception, SystemExit)
    assert not list(tmp_path.iterdir())


def test_arch_goes_with_the_model():
    result = run("--arch", "sm_80")
    assert result.exit_code == 2
    assert "--model" in result.output


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_the_models_table(arch):
    result = run("--model", "--arch", arch)
    assert result.exit_code == 0, result.output
    assert "not a measurement" in result.output
    for row in blocks.modelled(arch):
        assert row["fused"] == row["floor"] <= row["parts"], row
        assert row["layer"] in result.output
        times = [row[name] for name in ("fused_us", "split_us", "parts_us") if name in row]
        assert (row["form"] == "in parts") == (row["parts_us"] < min(times[:-1])), row
        assert row["form"].startswith("split ") == ("split_us" in row and row["split_us"] == min(times) < row["fused_us"]), row
        assert row["form"] in result.output


def test_bytes_by_hand():
    """MobileNet V2's features.3: 24 channels in and out at 56 x 56, 144 between, bf16."""
    (row,) = [row for row in blocks.modelled("sm_90") if (row["net"], row["layer"]) == ("mobilenet_v2", "features.3.conv")]
    pixels = 56 * 56
    assert row["floor"] == pixels * (24 + 24) * 2
    # expand reads 24 and writes 144, depthwise reads and writes 144, project reads 144 and writes 24
    assert row["parts"] == pixels * (24 + 144 + 144 + 144 + 144 + 24) * 2
    assert row["split"] == pixels * (24 + 144 + 144 + 24) * 2  # the depthwise result stays inside


def test_the_networks_blocks_are_all_there():
    counts = {}
    for block in blocks.blocks():
        key = block.net, block.problem.op
        counts[key] = counts.get(key, 0) + block.count
    assert counts["mobilenet_v1", "separable"] == 13
    assert counts["mobilenet_v2", "inverted_residual"] == 16
    assert counts["squeezenet1_1", "fire"] == counts["squeezenet1_0", "fire"] == 8
    assert counts["squeezenet1_1", "fire_pool"] == counts["squeezenet1_0", "fire_pool"] == 2
    assert counts["squeezenet1_1", "stem_pool"] == 1  # 1.0's window is seven steps of the product
    assert counts["mobilenet_v3_large", "expand_depthwise"] + counts["mobilenet_v3_large", "inverted_residual"] == 14
    assert all((net, "stem") in counts for net in {net for net, _ in counts})


def test_more_rows_a_lane_recompute_less():
    """A lane that marches over four rows computes an expanded value 4.5 times, one row at a time 9 times."""
    problem = configs.Problem("inverted_residual", "bf16", 56, 56, 24, 24, 3, (1, 1), (1, 1), 144)
    for run, times in ((1, 9), (4, 4.5)):
        tile = configs.BlockTile(run, 64, 32, 16, 8, 32)
        pixels = tile.tiles(56, 56) * 64 * run
        assert model.work(problem, tile).tensor == pixels * 144 * (times * 32 + 32)  # 24 channels are 32 to a tensor core


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_tiles_worth_trying(arch):
    for block in blocks.blocks():
        tiles = worth_trying(block.problem, arch)
        assert tiles[0] == model.best(block.problem, arch)
        assert set(tiles) <= {*configs.TABLES[block.problem.op][arch]["half"], *configs.staged(block.problem, arch)}
        assert all(model.resident_warps(block.problem, tile) >= tile.num_warps for tile in tiles)


def test_the_half_that_follows_an_expand():
    """It is the problem that the second kernel's launcher would name, and has tiles of its own."""
    problem = configs.Problem("inverted_residual", "bf16", 7, 6, 24, 40, 5, (2, 2), (2, 2), 144, (13, 11))
    assert problem.after_expand == configs.Problem("separable", "bf16", 7, 6, 144, 40, 5, (2, 2), (2, 2), 0, (13, 11))
    square = configs.Problem("inverted_residual", "bf16", 7, 7, 24, 40, 3, (1, 1), (1, 1), 144)
    assert square.after_expand.size == (7, 7)
    form = configs.Split(model.best(square.after_expand, "sm_90"))
    assert model.split_seconds(square, form.tile, "sm_90") > 0
    assert configs.text(form).startswith("split ")


def test_every_form_is_timed():
    for block in blocks.blocks():
        forms = tuner.forms(block.problem, "sm_90")
        assert len(set(forms)) == len(forms)
        assert any(isinstance(form, configs.Split) for form in forms) == (block.problem.op == "inverted_residual")
        assert (None in forms) == (block.problem.op != "stem")
        assert (configs.ATEN in forms) == (block.problem.op != "expand_depthwise")


def test_a_split_choice(tmp_path, monkeypatch, fresh):
    problem = configs.Problem("inverted_residual", "bf16", 14, 14, 32, 64, 3, (1, 1), (1, 1), 192)
    split = configs.Split(configs.TABLES["separable"]["sm_90"]["half"][3])
    assert tuned.row(split) == ["split", 2, 64, 128, 32, 8, 0, 1]
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"arch": "sm_90", "choices": {tuned.key(problem): tuned.row(split)}}))
    monkeypatch.setenv("FASTCONV_TUNED", str(file))
    assert configs.choice(problem, "sm_90") == split
    assert configs.text(split) == "split 2x64x128x32"
    assert configs.config(problem, "sm_90") == model.best(problem, "sm_90")  # of the one kernel, asked for by name


def test_staged_choices(tmp_path, monkeypatch, fresh):
    """Of both kinds, alone and as the second half of a split block."""
    block = configs.Problem("inverted_residual", "bf16", 56, 56, 24, 24, 3, (1, 1), (1, 1), 144)
    fire = configs.Problem("fire", "bf16", 13, 13, 512, 256, 3, (1, 1), (1, 1), 64)
    tile, fire_tile = configs.STAGED[3, 1][1], configs.STAGED_FIRE[0]
    other = configs.Problem("inverted_residual", "bf16", 28, 28, 24, 24, 3, (1, 1), (1, 1), 144)
    forms = {block: tile, fire: fire_tile, other: configs.Split(tile)}
    assert tuned.row(tile) == ["staged", 2, 7, 14, 32, 4, 168, 0]
    assert tuned.row(fire_tile) == ["staged", 64, 64, 8, 0]
    assert tuned.row(forms[other]) == ["split", "staged", 2, 7, 14, 32, 4, 168, 0]
    file = tmp_path / "table.json"
    choices = {tuned.key(problem): tuned.row(form) for problem, form in forms.items()}
    file.write_text(json.dumps({"arch": "sm_90", "choices": choices}))
    monkeypatch.setenv("FASTCONV_TUNED", str(file))
    assert {problem: configs.choice(problem, "sm_90") for problem in forms} == forms
    assert configs.config(block, "sm_90") == tile
    assert configs.text(tile) == "staged 14x14x32"
    assert configs.text(forms[other]) == "split staged 14x14x32"


SPLIT_ROWS = [
    ("inverted_residual bf16 a", ["split", 2, 64, 128], "null, 'aten', 7 ints or 'staged' and 7, after 'split' or not"),
    ("inverted_residual bf16 a", ["parts", 2, 64, 128, 32, 8, 0, 1], "null, 'aten', 7 ints or 'staged' and 7, after 'split' or not"),
    ("inverted_residual bf16 a", ["split", 2, 64, 128, 32, 8, 0, True], "7 ints"),
    ("inverted_residual bf16 a", [], "7 ints"),
    ("separable bf16 a", ["staged", 2, 7, 14, 32, 4], "'staged' and 7"),
    ("fire bf16 a", ["staged", 2, 7, 14, 32, 4, 0, 0], "'staged' and 4"),
    ("stem bf16 a", ["staged", 64, 64, 8, 0], "7 ints"),
    ("separable bf16 a", ["split", 2, 64, 128, 32, 8, 0, 1], "null, 'aten', 7 ints or 'staged' and 7, got"),
]


@pytest.mark.parametrize(("name", "row", "message"), SPLIT_ROWS, ids=str)
def test_a_row_that_is_no_form(name, row, message, tmp_path, monkeypatch, fresh):
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"arch": "sm_90", "choices": {name: row}}))
    monkeypatch.setenv("FASTCONV_TUNED", str(file))
    with pytest.raises(ValueError, match=message):
        configs.choice(configs.Problem("head", "bf16", 7, 7, 32, 64), "sm_90")


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_a_table_that_ships(arch):
    """Every row is a form, of a block of the networks, with a tile that the tests compile. There need not be a table."""
    assert {file.stem for file in (Path(configs.__file__).parent / "tables").glob("*")} <= set(configs.ARCHITECTURES)
    table = tuned._table(arch, None)
    known = {tuned.key(block.problem): block.problem for dtype in ("bf16", "f16", "f32", "tf32") for block in blocks.blocks(dtype)}
    for name in table:
        problem, form = known[name], tuned.choice(known[name], arch).form
        if isinstance(form, configs.Split):
            problem, form = problem.after_expand, form.tile
        if isinstance(form, configs.BlockTile):
            assert form in configs.TABLES[problem.op][arch][configs.kind(problem)], name
        elif form not in (None, configs.ATEN):
            assert form in configs.staged(problem, arch), name


def test_tables_ship_in_a_wheel(tmp_path, monkeypatch):
    """A checkout with one table: setuptools takes it along with the modules."""
    setuptools = pytest.importorskip("setuptools")
    checkout = Path(__file__).parents[1]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout / name, tmp_path)
    (tmp_path / "kernels/gpu/tables").mkdir(parents=True)
    (tmp_path / "kernels/gpu/tables/sm_90.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    distribution = setuptools.Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    build = distribution.get_command_obj("build_py")
    build.set_undefined_options = lambda *_: None  # those of a build, which would look for every package
    build.build_lib, build.force = "lib", False
    build.ensure_finalized()
    files = {package: names for package, _, _, names in build.data_files}
    assert files["fastconv.kernels.gpu"] == ["tables/sm_90.json"]


def test_a_measured_choice_goes_before_the_models(tmp_path, monkeypatch, fresh):
    problem = configs.Problem("separable", "bf16", 14, 14, 32, 64, 3, (1, 1), (1, 1))
    tile = configs.TABLES["separable"]["sm_90"]["half"][3]
    assert model.best(problem, "sm_90") != tile
    for row, wanted in ((tuned.row(tile), tile), (None, None), ("aten", configs.ATEN)):
        file = tmp_path / f"{type(wanted).__name__}.json"
        file.write_text(json.dumps({"device": "a test", "arch": "sm_90", "choices": {tuned.key(problem): row}}))
        monkeypatch.setenv("FASTCONV_TUNED", str(file))
        configs.choice.cache_clear()
        assert configs.choice(problem, "sm_90") == wanted
        assert configs.choice(problem, "sm_80") != tile  # another architecture's table
    assert configs.config(problem, "sm_90") == model.best(problem, "sm_90")  # a tile even where parts are faster


def test_what_it_writes_is_what_fastconv_reads(tmp_path, monkeypatch, fresh):
    """The command with the measuring replaced: a second run adds to the table, and the choices are then in force."""
    problems = [configs.Problem("separable", dtype, 14, 14, 32, 64, 3, (1, 1), (1, 1)) for dtype in ("bf16", "f16")]
    tile = configs.TABLES["separable"]["sm_90"]["half"][-1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file = tmp_path / "table.json"
    for problem, choice in zip(problems, (tile, None)):

        def measure(dtype, batch, seconds, say, problem=problem, choice=choice):
            assert (dtype, batch, seconds) == (problem.dtype, 64, 120)
            name = tuned.key(problem)
            rest = {"device": "a test", "arch": "sm_90", "dtype": dtype, "microseconds": {name: {"fused": 1.0, "parts": 2.0}}}
            return rest | {"choices": {name: tuned.row(choice)}}

        monkeypatch.setattr(tuner, "measure", measure)
        result = run("--out", str(file), "--dtype", problem.dtype, "--batch", "64", "--minutes", "2")
        assert result.exit_code == 0, result.output
        assert f"FASTCONV_TUNED={file}" in result.output.replace("\n", "")
    monkeypatch.setenv("FASTCONV_TUNED", str(file))
    configs.choice.cache_clear()
    assert [configs.choice(problem, "sm_90") for problem in problems] == [tile, None]


@pytest.mark.parametrize("text", ["no JSON", "{}", '{"arch": "sm_90", "choices": {"a": [1, 2]}}', '{"arch": "sm_90", "choices": 3}'])
def test_a_broken_table_is_an_error(text, tmp_path, monkeypatch, fresh):
    file = tmp_path / "table.json"
    file.write_text(text)
    monkeypatch.setenv("FASTCONV_TUNED", str(file))
    with pytest.raises(ValueError, match=r"FASTCONV_TUNED: .*table\.json"):
        configs.choice(configs.Problem("head", "bf16", 7, 7, 32, 64), "sm_90")


def test_a_missing_table_is_an_error(tmp_path, monkeypatch, fresh):
    monkeypatch.setenv("FASTCONV_TUNED", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"FASTCONV_TUNED: .*none\.json"):
        configs.choice(configs.Problem("head", "bf16", 7, 7, 32, 64), "sm_90")


class Cuda:
    """Events and graphs on a clock that only runs move: a launch takes 20 us, a kernel 5."""

    def __init__(self, monkeypatch, captures=True):
        self.now, self.replays, self.calls, self.capturing, self.captures = 0.0, 0, 0, False, captures
        self.stream = "the caller's"
        fakes = {"Event": self.event, "CUDAGraph": lambda: self, "graph": self.graph, "synchronize": lambda: None}
        fakes |= {"current_stream": lambda: self.stream, "set_stream": lambda stream: setattr(self, "stream", stream)}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing, self.calls, self.stream = True, 0, "its own"
        yield  # nothing is put back where a capture fails, as in torch
        self.capturing, self.stream = False, "the caller's"

    def replay(self):
        self.replays += 1
        self.now += 5 * self.calls

    def run(self):
        if self.capturing and not self.captures:
            self.capturing = False
            raise RuntimeError("operation not permitted when stream is capturing")
        self.calls += 1
        self.now += 0 if self.capturing else 20


def test_a_launch_is_no_part_of_a_time(monkeypatch):
    cuda = Cuda(monkeypatch)
    assert tuner.timed(cuda.run, 7) == (pytest.approx(5), True)
    assert cuda.calls == tuner.CALLS
    assert cuda.replays == 1 + 7
    assert tuner.cuda_clock(cuda.run) == pytest.approx(5)
    assert gc.isenabled()


def test_long_calls_are_not_repeated_in_a_graph(monkeypatch):
    cuda = Cuda(monkeypatch)

    def run():
        cuda.run()
        cuda.now += 0 if cuda.capturing else 3000

    tuner.timed(run, 7)
    assert cuda.calls == 1


def test_what_cannot_be_captured_is_timed_call_by_call(monkeypatch):
    cuda, flushed = Cuda(monkeypatch, captures=False), []
    assert tuner.timed(cuda.run, 7, lambda: flushed.append(1)) == (pytest.approx(20), False)
    assert len(flushed) == 7
    assert not cuda.replays
    assert gc.isenabled()
    assert cuda.stream == "the caller's"

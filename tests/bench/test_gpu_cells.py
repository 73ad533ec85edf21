"""The cells of the GPU benchmark, how they are picked, and the floors of their times."""

import sys
from pathlib import Path

import pytest

# Cells and floors --------------------------------------------------------------------------------


def test_all_that_is_quick_comes_first_and_of_it_what_the_targets_need(programs):
    contenders, schedule = programs.contenders, programs.bench.schedule()
    cells, builders = zip(*schedule, strict=True)
    assert builders == (contenders.QUICK,) * 31 + (contenders.COMPILED,) * 11
    assert len(set(cells[:31])) == 31
    assert cells[:11] == cells[31:]
    targets = programs.cells.TARGETS
    needed = {(t.net, t.n, precision) for t in targets for precision in t.precisions}
    assert {(cell.problem.name, *cell[1:]) for cell in cells[:11]} == needed
    for target in targets:
        assert target.n in programs.cells.ROWS[target.net]


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["2-10-5-1"], 4),
        (["2-10-5-1:float32"], 4),
        (["tf32"], 9),
        (["10000000"], 4),
        (["64-64-64-1:10000000:bfloat16"], 1),
        (["bfloat16:10000000:64-64-64-1", "10000000:bfloat16"], 1),
        (["784-128-64-10:tf32", "2-10-5-1:1"], 3),
    ],
)
def test_cells_are_picked_by_their_parts(programs, patterns, count):
    found = programs.cells.matching(patterns)
    assert len(found) == count
    for found_cell in found:
        parts = {found_cell.problem.name, str(found_cell.n), found_cell.precision}
        assert any(set(pattern.split(":")) <= parts for pattern in patterns)
    quick = [c for c, builders in programs.bench.schedule(patterns) if "prepared" in builders]
    assert quick == found


@pytest.mark.parametrize("pattern", ["2-10-5", "2-10-5-1:tf32", "1e7", "", "2-10-5-1 :1"])
def test_a_pattern_without_a_cell_is_refused(programs, pattern):
    with pytest.raises(ValueError, match=r"no cell matches .*2-10-5-1:float32; nets: 2-10-5-1, "):
        programs.cells.matching(["64-64-64-1", pattern])


def test_contenders_are_picked_by_name(programs):
    pattern = ["784-1024-1024-10:100000:tf32"]
    ((_, quick),) = programs.bench.schedule(pattern, ["bound", "torch"])
    assert quick == {name: programs.contenders.QUICK[name] for name in ("bound", "torch")}
    ((_, compiled),) = programs.bench.schedule(pattern, ["torch_compile"])
    assert list(compiled) == ["torch_compile"]


def test_the_command_line(programs, monkeypatch, capsys):
    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
        return programs.bench.arguments()

    assert parsed() == (programs.bench.schedule(), None)
    todo, path = parsed("--cells", "2-10-5-1:1", "--contenders", "bound", "--json", "a.json")
    cell = programs.cells.Cell(programs.cells.NETS["2-10-5-1"], 1, "float32")
    assert [(picked, list(builders)) for picked, builders in todo] == [(cell, ["bound"])]
    assert path == Path("a.json")
    for wrong, message in (("--cells 3-3", "no cell matches '3-3'"), ("--contenders me", "me")):
        with pytest.raises(SystemExit) as ended:
            parsed(*wrong.split())
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("net", "bytes_per_row", "operations", "special"),
    [
        ("2-10-5-1", 12, 410, 30),
        ("64-64-64-1", 260, 41_344, 256),
        ("784-128-64-10", 3_144, 454_400, 10),
        ("4096-4096-4096-4096-4096", 32_768, 369_098_752, 0),
    ],
)
def test_the_work_of_a_row(programs, net, bytes_per_row, operations, special):
    net = programs.bench.NETS[net]
    arguments = (net.sizes, net.activation, net.loss)
    one, three = (programs.floors.work(*arguments, n, "float32") for n in (1, 3))
    assert three.bytes - one.bytes == 2 * bytes_per_row
    assert (one.operations, one.special) == (operations, special)
    assert (three.operations, three.special) == (3 * operations, 3 * special)


def test_parameters_come_in_and_gradients_go_out(programs):
    for precision, itemsize in (("float32", 4), ("tf32", 4), ("bfloat16", 2)):
        needed = programs.floors.work((2, 10, 5, 1), "tanh", "squared_error", 0, precision)
        assert needed == (91 * (itemsize + 4), 0, 0, False)


def test_the_floor_is_the_slowest_of_three(programs):
    def floor(*needed, precision="tf32", wide=True):
        work = programs.floors.Work(*needed, fills_tiles=wide)
        return programs.floors.floor(work, programs.limits, precision)

    assert floor(8 * 10**12, 1, 1) == floor(1, 8 * 10**14, 1) == floor(1, 1, 8 * 10**12) == 2.0
    assert floor(1, 8 * 10**14, 1, precision="float32") == 3.0  # three products of half
    assert floor(1, 8 * 10**14, 1, precision="float32", wide=False) == 16.0

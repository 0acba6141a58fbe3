"""The stack of linear layers that is timed without an engine: its arithmetic, its checks and its results."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from pathlib import Path

import pytest
import torch

from benchmarks.common.results import read
from benchmarks.kernels import decode_stack
from benchmarks.kernels.decode_stack import (
    TINY,
    DenseFp8,
    Stack,
    Step,
    check,
    definition,
    in_turn,
    main,
    relative_error,
    unit_layer,
)
from benchmarks.kernels.shapes import layer_spec
from vllm_spense.ops import select_backend
from vllm_spense.ops.backend import Tensors
from vllm_spense.ops.linear.reference import decompressed

CPU = torch.device("cpu")
LAYERS = 3


@pytest.fixture
def stacks() -> dict[str, Stack]:
    dense = Stack.make(TINY, 1.0, LAYERS, CPU)
    return {"dense": dense, "spense": Stack.make(TINY, 0.5, LAYERS, CPU, beside=dense)}


def product(stack: Stack, kind: str, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Token by token: x rounded to e4m3 with its own scale, times the whole weight in fp64."""
    spec = stack.specs[kind]
    tensors = unit_layer(spec, CPU, layer)
    weight = decompressed(spec, tensors).double() * tensors["weight_scale"].double()[:, None]
    rows = []
    for token in x.float():
        scale = token.abs().max() / 448
        rows.append(weight @ ((token / scale).to(torch.float8_e4m3fn).double() * scale))
    return torch.stack(rows).bfloat16()


def slow(stack: Stack, tokens: int) -> torch.Tensor:
    """The same layers without the code under test."""

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x.float() / (x.float() ** 2).mean(1, keepdim=True).add(1e-6).sqrt()).bfloat16()

    attention, residual = stack.inputs(tokens)
    for layer in range(LAYERS):
        residual = residual + product(stack, "o", layer, attention)
        both = product(stack, "gate_up", layer, norm(residual))
        gate, up = both[:, : TINY.intermediate], both[:, TINY.intermediate :]
        residual = residual + product(stack, "down", layer, torch.nn.functional.silu(gate) * up)
        attention = product(stack, "qkv", layer, norm(residual))[:, : TINY.heads * TINY.head_size]
    return residual


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_stack_is_what_its_layers_are(stacks: dict[str, Stack], tokens: int, compiler: str | None) -> None:
    torch.compiler.reset()
    for name, stack in stacks.items():
        start = stack.inputs(tokens)[1]
        with torch.no_grad():
            found = stack.run(stack.step(compiler), stack.inputs(tokens)) - start
        want = slow(stack, tokens) - start
        assert want.float().norm() > start.float().norm(), "layers that add nothing prove nothing"
        assert relative_error(found, want) < 0.02, name


def test_stacks_differ_in_their_mlps_alone(stacks: dict[str, Stack]) -> None:
    attention = (256 + 2 * 128) * 256 + 256 * 256
    mlp = 3 * 256 * 512
    assert stacks["dense"].weight_bytes() == LAYERS * (attention + mlp)
    assert stacks["spense"].weight_bytes() == LAYERS * (attention + mlp - mlp * 3 // 16)
    for kind in ("qkv", "o"):
        a, b = (stack.layers[1][kind]["weight"] for stack in stacks.values())
        assert a.data_ptr() == b.data_ptr()
    assert not stacks["dense"].specs["down"].hybrid
    assert stacks["spense"].specs["down"].hybrid


@pytest.mark.parametrize("tokens", [1, 32])
def test_the_dense_product(tokens: int) -> None:
    spec = layer_spec(TINY, "qkv", 1.0)
    tensors = unit_layer(spec, CPU, 0)
    tensors["weight_scale"].copy_(torch.linspace(1e-4, 2e-4, spec.out_features))
    x = torch.randn(tokens, spec.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    x *= torch.linspace(1, 3, tokens)[:, None].bfloat16()
    dense = DenseFp8()
    y = dense.apply(spec, dense.prepare(spec, tensors), x, None)
    assert relative_error(y, definition(spec, tensors, x, torch.float32)) < 4e-3


@torch.no_grad()
def test_a_wrong_layer_is_not_timed(stacks: dict[str, Stack]) -> None:
    dense, spense = stacks.values()
    step = dense.step(None)
    right = dense.run(step, dense.inputs(4))
    assert max(check("dense", dense, step, 4, right).values()) < 0.02
    with pytest.raises(ArithmeticError, match="dense, 4 tokens: graph has a relative error of"):
        check("dense", dense, step, 4, dense.inputs(4)[1])
    with pytest.raises(ArithmeticError, match="graph has a relative error of nan"):
        check("dense", dense, step, 4, right * float("nan"))
    with pytest.raises(ArithmeticError, match="step has a relative error of"):
        check("spense", spense, step_of_another(step, dense.layers), 4, right)
    with pytest.raises(ArithmeticError, match="step has a relative error of nan"):
        check("dense", dense, not_a_number_in_the_last(step, dense.layers), 4, right)
    for kind in ("qkv", "down"):
        scale = dense.layers[2][kind]["weight_scale"]
        scale.mul_(1.3)
        with pytest.raises(ArithmeticError, match="step has a relative error of"):
            check("dense", dense, step, 4, right)
        scale.div_(1.3)
    spense.layers[0]["gate_up"]["weight_scale"].mul_(1.02)
    with pytest.raises(ArithmeticError, match=r"gate_up has a relative error of 2\.0.e-02"):
        check("spense", spense, spense.step(None), 4, right)
    dense.layers[0]["o"]["weight_scale"].mul_(1.06)
    with pytest.raises(ArithmeticError, match=r"o has a relative error of 6\.0.e-02"):
        check("dense", dense, step, 4, right)


def step_of_another(step: Step, layers: list[dict[str, Tensors]]) -> Step:
    """The step on another stack's weights, layer by layer."""
    weights = cycle(layers)
    return lambda tensors, *inputs: step(next(weights), *inputs)


def not_a_number_in_the_last(step: Step, layers: list[dict[str, Tensors]]) -> Step:
    def broken(tensors: dict[str, Tensors], *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv, residual = step(tensors, *inputs)
        return (qkv * float("nan") if tensors is layers[-1] else qkv), residual

    return broken


def test_results_hold_what_a_report_needs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = tmp_path / "stack.json"
    common = ["--rehearse", "--layers", "2", "--repeats", "3", "--results", str(results)]
    main([*common, "--tokens", "2"])
    main([*common, "--tokens", "2", "3"])
    out = capsys.readouterr().out
    assert out.count("tiny/2/0.5/2: ") == 1, "what is known is not measured again"
    assert out.count("tiny/2/0.5/3: ") == 1
    found = read(results)["stacks"]
    assert list(found) == ["tiny/2/0.5/2", "tiny/2/0.5/3"]
    entry = found["tiny/2/0.5/3"]
    turns = entry["turns_us"]
    assert [len(turns[name]) for name in ("dense", "spense")] == [3, 3]
    assert entry["us"] == {name: sorted(turns[name])[1] for name in turns}
    assert entry["speed_up"] == pytest.approx(entry["us"]["dense"] / entry["us"]["spense"])
    low, high = entry["speed_up_range"]
    assert low <= high
    assert set(entry["relative_errors"]["spense"]) == {"gate_up", "down", "qkv", "o", "step", "graph"}
    assert entry["backends"]["dense"]["down"] == "scaled_mm" != entry["backends"]["spense"]["down"]
    assert (entry["layers"], entry["tokens"], entry["cuda_graph"]) == (2, 3, False)
    assert {"command", "commit", "date", "versions", "device"} <= set(entry["made"])


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A takes 2 s, B 3 s, each the first time 10 s more."""
    clock, order = [0.0], []

    def call(name: str, seconds: float) -> None:
        clock[0] += seconds + 10 * (name not in order)
        order.append(name)

    monkeypatch.setattr(decode_stack.time, "perf_counter", lambda: clock[0])
    calls = {"a": partial(call, "a", 2.0), "b": partial(call, "b", 3.0)}
    assert in_turn(calls, 2, on_gpu=False) == {"a": [2e6, 2e6], "b": [3e6, 3e6]}
    assert order == ["a", "b"] * 3


def test_the_table() -> None:
    entry = {
        "tokens": 32,
        "us": {"dense": 2000.0, "spense": 1600.0},
        "weight_bytes": {"dense": 8_000_000_000, "spense": 6_400_000_000},
        "speed_up": 1.25,
        "speed_up_range": [1.2, 1.3],
    }
    lines = decode_stack.report_lines({"Qwen3-32B/16/0.5/32": entry})[0].splitlines()
    row = "| Qwen3-32B/16/0.5 | 32 | 2,000.0 | 1,600.0 | 1.250× (1.200 … 1.300) | 8.00 → 6.40 | 4.00, 4.00 |"
    assert lines[-1] == row


def test_without_time_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    results = tmp_path / "stack.json"
    main(["--rehearse", "--budget", "0", "--results", str(results)])
    assert capsys.readouterr().out.endswith("2 numbers of tokens left\n")
    assert not results.exists()


def test_a_wrong_stack_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseFp8, "apply", lambda self, spec, tensors, x, bias: x @ tensors["weight"].to(x))
    results = tmp_path / "stack.json"
    with pytest.raises(SystemExit, match="wrong result, nothing is timed: dense, 1 tokens: "):
        main(["--rehearse", "--layers", "1", "--repeats", "1", "--results", str(results)])
    assert not results.exists()


def test_a_device_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        decode_stack, "select_backend", lambda spec, device, name: select_backend(spec, CPU, "cuda")
    )
    with pytest.raises(
        SystemExit, match="nothing to time: back end 'cuda' cannot run this layer: runs on CUDA"
    ):
        main(["--rehearse", "--results", str(tmp_path / "stack.json")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "must be at least 1"),
        (["--layers", "0"], "must be at least 1"),
        ([], "--rehearse runs a tiny stack anywhere"),
    ],
)
def test_bad_calls(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in capsys.readouterr().err + str(error.value)

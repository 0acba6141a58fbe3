"""Bad quantization_config values, each with the message that a reader of config.json gets."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from vllm_spense.format.errors import CheckpointError
from vllm_spense.format.layout import Layout
from vllm_spense.format.schema import ModuleSpec, SpenseCheckpointConfig, parse_config

Json = dict[str, Any]
GATE, DOWN = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"


def good() -> Json:
    return {
        "quant_method": "spense",
        "version": 1,
        "weight_dtype": "float8_e4m3fn",
        "activation_scheme": "dynamic_per_token",
        "tensor_parallel_sizes": [1, 2],
        "ignore": ["lm_head"],
        "modules": {
            GATE: {
                "split": "output",
                "out_features": 96,
                "in_features": 48,
                "sparse": 64,
                "dense": 32,
                "bias": False,
            },
            DOWN: {"split": "input", "out_features": 48, "in_features": 96, "sparse": 64, "dense": 32},
        },
        "provenance": {"method": "obs", "losses": {GATE: 0.5}},
    }


def test_good_config_round_trips() -> None:
    config = parse_config(good())
    assert config.codecs.name == "fp8"
    assert config.modules[DOWN].layout() == Layout("input", 48, 96, 64)
    assert config.modules[DOWN].bias is False
    assert parse_config(config.model_dump()) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [Layout("output", 9, 16, 3), Layout("input", 9, 16, 8)])
def test_spec_of_layout(layout: Layout, bias: bool) -> None:
    spec = ModuleSpec.of(layout, bias)
    assert spec.layout() == layout
    assert spec.dense == layout.dense
    assert spec.bias is bias


def top(**values: object) -> Callable[[Json], None]:
    return lambda raw: raw.update(values)


def gate(**values: object) -> Callable[[Json], None]:
    return lambda raw: raw["modules"][GATE].update(values)


def without(key: str, module: str | None = None) -> Callable[[Json], None]:
    def remove(raw: Json) -> None:
        del (raw["modules"][module] if module else raw)[key]

    return remove


def renamed(name: str) -> Callable[[Json], None]:
    def rename(raw: Json) -> None:
        raw["modules"][name] = raw["modules"].pop(GATE)

    return rename


VERSION = r"format version {} is not supported \(this release reads 1 and 2\)"
INTEGER = "should be a valid integer"
BAD: dict[str, tuple[Callable[[Json], None], str]] = {
    "unknown key": (top(group_size=128), "quantization_config.group_size: Extra inputs are not permitted"),
    "unknown module key": (gate(group=8), f"modules.{GATE}.group: Extra inputs are not permitted"),
    "method missing": (without("quant_method"), "quant_method is None, expected 'spense'"),
    "other method": (top(quant_method="fp8"), "quant_method is 'fp8', expected 'spense'"),
    "version missing": (without("version"), VERSION.format("None")),
    "version true": (top(version=True), VERSION.format("True")),
    "version text": (top(version="1"), VERSION.format("'1'")),
    "version float": (top(version=1.0), VERSION.format(r"1\.0")),
    "version 3": (top(version=3), VERSION.format("3")),
    "version 0": (top(version=0), VERSION.format("0")),
    "version list": (top(version=[1]), VERSION.format(r"\[1\]")),
    "weight dtype missing": (without("weight_dtype"), "weight_dtype: Field required"),
    "weight dtype": (top(weight_dtype="int8"), "weight_dtype: Input should be 'float8_e4m3fn' or 'bfloat16'"),
    "scheme missing": (without("activation_scheme"), "activation_scheme: Field required"),
    "scheme unknown": (
        top(activation_scheme="static"),
        "activation_scheme: Input should be 'dynamic_per_token'",
    ),
    "scheme none for fp8": (
        top(activation_scheme="none"),
        "activation_scheme must be 'dynamic_per_token' for weight_dtype 'float8_e4m3fn'",
    ),
    "scheme dynamic for bf16": (
        top(weight_dtype="bfloat16"),
        "activation_scheme must be 'none' for weight_dtype 'bfloat16'",
    ),
    "tp missing": (without("tensor_parallel_sizes"), "tensor_parallel_sizes: Field required"),
    "tp empty": (top(tensor_parallel_sizes=[]), "tensor_parallel_sizes: List should have at least 1 item"),
    "tp zero": (top(tensor_parallel_sizes=[1, 0]), r"tensor_parallel_sizes\.1: .*greater than or equal to 1"),
    "tp negative": (top(tensor_parallel_sizes=[-2]), r"tensor_parallel_sizes\.0: .*greater than or equal"),
    "tp huge": (
        top(tensor_parallel_sizes=[1 << 20]),
        r"tensor_parallel_sizes\.0: .*less than or equal to 1024",
    ),
    "tp bool": (top(tensor_parallel_sizes=[True]), rf"tensor_parallel_sizes\.0: .*{INTEGER}"),
    "tp text": (top(tensor_parallel_sizes=["2"]), rf"tensor_parallel_sizes\.0: .*{INTEGER}"),
    "tp no list": (top(tensor_parallel_sizes=2), "tensor_parallel_sizes: Input should be a valid list"),
    "ignore and modules": (top(ignore=[DOWN]), f"{DOWN} stands in both modules and ignore"),
    "ignore pattern": (top(ignore=["re:.*lm_head"]), r"ignore\.0: String should match pattern"),
    "ignore text": (top(ignore="lm_head"), "ignore: Input should be a valid list"),
    "modules missing": (without("modules"), "modules: Field required"),
    "modules empty": (top(modules={}), "modules must not be empty"),
    "modules list": (top(modules=[GATE]), "modules: Input should be a valid dictionary"),
    "module null": (top(modules={GATE: None}), f"modules.{GATE}: Input should be a valid dictionary"),
    "name empty": (renamed(""), "String should have at least 1 character"),
    "name with wildcard": (renamed("model.*.gate_proj"), "String should match pattern"),
    "name with slash": (renamed("../../etc/passwd"), "String should match pattern"),
    "name with newline": (renamed("model.gate\n"), "String should match pattern"),
    "name with escape": (renamed("model.\x1b[31m"), "String should match pattern"),
    "name not ascii": (renamed("mödel.gate"), "String should match pattern"),
    "name too long": (renamed("a" * 513), "String should have at most 512 characters"),
    "split missing": (without("split", GATE), f"modules.{GATE}.split: Field required"),
    "split unknown": (gate(split="rows"), f"modules.{GATE}.split: Input should be 'output' or 'input'"),
    "sparse missing": (without("sparse", GATE), f"modules.{GATE}.sparse: Field required"),
    "dense missing": (without("dense", GATE), f"modules.{GATE}.dense: Field required"),
    "sparse negative": (gate(sparse=-64, dense=160), f"{GATE}.sparse: .*greater than or equal to 0"),
    "sparse bool": (gate(sparse=True), rf"{GATE}.sparse: .*{INTEGER}"),
    "sparse float": (gate(sparse=64.0), rf"{GATE}.sparse: .*{INTEGER}"),
    "sparse text": (gate(sparse="64"), rf"{GATE}.sparse: .*{INTEGER}"),
    "sparse null": (gate(sparse=None), rf"{GATE}.sparse: .*{INTEGER}"),
    "extent nan": (gate(out_features=float("nan")), rf"{GATE}.out_features: .*{INTEGER}"),
    "extent huge": (gate(out_features=1 << 40), f"{GATE}.out_features: .*less than or equal to 16777216"),
    "extent astronomic": (gate(in_features=10**400), f"{GATE}.in_features: "),
    "extent zero": (gate(out_features=0), rf"{GATE}: .*shape \[0, 48\] must be positive"),
    "sparse too large": (gate(sparse=97), rf"{GATE}: .*sparse extent 97 must lie in 0\.\.96"),
    "sum too small": (gate(dense=31), r"sparse 64 \+ dense 31 must be the 96 output features"),
    "sum too large": (gate(dense=33), r"sparse 64 \+ dense 33 must be the 96 output features"),
    "wrong axis": (gate(split="input"), f"{GATE}: .*sparse extent 64 must lie in 0..48"),
    "groups of 8": (gate(in_features=44), f"{GATE}: .*44 input features, which is no multiple of 8"),
    "bias number": (gate(bias=1), f"{GATE}.bias: Input should be a valid boolean"),
    "bias text": (gate(bias="true"), f"{GATE}.bias: Input should be a valid boolean"),
    "provenance list": (top(provenance=[1]), "provenance: Input should be a valid dictionary"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD.keys())
def test_bad_values(damage: Callable[[Json], None], message: str) -> None:
    raw = good()
    damage(raw)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config(raw, "somewhere/config.json")
    assert str(caught.value).startswith("file somewhere/config.json: ")
    assert "Fix: " in str(caught.value)


@pytest.mark.parametrize("raw", [None, [], "spense", 1])
def test_not_an_object(raw: object) -> None:
    with pytest.raises(CheckpointError, match="quantization_config must be an object, not "):
        parse_config(raw)


def test_one_error_names_several_mistakes_and_counts_the_rest() -> None:
    raw = good()
    raw["modules"] = {f"m{i}": {**raw["modules"][GATE], "bias": 3} for i in range(9)}
    with pytest.raises(CheckpointError) as caught:
        parse_config(raw)
    text = str(caught.value)
    assert [f"modules.m{i}.bias" in text for i in range(9)] == [True] * 5 + [False] * 4
    assert "(and 4 more)" in text


def test_parsing_leaves_the_dictionary_alone() -> None:
    raw = good()
    kept = copy.deepcopy(raw)
    parse_config(raw)
    assert raw == kept


def test_config_cannot_be_changed() -> None:
    config: SpenseCheckpointConfig = parse_config(good())
    with pytest.raises(ValueError, match="frozen"):
        config.version = 1  # type: ignore[misc]


def test_error_survives_pickling() -> None:
    error = CheckpointError("broken", file="f", module="m", tensor="t", fix="mend it")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "file f, module m, tensor t: broken. Fix: mend it" == str(error)
    assert (again.file, again.module, again.tensor, again.fix) == ("f", "m", "t", "mend it")

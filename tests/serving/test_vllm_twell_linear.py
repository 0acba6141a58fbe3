"""`--quantization twell`, checkpoints with thresholds, and what is refused, in real vLLM on the CPU."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.test_vllm_modes import PP2
from tests.serving.test_vllm_twell import BOUND, EXACT, FP32, TP2
from tests.tiny import make_llama
from tests.tiny_families import make_family
from tests.twell_models import distance, same_tokens, skipping, write
from tests.vllm_runs import Pool, Run
from vllm_spense.evaluation import load_model

pytestmark = pytest.mark.vllm
TWELL = {"quantization": "twell"}
PLAIN = ("opt", "nemotron", "arcee")
THRESHOLDS = {"model.layers.0.mlp.down_proj": 0.4, "model.layers.1.mlp.down_proj": 0.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twell-linear")
    for kind in PLAIN:
        make_family(kind, root / kind, hidden_size=128, head_dim=None if kind == "opt" else 32)
    make_llama(root / "llama")
    thresholds(root / "llama", root / "thresholds", THRESHOLDS, {"model.layers.0.mlp.down_proj": 0.5})
    for name, (change, _) in REFUSED.items():
        change(root, root / name)
    return root


def thresholds(source: Path, out: Path, inputs: dict[str, float], density: dict[str, float]) -> None:
    """The model with the config of a checkpoint that skips small inputs."""
    shutil.copytree(source, out)
    own = {"quant_method": "twell", "version": 1, "inputs": inputs, "density": density}
    configured(out, quantization_config=own)


def configured(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("runs"))

    def add(group: str, name: str, model: str, llm: dict, **more: Any) -> None:
        pool.add(group, name, {"model": str(models / model), "llm": llm, **more})

    for kind in PLAIN:
        add("plain", kind, kind, FP32 | TWELL)
        add("plain", f"{kind}-stock", kind, FP32)
        add("plain", f"{kind}-bf16", kind, FP32 | TWELL | {"dtype": "bfloat16"})
    add("plain", "thresholds", "thresholds", FP32)
    reload = ["reload_weights", {"weights_path": str(models / "opt")}]
    add("plain", "reload", "opt", FP32 | TWELL, calls=[reload])
    add("plain", "dummy", "opt", FP32 | TWELL | {"load_format": "dummy"})
    pool.environment("plain", VLLM_LOGGING_LEVEL="INFO")
    for kind in ("opt", "nemotron"):
        add("tp2", f"{kind}-tp2", kind, TP2 | TWELL)
    add("compile", "opt-compile", "opt", {"dtype": "float32"} | TWELL)
    add("pp2", "opt-pp2", "opt", PP2 | TWELL | {"dtype": "float32"})
    for group in ("pp2", "tp2"):
        pool.environment(group, VLLM_CPU_OMP_THREADS_BIND="0|1")
    for name in REFUSED:
        named = TWELL if name in BY_METHOD else {}
        add("refused", name, name, FP32 | named)
    pool.environment("refused", VLLM_LOGGING_LEVEL="INFO")
    return pool


@pytest.mark.parametrize("kind", PLAIN)
def test_skipping_zeros_changes_nothing(runs: Pool, kind: str) -> None:
    """Against stock vLLM, and transformers."""
    assert runs[kind].tokens == runs[f"{kind}-stock"].tokens
    assert apart(runs[kind], runs[f"{kind}-stock"]) < EXACT


@pytest.mark.parametrize("kind", PLAIN)
def test_it_is_transformers_model(runs: Pool, models: Path, kind: str) -> None:
    model = load_model(models / kind)
    assert same_tokens(model, runs[kind])
    assert distance(model, runs[kind]) < EXACT
    assert distance(model, runs[f"{kind}-bf16"]) < BOUND


@pytest.mark.parametrize("mode", ["opt-tp2", "nemotron-tp2", "opt-compile", "opt-pp2", "reload"])
def test_many_ways_to_run_it(runs: Pool, mode: str) -> None:
    plain = runs["nemotron" if mode.startswith("nemotron") else "opt"]
    assert runs[mode].tokens == plain.tokens
    assert apart(runs[mode], plain) < EXACT


def test_dummy_weights_run(runs: Pool) -> None:
    assert [len(t) for t in runs["dummy"].tokens] == [24] * 6


def test_thresholds_of_a_checkpoint(runs: Pool, models: Path) -> None:
    """They are what transformers computes with small inputs at zero, and not what it does without."""
    model = load_model(models / "llama")
    assert distance(model, runs["thresholds"]) > 20 * EXACT
    with skipping(model, THRESHOLDS):
        assert same_tokens(model, runs["thresholds"])
        assert distance(model, runs["thresholds"]) < EXACT


def test_the_start_up_log(runs: Pool) -> None:
    assert re.search(r"TwELL: 3 activation-sparse down layers; back ends: [a-z]+ 3; dens", runs["opt"].log)
    line = r"TwELL: 2 activation-sparse down layers; back ends: [a-z]+ 2; density by the checkpoint: "
    assert re.search(line + r"min 50\.0%, median 50\.0%, max 50\.0%", runs["thresholds"].log)


def apart(one: Run, other: Run) -> float:
    """Mean difference of all logprobs."""
    pairs = [
        (a, b)
        for x, y in zip(one.outputs, other.outputs, strict=True)
        for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


# -- refused -------------------------------------------------------------------------------------

Change = Callable[[Path, Path], object]


def made(kind: str, **changes: Any) -> Change:
    return lambda root, out: write(kind, out, **changes)


def limited(inputs: dict[str, Any]) -> Change:
    return lambda root, out: thresholds(root / "llama", out, inputs, {})


def linked(kind: str, **changes: Any) -> Change:
    def make(root: Path, out: Path) -> None:
        shutil.copytree(root / kind, out)
        configured(out, **changes)

    return make


def damaged(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def make(root: Path, out: Path) -> None:
        write("sparselm", out)
        state = load_file(out / "model.safetensors")
        change(state)
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})

    return make


UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj"
CONFIGS: dict[str, tuple[Change, str]] = {
    "not-gated": (made("sparselm", sparsity_gated_mlp=False), "sparsity_gated_mlp is False, expected True"),
    "baseline": (made("sparselm", sparsity_baseline_run=True), "sparsity_baseline_run is True"),
    "resized": (made("sparselm", sparsity_new_intermediate_size=64), "expected intermediate_size, 208"),
    "too-wide": (made("relu2", intermediate_size=65536), "intermediate_size is 65536, expected"),
    "negative": (made("prosparse", hidden_act_param=-0.01), "hidden_act_param is -0.01"),
    "infinite": (made("prosparse", hidden_act_param=float("inf")), "hidden_act_param is inf"),
    "silu": (made("relu2", hidden_act="silu"), "hidden_act is 'silu', expected one of relu"),
    "gelu-bamboo": (made("bamboo", hidden_act="gelu"), "hidden_act is 'gelu', expected 'relu'"),
    "density": (made("sparselm", sparsity_density=[0.5]), "a list of 2 shares"),
    "method-silu": (linked("llama"), "activation 'silu' of llama leaves no zeros"),
    "method-gelu": (linked("opt", activation_function="gelu"), "activation 'gelu' of opt leaves no zeros"),
    "method-gated": (linked("llama", hidden_act="relu"), "the MLPs of llama have a gate"),
    "threshold": (limited({DOWN: -0.1}), f"inputs.{DOWN}"),
    "elsewhere": (limited({"model.layers.7.mlp.down_proj": 0.1}), "inputs names a layer that no file holds"),
    "fused": (limited({"model.layers.0.self_attn.q_proj": 0.1}), "vLLM makes one layer of"),
}
"""Refused before a weight is loaded."""
FILES: dict[str, tuple[Change, str]] = {
    "no-up": (damaged(lambda s: s.pop(UP)), "was never loaded"),
    "short-up": (damaged(lambda s: s.update({UP: s[UP][:-2].clone()})), "bfloat16 [206, 128], expected"),
    "scaled-up": (
        damaged(lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)})),
        "float8_e4m3fn [208, 128]",
    ),
    "stranger": (damaged(lambda s: s.update({"model.strange": s[UP].clone()})), "no place for this tensor"),
}
REFUSED = CONFIGS | FILES
BY_METHOD = ("method-silu", "method-gelu", "method-gated")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(runs: Pool, name: str) -> None:
    """One error with the field or tensor, and how to mend it; a wrong config before any weight is loaded."""
    log = runs[name].log.split("Traceback", 1)[-1]
    assert runs[name].failed
    assert REFUSED[name][1] in log
    assert "Fix: " in log
    if name in CONFIGS:
        assert "Loading safetensors" not in log
        assert "Loading weights took" not in log

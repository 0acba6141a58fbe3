"""Real vLLM on CPU: a Spense checkpoint gives exactly the tokens of its dense twin, in every mode.

Eager and compiled, one rank and two round differently even for a dense model, so like is compared
with like; the unpruned model is the negative control.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import HIDDEN, INTER, LAYERS, dense_twin, make_llama, make_spense
from tests.vllm_runs import Pool
from vllm_spense.format.manifest import write_manifest
from vllm_spense.format.report import inspect
from vllm_spense.models.export import export

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
TP2 = {"enforce_eager": True, "tensor_parallel_size": 2}
MODES = ("eager", "compile", "tp2", "bf16", "lora")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_llama(root / "dense")
    make_llama(root / "other", seed=1)
    make_spense(root / "dense", root / "spense")
    make_spense(root / "other", root / "spense-other")
    make_spense(root / "dense", root / "spense-half", sparse=INTER // 2, tp_sizes=(1,))
    make_spense(root / "dense", root / "spense-bf16", codec="bf16")
    export(root / "spense", root / "twin", format="spense-dense")
    export(root / "spense-bf16", root / "export-bf16")
    dense_twin(root / "spense", root / "twin-tp2", tp=2)
    make_lora(root / "lora")
    damage(root)
    return root


def make_lora(out: Path, rank: int = 4, hidden: int = HIDDEN, inter: int = INTER) -> None:
    """A random LoRA adapter on gate, up and down of every layer, strong enough to change tokens."""
    torch.manual_seed(3)
    state = {}
    for layer in range(LAYERS):
        for name, (n, k) in {
            "gate_proj": (inter, hidden),
            "up_proj": (inter, hidden),
            "down_proj": (hidden, inter),
        }.items():
            prefix = f"base_model.model.model.layers.{layer}.mlp.{name}"
            state[f"{prefix}.lora_A.weight"] = torch.randn(rank, k) * k**-0.5
            state[f"{prefix}.lora_B.weight"] = torch.randn(n, rank)
    out.mkdir()
    save_file(state, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "bias": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))


def damage(root: Path) -> None:
    """Checkpoints that must not load, with manifests that do not give them away."""

    def copy(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        shutil.copytree(root / "spense", root / name)
        return root / name, load_file(root / name / "model.safetensors")

    path, state = copy("no-shard")
    del state["model.layers.1.self_attn.k_proj.weight_scale"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    write_manifest(path)
    path, state = copy("bad-nibble")
    state["model.layers.0.mlp.up_proj.sparse_meta"][3, 2] = 0
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    write_manifest(path)


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("runs"))

    def add(group: str, name: str, model: str, llm: dict, **more: Any) -> None:
        pool.add(group, name, {"model": str(models / model), "llm": llm, **more})

    add("load", "eager", "spense", EAGER)
    add("load", "eager-twin", "twin", EAGER)
    add("load", "eager-dense", "dense", EAGER)
    add("load", "named", "spense", EAGER | {"quantization": "spense"})
    add("load", "bf16", "spense-bf16", EAGER)
    add("load", "bf16-twin", "export-bf16", EAGER)
    add("load", "online", "dense", EAGER | {"quantization": "spense"})
    add("load", "offline", "spense-half", EAGER)
    add("load", "dummy", "spense", EAGER | {"load_format": "dummy"})
    add("load", "no-shard", "no-shard", EAGER)
    add("load", "bad-nibble", "bad-nibble", EAGER)
    reload = ["reload_weights", {"weights_path": str(models / "spense")}]
    add("load", "reload", "spense-other", EAGER, calls=[reload])
    pool.environment("load", VLLM_LOGGING_LEVEL="INFO")
    add("compile", "compile", "spense", {})
    add("compile", "compile-twin", "twin", {})
    lora = EAGER | {"enable_lora": True, "max_lora_rank": 8}
    add("lora", "lora", "spense", lora, lora=str(models / "lora"))
    add("lora", "lora-twin", "twin", lora, lora=str(models / "lora"))
    add("tp2", "tp2", "spense", TP2)
    add("tp2", "tp2-twin", "twin-tp2", TP2)
    pool.environment("tp2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    pool.start("load", "compile")
    return pool


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_the_dense_twin(runs: Pool, mode: str) -> None:
    assert runs[mode].outputs == runs[f"{mode}-twin"].outputs
    assert len(runs[mode].tokens) == 6


def test_the_unpruned_model_gives_other_tokens(runs: Pool) -> None:
    for pruned in ("eager", "bf16"):
        same = [a == b for a, b in zip(runs[pruned].tokens, runs["eager-dense"].tokens, strict=True)]
        assert not any(same)


def test_naming_the_method_changes_nothing(runs: Pool) -> None:
    assert runs["named"].outputs == runs["eager"].outputs


def test_load_time_mode_is_magnitude_pruning_with_the_last_half_dense(runs: Pool) -> None:
    assert runs["online"].outputs == runs["offline"].outputs
    assert "NOT quality" in runs["online"].log


def test_dummy_weights_run(runs: Pool) -> None:
    assert [len(t) for t in runs["dummy"].tokens] == [24] * 6


def test_lora_changes_the_tokens(runs: Pool) -> None:
    assert runs["lora"].tokens != runs["eager"].tokens


def test_reload_weights_from_another_checkpoint(runs: Pool) -> None:
    assert runs["reload"].outputs == runs["eager"].outputs


def test_the_start_up_log_says_what_was_loaded(runs: Pool, models: Path) -> None:
    """One block of one rank, none of the reload; the bytes are those of `spense inspect`."""
    log, report = runs["reload"].log, inspect(models / "spense-other")
    assert log.count("Spense:") == 1
    for fact in (
        "Spense: 8 linear layers: 4 hybrid (2:4 + dense), 4 all-dense FP8; 0 more left unquantized",
        f"mean dense ratio of the hybrid MLP layers: {report.dense_ratio:.3f}",
        f"{report.stored_bytes / 2**20:.2f} MiB, as dense FP8 {report.dense_bytes / 2**20:.2f} MiB",
        "back ends: cpu 8",
    ):
        assert fact in log
    assert "fell back" not in log


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-shard", ("model.layers.1.self_attn.k_proj", "weight_scale", "missing", "Fix:")),
        ("bad-nibble", ("model.layers.0.mlp.gate_up_proj", "sparse_meta", "nibble", "Fix:")),
    ],
)
def test_damaged_checkpoints_do_not_start(runs: Pool, name: str, words: tuple[str, ...]) -> None:
    assert runs[name].failed
    for word in words:
        assert word in runs[name].log

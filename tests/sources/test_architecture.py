"""What transformers says of a config.json becomes one line that names the file, the key and the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.published_configs import LLAMA_3_1_8B, PUBLISHED
from tests.tiny import make_llama
from tests.tiny_families import make_family
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense import PruneConfig, prune
from vllm_spense.evaluation import evaluate
from vllm_spense.evaluation.trial import try_out
from vllm_spense.format import CheckpointError
from vllm_spense.pruning.admission import admit
from vllm_spense.recovery import RecoveryConfig, recover
from vllm_spense.sources import check_windows, load_config, load_tokenizer
from vllm_spense.sources.architecture import positions

ANY = PruneConfig(preset="magnitude")


def directory_of(path: Path, raw: dict[str, Any]) -> Path:
    """A directory with nothing but this config.json; keys with ``...`` are left out."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))
    return path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"model_type": "llama9"},
        r"has no model_type 'llama9' \(.* by 4\.42\.3\)\. Fix: install",
    ),
    "foreign code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}},
        r"needs code of its own directory \(auto_map\), which is never run",
    ),
    "no type": ({"model_type": ...}, r"model_type is missing"),
    "type is a list": ({"model_type": ["llama"]}, r"model_type is \"\['llama'\]\""),
    "encoder-decoder": (
        {"model_type": "t5", "is_encoder_decoder": True},
        "'t5' is an encoder-decoder model",
    ),
    "decoder of one": ({"model_type": "bart", "is_encoder_decoder": True}, r": an encoder-decoder model: "),
    "vision": ({"model_type": "vit"}, r"'vit' is no language model that predicts the next token"),
    "encoder": ({"model_type": "bert"}, r"BertLMHeadModel has no list of decoder layers"),
    "state space": ({"model_type": "mamba", "rope_scaling": ...}, r"has no mlp"),
    "rope": (
        {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
        r"rope_scaling\.rope_type is 'spiral', which transformers \S+ does not know\. Fix: install a newer",
    ),
    "rope, old key": ({"rope_scaling": {"type": "spiral"}}, r"rope_scaling\.type is 'spiral', which"),
    "rope is a list": ({"rope_scaling": [8.0]}, r"cannot build this model \(.*rope_parameters"),
    "activation": ({"hidden_act": "swoosh"}, r"hidden_act is 'swoosh', which transformers \S+ does not know"),
    "layer types": ({"model_type": "qwen3", "layer_types": ["x"] * 32}, r"`layer_types` entries must be"),
    "many layers": ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, expected .* 1 to 1024"),
    "many labels": ({"num_labels": 10**12}, r"num_labels is 1000000000000, expected .* to 65536"),
    "long number": ({"vocab_size": 10**4000}, r"vocab_size is 10{79}, expected"),
    "size is text": ({"hidden_size": "4096"}, r"hidden_size is '4096', expected an integer from 1"),
    "size is null": ({"hidden_size": None}, r"hidden_size is None, expected an integer from 1"),
    "heads": ({"num_key_value_heads": 7}, r"num_attention_heads 32 is no multiple of num_key_value_heads 7"),
    "no key heads": ({"num_key_value_heads": -1}, r"no multiple of num_key_value_heads -1"),
    "head": ({"head_dim": -2}, r"cannot build this model \(RuntimeError: .*negative dimension"),
    "padding": ({"pad_token_id": 128256}, r"pad_token_id is 128256, but vocab_size is 128256\. Fix: set"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, r"dtype is 'float8_e4m3fn', expected one of bfloat16"),
    "dtype is no name": ({"torch_dtype": "nn"}, r"config\.json: "),
    "uncut": ({"intermediate_size": 14337}, r"leaves \d+ for 2:4, which is no multiple of 8"),
    "text model of none": ({"text_config": {"hidden_size": 8}}, r"'llama' has no text_config"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_refuses_is_one_line(kind: str, tmp_path: Path) -> None:
    change, message = REFUSED[kind]
    directory = directory_of(tmp_path / "model", LLAMA_3_1_8B | change)
    with pytest.raises(ValueError, match=message) as caught:
        admit(directory, ANY)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 2500
    assert f"{directory}/config.json" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_admitted(name: str, tmp_path: Path) -> None:
    admitted = admit(directory_of(tmp_path / "model", PUBLISHED[name]), ANY)
    text = PUBLISHED[name].get("text_config", PUBLISHED[name])
    assert len(admitted.targets) == text["num_hidden_layers"]
    assert admitted.stored_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 8192),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": float("inf")}}, 131072),
    ],
)
def test_positions(change: dict[str, Any], limit: int, tmp_path: Path) -> None:
    assert positions(load_config(directory_of(tmp_path / "model", LLAMA_3_1_8B | change))) == limit


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 positions, 512 tokens."""
    return add_tokenizer(make_llama(tmp_path_factory.mktemp("model") / "llama", bias=False, layers=1))


def too_long(llama: Path, text: Path, out: Path) -> dict[str, Callable[[], object]]:
    options = PruneConfig(preset="spensegpt+", calibration=str(text), num_samples=2, seq_len=257)
    good = PruneConfig(preset="magnitude", calibration=str(text), num_samples=2, seq_len=16)
    training = RecoveryConfig(calibration=str(text), steps=1, seq_len=257, objective="tokens")
    return {
        "prune": lambda: prune(llama, out / "a", options),
        "dry run": lambda: admit(llama, options),
        "eval": lambda: evaluate(llama, text, seq_len=257),
        "recover": lambda: recover(prune(llama, out / "b", good).directory, out / "c", training),
    }


@pytest.mark.parametrize("command", ["prune", "dry run", "eval", "recover"])
def test_windows_are_no_longer_than_the_positions(command: str, llama: Path, tmp_path: Path) -> None:
    run = too_long(llama, write_text(tmp_path / "text.txt"), tmp_path)[command]
    message = (
        r"windows of 257 tokens are longer than the model's 256 positions .*Fix: give --seq-len 256 or less"
    )
    with pytest.raises(CheckpointError, match=message):
        run()
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "c").exists()


def test_a_tokenizer_of_another_model(llama: Path, tmp_path: Path) -> None:
    small = make_llama(tmp_path / "small", bias=False, layers=1)
    raw = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(raw | {"vocab_size": 500}))
    check_windows(torch.tensor([[3, 499]]), small)
    with pytest.raises(CheckpointError, match="gives token 500, but the model's vocab_size is 500"):
        check_windows(torch.tensor([[3, 500]]), small)


def test_a_tokenizer_that_cannot_be_read(llama: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(llama, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot be read \(.*Fix: copy") as caught:
        load_tokenizer(tmp_path / "copy")
    assert str(caught.value).isprintable()


def test_the_trial_keeps_to_positions_and_vocabulary(tmp_path: Path) -> None:
    """It is run after all the work: OPT's table of positions ends, others only go wrong silently."""
    done = prune(make_family("opt", tmp_path / "opt"), tmp_path / "out", ANY).directory
    ids = torch.randint(0, 512, (600,), generator=torch.Generator().manual_seed(0))
    assert try_out(done, ids).tokens == 2 * 255
    words = (done / "tokenizer.json").read_text().replace('"w0": 0,', '"w0": 600,')
    (done / "tokenizer.json").write_text(words)
    with pytest.raises(CheckpointError, match="gives token 600, but the model's vocab_size is 512"):
        try_out(done)

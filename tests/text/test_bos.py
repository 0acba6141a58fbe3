"""Models that expect a BOS token get it in every window, as context; for others nothing has changed."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.tiny import make_llama, make_spense
from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.cli.app import app
from vllm_spense.cli.trial import try_checkpoint
from vllm_spense.evaluation import evaluate, load_model
from vllm_spense.evaluation.continuation import text_items
from vllm_spense.evaluation.harness import Harness
from vllm_spense.evaluation.perplexity import text_windows
from vllm_spense.format import Checkpoint
from vllm_spense.pruning import PruneConfig, prune, run
from vllm_spense.recovery import RecoveryConfig, recover
from vllm_spense.recovery import pipeline as recovery
from vllm_spense.recovery.training import HELD_OUT
from vllm_spense.text import Beginning, first_windows, opening, opening_text, sample_windows, tokenize

CHAT = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"
TEMPLATES = {
    "gemma": "{{ bos_token + ' ' }}" + CHAT,
    "chatml": "{% for m in messages %}{{ bos_token + ' ' + m['content'] + ' ' }}{% endfor %}",
    "refuses": "{{ raise_exception('no chats') }}",
}
BOS = 7


def set_bos(directory: Path, *, added: str = "", template: str = "", bos: bool = True) -> Path:
    """Give the tokenizer of :func:`add_tokenizer` the BOS token w7 and what it sets in front of texts."""
    from tokenizers import AddedToken, processors

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if bos:  # a word of its own, or else w71 would be split
        tokenizer.add_special_tokens({"bos_token": AddedToken(f"w{BOS}", single_word=True)})
    if added:
        special = [(word, int(word[1:])) for word in added.split()]
        processor = processors.TemplateProcessing(single=f"{added} $A", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = processor
    if template:
        tokenizer.chat_template = TEMPLATES[template]
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokenizer adds BOS, as those of Llama 3, Mistral and Gemma do."""
    made = add_tokenizer(make_llama(tmp_path_factory.mktemp("bos") / "dense"))
    return set_bos(made, added="w7")


@pytest.fixture(scope="module")
def text(dense: Path) -> Path:
    return write_text(dense.parent / "text.txt")


def words(path: Path) -> list[int]:
    return [int(word[1:]) for word in path.read_text().split()]


def obvious_nll(directory: Path, windows: list[list[int]], context: int = 1) -> float:
    model = load_model(directory)
    scores = []
    for window in windows:
        with torch.inference_mode():
            p = model(torch.tensor([window])).logits[0].double().softmax(-1)
        scores += [-math.log(p[i - 1, window[i]]) for i in range(context, len(window))]
    return sum(scores) / len(scores)


# -- which token ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "auto", "always"),
    [
        ({"added": "w7"}, (7,), (7,)),
        ({"added": "w7", "template": "gemma"}, (7,), (7,)),
        ({"template": "gemma"}, (7,), (7,)),
        ({"added": "w8 w9"}, (8, 9), (8, 9)),  # GLM's [gMASK]<sop>
        ({"added": "w8", "bos": False}, (8,), (8,)),
        ({"template": "chatml"}, (), (7,)),  # begins with it, as every turn does
        ({"template": "refuses"}, (), (7,)),
        ({}, (), (7,)),
    ],
)
def test_opening(how: dict[str, Any], auto: tuple[int], always: tuple[int], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(set_bos(add_tokenizer(tmp_path), **how))
    assert opening(tokenizer) == auto
    assert opening(tokenizer, "always") == always
    assert opening(tokenizer, "never") == ()
    assert opening_text(tokenizer, (8, 9)) == "w8w9"
    assert opening_text(tokenizer, ()) is None


def test_mistrals_own_tokenizers(tmp_path: Path) -> None:
    """They come from the package mistral_common, add BOS and have no chat template."""
    data = Path(pytest.importorskip("mistral_common").__file__).parent / "data"
    shutil.copy(
        min(data.glob("tekken*.json"), key=lambda path: path.stat().st_size), tmp_path / "tekken.json"
    )
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert opening(tokenizer) == opening(tokenizer, "always") == (tokenizer.bos_token_id,)
    assert opening_text(tokenizer, opening(tokenizer)) == "<s>"
    (tmp_path / "text.txt").write_text("Rain fell all day.\n\n" * 200)
    whole = [tokenizer.bos_token_id, *tokenizer.encode("Rain fell all day", add_special_tokens=False)]
    windows = text_windows(tokenizer, Beginning(tmp_path / "text.txt", tokenizer), len(whole), 100)
    assert windows[0].tolist() == whole
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(ValueError, match=r"row 1: .*no chat template"):
        Beginning(tmp_path / "chat.jsonl", tokenizer).characters(1)


def test_always_needs_a_bos_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(add_tokenizer(tmp_path))
    assert opening(tokenizer) == ()
    with pytest.raises(ValueError, match=r"--bos always.*no BOS token"):
        opening(tokenizer, "always")


# -- windows -------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    ids = torch.tensor([10, 11, 12, 13, 14, 15, 16, 17])
    assert first_windows(ids, 3).tolist() == [[10, 11, 12], [13, 14, 15]]
    assert first_windows(ids, 3, (7,)).tolist() == [[7, 10, 11], [7, 12, 13], [7, 14, 15], [7, 16, 17]]
    assert first_windows(ids, 4, (8, 9), 2).tolist() == [[8, 9, 10, 11], [8, 9, 12, 13]]
    assert first_windows(ids[:1], 3, (7,)).shape == (0, 3)


def test_an_opening_in_the_text_is_not_doubled() -> None:
    ids = torch.tensor([7, 10, 11, 12, 13, 7, 14, 15])
    assert first_windows(ids, 3, (7,)).tolist() == [[7, 10, 11], [7, 12, 13], [7, 14, 15]]
    for window in sample_windows(ids, 50, 3, 0, (7,)).tolist():
        assert window[0] == 7
        assert window[1] != 7


@pytest.mark.parametrize("seed", range(3))
def test_sampled_windows_start_where_those_without_bos_do(seed: int) -> None:
    ids = torch.arange(100, 400)
    plain, opened = sample_windows(ids, 9, 20, seed), sample_windows(ids, 9, 20, seed, (7,))
    assert torch.equal(opened[:, 1:], plain[:, :-1])
    assert opened[:, 0].tolist() == [7] * 9


def test_a_window_holds_more_than_its_opening() -> None:
    with pytest.raises(ValueError, match="2 tokens is filled by the 2 that open it"):
        sample_windows(torch.arange(50), 3, 2, 0, (8, 9))


# -- evaluation ----------------------------------------------------------------------------------


def test_perplexity_by_hand(dense: Path, text: Path) -> None:
    """BOS is the first of 32 tokens; all 31 of the text are scored, and none is scored or read twice."""
    ids = words(text)
    windows = [[BOS, *ids[start : start + 31]] for start in (0, 31, 62)]
    result = evaluate(dense, text, seq_len=32, max_tokens=96, reference=dense)
    assert result.nll == pytest.approx(obvious_nll(dense, windows), rel=1e-5)
    assert (result.tokens, result.bos) == (93, "w7")
    assert result.agreement is not None
    assert (result.agreement.nll, result.agreement.kl, result.agreement.tokens) == (result.nll, 0, 93)
    without = evaluate(dense, text, seq_len=32, max_tokens=96, bos="never")
    assert without.nll == pytest.approx(
        obvious_nll(dense, [ids[start : start + 32] for start in (0, 32, 64)]), rel=1e-5
    )
    assert without.bos is None
    assert without.nll != pytest.approx(result.nll, rel=1e-4)  # negative control


def test_an_opening_of_two_tokens_is_not_scored(dense: Path, text: Path, tmp_path: Path) -> None:
    model = set_bos(add_tokenizer(make_llama(tmp_path / "glm")), added="w8 w9")
    ids = words(text)
    windows = [[8, 9, *ids[start : start + 30]] for start in (0, 30)]
    result = evaluate(model, text, seq_len=32, max_tokens=64, reference=model)
    assert result.nll == pytest.approx(obvious_nll(model, windows, context=2), rel=1e-5)
    assert result.agreement is not None
    assert result.tokens == result.agreement.tokens == 60
    with pytest.raises(ValueError, match=r"no window of 2 tokens \(at least 3\)"):
        evaluate(model, text, seq_len=2)


def test_the_command_says_which_token(dense: Path, text: Path) -> None:
    command = ["eval", str(dense), "--text", str(text), "--seq-len", "32", "--max-tokens", "64"]
    assert json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)["bos"] == "w7"
    assert "over 62 tokens, windows behind w7, " in CliRunner().invoke(app, command).stdout


def test_contexts_of_the_continuation_task(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    documents = [" ".join(f"w{(3 * i + j * j) % 11 + 20}" for j in range(60)) for i in range(20)]
    path.write_text("\n\n".join(documents))
    tokenizer = AutoTokenizer.from_pretrained(dense)
    plain, opened = (text_items(tokenizer, Beginning(path, tokenizer), bos=bos) for bos in ("never", "auto"))
    assert torch.equal(opened.contexts[:, 1:], plain.contexts)
    assert set(opened.contexts[:, 0].tolist()) == {BOS}
    assert torch.equal(opened.spans, plain.spans)


def test_a_chat_that_begins_with_bos_gets_no_second_one(dense: Path, tmp_path: Path) -> None:
    """The template writes it, as Llama 3's and Gemma's do; the tokenizer would add another."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.chat_template = TEMPLATES["gemma"]
    said = [" ".join(f"w{(3 * i + j * j) % 11 + 20}" for j in range(50)) for i in range(20)]
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in said)
    )
    chats = Beginning(tmp_path / "chats.jsonl", tokenizer)
    windows = text_windows(tokenizer, chats, 52, 52 * 20).tolist()  # BOS, the role, 50 words
    assert [window[0] for window in windows] == [BOS] * 20
    assert [window.count(BOS) for window in windows] == [1] * 20
    assert [window[2:] for window in windows] == [[int(word[1:]) for word in text.split()] for text in said]
    for context in text_items(tokenizer, chats).contexts.tolist():
        assert context[0] == BOS
        assert context.count(BOS) == 1


@pytest.mark.parametrize(
    ("how", "bos", "first"),
    [
        ({"added": "w7"}, "auto", [7, 3]),
        ({"added": "w7"}, "never", [3, 4]),
        ({"template": "gemma"}, "auto", [7, 3]),
        ({}, "auto", [3, 4]),
        ({}, "always", [7, 3]),
    ],
)
def test_lm_eval_reads_the_same_start(
    how: dict[str, Any], bos: Any, first: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    model_dir = set_bos(add_tokenizer(make_llama(tmp_path / "model")), **how)
    config = model_dir / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token": "w2"}))
    items = tmp_path / "items.jsonl"
    items.write_text(json.dumps({"q": "w3 w4", "choices": ["w5", "w6"], "a": 0}) + "\n")
    (tmp_path / "pairs.yaml").write_text(
        f"task: pairs\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {items}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{a}}'\n"
    )
    model, seen = load_model(model_dir), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    Harness(["pairs"], tmp_path).run(model, AutoTokenizer.from_pretrained(model_dir), bos=bos)
    assert seen
    assert all(row[:2].tolist() == first for batch in seen for row in batch)


# -- pruning and recovery ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::vllm_spense.pruning.warnings.PruneWarning")
def test_prune_trial_and_recover(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration, gradient pass, trial and recovery read [BOS, text]; the records say so."""
    read: list[torch.Tensor] = []
    inputs, train = run.LayerInputs, recovery.train

    def embed(network: Any, windows: torch.Tensor, *rest: Any, **options: Any) -> Any:
        read.append(windows)
        return inputs(network, windows, *rest, **options)

    def trained(student: Any, teacher: Any, windows: torch.Tensor, *rest: Any) -> Any:
        read.append(windows)
        return train(student, teacher, windows, *rest)

    monkeypatch.setattr(run, "LayerInputs", embed)
    monkeypatch.setattr(recovery, "train", trained)
    config = PruneConfig(calibration=str(text), num_samples=20, seq_len=64, joint=0)
    report = prune(dense, tmp_path / "pruned", config)
    ids = torch.tensor(words(text))
    expected = sample_windows(ids, 20, 64, 0)[:, :-1]
    asked = [expected[:16], expected[-8:], expected[-16:-8], expected]  # gradient pass, pilot, guard, layers
    for windows, wanted in zip(read, asked, strict=True):
        assert windows[:, 0].tolist() == [BOS] * len(windows)
        assert torch.equal(windows[:, 1:], wanted)
    provenance = Checkpoint(tmp_path / "pruned").require_spense().provenance
    assert provenance["calibration"]["bos"] == "w7"
    assert "bos" not in provenance["options"]
    assert "seed 0, each behind w7" in (tmp_path / "pruned" / "README.md").read_text()

    output = StringIO()
    try_checkpoint(report, Console(file=output))
    assert report.text_end is not None
    end = report.text_end.ids.tolist()
    length = min(512, len(end)) - 1
    blocks = [[BOS, *end[i : i + length]] for i in range(0, len(end) - length + 1, length)]
    found = re.match(r"Perplexity ([\d.]+) on (\d+) tokens", output.getvalue())
    assert found is not None
    assert float(found[1]) == pytest.approx(math.exp(obvious_nll(tmp_path / "pruned", blocks)), rel=1e-4)
    assert int(found[2]) == length * len(blocks)

    again = RecoveryConfig(calibration=str(text), steps=2, seq_len=32)
    recover(tmp_path / "pruned", tmp_path / "recovered", again, dense)
    assert torch.equal(read[-1][:, 1:], sample_windows(ids, 2 + HELD_OUT, 32, 1)[:2, :-1])
    assert read[-1][:, 0].tolist() == [BOS] * 2
    entry = Checkpoint(tmp_path / "recovered").require_spense().provenance["recovery"][0]
    assert entry["text"]["bos"] == "w7"


def test_without_bos_the_records_are_the_old_ones(dense: Path, text: Path, tmp_path: Path) -> None:
    for usual in (PruneConfig(calibration="x"), RecoveryConfig(calibration="x")):
        assert "bos" not in usual.decisive()
    config = PruneConfig(preset="wanda", calibration=str(text), num_samples=4, seq_len=64, bos="never")
    prune(dense, tmp_path / "out", config)
    provenance = Checkpoint(tmp_path / "out").require_spense().provenance
    assert set(provenance["calibration"]) == {"source", "sha256"}
    assert provenance["options"]["bos"] == "never"
    assert "bos='never'" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.model
def test_smollm2_reads_the_same_windows_as_before(assets: Path) -> None:
    """Its BOS token only marks turns of a chat. The windows as they were made before BOS was looked at."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "SmolLM2-135M-Instruct")
    assert opening(tokenizer) == ()
    path = assets / "wikipedia" / "test.txt"
    ids = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    assert torch.equal(tokenize(tokenizer, path.read_text()), ids)
    starts = torch.randint(0, len(ids) - 512 + 1, (64,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample_windows(ids, 64, 512, 3), ids[starts[:, None] + torch.arange(512)])
    assert torch.equal(
        text_windows(tokenizer, Beginning(path, tokenizer), 512, 16384), ids[:16384].view(32, 512)
    )


def test_spense_and_dense_agree_on_the_start(dense: Path, text: Path, tmp_path: Path) -> None:
    spense = make_spense(dense, tmp_path / "spense")
    found = asdict(evaluate(spense, text, seq_len=32, max_tokens=64, reference=dense))
    assert found["bos"] == "w7"
    set_bos(add_tokenizer(make_llama(tmp_path / "other")))
    with pytest.raises(ValueError, match="splits the text into other tokens"):
        evaluate(spense, text, seq_len=32, max_tokens=64, reference=tmp_path / "other")

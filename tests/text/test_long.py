"""Long texts: as much is read and tokenised as is needed, and the numbers are those of the whole text."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.tiny_text import add_tokenizer, write_text
from vllm_spense.evaluation.continuation import text_items
from vllm_spense.evaluation.perplexity import text_windows
from vllm_spense.text import Beginning, calibrate, find_sources, sample_windows, text_end
from vllm_spense.text import beginning as beginnings
from vllm_spense.text import calibration as calibrations
from vllm_spense.text.calibration import random_pieces


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(add_tokenizer(tmp_path_factory.mktemp("words")))


def prose(characters: int, seed: int = 0) -> str:
    """Text with long and short runs of what tokenizers merge: letters, spaces, line ends, dashes."""
    generator = random.Random(seed)
    parts, length = [], 0
    while length < characters:
        kind = generator.choice(["word"] * 12 + ["\n", " ", "-", "word run"])
        if kind == "word":
            part = "".join(generator.choice("etaoin") for _ in range(generator.randrange(1, 9))) + " "
        elif kind == "word run":
            part = generator.choice("etaoin") * generator.randrange(1, 60)
        else:
            part = kind * generator.randrange(1, 40)
        parts.append(part)
        length += len(part)
    return "".join(parts)


def trained(kind: str) -> Any:
    """A BPE tokenizer of each of the two common makes: words split off first, or nothing split at all."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":  # GPT-2, Llama 3, Qwen, SmolLM2
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:  # Llama 2, Gemma: blanks are characters like others
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    tokenizer.train_from_iterator([prose(3000, seed) for seed in range(1, 6)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "whole"])
def test_first_tokens_are_those_of_the_whole_text(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = trained(kind)
    monkeypatch.setattr(beginnings, "MARGIN", 128)
    (tmp_path / "text.txt").write_text(prose(20_000))
    whole = torch.tensor(
        tokenizer((tmp_path / "text.txt").read_text(), add_special_tokens=False)["input_ids"]
    )
    for count in [*range(1, 400), *range(400, len(whole) + 50, 97)]:
        text = Beginning(tmp_path / "text.txt", tokenizer)
        assert torch.equal(text.tokens(tokenizer, count), whole[:count])
    text = Beginning(tmp_path / "text.txt", tokenizer)  # asked again, for more, for fewer
    for count in (10, 1000, 100, len(whole) + 1, 5):
        assert torch.equal(text.tokens(tokenizer, count), whole[:count])


@pytest.mark.model
def test_first_tokens_of_a_trained_tokenizer(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "SmolLM2-135M-Instruct")
    path = assets / "wikipedia" / "valid.txt"
    whole = torch.tensor(tokenizer(path.read_text(), add_special_tokens=False, verbose=False)["input_ids"])
    for count in (1, 512, 16384, 40_000, len(whole), 10**6):
        assert torch.equal(Beginning(path, tokenizer).tokens(tokenizer, count), whole[:count])
    documents = [part for part in path.read_text().split("\n\n") if part.strip()]
    assert Beginning(path, tokenizer).documents() == documents


def test_evaluation_reads_no_further_than_it_needs(words: Any) -> None:
    """A text that never ends."""
    ours, theirs = os.pipe()
    written = 0

    def feed() -> None:
        nonlocal written
        try:
            while True:
                written += os.write(theirs, b"w1 w2 w3 w4 w5 w6\n\n" * 500)
        except BrokenPipeError:
            os.close(theirs)

    thread = threading.Thread(target=feed)
    thread.start()
    text = Beginning(f"/dev/fd/{ours}", words)
    assert text_windows(words, text, 32, 3200).shape == (100, 32)
    assert written < 3 << 20  # of 3200 tokens with 20 kB, and of what is read ahead
    assert set(text.documents()) >= {"w1 w2 w3 w4 w5 w6"}
    assert written < 14 << 20
    del text
    os.close(ours)
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_items_come_from_the_first_documents(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"w{i} w{i + 1}" for i in range(500)))
    monkeypatch.setattr("vllm_spense.text.streams.PIECE", 100)
    whole = Beginning(tmp_path / "text.txt", words).documents()
    assert len(whole) == 500
    monkeypatch.setattr(beginnings, "ENOUGH", 1000)
    text = Beginning(tmp_path / "text.txt", words)
    some = text.documents()
    assert 90 < len(some) < 130
    assert some[:-1] == whole[: len(some) - 1]
    text.characters(5000)  # whatever else was asked for
    assert text.documents() == some
    with pytest.raises(ValueError, match=r"text\.txt: no document gives an item"):
        text_items(words, text)


# -- calibration ---------------------------------------------------------------------------------


def test_a_text_of_ordinary_size_gives_the_old_windows(words: Any, tmp_path: Path) -> None:
    path = write_text(tmp_path / "text.txt")
    ids = torch.tensor([int(word[1:]) for word in path.read_text().split()])
    found = calibrate(find_sources(path), words, 9, 64, 3)
    starts = torch.randint(0, 4000 - 64 + 1, (9,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(found.windows, ids[starts[:, None] + torch.arange(64)])
    assert torch.equal(found.windows, sample_windows(ids, 9, 64, 3))
    assert torch.equal(found.end.ids, text_end(ids, 9, 64, 3).ids)
    assert found.tokens == 4000
    assert found.record.dump() == {
        "source": "text.txt",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


@pytest.fixture
def long_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Long by a smaller measure, so that it is made quickly; the next limit is what 8 windows need."""
    monkeypatch.setattr(calibrations, "LONG", 50_000)
    monkeypatch.setattr("vllm_spense.text.streams.PIECE", 9_999)
    return write_text(tmp_path / "text.txt", 100_000)


def inside(window: list[int], ids: bytes) -> int:
    """Where ``window`` stands in ``ids`` (two bytes each), -1 for nowhere."""
    at = ids.find(b"".join(token.to_bytes(2, "little") for token in window))
    return at // 2 if at >= 0 else -1


@pytest.mark.parametrize("opening", [(), (7,)])
def test_windows_of_a_long_text(opening: tuple[int, ...], words: Any, long_text: Path) -> None:
    """They are parts of it, from all over, fixed by the seed; its end is in none of them."""
    if opening:
        words.bos_token = "w7"
    tokens = [int(word[1:]) for word in long_text.read_text().split()]
    ids = b"".join(token.to_bytes(2, "little") for token in tokens)
    read: list[int] = []
    arguments = (find_sources(long_text), words, 8, 64)
    bos: Any = "always" if opening else "never"
    found = calibrate(*arguments, 0, bos=bos, progress=read.append)
    assert found.windows.shape == (8, 64)
    places = [inside(window[len(opening) :], ids) for window in found.windows.tolist()]
    assert all(tuple(window[: len(opening)]) == opening for window in found.windows.tolist())
    assert min(places) >= 0
    assert len(set(places)) == 8
    assert max(places) - min(places) > 30_000
    assert found.end.ids.tolist() == tokens[-2048:]
    assert not found.end.calibrated
    assert max(places) + 64 <= len(tokens) - 2048
    assert found.tokens is None
    assert found.record.pieces == 8
    assert found.record.sha256 == hashlib.sha256(long_text.read_bytes()).hexdigest()
    assert len(read) > 5
    again, other = (calibrate(*arguments, seed, bos=bos) for seed in (0, 1))
    assert torch.equal(again.windows, found.windows)
    assert not torch.equal(other.windows, found.windows)


def test_a_token_may_be_longer_than_expected(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window is put together from several pieces then, and an absurd text is refused."""
    monkeypatch.setattr(calibrations, "LONG", 50_000)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"w{i % 512}{' ' * 12}" for i in range(40_000)))
    sources = find_sources(path)
    assert calibrate(sources, words, 4, 1500, 0).windows.shape == (4, 1500)
    path.write_text("w1" + " " * 800_000)
    with pytest.raises(ValueError, match="over 8 characters per token nearly everywhere"):
        calibrate(sources, words, 4, 1500, 0)


def test_pieces_have_equal_chances() -> None:
    """And do not depend on how the text arrives."""
    text = "".join(f"{i:04}" for i in range(42))

    def chunks(size: int) -> Iterator[str]:
        yield from (text[i : i + size] for i in range(0, len(text), size))

    drawn: Counter[str] = Counter()
    for seed in range(2000):
        pieces, end = random_pieces(chunks(7), 4, 10, seed)
        assert end == "00400041"
        assert len(set(pieces)) == 10
        drawn.update(pieces)
        if seed < 20:
            assert (pieces, end) == random_pieces(chunks(1 + seed * 9), 4, 10, seed)
    assert set(drawn) == {f"{i:04}" for i in range(40)}
    assert all(abs(count - 500) < 100 for count in drawn.values())  # five standard deviations
    assert random_pieces(chunks(5), 100, 3, 0) == ([], text)

"""What the compiler made of the kernels for activation-sparse MLPs, and what their operators refuse."""

from __future__ import annotations

import re

import pytest
import torch

from tests.kernels.sass import functions

KERNELS = {
    "pack_kernelILi4EEE": (1, "LDG.E.64"),  # wide loads at least, and how wide
    "pack_kernelILi8EEE": (1, "LDG.E.128"),
    "neurons_kernelILi4EEE": (8, "LDG.E.128"),
    "neurons_kernelILi8EEE": (8, "LDG.E.128"),
    "add_kernelE": (4, "LDG.E.128"),
}


def kernels() -> dict[str, str]:
    """SASS by name and template arguments."""
    found = {
        name: re.search(r"_ZN6spense3mlp\d+(\w+?)v?NS_13SparseMlpArgsE", name) for name in functions("sm_90a")
    }
    return {match[1]: functions("sm_90a")[name] for name, match in found.items() if match}


def count(sass: str, opcode: str) -> int:
    return len(re.findall(rf"(?<![\w.]){re.escape(opcode)}\b", sass))


def test_every_instance_is_compiled_without_local_memory_and_atomics() -> None:
    assert set(kernels()) == set(KERNELS)
    for name, sass in kernels().items():
        assert not re.search(r"\b(STL|LDL)\b", sass), f"{name} spills registers"
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", sass), name


def test_rows_are_read_by_wide_loads_several_at_a_time() -> None:
    for name, (loads, width) in KERNELS.items():
        sass = kernels()[name]
        assert count(sass, width) >= loads, name
        if loads > 1:  # issued before the first of them is waited for: nothing is computed between them
            assert longest_run(sass, "LDG.E.128", "FFMA") >= loads, name


def longest_run(sass: str, opcode: str, stop: str) -> int:
    """Most instructions of one kind without one of the other between them."""
    longest = run = 0
    for found in re.finditer(rf"(?<![\w.])({re.escape(opcode)}|{stop})\b", sass):
        run = run + 1 if found[1] == opcode else 0
        longest = max(longest, run)
    return longest


def test_loading_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="load_sparse_mlp failed with CUDA error"):
        torch.ops.spense.load_sparse_mlp()

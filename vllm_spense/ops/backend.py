"""What a back end of an operator is, and how one is chosen.

A back end turns the loaded checkpoint tensors into the tensors it computes on, once (``prepare``), and
runs one operator on them per forward (``apply``). Prepared shapes and dtypes depend on the spec
alone, so reloading weights can copy into the old storage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

Tensors = dict[str, torch.Tensor]
Spec_contra = TypeVar("Spec_contra", contravariant=True)
AnyBackend = TypeVar("AnyBackend", bound="Legal[Any]")


class Legal(Protocol[Spec_contra]):
    """What is asked of a back end of any operator when one is chosen."""

    name: str

    def why_not(self, spec: Spec_contra, device: torch.device) -> str | None:
        """None when this back end can run the layer there, else the reason in one line."""


class Backend(Legal[Spec_contra], Protocol[Spec_contra]):
    """One way to run a linear layer that ``Spec`` describes; stateless."""

    def prepare(self, spec: Spec_contra, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """From checkpoint tensors to run-time tensors.

        Given are both regions and the metadata, empty ones included, and the codec's scales; no bias.
        Takes ownership: the inputs' memory may be overwritten and be the result's.
        The tensor ``weight_packed`` must be among them: vLLM's LoRA code looks for it.
        """

    def apply(
        self,
        spec: Spec_contra,
        tensors: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """``x [M, K]`` to ``y [M, N]`` in x's dtype."""


def select(
    backends: Sequence[AnyBackend], spec: Any, device: torch.device, name: str | None = None
) -> AnyBackend:
    """The first legal back end, or the named one; ``ValueError`` says why a named one cannot run."""
    for backend in backends:
        if name is not None and backend.name != name:
            continue
        reason = backend.why_not(spec, device)
        if reason is None:
            return backend
        if name is not None:
            raise ValueError(f"back end {name!r} cannot run this layer: {reason}")
    known = ", ".join(b.name for b in backends)
    raise ValueError(f"unknown back end {name!r} (known: {known})")

"""Lets torchvision's build for GPUs be imported beside a torch for CPUs; put this directory on PYTHONPATH.

PyPI has no other build. Its library then does not load, so the two operators that importing the
package asks for are declared here, as they would be there. Nothing calls them: models resize images with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

_LIBRARIES = []  # an operator is gone with its library


class _Declare:
    """Sees the first import of torchvision, and finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision._meta_registrations":
            import torch

            if not hasattr(torch.ops.torchvision, "nms"):
                _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
                for operator in ("nms", "qnms"):
                    _LIBRARIES[0].define(
                        f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    )


sys.meta_path.insert(0, _Declare())

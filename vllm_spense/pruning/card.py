"""The model card (README.md) of a pruned checkpoint."""

from __future__ import annotations

from typing import Any

from vllm_spense.pruning.config import PruneConfig

_SELECTIONS = {
    "spensegpt": "the last ones",
    "spensegpt+": "the highest scored",
    "fisher": "those that would cost the most loss as 2:4",
}
_METHODS = {"obs": "OBS (SparseGPT)", "wanda": "Wanda", "magnitude": "magnitude"}


def model_card(
    base_model: str,
    config: PruneConfig,
    mlp_sparsity: float,
    sizes: list[int],
    losses: dict[str, float],
    provenance: dict[str, Any],
) -> str:
    """Markdown text: what the model is, how it was made, what was lost per layer, how to serve it."""
    weights = "FP8 (e4m3, one scale per output channel)" if config.weight_dtype == "fp8" else "bf16"
    selected = _SELECTIONS[config.selection]
    calibration = provenance["calibration"]
    if calibration is None:
        data = "none (data-free)"
    else:
        data = (
            f"{config.num_samples} windows of {config.seq_len} tokens from {calibration['source']} "
            f"(SHA-256 {calibration['sha256'][:16]}…), seed {config.seed}"
        )
    return f"""\
---
base_model: {base_model}
library_name: vllm
tags: [spense, "2:4", sparse, vllm]
---
# {base_model}, pruned to Spense

Spense layers are part 2:4 sparse and part dense. In this model the MLPs are pruned; attention,
embeddings and the head are not.

| | |
|---|---|
| base model | {base_model} |
| method | {_METHODS[config.method]}, selection {config.selection} |
| dense intermediate indices | {config.dense_ratio:.0%}, {selected} |
| zeros in the MLP | {mlp_sparsity:.1%} |
| weights | {weights} |
| calibration | {data} |
| tensor-parallel sizes | {", ".join(map(str, sizes))} |

## Serve

```
pip install "vllm-spense[vllm]"
vllm serve DIR
```

## Quality

Pruning without retraining costs quality. Measure this checkpoint before relying on it:
`spense eval DIR --text FILE`, against the same command on {base_model}. The licence of the base model
applies.

## Loss per layer

Relative squared output error on the calibration inputs{_no_data(calibration)}.

{_loss_table(losses)}
"""


def _no_data(calibration: Any) -> str:
    return "" if calibration is not None else " (here of the weights: nothing was calibrated)"


def _loss_table(losses: dict[str, float]) -> str:
    layers: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        layer, _, short = name.partition(".mlp.")
        layers.setdefault(layer, {})[short] = loss
    lines = ["| layer | gate | up | down |", "|---|---|---|---|"]
    for layer, found in layers.items():
        cells = (f"{found[s]:.4f}" for s in ("gate_proj", "up_proj", "down_proj") if s in found)
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)

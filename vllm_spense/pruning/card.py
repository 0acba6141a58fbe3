"""The model card (README.md) of a pruned checkpoint."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from vllm_spense.format import Codecs
from vllm_spense.format.codecs import codec
from vllm_spense.format.manifest import replace_text
from vllm_spense.models.parts import layer_name
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.sources import BaseModel
from vllm_spense.text import TextRecord

_SELECTIONS = {
    "spensegpt": "the last ones",
    "spensegpt+": "the highest scored",
    "fisher": "those that would cost the most loss as 2:4",
    "consensus": "those that rank highest by their cost in loss and by SpenseGPT+'s score together",
}
_PRUNED = {
    False: "the MLPs are pruned; attention,\nembeddings and the head are not",
    True: "the MLPs and the\nprojections of attention are pruned; embeddings and the head are not",
}
_METHODS = {"obs": "OBS (SparseGPT)", "wanda": "Wanda", "magnitude": "magnitude"}
_BACK_ENDS = {
    "fp8": (
        "H100, H200 (sm_90) and x86-64 CPUs with AVX2\ncompute on the compressed weights, B200 (sm_100) "
        "where `spense tune` measured\nthat as faster; other devices decompress them at load."
    ),
    "int8": (
        "x86-64 CPUs with AVX2 compute on the compressed\nweights; GPUs have no kernels for INT8 yet and "
        "decompress in every call, an FP8\ncheckpoint is for them."
    ),
}
_NO_BACK_END = "weights are decompressed at load\non every device; an FP8 checkpoint is what saves memory."
NOT_MEASURED = "Not measured after pruning."
CARD_NAME = "README.md"


def model_card(
    base: BaseModel,
    config: PruneConfig,
    mlp_sparsity: float,
    sizes: list[int],
    losses: dict[str, float],
    provenance: dict[str, Any],
) -> str:
    """Markdown text: what the model is; how it was made, is served, and is measured."""
    attention = config.attention_ratio < 1
    heads = f"| dense key/value heads | {config.attention_ratio:.0%}, rounded |\n" if attention else ""
    stored, pruned = codec(config.weight_dtype), config.codecs
    weights = f"{stored.title} ({stored.details})" if stored.details else stored.title
    if pruned != Codecs(stored, stored):
        weights = f"2:4 regions {pruned.sparse.title}, dense regions {pruned.dense.title}; all else {weights}"
    back_ends = _BACK_ENDS.get(pruned.name, f"{pruned.title} {_NO_BACK_END}")
    selected = _SELECTIONS[config.selection]
    if config.allocation != "uniform":
        selected += f", under one budget of {config.allocation} for all layers"
    calibration, versions = provenance["calibration"], provenance["versions"]
    if calibration is None:
        data = "none (data-free)"
    else:
        behind = f", each behind {calibration['bos']}" if "bos" in calibration else ""
        data = (
            f"{config.num_samples} windows of {config.seq_len} tokens from {_named(calibration['source'])} "
            f"(SHA-256 {calibration['sha256'][:16]}…), seed {config.seed}{behind}"
        )
    revision = "" if base.revision is None else f" at commit {base.revision}"
    return f"""\
---
base_model: {_yaml(base.name)}
library_name: vllm
tags: [spense, "2:4", sparse, vllm]
---
# {base.name}, pruned to Spense

Spense layers are part 2:4 sparse and part dense. In this model {_PRUNED[attention]}.

| | |
|---|---|
| base model | {base.name}{revision} |
| method | preset {config.preset}: {_METHODS[config.method]}{_refined(config)} |
| dense intermediate indices | {config.dense_ratio:.0%}, {selected} |
{heads}| zeros in the MLP | {mlp_sparsity:.1%} |
| weights | {weights} |
| calibration | {data} |

## Creation

```python
from vllm_spense import PruneConfig, prune

{_call(base.name, config, calibration)}
```

vllm-spense {versions["vllm-spense"]}, torch {versions["torch"]}, transformers {versions["transformers"]}.

### Loss per layer

Relative squared output error on the calibration inputs{_no_data(calibration)}.{_exceptions(provenance)}

{_loss_table(losses)}

## Deployment

```
pip install "vllm-spense[vllm]"
vllm serve DIR --tensor-parallel-size N
```

N is one of {", ".join(map(str, sizes))}. {back_ends} `spense doctor` names the
back end of this machine. Engines without the plugin can serve `spense export DIR -o DENSE --format FORMAT`.

In transformers, `import vllm_spense` comes first; `from_pretrained` then gives the dense weights, for
training, adapters and evaluation. Without that import transformers warns `Unknown quantization type, got
spense` and fills the pruned layers with random numbers.

## Evaluation

{NOT_MEASURED}

Pruning without retraining costs quality. Compare this checkpoint with {base.name} on text that matters
to you before relying on it. The licence of the base model applies.

```
spense eval DIR --text FILE --reference {shlex.quote(base.name)}
```
"""


def record_evaluation(directory: Path, text: str) -> None:
    """Put what was measured into the card of a checkpoint just written; its manifest stays right."""
    card = (directory / CARD_NAME).read_text(encoding="utf-8")
    replace_text(directory, CARD_NAME, card.replace(NOT_MEASURED, text))


def _yaml(name: str) -> str:
    """A name as a YAML value; quoted where it could be read as something else."""
    return name if re.fullmatch(r"[A-Za-z][\w./-]*", name) else json.dumps(name, ensure_ascii=False)


def _call(base_model: str, config: PruneConfig, calibration: Any) -> str:
    """The call that makes this checkpoint: its preset, and what differs from that and from the defaults."""
    usual = PruneConfig(preset=config.preset, calibration="").decisive()
    options = {"preset": config.preset}
    if calibration is not None:
        options["calibration"] = calibration["source"]
    options |= {name: value for name, value in config.decisive().items() if value != usual.get(name)}
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"prune({base_model!r}, 'DIR', PruneConfig({given}))"


def _refined(config: PruneConfig) -> str:
    then = ", then least squares" if config.refit else ""
    return f"{then} and better pairs" if config.refine else then


def _exceptions(provenance: dict[str, Any]) -> str:
    """Sentences on the Hessians that needed more damping than configured and on the MLPs whose joint fit was
    left out, if there are any."""
    raised = ", ".join(f"{name} ({value:g})" for name, value in provenance["raised_damping"].items())
    unfitted = ", ".join(provenance["joint_left_out"])
    text = f"\nThese input Hessians needed more damping: {raised}." if raised else ""
    if unfitted:
        text += f"\nThe joint fit did not lower the error on tokens kept back and is left out in {unfitted}."
    return text


def _named(source: str | list[str]) -> str:
    return source if isinstance(source, str) else TextRecord(source, "").names


def _no_data(calibration: Any) -> str:
    return "" if calibration is not None else " (here of the weights: nothing was calibrated)"


def _loss_table(losses: dict[str, float]) -> str:
    layers: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        short = name.rpartition(".")[2].removesuffix("_proj")
        layers.setdefault(layer_name(name), {})[short] = loss
    columns = list(dict.fromkeys(short for found in layers.values() for short in found))
    lines = [f"| layer | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for layer, found in layers.items():
        cells = (f"{found[short]:.4f}" if short in found else "" for short in columns)
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)

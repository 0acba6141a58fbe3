"""Run as a program by `test_register.py`: vLLM's own plugin loading, case by case, in a fresh process.

Arguments: a model without quantization, one in vLLM's FP8, a Spense checkpoint. Prints one JSON object: for
each case whether Spense is registered afterwards, and what vLLM makes of the models.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from vllm import plugins
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from vllm.model_executor.model_loader.weight_utils import get_quant_config


def load(allowed: str | None) -> bool:
    """Load all plugins as at a process start; whether Spense is known then, and once."""
    os.environ.pop("VLLM_PLUGINS", None)
    if allowed is not None:
        os.environ["VLLM_PLUGINS"] = allowed
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    assert QUANTIZATION_METHODS.count("spense") <= 1
    return "spense" in QUANTIZATION_METHODS


def seen(directory: str) -> list[str | None]:
    """Quantization that vLLM detects in a model directory, and the class of its configuration."""
    model = ModelConfig(model=directory, skip_tokenizer_init=True, dtype="bfloat16")
    config = get_quant_config(model, LoadConfig()) if model.quantization else None
    return [model.quantization, type(config).__name__ if config else None]


def main(plain: str, fp8: str, spense: str) -> dict[str, Any]:
    found: dict[str, Any] = {"other": load("other"), "empty": load("")}
    sys.modules["vllm_spense.serving.config"] = None  # type: ignore[assignment]
    found["broken"] = load(None)
    found["models while broken"] = [seen(plain), seen(fp8)]
    del sys.modules["vllm_spense.serving.config"]
    found["named"] = load("other,spense")
    found["again"] = load(None)
    found["models"] = [seen(plain), seen(fp8), seen(spense)]
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))

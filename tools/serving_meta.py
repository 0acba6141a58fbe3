"""Builds the served models in real vLLM without weights, on torch's meta device, and counts their bytes.

usage: python -m tools.serving_meta [--models Qwen3-32B …] [--ratios 0.5 0.25] [--pretend-h200]

Shows without a GPU that vLLM takes the configurations of the serving benchmarks, that the plugin gives every
layer its method, and how large parameters are, by the same code that a GPU runs up to its first kernel.
Prints one line of JSON per model. ``--pretend-h200``: for CUDA builds of vLLM on a machine without a GPU;
they need a libcuda.so.1, of which the CUDA toolkit has a stub.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving.models import DENSE, MODELS, ServedModel


def pretend_h200() -> None:
    """Make a CUDA build of vLLM believe that there is one; before anything else of vLLM is imported."""
    import torch
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H200(NonNvmlCudaPlatform):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 141 << 30)
        log_warnings = classmethod(lambda cls: None)
        check_if_supports_dtype = classmethod(lambda cls, dtype: None)

    vllm.platforms._current_platform = H200()
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)


def build(model: ServedModel, variant: str, work: Path) -> dict[str, Any]:
    """Bytes of the parameters and number of layers by linear method."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.model_loader.utils import initialize_model

    directory = model.write(work / f"{model.name}-{variant}", variant)
    options = {"max_model_len": 8200, "max_num_batched_tokens": 8192}
    engine = EngineArgs(model=str(directory), skip_tokenizer_init=True, load_format="dummy", **options)
    config = engine.create_engine_config()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM's loaders do
    with set_current_vllm_config(config):
        one_rank(work)
        with torch.device("meta"):
            built = initialize_model(config)
    torch.set_default_dtype(torch.float32)
    layers = [module for module in built.modules() if isinstance(module, LinearBase)]
    sizes = {name: parameter.nbytes for name, parameter in built.named_parameters()}
    return {
        "model": model.name,
        "variant": variant,
        "parameter_bytes": sum(sizes.values()),
        "mlp_bytes": sum(size for name, size in sizes.items() if ".mlp." in name),
        "methods": dict(Counter(type(layer.quant_method).__name__ for layer in layers)),
    }


def one_rank(work: Path) -> None:
    """The process groups that vLLM's layers ask for their size."""
    from vllm import distributed

    if not distributed.model_parallel_is_initialized():
        distributed.init_distributed_environment(1, 0, f"file://{work}/rendezvous", 0, "gloo")
        distributed.initialize_model_parallel(1, 1, backend="gloo")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ratios", nargs="+", default=["0.5", "0.25"])
    parser.add_argument("--pretend-h200", action="store_true")
    arguments = parser.parse_args()
    if arguments.pretend_h200:
        pretend_h200()
    from vllm_spense.serving.plugin import register

    register()
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.models:
            for variant in (DENSE, *arguments.ratios):
                print(json.dumps(build(MODELS[name], variant, Path(work))), flush=True)


if __name__ == "__main__":
    main()

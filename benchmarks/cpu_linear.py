"""Which arithmetic serves a Spense layer fastest on this CPU? The table in docs/architecture.md.

usage: python benchmarks/cpu_linear.py [--n 3072] [--k 576]
Prints microseconds per call (median): dense fp32 (the `cpu` back end), bf16, FP8 `torch._scaled_mm`, and
the `reference` back end, which decompresses in every call.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from vllm_spense.ops import LinearSpec, online_layout, prune_and_pack, quantize_per_token, select_backend


def median_us(call: Callable[[], object], seconds: float = 0.5) -> float:
    call()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=3072)
    parser.add_argument("--k", type=int, default=576)
    arguments = parser.parse_args()
    n, k = arguments.n, arguments.k
    torch.manual_seed(0)
    layout = online_layout("output", n, k, 0.5)
    tensors = prune_and_pack(torch.randn(n, k), layout)
    spec = LinearSpec("output", n, k, (layout.sparse,), (layout.dense,), torch.float8_e4m3fn)
    device = torch.device("cpu")
    prepared = {b: select_backend(spec, device, b).prepare(spec, tensors) for b in ("cpu", "reference")}
    dense = prepared["cpu"]["weight_packed"]
    bf16, fp8 = dense.bfloat16(), dense.to(torch.float8_e4m3fn)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, W [{n}, {k}], dense ratio 0.5; µs")
    print("| M | fp32 GEMM | bf16 GEMM | FP8 _scaled_mm | cpu back end | reference back end |")
    print("|---|---|---|---|---|---|")
    for m in (1, 8, 32, 128, 512):
        x = torch.randn(m, k).bfloat16()
        wide, (xq, xs) = x.float(), quantize_per_token(x)
        row = [
            median_us(lambda a=wide: a @ dense.t()),
            median_us(lambda a=x: a @ bf16.t()),
            median_us(
                lambda a=xq, s=xs: torch._scaled_mm(
                    a, fp8.t(), s, tensors["weight_scale"][None], out_dtype=torch.bfloat16
                )
            ),
        ]
        for name in ("cpu", "reference"):
            backend = select_backend(spec, device, name)
            row.append(median_us(lambda a=x, b=backend, p=prepared[name]: b.apply(spec, p, a, None)))
        print(f"| {m} | " + " | ".join(f"{us:,.0f}" for us in row) + " |")


if __name__ == "__main__":
    main()

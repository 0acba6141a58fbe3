"""What a pruning run will need (memory, disk, time), from config.json and headers alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_spense.format import Layout
from vllm_spense.pruning.adapters import DecoderLayer, Mlp, decoder, decoder_layers
from vllm_spense.pruning.config import PruneConfig
from vllm_spense.pruning.layer import KEEP_BYTES, LayerPruner
from vllm_spense.pruning.output import REST_SHARD_BYTES
from vllm_spense.pruning.source import SourceModel, meta_network, source_directory

DeviceModel = Literal["here", "h200", "b200"]

THROUGHPUT = {"h200": (6.0e14, 4.5e13), "b200": (1.3e15, 6.0e13)}
"""FLOP/s of large bf16 and fp32 (no TF32) GEMMs: about 0.6 and 0.7 of the data sheets, not measured."""
COLUMN_SECONDS = 8e-5
"""A column of the OBS solver launches about ten small kernels, whatever its length."""
PROCESS_BYTES = {"cpu": 600 << 20, "cuda": 3 << 30}
"""Host memory of Python, torch and transformers before the first tensor."""
CONTEXT_BYTES = 1 << 30
"""Device memory of the CUDA context and the libraries' workspaces."""
SOLVER_MATRICES = 6
"""[K, K] fp32 at the worst moment of a factorisation: H, H + λI, L, the inverse, U, LAPACK's copy."""
CHECK_FACTOR = 3.5
"""fp32 copies of a tensor while it is looked through for NaN: the values, their magnitudes, two masks."""


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer: peak bytes of the device while it is pruned, bytes of its file, FLOP, seconds.

    ``flop`` are those of forward passes in the compute dtype, ``flop_fp32`` those of Hessians,
    factorisations and solvers.
    """

    name: str
    device_bytes: int
    output_bytes: int
    flop: float
    flop_fp32: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """The whole run. ``host_bytes`` leaves out ``activation_bytes``, the cached activations.

    On a CPU the device's memory is the host's and counts in ``host_bytes``; ``device_bytes`` is then 0.
    ``activations`` says where the hidden states wait (``host`` or ``disk``).
    """

    device: str
    dtype: str
    layers: list[LayerPlan]
    device_bytes: int
    host_bytes: int
    activation_bytes: int
    activations: str
    source_bytes: int
    output_bytes: int
    seconds: float


def plan(model: str | Path, config: PruneConfig, device_model: DeviceModel = "here") -> Plan:
    """Estimate ``prune(model, …, config)``. The directory needs config.json; weights are optional.

    With weights there, their headers are checked as the run would (:class:`SourceModel`), and the same
    errors raised. ``here`` measures this machine's GEMMs for a second; else figures of THROUGHPUT.
    """
    directory = source_directory(model)
    cuda = device_model != "here" or torch.cuda.is_available()
    network, stored = _network(directory)
    dtype = stored if cuda else torch.float32
    rates = _measure(dtype, torch.device("cuda" if cuda else "cpu")) if device_model == "here" else None
    sizes = _Sizes(network.config, config, dtype, stored, rates or THROUGHPUT[device_model])
    layers = [sizes.layer(layer) for layer in decoder_layers(network)]
    in_layers = sum(p.numel() for layer in decoder_layers(network) for p in layer.module.parameters())
    rest = [p.numel() for p in network.parameters()]
    outside = (sum(rest) - in_layers) * stored.itemsize
    embedding = sum(p.numel() for c in _embedding(network) for p in c.parameters()) * dtype.itemsize
    working = max([layer.device_bytes for layer in layers] + [embedding * 3 // 2])
    largest = max(p.numel() for n, p in network.named_parameters()) * stored.itemsize
    writing = max(
        min(outside, max(REST_SHARD_BYTES, largest)),
        int(largest * (1 + CHECK_FACTOR * 4 / stored.itemsize)),
        max(layer.output_bytes for layer in layers) + largest,
    )
    host = PROCESS_BYTES["cuda" if cuda else "cpu"] + (writing if cuda else max(writing, working))
    return Plan(
        device=_device_name(device_model, cuda),
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        device_bytes=CONTEXT_BYTES + working if cuda else 0,
        host_bytes=host,
        activation_bytes=max(sizes.activations(layer) for layer in decoder_layers(network)),
        activations=config.cache_activations,
        source_bytes=sum(rest) * stored.itemsize,
        output_bytes=sum(layer.output_bytes for layer in layers) + outside,
        seconds=sum(layer.seconds for layer in layers),
    )


class _Sizes:
    """Arithmetic of one layer. T tokens in N samples of S; K inputs of a linear; I the intermediate size."""

    def __init__(
        self,
        model: Any,
        config: PruneConfig,
        dtype: torch.dtype,
        stored: torch.dtype,
        rates: tuple[float, float],
    ) -> None:
        self.model = model
        self.config = config
        self.dtype = dtype
        self.stored = stored
        self.rates = rates
        self.pruner = LayerPruner(config, None)
        self.calibrated = config.calibration is not None
        self.tokens = config.num_samples * config.seq_len if self.calibrated else 0

    def layer(self, layer: DecoderLayer) -> LayerPlan:
        layouts = self.pruner.layouts(0, layer)  # at the same dense ratio everywhere
        flop, flop_fp32, columns = self._work(layer, layouts)
        fast, slow = self.rates
        return LayerPlan(
            name=layer.name,
            device_bytes=self._device(layer, layouts),
            output_bytes=self._output(layer, layouts),
            flop=flop,
            flop_fp32=flop_fp32,
            seconds=flop / fast + flop_fp32 / slow + columns * COLUMN_SECONDS,
        )

    def activations(self, layer: DecoderLayer) -> int:
        """Hidden states in bf16, attention's outputs and, where they are kept, down's inputs."""
        hidden = self.tokens * self.model.hidden_size
        kept = self.tokens * layer.mlp.intermediate if self._keeps(layer.mlp) and layer.mlp else 0
        return hidden * 2 + (hidden + kept) * self.dtype.itemsize

    def _keeps(self, mlp: Mlp | None) -> bool:
        return mlp is not None and self.tokens * mlp.intermediate * self.dtype.itemsize <= KEEP_BYTES

    def _device(self, layer: DecoderLayer, layouts: dict[str, Layout]) -> int:
        weights = _numel(layer) * self.dtype.itemsize
        packed = [layout.out_features * layout.in_features * 4 for layout in layouts.values()]
        resident = weights + sum(packed)  # the results in fp32, until they are packed
        hidden, mlp = self.model.hidden_size, layer.mlp
        seq = self.config.seq_len if self.calibrated else 0
        widest = max([hidden, *(linear.out_features for linear in layer.dense.values())])
        sample = seq * (4 * hidden + 4 * widest) * self.dtype.itemsize
        if getattr(self.model, "sliding_window", None):  # a mask of its own, and its copy as numbers
            sample += seq * seq * (1 + self.dtype.itemsize)
        if mlp is None:
            return resident + sample
        inner = mlp.intermediate
        sample += seq * inner * ((len(mlp.inner) + 2) * self.dtype.itemsize + 4)
        solver = 4 * SOLVER_MATRICES * max(inner, hidden) ** 2 if self.calibrated else 0
        return resident + 4 * hidden**2 + max(sample + 4 * inner**2, solver + 3 * max(packed))

    def _output(self, layer: DecoderLayer, layouts: dict[str, Layout]) -> int:
        wide = 1 if self.config.weight_dtype == "fp8" else 2
        total = _numel(layer) * self.stored.itemsize
        for layout in layouts.values():
            total -= layout.out_features * layout.in_features * self.stored.itemsize
            for name in layout.regions():
                rows, columns = layout.shape(name)
                total += rows * columns * (1 if name == "sparse_meta" else wide)
            total += layout.out_features * 4 if wide == 1 else 0
        return total

    def _work(self, layer: DecoderLayer, layouts: dict[str, Layout]) -> tuple[float, float, int]:
        """FLOP of forwards, FLOP of statistics and solvers, and sequential columns of the solvers."""
        mlp = layer.mlp
        if not self.calibrated:
            return 0.0, 0.0, 0
        model, tokens, seq = self.model, float(self.tokens), self.config.seq_len
        head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
        flop = 2 * tokens * sum(w.numel() for linear in layer.dense.values() for w in linear.parameters())
        flop += 2 * tokens * seq * model.num_attention_heads * head  # QKᵀ and PV, half of each is masked
        if mlp is None:
            return flop, 0.0, 0
        inner = sum(2 * tokens * linear.weight.numel() for linear in mlp.inner.values())
        scored = self.config.scores_indices
        passes = scored + 1 + (not self._keeps(mlp))
        flop += passes * inner + 2 * tokens * mlp.down.weight.numel()
        sides = (mlp.reader.in_features, mlp.intermediate)
        fp32 = sum(tokens * k * (k + 512) for k in sides)  # the blocks on and above the diagonal
        columns = 0
        if self.config.method == "obs":
            fp32 += sum(4 / 3 * k**3 for k in sides)
            for name in (*mlp.inner, mlp.down_name):
                rows, cut = layouts[name].sparse_shape
                fp32 += rows * cut * (2 * layouts[name].in_features - cut + self.config.block_size)
                columns += cut if rows else 0
        return flop, fp32, columns


def _network(directory: Path) -> tuple[Any, torch.dtype]:
    """The network on meta and the dtype of its weights; with weights there, their headers are checked."""
    if any(directory.glob("*.safetensors")):
        source = SourceModel(directory, torch.device("cpu"))
        return source.network, source.stored_dtype
    raw = json.loads((directory / "config.json").read_bytes())
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    dtype = getattr(torch, name)
    return meta_network(directory, dtype), dtype


def _embedding(network: Any) -> Iterator[Any]:
    yield from (child for name, child in decoder(network).named_children() if name != "layers")


def _numel(layer: DecoderLayer) -> int:
    return sum(p.numel() for p in layer.module.parameters())


def _device_name(device_model: DeviceModel, cuda: bool) -> str:
    if device_model != "here":
        return device_model.upper()
    return torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"


def _measure(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """FLOP/s of square GEMMs on this machine, in ``dtype`` and in fp32."""
    size = 8192 if device.type == "cuda" else 1024
    rates = [_gemm(size, kind, device) for kind in (dtype, torch.float32)]
    return rates[0], rates[1]


def _gemm(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best

"""The pruning run: read a dense model layer by layer, prune it, write it as a Spense checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.format.report import inspect
from vllm_spense.format.target import Target
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.models.parts import DecoderLayer, layer_name, mlp_shapes
from vllm_spense.network import language_head
from vllm_spense.pruning.activations import LayerInputs, in_memory, on_disk
from vllm_spense.pruning.admission import check_layouts
from vllm_spense.pruning.choice.allocation import dense_counts
from vllm_spense.pruning.choice.pilot import Verdict, choose
from vllm_spense.pruning.choice.selection import DenseChoice
from vllm_spense.pruning.choice.sensitivity import index_costs
from vllm_spense.pruning.config import GRADIENT_SELECTIONS, PruneConfig
from vllm_spense.pruning.fingerprint import fingerprint
from vllm_spense.pruning.layer import LayerPruner
from vllm_spense.pruning.output import (
    REST_SHARD_BYTES,
    facts,
    merged,
    pack_layer,
    rehearse,
    restore_layer,
    write_rest,
)
from vllm_spense.pruning.resume import LayerRecord, WorkDirectory
from vllm_spense.pruning.selfcheck import check_replay
from vllm_spense.pruning.source import SourceModel, source_directory
from vllm_spense.pruning.warnings import (
    warn_about_calibration,
    warn_about_experts,
    warn_about_overlap,
    warn_about_size,
    warnings_as_errors,
)
from vllm_spense.sources import base_model, check_windows, load_tokenizer
from vllm_spense.text import Calibration, TextEnd, TextRecord, calibrate, find_sources, listed

GRADIENT_TOKENS = 256
"""A window's part that the gradient pass reads: more windows tell more than longer ones."""


@dataclass(frozen=True)
class PruneProgress:
    """State after one layer: 1-based ``layer`` of ``layers``, losses per MLP module, seconds.

    ``restored``: the layer was finished by an earlier run and only the hidden states were computed.
    ``stage``: nothing is pruned yet in ``text``, where a long text is read (``layer`` are characters so far,
    ``layers`` is 0), in ``check``, which compares the layers with the model's own forward, in
    ``gradient``, where each layer is counted forward and backward, and in ``pilot``, which passes over the
    layers twice and ends with a ``verdict``.
    """

    layer: int
    layers: int
    losses: dict[str, float]
    elapsed: float
    remaining: float
    restored: bool = False
    stage: Literal["text", "check", "gradient", "pilot", "layers"] = "layers"
    verdict: Verdict | None = None


@dataclass(frozen=True)
class PruneReport:
    """What a finished run did. ``mlp_sparsity`` is the part of the MLP's weights that is zero.

    ``losses`` by module name; ``damping``: modules whose Hessian needed more than the configured
    damping, with the value used; ``tensor_parallel_sizes`` that the checkpoint promises; ``text_end``: text
    to try the checkpoint on, None without calibration and after a run that another process ended;
    ``verdict``: how the dense indices were shared out, None where that was not measured.
    """

    directory: Path
    config: PruneConfig
    layers: int
    mlp_sparsity: float
    losses: dict[str, float]
    damping: dict[str, float]
    tensor_parallel_sizes: list[int]
    seconds: float
    text_end: TextEnd | None = None
    verdict: Verdict | None = None


@torch.no_grad()
def prune(
    model: str | Path,
    out: str | Path,
    config: PruneConfig,
    progress: Callable[[PruneProgress], None] | None = None,
) -> PruneReport:
    """Prune ``model`` (a local directory, or a hub name where there is network) into ``out``.

    The method is SpenseGPT (arXiv 2606.10445), true-sequential: down is calibrated behind the pruned
    gate and up, every layer behind the pruned and rounded layers before it. One layer at a time is in
    memory: the model runs in fp32 on CPUs and in its stored dtype on a GPU if there is one; statistics
    and solvers are fp32. Equal inputs, seed and machine give bit-identical directories. ``out`` is
    complete and checked, or not there at all; finished layers of a run that did not end stay beside it
    in ``.OUT.spense-work``, and ``config.resume`` continues from them to the same bytes.

    Raises :class:`~vllm_spense.format.CheckpointError` (a ``ValueError``) for unusable source files,
    :class:`~vllm_spense.models.parts.UnsupportedModelError` (a ``ValueError``) for other
    architectures, ``ValueError`` for calibration text and sizes that do not fit, ``FileExistsError``
    for an ``out`` that is in use, :class:`~vllm_spense.pruning.resume.ResumeError` for an unfinished run
    in the way, :class:`~vllm_spense.pruning.solvers.obs.SolverError` for a Hessian that cannot be factored.
    Warns with :class:`~vllm_spense.pruning.warnings.PruneWarning`; under ``config.strict`` each is a
    ``ValueError`` instead, with the work directory kept as for other errors.
    """
    started = time.monotonic()
    inputs = [model] if config.calibration is None else [model, *listed(config.calibration)]
    target, work = Target(out, overwrite=config.overwrite, inputs=inputs), WorkDirectory(out)
    if not (config.resume and work.published()):
        target.check()
    with work, warnings_as_errors(config.strict):
        if config.resume and work.published():  # killed behind the last step: only to be cleaned up
            return _report_of(Path(out), config, time.monotonic() - started)
        target.rehearse(work.path)
        expected = None  # the record of the text, as far as it is known before the model is looked at
        if config.calibration is not None:
            expected = TextRecord.of(find_sources(config.calibration))
        directory = source_directory(model)
        base = base_model(directory)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False  # H loses its small eigenvalues in TF32
        source = SourceModel(directory, device)
        if config.needs_gradient:
            language_head(source.network)
        warn_about_experts(source.layers, source.stored_dtype)
        check_layouts(source.layers, config, directory)
        rehearse(source, config, base, expected)  # what cannot be pruned or written is refused first
        warn_about_size(sum(p.numel() for p in source.network.parameters()), config)
        text = _calibration(directory, config, started, progress)
        windows = None if text is None else text.windows
        record = None if text is None else text.record
        if windows is not None:
            warn_about_calibration(windows.numel(), source.layers, config)
        made_from = fingerprint(base, source.checkpoint, config, record, windows, device)
        finished = work.begin(made_from, resume=config.resume, restart=config.restart)
        if windows is not None and not finished:
            check_replay(source, windows[:2], _steps("check", started, progress))
        choice, verdict = None, None
        if windows is not None and config.needs_gradient:
            choice, verdict = _choose(source, windows, config, work, finished, started, progress)
        hidden = None if windows is None else _embed(source, windows, config, work)
        records = _LayerLoop(work, source, config, hidden, choice, started, progress).run(finished)

        def check(checkpoint: Path) -> None:
            check_checkpoint(Checkpoint(checkpoint))
            work.announce(checkpoint)

        with CheckpointWriter(
            out,
            overwrite=config.overwrite,
            inputs=[*inputs, directory],
            max_shard_bytes=REST_SHARD_BYTES,
            work=work.path,
            check=check,
        ) as writer:
            for index in range(len(records)):
                writer.adopt(work.shard(index))
            write_rest(writer, source, config, base, record, records, verdict)
    written = facts(records, config, source.layers)
    return PruneReport(
        directory=Path(out),
        config=config,
        layers=len(records),
        mlp_sparsity=written.mlp_sparsity,
        losses=merged(records)[1],
        damping={name: value for record in records for name, value in record.damping.items()},
        tensor_parallel_sizes=written.tensor_parallel_sizes,
        seconds=time.monotonic() - started,
        text_end=None if text is None else text.end,
        verdict=verdict,
    )


class _LayerLoop:
    """Brings every layer into a state where its file and record are in the work directory."""

    def __init__(
        self,
        work: WorkDirectory,
        source: SourceModel,
        config: PruneConfig,
        inputs: LayerInputs | None,
        choice: DenseChoice | None,
        started: float,
        progress: Callable[[PruneProgress], None] | None,
    ) -> None:
        self.work = work
        self.source = source
        self.config = config
        self.inputs = inputs
        self.pruner = LayerPruner(config, inputs, choice)
        self.started = started
        self.progress = progress

    def run(self, finished: int) -> list[LayerRecord]:
        """Prune all layers but the first ``finished``, which are only run."""
        records = [self.work.read_layer(index) for index in range(finished)]
        loop_started = time.monotonic()
        for index, layer in enumerate(self.source.layers):
            restored = index < finished
            if restored:
                self._restore(index, layer, records[index])
            else:
                records.append(self._prune(index, layer))
            if self.progress is not None:
                self.progress(self._progress(index, records, restored, time.monotonic() - loop_started))
        return records

    def _prune(self, index: int, layer: DecoderLayer) -> LayerRecord:
        began = time.monotonic()
        with self.source.resident(layer.module):
            pruned = self.pruner.prune(index, layer)
        tensors, modules = pack_layer(pruned, layer, self.source, self.config)
        seconds = round(time.monotonic() - began, 3)
        record = LayerRecord(modules, pruned.losses, pruned.damping, pruned.left_out, seconds)
        self.work.save_layer(index, tensors, record)
        return record

    def _restore(self, index: int, layer: DecoderLayer, record: LayerRecord) -> None:
        if self.inputs is None:
            return
        with self.source.resident(layer.module):
            restore_layer(layer, record.modules, self.work.shard(index), self.config.weight_dtype)
            self.inputs.advance(index, layer.module)

    def _progress(
        self, index: int, records: list[LayerRecord], restored: bool, spent: float
    ) -> PruneProgress:
        layers = len(self.source.layers)
        left = layers - len(records)
        if restored:  # what pruning took is on record; restoring goes on as it went so far
            pruning = sum(record.seconds for record in records) / len(records) * left
            remaining = pruning + spent / (index + 1) * (len(records) - index - 1)
        else:
            mine = [record.seconds for record in records]
            remaining = sum(mine) / len(mine) * left
        elapsed = time.monotonic() - self.started
        return PruneProgress(index + 1, layers, records[index].losses, elapsed, remaining, restored)


def _calibration(
    directory: Path,
    config: PruneConfig,
    started: float,
    progress: Callable[[PruneProgress], None] | None,
) -> Calibration | None:
    """The windows to calibrate on; None where the config has no text."""
    if config.calibration is None:
        return None

    def step(characters: int) -> None:
        if progress is not None:
            progress(PruneProgress(characters, 0, {}, time.monotonic() - started, 0.0, stage="text"))

    text = calibrate(
        find_sources(config.calibration),
        load_tokenizer(directory),
        config.num_samples,
        config.seq_len,
        config.seed,
        bos=config.bos,
        column=config.text_column,
        progress=step,
    )
    check_windows(text.windows, directory)
    warn_about_overlap(text)
    return text


def _choose(
    source: SourceModel,
    windows: torch.Tensor,
    config: PruneConfig,
    work: WorkDirectory,
    finished: int,
    started: float,
    progress: Callable[[PruneProgress], None] | None,
) -> tuple[DenseChoice, Verdict | None]:
    """How many indices stay dense in each layer, and which: found out now, or by the run that is resumed."""
    if finished:
        return work.read_choice()
    some = windows[: config.gradient_samples, :GRADIENT_TOKENS]
    steps = _steps("gradient", started, progress)
    costs = index_costs(source, _embed(source, some, config, work), some, steps)
    verdict = None
    if config.needs_pilot:

        def embed(tokens: torch.Tensor) -> LayerInputs:
            return _embed(source, tokens, config, work, torch.float32)

        choice, verdict = choose(source, embed, windows, costs, config, _steps("pilot", started, progress))
        if progress is not None:
            done, seconds = len(source.layers), time.monotonic() - started
            progress(PruneProgress(done, done, {}, seconds, 0.0, stage="pilot", verdict=verdict))
    else:
        counts = dense_counts(costs.fisher, mlp_shapes(source.layers), config)
        ranked = config.selection in GRADIENT_SELECTIONS
        choice = DenseChoice(counts, costs.ranking(config.selection) if ranked else None)
    work.save_choice(choice, verdict)
    return choice, verdict


def _steps(
    stage: Literal["check", "gradient", "pilot"],
    started: float,
    progress: Callable[[PruneProgress], None] | None,
) -> Callable[[int, int], None] | None:
    """Reports (steps done, steps in all) of a stage in front of the layers, which begins now."""
    if progress is None:
        return None
    began = time.monotonic()

    def step(done: int, steps: int) -> None:
        now = time.monotonic()
        remaining = (now - began) / done * (steps - done)
        progress(PruneProgress(done, steps, {}, now - started, remaining, stage=stage))

    return step


def _embed(
    source: SourceModel,
    windows: torch.Tensor,
    config: PruneConfig,
    work: WorkDirectory,
    dtype: torch.dtype = torch.bfloat16,
) -> LayerInputs:
    allocate = on_disk(work.path) if config.cache_activations == "disk" else in_memory
    with source.resident(*source.embedding()):
        return LayerInputs(source.network, windows, source.device, dtype=dtype, allocate=allocate)


def _report_of(directory: Path, config: PruneConfig, seconds: float) -> PruneReport:
    """The report of a run that another process ended, from what the checkpoint says of itself."""
    report = inspect(directory)
    said = report.provenance
    beside = layer_name(report.modules[0].name).rpartition(".")[0] + "."  # not the layers of a vision tower
    return PruneReport(
        directory=directory,
        config=config,
        layers=len({layer_name(n) for n in Checkpoint(directory).tensors if n.startswith(beside)}),
        mlp_sparsity=report.mlp_sparsity,
        losses=said["losses"],
        damping=said["raised_damping"],
        tensor_parallel_sizes=report.tensor_parallel_sizes,
        seconds=seconds,
        verdict=Verdict.read(said.get("allocation")),
    )

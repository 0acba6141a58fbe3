"""The pruning run: read a dense model layer by layer, prune it, write it as a Spense checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_spense.format import Checkpoint, CheckpointWriter
from vllm_spense.format.report import inspect
from vllm_spense.format.target import Target
from vllm_spense.format.validate import check_checkpoint
from vllm_spense.models.parts import layer_name, mlp_shapes
from vllm_spense.network import language_head
from vllm_spense.pruning.activations import LayerInputs
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
from vllm_spense.pruning.progress import Clock, PruneProgress
from vllm_spense.pruning.resume import LayerRecord, WorkDirectory
from vllm_spense.pruning.run import Run
from vllm_spense.pruning.selfcheck import check_replay
from vllm_spense.pruning.source import SourceModel, source_directory
from vllm_spense.pruning.targets import LayerTargets
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
    clock = Clock(progress)
    inputs = [model] if config.calibration is None else [model, *listed(config.calibration)]
    target, work = Target(out, overwrite=config.overwrite, inputs=inputs), WorkDirectory(out)
    if not (config.resume and work.published()):
        target.check()
    with work, warnings_as_errors(config.strict):
        if config.resume and work.published():  # killed behind the last step: only to be cleaned up
            return _report_of(Path(out), config, clock.seconds)
        target.rehearse(work.path)
        expected = None  # the record of the text, as far as it is known before the model is looked at
        if config.calibration is not None:
            expected = TextRecord.of(find_sources(config.calibration))
        run = _admit(model, config, work, clock)
        source = run.source
        rehearse(run, expected)  # what cannot be pruned or written is refused first
        warn_about_size(sum(p.numel() for p in source.network.parameters()), config)
        text = _calibration(run)
        windows = None if text is None else text.windows
        record = None if text is None else text.record
        if windows is not None:
            warn_about_calibration(windows.numel(), source.layers, config)
        made_from = fingerprint(run.base, source.checkpoint, config, record, windows, source.device)
        finished = work.begin(made_from, resume=config.resume, restart=config.restart)
        if windows is not None and not finished:
            check_replay(source, windows[:2], clock.steps("check"))
        choice, verdict = None, None
        if windows is not None and config.needs_gradient:
            choice, verdict = _choose(run, windows, finished)
        records = _LayerLoop(run, None if windows is None else run.embed(windows), choice).run(finished)

        def check(checkpoint: Path) -> None:
            check_checkpoint(Checkpoint(checkpoint))
            work.announce(checkpoint)

        with CheckpointWriter(
            out,
            overwrite=config.overwrite,
            inputs=[*inputs, source.checkpoint.directory],
            max_shard_bytes=REST_SHARD_BYTES,
            work=work.path,
            check=check,
        ) as writer:
            for index in range(len(records)):
                writer.adopt(work.shard(index))
            write_rest(writer, run, record, records, verdict)
    written = facts(run, records)
    return PruneReport(
        directory=Path(out),
        config=config,
        layers=len(records),
        mlp_sparsity=written.mlp_sparsity,
        losses=merged(records)[1],
        damping={name: value for record in records for name, value in record.damping.items()},
        tensor_parallel_sizes=written.tensor_parallel_sizes,
        seconds=clock.seconds,
        text_end=None if text is None else text.end,
        verdict=verdict,
    )


def _admit(model: str | Path, config: PruneConfig, work: WorkDirectory, clock: Clock) -> Run:
    """The run for ``model``, whose files and sizes can be pruned as ``config`` says."""
    directory = source_directory(model)
    base = base_model(directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # H loses its small eigenvalues in TF32
    source = SourceModel(directory, device)
    if config.needs_gradient:
        language_head(source.network)
    warn_about_experts(source.layers, source.stored_dtype)
    targets = check_layouts(source.layers, config, directory)
    return Run(source, base, config, targets, work, clock)


class _LayerLoop:
    """Brings every layer into a state where its file and record are in the work directory.

    ``inputs`` stand in front of the first layer; ``choice``: see :class:`LayerPruner`.
    """

    def __init__(self, run: Run, inputs: LayerInputs | None, choice: DenseChoice | None) -> None:
        self._run = run
        self._inputs = inputs
        self._pruner = LayerPruner(run.config, inputs, None if choice is None else choice.costs)
        self._targets = run.targets
        if choice is not None:
            pairs = zip(run.targets, choice.counts, strict=True)
            self._targets = [targets.with_dense(count) for targets, count in pairs]

    def run(self, finished: int) -> list[LayerRecord]:
        """Prune all layers but the first ``finished``, which are only run."""
        work, clock = self._run.work, self._run.clock
        records = [work.read_layer(index) for index in range(finished)]
        began = time.monotonic()
        for index, targets in enumerate(self._targets):
            restored = index < finished
            if restored:
                self._restore(index, targets, records[index])
            else:
                records.append(self._prune(index, targets))
            spent = time.monotonic() - began if restored else None
            clock.layer(index, len(self._targets), records, spent)
        return records

    def _prune(self, index: int, targets: LayerTargets) -> LayerRecord:
        began, source, layer = time.monotonic(), self._run.source, targets.layer
        with source.resident(layer.module):
            pruned = self._pruner.prune(index, targets)
        tensors, modules = pack_layer(pruned, layer, source)
        seconds = round(time.monotonic() - began, 3)
        record = LayerRecord(modules, pruned.losses, pruned.damping, pruned.left_out, seconds)
        self._run.work.save_layer(index, tensors, record)
        return record

    def _restore(self, index: int, targets: LayerTargets, record: LayerRecord) -> None:
        if self._inputs is None:
            return
        with self._run.source.resident(targets.layer.module):
            restore_layer(targets, record.modules, self._run.work.shard(index), self._run.config)
            self._inputs.advance(index, targets.layer.module)


def _calibration(run: Run) -> Calibration | None:
    """The windows to calibrate on; None where the config has no text."""
    config, directory = run.config, run.source.checkpoint.directory
    if config.calibration is None:
        return None
    text = calibrate(
        find_sources(config.calibration),
        load_tokenizer(directory),
        config.num_samples,
        config.seq_len,
        config.seed,
        bos=config.bos,
        column=config.text_column,
        progress=run.clock.text,
    )
    check_windows(text.windows, directory)
    warn_about_overlap(text)
    return text


def _choose(run: Run, windows: torch.Tensor, finished: int) -> tuple[DenseChoice, Verdict | None]:
    """How many indices stay dense in each layer, and which: found out now, or by the run that is resumed."""
    source, config = run.source, run.config
    if finished:
        return run.work.read_choice()
    some = windows[: config.gradient_samples, :GRADIENT_TOKENS]
    costs = index_costs(source, run.embed(some), some, run.clock.steps("gradient"))
    verdict = None
    if config.needs_pilot:

        def embed(tokens: torch.Tensor) -> LayerInputs:
            return run.embed(tokens, torch.float32)

        choice, verdict = choose(source, embed, windows, costs, config, run.clock.steps("pilot"))
        run.clock.verdict(len(source.layers), verdict)
    else:
        counts = dense_counts(costs.fisher, mlp_shapes(source.layers), config)
        ranked = config.selection in GRADIENT_SELECTIONS
        choice = DenseChoice(counts, costs.ranking(config.selection) if ranked else None)
    run.work.save_choice(choice, verdict)
    return choice, verdict


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

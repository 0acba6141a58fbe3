"""The ``spense`` command. Each command parses, calls one Python function and prints its result."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from rich.table import Table

from vllm_spense.cli.console import new_console, print_anywhere, say, shown
from vllm_spense.cli.dry_run import show_plan
from vllm_spense.cli.interrupt import interruptible, notes
from vllm_spense.cli.options import takes_options
from vllm_spense.cli.plan import plot_plan, refuse_unprunable, show_prediction
from vllm_spense.cli.progress import (
    module_progress,
    one_line_warnings,
    pruning_progress,
    quiet_transformers,
    recovery_progress,
    stage_progress,
)
from vllm_spense.cli.report import show_density, show_report
from vllm_spense.cli.server import ServerError
from vllm_spense.cli.text_options import TEXT, ColumnOption, StartOption, one_or_all
from vllm_spense.cli.trial import try_checkpoint
from vllm_spense.format.codecs import codec_names
from vllm_spense.format.errors import one_line
from vllm_spense.pruning.config import PRESET_FIELDS, PruneConfig
from vllm_spense.recovery.config import RecoveryConfig
from vllm_spense.sparsify.config import SparsifyConfig

app = typer.Typer(
    help="Spense for vLLM: prune a model to 2:4 sparse + dense FP8, check it, measure it, export it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = new_console()
errors = new_console(stderr=True)

Directory = Annotated[Path, typer.Argument(help="Spense checkpoint directory", show_default=False)]
Packed = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY", help="Spense checkpoint, or a 4-bit one of bitsandbytes", show_default=False
    ),
]


WEIGHT_DTYPES: Any = Literal[codec_names()]


@app.command()
@takes_options(
    PruneConfig,
    first=("preset", "method", "selection", "dense_ratio", "targets", "attention_dense_ratio"),
    skip=("damping", "block_size", "alignment"),
    left_open=PRESET_FIELDS,
    types={
        "calibration": list[str],
        "weight_dtype": WEIGHT_DTYPES,
        "sparse_dtype": WEIGHT_DTYPES | None,
        "dense_dtype": WEIGHT_DTYPES | None,
    },
)
def prune(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="New checkpoint directory", show_default=False)],
    options: dict[str, Any],
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not run OUT afterwards (perplexity, a short generation)")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what the run would need; reads headers only")
    ] = False,
    device_model: Annotated[
        Literal["here", "h200", "b200"], typer.Option(help="Of --dry-run: the device to estimate for")
    ] = "here",
    as_json: Annotated[bool, typer.Option("--json", help="Of --dry-run: print JSON")] = False,
) -> None:
    """Prune MODEL into a Spense checkpoint that `vllm serve OUT` runs."""
    from vllm_spense.pruning import PruneConfig
    from vllm_spense.pruning import prune as run

    config = PruneConfig(**options | {"calibration": one_or_all(options.get("calibration"))})
    quiet_transformers()
    if dry_run:
        with one_line_warnings(errors):
            show_plan(model, config, device_model, as_json, console)
        return
    with interruptible(errors), one_line_warnings(errors), pruning_progress(console) as progress:
        report = run(model, out, config, progress)
    _say_written(out)
    if not no_check:
        with one_line_warnings(errors):
            try_checkpoint(report, console)


@app.command()
@takes_options(RecoveryConfig, types={"calibration": list[str]})
def recover(
    directory: Directory,
    out: Annotated[Path, typer.Option("-o", "--out", help="New checkpoint directory", show_default=False)],
    options: dict[str, Any],
    dense: Annotated[
        str | None, typer.Option(help="The model that DIRECTORY was pruned from", show_default=False)
    ] = None,
) -> None:
    """Train the kept weights of a pruned checkpoint for a few minutes; its zeros stay zeros. Or give a Llama
    ReLU gates."""
    from vllm_spense.recovery import recover as run

    config = RecoveryConfig(**options | {"calibration": one_or_all(options["calibration"])})
    quiet_transformers()
    with one_line_warnings(errors), recovery_progress(console) as progress:
        report = run(directory, out, config, dense, progress)
    before, after = report.held_out
    console.print(f"loss on windows that were not learnt from: {before:.4f} before, {after:.4f} after")
    if report.density is not None:
        used, left = report.density
        console.print(f"hidden values there that are not zero: {used:.1%} before, {left:.1%} after")
    _say_written(out)


@app.command()
@takes_options(SparsifyConfig, types={"calibration": list[str]})
def sparsify(
    model: Annotated[str, typer.Argument(help="Hugging Face directory or hub name", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="New checkpoint directory", show_default=False)],
    options: dict[str, Any],
) -> None:
    """Find thresholds below which the MLPs of MODEL skip inputs of their last linear; nothing is trained."""
    from vllm_spense.sparsify import sparsify as run

    config = SparsifyConfig(**options | {"calibration": one_or_all(options["calibration"])})
    quiet_transformers()
    with one_line_warnings(errors), stage_progress(errors) as progress:
        report = run(model, out, config, progress)
    show_density(report.density, console, report.thresholds)
    console.print(
        f"KL divergence from the model itself: {report.loss:.4f} nats per token "
        f"({report.uniform_loss:.4f} with the same share in each layer)",
        highlight=False,
    )
    _say_written(out)


@app.command(name="eval")
def evaluate_(
    directory: Annotated[Path, typer.Argument(help="Dense, Spense or 4-bit checkpoint", show_default=False)],
    text: Annotated[list[str], TEXT],
    text_column: ColumnOption = None,
    seq_len: Annotated[int, typer.Option(help="Tokens per window", min=2)] = 512,
    max_tokens: Annotated[int, typer.Option(help="Tokens to score", min=2)] = 16384,
    bos: StartOption = "auto",
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not quantise activations (FP8 and INT8 checkpoints)")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Dense original: adds KL divergence and top-1 agreement with it")
    ] = None,
    with_continuation: Annotated[
        bool, typer.Option("--continuation", help="Add the four-way continuation task made from the text")
    ] = False,
    tasks: Annotated[str, typer.Option(help="Tasks of lm_eval, a,b,c (pip install vllm-spense[eval])")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Directory with task files of your own")] = None,
    limit: Annotated[int | None, typer.Option(help="Of --tasks: items per task", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Perplexity on non-overlapping windows of a text, and what else is asked for."""
    from vllm_spense.evaluation import evaluate

    quiet_transformers()
    with one_line_warnings(errors), module_progress(errors, "steps") as progress:
        result = evaluate(
            directory,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            bos=bos,
            text_column=text_column,
            activations="none" if weights_only else "checkpoint",
            reference=reference,
            with_continuation=with_continuation,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            include_path=include_path,
            limit=limit,
            progress=progress,
        )
    if as_json:
        print(json.dumps({"directory": str(directory), **asdict(result)}))
        return
    perplexity, seconds = (f"{result.perplexity:.3f}", "bold"), f"{result.seconds:.0f} s"
    behind = "" if result.bos is None else f", windows behind {shown(result.bos)}"
    say(console, "perplexity ", perplexity, f" over {result.tokens} tokens{behind}, {seconds}")
    if (a := result.agreement) is not None:
        kl, same = (f"{a.kl:.4f}", "bold"), (f"{a.top1:.1%}", "bold")
        say(
            *(console, f"reference {a.reference_perplexity:.3f}, KL divergence ", kl, " nats, same first "),
            *("choice for ", same, " of the tokens"),
        )
    if (c := result.continuation) is not None:
        accuracy = f"{c.accuracy:.1%}", "bold"
        say(console, "continuation ", accuracy, f" ± {c.standard_error:.1%} of {c.items} items")
    for task, scores in (result.tasks or {}).items():
        say(console, f"{task} " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


@app.command()
def inspect(
    directory: Packed,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw dense ratio and loss per layer, as FILE.png (needs matplotlib)")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Measure density on a text: the share of hidden values that are not zero"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of --text: tokens to read", min=2)] = 16384,
) -> None:
    """What a checkpoint holds: regions, sparsity, bytes, losses. With --text: how much of its MLPs any model
    uses."""
    from vllm_spense.format.report import inspect as run

    if text:
        if plot is not None:
            raise ValueError(
                "--text shows how much of its MLPs a model uses, and --plot what is stored: one each"
            )
        _inspect_density(directory, text, max_tokens, as_json)
        return
    report = run(directory)
    if plot is not None:
        from vllm_spense.cli.plot import plot_layers

        plot_layers(report, plot)
        say(errors, "Wrote ", (shown(plot), "bold"))
    show_report(report, as_json, console)


def _inspect_density(directory: Path, text: list[str], max_tokens: int, as_json: bool) -> None:
    from vllm_spense.evaluation.density import text_density

    quiet_transformers()
    with one_line_warnings(errors), module_progress(errors, "windows") as progress:
        found = text_density(directory, text, max_tokens=max_tokens, progress=progress)
    if as_json:
        print(json.dumps({"directory": str(directory), "density": found.mean, **asdict(found)}))
        return
    show_density(found, console)


@app.command()
def verify(
    directory: Packed,
    update_manifest: Annotated[
        bool, typer.Option("--update-manifest", help="Accept the files as they are now, if all else is right")
    ] = False,
) -> None:
    """Check hashes, schema, tensors and values; exit code 1 when anything is wrong."""
    from vllm_spense.verification import verify as run

    with module_progress(errors, "checks") as progress:
        report = run(directory, update_manifest=update_manifest, progress=progress)
    notes = [
        *([] if report.hashes_checked else ["no manifest: hashes not checked"]),
        *([] if report.architecture_checked else ["transformers is missing: fit to the model not checked"]),
    ]
    note = f" ({'; '.join(notes)})" if notes else ""
    say(console, ("OK", "green"), f" {report.modules} modules, {report.tensors} tensors{note}")


@app.command()
def export(
    directory: Packed,
    out: Annotated[Path, typer.Option("-o", "--out", help="New dense directory", show_default=False)],
    format: Annotated[
        Literal["bfloat16", "float32", "fp8", "int8", "spense-dense"],
        typer.Option(
            help="fp8, int8: compressed-tensors W8A8 layout; spense-dense: the twin for comparisons"
        ),
    ] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT")] = False,
) -> None:
    """Write a plain dense checkpoint with the zeros written out, for any other engine."""
    from vllm_spense.models.export import export as run

    with module_progress(errors, "modules") as progress:
        run(directory, out, format=format, overwrite=overwrite, progress=progress)
    say(console, "Wrote ", (shown(out), "bold"), f" ({format})")


@app.command()
def tune(
    directory: Directory,
    tokens: Annotated[list[int] | None, typer.Option(help="Numbers of tokens (repeat the option)")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tp", help="Tensor-parallel size", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory of the table")] = None,
    budget: Annotated[float, typer.Option(help="Seconds, checked before each layer")] = 3600,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run; needs no GPU")] = False,
) -> None:
    """Measure the kernels for this checkpoint's layers on this GPU, for dispatch to read."""
    from vllm_spense.format.checkpoint import Checkpoint
    from vllm_spense.ops.linear.tune import TOKENS, layer_specs, plan
    from vllm_spense.ops.linear.tune import tune as run

    specs, counts = layer_specs(Checkpoint(directory), tensor_parallel), tokens or list(TOKENS)
    if dry_run:
        table = Table(title="configurations on an H200, estimated")
        for column in ("layer", "tokens", "configurations", "best by estimate", "µs"):
            table.add_column(column)
        for row in plan(specs, counts):
            table.add_row(*map(str, row))
        console.print(table)
        return
    path = run(
        *(specs, counts),
        directory=out,
        command=f"spense tune {directory} --tp {tensor_parallel}",
        budget=budget,
        progress=console.print,
    )
    say(console, "Wrote ", (shown(path), "bold"))


@app.command(name="plan")
def plan_(
    model: Annotated[
        str,
        typer.Argument(
            help="Dense or Spense directory (config.json is enough), or Qwen3-32B, Seed-OSS-36B, "
            "Llama-3.1-8B, Llama-3.1-70B",
            show_default=False,
        ),
    ],
    gpu: Annotated[str, typer.Option(help="H100, H200 or B200")] = "H200",
    batch: Annotated[int, typer.Option(help="Sequences that decode together", min=1)] = 32,
    context: Annotated[int, typer.Option(help="Tokens behind each of them", min=1)] = 4096,
    prefill: Annotated[int, typer.Option(help="Tokens of a prefill step", min=1)] = 8192,
    dense_ratio: Annotated[
        float | None,
        typer.Option(help="Dense share of MLPs that are not pruned yet \\[default: 0.5]", min=0, max=1),
    ] = None,
    kv_dtype: Annotated[Literal["bf16", "fp8"], typer.Option(help="KV cache")] = "bf16",
    tensor_parallel: Annotated[int, typer.Option("--tp", help="Tensor-parallel size", min=1)] = 1,
    measured: Annotated[
        Path | None, typer.Option(help="JSON of a serving benchmark: print the prediction's errors")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw speed-up against batch, as FILE.png (needs matplotlib)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Predict what Spense gains when served, before pruning: speed-up, memory, and where it does not pay."""
    from vllm_spense.planning import compare, plan, read_model

    refuse_unprunable(model, dense_ratio)
    shape = read_model(model, dense_ratio)
    found = plan(
        *(shape, gpu),
        batch=batch,
        context=context,
        prefill_tokens=prefill,
        kv_dtype=kv_dtype,
        tensor_parallel=tensor_parallel,
    )
    compared = None if measured is None else compare(shape, measured)
    if plot is not None:
        plot_plan(found, plot)
        say(errors, "Wrote ", (shown(plot), "bold"))
    show_prediction(found, as_json, console, compared)


@app.command()
def doctor() -> None:
    """Versions, plugin, back ends, GPU: what is missing and how to get it."""
    from vllm_spense.cli.doctor import doctor as run

    colors = {"ok": "green", "note": "yellow", "error": "red"}
    findings = run()
    width = max(len(f.topic) for f in findings)
    for f in findings:  # one line each, however narrow the terminal is
        mark = f"{f.status:<6}", colors[f.status]
        fix = f"; {f.fix}" if f.fix and f.status != "ok" else ""
        say(console, f"{f.topic:<{width}}  ", mark, f" {shown(f.text)}", (fix, "dim"))
    if any(f.status == "error" for f in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    work: Annotated[Path, typer.Option(help="Where model, text and checkpoints go")] = Path("build/demo"),
    port: Annotated[int, typer.Option(help="Port of the server; 0 picks a free one")] = 0,
) -> None:
    """The whole road with a small trained model: fetch, prune, measure, serve, ask."""
    from vllm_spense.cli.demo import demo as run

    run(work, port=port, console=console)


def main() -> None:
    """Entry point: expected failures become one line on stderr and exit code 1."""
    print_anywhere()
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        say(errors, ("error:", "red"), " ", ". ".join([_one_line(error), *notes(error)]))
        sys.exit(1)


def _say_written(out: Path) -> None:
    command = f"vllm serve {shlex.quote(shown(out))}"
    say(console, "Wrote ", (shown(out), "bold"), ". Serve it: ", (command, "cyan"))


def _one_line(error: Exception) -> str:
    if isinstance(error, ServerError):
        return str(error)  # with the end of the server's log
    if isinstance(error, UnicodeEncodeError):  # bytes of a name that are no characters here
        return (
            f"a library cannot take the name {shown(error.object)}, which is no text in this locale "
            f"({sys.getfilesystemencoding()}): set LC_ALL=C.UTF-8, or rename it"
        )
    if isinstance(error, ValidationError):  # our own options
        parts = [
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        ]
        return shown("; ".join(parts))
    return shown(one_line(str(error), 4000)) or type(error).__name__


if __name__ == "__main__":
    main()

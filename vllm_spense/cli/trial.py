"""``spense prune``: what it says of the checkpoint that it has just written."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from vllm_spense.cli.console import say, shown

if TYPE_CHECKING:
    from vllm_spense.pruning import PruneReport


def try_checkpoint(report: PruneReport, console: Console) -> None:
    """Load what ``report`` is about, measure it briefly, print that and put it into the model card.

    The checkpoint stays where it is whatever is found. Raises ``RuntimeError`` for a perplexity that is not
    finite; warns of an absurd one (an error under ``strict``).
    """
    from vllm_spense.evaluation.trial import PROMPT, memory_available, memory_needed, try_out
    from vllm_spense.pruning.card import record_evaluation
    from vllm_spense.pruning.warnings import warn, warnings_as_errors

    directory, end = report.directory, report.text_end
    needed, available = memory_needed(directory), memory_available()
    if needed > available:
        command = f"spense eval {shlex.quote(shown(directory))} --text FILE"
        say(
            console,
            f"Not checked by running it: that takes {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are available here. Measure it where there is more: ",
            (command, "cyan"),
        )
        return
    trial = try_out(directory, None if end is None else end.ids, report.config.bos)
    lines = []
    if end is not None and trial.perplexity is not None:
        which = "parts of which calibration has used" if end.calibrated else "which calibration has not seen"
        lines.append(
            f"Perplexity {trial.perplexity:.2f} on {trial.tokens} tokens at the end of the calibration text, "
            f"{which}."
        )
    if trial.text is not None:
        lines.append(f"Greedy continuation of “{PROMPT}”: “{' '.join(trial.text.split())}”")
    for line in lines:
        say(console, line)
    record_evaluation(Path(directory), "\n\n".join(lines))
    if trial.absurd:
        with warnings_as_errors(report.config.strict):
            warn(
                f"{directory}: its perplexity {trial.perplexity:.4g} is above that of guessing blindly among "
                f"{trial.vocabulary} tokens; the source model or the pruning is broken"
            )

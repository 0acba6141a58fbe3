"""Tasks of the lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on our models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vllm_spense.text.bos import Bos, added_in_front, opening, opening_text

BATCH = 8


class Harness:
    """Tasks that are known and whose data is here, before any time goes into a model.

    ``include_path``: a directory with task files of your own; like those of the harness they can name Python
    functions, which are run. Needs the extra ``eval``; most tasks fetch their data from a hub.

    Raises ``ImportError`` without lm_eval, ``ValueError`` for tasks that it does not know and for tasks whose
    data cannot be had.
    """

    def __init__(self, tasks: Sequence[str], include_path: str | Path | None = None) -> None:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                f"tasks need the package lm_eval ({error}); install it with `pip install vllm-spense[eval]`"
            ) from None
        self._evaluate, self._wrapper = lm_eval.simple_evaluate, HFLM
        self._tasks = list(tasks)
        self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        unknown = sorted(set(tasks) - set(self._manager.all_tasks))
        if unknown:
            raise ValueError(f"lm_eval has no task {', '.join(unknown)} (`lm-eval ls tasks` lists them)")
        for task in tasks:
            try:
                self._manager.load([task])
            except Exception as error:  # hubs, proxies, file systems: every loader raises its own
                reason = (str(error).strip().splitlines() or ["no reason given"])[0]
                raise ValueError(
                    f"the data of task {task} cannot be had ({type(error).__name__}: {reason}); most tasks "
                    "need network access once, or a filled cache of the package datasets"
                ) from None

    def run(
        self, model: nn.Module, tokenizer: Any, limit: int | None = None, bos: Bos = "auto"
    ) -> dict[str, dict[str, float]]:
        """Scores of each task and of its parts: ``{"hellaswag": {"acc": 0.41, "acc_stderr": 0.005, …}}``.

        ``model``: what :func:`~vllm_spense.evaluation.load_model` gives; ``limit``: items per task; ``bos``:
        whether each item starts with the model's BOS token.
        """
        wrapper, start = self._wrapper, opening(tokenizer, bos)
        if start and start != added_in_front(tokenizer):  # lm_eval leaves it to the tokenizer
            wrapper = _opened(wrapper, start)
        added = False if bos == "never" else None
        results = self._evaluate(
            model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, add_bos_token=added),
            tasks=self._tasks,
            task_manager=self._manager,
            limit=limit,
            log_samples=False,
        )["results"]
        return {task: _numbers(scores) for task, scores in results.items()}


def _opened(wrapper: Any, start: tuple[int, ...]) -> Any:
    """lm_eval's class ``wrapper`` with the tokens ``start`` before every text that lacks them."""

    class Opened(wrapper):
        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None
        ) -> list[int]:
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            if add_special_tokens is not False and tuple(ids[: len(start)]) != start:
                ids = [*start, *ids]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(self, strings: list[str], *arguments: Any, **options: Any) -> Any:
            text = opening_text(self.tokenizer, start) or ""
            opened = [string if string.startswith(text) else text + string for string in strings]
            return super().tok_batch_encode(opened, *arguments, **options)

    return Opened


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` becomes ``acc`` (no filter on the answers); names and counts are left out."""
    return {
        metric.removesuffix(",none"): float(value)
        for metric, value in scores.items()
        if "," in metric and isinstance(value, int | float)
    }

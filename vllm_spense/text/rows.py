"""Rows of JSON and parquet files and of datasets: numbered from 1, with the names of their columns."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from vllm_spense.format.errors import one_line
from vllm_spense.text.sources import Dataset, File
from vllm_spense.text.streams import text_of

Row = tuple[int, Any]
"""Its number (the line's in a .jsonl file) and its value, which may be anything."""
Wanted = Callable[[list[str]], list[str]]
"""The columns that are needed, of all there are."""
_JSON_START = re.compile(rb"(\xef\xbb\xbf)?\s*(\{\s*\"|\[\s*[{\"])")
BATCH = 256
"""Rows of a parquet file that are in memory at once."""


def kind_of(stream: io.BufferedReader, kind: str | None) -> str:
    """``kind`` by the suffix, or by what is next in ``stream``: parquet, json, jsonl or text.

    What is called .json is often one object per line.
    """
    if kind not in (None, "json"):
        return kind
    start = stream.peek(4)
    if kind is None and start.startswith(b"PAR1"):
        return "parquet"
    if kind is None and not _JSON_START.match(start):
        return "text"
    line, _, rest = start.removeprefix(b"\xef\xbb\xbf").partition(b"\n")
    try:
        return "jsonl" if rest.strip() and isinstance(json.loads(line), dict) else "json"
    except (ValueError, RecursionError):
        return "json"


def json_lines(file: File, stream: io.BufferedReader) -> Iterator[Row]:
    """One row per line; blank lines are no rows. Raises ``ValueError`` for lines that are no JSON."""
    return _lines(file, text_of(file, stream))


def json_document(file: File, stream: io.BufferedReader) -> Iterator[Row]:
    """A list of rows, an object that holds one list of rows, one row, or a line per row after all."""
    text = text_of(file, stream).read()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _lines(file, io.StringIO(text))
            return
        hint = "" if file.kind else "; a plain text that only looks like it needs the suffix .txt"
        raise ValueError(f"{file.place}: this is no JSON ({error}){hint}") from None
    if isinstance(document, dict):
        tables = [v for v in document.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        columns = {"text", "messages", "conversations", "prompt"}
        document = tables[0] if len(tables) == 1 and not columns & set(document) else [document]
    if not isinstance(document, list):
        raise ValueError(f"{file.place}: this JSON holds no rows (a list of objects was expected)")
    yield from enumerate(document, 1)


def parquet_rows(file: File, wanted: Wanted) -> Iterator[Row]:
    """Rows of a parquet file, with the ``wanted`` columns alone. Needs pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(
            f"{file.place}: parquet files need the package pyarrow (`pip install vllm-spense[data]`)"
        ) from None
    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            columns = wanted(table.schema_arrow.names)
            for batch in table.iter_batches(BATCH, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, ArrowException) as error:
        raise ValueError(
            f"{file.place}: the parquet file cannot be read ({one_line(str(error), 200)})"
        ) from None


def dataset_rows(dataset: Dataset, wanted: Wanted) -> Iterator[Row]:
    """Rows of a dataset of the hub, with the ``wanted`` columns alone. Needs network."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"{dataset.name}: there is no such file, and reading it as a dataset of the Hugging Face hub "
            "needs the package datasets (`pip install datasets`)"
        ) from None
    try:
        rows = load_dataset(dataset.repository, dataset.config, split=dataset.split)
    except Exception as error:  # hub, network, cache, builder: each raises its own
        reason = one_line(str(error) or type(error).__name__, 200)
        raise ValueError(f"{dataset.name}: no such file, and not readable as a dataset ({reason})") from None
    yield from enumerate(rows.select_columns(wanted(rows.column_names)), 1)


def _lines(file: File, lines: io.TextIOBase) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file.place}, row {number}: this is no JSON ({error})") from None

"""Text for calibration and evaluation: reading it, and cutting its tokens into windows."""

from vllm_spense.text.bos import Bos, opening, opening_text
from vllm_spense.text.reading import CalibrationText, read_calibration
from vllm_spense.text.windows import (
    TextEnd,
    context_length,
    first_windows,
    sample_windows,
    text_end,
    tokenize,
)

__all__ = [
    "Bos",
    "CalibrationText",
    "TextEnd",
    "context_length",
    "first_windows",
    "opening",
    "opening_text",
    "read_calibration",
    "sample_windows",
    "text_end",
    "tokenize",
]

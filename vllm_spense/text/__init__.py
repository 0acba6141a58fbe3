"""Text for calibration and evaluation: reading it, and cutting its tokens into windows."""

from vllm_spense.text.beginning import Beginning
from vllm_spense.text.bos import Bos, opening, opening_text
from vllm_spense.text.calibration import Calibration, calibrate
from vllm_spense.text.reading import TextRecord
from vllm_spense.text.sources import Given, find_sources, listed
from vllm_spense.text.windows import (
    TextEnd,
    context_length,
    first_windows,
    sample_windows,
    text_end,
    tokenize,
)

__all__ = [
    "Beginning",
    "Bos",
    "Calibration",
    "Given",
    "TextEnd",
    "TextRecord",
    "calibrate",
    "context_length",
    "find_sources",
    "first_windows",
    "listed",
    "opening",
    "opening_text",
    "sample_windows",
    "text_end",
    "tokenize",
]

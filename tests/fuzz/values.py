"""Values to put where a checkpoint has one: every JSON type, the borders of number types, hostile text."""

from __future__ import annotations

from hypothesis import strategies as st

DTYPES = (
    "F8_E4M3",
    "F8_E5M2",
    "U8",
    "I8",
    "BOOL",
    "BF16",
    "F16",
    "F32",
    "F64",
    "I32",
    "I64",
    "C64",
    "F4",
    "f32",
    "",
)
NUMBERS = st.sampled_from(
    [
        0,
        1,
        -1,
        2,
        3,
        8,
        255,
        2**24,
        2**24 + 1,
        2**31 - 1,
        2**31,
        2**32,
        2**53 + 1,
        2**63,
        2**64,
        10**30,
        10**4000,
    ]
)
FLOATS = st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")])
_WORDS = ["0", "1", "true", "none", "float8_e4m3fn", "bfloat16", "output", "input", "spense"]
_WORDS += ["../x", "/etc/passwd", "__metadata__", "{}", "%s{0}"]
_HOSTILE = ["", "a\0b", "\ud800", "x\x1b[31m", "line\nline", "\u202eabc", "ä" * 300, "x" * 20_000]
STRINGS = st.sampled_from([*_WORDS, *_HOSTILE]) | st.text(max_size=12)
_DEEP = [["[", 400, "]"], ["[", 5_000, "]"], ["[", 200_000, ""], ['{"a":', 900, "}"], ["[[],", 300, "1]"]]
_ODD = [
    "1e999",
    "9" * 5_000,
    "-",
    "NaN",
    "-Infinity",
    "0x10",
    "01",
    '"\\ud800"',
    "",
    "nul",
    '"\\u0000"',
    "1,",
]
RAW = st.sampled_from([*_DEEP, *([text, 1, ""] for text in _ODD)]).map(lambda raw: {"@raw": raw})
"""Depth and spellings that Python's writer would not give."""
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers(-300, 300) | FLOATS | STRINGS
JSON = st.recursive(
    SCALARS | RAW,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
HEX = st.binary(min_size=1, max_size=4).map(bytes.hex)
AT = st.integers(0, 1 << 20)

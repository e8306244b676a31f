"""How the report writes numbers: scores without a leading zero, true minus signs, times and small values in words."""

from __future__ import annotations

import math

MINUS = "−"


def score(value: float, digits: int = 3, signed: bool = False) -> str:
    """A share: ``.524``, ``1.000``; with ``signed`` ``+.284`` or ``−.017``."""
    text = f"{abs(value):.{digits}f}"
    if text.startswith("0."):
        text = text[1:]
    is_zero = float(text) == 0
    if value < 0 and not is_zero:
        return MINUS + text
    return ("+" + text) if signed and not is_zero else text


def enough_digits(*values: float | None) -> int:
    """2, or 3 where two digits would show a value that is not 0 as .00."""
    return 3 if any(v is not None and 0 < abs(v) < 0.005 for v in values) else 2


def compact(value: object) -> str:
    """Any number in three significant digits: ``0``, ``0.0312``, ``2.4e-7``, ``1,240``; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if isinstance(value, int) or (size >= 1000 and size < 1e7):
        text = f"{size:,.0f}"
    elif 1e-3 <= size < 1000:
        text = f"{size:.3g}"
    else:
        mantissa, exponent = f"{size:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    return MINUS + text if value < 0 else text


def duration(seconds: float) -> str:
    """``45 s``, ``8 min 12 s``, ``3 h 05 min``."""
    total = max(0, round(seconds))
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"

"""Numbers as people read them."""

from __future__ import annotations


def si(number: float, digits: int = 3) -> str:
    """`1.53M`, `42`, `0.012`."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor * (1 - 0.5 * 10**-digits):
            return f"{_rounded(number / factor, digits)}{letter}"
    return _rounded(number, digits)


def fixed(value: float, places: int, *, sign: bool = False) -> str:
    """`2.310` with so many decimals, `+0.190` with a sign where asked; from a hundred thousand on `1.235M`."""
    if abs(value) >= 1e5:
        return f"+{si(value, 4)}" if sign and value > 0 else si(value, 4)
    return f"{value:+.{places}f}" if sign else f"{value:.{places}f}"


def _rounded(number: float, digits: int) -> str:
    text = f"{number:.{digits}g}"
    return f"{float(text):.0f}" if "e+" in text else text


def bytes_text(count: float | None) -> str:
    """`48 MB` (10⁶), a dash for None."""
    if count is None:
        return "–"
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{_rounded(count / factor, 3)} {unit}"
    return f"{count:.0f} B"


def rate_text(per_second: float | None) -> str:
    """`12.3k`, a dash for None."""
    return "–" if per_second is None else si(per_second)


def seconds_text(seconds: float | None) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

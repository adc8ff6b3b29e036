"""Numbers as a person reads them; every part of a report writes them the same way."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "-"


def count(number: float) -> str:
    """A count to three digits: 950, 4.1K, 3.24M, 1.8B, 3.6T."""
    if not math.isfinite(number):
        return MISSING
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # 999 600 rounds to 1.00M, not to 1000K.
        if abs(number) >= size * 0.9995:
            return f"{_three_digits(number / size)}{unit}"
    return f"{number:.0f}"


def _three_digits(number: float) -> str:
    return f"{number:.{max(0, 2 - int(math.log10(abs(number) + 0.005)))}f}"


def power(number: float) -> str:
    """A FLOP count: 1.20e13; 0 stays 0."""
    if not math.isfinite(number):
        return MISSING
    return f"{number:.2e}".replace("e+", "e").replace("e0", "e") if number else "0"


def duration(seconds: float) -> str:
    """A time to three digits: 4.2 s, 12.5 min, 3.4 h, 2.1 d."""
    if not math.isfinite(seconds):
        return MISSING
    for size, unit in ((86400 * 2, "d"), (7200, "h"), (120, "min")):
        if seconds >= size:
            length = {"d": 86400, "h": 3600, "min": 60}[unit]
            return f"{seconds / length:.{0 if seconds >= 99.95 * length else 1}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def loss(value: float | None) -> str:
    """A loss in nats a token, to three places; a dash where there is none yet."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if math.isfinite(value) else "NaN"


def small(value: float) -> str:
    """A number near 1 or far below it, to three digits: 0.481, 12.3, 4.2e-5."""
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def axis(values: Sequence[float]) -> list[str]:
    """Evenly spaced numbers with as many places as their spacing needs."""
    if len(values) < 2:
        return [small(value) for value in values]
    largest, step = max(map(abs, values)), values[1] - values[0]
    if largest >= 10_000:
        return [count(value) for value in values]
    if largest < 0.001:
        return [small(value) for value in values]
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:.{places}f}" for value in values]


def clip(text: str, width: int) -> str:
    """`text` in one line of at most `width` printable characters."""
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return line if len(line) <= width else line[: width - 1] + "…"


def shape(model: Mapping[str, Any]) -> str:
    """An architecture in one line, leaving out what it does not say: 6 layers, 160 wide, ..."""
    parts = []
    for key, phrase in (
        ("num_layers", "{} layers"),
        ("embed_dim", "{} wide"),
        ("num_heads", "{} heads"),
        ("num_kv_heads", "{} kv heads"),
        ("mlp_dim", "mlp {}"),
    ):
        if model.get(key):
            parts.append(phrase.format(model[key]))
    if model.get("num_experts"):
        chosen = model.get("experts_per_token")
        parts.append(f"{model['num_experts']} experts" + (f", {chosen} a token" if chosen else ""))
    return ", ".join(parts)

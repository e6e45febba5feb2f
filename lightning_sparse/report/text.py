"""Numbers as text, as the page shows them; what is not known is a dash."""

from datetime import datetime

__all__ = ["count", "is_share", "memory", "metric_text", "moment", "operations", "plain", "seconds", "share"]


def share(value: float | None) -> str:
    """Write a share in percent with three digits; what is not quite all or nothing never looks so.

    >>> share(0.05128), share(1.0), share(0.99999), share(0.0), share(None)
    ('5.13 %', '100 %', '> 99.9 %', '0 %', '—')
    """
    if value is None:
        return "—"
    text = f"{100 * value:.3g}"
    return "> 99.9 %" if text == "100" and value < 1 else f"{text} %"


def seconds(value: float | None) -> str:
    """Write a time.

    >>> seconds(0.00205), seconds(12.3), seconds(4000), seconds(None)
    ('2.05 ms', '12.3 s', '1 h 6 min', '—')
    """
    if value is None:
        return "—"
    if value >= 60:
        hours, minutes = divmod(int(value) // 60, 60)
        return f"{hours} h {minutes} min" if hours else f"{minutes} min {int(value) % 60} s"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def memory(value: float | None) -> str:
    """Write a number of bytes.

    >>> memory(3 * 2**30), memory(2.5 * 2**20), memory(None)
    ('3 GiB', '2.5 MiB', '—')
    """
    if value is None:
        return "—"
    return f"{value / 2**30:.3g} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"


def count(value: float | None) -> str:
    """Write a whole number with thin spaces between thousands.

    >>> count(266200).replace(chr(0x202F), "_")
    '266_200'
    """
    return "—" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def operations(value: float | None) -> str:
    """Write a number of operations with three digits and a prefix.

    >>> operations(53240.0), operations(1.5e6), operations(12.0)
    ('53.2 k', '1.5 M', '12')
    """
    for size, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value is not None and value >= size:
            return f"{value / size:.3g}{prefix}"
    return "—" if value is None else f"{value:.3g}"


def plain(value: float | None) -> str:
    """Write any other number."""
    return "—" if value is None else f"{value:.4g}"


def moment(text: str | None) -> str:
    """Write an ISO time to the minute, in the zone that it has.

    >>> moment("2026-11-21T08:00:42.5+00:00")
    '2026-11-21 08:00 UTC'
    """
    if not text:
        return "—"
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()


def is_share(metric: str) -> bool:
    """Whether a metric is one of those that are read in percent."""
    return "acc" in metric.lower()


def metric_text(name: str, value: float | None) -> str:
    """Write a metric: accuracies in percent.

    >>> metric_text("val_acc", 0.97654), metric_text("val_loss", 0.0834567)
    ('97.65 %', '0.08346')
    """
    return f"{100 * value:.2f} %" if is_share(name) and value is not None and value <= 1 else plain(value)

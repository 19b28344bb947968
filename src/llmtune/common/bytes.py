"""Numbers of bytes as people read them."""

from __future__ import annotations

__all__ = ["readable_bytes"]


def readable_bytes(count: int) -> str:
    """Return a number of bytes in decimal units, with two digits after the point.

    >>> readable_bytes(999), readable_bytes(56_700_000), readable_bytes(1_500_000_000)
    ('999 B', '56.70 MB', '1.50 GB')
    """
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"

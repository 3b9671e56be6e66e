"""Numbers and tables as text. Imports nothing from jmx8."""

from collections.abc import Sequence


def format_bytes(count: int | float) -> str:
    """Returns a byte count as people write it: "51.0 MiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024:
            return f"{count:.1f} {unit}"
    return f"{count / 1024:.1f} TiB"


def format_table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Returns cells in columns; those of `left` are aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )

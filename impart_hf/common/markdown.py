"""Tables in Markdown."""

from collections.abc import Mapping, Sequence


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table of rows, each its cells by column; the first column is aligned to the left, others to the right.

    Args:
        rows: at least one; all have the columns of the first.
    """
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, [widths[0] * "-", *((width - 1) * "-" + ":" for width in widths[1:])])
    return "\n".join(
        f"| {line[0].ljust(widths[0])} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        + " |"
        for line in lines
    )

"""Tables that can be pasted into an issue: markdown, columns aligned."""

from typing import Any


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows with the same keys -> lines of a table; numbers stand on the right."""
    header = list(rows[0])
    cells = [[str(row[name]) for name in header] for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]

    def line(words: list[str]) -> str:
        return "| " + " | ".join(word.rjust(width) for word, width in zip(words, widths)) + " |"

    return "\n".join(
        [
            line(header),
            "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|",
            *map(line, cells),
        ]
    )

"""Tables as notebooks show them, of the same rows that terminals get as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from markupsafe import Markup


def html_table(rows: Sequence[Sequence[str]], *, right: Collection[str] = (), caption: str = "") -> str:
    """Lay out rows of cells as an HTML table; what is in the cells is escaped.

    Args:
        rows: The first one holds the titles.
        right: Titles of the columns whose cells are to stand at the right.
        caption: A line above.
    """
    sides = ["right" if title in right else "left" for title in rows[0]]
    cell = Markup('<{tag} style="text-align: {side}">{text}</{tag}>')

    def line(row: Sequence[str], tag: str) -> Markup:
        cells = (cell.format(tag=tag, side=side, text=text) for text, side in zip(row, sides, strict=True))
        return Markup("<tr>{}</tr>").format(Markup("").join(cells))

    body = Markup("").join(line(row, "td") for row in rows[1:])
    head = Markup("<caption>{}</caption>").format(caption) if caption else Markup("")
    return str(
        Markup("<table>{}<thead>{}</thead><tbody>{}</tbody></table>").format(head, line(rows[0], "th"), body)
    )

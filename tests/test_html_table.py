"""Tables for notebooks."""

from __future__ import annotations

from xml.etree import ElementTree

from compress_search.html_table import html_table


def test_has_all_cells_in_their_places_and_escaped():
    rows = [("name", "size"), ("<b>conv</b>", "12"), ("a & b", "3")]
    table = ElementTree.fromstring(html_table(rows, right=["size"], caption="1 < 2"))
    assert table.findtext("caption") == "1 < 2"
    assert [[cell.text for cell in row] for row in table.iter("tr")] == [list(row) for row in rows]
    assert {cell.get("style") for cell in table.iter("td") if cell.text in ("12", "3")} == {
        "text-align: right"
    }


def test_without_caption_there_is_none():
    assert "caption" not in html_table([("name",)])

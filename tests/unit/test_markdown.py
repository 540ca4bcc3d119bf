"""The one maker of Markdown tables."""

import pytest

from orthrus.base.markdown import markdown_table


def test_cells_cannot_break_the_table() -> None:
    table = markdown_table(["a|b", "number"], [["x\n y", "1"], ["|", "2"]], "lr")
    assert table.splitlines() == [
        "| a\\|b | number |",
        "| --- | ---: |",
        "| x y | 1 |",
        "| \\| | 2 |",
    ]


def test_alignment_may_be_left_out() -> None:
    assert markdown_table(["a", "b"], []) == "| a | b |\n| --- | --- |"
    with pytest.raises(KeyError):
        markdown_table(["a"], [], "c")

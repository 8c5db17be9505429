"""Tables are aligned and say what is missing."""

from mnemos.engine.plain_table import format_table


def test_columns_line_up() -> None:
    rows = [
        {"stage": "report", "steps": 1200, "loss": 0.756789, "note": "done"},
        {"stage": "pathology", "steps": 40, "loss": None},
    ]
    assert format_table(rows, {"stage": "stage", "steps": "updates", "loss": "loss", "note": ""}).split(
        "\n"
    ) == [
        "stage      updates    loss",
        "---------  -------  ------  ----",
        "report       1,200  0.7568  done",
        "pathology       40       -  -",
    ]


def test_words_and_flags_stay_left() -> None:
    table = format_table([{"a": "0.90x", "b": True}, {"a": "x", "b": False}], ["a", "b"])
    assert table.split("\n") == ["a      b", "-----  ---", "0.90x  yes", "x      no"]
    assert format_table([], ["stage", "loss"]) == "stage  loss\n-----  ----"

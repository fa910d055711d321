"""The table of `predict`: what it shows is what was said."""

from types import SimpleNamespace

from instructedit.callbacks import PredictionTable


def test_text_with_square_brackets_is_shown_as_it_is(capsys):
    table = PredictionTable()
    row = {"task": "quiz", "record": "0", "kind": "reliability", "prompt": "The [/b] city [red]is", "answer": "[x]"}
    table.rows = [row | {"before": "[bold]a", "after": "b"}]
    table.on_predict_end(SimpleNamespace(is_global_zero=True, loggers=[], global_step=0), None)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("The [/b] city [red]is", "[x]", "[bold]a"))

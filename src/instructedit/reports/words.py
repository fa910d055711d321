"""How the numbers of a report are put into words, in the terminal and on the page alike."""

from __future__ import annotations

from instructedit.reports.measure import Drift


def number(value: float) -> str:
    """A probability or a divergence in three digits at most."""
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}" if value < 1 else f"{value:.3g}"


def change(before: float, after: float) -> str:
    """A number before and after; whole numbers as they are."""
    return " → ".join(str(each) if isinstance(each, int) else number(each) for each in (before, after))


def one_line(words: str) -> str:
    """A reply without the line breaks in it."""
    return " ".join(words.split())


def drift_line(drift: Drift) -> str:
    """How far unrelated text moved, in a line."""
    before, after = (f"{each:.2f}" for each in (drift.perplexity_before, drift.perplexity_after))
    return f"unrelated text ({drift.positions} tokens): KL {number(drift.kl)}, perplexity {before} → {after}"

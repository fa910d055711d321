"""Formatting of a report's numbers and texts, for both the terminal and the page."""

from __future__ import annotations

from instructedit.evaluation.drift import Drift


def number(value: float) -> str:
    """Formats a probability or a divergence with at most three digits."""
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}" if value < 1 else f"{value:.3g}"


def change(before: float, after: float) -> str:
    """Formats a number before and after the edit; integers are printed in full."""
    return " → ".join(str(each) if isinstance(each, int) else number(each) for each in (before, after))


def one_line(words: str) -> str:
    """Replaces the line breaks in a reply by spaces."""
    return " ".join(words.split())


def drift_line(drift: Drift) -> str:
    """Describes in one line how far the predictions on unrelated text moved."""
    before, after = (f"{each:.2f}" for each in (drift.perplexity_before, drift.perplexity_after))
    return f"unrelated text ({drift.positions} tokens): KL {number(drift.kl)}, perplexity {before} → {after}"

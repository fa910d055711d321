"""The embedded world: true facts, a corpus that teaches them, four datasets, and two small language models."""

from pathlib import Path

_MODELS = Path(__file__).parent / "models"
#: The embedded language models, which share one tokenizer: name → folder.
EMBEDDED = {"tiny": _MODELS / "tiny-gpt2", "tiny-llama": _MODELS / "tiny-llama"}

__all__ = ["EMBEDDED"]

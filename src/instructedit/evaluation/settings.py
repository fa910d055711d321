"""Settings for how edited models are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from instructedit.editors import Editor
from instructedit.errors import at_least
from instructedit.instructions import Instructor, Variant


@dataclass(frozen=True)
class Evaluation:
    """Settings for how edited models are scored.

    Attributes:
        generate: Also let the model answer freely, and keep its answers before and after the edit.
        fluency_tokens: Length of the text that Fluency is measured on; 0 leaves Fluency out.
        descriptions: Split of the instruction banks that descriptions are drawn from.
        description: Id of one description to use for every record instead; ``10`` is the tenth of each task's bank.
        instruction: A free sentence to use for every record instead, or one for each task, by its name.
        variant: How instructions are altered, to test whether the editor reads them: unchanged (``own``), with their
            words ``shuffled``, one of ``other_task``, the ``task_name`` alone, or ``left_out``.
        replies: Number of replies of each sentiment that edit success is measured on; the first ones of a record are
            taken.
        seed: Seed of the descriptions drawn and of sampled text, which depends on it and the record alone.
        tokens: Largest number of tokens in one forward pass, padding and tokens to be generated included; it bounds the
            memory.
        kv_dtype: Dtype of the keys and values of sampled text (Fluency): as they are computed (``float32``), or rounded
            to half the memory, so that twice as many rows are sampled at once.
    """

    generate: bool = True
    fluency_tokens: int = 100
    descriptions: Literal["train", "heldout", "unseen"] = "train"
    description: str | None = None
    instruction: str | dict[str, str] | None = None
    variant: Variant = "own"
    replies: int = 2
    seed: int = 0
    tokens: int = 8192
    kv_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        at_least(0, fluency_tokens=self.fluency_tokens, replies=self.replies)
        at_least(1, tokens=self.tokens)

    def instructor(self, editor: Editor) -> Instructor | None:
        """Returns the source of instructions for an editor; None if it takes none."""
        return editor.instructor(self.descriptions, self.description, self.seed, self.instruction, self.variant)

    @property
    def text_tokens(self) -> int:
        """Largest number of tokens in one pass when text is sampled."""
        return self.tokens if self.kv_dtype == "float32" else 2 * self.tokens

"""Workloads of the benchmark: the same LM, hypernetwork and records for the engine and the plain implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeVar

import torch

from instructedit.benchmark.plain import PlainMend
from instructedit.data.batch import Collator, EditBatch
from instructedit.editors import build_editor
from instructedit.editors.factored_gradients import factor_gradients
from instructedit.editors.losses import LossWeights
from instructedit.editors.mend import Mend
from instructedit.evaluation import Evaluation, evaluate_batch
from instructedit.instructions import Instructor, render_records
from instructedit.lm import FrozenLM
from instructedit.lm.loading import load_model
from instructedit.records import EditRecord
from instructedit.tasks import load_records
from instructedit.testbed.pretrain import Recipe, new_model
from instructedit.training.optimizer import ProductAdamW

T = TypeVar("T")

WEIGHTS = LossWeights(edit=0.1, locality=1.0)
#: Gradient accumulation of the plain training (the paper's).
ACCUMULATE = 2


class LowMemory(NamedTuple):
    """Sizes of the low-memory variant: training examples, edits evaluated, and tokens of a forward pass at once.

    `kv_dtype` is that of `Evaluation`.
    """

    examples: int = 3
    edits: int = 16
    tokens: int = 352
    kv_dtype: Literal["float32", "float16"] = "float32"


LOW_MEMORY = LowMemory()


@dataclass(frozen=True)
class Shape:
    """Shape of a model with random weights, or a real model.

    Attributes:
        architecture: Kind of blocks; ``real``: the model that the setting names is loaded.
        layers, width, heads, vocab: Its size, if its weights are random.
        dtype: Data type of the LM.
        gpu: Whether it is meant for a GPU alone.
        batch: Default number of edits that the engine works on at once.
        tokens: Default maximum of tokens in one forward pass of the engine's evaluation.
        low_memory: Sizes of the low-memory variant.
    """

    architecture: Literal["gpt2", "llama", "real"]
    layers: int = 0
    width: int = 0
    heads: int = 0
    vocab: int = 50257
    dtype: str = "float32"
    gpu: bool = False
    batch: int = 32
    tokens: int = 8192
    low_memory: LowMemory = LOW_MEMORY


SHAPES = {
    "6x256": Shape("gpt2", 6, 256, 4),
    "12x768": Shape("gpt2", 12, 768, 12),
    "48-narrow": Shape("gpt2", 48, 256, 4, low_memory=LowMemory(tokens=232, kv_dtype="float16")),
    "4x512-gated": Shape("llama", 4, 512, 8, 32000),
    "gpt2-xl": Shape("gpt2", 48, 1600, 25, dtype="bfloat16", gpu=True, batch=64),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32000, dtype="bfloat16", gpu=True, batch=64),
}


@dataclass(frozen=True)
class Setting:
    """Settings of a timed run.

    Attributes:
        shape: One of `SHAPES`, or a model's name, folder or hub id.
        rank: Rank of the hypernetwork (paper: 1920).
        edits: Edits in a run.
        batch: Edits that the engine works on at once; in training their gradients are summed over the run, as
            `accumulate_grad_batches` does. By default the shape's.
        tokens: Maximum of tokens in one forward pass of the engine's evaluation. By default the shape's.
        instructions: Whether to put an instruction in front of each request and its in-scope probes.
        fluency_tokens: Length of sampled text in evaluation.
        device: Device on which it runs.
        threads: CPU threads.
    """

    shape: str
    rank: int = 1920
    edits: int = 32
    batch: int | None = None
    tokens: int | None = None
    instructions: bool = False
    fluency_tokens: int = 100
    device: str = "cpu"
    threads: int = 2

    @property
    def model(self) -> Shape:
        """Shape of the model, which is known before the model is loaded."""
        return SHAPES.get(self.shape, Shape("real"))


class Bench:
    """LM, hypernetwork, records and optimiser that the engine and the plain implementation share."""

    def __init__(self, setting: Setting) -> None:
        torch.set_num_threads(setting.threads)
        shape = setting.model
        self.setting = setting
        self.lm = _lm(setting).to(setting.device).try_out()
        torch.manual_seed(0)
        editor = build_editor("mend", self.lm, rank=setting.rank)
        assert isinstance(editor, Mend)
        self.editor = editor
        self.plain = PlainMend(self.lm, editor)
        self.adam = ProductAdamW(editor.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        records = load_records("counterfact", "tiny", "train")[0]
        self.records = [_trimmed(r) for r in records if r.of("locality")][: setting.edits]
        facts, replies = load_records("zsre", "tiny", "test")[0], load_records("convsent", "tiny", "test")[0]
        self.low_memory = shape.low_memory
        self.size, self.tokens = setting.batch or shape.batch, setting.tokens or shape.tokens
        self.tested = [*facts[: setting.edits * 3 // 4], *replies[: setting.edits // 4]]
        if setting.instructions:
            self.records, self.tested = ([_instructed(r) for r in part] for part in (self.records, self.tested))
        collate = Collator(self.lm.text, None)
        self.batches, self.small = (
            [collate(part).to(setting.device) for part in parts(list(enumerate(self.records)), size)]
            for size in (self.size, self.low_memory.examples)
        )

    def run(self, measure: str, variant: str) -> None:
        """Runs one variant of a measure once."""
        with self.precision():
            getattr(self, f"{measure}_{variant}")()

    def precision(self) -> torch.autocast:
        """Returns autocast to the LM's half precision for the hypernetwork too, as with ``--trainer.precision``."""
        kind = self.lm.model.dtype
        return torch.autocast(self.lm.device.type, kind, enabled=kind != torch.float32)

    # -- what is timed ------------------------------------------------------------------------------------------------

    def train_plain(self) -> None:
        """Trains for one pass over the records with the plain implementation, one record at a time."""
        self.editor.train()
        for number, record in enumerate(self.records, 1):
            loss = self.plain.loss(record, WEIGHTS)
            (loss / ACCUMULATE).backward()
            if number % ACCUMULATE == 0:
                self._step()

    def train_cold(self) -> None:
        """Trains for one pass over the records with the engine, batch by batch, from an empty prefix cache."""
        self.lm.forget()
        self._train(self.batches)

    def train_warm(self) -> None:
        """Trains for one pass over the records with the engine, batch by batch, with the prefix cache kept."""
        self._train(self.batches)

    def train_lean(self) -> None:
        """Trains for one pass over the records with the engine, in small batches and with factored gradients."""
        factor_gradients(self.editor.parameters())
        try:
            self._train(self.small)
        finally:
            factor_gradients(self.editor.parameters(), False)

    def _train(self, batches: Sequence[EditBatch]) -> None:
        self.editor.train()
        for batch in batches:
            loss = self.editor.training_loss(batch, WEIGHTS)["loss"]
            (loss * len(batch) / len(self.records)).backward()
        self._step()

    def _step(self) -> None:
        self.adam.clip(100.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def evaluate_plain(self) -> None:
        """Computes all metrics of the test records with the plain implementation, one record at a time."""
        for record in self.tested:
            self.plain.scores(record, self.setting.fluency_tokens)

    def evaluate_cold(self) -> None:
        """Computes all metrics of the test records with the engine, batch by batch, from an empty prefix cache."""
        self.lm.forget()
        self._evaluate(self.size, self.tokens)

    def evaluate_warm(self) -> None:
        """Computes all metrics of the test records with the engine, batch by batch, with the prefix cache kept."""
        self._evaluate(self.size, self.tokens)

    def evaluate_lean(self) -> None:
        """Computes all metrics of the test records with the engine, in the sizes of the low-memory variant."""
        self._evaluate(self.low_memory.edits, self.low_memory.tokens, self.low_memory.kv_dtype)

    def _evaluate(self, size: int, tokens: int, kv_dtype: Literal["float32", "float16"] = "float32") -> None:
        settings = Evaluation(fluency_tokens=self.setting.fluency_tokens, tokens=tokens, kv_dtype=kv_dtype)
        for records in parts(self.tested, size):
            evaluate_batch(self.lm, self.editor, records, settings)

    def one_plain(self) -> None:
        """Makes one edit with the plain implementation."""
        record = self.records[0]
        self.editor.eval()
        self.plain.deltas(record.request.prompt, record.request.target)

    def one_cold(self) -> None:
        """Makes one edit with the engine, from an empty prefix cache."""
        self.lm.forget()
        self.editor.edit([self.records[0].request])

    def one_warm(self) -> None:
        """Makes one edit with the engine, with its prompt in the prefix cache."""
        self.editor.edit([self.records[0].request])


def _lm(setting: Setting) -> FrozenLM:
    shape = setting.model
    if shape.architecture == "real":
        return FrozenLM.from_pretrained(setting.shape, shape.dtype)
    _, tokenizer = load_model("tiny")
    recipe = Recipe(shape.architecture, 0, 0, shape.width, shape.layers, shape.heads, shape.vocab, 256)
    return FrozenLM(new_model(recipe, tokenizer.eos_token_id).to(getattr(torch, shape.dtype)), tokenizer, setting.shape)


def parts(whole: Sequence[T], size: int) -> list[Sequence[T]]:
    """Splits a sequence into pieces of a size; the last one may be shorter."""
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def _instructed(record: EditRecord) -> EditRecord:
    """Puts a record's instruction into the prompts themselves, so that both implementations see it."""
    (rendered,) = render_records([record], Instructor("train"))
    probes = [replace(probe, prompt=rendered.ask(probe)) for probe in record.probes]
    request = replace(record.request, prompt=rendered.prompt)
    return replace(record, request=request, probes=tuple(probes))


def _trimmed(record: EditRecord) -> EditRecord:
    """Keeps the probes of a record that one training example has: one rephrasing and two of locality."""
    return replace(record, probes=record.of("generalization")[:1] + record.of("locality")[:2])

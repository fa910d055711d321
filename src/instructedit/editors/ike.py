"""IKE, in-context knowledge editing (Zheng et al. 2023): the edit is stated in the prompt, with demonstrations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from instructedit.data.batch import RequestBatch
from instructedit.editors.base import Editor
from instructedit.editors.options import options
from instructedit.edits import ContextEdit
from instructedit.errors import UserError
from instructedit.lm import Text
from instructedit.records import EditRecord, EditRequest
from instructedit.tasks import load_records

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Kinds of demonstrations, each with the kinds of probes that it is made from: the edit itself is copied, rephrasings
#: of it are updated, and prompts out of its scope are retained.
PROBE_KINDS: dict[str, tuple[str, ...]] = {
    "copy": ("reliability",),
    "update": ("generalization", "portability", "wanted"),
    "retain": ("locality",),
}
#: The tasks that the paper trains on.
TASKS = ("counterfact", "recent", "convsent")


@dataclass(frozen=True)
class Demonstration:
    """An edit of the training data, followed by a question and its right answer."""

    request: EditRequest
    prompt: str
    answer: str

    def rendered(self, text: Text) -> str:
        """Returns the demonstration as the model reads it."""
        return f"{fact_statement(text, self.request)}{text.joined(self.prompt, self.answer)}\n"


def fact_statement(text: Text, request: EditRequest) -> str:
    """Returns the line that states an edit."""
    return f"New fact: {text.joined(request.prompt, request.target)}\n"


@options
class Ike(Editor):
    """Prepends demonstrations and the new fact to every prompt; no weight is changed.

    The demonstrations are those whose edit is nearest to the request, with the nearest last, in the paper's proportion
    of kinds (copy : update : retain = 1 : 3 : 4). Each edit is stated as "New fact: …", followed by a prompt.

    Defaults: 32 demonstrations (Zheng et al.), or as many of the nearest as fit into the model's context.

    Args:
        demonstrations: Number of demonstrations.
        ratio: Proportion of the kinds copy, update and retain.
        sources: Sources of demonstrations, task → source of its training records (``tiny``, a file, a hub id).
        retriever: ``tfidf`` (scikit-learn), or ``sentence-transformers`` if it is installed.
        sentence_model: Model for sentence-transformers, a name or a folder.
        room: Share of the model's context that the demonstrations may take.
    """

    name: ClassVar[str] = "ike"
    changes_weights = False

    demonstrations: int = 32
    ratio: Sequence[int] = (1, 3, 4)
    sources: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(TASKS, "tiny"))
    retriever: Literal["tfidf", "sentence-transformers"] = "tfidf"
    sentence_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    room: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ratio) != len(PROBE_KINDS) or min(self.ratio) < 0 or not sum(self.ratio):
            raise UserError(f"editor 'ike': ratio must be three weights (copy, update, retain), got {list(self.ratio)}")
        self._store: dict[str, _Store] = {}

    def compute_edit(self, batch: RequestBatch) -> ContextEdit:
        encode = self.lm.token_ids
        budget = int(self.room * self.lm.max_length)
        contexts = []
        for request in batch.requests:
            fact = encode(fact_statement(self.lm.text, request))
            shown: list[int] = []
            for demonstration in self._nearest(request):
                more = encode(demonstration.rendered(self.lm.text))
                if len(shown) + len(more) + len(fact) > budget:
                    break
                shown = more + shown  # the nearest stands last
            contexts.append(torch.tensor(shown + fact))
        ids = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True).unsqueeze(1)
        lengths = torch.tensor([[len(context)] for context in contexts])
        return ContextEdit(ids.to(self.lm.device), lengths.to(self.lm.device))

    def _nearest(self, request: EditRequest) -> list[Demonstration]:
        """Returns demonstrations for a request, the nearest first, with the kinds interleaved by their ratio."""
        if not self._store:
            self._store = self._read()
        text = f"{request.prompt} {request.target}"
        until = [self.demonstrations * part // sum(self.ratio) for part in itertools.accumulate(self.ratio)]
        counts = [end - start for start, end in itertools.pairwise((0, *until))]
        ranked = [iter(store.nearest(text, n)) for store, n in zip(self._store.values(), counts, strict=True)]
        turns = sorted((k / n, kind) for kind, n in enumerate(counts) for k in range(n))
        return [found for _, kind in turns if (found := next(ranked[kind], None)) is not None]

    def _read(self) -> dict[str, _Store]:
        records = [r for task, source in self.sources.items() for r in load_records(task, source, "train")[0]]
        by_kind = {kind: _demonstrations(records, probe_kinds) for kind, probe_kinds in PROBE_KINDS.items()}
        return {kind: _Store(found, self._vectors()) for kind, found in by_kind.items()}

    def _vectors(self) -> Any:
        """Returns an embedder with fit(texts) and of(texts), vectors whose inner products are similarities."""
        return _TfIdf() if self.retriever == "tfidf" else _Sentences(self.sentence_model)


def _demonstrations(records: Sequence[EditRecord], probe_kinds: tuple[str, ...]) -> list[Demonstration]:
    """Builds a demonstration from the first probe of these kinds of each record that has one."""
    firsts = [(record, record.of(*probe_kinds)) for record in records]
    return [Demonstration(r.request, probes[0].prompt, probes[0].answers[0]) for r, probes in firsts if probes]


class _TfIdf:
    def fit(self, texts: list[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.model = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit(texts)

    def of(self, texts: list[str]) -> Any:
        return self.model.transform(texts)


class _Sentences:
    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UserError(
                "editor 'ike': retriever 'sentence-transformers' needs that package: pip install sentence-transformers"
            ) from error
        self.model = SentenceTransformer(model)

    def fit(self, texts: list[str]) -> None:
        """Does nothing, since the model is pretrained."""

    def of(self, texts: list[str]) -> Any:
        return self.model.encode(texts, normalize_embeddings=True)


class _Store:
    """A search index of the demonstrations of one kind, by the edit that they show."""

    def __init__(self, demonstrations: list[Demonstration], vectors: Any) -> None:
        self.demonstrations, self.vectors = demonstrations, vectors
        if not demonstrations:  # the data have no probe of this kind
            return
        texts = [f"{d.request.prompt} {d.request.target}" for d in demonstrations]
        vectors.fit(texts)
        self.index = vectors.of(texts)

    def nearest(self, text: str, count: int) -> list[Demonstration]:
        """Returns the nearest demonstrations, nearest first; ties are in the order of the data."""
        if not self.demonstrations:
            return []
        products: Any = self.index @ self.vectors.of([text]).T
        scores: NDArray[Any] = (products.toarray() if hasattr(products, "toarray") else products)[:, 0]
        return [self.demonstrations[i] for i in (-scores).argsort(kind="stable")[:count]]

"""The interface of every editing method, and functions that build and load editors."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from instructedit.data.batch import EditBatch, RequestBatch, batch_rendered, batch_requests
from instructedit.editors.card import model_card
from instructedit.editors.losses import EditingLoss, LossWeights, editing_loss
from instructedit.editors.options import check_numbers, options
from instructedit.editors.report import TargetReport, check_finite, target_report
from instructedit.editors.saved import SavedEditor, check_made_for, made_for, read_editor, upload, write_folder
from instructedit.editors.sources import find_editor
from instructedit.edits import Edit
from instructedit.errors import UserError, unknown
from instructedit.instructions import Instructor, RenderedRecord, Split, Variant
from instructedit.lm import FrozenLM, Site, Text
from instructedit.records import EditRequest
from instructedit.registry import plugin, plugins
from instructedit.renamed import Renamed

if TYPE_CHECKING:
    from pandas import DataFrame

PACKAGE = "instructedit.editors"
_OLD_METHODS = {
    "make": "compute_edit", "make_together": "compute_joint_edit", "objective": "training_loss",
    "validated": "on_validation_end", "watched": "monitored",
}  # fmt: skip


@options
class Editor(nn.Module, ABC):
    """An editing method, which turns edit requests into an `Edit` without changing the LM.

    A method is one file that defines a subclass with a ``name``, its hyper-parameters as plain fields (or constructor
    arguments kept under their names; they are the config schema), `build` for what depends on the LM's shapes, and
    `compute_edit`.

    Args:
        instructions: Prepend the task's instruction to every request.
        blocks: Blocks whose layers are edited, negative from the top; None means the method's own (`PAPER_BLOCKS`), or
            all if it has none.
        site_names: Names or patterns of the edited layers in these blocks; None means the method's own kind of layer.
    """

    name: ClassVar[str] = ""
    #: Whether `fit` trains it; otherwise it is used as built.
    trainable: ClassVar[bool] = False
    #: Whether its edits are changes of weights, which can be merged into a model permanently.
    changes_weights: ClassVar[bool] = True
    #: The blocks that the method's paper edits, and the depth of its model; scaled in proportion for other depths.
    PAPER_BLOCKS: ClassVar[tuple[tuple[int, ...], int] | None] = None
    #: Whether it may change any linear layer of a block, including attention's, rather than only those of the MLP.
    EVERY_LAYER: ClassVar[bool] = False
    #: What to change if edits found by optimisation miss their targets; empty if the method does not optimise.
    REMEDY: ClassVar[str] = ""
    #: Whether it edits only the MLP's output projection by default, rather than all of the MLP's layers.
    OUTPUT_SITES: ClassVar[bool] = False
    #: Whether the editor reads instructions separately, rather than prepended to a request's prompt.
    INSTRUCTIONS_APART: ClassVar[bool] = False

    instructions: bool = False
    blocks: Sequence[int] | None = (-3, -2, -1)
    site_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_numbers(self)
        self.sites: tuple[Site, ...] = ()
        self.report: TargetReport | None = None  # from the last call of `edit`, if the method optimises
        self._tokenization: Text | None = None  # set by methods that tokenise in their own way
        self._lm: list[FrozenLM] = []  # in a list, so that the LM is not a submodule: never saved, trained or moved

    @property
    def lm(self) -> FrozenLM:
        """The LM that the editor is bound to.

        Raises:
            UserError: Before `bind`.
        """
        if not self._lm:
            raise UserError(f"editor {self.name!r} is not bound to an LM yet: use build_editor or load_editor")
        return self._lm[0]

    @property
    def tokenization(self) -> Text:
        """The tokenization of requests and of the probes of a training step."""
        return self._tokenization or self.lm.text

    def bind(self, lm: FrozenLM) -> Self:
        """Binds the editor to an LM: chooses its sites and builds the parts that depend on their shapes.

        Raises:
            UserError: If the LM has no such sites.
        """
        self._lm = [lm]
        self.sites = lm.select(self.site_names, _blocks(self, lm), self.EVERY_LAYER)
        if self.OUTPUT_SITES and self.site_names is None:
            self.sites = tuple(site for site in self.sites if site.output)
        if not self.sites:
            raise UserError(f"editor {self.name!r}: {lm.name} has no layer of the kind that it edits in these blocks")
        self.build()
        return self.to(lm.device)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Renamed.adopt(cls, **_OLD_METHODS)

    def build(self) -> None:
        """Builds the parts whose shapes depend on ``self.sites``; called once, by `bind`."""

    @abstractmethod
    def compute_edit(self, batch: RequestBatch) -> Edit:
        """Computes one edit for each of n requests, with gradients to the editor's parameters if it has any."""

    def compute_joint_edit(self, batch: RequestBatch) -> Edit:
        """Computes one edit that serves all n requests; by default the separate edits, joined."""
        return self.compute_edit(batch).joined()

    def begin_sequence(self) -> Any:
        """Returns the initial state of a sequence of edits, which `make_next` passes on from one edit to the next.

        By default None: an edit depends on earlier ones only through the model to which they are applied.
        """
        return None

    def make_next(self, batch: RequestBatch, state: Any) -> tuple[Edit, Any]:
        """Computes the next edit of a sequence, while the earlier ones are applied to the model.

        Args:
            batch: N requests.
            state: Returned by `begin_sequence` or the previous call.

        Returns:
            One edit that serves all of them, to be added to the earlier ones (`instructedit.edits.add`), and the
            state for the next call.
        """
        return self.compute_joint_edit(batch), state

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """Computes the outer loss of a training step, ``loss``, and the terms to log beside it; scalars.

        By default it is MEND's (section 3.2 of its paper): c_edit · L_e + c_loc · KL.
        """
        edit, locality = self.editing_loss(batch, weights)
        return {"loss": weights.edit * edit + weights.locality * locality, "edit_loss": edit, "locality_loss": locality}

    def editing_loss(self, batch: EditBatch, weights: LossWeights) -> EditingLoss:
        """Edits a batch and computes both terms of the outer loss; states below the edit are computed together."""
        self.lm.prefixes.warm(batch.tokens, self.lm.first_block([site.name for site in self.sites]))
        return editing_loss(self.lm, self.compute_edit(batch.requests), batch, weights.unlikelihood)

    def on_validation_end(self, scores: Mapping[str, float]) -> None:
        """Receives the scores of each validation during training: metric → mean over the tasks, 0..100."""

    def upgrade(self, weights: dict[str, Tensor], prefix: str = "") -> bool:
        """Converts weights saved by an older version to the current format, in place; True if there were any.

        Args:
            weights: Name → tensor.
            prefix: Prefix of the editor's own names.
        """
        return False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Returns the trained parameters, grouped by learning rate: ``network`` and ``edit_rates``."""
        return {"network": list(self.parameters())}

    def monitored(self) -> dict[str, Tensor]:
        """Returns small tensors that training must change; a guard stops a run in which they stay constant."""
        return {}

    def edit(
        self,
        requests: Sequence[EditRequest],
        description: str | None = None,
        together: bool = False,
        instruction: str | Mapping[str, str] | None = None,
    ) -> Edit:
        """Computes edits for a user's requests, without applying them.

        A method that optimises warns of requests whose targets the edited model does not predict, and keeps its
        findings in ``editor.report``.

        Args:
            requests: n edit requests, each of which gets its own edit.
            description: Id of the instruction's description; by default a fixed one of those used in training.
            together: Make one edit that serves all requests instead (MEMIT solves for them at once; the edits of
                most methods are joined).
            instruction: A sentence of your own in place of the description, or a mapping from task names to such
                sentences; slots such as [TOPIC] are filled from the request.

        Raises:
            UserError: If the editor takes instructions and a request names no task, if it takes none but one is
                given, or if a target is too long.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode(False), torch.no_grad():
                batch = self.requests(requests, self.instructor(description=description, instruction=instruction))
                edit = (self.compute_joint_edit(batch) if together else self.compute_edit(batch)).detach()
                check_finite(edit, self.name)
                if self.REMEDY:
                    self._report(edit, batch)
                return edit
        finally:
            self.train(was_training)

    def _report(self, edit: Edit, batch: RequestBatch) -> None:
        """Warns of requests that miss their targets, and keeps the findings in ``self.report``."""
        self.report = target_report(self.lm, edit, batch)
        if failures := self.report.failures(batch):
            warnings.warn(f"editor {self.name!r}: {failures}; try {self.REMEDY}", stacklevel=3)

    def instructor(
        self,
        split: Split = "train",
        description: str | None = None,
        seed: int = 0,
        instruction: str | Mapping[str, str] | None = None,
        variant: Variant = "own",
    ) -> Instructor | None:
        """Returns what draws this editor's instructions; None if it takes none (an error if a sentence is given)."""
        if self.instructions:
            return Instructor(split, description, seed, instruction, self.INSTRUCTIONS_APART, variant)
        if instruction is not None:
            raise UserError(f"editor {self.name!r} reads no instructions (instructions: false), but one is given")
        return None

    def requests(
        self, requests: Sequence[EditRequest], instructor: Instructor | None, keys: Sequence[str] = ()
    ) -> RequestBatch:
        """Tokenises requests for this editor's LM, on its device."""
        if not requests:
            raise UserError("no edit request given")
        keys = keys or [""] * len(requests)
        prefixes = [instructor.prefix(r, key=k) if instructor else "" for r, k in zip(requests, keys, strict=True)]
        names = [f"record {k}" for k in keys] if any(keys) else ()
        return batch_requests(self.tokenization, requests, prefixes, names, self.INSTRUCTIONS_APART).to(self.lm.device)

    def rendered_requests(self, rendered: Sequence[RenderedRecord]) -> RequestBatch:
        """Tokenises the requests of rendered records for this editor's LM, on its device."""
        return batch_rendered(self.tokenization, rendered).to(self.lm.device)

    # -- disk -----------------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """Returns the constructor arguments as plain values; a subclass stores each under its own name."""
        return {name: plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    def save_pretrained(self, folder: str | Path, results: DataFrame | None = None, place: str = "") -> None:
        """Writes the editor without the LM: ``editor.json``, ``editor.safetensors`` and a model card.

        Args:
            folder: Created if necessary.
            results: Scores for the card, from `Scores.summary` or a test run's table ``summary``.
            place: The source to load it from, as named on the card.
        """
        text = model_card(self.lm, self.name, self.options(), results, place)
        write_folder(Path(folder), SavedEditor(self.name, self.options(), self.state_dict(), self.made_for()), text)

    def push_to_hub(self, repo_id: str, private: bool = False, results: DataFrame | None = None) -> None:
        """Uploads the saved editor to ``owner/name`` on the hub, with the user's own token; see `save_pretrained`."""
        upload(repo_id, private, partial(self.save_pretrained, results=results, place=repo_id))

    @classmethod
    def from_pretrained(cls, source: str | Path, lm: FrozenLM) -> Self:
        """Loads a trained editor of this method from a folder, a checkpoint, a run or the hub (see `load_editor`).

        Raises:
            UserError: See `load_editor`; also if the editor is of another method.
        """
        editor = load_editor(source, lm)
        if not isinstance(editor, cls):
            raise UserError(f"{source}: holds an editor {editor.name!r}, not {cls.name!r}")
        return editor

    def made_for(self) -> dict[str, Any]:
        """Describes the model that its weights fit: the LM's name, its tokenizer, and the sites' shapes."""
        return made_for(self.lm, {site.name: list(site.shape) for site in self.sites})


Renamed.keep(Editor, **_OLD_METHODS)


@runtime_checkable
class KeepsTrainingState(Protocol):
    """An editor that gathers more than weights in training, which a run that is resumed needs: it is in checkpoints."""

    def training_state(self) -> dict[str, Any]:
        """Returns it as tensors and plain values."""

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Takes it from a checkpoint."""


def _blocks(editor: Editor, lm: FrozenLM) -> Sequence[int] | None:
    """Returns the blocks that an editor edits: from its options, or else scaled from its paper; None for all."""
    if editor.blocks is not None or editor.PAPER_BLOCKS is None:
        return editor.blocks
    blocks, depth = editor.PAPER_BLOCKS
    return sorted({block * len(lm.forward.blocks) // depth for block in blocks})


def plain(value: Any) -> Any:
    """Turns a constructor's argument into plain values, an editor among them in the form of the command line."""
    if isinstance(value, Editor):
        return {"class_path": f"{type(value).__module__}.{type(value).__name__}", "init_args": value.options()}
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def build_editor(name: str, lm: FrozenLM, **options: Any) -> Editor:
    """Builds a new editor and binds it to an LM.

    Args:
        name: Name of the method, see `editor_names`.
        lm: The model that it edits.
        options: Its hyper-parameters.

    Raises:
        UserError: If there is no such method or option, or the LM lacks the sites.
    """
    cls: Any = plugin(Editor, PACKAGE, name)
    try:
        return cls(**options).bind(lm).eval()
    except TypeError as error:
        raise UserError(f"editor {name!r}: {error}") from error


def load_editor(source: str | Path, lm: FrozenLM) -> Editor:
    """Loads a trained editor and binds it to an LM.

    Args:
        source: A folder that `Editor.save_pretrained` wrote, a checkpoint of a run (``.ckpt``), a folder that holds
            one, the id or name of a run in ``mlruns/``, ``latest``, or a hub id ``owner/name`` (see `find_editor`).
        lm: The LM to bind it to.

    Raises:
        UserError: If there is no editor, or it was trained for an LM with other shapes or another tokenizer.
    """
    found = find_editor(source)
    saved = read_editor(found)
    name = editor_class(saved.name).name if found.is_file() else saved.name
    editor = build_editor(name, lm, **saved.options)
    check_made_for(saved.made_for, editor.made_for(), str(found))
    return load_weights(editor, saved.weights, str(found)).eval()


def editor_class(name: str) -> type[Editor]:
    """Returns the editing method whose class has a given name; only the package's own modules are imported for it.

    Raises:
        UserError: If no known method has a class of this name.
    """
    classes = {cls.__name__: cls for cls in plugins(Editor, PACKAGE).values()}
    if name not in classes:
        raise unknown("editor", name, list(classes))
    return classes[name]


def load_weights(editor: Editor, weights: dict[str, Tensor], source: str) -> Editor:
    """Puts saved weights into a bound editor.

    Raises:
        UserError: If they do not fit, because the editor was trained for other sites or with other options.
    """
    own, weights = editor.state_dict(), dict(weights)
    editor.upgrade(weights)
    for name in own.keys() | weights.keys():
        have, want = (tuple(d[name].shape) if name in d else "absent" for d in (weights, own))
        if have != want:
            raise UserError(
                f"{source}: does not fit editor {editor.name!r} on {editor.lm.name}: {name} is {have} there, "
                f"{want} here; was it trained for another architecture?"
            )
    editor.load_state_dict(weights)
    return editor

"""How an edit is made: the one interface of every editing method."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

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
    """An editing method: turns edit requests into an `Edit`, and leaves the LM as it is.

    A method is one file that defines a subclass with a ``name``, its hyper-parameters as plain fields (or constructor
    arguments kept under their names; they are the config schema), `build` for what depends on the LM's shapes, and
    `compute_edit`.

    Args:
        instructions: Put the task's instruction in front of every request.
        blocks: Blocks whose layers are edited, negative from the top; None means the method's own (`PAPER_BLOCKS`), or
            else all.
        site_names: Names or patterns of the edited layers within them; None means the method's own kind of layer.
    """

    name: ClassVar[str] = ""
    #: Whether `fit` can train it; else it is used as it is built.
    trainable: ClassVar[bool] = False
    #: Whether its edits are changes of weights, which a model can hold for good.
    changes_weights: ClassVar[bool] = True
    #: The blocks that the method's paper edits, and how many its model has; at other depths those as far up.
    PAPER_BLOCKS: ClassVar[tuple[tuple[int, ...], int] | None] = None
    #: Whether it may change any linear layer of a block, attention's too, rather than those of MLPs.
    EVERY_LAYER: ClassVar[bool] = False
    #: What to change where edits that are found by optimisation miss their targets; empty if none is.
    REMEDY: ClassVar[str] = ""
    #: Whether the method's own kind of layer is the MLP's output projection alone, rather than all its layers.
    OUTPUT_SITES: ClassVar[bool] = False
    #: Whether instructions are read beside a request, rather than in front of its prompt.
    INSTRUCTIONS_APART: ClassVar[bool] = False

    instructions: bool = False
    blocks: Sequence[int] | None = (-3, -2, -1)
    site_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__init__()
        check_numbers(self)
        self.sites: tuple[Site, ...] = ()
        self.report: TargetReport | None = None  # of the last call of `edit`, where the method optimises
        self._tokenization: Text | None = None  # where a method reads text in its own way
        self._lm: list[FrozenLM] = []  # in a list, so that the LM is no submodule: never saved, trained or moved

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
        """How requests, and the probes of a training step, become tokens."""
        return self._tokenization or self.lm.text

    def bind(self, lm: FrozenLM) -> Self:
        """Chooses the sites in the LM and builds what depends on their shapes.

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
        """Makes the parts whose shapes depend on ``self.sites``. Called once, by `bind`."""

    @abstractmethod
    def compute_edit(self, batch: RequestBatch) -> Edit:
        """N requests → n edits, with gradients to the editor's parameters where it has any."""

    def compute_joint_edit(self, batch: RequestBatch) -> Edit:
        """N requests → one edit that serves them all. A method that solves for many at once says how."""
        return self.compute_edit(batch).joined()

    def begin_sequence(self) -> Any:
        """What the editor keeps over a sequence of edits, passed on from one to the next by `make_next`.

        By default None: an edit depends on those before it only through the model, which carries them.
        """
        return None

    def make_next(self, batch: RequestBatch, state: Any) -> tuple[Edit, Any]:
        """The next edit of a sequence, made while the model has those before it on.

        Args:
            batch: N requests.
            state: What `begin_sequence` or the last call gave.

        Returns:
            One edit that serves all of them, to be put on top of those before (`instructedit.edits.add`), and the
            state for the next call.
        """
        return self.compute_joint_edit(batch), state

    def training_loss(self, batch: EditBatch, weights: LossWeights) -> dict[str, Tensor]:
        """The outer loss of a training step, ``loss``, and the parts of it to be logged; scalars.

        By default MEND's (its section 3.2): c_edit · L_e + c_loc · KL.
        """
        edit, locality = self.editing_loss(batch, weights)
        return {"loss": weights.edit * edit + weights.locality * locality, "edit_loss": edit, "locality_loss": locality}

    def editing_loss(self, batch: EditBatch, weights: LossWeights) -> EditingLoss:
        """Edits a batch and gives both terms of the outer loss; states below the edit are computed all at once."""
        self.lm.prefixes.warm(batch.tokens, self.lm.first_block([site.name for site in self.sites]))
        return editing_loss(self.lm, self.compute_edit(batch.requests), batch, weights.unlikelihood)

    def on_validation_end(self, scores: Mapping[str, float]) -> None:
        """Told after each validation in training: metric → mean over the tasks, 0..100."""

    def upgrade(self, weights: dict[str, Tensor], prefix: str = "") -> bool:
        """Turns weights that an older version saved into today's, in place; True if there were any.

        Args:
            weights: Name → tensor.
            prefix: What the editor's own names stand behind.
        """
        return False

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trained parameters by the learning rate that they take: ``network`` and ``edit_rates``."""
        return {"network": list(self.parameters())}

    def monitored(self) -> dict[str, Tensor]:
        """Small tensors that training must move; a guard stops a run in which they stand still."""
        return {}

    def edit(
        self,
        requests: Sequence[EditRequest],
        description: str | None = None,
        together: bool = False,
        instruction: str | Mapping[str, str] | None = None,
    ) -> Edit:
        """Makes edits for a user's requests; nothing is applied yet.

        A method that optimises warns of requests whose targets the edited model does not predict, and keeps what it
        found in ``editor.report``.

        Args:
            requests: n edit requests: n separate edits.
            description: Id of the instruction's description; by default one that training uses, always the same.
            together: Make one edit that serves all requests instead (MEMIT solves for them at once; the edits of
                most methods are joined).
            instruction: A free sentence of your own in the description's place, or one for each task by its name;
                slots such as [TOPIC] are filled from the request.

        Raises:
            UserError: If the editor takes instructions and a request names no task, if it takes none and one is
                given, or a target does not fit.
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
        """Says which requests miss their targets, and keeps what was found in ``self.report``."""
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
        """Draws this editor's instructions; None if it takes none, which with a free sentence is an error."""
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
        """The constructor arguments as plain values; a subclass keeps each under its own name."""
        return {name: _plain(getattr(self, name)) for name in inspect.signature(type(self)).parameters}

    def save_pretrained(self, folder: str | Path, results: DataFrame | None = None, place: str = "") -> None:
        """Writes the editor, never the LM: ``editor.json``, ``editor.safetensors`` and a model card.

        Args:
            folder: Made if need be.
            results: Its scores for the card, as `Scores.summary` or a test run's table ``summary``.
            place: Where it will be loaded from, for the card.
        """
        text = model_card(self.lm, self.name, self.options(), results, place)
        write_folder(Path(folder), SavedEditor(self.name, self.options(), self.state_dict(), self.made_for()), text)

    def push_to_hub(self, repo_id: str, private: bool = False, results: DataFrame | None = None) -> None:
        """Uploads the saved editor to ``owner/name`` on the hub (the user's own token); see `save_pretrained`."""
        upload(repo_id, private, partial(self.save_pretrained, results=results, place=repo_id))

    @classmethod
    def from_pretrained(cls, source: str | Path, lm: FrozenLM) -> Self:
        """A trained editor of this method, from a folder, a checkpoint, a run or the hub (see `load_editor`).

        Raises:
            UserError: See `load_editor`; or if it is one of another method.
        """
        editor = load_editor(source, lm)
        if not isinstance(editor, cls):
            raise UserError(f"{source}: holds an editor {editor.name!r}, not {cls.name!r}")
        return editor

    def made_for(self) -> dict[str, Any]:
        """What its weights fit: the LM's name, its tokenizer, and the sites' shapes."""
        return made_for(self.lm, {site.name: list(site.shape) for site in self.sites})


Renamed.keep(Editor, **_OLD_METHODS)


def _blocks(editor: Editor, lm: FrozenLM) -> Sequence[int] | None:
    """The blocks that an editor edits: those of its options, or as far up as in its paper; None for all."""
    if editor.blocks is not None or editor.PAPER_BLOCKS is None:
        return editor.blocks
    blocks, depth = editor.PAPER_BLOCKS
    return sorted({block * len(lm.forward.blocks) // depth for block in blocks})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def build_editor(name: str, lm: FrozenLM, **options: Any) -> Editor:
    """A new editor, bound to an LM.

    Args:
        name: Of the method, see `editor_names`.
        lm: What it edits.
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
    """A trained editor.

    Args:
        source: A folder that `Editor.save_pretrained` wrote, a checkpoint of a run (``.ckpt``), a folder that holds
            one, the id or name of a run in ``mlruns/``, ``latest``, or a hub id ``owner/name`` (see `find_editor`).
        lm: The LM to bind it to.

    Raises:
        UserError: If nothing is there, or it was trained for an LM of other shapes or another tokenizer.
    """
    found = find_editor(source)
    saved = read_editor(found)
    name = editor_class(saved.name).name if found.is_file() else saved.name
    editor = build_editor(name, lm, **saved.options)
    check_made_for(saved.made_for, editor.made_for(), str(found))
    return load_weights(editor, saved.weights, str(found)).eval()


def editor_class(name: str) -> type[Editor]:
    """The editing method whose class has a name. Nothing is imported for it but the package's own methods.

    Raises:
        UserError: If no method that is known here has such a class.
    """
    classes = {cls.__name__: cls for cls in plugins(Editor, PACKAGE).values()}
    if name not in classes:
        raise unknown("editor", name, list(classes))
    return classes[name]


def load_weights(editor: Editor, weights: dict[str, Tensor], source: str) -> Editor:
    """Puts saved weights into a bound editor.

    Raises:
        UserError: If they do not fit: the editor was trained for other sites, or with other options.
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

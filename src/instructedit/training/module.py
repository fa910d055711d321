"""The LightningModule: a frozen LM and the editor that is trained on it."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L  # noqa: N812
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from instructedit.data.batch import EditBatch
from instructedit.data.module import EditData
from instructedit.editors import Editor, load_weights
from instructedit.editors.base import KeepsTrainingState, plain
from instructedit.editors.factored_gradients import factor_gradients
from instructedit.editors.losses import LossWeights
from instructedit.editors.saved import check_checkpoint, check_made_for, seal_checkpoint
from instructedit.errors import UserError, at_least
from instructedit.evaluation import Evaluation, Outcome, Watcher, evaluate_batch
from instructedit.lm import FrozenLM, Loading
from instructedit.metrics import PerRecordMean, editing_metrics
from instructedit.records import EditRecord
from instructedit.renamed import warn_renamed
from instructedit.training.optimizer import ProductAdamW


@dataclass(frozen=True)
class LMConfig(Loading):
    """The LM to edit, and how its files are read.

    Attributes:
        name: ``tiny`` or ``tiny-llama`` (embedded), ``smollm2-135m`` or ``gemma-3-270m`` (real, by pip; see
            `instructedit models`), a local folder, a .gguf file, or a hub id.
        max_length: Largest number of tokens in a row; by default the model's own limit.
        cache_bytes: Size of the prefix cache in memory, in bytes; 0 keeps nothing there.
        cache_dir: Folder of the prefix cache on disk, for later runs and for states that do not fit into memory; by
            default nothing is kept on disk (see `instructedit cache`).
        cache_dtype: Dtype of the states on disk: ``float32`` (exactly as they are computed), or rounded to
            ``bfloat16`` or ``float16``, which halves the size for an LM that computes in float32.
        cache_disk_bytes: Largest size of that folder, in bytes; the least recently used states are removed.
        activation_checkpointing: Train with less memory but more time: blocks are recomputed in the backward pass
            instead of keeping all of their activations.
        shards: Number of processes that share one copy of the blocks' weights (FSDP2), for an LM that does not fit on
            one GPU; they see the same records. The number of processes must be a multiple of it.
        joiner: Text between a prompt and its answer; ``auto`` is a space, or nothing after white space, an opening
            quote or bracket, and in scripts without spaces.
        chat: Put prompts, with their instruction in front, into the user's turn of the LM's own chat template, and
            answers into the model's turn.
        checkpoint: Deprecated name of `activation_checkpointing`.
    """

    name: str = "tiny"
    max_length: int | None = None
    cache_bytes: int = 2 << 30
    cache_dir: str | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    cache_disk_bytes: int = 64 << 30
    activation_checkpointing: bool = False
    shards: int = 1
    joiner: str = "auto"
    chat: bool = False
    checkpoint: bool | None = None

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            warn_renamed("lm.checkpoint", "lm.activation_checkpointing")
            object.__setattr__(self, "activation_checkpointing", self.checkpoint)

    def options(self) -> dict[str, Any]:
        """Returns the arguments of `FrozenLM.from_pretrained`."""
        return {name: value for name, value in asdict(self).items() if name not in ("checkpoint", "shards")}


class EditingModule(L.LightningModule):
    """Trains and tests an editor of a frozen LM.

    The LM is not a submodule: it is never trained, never in train mode, and never in a checkpoint.

    Args:
        editor: The editing method.
        lm: The LM to edit.
        lr: Adam's learning rate for the editor's networks (paper: 1e-6).
        lr_edit_rates: Adam's learning rate for the edit rates, relative to each rate: they are learned as logarithms.
        c_edit: Weight of the edit loss (MEND: 0.1).
        c_loc: Weight of the locality loss (MEND: 1).
        c_unlikelihood: Weight, within the edit loss, of the unlikelihood of unwanted replies (SERAC: 1).
        weight_decay: Decoupled weight decay of the networks: 0 is Adam (MEND), 0.01 is AdamW as used for KE in the
            paper.
        warmup_steps: Number of optimiser steps over which both learning rates rise from zero.
        decay: Let both learning rates fall linearly to zero at ``max_steps``.
        factored_gradients: Keep the gradients of the hypernetwork's matrices factored into a few rows until the
            optimiser's step, which computes them one at a time: less memory, somewhat more arithmetic. For one process.
        evaluation: How edited models are scored in `test`. Validation leaves out generation and Fluency.
    """

    def __init__(
        self,
        editor: Editor,
        lm: LMConfig = LMConfig(),
        lr: float = 1e-6,
        lr_edit_rates: float = 1e-2,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        c_unlikelihood: float = 1.0,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: bool = False,
        factored_gradients: bool = False,
        evaluation: Evaluation = Evaluation(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        at_least(1, shards=lm.shards)
        self._shards = lm.shards
        self._lm = [FrozenLM.from_pretrained(**lm.options())]
        self.editor = editor.bind(self.lm)
        self.evaluation = evaluation
        self._data: EditData | None = None
        self.scores = nn.ModuleDict()
        self.watchers: list[Watcher] = []  # called with the edits of `test`
        self.editor_folder: str | None = None  # folder that the editor was loaded from, if not from a checkpoint

    @property
    def lm(self) -> FrozenLM:
        """The frozen LM."""
        return self._lm[0]

    def connect(self, data: EditData) -> None:
        """Connects the module with its data, which then uses the LM's tokenization and the editor's instructions.

        Call this before passing the two to the Trainer; the command line does so automatically.
        """
        data.connect(self.editor.tokenization, self.editor.instructor)
        self._data = data

    @property
    def data(self) -> EditData:
        """The data that the module is connected with."""
        if self._data is None:  # scripts for 0.1 pass the data only to the Trainer
            data: Any = getattr(self.trainer, "datamodule", None)
            if data is None:
                raise UserError("the editing module needs its data: call module.connect(data)")
            advice = "call module.connect(data) before the Trainer's fit or test"
            warnings.warn(advice, DeprecationWarning, stacklevel=2)
            self.connect(data)
            return data
        return self._data

    def setup(self, stage: str) -> None:
        """Shards the LM, and connects data that was passed only to the Trainer, before its stream begins."""
        self.lm.shard(self._shards, self.trainer.strategy.root_device)
        if getattr(self.trainer, "datamodule", None) is not None:
            _ = self.data

    @property
    def loss_weights(self) -> LossWeights:
        """Weights of the outer loss."""
        return LossWeights(*(self.hparams[name] for name in ("c_edit", "c_loc", "c_unlikelihood")))

    # -- fit ------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """Creates Adam (with weight decay: AdamW) with one learning rate for networks and one for edit rates."""
        groups = self.editor.parameter_groups()
        rates = {"network": self.hparams["lr"], "edit_rates": self.hparams["lr_edit_rates"]}
        factored = self.hparams["factored_gradients"]
        if factored and (self.trainer.world_size > 1 or self.trainer.precision == "16-mixed"):
            raise UserError("factored_gradients: not with several processes, which sum gradients, nor with 16-mixed")
        factor_gradients(self.editor.parameters(), factored)
        decay = {"network": self.hparams["weight_decay"], "edit_rates": 0.0}  # zero is not special for a logarithm
        optimizer = (ProductAdamW if factored else torch.optim.AdamW)(
            [{"params": p, "lr": rates[name], "weight_decay": decay[name], "name": name} for name, p in groups.items()],
            # Fused saves copies of the hypernetwork's size; but float16's loss scaling would then refuse to clip.
            fused=self.trainer.precision != "16-mixed",
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / (self.hparams["warmup_steps"] + 1))
        total = self.trainer.max_steps
        return rising * (1 - step / total) if self.hparams["decay"] and total > 0 else rising

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips gradients as the Trainer is configured to; factored gradients can only be clipped by norm."""
        plugin, how = self.trainer.precision_plugin, GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        if isinstance(optimizer, ProductAdamW):
            if how == GradClipAlgorithmType.VALUE:
                raise UserError("factored_gradients: no single value is known before the step; clip by norm")
            if gradient_clip_val:
                optimizer.clip(gradient_clip_val)
        elif isinstance(plugin, MixedPrecision) and not plugin.scaler and gradient_clip_val:
            # Lightning refuses every fused optimiser here because of loss scaling, which bfloat16 does not use.
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, how)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_fit_start(self) -> None:
        if not self.editor.trainable:
            raise UserError(f"editor {self.editor.name!r} has nothing to train: run `instructedit test`")
        self.lm.to(self.device)

    def training_step(self, batch: EditBatch, batch_idx: int) -> Tensor:
        """Computes the editor's outer loss on one batch of different edits."""
        parts = self.editor.training_loss(batch, self.loss_weights)
        loss = parts.pop("loss")
        truncated = batch.in_scope.tokens.truncated + (batch.locality.tokens.truncated if batch.locality else 0)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)
        logged = {f"train/{name}": value for name, value in parts.items()} | {"data/truncated": float(truncated)}
        self.log_dict(logged, batch_size=len(batch), sync_dist=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds a description of the model that the editor fits, and a checksum that detects later corruption.

        Constructor arguments are stored as plain values, also those of a module that was built in Python: a checkpoint
        with objects in it could not be read back without trusting it.
        """
        for part in ("hyper_parameters", "datamodule_hyper_parameters"):
            if part in checkpoint:
                checkpoint[part] = plain(checkpoint[part])
        checkpoint["made_for"] = self.editor.made_for()
        if isinstance(self.editor, KeepsTrainingState):
            checkpoint["training_state"] = self.editor.training_state()
        seal_checkpoint(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a corrupt checkpoint, or weights of another architecture, with a one-line error."""
        check_checkpoint(checkpoint, "the checkpoint")
        weights = {k.removeprefix("editor."): v for k, v in checkpoint["state_dict"].items() if k.startswith("editor.")}
        made_for = checkpoint.get("made_for", {})
        check_made_for(made_for, self.editor.made_for(), "the checkpoint")
        load_weights(self.editor, weights, f"the checkpoint (trained on {made_for.get('lm', '?')})")
        if isinstance(self.editor, KeepsTrainingState) and "training_state" in checkpoint:
            self.editor.load_training_state(checkpoint["training_state"])
        if self.editor.upgrade(weights):  # the optimiser's state belongs to the old parametrisation
            for state in checkpoint.get("optimizer_states", ()):
                state["state"].clear()

    # -- validate, test, predict ------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        self.lm.to(self.device)

    def on_test_start(self) -> None:
        self.lm.to(self.device)

    def on_predict_start(self) -> None:
        self.lm.to(self.device)

    def validation_step(self, batch: list[EditRecord], batch_idx: int) -> Any:
        """Scores a batch under teacher forcing."""
        quick = Evaluation(generate=False, fluency_tokens=0, seed=self.evaluation.seed)
        return self._evaluate("val", batch, quick)

    def test_step(self, batch: list[EditRecord], batch_idx: int) -> Any:
        """Scores a batch with everything that `evaluation` asks for."""
        return self._evaluate("test", batch, self.evaluation, self.watchers)

    def predict_step(self, batch: list[EditRecord], batch_idx: int) -> list[dict[str, Any]]:
        """Returns the model's answers before and after each edit of a batch."""
        rows = evaluate_batch(self.lm, self.editor, batch, self.evaluation).rows if batch else []
        return [row for row in rows if row["main"]]

    def _evaluate(
        self, stage: str, batch: list[EditRecord], settings: Evaluation, watchers: Sequence[Watcher] = ()
    ) -> Outcome:
        metrics = self._metrics(stage)
        if not batch:  # this process has no record left
            return Outcome([])
        outcome = evaluate_batch(self.lm, self.editor, batch, settings, watchers)
        every = editing_metrics()
        for key, metric in metrics.items():
            _, task, name = key.split("/")
            declared = every[name]
            rows = [r for r in outcome.rows if r["task"] == task and r["kind"] in declared.probes and r["main"]]
            metric.update(
                [_number(r["record"]) for r in rows], [_number(r["cluster"]) for r in rows],
                [r["probe"] for r in rows], torch.tensor([float(r[declared.column]) for r in rows]),
            )  # fmt: skip
        return outcome

    def _metrics(self, stage: str) -> dict[str, PerRecordMean]:
        """Returns the metrics of a stage, which are the same on every process, whatever records it gets."""
        every = editing_metrics()
        for task in self.data.records["validate" if stage == "val" else "test"]:
            for name, metric in every.items():
                if metric.column and f"{stage}/{task}/{name}" not in self._own(stage):
                    self.scores[f"{stage}/{task}/{name}"] = PerRecordMean(metric.scale).to(self.device)
        return self._own(stage)

    def _own(self, stage: str) -> dict[str, Any]:
        return {key: metric for key, metric in self.scores.items() if key.startswith(f"{stage}/")}

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        values = {key: metric.compute() for key, metric in self._own(stage).items()}
        found = {key: value for key, value in values.items() if not torch.isnan(value)}
        for key, value in found.items():
            self.log(key, value)
        if stage == "val":
            chosen_by = [name for name, metric in editing_metrics().items() if metric.chooses]
            means = {name: [v for k, v in found.items() if k.endswith(f"/{name}")] for name in chosen_by}
            if chosen := [value for values in means.values() for value in values]:
                self.log("val/score", torch.stack(chosen).mean(), prog_bar=True)
            if self.trainer.state.fn == TrainerFn.FITTING:
                self.editor.on_validation_end({n: torch.stack(v).mean().item() for n, v in means.items() if v})
        for metric in self._own(stage).values():
            metric.reset()


def _number(text: str) -> int:
    """Hashes an id to an integer that is the same on every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

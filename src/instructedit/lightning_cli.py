"""The commands `fit`, `validate`, `test` and `predict`: a LightningCLI over the editing module and the data module."""

from __future__ import annotations

import logging
import warnings
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from instructedit.callbacks import (
    DataReport,
    EditingAreaDump,
    EditRateSweep,
    Guards,
    Pace,
    PredictionTable,
    ResultTables,
    TestedEditor,
)
from instructedit.callbacks.checkpoint import Checkpoint
from instructedit.callbacks.editor_model import EditorModel
from instructedit.configs import expanded, shown
from instructedit.data.module import EditData
from instructedit.editors.base import PACKAGE, Editor, editor_class, load_weights
from instructedit.editors.options import adjustable_options
from instructedit.editors.saved import read_checkpoint, read_folder
from instructedit.editors.sources import check_run_id, find_editor
from instructedit.errors import UserError
from instructedit.paths import DEFAULTS, check_database, check_writable
from instructedit.registry import plugin, plugins
from instructedit.run_names import next_command, run_name, run_tags
from instructedit.tracking import DATABASE, MLflowTracker, SaveConfig, unfinished_run
from instructedit.training.module import EditingModule

#: Options that stand for several configs.
NAMED = {
    "--scale": "the LM, trainer and data of configs/scale/NAME.yaml, or of a file of your own; --config and options "
    "override",
    "--editor": "the editor's config at that scale: configs/editor/, or a file of your own",
    "--task": "the one task to train, validate and test on: its name, or a folder with a task.yaml "
    "(instructedit new-task)",
    "--callbacks": "further callbacks or other options of those that every run has: configs/callbacks/, or a file",
    "--logger": "where metrics go: configs/logger/, or a file",
    "--debug": "a way to be careful: configs/debug/, or a file",
}

#: Values of ``--ckpt_path`` that Lightning resolves.
LIGHTNINGS_OWN = ("best", "last", "hpc")


#: Parts of a checkpoint that Lightning needs: to score it, and to resume training.
_VERSION = ("pytorch-lightning_version",)
_NEEDED = (_VERSION, (*_VERSION, "optimizer_states", "lr_schedulers", "epoch", "global_step"))


class EditingCLI(LightningCLI):
    """LightningCLI for the commands `fit`, `validate`, `test` and `predict`.

    Attributes:
        typed: The command line as it was given, before names of configs were replaced by their files.
    """

    typed: tuple[str, ...] = ()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options that name configs, for the help alone (`expanded` reads them), and every run's callbacks."""
        for flag, what in NAMED.items():
            parser.add_argument(flag, metavar="NAME", default=SUPPRESS, help=what)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(EditRateSweep, "edit_rate")  # before the guards, which note the initial rates
        parser.add_lightning_class_args(Guards, "guards")
        parser.add_lightning_class_args(DataReport, "data_report")
        parser.add_lightning_class_args(Pace, "pace")
        parser.add_lightning_class_args(EditorModel, "editor_model")
        parser.add_lightning_class_args(ResultTables, "results")
        parser.add_lightning_class_args(TestedEditor, "tested_editor")
        parser.add_lightning_class_args(PredictionTable, "predictions")
        parser.add_lightning_class_args(EditingAreaDump, "areas")

    def fit(self, **options: Any) -> None:
        """Runs `Trainer.fit`, then prints the commands that usually follow."""
        self._call(self.trainer.fit, options)
        for logger in self._trackers():
            if not logger.is_child:
                then = next_command(str(logger.run_id), "FINISHED", run_tags(self.typed))
                rank_zero_info(f"next: {then}\nand:  instructedit edit --editor {logger.run_id} --prompt … --target …")

    def _trackers(self) -> list[MLflowTracker]:
        return [logger for logger in self.trainer.loggers if isinstance(logger, MLflowTracker)]

    def validate(self, **options: Any) -> None:
        """Runs `Trainer.validate`."""
        self._score(self.trainer.validate, options)

    def test(self, **options: Any) -> None:
        """Runs `Trainer.test` without Lightning's table of bare means: ours has intervals."""
        self._score(self.trainer.test, options | {"verbose": False})

    def predict(self, **options: Any) -> None:
        """Runs `Trainer.predict`."""
        self._score(self.trainer.predict, options)

    def _score(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        """Runs a scoring command; rejects an untrained editor, which must not be scored under its method's name."""
        editor = self.model.editor
        if editor.trainable and not options["ckpt_path"]:
            raise UserError(
                f"editor {editor.name!r} must be trained first: give --ckpt_path a run's id, folder or checkpoint"
            )
        self._call(function, options)

    def _call(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        """Calls Lightning; a missing checkpoint is a `UserError`, even for ``last``, where Lightning would go on."""
        asked = options["ckpt_path"]
        if self._weights:  # of a saved editor, which Lightning cannot read: they are loaded already
            options = options | {"ckpt_path": None}
        with warnings.catch_warnings():
            if asked in LIGHTNINGS_OWN:
                warnings.filterwarnings("error", ".*there is no last checkpoint available")
            try:
                function(**options)
            except (ValueError, UserWarning) as error:
                if asked in LIGHTNINGS_OWN and "ckpt_path" in str(error):
                    raise UserError(f"--ckpt_path {asked}: finds no checkpoint: name a run, folder or file") from error
                raise

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments and reports errors in them as one line."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            hint = f" (editors: {', '.join(sorted(_class_names()))})" if "model.editor" in str(error) else ""
            raise UserError(f"{' '.join(str(error).split())}{hint}") from error

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint, takes the editor's options from it, and reports where the command line's differ.

        LightningCLI would take all options of the model, so that a checkpoint could not be tested in another way than
        it was trained: with another instruction, say, or in another dtype.

        Raises:
            UserError: If there is no usable checkpoint.
        """
        self._weights: dict[str, Tensor] | None = None  # of a saved editor that is not a checkpoint
        config = self.config[self.config.subcommand]
        asked = config.get("ckpt_path")
        if not asked or asked in LIGHTNINGS_OWN:
            return
        try:
            found = find_editor(asked, _store(config))
            if found.is_dir() and self.config.subcommand == "fit":
                raise UserError(f"{found}: holds a trained editor alone; training goes on from a checkpoint (.ckpt)")
            saved, self._weights = _saved_editor(found, _NEEDED[self.config.subcommand == "fit"])
        except UserError as error:
            raise UserError(f"--ckpt_path {error}") from error
        config["ckpt_path"] = str(found)
        if self.config.subcommand == "fit":
            _go_on(config, found)
        self._take(saved)

    def _take(self, saved: dict[str, Any]) -> None:
        """Replaces the editor's class and options in the command line's configuration by those of a saved editor.

        Those that may change after training stay as the command line has them, if it does.
        """
        before = _flat(self.config[self.config.subcommand].model.editor)
        given = {arg.partition("=")[0].replace(".init_args", "") for arg in self.typed}
        for option in adjustable_options(editor_class(saved["class_path"].rpartition(".")[2])):
            if f"--model.editor.{option}" in given and (name := f"editor.init_args.{option}") in before:
                saved["init_args"] = saved["init_args"] | {option: before[name]}
        taken = {self.config.subcommand: {"model": {"editor": saved}}}
        try:
            self.config = self.parser.parse_object(taken, self.config)
        except ArgumentError as error:
            raise UserError(f"--ckpt_path: options of its editor: {' '.join(str(error).split())}") from error
        now = _flat(self.config[self.config.subcommand].model.editor)
        changed = [f"{k} = {now[k]} (not {before[k]})" for k in before if k in now and before[k] != now[k]]
        if changed:
            rank_zero_info(f"the checkpoint's own editor is used: {', '.join(changed)}")

    def before_instantiate_classes(self) -> None:
        """Checks the local store before anything is instantiated: jsonargparse would hide what is wrong with it."""
        config = self.config[self.config.subcommand]
        if getattr(config.trainer.logger, "class_path", "").endswith(f".{MLflowTracker.__name__}"):
            options = config.trainer.logger.init_args
            if not options.get("tracking_uri"):
                check_database(check_writable(_store(config), "trainer.logger.root") / DATABASE)
                check_run_id(options.get("run_id"))

    def after_instantiate_classes(self) -> None:
        """Connects the module and the data, names the run, and loads the weights of a saved editor."""
        self.model.connect(self.datamodule)
        config = self.config[self.config.subcommand]
        checkpoint = config.get("ckpt_path") if self.config.subcommand != "fit" else None
        editor = type(self.model.editor).__name__
        for logger in self._trackers():
            logger.describe(
                run_name(self.config.subcommand, editor, config.model.lm.name, config.seed_everything),
                run_tags(self.typed, checkpoint),
            )
        if self._weights is not None:
            load_weights(self.model.editor, self._weights, "--ckpt_path")
            self.model.editor_folder = self.config_init[self.config_init.subcommand].ckpt_path


def _store(config: Any) -> str:
    """Returns the folder of the store that a command logs to."""
    options = getattr(config.trainer.logger, "init_args", None) or {}
    return str(options.get("root") or "mlruns")


def _go_on(config: Any, checkpoint: Path) -> None:
    """Continues a killed or failed run as the same run; the checkpoint of a finished run starts a new one."""
    options = getattr(config.trainer.logger, "init_args", None)
    if options is None or options.get("run_id", "") is not None:  # another logger, or the run is given
        return
    if run_id := unfinished_run(checkpoint, _store(config)):
        rank_zero_info(f"run {run_id} goes on")
        options["run_id"] = run_id


def _saved_editor(found: Path, needed: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Returns a saved editor's class and options in the parser's form, and its weights if it is not a checkpoint.

    Raises:
        UserError: If it is damaged, or a checkpoint of something else.
    """
    saved = read_folder(found) if found.is_dir() else read_checkpoint(found)
    cls = plugin(Editor, PACKAGE, saved.name) if found.is_dir() else editor_class(saved.name)
    if found.is_file() and (missing := [part for part in needed if part not in saved.parts]):
        raise UserError(f"{found}: the checkpoint has no {missing[0]!r}: Lightning cannot read it for this")
    editor = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": saved.options}
    return editor, saved.weights if found.is_dir() else None


def _flat(config: Any, prefix: str = "editor") -> dict[str, Any]:
    if not hasattr(config, "items"):
        return {prefix: config}
    return {k: v for name, value in config.items() for k, v in _flat(value, f"{prefix}.{name}").items()}


class Built(EditingCLI):
    """CLI that builds the module, data and Trainer of a command without running it."""

    def _score(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        pass

    def _call(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        pass


def run(args: Sequence[str], cls: type[EditingCLI] = EditingCLI, **trainer_defaults: Any) -> EditingCLI:
    """Parses and runs one command; with `Built`, only builds what it needs.

    Raises:
        UserError: If the arguments or the run's input are wrong.
    """
    plugins(Editor, PACKAGE)  # imports every editing method, so that its class name alone resolves
    _quiet()
    typed = tuple(args)
    args, files = expanded(args)
    if files:
        rank_zero_info(f"configs: {' '.join(map(shown, files))}")
    raising = {"exit_on_error": False}
    first = raising | {"default_config_files": [str(DEFAULTS)]}
    cls = _of_one_command(cls, args[0] if args else "", typed)
    return cls(
        EditingModule,
        EditData,
        args=args,
        save_config_callback=SaveConfig,
        trainer_defaults=trainer_defaults,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "instructedit", **raising, **dict.fromkeys(cls.subcommands(), first)},
    )


def _of_one_command(cls: type[EditingCLI], command: str, typed: tuple[str, ...]) -> type[EditingCLI]:
    """Returns the CLI with the parser of one command alone, since each parser takes half a second to build."""
    every = cls.subcommands()
    chosen = {command: every[command]} if command in every else every
    return type(
        cls.__name__, (cls,), {"subcommands": staticmethod(lambda: chosen), "__doc__": cls.__doc__, "typed": typed}
    )


def _class_names() -> list[str]:
    return [cls.__name__ for cls in plugins(Editor, PACKAGE).values()]


def _quiet() -> None:
    """Silences warnings that every run would print and that need no action from the user."""
    for message in (
        ".*does not have many workers.*",
        ".*is an instance of `nn.Module` and is already saved during checkpointing.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*args parameter is intended to run from within Python.*",
        "The dirpath has changed.*",  # a test has a run of its own
    ):
        warnings.filterwarnings("ignore", message)
    # Lightning's advertisements, and its lines about missing devices, are log messages.
    silent = ("💡", "GPU available: False", "TPU available: False")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(words in record.getMessage() for words in silent)
    )

"""Make one edit and see what the model says before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from instructedit.configs import Scale
from instructedit.console import console
from instructedit.errors import UserError
from instructedit.paths import check_writable

if TYPE_CHECKING:
    from instructedit.editors import Editor
    from instructedit.lm import FrozenLM


def main(
    prompt: str,
    target: str,
    editor: str,
    options: dict[str, Any] | None = None,
    scale: str | None = None,
    lm: str | None = None,
    task: str | None = None,
    subject: str | None = None,
    description: str | None = None,
    instruction: str | None = None,
    slots: dict[str, str] | None = None,
    ask: list[str] | None = None,
    max_new_tokens: int = 12,
    chat: bool = False,
    save: str | None = None,
    merge: str | None = None,
) -> None:
    """Edits what a model says, and shows its words before and after.

    Args:
        prompt: What the model is asked.
        target: What it should say.
        editor: A trained editor (folder, checkpoint, a run's id or a hub id), or the name of a method that needs no
            training.
        options: Hyper-parameters of a method that needs no training, e.g. '{"lr": 0.005, "bound": 0.02}'; by
            default those of its config at the scale; without a scale the published ones, with step sizes and radii
            that follow the model's own scales.
        scale: A scale of configs/scale/, or a file of your own, for the LM and the method's hyper-parameters.
        lm: tiny, tiny-llama, smollm2-135m, gemma-3-270m, a local folder, a .gguf file, or a hub id; by default the
            scale's, or tiny.
        task: Name of the editing task, for editors that read instructions.
        subject: The entity in the prompt that the edit is about, for ROME and MEMIT.
        description: Id of the instruction's description; by default one that training uses, always the same.
        instruction: A sentence of your own in the description's place, for editors that read instructions; its slots
            are filled.
        slots: Values of the task's instruction slots, e.g. '{"LABEL": "positive", "TOPIC": "tea"}'.
        ask: Further prompts to ask before and after.
        max_new_tokens: Length of the answers.
        chat: Ask in the LM's own chat template.
        save: Folder to save the edit to (a LoRA adapter, for edits of low rank).
        merge: Folder to save a plain transformers model with the edit in its weights to.
    """
    import instructedit as ie

    _check_targets(save, merge)
    request = ie.EditRequest(prompt, target, task=task, subject=subject, slots=slots or {})
    at = Scale.load(scale) if scale else None
    known = at.lm_options() if at and not lm else {"name": lm or "tiny"}
    model = ie.FrozenLM.from_pretrained(**known | ({"chat": True} if chat else {}))
    method = _method(editor, model, options, at)
    if merge and not method.changes_weights:
        raise UserError(f"--merge: edits of {method.name!r} are no change of weights, so no model can hold them")
    change = method.edit([request], description=description, instruction=instruction)
    prompts = [prompt, *(ask or [])]
    before = model.generate(prompts, max_new_tokens=max_new_tokens)
    with model.edited(change, rows=[0] * len(prompts)):
        after = model.generate(prompts, max_new_tokens=max_new_tokens)
    _show_words(prompts, before, after)
    if save:
        model.save(change, save)
    if merge:
        model.merge(change).save_pretrained(merge)
        model.tokenizer.save_pretrained(merge)


def _method(editor: str, lm: FrozenLM, options: dict[str, Any] | None, scale: Scale | None) -> Editor:
    """A trained editor, or one that needs no training."""
    import instructedit as ie
    from instructedit.editors.sources import is_place

    if editor not in ie.editor_names() and is_place(editor):
        if options:
            raise UserError(f"editor {editor!r} is a trained one, which has its own options: leave out --options")
        return ie.load_editor(editor, lm)
    own = scale.editor_options(editor) if scale else {}
    method = ie.build_editor(editor, lm, **own | (options or {}))
    if method.trainable:
        raise UserError(f"editor {editor!r} must be trained first: give --editor a run's folder or checkpoint")
    return method


def _check_targets(save: str | None, merge: str | None) -> None:
    """Finds out before the work whether both folders can be written, and that no model gets the edit twice."""
    adapter = check_writable(save, "--save") if save else None
    model = check_writable(merge, "--merge") if merge else None
    if adapter and adapter == model:
        raise UserError("--save and --merge name one folder: loading it would apply the edit twice")
    if model and (model / "adapter_config.json").exists():
        raise UserError(f"--merge {merge}: holds an adapter, which loading would apply to the model: another folder")
    if adapter and (adapter / "config.json").exists():
        raise UserError(f"--save {save}: holds a model, to which loading would apply the adapter: another folder")


def _show_words(prompts: list[str], before: list[str], after: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", "before", "after")
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(Text(text.strip()) for text in row))  # square brackets are the user's own
    console().print(table)

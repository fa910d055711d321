"""Make one edit and see what the model says before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instructedit.console import console
from instructedit.errors import UserError


def main(
    prompt: str,
    target: str,
    editor: str,
    options: dict[str, Any] | None = None,
    lm: str = "tiny",
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
        editor: A trained editor (folder, checkpoint or hub id), or the name of a method that needs no training.
        options: Hyper-parameters of a method that needs no training, e.g. '{"lr": 0.005, "bound": 0.02}'; by
            default the published ones, which suit larger models (configs/editor/tiny has values for the embedded ones).
        lm: tiny, tiny-llama, a local folder, or a hub id.
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

    model = ie.FrozenLM.from_pretrained(lm, chat=chat)
    built = editor in ie.editor_names() or not (Path(editor).exists() or "/" in editor)
    if options and not built:
        raise UserError(f"editor {editor!r} is a trained one, which has its own options: leave out --options")
    method = ie.build_editor(editor, model, **options or {}) if built else ie.load_editor(editor, model)
    if built and method.trainable:
        raise UserError(f"editor {editor!r} must be trained first: give --editor a run's folder or checkpoint")
    request = ie.EditRequest(prompt, target, task=task, subject=subject, slots=slots or {})
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


def _show_words(prompts: list[str], before: list[str], after: list[str]) -> None:
    from rich.table import Table

    table = Table("prompt", "before", "after")
    for row in zip(prompts, before, after, strict=True):
        table.add_row(*(text.strip() for text in row))
    console().print(table)

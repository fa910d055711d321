"""Open a page to try edits: type an edit, see its report, keep it, undo it, download it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from instructedit.errors import UserError

if TYPE_CHECKING:
    from instructedit.reports.workbench import Workbench

#: The page is only for users at this machine: it reads editors from its disk.
HOST = "127.0.0.1"


def main(models: list[str] | None = None, store: str | None = None, port: int = 7860) -> None:
    """Opens the page on this machine alone, at http://127.0.0.1:PORT, until Ctrl-C.

    It needs Gradio: pip install 'instructedit[ui]'.

    Args:
        models: Models to choose from: names, folders or hub ids; by default tiny and smollm2-135m.
        store: Folder that edits are kept in; by default $INSTRUCTEDIT_EDITS, or edits/.
        port: Port of the page.
    """
    _gradio()
    from instructedit.reports.store import store_folder
    from instructedit.reports.workbench import Workbench

    bench = Workbench(store_folder(store), models or ("tiny", "smollm2-135m"))
    try:
        page(bench).launch(server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(f"--port {port}: {error}") from error
    print(f"http://{HOST}:{port}   (Ctrl-C ends it)", flush=True)
    _wait()


def page(bench: Workbench) -> Any:
    """Builds the page on top of a workbench, with a `Visit` of its own for each browser tab."""
    gr = _gradio()
    from instructedit.editors import editor_names
    from instructedit.reports.workbench import Visit

    with gr.Blocks(title="instructedit", analytics_enabled=False) as blocks:
        visit = gr.State(Visit())
        with gr.Row():
            lm = gr.Dropdown(list(bench.models), value=bench.models[0], label="Model")
            editor = gr.Dropdown(
                editor_names(), value="ft_l", label="Editor", allow_custom_value=True,
                info="a method that needs no training, or a trained editor: a run, a folder, latest",
            )  # fmt: skip
            task = gr.Textbox(label="Task", info="for editors that read instructions, e.g. counterfact")
        with gr.Row():
            prompt = gr.Textbox("The capital of France is", label="Prompt")
            target = gr.Textbox("Lyon", label="Target")
            subject = gr.Textbox(label="Subject", info="for ROME and MEMIT")
        neighbours = gr.Textbox(label="Neighbours", lines=2, info="prompts whose answers should stay, one a line")
        make = gr.Button("Edit", variant="primary")
        report = gr.HTML()
        where = gr.Button("Map of editing areas: where the edit lies among this editor's edits of known tasks")
        areas = gr.Plot(show_label=False)
        with gr.Row():
            name = gr.Textbox(label="Name")
            kept, undone, packed = gr.Button("Keep"), gr.Button("Undo"), gr.Button("Download")
        said, file = gr.Markdown(), gr.File(label="The edit", interactive=False)
        request = [lm, editor, prompt, target, task, subject, neighbours]
        make.click(_plainly(bench.edit), [visit, *request], report)
        where.click(_plainly(bench.map), [visit], areas)
        kept.click(_plainly(bench.keep), [visit, name], said)
        undone.click(_plainly(bench.undo), [visit, name], said)
        packed.click(_plainly(bench.pack), [visit], file)
    return blocks


def _plainly(action: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps an action so that the page shows its user errors as one line."""
    gr = _gradio()

    def act(*given: Any) -> Any:
        try:
            return action(*given)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    act.__name__ = action.__name__  # the name by which programs call it, such as /edit
    return act


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError as error:
        raise UserError("the page needs Gradio: pip install 'instructedit[ui]'") from error
    return gradio


def _wait() -> None:
    import time

    while True:
        time.sleep(3600)

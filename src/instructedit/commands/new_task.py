"""Write the folder of a task of your own, as an example that runs: fill in your records."""

from __future__ import annotations

POSITIONAL = True


def main(folder: str, title: str | None = None) -> None:
    """Writes a folder with a task.yaml, records in a CSV file and a bank of instructions, and says how to train on it.

    The records are some of the embedded facts, so that the example runs as it is. Nothing is overwritten.

    Args:
        folder: Folder to create; its name is the task's.
        title: Title of the task in tables and instructions; by default the folder's name.
    """
    from instructedit.tasks.example import write_example

    place = write_example(folder, title)
    print(f"{place}: task.yaml says which field of facts.csv is which; bank.yaml describes the task in a few sentences")
    print(f"next: instructedit fit --scale tiny --editor instructedit --task {folder} --trainer.max_steps 50")

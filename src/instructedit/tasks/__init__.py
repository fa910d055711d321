"""Dataset files to edit records: one module per task, found by the name its class gives itself."""

from instructedit.tasks.base import LoadReport, Task, load_records, task_names, task_title

__all__ = ["LoadReport", "Task", "load_records", "task_names", "task_title"]

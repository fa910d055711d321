"""Dataset files to edit records: one module per task, found by the name its class gives itself."""

from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.loading import find_task, load_records, task_name, task_names, task_title

__all__ = ["LoadReport", "Task", "find_task", "load_records", "task_name", "task_names", "task_title"]

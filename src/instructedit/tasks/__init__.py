"""Readers that turn dataset files into edit records: one module per task, found by the name that its class sets."""

from instructedit.tasks.base import LoadReport, Task
from instructedit.tasks.loading import find_task, load_records, task_name, task_names, task_title

__all__ = ["LoadReport", "Task", "find_task", "load_records", "task_name", "task_names", "task_title"]

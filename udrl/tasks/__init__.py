"""Tasks: the kinds of prompt to write, each one YAML file, and their rendering as input of a teacher."""

from udrl.tasks.task import (
    LANGUAGES,
    Example,
    Format,
    Task,
    load_task,
    load_tasks,
    render_chat,
    render_chat_json,
    render_completion,
    render_completion_json,
    shipped_tasks,
)

__all__ = [
    "LANGUAGES",
    "Example",
    "Format",
    "Task",
    "load_task",
    "load_tasks",
    "render_chat",
    "render_chat_json",
    "render_completion",
    "render_completion_json",
    "shipped_tasks",
]

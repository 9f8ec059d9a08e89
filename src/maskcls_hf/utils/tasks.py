"""What can be predicted of an image."""

from typing import Literal, get_args

Task = Literal["semantic", "panoptic", "instance"]
TASKS: tuple[Task, ...] = get_args(Task)

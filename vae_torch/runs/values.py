"""Values of settings: as text, and in order."""

from typing import Any

Key = tuple[Any, ...]  # several values


def is_number(value: Any) -> bool:
    """Whether it is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_text(value: Any) -> str:
    """A value as Hydra's command line accepts it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{','.join(map(as_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def sort_key(value: Any) -> Any:
    """Sort numbers by size, then words; None first."""
    if isinstance(value, tuple):
        return tuple(sort_key(part) for part in value)
    return (0, value, "") if is_number(value) else (1, 0, as_text(value))

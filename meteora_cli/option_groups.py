"""Options that several commands share, as one dataclass in the signature of each command.

A parameter of a command whose type is a dataclass stands for one option per field. The command receives the values as an instance of the dataclass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def with_option_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command in whose signature every group of options is replaced by its options, in the order of the fields.

    Args:
        command: The function of a command. Parameters whose type is a dataclass are groups; every field has a default and is annotated as an option.

    Returns:
        ``command`` itself if it has no groups; otherwise, a function with the longer signature, from which Typer makes the options.

    Raises:
        TypeError: Two options have the same name, or a field has no default.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Size:
        ...     width: int = 1
        ...     height: int = 2
        >>> def draw(size: Size, colour: str = "blue") -> str:
        ...     return f"{size.width} x {size.height}, {colour}"
        >>> with_option_groups(draw)(width=3, height=4, colour="red")
        '3 x 4, red'
    """
    types = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in types.items() if is_dataclass(kind)}
    if not groups:
        return command
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _options(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=types[parameter.name], kind=Parameter.KEYWORD_ONLY))
    names = [parameter.name for parameter in parameters]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{command.__name__} has more than one option named {', '.join(sorted(repeated))}")

    @wraps(command)
    def with_options(**values: Any) -> Any:
        grouped = {name: kind(**{field.name: values.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()}
        return command(**values, **grouped)

    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _options(group: Any) -> list[Parameter]:
    """Return one parameter for each field of a group."""
    types = get_type_hints(group, include_extras=True)
    options = []
    for field in fields(group):
        if field.default is MISSING:
            raise TypeError(f"{group.__name__}.{field.name} has no default")
        options.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=types[field.name]))
    return options

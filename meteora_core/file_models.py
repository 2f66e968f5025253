"""Checks configuration files of unknown origin against a pydantic model; a refusal is one line that names the file and the key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from meteora_core.errors import DataError, MeteoraError
from meteora_core.json_files import read_object
from meteora_core.reading import shown_path
from meteora_core.text import shown, validation_message


class FileModel(BaseModel):
    """Base class for the models of files: types are strict, numbers are finite, and unknown keys are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)


def check_model(model: type[Model], value: Any, source: str, *, error: type[MeteoraError] = DataError, hint: str | None = None) -> Model:
    """Validate ``value``.

    Args:
        model: The pydantic model to validate against.
        value: The decoded content of the file.
        source: The name of the file in error messages.
        error: The type of the error that is raised.
        hint: The hint of that error.

    Returns:
        An instance of the model.

    Raises:
        MeteoraError: (of the type ``error``) ``value`` does not fit the model. The message names the first wrong key, its value, and what it should be.
    """
    try:
        return model.model_validate(value)
    except ValidationError as wrong:
        raise error(f"{source}: {_explain(wrong)}", hint=hint) from wrong
    except RecursionError as deep:
        raise error(f"{source} is nested too deeply", hint=hint) from deep


def read_model(path: Path, model: type[Model], *, error: type[MeteoraError] = DataError, hint: str | None = None) -> Model:
    """Read a JSON file and validate it; see :func:`meteora_core.json_files.read_object` and :func:`check_model`."""
    return check_model(model, read_object(path, error=error, hint=hint), shown_path(path), error=error, hint=hint)


@dataclass(frozen=True)
class Problem:
    """One validation error.

    Attributes:
        key: The dotted path of the invalid part, with each name cut to 80 characters; empty for the value as a whole.
        message: pydantic's message, which says what the value should be.
        value: The invalid part.
        kind: pydantic's name of the error, such as ``"missing"`` or ``"extra_forbidden"``.
    """

    key: str
    message: str
    value: Any
    kind: str


def first_problem(wrong: ValidationError) -> Problem:
    """Return the first error of a validation.

    Example:
        >>> class Point(FileModel):
        ...     x: int
        >>> try:
        ...     Point(x="left")
        ... except ValidationError as wrong:
        ...     first_problem(wrong).key
        'x'
    """
    first = wrong.errors(include_url=False)[0]
    return Problem(".".join(str(part)[:80] for part in first["loc"]), validation_message(first["msg"]), first.get("input"), first["type"])


def _explain(wrong: ValidationError) -> str:
    first = first_problem(wrong)
    if first.kind == "missing":
        return f"the key {shown(first.key)} is missing"
    message = first.message[:1].lower() + first.message[1:]
    message = message.replace("input should be", "it should be")
    if not first.key:
        return message
    return f"{first.key if len(first.key) <= 60 and first.key.isprintable() else shown(first.key)} is {shown(first.value)}; {message}"

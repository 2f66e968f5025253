"""Configuration files from elsewhere: read as JSON, checked against a pydantic model, and refused in one line that names file and key."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from meteora_core.errors import DataError, MeteoraError
from meteora_core.reading import finite

MAX_BYTES = 256 << 20
"""Size of the largest JSON file that is read."""

_SHOWN = 60


class FileModel(BaseModel):
    """Base of the models: types are strict, numbers are finite, and keys that the model does not know are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


Model = TypeVar("Model", bound=BaseModel)


def is_regular(path: Path) -> bool:
    """Whether an ordinary file (or a link to one) is at ``path``; False also where that cannot be found out."""
    try:
        return stat.S_ISREG(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def require_regular(path: Path, *, error: type[MeteoraError] = DataError, hint: str | None = None) -> int:
    """Refuse anything but an ordinary file, without opening it.

    Args:
        path: The file.
        error: The type of the error that is raised.
        hint: Shown with the error.

    Returns:
        Its size in bytes.

    Raises:
        MeteoraError: (of the type ``error``) There is no such file, it cannot be looked at, or it is a folder, a pipe, a socket or a device.
    """
    try:
        facts = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError) as missing:
        raise error(f"no such file: {path}", hint=hint) from missing
    except OSError as broken:
        raise error(f"{path} cannot be read: {broken.strerror or broken}", hint=hint) from broken
    except ValueError as broken:
        raise error(f"{str(path)!r} is not a path: {broken}", hint=hint) from broken
    if stat.S_ISDIR(facts.st_mode):
        raise error(f"{path} is a folder, not a file", hint=hint)
    if not stat.S_ISREG(facts.st_mode):
        raise error(f"{path} is not an ordinary file: pipes, sockets and devices are not read", hint=hint)
    return facts.st_size


def parse_json(raw: bytes, source: str, *, notes: str | None = None, error: type[MeteoraError] = DataError, hint: str | None = None) -> Any:
    """Parse strict JSON: UTF-8 (a byte order mark is passed over), no NaN or Infinity, no key twice in one object.

    Args:
        raw: The text.
        source: How errors name it.
        notes: A key of the outermost object under which NaN and Infinity may stand, as earlier versions wrote them, or "*" for all keys; they become None.
        error: The type of the error that is raised.
        hint: Shown with the error.

    Raises:
        MeteoraError: (of the type ``error``) It is not JSON; where the parser knows them, line and column are named.
    """

    def refuse(name: str) -> NoReturn:
        raise error(f"{source} holds {name}, which is not a number in JSON", hint=hint)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise error(f"{source} has the key {_short(twice)} twice in one object", hint=hint)
        return made

    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=float if notes else refuse, object_pairs_hook=pairs)
        if notes == "*":
            return finite(value)
        if notes and isinstance(value, dict):
            for key, entry in value.items():
                if key != notes and (name := _constant(entry)):
                    refuse(name)
            if notes in value:
                value[notes] = finite(value[notes])
        return value
    except UnicodeDecodeError as broken:
        raise error(f"{source} is not UTF-8 text (byte {broken.start})", hint=hint) from broken
    except json.JSONDecodeError as broken:
        raise error(f"{source}:{broken.lineno}:{broken.colno} is not valid JSON: {broken.msg}", hint=hint) from broken
    except (ValueError, RecursionError) as broken:
        raise error(f"{source} cannot be read as JSON: {_first_line(broken)}", hint=hint) from broken


def read_object(path: Path, *, notes: str | None = None, error: type[MeteoraError] = DataError, hint: str | None = None) -> dict[str, Any]:
    """Read a file that holds one JSON object; :func:`require_regular` and :func:`parse_json` say what is refused."""
    path = Path(path)
    size = require_regular(path, error=error, hint=hint)
    if size > MAX_BYTES:
        raise error(f"{path} has {size} bytes, more than a configuration can have", hint=hint)
    try:
        raw = path.read_bytes()
    except OSError as broken:
        raise error(f"{path} cannot be read: {broken.strerror or broken}", hint=hint) from broken
    value = parse_json(raw, str(path), notes=notes, error=error, hint=hint)
    if not isinstance(value, dict):
        raise error(f"{path} is not a JSON object", hint=hint)
    return value


def checked(model: type[Model], value: Any, source: str, *, error: type[MeteoraError] = DataError, hint: str | None = None) -> Model:
    """``value`` as the model, or an error in one line that names the first key that is wrong, its value, and what it should be."""
    try:
        return model.model_validate(value)
    except ValidationError as wrong:
        raise error(f"{source}: {_explain(wrong)}", hint=hint) from wrong
    except RecursionError as deep:
        raise error(f"{source} is nested too deeply", hint=hint) from deep


def read_model(path: Path, model: type[Model], *, error: type[MeteoraError] = DataError, hint: str | None = None) -> Model:
    """Read a JSON file and check it; see :func:`read_object` and :func:`checked`."""
    return checked(model, read_object(path, error=error, hint=hint), str(path), error=error, hint=hint)


def _constant(value: Any) -> str | None:
    """The first NaN or infinite number in a value, as text."""
    if isinstance(value, float):
        return None if math.isfinite(value) else str(value)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((name for entry in inside if (name := _constant(entry))), None)


def _explain(wrong: ValidationError) -> str:
    first = wrong.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"the key {_short(key)} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    message = message.replace("input should be", "it should be")
    if not key:
        return message
    return f"{_bare(key)} is {_short(first['input'])}; {message}"


def _bare(key: str) -> str:
    return key if len(key) <= _SHOWN and key.isprintable() else _short(key)


def _short(value: Any) -> str:
    """A value in a message: ``repr``, without control characters, and cut where it is long."""
    if isinstance(value, dict | list) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _first_line(broken: BaseException) -> str:
    lines = str(broken).strip().splitlines()
    return lines[0] if lines else type(broken).__name__

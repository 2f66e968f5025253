"""The manifest of a dataset: its sources, the rules by which it was made, and the hashes of its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from meteora_core.data.frames import Frame, FrameModel
from meteora_core.data.rows import SPLITS, iter_rows
from meteora_core.errors import DataError
from meteora_core.file_models import first_problem
from meteora_core.files import sha256
from meteora_core.json_files import read_json, write_json
from meteora_core.names import problem_of
from meteora_core.ranges import MOST_TOKENS
from meteora_core.reading import present

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """One file of a dataset.

    Args:
        rows: Number of rows.
        bytes: Length in bytes.
        sha256: SHA-256 of the content.
    """

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a dataset. It contains no time and no path of a machine, so two builds are equal byte for byte.

    Args:
        task: Name of the task.
        metric: Metric that scores the task.
        source: Origin of the rows: ``kind``, ``name`` and identifiers of the version.
        split_rule: Rule that divides train and test rows, in words.
        seed: Seed of that rule, or of a composite; None if nothing is drawn.
        files: Entries by file name.
        duplicates: Number of duplicate examples that were dropped, and number of test rows whose prompt is also a train prompt.
        max_train, max_test: Requested limits of the number of rows.
        members: Tasks of a composite, in the order of the prompts.
        examples: Solved examples of a composite: for each, the numbers of its members' train rows, counted from 0.
        max_new_tokens: Largest number of tokens of an answer, if a user's task sets it.
        frame: Frame of the prompts of a user's task; None for a built-in task, whose frame is ``[INST] {} [/INST]``.
        format: Version of the file's format.
    """

    task: str
    metric: str
    source: dict[str, Any]
    split_rule: str
    seed: int | None
    files: dict[str, FileEntry]
    duplicates: dict[str, int] = field(default_factory=dict)
    max_train: int | None = None
    max_test: int | None = None
    members: tuple[str, ...] = ()
    examples: tuple[tuple[int, ...], ...] = ()
    max_new_tokens: int | None = None
    frame: Frame | None = None
    format: int = FORMAT

    @property
    def rows(self) -> dict[str, int]:
        """The number of rows of each split."""
        return {name.removesuffix(".jsonl"): entry.rows for name, entry in self.files.items()}

    def to_json(self) -> dict[str, Any]:
        """The manifest as a dictionary for JSON."""
        values = asdict(self)
        if self.frame is None:
            del values["frame"]
        else:
            values["frame"] = self.frame.to_json()
        return values


_HINT = "build the dataset again, or add it again from its files"
_Count = Annotated[int, Field(ge=0, le=2**53)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _name(value: str) -> str:
    if problem := problem_of(value):
        raise ValueError(f"it is not a valid name: {problem}")
    return value


_Name = Annotated[str, AfterValidator(_name)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class _Entry(_Strict):
    rows: _Count
    bytes: _Count
    sha256: _Digest


class _Member(_Strict):
    task: _Name
    sha256: _Digest


class _Members(_Strict):
    members: list[_Member] = []


class _File(_Strict):
    """The form of the file; see :class:`Manifest`."""

    task: _Name
    metric: str
    source: dict[str, Any]
    split_rule: str
    seed: int | None
    files: dict[Literal["train.jsonl", "test.jsonl"], _Entry]
    duplicates: dict[str, _Count] = {}
    max_train: _Count | None = None
    max_test: _Count | None = None
    members: list[_Name] = []
    examples: list[list[_Count]] = []
    max_new_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    frame: FrameModel | None = None
    format: int = FORMAT

    @field_validator("source")
    @classmethod
    def _source(cls, source: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(source.get("kind"), str):
            raise ValueError("it has no text 'kind'")
        try:
            _Members.model_validate(source)
        except ValidationError as broken:
            first = first_problem(broken)
            raise ValueError(f"{first.key}: {first.message}") from None
        return source


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest`` into a dataset's folder. Raises StorageError."""
    write_json(folder / NAME, manifest.to_json())


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a dataset's folder, or None if there is none.

    Raises:
        DataError: The manifest is broken, or has an unknown format.
    """
    path = folder / NAME
    if not present(path, hint=_HINT):
        return None
    raw = read_json(path, hint=_HINT)
    if isinstance(raw, dict) and raw.get("format") != FORMAT:
        shown = repr(raw.get("format"))[:40]
        raise DataError(f"{path} has format {shown}, and this version reads format {FORMAT}", hint=_HINT)
    try:
        read = _File.model_validate(raw)
    except ValidationError as broken:
        first = first_problem(broken)
        raise DataError(f"{path} is not a dataset's manifest: {first.key or 'the file'}: {first.message}", hint=_HINT) from broken
    values = {name: getattr(read, name) for name in _File.model_fields}
    values["files"] = {name: FileEntry(entry.rows, entry.bytes, entry.sha256) for name, entry in read.files.items()}
    values["members"] = tuple(read.members)
    values["frame"] = None if read.frame is None else read.frame.to_frame()
    values["examples"] = tuple(tuple(example) for example in read.examples)
    return Manifest(**values)


def nested_members(data_dir: Path, manifest: Manifest) -> list[str]:
    """The members of a composite that are composites, or the composite itself. They are not allowed, because looking them up might never end."""
    nested = []
    for member in manifest.members:
        try:
            found = read_manifest(data_dir / member)
        except DataError:
            found = None
        if member == manifest.task or (found is not None and found.members):
            nested.append(member)
    return nested


def intact(folder: Path, manifest: Manifest) -> bool:
    """Whether all files of the manifest exist with the same length and hash."""
    return not problems_of(folder, manifest, rows=False)


def problems_of(folder: Path, manifest: Manifest, *, rows: bool = True) -> list[str]:
    """The problems of a dataset's files; empty if there are none.

    Args:
        folder: Folder of the dataset.
        manifest: Manifest of the dataset.
        rows: Whether to parse and count the rows too.
    """
    problems = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        size = path.stat().st_size
        if size != entry.bytes:
            problems.append(f"{path} has {size} bytes, and the manifest says {entry.bytes}")
        elif sha256(path) != entry.sha256:
            problems.append(f"{path} was changed: its SHA-256 differs from the manifest's")
        if rows:
            try:
                count = sum(1 for _ in iter_rows(path))
            except DataError as broken:
                problems.append(broken.message)
            else:
                if count != entry.rows:
                    problems.append(f"{path} has {count} rows, and the manifest says {entry.rows}")
    for split in SPLITS:
        name = f"{split}.jsonl"
        if name not in manifest.files and (folder / name).is_file():
            problems.append(f"{folder / name} is not in the manifest")
    problems += [f"{folder} names {member} as a member, which is a composite" for member in nested_members(folder.parent, manifest)]
    if folder.name != manifest.task:
        problems.append(f"{folder} holds the dataset of {manifest.task}")
    return problems

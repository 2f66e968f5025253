"""The frame of a built dataset's prompts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from meteora_core.data.frames import INST, Frame, common_frame
from meteora_core.data.manifest import read_manifest
from meteora_core.data.rows import Row, iter_rows, split_path
from meteora_core.data.tasks import TASK_ORDER
from meteora_core.reading import is_regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLED_ROWS = 1000


def dataset_frame(data_dir: Path | str, task: str) -> Frame | None:
    """The prompt frame of a dataset.

    For a task that ``meteora data add`` built, the manifest contains the frame; the paper's tasks have ``[INST] {} [/INST]``. For any other dataset, the
    frame is the text that the prompts of its training rows have in common.

    Args:
        data_dir: Folder that contains all datasets.
        task: Name of the dataset.

    Returns:
        The frame, or None if there is no such dataset.

    Raises:
        DataError: The manifest or a row is broken.
    """
    folder = Path(data_dir) / task
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is not None and manifest.frame is not None:
        return manifest.frame
    rows = next((path for path in (split_path(data_dir, task, split) for split in ("train", "test")) if is_regular(path)), None)
    if rows is None:
        return None
    if task in TASK_ORDER or (manifest is not None and manifest.members):
        return INST
    return common_frame(row.prompt for row in islice(iter_rows(rows), _SAMPLED_ROWS))


def row_end(data_dir: Path | str, task: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the token that ends the responses of a dataset; None for the end-of-sequence token, unless its manifest names another token."""
    manifest = read_manifest(Path(data_dir) / task)
    return None if manifest is None or manifest.frame is None else manifest.frame.end_id(tokenizer)


def reframed(row: Row, frame: Frame, other: Frame) -> Row:
    """The row with its message in another frame. A row whose prompt is not in ``frame`` is returned unchanged."""
    message = frame.inside(row.prompt)
    return row if message is None else Row(other.around(message), row.response)


def same_text(one: Frame, other: Frame) -> bool:
    """Whether two frames put the same text around a message."""
    return (one.before, one.after) == (other.before, other.after)

"""One adapter alone, by PEFT: what MeteoRA is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.adapters.peft_folder import CONFIG, WEIGHTS
from meteora_core.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_adapter(folder: Path) -> None:
    """Whether PEFT can read the folder without touching a pickle file.

    Raises:
        AdapterError: Something is missing.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"no adapter at {folder}", hint="train it with `meteora train --stage adapters --task NAME`, or correct the path")
    if not (folder / WEIGHTS).is_file():
        pickled = next((file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")), None)
        if pickled:
            raise AdapterError(f"{folder / pickled} is a pickle file, which is never read", hint="save the adapter again as safetensors with a recent PEFT")
        raise AdapterError(f"{folder} holds no {WEIGHTS}", hint="copy or train the adapter again")


@contextmanager
def with_adapter(model: PreTrainedModel, folder: Path) -> Iterator[Any]:
    """Within the block, the base with one un-merged PEFT adapter, in the base's dtype; afterwards the base is as it was.

    Args:
        model: A base model without adapters.
        folder: A PEFT LoRA folder.

    Yields:
        The PEFT model, in evaluation mode.

    Raises:
        AdapterError: The folder is missing or does not fit the base.
    """
    from peft import PeftModel

    check_adapter(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    except (RuntimeError, ValueError, OSError) as error:
        text = next((line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error).strip().splitlines()[0])
        raise AdapterError(f"the adapter {folder} does not fit this base model: {text}", hint="it was trained on another base model") from error
    try:
        yield adapted.eval()
    finally:
        adapted.unload()
        model.eval()

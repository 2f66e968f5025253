"""Changes to the bank of a running server, in memory; the checkpoint on disk is not changed."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.checkpoints.gate_statistics import Recipe, read_statistics
from meteora_core.errors import UsageError
from meteora_core.fused.fuse import fuse_for_inference
from meteora_core.living.checkpoints import BARE_SHARE
from meteora_core.living.collector import Collector
from meteora_core.living.live_bank import LiveBank
from meteora_core.living.options import ANSWER_SHARE
from meteora_core.living.rows import AdapterRows, find_rows
from meteora_core.model.vocabulary import padding_token
from meteora_core.serving.failures import ApiError
from meteora_core.training.statistics import Collecting

if TYPE_CHECKING:
    from collections.abc import Callable

    from meteora_core.choices import Switch
    from meteora_core.serving.service import Service


@dataclass
class BankChanges:
    """Adds adapters to the bank of a server, and removes them.

    Attributes:
        roots: Folders that contain the adapters that may be added.
        checkpoint: The server's checkpoint, whose gate statistics are used.
        data: Folder of datasets, in which the rows of an adapter without statistics are looked for.
        fuse: Whether layers are fused after a change.
    """

    roots: tuple[Path, ...]
    checkpoint: Path
    data: Path | None = None
    fuse: Switch = "auto"
    _live: LiveBank | None = None
    _workspace: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, service: Service, name: str, path: str) -> None:
        """Add the PEFT folder ``path`` under a name.

        Raises:
            ApiError: The folder is not in one of the roots, or the name is that of another model.
            MeteoraError: The adapter cannot be used.
        """
        folder = self._folder(path)
        if name in service.models:
            raise ApiError(409, f"there is already a model named {name!r}", param="name")
        self._change(service, lambda live: live.add(name, folder))

    def drop(self, service: Service, name: str) -> None:
        """Remove an adapter.

        Raises:
            ApiError: There is no such adapter.
            MeteoraError: It is the only one.
        """
        if name not in service.adapters:
            raise ApiError(404, f"there is no adapter named {name!r}", param="name", code="adapter_not_found")
        if name == service.chat_model.adapter:
            raise UsageError(f"the server forces the adapter {name!r}", hint="start it without --adapter")
        self._change(service, lambda live: live.drop(name))

    def _folder(self, path: str) -> Path:
        if "\0" in path:
            raise ApiError(400, "the path contains a NUL character", param="path")
        for root in self.roots:
            folder = (root / path).resolve()
            if folder.is_relative_to(root.resolve()) and folder.is_dir():
                return folder
        raise ApiError(403, "the path is not a folder in one of the server's adapter folders", hint="the option --adapter-root names them", param="path")

    def _change(self, service: Service, change: Callable[[LiveBank], Any]) -> None:
        with self._lock:

            def now() -> None:
                with service.lock:
                    try:
                        change(self._bank(service))
                    finally:
                        service.embedded.version += 1
                        fuse_for_inference(service.chat_model.model, self.fuse)
                        service.embedded.model.eval()

            service.embedded.exclusively(now)

    def _bank(self, service: Service) -> LiveBank:
        if self._live is None:
            chat_model = service.chat_model
            names = list(service.adapters)
            self._workspace = tempfile.TemporaryDirectory(prefix="meteora-statistics")
            how = Collecting(
                chat_model.base,
                padding_token(chat_model.model, chat_model.tokenizer),
                Recipe(answer_share=ANSWER_SHARE, bare_share=BARE_SHARE),
            )
            data, tokenizer = self.data, chat_model.tokenizer

            def find(adapter: str, folder: Path | None) -> AdapterRows | None:
                return find_rows(adapter, data, folder, tokenizer, seed=how.seed)

            collector = Collector(tokenizer, how, Path(self._workspace.name), find)
            self._live = LiveBank(chat_model.model, collector, read_statistics(self.checkpoint, names))
        return self._live

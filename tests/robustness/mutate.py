"""Ways to break JSON documents, safetensors files and bytes; every choice comes from the generator that is passed in."""

from __future__ import annotations

import copy
import json
import math
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

ESCAPES = (
    "\x1b]0;PWN\x07",
    "\x1b[31;5mPWN",
    "\x9b2JPWN",
    "\x1b]52;c;UFdO\x07",
    "a\rPWN",
    "\x08\x08PWN",
    "\x7f",
    "[/PWN]",
    "[link=http://pwn.invalid]x[/link]",
    "[bold red]PWN",
    "\u202ePWN",
    "a\nerror: PWN",
)
"""Texts that a terminal or Rich would act on."""


def no_file(action: int, file: Path) -> str:
    """Put a folder (0), a pipe (1), a link to itself (2) or a link to a device (3) at the path of a file that is gone, and return a description."""
    if action == 0:
        file.mkdir()
        return f"{file.name} is a folder"
    if action == 1:
        os.mkfifo(file)
        return f"{file.name} is a pipe"
    if action == 2:
        file.symlink_to(file.name)
        return f"{file.name} is a link to itself"
    file.symlink_to("/dev/zero")
    return f"{file.name} is a device"


class Raw(str):
    """Text that stands in a JSON document as it is, without quotes."""


def dumps(value: Any) -> str:
    """JSON of a value that may hold Raw parts."""
    parts: list[str] = []

    def replace(value: Any) -> Any:
        if isinstance(value, Raw):
            parts.append(str(value))
            return f"\x00{len(parts) - 1}\x00"
        if isinstance(value, dict):
            return {key: replace(each) for key, each in value.items()}
        return [replace(each) for each in value] if isinstance(value, list) else value

    text = json.dumps(replace(value), indent=1)
    for number, part in enumerate(parts):
        text = text.replace(f'"\\u0000{number}\\u0000"', part)
    return text


def strange(rng: Random) -> tuple[str, Any]:
    """A value of an odd type or size, and what to call it."""
    return rng.choice(
        [
            ("null", None),
            ("true", True),
            ("false", False),
            ("zero", 0),
            ("minus one", -1),
            ("a fraction", 1.5),
            ("a huge integer", 10**30),
            ("a 5,000-digit integer", Raw("9" * 5000)),
            ("1e400", Raw("1e400")),
            ("1e300", 1e300),
            ("NaN", Raw("NaN")),
            ("-Infinity", Raw("-Infinity")),
            ("an empty text", ""),
            ("a text", "eight"),
            ("a number as a text", "8"),
            ("a long text", "x" * 70_000),
            ("a lone surrogate", Raw('"\\ud800"')),
            ("a zero byte", "a\x00b"),
            ("escapes", rng.choice(ESCAPES)),
            ("an empty list", []),
            ("a list of null", [None]),
            ("a list", [1, "a"]),
            ("an empty object", {}),
            ("an object", {"a": {"b": 1}}),
            ("deep nesting", Raw("[" * 3000 + "]" * 3000)),
            ("a path", "../../../etc/passwd"),
        ]
    )


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside ``value``."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found.append((*path, key))
        found += places(each, (*path, key))
    return found


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutate_json(rng: Random, value: Any) -> tuple[str, Any]:
    """A document with one thing changed, and what that was. Upper levels are chosen as often as lower ones, although they hold fewer values."""
    value = copy.deepcopy(value)
    every = places(value)
    depth = rng.choice(sorted({len(path) for path in every}))
    path = rng.choice([path for path in every if len(path) == depth])
    holder, key, old = _at(value, path[:-1]), path[-1], _at(value, path)
    name = ".".join(map(str, path))
    action = rng.randrange(10)
    if action == 0:
        del holder[key]
        return f"{name} left out", value
    if action == 1 and isinstance(holder, dict):
        holder[rng.choice(["extra", "", "__class__", rng.choice(ESCAPES)])] = strange(rng)[1]
        return f"something added beside {name}", value
    if action == 2 and isinstance(holder, dict):
        holder[str(key).upper() + "x"] = holder.pop(key)
        return f"{name} under another name", value
    if action == 3 and isinstance(old, list) and len(old) > 1:
        order = rng.choice(["reversed", "shortened", "doubled"])
        holder[key] = old[::-1] if order == "reversed" else old[:-1] if order == "shortened" else old + old[-1:]
        return f"{name} {order}", value
    if action == 4 and type(old) in (int, float):
        new: Any = rng.choice([-old, old + 1, old * 2, old / 3, old * 1e300, 0, Raw("NaN"), Raw("Infinity"), Raw(f"{float(old)}"), True])
        holder[key] = new
        return f"{name} from {old} to {new!s:.20}", value
    if action == 5 and isinstance(holder, dict) and len(holder) > 1:
        other = rng.choice(sorted(holder, key=str))
        holder[key], holder[other] = holder[other], holder[key]
        return f"{name} and {other} exchanged", value
    if action == 6 and isinstance(old, str):
        new = rng.choice([old.upper(), old + " ", old[:-1], old + rng.choice(ESCAPES), rng.choice(ESCAPES), "../" + old, "/" + old])
        holder[key] = new
        return f"{name} = {new!a:.60}", value
    what, new = strange(rng)
    holder[key] = new
    return f"{name} = {what}", value


def mutate_bytes(rng: Random, raw: bytes) -> tuple[str, bytes]:
    """Bytes cut, flipped, or with something before or behind them."""
    action = rng.randrange(9) if raw else 3
    place = rng.randrange(max(1, len(raw)))
    if action == 0:
        return "empty", b""
    if action == 1:
        return f"cut at byte {place}", raw[:place]
    if action == 2:
        return f"byte {place} flipped", raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]
    if action == 3:
        return "one byte more", raw + rng.choice([b"\0", b" ", b"}", b"x"])
    if action == 4:
        return "a byte order mark before it", b"\xef\xbb\xbf" + raw
    if action == 5:
        return "as UTF-16", raw.decode("utf-8", "replace").encode("utf-16")
    if action == 6:
        return f"bytes at {place} that are no text", raw[:place] + b"\xff\xfe\x80" + raw[place:]
    if action == 7:
        return "twice", raw + raw
    return f"a block of zeros at {place}", raw[:place] + bytes(min(64, len(raw) - place)) + raw[place + 64 :]


def mutate_document(rng: Random, file: Path) -> str:
    """Break a JSON file in its structure, as a whole, or in its bytes; return how."""
    action = rng.randrange(12)
    if action == 0:
        what, value = strange(rng)
        file.write_text(dumps(value))
        return f"{file.name} is {what}"
    if action == 1:
        what, raw = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(raw)
        return f"{file.name}: {what}"
    what, value = mutate_json(rng, json.loads(file.read_text()))
    file.write_text(dumps(value))
    return f"{file.name}: {what}"


Entry = dict[str, Any]


def split_tensors(raw: bytes) -> tuple[dict[str, Entry], bytes]:
    """Header and body of a safetensors file."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join_tensors(header: Any, body: bytes, *, lie: int = 0) -> bytes:
    """A safetensors file; ``lie`` is added to the header's length."""
    raw = header if isinstance(header, bytes) else dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", max(0, len(raw) + lie)) + raw + body


def mutate_tensors(rng: Random, file: Path) -> str:
    """Break a safetensors file, or change what it holds so that it is still one; return how."""
    import torch
    from safetensors.torch import load, save

    raw = file.read_bytes()
    header, body = split_tensors(raw)
    names = sorted(name for name in header if name != "__metadata__")
    one, two = rng.sample(names, 2)
    action = rng.randrange(30)
    if action < 4:
        what, new = mutate_bytes(rng, raw)
    elif action == 4:
        lie = rng.choice([-9, -1, 1, 8, 1 << 40, 1 << 62, -len(raw)])
        what, new = f"header length wrong by {lie}", join_tensors(header, body, lie=lie)
    elif action == 5:
        what, new = "header is no object", join_tensors(rng.choice([b"[]", b"3", b"{", b"null", b'{"a": 1}', b'{"a": {}}', b"[" * 50_000, b"{}"]), body)
    elif action == 6:
        header[one]["dtype"] = rng.choice(["I32", "U32", "BOOL", "F16", "BF16", "F64", "F8_E4M3", "F4", "X", "", None, 3, "f32"])
        what, new = f"{one}: dtype {header[one]['dtype']}", join_tensors(header, body)
    elif action == 7:
        shape = header[one]["shape"]
        header[one]["shape"] = rng.choice(
            [shape[::-1], [math.prod(shape)], [*shape, 1], [-n for n in shape], [], [0, 5], [2**62, 4], [1e309], None, "x", [True]]
        )
        if header[one]["shape"] == [1e309]:
            header[one]["shape"] = [Raw("1e309")]
        what, new = f"{one}: shape {header[one]['shape']!s:.40}", join_tensors(header, body)
    elif action == 8:
        begin, end = header[one]["data_offsets"]
        header[one]["data_offsets"] = rng.choice(
            [[end, begin], [begin, end + 4], [begin - 4, end], [0, end - begin], [begin], [begin, end, end], None, ["0", "4"], [0.5, 1]]
        )
        what, new = f"{one}: offsets {header[one]['data_offsets']}", join_tensors(header, body)
    elif action == 9:
        header[one]["data_offsets"] = list(header[two]["data_offsets"])
        what, new = f"{one} has the bytes of {two}", join_tensors(header, body)
    elif action == 10:
        header["__metadata__"] = rng.choice([None, [], "x", {"a": 1}, {"format": "tf"}, {rng.choice(ESCAPES): rng.choice(ESCAPES)}])
        what, new = "metadata", join_tensors(header, body)
    else:
        tensors = load(raw)
        tensor = tensors[one]
        dtype = rng.choice(
            [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
        )
        if action == 11:
            del tensors[one]
            what = f"{one} left out"
        elif action == 12:
            layer = one.rpartition(".")[0].rpartition(".")[0]
            for name in [name for name in tensors if name.startswith(layer + ".")]:
                del tensors[name]
            what = f"{layer} left out"
        elif action == 13:
            tensors = dict(list(tensors.items())[:1]) if rng.random() < 0.3 else {}
            what = f"{len(tensors)} tensors"
        elif action in (14, 15, 16):
            new_name = rng.choice(
                [
                    one.replace("layers.0", "layers.77"),
                    one.replace("model.layers", "layers"),
                    one.replace("base_model.model.", ""),
                    "module." + one,
                    one + rng.choice(ESCAPES),
                    one.replace("lora_A", "lora_embedding_A").replace("gate", "gates"),
                    rng.choice(ESCAPES),
                    one.replace("q_proj", "v_proj"),
                    "",
                    "../x",
                ]
            )
            tensors[new_name] = tensors.pop(one)
            what = f"{one} as {new_name!a:.70}"
        elif action in (17, 18, 19):
            value = rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e30, 0.0])
            tensor.view(-1)[rng.randrange(max(1, tensor.numel()))] = value
            what = f"{one}: {value} in it"
        elif action == 20:
            tensors = {name: torch.full_like(each, rng.choice([0.0, 1e20, 3e38])) for name, each in tensors.items()}
            what = "all numbers alike"
        elif action in (21, 22):
            tensors[one] = tensor.to(dtype)
            what = f"{one} as {dtype}"
        elif action in (23, 24):
            tensors = {name: each.to(dtype) for name, each in tensors.items()}
            what = f"all as {dtype}"
        elif action == 25:
            odd = [torch.zeros(3), tensor[None], tensor.reshape(-1)[:0], tensor.sum()]
            odd += [tensor.t().contiguous(), tensor[:-1], tensor[:, :-1].contiguous()] if tensor.ndim == 2 else []
            tensors[one] = rng.choice(odd)
            what = f"{one} of shape {list(tensors[one].shape)}"
        elif action == 26:
            tensors["extra"] = torch.zeros(2, 2)
            what = "a tensor more"
        elif action == 27 and tensors[one].shape == tensors[two].shape:
            tensors[one], tensors[two] = tensors[two], tensors[one]
            what = f"{one} and {two} exchanged"
        elif action == 27:
            prefix = rng.choice(["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "x."])
            tensors = {prefix + name: each for name, each in tensors.items()}
            what = f"all names behind {prefix}"
        elif action == 28:
            tensors = {name: each * rng.choice([1.0, -1.0, 2.0]) for name, each in tensors.items()}
            what = "numbers scaled"
        else:
            metadata = {"format": "pt"}
            file.write_bytes(save(dict(reversed(list(tensors.items()))), metadata=metadata))
            return f"{file.name}: written again"
        new = save({name: each.contiguous() for name, each in tensors.items()}, metadata={"format": "pt"})
    file.write_bytes(new)
    return f"{file.name}: {what}"

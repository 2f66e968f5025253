"""Malformed datasets, manifests, results and archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import tarfile
from pathlib import Path
from random import Random
from typing import Any

from .cases import Case, document, finite_numbers, judged
from .forks import Outcome
from .mutate import ESCAPES, dumps, mutate_bytes, mutate_document, mutate_json, no_file, strange
from .reference import Invalid, need


def strict_rows(file: Path) -> list[tuple[str, str]]:
    """The rows of a JSON-lines file of prompts and responses. Raises Invalid where a line is broken or a text is none."""

    def refuse(word: str) -> Any:
        raise Invalid(word)

    need(file.is_file(), f"no {file.name}")
    rows = []
    for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"), parse_constant=refuse)
        except (ValueError, RecursionError) as broken:
            raise Invalid(str(broken)) from broken
        need(isinstance(row, dict) and "prompt" in row and "response" in row, "not a row")
        for key in ("prompt", "response"):
            value = row[key]
            need(isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value)), f"{key} is no text")
        rows.append((_text(row["prompt"]), _text(row["response"])))
    need(rows, "no rows")
    return rows


def given_rows(file: Path) -> list[tuple[str, str]]:
    """The rows of a user's own file, which may also be one JSON array. Raises Invalid as :func:`strict_rows` does."""
    need(file.is_file(), f"no {file.name}")
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf").strip()
    if not raw.startswith(b"["):
        return strict_rows(file)
    try:
        records = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as broken:
        raise Invalid(str(broken)) from broken
    lines = file.with_name("array.jsonl")
    lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    return strict_rows(lines)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _break_rows(rng: Random, file: Path) -> str:
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    row = json.loads(lines[number])
    action = rng.randrange(12)
    if action == 0:
        what, raw = mutate_bytes(rng, file.read_bytes())
        file.write_bytes(raw)
        return what
    if action == 1:
        what, raw = mutate_bytes(rng, lines[number].encode())
        file.write_bytes("\n".join(lines[:number]).encode() + b"\n" + raw + b"\n" + "\n".join(lines[number + 1 :]).encode() + b"\n")
        return f"line {number + 1}: {what}"
    if action == 2:
        what, value = strange(rng)
        lines[number] = dumps(value).replace("\n", " ")
    elif action == 3:
        file.write_text(json.dumps([json.loads(line) for line in lines], indent=1))
        return "a JSON array"
    elif action == 4:
        what = "other line ends"
        file.write_bytes(("\r\n" if rng.random() < 0.5 else "\r").join(lines).encode())
        return what
    elif action == 5:
        text = rng.choice([*ESCAPES, "", "\u2028", "x" * 200_000, "\u0000", "[INST] a [/INST]", " ", "𝄞" * 50, "\ufeff"])
        key = rng.choice(["prompt", "response"])
        row[key] = text
        lines[number], what = json.dumps(row), f"{key} = {text!a:.40}"
    elif action == 6:
        file.write_text("\n" * 3)
        return "only empty lines"
    elif action == 7:
        what = "one row"
        lines = lines[:1]
    else:
        what, value = mutate_json(rng, row)
        lines[number] = dumps(value).replace("\n", " ")
    file.write_text("\n".join(lines) + "\n")
    return f"line {number + 1}: {what}"


def rows(rng: Random) -> Case:
    """A changed file of rows."""
    if rng.random() < 0.5:
        return _added(rng)
    file = Path("datasets/alpha") / rng.choice(["test.jsonl", "train.jsonl"])
    what = f"{file.name}: {_break_rows(rng, file)}" if rng.random() < 0.9 else _odd_rows(rng, file)
    command = rng.choices(["show", "verify", "eval", "train", "composite", "trace"], [4, 2, 2, 1, 2, 1])[0]
    split = file.stem
    if command == "show":
        return Case(
            what, ["data", "show", "alpha", "--split", split, "-n", "30", *rng.choice([["--json"], []])], check=_shown(file), terminal=rng.random() < 0.3
        )
    if command == "verify":
        return judged(Case(what, ["data", "verify", "alpha", "--json"]), lambda: _verified(Path("datasets/alpha")))
    if command == "eval":
        argv = ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--max-new-tokens", "2", "--out", "out", *rng.choice([["--json"], ["--debug"]])]
        return Case(what, argv, writes=("out",), terminal="--debug" in argv and rng.random() < 0.5)
    if command == "composite":
        argv = ["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--examples", "1", "--num-samples", "3", "--json"]
        return Case(what, argv, writes=("datasets/both",))
    if command == "trace":
        argv = ["trace", "--task", "alpha", "--row", "0", "--checkpoint", "packed", "--max-new-tokens", "2", "--out", "page.html"]
        return Case(what, argv, writes=("page.html",), terminal=True)
    argv = ["train", "adapters", "--task", "alpha", "--base", "base", "--max-steps", "1", "--batch-size", "2", "--log-to", "none", "--out", "new"]
    return Case(what, [*argv, "--json"], writes=("new",))


def _odd_rows(rng: Random, file: Path) -> str:
    file.unlink()
    return no_file(rng.randrange(4), file)


def _added(rng: Random) -> Case:
    file = Path("raw/alpha.jsonl")
    what = _break_rows(rng, file) if rng.random() < 0.92 else _odd_rows(rng, file)
    name = rng.choice(["mine", "mine", "mine", "alpha"])
    argv = ["data", "add", name, "--train", str(file), *rng.choice([[], ["--test", "raw/beta.jsonl"]]), *rng.choice([["--json"], [], ["--dry-run"]])]

    def check(outcome: Outcome) -> str | None:
        if "--dry-run" in argv:
            return None
        built = [row for split in ("train", "test") for row in strict_rows(Path("datasets") / name / f"{split}.jsonl")]
        wanted = given_rows(file) + (strict_rows(Path("raw/beta.jsonl")) if "--test" in argv else [])
        return None if sorted(built) == sorted(wanted) else f"{len(built)} rows built that are not the {len(wanted)} of the files"

    case = Case(what, argv, check=check, writes=(f"datasets/{name}",))
    return judged(case, lambda: _addable(file))


def _addable(file: Path) -> None:
    need(all(response.strip() for _, response in given_rows(file)), "an empty response")


def _shown(file: Path) -> Any:
    def check(outcome: Outcome) -> str | None:
        try:
            wanted = strict_rows(file)[:30]
        except Invalid as broken:
            return f"it showed a broken file: {broken}"
        if not outcome.out.startswith(b"{"):
            return None
        shown = [(row["prompt"], row["response"]) for row in document(outcome)["rows"]]
        return None if shown == wanted else "other rows than the file's"

    return check


def _verified(folder: Path) -> None:
    """Raises Invalid unless the dataset's files are those that its manifest names."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8-sig"))
    need({path.name for path in folder.glob("*.jsonl")} == set(manifest["files"]), "files")
    for name, entry in manifest["files"].items():
        need((folder / name).is_file(), name)
        raw = (folder / name).read_bytes()
        need(hashlib.sha256(raw).hexdigest() == entry["sha256"] and len(raw) == entry["bytes"], name)


def manifest(rng: Random) -> Case:
    """A changed manifest."""
    folder = Path("datasets/alpha")
    what = mutate_document(rng, folder / "manifest.json")
    command = rng.choice(["verify", "list", "show", "composite", "eval", "card"])
    if command == "verify":
        return Case(what, ["data", "verify", *rng.choice([[], ["alpha"]]), *rng.choice([["--json"], []])], check=lambda outcome: _check_verified(folder))
    if command == "list":
        return Case(what, ["data", "list", *rng.choice([["--json"], []])], terminal=rng.random() < 0.3)
    if command == "show":
        return Case(what, ["data", "show", "alpha", "--json"])
    if command == "composite":
        return Case(what, ["data", "composite", "--tasks", "alpha,beta", "--name", "both", "--examples", "0", "--num-samples", "3"], writes=("datasets/both",))
    if command == "card":
        return Case(what, ["ckpt", "card", "packed", "--data", "datasets"], writes=("packed/README.md",))
    argv = ["eval", "--task", "alpha", "--model", "base", "--base", "base", "--limit", "1", "--max-new-tokens", "1", "--out", "out"]
    return Case(what, argv, writes=("out",))


def _check_verified(folder: Path) -> str | None:
    try:
        _verified(folder)
    except Invalid as broken:
        return f"verified, although it is broken: {broken}"
    except (KeyError, TypeError, AttributeError, ValueError) as broken:
        return f"verified, although its manifest is broken: {broken!r}"
    return None


def results(rng: Random) -> Case:
    """A changed results file."""
    file = next(Path("results").rglob("results_*.json"))
    if rng.random() < 0.4:
        values = json.loads(file.read_text())
        task = rng.choice(sorted(values["results"]))
        what, values["results"][task] = mutate_json(rng, values["results"][task])
        what = f"{file.name}: results.{task}.{what}"
        file.write_text(dumps(values))
    else:
        what = mutate_document(rng, file)
    command = rng.choice(["json", "table", "markdown", "card"])
    if command == "card":
        return Case(what, ["ckpt", "card", "packed", "--results", str(file)], writes=("packed/README.md",), check=_no_nan_in(Path("packed/README.md")))
    runs = rng.choice([[str(file)], ["results"], [str(file.parent), str(file)]])
    return Case(
        what, ["eval", "report", *runs, *{"json": ["--json"], "markdown": ["--markdown"], "table": []}[command]], check=_no_nan_out, terminal=command == "table"
    )


def _no_nan_out(outcome: Outcome) -> str | None:
    words = (outcome.out or outcome.err).decode("utf-8", "replace").lower().replace("|", " ").split()
    return "NaN or infinity in the table" if {"nan", "inf", "-inf", "nan%", "inf%"} & set(words) else None


def _no_nan_in(file: Path) -> Any:
    def check(outcome: Outcome) -> str | None:
        words = set(file.read_text().lower().replace("|", " ").split())
        return "NaN or infinity in the card" if {"nan", "inf", "-inf"} & words else None

    return check


def archive(rng: Random) -> Case:
    """A changed or hostile archive of raw tasks."""
    file = Path("archive.tar.gz")
    action = rng.randrange(12)
    broken = False
    raw = file.read_bytes()
    if action < 5:
        what, new = mutate_bytes(rng, raw)
        file.write_bytes(new)
    elif action == 5:
        what, new = "a wrong checksum", raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:]
        file.write_bytes(new)
    elif action == 6:
        what = "the trailer cut"
        file.write_bytes(raw[: -rng.randrange(1, 9)])
    elif action == 7:
        what, body = mutate_bytes(rng, gzip.decompress(raw))
        file.write_bytes(gzip.compress(body))
    elif action == 8:
        name, link = "bigbench-1.0.0/bigbench/benchmark_tasks/strategyqa/task.json", "bigbench-1.0.0/x"
        bad = rng.choice(["/etc/pwn", "../../pwn", "bigbench-1.0.0/../../pwn", "bigbench-1.0.0/\x1b]0;PWN\x07", "C:/pwn", f"{name}/../../../../../../pwn"])
        kind = rng.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
        member = tarfile.TarInfo(bad if kind == tarfile.REGTYPE else link)
        member.type, member.linkname = kind, bad
        _add_member(file, raw, member, b"")
        what, broken = f"a member {bad!a} of type {kind!r}", "\x1b" not in bad or kind != tarfile.REGTYPE
    elif action == 9:
        member = tarfile.TarInfo("bigbench-1.0.0/x")
        member.pax_headers = rng.choice(
            [{"GNU.sparse.map": "x"}, {"size": "nan"}, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}, {"path": "../../pwn"}, {"mtime": "inf"}]
        )
        what = f"pax headers {member.pax_headers}"
        _add_member(file, raw, member, b"", tarfile.PAX_FORMAT)
    elif action == 10:
        what = "a bomb"
        member = tarfile.TarInfo("bigbench-1.0.0/bigbench/benchmark_tasks/strategyqa/big.json")
        _add_member(file, raw, member, bytes(rng.choice([1 << 20, 200 << 20])))
    else:
        what = mutate_document_in(rng, file, raw)
    argv = ["data", "build", "--task", "strategyqa", "--source", "local", "--raw-dir", str(file), *rng.choice([["--json"], []])]
    case = Case(f"archive: {what}", argv, writes=("datasets/strategyqa",), check=_built_right)
    if broken:
        return judged(case, lambda: need(False, "a member that leaves the folder, or is neither file nor folder"))
    return judged(case, lambda: _whole(file))


def _add_member(file: Path, raw: bytes, member: tarfile.TarInfo, body: bytes, form: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(file, "w:gz", format=form, compresslevel=1) as tar, tarfile.open(fileobj=io.BytesIO(raw)) as old:
        for each in old.getmembers():
            tar.addfile(each, old.extractfile(each))
        member.size = len(body)
        tar.addfile(member, io.BytesIO(body))


def mutate_document_in(rng: Random, file: Path, raw: bytes) -> str:
    """Break the task's document inside the archive."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as old:
        names = [each.name for each in old.getmembers()]
        bodies = [old.extractfile(each).read() for each in old.getmembers()]  # type: ignore[union-attr]
    task = Path("task.json")
    task.write_bytes(bodies[1])
    what = mutate_document(rng, task)
    bodies[1] = task.read_bytes()
    task.unlink()
    with tarfile.open(file, "w:gz") as tar:
        for name, body in zip(names, bodies, strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return what


def _whole(file: Path) -> None:
    """Raises Invalid unless gzip can read the whole file and its checksum is right."""
    try:
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, ValueError) as broken:
        raise Invalid(f"gzip: {broken}") from broken
    except Exception as broken:  # zlib.error is no OSError
        raise Invalid(f"gzip: {broken}") from broken


def _built_right(outcome: Outcome) -> str | None:
    """Every row that was built is one of the archive's examples, whole."""
    folder = Path("datasets/strategyqa")
    for split in ("train", "test"):
        try:
            rows_ = strict_rows(folder / f"{split}.jsonl")
        except (Invalid, OSError) as broken:
            return f"{split}.jsonl is broken: {broken}"
        if not all(prompt and response for prompt, response in rows_):
            return "an empty text"
    return None if finite_numbers(json.loads((folder / "manifest.json").read_text())) else "NaN in the manifest"

"""Every kind of file and every format gives the rows of the ``datasets`` library, or an error of one clear line."""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from meteora_core.data.formats.own import extract_own
from meteora_core.data.formats.reading import Reading
from meteora_core.data.rows import Row
from meteora_core.data.tasks import Files, Task
from meteora_core.errors import DataError, MeteoraError, UsageError

Write = Callable[[Path], Path]


@pytest.fixture(autouse=True)
def own_library_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def raw(name: str, content: bytes | str) -> Write:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


def lines(name: str, *records: Any) -> Write:
    return raw(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def array(name: str, *records: Any) -> Write:
    return raw(name, json.dumps(records, ensure_ascii=False, indent=1))


def parquet(name: str, **columns: Any) -> Write:
    def write(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
        return folder / name

    return write


def feather(name: str, **columns: Any) -> Write:
    def write(folder: Path) -> Path:
        pyarrow.feather.write_feather(pyarrow.table(columns), folder / name, compression="uncompressed")
        return folder / name

    return write


def saved(*records: Any, features: Any = None) -> Write:
    def write(folder: Path) -> Path:
        datasets.Dataset.from_list(list(records), features=features).save_to_disk(folder / "hf")
        return folder / "hf"

    return write


def packed(write: Write, by: str) -> Write:
    def again(folder: Path) -> Path:
        path = write(folder)
        data = path.read_bytes()
        target = path.with_name(f"{path.name}.{by}")
        target.write_bytes(gzip.compress(data) if by == "gz" else pyarrow.Codec("zstd").compress(data, asbytes=True))
        path.unlink()
        return target

    return again


def read(path: Path, reading: Reading | None = None) -> list[Row]:
    """All rows of a dataset in order. The dataset is also the test split, so that no train rows become test rows."""
    task = Task("mine", None, "exact", Files(path, path, reading or Reading(template="inst")))
    return list(extract_own(task).rows("train"))


def inst(text: str) -> str:
    return f"[INST] {text} [/INST]\n"


def library(path: Path) -> list[dict[str, Any]]:
    """The records as ``datasets`` reads them. CSV is read as text, because type inference turns ``007`` into 7 and ``NA`` into None."""
    if path.is_dir():
        return list(datasets.load_from_disk(str(path)))
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        sep = "\t" if name.endswith(".tsv") else ";" if b";" in path.read_bytes().split(b"\n")[0] else ","
        names = list(datasets.load_dataset("csv", data_files=glob.escape(str(path)), split="train", sep=sep).features)
        features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
        return list(datasets.load_dataset("csv", data_files=glob.escape(str(path)), split="train", sep=sep, features=features, keep_default_na=False))
    kind = "parquet" if name.endswith(".parquet") else "arrow" if name.endswith(".arrow") else "text" if name.endswith(".txt") else "json"
    return list(datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train"))


def flat(user: str, response: str, frame: Callable[[str], str] = inst) -> Callable[[dict[str, Any]], Row]:
    return lambda record: Row(frame(record[user]), record[response])


def asked(record: dict[str, Any]) -> Row:
    return Row(inst(record["messages"][0]["content"]), record["messages"][1]["content"])


def told(record: dict[str, Any]) -> Row:
    return Row(inst(record["conversations"][0]["value"]), record["conversations"][1]["value"])


def alpaca(record: dict[str, Any]) -> Row:
    return Row(inst(record["instruction"] + (f"\n{record['input']}" if record["input"] else "")), record["output"])


FRAME = "### Instruction:\n{}\n\n### Response:\n"
TALK = {"messages": [{"role": "user", "content": "Say é"}, {"role": "assistant", "content": "É"}]}
SHARE = {"conversations": [{"from": "human", "value": "Say hi"}, {"from": "gpt", "value": "HI"}]}
INSTRUCTION = {"instruction": "Write in capital letters", "input": "doctor candle", "output": "DOCTOR CANDLE"}
FINISHED = {"prompt": FRAME.format("Write: candle"), "response": "CANDLE"}
COMPLETION = {"prompt": FRAME.format("Write: candle"), "completion": "CANDLE"}

GOOD: dict[str, tuple[Write, Callable[[dict[str, Any]], Row]]] = {
    # the formats that adapters are trained on
    "alpaca.json": (array("alpaca.json", INSTRUCTION, {"instruction": "Say", "input": "", "output": "S"}), alpaca),
    "alpaca.jsonl": (lines("alpaca.jsonl", INSTRUCTION, {"instruction": "Say", "input": "", "output": "S"}), alpaca),
    "array.json": (array("array.json", FINISHED, FINISHED), flat("prompt", "response", str)),
    "bom.jsonl": (raw("bom.jsonl", b"\xef\xbb\xbf" + (json.dumps(FINISHED) + "\n").encode()), flat("prompt", "response", str)),
    "chat.jsonl": (lines("chat.jsonl", TALK), asked),
    "saved": (saved(FINISHED, FINISHED), flat("prompt", "response", str)),
    "rows.csv": (raw("rows.csv", 'prompt,response\n"### Instruction:\nhi, you\n\n### Response:\n",HI\n'), flat("prompt", "response", str)),
    "rows.parquet": (parquet("rows.parquet", prompt=["p\n", "q\n"], response=["a", "b"]), flat("prompt", "response", str)),
    "sharegpt.jsonl": (lines("sharegpt.jsonl", SHARE), told),
    "trl.jsonl": (lines("trl.jsonl", COMPLETION), flat("prompt", "completion", str)),
    # odd columns, encodings, nulls
    "jsonl: extra columns and an emoji": (lines("a.jsonl", {**FINISHED, "id": 7, "source": None, "response": "😀"}), flat("prompt", "response", str)),
    "jsonl: packed by gzip": (packed(lines("a.jsonl", FINISHED), "gz"), flat("prompt", "response", str)),
    "jsonl: blank lines and CRLF": (raw("a.jsonl", '\r\n{"prompt": "p", "response": "r"}\r\n\r\n'), flat("prompt", "response", str)),
    "json: with a byte-order mark": (
        raw("a.json", b"\xef\xbb\xbf" + json.dumps([{"question": "Wer ist da? ä", "answer": "Ich"}]).encode()),
        flat("question", "answer"),
    ),
    "json: named in capitals": (array("A.JSON", {"question": "q", "answer": "a"}), flat("question", "answer")),
    "json: more columns in a later row": (array("a.json", {"query": "q", "answer": "a"}, {"query": "r", "answer": "b", "score": 1}), flat("query", "answer")),
    "csv: NA, None, 007 and a date stay text": (
        raw("a.csv", "question,answer\nNA,None\n007,2024-01-01 00:00:00\ntrue,1.0\n"),
        flat("question", "answer"),
    ),
    "csv: semicolons and a byte-order mark": (raw("a.csv", b"\xef\xbb\xbfquestion;answer\nWas, bitte?;\xc3\x84h\n"), flat("question", "answer")),
    "tsv: quotes and tabs": (raw("a.tsv", 'question\tanswer\n"a ""b"""\t"c\td"\n'), flat("question", "answer")),
    "parquet: nulls in other columns": (
        parquet("a.parquet", question=["q", "r"], answer=["a", "b"], note=pyarrow.array([None, "x"])),
        flat("question", "answer"),
    ),
    "parquet: nested messages": (parquet("a.parquet", messages=[TALK["messages"], TALK["messages"]]), asked),
    "parquet: brackets in the name": (parquet("a[1].parquet", question=["q"], answer=["a"]), flat("question", "answer")),
    "arrow: as feather": (feather("a.arrow", question=["q"], answer=["a"]), flat("question", "answer")),
    "saved: messages": (saved(TALK), asked),
    "saved: conversations": (saved(SHARE), told),
    "text: prompt and answer in one column": (
        lines("a.jsonl", {"text": "<s>### Instruction:\nSay hi\n\n### Response:\nHI</s>"}, {"text": "<s>### Instruction:\nGo\n\n### Response:\nGO</s>"}),
        lambda record: Row(
            record["text"].removeprefix("<s>").partition("### Response:\n")[0] + "### Response:\n",
            record["text"].removesuffix("</s>").rpartition("### Response:\n")[2],
        ),
    ),
    "text: lines": (raw("a.txt", "one line\nanother: größer\n"), lambda record: Row("", record["text"])),
    "alpaca: input is null": (
        lines("a.jsonl", INSTRUCTION, {**INSTRUCTION, "input": None}),
        alpaca,
    ),
    "qa: squad's context": (
        lines("a.jsonl", {"context": "Red is a colour.", "question": "What is red?", "answer": "a colour"}),
        lambda record: Row(inst(f"{record['question']}\n{record['context']}"), record["answer"]),
    ),
    "completion: numbers become text": (
        lines("a.jsonl", {"prompt": "1 + 1 = ", "completion": 2}, {"prompt": "1 / 2 = ", "completion": 5}),
        lambda record: Row(record["prompt"], str(record["completion"])),
    ),
}


AS_IT_IS = {
    *("array.json", "bom.jsonl", "saved", "rows.csv", "rows.parquet", "trl.jsonl"),
    *("jsonl: extra columns and an emoji", "jsonl: packed by gzip", "jsonl: blank lines and CRLF"),
    *("text: prompt and answer in one column", "text: lines", "completion: numbers become text"),
}
"""The cases with finished prompts; the prompts of all others are put into a frame."""


@pytest.mark.parametrize("name", GOOD)
def test_rows_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    write, expected = GOOD[name]
    path = write(tmp_path)
    rows = read(path, Reading(template=None if name in AS_IT_IS else "inst"))
    assert rows == [expected(record) for record in library(path)]
    assert rows


def test_zstd_gives_the_same_rows(tmp_path: Path) -> None:
    """``datasets`` needs another package for this kind of file."""
    records = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5000)]
    for write in (lines("a.jsonl", *records), array("b.json", *records), parquet("c.parquet", question=["q"], answer=["a"])):
        rows = read(write(tmp_path))
        assert read(packed(write, "zst")(tmp_path)) == rows
        assert read(packed(write, "gz")(tmp_path)) == rows


BAD: dict[str, tuple[Write, str]] = {
    "jsonl: a null": (lines("a.jsonl", FINISHED, {"prompt": "p", "response": None}), r"a\.jsonl: row 2: field 'response' is null"),
    "jsonl: Latin-1": (raw("a.jsonl", '{"prompt": "ä", "response": "b"}\n'.encode("latin-1")), r"a\.jsonl:1:14 is not UTF-8 text|is not UTF-8 text"),
    "jsonl: half a row": (raw("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a'), r"a\.jsonl:2:12 is not valid JSON"),
    "json: one object": (raw("a.json", '{\n "data": [\n  {"prompt": "a", "response": "b"}\n ]\n}\n'), r"is one JSON object \(data\), not rows"),
    "json: a list of texts": (array("a.json", "one", "two"), r"row 1 is 'one', not a JSON object"),
    "json: UTF-16": (raw("a.json", json.dumps([FINISHED]).encode("utf-16")), r"is UTF-16 text"),
    "csv: too many fields": (raw("a.csv", "question,answer\nwho, me?,you\n"), r"a\.csv:2: 3 fields, and there are 2 columns"),
    "csv: an empty answer": (raw("a.csv", "question,answer\nq,a\nq,\n"), r"row 2: the response is empty"),
    "csv: no names": (raw("a.csv", "Is it red?,yes\nIs it blue?,no\n"), r"fit no known format; there are: Is it red\?, yes"),
    "csv: a name twice": (raw("a.csv", "answer,question,answer\na,q,a\n"), r"two columns called 'answer'"),
    "csv: an open quote": (raw("a.csv", 'question,answer\n"q,a\n'), r"a\.csv:2 is not valid CSV: unexpected end of data"),
    "csv: Latin-1": (raw("a.csv", "question,answer\nä,b\n".encode("latin-1")), r"is not UTF-8 text"),
    "parquet: a null": (parquet("a.parquet", question=["q", None], answer=["a", "b"]), r"row 2: field 'question' is null"),
    "parquet: bytes": (parquet("a.parquet", question=[b"q"], answer=["a"]), r"row 1: field 'question' is not a text"),
    "parquet: cut off": (raw("a.parquet", b"PAR1 and then nothing"), r"a\.parquet cannot be read"),
    "parquet: only by name": (raw("a.parquet", b"question,answer\nq,a\n"), r"is not in the Parquet format"),
    "messages: no answer": (lines("a.jsonl", {"messages": [{"role": "user", "content": "hi"}]}), r"row 1: the conversation has no answer of the assistant"),
    "messages: an unknown role": (lines("a.jsonl", {"messages": [{"role": "narrator", "content": "hi"}]}), r"message 1 has an unknown role: 'narrator'"),
    "messages: null": (lines("a.jsonl", TALK, {"messages": None}), r"row 2: the conversation is null"),
    "messages: a picture": (
        lines("a.jsonl", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}),
        r"message 1 has a part that is not text: 'image_url'",
    ),
    "messages: the content is null": (lines("a.jsonl", {"messages": [{"role": "user", "content": None}]}), r"message 1 has no content"),
    "sharegpt: no role": (lines("a.jsonl", {"conversations": [{"value": "hi"}]}), r"message 1 has no role; there are: value"),
    "sharegpt: the assistant begins": (lines("a.jsonl", {"conversations": [{"from": "gpt", "value": "hi"}]}), r"the conversation begins with the assistant"),
    "alpaca: no output": (lines("a.jsonl", {"instruction": "do", "input": ""}), r"fit no known format; there are: instruction, input"),
    "alpaca: the output is a list": (lines("a.jsonl", {"instruction": "do", "output": ["a"]}), r"field 'output' is not a text"),
    "preferences": (lines("a.jsonl", {"chosen": "a", "rejected": "b"}), r"fit no known format; there are: chosen, rejected"),
    "text: latin": (raw("a.txt", "größer\n".encode("latin-1")), r"is not UTF-8 text"),
    "text: empty": (raw("a.txt", "\n\n"), r"has no rows"),
    "gzip: cut off": (raw("a.jsonl.gz", gzip.compress(json.dumps(FINISHED).encode() * 99)[:-20]), r"is a broken gzip file"),
    "zstd: broken": (raw("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40), r"cannot be unpacked"),
    "a pickle": (raw("a.pkl", b"\x80\x04\x95"), r"cannot tell what kind of file"),
    "a saved folder without its rows": (raw("dataset_dict.json", '{"splits": ["train"]}'), r"cannot be read|is one JSON object"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_line(tmp_path: Path, name: str) -> None:
    write, message = BAD[name]
    path = write(tmp_path)
    path = path.parent if path.name == "dataset_dict.json" else path
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in caught.value.message


def test_invalid_rows_can_be_left_out(tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes:
        def note(self, message: str) -> None:
            notes.append(message)

    path = lines("a.jsonl", {"question": None, "answer": "x"}, {"question": "q", "answer": "a"}, {"question": "q", "answer": " "})(tmp_path)
    task = Task("mine", None, "exact", Files(path, path, Reading(template="raw", skip_invalid=True)))
    raw_rows = extract_own(task, Notes())  # type: ignore[arg-type]
    assert raw_rows.example == Row("q", "a")
    assert list(raw_rows.rows("train")) == [Row("q", "a")]
    assert notes == ["mine: 2 train rows were left out (row 1: field 'question' is null, row 3: the response is empty)"]


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from meteora_core.data.formats import files

    monkeypatch.setattr(files, "FREE_BYTES", 1 << 20)
    path = packed(raw("a.jsonl", b'{"prompt": "' + b"a" * (1 << 24)), "gz")(tmp_path)
    with pytest.raises(DataError, match="unpacks to more than"):
        read(path)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (Reading(columns=(("question", "ask"), ("answer", "fields.reply")), template="inst"), Row(inst("Q1"), "A1")),
        (Reading(columns=(("question", "ask"), ("answer", "fields.reply")), template="Ask: {}\nSay:"), Row("Ask: Q1\nSay:", "A1")),
        (Reading(columns=(("prompt", "ask"), ("response", "n"))), Row("Q1", "1")),
        (Reading(template="{n}) {ask} {{x}}\n", target="{fields.reply}!"), Row("1) Q1 {x}\n", "A1!")),
        (Reading(columns=(("question", "ask"), ("answer", "n")), template="raw", target="<{fields.reply}>"), Row("Q1", "<A1>")),
    ],
)
def test_columns_template_and_target(tmp_path: Path, reading: Reading, expected: Row) -> None:
    path = lines("a.jsonl", {"ask": "Q1", "fields": {"reply": "A1"}, "n": 1})(tmp_path)
    assert read(path, reading) == [expected]


@pytest.mark.parametrize(
    ("reading", "message"),
    [
        (Reading(columns=(("questoin", "ask"),)), "'questoin' is not a known column"),
        (Reading(columns=(("question", "ask"), ("answer", "reply")), template="raw"), "row 1: no field 'reply'; there are: ask, n"),
        (Reading(template="{ask}"), "fit no known format"),
        (Reading(template="no place at all"), "has no place for the user's text"),
        (Reading(template="cht"), "has no place for the user's text"),
        (Reading(template="{} and {}", columns=(("question", "ask"), ("answer", "n"))), "more than one {}"),
        (Reading(template="inst", target="no column", columns=(("question", "ask"), ("answer", "n"))), "names no column"),
        (Reading(columns=(("question", "ask"), ("answer", "n"))), "chat template is needed"),
        (Reading(template="{ask", target="{n}"), "is broken"),
    ],
)
def test_wrong_columns_and_templates(tmp_path: Path, reading: Reading, message: str) -> None:
    path = lines("a.jsonl", {"ask": "Q1", "n": 1})(tmp_path)
    with pytest.raises((DataError, UsageError), match=message):
        read(path, reading)


def test_a_prompt_is_not_framed_twice(tmp_path: Path) -> None:
    path = lines("a.jsonl", {"prompt": inst("hi"), "response": "HI"}, {"prompt": "bye", "response": "BYE"})(tmp_path)
    assert read(path) == [Row(inst("hi"), "HI"), Row(inst("bye"), "BYE")]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "has no train rows")):
        with pytest.raises(MeteoraError, match=message):
            read(path)

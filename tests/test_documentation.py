"""The documentation is true: generated pages, links, commands, the example of the README."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.tools.reference_pages import pages
from meteora_cli.tree import command
from meteora_core.json_files import write_jsonl
from support.chat_world import byte_llama, byte_tokenizer, write_adapter

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples" / "paper" / "README.md"]
    + [file for folder in ("docs", "notes") for file in (ROOT / folder).rglob("*.md")]
)
USER_PAGES = [file for file in TEXTS if "notes" not in file.parts and file.name != "CHANGELOG.md" and file != ROOT / "docs" / "results" / "paper.md"]


def names(files: list[Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


@pytest.mark.parametrize("name", ["cli.md", "settings.md"])
def test_generated_pages_are_those_of_the_code(name: str) -> None:
    written = (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8")
    assert written == pages()[name], "run `make docs-reference` and commit the result"


def prose(text: str) -> str:
    """A page without its fenced code and without code within lines."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"(?ms)^ *```.*?^ *```[^\n]*$", "", text))


def anchors(file: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    found = set()
    for line in re.sub(r"(?ms)^ *```.*?^ *```[^\n]*$", "", file.read_text(encoding="utf-8")).splitlines():
        if line.startswith("#"):
            title = re.sub(r"[^\w\s-]", "", line.lstrip("#").strip().lower())
            found.add(re.sub(r"\s+", "-", title))
        if api := re.match(r"::: (\S+)", line):
            found.add(api[1])
    return found


@pytest.mark.parametrize("file", TEXTS, ids=names(TEXTS))
def test_links_lead_to_files_and_headings_that_exist(file: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(file.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (file.parent / path).resolve() if path else file
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


def commands(text: str) -> Iterator[list[str]]:
    """The words of every ``meteora`` command in a page's code."""
    fenced = re.findall(r"(?ms)^ *```(?:bash)?\n(.*?)^ *```", text)
    inline = [each for each in re.findall(r"`(meteora [^`\n]+)`", re.sub(r"(?ms)^ *```.*?^ *```[^\n]*$", "", text)) if "…" not in each and "\\|" not in each]
    for line in [*"".join(fenced).replace("\\\n", " ").splitlines(), *inline]:
        words = shlex.split(line, comments=True) if line.strip().startswith("meteora ") else []
        if words and "[OPTIONS]" not in words:
            yield words[1:]


def unknown_options(words: list[str]) -> list[str]:
    """Words of a command that its parser does not know: sub-commands and options."""
    item: Any = command()
    options = {each for parameter in item.params for each in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}
    found = []
    for word in words:
        children = getattr(item, "commands", {})
        if item is command().commands["train"] and word.startswith("-"):  # without the name of a command it trains the gates
            item = children["gates"]
            options |= {each for parameter in item.params for each in (*parameter.opts, *parameter.secondary_opts)}
        if word in children:
            item = children[word]
            options |= {each for parameter in item.params for each in (*parameter.opts, *parameter.secondary_opts)}
        elif word.startswith("-") and " " not in word:  # a word with a blank is a value: the options of another program
            if word.partition("=")[0] not in options and not re.fullmatch(r"-\d.*", word):
                found.append(word)
        elif item is command() and not word.endswith(".toml"):
            found.append(word)
    return found


@pytest.mark.parametrize("file", USER_PAGES, ids=names(USER_PAGES))
def test_commands_in_the_documentation_have_options_that_exist(file: Path) -> None:
    assert {" ".join(words): unknown for words in commands(file.read_text(encoding="utf-8")) if (unknown := unknown_options(words))} == {}


def test_a_wrong_option_in_the_documentation_would_be_found() -> None:
    page = "Run `meteora trian` or\n\n```bash\nmeteora train --lerning-rate 3  # no\nmeteora eval report runs --plot x.png\n```\n"
    assert [unknown_options(words) for words in commands(page)] == [["--lerning-rate"], [], ["trian"]]


def test_the_site_lists_every_page_and_every_note_is_in_the_index() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages_of_docs = [str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md") if file.parent.name != "kernels"]
    assert [page for page in pages_of_docs if not re.search(rf"(?m)[ :-] {re.escape(page)}$", site)] == []
    index = (ROOT / "notes" / "lab" / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in (ROOT / "notes" / "lab").glob("2*.md") if f"]({file.name})" not in index] == []


def test_the_page_on_performance_stays_short() -> None:
    assert len((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()) <= 80


def python_of(page: str, count: int) -> str:
    """The first Python examples of a page, as one program."""
    return "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"))[:count])


@pytest.mark.parametrize(("page", "count", "written"), [("README.md", 1, "runs/mine"), ("docs/guide/python.md", 4, "runs/better")])
def test_the_python_examples_run(
    page: str, count: int, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are written, but for the base model, which is tiny here, and the number of steps."""
    model = byte_llama()
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    for seed, task in enumerate(("logical_deduction", "strategyqa")):
        write_adapter(tmp_path / "adapters" / task, model, tmp_path / "base", seed)
        write_jsonl(tmp_path / "datasets" / task / "train.jsonl", [{"prompt": f"[INST] {task} {i} [/INST]\n", "response": "yes"} for i in range(20)])
    monkeypatch.chdir(tmp_path)
    source = python_of(page, count)
    for old, new in (("HuggingFaceTB/SmolLM2-135M-Instruct", "base"), ("range(200)", "range(2)"), ("max_steps=100", "max_steps=2")):
        assert source.count(old) == 1 or old == "max_steps=100"
        source = source.replace(old, new)
    exec(compile(source, page, "exec"), {"__name__": "__example__"})
    assert (tmp_path / written / "meteora_config.json").is_file()
    assert "tensor([" in capsys.readouterr().out

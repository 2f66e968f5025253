"""`meteora trace`: pictures of prompts, files and rows."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest

from meteora_core.json_files import write_jsonl
from support.chat_world import World, build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


def test_a_prompt_as_a_page(meteora, world, tmp_path) -> None:
    ran = meteora("trace", "--prompt", "Is <script>alert(1)</script> safe?", "--checkpoint", world.checkpoint, "--max-new-tokens", "5")
    assert ran.code == 0, ran.err
    assert ran.out == "trace.html\n"
    assert "/set" not in ran.err
    source = (tmp_path / "trace.html").read_text(encoding="utf-8")
    assert "<script>alert" not in source
    assert 'data-text="&lt;"' in source
    assert "5 written" in source
    assert "gates: top 2, T 1" in unescape(source)


def test_a_prompt_that_is_not_utf8_is_said(meteora, world) -> None:
    ran = meteora("trace", "--prompt", "caf\udce9?", "--checkpoint", world.checkpoint, "--max-new-tokens", "2", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["message"] == "caf\N{REPLACEMENT CHARACTER}?"
    assert "--prompt is not UTF-8 at byte 4" in ran.err


@pytest.mark.parametrize(("name", "start"), [("x.png", b"\x89PNG"), ("x.svg", b"<svg"), ("sub/x.json", b"{")])
def test_other_formats(meteora, world, tmp_path, name, start) -> None:
    ran = meteora("trace", "--prompt", "Hi", "--checkpoint", world.checkpoint, "--max-new-tokens", "2", "--out", name)
    assert ran.code == 0, ran.err
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_file_and_a_row_of_a_task(meteora, world, tmp_path) -> None:
    (tmp_path / "question.txt").write_text("What is it?\n", encoding="utf-8")
    folder = tmp_path / "datasets" / "mine"
    folder.mkdir(parents=True)
    rows = [{"prompt": f"[INST] What is it{mark} [/INST]\n", "response": "x"} for mark in (".", "?")]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--checkpoint", world.checkpoint, "--max-new-tokens", "3", "--json")
    from_file = meteora("trace", "--file", "question.txt", *common).json
    from_row = meteora("trace", "--task", "mine", "--row", "1", *common).json
    assert from_file["prompt_ids"] == from_row["prompt_ids"]
    assert from_file["routes"] == from_row["routes"]
    assert not (tmp_path / "trace.html").exists()
    outside = meteora("trace", "--task", "mine", "--row", "2", *common)
    assert outside.code == 2
    assert "choose --row from 0 to 1" in outside.err


def test_a_prompt_in_its_frame_is_not_framed_again(meteora, world) -> None:
    common = ("--checkpoint", world.checkpoint, "--max-new-tokens", "1", "--json")
    plain, framed = (meteora("trace", "--prompt", prompt, *common).json for prompt in ("Is the sky blue?", "[INST] Is the sky blue? [/INST]"))
    assert plain["prompt_ids"] == framed["prompt_ids"]
    assert plain["notice"] is None
    assert framed["notice"] == "the message already contains [INST] … [/INST], so the template is not applied again"


def test_rows_of_the_quickstart_are_named(meteora, world, tmp_path) -> None:
    write_jsonl(tmp_path / "runs" / "starter" / "datasets" / "strategyqa" / "test.jsonl", [{"prompt": "a", "response": "b"}])
    ran = meteora("trace", "--task", "strategyqa", "--checkpoint", world.checkpoint)
    assert ran.code == 1
    assert "set `METEORA_PATHS__DATA=runs/starter/datasets`, where the quickstart has them, or run `meteora data build --task strategyqa`" in ran.err


def test_forced_and_single_adapters(meteora, world, tmp_path) -> None:
    forced = meteora("trace", "--prompt", "Hi", "--checkpoint", world.checkpoint, "--adapter", "beta", "--max-new-tokens", "2", "--json").json
    assert {token["adapter"] for token in forced["routes"]["tokens"]} == {"beta"}
    single = meteora("trace", "--prompt", "Hi", "--adapter", world.adapters / "beta", "--template", "inst", "--max-new-tokens", "2", "--json").json
    assert single["ids"] == forced["ids"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "exactly one of --prompt, --file and --task"),
        (("--prompt", "a", "--task", "b"), 2, "exactly one"),
        (("--prompt", "a", "--out", "x.gif"), 2, "cannot tell the format of x.gif"),
        (("--prompt", " "), 2, "the message is empty"),
        (("--file", "none.txt"), 1, "no such file: none.txt"),
        (("--file", "latin.txt"), 1, "not UTF-8 text (byte 4)"),
        (("--task", "gsm8k"), 1, "no test rows of gsm8k"),
        (("--prompt", "a", "--out", "latin.txt/x.html"), 1, "cannot write"),
    ],
)
def test_bad_input(meteora, world, tmp_path, arguments, code, message) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    ran = meteora("trace", "--checkpoint", world.checkpoint, "--max-new-tokens", "1", *arguments)
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert message in ran.err
    assert not list(Path.cwd().glob("*.html"))


def test_a_base_model_has_no_routes(meteora, world) -> None:
    ran = meteora("trace", "--base", world.base, "--prompt", "Hi")
    assert ran.code == 2
    assert "base model alone" in ran.err

"""Conversations: turns, tools, histories, and the base model's chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meteora_core.data.formats.conversations import conversation
from meteora_core.data.formats.own import extract_own
from meteora_core.data.formats.reading import Reading
from meteora_core.data.frames import Frame
from meteora_core.data.rows import Row
from meteora_core.data.tasks import Files, Task
from meteora_core.errors import UsageError
from support.tiny_training import letters

CHATML = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def chatty(template: str | None = CHATML) -> Any:
    tokenizer = letters()
    tokenizer.chat_template = template
    return tokenizer


def rows_of(folder: Path, records: list[Any], template: str | None = None, tokenizer: Any = None) -> tuple[list[Row], Frame | None]:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    reading = Reading(template=template, tokenizer=None if tokenizer is None else lambda: tokenizer)
    extract = extract_own(Task("mine", None, "exact", Files(path, path, reading)))
    return list(extract.rows("train")), extract.frame


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


TURNS = messages(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you"))


def test_the_chat_template_lays_out_all_turns(tmp_path: Path) -> None:
    rows, frame = rows_of(tmp_path, [{"messages": TURNS}], tokenizer=chatty())
    assert rows == [Row("<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n", "See you")]
    assert frame == Frame("<|system|>\nBe brief.<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n", chat=True, system="Be brief.")


def test_rows_equal_the_tokenizers_own_rendering(tmp_path: Path) -> None:
    tokenizer = chatty()
    talks = [TURNS, TURNS[1:], messages(("user", "a  b"), ("assistant", " c "))]
    rows, _ = rows_of(tmp_path, [{"messages": talk} for talk in talks], tokenizer=tokenizer)
    for row, talk in zip(rows, talks, strict=True):
        assert tokenizer.apply_chat_template(talk, tokenize=False) == row.prompt + row.response + "<|end|>\n"


def test_a_text_frame_puts_the_end_token_after_earlier_answers(tmp_path: Path) -> None:
    rows, frame = rows_of(tmp_path, [{"messages": TURNS}], "Q: {}\nA:", chatty())
    assert rows == [Row("Q: Be brief.\n\nHi\nA:Hello</s>Q: Bye\nA:", "See you")]
    assert frame == Frame("Q: ", "\nA:", system="Be brief.")
    with pytest.raises(UsageError, match="need the base model's end token"):
        rows_of(tmp_path, [{"messages": TURNS}], "Q: {}\nA:")


def test_questions_go_into_the_chat_template_and_inst_is_the_fallback(tmp_path: Path) -> None:
    record = {"question": "Why?", "answer": "So."}
    assert rows_of(tmp_path, [record], tokenizer=chatty())[0] == [Row("<|user|>\nWhy?<|end|>\n<|assistant|>\n", "So.")]
    assert rows_of(tmp_path, [record], tokenizer=chatty(None))[0] == [Row("[INST] Why? [/INST]\n", "So.")]
    with pytest.raises(UsageError, match="has no chat template"):
        rows_of(tmp_path, [record], "chat", chatty(None))
    with pytest.raises(UsageError, match="leaves out the user's message"):
        rows_of(tmp_path, [record], tokenizer=chatty("always the same"))


def test_a_template_without_a_system_role_and_with_a_bos_token(tmp_path: Path) -> None:
    tokenizer = letters(bos=True)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}({{ m['content'] }}){% endfor %}"
    )
    rows, frame = rows_of(tmp_path, [{"messages": TURNS}], tokenizer=tokenizer)
    assert rows == [Row("(Be brief.\n\nHi)(Hello)(Bye)", "See you")]
    assert frame == Frame("(Be brief.\n\n", ")", chat=True, system="Be brief.")


def test_the_end_token_of_a_chat_template_that_is_not_the_end_of_sequence() -> None:
    from meteora_core.data.frames import chat_frame

    tokenizer = chatty()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    assert chat_frame(tokenizer).end == "<|end|>"
    assert chat_frame(chatty(CHATML.replace("<|end|>", "</s>"))).end is None


def test_conversational_prompt_and_completion(tmp_path: Path) -> None:
    record = {"prompt": messages(("user", "Hi")), "completion": messages(("assistant", "Hello"))}
    assert rows_of(tmp_path, [record], tokenizer=chatty())[0] == [Row("<|user|>\nHi<|end|>\n<|assistant|>\n", "Hello")]
    plain = {"prompt": messages(("user", "Hi")), "completion": "Hello"}
    assert rows_of(tmp_path, [plain], "raw")[0] == [Row("Hi", "Hello")]


def test_alpaca_with_history_and_system(tmp_path: Path) -> None:
    record = {"instruction": "And 3?", "input": "", "output": "9", "system": "Square it.", "history": [["2?", "4"]]}
    rows, _ = rows_of(tmp_path, [record], "Q: {}\nA:", chatty())
    assert rows == [Row("Q: Square it.\n\n2?\nA:4</s>Q: And 3?\nA:", "9")]


def test_tools_are_kept_as_text() -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": None}}]
    talk = conversation(
        [
            {"role": "user", "content": "1 + 2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
        tools=tools,
    )
    assert talk.system == 'Tools:\n[{"type": "function", "function": {"name": "add"}}]'
    assert talk.messages == (
        ("user", "1 + 2?"),
        ("assistant", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'),
        ("user", "<tool_response>\n3\n</tool_response>"),
    )
    assert talk.response == "It is 3."
    assert conversation(json.dumps(TURNS), tools=json.dumps(tools)).system == f"Be brief.\n\n{talk.system}"
    share = [
        {"from": "human", "value": "1 + 2?"},
        {"from": "function_call", "value": "add"},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3"},
    ]
    assert conversation(share).messages[1:] == (("assistant", "<tool_call>\nadd\n</tool_call>"), ("user", "<tool_response>\n3\n</tool_response>"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (messages(("user", "a"), ("user", "b"), ("assistant", "c")), ("a\n\nb", "c")),
        (messages(("user", "a"), ("assistant", "c"), ("user", "left out")), ("a", "c")),
        ({"role": ["human", "gpt"], "content": ["a", "c"]}, ("a", "c")),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"role": "assistant", "content": "c"}], ("ab", "c")),
    ],
)
def test_odd_conversations(value: Any, expected: tuple[str, str]) -> None:
    talk = conversation(value)
    assert (talk.messages[0][1], talk.response) == expected


@pytest.mark.parametrize("value", [7, "no json", {"role": ["user"], "content": []}, [7], [{"role": "assistant", "tool_calls": [{}]}]])
def test_what_is_no_conversation(value: Any) -> None:
    with pytest.raises(ValueError):
        conversation(value)

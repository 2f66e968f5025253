"""Tokenisation of prompt templates, and cuts of conversations that are too long."""

from __future__ import annotations

import pytest

from meteora_core.chat.prompts import Turn, encode, fit
from meteora_core.data.frames import INST, RAW, Frame
from meteora_core.data.rows import Row
from meteora_core.errors import UsageError
from meteora_core.training.encoding import encode_rows
from support.chat_world import CHAT_TEMPLATE, byte_tokenizer

TOKENIZER = byte_tokenizer()
CHAT = Frame(chat=True)
ONE = tuple(TOKENIZER("one")["input_ids"])
TURNS = [Turn("first?", "one", ONE), Turn("second?")]


def shown(encoded) -> str:
    return TOKENIZER.decode(encoded.ids)


def test_inst_is_what_training_rows_look_like() -> None:
    encoded = encode(TOKENIZER, INST, None, [Turn("How many?")])
    row = encode_rows([Row("[INST] How many? [/INST]\n", "Four")], TOKENIZER, 0, 512).rows[0]
    assert tuple(encoded.ids) == row.tokens[: row.response_start]
    assert set(encoded.roles) == {"prompt"}


def test_inst_with_earlier_turns() -> None:
    encoded = encode(TOKENIZER, INST, "Be brief.", TURNS)
    assert shown(encoded) == "[INST] Be brief.\n\nfirst? [/INST]\none</s>[INST] second? [/INST]\n"
    answer = [token for token, role in zip(encoded.ids, encoded.roles, strict=True) if role == "answer"]
    assert answer == list(ONE)
    assert TOKENIZER.decode(encoded.ids[encoded.last_start :]) == "[INST] second? [/INST]\n"


def test_a_bos_stands_before_every_row_as_in_training() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.decode(encode(tokenizer, INST, None, TURNS).ids).count("<s>") == 2
    assert tokenizer.decode(encode(tokenizer, RAW, None, TURNS).ids) == "<s>first?onesecond?"
    assert tokenizer.decode(encode(tokenizer, CHAT, None, TURNS).ids).count("<s>") == 0


def test_raw_is_the_text_itself() -> None:
    assert shown(encode(TOKENIZER, RAW, None, TURNS)) == "first?onesecond?"
    assert shown(encode(TOKENIZER, RAW, "Head.", [Turn("x")])) == "Head.\n\nx"


def test_chat_is_the_models_template_and_keeps_the_generated_tokens() -> None:
    encoded = encode(TOKENIZER, CHAT, "Sys", TURNS)
    assert shown(encoded) == "<|system|>Sys</s><|user|>first?</s><|assistant|>one</s><|user|>second?</s><|assistant|>"
    assert [token for token, role in zip(encoded.ids, encoded.roles, strict=True) if role == "answer"] == list(ONE)
    assert TOKENIZER.decode(encoded.ids[encoded.last_start :]) == "</s><|user|>second?</s><|assistant|>"
    loaded = encode(TOKENIZER, CHAT, "Sys", [Turn("first?", "one"), Turn("second?")])
    assert loaded.ids == encode(TOKENIZER, CHAT, "Sys", TURNS).ids


def test_a_later_turn_begins_with_the_tokens_of_the_turn_before() -> None:
    for template in (INST, CHAT, RAW):
        before = encode(TOKENIZER, template, "Sys", TURNS[:1])
        after = encode(TOKENIZER, template, "Sys", TURNS)
        assert after.ids[: len(before.ids) + 3] == [*before.ids, *ONE]


def test_a_template_that_strips_or_rewrites_answers() -> None:
    stripping = byte_tokenizer(CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    encoded = encode(stripping, CHAT, None, [Turn("a", " b ", (5, 6, 7)), Turn("c")])
    assert [token for token, role in zip(encoded.ids, encoded.roles, strict=True) if role == "answer"] == [5, 6, 7]
    rewriting = byte_tokenizer(CHAT_TEMPLATE.replace("message['content']", "message['content'] | replace('thought ', '')"))
    encoded = encode(rewriting, CHAT, None, [Turn("a", "thought b", (5, 6, 7)), Turn("c")])
    assert rewriting.decode(encoded.ids) == "<|user|>a</s><|assistant|>b</s><|user|>c</s><|assistant|>"
    assert set(encoded.roles) == {"prompt"}


def test_a_template_without_a_system_role_gets_it_in_the_first_message() -> None:
    refusing = byte_tokenizer("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE)
    assert refusing.decode(encode(refusing, CHAT, "Sys", [Turn("a")]).ids) == "<|user|>Sys\n\na</s><|assistant|>"
    always = byte_tokenizer("{{ raise_exception('nothing at all') }}")
    with pytest.raises(UsageError, match="nothing at all"):
        encode(always, CHAT, None, [Turn("a")])


def test_nothing_to_answer() -> None:
    with pytest.raises(UsageError, match="nothing to answer"):
        encode(TOKENIZER, INST, None, [])


def test_turns_in_a_frame_of_ones_own() -> None:
    frame = Frame("Q: ", "\nA:")
    assert TOKENIZER.decode(encode(TOKENIZER, frame, "Sys", TURNS).ids) == "Q: Sys\n\nfirst?\nA:one</s>Q: second?\nA:"
    assert TOKENIZER.decode(encode(TOKENIZER, Frame("Q: ", "", system="Own"), None, TURNS[:1]).ids) == "Q: Own\n\nfirst?"
    ended = encode(TOKENIZER, Frame("Q: ", "\nA:", end="<s>"), None, TURNS)
    assert TOKENIZER.decode(ended.ids) == "Q: first?\nA:one<s>Q: second?\nA:"


def test_what_fits_is_left_alone() -> None:
    encoded = fit(TOKENIZER, INST, None, TURNS, 512, 64)
    assert (encoded.notice, encoded.first_turn) == (None, 0)
    assert encoded.ids == encode(TOKENIZER, INST, None, TURNS).ids
    assert fit(TOKENIZER, INST, None, [Turn("x" * 9000)], None, 64).notice is None


def test_the_oldest_turns_go_first_and_it_is_said() -> None:
    turns = [*(Turn("q" * 30, "a" * 30, (100,) * 30) for _ in range(5)), Turn("last")]
    encoded = fit(TOKENIZER, RAW, None, turns, 256, 56)
    assert len(encoded.ids) <= 150
    assert encoded.first_turn == 3
    assert encoded.notice == "the conversation is 304 tokens, and the model's context of 256 leaves 200 for it: the oldest 3 turns (180 tokens) are left out"
    assert TOKENIZER.decode(encoded.ids).endswith("last")
    later = fit(TOKENIZER, RAW, None, turns, 256, 56, first_turn=3)
    assert (later.notice, later.first_turn) == (None, 3)


def test_a_message_that_is_too_long_loses_its_start_and_it_is_said() -> None:
    text = "".join(f"{number:05d}." for number in range(200))
    encoded = fit(TOKENIZER, INST, None, [Turn("old", "answer"), Turn(text)], 256, 56)
    decoded = TOKENIZER.decode(encoded.ids)
    assert len(encoded.ids) == 200
    assert decoded.startswith("[INST] ")
    assert decoded.endswith("00199. [/INST]\n")
    assert encoded.first_turn == 1
    assert encoded.notice.endswith(": the first 1016 of the last message's 1216 tokens and the earlier turn are left out")


def test_a_cut_inside_a_character_drops_its_rest() -> None:
    encoded = fit(TOKENIZER, RAW, None, [Turn("é" * 200)], 128, 29)
    assert len(encoded.ids) == 98
    assert TOKENIZER.decode(encoded.ids) == "é" * 49


def test_room_for_the_answer_takes_a_quarter_at_most() -> None:
    encoded = fit(TOKENIZER, RAW, None, [Turn("x" * 900)], 400, 5000)
    assert len(encoded.ids) == 300


def test_a_system_text_that_fills_the_context() -> None:
    with pytest.raises(UsageError, match="system text alone is longer than the 96 tokens"):
        fit(TOKENIZER, CHAT, "s" * 300, [Turn("x" * 50)], 128, 64)

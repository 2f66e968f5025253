"""Prompt frames: their notation, and their detection in prompts."""

from __future__ import annotations

import pytest

from meteora_core.data.frames import INST, RAW, Frame, FrameModel, common_frame, default_frame, parse_frame, pick_frame, typed, usable
from meteora_core.errors import UsageError


@pytest.mark.parametrize(
    ("frame", "asks"),
    [
        ("[INST] {} [/INST]\n", ["q0", "q1"]),
        ("### Instruction:\n{}\n\n### Response:\n", ["Write in capital letters: doctor candle", "Write in capital letters: purple spider"]),
        ("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", ["Say a.", "Say b."]),
        ("<|user|>{}<|assistant|>", ["Say a", "Say b"]),
        ("Q: {}\nA:", ["Is it red?", "Who won?"]),
        ("USER: {}\nASSISTANT:", ["Hi there", "Bye there"]),
        ("Below is an instruction.\n\n### Instruction:\n{}\n### Response:", ["a b", "c d"]),
        ("{}", ["one thing", "another thing"]),
    ],
)
def test_the_common_frame_of_prompts(frame: str, asks: list[str]) -> None:
    assert common_frame(frame.replace("{}", ask) for ask in asks).text == frame


def test_too_few_prompts_have_no_frame() -> None:
    assert common_frame([]) == common_frame(["### Instruction:\na\n"]) == RAW
    assert common_frame(["[INST] a [/INST]\n"]) == INST


def test_start_and_end_do_not_overlap() -> None:
    assert common_frame(["a\n\nb", "a\nb"]).text in ("a\n{}b", "a\n{}")


def test_messages_go_in_and_come_out() -> None:
    for frame in (INST, RAW, Frame("### {}", "\n"), Frame("a", " b")):
        assert frame.inside(frame.around("x y")) == "x y"
    assert INST.inside("[INST] x [/INST]") == "x"
    assert INST.inside("x") is None


@pytest.mark.parametrize(("frame", "name"), [(INST, "inst"), (RAW, "raw"), (Frame("<", ">", chat=True), "chat"), (Frame("<", ">"), "<{}>")])
def test_names_and_json(frame: Frame, name: str) -> None:
    assert frame.name == name
    assert FrameModel.model_validate(frame.to_json()).to_frame() == frame


def test_frames_that_are_typed() -> None:
    assert parse_frame(typed(r"Q: {}\nA:\t")) == Frame("Q: ", "\nA:\t")
    for text in ("nothing", "{} {}"):
        with pytest.raises(UsageError, match=r"\{\}"):
            parse_frame(text)


def test_which_frame_is_meant() -> None:
    from support.tiny_training import letters

    bare, chatty = letters(), letters()
    chatty.chat_template = "<{{ messages[0]['content'] }}>"
    assert pick_frame("auto", INST, bare) == pick_frame("inst", RAW, bare) == INST
    assert pick_frame("raw", INST, bare) == RAW
    assert pick_frame("Q: {}", INST, bare) == Frame("Q: ")
    assert pick_frame("chat", INST, chatty) == Frame("<", ">", chat=True)
    with pytest.raises(UsageError, match="no chat template"):
        pick_frame("chat", INST, bare)
    with pytest.raises(UsageError, match="unknown template 'x'"):
        pick_frame("x", INST, bare)
    assert default_frame(["gsm8k", "alpaca"], chatty) == default_frame(["mine"], bare) == INST
    assert default_frame(["gsm8k", "mine"], chatty) == default_frame((), chatty) == Frame("<", ">", chat=True)
    assert default_frame((), bare) == RAW


def test_a_chat_template_of_another_tokenizer_is_a_text() -> None:
    from support.tiny_training import letters

    chatty = letters()
    chatty.chat_template = "<{{ messages[0]['content'] }}>"
    assert usable(Frame("<", ">", chat=True), chatty).chat
    for tokenizer, frame in ((letters(), Frame("<", ">", chat=True)), (chatty, Frame("(", ")", chat=True))):
        assert usable(frame, tokenizer) == Frame(frame.before, frame.after)

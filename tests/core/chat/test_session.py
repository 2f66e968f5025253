"""A conversation: turns, modes, files, pictures and comparisons."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from meteora_core.chat.chat_model import ChatModel, load_chat_model
from meteora_core.chat.options import OPTIONS, check_option, options_for
from meteora_core.chat.prompts import Encoded
from meteora_core.chat.session import ChatSession, Mode, routing_mode
from meteora_core.data.frames import Frame
from meteora_core.errors import AdapterError, CheckpointError, DataError, UsageError
from meteora_core.generation.requests import Finished, Reading, Written
from meteora_core.generation.sampling import Sampling
from meteora_core.model.base import BaseReference
from meteora_core.settings import Settings, load_settings
from meteora_core.starter import usual_checkpoint
from support.chat_world import NAMES, byte_llama, byte_tokenizer, open_chat_model, without_ends


@pytest.fixture
def session(speaker) -> ChatSession:
    return ChatSession(speaker, Sampling(max_new_tokens=10))


def ask(session: ChatSession, message: str, **options) -> Finished:
    return list(session.ask(message, **options))[-1]


def test_turns_are_kept_and_reuse_the_cache(session) -> None:
    first = ask(session, "One?")
    second = ask(session, "Two?")
    assert [turn.message for turn in session.turns] == ["One?", "Two?"]
    assert [turn.answer for turn in session.turns] == [first.text, second.text]
    assert not session.turns[0].complete
    assert second.reused == first.prompt_tokens + 9
    session.new()
    assert session.turns == []
    assert ask(session, "One?").ids == first.ids


def test_the_second_turns_reading_does_not_grow_with_the_first_turn(session) -> None:
    read = []
    for length in (10, 100, 300):
        session.new()
        ask(session, "x" * length)
        read.append(next(event.total for event in session.ask("Two?") if isinstance(event, Reading)))
    assert len(set(read)) == 1


def test_a_stopped_answer_is_kept_and_an_empty_one_forgotten(session) -> None:
    written: list[Written] = []
    for event in session.ask("One?", stop=lambda: len(written) == 3):
        if isinstance(event, Written):
            written.append(event)
    assert (event.reason, len(session.turns[0].ids)) == ("stopped", 3)
    assert ask(session, "Two?", stop=lambda: True).reason == "stopped"
    assert len(session.turns) == 1
    assert len(ask(session, "Two?").ids) == 10


def test_a_message_in_its_frame_is_not_framed_again(session) -> None:
    first, *_ = session.ask("Hello there")
    session.new()
    ask(session, "[INST] Hello there [/INST]\n")
    assert session.turns[0].message == "Hello there"
    assert session._last[0].ids == first.ids
    assert first.notice is None
    assert "not applied again" in session._last[0].notice
    for other in ("[INST] a [/INST] and more", "[INST] a [/INST] b [INST] c [/INST]", "[INST] [/INST]"):
        session.new()
        assert next(session.ask(other)).notice is None
    raw = ChatSession(session.chat_model, template="raw")
    assert next(raw.ask("[INST] Hello [/INST]\n")).notice is None


def test_empty_messages_are_refused(session) -> None:
    with pytest.raises(UsageError, match="empty"):
        ask(session, "  \n ")
    assert session.turns == []


def test_forced_muted_and_gates_are_those_of_the_model(session) -> None:
    ids = torch.tensor([next(event for event in session.ask("Hello") if isinstance(event, Encoded)).ids])
    model, state = session.chat_model.model, session.chat_model.routing

    def expected() -> list[int]:
        return model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :].tolist()

    def answer() -> list[int]:
        session.turns = []
        return list(ask(session, "Hello").ids)

    gates = expected()
    assert answer() == gates
    session.use("gamma")
    with state.force("gamma"):
        assert answer() == expected() != gates
    session.use(None)
    assert session.mute("alpha")
    state.mute(["alpha"])
    muted = expected()
    state.mute([])
    assert answer() == muted != gates
    assert not session.mute("alpha")
    session.set("top-k", "1")
    session.set("T", "7.5")
    state.top_k = 1
    narrow = expected()
    state.top_k = 2
    assert answer() == narrow != gates
    assert (state.top_k, state.temperature, state.routing.allowed, state.mode.forced) == (2, 1.0, None, None)


def test_names_are_checked(session) -> None:
    with pytest.raises(UsageError, match="no adapter named 'gama'") as raised:
        session.use("gama")
    assert raised.value.hint == "did you mean 'gamma'?"
    with pytest.raises(UsageError, match="no adapter named"):
        session.mute("x")
    session.mute("alpha")
    session.mute("beta")
    with pytest.raises(UsageError, match="gamma is the last adapter"):
        session.mute("gamma")
    assert session.mode.describe() == "gates: top 2, T 1, without alpha, beta"


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("temperature", "-1", "it must be a number from 0 to 5"),
        ("temperature", "nan", "it must be a number from 0 to 5"),
        ("temperature", "hot", "it must be a number from 0 to 5"),
        ("top-p", "0", "it must be a number above 0 and up to 1"),
        ("top-p", "1.5", "it must be a number above 0 and up to 1"),
        ("seed", "1.5", "it must be a whole number from 0 to 4294967295"),
        ("max-new-tokens", "0", "it must be a whole number from 1"),
        ("T", "0", "it must be a number from 1.18e-38 to 1000"),
        ("T", "inf", "it must be a number from 1.18e-38 to 1000"),
        ("top-k", "4", "it must be a whole number from 1 to 3"),
        ("tempratur", "1", "did you mean 'temperature'?"),
    ],
)
def test_settings_out_of_range_name_the_range(session, name, value, hint) -> None:
    before = session.values()
    with pytest.raises(UsageError) as raised:
        session.set(name, value)
    assert raised.value.hint == hint
    assert session.values() == before


def test_settings_in_range_take_effect(session) -> None:
    for name, value in {"max-new-tokens": 3, "temperature": 0.5, "top-p": 0.9, "seed": 7, "T": 20.0, "top-k": 3}.items():
        session.set(name, str(value))
        assert session.values()[name] == value
    assert len(ask(session, "Hello").ids) == 3
    assert set(session.values()) == {option.name for option in OPTIONS}
    assert session.about()["routing"] == "gates: top 3, T 20"


def test_a_bare_base_has_no_gates(world) -> None:
    model = byte_llama()
    without_ends(model)
    session = ChatSession(ChatModel("base", "tiny", model, byte_tokenizer(), BaseReference("tiny")), Sampling(max_new_tokens=5))
    assert session.template == "chat"
    assert set(session.values()) == {"max-new-tokens", "temperature", "top-p", "seed"}
    assert set(options_for(0)) == set(session.values())
    assert len(ask(session, "Hello", record=True).ids) == 5
    for call in (lambda: session.use(None), lambda: session.mute("alpha"), session.picture, lambda: next(session.compare())):
        with pytest.raises(UsageError, match="base model alone"):
            call()
    with pytest.raises(UsageError, match="is a setting of the gates"):
        check_option("T", "1", options_for(0))
    assert session.mode.describe() == "base model"


def test_the_start_takes_top_k_and_temperature(speaker) -> None:
    session = ChatSession(speaker, top_k=1, routing_temperature=4.0)
    assert session.mode == Mode(1, 4.0)
    with pytest.raises(UsageError):
        ChatSession(speaker, top_k=9)


def test_a_saved_conversation_comes_back(session, tmp_path) -> None:
    session.set_system("Be brief.")
    first, second = ask(session, "One?"), ask(session, "Two\nlines?")
    path = tmp_path / "talk.jsonl"
    assert session.save(path) == 2
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"prompt": "[INST] Be brief.\n\nOne? [/INST]\n", "response": first.text},
        {"prompt": "[INST] Two\nlines? [/INST]\n", "response": second.text},
    ]
    before = list(session.turns)
    session.new()
    assert session.load(path) == 2
    assert [(turn.message, turn.answer) for turn in session.turns] == [(turn.message, turn.answer) for turn in before]
    assert session.picture().tokens[-1].role == "answer"
    ask(session, "Three?")
    assert len(session.turns) == 3


def test_saved_rows_are_read_by_training(session, tmp_path) -> None:
    from meteora_core.data.rows import read_rows
    from meteora_core.training.encoding import encode_rows

    ask(session, "One?")
    session.save(tmp_path / "mine" / "train.jsonl")
    rows = read_rows(tmp_path, "mine", "train")
    assert encode_rows(rows, session.chat_model.tokenizer, 0, 512).rows[0].gate_labels[0] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "response": "b"}\n{oops}\n', "talk.jsonl:2:2 is not valid JSON"),
        ('{"prompt": "a"}\n', "talk.jsonl:1 has no field 'response'"),
        ('{"prompt": "a", "response": 5}\n', "row 1: 'response' is not a text"),
        ("\n", "has no rows"),
    ],
)
def test_a_broken_file_leaves_the_conversation(session, tmp_path, content, message) -> None:
    ask(session, "One?")
    (tmp_path / "talk.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        session.load(tmp_path / "talk.jsonl")
    assert len(session.turns) == 1
    with pytest.raises(DataError, match="no such file"):
        session.load(tmp_path / "none.jsonl")


def test_saving_nothing_is_refused(session, tmp_path) -> None:
    with pytest.raises(UsageError, match="nothing to save"):
        session.save(tmp_path / "talk.jsonl")


def test_the_picture_is_the_one_that_was_recorded(session) -> None:
    ask(session, "One?")
    session.use("beta")
    events = list(session.ask("Two?", record=True))
    session.use(None)
    picture = session.picture(last_turn=True)
    assert "".join(token.text for token in picture.tokens if token.role == "prompt") == "</s>[INST] Two? [/INST]\n"[4:]
    assert picture.total().tolist() == [0.0, 1.0, 0.0]
    recorded = torch.cat([event.routes[0] for event in events if isinstance(event, Reading | Written)])
    # Because of another adapter, the earlier turn was read again before this turn.
    assert recorded.shape[0] == len(session.picture().tokens)
    assert torch.equal(recorded[-len(picture.tokens) :], picture.indices)
    whole = session.picture()
    assert [token.role for token in whole.tokens if token.text == "O"] == ["prompt"]
    assert whole.about["routing"] == "forced: beta"


def test_there_is_no_picture_before_an_answer(session) -> None:
    with pytest.raises(UsageError, match="no answer yet"):
        session.picture()


def test_three_answers_to_one_message(session) -> None:
    ask(session, "One?")
    events = list(session.compare(adapter="beta", message="Two?"))
    finished = {event.label: event.event for event in events if isinstance(event.event, Finished)}
    assert list(finished) == ["base (chat)", "adapter beta (inst)", "MeteoRA (inst)"]
    assert len(session.turns) == 1
    assert ask(session, "Two?").ids == finished["MeteoRA (inst)"].ids
    session.use("beta")
    session.turns.pop()
    assert ask(session, "Two?").ids == finished["adapter beta (inst)"].ids
    again = {event.label for event in session.compare()}
    assert again == set(finished)
    base = ChatSession(ChatModel("base", "", byte_llama(), byte_tokenizer(), BaseReference("")), Sampling(max_new_tokens=10))
    without_ends(base.chat_model.model)
    base.turns = session.turns[:1]
    assert ask(base, "Two?").ids == finished["base (chat)"].ids


def test_a_comparison_asks_the_adapter_that_spoke_most(session) -> None:
    with pytest.raises(UsageError, match="nothing to compare"):
        next(session.compare())
    ask(session, "One?")
    most = NAMES[int(session.picture(last_turn=True).total("answer").argmax())]
    labels = {event.label for event in session.compare()}
    assert f"adapter {most} (inst)" in labels
    columns = set()
    for event in session.compare(stop=lambda: bool(columns)):
        columns.add(event.column)
    assert columns == {0}


def test_a_long_conversation_drops_turns_once(session) -> None:
    notices = []
    for number in range(6):
        encoded = next(event for event in session.ask(f"{number}" * 120) if isinstance(event, Encoded))
        list_of = list(session.ask(f"{number}" * 120))
        notices += [encoded.notice, list_of[0].notice]
    assert any(notice and "left out" in notice for notice in notices)
    assert session._first_turn > 0
    assert session.picture().tokens[0].role == "prompt"


def test_routing_mode_puts_everything_back_after_an_error(speaker) -> None:
    state = speaker.routing
    before = (state.routing, state.mode.forced, state.mode.enabled)

    def fail() -> None:
        with routing_mode(state, Mode(1, 3.0, None, frozenset({"alpha"}), enabled=False)):
            assert not state.mode.enabled
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (state.routing, state.mode.forced, state.mode.enabled) == before


def settings_of(world, **sections) -> Settings:
    return load_settings(None, {"model": {"base": str(world.base)}, "paths": {"adapters": world.adapters, "runs": world.checkpoint.parent}, **sections})


def test_chat_models_by_flag(world, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(world)
    assert usual_checkpoint(settings.paths.runs) == world.checkpoint
    gates = load_chat_model(settings)
    assert (gates.kind, gates.adapter, gates.routing.names) == ("meteora", None, NAMES)
    base = load_chat_model(settings, base=str(world.base))
    assert (base.kind, base.routing) == ("base", None)
    for adapter in ("beta", str(world.adapters / "beta")):
        single = load_chat_model(settings, adapter=adapter)
        assert (single.kind, single.routing.names, single.adapter) == ("adapter", ("beta",), "beta")
    inside = load_chat_model(settings, checkpoint=world.checkpoint, adapter="beta")
    assert (inside.kind, inside.adapter) == ("meteora", "beta")
    ids = torch.tensor([[5, 6, 7, 8]])
    with inside.routing.force("beta"):
        torch.testing.assert_close(inside.model(ids).logits, single.model(ids).logits)
    torch.testing.assert_close(load_chat_model(settings, checkpoint=world.checkpoint, base=str(world.base)).model(ids).logits, gates.model(ids).logits)


def test_chat_models_that_do_not_exist(world, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(world)
    with pytest.raises(UsageError, match="no adapter 'bta'") as raised:
        load_chat_model(settings, adapter="bta")
    assert raised.value.hint == "did you mean 'beta'?"
    with pytest.raises(CheckpointError, match="no such folder"):
        load_chat_model(settings, checkpoint=tmp_path / "none")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError):
        load_chat_model(settings, adapter=str(tmp_path / "broken"))


def test_what_was_trained_comes_before_the_quickstarts_checkpoint(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meteora_core.starter.starter_checkpoint", lambda: None)
    assert str(usual_checkpoint(load_settings().paths.runs)) == "runs/meteora"
    (tmp_path / "runs" / "quickstart" / "meteora").mkdir(parents=True)
    assert str(usual_checkpoint(load_settings().paths.runs)) == "runs/quickstart/meteora"
    (tmp_path / "runs" / "meteora").mkdir()
    assert str(usual_checkpoint(load_settings().paths.runs)) == "runs/meteora"
    elsewhere = load_settings(None, {"paths": {"runs": tmp_path / "elsewhere"}})
    assert usual_checkpoint(elsewhere.paths.runs) == tmp_path / "elsewhere" / "meteora"


def test_the_world_is_what_it_seems(world) -> None:
    assert open_chat_model(world).routing.names == NAMES


def test_each_who_answers_has_its_own_frame(world) -> None:
    speaker = open_chat_model(world)
    state = speaker.routing
    state.adapters = tuple(replace(info, frame=frame) for info, frame in zip(state.adapters, (Frame("Q: ", "\nA:"), Frame("<", ">"), None), strict=True))
    session = ChatSession(speaker, Sampling(max_new_tokens=2))
    prompts = {}
    for name in (None, "alpha", "beta", "gamma"):
        session.new()
        session.use(name)
        prompts[name] = speaker.tokenizer.decode(next(session.ask("Hi")).ids)
    assert prompts == {None: "[INST] Hi [/INST]\n", "alpha": "Q: Hi\nA:", "beta": "<Hi>", "gamma": "[INST] Hi [/INST]\n"}
    state.provenance.frame = None
    assert ChatSession(speaker).template == "chat"
    state.adapters = tuple(replace(info, frame=Frame("<", ">")) for info in state.adapters)
    assert ChatSession(speaker).template == "<{}>"
    own = ChatSession(speaker, template="Ask: {}\nSay:")
    assert speaker.tokenizer.decode(next(own.ask("Ask: Hi\nSay:")).ids) == "Ask: Hi\nSay:"
    assert [each.label for each in ChatSession(speaker, Sampling(max_new_tokens=1)).compare(message="Hi")][:1] == ["base (chat)"]


def test_a_frames_end_token_ends_an_answer(world) -> None:
    from meteora_core.generation.limits import end_tokens

    speaker = open_chat_model(world)
    state, before = speaker.routing, end_tokens(speaker.model, speaker.tokenizer)
    state.adapters = tuple(replace(info, frame=Frame(end="<s>")) for info in state.adapters)
    assert end_tokens(speaker.model, speaker.tokenizer) == before | {1}

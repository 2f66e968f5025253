"""Chat with fused layers and with caches of fixed size: the same answers after every action of the user."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_core.chat.chat_model import load_chat_model
from meteora_core.chat.session import ChatSession
from meteora_core.errors import UsageError
from meteora_core.generation.sampling import Sampling
from meteora_core.settings import load_settings
from support.authors_files import write_authors
from support.chat_world import byte_tokenizer, without_ends
from support.plain_groups import use_plain_groups


def talk(session: ChatSession) -> list[object]:
    """Take all actions that switch adapters or record routes, one after the other, and return all answers and routes."""
    said: list[object] = []

    def ask(message: str, **options: bool) -> None:
        events = list(session.ask(message, **options))
        said.append(events[-1].ids)
        if options:
            said.append([event.routes[0].tolist() for event in events if getattr(event, "routes", None) is not None])

    ask("One?")
    ask("Two?")
    ask("Three?", record=True)
    ask("Four?")
    said.append([(compared.label, compared.event.ids) for compared in session.compare(adapter="beta") if hasattr(compared.event, "reason")])
    session.use("gamma")
    ask("Five?")
    session.use(None)
    session.mute("alpha")
    ask("Six?")
    session.set("top-k", "1")
    ask("Seven?", record=True)
    session.mute("alpha")
    session.set("T", "9")
    session.set("top-k", "3")
    ask("Eight?")
    session.new()
    ask("One?")
    said.append(session.picture().indices.tolist())
    return said


def session_of(world, fuse: str = "off", cuda_graphs: str = "off") -> ChatSession:
    settings = load_settings(None, {"model": {"base": str(world.base), "device": "cpu"}, "paths": {"runs": world.checkpoint.parent}, "chat": {"fuse": fuse}})
    speaker = load_chat_model(settings, checkpoint=world.checkpoint)
    without_ends(speaker.model)
    return ChatSession(speaker, Sampling(max_new_tokens=4), cuda_graphs=cuda_graphs)


@pytest.mark.parametrize(("fuse", "graphs"), [("on", "off"), ("off", "on"), ("on", "on")])
def test_the_conversation_is_the_same(world, monkeypatch, fuse, graphs) -> None:
    calls = use_plain_groups(monkeypatch)
    wanted = talk(session_of(world))
    assert not calls
    assert talk(session_of(world, fuse, graphs)) == wanted
    assert set(calls) == ({1, 2, 3} if fuse == "on" else set())


def test_a_checkpoint_in_the_authors_layout_speaks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = write_authors(tmp_path, count=3, vocabulary=259)
    byte_tokenizer().save_pretrained(made.base)
    settings = load_settings(None, {"model": {"device": "cpu"}})
    speaker = load_chat_model(settings, checkpoint=made.checkpoint, base=str(made.base), adapters_dir=made.adapters)
    assert (speaker.kind, speaker.routing.names) == ("meteora", made.names)
    session = ChatSession(speaker, Sampling(max_new_tokens=4))
    prompt = next(iter(session.ask("What?"))).ids
    expected = speaker.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    finished = list(session.ask("What?"))[-1]
    assert list(finished.ids) == [token for token in expected if token != 2]
    assert load_chat_model(settings, checkpoint=made.checkpoint, base=str(made.base), adapter="adapter_1").adapter == "adapter_1"
    with pytest.raises(UsageError, match="does not name its base model") as caught:
        load_chat_model(settings, checkpoint=made.checkpoint)
    assert "--base" in (caught.value.hint or "")
    in_settings = load_settings(None, {"model": {"device": "cpu", "base": str(made.base)}})
    assert load_chat_model(in_settings, checkpoint=made.file).base.name == str(made.base)
    with pytest.raises(UsageError, match="no adapter 'task_9'"):
        load_chat_model(settings, checkpoint=made.checkpoint, base=str(made.base), adapters_dir=made.adapters, adapter="task_9")


def test_quantised_models_are_refused_without_a_gpu(world) -> None:
    settings = load_settings(None, {"model": {"device": "cpu", "quantization": "8bit"}, "paths": {"runs": world.checkpoint.parent}})
    for names in ({"checkpoint": world.checkpoint}, {"base": str(world.base)}, {"adapter": str(world.adapters / "beta")}):
        with pytest.raises(UsageError, match="an 8bit base model needs a CUDA GPU"):
            load_chat_model(settings, **names)

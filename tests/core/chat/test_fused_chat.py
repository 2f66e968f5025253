"""Chat with fused layers and with a cache of fixed size: the same words, whatever the user does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_core.chat.session import ChatSession
from meteora_core.chat.speaker import load_speaker
from meteora_core.errors import UsageError
from meteora_core.generation import fixed_cache as fixed
from meteora_core.generation.engine import Engine, Sampling
from meteora_core.settings import load_settings
from support.authors_files import write_authors
from support.chat_world import byte_tokenizer, without_ends
from support.plain_groups import use_plain_groups


def talk(session: ChatSession) -> list[object]:
    """Everything that switches adapters or records, one after the other."""
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
    speaker = load_speaker(settings, checkpoint=world.checkpoint)
    without_ends(speaker.model)
    return ChatSession(speaker, Sampling(max_new_tokens=4), cuda_graphs=cuda_graphs)


@pytest.mark.parametrize(("fuse", "graphs"), [("on", "off"), ("off", "on"), ("on", "on")])
def test_the_conversation_is_the_same(world, monkeypatch, fuse, graphs) -> None:
    calls = use_plain_groups(monkeypatch)
    wanted = talk(session_of(world))
    assert not calls
    assert talk(session_of(world, fuse, graphs)) == wanted
    assert set(calls) == ({1, 2, 3} if fuse == "on" else set())


def test_a_cache_of_fixed_size_grows_is_cut_and_survives_a_broken_pass(world, monkeypatch) -> None:
    monkeypatch.setattr(fixed, "LEAST", 8)
    speaker = load_speaker(load_settings(None, {"model": {"device": "cpu"}}), checkpoint=world.checkpoint)
    without_ends(speaker.model)
    growing, still = (Engine(speaker.model, speaker.tokenizer, graphs) for graphs in ("off", "on"))
    ids = list(range(5, 40))
    capacities = []

    def answers(prompt: list[int], **options) -> list[tuple[int, ...]]:
        made = [list(engine.generate(prompt, Sampling(max_new_tokens=40), **options))[-1] for engine in (growing, still)]
        assert made[0].reused == made[1].reused
        capacities.append(still._fixed.capacity)
        return [finished.ids for finished in made]

    first = answers(ids[:6])
    assert first[0] == first[1]
    for prompt in ([*ids[:6], *first[0], 7, 8, 9], ids[:4], ids, [*ids[:20], 9], ids[:1]):
        one, other = answers(prompt)
        assert one == other
    assert capacities == [64, 128, 128, 128, 128, 128]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = speaker.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(still.generate([*ids[:1], 9], Sampling(max_new_tokens=3)))
    handle.remove()
    growing.forget()
    one, other = answers([*ids[:1], 9, 9])
    assert one == other
    full = answers(list(range(3, 3 + 250)) * 2)
    assert full[0] == full[1]
    assert capacities[-1] == 512 == still.context


def test_models_without_a_plain_cache_keep_a_growing_one(world, caplog) -> None:
    speaker = load_speaker(load_settings(None, {"model": {"device": "cpu"}}), checkpoint=world.checkpoint)
    assert Engine(speaker.model, speaker.tokenizer)._fixed is None
    speaker.model.set_attn_implementation("eager")
    assert Engine(speaker.model, speaker.tokenizer, "on")._fixed is None
    assert "needs a growing cache" in caplog.text


def test_a_checkpoint_in_the_authors_layout_speaks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = write_authors(tmp_path, count=3, vocabulary=259)
    byte_tokenizer().save_pretrained(made.base)
    settings = load_settings(None, {"model": {"device": "cpu"}})
    speaker = load_speaker(settings, checkpoint=made.checkpoint, base=str(made.base), adapters_dir=made.adapters)
    assert (speaker.kind, speaker.routing.names) == ("meteora", made.names)
    session = ChatSession(speaker, Sampling(max_new_tokens=4))
    prompt = next(iter(session.ask("What?"))).ids
    expected = speaker.model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :].tolist()
    finished = list(session.ask("What?"))[-1]
    assert list(finished.ids) == [token for token in expected if token != 2]
    assert load_speaker(settings, checkpoint=made.checkpoint, base=str(made.base), adapter="adapter_1").adapter == "adapter_1"
    with pytest.raises(UsageError, match="does not name its base model") as caught:
        load_speaker(settings, checkpoint=made.checkpoint)
    assert "--base" in (caught.value.hint or "")
    in_settings = load_settings(None, {"model": {"device": "cpu", "base": str(made.base)}})
    assert load_speaker(in_settings, checkpoint=made.file).base.name == str(made.base)
    with pytest.raises(UsageError, match="no adapter 'task_9'"):
        load_speaker(settings, checkpoint=made.checkpoint, base=str(made.base), adapters_dir=made.adapters, adapter="task_9")


def test_quantised_speakers_are_refused_without_a_gpu(world) -> None:
    settings = load_settings(None, {"model": {"device": "cpu", "quantization": "8bit"}, "paths": {"runs": world.checkpoint.parent}})
    for names in ({"checkpoint": world.checkpoint}, {"base": str(world.base)}, {"adapter": str(world.adapters / "beta")}):
        with pytest.raises(UsageError, match="an 8bit base model needs a CUDA GPU"):
            load_speaker(settings, **names)

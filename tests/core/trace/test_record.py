"""Recording routes: with batches, caches, `generate` and compiled code; and its cost when it is off."""

from __future__ import annotations

import logging

import pytest
import torch

from meteora_core.errors import UsageError
from meteora_core.generation import engine
from meteora_core.model.attach import meteora_layers
from meteora_core.routing import is_compiled, record_routes
from meteora_core.trace.record import trace_tokens

IDS = torch.randint(3, 259, (2, 9), generator=torch.Generator().manual_seed(1))


def test_a_batch_packs_row_by_row(speaker) -> None:
    with torch.no_grad(), record_routes(speaker.model) as routes:
        speaker.model(IDS)
    for row in range(2):
        with torch.no_grad(), record_routes(speaker.model) as alone:
            speaker.model(IDS[row : row + 1])
        indices, weights = routes.packed(row)
        assert torch.equal(indices, alone.packed()[0])
        torch.testing.assert_close(weights, alone.packed()[1], rtol=1e-4, atol=1e-5)
        assert indices.shape == (9, len(routes.paths), 2)
    assert routes.paths == tuple(path for path, _ in meteora_layers(speaker.model))


def test_generate_with_a_cache_gives_the_routes_of_one_pass(speaker) -> None:
    with record_routes(speaker.model) as routes:
        made = speaker.model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    picture = trace_tokens(speaker.model, speaker.tokenizer, made[0].tolist(), ["prompt"] * made.shape[1])
    # The model never reads the last token.
    assert torch.equal(routes.packed(0)[0], picture.indices[:-1])


def test_generate_without_a_cache_reads_everything_again(speaker) -> None:
    with record_routes(speaker.model) as routes:
        speaker.model.generate(IDS[:1], max_new_tokens=3, do_sample=False, use_cache=False)
    assert [step.indices.shape[1] for step in routes.steps(routes.paths[0])] == [9, 10, 11]


def test_beams_change_the_batch_and_are_kept_step_by_step(speaker) -> None:
    with record_routes(speaker.model) as routes:
        speaker.model.generate(IDS[:1], max_new_tokens=3, num_beams=2, do_sample=False)
    assert {step.indices.shape[0] for step in routes.steps(routes.paths[0])} == {2}
    assert routes.packed(1)[0].shape[1] == len(routes.paths)


def test_forced_routes_and_gates_in_one_recording(speaker) -> None:
    state = speaker.routing
    with torch.no_grad(), record_routes(speaker.model) as routes:
        with state.force("gamma"):
            speaker.model(IDS)
        speaker.model(IDS[:, :4])
    indices, weights = routes.packed()
    assert indices.shape == weights.shape == (13, len(routes.paths), 2)
    assert torch.equal(weights[:9], torch.tensor([1.0, 0.0]).expand(9, len(routes.paths), 2))
    assert set(indices[:9, :, 0].flatten().tolist()) == {2}
    torch.testing.assert_close(weights.sum(-1), torch.ones(13, len(routes.paths)))


def test_clearing_keeps_the_order_of_layers(speaker) -> None:
    with torch.no_grad(), record_routes(speaker.model) as routes:
        assert routes.packed()[0].shape == (0, 0, 1)
        speaker.model(IDS)
        paths = routes.paths
        routes.clear()
        assert routes.paths == paths
        assert routes.packed()[0].shape == (0, len(paths), 1)
        speaker.model(IDS[:, :2])
    assert routes.packed()[0].shape[0] == 2
    routes.add(paths[0], torch.zeros(1, 1, 2, dtype=torch.long), torch.ones(1, 1, 2))
    with pytest.raises(ValueError, match="more often than others"):
        routes.packed()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_left_and_it_is_said(speaker, caplog) -> None:
    model = speaker.model
    with torch.no_grad(), record_routes(model) as plain:
        model(IDS)
    assert not caplog.records
    compiled_calls = 0

    def count(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        def call(*arguments: object) -> object:
            nonlocal compiled_calls
            compiled_calls += 1
            return module.forward(*arguments)

        return call

    compiled = torch.compile(model, backend=count)
    with torch.no_grad():
        compiled(IDS)
        assert compiled_calls > 0
        before = compiled_calls
        with caplog.at_level(logging.WARNING, "meteora_core.routing"), record_routes(compiled) as routes:
            compiled(IDS)
        assert compiled_calls == before
        assert "eager" in caplog.text
        compiled(IDS)
        assert compiled_calls > before
    assert torch.equal(routes.packed()[0], plain.packed()[0])
    torch.compiler.reset()


def test_models_that_would_be_compiled_are_known(speaker) -> None:
    assert not is_compiled(speaker.model)
    speaker.model.generation_config.cache_implementation = "static"
    assert is_compiled(speaker.model)
    with record_routes(speaker.model) as routes:
        speaker.model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert routes.packed()[0].shape[0] == 11


def test_recording_ends_with_the_block_and_may_be_nested(speaker) -> None:
    with torch.no_grad(), record_routes(speaker.model) as outer:
        speaker.model(IDS)
        with record_routes(speaker.model) as inner:
            speaker.model(IDS[:, :3])
        speaker.model(IDS[:, :2])
    speaker.model(IDS)
    assert outer.packed()[0].shape[0] == 11
    assert inner.packed()[0].shape[0] == 3
    with pytest.raises(UsageError, match="no adapters attached"), record_routes(torch.nn.Linear(2, 2)):
        pass


def test_nothing_is_called_when_nothing_is_recorded(speaker, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("the recording path ran")

    monkeypatch.setattr("meteora_core.model.layer.mix_observed", fail)
    with torch.no_grad():
        speaker.model(IDS)
    assert not speaker.routing.observed
    with pytest.raises(AssertionError, match="the recording path ran"), record_routes(speaker.model):
        speaker.model(IDS)


def test_long_texts_are_read_in_pieces(speaker, monkeypatch) -> None:
    ids, roles = IDS[0].tolist(), ["prompt"] * 6 + ["answer"] * 3
    whole = trace_tokens(speaker.model, speaker.tokenizer, ids, roles)
    monkeypatch.setattr(engine, "CHUNK", 3)
    read: list[int] = []
    pieces = trace_tokens(speaker.model, speaker.tokenizer, ids, roles, on_read=read.append)
    assert read == [3, 3, 2]
    assert torch.equal(pieces.indices, whole.indices)


def test_an_answer_token_shows_the_pass_that_wrote_it(speaker) -> None:
    ids = IDS[0].tolist()
    read = trace_tokens(speaker.model, speaker.tokenizer, ids, ["prompt"] * 9)
    mixed = trace_tokens(speaker.model, speaker.tokenizer, ids, ["prompt"] * 6 + ["answer"] * 3)
    assert torch.equal(mixed.indices, read.indices[[0, 1, 2, 3, 4, 5, 5, 6, 7]])


@pytest.mark.parametrize(("ids", "roles"), [([], []), ([5], ["answer"]), ([5, 6], ["prompt"])])
def test_what_cannot_be_traced(speaker, ids, roles) -> None:
    with pytest.raises(ValueError, match="a trace needs"):
        trace_tokens(speaker.model, speaker.tokenizer, ids, roles)

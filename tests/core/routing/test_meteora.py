"""``model.meteora``: routing values, modes for the length of a block, and what is known of the base model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from meteora_core import AdapterBank, attach, detach
from meteora_core.adapters.peft_folder import AdapterInfo
from meteora_core.checkpoints.native import base_changes, note_base_changes
from meteora_core.errors import UsageError
from meteora_core.model.base import BaseReference, loaded_by, name_reference
from meteora_core.routing import Meteora, Routes, find_meteora, meteora_of
from support.tiny_models import make_tiny_llama


@pytest.fixture
def state() -> Meteora:
    return Meteora(tuple(AdapterInfo(name, "", "", None, 4, 16.0, False, 0.0) for name in ("one", "two", "three")), 2, 1.0, "auto")


def test_an_earlier_routing_can_be_assigned_again(state) -> None:
    before = state.routing
    state.top_k, state.temperature = 1, 9.0
    state.mute(["two"])
    assert (state.routing.top_k, state.routing.temperature, state.routing.allowed.tolist()) == (1, 9.0, [True, False, True])
    state.routing = before
    assert (state.top_k, state.temperature, state.routing.allowed) == (2, 1.0, None)


def test_every_change_that_layers_must_see_has_a_version_of_its_own(state) -> None:
    versions = [state.version]

    def changed() -> bool:
        versions.append(state.version)
        return versions[-1] > versions[-2]

    state.top_k = 1
    assert changed()
    state.temperature = 2.0
    assert changed()
    state.backend = "dense"
    assert changed()
    state.mute(["one"])
    assert changed()
    for block in (state.force("two"), state.disabled(), state.record(Routes(state.names)), state.label_gates(torch.zeros(1, 3, dtype=torch.int64))):
        with block:
            assert changed()
        assert changed()


def test_blocks_that_end_in_another_order_leave_nothing_behind(state) -> None:
    """A generator may leave its block after the block around it has ended."""
    routes = Routes(state.names)
    recording, forcing, bare = state.record(routes), state.force("two"), state.disabled()
    for block in (recording, forcing, bare):
        block.__enter__()
    assert (state.mode.recorder, state.mode.forced.tolist(), state.mode.enabled, state.observed) == (routes, [1], False, True)
    for block in (recording, forcing, bare):
        block.__exit__(None, None, None)
    assert (state.mode.recorder, state.mode.forced, state.mode.enabled, state.observed) == (None, None, True, False)


def test_nested_forced_routes_return_to_the_outer_ones(state) -> None:
    with state.force("two"):
        with state.force(torch.tensor([0, 2])):
            assert state.mode.forced.tolist() == [0, 2]
        assert state.mode.forced.tolist() == [1]
    with pytest.raises(UsageError, match="no adapter named 'four'"), state.force("four"):
        pass


def test_copies_and_pickles_route_as_the_original_does(state) -> None:
    state.mute(["two"])
    state.on(state.routing.allowed, torch.device("meta"))
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert twin.routing.allowed.tolist() == [True, False, True]
        twin.mute([])
        twin.top_k = 1
        with twin.force("three"):
            assert twin.mode.forced.tolist() == [2]
    assert (state.top_k, state.routing.allowed.tolist()) == (2, [True, False, True])


def test_a_model_has_one_object_and_keeps_what_is_known_of_its_base(make_adapter) -> None:
    model = make_tiny_llama()
    assert find_meteora(model) is None
    with pytest.raises(UsageError, match="no adapters attached"):
        meteora_of(model)
    name_reference(model, BaseReference("tiny", "main"))
    attach(model, AdapterBank.from_peft({"one": make_adapter("one", 0), "two": make_adapter("two", 1)}))
    assert [name for name in vars(model) if "meteora" in name] == ["meteora"]
    assert find_meteora(model) is meteora_of(model) is model.meteora
    note_base_changes(model, ["model.norm.weight"])
    assert (loaded_by(model), base_changes(model)) == (BaseReference("tiny", "main"), ("model.norm.weight",))
    twin = copy.deepcopy(model)
    note_base_changes(twin, [])
    assert base_changes(model) == ("model.norm.weight",)
    detach(model)
    assert find_meteora(model) is None
    assert (loaded_by(model), base_changes(model)) == (BaseReference("tiny", "main"), ("model.norm.weight",))

"""All summaries of the routes, compared with figures computed by hand."""

from __future__ import annotations

import json

import pytest
import torch

from meteora_core.trace.picture import RoutePicture, Token, first_choices, layer_kind, layer_number, mean_weights, speakers

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture
def picture() -> RoutePicture:
    """Three tokens, two decoder layers with two linear layers each, three adapters, top-2."""
    indices = torch.tensor([[[0, 1], [0, 1], [1, 0], [2, 0]], [[1, 0], [1, 2], [0, 1], [0, 1]], [[2, 1], [2, 1], [2, 1], [1, 2]]])
    first = torch.tensor([[0.9, 0.8, 0.7, 0.6], [1.0, 1.0, 0.5, 0.5], [0.75, 0.75, 0.75, 0.75]])
    tokens = (Token(5, "Hi", "prompt"), Token(6, " <b>", "prompt"), Token(7, "\n", "answer"))
    return RoutePicture(tokens, ("a", "b", "c"), PATHS, indices, torch.stack([first, 1 - first], -1), {"model": "m"})


def close(actual: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_shares_and_votes(picture) -> None:
    close(picture.shares(), [[(0.9 + 0.8 + 0.3 + 0.4) / 4, (0.1 + 0.2 + 0.7) / 4, 0.6 / 4], [0.25, 0.75, 0.0], [0.0, 1.5 / 4, 2.5 / 4]])
    close(picture.votes(), [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.25, 0.75]])
    close(picture.shares([1, 3]), [[0.6, 0.1, 0.3], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])


def test_the_speaker_is_first_choice_most_often_then_by_weight(picture) -> None:
    # For token 1, two layers choose a first and two choose b; b has the larger mean weight.
    assert picture.speakers().tolist() == [0, 1, 2]
    assert picture.speakers([0, 2]).tolist() == [0, 1, 2]
    even = torch.tensor([[[1], [0]]])
    assert speakers(even, torch.ones(1, 2, 1), 3).tolist() == [0]


def test_layers_and_kinds(picture) -> None:
    assert picture.layers == (0, 1)
    assert picture.kinds == ("q", "up")
    assert picture.select(layer=1) == [2, 3]
    assert picture.select(kind="up") == [1, 3]
    assert picture.select(layer=1, kind="up") == [3]
    assert picture.select() == [0, 1, 2, 3]
    close(picture.by_layer("answer"), [[0.0, 0.25, 0.75], [0.0, 0.5, 0.5]])
    close(picture.by_kind("answer"), [[0.0, 0.25, 0.75], [0.0, 0.5, 0.5]])
    close(picture.by_kind(), [[(0.9 + 0.3 + 0.0 + 0.5) / 6, (0.1 + 0.7 + 1.0 + 0.5 + 0.5) / 6, 1.5 / 6], [0.85 / 3, 1.35 / 3, 0.8 / 3]])
    close(picture.total("answer"), [0.0, 0.375, 0.625])


@pytest.mark.parametrize(
    ("path", "number", "kind"),
    [("model.layers.12.mlp.down_proj", 12, "down"), ("transformer.h.3.attn.c_attn", 3, "c_attn"), ("lm_head", -1, "lm_head"), ("h2o.block", -1, "block")],
)
def test_names_of_layers(path, number, kind) -> None:
    assert (layer_number(path), layer_kind(path)) == (number, kind)


def test_spans_end_where_speaker_or_role_changes(picture) -> None:
    assert [(span.start, span.end, span.role, span.adapter, span.text) for span in picture.spans()] == [
        (0, 1, "prompt", 0, "Hi"),
        (1, 2, "prompt", 1, " <b>"),
        (2, 3, "answer", 2, "\n"),
    ]
    assert [span.start for span in picture.spans("answer")] == [2]
    same = RoutePicture(picture.tokens, picture.names, PATHS, torch.zeros(3, 4, 1, dtype=torch.long), torch.ones(3, 4, 1))
    assert [(span.start, span.end) for span in same.spans()] == [(0, 2), (2, 3)]
    close(same.spans()[0].shares, [1.0, 0.0, 0.0])


def test_the_end_of_a_picture(picture) -> None:
    rest = picture.since(2)
    assert rest.tokens == picture.tokens[2:]
    close(rest.shares(), picture.shares()[2:].tolist())
    assert rest.total("prompt").tolist() == [0.0, 0.0, 0.0]
    assert rest.by_layer("prompt").tolist() == [[0.0] * 3] * 2
    assert picture.since(3).spans() == []


def test_json_holds_everything(picture) -> None:
    document = json.loads(json.dumps(picture.to_json()))
    assert document["adapters"] == ["a", "b", "c"]
    assert document["paths"] == list(PATHS)
    token = document["tokens"][0]
    assert (token["id"], token["text"], token["role"], token["adapter"]) == (5, "Hi", "prompt", "a")
    assert token["layers"] == [[[0, 0.9], [1, 0.1]], [[0, 0.8], [1, 0.2]], [[1, 0.7], [0, 0.3]], [[2, 0.6], [0, 0.4]]]
    assert token["shares"] == {"a": 0.6, "b": 0.25, "c": 0.15}
    assert document["spans"][2] == {"start": 2, "end": 3, "role": "answer", "adapter": "c", "text": "\n", "shares": {"b": 0.375, "c": 0.625}}
    assert document["by_kind"]["q"] == {"b": 0.25, "c": 0.75}
    assert "layers" not in picture.to_json(layers=False)["tokens"][0]


def test_shapes_must_fit(picture) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        RoutePicture(picture.tokens[:2], picture.names, PATHS, picture.indices, picture.weights)
    assert mean_weights(torch.zeros(0, 4, 2, dtype=torch.long), torch.zeros(0, 4, 2), 3).shape == (0, 3)
    assert first_choices(torch.zeros(2, 0, 2, dtype=torch.long), 3).tolist() == [[0.0] * 3] * 2

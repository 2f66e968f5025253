"""Tests that compile a whole model into one graph, on machines whose PyTorch cannot do that for a plain model either."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from support.tiny_models import make_tiny_llama


@contextmanager
def one_graph() -> Iterator[None]:
    """A context for code that compiles a model with ``fullgraph=True``. If that fails, and for a plain model of transformers too, the test is skipped."""
    try:
        yield
    except torch._dynamo.exc.Unsupported:
        torch._dynamo.reset()
        plain = torch.compile(make_tiny_llama().eval(), backend="aot_eager", fullgraph=True)
        try:
            with torch.no_grad():
                plain(torch.tensor([[3, 4, 5]]))
        except torch._dynamo.exc.Unsupported as problem:
            pytest.skip(f"this PyTorch cannot compile a plain model of this transformers in one graph: {str(problem).splitlines()[0]}")
        raise

"""Fused groups in compiled code."""

from __future__ import annotations

import pytest
import torch

from meteora_kernels import Routing
from meteora_kernels.group import group_operator, row_for, run_group
from meteora_kernels.plan import Row
from meteora_kernels.types import Form
from support.kernel_groups import errors, members
from support.kernel_rows import taking


@pytest.mark.parametrize("pieces", [0, 2])
def test_group_operator_is_sound_for_compilers(pieces: int) -> None:
    given = members((24, 9), 17, bias=True, dtype=torch.float16)
    flat = group_operator.flat((given.x, given.group, Routing(), Form(apart=True)))
    with taking(Row("packed", pieces=pieces)):
        found = torch.library.opcheck(group_operator.op, flat, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


def test_compiled_groups_are_whole_graphs() -> None:
    """Compiled code does not read B^T in the rows of the weights, which may be stale."""
    given = members((24, 9), 20, dtype=torch.float16, has_up=True)
    given.wide.place_up(given.group.packed, torch.zeros_like(given.group.adapters.lora_B), list(given.widths))
    compiled = torch.compile(lambda x: run_group(x, given.group, Routing()), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), taking(Row("wide"), Row("split", pieces=1)):
        assert row_for(given.group, 20, 2).path == "wide"
        assert float(errors(compiled(given.x), given.exact()).max()) < 5e-3

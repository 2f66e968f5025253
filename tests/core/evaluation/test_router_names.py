"""Names of routers: parsed, refused with a hint, and expanded by seeds."""

from __future__ import annotations

import pytest

from meteora_core.data.tasks import get_task
from meteora_core.errors import UsageError
from meteora_core.evaluation.router_names import ROUTERS, SEEDED, RouterName, expand_routers, is_meteora, router_name


@pytest.mark.parametrize("text", ["router:oracle", "router:spectr:without-asked", "router:random@0", "router:closed-form:without-asked@12"])
def test_a_name_is_what_it_was_read_from(text: str) -> None:
    assert str(RouterName.parse(text)) == text
    assert router_name(text) == RouterName.parse(text)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("router:arow", "no router named 'arow'", "did you mean 'arrow'?"),
        ("router:", "no router named ''", "routers: router:oracle"),
        ("router:arrow:removed", "is not a router", "write router:arrow, "),
        ("router:arrow@x", "is not a router", "router:arrow@SEED"),
        ("router:spectr@3", "does not depend on a seed", "leave out @3"),
        ("router:oracle:without-asked", "cannot be removed", "leave out :without-asked"),
    ],
)
def test_other_names_are_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message.replace("?", r"\?")) as caught:
        RouterName.parse(text)
    assert hint in str(caught.value.hint)


def test_other_models_are_no_routers() -> None:
    assert [router_name(model) for model in ("base", "meteora", "peft-arrow", "adapters/router")] == [None] * 4
    assert [is_meteora(model) for model in ("meteora", "router:meteora", "router:meteora:without-asked", "router:arrow", "own")] == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_seeds_and_removal_multiply_only_where_they_matter() -> None:
    every = [f"router:{name}" for name in ROUTERS]
    expanded = expand_routers(["meteora", *every], without_asked=True, seeds=(3, 4))
    assert len(expanded) == 1 + len(ROUTERS) + len(SEEDED)
    assert expanded[:3] == ("meteora", "router:oracle", "router:meteora:without-asked")
    assert "router:phatgoose:without-asked@4" in expanded
    assert expand_routers(["router:random@9"], seeds=(1, 2)) == ("router:random@9",)
    assert expand_routers(every) == tuple(every)


def test_the_removed_adapters_are_those_of_the_task_or_of_a_composites_members() -> None:
    names = ("logical_deduction", "gsm8k", "strategyqa")
    router = RouterName("arrow", without_asked=True)
    assert router.removed(get_task("gsm8k"), names) == ("gsm8k",)
    assert router.removed(get_task("composite_3"), names) == ("logical_deduction", "strategyqa")
    assert RouterName("arrow").removed(get_task("gsm8k"), names) == ()

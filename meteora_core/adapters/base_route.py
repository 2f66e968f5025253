"""The base route: the entry of a bank that stands for no adapter at all.

A token that chooses it gets the output of the base layer alone. It is an adapter of rank 0 in every layer, so gates, kernels, traces, forced routes and
muting treat it as any other adapter.
"""

from __future__ import annotations

from collections.abc import Iterable

from meteora_core.adapters.bank import AdapterBank
from meteora_core.adapters.peft_folder import AdapterInfo

NO_ADAPTER = "no_adapter"
"""The name of the base route in banks, traces and statistics."""


def base_route() -> AdapterBank:
    """Return a bank that contains only the base route; :func:`meteora_core.adapters.joining.with_adapter` adds it to another bank.

    Example:
        >>> from meteora_core.adapters.base_route import base_route
        >>> base_route().names, base_route().modules
        (('no_adapter',), {})
    """
    return AdapterBank((AdapterInfo(NO_ADAPTER, "", "", None, 0, 0.0, False, 0.0),), {})


def is_base_route(adapter: AdapterInfo) -> bool:
    """Whether an entry of a bank is the base route.

    Example:
        >>> from meteora_core.adapters.base_route import base_route, is_base_route
        >>> is_base_route(base_route().adapters[0])
        True
    """
    return adapter.name == NO_ADAPTER and adapter.rank == 0


def real_adapters(adapters: Iterable[AdapterInfo]) -> list[AdapterInfo]:
    """Return the entries other than the base route."""
    return [adapter for adapter in adapters if not is_base_route(adapter)]

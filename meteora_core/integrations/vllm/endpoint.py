"""Routes and counts over HTTP, in vLLM's server (``VLLM_PLUGINS=meteora``)."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException, Request

PREFIX = "/v1/meteora"
"""The prefix of the paths. vLLM's ``--api-key`` protects all paths under /v1."""
METRIC = "meteora:adapter_choices"


class MeteoraEndpoints:
    """An endpoint plugin of vLLM.

    - ``GET /v1/meteora/adapters``: the adapters and the default options;
    - ``GET /v1/meteora/routes/{request}``: the adapters of every token and layer, for a request that was sent with ``"vllm_xargs": {"meteora_trace": 1}``,
      while it is answered and afterwards; ``?first=N`` leaves out the positions before N;
    - ``GET /v1/meteora/counts``: how often each adapter was chosen; ``/metrics`` has the same numbers.
    """

    name = "meteora"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the paths to vLLM's FastAPI application, and keep the counts in ``/metrics`` up to date."""

        async def adapters(request: Request) -> dict[str, Any]:
            config = _config(request.app.state)
            if config is None:
                raise HTTPException(404, "this model has no MeteoRA adapters")
            default = config.default
            return {"adapters": list(config.store.names), "top_k": default.top_k, "temperature": default.temperature}

        async def routes(request: Request) -> dict[str, Any]:
            name, first = request.path_params["request"], request.query_params.get("first", "0")
            if not first.isdecimal() or len(first) > 12:
                raise HTTPException(400, "first must be the number of a position")
            found = await _engine(request.app.state).collective_rpc("meteora_routes", args=(name, int(first)))
            parts = [part for part in found if part]
            if not parts:
                raise HTTPException(404, 'no routes were recorded for this request: send it with "vllm_xargs": {"meteora_trace": 1}')
            config = _config(request.app.state)
            layers = {path: layer for part in parts for path, layer in part["layers"].items()}
            return {"request": name, "adapters": list(config.store.names), "positions": parts[0]["positions"], "layers": layers}

        async def counts(request: Request) -> dict[str, Any]:
            return await _counts(request.app.state)

        app.add_api_route(f"{PREFIX}/adapters", adapters, methods=["GET"])
        app.add_api_route(f"{PREFIX}/routes/{{request}}", routes, methods=["GET"])
        app.add_api_route(f"{PREFIX}/counts", counts, methods=["GET"])
        app.add_middleware(_Refresh)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Store the engine, for later requests."""
        state.meteora_engine = engine_client


class _Refresh:
    """Middleware that updates the counters before ``/metrics`` is read.

    Args:
        app: The application that it wraps.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope.get("type") == "http" and scope.get("path") == "/metrics":
            state = scope["app"].state
            if getattr(state, "meteora_engine", None) is not None and _config(state) is not None and _config(state).count_every:
                _publish(await _counts(state))
        await self._app(scope, receive, send)


def _engine(state: Any) -> Any:
    engine = getattr(state, "meteora_engine", None)
    if engine is None or _config(state) is None:
        raise HTTPException(404, "this model has no MeteoRA adapters")
    return engine


def _config(state: Any) -> Any:
    """The quantisation configuration of the served model; None if the model has no MeteoRA adapters."""
    config = getattr(getattr(getattr(state, "meteora_engine", None), "vllm_config", None), "quant_config", None)
    return config if config is not None and config.get_name() == "meteora" else None


async def _counts(state: Any) -> dict[str, Any]:
    """The counts of all layers. Processes of a tensor-parallel group count the same tokens; those of a pipeline count different layers."""
    found = await _engine(state).collective_rpc("meteora_counts")
    parallel = _engine(state).vllm_config.parallel_config
    stages = found[:: max(1, parallel.tensor_parallel_size)]
    names = list(found[0]["adapters"])
    return {
        "adapters": {name: sum(part["adapters"][name] for part in stages) for name in names},
        "tokens": max(part["tokens"] for part in stages),
        "layers": sum(part["layers"] for part in stages),
        "every": found[0]["every"],
    }


_gauges: dict[str, Any] = {}


def _publish(counts: dict[str, Any]) -> None:
    from prometheus_client import Gauge

    if not _gauges:
        _gauges["choices"] = Gauge(METRIC, "Choices of each adapter, over all layers, in the counted steps.", ["adapter"], multiprocess_mode="mostrecent")
        _gauges["tokens"] = Gauge("meteora:counted_tokens", "Tokens of the counted steps.", multiprocess_mode="mostrecent")
    for name, number in counts["adapters"].items():
        _gauges["choices"].labels(adapter=name).set(number)
    _gauges["tokens"].set(counts["tokens"])

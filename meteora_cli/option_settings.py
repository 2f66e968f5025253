"""Lists the options of each command that are settings."""

from __future__ import annotations

from collections.abc import Iterable


def _same(section: str, names: Iterable[str]) -> dict[str, str]:
    """Return the settings of parameters with the same names."""
    return {name: f"{section}.{name}" for name in names}


_MODEL = _same("model", ("base", "dtype", "device", "backend"))
_PLACES = _same("paths", ("data", "adapters"))
_ROUTING = _same("routing", ("top_k",)) | {"routing_temperature": "routing.temperature"}
_OPTIMISER = ("max_steps", "batch_size", "accumulation", "learning_rate", "max_length", "seed", "gradient_checkpointing", "packing")
_ROWS = ("loss_on", "list_rows", "list_max")
_WATCHING = ("eval_steps", "patience", "log_steps", "save_steps", "log_to")
_LAUNCH = _same("launch", ("launcher", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"))
_STATISTICS = {"answer_share": "route.answer_share", "statistics": "route.statistics"}
_OF_GATES = (
    "beta",
    "answer_share",
    "adapter_learning_rate",
    "trainable",
    "init",
    "composite_rows",
    "composite_max",
    "joined_rows",
    "joined_max",
    "sampling",
    "loss_balance",
)

_SESSION = _same("chat", ("template", "max_new_tokens")) | _same("model", ("device", "backend"))

_COLLECTING = _same("route", ("tokens", "max_length", "batch_size", "seed")) | _same("model", ("dtype", "device", "backend")) | {"data": "paths.data"}

OPTION_SETTINGS: dict[str, dict[str, str]] = {
    "train adapters": {
        **_PLACES,
        **{name: setting for name, setting in _MODEL.items() if name != "backend"},
        **_same("train_adapters", (*_OPTIMISER, *_ROWS, *_WATCHING, "rank", "alpha")),
        **_LAUNCH,
        "jobs": "launch.jobs",
    },
    "eval": {**_PLACES, **_MODEL, **_ROUTING, **_same("eval", ("batch_size", "max_new_tokens", "max_prompt_tokens", "limit", "scoring", "template"))},
    "chat": {**_SESSION, "sampling_temperature": "chat.sampling_temperature"},
    "trace": _SESSION,
    "route": {**_COLLECTING, **_ROUTING, "adapters": "paths.adapters", **_STATISTICS},
    "serve": {
        **_same(
            "serve",
            (
                "engine",
                "vllm_python",
                "vllm_args",
                "host",
                "port",
                "name",
                "template",
                "max_new_tokens",
                "max_batch",
                "max_queue",
                "max_model_len",
                "prefix_cache_mb",
                "cors",
            ),
        ),
        **_same("model", ("device", "dtype", "backend")),
        "adapter_root": "serve.adapter_roots",
    },
    "adapters add": _COLLECTING,
    "adapters update": _COLLECTING,
    "adapters collect": {**_COLLECTING, **_STATISTICS},
    "train gates": {**_PLACES, **_MODEL, **_same("train_gates", (*_OPTIMISER, *_ROWS, *_WATCHING, *_OF_GATES)), **_ROUTING, **_LAUNCH},
}
"""The dotted name of the setting for each parameter that is one, by command, such as ``"train gates"``."""

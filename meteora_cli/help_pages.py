"""Examples of every command, and panels that group the options of long commands, both of which only the help shows."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("meteora quickstart", "meteora chat", "meteora --config my.toml eval --task singles"),
    "quickstart": ("meteora quickstart", "meteora quickstart --train --adapter-steps 60"),
    "data": ("meteora data build --task strategyqa,gsm8k", "meteora data list"),
    "data build": ("meteora data build --task strategyqa,logical_deduction", "meteora data build --task bigbench --source pypi --max-test 200"),
    "data composite": ("meteora data composite --n 3", "meteora data composite --tasks strategyqa,gsm8k --name both"),
    "data add": (
        "meteora data add pirate --train pirate.jsonl",
        "meteora data add my_datasets/",
        "meteora data add faq --train faq.csv --columns question=ASK,answer=REPLY --template '### Question:\\n{}\\n### Answer:\\n'",
    ),
    "data list": ("meteora data list",),
    "data show": ("meteora data show strategyqa -n 3 --split train",),
    "data verify": ("meteora data verify", "meteora data verify strategyqa gsm8k"),
    "ckpt": ("meteora ckpt download smollm2-135m", "meteora ckpt inspect runs/meteora"),
    "ckpt download": (
        "meteora ckpt download smollm2-135m",
        "meteora ckpt download qwen2.5-coder-0.5b",
        "meteora ckpt download ParagonLight/MeteoRA-llama3-8b --include '*/top_2/*'",
    ),
    "ckpt inspect": ("meteora ckpt inspect runs/meteora", "meteora ckpt inspect adapters/gsm8k --no-hashes"),
    "ckpt convert": ("meteora ckpt convert model.safetensors runs/authors --base meta-llama/Meta-Llama-3-8B --adapters llama3_8b_peft",),
    "ckpt pack": ("meteora ckpt pack runs/meteora small --rank 4 --max-mb 20",),
    "ckpt export": (
        "meteora ckpt export runs/meteora gsm8k-peft --adapter gsm8k",
        "meteora ckpt export runs/meteora gsm8k-gguf --adapter gsm8k --gguf",
        "meteora ckpt export runs/meteora gsm8k-merged --merge gsm8k --dtype bfloat16",
        "meteora ckpt export runs/meteora served --format vllm",
    ),
    "ckpt push": ("meteora ckpt push runs/meteora me/helpdesk --dry-run", "meteora ckpt push runs/meteora me/helpdesk --licence apache-2.0 --public"),
    "ckpt card": ("meteora ckpt card runs/meteora --results runs/eval/meteora --licence gsm8k=MIT",),
    "train": (
        "meteora train adapters --task gsm8k,strategyqa",
        "meteora train gates --init ridge",
        "meteora train --launcher fsdp --gradient-checkpointing",
    ),
    "train adapters": (
        "meteora train adapters --task gsm8k,strategyqa --rank 8",
        "meteora train adapters --rows my_datasets/",
        "meteora train adapters --task all --jobs 4",
        "meteora train adapters --task all --dry-run",
    ),
    "train gates": (
        "meteora train gates --init ridge",
        "meteora train gates --task gsm8k,strategyqa --max-steps 1000 --eval-steps 100 --patience 3",
        "meteora train gates --launcher fsdp --num-processes 8 --gradient-checkpointing",
    ),
    "route": ("meteora route adapters --data datasets", "meteora route adapters --only sql,legal --out runs/two --tokens 20000"),
    "adapters": ("meteora adapters list runs/routed", "meteora adapters add runs/routed adapters/sql --data datasets"),
    "adapters list": ("meteora adapters list runs/routed",),
    "adapters add": ("meteora adapters add runs/routed adapters/sql", "meteora adapters add runs/routed new/sql --name sql2 --rows sql.jsonl"),
    "adapters update": ("meteora adapters update runs/routed new/sql",),
    "adapters collect": ("meteora adapters collect adapters/sql --rows sql.jsonl",),
    "adapters drop": ("meteora adapters drop runs/routed sql",),
    "eval": (
        "meteora eval --task singles --model base,own,meteora --limit 50",
        "meteora eval --task composite_3 --checkpoint runs/meteora --T 15",
        "meteora eval --task singles --model router:all --seeds 1,2",
    ),
    "eval report": ("meteora eval report runs/eval/base runs/eval/meteora --plot compare.png --kind radar",),
    "chat": ("meteora chat", "echo 'Is the sky blue?' | meteora chat --checkpoint runs/meteora --json", "meteora chat --url http://127.0.0.1:8000"),
    "serve": (
        "meteora serve runs/meteora --port 8080",
        "meteora serve runs/meteora --max-batch 16 --cors https://example.org",
        "meteora serve runs/meteora --engine vllm --vllm-args '--tensor-parallel-size 2'",
    ),
    "trace": ("meteora trace --prompt 'Is the sky blue?' --out trace.html", "meteora trace --task strategyqa --row 3 --out trace.png"),
    "bench-kernels": ("meteora bench-kernels --tokens 1,8,512", "meteora bench-kernels --model-shape llama3-8b --end-to-end --layers 8"),
    "config": ("meteora config show",),
    "config show": ("meteora config show", "meteora config show --defaults"),
}
"""The examples of each command, by the command's full name; a test parses every line."""

_MODEL = "Model and device"
_CHOICE = "Adapters and routing"
_ANSWERS = "Prompts and answers"
_OUTPUT = "Output"

_CHANGE = {
    "Adapter and rows": ("name", "rows", "data", "self_written"),
    "Closed form": ("tokens", "max_length", "batch_size", "seed"),
    _MODEL: ("base", "adapters_dir", "dtype", "device", "backend"),
    _OUTPUT: ("as_json",),
}

_PANELS: dict[str, dict[str, tuple[str, ...]]] = {
    "eval": {
        "What to evaluate": ("task", "model", "without_asked", "checkpoint", "data", "limit", "scoring", "seeds"),
        _CHOICE: ("routing_temperature", "top_k", "adapters", "backend"),
        _ANSWERS: ("template", "batch_size", "max_new_tokens", "max_prompt_tokens"),
        _MODEL: ("base", "dtype", "device", "load_in_4bit", "load_in_8bit", "launcher", "processes"),
        _OUTPUT: ("save", "out_dir", "routing", "debug", "as_json"),
    },
    "route": {
        "Adapters and rows": ("adapters", "data", "only", "exclude", "self_written", "base_route"),
        "Closed form": ("tokens", "answer_share", "statistics", "steps", "max_length", "batch_size", "seed"),
        _CHOICE: ("routing_temperature", "top_k", "backend"),
        _MODEL: ("base", "dtype", "device"),
        _OUTPUT: ("out_dir", "embed", "force", "as_json"),
    },
    "adapters add": _CHANGE,
    "adapters update": _CHANGE,
    "adapters collect": {**_CHANGE, "Closed form": (*_CHANGE["Closed form"], "answer_share", "statistics")},
    "chat": {
        "What to talk to": ("checkpoint", "base", "adapter", "adapters_dir"),
        "A server": ("url", "api_key", "served_model"),
        _CHOICE: ("routing_temperature", "top_k", "backend", "route"),
        _ANSWERS: ("system", "template", "max_new_tokens", "sampling_temperature"),
        _MODEL: ("device", "load_in_4bit", "load_in_8bit", "trust_remote_code"),
        _OUTPUT: ("as_json",),
    },
    "serve": {
        "What to serve": ("base", "adapters_dir", "name", "engine", "vllm_python", "vllm_args"),
        "Address and access": ("host", "port", "api_key", "no_auth", "cors", "allow_adapter_changes", "adapter_root"),
        "Limits": ("max_batch", "max_queue", "max_model_len", "max_new_tokens", "prefix_cache_mb"),
        _CHOICE: ("routing_temperature", "top_k", "backend"),
        "Prompts": ("template",),
        _MODEL: ("device", "dtype", "load_in_4bit", "load_in_8bit", "trust_remote_code"),
    },
    "trace": {
        "What to trace": ("prompt", "file", "task", "row"),
        "Which model": ("checkpoint", "base", "adapter", "adapters_dir"),
        "A server": ("url", "api_key", "served_model"),
        _CHOICE: ("routing_temperature", "top_k", "backend"),
        _ANSWERS: ("system", "template", "max_new_tokens"),
        _MODEL: ("device", "load_in_4bit", "load_in_8bit", "trust_remote_code"),
        _OUTPUT: ("target", "as_json"),
    },
}
_PANEL_OF = {path: {name: panel for panel, names in panels.items() for name in names} for path, panels in _PANELS.items()}


def panel_of(path: str, parameter: str | None) -> str | None:
    """Return the panel in which the help of a command shows an option; None for the panel of all other options."""
    return _PANEL_OF.get(path, {}).get(parameter or "")

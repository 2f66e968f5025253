"""The values that settings, flags and functions choose from, each in one place."""

from __future__ import annotations

from typing import Literal

Switch = Literal["auto", "on", "off"]
"""Whether an optimisation is used; auto decides by the device."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Number type of the base model; auto is float32 on a CPU and bfloat16 on a GPU."""

Launcher = Literal["none", "ddp", "fsdp", "deepspeed"]
"""How training is spread over devices: not at all, one copy of the model on each, or sharded in one of two ways."""

EvalLauncher = Literal["none", "ddp"]
"""How an evaluation is spread over devices: not at all, or the rows over one copy of the model on each."""

GateStart = Literal["normal", "zeros", "arrow", "ridge"]
"""The gates' start values: random, zeros, from the adapters alone, or in closed form from train rows."""

TrainedParts = Literal["gates", "gates+adapters"]
"""What trains in the gates' stage."""

RowSampling = Literal["balanced", "proportional"]
"""How rows are drawn from the tasks: as many tokens of each, or every row as often."""

LossOn = Literal["all", "response"]
"""Tokens that the language-model loss counts."""

LogTo = Literal["none", "tensorboard", "wandb", "mlflow"]
"""Where training curves are written besides the result."""

Scoring = Literal["corrected", "paper"]
"""What scores mean: the metrics' own definition, or what the authors computed."""

ReportKind = Literal["bar", "radar"]
"""What a picture of several results looks like."""

"""The sets of values that settings, flags and functions choose from, each defined once."""

from __future__ import annotations

from typing import Literal

Switch = Literal["auto", "on", "off"]
"""Whether an optimisation is used; auto depends on the device."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
"""Number type of the base model; auto is float32 on a CPU and bfloat16 on a GPU."""

Launcher = Literal["none", "ddp", "fsdp", "deepspeed"]
"""How training is distributed over devices: not at all, one copy of the model on each device, or sharded by FSDP or DeepSpeed."""

EvalLauncher = Literal["none", "ddp"]
"""How an evaluation is distributed over devices: not at all, or the rows over one copy of the model on each device."""

SecondMoments = Literal["auto", "float32", "float16", "low-rank"]
"""How the second moments of gate statistics are stored: whole in float32 or float16, or as a matrix of low rank and a diagonal. auto is "float32" for small
models and "low-rank" for others."""

GateStart = Literal["normal", "zeros", "arrow", "ridge"]
"""The gates' initial values: random, zeros, from the adapters alone, or in closed form from training rows."""

TrainedParts = Literal["gates", "gates+adapters"]
"""The parameters that `meteora train gates` trains."""

RowSampling = Literal["balanced", "proportional"]
"""How rows are drawn from the tasks: the same number of tokens from each task, or every row equally often."""

LossBalance = Literal["tokens", "tasks"]
"""Units that have equal weight in the language-model loss when gates are trained."""

LossOn = Literal["all", "response"]
"""The tokens that the language-model loss covers: prompt and response, or the response alone."""

LogTo = Literal["none", "tensorboard", "wandb", "mlflow"]
"""The tracker that receives the training curves, in addition to the result file."""

Scoring = Literal["corrected", "paper"]
"""How scores are computed: by the definitions of the metrics, or as the authors computed them."""

ReportKind = Literal["bar", "radar"]
"""The kind of chart that compares several results."""

Engine = Literal["auto", "transformers", "vllm"]
"""The program that runs the model of `meteora serve`: that of this library, or vLLM."""

#!/bin/bash
# Packs vLLM 0.26.0 for a machine without a network that has Python 3.12, PyTorch 2.11 (CUDA 13) and transformers 5.17: 86 MB in parts of 30 MB. machine.sh unpacks it there.
# usage: bundle.sh FOLDER PYTHON3.12; on the machine: cat FOLDER/site.?? | xz -dc | tar -C SITE -xf -, then PYTHONPATH=SITE and VLLM_USE_FLASHINFER_SAMPLER=0
set -e
folder=$1 python=$2
mkdir -p "$folder/wheels" "$folder/site" && cd "$folder"
"$python" -m pip download -q --no-deps --only-binary=:all: -d . vllm==0.26.0
"$python" -m pip download -q --no-deps --only-binary=:all: -d wheels PyJWT==2.15.1 annotated-types==0.8.0 anthropic==2.14.0 apache-tvm-ffi==0.1.10 astor==0.8.1 blake3==1.0.11 cachetools==8.0.2 cbor2==6.3.0 cffi==2.1.1 compressed-tensors==0.17.0 cryptography==50.0.2 depyf==0.20.0 dill==0.4.1 docstring_parser==0.18.0 fastapi==0.136.3 googleapis-common-protos==1.76.0 httpcore2==2.16.2 httptools==0.9.0 httpx2==2.16.2 ijson==3.6.0 interegular==0.3.3 jiter==0.19.0 jmespath==1.1.0 jsonschema-specifications==2025.9.1 jsonschema==4.26.0 lark==1.2.2 llguidance==1.7.6 lm-format-enforcer==0.11.3 loguru==0.7.3 mcp-types==2.3.0 mcp==2.3.0 model-hosting-container-standards==0.1.16 msgspec==0.23.0 nvtx==0.2.15 openai-harmony==0.0.8 openai==3.57.0 opentelemetry-api==1.45.2 opentelemetry-exporter-http-transport==0.66b2 opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-otlp-proto-common==1.45.2 opentelemetry-exporter-otlp-proto-grpc==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp==1.45.2 opentelemetry-proto==1.45.2 opentelemetry-sdk==1.45.2 opentelemetry-semantic-conventions-ai==0.5.1 opentelemetry-semantic-conventions==0.66b2 outlines_core==0.2.14 partial-json-parser==0.2.1.1.post7 prometheus-fastapi-instrumentator==8.1.0 pybase64==1.5.1 pycparser==3.12 pydantic-settings==2.16.3 pydantic==2.14.4 pydantic_core==2.50.5 python-dotenv==1.2.4 python-json-logger==4.2.0 python-multipart==0.0.34 pyzmq==27.3.0 referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 sse-starlette==3.7.0 starlette==1.10.0 supervisor==4.3.0 truststore==0.10.5 typing-inspection==0.4.5 uvicorn==0.54.0 watchfiles==1.3.0
"$python" -m pip install -q --no-index --no-deps --no-compile --target site wheels/*.whl
# Only Hopper's attention and the operators that vLLM cannot do without.
unzip -q -o vllm-0.26.0-*.whl 'vllm/*.py' 'vllm-0.26.0.dist-info/*' 'vllm/_C_stable_libtorch*' 'vllm/vllm_flash_attn/_vllm_fa3*' 'vllm/spinloop*' -d site
rm -rf site/vllm/third_party/fmha_sm100 site/vllm/third_party/deep_gemm
# vLLM imports xgrammar (45 MB) for grammars alone; names that it looks up there must exist.
mkdir -p site/xgrammar
cat > site/xgrammar/__init__.py <<'P'
__version__ = "0"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {})
P
tar -C site --sort=name -cf - . | xz -T2 --lzma2=preset=6,dict=192MiB | split -b 30m -d - site.

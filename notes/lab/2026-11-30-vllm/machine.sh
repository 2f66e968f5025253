# Sourced on a machine without a network: unpacks the parts of bundle.sh from $PARTS into $SITE once, and sets what vLLM needs.
SITE=${SITE:-/tmp/vllm_site} PARTS=${PARTS:-/tmp/vllm_parts}
if [ ! -e "$SITE/ready" ]; then
    mkdir -p "$SITE" && cat "$PARTS"/site.?? | xz -dc -T0 | tar -C "$SITE" -xf - || { echo "the parts of vLLM in $PARTS are incomplete"; exit 1; }
    mkdir -p "$SITE/meteora_lora-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: meteora-lora\nVersion: 0\n' > "$SITE/meteora_lora-0.dist-info/METADATA"
    printf '[vllm.general_plugins]\nmeteora = meteora_core.integrations.vllm:register\n' > "$SITE/meteora_lora-0.dist-info/entry_points.txt"
    touch "$SITE/ready"
fi
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1 VLLM_ENABLE_V1_MULTIPROCESSING=${VLLM_ENABLE_V1_MULTIPROCESSING:-0} VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
VLLM_PATH=$SITE:$PWD:$PWD/kernels

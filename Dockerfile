# docker build -t megalign .                       for GPUs (the last stage)
# docker build -t megalign:cpu --target cpu .      for CI without GPUs
# docker run --gpus all --shm-size 16g -v $PWD:/work -w /work megalign megalign sft recipe.yaml

FROM python:3.11-slim AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /opt/megalign
COPY . .
RUN pip install --no-cache-dir -c constraints-cpu.txt --extra-index-url "$TORCH_INDEX" -e '.[test]'
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

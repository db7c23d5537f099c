# One file, two images:
#   docker build --target core    -t nemo-minitron:core .       everything but NeMo-Aligner's stages
#   docker build --target aligner -t nemo-minitron:aligner .    SFT, preferences, reward models, SteerLM
#   docker run --rm --gpus all nemo-minitron:core minitron version
# Pins are those of constraints/core.txt. Not built by the tests: docs/CLUSTER.md has the commands that show it, and `minitron env
# aligner` in the second image checks that its NeMo-Aligner is the supported one.
ARG CORE_IMAGE=nvcr.io/nvidia/pytorch:25.06-py3
ARG ALIGNER_IMAGE=nvcr.io/nvidia/nemo:25.02

# hadolint ignore=DL3006
FROM ${CORE_IMAGE} AS core
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/nemo-minitron
COPY constraints constraints
# What the image brings in builds of its own stays: torch, numpy and their like.
RUN grep -viE '^(torch|numpy|scipy|pandas|protobuf|pillow)==' constraints/core.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt megatron-core transformers hydra-core pydantic typer
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nemo_minitron nemo_minitron
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir -c /tmp/constraints.txt '.[eval]'
# Runs as any user: docker run --user "$(id -u):$(id -g)".
ENV PYTHONUNBUFFERED=1 HOME=/tmp
USER 1000
HEALTHCHECK --interval=5m --timeout=2m CMD ["minitron", "doctor", "--run-root", "/tmp"]
CMD ["minitron", "--help"]

# hadolint ignore=DL3006
FROM ${ALIGNER_IMAGE} AS aligner
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/nemo-minitron
COPY constraints constraints
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nemo_minitron nemo_minitron
COPY configs configs
COPY recipes recipes
# The image's own torch, Megatron-Core, NeMo and NeMo-Aligner stay; ours needs only small packages beside them.
RUN grep -iE '^(pydantic|pydantic-core|typer|rich|hydra-core|omegaconf|jinja2|zstandard|annotated-types)==' \
        constraints/core.txt > /tmp/small.txt \
    && pip install --no-cache-dir -r /tmp/small.txt \
    && pip install --no-cache-dir --no-deps .
ENV PYTHONUNBUFFERED=1 HOME=/tmp
USER 1000
HEALTHCHECK --interval=5m --timeout=2m CMD ["minitron", "doctor", "--run-root", "/tmp", "--require", "aligner"]
CMD ["minitron", "--help"]

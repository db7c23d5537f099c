# Two images:
#   docker build --target core    -t nemo-minitron:core .       everything except NeMo-Aligner's stages
#   docker build --target aligner -t nemo-minitron:aligner .    SFT, preferences, reward models, SteerLM
#   docker run --rm --gpus all nemo-minitron:core minitron version
# Pins come from constraints/newest.txt, hashes from newest.lock. constraints/image.py keeps the base image's own builds (torch,
# CUDA's packages, Transformer Engine, numpy) and checks at the end that none of them has changed. The tests run these pip steps
# without docker; the commands that test the images themselves are in docs/how-to/cluster.md.
#
# The core image needs Python 3.12. The default is the image that Megatron-LM itself is built on. With a NeMo image
# (nemo:26.02 or newer) its Megatron-Core and transformers are kept, too: --build-arg CORE_IMAGE=nvcr.io/nvidia/nemo:26.06
ARG CORE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
# NeMo-Aligner 0.7.0 needs NeMo 2.1 and Megatron-Core 0.10. This image has both, with an older NeMo-Aligner.
ARG ALIGNER_IMAGE=nvcr.io/nvidia/nemo:24.12

# hadolint ignore=DL3006
FROM ${CORE_IMAGE} AS core
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/nemo-minitron
# NVIDIA's images pin all of their packages with this variable, also in pip's build environments. See constraints/image.py.
ENV PIP_CONSTRAINT=""
COPY constraints constraints
RUN python constraints/image.py kept > /tmp/kept.json \
    && python constraints/image.py pins constraints/newest.txt /etc/pip/constraint.txt > /tmp/constraints.txt \
    && python constraints/image.py locked constraints/newest.lock /tmp/constraints.txt > /tmp/locked.txt \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/locked.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nemo_minitron nemo_minitron
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir -c /tmp/constraints.txt '.[eval]' \
    && python constraints/image.py check /tmp/kept.json \
    && python -c "import torch, megatron.core, nemo_minitron"
# Runs as any user: docker run --user "$(id -u):$(id -g)". Torch needs a user name and a home folder.
ENV PYTHONUNBUFFERED=1 HOME=/tmp USER=minitron LOGNAME=minitron
USER 1000
HEALTHCHECK --interval=5m --timeout=2m CMD ["minitron", "doctor", "--run-root", "/tmp"]
CMD ["minitron", "--help"]

# hadolint ignore=DL3006
FROM ${ALIGNER_IMAGE} AS aligner
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/nemo-minitron
ENV PIP_CONSTRAINT=""
COPY constraints constraints
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nemo_minitron nemo_minitron
COPY configs configs
COPY recipes recipes
# Installed from its repository: the wheel lacks the programs and configs that stages and `minitron rlhf` use from
# /opt/NeMo-Aligner.
RUN version=$(sed -n 's/^nemo-aligner==//p' nemo_minitron/backends/alignment/nemo_aligner/requirements.txt) \
    && rm -rf /opt/NeMo-Aligner \
    && git clone --depth 1 --branch "v$version" https://github.com/NVIDIA/NeMo-Aligner.git /opt/NeMo-Aligner \
    && pip install --no-cache-dir --no-deps /opt/NeMo-Aligner
# The image's own torch, Megatron-Core and NeMo stay; this package adds only small packages.
RUN python constraints/image.py kept > /tmp/kept.json \
    && python constraints/image.py pins constraints/newest.txt /etc/pip/constraint.txt > /tmp/constraints.txt \
    && python constraints/image.py locked constraints/newest.lock /tmp/constraints.txt \
        pydantic pydantic-core typing-extensions typing-inspection annotated-types annotated-doc typer click shellingham rich \
        markdown-it-py mdurl pygments hydra-core omegaconf antlr4-python3-runtime jinja2 markupsafe zstandard > /tmp/small.txt \
    && pip install --no-cache-dir --no-deps --require-hashes -r /tmp/small.txt \
    && pip install --no-cache-dir --no-deps . \
    && python constraints/image.py check /tmp/kept.json
ENV PYTHONUNBUFFERED=1 HOME=/tmp USER=minitron LOGNAME=minitron
USER 1000
HEALTHCHECK --interval=5m --timeout=2m CMD ["minitron", "doctor", "--run-root", "/tmp", "--require", "aligner"]
CMD ["minitron", "--help"]

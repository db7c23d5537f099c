# The core environment on an NGC PyTorch image: its torch, Transformer Engine and apex stay as they are.
#   docker build -t nemo-minitron .
#   docker run --gpus all --ipc=host -v $PWD/runs:/workspace/runs nemo-minitron minitron run RECIPE
# Untested on a GPU so far; the package itself is tested on CPU.
FROM nvcr.io/nvidia/pytorch:25.06-py3

WORKDIR /workspace/nemo-minitron
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY nemo_minitron nemo_minitron

# Everything but torch, numpy and what else the image brings in its own builds.
RUN grep -viE '^(torch|numpy|scipy|pandas|protobuf|pillow)==' constraints/core.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt '.[eval]'

COPY recipes recipes
COPY configs configs
ENV PYTHONUNBUFFERED=1
CMD ["minitron", "--help"]

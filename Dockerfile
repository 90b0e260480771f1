# secateur as a command.
#   docker build -t secateur .                                    on CPU
#   docker build -t secateur:gpu --build-arg EXTRA=gpu \
#     --build-arg BASE=nvidia/cuda:13.0.2-cudnn-runtime-ubuntu24.04 .   on CUDA
#   docker run --rm -v "$PWD:/work" secateur run configs/quickstart.yaml
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG EXTRA=cpu
ARG USER_ID=1000

# A CUDA base has no Python; the Python base has. Its distribution fixes the version.
# hadolint ignore=DL3008
RUN if ! command -v python3 >/dev/null || ! python3 -c 'import venv, ensurepip' 2>/dev/null; then \
      apt-get update \
      && apt-get install --no-install-recommends --yes python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /opt/secateur
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY pipeline pipeline
COPY exporters exporters
COPY benchmarks benchmarks
COPY configs configs
# The constraints name the CPU wheel of ONNX Runtime; the GPU one has the same version.
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRA},demo]"

RUN useradd --create-home --uid "${USER_ID}" --non-unique secateur \
    && mkdir -p /work && chown secateur /work
USER ${USER_ID}
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["secateur"]
CMD ["--help"]

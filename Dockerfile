# replaceme in a container. On a CPU, and on CUDA:
#
#   docker build -t replaceme .
#   docker build -t replaceme:cuda --build-arg DEVICE=cuda .
#
# The two differ in what stands between here and the last FROM: the base image, and where torch comes from.
ARG DEVICE=cpu

FROM debian:bookworm-slim AS cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch of the package index brings CUDA's libraries itself: the base has the runtime, and what the driver needs
FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS cuda
ENV TORCH_INDEX=https://pypi.org/simple

FROM ${DEVICE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv /opt/venv

# From what changes seldom to what changes often: torch, what the package stands on (it is empty by now), the package
WORKDIR /src
COPY constraints.txt ./
RUN pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt torch
COPY settings.ini setup.py ./
RUN pip install -c constraints.txt .
COPY README.md LICENSE MANIFEST.in ./
COPY replaceme replaceme
RUN pip install --no-deps --force-reinstall . \
 && rm -rf build replaceme.egg-info

# Nobody in particular; what is fetched and kept lies in a volume, and work is done where a folder is put
ENV REPLACEME_CACHE=/cache/replaceme HF_HOME=/cache/huggingface
RUN useradd --create-home --uid 10001 replaceme \
 && mkdir -p /cache /work \
 && chown replaceme /cache /work
USER 10001
VOLUME /cache
WORKDIR /work
RUN run_replaceme --help
CMD ["run_replaceme", "--help"]

# On the CPU:  docker build -t mixserve .
# On a GPU:    docker build -t mixserve --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 .
#              docker run --gpus all -p 8000:8000 mixserve MODEL
# BASE is any Debian or Ubuntu image with Python >= 3.11, or where apt has one. pip takes PyTorch's CUDA build unless its
# settings say otherwise: --build-arg PIP_EXTRA_INDEX_URL=... with an index of CPU builds makes a far smaller image.
ARG BASE=python:3.12-slim

FROM ${BASE} AS python
RUN command -v python3 > /dev/null || ( \
        apt-get update \
        && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/* )

FROM python AS build
# For the CPU kernels: without a compiler torch's operations would serve on a CPU.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ python3-dev \
    && rm -rf /var/lib/apt/lists/*
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/mixserve
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY server server
COPY engine engine
COPY weights weights
RUN /opt/mixserve/bin/pip install --constraint constraints.txt setuptools \
    && /opt/mixserve/bin/pip install --constraint constraints.txt --no-build-isolation .

FROM python
RUN useradd --create-home --uid 10001 mixserve
COPY --from=build /opt/mixserve /opt/mixserve
ENV PATH=/opt/mixserve/bin:$PATH PYTHONUNBUFFERED=1
USER mixserve
WORKDIR /home/mixserve
EXPOSE 8000
# /health is 200 while a model is downloaded or loaded; /ready tells when it can be used.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python3", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["mixserve", "serve", "--host", "0.0.0.0", "--port", "8000"]

# syntax=docker/dockerfile:1
# The program with all that a GPU host needs but the driver, which the host brings: docs/docker.md
#   docker build -t iwb-pipeline .
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD":/work iwb-pipeline run digits-lt
# Any Debian or Ubuntu image with Python 3.11 or newer and its venv module will do as a base.
ARG BASE_IMAGE=python:3.12-slim

# gcc stays in the image: Triton, by which GPUs rebalance and torch.compile works, compiles its launcher where it runs.
# tini is process 1, which is given only signals it asked for: Python alone, told to stop while it imports torch, goes on.
FROM ${BASE_IMAGE} AS base
ARG PIP_INDEX_URL=
# hadolint ignore=DL3008,SC2046
RUN headers=$(python3 -c "import sysconfig; print(sysconfig.get_path('include'))") \
 && apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev tini $(test -e "$headers/Python.h" || echo python3-dev) \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/bin/*-lto-dump-* \
 && install -d -m 1777 /work /cache

# the program's wheel with its compiled kernel, and the list of what it needs; both leave this stage, nothing else does
FROM base AS wheel
COPY pyproject.toml LICENSE README.md /src/
COPY pipeline /src/pipeline
COPY cache /src/cache
COPY configs /src/configs
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src
ARG EXTRAS="s3"
ARG CONSTRAINTS=
RUN python3 -c "import sys, tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *(line for name in sys.argv[1:] for line in project['optional-dependencies'][name]), sep='\n')" \
    ${EXTRAS} > /requirements.txt \
 && printf '%s\n' ${CONSTRAINTS} > /constraints.txt

FROM base
ARG PIP_INDEX_URL=
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# dependencies first: several GB that change only with that list; what only linking and their own tests use goes at once
COPY --from=wheel /requirements.txt /constraints.txt /opt/venv/
RUN python3 -m venv /opt/venv \
 && pip install -r /opt/venv/requirements.txt -c /opt/venv/constraints.txt \
 && pip freeze > /opt/venv/installed.txt \
 && find /opt/venv \( -name '*.a' -o -type d -name tests \) -prune -exec rm -r {} +

# copied, not mounted: builders other than Docker's do not see that what they mount has changed
COPY --from=wheel /wheel /opt/wheel
RUN pip install --no-deps /opt/wheel/*.whl && pip check

# any uid will do, also one without a name or a home: what it makes goes to /work, what is made to be quicker next time to
# /cache, a volume also where none is named, since torch makes a folder there even where all else may only be read
ENV HOME=/cache USER=pipeline MPLCONFIGDIR=/cache/matplotlib HF_HOME=/cache/huggingface TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor TRITON_CACHE_DIR=/cache/triton CUDA_CACHE_PATH=/cache/cuda
VOLUME /cache
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["tini", "--", "pipeline"]
CMD ["--help"]

ARG REVISION=
ARG SOURCE=
ARG CREATED=
ARG BASE_IMAGE=python:3.12-slim
ARG BASE_DIGEST=
ENV PIPELINE_REVISION=${REVISION} PIPELINE_IMAGE=1
LABEL org.opencontainers.image.title="iwb-pipeline" \
      org.opencontainers.image.description="Train an image classifier once on unbalanced classes, re-balance it in seconds" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}" \
      org.opencontainers.image.revision="${REVISION}"

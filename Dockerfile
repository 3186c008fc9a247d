# syntax=docker/dockerfile:1
# Any image with Python 3.11 or newer and its venv module will do; torch's wheels bring CUDA, the host brings the driver.
#   docker build -t iwb-pipeline .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work iwb-pipeline run digits-lt
ARG BASE_IMAGE=python:3.12-slim

# the program's wheel with its compiled kernel; without a compiler the wheel still works, its fits on a CPU are slower
FROM ${BASE_IMAGE} AS wheel
RUN (apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev) || echo "no C compiler: building without the kernel"
COPY pyproject.toml LICENSE README.md /src/
COPY pipeline /src/pipeline
COPY cache /src/cache
COPY configs /src/configs
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel /src

FROM ${BASE_IMAGE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH

# dependencies first: several GB that change seldom
COPY pyproject.toml /src/
RUN python3 -m venv /opt/venv \
 && python -c "import tomllib; print(*tomllib.load(open('/src/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /src/requirements.txt \
 && pip install -r /src/requirements.txt

COPY --from=wheel /wheel /wheel
RUN pip install --no-deps /wheel/*.whl

# runs as any uid (docker run --user): everything it writes goes to /work, caches to /tmp
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface TORCH_HOME=/tmp/torch
RUN mkdir -p /work && chmod 1777 /work
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["pipeline"]
CMD ["--help"]

# syntax=docker/dockerfile:1
# Any image with Python 3.11 or newer and its venv module will do; torch's wheels bring CUDA, the host brings the driver.
#   docker build -t iwb-pipeline .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD":/work iwb-pipeline run digits-lt
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH

# dependencies first: several GB that change seldom
COPY pyproject.toml /src/
RUN python3 -m venv /opt/venv \
 && python -c "import tomllib; print(*tomllib.load(open('/src/pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > /src/requirements.txt \
 && pip install -r /src/requirements.txt

COPY LICENSE README.md /src/
COPY pipeline /src/pipeline
COPY cache /src/cache
COPY configs /src/configs
RUN pip install --no-deps /src

# runs as any uid (docker run --user): everything it writes goes to /work, caches to /tmp
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface TORCH_HOME=/tmp/torch
RUN mkdir -p /work && chmod 1777 /work
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["pipeline"]
CMD ["--help"]

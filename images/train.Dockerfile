# train. PyTorch and DeepSpeed for CUDA.
ARG PYTHON=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON} AS build
COPY constraints/train.txt /build/
COPY dist/*.whl /build/
# DeepSpeed comes as source: its operators are compiled where they are used, not here.
ENV DS_BUILD_OPS=0
RUN python -m venv --without-pip /opt/cgd \
    && python -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps -r /build/train.txt /build/*.whl

FROM ${PYTHON}
LABEL org.opencontainers.image.title="cgd-train" \
      org.opencontainers.image.description="Stage programs of cgd-operator that train, with DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0"
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cgd /opt/cgd
# Libraries ask for the name of the user, whom no passwd file knows.
ENV PATH=/opt/cgd/bin:$PATH HOME=/tmp USER=cgd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
CMD ["python", "-m", "cgd_stages.train"]

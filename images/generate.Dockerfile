# Every stage but training. vLLM for CUDA.
ARG PYTHON=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON} AS build
COPY constraints/generate.txt /build/
COPY dist/*.whl /build/
RUN python -m venv --without-pip /opt/cgd \
    && python -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps -r /build/generate.txt /build/*.whl

FROM ${PYTHON}
LABEL org.opencontainers.image.title="cgd-generate" \
      org.opencontainers.image.description="Stage programs of cgd-operator that generate, with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles kernels at start.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev libseccomp2 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cgd /opt/cgd
# Libraries ask for the name of the user, whom no passwd file knows.
ENV PATH=/opt/cgd/bin:$PATH HOME=/tmp USER=cgd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
USER 65532:65532
WORKDIR /tmp
CMD ["python", "-m", "cgd_stages.generate"]

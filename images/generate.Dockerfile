# Every stage but training. vLLM for CUDA.
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS build
# Where pip looks and whom it trusts, if not as by default: they stay in this stage, which is not shipped.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
COPY constraints/generate.txt /build/
COPY dist/*.whl /build/
RUN python3 -m venv --without-pip /opt/cgd \
    && python3 -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps --require-hashes -r /build/generate.txt \
    && python3 -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps --no-index /build/*.whl

FROM ${BASE}
ARG BASE
LABEL org.opencontainers.image.title="cgd-generate" \
      org.opencontainers.image.description="Stage programs of cgd-operator that generate, with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
# Triton compiles kernels at start, and a launcher for each against Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libc6-dev libpython3-dev libseccomp2 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cgd /opt/cgd
# Libraries ask for the name of the user, whom no passwd file knows.
ENV PATH=/opt/cgd/bin:$PATH HOME=/tmp USER=cgd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
# vLLM takes FlashInfer's sampler for granted, which is compiled at its first use, by a whole CUDA toolkit; ours is none.
ENV VLLM_USE_FLASHINFER_SAMPLER=0
# GKE puts the driver there and tells nobody; NVIDIA's container toolkit needs no help.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64
USER 65532:65532
WORKDIR /tmp
CMD ["python", "-m", "cgd_stages.generate"]

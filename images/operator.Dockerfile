# The operator. From the repository's root: make images
ARG BASE=docker.io/library/debian:trixie-slim

FROM ${BASE} AS build
# Where pip looks and whom it trusts, if not as by default: they stay in this stage, which is not shipped.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_CERT
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-pip python3-venv && rm -rf /var/lib/apt/lists/*
COPY constraints/operator.txt /build/
COPY dist/*.whl /build/
RUN python3 -m venv --without-pip /opt/cgd \
    && python3 -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps --require-hashes -r /build/operator.txt \
    && python3 -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps --no-index /build/*.whl

FROM ${BASE}
ARG BASE
LABEL org.opencontainers.image.title="cgd-operator" \
      org.opencontainers.image.description="Operator for Critique-Guided Distillation" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates python3 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/cgd /opt/cgd
# Libraries ask for the name of the user, whom no passwd file knows.
ENV PATH=/opt/cgd/bin:$PATH HOME=/tmp USER=cgd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "cgd_operator"]

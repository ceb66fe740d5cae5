# The operator. From the repository's root: make images
ARG PYTHON=docker.io/library/python:3.12-slim-bookworm

FROM ${PYTHON} AS build
COPY constraints/operator.txt /build/
COPY dist/*.whl /build/
RUN python -m venv --without-pip /opt/cgd \
    && python -m pip --python /opt/cgd/bin/python install --no-cache-dir --no-deps -r /build/operator.txt /build/*.whl

FROM ${PYTHON}
LABEL org.opencontainers.image.title="cgd-operator" \
      org.opencontainers.image.description="Operator for Critique-Guided Distillation" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/cgd /opt/cgd
# Libraries ask for the name of the user, whom no passwd file knows.
ENV PATH=/opt/cgd/bin:$PATH HOME=/tmp USER=cgd PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python", "-m", "cgd_operator"]

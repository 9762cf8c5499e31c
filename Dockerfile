# syntax=docker/dockerfile:1
# docker build -t counterpart .                                for the CPU
# docker build -t counterpart:gpu --build-arg PROVIDER=gpu .   for CUDA 13; the host needs an NVIDIA driver
#
# Every stage begins with BASE, a Debian release with security support. Its Python comes from the same release. For a
# reproducible build, pin BASE by its digest: --build-arg BASE=debian:trixie-slim@sha256:...
ARG BASE=debian:trixie-slim
ARG PROVIDER=cpu

FROM ${BASE} AS build
ARG PROVIDER
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3-venv
# The environment of the service has no pip. The pip of another environment installs into it.
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/counterpart
WORKDIR /src
COPY deploy/requirements requirements
RUN set -- --no-cache-dir --disable-pip-version-check --require-hashes --only-binary :all: \
    && /opt/tools/bin/pip install "$@" --requirement requirements/build.txt \
    && /opt/tools/bin/pip --python /opt/counterpart/bin/python install "$@" --requirement "requirements/${PROVIDER}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY models models
RUN /opt/tools/bin/python -m hatchling build --target wheel --directory dist \
    && /opt/tools/bin/pip --python /opt/counterpart/bin/python install --no-deps --no-index dist/*.whl \
    && python3 -m compileall -q /opt/counterpart/lib

FROM ${BASE} AS base-cpu
ENV COUNTERPART_PROVIDER=cpu

# onnxruntime-gpu 1.31 needs CUDA 13 and cuDNN 9. Both are installed as wheels, and onnxruntime loads them with
# `preload_dlls`. The driver comes from the host.
FROM ${BASE} AS base-gpu
ENV COUNTERPART_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base-${PROVIDER} AS runtime
LABEL org.opencontainers.image.title="counterpart" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Research use only, not a medical device."
# Kubernetes cannot verify that a user that is given by name is not root, so USER below is numeric.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /var/lib/counterpart --shell /usr/sbin/nologin counterpart \
    && install -d -m 700 -o 10001 -g 10001 /var/lib/counterpart
COPY --from=build /opt/counterpart /opt/counterpart
# The host cannot reach the container's loopback, so the service listens on every address of the container.
# It refuses to start without a token.
ENV PATH=/opt/counterpart/bin:$PATH \
    HOME=/var/lib/counterpart \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    COUNTERPART_HOST=0.0.0.0 \
    COUNTERPART_PORT=8000 \
    COUNTERPART_STORE=/var/lib/counterpart
USER 10001:10001
WORKDIR /var/lib/counterpart
VOLUME /var/lib/counterpart
EXPOSE 8000
# The service is ready after a real inference with each model. A slow machine needs time for this.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["counterpart"]
CMD ["serve"]

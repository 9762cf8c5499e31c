# syntax=docker/dockerfile:1
# docker build -t counterpart .                                for the CPU
# docker build -t counterpart:gpu --build-arg PROVIDER=gpu .   for CUDA 13; the host needs an NVIDIA driver
ARG PROVIDER=cpu

# Every stage has the same Debian release, so that the environment can be copied between them.
FROM python:3.11-slim-bookworm AS build
ARG PROVIDER
WORKDIR /src
RUN python -m venv /opt/counterpart
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY app app
COPY models models
RUN /opt/counterpart/bin/pip install --no-cache-dir --constraint constraints.txt ".[${PROVIDER}]" \
    && /opt/counterpart/bin/python -m compileall -q /opt/counterpart/lib

FROM python:3.11-slim-bookworm AS base-cpu
ENV COUNTERPART_PROVIDER=cpu

# onnxruntime-gpu 1.31 needs CUDA 13 and cuDNN 9. Both are installed as wheels, and onnxruntime loads them with
# `preload_dlls`. The driver comes from the host.
FROM python:3.11-slim-bookworm AS base-gpu
ENV COUNTERPART_PROVIDER=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM base-${PROVIDER} AS runtime
LABEL org.opencontainers.image.title="counterpart" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.description="Research use only, not a medical device."
RUN useradd --uid 10001 --create-home --home-dir /home/counterpart counterpart \
    && install -d -m 700 -o counterpart -g counterpart /var/lib/counterpart
COPY --from=build /opt/counterpart /opt/counterpart
# The host cannot reach the container's loopback, so the service listens on every address of the container.
# It refuses to start without COUNTERPART_TOKEN.
ENV PATH=/opt/counterpart/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    COUNTERPART_HOST=0.0.0.0 \
    COUNTERPART_PORT=8000 \
    COUNTERPART_STORE=/var/lib/counterpart
USER counterpart
WORKDIR /home/counterpart
VOLUME /var/lib/counterpart
EXPOSE 8000
# The service is ready after a real inference with each model. A slow machine needs time for this.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["counterpart"]
CMD ["serve"]

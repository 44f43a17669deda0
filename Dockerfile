# syntax=docker/dockerfile:1
#
# The image of the service. One stage builds a wheel and installs it, with the pinned dependencies, into a virtual
# environment; the other carries that environment and nothing else: no compiler, no pip, no source tree.
#
#   docker build -t surefoot:0.1.0 .
#   docker build -t surefoot:0.1.0-gpu --build-arg EXTRAS=gpu .
#
# The image runs as uid 10001 with a read-only root file system; it writes to /var/lib/surefoot and /tmp alone.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# EXTRAS: optional dependencies of the package, separated by commas. `gpu` adds the CUDA libraries.
ARG EXTRAS=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service/ service/
COPY policies/ policies/
COPY safety/ safety/
COPY shadow/ shadow/
COPY surefoot/ surefoot/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m pip wheel --no-deps --wheel-dir /wheels .
RUN python -m venv --without-pip /opt/surefoot
# `set --` keeps the one wheel's name, so that the version stands nowhere in this file.
RUN --mount=type=cache,target=/root/.cache/pip \
    set -- /wheels/surefoot-*.whl \
    && python -m pip --python /opt/surefoot/bin/python install -c constraints.txt "$1${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim
ARG VERSION=""
ARG REVISION=""
LABEL org.opencontainers.image.title="surefoot" \
      org.opencontainers.image.description="Online policy serving for reinforcement learning" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/surefoot/surefoot" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The data directory belongs to the image's user, so that a fresh named volume does too.
RUN groupadd --gid 10001 surefoot \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin surefoot \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/surefoot
COPY --from=build /opt/surefoot /opt/surefoot
# A non-loopback host makes the service ask for SUREFOOT_CLIENT_TOKEN at start: nobody runs it open by accident.
# ONNX Runtime's Linux builds send usage events to their maker since 1.29, unless told not to.
ENV PATH=/opt/surefoot/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    HOME=/tmp \
    ORT_DISABLE_TELEMETRY=1 \
    SUREFOOT_HOST=0.0.0.0 \
    SUREFOOT_PORT=8080 \
    SUREFOOT_DATA_DIR=/var/lib/surefoot
WORKDIR /
USER 10001:10001
VOLUME /var/lib/surefoot
EXPOSE 8080
# The parent process reaps its children itself and turns SIGTERM into a drain, so no init process stands above it.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-m", "service.health_check", "live"]
ENTRYPOINT ["surefoot"]
CMD ["serve"]

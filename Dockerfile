# The policy server.
#   docker build -t paligemma-vla .
#   docker run --rm -p 8000:8000 -e POLICY_TOKEN=... -v "$PWD/my-policy:/policy:ro" paligemma-vla
# With an NVIDIA GPU add: --gpus all
FROM python:3.11.14-slim-bookworm

WORKDIR /app
RUN useradd --create-home --uid 1000 policy
COPY requirements.txt .
RUN pip install --no-cache-dir "$(grep '^torch==' requirements.txt)" && pip install --no-cache-dir -r requirements.txt
COPY clients clients
COPY data data
COPY inference inference
COPY model model
COPY scripts scripts
COPY utils utils
USER policy
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["python", "scripts/serve_policy.py", "--host", "0.0.0.0", "--port", "8000", "--token_env", "POLICY_TOKEN"]
CMD ["--checkpoint_path", "/policy"]

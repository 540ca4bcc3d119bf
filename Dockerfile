# A CPU image of the server. Build and run it with `docker compose up`, see docs/serving.md.
FROM python:3.12-slim

# The compiler makes code for the processor that the server finds itself on.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home orthrus

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
# torch goes first and alone, so that the build without CUDA is taken.
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY src src
COPY views views
RUN pip install --no-cache-dir -c constraints.txt ".[serve,grammar]"

USER orthrus
# Made here, so that a volume in its place belongs to the user: the model and compiled code are kept in it.
RUN mkdir -p /home/orthrus/.cache/orthrus
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["orthrus", "serve", "--host", "0.0.0.0"]

# CPU:  docker build -t bsdiff-rt .
# CUDA: docker build -t bsdiff-rt:cuda --build-arg RUNTIME=cuda .
# TORCH_INDEX names the package index with the build of torch you want; torch's own site lists them.
# Use:  docker run --rm -v "$PWD:/data" bsdiff-rt infer /data/xrays --output /data/out   (docs/install.md)
FROM python:3.12-slim

ARG RUNTIME=cpu
ARG TORCH_INDEX=
ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX}

# g++ compiles engines for the CPU (`bsdiff-rt build-engine`).
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bsdiff-rt
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt torch
COPY pyproject.toml MANIFEST.in README.md LICENSE ./
COPY bsdiff_rt ./bsdiff_rt
RUN python -m pip install --no-cache-dir --constraint constraints.txt ".[${RUNTIME}]"

# Engines are kept in the user's cache. Mount a volume there to keep them after the container ends. /node is for the
# folder of `bsdiff-rt serve`.
RUN useradd --create-home bsdiff && mkdir -p /home/bsdiff/.cache /node && chown bsdiff /home/bsdiff/.cache /node
USER bsdiff
VOLUME /home/bsdiff/.cache
WORKDIR /data

ENTRYPOINT ["bsdiff-rt"]
CMD ["--help"]

# swat_jax with its CUDA kernels, for NVIDIA GPUs:
#
#   docker build --tag swat_jax .
#   docker run --rm --gpus all swat_jax
#   docker run --rm --gpus all --volume "$PWD/runs:/swat_jax/runs" swat_jax \
#       python -m swat_jax.main --config configs/digits.py --workdir runs/digits
#
# The first run prints what is installed, which backend runs, and a test of every kernel. CUDA 13 needs
# driver 580 or newer; for older ones build with --build-arg CUDA=12.8.1. For one kind of GPU the build
# is quicker: --build-arg SWAT_JAX_CUDA_ARCHITECTURES=90a (H100, H200).
ARG CUDA=13.0.2
ARG UBUNTU=24.04

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build
# The packages are those of the Ubuntu release above.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY .ci/container_steps .ci/
COPY ops ops
COPY swat_jax swat_jax
ARG CUDA
ARG SWAT_JAX_CUDA_ARCHITECTURES
RUN bash .ci/container_steps install /opt/swat_jax "cuda${CUDA%%.*}"

# Not the "runtime" image: JAX brings the CUDA libraries that it runs, and a second set is in its way.
FROM nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU}
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/swat_jax /opt/swat_jax
COPY .ci/container_steps /opt/swat_jax/
ENV PATH=/opt/swat_jax/bin:$PATH
RUN bash /opt/swat_jax/container_steps check /opt/swat_jax kernels
WORKDIR /swat_jax
COPY configs configs
CMD ["python", "-m", "swat_jax.info"]

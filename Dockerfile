# bat on an NVIDIA GPU:  docker build -t bat .
# docker run --gpus all --ipc=host -v /data:/data -v $PWD/runs:/home/bat/runs bat \
#     bat-pretrain recipe=as2m data.shards=/data/as2m/train hardware=ddp
# The runs folder must be writable for user 1000 (or say --user $(id -u) and HOME=/home/bat).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# compilers and headers: torch.compile builds its kernels with them (g++: those for the CPU)
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-dev python3-venv gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /opt/bat
COPY . .
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt '.[wandb,parquet]' \
    && (userdel --remove ubuntu || true) \
    && useradd --uid 1000 --create-home bat

USER bat
WORKDIR /home/bat
CMD ["bat-pretrain", "--help"]

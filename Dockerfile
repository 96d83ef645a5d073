# The image of every node: head and workers, on Kubernetes (KubeRay), under the Ray cluster launcher, and by hand:
#   docker build --tag registry.example.com/ovss-ray:0.1.0 .
#   docker run --rm --gpus all registry.example.com/ovss-ray:0.1.0 ovss-ray methods
# Not built on an image of Ray's: those hold many packages in other versions than constraints.txt. CUDA comes with
# torch's wheels.
FROM python:3.11-slim-bookworm

# wget is for KubeRay's probes; rsync and ssh are for the cluster launcher, whose head node starts the other nodes.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 --shell /bin/bash ray

# The NVIDIA runtime gives a container the GPUs that these name; the launcher looks HOME up in the image.
ENV HOME=/home/ray \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0

WORKDIR /opt/ovss-ray
COPY constraints.txt ./
# A layer of its own: gigabytes that outlive a change of the source. With boto3 the launcher's head node starts workers.
RUN pip install --constraint constraints.txt torch torchvision "ray[default]" boto3
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY ovss_ray ovss_ray
RUN pip install --constraint constraints.txt ".[s3,gcs,azure]"

# To spare every node the download of the weights, uncomment; a node without internet needs it.
# USER ray
# RUN python -c "import open_clip; open_clip.create_model('ViT-L-14-quickgelu', pretrained='openai')"

USER ray
WORKDIR /home/ray
# No ENTRYPOINT: KubeRay and the launcher start a shell of their own.
CMD ["ovss-ray", "--help"]

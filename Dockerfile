# neuronet in a container. Scans stay on the host: mount the folders that hold the run, the scans and the results.
#
#   docker build --tag neuronet .
#   docker run --rm --user $(id -u):$(id -g) --volume $PWD:/data neuronet segment T1.nii.gz --run=runs/all_targets --out=labels
#   docker run --rm --user $(id -u):$(id -g) --volume $PWD:/data neuronet bids bids labels participant --run=runs/all_targets
#
# For NVIDIA GPUs: docker build --build-arg EXTRA=[cuda] --tag neuronet . and docker run --gpus all …
FROM python:3.12-slim
ARG EXTRA=""
COPY . /opt/neuronet
RUN python -m pip install --no-cache-dir --constraint /opt/neuronet/constraints.txt "/opt/neuronet${EXTRA}"
# a home for compiled programs, whoever the container runs as
ENV XDG_CACHE_HOME=/tmp/cache
WORKDIR /data
ENTRYPOINT ["neuronet"]

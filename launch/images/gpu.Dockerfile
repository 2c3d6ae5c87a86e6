# docker build -f launch/images/gpu.Dockerfile -t IMAGE .
# docker run --gpus all --ipc host -v "$PWD/runs:/instructax/runs" IMAGE --flags gpu -- run --config configs/demo.py
FROM python:3.12-slim
WORKDIR /instructax
COPY setup.py pyproject.toml README.md ./
COPY src src
# jax[cuda13] brings CUDA, cuDNN and NCCL as packages; the machine needs the driver and NVIDIA's container toolkit.
RUN pip install --no-cache-dir --editable ".[gpu]"
COPY configs configs
COPY launch launch
ENTRYPOINT ["launch/local.sh"]
CMD ["--flags", "gpu", "--", "--help"]

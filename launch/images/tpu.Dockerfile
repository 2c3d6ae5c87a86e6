# docker build -f launch/images/tpu.Dockerfile -t IMAGE .
FROM python:3.12-slim
WORKDIR /instructax
COPY setup.py pyproject.toml README.md ./
COPY src src
# jax[tpu] brings the TPU compiler and runtime as a package.
RUN pip install --no-cache-dir --editable ".[tpu]"
COPY configs configs
COPY launch launch
ENTRYPOINT ["launch/local.sh"]
CMD ["--flags", "tpu", "--", "--help"]

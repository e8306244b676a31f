# docker build -t lvrpo .              PyTorch with CUDA: run it with --gpus all (NVIDIA container toolkit)
# docker build -t lvrpo:cpu --build-arg TORCH_INDEX=URL .    URL: the index of PyTorch's CPU wheels (pytorch.org, Get started)
# docker run --rm -v "$PWD/runs:/home/lvrpo/runs" lvrpo quickstart
FROM python:3.11-slim
ARG TORCH_INDEX=
WORKDIR /opt/lvrpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt '.[peft,external,ocr,math,endpoint]'
RUN useradd --create-home lvrpo
USER lvrpo
WORKDIR /home/lvrpo
ENTRYPOINT ["lvrpo"]
CMD ["--help"]

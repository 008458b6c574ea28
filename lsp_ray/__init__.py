"""Fine-tune large language models on the GPU you own: learned sparse projectors on a Ray actor runtime."""

__version__ = "0.1.0"

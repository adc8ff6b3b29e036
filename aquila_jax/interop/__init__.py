"""Models from and to other libraries: Hugging Face safetensors in and out, GGUF in."""

from aquila_jax.interop.directory import Directory
from aquila_jax.interop.gguf_file import load_gguf
from aquila_jax.interop.huggingface import load_hf, save_hf
from aquila_jax.interop.layout import Slice, slices
from aquila_jax.interop.writer import Writer

__all__ = ["Directory", "Slice", "Writer", "load_gguf", "load_hf", "save_hf", "slices"]

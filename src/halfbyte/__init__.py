"""halfbyte: fine-tunes large language models on 4-bit frozen weights."""

__version__ = "0.1.0"

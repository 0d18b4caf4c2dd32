"""Folders in Hugging Face's format (config.json, safetensors, tokenizer files): read and written without transformers."""

from megalm.checkpoint.huggingface.families import differences, family_of
from megalm.checkpoint.huggingface.read import HuggingFace, open_huggingface

__all__ = ["HuggingFace", "differences", "family_of", "open_huggingface"]

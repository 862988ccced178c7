"""Weights in timm's form, on disk and on the Hugging Face Hub."""

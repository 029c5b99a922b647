"""Shapes of the Gemma 4 models, and folders that SGLang loads them from."""

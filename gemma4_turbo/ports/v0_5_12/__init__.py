"""SGLang 0.5.11 and 0.5.12."""

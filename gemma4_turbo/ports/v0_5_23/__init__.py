"""SGLang 0.5.22 and 0.5.23."""

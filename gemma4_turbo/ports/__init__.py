"""The only code that names SGLang: a folder per release line."""

"""Forwards of SGLang's Gemma 4 modules, rewritten once so that several patches can share each."""

"""From the rows of ``bench/results`` and the catalogue to the tables of README and docs.

Rule: pandas in, Markdown out; no torch, no SGLang, no process. Every figure of a page comes from a row.
"""

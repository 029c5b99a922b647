"""Decisions on the host as pure functions."""

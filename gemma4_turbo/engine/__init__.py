"""Installs, reports and reverts patches; the only place that swaps."""

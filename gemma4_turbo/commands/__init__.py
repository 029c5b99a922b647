"""What ``python -m gemma4_turbo`` does, one file per command."""

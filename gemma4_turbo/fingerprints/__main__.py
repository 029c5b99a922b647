"""``python -m gemma4_turbo.fingerprints``: these are tables; commands read and write them."""

import sys

print(
    "gemma4_turbo.fingerprints: no command: python -m gemma4_turbo release WHEEL says what a release "
    "of SGLang needs, and record WHEEL... writes its fingerprints",
    file=sys.stderr,
)
sys.exit(2)

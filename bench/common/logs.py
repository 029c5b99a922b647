"""What SGLang's log tells."""

from __future__ import annotations

import re

RETRACTED = re.compile(r"KV cache pool is full\. Retract")
"""Once each time that requests are retracted. The word alone stands in the server's arguments, too."""
DIED = re.compile(r"Traceback \(most recent call last\)|Scheduler hit an exception|CUDA error")

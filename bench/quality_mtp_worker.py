"""One SGLang engine with or without an MTP assistant, told what to answer by `quality_mtp.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

from bench import small_tasks  # noqa: E402
from bench.engine_worker import main  # noqa: E402
from bench.mtp_worker import MtpWorker  # noqa: E402
from bench.quality_worker import ended  # noqa: E402


class QualityMtpWorker(MtpWorker):
    """With greedy answers of several lengths."""

    def continued(
        self, ids: list[list[int]], new: list[int], batch: int, to_eos: bool
    ) -> dict[str, Any]:
        """Greedy tokens after prompts, so many prompts at a time, and the verify steps that they took.

        ``new``: tokens of each at most; ``to_eos``: an answer ends with EOS, which is kept.
        """
        rows = []
        for start in range(0, len(ids), batch):
            sampling = [
                {
                    "temperature": 0,
                    "max_new_tokens": count,
                    **({"stop_token_ids": [small_tasks.EOS]} if to_eos else {"ignore_eos": True}),
                }
                for count in new[start : start + batch]
            ]
            answers = self.engine.generate(
                input_ids=ids[start : start + batch], sampling_params=sampling
            )
            for answer in answers:
                meta, tokens = answer["meta_info"], answer["output_ids"]
                if to_eos:
                    tokens = ended(tokens, meta["finish_reason"])
                rows.append({"ids": tokens, "verified": meta.get("spec_verify_ct", 0)})
        return {"rows": rows}


if __name__ == "__main__":  # SGLang's spawned processes import this file again
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(QualityMtpWorker)

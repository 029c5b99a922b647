"""A model of `train_small.py` with quantised weights, as a checkpoint of compressed-tensors.

    python bench/quantise_small.py small-models/moe fp8
    python bench/quantise_small.py small-models/moe w4a16

Writes FOLDER-fp8 or FOLDER-w4a16, which SGLang and `quality.py` load; `bench.models.compressed` has the formats and
says what stays in bf16. Weights are rounded to nearest, without calibration: the model is a worse one, and
the question of `quality.py` is how far engines are from what *its* weights say.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import typer  # noqa: E402

from bench.models import checkpoints, compressed, small_models  # noqa: E402
from bench.models.compressed import Scheme  # noqa: E402


def write(folder: Path, scheme: Scheme, experts: bool = True) -> Path:
    """The quantised checkpoint beside a folder of `train_small.py`; returns its folder.

    Raises:
        ValueError: ``folder`` is quantised already, or its weights cannot be.
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError(f"folder must hold bf16 weights, got {folder}, which is quantised")
    tensors = load_file(folder / small_models.WEIGHTS)
    config["quantization_config"] = compressed.config(tensors, scheme, experts)
    out = folder.with_name(f"{folder.name}-{scheme}")
    checkpoints.write(out, config, compressed.quantised(tensors, scheme, experts))
    notes = json.loads((folder / "training.json").read_text())
    notes |= {"model": f"{notes['model']}-{scheme}", "experts_quantised": experts}
    (out / "training.json").write_text(json.dumps(notes, indent=1))
    for path in folder.iterdir():
        if not (out / path.name).exists():
            shutil.copy(path, out)
    return out


def main(
    folder: Annotated[Path, typer.Argument(help="A folder of train_small.py")],
    scheme: Annotated[Scheme, typer.Argument()],
    experts: Annotated[
        bool, typer.Option(help="FP8: experts too; W4A16 never has them, stock cannot run them")
    ] = True,
) -> None:
    """Write a quantised checkpoint beside a trained one."""
    try:
        out = write(folder, scheme, experts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    bytes_ = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {bytes_ / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)

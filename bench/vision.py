"""Vision encoder and projection of Gemma 4: stock against each patch, and all of them together.

    python bench/vision.py --images 96 --patches 900

SGLang's own multimodal class with random weights, in this process. Per variant: milliseconds, the
peak of memory above what was there before, and the largest distance from stock relative to the
largest value of the token. Rounds alternate between the variants; one row of a CSV each.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import gemma4_turbo
from bench.common.provenance import provenance
from bench.common.results import append
from gemma4_turbo.cli import sglang_process

PATCHES = [
    "vision_batch",
    "vision_positions",
    "vision_clamps",
    "vision_masks",
    "vision_syncs",
    "vision_rope",
]
VARIANTS = {"stock": [], **{name: [name] for name in PATCHES}, "all": PATCHES}
console = Console(width=150)


def build(device: str, small: bool, attention: str) -> Any:
    """The multimodal class: the whole vision encoder, a language model of two layers."""
    from sglang.srt.models.gemma4_mm import Gemma4ForConditionalGeneration
    from transformers import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

    if device == "cpu" or attention:
        sglang_process.prepare_sglang(mm_attention_backend=attention or "triton_attn")
    else:
        sglang_process.prepare_sglang()
    sizes: dict[str, Any] = {}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    of_text: dict[str, Any] = {
        "hidden_size": 1536,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "global_head_dim": 64,
        "vocab_size": 64,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "max_position_embeddings": 128,
    }
    text = Gemma4TextConfig(**of_text)
    config = Gemma4Config(
        text_config=text, vision_config=Gemma4VisionConfig(**sizes), audio_config=None
    )
    fields: Any = config.text_config
    fields.swa_head_dim = fields.swa_v_head_dim = 64
    fields.swa_num_key_value_heads = 1
    if device == "cpu":
        import sglang.srt.layers.rotary_embedding.base as rotary

        rotary._is_cpu = True
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Gemma4ForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        low = 0.5 if "norm" in name else -0.03
        parameter.data.uniform_(low, low + (1.0 if low > 0 else 0.06), generator=generator)
    return model.to(device)


def images(count: int, patches: int, device: str) -> list[Any]:
    """Square images, as the processor hands them over: on the host, fp32."""
    side = int(patches**0.5)
    if side * side != patches or side % 3:
        raise typer.BadParameter(f"--patches must be the square of a multiple of 3, got {patches}")
    grid = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy")
    places = torch.stack(grid, dim=-1).reshape(-1, 2)
    generator = torch.Generator().manual_seed(1)
    return [
        SimpleNamespace(
            feature=torch.rand(patches, 3 * 16**2, generator=generator), image_position_ids=places
        )
        for _ in range(count)
    ]


def main(
    images_: Annotated[int, typer.Option("--images", min=1)] = 96,
    patches: Annotated[int, typer.Option(help="Per image; 900 are 480 by 480 pixels")] = 900,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    per_call: Annotated[
        int, typer.Option(help="Images of a call (of a prompt); 0: all in one")
    ] = 6,
    attention: Annotated[
        str, typer.Option(help="SGLang's mm_attention_backend; empty: its own choice")
    ] = "",
    small: Annotated[bool, typer.Option(help="A toy encoder, for a machine without GPU")] = False,
    out: Annotated[Path, typer.Option(help="CSV to append to")] = Path("bench-vision.csv"),
) -> None:
    """Stock against the patches of the vision encoder."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    gemma4_turbo.apply(only=[])
    model, items = build(device, small, attention), images(images_, patches, device)
    calls = [
        items[at : at + (per_call or images_)] for at in range(0, images_, per_call or images_)
    ]
    base = {**provenance(), "images": images_, "patches": patches, "per_call": per_call}
    base["attention"] = attention or "auto"
    rows, expected = [], None
    for round_ in range(-1, rounds):  # the first one compiles and is not kept
        for variant, names in VARIANTS.items():
            gemma4_turbo.apply(only=names)
            before = torch.cuda.memory_allocated() if cuda else 0
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            with torch.no_grad():
                found = torch.cat([model.get_image_feature(call) for call in calls])
            if cuda:
                torch.cuda.synchronize()
            elapsed = (time.perf_counter() - started) * 1e3
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
            expected = found if expected is None else expected
            scale = expected.float().abs().amax(dim=-1, keepdim=True)
            distance = float(((found.float() - expected.float()).abs() / scale).max())
            engaged = {row.name: (row.state, row.engaged) for row in gemma4_turbo.status()}
            inactive: list[str] = []
            for name in names:
                if engaged[name][0] != "active" or not engaged[name][1]:
                    console.print(f"{variant}: {name} is {engaged[name]}", style="red")
                    inactive.append(name)
            if round_ >= 0:
                rows.append(
                    {**base, "variant": variant, "round": round_, "ms": elapsed}
                    | {"peak_mib": peak, "distance": distance, "inactive": "+".join(inactive)}
                )
    frame = pd.DataFrame(rows)
    append(frame, out)
    medians = frame.groupby("variant", sort=False)[["ms", "peak_mib", "distance"]].median()
    table = Table("variant", "ms", "ratio", "peak, MiB", "largest distance from stock")
    for variant, row in medians.iterrows():
        ratio = row["ms"] / medians.loc["stock", "ms"]
        table.add_row(
            str(variant), f"{row['ms']:.2f}", f"{ratio:.3f}", f"{row['peak_mib']:.0f}",
            f"{row['distance']:.1e}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

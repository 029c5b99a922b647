"""``record`` and ``release`` on a small wheel made from the baseline's sources."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma4_turbo.__main__ import app
from gemma4_turbo.catalogue import CATALOGUE
from gemma4_turbo.cli import releases
from gemma4_turbo.engine import fingerprints
from gemma4_turbo.instance import PORTS, every_port
from tests.releases import BASELINE, is_another

pytestmark = pytest.mark.skipif(is_another(), reason=f"edits the sources of SGLang {BASELINE}")
VISION = "sglang/srt/models/gemma4_vision.py"
RADIX = "sglang/srt/layers/radix_attention.py"
ROPE = "def _apply_multidimensional_rope("


def wheel(folder: Path, release: str = "9.0", name: str = "sglang", **edits: Any) -> Path:
    """Every module that a port names; ``edits``: a stem's source, from the old one."""
    modules = {
        target.partition(":")[0]
        for port in every_port()
        for target in (*port.sources, *(read for read, _ in port.reads))
    }
    modules |= {
        port.superseded_when[0].partition(":")[0] for port in every_port() if port.superseded_when
    }
    path = folder / f"sglang-{release}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(f"sglang-{release}.dist-info/METADATA", f"Name: {name}\nVersion: {release}\n")
        for module in sorted(modules):
            source = fingerprints.installed_source(module)
            if source is None:
                continue
            stem = module.rpartition(".")[2]
            if stem in edits:
                source = edits[stem](source)
            made.writestr(f"{module.replace('.', '/')}.py", source)
    return path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def needs(path: Path) -> dict[str, dict[str, Any]]:
    """By patch, from the JSON."""
    return {
        need["patch"]: need
        for need in json.loads(call("release", path, "--json").stdout)["patches"]
    }


def test_the_baseline_is_recorded_as_it_is(tmp_path: Path) -> None:
    """The file is the one of the package, byte by byte."""
    path = wheel(tmp_path, BASELINE)
    done = call("record", path, "--out", tmp_path / "new")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == f"record: {BASELINE}"
    written = (tmp_path / "new" / f"{BASELINE}.json").read_text()
    assert written == (fingerprints.TABLES / f"{BASELINE}.json").read_text(encoding="utf-8")
    again = json.loads(call("record", path, "--out", tmp_path / "new", "--json").stdout)
    assert [one["was"] for one in again["written"]] == ["same"]
    (tmp_path / "new" / f"{BASELINE}.json").write_text("{}")
    again = json.loads(call("record", path, "--out", tmp_path / "new", "--json").stdout)
    assert [one["was"] for one in again["written"]] == ["different"]


def test_nothing_is_written_if_one_wheel_is_none(tmp_path: Path) -> None:
    (tmp_path / "b.whl").write_text("")
    done = call("record", wheel(tmp_path), tmp_path / "b.whl", "--out", tmp_path / "new")
    assert done.exit_code == 2
    assert not (tmp_path / "new").exists()


def test_a_release_with_the_same_source_needs_nothing(tmp_path: Path) -> None:
    """In one screen, the verdict last; patches of later releases alone need nothing here."""
    done = call("release", wheel(tmp_path, BASELINE))
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == f"SGLang {BASELINE}"
    assert re.fullmatch(
        rf"release {BASELINE}: \d+ same, 1 upstreamed, 2 needless, \d later", lines[-1]
    )
    assert "  router_few, feed_forward_few" in lines
    assert len(lines) < 12
    assert call("release", wheel(tmp_path)).stdout.startswith("SGLang 9.0, not recorded yet\n")


def test_a_name_that_is_read_no_more(tmp_path: Path) -> None:
    """Of a class that is only read from."""
    path = wheel(
        tmp_path,
        piecewise_context_manager=lambda source: source.replace("forward_batch", "the_batch"),
    )
    need = needs(path)["yoco_piecewise"]
    assert need["what"] == "changed"
    assert need["changed"] == ["sglang.srt.compilation.piecewise_context_manager:ForwardContext"]


def test_a_method_that_a_class_took_from_its_base(tmp_path: Path) -> None:
    """It has one of its own now; the class as it was, in another module."""
    inputs = "sglang.srt.speculative.frozen_kv_mtp_info:FrozenKVMTPDraftInput"
    head = "class FrozenKVMTPDraftInput(EagleDraftInput):\n"
    own = f"{head}    def merge_batch(self, other): ...\n"
    path = wheel(tmp_path, frozen_kv_mtp_info=lambda source: source.replace(head, own))
    need = needs(path)["mtp_merge_batch"]
    assert (need["what"], need["changed"]) == ("changed", [f"{inputs}.*"])
    diff = call("release", path, "--diff", "mtp_merge_batch").stdout.splitlines()
    assert [line for line in diff[2:] if line[0] in "+-"] == ["+merge_batch"]
    path = wheel(
        tmp_path,
        frozen_kv_mtp_info=lambda source: source.replace(head, head.replace("Input(", "Put(")),
    )
    with zipfile.ZipFile(path, "a") as archive:
        source = fingerprints.installed_source(inputs.partition(":")[0])
        archive.writestr("sglang/srt/speculative/inputs.py", source)
    moved = needs(path)["mtp_merge_batch"]["moved"]
    assert moved[f"{inputs}.*"] == "sglang.srt.speculative.inputs:FrozenKVMTPDraftInput.*"


def test_a_method_that_a_class_must_not_have(tmp_path: Path) -> None:
    """The older release has none of it to compare with."""
    head = "class TritonAttnBackend(AttentionBackend):\n"
    own = f"{head}    def forward_mixed(self, q): ...\n"
    path = wheel(tmp_path, triton_backend=lambda source: source.replace(head, own))
    backend = "sglang.srt.layers.attention.triton_backend:TritonAttnBackend"
    need = needs(path)["rope_store"]
    assert (need["what"], need["changed"]) == ("changed", [f"{backend}.forward_mixed"])
    diff = call("release", path, "--diff", "rope_store").stdout.splitlines()
    assert diff[3:] == ["+    def forward_mixed(self, q): ..."]


def test_moved_changed_and_gone(tmp_path: Path) -> None:
    """Each is told of its patch, with the function; whatever else stays as it was."""

    def moved(source: str) -> str:
        return source.replace("def _apply_multidimensional_rope", "def _another_rope")

    path = wheel(tmp_path, gemma4_vision=moved)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(
            "sglang/srt/models/rope_of_all.py",
            fingerprints.installed_source("sglang.srt.models.gemma4_vision"),
        )
    found = needs(path)
    old = "sglang.srt.models.gemma4_vision:_apply_multidimensional_rope"
    assert found["vision_rope"]["what"] == "moved"
    assert found["vision_rope"]["moved"] == {
        old: "sglang.srt.models.rope_of_all:_apply_multidimensional_rope"
    }
    found = needs(wheel(tmp_path, gemma4_vision=moved))
    assert (found["vision_rope"]["what"], found["vision_rope"]["gone"]) == ("gone", [old])
    assert found["vision_positions"]["what"] == "same"
    path = wheel(
        tmp_path,
        gemma4_vision=lambda source: source.replace(
            "(_rotate_half(x) * sin)", "(_rotate_half(1 * x) * sin)"
        ),
    )
    found = needs(path)
    assert found["vision_rope"]["what"] == "changed"
    assert call("release", path).exit_code == 1
    diff = call("release", path, "--diff", "vision_rope").stdout.splitlines()
    assert diff[0].startswith(f"--- {BASELINE}/sglang.srt.models.gemma4_vision:")
    assert (
        sum(line.startswith("+") for line in diff)
        == 1 + sum(line.startswith("-") for line in diff) - 1
    )
    assert any("1 * x" in line for line in diff if line.startswith("+"))
    older = wheel(tmp_path, "8.0")
    told = call("release", path, "--diff", "vision_rope", "--against", older).stdout
    assert told.startswith("--- 8.0/")


def test_every_patch_is_told_once(tmp_path: Path) -> None:
    """Also where nothing is left of SGLang."""
    path = tmp_path / "sglang-9.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("sglang-9.1.dist-info/METADATA", "Name: sglang\nVersion: 9.1\n")
    done = call("release", path)
    assert done.stdout.splitlines()[-1] == f"release 9.1: {len(CATALOGUE)} gone"
    lines = done.stdout.splitlines()
    assert all(sum(line.startswith(f"  {name} ") for line in lines) == 1 for name in PORTS)


@pytest.mark.parametrize("command", ["record", "release"])
def test_what_is_no_wheel_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    """With its name; as JSON, too."""
    (tmp_path / "text").write_text("x")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr("x.whl", "")
    cases = {
        tmp_path / "gone.whl": "cannot be read: No such file or directory",
        tmp_path: "is no wheel: it is a folder",
        tmp_path / "text": "is no wheel: it is no zip file",
        tmp_path / "a.zip": "is no wheel: it holds no .dist-info/METADATA",
        tmp_path / "a.zip" / "x.whl": "is inside another file, of which it must be taken out first",
        wheel(tmp_path, name="other"): "is a wheel of other, not of sglang",
    }
    for path, told in cases.items():
        done = call(command, path)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr == f"gemma4_turbo: {path} {told}\n"
        assert json.loads(call(command, path, "--json").stdout) == {"error": f"{path} {told}"}


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    path = wheel(tmp_path)
    assert (
        "--diff names no patch: 'rooter'; choose from"
        in call("release", path, "--diff", "rooter").stderr
    )
    assert "--against goes with --diff" in call("release", path, "--against", path).stderr


def test_tables_in_a_zip_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the package may be in one."""
    path = wheel(tmp_path)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as made:
        made.writestr("fingerprints/x.json", "{}")
    monkeypatch.setattr(fingerprints, "TABLES", zipfile.Path(tmp_path / "p.zip", "fingerprints/"))
    with pytest.raises(
        releases.CannotRunError, match="inside a zip and cannot be written: name a folder"
    ):
        releases.record([path], None, False)

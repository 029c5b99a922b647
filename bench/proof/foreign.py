"""What others may have left: a full state folder, a broken PYTHONPATH, and rights to neither."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

OTHER_USER = 1000


def foreign_files(folder: Path, victim: Path, pids: int = 1500) -> None:
    """Fill a folder with what others may have left in it.

    Args:
        victim: a file elsewhere that links in the folder lead to.
        pids: links are named after so many processes that will be started next.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {
        "config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "pid": "x"}).encode(),
        "deep.json": b"[" * 100_000 + b"]" * 100_000,
        "deeper.json": b'{"pid":' * 50_000 + b"1" + b"}" * 50_000,
        "infinite.json": b'{"pid": Infinity, "start": null, "patches": []}',
        "long.json": b'{"pid": ' + b"9" * 5000 + b', "start": "1", "patches": []}',
        "list.json": b"[1, 2, 3]",
        "null.json": b"null",
        "bytes.json": bytes(range(128, 256)) * 8,
        "empty.json": b"",
        "rows.json": b'{"pid": 1, "start": "0", "patches": "none", "counters": {}}',
        "notes.txt": b"keep me\n",
        "data.counters": b"\0\1\2" * 100,
        "config.tmp": b"half written",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for name in ("pipe.json", "pipe.counters", "pipe.tmp", "9.json"):
        os.mkfifo(folder / name)
    (folder / "folder.json").mkdir()
    (folder / "folder.json" / "inner.json").write_text("{}")
    (folder / "dangling.json").symlink_to(folder / "nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "out.json").symlink_to(victim)
    (folder / "up.json").symlink_to(folder.parent)
    # A socket's path is short: bound from inside its folder, by another process.
    code = "import socket; socket.socket(socket.AF_UNIX).bind('socket.json')"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=folder)
    child.wait()
    for pid in range(child.pid, child.pid + pids):
        (folder / f"{pid}.counters").symlink_to(victim)
        if pid % 10 == 0:
            (folder / f"{pid}.json").symlink_to(victim)


def give_away(folder: Path, notes: list[str]) -> None:
    """Everything below becomes another user's, where this one may do that."""
    if os.geteuid():
        notes.append("not root: the foreign files have this user")
        return
    for where, names, files in os.walk(folder):
        for name in ["", *names, *files]:
            os.chown(Path(where, name), OTHER_USER, OTHER_USER, follow_symlinks=False)


def bad_path(scratch: Path) -> tuple[list[str], Path]:
    """Entries of PYTHONPATH that are no folders with modules, and the one that is locked."""
    folder = scratch / "path"
    folder.mkdir()
    locked, broken = folder / "locked", folder / "broken"
    for made in (locked, broken):
        made.mkdir()
    (locked / "module.py").write_text("value = 1\n")
    (broken / "sitecustomize.py").write_text(
        "# gemma4_turbo is not started here\nraise RuntimeError('this sitecustomize is broken')\n"
    )
    with zipfile.ZipFile(folder / "good.zip", "w") as archive:
        archive.writestr("zipped_module.py", "value = 1\n")
    (folder / "bad.zip").write_bytes(b"PK\3\4 no zip")
    (folder / "file").write_text("no folder\n")
    (folder / "loop").symlink_to("loop")
    entries = [locked, folder / "missing", folder / "loop", folder / "file" / "below"]
    entries += [folder / "good.zip", folder / "bad.zip", Path("/" + "n" * 300), broken]
    locked.chmod(0)
    return [str(entry) for entry in entries], locked


def without_root_rights(locked: Path, path: list[str], notes: list[str]) -> list[str]:
    """A prefix that takes root's right to open everything away, if the server can run without it."""
    if os.geteuid():
        return []
    tool = shutil.which("setpriv")
    if tool is None:
        notes.append("no setpriv: root can search the locked folder")
        return []
    prefix = [tool, "--inh-caps=-all", "--bounding-set=-dac_override,-dac_read_search"]
    code = (
        "import os, sys\n"
        "try:\n    os.listdir(sys.argv[1])\n"
        "except PermissionError:\n"
        "    import importlib.util\n    import gemma4_turbo\n"
        "    for name in ('sglang', 'torch'):\n"
        "        open(importlib.util.find_spec(name).origin).read()\n"
        "else:\n    sys.exit('root can search everything')\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(path))
    try:
        done = subprocess.run(
            [*prefix, sys.executable, "-c", code, str(locked)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        notes.append(f"root keeps its rights: {error}")
        return []
    if done.returncode:
        notes.append(f"root keeps its rights: {(done.stderr.splitlines() or ['?'])[-1]}")
        return []
    return prefix

"""Conversion of a file of ViT-g's size: memory, and how long it takes beside a copy of the file."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

MEMORY_SHARE = 0.5
GIGABYTE = 10**9

MEASURED_CONVERSION = """
import json, re, sys, threading, time
from pathlib import Path
from vit_adapter.conversion.convert import convert_source

peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        status = Path("/proc/self/status").read_text()
        peak = max(peak, 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", status).group(1)))

watcher = threading.Thread(target=watch)
watcher.start()
report = convert_source(sys.argv[1], sys.argv[2])
done.set()
watcher.join()
print(json.dumps({"peak": peak, "preset": report.preset, "seconds": report.seconds}))
"""


def synced_copy_seconds(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


@pytest.fixture
def roomy_folder(tmp_path) -> Iterator[Path]:
    """A folder for gigabytes, emptied at once: pytest keeps its own for a while."""
    if shutil.disk_usage(tmp_path).free < 16 * GIGABYTE:
        pytest.skip("three files of 4.5 GB need 16 GB of free disk")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_vit_g_converts_in_little_anonymous_memory(roomy_folder, vit_state):
    file = roomy_folder / "dinov2_vitg14_pretrain.pth"
    torch.save(vit_state(1536, 40, 37, patch=14, layer_scale="ls1.gamma", swiglu=4096), file)
    out = roomy_folder / "out"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED_CONVERSION, file, out], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.splitlines()[-1])
    copy = synced_copy_seconds(file, roomy_folder / "copy")
    # Times are shown, not judged: they depend on what else the machine does.
    print(f"{file.stat().st_size / GIGABYTE:.2f} GB, a synced copy {copy:.1f} s, conversion {said}")
    assert said["preset"] == "dinov2-giant"
    assert said["peak"] < MEMORY_SHARE * file.stat().st_size
    assert len(list(out.glob("model-*.safetensors"))) == 3

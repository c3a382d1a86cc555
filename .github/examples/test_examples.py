# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of ppg_procgen.py
"""The patches still fit the script, and the copies that they make train, save and go on."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent
SCRIPT = Path(os.environ.get("PPG_SCRIPT", EXAMPLES.parents[1] / "ppg_procgen.py"))  # .github/examples is here
PACKAGES = {"mujoco": ("gymnasium", "mujoco"), "atari": ("gymnasium", "ale_py", "cv2")}
TINY = "--no-cuda --num-envs 2 --num-steps 16 --num-minibatches 2 --n-iteration 2 --precision fp32"
TINY += " --e-policy 1 --e-value 1 --e-auxiliary 1 --num-aux-rollouts 2"
PHASE = 64


@pytest.mark.parametrize("suite", PACKAGES)
def test_a_patched_copy_trains_and_goes_on(suite, tmp_path, monkeypatch):
    copy = tmp_path / f"ppg_{suite}.py"
    patch = ["patch", "--fuzz=0", "-o", copy, SCRIPT, EXAMPLES / f"{suite}.patch"]
    subprocess.run(patch, check=True, capture_output=True)  # also where the packages are missing
    for package in PACKAGES[suite]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(tmp_path)
    ppg = importlib.import_module(copy.stem)
    flags = [*TINY.split(), "--runs-dir", str(tmp_path), "--total-timesteps", str(2 * PHASE)]
    assert ppg.train(ppg.parse_args(flags))["global_step"] == 2 * PHASE
    (checkpoint,) = tmp_path.glob("*/checkpoint.pt")
    flags = ["--resume", str(checkpoint.parent), "--total-timesteps", str(3 * PHASE)]
    assert ppg.train(ppg.parse_args(flags))["global_step"] == 3 * PHASE

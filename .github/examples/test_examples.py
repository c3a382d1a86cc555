# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of ppg_procgen.py
"""The patches still fit the script; the environments of the copies pass its tests' check; they train and go on."""

import importlib
import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent
SCRIPT = Path(os.environ.get("PPG_SCRIPT", EXAMPLES.parents[1] / "ppg_procgen.py"))  # .github/examples is here
PACKAGES = {"mujoco": ("gymnasium", "mujoco"), "atari": ("gymnasium", "ale_py", "cv2")}
TINY = "--no-cuda --num-envs 2 --num-steps 16 --num-minibatches 2 --n-iteration 2 --precision fp32"
TINY += " --e-policy 1 --e-value 1 --e-auxiliary 1 --num-aux-rollouts 2"
PHASE = 64
CHECKED_STEPS = {"mujoco": 1010, "atari": 100}  # a time limit ends an episode of HalfCheetah after 1000 steps


@pytest.mark.parametrize("suite", PACKAGES)
def test_patched_copy(suite, tmp_path, monkeypatch):
    copy = tmp_path / f"ppg_{suite}.py"
    patch = ["patch", "--fuzz=0", "-o", copy, SCRIPT, EXAMPLES / f"{suite}.patch"]
    subprocess.run(patch, check=True, capture_output=True)  # also where the packages are missing
    for package in PACKAGES[suite]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(tmp_path)
    ppg = importlib.import_module(copy.stem)
    shutil.copy(SCRIPT.with_name("test_ppg_procgen.py"), tmp_path / f"test_{copy.name}")
    checks = importlib.import_module(f"test_{copy.stem}")
    flags = [*TINY.split(), "--runs-dir", str(tmp_path), "--total-timesteps", str(2 * PHASE)]
    checks.check_envs(partial(ppg.make_envs, ppg.parse_args(flags), num_envs=2), CHECKED_STEPS[suite])
    assert ppg.train(ppg.parse_args(flags))["global_step"] == 2 * PHASE
    (checkpoint,) = tmp_path.glob("*/checkpoint.pt")
    flags = ["--resume", str(checkpoint.parent), "--total-timesteps", str(3 * PHASE)]
    assert ppg.train(ppg.parse_args(flags))["global_step"] == 3 * PHASE

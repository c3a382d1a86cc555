# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of ppg_procgen.py
"""Speed of the bare network and of the program: `python .github/benchmark.py [num_envs [n_iteration [repeats]]]`."""

import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppg_procgen as ppg

SCRIPT = ROOT / "ppg_procgen.py"
PPO = ("--arch", "shared", "--e-policy", "3", "--e-value", "3", "--e-auxiliary", "0")
SETTINGS = {
    "textbook": "textbook (float32, NHWC images permuted, weights contiguous, the allocator as it is)",
    "float32": "best in float32 (weights channels_last, freed memory kept)",
    "program": "as the program runs it, in the precision above"}  # fmt: skip
PASSES = {"rollout": "forward", "policy": "forward+backward", "old logits": "forward", "auxiliary": "forward+backward"}
PARTS = {"rollout": ["rollout"], "policy_phase": ["policy"], "auxiliary_phase": ["old logits", "auxiliary"]}
PROGRAMS = {  # flags, and how often a step of the program makes each of the passes through a trunk
    "dual": (["--arch", "dual"], (2, 2, 1, 12)), "detach": (["--arch", "detach"], (1, 1, 1, 6)), "PPO": (PPO, (1, 3, 0, 0))
}  # fmt: skip


def print_rates(num_envs, setting):
    """A process of its own in the benchmark: images/s of one trunk in each of the passes, as JSON."""
    args = ppg.parse_args(["--num-envs", num_envs, "--precision", "auto" if setting == "program" else "fp32"])
    envs = ppg.make_envs(args, num_envs=1)
    spaces = (envs.single_observation_space, envs.single_action_space)
    if setting == "textbook":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        agent = ppg.Agent(*spaces, "shared").to(device, memory_format=torch.contiguous_format)
        limit = math.inf
    else:
        device = ppg.start_process(args)
        agent = ppg.Agent(*spaces, "shared", args.precision).to(device)
        limit = ppg.choose_segments_per_pass(device, args.num_steps) * args.num_steps
    rates = []
    for kind, what in PASSES.items():
        segments = args.num_envs // args.num_minibatches if kind == "policy" else args.num_aux_rollouts
        size = args.num_envs if kind == "rollout" else min(segments * args.num_steps, limit)
        obs = torch.randint(256, (size, 64, 64, 3), dtype=torch.uint8, device=device)
        count = -1  # the first pass warms up
        start = math.inf
        while time.perf_counter() - start < 2:
            agent.zero_grad()
            with torch.set_grad_enabled("backward" in what):
                output = agent({"obs": obs}, auxiliary_phase=kind in PARTS["auxiliary_phase"])
            if "backward" in what:
                torch.stack([head.square().mean() for head in output]).sum().backward()
            if kind == "rollout":
                output.policy.cpu()  # the environments wait for the actions
            count += 1
            if count == 0:
                obs.sum().item()  # waits for a GPU
                start = time.perf_counter()
        obs.sum().item()
        rates.append(count * size / (time.perf_counter() - start))
    print(json.dumps(rates))


def output_of(*command):
    """What a process of its own prints; if it fails, its errors end the benchmark."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\nthis failed: {shlex.join(command)}")
    return done.stdout


def busy_seconds(flags):
    """How long kernels and copies keep the GPU busy in each part of a run."""
    seconds = dict.fromkeys(PARTS, 0)

    def profiled(part, function, *args):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = function(*args)
            torch.cuda.synchronize()
        for event in profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
                seconds[part] += event.time_range.elapsed_us() / 1e6
        return result

    functions = {}
    for part, name in zip(PARTS, ("collect_rollout", "policy_update", "auxiliary_phase")):
        functions[name] = partial(profiled, part, getattr(ppg, name))
    with mock.patch.multiple(ppg, **functions), tempfile.TemporaryDirectory() as runs_dir:
        ppg.train(ppg.parse_args([*map(str, flags), "--runs-dir", runs_dir]))
    return seconds


def print_table(header, rows):
    print("", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)), sep="\n", flush=True)


def benchmark(num_envs, n_iteration, repeats):
    """Prints the speed of the bare network and that of the program, medians of interleaved repeats, as Markdown."""
    steps = num_envs * ppg.parse_args([]).num_steps  # of an iteration
    sizes = ["--num-envs", num_envs, "--n-iteration", n_iteration, "--total-timesteps", 2 * n_iteration * steps]
    args = ppg.parse_args([*map(str, sizes)])
    device = ppg.start_process(args)
    precision = args.precision
    gpu = device.type == "cuda"
    found = {name: [] for name in SETTINGS if name != "program" or precision != "fp32"}
    summaries = {name: [] for name in PROGRAMS}
    for repeat in range(repeats + 1):
        for name, repeated in found.items():
            repeated.append(json.loads(output_of(__file__, "rates", num_envs, name)))
        for name, (flags, _) in PROGRAMS.items():
            if repeat < repeats:
                with tempfile.TemporaryDirectory() as runs_dir:
                    output_of(SCRIPT, *sizes, "--checkpoint-interval", 0, *flags, "--runs-dir", runs_dir)
                    summaries[name].append(json.loads(next(Path(runs_dir).glob("*/summary.json")).read_text()))
    hardware = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    run = f"{torch.get_num_threads()} threads, {num_envs} environments, N_pi {n_iteration}, precision {precision}"
    print(f"torch {torch.__version__}, {hardware}, {run}; medians of {repeats} runs, {repeats + 1} rates")
    rates = {name: dict(zip(PASSES, np.median(repeated, axis=0))) for name, repeated in found.items()}
    rates.setdefault("program", rates["float32"])  # where bfloat16 is slow they are the same
    rows = [[text, *(f"{rate:,.0f}" for rate in rates[name].values())] for name, text in SETTINGS.items()]
    print_table(["images/s of one trunk", *(f"{kind}, {what}" for kind, what in PASSES.items())], rows)

    rows = []
    for name, (flags, counts) in PROGRAMS.items():
        costs = {x: {kind: n / rates[x][kind] for kind, n in zip(PASSES, counts)} for x in SETTINGS}  # seconds a step
        alone = [1 / sum(cost.values()) for cost in costs.values()]
        speeds = [summary["SPS"] for summary in summaries[name]]
        sps = statistics.median(speeds)
        row = [name, *(f"{x:,.0f}" for x in alone), f"{sps:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f})"]
        row += [f"{sps / alone[0]:.2f}", f"{sps / alone[-1]:.2f}"]
        if gpu:
            one_phase = ("--n-iteration", 1, "--total-timesteps", steps, "--checkpoint-interval", 0)
            busy = busy_seconds([*sizes, *flags, *one_phase])
        for part, kinds in PARTS.items():
            seconds = statistics.median(summary["seconds"][part] for summary in summaries[name])
            least = 2 * n_iteration * steps * sum(costs["program"][kind] for kind in kinds)
            row.append(f"{seconds:.1f} ({least:.1f})")
            if gpu and seconds > 0:
                row[-1] += f", {2 * n_iteration * busy[part] / seconds:.0%}"
        memory = [summaries[name][-1]["peak_memory_bytes"][x] / 1e9 for x in ("host", "device")]
        rows.append([*row, *(f"{size:.2f}" for size in memory)])
    header = ["SPS", *(f"network alone, {name}" for name in SETTINGS), "program", "/ textbook", "/ network alone"]
    note = "s (network alone), GPU busy" if gpu else "s (network alone)"
    print_table([*header, *(f"{part}, {note}" for part in PARTS), "host GB", "device GB"], rows)


if __name__ == "__main__":
    defaults = [64, 8, 2] if torch.cuda.is_available() else [16, 2, 2]
    match sys.argv[1:]:
        case ["rates", num_envs, setting]:
            print_rates(num_envs, setting)
        case given if len(given) <= 3 and all(re.fullmatch("[1-9][0-9]*", size) for size in given):
            benchmark(*map(int, given), *defaults[len(given) :])
        case _:
            ppg.fail(f"usage: python {sys.argv[0]} [num_envs [n_iteration [repeats]]]")

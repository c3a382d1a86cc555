# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of ppg_procgen.py
"""Tests of the script beside this file (test_X.py tests X.py): `pytest`; the first to run: `pytest -k stopped`.

The shipped functions are compared with slow references that are written from the paper, or the program is run as a
user runs it. A copy of the script, ppg_rnd.py, is tested by a copy of this file, test_ppg_rnd.py.

| section | what it holds | changes with |
| --- | --- | --- |
| A. algorithm | mathematics, networks, gradient routing, both phases, learning, the authors' figures | an idea: on purpose |
| B. invariants | no stale gradient, first KL 0, same seed same run, processes, resume to the bit, devices | hardly any idea |
| C. program | flags, files, progress, evaluation, film, wandb, faults, README | a flag, a metric, a file |

`pytest -m "not algorithm"` runs B and C, what stays green after almost any change; marks: algorithm, invariant, program.
"""

import copy
import importlib
import inspect
import io
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import weakref
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ppg = importlib.import_module(Path(__file__).stem.removeprefix("test_"))
gym = ppg.gym  # imported by itself it prints a page
SCRIPT = Path(ppg.__file__)
README = SCRIPT.with_name("README.md")
RESULTS = README.parent / ".github/results/README.md"
ARCHS = ("dual", "detach", "shared")
PPO = ("--arch", "shared", "--e-policy", 3, "--e-value", 3, "--e-auxiliary", 0)
CPU = torch.device("cpu")
IMAGES = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
# Sums depend on the number of threads: all processes that are compared to the bit have one.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
# A script makes its background jobs deaf to SIGINT: the program listens all the same.
DEAF = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), "env": ENVIRONMENT}
DEAF |= {"stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Signpost(gym.vector.VectorEnv):
    """A bright block in a corner names the one action of four that earns 1. Episodes last 1 to 12 steps."""

    def __init__(self, num_envs):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(4))
        self.history = []  # (observation, actions, rewards, done, next observation) of every step
        self.finished = []  # (return, length) of every episode

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.lengths = self.rng.integers(1, 13, self.num_envs)
        self.ages = np.zeros(self.num_envs, int)
        self.returns = np.zeros(self.num_envs)
        return self.draw(), {}

    def draw(self):
        self.right = self.rng.integers(4, size=self.num_envs)
        self.obs = self.rng.integers(64, size=(self.num_envs, 64, 64, 3), dtype=np.uint8)
        for image, corner in zip(self.obs, self.right):
            y, x = 40 * (corner // 2), 40 * (corner % 2)
            image[y : y + 24, x : x + 24] = 255
        return self.obs

    def step(self, actions):
        obs, rewards = self.obs, (actions == self.right).astype(np.float32)
        self.ages += 1
        self.returns += rewards
        done = self.ages == self.lengths
        self.finished += [(self.returns[i], self.ages[i]) for i in np.flatnonzero(done)]
        self.lengths = np.where(done, self.rng.integers(1, 13, self.num_envs), self.lengths)
        self.ages, self.returns = self.ages * ~done, self.returns * ~done
        self.history.append((obs, actions, rewards, done, self.draw()))
        return self.obs, rewards, done, np.zeros_like(done), {}


def train_in_signposts(args, factory=lambda args, *, num_envs, **_: Signpost(num_envs)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppg, "make_envs", factory)
        return ppg.train(args)


def make_args(runs_dir, *flags):
    """A run of 4 environments and 4 iterations of 8 steps, in 2 phases, on the CPU; `flags` override."""
    small = "--num-envs 4 --num-steps 8 --n-iteration 2 --num-minibatches 2 --num-aux-rollouts 2 --total-timesteps 128"
    small += " --no-cuda --env-threads 1"
    return ppg.parse_args([*small.split(), "--runs-dir", str(runs_dir), *map(str, flags)])


# Fruitbot gives rewards early, and its episodes are short. A phase is 2 iterations of 2 environments and 16 steps.
PHASE = 64
TINY = shlex.split("--env-id fruitbot --arch detach --num-envs 2 --num-steps 16 --n-iteration 2 --num-minibatches 2")
TINY += shlex.split("--e-auxiliary 1 --num-aux-rollouts 2 --env-threads 1 --no-cuda")


def phases(count, processes=1):
    return ["--total-timesteps", str(count * PHASE * processes)]


def train(runs_dir, *flags):
    """A run of TINY on Procgen in this process. Returns its directory, the only one there."""
    ppg.train(ppg.parse_args([*TINY, "--runs-dir", str(runs_dir), *map(str, flags)]))
    return only_run(runs_dir)


def resume(run_dir, *flags):
    ppg.train(ppg.parse_args(["--resume", str(run_dir), *map(str, flags)]))


def only_run(runs_dir):
    (directory,) = Path(runs_dir).iterdir()
    return directory


def program(*flags, cwd, **environment):
    """Runs the script as a user does."""
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    options = {"cwd": cwd, "env": ENVIRONMENT | environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **options, check=False)


def refusal(capsys, *flags):
    """The one sentence with which these flags are refused; exit status 2."""
    with pytest.raises(SystemExit) as ending:
        ppg.parse_args([*map(str, flags)])
    (sentence,) = capsys.readouterr().err.splitlines()
    assert ending.value.code == 2 and sentence.startswith("error: ")
    return sentence


def read_rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_checkpoint(run_dir):
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def leaves(tree, path=""):
    """Every value of nested dicts, lists and tuples, under its path."""
    if not isinstance(tree, (dict, list, tuple)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}


def learned(run_dir, *ignored):
    """What must be equal to the bit in two equal runs: the rows without times, and all of the checkpoint but flags."""
    ignored = ("time/", "charts/SPS", *ignored)
    rows = [{k: v for k, v in row.items() if not k.startswith(ignored)} for row in read_rows(run_dir)]
    saved = leaves({name: part for name, part in read_checkpoint(run_dir).items() if name != "args"})
    not_learned = ("/run/seconds/", "/run/charts/SPS", "/run/evaluation")
    return rows, {name: leaf for name, leaf in saved.items() if not name.startswith(not_learned)}


def assert_same_run(one, other, *ignored):
    """Rows, parameters, optimisers, normalisers and simulators of two runs are equal to the bit."""
    (rows, leaves_of_one), (other_rows, leaves_of_other) = learned(one, *ignored), learned(other, *ignored)
    assert rows == other_rows
    assert leaves_of_one.keys() == leaves_of_other.keys()
    assert any("exp_avg" in name for name in leaves_of_one) and any("policy_head" in name for name in leaves_of_one)
    for name, leaf in leaves_of_one.items():
        other_leaf = leaves_of_other[name]
        same = torch.equal(leaf, other_leaf) if isinstance(leaf, torch.Tensor) else leaf == other_leaf
        assert same, f"{name} differs"


def make_agent(arch="dual", precision="fp32", seed=0, num_actions=4, sharpness=30.0):
    """An agent whose logits differ from image to image, unlike those of a fresh one."""
    torch.manual_seed(seed)
    spaces = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(num_actions)
    agent = ppg.Agent(*spaces, arch, precision)
    agent.policy_head.weight.data *= sharpness
    return agent


def inputs(obs):
    """What the network reads beside observations [..., H, W, C]: all that a copy edits whose network reads more."""
    return {"obs": obs}


def call(agent, obs, **options):
    return agent(inputs(obs), **options)


def random_images(*shape):
    """Coarse noise, so that the network tells one image from another."""
    small = torch.randint(256, (math.prod(shape), 3, 4, 4)).float()
    return F.interpolate(small, size=(64, 64)).permute(0, 2, 3, 1).to(torch.uint8).reshape(*shape, 64, 64, 3)


def random_rollout(agent, num_envs, num_steps):
    """A rollout whose log-probabilities are 0.4 nats off those of the agent, so that some ratios are clipped."""
    shape, obs = (num_envs, num_steps), random_images(num_envs, num_steps)
    with torch.no_grad():
        logits = call(agent, obs).policy
    actions = torch.randint(logits.shape[-1], shape)
    log_probs = logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0] + 0.4 * torch.randn(shape)
    values, firsts = torch.randn(num_envs, num_steps + 1), torch.zeros(num_envs, num_steps + 1)
    rewards, final_values = torch.randn(shape), torch.zeros(shape)
    return ppg.Rollout(inputs(obs), actions, log_probs, values, final_values, rewards, firsts, [])


def adams(agent, rate=1e-3):
    """Optimisers under every name that a policy phase may ask for."""
    return {name: torch.optim.Adam(agent.parameters(), rate) for name in ("policy_and_value", "value", "policy")}


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_same_change(new, expected, old, tolerance=1e-2):
    """Both went the same way from `old`, and far enough for that to say something."""
    change, error = (expected - old).norm(), (new - expected).norm()
    assert change > 1e-4 and error < tolerance * change, f"change {change}, error {error}"


def spy(monkeypatch, name, note):
    """Has ppg.<name> go on as before, and appends note(arguments, result) to the list that is returned."""
    notes, real = [], getattr(ppg, name)

    def watched(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        result = real(*args, **kwargs)
        notes.append(note(bound.arguments, result))
        return result

    monkeypatch.setattr(ppg, name, watched)
    return notes


def spy_on_steps(monkeypatch, note):
    """Appends note(optimizer) of every step of an Adam to the list that is returned."""
    notes, real = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *args: notes.append(note(self)) or real(self, *args))
    return notes


def spy_on_losses(monkeypatch, note=lambda x: x.item()):
    """Appends {name: note(tensor)} of each pass's metrics to the list that is returned, before they become means."""
    notes, real = [], ppg.Means.add

    def add(self, metrics):
        notes.append({name: note(value) for name, value in metrics.items()})
        real(self, metrics)

    monkeypatch.setattr(ppg.Means, "add", add)
    return notes


def column(rows, name):
    return [row[name] for row in rows if name in row]


def at_call(monkeypatch, number, action, name="policy_update"):
    """Has this call of ppg.<name> end with action(agent, result), or with an error."""

    def note(arguments, result):
        if len(calls) == number - 1:
            if isinstance(action, BaseException):
                raise action
            action(arguments["agent"], result)

    calls = spy(monkeypatch, name, note)


def mark_section(name):
    """Marks the tests above that belong to no section yet."""
    for key, test in list(globals().items()):
        marks = {mark.name for mark in getattr(test, "pytestmark", [])}
        if key.startswith("test_") and not marks & {"algorithm", "invariant", "program"}:
            getattr(pytest.mark, name)(test)


# ---- A. algorithm: mathematics -------------------------------------------------------------------
def test_gae_matches_the_definition():
    """An advantage is sum_k (gamma lambda)^k delta_{t+k}, up to the end of its episode or of the rollout."""
    torch.manual_seed(0)
    rewards = torch.randn(6, 40).double()
    values = torch.randn(6, 41).double()
    firsts = (torch.rand(6, 41) < 0.15).double()
    firsts[:2, -1] = torch.tensor([1, 0])  # a rollout that ends with its episode, and one that does not
    final_values = torch.randn(6, 40).double() * firsts[:, 1:] * (torch.rand(6, 40) < 0.5)  # of half of the ends
    tensors = {"rewards": rewards, "values": values, "final_values": final_values, "firsts": firsts}
    advantages, targets = ppg.compute_gae(**tensors, gamma=0.97, gae_lambda=0.9)
    for n, t in np.ndindex(6, 40):
        total = 0.0
        weight = 1.0  # (gamma lambda)^k, and 0 beyond the end of the episode
        for k in range(t, 40):
            goes_on = float(firsts[n, k + 1] == 0)
            next_value = values[n, k + 1] if goes_on else final_values[n, k]  # 0, but for time limits
            total += weight * float(rewards[n, k] + 0.97 * next_value - values[n, k])
            weight *= 0.97 * 0.9 * goes_on
        assert float(advantages[n, t]) == pytest.approx(total, abs=1e-9)
        assert float(targets[n, t]) == pytest.approx(total + float(values[n, t]), abs=1e-9)


def test_reward_normalizer_matches_a_loop():
    """Returns go on from rollout to rollout and end with episodes; the variance is that of all and of the prior."""
    torch.manual_seed(0)
    normalizer = ppg.RewardNormalizer(3, gamma=0.9, clip=1.5)
    running = [0.0] * 3
    seen = []
    for rollout in range(4):
        rewards = (torch.randn(3, 20) + 0.5) * 10.0 ** (rollout - 2)
        firsts = (torch.rand(3, 20) < 0.2).float()
        firsts[:, 0] = 1.0 if rollout == 0 else torch.tensor([0.0, 1.0, 0.0])
        for n, t in np.ndindex(3, 20):
            running[n] = float(rewards[n, t]) + (0.0 if firsts[n, t] else 0.9 * running[n])
            seen.append(running[n])
        count = 1e-4 + len(seen)  # the prior has a count of 1e-4, mean 0 and variance 1
        variance = (1e-4 + sum(x * x for x in seen)) / count - (sum(seen) / count) ** 2
        expected = rewards / math.sqrt(variance + 1e-8)
        torch.testing.assert_close(normalizer(rewards, firsts), expected.clamp(-1.5, 1.5), rtol=1e-5, atol=1e-6)
    assert expected.abs().max() > 1.5 > expected.abs().median()


def slow_policy_losses(logits, actions, old_log_probs, advantages, clip_coef, kl_coef):
    """Policy loss, entropy, E[-log ratio], E[ratio - 1 - log ratio], clipped share: means, sample by sample."""
    total = 0
    for row, action, old_log_prob, advantage in zip(logits, actions, old_log_probs, advantages):
        log_probs = row - row.exp().sum().log()
        log_ratio = log_probs[action] - old_log_prob
        ratio = log_ratio.exp()
        gain = ratio * advantage
        if clip_coef:
            gain = min(gain, max(1 - clip_coef, min(1 + clip_coef, ratio)) * advantage)
        loss = -gain + kl_coef * 0.5 * log_ratio**2
        entropy = -(log_probs.exp() * log_probs).sum()
        clipped = (abs(ratio - 1) > clip_coef).float()
        total = total + torch.stack([loss, entropy, -log_ratio, ratio - 1 - log_ratio, clipped])
    return total / len(logits)


@pytest.mark.parametrize("clip_coef", [0.2, 0.0, 0.1, 0.5])
def test_surrogate_matches_a_loop(clip_coef):
    """Loss and metrics are means over the samples, and the gradient is the slope of the loss."""
    torch.manual_seed(0)
    logits = torch.randn(12, 5).double()
    actions = torch.randint(5, (12,))
    advantages = torch.randn(12).double()
    old_log_probs = logits.log_softmax(-1)[range(12), actions] + 0.5 * torch.randn(12).double()
    expected = slow_policy_losses(logits, actions, old_log_probs, advantages, clip_coef, 0).tolist()

    def loss_of(logits):
        log_ratio = logits.log_softmax(-1)[range(12), actions] - old_log_probs
        return ppg.surrogate_loss(log_ratio, advantages, clip_coef=clip_coef)

    assert loss_of(logits).item() == pytest.approx(expected[0])
    assert torch.autograd.gradcheck(loss_of, logits.requires_grad_())  # finite differences
    pi = ppg.action_distribution(logits)
    metrics = ppg.ratio_metrics(pi.log_prob(actions) - old_log_probs, clip_coef)
    found = [metrics[f"losses/{name}"].item() for name in ("old_approx_kl", "approx_kl", "clipfrac")]
    assert [pi.entropy().mean().item(), *found] == pytest.approx(expected[1:])


def test_kl_matches_a_loop():
    """From the old policy to the new one, and 0 only between equals."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 3, 4, 5).double()
    expected = float(slow_kl(old.flatten(0, 1), new.flatten(0, 1)))
    assert ppg.kl_from_old_policy(old, new).item() == pytest.approx(expected) and expected > 0.1
    assert ppg.kl_from_old_policy(old, old).item() == 0


def slow_kl(old_logits, logits):
    """The mean over the states of sum_a pi_old(a) (log pi_old(a) - log pi(a))."""
    old_log_probs = old_logits - old_logits.exp().sum(-1, keepdim=True).log()
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    return (old_log_probs.exp() * (old_log_probs - log_probs)).sum() / len(logits)


# Game, then R_min and R_max in easy and in hard mode (Cobbe et al. 2019, arXiv 1912.01588, appendix C).
RETURNS = """bigfish 1 40 0 40, bossfight 0.5 13 0.5 13, caveflyer 3.5 12 2 13.4, chaser 0.5 13 0.5 14.2,
climber 2 12.6 1 12.6, coinrun 5 10 5 10, dodgeball 1.5 19 1.5 19, fruitbot -1.5 32.4 -0.5 27.2, heist 3.5 10 2 10,
jumper 3 10 1 10, leaper 3 10 1.5 10, maze 5 10 4 10, miner 1.5 13 1.5 20, ninja 3.5 10 2 10, plunder 4.5 30 3 30,
starpilot 2.5 64 1.5 35"""


def test_normalized_returns():
    """A return is normalised with the range of its game in its mode, and is None for an unknown game."""
    games = [line.split() for line in RETURNS.split(",")]
    assert len(games) == 16
    for game, *numbers in games:
        for mode, low, high in zip(("easy", "hard"), map(float, numbers[::2]), map(float, numbers[1::2])):
            args = ppg.parse_args(["--env-id", game, "--distribution-mode", mode])
            found = [ppg.normalized_return(args, x) for x in (low, high, 2 * high - low)]
            assert found == pytest.approx([0, 1, 2]), (game, mode)
    args.env_id = "signpost"
    assert ppg.normalized_return(args, 1.0) is None


# ---- A. algorithm: networks and gradient routing -------------------------------------------------
def layers_of(*parts):
    """Their convolutions and dense layers, in the order in which they run."""
    return [layer for part in parts for layer in part.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_weights(arch):
    """Incoming weights of every unit have the norm of their layer's kind; biases are 0; no two trunks are equal."""
    agent = make_agent(arch, sharpness=1)
    num_trunks = 2 if arch == "dual" else 1
    stack = [1.0, *4 * [math.sqrt(1 / math.sqrt(3) / math.sqrt(2))]]
    scales = [*num_trunks * [*3 * stack, 1.4], 0.1, 0.1, 0.1]
    layers = layers_of(agent)
    for layer, scale in zip(layers, scales, strict=True):
        norms = layer.weight.detach().flatten(1).square().sum(1).sqrt()
        torch.testing.assert_close(norms, torch.full_like(norms, scale), rtol=1e-5, atol=0)
        assert not layer.bias.any()
    first_units = torch.stack([layer.weight[i].flatten() for layer in layers[: 16 * num_trunks : 16] for i in (0, 1)])
    assert torch.pdist(first_units).min() > 0.1


@pytest.mark.parametrize(("arch", "image"), [("dual", (64, 64, 3)), ("detach", (84, 84, 1)), ("shared", (40, 52, 4))])
def test_forward_is_the_impala_network(arch, image):
    """Bytes / 255 pass through three stacks, the dense layer and the heads; what is not asked for does not run."""
    torch.manual_seed(0)
    agent = ppg.Agent(gym.spaces.Box(0, 255, image, np.uint8), gym.spaces.Discrete(7), arch)
    for parameter in agent.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # or biases would be 0
    obs = torch.randint(256, (5, *image), dtype=torch.uint8)

    def outputs(trunk, *heads):
        *convs, dense = layers_of(trunk)
        x = torch.from_numpy(np.moveaxis(obs.numpy(), 3, 1).astype(np.float32) / 255)
        for i in (0, 5, 10):
            x = F.max_pool2d(F.conv2d(x, convs[i].weight, convs[i].bias, padding=1), 3, 2, 1)
            for a, b in (convs[i + 1 : i + 3], convs[i + 3 : i + 5]):
                inner = F.relu(F.conv2d(F.relu(x), a.weight, a.bias, padding=1))
                x = x + F.conv2d(inner, b.weight, b.bias, padding=1)
        features = F.relu(F.linear(F.relu(x.flatten(1)), dense.weight, dense.bias))
        return [F.linear(features, head.weight, head.bias) for head in heads]

    logits, aux_values = outputs(agent.policy_trunk, agent.policy_head, agent.aux_value_head)
    (values,) = outputs(agent.value_trunk, agent.value_head)
    assert logits.shape == (5, 7) and logits.std(dim=0).min() > 1e-2  # the images do tell
    expected = (logits, aux_values[:, 0], values[:, 0])
    runs = []
    for trunk in {agent.policy_trunk, agent.value_trunk}:
        trunk.register_forward_hook(lambda module, *_: runs.append(module))
    torch.testing.assert_close(tuple(call(agent, obs)), expected, rtol=1e-4, atol=1e-4)
    without_value = call(agent, obs, with_value=False)
    without_policy = call(agent, obs, with_policy=False)
    assert runs[-2:] == [agent.policy_trunk, agent.value_trunk] and len(runs) == (4 if arch == "dual" else 3)
    found = (without_value.policy, without_value.aux_values, without_policy.values)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert without_value.values is without_policy.policy is without_policy.aux_values is None


@pytest.mark.parametrize(("arch", "precision"), [("dual", "fp32"), ("dual", "bf16-aux"), ("detach", "bf16")])
def test_precision_of_each_phase(tmp_path, monkeypatch, arch, precision):
    """Trunks run in bfloat16 in exactly the phases that --precision names; heads, outputs and losses are float32."""
    agent = make_agent(arch, precision)
    dtypes = [set()]  # of the trunks, phase by phase
    for layer in layers_of(agent.policy_trunk, agent.value_trunk):
        layer.register_forward_hook(lambda _, inputs, output: dtypes[-1].add(output.dtype))
    losses = spy_on_losses(monkeypatch, lambda value: value.dtype)
    others = []
    for head in (agent.policy_head, agent.value_head, agent.aux_value_head):
        head.register_forward_hook(lambda _, inputs, output: others.append(output.dtype))
    agent.register_forward_hook(lambda _, inputs, output: others.extend(x.dtype for x in output if x is not None))
    args = make_args(tmp_path, "--num-envs", 2, "--num-steps", 4, "--n-iteration", 1, "--e-auxiliary", 1)
    obs = torch.zeros(2, 4, 64, 64, 3, dtype=torch.uint8)
    rollout = ppg.collect_rollout(agent, ppg.EpisodeTracker(Signpost(2), 1), obs, CPU)
    dtypes.append(set())
    ppg.policy_update(agent, adams(agent), rollout, torch.randn(2, 4), torch.randn(2, 4), args, 9)
    dtypes.append(set())
    ppg.auxiliary_phase(agent, adams(agent)["policy"], inputs(obs) | {"targets": torch.randn(2, 4)}, args, 9)
    in_bf16 = {"fp32": 0, "bf16-aux": 1, "bf16": 3}[precision]
    assert dtypes == (3 - in_bf16) * [{torch.float32}] + in_bf16 * [{torch.bfloat16}]
    assert set(others) == {dtype for row in losses for dtype in row.values()} == {torch.float32}


@pytest.mark.parametrize(("arch", "value_routes"), [  # in the policy phase, in the auxiliary phase
    ("dual", ("value_trunk value_head", "value_trunk value_head")),
    ("detach", ("value_head", "policy_trunk value_head")),
    ("shared", ("policy_trunk value_head", "policy_trunk value_head")),
])  # fmt: skip
def test_which_output_trains_what(arch, value_routes):
    """The gradient of an output reaches all of its head, and the trunk where the architecture lets it in this phase."""
    agent = make_agent(arch)
    obs = random_images(3)
    for auxiliary_phase, value_route in zip((False, True), value_routes):
        for i, route in enumerate(("policy_trunk policy_head", "policy_trunk aux_value_head", value_route)):
            agent.zero_grad()
            call(agent, obs, auxiliary_phase=auxiliary_phase)[i].square().sum().backward()
            reached = {name for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}
            assert reached == {name for name, _ in agent.named_parameters() if name.split(".")[0] in route.split()}


# ---- A. algorithm: phases ------------------------------------------------------------------------
@pytest.mark.parametrize("time_limit", [False, True])
def test_rollout_stores_what_the_environment_showed(monkeypatch, time_limit):
    """What belongs to a step has one index, both signals end an episode, and the next rollout goes on from there."""
    envs = Signpost(4)
    if time_limit:  # it ends episodes where they would end themselves, with an image that no rollout shows
        step = envs.step
        finals = []

        def step_until_the_limit(actions):
            obs, rewards, done, never, _ = step(actions)
            finals.append(random_images(4))
            return obs, rewards, never, done, {"final_obs": finals[-1].numpy()}

        monkeypatch.setattr(envs, "step", step_until_the_limit)
    tracker = ppg.EpisodeTracker(envs, 1)
    agent = make_agent("dual")
    firsts = np.ones(4, bool)
    ended = 0
    for _ in range(4):
        envs.history.clear()
        envs.finished.clear()
        observations = torch.zeros(4, 8, 64, 64, 3, dtype=torch.uint8)
        rollout = ppg.collect_rollout(agent, tracker, observations, CPU)
        assert rollout.inputs["obs"].data_ptr() == observations.data_ptr()
        stored = (observations, rollout.actions, rollout.rewards, rollout.firsts)
        for t, (seen, actions, rewards, done, next_seen) in zip(range(8), envs.history, strict=True):
            for tensor, expected in zip(stored, (seen, actions, rewards, firsts)):
                assert (tensor[:, t].numpy() == expected).all()
            output = call(agent, torch.from_numpy(seen))
            log_probs = output.policy.detach().log_softmax(-1)[range(4), actions]
            torch.testing.assert_close(rollout.log_probs[:, t], log_probs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.values[:, t], output.values.detach())
            firsts = done
            ended = ended + done
        assert (rollout.firsts[:, -1].numpy() == firsts).all()
        torch.testing.assert_close(rollout.values[:, -1], call(agent, torch.from_numpy(next_seen)).values.detach())
        assert [episode[2:] for episode in rollout.episodes] == envs.finished
    assert ended.min() > 0


def test_rollout_samples_from_the_policy():
    """Two actions with a log-odds of log 3 are played three to one."""
    agent = make_agent("shared")
    agent.policy_head.weight.data.zero_()
    agent.policy_head.bias.data.copy_(torch.tensor([math.log(3), 0, -1e3, -1e3]))
    observations = torch.zeros(32, 8, 64, 64, 3, dtype=torch.uint8)
    actions = ppg.collect_rollout(agent, ppg.EpisodeTracker(Signpost(32), 1), observations, CPU).actions
    shares = actions.flatten().bincount(minlength=4) / actions.numel()
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.25, 0, 0]), rtol=0, atol=0.1)


def two_slow_updates(agent, losses, weights_of_losses):
    """A copy of the agent after two plain steps on the weighted sum of losses(agent), and their means over both."""
    updated = copy.deepcopy(agent)
    optimizer = torch.optim.SGD(updated.parameters(), 0.05)
    rows = []
    for _ in range(2):
        row = torch.stack(losses(updated))
        optimizer.zero_grad()
        (row * torch.tensor(weights_of_losses)).sum().backward()
        optimizer.step()
        rows.append(row.detach())
    assert (rows[1] - rows[0]).abs().min() > 1e-4  # one row alone would not do
    return updated, ((rows[0] + rows[1]) / 2).tolist()


@pytest.mark.parametrize(("arch", "clip_coef", "kl_coef"), [
    ("dual", 0.2, 0), ("detach", 0.2, 0), ("shared", 0.4, 0), ("dual", 0, 1), ("detach", 0.1, 0.5),
])  # fmt: skip
def test_updates_match_a_loop_over_samples(tmp_path, arch, clip_coef, kl_coef):
    """Two updates of a phase go where the losses of the samples lead, and metrics are means over both."""
    agent = make_agent(arch, sharpness=10.0)
    rollout = random_rollout(agent, 3, 4)
    advantages = 1000 + 0.1 * torch.randn(3, 4)  # too far from 0 for the moments to be taken in float32
    targets = torch.randn(3, 4)
    obs = rollout.inputs["obs"].flatten(0, 1)
    old_logits = call(agent, obs).policy.detach()
    normalized = ((advantages - advantages.double().mean()) / advantages.double().std(correction=0)).float()
    constants = [x.flatten() for x in (rollout.actions, rollout.log_probs, normalized)]

    def squared_error(values):
        return (values - targets.flatten()).square().mean()

    def policy_losses(agent):
        output = call(agent, obs)
        policy_loss, entropy, *_ = slow_policy_losses(output.policy, *constants, clip_coef, kl_coef)
        return policy_loss, entropy, 0.8 * squared_error(output.values)

    def auxiliary_losses(agent):
        output = call(agent, obs, auxiliary_phase=True)
        kl = slow_kl(old_logits, output.policy)  # 0 in the first update, it pulls back in the second
        return kl, 0.5 * squared_error(output.aux_values), 0.5 * squared_error(output.values)

    size = "--num-envs 3 --num-minibatches 1 --n-iteration 1 --num-aux-rollouts 3"
    coefs = f"--ent-coef 0.3 --vf-coef 0.8 --clip-coef {clip_coef} --kl-coef {kl_coef}"
    epochs = "--e-policy 2 --e-value 2 --e-auxiliary 2 --beta-clone 200 --aux-vf-coef 0.7"
    args = make_args(tmp_path, *f"{size} {coefs} {epochs}".split())
    trained = copy.deepcopy(agent)
    sgd = torch.optim.SGD(trained.parameters(), 0.05)
    data = rollout, advantages, targets, args, 9
    metrics = ppg.policy_update(trained, {"policy_and_value": sgd}, *data)
    expected, means = two_slow_updates(agent, policy_losses, [1, -0.3, 1])
    assert_same_change(weights(trained), weights(expected), weights(agent))
    found = [metrics[f"losses/{name}"] for name in ("policy_loss", "entropy", "value_loss")]
    assert found == pytest.approx(means, rel=1e-3, abs=1e-5)
    explained = 1 - (targets - rollout.values[:, :-1]).var() / targets.var()
    assert metrics["losses/explained_variance"] == pytest.approx(float(explained), abs=1e-4)
    trained.load_state_dict(agent.state_dict())
    metrics = ppg.auxiliary_phase(trained, sgd, rollout.inputs | {"targets": targets}, args, 9)
    expected, means = two_slow_updates(agent, auxiliary_losses, [200, 1, 0.7])
    assert_same_change(weights(trained), weights(expected), weights(agent))
    found = [metrics[f"losses/aux/{name}"] for name in ("kl_loss", "aux_value_loss", "real_value_loss")]
    assert found == pytest.approx(means, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(("e_policy", "e_value"), [(1, 1), (2, 2), (1, 3), (2, 1)])
def test_policy_epochs(tmp_path, monkeypatch, e_policy, e_value):
    """Every epoch uses each environment once, in a fresh order; value epochs come first, unless both are one."""
    minibatches = spy(monkeypatch, "take", lambda a, _: a["segments"].tolist())
    steps = spy_on_steps(monkeypatch, lambda optimizer: optimizer)
    agent = make_agent("dual")
    optimizers = adams(agent)
    args = make_args(tmp_path, "--num-envs", 8, "--num-minibatches", 4, "--e-policy", e_policy, "--e-value", e_value)
    ppg.policy_update(agent, optimizers, random_rollout(agent, 8, 2), *torch.randn(2, 8, 2), args, 9)
    schedule = ["policy_and_value"] * e_policy
    if e_policy != e_value:
        schedule = ["value"] * e_value + ["policy"] * e_policy
    assert steps == [optimizers[losses] for losses in schedule for _ in range(4)]
    assert {len(minibatch) for minibatch in minibatches} == {2}
    epochs = torch.tensor(minibatches).view(-1, 8).tolist()
    assert all(sorted(epoch) == list(range(8)) != epoch for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_gradient_norm_is_clipped(tmp_path):
    """--max-grad-norm bounds the L2 norm of all parameter groups together, and keeps the direction."""
    moves = {}
    for limit in (0, 0.05):
        agent = make_agent("shared")
        data = random_rollout(agent, 4, 2), torch.randn(4, 2), 3 + torch.randn(4, 2)
        groups = [{"params": part.parameters()} for part in agent.children()]
        old = weights(agent)
        args = make_args(tmp_path, "--max-grad-norm", limit, "--num-minibatches", 1)
        new, _ = run_update(agent, torch.optim.SGD(groups, 1.0), data, args)  # a step is the gradient
        moves[limit] = new - old
    assert moves[0].norm() > 0.5
    assert float(moves[0.05].norm()) == pytest.approx(0.05, rel=1e-3)
    assert F.cosine_similarity(moves[0.05], moves[0], dim=0) > 0.999


@pytest.mark.parametrize("flags", [("--arch", "dual"), ("--arch", "detach"), PPO, *(
    pytest.param((*flags, "--cuda"), marks=needs_gpu)
    for flags in (("--precision", "fp32"), ("--precision", "bf16-aux"), PPO, ("--compile",))
)])  # fmt: skip
def test_learns(tmp_path, flags):
    """The action that the picture names is found from pixels and rewards: 90 % of the best return."""
    size = "--num-envs 16 --n-iteration 2 --num-aux-rollouts 8 --e-auxiliary 1 --total-timesteps 1280"
    rates = "--learning-rate 1e-3 --aux-learning-rate 1e-3 --gamma 0.5 --reward-norm-gamma 0.5"
    summary = train_in_signposts(make_args(tmp_path, *size.split(), *rates.split(), *flags))
    assert summary["episodic_return"] > 0.9 * summary["episodic_length"]  # of 100 episodes; 1 a step is best


# ---- A. algorithm: the figures of the authors' code ----------------------------------------------
# What openai/phasic-policy-gradient returns (float32, CPU) on the weights and data of `example`: figures only.
ORIGINAL = {  # of [N, T]: the last step of each environment, then the L2 norms over its steps
    "advantages": (0.87962, -2.11278, 1.00154, 2.11815, 4.94275, 8.90058, 7.0061, 8.63809),
    "targets": (1.06204, -1.56374, 0.126619, 1.99037, 4.44678, 6.35215, 4.50637, 5.98029),
    "rewards": (0.706399, -0.332572, 0.503568, 0.334403, 2.07521, 2.89708, 2.2016, 2.39998),
    "rewards2": (0.478555, -0.370311, 1.21237, -2.15462, 4.13119, 3.22166, 4.59244, 4.76308),
    "values": (-0.20513, 0.073268, -0.35118, -0.192599, 0.662211, 0.621809, 0.689569, 0.740641),
    "aux_values": (-1.74252, -1.47355, -1.66369, -1.77517, 7.32237, 7.10949, 7.3695, 7.28895),
}


def set_given_weights(agent):
    """NumPy's numbers, in the order in which the authors' code was given them."""
    rng = np.random.default_rng(12345)
    trunks = layers_of(*dict.fromkeys((agent.policy_trunk, agent.value_trunk)))
    heads = layers_of(agent.policy_head, agent.value_head, agent.aux_value_head)
    for layer in (*trunks, *heads):
        scale = 0.1 if layer in heads else layer.weight[0].numel() ** -0.5
        layer.weight.data.copy_(torch.from_numpy(scale * rng.normal(size=layer.weight.shape)))
        layer.bias.data.copy_(torch.from_numpy(0.05 * rng.normal(size=layer.bias.shape)))


@pytest.fixture
def example(tmp_path):
    """The weights and data that the authors' code was run on: NumPy's numbers, drawn in the same order."""
    agent = make_agent(num_actions=15)
    set_given_weights(agent)
    rng = np.random.default_rng(54321)
    observations = torch.from_numpy(rng.integers(0, 256, size=(4, 16, 64, 64, 3), dtype=np.uint8))
    actions = torch.from_numpy(rng.integers(0, 15, size=(4, 16)))
    rewards, other_rewards = torch.from_numpy(rng.normal(size=(2, 4, 16))).float()
    values = torch.from_numpy(rng.normal(size=(4, 17))).float()
    firsts, other_firsts = torch.from_numpy(rng.random((2, 4, 17)) < 0.2).float()
    log_probs = torch.from_numpy(0.2 * rng.normal(size=(4, 16))).float()
    args = make_args(tmp_path, "--num-steps", 16, "--num-minibatches", 1, "--num-aux-rollouts", 4, "--n-iteration", 1)
    trajectory = {"rewards": rewards, "values": values, "firsts": firsts, "final_values": torch.zeros(4, 16)}
    advantages, targets = ppg.compute_gae(**trajectory, gamma=args.gamma, gae_lambda=args.gae_lambda)
    output = call(agent, observations.flatten(0, 1))
    log_probs += output.policy.detach().log_softmax(-1)[range(64), actions.flatten()].view(4, 16)
    rollout = ppg.Rollout(inputs(observations), actions, log_probs, values, torch.zeros(4, 16), rewards, firsts, [])
    adam = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=args.adam_eps)
    return types.SimpleNamespace(**locals())


def test_original_outputs(example):
    """Forward pass, advantages, value targets and normalised rewards are those of the authors' code."""
    normalizer = ppg.RewardNormalizer(4, example.args.reward_norm_gamma, example.args.reward_clip)
    found = {
        "advantages": example.advantages,
        "targets": example.targets,
        "rewards": normalizer(example.rewards, example.firsts[:, :-1]),
        "rewards2": normalizer(3 * example.other_rewards, example.other_firsts[:, :-1]),
        "values": example.output.values.detach().view(4, 16),
        "aux_values": example.output.aux_values.detach().view(4, 16),
    }
    for name, x in found.items():
        numbers = [*x[:, -1].tolist(), *x.norm(dim=1).tolist()]
        assert numbers == pytest.approx(ORIGINAL[name], rel=1e-4, abs=1e-6), name


ORIGINAL_RUNS = SCRIPT.parent / ".github/results/original_run.json"
needs_original = pytest.mark.skipif(not ORIGINAL_RUNS.exists(), reason="a copy without the authors' figures")


@pytest.fixture
def in_float64():
    """The script once more, its source read with float64 for float32: there two programs do not part by rounding."""
    source = SCRIPT.read_text().replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    module = types.ModuleType("in_float64")
    module.__file__ = str(SCRIPT)
    sys.modules["in_float64"] = module  # dataclasses look there
    exec(compile(source, SCRIPT, "exec"), module.__dict__)  # noqa: S102
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(torch.float32)


@needs_original
@pytest.mark.parametrize("name", ["dual", "ppo", "ev2", "kl"])
def test_original_run(tmp_path, monkeypatch, in_float64, name):
    """Two phases and an iteration of the authors' whole program: every action is the same, every figure to 1e-6."""
    original = json.loads(ORIGINAL_RUNS.read_text())[name]
    sizes = original["config"]
    flags = f"--env-id {sizes['env']} --distribution-mode {sizes['mode']} --arch {sizes['arch']} --seed 5 --no-cuda"
    flags += f" --num-envs {sizes['N']} --num-steps {sizes['T']} --n-iteration {sizes['n_pi']} --precision fp32"
    flags += f" --e-policy {sizes['e_pi']} --e-value {sizes['e_v']} --e-auxiliary {sizes['e_aux']}"
    flags += f" --num-minibatches {sizes['nmb']} --num-aux-rollouts {sizes['aux_mb']} --clip-coef {sizes['clip']}"
    flags += f" --kl-coef {sizes['kl']} --total-timesteps {sizes['total']} --checkpoint-interval 0"

    agents = []
    real_agent = in_float64.Agent

    def agent_with_given_weights(*args):
        agent = real_agent(*args)
        set_given_weights(agent)
        agents.extend([agent, weights(agent)])
        return agent

    actions_generator = torch.Generator().manual_seed(101)
    order_generator = torch.Generator().manual_seed(202)

    def sample(distribution):
        cumulated = distribution.probs.double().cumsum(-1)
        uniform = torch.rand(len(cumulated), generator=actions_generator, dtype=torch.float64)
        return (cumulated < uniform[:, None]).sum(-1)

    iterations, losses, changes = [], [], []
    monkeypatch.setattr(in_float64, "Agent", agent_with_given_weights)
    monkeypatch.setattr(torch.distributions.Categorical, "sample", sample)
    randperm = lambda n: torch.argsort(torch.rand(n, generator=order_generator, dtype=torch.float64))
    monkeypatch.setattr(torch, "randperm", randperm)
    real_gae, real_update, real_end = in_float64.compute_gae, in_float64.policy_update, in_float64.Run.end_phase

    def gae(**arguments):
        advantages, targets = real_gae(**arguments)
        tensors = {"norm_rewards": arguments["rewards"], "values": arguments["values"]}
        tensors |= {"advantages": advantages, "targets": targets}
        iterations.append({f"{key}_norm": float(x.norm()) for key, x in tensors.items()})
        return advantages, targets

    def update(agent, optimizers, rollout, *rest):
        figures = {"rewards_norm": float(rollout.rewards.norm()), "firsts": float(rollout.firsts.sum())}
        iterations[-1] |= figures | {"actions": ["".join(f"{a:x}" for a in row) for row in rollout.actions.tolist()]}
        return real_update(agent, optimizers, rollout, *rest)

    def end_phase(*args, **options):
        change = weights(agents[0]) - agents[1]
        changes.append((float(change.norm()), float(change.sum())))
        return real_end(*args, **options)

    for function, replacement in (("compute_gae", gae), ("policy_update", update)):
        monkeypatch.setattr(in_float64, function, replacement)
    monkeypatch.setattr(in_float64.Run, "end_phase", end_phase)
    add = in_float64.Means.add
    monkeypatch.setattr(
        in_float64.Means, "add", lambda self, x: losses.append({k: v.item() for k, v in x.items()}) or add(self, x)
    )
    in_float64.train(in_float64.parse_args([*flags.split(), "--runs-dir", str(tmp_path)]))

    for found, expected in zip(iterations, original["iterations"], strict=True):
        figures = {key: value for key, value in expected.items() if key != "losses"}
        assert found.pop("actions") == figures.pop("actions")
        assert found == pytest.approx(figures, rel=1e-6)
    assert changes == [pytest.approx((x["change_norm"], x["change_sum"]), rel=1e-6) for x in original["phases"]]

    # Their program computes all losses in every epoch; with E_V above E_pi the first epochs train the values.
    rows = [iteration["losses"] for iteration in original["iterations"]]
    policy_epochs = slice(-sizes["e_pi"] * sizes["nmb"], None)
    value_epochs = slice(None, sizes["e_v"] * sizes["nmb"])
    for key, used in (("policy_loss", policy_epochs), ("entropy", policy_epochs), ("clipfrac", policy_epochs),
                      ("value_loss", value_epochs)):  # fmt: skip
        expected = [row[key] for iteration in rows for row in iteration[used]]
        assert column(losses, f"losses/{key}") == pytest.approx(expected, rel=1e-6, abs=1e-12), key
    auxiliary = [row for phase in original["phases"] for row in phase["auxiliary"]]
    for key, ours in (("kl", "kl_loss"), ("aux_value_loss", "aux_value_loss"), ("real_value_loss", "real_value_loss")):
        expected = [row[key] for row in auxiliary]
        assert column(losses, f"losses/aux/{ours}") == pytest.approx(expected, rel=1e-6, abs=1e-12), key


mark_section("algorithm")


# ---- B. invariants: what holds whatever is learned -------------------------------------------------
def run_update(agent, optimizer, data, args, max_segments=512, auxiliary=False):
    """One update of either phase on (rollout, advantages, targets). Returns the new weights and the metrics."""
    rollout, advantages, targets = data
    torch.manual_seed(7)
    if auxiliary:
        states = rollout.inputs | {"targets": targets}
        metrics = ppg.auxiliary_phase(agent, optimizer, states, args, max_segments)
    else:
        optimizers = dict.fromkeys(("policy_and_value", "value", "policy"), optimizer)
        metrics = ppg.policy_update(agent, optimizers, rollout, advantages, targets, args, max_segments)
    return weights(agent), metrics


def random_data(agent, num_envs, num_steps):
    return random_rollout(agent, num_envs, num_steps), *torch.randn(2, num_envs, num_steps)


@pytest.mark.parametrize("schedule", ["--e-value 1", "--e-value 2", "--e-policy 2", "auxiliary"])
def test_gradients_from_before_change_nothing(tmp_path, schedule):
    """What lies in .grad before a phase does not leak into its first step."""
    auxiliary = schedule == "auxiliary"
    args = make_args(tmp_path, "--n-iteration", 1, *(() if auxiliary else schedule.split()))
    results = []
    for junk in (None, 100.0):
        agent = make_agent("detach")
        data = random_data(agent, 4, 2)
        old = weights(agent)
        for parameter in agent.parameters():
            parameter.grad = None if junk is None else torch.full_like(parameter, junk)
        results.append(run_update(agent, adams(agent)["value"], data, args, auxiliary=auxiliary)[0])
    assert torch.equal(*results) and not torch.equal(results[0], old)


@pytest.mark.parametrize("precision", ["fp32", "bf16-aux", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_first_ratio_is_one_and_first_kl_is_zero(tmp_path, monkeypatch, arch, precision):
    """Before the first step of a phase its policy is the one that played, or pi_old, in any precision and pass."""
    losses = spy_on_losses(monkeypatch)
    args = make_args(tmp_path, "--num-envs", 8)
    agent = make_agent(arch, precision)
    tracker = ppg.EpisodeTracker(Signpost(8), seed=1)
    for _ in range(3):  # a memory is 0 in the first
        rollout = ppg.collect_rollout(agent, tracker, torch.empty(8, 4, 64, 64, 3, dtype=torch.uint8), CPU)
    run_update(agent, torch.optim.Adam(agent.parameters(), 1e-2), (rollout, *torch.randn(2, 8, 4)), args)
    kls = column(losses, "losses/approx_kl")
    assert abs(kls[0]) < 1e-6 < kls[1]
    agent = make_agent(arch, precision)
    data = random_data(agent, 8, 2)
    still, moving = (torch.optim.SGD(agent.parameters(), rate) for rate in (0.0, 0.1))
    for segments, max_segments in ((8, 512), (2, 512), (4, 2), (4, 1)):
        args = make_args(tmp_path, "--num-aux-rollouts", segments, "--e-auxiliary", 1)
        _, metrics = run_update(agent, still, data, args, max_segments, auxiliary=True)
        assert abs(metrics["losses/aux/kl_loss"]) < 1e-6
    _, metrics = run_update(agent, moving, data, args, auxiliary=True)
    assert metrics["losses/aux/kl_loss"] > 1e-5


@pytest.mark.parametrize("auxiliary", [False, True], ids=["policy phase", "auxiliary phase"])
def test_passes_in_parts_are_the_whole(tmp_path, auxiliary):
    """--segments-per-pass bounds every pass, all of a minibatch are equal, and neither steps nor metrics change."""
    args = make_args(tmp_path, "--num-envs", 8, "--n-iteration", 1, "--num-aux-rollouts", 4, "--e-auxiliary", 1)
    first = make_agent("detach", sharpness=10.0)
    data = random_data(first, 8, 4)
    for max_segments, largest in ((512, 4), (4, 4), (3, 2), (2, 2), (1, 1)):
        agent, passes = copy.deepcopy(first), []
        agent.register_forward_pre_hook(lambda _, inputs, passes=passes: passes.append(len(inputs[0]["obs"])))
        optimizer = torch.optim.SGD(agent.parameters(), 0.02)
        new, metrics = run_update(agent, optimizer, data, args, max_segments, auxiliary)
        if max_segments == 512:
            whole, metrics_of_whole = new, metrics
        assert set(passes) == {largest}
        assert_same_change(new, whole, weights(first), tolerance=1e-3)
        assert metrics == pytest.approx(metrics_of_whole, rel=1e-3, abs=1e-5)


def test_updates_leave_no_tensors_behind(tmp_path, monkeypatch):
    """Small tensors kept from every update would lie between freed activations: gigabytes of the heap in a phase."""
    passes = spy_on_losses(monkeypatch, weakref.ref)
    alive = spy(monkeypatch, "take", lambda *_: sum(ref() is not None for refs in passes for ref in refs.values()))
    train(tmp_path, *phases(1), "--e-policy", 3, "--e-value", 3, "--e-auxiliary", 6)
    assert len(column(passes, "losses/policy_loss")) == 12 and max(alive) <= 9


def test_auxiliary_epochs(tmp_path):
    """Each auxiliary epoch uses all segments of all iterations once, in fresh order, some to a minibatch."""
    args = make_args(tmp_path, "--n-iteration", 4, "--num-aux-rollouts", 4, "--e-auxiliary", 3)
    agent = make_agent("shared")
    rollout, *others = random_data(agent, 16, 2)
    rollout.inputs["obs"][:] = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1, 1)  # each names its segment
    seen = []
    agent.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]["obs"][:, 0, 0, 0, 0].tolist()))
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    run_update(agent, optimizer, (rollout, *others), args, auxiliary=True)
    updates = seen[seen.index("step") - 4 :]  # without the passes of the old policy
    assert [x == "step" for x in updates] == 12 * [False, False, False, False, True]
    order = [x for x in updates if x != "step"]
    epochs = [order[i : i + 16] for i in range(0, 48, 16)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(16)]}) == 4


SMALL = ("--arch", "detach", "--num-steps", 4, "--total-timesteps", 64, "--e-auxiliary", 1)  # 2 phases


@pytest.mark.parametrize("clip", [1.1, 50.0])
def test_the_phases_get_the_right_data(tmp_path, monkeypatch, clip):
    """Rewards are normalised, then GAE; the auxiliary phase has all rollouts of its phase, with their targets."""
    rollouts = spy(monkeypatch, "collect_rollout", lambda _, rollout: copy.deepcopy(rollout))
    seeds = spy(monkeypatch, "collect_rollout", lambda *_: torch.initial_seed())
    gaes = spy(monkeypatch, "compute_gae", lambda a, result: (dict(a), *result))
    updates = spy(monkeypatch, "policy_update", lambda a, _: (a["rollout"], a["advantages"], a["targets"]))
    phases = spy(monkeypatch, "auxiliary_phase", lambda a, _: (a["data"]["obs"].clone(), a["data"]["targets"]))
    flags = ("--gamma", 0.9, "--gae-lambda", 0.8, "--reward-norm-gamma", 0.7, "--reward-clip", clip)
    train_in_signposts(make_args(tmp_path, *flags, *SMALL))
    normalizer = ppg.RewardNormalizer(4, 0.7, clip)
    assert len(rollouts) == len(gaes) == len(updates) == 4
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]  # each phase draws numbers of its own
    assert [observations.shape for observations, _ in phases] == 2 * [(8, 4, 64, 64, 3)]
    for i, (rollout, (given, *estimates)) in enumerate(zip(rollouts, gaes)):
        torch.testing.assert_close(given.pop("rewards"), normalizer(rollout.rewards, rollout.firsts[:, :-1]))
        expected = {name: getattr(rollout, name) for name in ("values", "final_values", "firsts")}
        expected |= {"gamma": 0.9, "gae_lambda": 0.8}
        torch.testing.assert_close(given, expected)
        used, *used_estimates = updates[i]
        assert torch.equal(used.actions, rollout.actions)
        torch.testing.assert_close(used_estimates, estimates)
        own = slice(4 * (i % 2), 4 * (i % 2) + 4)  # iterations one after the other, environments within them
        observations, targets = phases[i // 2]
        assert torch.equal(observations[own], rollout.inputs["obs"])
        torch.testing.assert_close(targets[own], estimates[1])


@pytest.mark.parametrize(("flags", "count"), [((), 1), (("--e-value", 2), 2)], ids=["one Adam", "two"])
def test_learning_rates_fall_over_the_whole_run(tmp_path, monkeypatch, flags, count):
    """They fall in all optimisers from first iteration to last, not by phases; to a new last if the run grows."""
    rates_of = lambda optimizer: [group["lr"] for group in optimizer.param_groups]
    used = spy_on_steps(monkeypatch, lambda optimizer: (optimizer, rates_of(optimizer)))
    real = torch.optim.Adam
    groups = lambda parameters, lr: [{"params": parameters[:3]}, {"params": parameters[3:], "lr": lr / 10}]
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, **options: real(groups([*p], lr), lr=lr, **options))
    rates = ("--anneal-lr", "--learning-rate", 1e-3, "--aux-learning-rate", 1e-4)
    train_in_signposts(make_args(tmp_path, *rates, *flags, *SMALL))
    fall = [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    by_optimizer = {}
    for optimizer, (rate, of_second_group) in used:
        by_optimizer.setdefault(optimizer, {})[rate] = None
        assert of_second_group == pytest.approx(rate / 10)
    expected = [*count * [fall], [7.5e-5, 2.5e-5]]
    assert [list(rates) for rates in by_optimizer.values()] == [pytest.approx(rates) for rates in expected]
    train_in_signposts(ppg.parse_args(["--resume", str(only_run(tmp_path)), "--total-timesteps", "96"]))
    fall += [1e-3 / 3, 1e-3 / 6]
    assert [row["charts/learning_rate"] for row in read_rows(only_run(tmp_path))] == pytest.approx(fall)
    assert used[-1][1] == pytest.approx([1e-4 / 6, 1e-5 / 6])


LEARNING_FLAGS = """--learning-rate 1e-3, --adam-eps 1e-3, --gamma 0.5, --gae-lambda 0.5, --reward-norm-gamma 0.5,
--reward-clip 0.5, --clip-coef 0.01, --kl-coef 1, --ent-coef 0.5, --vf-coef 1, --max-grad-norm 0.1, --e-policy 2,
--e-value 2, --e-auxiliary 2, --beta-clone 9, --aux-vf-coef 2, --aux-learning-rate 1e-3, --num-aux-rollouts 4,
--num-minibatches 1, --n-iteration 1, --num-steps 4, --arch detach, --precision bf16-aux, --anneal-lr, --seed 3"""


@pytest.fixture(scope="module")
def weights_by_flags(tmp_path_factory):
    """The weights after two phases that begin with a given learning rate and so on; the flags are a string."""
    found = {}

    def run(flags):
        if flags not in found:
            args = make_args(
                tmp_path_factory.mktemp("flags"), "--e-auxiliary", 1, "--precision", "fp32", *flags.split()
            )
            train_in_signposts(args)
            found[flags] = torch.cat(
                [x.flatten() for x in read_checkpoint(only_run(args.runs_dir))["modules"]["agent"].values()]
            )
        return found[flags]

    return run


@pytest.mark.parametrize("flags", LEARNING_FLAGS.replace("\n", " ").split(", "))
def test_every_flag_of_learning_matters(weights_by_flags, flags):
    """Another value of any one of them leads to other weights."""
    base, other = weights_by_flags(""), weights_by_flags(flags)
    assert base.shape != other.shape or (base - other).norm() > 1e-5 * base.norm()


def test_unequal_lengths_are_refused():
    """A tensor with more rows than there are segments would be read at the wrong place without a word."""
    with pytest.raises(ValueError, match="'mine': 3"):
        ppg.take({"obs": torch.zeros(2, 4), "mine": torch.zeros(3, 4)}, torch.arange(2), CPU)


def test_gradients_are_averaged_in_one_collective(monkeypatch):
    """The other process has three times the gradients of this one."""
    calls = []
    monkeypatch.setattr(ppg, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppg.dist, "all_reduce", lambda x: calls.append(x.mul_(4)))
    agent = make_agent()
    call(agent, random_images(2), with_value=False).policy.square().sum().backward()
    before = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}
    ppg.average_over_processes(agent)
    assert len(calls) == 1 and 0 < len(before) < len(list(agent.parameters()))
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is None) == (name not in before)
        assert name not in before or torch.equal(parameter.grad, 2 * before[name])


def test_same_seed_same_run(tmp_path, monkeypatch):
    """A seed determines a run on Procgen to the bit; another seed has other levels, weights and metrics."""
    seen = spy(monkeypatch, "collect_rollout", lambda _, rollout: rollout.inputs["obs"][:, 0].clone())
    flags = ("--num-steps", 8, *phases(0.5))  # a phase
    runs = [train(tmp_path / name, "--seed", seed, *flags) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert_same_run(*runs[:2])
    (rows, saved), (other_rows, other_saved) = learned(runs[0]), learned(runs[2])
    head = "/modules/agent/policy_head.weight"
    assert rows != other_rows and not torch.equal(saved[head], other_saved[head])
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])


def test_stopped_at_any_moment_it_is_the_uninterrupted_run(tmp_path):
    """A run that is killed, or ended by Ctrl-C or SIGTERM, says how to go on, and goes on to the bit."""
    flags = [*TINY, "--runs-dir", str(tmp_path / "a"), *phases(10**4)]  # never gets to its end
    checkpoint, written = None, 0
    deadline = time.monotonic() + 200
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, SCRIPT, *flags], **DEAF)
        try:
            while checkpoint is None or checkpoint.stat().st_mtime_ns == written:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
                checkpoint = next(tmp_path.glob("a/*/checkpoint.pt"), None)
            time.sleep(random.Random(int(how)).uniform(0, 0.4))
            process.send_signal(how)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        written = checkpoint.stat().st_mtime_ns
        flags = ["--resume", str(checkpoint.parent)]
        assert process.returncode == -how and "Traceback" not in errors
        assert how == signal.SIGKILL or f"--resume={checkpoint.parent}" in errors
    total = ("--total-timesteps", read_checkpoint(checkpoint.parent)["run"]["global_step"] + PHASE)
    resume(checkpoint.parent, *total)
    assert_same_run(checkpoint.parent, train(tmp_path / "b", *total))


@pytest.mark.parametrize(("flags", "count", "where", "call"), [
    ("--arch dual --e-value 2 --anneal-lr --num-levels 3 --start-level 7", 2, "auxiliary_phase", 2),
    (shlex.join(map(str, PPO)), 2, "policy_update", 4), ("--checkpoint-interval 2", 4, "collect_rollout", 8),
])  # fmt: skip
def test_stopped_within_a_phase_it_is_the_uninterrupted_run(tmp_path, monkeypatch, flags, count, where, call):
    """All optimisers, the annealing, the levels and the rows are those of the last checkpoint when a run goes on."""
    flags = [*flags.split(), "--num-steps", 8, *phases(count / 2)]  # half the steps are half a phase
    uninterrupted = train(tmp_path / "a", *flags)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        at_call(patch, call, RuntimeError("stopped"), where)
        train(tmp_path / "b", *flags)
    run_dir = only_run(tmp_path / "b")
    assert len(read_rows(run_dir)) > read_checkpoint(run_dir)["run"]["iteration"] == count  # rows are to be cut
    resume(run_dir)
    assert_same_run(uninterrupted, run_dir)


def test_a_partial_last_phase_stays_one_when_the_run_grows(tmp_path):
    """After a phase that was not full the next one is whole, and growing twice is growing once, to the bit."""
    once = train(tmp_path / "a", "--num-steps", 8, *phases(0.75))
    twice = Path(shutil.copytree(once, tmp_path / "b" / once.name))
    resume(once, *phases(1.75))
    resume(twice, *phases(1.25))
    resume(twice, *phases(1.75))
    assert_same_run(once, twice)
    rows = read_rows(once)
    assert [row["phase"] for row in rows] == [0, 0, 1, 2, 2, 3, 3]
    assert ["losses/aux/kl_loss" in row for row in rows] == [False, True, False, False, True, False, True]


def make_updates(path):
    """What updates change in the weights, and their metrics, from this process's share of 4 environments."""
    num_envs = 4 // ppg.WORLD_SIZE
    own = slice(ppg.RANK * num_envs, (ppg.RANK + 1) * num_envs)
    scale = torch.arange(1.0, 5)[:, None]  # the environments, hence the processes, are unlike
    rollout, advantages, targets = random_data(make_agent(), 4, 4)
    rollout = rollout._replace(log_probs=rollout.log_probs + (scale > 2), rewards=scale * rollout.rewards)
    own_inputs = {name: tensor[own] for name, tensor in rollout.inputs.items()}
    rollout = ppg.Rollout(own_inputs, *(tensor[own] for tensor in rollout[1:-1]), [])
    data = rollout, (scale * (advantages + scale))[own], (scale * targets)[own]
    sizes = ("--num-envs", num_envs, "--n-iteration", 1, "--num-minibatches", 1, "--num-aux-rollouts", num_envs)

    def updated(*flags, auxiliary=False):
        args, agent = make_args(path, *sizes, *flags), make_agent()
        old = weights(agent)
        new, metrics = run_update(agent, torch.optim.SGD(agent.parameters(), 0.1), data, args, auxiliary=auxiliary)
        metrics.pop("losses/explained_variance", None)  # a mean of what each process knows of its own
        return new - old, metrics

    results = {
        "policy": updated(),
        "policy, separate and clipped": updated("--e-value", 2, "--max-grad-norm", 0.05),
        "auxiliary": updated("--e-auxiliary", 2, auxiliary=True),
    }
    normalizer = ppg.RewardNormalizer(num_envs, gamma=0.99, clip=10.0)
    normalizer(rollout.rewards, rollout.firsts[:, :-1])
    results["rewards"] = normalizer(3 * rollout.rewards, rollout.firsts[:, :-1])
    data[2][scale[own, 0] == 4] = torch.nan  # in the last process
    results["nan"] = updated()
    return results


def in_each_process(path):
    """What each of the two processes of the tests does, and saves."""
    signal.alarm(150)  # ends one that waits for ever for the other
    patch = pytest.MonkeyPatch()
    ppg.start_process(make_args(path))
    results = make_updates(path)
    agents = spy(patch, "Agent", lambda _, agent: agent)
    seen = spy(patch, "collect_rollout", lambda _, rollout: rollout.inputs["obs"][:, 0].clone())
    short = ("--num-steps", 8, "--arch", "dual")
    seeds = spy(patch, "collect_rollout", lambda *_: torch.initial_seed())
    train(path / "whole", *short, *phases(1, 2))
    watched = (*short, "--eval-interval", 1, "--eval-episodes", 2, "--capture-video")
    run_dir = train(path / "resumed", *watched, *phases(0.5, 2))
    torch.distributed.barrier()  # rank 0 writes the checkpoint
    resume(run_dir, "--eval-interval", 0, "--no-capture-video", *phases(1, 2))
    train(path / "ppo", *PPO, "--num-steps", 8, *phases(0.5, 2))
    torch.manual_seed(ppg.RANK)
    beside = torch.nn.Linear(9, 9)
    modules = {"agent": make_agent(), "beside": beside}
    with ppg.Run(make_args(path / "beside"), CPU, modules, {}):
        agents.append(beside)
    results |= {"weights": [weights(agent) for agent in agents], "first observations": seen[0], "seeds": seeds}
    torch.save(results, path / f"{ppg.RANK}.pt")
    if ppg.RANK == 1:
        patch.setattr(ppg, "auxiliary_phase", lambda *args: os._exit(1))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or torchrun, too, would end the survivor
    with pytest.raises(RuntimeError):
        train(path / "dying", *phases(10**4, 2))
    (path / "survivor").touch()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The directory and the results of two processes that torchrun started, and what one makes of the data of both."""
    path = tmp_path_factory.mktemp("processes")
    command = f"import pathlib, {__name__} as tests; tests.in_each_process(pathlib.Path({str(path)!r}))"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    torchrun += [sys.executable, "-c", command]
    subprocess.run(torchrun, env=ENVIRONMENT, timeout=200, check=False)  # it fails, for a process dies in the end
    return path, [torch.load(path / f"{rank}.pt") for rank in range(2)], make_updates(path)


def test_processes_stay_equal_but_play_levels_of_their_own(two_processes):
    """After every run the ranks have the same weights, beside the agent too, they began in other levels, and one's death ends both."""
    path, (first, second), _ = two_processes
    assert len(first["weights"]) == len(second["weights"]) == 6
    assert all(torch.equal(one, other) for one, other in zip(first["weights"], second["weights"]))
    assert not torch.equal(first["first observations"], second["first observations"])
    assert not set(first["seeds"]) & set(second["seeds"])  # actions and minibatches, too, are drawn by each
    assert (path / "survivor").exists()  # it neither waited for ever nor went on alone: it raised
    whole, resumed = (only_run(path / name) for name in ("whole", "resumed"))
    assert_same_run(whole, resumed, "eval/")  # neither a pause nor evaluation and film on one rank matters
    assert [row["global_step"] for row in read_rows(whole)] == [32, 64, 96, 128]  # steps count once
    assert len((resumed / "evaluations.jsonl").read_text().splitlines()) == len([*resumed.glob("videos/*.mp4")]) == 1


def test_two_processes_update_as_one(two_processes):
    """Gradients, moments, metrics, the decision to stop, the returns' spread and a NaN are those of all."""
    _, results_of_both, one_process = two_processes
    for update in ("policy", "policy, separate and clipped", "auxiliary"):
        expected, expected_metrics = one_process[update]
        assert expected.norm() > 1e-3
        for results in results_of_both:
            change, metrics = results[update]
            assert (change - expected).norm() < 1e-4 * expected.norm(), update
            assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6), update
    torch.testing.assert_close(torch.cat([x["rewards"] for x in results_of_both]), one_process["rewards"])
    assert all(math.isnan(x["nan"][1]["losses/value_loss"]) for x in results_of_both)


def test_compiled_it_is_the_same_run(tmp_path, monkeypatch):
    """--compile takes the network and a rollout's step, each without a break; what it traces is the same to the bit."""
    traced = []

    def trace_alone(function, backend="aot_eager", mode=None, **options):  # no code is generated, no CUDA graph
        traced.append((function.__name__, mode))
        return real(function, backend=backend, **options)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags = ("--arch", "dual", "--e-value", 2, *phases(2))
    plain = train(tmp_path / "plain", *flags)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", trace_alone)
    compiled = train(tmp_path / "compiled", *flags, "--compile")
    assert traced == [("_call_impl", None), ("act", "reduce-overhead")]
    (rows, expected), (compiled_rows, found) = learned(plain), learned(compiled)
    assert compiled_rows == rows and expected.keys() <= found.keys()
    assert all(np.array_equal(leaf, found[name]) for name, leaf in expected.items())
    for name in found.keys() - expected.keys():  # a head that no loss uses gets gradient 0, where it had none
        assert "/step" in name or not found[name].any()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 5 and not counters["graph_break"]


@pytest.mark.parametrize("flags", [
    "--arch dual", "--arch detach --e-policy 2 --max-grad-norm 1 --segments-per-pass 1", shlex.join(map(str, PPO)),
    "--arch dual --clip-coef 0 --kl-coef 1 --e-value 2 --anneal-lr", "--arch shared --num-steps 2 --e-auxiliary 2",
])  # fmt: skip
def test_the_device_is_read_once_a_step(tmp_path, monkeypatch, flags):
    """No host tensor meets one of the device, which is read once an environment step, and seldom besides."""
    # The device is PyTorch's `meta`: it computes nothing and refuses to be mixed; what is read from it is replaced.
    reads = []

    def to_host(tensor, name):
        if not tensor.is_meta:
            return tensor
        reads.append(name)
        return torch.ones_like(tensor, device="cpu")

    for name in ("cpu", "tolist", "__bool__"):  # by any other way a read raises
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, name=name, real=real: real(to_host(x, name)))
    real_autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: real_autocast("cpu", enabled=False))
    monkeypatch.setattr(ppg, "start_process", lambda args: torch.device("meta"))
    small = "--checkpoint-interval 0 --num-steps 3 --e-auxiliary 1 --num-aux-rollouts 4 "
    args = make_args(tmp_path, *(small + flags).split())
    args.total_timesteps = 2 * args.num_envs * args.num_steps  # a phase
    train_in_signposts(args)
    assert reads.count("cpu") == 2 * (args.num_steps + 1)
    assert reads.count("tolist") == 2 + (args.e_auxiliary > 0)
    assert reads.count("__bool__") == 2 + (args.e_auxiliary > 0) + 1  # are all weights finite?


mark_section("invariant")


# ---- C. program: flags, files, faults, evaluation, wandb, memory, README -------------------------
DEFAULTS = {
    "exp_name": SCRIPT.stem, "seed": 1, "torch_deterministic": True, "cuda": True, "track": False,
    "wandb_project_name": "ppg-procgen", "wandb_entity": None, "capture_video": False, "runs_dir": "runs",
    "checkpoint_interval": 1, "resume": None, "evaluate": None, "eval_interval": 0, "eval_episodes": 100,
    "env_id": "starpilot", "distribution_mode": "easy", "num_levels": 0, "start_level": 0, "num_envs": 64,
    "env_threads": 4, "total_timesteps": 25_000_000, "arch": "dual", "num_steps": 256, "n_iteration": 32,
    "e_policy": 1, "e_value": 1, "num_minibatches": 8, "learning_rate": 5e-4, "anneal_lr": False, "adam_eps": 1e-8,
    "gamma": 0.999, "gae_lambda": 0.95, "reward_norm_gamma": 0.99, "reward_clip": 10.0, "clip_coef": 0.2,
    "kl_coef": 0.0, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.0, "e_auxiliary": 6,
    "beta_clone": 1.0, "aux_vf_coef": 1.0, "aux_learning_rate": 5e-4, "num_aux_rollouts": 4, "precision": "auto",
    "segments_per_pass": 0, "compile": False,
}  # fmt: skip
BAD_INPUT = {
    "--num-minibatches 3": "must divide --num-envs, 64", "--num-aux-rollouts 3": "must divide N x N_pi, 2048",
    "--total-timesteps 16383": "one rollout, 16384 steps", "--ent-coef inf": "not inf", "--num-steps 0": "1 to",
    "--gamma 1.001": "from 0 to 1, not 1.001", "--seed 99999999999": "to 2e+09, not 99999999999",
    "--num-envs 8.5": "a whole number", "--num-envs many": "--num-envs", "--seed": "--seed", "--track yes": "yes",
    "--env-id starpliot": "'starpilot'", "--distribution-mode extreme": "'easy', 'hard'",
    "--num-env 64": "--num-env 64", "--lerning-rate=1": "--lerning-rate=1", "--arch duel": "'dual', 'detach', 'shared'",
    "--resume a --evaluate b": "not allowed",
    "--exp-name a/b": "without", "--exp-name a:b": "without", "--start-level 2e9": "from 0 to 1e+09",
    "--eval-interval 1 --eval-episodes 0": "at least 1", "--resume=-x": "-x/checkpoint.pt is missing",
    "--resume=": "checkpoint.pt is missing", "--evaluate nowhere": "nowhere/checkpoint.pt is missing",
}  # fmt: skip
LEVELS = ("--env-id", "bossfight", "--num-levels", 3)  # its episodes, and films, are the shortest


@pytest.fixture
def wandb(monkeypatch):
    """Notes what it is told."""
    wandb = types.SimpleNamespace(started=[], rows=[])
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb.init = lambda **options: wandb.started.append(options) or wandb
    wandb.finish = lambda exit_code: None
    wandb.log = lambda row, step: wandb.rows.append(dict(row) if step == row["global_step"] else None)
    return wandb


@pytest.fixture(scope="module")
def on_levels(tmp_path_factory):
    """A run of 3 phases on 3 levels. Tests only read it."""
    return train(tmp_path_factory.mktemp("levels"), *LEVELS, *phases(3))


@pytest.fixture
def copied(on_levels, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(on_levels, tmp_path / on_levels.name)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The same run, evaluated after two phases and filmed after each."""
    flags = ("--eval-interval", 2, "--eval-episodes", 2, "--capture-video")
    return train(tmp_path_factory.mktemp("evaluated"), *LEVELS, *flags, *phases(3))


def ending(capsys, *flags):
    """Exit status and stderr of the program, run in this process; 128 and the number of a signal that ends it."""
    with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "raise_signal", lambda signum: sys.exit(128 + signum))
        ppg.main([*map(str, flags)])
    return end.value.code, capsys.readouterr().err


def contents(run_dir):
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


def test_flags(monkeypatch, capsys):
    """A flag has its documented default, a help text of its own and a --no- form, and no number may be below 0."""
    assert vars(ppg.parse_args([])) == DEFAULTS
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as end:
        ppg.parse_args(["--help"])
    entries = r"^  --([\w-]+).*?\s{2,}(\S.*?) \(default: "
    helps = dict(re.findall(entries, capsys.readouterr().out, flags=re.MULTILINE))
    assert end.value.code == 0 and {name.replace("-", "_") for name in helps} == set(DEFAULTS)
    assert min(map(len, helps.values())) > 10 and len(set(helps.values())) == len(helps)
    assert helps["env-id"] == ", ".join(line.split()[0] for line in RETURNS.split(","))
    for name in ("torch-deterministic", "cuda", "track", "capture-video", "anneal-lr", "compile"):
        assert vars(ppg.parse_args([f"--{name}"]))[name.replace("-", "_")] is True
        assert vars(ppg.parse_args([f"--no-{name}"]))[name.replace("-", "_")] is False
    other = ppg.parse_args(["--v-value", "3", "--total-timesteps", "1e6"])
    assert other.e_value == 3 and other.total_timesteps == 1_000_000
    for name in (name for name, default in DEFAULTS.items() if type(default) in (int, float)):
        flag = f"--{name.replace('_', '-')}"
        assert flag in refusal(capsys, f"{flag}=-1") and flag in refusal(capsys, f"{flag}=nan")


@pytest.mark.parametrize(("line", "words"), BAD_INPUT.items(), ids=BAD_INPUT)
def test_bad_input(tmp_path, monkeypatch, capsys, line, words):
    """One sentence says what is wrong, the exit status is 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, *line.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_from_a_shell(tmp_path, rank):
    """Of several processes one on each node says the sentence; there is no traceback."""
    done = program("--num-envs", 12, cwd=tmp_path, RANK=str(rank + 2), LOCAL_RANK=str(rank))  # of a second node
    sentence = "error: --num-minibatches must divide --num-envs, 12\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "" if rank else sentence)


def play_at_random(tracker, steps):
    """What the environments show, reward and end in each step."""
    space = tracker.envs.single_action_space
    space.seed(0)
    shown = []
    for _ in range(steps):
        actions = np.stack([space.sample() for _ in range(tracker.envs.num_envs)])
        step = tracker.step(torch.from_numpy(actions))
        shown.append((tracker.obs.clone(), step.rewards, step.episodes))
    return shown


def check_envs(make, steps):
    """Environments, made by `make()`, are what `make_envs` asks for; of `steps`, some should end an episode.

    They reset in the step that ends an episode, the seed decides what they show, and their state, read as a checkpoint
    is read, goes on in environments of another seed. A copy calls it with make_envs of its own.
    """
    tracker, same, other = [ppg.EpisodeTracker(make(), seed) for seed in (7, 7, 8)]
    mode = (tracker.envs.metadata or {}).get("autoreset_mode")
    assert mode is None or mode.name == "SAME_STEP", f"autoreset_mode must be SAME_STEP, not {mode}"
    assert torch.equal(tracker.obs, same.obs), "one seed must show one start"
    shown = play_at_random(tracker, steps)
    exactly = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(play_at_random(same, steps), shown, **exactly)
    assert not torch.equal(shown[0][0], shown[-1][0]), "nothing moves"
    differ = [not torch.equal(a[0], b[0]) for a, b in zip(play_at_random(other, steps), shown)]
    assert any(differ), "another seed must show something else"
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(play_at_random(other, steps), play_at_random(tracker, steps), **exactly)


@pytest.mark.parametrize("game", [line.split()[0] for line in RETURNS.split(",")])
def test_game(tmp_path, game):
    check_envs(partial(ppg.make_envs, make_args(tmp_path, "--env-id", game), num_envs=2), 60)


@pytest.mark.parametrize(("fault", "words"), [
    ("seed", "one seed"), ("frozen", "nothing moves"), ("state", "The failure occurred"), ("later", "SAME_STEP")
])  # fmt: skip
def test_bad_environments_are_found(monkeypatch, fault, words):
    """By check_envs, which finds nothing wrong with good ones."""
    monkeypatch.setattr(Signpost, "get_state", lambda self: pickle.dumps(vars(self)), raising=False)
    monkeypatch.setattr(
        Signpost, "set_state", lambda self, state: vars(self).update(pickle.loads(state)), raising=False
    )
    check_envs(partial(Signpost, 2), 30)
    if fault == "seed":
        reset = Signpost.reset
        monkeypatch.setattr(Signpost, "reset", lambda self, *, seed: reset(self, seed=None))
    if fault == "frozen":
        zeros = np.zeros(2, bool)
        monkeypatch.setattr(Signpost, "step", lambda self, actions: (self.obs, zeros, zeros, zeros, {}))
    if fault == "state":
        monkeypatch.setattr(Signpost, "set_state", lambda self, state: None)
    if fault == "later":
        monkeypatch.setattr(Signpost, "metadata", {"autoreset_mode": types.SimpleNamespace(name="NEXT_STEP")})
    with pytest.raises(AssertionError, match=words):
        check_envs(partial(Signpost, 2), 30)


def test_environment_flags_reach_the_training(tmp_path, monkeypatch):
    """Game, mode, number of levels and first level decide what the training sees."""
    starts = spy(monkeypatch, "collect_rollout", lambda _, rollout: rollout.inputs["obs"][:, 0].clone())
    base = ("--total-timesteps", 32, "--checkpoint-interval", 0, "--num-levels", 1, "--start-level", 5)
    others = [("--env-id", "maze"), ("--distribution-mode", "hard"), ("--start-level", 6), ("--num-levels", 0)]
    for i, flags in enumerate([(), *others]):
        train(tmp_path / str(i), *base, *flags)
    assert [torch.equal(start[0], start[1]) for start in starts] == [True, True, True, True, False]
    assert all(not torch.equal(start[0], starts[0][0]) for start in starts[1:])
    assert not list(tmp_path.glob("*/*/checkpoint.pt"))


def test_other_environments(tmp_path, monkeypatch, capsys):
    """Other environments are trained in, counted, resumed and evaluated; SPS leaves the evaluation out."""
    envs = Signpost(4)

    def factory(args, *, num_envs, **_):
        return envs if num_envs == 4 else Signpost(num_envs)

    spy(monkeypatch, "play", lambda *_: time.sleep(0.5))
    flags = ("--arch", "shared", "--e-auxiliary", 0, "--num-steps", 64, "--total-timesteps", 1024)
    args = make_args(tmp_path, *flags, "--eval-interval", 1, "--eval-episodes", 3)
    args.env_id = "signpost"
    summary = train_in_signposts(args, factory)
    figures = [summary[name] for name in ("episodic_return", "episodic_length")]
    assert summary["episodes"] == len(envs.finished) > 110 and len(envs.history) == 256
    assert figures == pytest.approx(np.mean(envs.finished[-100:], axis=0)) and summary["normalized_return"] is None
    assert summary["SPS"] > 1024 / (summary["seconds"]["total"] - 1)
    run_dir = only_run(tmp_path)
    names = set().union(*read_rows(run_dir))
    assert "eval/all_levels_return" in names and not any("normalized" in name for name in names)
    train_in_signposts(ppg.parse_args(["--resume", str(run_dir), "--total-timesteps", "1280"]), factory)
    assert "they start anew" in capsys.readouterr().err and len(read_rows(run_dir)) == 5
    monkeypatch.setattr(ppg, "make_envs", factory)
    ppg.main(["--evaluate", str(run_dir)])
    report = json.loads(capsys.readouterr().out)
    assert report["global_step"] == 1280 and report["all_levels_normalized_return"] is None
    assert not any(name.startswith("train_levels") for name in report)  # all levels are played once
    monkeypatch.setattr(Signpost, "get_state", lambda self: self.rng, raising=False)  # cannot be loaded safely
    with pytest.raises(pickle.UnpicklingError, match="generator_ctor"):
        train_in_signposts(args, factory)
    assert len(list(tmp_path.glob("*/checkpoint*"))) == 1  # of the first run
    monkeypatch.setattr(Signpost, "draw", lambda self: np.zeros((1, 64, 64, 3)))
    with pytest.raises(ValueError, match="their space is"):
        ppg.EpisodeTracker(Signpost(1), 1)
    for image in (gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Box(0, 1, (84, 84, 4), np.float32)):
        with pytest.raises(ValueError, match=r"observations must be uint8 \[H, W, C\]"):
            ppg.Agent(image, gym.spaces.Discrete(4), "dual")


def test_the_last_episodes_are_those_of_all_processes(tmp_path, monkeypatch):
    """An iteration in which each of two processes ends hundreds of episodes counts the newest of both."""
    envs = Signpost(32)
    better = lambda episodes: [episode._replace(episodic_return=episode.episodic_return + 1) for episode in episodes]
    doubled = lambda thing: [thing, better(thing) if isinstance(thing, list) else thing]
    monkeypatch.setattr(ppg, "gather_objects", doubled)  # the other process is better by 1
    flags = ("--num-envs", 32, "--num-steps", 64, "--total-timesteps", 2048, "--e-auxiliary", 0)
    summary = train_in_signposts(make_args(tmp_path, *flags), lambda *_, **__: envs)
    assert len(envs.finished) > 200 and summary["episodes"] == 2 * len(envs.finished)
    assert summary["episodic_return"] == pytest.approx(np.mean(envs.finished[-50:], axis=0)[0] + 0.5, abs=0.1)


def test_what_a_run_writes(tmp_path, monkeypatch, capsys, wandb):
    """A run has the documented files; its rows hold every metric that the code hands over, and wandb the same."""
    passes = spy_on_losses(monkeypatch)
    kls = spy(monkeypatch, "kl_from_old_policy", lambda _, result: result.item())
    configs = spy(monkeypatch, "collect_rollout", lambda *_: (only_run(tmp_path) / "config.json").read_text())
    real = ppg.policy_update
    monkeypatch.setattr(ppg, "policy_update", lambda *args: real(*args) | {"my/metric": torch.tensor(2.5)})
    # 5 iterations of 4 x 8 steps and 20 steps more: two full phases of 2, and one of 1.
    args = make_args(tmp_path, "--total-timesteps", 180, "--e-policy", 2, "--e-auxiliary", 1, "--track")
    returned = train_in_signposts(args)
    run_dir = only_run(tmp_path)
    said = capsys.readouterr().err
    assert f"writing to {run_dir}" in said and "is not PPO" not in said
    assert f'done: {{"episodic_return": {returned["episodic_return"]}, ' in said
    assert re.fullmatch(rf"starpilot__{SCRIPT.stem}__1__\d{{10}}", run_dir.name)
    assert set(contents(run_dir)) == {"config.json", "metrics.jsonl", "checkpoint.pt", "summary.json", SCRIPT.name}
    assert (run_dir / SCRIPT.name).read_bytes() == SCRIPT.read_bytes()
    config = json.loads(configs[0])
    assert (
        config["flags"] == vars(args) and config["command_line"] == sys.argv and config["flags"]["precision"] != "auto"
    )
    versions = [config[name] for name in ("device", "python", "torch", "gym", "numpy")]
    assert versions == ["cpu", sys.version, torch.__version__, gym.__version__, np.__version__]
    rows = read_rows(run_dir)
    counters = [(row["iteration"], row["phase"], row["global_step"]) for row in rows]
    assert counters == [(1, 0, 32), (2, 0, 64), (3, 1, 96), (4, 1, 128), (5, 2, 160)]
    losses = column(passes, "losses/policy_loss")
    assert len(losses) == 5 * 2 * 2 and len(set(losses)) > 10 and len(kls) == 2 * 1 * 4
    for i, row in enumerate(rows):
        assert row["losses/policy_loss"] == pytest.approx(statistics.fmean(losses[4 * i : 4 * i + 4]), abs=1e-5)
        before = rows[i - 1] if i else dict.fromkeys(row, 0)
        grown = {name for name in row if name.startswith("time/") and row[name] > before[name]}
        auxiliary = {"time/auxiliary_phase"} if i in (1, 3) else set()
        assert grown - {"time/evaluation"} == {"time/rollout", "time/policy_phase", "time/total"} | auxiliary
        assert ("losses/aux/kl_loss" in row) == bool(auxiliary) and row["my/metric"] == 2.5
    assert rows[3]["losses/aux/kl_loss"] == pytest.approx(statistics.fmean(kls[4:]), rel=1e-3, abs=1e-7)
    assert wandb.rows == rows and wandb.started[0]["config"] == vars(args)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary == returned and summary["evaluation"] is None and summary["global_step"] == 160
    assert summary["peak_memory_bytes"]["host"] > 1e8 and summary["peak_memory_bytes"]["device"] == 0
    total = summary["seconds"]["total"]
    assert summary["SPS"] == pytest.approx(160 / total, rel=0.01) and sum(summary["seconds"].values()) < 2 * total
    assert summary["seconds"] == {name: rows[4][f"time/{name}"] for name in summary["seconds"]}


def test_runs_that_stay_as_they_are(copied, monkeypatch, capsys):
    """Directories of a running process and of a run begun in the same second are refused; a finished run is told."""
    before = contents(copied)
    other_process = os.open(copied, os.O_RDONLY)
    ppg.fcntl.flock(other_process, ppg.fcntl.LOCK_SH)  # a process that writes locks for itself alone
    status, said = ending(capsys, "--resume", copied, *phases(4))
    os.close(other_process)
    assert status == 2 and f"error: another process is writing to {copied}" in said and contents(copied) == before
    saved = read_checkpoint(copied)
    larger = saved["modules"] | {"agent": saved["modules"]["agent"] | {"gru.weight": torch.zeros(1)}}
    torch.save(saved | {"modules": larger}, copied / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        status, said = ending(capsys, flag, copied)
        assert status == 2 and f"error: 'agent' in the checkpoint of {copied} is another script's" in said
    torch.save(saved | {"modules": {"agent": saved["modules"]["agent"]}}, copied / "checkpoint.pt")
    status, said = ending(capsys, "--resume", copied, *phases(4))
    assert status == 2 and f"error: 'policy_and_value' in the checkpoint of {copied} is another script's" in said
    (copied / "checkpoint.pt").write_bytes(before["checkpoint.pt"])  # all else is as before
    monkeypatch.setattr(time, "time", lambda: int(copied.name[-10:]))
    status, said = ending(capsys, *TINY, *LEVELS, "--runs-dir", copied.parent)
    assert status == 1 and f"{copied}: File exists" in said and contents(copied) == before
    ppg.main(["--resume", str(copied)])
    said = capsys.readouterr().err
    assert "going on from step 192 of 192" in said and "done: " in said
    assert all(contents(copied)[name] == before[name] for name in ("metrics.jsonl", "checkpoint.pt"))


@pytest.mark.parametrize(("complete", "half", "dropped", "missing"), [(7, 0, 1, 0), (4, 40, 1, 2), (0, 0, 0, 6)])
def test_rows_are_cut_by_iteration(copied, capsys, complete, half, dropped, missing):
    """A resumed run drops later rows and half a row, and says how many are missing, of a deleted file too."""
    (copied / "evaluations.jsonl").write_text('{"global_step": 192}\n{"global_step": 224}\n')
    path = copied / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows += 2 * [
        rows[5].replace('"iteration": 6', '"iteration": 7').replace('"global_step": 192', '"global_step": 224')
    ]
    path.write_text("".join(rows[:complete]) + rows[complete][:half])
    if complete == 0:
        path.unlink()
    resume(copied, *phases(4))
    assert [row["iteration"] for row in read_rows(copied)] == [*range(1, 7 - missing), 7, 8]
    assert (copied / "evaluations.jsonl").read_text() == '{"global_step": 192}\n'
    counts = f"{6 - missing} of 6 rows; {dropped} later ones are dropped"
    assert f"going on from step 192 of 256 with {counts}" in capsys.readouterr().err


FILE_SIZE = ppg.resource.RLIMIT_FSIZE  # beyond it the system refuses to write: a full disk
UPDATE, AUXILIARY = "policy_update", "auxiliary_phase"
NAN = lambda agent, _: agent.value_head.weight.data.fill_(math.nan)  # as a loss that is not finite does
DIVERGED = "error: a weight is not finite at step {}; last checkpoint: 64; a resumed run would repeat this"
STOPPED = "stopped at step {}; last checkpoint: 64\nto go on from there"
TOO_LARGE = "(.|\n)*error: .*File too large"
limit_files = lambda size: lambda *_: ppg.resource.setrlimit(FILE_SIZE, (size, -1))


@pytest.mark.parametrize(("function", "call", "fault", "status", "sentence", "step", "kept"), [
    (UPDATE, 2, KeyboardInterrupt(), 130, "stopped at step {}; last checkpoint: none", 32, []),
    (UPDATE, 3, NAN, 1, DIVERGED, 96, [64]), (AUXILIARY, 2, NAN, 1, DIVERGED, 128, [64]),
    (UPDATE, 3, limit_files(10), 1, STOPPED + TOO_LARGE, 128, [64]),
    (AUXILIARY, 2, limit_files(10**6), 1, STOPPED + TOO_LARGE, 128, [64]),
    (UPDATE, 3, FileNotFoundError("mine"), "mine", STOPPED, 64, [64]),  # an error in a changed copy
])  # fmt: skip
def test_faults(tmp_path, monkeypatch, capsys, function, call, fault, status, sentence, step, kept):
    """What stops a run leaves the last good checkpoint and a sentence; unexpected errors keep their tracebacks."""
    at_call(monkeypatch, call, fault, function)
    limits = ppg.resource.getrlimit(FILE_SIZE)
    monkeypatch.setattr(signal, "raise_signal", lambda signum: sys.exit(128 + signum))
    try:
        with pytest.raises((SystemExit, FileNotFoundError)) as end:
            ppg.main([*TINY, "--runs-dir", str(tmp_path), *phases(3)])
    finally:
        ppg.resource.setrlimit(FILE_SIZE, limits)
    assert end.value.args[0] == status and re.search(sentence.format(step), capsys.readouterr().err)
    assert [read_checkpoint(path.parent)["run"]["global_step"] for path in tmp_path.glob("*/checkpoint.pt")] == kept
    assert not list(tmp_path.glob("*/*.tmp"))


def test_nan_beside_the_agent(tmp_path, capsys):
    """A weight that is not finite ends the run in any module, before it is saved."""
    modules = {"agent": make_agent(), "beside": torch.nn.PReLU(init=math.nan)}
    with pytest.raises(SystemExit), ppg.Run(make_args(tmp_path), CPU, modules, {}) as run:
        run.log({})
    assert "error: a weight is not finite" in capsys.readouterr().err


def test_advice(tmp_path, monkeypatch, capsys, wandb):
    """What is told leads on, with the flags as they were given, also beside --resume; wandb continues the same run."""

    def stopped(call, *flags):
        with monkeypatch.context() as patch:
            at_call(patch, call, KeyboardInterrupt())
            _, said = ending(capsys, *flags)
        step, words = re.search(r"checkpoint: (\d+)\nto go on from there, .* command and (--resume=.*)", said).groups()
        return [*map(str, flags), *shlex.split(words)], int(step)

    command, step = stopped(3, *TINY, *phases(3), "--track", "--runs-dir", tmp_path / "it's mine")
    run_dir = only_run(tmp_path / "it's mine")
    assert command[-1] == f"--resume={run_dir}" and step == 64
    command, step = stopped(5, *command, "--total-timesteps", 256, "--checkpoint-interval", 2)  # none in phase 3
    assert command[-1] == f"--resume={run_dir}" and step == 128
    ppg.main(command)
    assert [row["iteration"] for row in read_rows(run_dir)] == [*range(1, 9)]
    assert {options["id"] for options in wandb.started} == {run_dir.name} and len(wandb.started) == 3
    # Rows that were made again, of step 96 and 160, are not logged again.
    assert [row["global_step"] for row in wandb.rows] == [*range(32, 257, 32)]


class Malice:
    """Unpickled, it makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("victim",)


@pytest.mark.parametrize(("change", "words"), [
    (lambda saved: torch.zeros(3), "is not a checkpoint of this version"),
    (lambda saved: saved | {"format": 0}, "is not a checkpoint of this version"),
    (lambda saved: saved | {"args": saved["args"] | {"my_flag": 1}}, "of a script with other flags (my_flag)"),
    (lambda saved: saved | {"args": {k: v for k, v in saved["args"].items() if k != "gamma"}}, "other flags (gamma)"),
    (lambda saved: saved | {"run": Malice()}, "not a checkpoint (UnpicklingError)"),
    (None, "damaged or not a checkpoint (RuntimeError)"),
])  # fmt: skip
def test_bad_checkpoints(copied, monkeypatch, capsys, change, words):
    """Each is refused in its own words, and neither run nor written to."""
    monkeypatch.chdir(copied)
    path = copied / "checkpoint.pt"
    if change:
        torch.save(change(read_checkpoint(copied)), path)
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    before = contents(copied)
    for flag in ("--resume", "--evaluate"):
        sentence = refusal(capsys, flag, copied)
        assert words in sentence and str(copied) in sentence
    assert contents(copied) == before and not Path("victim").exists()


def test_precision_stays_that_of_the_run(tmp_path, monkeypatch, capsys):
    """What auto meant on the first machine is a flag of the run, and said where it is slow; passes are chosen anew."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    run_dir = train(tmp_path, *phases(1))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    resume(run_dir, *phases(2), "--precision", "auto")
    assert "--precision bf16 is slow" in capsys.readouterr().err
    flags = json.loads((run_dir / "config.json").read_text())["flags"]
    assert (flags["precision"], flags["segments_per_pass"]) == ("bf16", 0)


def test_system_errors(tmp_path, capsys, copied):
    """Each is a sentence with its path and reason; rows are never cut halfway."""
    (tmp_path / "file").touch()
    status, said = ending(capsys, *TINY, "--runs-dir", tmp_path / "file" / "runs")
    assert status == 1 and re.search(f"error: {tmp_path}/file/runs/.*: Not a directory\n", said)
    before = contents(copied)
    (copied / "metrics.jsonl").write_bytes(before["metrics.jsonl"] + b'{"global_step": 999}\n')
    (copied / "metrics.tmp").symlink_to("/dev/full")
    status, said = ending(capsys, "--resume", copied, *phases(4))
    assert status == 1 and f"error: {copied}: No space left on device\n" in said
    assert contents(copied) == before | {"metrics.jsonl": before["metrics.jsonl"] + b'{"global_step": 999}\n'}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppg, "WORLD_SIZE", 2)
        assert "takes one process" in refusal(capsys, "--evaluate", copied)


def test_shared_is_not_ppo(tmp_path, capsys):
    """--arch shared with an auxiliary phase says so."""
    train_in_signposts(make_args(tmp_path / "a", "--arch", "shared", "--e-auxiliary", 1, "--total-timesteps", 32))
    assert "is not PPO" in capsys.readouterr().err
    train_in_signposts(make_args(tmp_path / "b", *PPO, "--total-timesteps", 32))
    assert "is not PPO" not in capsys.readouterr().err


def test_flags_beside_resume(on_levels, monkeypatch, capsys):
    """What changes the learning may be repeated, all else may differ; the checkpoint's own path is understood."""
    args = ppg.parse_args(["--resume", str(on_levels), "--num-steps", "16", "--env-threads", "2"])
    assert (args.num_levels, args.num_steps, args.env_threads, args.env_id) == (3, 16, 2, "bossfight")
    for flags in (["--gamma", 0.9], ["--arch", "dual"], ["--seed", 2], ["--anneal-lr"], ["--precision", "bf16-aux"]):
        assert f"leave out {flags[0]}:" in refusal(capsys, "--resume", on_levels, *flags)
    assert "at least 192" in refusal(capsys, "--resume", on_levels, *phases(2))
    with monkeypatch.context() as patch:
        patch.setattr(ppg, "WORLD_SIZE", 2)
        assert "goes on with 1 processes" in refusal(capsys, "--resume", on_levels, *phases(6))
    monkeypatch.chdir(on_levels)
    for path in (on_levels / "checkpoint.pt", "checkpoint.pt"):
        assert Path(ppg.parse_args(["--resume", str(path)]).resume or "none").resolve() == on_levels


def test_what_a_run_says(tmp_path, capsys):
    """A line for each iteration and auxiliary epoch."""
    train_in_signposts(make_args(tmp_path, "--e-auxiliary", 1))
    said = capsys.readouterr().err
    lines = re.findall(r"^step (\d+) of 128: episodic_return \d.*, SPS \d+", said, re.MULTILINE)
    assert lines == ["32", "64", "96", "128"]
    assert said.count("auxiliary epoch 1 of 1\n") == 2


def test_each_environment_plays_its_quota():
    """Short episodes do not take the place of long ones: each of 4 environments plays 3, and the first one 4."""
    envs = Signpost(4)
    returns = ppg.play(make_agent(), envs, 13, 0, CPU)
    rewards, ends = (np.stack([step[part] for step in envs.history]) for part in (2, 3))
    expected = []
    for i, quota in enumerate([4, 3, 3, 3]):
        episodes = np.split(rewards[:, i], np.flatnonzero(ends[:, i]) + 1)
        expected += [episode.sum() for episode in episodes[:quota]]
    assert sorted(returns) == sorted(expected) != sorted(total for total, _ in envs.finished[:13])


def test_evaluation_report(copied, monkeypatch, capsys):
    """The trained policy plays the training levels and all levels, on other seeds than the training."""
    saved = read_checkpoint(copied)["modules"]["agent"]
    seeds = []

    def play(agent, envs, episodes, seed, device):
        assert all(torch.equal(value, saved[name]) for name, value in agent.state_dict().items())
        seeds.append(seed)
        returns = {0: [1.0, 2.0, 3.0], 3: [2.0, 4.0, 9.0]}  # of all levels, of 3 levels
        return np.array(returns[envs.options["num_levels"]][:episodes])

    monkeypatch.setattr(ppg, "play", play)
    ppg.main(["--evaluate", str(copied), "--eval-episodes", "3"])
    report = json.loads(capsys.readouterr().out)
    expected = {"train_levels_return": 5, "train_levels_standard_error": (13 / 3) ** 0.5, "episodes": 3, "seed": 1}
    expected |= {"train_levels_normalized_return": 4.5 / 12.5, "all_levels_normalized_return": 1.5 / 12.5}
    expected |= {"all_levels_return": 2, "all_levels_standard_error": (1 / 3) ** 0.5, "global_step": 192}
    all_levels = {"num_levels": 0, "start_level": 0}
    assert report.pop("level_sets") == {"train_levels": {"num_levels": 3, "start_level": 0}, "all_levels": all_levels}
    assert report == pytest.approx(expected)
    report["level_sets"] = {"train_levels": {"num_levels": 3, "start_level": 0}, "all_levels": all_levels}
    ppg.main(["--evaluate", str(copied), "--eval-episodes", "1", "--seed", "7"])
    other = json.loads(capsys.readouterr().out)
    assert other["all_levels_standard_error"] is None and other["train_levels_return"] == 2 and other["seed"] == 7
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3] and not {1, 7, 10_001} & set(seeds)
    path = copied / "evaluations.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [report, other]
    path.unlink()
    path.symlink_to("/dev/null/none")
    ppg.main(["--evaluate", str(copied), "--eval-episodes", "2"])
    output = capsys.readouterr()
    assert json.loads(output.out)["episodes"] == 2 and f"not stored in {path}: Not a directory" in output.err
    path.unlink()
    levels = {"num_levels": 3, "start_level": 1000}
    ppg.main(["--evaluate", str(copied), "--eval-episodes", "2", "--start-level", "1000"])
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["level_sets"] == {"chosen_levels": levels} and chosen["chosen_levels_return"] == 3
    films = spy(monkeypatch, "make_envs", lambda a, _: a.get("film"))
    ppg.main(["--evaluate", str(copied), "--eval-episodes", "0", "--capture-video", "--seed", "8"])
    assert films[-1]["prefix"] == "step192-seed8-" and not capsys.readouterr().out


def test_evaluation_and_film_leave_the_training_alone(on_levels, evaluated):
    """A training that is evaluated and filmed equals the one that is not; the films are 512 x 512 and move."""
    assert_same_run(on_levels, evaluated, "eval/")
    rows = read_rows(evaluated)
    names = {f"eval/{x}_levels_{y}" for x in ("train", "all") for y in ("return", "normalized_return")}
    assert [names <= set(row) for row in rows] == [i in (3, 5) for i in range(6)]  # after two phases, and at the end
    results = [json.loads(line) for line in (evaluated / "evaluations.jsonl").read_text().splitlines()]
    assert json.loads((evaluated / "summary.json").read_text())["evaluation"] == results[-1] != results[0]
    for step in (64, 128, 192):
        film = importlib.import_module("imageio").get_reader(evaluated / f"videos/step{step}-seed1-00000.mp4")
        frames = [film.get_data(i) for i in range(10)]
        assert frames[0].shape == (512, 512, 3) and any((frame != frames[0]).any() for frame in frames)


def test_offline_wandb_and_film_from_a_shell(tmp_path):
    """The program ends well with the real wandb, which holds its metrics, and warns of nothing."""
    flags = (*TINY, *LEVELS, *phases(1), "--track", "--capture-video")
    done = program(*flags, cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0 and "arning" not in done.stderr and "pkg_resources" not in done.stderr, done.stderr
    refused = program(*flags, "--runs-dir", "refused", cwd=tmp_path, HOME=str(tmp_path), WANDB_API_KEY="")
    assert refused.returncode == 1 and not (tmp_path / "refused").exists(), refused.stderr
    assert "error: Weights & Biases refuses: No API key" in refused.stderr and "Traceback" not in refused.stderr
    (data,) = tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb")
    assert all(name.encode() in data.read_bytes() for row in read_rows(only_run(tmp_path / "runs")) for name in row)


@pytest.mark.parametrize(("device", "gpu", "home"), [  # GB free on the GPU
    ("cuda", 800, "empty {'dtype': torch.uint8, 'device': device(type='cuda')}"),
    ("cuda", 700, "zeros {'dtype': torch.uint8, 'pin_memory': True}"),
    ("cpu", 0, "zeros {'dtype': torch.uint8, 'pin_memory': False}"),
])  # fmt: skip
def test_home_of_the_observations(tmp_path, monkeypatch, capsys, device, gpu, home):
    """618.5 GB go to the GPU if they are 80 % of what is free there, else to the host, pinned for a GPU."""
    args = make_args(tmp_path, "--num-envs", 4096, "--num-steps", 4096, "--total-timesteps", 2e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gpu * 10**9, 10**15))
    for name in ("empty", "zeros"):
        monkeypatch.setattr(torch, name, lambda shape, name=name, **options: (shape, f"{name} {options}"))
    found = ppg.allocate_observations(3, IMAGES, torch.device(device), args)
    assert found == ((3, 4096, 4096, 64, 64, 3), home)
    assert "take 618.48 GB in each process" in capsys.readouterr().err


@pytest.mark.parametrize("hardware", ["avx512_bf16", "amx_bf16", "avx2", "new GPU", "old GPU"])
def test_choices_by_hardware(tmp_path, monkeypatch, capsys, hardware):
    """bfloat16 is chosen where it is fast, once for a run; passes by memory; collectives for host and device."""
    backends = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {hardware: True})
    monkeypatch.setattr(ppg, "WORLD_SIZE", 2)
    monkeypatch.setattr(ppg.dist, "init_process_group", lambda backend, **_: backends.append(backend))
    answers = {"is_available": "GPU" in hardware, "is_bf16_supported": "new" in hardware, "device_count": 1}
    for name, answer in (answers | {"set_device": None, "mem_get_info": (80 * 10**9, 0)}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    args = make_args(tmp_path, "--cuda")
    device = ppg.start_process(args)
    fast = {"avx512_bf16": "bf16", "amx_bf16": "bf16", "new GPU": "bf16-aux"}.get(hardware, "fp32")
    assert args.precision == fast and "is slow" not in capsys.readouterr().err
    assert [ppg.choose_segments_per_pass(device, t) for t in (256, 999999)] == [31 if "GPU" in hardware else 2, 1]
    assert backends == ["cpu:gloo,cuda:nccl" if "GPU" in hardware else "gloo"]
    ppg.start_process(make_args(tmp_path, "--no-cuda"))
    assert backends[1] == "gloo"
    args.precision = "bf16"
    ppg.start_process(args)
    assert args.precision == "bf16" and ("is slow" in capsys.readouterr().err) == (fast == "fp32")


def readme_block(heading, index=0, path=README):
    """A python block of README, or of another page: the one at this index below the heading that begins so."""
    _, _, section = path.read_text().partition(f"\n## {heading}")
    blocks = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], flags=re.DOTALL)
    return blocks[index]


needs_readme = pytest.mark.skipif(not README.exists(), reason="a copy without its README")


@needs_readme
def test_readme_commands(on_levels):
    """Every command is understood, on the pages beside results too."""
    pages = [README, RESULTS]
    for page in pages:
        text = page.read_text().replace("$game", "starpilot")
        commands = re.findall(r"(?:python|torchrun [^`\n]*?|uv run) ppg_procgen\.py([^`\n&|#>;]*)", text)
        assert len(commands) >= 5
        for command in commands:
            flags = re.sub(r"(--resume|--evaluate)[ =]\S+", rf"\1 {on_levels}", command.replace("--help", ""))
            ppg.parse_args(shlex.split(re.sub(r"\$\w+", "1", flags)))


@needs_readme
def test_readme_metrics(evaluated):
    """Its table has just the metrics that a run writes."""
    cells = "".join(re.findall(r"^\| (`[^|]*`) \|", README.read_text(), flags=re.MULTILINE))
    metrics = set(re.findall(r"`([a-z_]+(?:/\w+)+|iteration|phase|global_step|episodes)`", cells))
    assert metrics == set().union(*read_rows(evaluated))


@needs_readme
def test_readme_draws_curves(tmp_path, monkeypatch, evaluated):
    """Runs of its example, one of which has just begun; a metric with gaps; the picture of README."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    shutil.copytree(README.parent / ".github", tmp_path / ".github")
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2, 3):
        Path(f"runs/x__ppo__{seed}__0").mkdir(parents=True)
        Path(f"runs/x__ppo__{seed}__0/metrics.jsonl").touch()
    rows = [{"global_step": 64, "charts/SPS": 1.0}, {"global_step": 128, "charts/episodic_return": 2.0}]
    Path("runs/x__ppo__2__0/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    Path("runs/x__ppo__3__0/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {}
    exec(readme_block("Your own runs"), names)  # noqa: S102
    (mean, run) = names["own"].lines
    assert mean.get_xydata().tolist() == run.get_xydata().tolist() == [[128e-6, 2.0]]
    names["draw"](names["own"], "evaluations", [str(evaluated / "metrics.jsonl")], metric="eval/all_levels_return")
    drawn = names["own"].lines[-1].get_ydata().tolist()
    assert drawn == [row["eval/all_levels_return"] for row in read_rows(evaluated) if "eval/all_levels_return" in row]
    exec(readme_block("The picture", path=RESULTS), names)  # noqa: S102
    assert [len(axes.lines) for axes in names["panels"].flat] == [6, 6, 7, 8]
    assert Path("curves.png").stat().st_size > 10_000
    exec(readme_block("The picture", 1, path=RESULTS), names)  # noqa: S102
    assert [len(axes.get_legend().texts) for axes in names["panels"].flat] == [3, 2, 2, 2, 2, 3]


@needs_readme
def test_results_by_phase(monkeypatch, capsys):
    """Every mean that the page's code computes from the rows stands in its tables."""
    monkeypatch.chdir(README.parent)
    exec(readme_block("PPG and PPO, easy levels", path=RESULTS), {})  # noqa: S102
    means = Counter(re.findall(r" (\d+\.\d\d)", capsys.readouterr().out))
    cells = Counter(re.findall(r"\| (\d+\.\d\d)(?= )", RESULTS.read_text()))
    assert means.total() > 50 and means <= cells


@needs_readme
def test_readme_tabulates_summaries(tmp_path, monkeypatch, capsys):
    """Two seeds of a game, what stands for another game, another algorithm, and a run without an episode."""
    monkeypatch.chdir(tmp_path)
    sizes = "--num-envs 8 --num-steps 64 --total-timesteps 512 --e-auxiliary 0 --no-cuda --exp-name ppg --seed"
    for seed in (1, 2):
        ppg.train(ppg.parse_args([*sizes.split(), str(seed)]))
    summaries = [json.loads(file.read_text()) for file in Path("runs").glob("*/summary.json")]
    first, second = (summary["normalized_return"] for summary in summaries)
    changes = ({"env_id": "coinrun", "normalized_return": 0.5}, {"exp_name": "ppo"}, {"normalized_return": None})
    for i, change in enumerate(changes):
        Path(f"runs/{i}").mkdir()
        Path(f"runs/{i}/summary.json").write_text(json.dumps(summaries[0] | change))
    exec(readme_block("Your own runs", 1), {})  # noqa: S102
    printed = capsys.readouterr().out
    mean, low, high = ((0.5 + x) / 2 for x in ((first + second) / 2, min(first, second), max(first, second)))
    assert f"ppg: {mean:.3f}, {low:.3f} to {high:.3f}, games: 2\n" in printed
    assert f"ppo: {first:.3f}, {first:.3f} to {first:.3f}, games: 1\n" in printed
    assert re.search(r"starpilot +ppg +\S+ +\S+ +2$", printed, flags=re.MULTILINE)


@needs_readme
def test_readme_plays_an_agent(on_levels):
    """From Python: probabilities that add up to 1, a value for each environment."""
    names = {"run_dir": str(on_levels), "ppg": ppg}
    exec(readme_block("From Python").replace("import ppg_procgen as ppg\n", ""), names)  # noqa: S102
    assert names["probabilities"].sum(1).tolist() == pytest.approx([1] * 4, rel=1e-5)
    assert names["values"].shape == (4,) and names["tracker"].num_steps == 100


@needs_readme
def test_readme_agent_before_the_auxiliary_phase(tmp_path):
    """That of a run without it: same rows of metrics in the first phase, but for times."""
    rows = []
    for epochs in (0, 1):
        run_dir = train(tmp_path / str(epochs), "--e-auxiliary", epochs, *phases(1))
        rows.append(
            [{k: x for k, x in row.items() if k.startswith("losses") and "aux" not in k} for row in read_rows(run_dir)]
        )
    assert rows[0] == rows[1]


@needs_readme
def test_requirements_are_the_inline_metadata():
    """A copied file alone, and a clone, get the same packages; Procgen first, where an unsupported Python fails."""
    lines = [line.partition("#")[0].strip() for line in README.with_name("requirements.txt").read_text().splitlines()]
    (block,) = re.findall(r"# dependencies = \[\n(.*?)# \]\n", SCRIPT.read_text(), flags=re.DOTALL)
    inline = re.findall(r'"(.*?)"', block)
    assert lines[0].startswith("procgen==") and len(inline) == 8
    assert {line.replace('"', "'") for line in lines if not line.startswith("pytest==")} == set(inline)


mark_section("program")


# ---- GPU: what the CPU tests cannot see ----------------------------------------------------------
def after_both_updates(rollout, args):
    """Home of the observations, weights and metrics after a policy update and two auxiliary updates."""
    device = ppg.start_process(args)
    agent = make_agent(precision=args.precision).to(device)
    buffer = ppg.allocate_observations(1, IMAGES, device, args)
    buffer[0] = rollout.inputs["obs"]
    moved = {name: getattr(rollout, name).to(device) for name in ("actions", "log_probs", "values")}
    rollout = rollout._replace(inputs=inputs(buffer[0]), **moved)
    torch.manual_seed(1)
    advantages, targets = torch.randn(2, args.num_envs, args.num_steps).to(device)
    sgd = torch.optim.SGD(agent.parameters(), 0.003)  # Adam would enlarge the rounding of gradients near 0
    metrics = ppg.policy_update(agent, {"policy_and_value": sgd}, rollout, advantages, targets, args, 2)
    metrics |= ppg.auxiliary_phase(agent, sgd, rollout.inputs | {"targets": targets}, args, 2)
    return buffer, weights(agent).cpu(), metrics


@needs_gpu
@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_updates_on_a_gpu_are_those_on_the_cpu(tmp_path, monkeypatch, home):
    """In float32, wherever the observations are: losses to 1e-4, weights but for rounding at the network's kinks."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    flags = "--precision fp32 --num-minibatches 1 --n-iteration 1 --num-aux-rollouts 4 --e-auxiliary 2"
    rollout = random_rollout(make_agent(), 4, 8)
    _, expected, expected_metrics = after_both_updates(rollout, make_args(tmp_path, *flags.split()))
    args = make_args(tmp_path, *flags.split(), "--cuda")
    if home == "cpu":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    buffer, found, metrics = after_both_updates(rollout, args)
    assert buffer.device.type == home and buffer.is_pinned() == (home == "cpu")
    assert_same_change(found, expected, weights(make_agent()))
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


@needs_gpu
@pytest.mark.parametrize("flags", [(), ("--e-value", 2, "--max-grad-norm", 1)])
@pytest.mark.parametrize("home", ["cuda", "cpu"])
def test_updates_never_wait_for_the_gpu(tmp_path, monkeypatch, flags, home):
    """From its first pass to its metrics an update does not synchronise; sums of metrics are on the device."""
    take, compute = ppg.take, ppg.Means.compute
    sums = []

    def guarded_take(*args):
        torch.cuda.set_sync_debug_mode("error")
        return take(*args)

    def guarded_compute(means):
        sums.extend(total for total, _ in means.sums.values())
        with pytest.raises(RuntimeError, match="synchronizing"):
            sums[-1].item()
        torch.cuda.set_sync_debug_mode("default")
        return compute(means)

    monkeypatch.setattr(ppg, "take", guarded_take)
    monkeypatch.setattr(ppg.Means, "compute", guarded_compute)
    if home == "cpu":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    try:
        train(tmp_path, "--cuda", *phases(1), *flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(sums) > 10 and {tensor.device.type for tensor in sums} == {"cuda"}


@needs_gpu
def test_a_resumed_run_goes_on_on_a_gpu(tmp_path, monkeypatch):
    """From the weights and the step counts of its checkpoint, though not to the bit."""
    run_dir = train(tmp_path, "--cuda", *phases(1))
    saved = read_checkpoint(run_dir)["modules"]["agent"]
    agents = spy(monkeypatch, "collect_rollout", lambda given, _: copy.deepcopy(given["agent"].state_dict()))
    resume(run_dir, *phases(2))
    assert len(agents) == 2 and all(torch.equal(agents[0][name], saved[name].cuda()) for name in saved)
    assert {tensor.device.type for tensor in agents[0].values()} == {"cuda"}
    assert [row["iteration"] for row in read_rows(run_dir)] == [1, 2, 3, 4]
    modules = read_checkpoint(run_dir)["modules"]
    assert [modules[x]["state"][0]["step"] for x in ("policy_and_value", "auxiliary")] == [8, 4]


mark_section("invariant")

"""Tests of ppg_procgen.py: pytest. Benchmark: python test_ppg_procgen.py benchmark.

Each test compares the shipped functions with a slow reference written from the paper, or runs the program as a user
does. What it would take to break it stands in its first line.
"""

import ast
import copy
import csv
import errno
import inspect
import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ppg_procgen as ppg

gym = ppg.gym  # imported by itself it prints a page
ARCHS = ("dual", "detach", "shared")
FILE = Path(ppg.__file__)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def make_args(tmp_path, *flags):
    """A run of 4 environments and 4 iterations of 8 steps, in 2 phases; `flags` override."""
    small = "--num-envs 4 --num-steps 8 --n-iteration 2 --num-minibatches 2 --num-aux-rollouts 2 --total-timesteps 128"
    return ppg.parse_args([*small.split(), "--no-cuda", "--runs-dir", str(tmp_path), *map(str, flags)])


class Signpost(gym.vector.VectorEnv):
    """A bright block names the one action of four that earns 1. Episodes last 1 to 12 steps."""

    def __init__(self, num_envs):
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(4))
        self.finished, self.history = [], []  # (return, length) of the episodes; (obs, action, reward, done, next obs)

    def reset_wait(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.lengths = self.rng.integers(1, 13, self.num_envs)
        self.ages, self.returns = np.zeros(self.num_envs, int), np.zeros(self.num_envs)
        return self.draw(), {}

    @property
    def episode_lengths(self):
        return self.ages

    def draw(self):
        self.right = self.rng.integers(4, size=self.num_envs)
        self.obs = self.rng.integers(64, size=(self.num_envs, 64, 64, 3), dtype=np.uint8)
        for image, corner in zip(self.obs, self.right):
            y, x = 40 * (corner // 2), 40 * (corner % 2)
            image[y : y + 24, x : x + 24] = 255
        return self.obs

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        obs, rewards = self.obs, (self.actions == self.right).astype(np.float32)
        self.ages, self.returns = self.ages + 1, self.returns + rewards
        done = self.ages == self.lengths
        self.finished += [(self.returns[i], self.ages[i]) for i in np.flatnonzero(done)]
        self.lengths = np.where(done, self.rng.integers(1, 13, self.num_envs), self.lengths)
        self.ages, self.returns = self.ages * ~done, self.returns * ~done
        self.history.append((obs, self.actions, rewards, done, self.draw()))
        return self.obs, rewards, done, np.zeros_like(done), {}


def make_agent(arch="dual", bf16_phases=(), seed=0, num_actions=4, sharpness=30.0):
    """An agent whose logits differ from image to image, unlike those of a fresh one."""
    torch.manual_seed(seed)
    agent = ppg.Agent(num_actions, arch, bf16_phases)
    agent.policy_head.weight.data *= sharpness
    return agent


def random_images(*shape):
    """Coarse noise, so that the network tells one image from another."""
    small = torch.randint(256, (math.prod(shape), 3, 4, 4)).float()
    return F.interpolate(small, size=(64, 64)).permute(0, 2, 3, 1).to(torch.uint8).reshape(*shape, 64, 64, 3)


def random_rollout(agent, num_envs, num_steps):
    """A rollout whose log-probabilities are 0.4 nats off those of the agent, so that some ratios are clipped."""
    shape, obs = (num_envs, num_steps), random_images(num_envs, num_steps)
    with torch.no_grad():
        logits = agent(obs.flatten(0, 1), "policy")[0].view(*shape, -1)
    actions = torch.randint(logits.shape[-1], shape)
    log_probs = logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0] + 0.4 * torch.randn(shape)
    values, firsts = torch.randn(num_envs, num_steps + 1), torch.zeros(num_envs, num_steps + 1)
    return ppg.Rollout(obs, actions, log_probs, values, torch.randn(shape), firsts, [])


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def assert_same_change(new, expected, old, tolerance=1e-2):
    """Both went the same way from `old`, and went far enough for that to say something."""
    change, error = (expected - old).norm(), (new - expected).norm()
    assert change > 1e-4 and error < tolerance * change, f"change {change}, error {error}"


def parts_of(agent):
    names = ("policy_trunk", "value_trunk", "policy_head", "value_head", "aux_value_head")
    return {name: getattr(agent, name) for name in names if agent.arch == "dual" or name != "value_trunk"}


def reached(agent):
    """The parts of the agent that hold a gradient other than 0."""
    grads = {name: [p.grad for p in part.parameters()] for name, part in parts_of(agent).items()}
    return {name for name in grads if any(g is not None and g.any() for g in grads[name])}


def spy(monkeypatch, name, note):
    """Has ppg.<name> go on as before, and appends note(arguments, result) to the list that is returned."""
    calls, real = [], getattr(ppg, name)

    def wrapped(*args, **kwargs):
        bound = inspect.signature(real).bind(*args, **kwargs)
        result = real(*args, **kwargs)
        calls.append(note(bound.arguments, result))
        return result

    monkeypatch.setattr(ppg, name, wrapped)
    return calls


def run_dir(tmp_path):
    (directory,) = tmp_path.iterdir()
    return directory


def read_metrics(directory):
    with open(directory / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_gae_matches_the_definition():
    """sum_k (gamma lambda)^k delta_{t+k}, the paper's double loop, each episode cut by hand."""
    torch.manual_seed(0)
    num_envs, num_steps, gamma, gae_lambda = 6, 40, 0.97, 0.9
    rewards, values = torch.randn(num_envs, num_steps).double(), torch.randn(num_envs, num_steps + 1).double()
    firsts = (torch.rand(num_envs, num_steps + 1) < 0.15).double()
    firsts[0, -1], firsts[1, -1] = 1, 0  # one rollout ends with its episode, one does not
    batch = {"rewards": rewards, "values": values, "firsts": firsts}
    advantages, targets = ppg.compute_gae(**batch, gamma=gamma, gae_lambda=gae_lambda)
    for n in range(num_envs):
        for t in range(num_steps):
            total = 0.0
            for k in range(num_steps - t):
                over = firsts[n, t + k + 1] == 1
                bootstrap = 0.0 if over else gamma * float(values[n, t + k + 1])
                delta = float(rewards[n, t + k]) + bootstrap - float(values[n, t + k])
                total += (gamma * gae_lambda) ** k * delta
                if over:
                    break
            assert float(advantages[n, t]) == pytest.approx(total, abs=1e-9)
            assert float(targets[n, t]) == pytest.approx(total + float(values[n, t]), abs=1e-9)


def test_reward_normalizer_matches_a_loop():
    """Returns carried from rollout to rollout and cut at episode starts; variance of all of them and the prior."""
    torch.manual_seed(0)
    num_envs, num_steps, gamma, clip = 3, 20, 0.9, 1.5
    normalizer = ppg.RewardNormalizer(num_envs, gamma, clip)
    running, seen, clipped = [0.0] * num_envs, [], 0
    for rollout in range(4):
        rewards = torch.randn(num_envs, num_steps) * (1 + rollout) + 0.5
        firsts = (torch.rand(num_envs, num_steps) < 0.2).float()
        firsts[:, 0] = 1.0 if rollout == 0 else torch.tensor([0.0, 1.0, 0.0])
        result = normalizer(rewards, firsts)
        for n in range(num_envs):
            for t in range(num_steps):
                running[n] = float(rewards[n, t]) + (0.0 if firsts[n, t] else gamma * running[n])
                seen.append(running[n])
        # Before the first rollout: a count of 1e-4, mean 0, variance 1.
        count = 1e-4 + len(seen)
        variance = (1e-4 + sum(x * x for x in seen)) / count - (sum(seen) / count) ** 2
        for n in range(num_envs):
            for t in range(num_steps):
                expected = float(rewards[n, t]) / math.sqrt(variance + 1e-8)
                clipped += abs(expected) > clip
                assert float(result[n, t]) == pytest.approx(max(-clip, min(clip, expected)), abs=1e-5)
    assert 0 < clipped < 4 * num_envs * num_steps / 2


def test_global_moments():
    """Count, mean and biased variance, also where the mean is far greater than the deviation."""
    x = 1000 + 0.1 * torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    numbers = [float(value) for value in x.flatten()]
    count, mean, variance = ppg.global_moments(x).tolist()
    assert count == 77 and mean == pytest.approx(statistics.fmean(numbers))
    assert variance == pytest.approx(statistics.pvariance(numbers), rel=1e-5)


def slow_log_softmax(row):
    log_sum = math.log(sum(math.exp(x) for x in row))
    return [x - log_sum for x in row]


def slow_policy_loss(logits, actions, old_log_probs, advantages, clip_coef, kl_coef):
    total = 0.0
    for row, action, old, advantage in zip(logits, actions, old_log_probs, advantages):
        log_ratio = slow_log_softmax(row)[action] - old
        ratio = math.exp(log_ratio)
        gain = ratio * advantage
        if clip_coef:
            gain = min(gain, max(1 - clip_coef, min(1 + clip_coef, ratio)) * advantage)
        total += -gain + kl_coef * 0.5 * log_ratio**2
    return total / len(logits)


@pytest.mark.parametrize(("clip_coef", "kl_coef"), [(0.2, 0.0), (0.0, 0.0), (0.0, 1.0), (0.1, 0.5)])
def test_policy_loss_matches_a_loop(clip_coef, kl_coef):
    """The clipped surrogate, the plain one and the KL variant, sample by sample; gradients by finite differences."""
    torch.manual_seed(0)
    logits = torch.randn(12, 5).double().requires_grad_()
    actions, advantages = torch.randint(5, (12,)), torch.randn(12).double()
    log_probs = logits.detach().log_softmax(-1)[range(12), actions]
    old_log_probs = log_probs + 0.5 * torch.randn(12).double()
    rest = actions.tolist(), old_log_probs.tolist(), advantages.tolist(), clip_coef, kl_coef
    batch = {"actions": actions, "old_log_probs": old_log_probs, "advantages": advantages}
    loss, metrics = ppg.policy_loss(logits=logits, **batch, clip_coef=clip_coef, kl_coef=kl_coef)
    assert float(loss.detach()) == pytest.approx(slow_policy_loss(logits.tolist(), *rest))
    loss.backward()
    for i in range(12):
        for j in range(5):
            up, down = logits.tolist(), logits.tolist()
            up[i][j] += 1e-5
            down[i][j] -= 1e-5
            slope = (slow_policy_loss(up, *rest) - slow_policy_loss(down, *rest)) / 2e-5
            assert float(logits.grad[i, j]) == pytest.approx(slope, abs=1e-7)
    ratios = [math.exp(x) for x in (log_probs - old_log_probs).tolist()]
    expected = {
        "policy_loss": slow_policy_loss(logits.tolist(), *rest),
        "entropy": statistics.fmean(-sum(math.exp(x) * x for x in slow_log_softmax(row)) for row in logits.tolist()),
        "old_approx_kl": statistics.fmean(-math.log(r) for r in ratios),
        "approx_kl": statistics.fmean(r - 1 - math.log(r) for r in ratios),
        "clipfrac": statistics.fmean(float(abs(r - 1) > clip_coef) for r in ratios),
    }
    assert {name: float(x.detach()) for name, x in metrics.items()} == pytest.approx(expected)


def test_clone_loss_is_the_kl_from_the_old_policy():
    """sum_a pi_old(a) (log pi_old(a) - log pi(a)): not the other way round, and a mean over the states."""
    torch.manual_seed(0)
    old, new = 2 * torch.randn(9, 6).double(), 2 * torch.randn(9, 6).double()
    total = 0.0
    for row, new_row in zip(map(slow_log_softmax, old.tolist()), map(slow_log_softmax, new.tolist())):
        total += sum(math.exp(p) * (p - q) for p, q in zip(row, new_row))
    assert float(ppg.clone_loss(old, new)) == pytest.approx(total / 9)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_weights(arch):
    """Every unit's incoming weights have the norm of design: 1, 0.639, 1.4 or 0.1; biases are 0; trunks are apart."""
    agent, residual = ppg.Agent(15, arch), math.sqrt(1 / math.sqrt(3) / math.sqrt(2))
    count, kinds = 0, []
    for name, layer in agent.named_modules():
        if not isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            continue
        if name.endswith("_head"):
            scale = 0.1
        elif isinstance(layer, torch.nn.Linear):
            scale = 1.4
        else:
            scale = residual if layer.in_channels == layer.out_channels and re.search(r"\d\.\d$", name) else 1.0
        norms = torch.tensor([math.sqrt(sum(x * x for x in unit.flatten().tolist())) for unit in layer.weight])
        torch.testing.assert_close(norms, torch.full_like(norms, scale), rtol=1e-5, atol=0)
        assert not layer.bias.any()
        assert len(layer.weight) == 1 or (layer.weight[0] - layer.weight[1]).any()
        count, kinds = count + 1, [*kinds, round(scale, 3)]
    trunks = 2 if arch == "dual" else 1
    assert count == 16 * trunks + 3  # 3 x (1 + 2 x 2) convolutions and the dense layer
    assert [kinds.count(x) for x in (1.0, 0.639, 1.4, 0.1)] == [3 * trunks, 12 * trunks, trunks, 3]
    assert (agent.value_trunk is agent.policy_trunk) == (arch != "dual")
    if arch == "dual":
        assert (weights(agent.value_trunk) - weights(agent.policy_trunk)).abs().max() > 0.1


def test_forward_is_the_impala_network():
    """NHWC bytes / 255 through three stacks, dense and heads, layer by layer from the weights alone."""
    agent, obs = make_agent("dual"), random_images(5)

    def trunk(layers, x):
        convs = [layer for layer in layers.modules() if isinstance(layer, torch.nn.Conv2d)]
        for i in range(3):
            first, *residual = convs[5 * i : 5 * i + 5]
            x = F.max_pool2d(F.conv2d(x, first.weight, first.bias, padding=1), 3, 2, 1)
            for a, b in (residual[:2], residual[2:]):
                inner = F.relu(F.conv2d(F.relu(x), a.weight, a.bias, padding=1))
                x = x + F.conv2d(inner, b.weight, b.bias, padding=1)
        (dense,) = [layer for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
        return F.relu(F.linear(F.relu(x.flatten(1)), dense.weight, dense.bias))

    images = torch.from_numpy(np.moveaxis(obs.numpy(), 3, 1).astype(np.float32) / 255)
    pi, v = trunk(agent.policy_trunk, images), trunk(agent.value_trunk, images)
    logits, aux_values, values = agent(obs, "policy")
    torch.testing.assert_close(logits, F.linear(pi, agent.policy_head.weight, agent.policy_head.bias))
    torch.testing.assert_close(
        aux_values[:, None], F.linear(pi, agent.aux_value_head.weight, agent.aux_value_head.bias)
    )
    torch.testing.assert_close(values[:, None], F.linear(v, agent.value_head.weight, agent.value_head.bias))
    assert logits.std(dim=0).min() > 1e-2  # the images do tell


@pytest.mark.parametrize("arch", ARCHS)
def test_networks_that_are_not_needed_are_not_run(arch):
    """Without `value` or `policy` the rest of the result is the same; in dual form the other trunk stays idle."""
    agent, obs, runs = make_agent(arch), random_images(2), []
    for name in ("policy_trunk", "value_trunk"):
        getattr(agent, name).register_forward_hook(lambda *_, name=name: runs.append(name))
    logits, aux_values, values = agent(obs, "policy")
    runs.clear()
    only_policy = agent(obs, "policy", value=False)
    assert "value_trunk" not in runs or arch != "dual"
    runs.clear()
    only_value = agent(obs, "policy", policy=False)
    assert "policy_trunk" not in runs or arch != "dual"
    assert only_policy[2] is None and only_value[0] is only_value[1] is None
    torch.testing.assert_close((*only_policy[:2], only_value[2]), (logits, aux_values, values))


# ---- gradient routing ------------------------------------------------------------------------------------------------

ROUTES = {  # (arch, phase): what the losses of the policy, the auxiliary value and the value reach
    ("dual", "policy"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "value_trunk value_head"),
    ("dual", "auxiliary"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "value_trunk value_head"),
    ("detach", "policy"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "value_head"),
    ("detach", "auxiliary"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "policy_trunk value_head"),
    ("shared", "policy"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "policy_trunk value_head"),
    ("shared", "auxiliary"): ("policy_trunk policy_head", "policy_trunk aux_value_head", "policy_trunk value_head"),
}


@pytest.mark.parametrize(("arch", "phase"), ROUTES)
def test_which_output_trains_what(arch, phase):
    """A missing or superfluous detach, or a head on the wrong trunk, moves an entry of the table."""
    agent, obs = make_agent(arch), random_images(3)
    for i, expected in enumerate(ROUTES[arch, phase]):
        agent.zero_grad()
        agent(obs, phase)[i].square().sum().backward()
        assert reached(agent) == set(expected.split())


@pytest.mark.parametrize("arch", ARCHS)
def test_policy_phase_trains_what_it_should(tmp_path, arch):
    """The value loss alone (advantages 0, no bonus), then the policy loss alone, through a whole phase."""
    agent = make_agent(arch)
    rollout, targets = random_rollout(agent, 2, 4), torch.randn(2, 4)
    flags = ("--num-envs", 2, "--num-minibatches", 1)
    for flag, advantages, i in (("--ent-coef", torch.zeros(2, 4), 2), ("--vf-coef", torch.randn(2, 4), 0)):
        args = make_args(tmp_path, *flags, flag, 0)
        optimizer = torch.optim.SGD(agent.parameters(), 1e-3)
        ppg.policy_phase(agent, {"joint": optimizer}, rollout, advantages, targets, args)
        # The gradients of the one update are still there. 0 times a loss is a gradient of 0.
        assert reached(agent) == set(ROUTES[arch, "policy"][i].split())


@pytest.mark.parametrize("arch", ARCHS)
def test_auxiliary_phase_trains_what_it_should(tmp_path, arch):
    """The value head's loss alone: in the single network it now reaches the trunk. Then the auxiliary head's alone."""
    flags = ("--num-envs", 2, "--n-iteration", 1, "--e-auxiliary", 1, "--beta-clone", 0)
    for silent, weight, i in (("aux_value_head", 1, 2), ("value_head", 0, 1)):
        agent, obs, targets = make_agent(arch), random_images(2, 4), torch.full((2, 4), 3.0)
        if weight:  # that head is right everywhere: its loss and the gradient of it are 0
            getattr(agent, silent).weight.data.zero_()
            getattr(agent, silent).bias.data.fill_(3.0)
        args = make_args(tmp_path, *flags, "--aux-vf-coef", weight)
        ppg.auxiliary_phase(agent, torch.optim.SGD(agent.parameters(), 1e-3), obs, targets, args)
        assert reached(agent) == set(ROUTES[arch, "auxiliary"][i].split())


# ---- policy phase ----------------------------------------------------------------------------------------------------


def test_rollout_stores_what_the_environment_showed(tmp_path):
    """Observation, action, reward and first of one step share an index; T + 1 values and firsts; the last obs goes on."""
    args, envs, device = make_args(tmp_path, "--precision", "fp32"), Signpost(4), torch.device("cpu")
    agent = make_agent("dual")
    (obs, _), done = envs.reset(seed=1), np.ones(4, bool)
    ended = 0
    for _ in range(6):
        envs.history.clear()
        observations = torch.zeros(4, args.num_steps, 64, 64, 3, dtype=torch.uint8)
        rollout, obs = ppg.collect_rollout(agent, envs, obs, observations, device)
        assert rollout.observations.data_ptr() == observations.data_ptr()
        for t, (seen, actions, rewards, next_done, next_seen) in enumerate(envs.history):
            assert (observations[:, t].numpy() == seen).all()
            assert (rollout.actions[:, t].numpy() == actions).all()
            assert (rollout.rewards[:, t].numpy() == rewards).all()
            assert (rollout.firsts[:, t].numpy() == done).all()
            logits, _, values = agent(torch.from_numpy(seen), "policy")
            log_probs = torch.tensor([slow_log_softmax(row)[a] for row, a in zip(logits.tolist(), actions)])
            torch.testing.assert_close(rollout.log_probs[:, t], log_probs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.values[:, t], values.detach())
            done = next_done
        assert (obs == next_seen).all() and (rollout.firsts[:, -1].numpy() == done).all()
        torch.testing.assert_close(rollout.values[:, -1], agent(torch.from_numpy(next_seen), "policy")[2].detach())
        ended += rollout.firsts[:, -1].sum()
    assert 0 < ended < 6 * 4


def test_rollout_samples_from_the_policy(tmp_path):
    """Two actions with a log-odds of log 3 are played three to one: not the best action always, nor any at random."""
    args, envs, agent = make_args(tmp_path), Signpost(32), make_agent("shared")
    agent.policy_head.weight.data.zero_()
    agent.policy_head.bias.data.copy_(torch.tensor([math.log(3), 0, -1e3, -1e3]))
    observations = torch.zeros(32, args.num_steps, 64, 64, 3, dtype=torch.uint8)
    obs, _ = envs.reset(seed=1)
    rollout, _ = ppg.collect_rollout(agent, envs, obs, observations, torch.device("cpu"))
    shares = rollout.actions.flatten().bincount(minlength=4) / rollout.actions.numel()
    assert abs(shares[0] - 0.75) < 0.1 and abs(shares[1] - 0.25) < 0.1 and not shares[2:].any()


@pytest.mark.parametrize("arch", ARCHS)
def test_policy_updates_match_a_loop_over_samples(tmp_path, arch):
    """Two full-batch steps on clip + entropy + value loss, advantages normalised over the rollout, sample by sample."""
    agent = make_agent(arch, sharpness=10.0)
    rollout, advantages, targets = random_rollout(agent, 3, 4), 5 + 3 * torch.randn(3, 4), torch.randn(3, 4)
    expected, old = copy.deepcopy(agent), weights(agent)
    numbers = advantages.flatten().tolist()
    mean, deviation = statistics.fmean(numbers), statistics.pstdev(numbers)
    optimizer, rows = torch.optim.SGD(expected.parameters(), 0.02), []
    for _ in range(2):
        policy_losses, entropies, value_losses = [], [], []
        for n in range(3):
            for t in range(4):
                logits, _, value = expected(rollout.observations[n, t : t + 1], "policy")
                log_probs = logits[0] - logits[0].exp().sum().log()
                ratio = (log_probs[rollout.actions[n, t]] - rollout.log_probs[n, t]).exp()
                advantage = (float(advantages[n, t]) - mean) / deviation
                clipped = max(0.8, min(1.2, float(ratio.detach())))
                plain_is_less = float(ratio.detach()) * advantage <= clipped * advantage
                policy_losses.append(-ratio * advantage if plain_is_less else torch.tensor(-clipped * advantage))
                entropies.append(-(log_probs.exp() * log_probs).sum())
                value_losses.append(0.5 * (value[0] - targets[n, t]) ** 2)
        means = [sum(x) / 12 for x in (policy_losses, entropies, value_losses)]
        rows.append([float(x.detach()) for x in means])
        optimizer.zero_grad()
        (means[0] - 0.3 * means[1] + means[2]).backward()
        optimizer.step()
    flags = ("--num-envs", 3, "--num-minibatches", 1, "--e-policy", 2, "--e-value", 2, "--ent-coef", 0.3)
    args = make_args(tmp_path, *flags, "--num-aux-rollouts", 1)
    optimizers = {"joint": torch.optim.SGD(agent.parameters(), 0.02)}
    metrics = ppg.policy_phase(agent, optimizers, rollout, advantages, targets, args)
    assert_same_change(weights(agent), weights(expected), old)
    for i, name in enumerate(("policy_loss", "entropy", "value_loss")):  # means over the epochs, not the last one
        assert metrics[f"losses/{name}"] == pytest.approx((rows[0][i] + rows[1][i]) / 2, abs=1e-4)
        assert abs(rows[0][i] - rows[1][i]) > 1e-3
    errors = [float(x) for x in (targets - rollout.values[:, :-1]).flatten()]
    explained = 1 - statistics.variance(errors) / statistics.variance(map(float, targets.flatten()))
    assert metrics["losses/explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_policy_phase_ignores_gradients_from_before(tmp_path):
    """Junk in .grad is cleared before the first backward pass, of the joint optimiser and of the separate ones."""
    for flags in ((), ("--e-value", 2)):
        results = []
        for junk in (False, True):
            agent = make_agent("detach")
            rollout, advantages, targets = random_rollout(agent, 4, 2), torch.randn(4, 2), torch.randn(4, 2)
            for p in agent.parameters():
                p.grad = 100 * torch.ones_like(p) if junk else None
            args = make_args(tmp_path, *flags)
            optimizers = {x: torch.optim.Adam(agent.parameters(), 1e-3) for x in ("joint", "value", "policy")}
            old = weights(agent)
            ppg.policy_phase(agent, optimizers, rollout, advantages, targets, args)
            results.append(weights(agent))
        assert torch.equal(*results) and not torch.equal(results[0], old)


@pytest.mark.parametrize(("e_policy", "e_value"), [(1, 1), (2, 2), (1, 3), (2, 1)])
def test_policy_epochs(tmp_path, monkeypatch, e_policy, e_value):
    """Each epoch uses every environment once, in fresh order; value epochs come first, unless both are one."""
    calls = spy(monkeypatch, "update", lambda a, _: (a["optimizer"], a["minibatch"].tolist()))
    agent, passes = make_agent("dual"), []
    batch = random_rollout(agent, 8, 2), torch.randn(8, 2), torch.randn(8, 2)
    for name in ("policy_trunk", "value_trunk"):
        getattr(agent, name).register_forward_hook(lambda *_, name=name: passes.append(name))
    optimizers = {x: torch.optim.Adam(agent.parameters(), 1e-3) for x in ("joint", "value", "policy")}
    flags = ("--num-envs", 8, "--num-minibatches", 4, "--e-policy", e_policy, "--e-value", e_value)
    ppg.policy_phase(agent, optimizers, *batch, make_args(tmp_path, *flags))
    # A network whose loss is not in an epoch does not run in it.
    assert (passes.count("policy_trunk"), passes.count("value_trunk")) == (4 * e_policy, 4 * e_value)
    schedule = ["joint"] * e_policy if e_policy == e_value else ["value"] * e_value + ["policy"] * e_policy
    assert [optimizer for optimizer, _ in calls] == [optimizers[kind] for kind in schedule for _ in range(4)]
    assert {len(minibatch) for _, minibatch in calls} == {2}
    epochs = [[x for _, minibatch in calls[i : i + 4] for x in minibatch] for i in range(0, len(calls), 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs) and list(range(8)) not in epochs
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    # What each optimiser has stepped: only what its loss reaches, as often as it was called.
    for kind, parts in (("value", "value_trunk value_head"), ("policy", "policy_trunk policy_head")):
        state, wanted = optimizers[kind].state, {p for x in parts.split() for p in parts_of(agent)[x].parameters()}
        assert set(state) == (wanted if kind in schedule else set())
        assert {int(state[p]["step"]) for p in state} <= {4 * schedule.count(kind)}


def test_target_kl_ends_the_policy_epochs(tmp_path, monkeypatch):
    """Exceeded after the first epoch: no second one. Out of reach or off: all of them. Value epochs all run."""
    calls = spy(monkeypatch, "update", lambda a, _: a["optimizer"])
    for flags, counts in (
        (["--target-kl", 1e-6, "--e-value", 4], {"joint": 2}),
        (["--target-kl", 1e6, "--e-value", 4], {"joint": 8}),
        (["--e-value", 4], {"joint": 8}),
        (["--target-kl", 1e-6, "--e-value", 3], {"value": 6, "policy": 2}),
        (["--target-kl", 1e6, "--e-value", 3], {"value": 6, "policy": 8}),
    ):
        agent = make_agent("shared")
        optimizers = {x: torch.optim.Adam(agent.parameters(), 1e-3) for x in ("joint", "value", "policy")}
        batch = random_rollout(agent, 4, 2), torch.randn(4, 2), torch.randn(4, 2)
        calls.clear()
        ppg.policy_phase(agent, optimizers, *batch, make_args(tmp_path, "--e-policy", 4, *flags))
        assert {kind: calls.count(optimizers[kind]) for kind in optimizers if optimizers[kind] in calls} == counts


def test_gradient_norm_is_clipped(tmp_path):
    """One SGD step of rate 1 moves the weights by the gradient: its L2 norm is bounded, its direction is kept."""
    moves = {}
    for limit in (0, 0.05, 1e4):
        agent = make_agent("shared")
        batch = random_rollout(agent, 4, 2), torch.randn(4, 2), 3 + torch.randn(4, 2)
        old, optimizers = weights(agent), {"joint": torch.optim.SGD(agent.parameters(), 1.0)}
        ppg.policy_phase(
            agent, optimizers, *batch, make_args(tmp_path, "--max-grad-norm", limit, "--num-minibatches", 1)
        )
        moves[limit] = weights(agent) - old
    assert moves[0].norm() > 0.5 and (moves[0] - moves[1e4]).norm() < 1e-4 * moves[0].norm()
    assert float(moves[0.05].norm()) == pytest.approx(0.05, rel=1e-3)
    assert F.cosine_similarity(moves[0.05], moves[0], dim=0) > 0.999


@pytest.mark.parametrize("arch", ("dual", "detach"))
def test_first_ratio_is_one(tmp_path, monkeypatch, arch):
    """Rollout and update run in one precision: before the first step the policy is the one that played, to 1e-3."""
    ratios = []

    def note(a, _):
        log_probs = a["logits"].detach().log_softmax(-1).gather(-1, a["actions"][:, None])[:, 0]
        ratios.append((log_probs - a["old_log_probs"]).exp())

    spy(monkeypatch, "policy_loss", note)
    args = make_args(tmp_path, "--num-envs", 16, "--arch", arch)
    (device, bf16_phases), envs = ppg.start_process(args), Signpost(16)
    agent = ppg.Agent(4, args.arch, bf16_phases).to(device)
    agent.policy_head.weight.data *= 30
    observations = ppg.allocate_observations((16, 8, 64, 64, 3), device, "auto")
    rollout, _ = ppg.collect_rollout(agent, envs, envs.reset(seed=1)[0], observations, device)
    optimizers = {"joint": torch.optim.Adam(agent.parameters(), 1e-2)}
    ppg.policy_phase(agent, optimizers, rollout, torch.randn(16, 8), torch.randn(16, 8), args)
    assert (ratios[0] - 1).abs().max() < 1e-3 < (ratios[1] - 1).abs().max()


# ---- auxiliary phase -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_auxiliary_updates_match_a_loop_over_samples(tmp_path, arch):
    """Two full-buffer steps on L_joint and the value loss, sample by sample. In the second one the KL pulls back."""
    agent, obs, targets = make_agent(arch, sharpness=30.0), random_images(3, 4), torch.randn(3, 4)
    expected, frozen, old = copy.deepcopy(agent), copy.deepcopy(agent), weights(agent)
    optimizer, rows = torch.optim.SGD(expected.parameters(), 0.05), []
    for _ in range(2):
        kls, aux_losses, value_losses = [], [], []
        for n in range(3):
            for t in range(4):
                logits, aux_value, value = expected(obs[n, t : t + 1], "auxiliary")
                old_logits = frozen(obs[n, t : t + 1], "auxiliary")[0][0].detach()
                old_log_probs = old_logits - old_logits.exp().sum().log()
                log_probs = logits[0] - logits[0].exp().sum().log()
                kls.append((old_log_probs.exp() * (old_log_probs - log_probs)).sum())
                aux_losses.append(0.5 * (aux_value[0] - targets[n, t]) ** 2)
                value_losses.append(0.5 * (value[0] - targets[n, t]) ** 2)
        means = [sum(x) / 12 for x in (kls, aux_losses, value_losses)]
        rows.append([float(x.detach()) for x in means])
        optimizer.zero_grad()
        (means[1] + 20 * means[0] + 0.7 * means[2]).backward()
        optimizer.step()
    flags = ("--num-envs", 3, "--num-minibatches", 1, "--n-iteration", 1, "--num-aux-rollouts", 3, "--e-auxiliary", 2)
    args = make_args(tmp_path, *flags, "--beta-clone", 20, "--aux-vf-coef", 0.7)
    metrics = ppg.auxiliary_phase(agent, torch.optim.SGD(agent.parameters(), 0.05), obs, targets, args)
    assert_same_change(weights(agent), weights(expected), old)
    assert rows[1][0] > 1e-4  # or the second step would have had no KL to feel
    for i, name in enumerate(("kl_loss", "aux_value_loss", "real_value_loss")):
        assert metrics[f"losses/aux/{name}"] == pytest.approx((rows[0][i] + rows[1][i]) / 2, rel=1e-2, abs=1e-6)


def test_auxiliary_phase_ignores_gradients_from_before(tmp_path):
    """Gradients of the policy phase must not leak into the first auxiliary step."""
    results = []
    for junk in (False, True):
        agent = make_agent("dual")
        obs, targets = random_images(8, 2), torch.randn(8, 2)
        for p in agent.parameters():
            p.grad = 100 * torch.ones_like(p) if junk else None
        old, optimizer = weights(agent), torch.optim.Adam(agent.parameters(), 1e-3)
        ppg.auxiliary_phase(agent, optimizer, obs, targets, make_args(tmp_path, "--e-auxiliary", 1))
        results.append(weights(agent))
    assert torch.equal(*results) and not torch.equal(results[0], old)


@pytest.mark.parametrize("bf16_phases", [(), ("auxiliary",), ("policy", "auxiliary")])
@pytest.mark.parametrize("arch", ("dual", "detach"))
def test_first_kl_is_zero(tmp_path, arch, bf16_phases):
    """The old policy is taken with the network and the precision of the updates: before the first one, KL is 0."""
    agent, obs, targets = make_agent(arch, bf16_phases), random_images(8, 8), torch.randn(8, 8)
    one, none, full = ("--e-auxiliary", 1), torch.optim.SGD(agent.parameters(), 0.0), "--num-aux-rollouts"
    for flags in ((*one, full, 8), (*one, full, 2), (*one, full, 4, "--n-aux-grad-accum", 2)):
        metrics = ppg.auxiliary_phase(agent, none, obs, targets, make_args(tmp_path, *flags))
        assert abs(metrics["losses/aux/kl_loss"]) < 1e-6
    some = torch.optim.SGD(agent.parameters(), 0.01)
    metrics = ppg.auxiliary_phase(agent, some, obs, targets, make_args(tmp_path, "--e-auxiliary", 3))
    assert metrics["losses/aux/kl_loss"] > 1e-5


def test_clone_term_holds_the_policy(tmp_path):
    """The value targets pull at the trunk of the policy. Without the clone term it drifts; with a heavy one it stays."""
    drift, aux_losses = {}, {}
    for beta in (0, 30):
        agent = make_agent("dual")
        obs, targets = random_images(8, 8), 3 * torch.randn(8, 8)
        old = agent(obs.flatten(0, 1), "auxiliary")[0].detach().log_softmax(-1)
        args = make_args(tmp_path, "--beta-clone", beta, "--e-auxiliary", 6)
        optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
        aux_losses[beta] = ppg.auxiliary_phase(agent, optimizer, obs, targets, args)["losses/aux/aux_value_loss"]
        new = agent(obs.flatten(0, 1), "auxiliary")[0].detach().log_softmax(-1)
        drift[beta] = float((old.exp() * (old - new)).sum(-1).mean())
    assert drift[0] > 0.1 and drift[30] < 0.2 * drift[0]


def test_auxiliary_epochs(tmp_path, monkeypatch):
    """Each epoch uses every segment of all iterations once, in fresh order, 4 to a minibatch; one optimiser steps."""
    calls = spy(monkeypatch, "update", lambda a, _: (a["optimizer"], a["minibatch"].tolist()))
    handed = []
    agent, obs, targets = make_agent("shared"), random_images(16, 2), torch.randn(16, 2)
    optimizer = torch.optim.Adam(agent.parameters(), 1e-3)
    args = make_args(tmp_path, "--n-iteration", 4, "--num-aux-rollouts", 4, "--e-auxiliary", 3)
    ppg.auxiliary_phase(agent, optimizer, obs, targets, args, lambda batches: handed.extend(batches) or batches)
    assert len(calls) == len(handed) == 12 and {len(minibatch) for _, minibatch in calls} == {4}
    assert all(each is optimizer for each, _ in calls)
    epochs = [[x for _, minibatch in calls[i : i + 4] for x in minibatch] for i in range(0, 12, 4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs) and list(range(16)) not in epochs
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("limit", [1024, 6, 4, 1])
def test_parts_of_a_minibatch_give_the_same_gradient(tmp_path, monkeypatch, limit):
    """Neither --n-aux-grad-accum nor the bound on a pass changes a step; parts of unequal size are weighted."""
    agent = make_agent("detach", sharpness=10.0)
    rollout, obs, targets = random_rollout(agent, 8, 2), random_images(8, 2), torch.randn(8, 2)
    advantages = torch.randn(8, 2)

    def step(limit, *flags):
        monkeypatch.setattr(ppg, "MAX_STEPS_PER_PASS", limit)
        mine, args = copy.deepcopy(agent), make_args(tmp_path, "--num-envs", 8, "--n-iteration", 1, *flags)
        passes = []
        mine.register_forward_pre_hook(
            lambda _, inputs: passes.append(len(inputs[0])) if torch.is_grad_enabled() else None
        )
        optimizer = torch.optim.SGD(mine.parameters(), 0.02)
        torch.manual_seed(0)
        metrics = ppg.policy_phase(mine, {"joint": optimizer}, rollout, advantages, targets, args)
        metrics |= ppg.auxiliary_phase(mine, optimizer, obs, targets, args)
        return weights(mine), metrics, passes

    flags = ("--num-minibatches", 2, "--num-aux-rollouts", 4, "--e-auxiliary", 2)
    expected, expected_metrics, passes = step(1024, *flags)
    assert set(passes) == {8}
    for accum in (1, 2, 4):
        found, metrics, passes = step(limit, *flags, "--n-aux-grad-accum", accum)
        largest = max(2, limit)  # a segment is never cut
        assert max(passes) == min(largest, 8) and max(passes[-4:]) == min(largest, 8 // accum)
        assert_same_change(found, expected, weights(agent))
        assert metrics == pytest.approx(expected_metrics, rel=1e-3, abs=1e-5)


# ---- environments ----------------------------------------------------------------------------------------------------


def play(envs, steps, seed=0, reset_seed=None):
    """Random actions; returns the observations, rewards, dones and infos, and the first observation before them."""
    rng, stream = np.random.default_rng(seed), []
    if reset_seed is not None:
        stream.append((envs.reset(seed=reset_seed)[0].copy(),))
    for _ in range(steps):
        obs, rewards, terminated, truncated, infos = envs.step(rng.integers(15, size=envs.num_envs))
        stream.append((obs.copy(), rewards.copy(), terminated | truncated, infos))
    return stream


def same_stream(a, b):
    return all(np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left[:3], right[:3]))


@pytest.mark.parametrize("game", ppg.RETURN_RANGES)
def test_game_steps(tmp_path, game):
    """All 16 games: NHWC bytes out, and the seed alone decides on the stream."""
    args = make_args(tmp_path, "--env-id", game, "--env-threads", 1)
    streams = []
    for seed in (7, 7, 8):
        envs = ppg.ProcgenVecEnv(args, 2, 0)
        assert isinstance(envs, gym.vector.VectorEnv)
        streams.append(play(envs, 15, reset_seed=seed))
        envs.close()
    obs, rewards, done, _ = streams[0][-1]
    assert obs.shape == (2, 64, 64, 3) and obs.dtype == np.uint8 and obs.std() > 1
    assert rewards.shape == done.shape == (2,) and rewards.dtype == np.float32 and done.dtype == bool
    assert same_stream(streams[0], streams[1]) and not np.array_equal(streams[0][0][0], streams[2][0][0])
    assert not np.array_equal(streams[0][0][0], obs)  # something moves


def test_level_flags_reach_procgen(tmp_path):
    """One level: all environments start alike, at the level that --start-level names, of the mode that is asked for."""

    def first_frames(num_levels, *flags):
        envs = ppg.ProcgenVecEnv(make_args(tmp_path, "--env-id", "maze", *flags), 4, num_levels)
        obs = envs.reset(seed=1)[0].copy()
        envs.close()
        return obs

    one = first_frames(1, "--start-level", 5)
    assert (one == one[0]).all()
    assert not (one[0] == first_frames(1, "--start-level", 6)[0]).all()
    assert not (one[0] == first_frames(1, "--start-level", 5, "--distribution-mode", "hard")[0]).all()
    every = first_frames(0)
    assert not (every == every[0]).all()


def test_episode_statistics(tmp_path):
    """Return and length of every episode that ends, also of several at one step, against own accounts."""
    envs = ppg.ProcgenVecEnv(make_args(tmp_path, "--env-id", "bigfish"), 16, 0)
    returns, lengths, ended, at_once = np.zeros(16), np.zeros(16, int), 0, 0
    for _, rewards, done, infos in play(envs, 300, reset_seed=3)[1:]:
        returns, lengths = returns + rewards, lengths + 1
        assert done.any() == ("episode" in infos)
        if done.any():
            assert np.array_equal(infos["_episode"], done)
            np.testing.assert_allclose(infos["episode"]["r"][done], returns[done])
            assert np.array_equal(infos["episode"]["l"][done], lengths[done])
            ended, at_once = ended + done.sum(), max(at_once, done.sum())
        returns, lengths = returns * ~done, lengths * ~done
    assert ended > 30 and at_once > 1
    envs.close()


def test_reset_without_a_seed_starts_new_episodes(tmp_path):
    """An episode that was under way is not counted on."""
    envs = ppg.ProcgenVecEnv(make_args(tmp_path, "--env-id", "coinrun"), 4, 0)
    before = play(envs, 5, reset_seed=3)[-1][0]
    obs, _ = envs.reset()
    assert not np.array_equal(obs, before) and envs.simulator.observe()[2].all() and not envs.episode_lengths.any()
    assert envs.step(np.zeros(4, int))[0].shape == obs.shape and (envs.episode_lengths == 1).all()
    envs.close()


def test_environment_state_comes_back(tmp_path):
    """A state set in environments of another seed continues as the first ones did, running episodes included."""
    args = make_args(tmp_path, "--env-id", "starpilot")
    envs, others = ppg.ProcgenVecEnv(args, 4, 0), ppg.ProcgenVecEnv(args, 4, 0)
    play(envs, 40, reset_seed=3)
    state = envs.get_state()
    expected = play(envs, 150, seed=1)
    play(others, 10, reset_seed=4)
    others.set_state(state)
    found = play(others, 150, seed=1)
    assert same_stream(found, expected)
    ends = [(a[3], b[3]) for a, b in zip(expected, found) if a[3]]
    assert ends and all(np.array_equal(a["episode"][x], b["episode"][x]) for a, b in ends for x in "rl")
    envs.close()
    others.close()


# ---- the whole run ---------------------------------------------------------------------------------------------------

PPO = ("--arch", "shared", "--e-policy", 3, "--e-value", 3, "--e-auxiliary", 0)
COLUMNS = [
    "iteration",
    "global_step",
    "episodes",
    "charts/episodic_return",
    "charts/episodic_length",
    "charts/normalized_return",
    "charts/SPS",
    "charts/learning_rate",
    "time/rollout",
    "time/policy_phase",
    "time/auxiliary_phase",
    "losses/policy_loss",
    "losses/value_loss",
    "losses/entropy",
    "losses/approx_kl",
    "losses/old_approx_kl",
    "losses/clipfrac",
    "losses/explained_variance",
    "losses/aux/kl_loss",
    "losses/aux/aux_value_loss",
    "losses/aux/real_value_loss",
    "eval/train_levels_return",
    "eval/train_levels_normalized_return",
    "eval/all_levels_return",
    "eval/all_levels_normalized_return",
]


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--arch", "dual"), 2048),
        (("--arch", "detach"), 2048),
        (("--arch", "detach", "--precision", "fp32"), 2048),
        (PPO, 2048),
    ],
    ids=("dual", "detach", "detach-fp32", "ppo"),
)
def test_learns(tmp_path, flags, steps):
    """The action that the picture names is found, from pixels and rewards alone: 90 % of the best return."""
    size = (
        "--num-envs",
        16,
        "--num-steps",
        16,
        "--n-iteration",
        2,
        "--num-aux-rollouts",
        8,
        "--total-timesteps",
        steps,
    )
    rates = ("--learning-rate", 1e-3, "--aux-learning-rate", 1e-3, "--gamma", 0.5, "--reward-norm-gamma", 0.5)
    summary = ppg.train(make_args(tmp_path, *size, *rates, "--e-auxiliary", 2, *flags), Signpost(16))
    assert summary["episodic_return"] > 0.9 * summary["episodic_length"]  # of the last 100 episodes; 1 a step is best


def test_a_run_on_other_environments(tmp_path):
    """train() takes any vector environment, and counts its episodes and returns as the environment does."""
    envs = Signpost(4)
    args = make_args(tmp_path, *PPO, "--e-policy", 1, "--e-value", 1, "--num-steps", 64, "--total-timesteps", 1024)
    summary = ppg.train(args, envs)
    assert summary["episodes"] == len(envs.finished) > 110
    assert summary["episodic_return"] == pytest.approx(statistics.fmean(r for r, _ in envs.finished[-100:]))
    assert summary["episodic_length"] == pytest.approx(statistics.fmean(n for _, n in envs.finished[-100:]))
    assert len(envs.history) == 256
    low, high = 2.5, 64  # starpilot, easy
    assert summary["normalized_return"] == pytest.approx((summary["episodic_return"] - low) / (high - low))


def test_what_a_run_writes(tmp_path, monkeypatch):
    """A row per iteration with the documented columns; losses are means over all minibatches; the summary's keys."""
    iterations, policy_losses, kls = [], [], []
    spy(monkeypatch, "policy_phase", lambda *_: iterations.append((len(policy_losses), len(kls))))
    real_policy_loss, real_clone_loss = ppg.policy_loss, ppg.clone_loss

    def policy_loss(**kwargs):
        loss, metrics = real_policy_loss(**kwargs)
        policy_losses.append(float(loss.detach()))
        return loss, metrics

    def clone_loss(*inputs):
        loss = real_clone_loss(*inputs)
        kls.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(ppg, "policy_loss", policy_loss)
    monkeypatch.setattr(ppg, "clone_loss", clone_loss)
    # 5 iterations of 4 x 8 steps: two full phases of 2, and one of 1 that gets no auxiliary phase.
    args = make_args(tmp_path, "--total-timesteps", 180, "--e-policy", 2, "--learning-rate", 0.01)
    returned = ppg.train(args, Signpost(4))
    directory = run_dir(tmp_path)
    assert re.fullmatch(r"starpilot__ppg_procgen__1__\d{10}", directory.name)
    assert {path.name for path in directory.iterdir()} == {"metrics.csv", "checkpoint.pt", "summary.json"}
    rows = read_metrics(directory)
    assert list(rows[0]) == COLUMNS
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5]
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128, 160]
    assert len(policy_losses) == 5 * 2 * 2 and len(kls) == 2 * 6 * 4
    for i, row in enumerate(rows):
        calls = policy_losses[4 * i : 4 * i + 4]
        assert float(row["losses/policy_loss"]) == pytest.approx(statistics.fmean(calls), abs=1e-5)
        assert len(set(calls)) > 1
        if i in (1, 3):
            mean = statistics.fmean(kls[24 * (i // 2) :][:24])
            assert float(row["losses/aux/kl_loss"]) == pytest.approx(mean, rel=1e-3, abs=1e-7)
            assert float(row["time/auxiliary_phase"]) > 0 and float(row["losses/aux/real_value_loss"]) > 0
        else:
            assert row["losses/aux/kl_loss"] == row["time/auxiliary_phase"] == ""
    summary = json.loads((directory / "summary.json").read_text())
    assert summary == returned
    keys = "env_id distribution_mode arch seed global_step episodes episodic_return episodic_length normalized_return"
    assert set(summary) >= {*keys.split(), "SPS", "seconds", "peak_memory_bytes", "device", "torch"}
    assert set(summary["seconds"]) == {"rollout", "policy_phase", "auxiliary_phase", "total"}
    assert set(summary["peak_memory_bytes"]) == {"host", "device"} and summary["peak_memory_bytes"]["host"] > 1e8
    found = [summary[x] for x in ("env_id", "distribution_mode", "arch", "seed", "global_step", "device", "torch")]
    assert found == ["starpilot", "easy", "dual", 1, 160, "cpu", torch.__version__]
    seconds = summary["seconds"]
    for name in ("rollout", "policy_phase", "auxiliary_phase"):
        assert seconds[name] == pytest.approx(sum(float(row[f"time/{name}"] or 0) for row in rows))
    phases = seconds["rollout"] + seconds["policy_phase"] + seconds["auxiliary_phase"]
    assert phases <= seconds["total"] and summary["SPS"] == pytest.approx(160 / seconds["total"])


def test_progress_without_a_terminal(tmp_path, capsys):
    """The run and its auxiliary phases report in plain lines: steps, rate, time left and return; no cursor moves."""
    ppg.train(make_args(tmp_path, "--total-timesteps", 64), Signpost(4))
    said = capsys.readouterr().err
    lines = said.replace("\r", "\n").splitlines()
    assert any(re.fullmatch(r"64/64, +\S+step/s, 00:00 left, return -?\d+\.\d\d", line) for line in lines)
    assert any(re.fullmatch(r"auxiliary phase: \d+/24, +\S+update/s, \S+ left", line) for line in lines)
    assert "\x1b" not in said


@pytest.mark.parametrize(("flags", "kinds"), [((), ("joint",)), (("--e-value", 2), ("value", "policy"))])
def test_learning_rates_fall_over_the_whole_run(tmp_path, monkeypatch, flags, kinds):
    """Annealing runs from the first iteration to the last and does not start again with a phase; all Adams follow."""
    used = spy(monkeypatch, "update", lambda a, _: (a["optimizer"], a["optimizer"].param_groups[0]["lr"]))
    rates = ("--anneal-lr", "--learning-rate", 1e-3, "--aux-learning-rate", 1e-4, "--adam-eps", 1e-5)
    ppg.train(make_args(tmp_path, *rates, "--e-auxiliary", 1, "--arch", "shared", *flags), Signpost(4))
    rows = read_metrics(run_dir(tmp_path))
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    by_optimizer = {}
    for optimizer, rate in used:
        by_optimizer.setdefault(optimizer, []).append(rate)
    *policy, auxiliary = by_optimizer.values()
    assert len(policy) == len(kinds)
    for rates in policy:
        assert sorted(set(rates), reverse=True) == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert list(dict.fromkeys(auxiliary)) == pytest.approx([7.5e-5, 2.5e-5])
    assert all(type(x) is torch.optim.Adam and x.param_groups[0]["eps"] == 1e-5 for x in by_optimizer)
    saved = torch.load(run_dir(tmp_path) / "checkpoint.pt", weights_only=True)["modules"]
    assert set(saved) == {"agent", "auxiliary", *kinds}


@pytest.mark.parametrize("clip", [1.1, 50.0])
def test_the_phases_get_the_right_data(tmp_path, monkeypatch, clip):
    """Rewards are normalised, then GAE; the auxiliary phase has all rollouts of its phase, with their targets."""
    rollouts = spy(monkeypatch, "collect_rollout", lambda _, result: copy.deepcopy(result[0]))
    gaes = spy(monkeypatch, "compute_gae", lambda a, result: (dict(a), *result))
    policies = spy(monkeypatch, "policy_phase", lambda a, _: (a["advantages"], a["targets"].clone()))
    phases = spy(monkeypatch, "auxiliary_phase", lambda a, _: (a["observations"].clone(), a["targets"].clone()))
    flags = ("--gamma", 0.9, "--gae-lambda", 0.8, "--reward-norm-gamma", 0.7, "--reward-clip", clip, "--e-auxiliary", 1)
    ppg.train(make_args(tmp_path, *flags), Signpost(4))
    normalizer = ppg.RewardNormalizer(4, 0.7, clip)
    assert len(rollouts) == len(gaes) == 4 and len(phases) == 2
    for i, (rollout, (given, advantages, targets)) in enumerate(zip(rollouts, gaes)):
        torch.testing.assert_close(given["rewards"], normalizer(rollout.rewards, rollout.firsts[:, :-1]))
        torch.testing.assert_close((given["values"], given["firsts"]), (rollout.values, rollout.firsts))
        assert (given["gamma"], given["gae_lambda"]) == (0.9, 0.8)
        torch.testing.assert_close(policies[i], (advantages, targets))
        own = slice(4 * (i % 2), 4 * (i % 2) + 4)  # iterations one after the other, environments within them
        assert torch.equal(phases[i // 2][0][own], rollout.observations)
        torch.testing.assert_close(phases[i // 2][1][own], targets)
    assert phases[0][0].dtype == torch.uint8 and phases[0][0].shape == (8, 8, 64, 64, 3)


def test_same_seed_same_run(tmp_path, monkeypatch):
    """On Procgen, to the last bit: metrics but for times, all weights, optimisers and environment. Not so of seed 2."""
    results, seen = [], spy(monkeypatch, "collect_rollout", lambda a, _: a["obs"].copy())
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        size = ("--num-steps", 16, "--total-timesteps", 256, "--e-auxiliary", 1, "--seed", seed)
        ppg.train(make_args(tmp_path / name, *size))
        directory = run_dir(tmp_path / name)
        rows = read_metrics(directory)
        rows = [{k: v for k, v in row.items() if not k.startswith("time/") and k != "charts/SPS"} for row in rows]
        saved = torch.load(directory / "checkpoint.pt", weights_only=True)
        results.append((rows, saved["modules"], saved["processes"][0]))

    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    assert same(results[0], results[1])
    for one, other in zip(results[0], results[2]):
        assert not same(one, other)
    first, _, other = seen[::4]  # observations before any action: the levels are others too, not only the weights
    assert not np.array_equal(first, other)


class FakeWandb(types.ModuleType):
    """Notes what it is told instead of sending it. Broken, it has no network."""

    def __init__(self, broken=False):
        super().__init__("wandb")
        self.broken, self.started, self.rows, self.finished = broken, [], [], False

    def init(self, **options):
        if self.broken:
            raise ConnectionError("no network")
        self.started.append(options)
        return self

    def define_metric(self, *args, **kwargs):
        self.metric = kwargs

    def log(self, row, *args, **kwargs):
        self.rows.append(dict(row))

    def finish(self, *args, **kwargs):
        self.finished = True

    def Video(self, path, *args, **kwargs):
        return f"video {path}"


def test_track_sends_what_the_csv_has(tmp_path, monkeypatch):
    """The same metrics under the same names, once per iteration, with the flags as the configuration."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    names = ("--wandb-project-name", "some-project", "--wandb-entity", "some-team", "--e-auxiliary", 1)
    ppg.train(make_args(tmp_path, "--track", "--arch", "shared", *names), Signpost(4))
    rows = [{k: float(v) for k, v in row.items() if v} for row in read_metrics(run_dir(tmp_path))]
    assert wandb.rows == rows and wandb.finished and len(rows) == 4
    assert set(rows[-1]) == {x for x in COLUMNS if not x.startswith("eval/")}
    assert (wandb.started[0]["project"], wandb.started[0]["entity"]) == ("some-project", "some-team")
    assert wandb.started[0]["config"]["e_auxiliary"] == 1 and wandb.metric == {"step_metric": "global_step"}


@pytest.mark.parametrize("wandb", [FakeWandb(broken=True), None], ids=("unreachable", "not-installed"))
def test_without_wandb_the_run_goes_on(tmp_path, monkeypatch, capsys, wandb):
    """--track with no network, or no wandb, says so and trains on."""
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    summary = ppg.train(make_args(tmp_path, *PPO, "--total-timesteps", 64, "--track"), Signpost(4))
    assert summary["global_step"] == 64 and "wandb" in capsys.readouterr().err
    assert len(read_metrics(run_dir(tmp_path))) == 2


def program(*flags, cwd, **environment):
    """Runs the script as a user does."""
    command = [sys.executable, str(FILE), *map(str, flags)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_offline_wandb_run(tmp_path):
    """The real wandb, offline: the script ends well, and its run directory holds the run under its metrics' names."""
    pytest.importorskip("wandb")
    size = "--num-envs 4 --num-steps 8 --n-iteration 1 --num-minibatches 2 --num-aux-rollouts 2 --total-timesteps 64"
    done = program(*size.split(), "--no-cuda", "--track", cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("**/wandb/offline-run-*/*.wandb")
    content = data.read_bytes()
    metrics = [x for x in COLUMNS if not x.startswith(("eval/", "charts/episodic", "charts/normalized"))]
    assert [x for x in metrics if x.encode() not in content] == []


def test_peak_memory(tmp_path):
    """Large minibatches go through the network in parts: buffer + 2.5 GB hold the whole process."""
    size = "--num-envs 64 --num-steps 32 --n-iteration 1 --num-minibatches 1 --num-aux-rollouts 64 --e-auxiliary 1"
    done = program(*size.split(), "--total-timesteps", 2048, "--no-cuda", "--checkpoint-interval", 0, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    peak = json.loads((run_dir(tmp_path / "runs") / "summary.json").read_text())["peak_memory_bytes"]["host"]
    assert 64 * 32 * 12288 < peak < 64 * 32 * 12288 + 2.5e9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_everything_runs_on_the_gpu(tmp_path, monkeypatch):
    """With a GPU every pass, loss and update is there, and so is the buffer."""
    found = []

    def note(a, _):
        params = [p for p in a["optimizer"].param_groups[0]["params"] if p.grad is not None]
        found.append({x.device.type for p in params for x in (p, p.grad)})

    updates = spy(monkeypatch, "update", note)
    passes = []
    real = ppg.Agent.forward
    watched = lambda self, obs, *a, **k: passes.append(obs.device.type) or real(self, obs, *a, **k)
    monkeypatch.setattr(ppg.Agent, "forward", watched)
    spy(monkeypatch, "policy_loss", lambda _, result: found.append({result[0].device.type}))
    spy(monkeypatch, "clone_loss", lambda _, result: found.append({result.device.type}))
    spy(monkeypatch, "allocate_observations", lambda _, result: found.append({result.device.type}))
    summary = ppg.train(make_args(tmp_path, "--cuda"), Signpost(4))
    assert updates and all(devices == {"cuda"} for devices in found) and set(passes) == {"cuda"}
    assert summary["device"] == torch.cuda.get_device_name() and summary["peak_memory_bytes"]["device"] > 1e6


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "avx2"])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [("auto", ["policy", "auxiliary"]), ("bf16", ["policy", "auxiliary"]), ("bf16-aux", ["auxiliary"]), ("fp32", [])],
)
def test_precision_by_hardware(tmp_path, monkeypatch, capsys, capability, precision, expected):
    """On a CPU bfloat16 everywhere is the default; one that is slow in it computes in float32, and says so."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", capability: True})
    _, phases = ppg.start_process(make_args(tmp_path, "--no-cuda", "--precision", precision))
    slow = capability == "avx2"
    assert phases == ([] if slow else expected)
    assert ("float32" in capsys.readouterr().err) == (slow and precision != "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_so(tmp_path, capsys):
    """--cuda, the default, runs on the CPU where there is none, and says it in a line."""
    assert ppg.start_process(make_args(tmp_path, "--cuda"))[0].type == "cpu"
    assert "no GPU" in capsys.readouterr().err
    assert ppg.start_process(make_args(tmp_path, "--no-cuda"))[0].type == "cpu"
    assert capsys.readouterr().err == ""


# ---- command line ----------------------------------------------------------------------------------------------------

DEFAULTS = {
    "exp_name": "ppg_procgen", "seed": 1, "torch_deterministic": True, "cuda": True, "track": False,
    "wandb_project_name": "ppg-procgen", "wandb_entity": None, "capture_video": False, "runs_dir": "runs",
    "checkpoint_interval": 1, "resume": None, "evaluate": None, "eval_interval": 0, "eval_episodes": 100,
    "env_id": "starpilot", "distribution_mode": "easy", "num_levels": 0, "start_level": 0, "num_envs": 64,
    "env_threads": 4, "total_timesteps": 25_000_000, "arch": "dual", "num_steps": 256, "n_iteration": 32,
    "e_policy": 1, "e_value": 1, "num_minibatches": 8, "learning_rate": 5e-4, "anneal_lr": False, "adam_eps": 1e-8,
    "gamma": 0.999, "gae_lambda": 0.95, "reward_norm_gamma": 0.99, "reward_clip": 10.0, "clip_coef": 0.2,
    "kl_coef": 0.0, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.0, "target_kl": None, "e_auxiliary": 6,
    "beta_clone": 1.0, "aux_vf_coef": 1.0, "aux_learning_rate": 5e-4, "num_aux_rollouts": 4, "n_aux_grad_accum": 1,
    "precision": "auto", "aux_buffer_device": "auto",
}  # fmt: skip


def test_flags_and_defaults(monkeypatch):
    """Every flag has its documented default and a help text of its own, and something outside the parser reads it."""
    parsers, real = [], ppg.argparse.ArgumentParser.parse_args
    keep = lambda self, *args: parsers.append(self) or real(self, *args)
    monkeypatch.setattr(ppg.argparse.ArgumentParser, "parse_args", keep)
    assert vars(ppg.parse_args([])) == DEFAULTS
    helps = {action.dest: action.help for action in parsers[0]._actions if action.dest != "help"}
    assert set(helps) == set(DEFAULTS) and all(len(text or "") > 10 for text in helps.values())
    assert len(set(helps.values())) == len(helps)
    source = FILE.read_text()
    rest = source.split(inspect.getsource(ppg.parse_args))[1]
    by_name = re.search(r"getattr\(self\.args, name\) for name in \((.*?)\)", rest)[1]
    unread = [x for x in DEFAULTS if not re.search(rf"args\.{x}\b", rest) and f'"{x}"' not in by_name]
    assert unread == []


def test_other_forms_of_flags():
    """Booleans have a --no- form, CleanRL's --v-value is understood, and the game names are Procgen's 16."""
    for name in ("torch-deterministic", "cuda", "track", "capture-video", "anneal-lr"):
        for value in (True, False):
            args = ppg.parse_args([f"--{'' if value else 'no-'}{name}"])
            assert getattr(args, name.replace("-", "_")) is value
    assert ppg.parse_args(["--v-value", "3"]).e_value == 3
    assert [ppg.parse_args(["--env-id", game]).env_id for game in ppg.RETURN_RANGES] == list(ppg.RETURN_RANGES)
    assert len(ppg.RETURN_RANGES) == 16


def test_help_is_readable(capsys):
    """--help names every flag and ends with status 0."""
    with pytest.raises(SystemExit) as ending:
        ppg.parse_args(["--help"])
    text = capsys.readouterr().out
    assert ending.value.code == 0 and all(f"--{x.replace('_', '-')}" in text for x in DEFAULTS)


BAD_INPUT = [
    ("--num-minibatches 3", "--num-minibatches"),
    ("--num-envs 4", "--num-minibatches"),
    ("--total-timesteps 16383", "16384"),
    ("--num-aux-rollouts 3", "--num-aux-rollouts"),
    ("--num-aux-rollouts 4096", "--num-aux-rollouts"),
    ("--n-aux-grad-accum 3", "--n-aux-grad-accum"),
    ("--n-aux-grad-accum 8", "--n-aux-grad-accum"),
    ("--learning-rate nan", "--learning-rate"),
    ("--learning-rate inf", "--learning-rate"),
    ("--learning-rate -1e-3", "--learning-rate"),
    ("--aux-learning-rate -1", "--aux-learning-rate"),
    ("--adam-eps nan", "--adam-eps"),
    ("--gamma 1.5", "--gamma"),
    ("--gamma nan", "--gamma"),
    ("--gae-lambda -0.1", "--gae-lambda"),
    ("--reward-norm-gamma 2", "--reward-norm-gamma"),
    ("--reward-clip -1", "--reward-clip"),
    ("--clip-coef -0.2", "--clip-coef"),
    ("--kl-coef nan", "--kl-coef"),
    ("--ent-coef -inf", "--ent-coef"),
    ("--vf-coef -1", "--vf-coef"),
    ("--aux-vf-coef -1", "--aux-vf-coef"),
    ("--beta-clone nan", "--beta-clone"),
    ("--max-grad-norm -1", "--max-grad-norm"),
    ("--target-kl nan", "--target-kl"),
    ("--num-envs 0", "--num-envs"),
    ("--num-envs -8", "--num-envs"),
    ("--num-envs many", "--num-envs"),
    ("--num-envs 8.5", "--num-envs"),
    ("--num-steps 0", "--num-steps"),
    ("--n-iteration 0", "--n-iteration"),
    ("--e-policy 0", "--e-policy"),
    ("--e-value 0", "--e-value"),
    ("--e-auxiliary -1", "--e-auxiliary"),
    ("--num-minibatches 0", "--num-minibatches"),
    ("--num-aux-rollouts 0", "--num-aux-rollouts"),
    ("--n-aux-grad-accum 0", "--n-aux-grad-accum"),
    ("--env-threads 0", "--env-threads"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999", "--seed"),
    ("--num-levels -1", "--num-levels"),
    ("--start-level -1", "--start-level"),
    ("--eval-episodes 0", "--eval-episodes"),
    ("--checkpoint-interval -1", "--checkpoint-interval"),
    ("--eval-interval -1", "--eval-interval"),
    ("--env-id pong", "pong"),
    ("--distribution-mode extreme", "extreme"),
    ("--arch triple", "triple"),
    ("--precision fp8", "fp8"),
    ("--aux-buffer-device tape", "tape"),
    ("--aux-buffer-device cuda --no-cuda", "--aux-buffer-device"),
    ("--exp-name ../elsewhere", "--exp-name"),
    ("--exp-name=", "--exp-name"),
    ("--resume nowhere", "nowhere"),
    ("--evaluate nowhere", "nowhere"),
    ("--resume=", "checkpoint.pt"),
    ("--evaluate=", "checkpoint.pt"),
    ("--resume a --evaluate b", "--evaluate"),
    ("--no-such-flag", "--no-such-flag"),
    ("--num-env 64", "--num-env"),
    ("--track yes", "yes"),
    ("--seed", "--seed"),
]


@pytest.mark.parametrize(("line", "word"), BAD_INPUT, ids=[line for line, _ in BAD_INPUT])
def test_bad_input(tmp_path, monkeypatch, capsys, line, word):
    """One sentence that names what is wrong, exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ppg_procgen.py", *line.split()])
    with pytest.raises(SystemExit) as ending:
        ppg.train(ppg.parse_args())
    usage, sentence = capsys.readouterr().err.strip().split("\n")
    assert ending.value.code == 2 and usage.startswith("usage:") and word in sentence.partition("error: ")[2]
    assert not list(tmp_path.iterdir())


def test_bad_input_from_a_shell(tmp_path):
    """The same of the program itself: no traceback, nothing on stdout."""
    done = program("--num-envs", 12, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "--num-minibatches" in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_none(tmp_path, capsys):
    """A damaged file is refused in one sentence, with exit status 2."""
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as ending:
            ppg.parse_args([flag, str(tmp_path)])
        assert ending.value.code == 2 and "checkpoint.pt is missing, damaged" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="free memory is read from Linux's /proc")
def test_a_buffer_too_large(tmp_path, monkeypatch, capsys):
    """6.6 TB of observations: exit status 2 before training, the size needed, the size free, and what to lower."""
    size = ("--num-envs", 4096, "--num-steps", 4096, "--n-iteration", 32, "--total-timesteps", 2_000_000_000)
    monkeypatch.setattr(sys, "argv", ["ppg_procgen.py", "--no-cuda", "--runs-dir", str(tmp_path), *map(str, size)])
    with pytest.raises(SystemExit) as ending:
        ppg.train(ppg.parse_args())
    text = capsys.readouterr().err
    free = re.search(r"([\d.]+) GB are free", text)
    assert ending.value.code == 2 and "6597.1 GB" in text and 0 < float(free[1]) < 6597
    assert all(flag in text for flag in ("--num-envs", "--num-steps", "--n-iteration"))
    assert "Traceback" not in text and not list(tmp_path.iterdir())


# ---- helpers for whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums depend on the number of threads: all processes that are compared bit by bit have one."""
    torch.set_num_threads(1)


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
}
# Fruitbot gives rewards early, and its episodes are short. A phase is 2 iterations of 2 environments and 16 steps.
TINY = shlex.split(
    "--env-id fruitbot --arch detach --num-envs 2 --num-steps 16 --n-iteration 2 --num-minibatches 2 --e-auxiliary 1 "
    "--num-aux-rollouts 2 --env-threads 1"
)
PHASE = 64
CPU = torch.device("cpu")


def phases(count: int, processes: int = 1) -> list[str]:
    return ["--total-timesteps", str(count * PHASE * processes)]


def train(runs_dir: Path, *flags: str) -> Path:
    """A run in this process. Returns its directory, which must be the only one there."""
    ppg.train(ppg.parse_args([*TINY, "--runs-dir", str(runs_dir), *flags]))
    (run_dir,) = runs_dir.iterdir()
    return run_dir


def resume(run_dir: Path, *flags: str) -> None:
    ppg.train(ppg.parse_args(["--resume", str(run_dir), *flags]))


def script(*flags: str) -> int:
    """Runs the file's last block, as `python ppg_procgen.py` does, in this process. Returns the exit status."""
    argv, on_sigterm = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = [ppg.__file__, *flags]
    (*_, block) = ast.parse(Path(ppg.__file__).read_text()).body
    assert isinstance(block, ast.If)
    try:
        exec(compile(ast.Module(block.body, []), ppg.__file__, "exec"), dict(vars(ppg)))  # noqa: S102
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, on_sigterm)
    return 0


def printed(capsys) -> str:
    return "".join(capsys.readouterr())


def read_checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / "checkpoint.pt", weights_only=True)


def rows_of(run_dir: Path, *ignored: str) -> list[dict]:
    """metrics.csv without what differs from run to run: seconds, and steps per second."""
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ignored = ("time/", "charts/SPS", *ignored)
    return [{name: value for name, value in row.items() if not name.startswith(ignored)} for row in rows]


def leaves(tree, path: str = "") -> dict:
    """Every value of nested dicts, lists and tuples, under its path."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, value in items for name, leaf in leaves(value, f"{path}/{key}").items()}
    return {path: tree}


def assert_same_run(one: Path, other: Path, *ignored_columns: str) -> None:
    """The rows and all that the checkpoints hold are equal to the bit: parameters, optimisers, generators, simulators."""
    assert rows_of(one, *ignored_columns) == rows_of(other, *ignored_columns)
    ignored = ("/args/", "/run/seconds/", "/run/charts/charts/SPS", "/run/wandb_id", "/run/metrics_bytes")
    one, other = (
        {k: v for k, v in leaves(read_checkpoint(x)).items() if not k.startswith(ignored)} for x in (one, other)
    )
    assert one.keys() == other.keys()
    assert any("exp_avg" in name for name in one) and any("policy_head" in name for name in one)
    for name, leaf in one.items():
        same = torch.equal(leaf, other[name]) if isinstance(leaf, torch.Tensor) else leaf == other[name]
        assert same, f"{name} differs"


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 3 phases on 3 levels. Tests only read it."""
    return train(tmp_path_factory.mktemp("finished"), "--num-levels", "3", *phases(3))


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    """The finished run once more, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """The same run with a fourth phase."""
    return train(tmp_path_factory.mktemp("longer"), "--num-levels", "3", *phases(4))


# ---- checkpoint and resume -------------------------------------------------------------------------------------------


def stop_after_next_checkpoint(flags: list[str], run_dirs: Path, how: signal.Signals) -> tuple[int, str, Path]:
    """Starts the program, and sends it a signal at a random moment after it has written a checkpoint."""
    before = {path: path.stat().st_mtime_ns for path in run_dirs.glob("*/checkpoint.pt")}
    command = [sys.executable, ppg.__file__, *flags]
    # A shell makes its background jobs deaf to SIGINT, and thereby all that they start: these tests too, perhaps.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 300
    while {path: path.stat().st_mtime_ns for path in run_dirs.glob("*/checkpoint.pt")} == before:
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    process.send_signal(how)
    output, _ = process.communicate(timeout=120)
    (run_dir,) = run_dirs.iterdir()
    return process.returncode, output, run_dir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, dict]:
    """A run killed by kill -9, resumed and stopped by Ctrl-C, resumed and stopped by SIGTERM. How each of them ended."""
    runs_dir, ends = tmp_path_factory.mktemp("stopped"), {}
    flags = [*TINY, "--runs-dir", str(runs_dir), *phases(10**4)]  # never gets to its end
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        *ends[how], run_dir = stop_after_next_checkpoint(flags, runs_dir, how)
        flags = ["--resume", str(run_dir)]
    return run_dir, ends


def test_run_stopped_at_random_moments_is_the_uninterrupted_run(stopped, tmp_path):
    # Breaks when anything that later steps depend on is missing from the checkpoint, or rows after it are kept.
    run_dir, ends = stopped
    assert ends[signal.SIGKILL][0] == -signal.SIGKILL
    total = ["--total-timesteps", str(read_checkpoint(run_dir)["run"]["global_step"] + PHASE)]
    resume(run_dir, *total)
    assert_same_run(run_dir, train(tmp_path, *total))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_with_the_command_that_resumes(stopped, how):
    # Breaks when a signal is not handled, or its message does not lead back to the run.
    run_dir, ends = stopped
    status, output = ends[how]
    assert status == 130
    assert "Traceback" not in output
    assert re.findall(r"python ppg_procgen\.py --resume (\S+)", output) == [str(run_dir)]


def test_run_stopped_within_a_phase_sees_the_same_observations(tmp_path, monkeypatch):
    # Breaks when one of several optimisers, the annealing, or the simulators' state is not restored.
    flags = shlex.split("--arch dual --e-value 2 --anneal-lr --num-levels 3 --start-level 7")
    seen, collect_rollout, auxiliary_phase = [], ppg.collect_rollout, ppg.auxiliary_phase

    def observe(*args):
        result = collect_rollout(*args)
        seen.append(result[0].observations.clone())
        return result

    def stop_in_second_phase(*args):
        if len(seen) == 4:
            raise InterruptedError
        return auxiliary_phase(*args)

    monkeypatch.setattr(ppg, "collect_rollout", observe)
    uninterrupted = train(tmp_path / "a", *flags, *phases(3))
    expected, seen = seen, []
    monkeypatch.setattr(ppg, "auxiliary_phase", stop_in_second_phase)
    with pytest.raises(InterruptedError):
        train(tmp_path / "b", *flags, *phases(3))
    monkeypatch.setattr(ppg, "auxiliary_phase", auxiliary_phase)
    (run_dir,) = (tmp_path / "b").iterdir()
    assert len(rows_of(run_dir)) > read_checkpoint(run_dir)["run"]["iteration"] == 2  # so there is something to cut
    seen = []
    resume(run_dir)
    assert len(seen) == 4
    assert all(torch.equal(one, other) for one, other in zip(seen, expected[2:]))
    assert_same_run(uninterrupted, run_dir)


@pytest.mark.parametrize("interval, expected", [("2", [2, 3]), ("0", [])])
def test_checkpoint_interval(tmp_path, monkeypatch, interval, expected):
    # Breaks when the interval is ignored, or the end of the run gets no checkpoint.
    written, save = [], ppg.Run.save

    def note(self, *args, **kwargs):
        written.append(self.state["phase"])
        return save(self, *args, **kwargs)

    monkeypatch.setattr(ppg.Run, "save", note)
    run_dir = train(tmp_path, "--checkpoint-interval", interval, *phases(3))
    assert written == expected
    assert (run_dir / "checkpoint.pt").exists() == bool(expected)


def test_total_timesteps_may_grow(run_copy, longer):
    # Breaks when a finished run cannot be continued, or starts its last phase anew.
    resume(run_copy, *phases(4))
    assert_same_run(run_copy, longer)
    assert ppg.parse_args(["--evaluate", str(run_copy)]).resume is None  # nor does it stay a resumed one


def test_resuming_a_finished_run_changes_nothing(run_copy):
    # Breaks when the summary is written again from a process that has made no step.
    before = contents(run_copy)
    summary = json.loads(before["summary.json"])
    assert script("--resume", str(run_copy)) == 0
    after = contents(run_copy)
    assert after["metrics.csv"] == before["metrics.csv"] and after["checkpoint.pt"] == before["checkpoint.pt"]
    assert json.loads(after["summary.json"]).keys() == summary.keys()


class Malice:
    """Unpickled, it runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["truncated", "random bytes", "tensor", "other dict", "older", "malicious"])
def test_bad_checkpoint_gets_a_sentence_and_stays(run_copy, capsys, kind):
    # Breaks when a file that is not ours ends in a traceback, is written to, or can run code.
    path, victim = run_copy / "checkpoint.pt", run_copy / "victim"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "random bytes":
        path.write_bytes(random.Random(0).randbytes(10_000))
    else:
        saved = read_checkpoint(run_copy)
        other = {"tensor": torch.zeros(3), "other dict": {"state_dict": {}}, "older": saved | {"format": 0}}
        torch.save(other.get(kind, saved | {"run": Malice(f"touch {victim}")}), path)
    before = contents(run_copy)
    for flag in ("--resume", "--evaluate"):
        with pytest.raises(SystemExit) as end:
            ppg.parse_args([flag, str(run_copy)])
        assert end.value.code == 2
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1 and str(path) in errors.splitlines()[-1]
        assert "Traceback" not in errors
    assert contents(run_copy) == before
    assert not victim.exists()


def test_resume_without_a_checkpoint(tmp_path, capsys):
    # Breaks when a mistyped directory ends in a traceback, or is made.
    with pytest.raises(SystemExit) as end:
        ppg.parse_args(["--resume", str(tmp_path / "absent")])
    assert end.value.code == 2
    assert "absent" in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_failing_write_keeps_the_previous_checkpoint(run_copy, longer, monkeypatch, capsys, fault):
    # Breaks when the checkpoint is written in place, half of a new one is left behind, or the failure is a traceback.
    before, fsync = contents(run_copy), os.fsync
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_disk(file):
        if os.fstat(file).st_size > 10**6:  # the checkpoint: metrics.csv is much smaller
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    if fault == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    else:  # no file may grow beyond this: the system refuses the rest of the checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        assert script("--resume", str(run_copy), *phases(4)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    errors = printed(capsys)
    assert "Traceback" not in errors
    assert re.search(r"error: .*(No space left|too large)", errors)
    assert str(run_copy) in errors
    after = contents(run_copy)
    assert after.keys() == before.keys() and after["checkpoint.pt"] == before["checkpoint.pt"]
    resume(run_copy, *phases(4))
    assert_same_run(run_copy, longer)


def test_flags_beside_resume(finished, capsys):
    # Breaks when a run can silently go on as another one, or when a flag that is repeated is refused.
    run_dir = str(finished)
    args = ppg.parse_args(["--resume", run_dir, "--gamma", "0.999", "--num-steps", "16", "--env-threads", "2"])
    assert (args.num_levels, args.num_steps, args.env_threads, args.resume) == (3, 16, 2, run_dir)
    for flags, named in (
        (["--gamma", "0.9", "--arch", "dual"], ["--gamma", "--arch"]),
        (["--seed", "2"], ["--seed"]),
        (["--no-anneal-lr", "--num-levels", "4"], ["--num-levels"]),
        (phases(2), ["--total-timesteps"]),
    ):
        with pytest.raises(SystemExit) as end:
            ppg.parse_args(["--resume", run_dir, *flags])
        assert end.value.code == 2
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert all(name in sentence for name in named), sentence


def test_shortened_metrics(run_copy, longer, capsys):
    # Breaks when a resumed run fills a hole in metrics.csv with zero bytes, hides it, or when rows that a power failure
    # took (they are not synchronised as the checkpoint is) make the checkpoint useless.
    path = run_copy / "metrics.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    resume(run_copy, *phases(4))
    assert f"{path} lacks rows" in printed(capsys)
    ours, theirs = rows_of(run_copy), rows_of(longer)
    assert [row["iteration"] for row in ours] == ["1", "2", "3", "4", "5", "7", "8"]
    assert [row["charts/episodic_return"] for row in ours[5:]] == [row["charts/episodic_return"] for row in theirs[6:]]
    assert b"\0" not in path.read_bytes()


# ---- processes -------------------------------------------------------------------------------------------------------

NUM_ENVS = 4  # of all processes together


def make_updates(rank: int, processes: int) -> dict[str, tuple[torch.Tensor, dict]]:
    """What policy and auxiliary updates change in the parameters, and their metrics, from this process's environments.

    All data are drawn first, so that the shares of all processes together are what one process gets.
    """
    random_numbers, steps = torch.Generator().manual_seed(3), 8
    mine = slice(rank * NUM_ENVS // processes, (rank + 1) * NUM_ENVS // processes)

    def draw(*shape):
        return torch.randn(NUM_ENVS, *shape, generator=random_numbers)[mine]

    scale = torch.arange(1.0, NUM_ENVS + 1)[mine, None]  # the environments, hence the processes, are unlike
    observations = (draw(steps, 64, 64, 3) * 60 + 128).clamp(0, 255).byte()
    actions, log_probs = (draw(steps) * 100).long().abs() % 15, -2.7 + 0.2 * draw(steps)
    advantages, targets, values = scale * (draw(steps) + scale), scale * draw(steps), draw(steps + 1)
    rollout = ppg.Rollout(observations, actions, log_probs, values, scale * draw(steps), torch.zeros_like(values), [])

    def updated(function, *data, **flags):
        flags |= {"num_envs": len(scale), "n_iteration": 1, "num_minibatches": 1, "num_aux_rollouts": len(scale)}
        torch.manual_seed(0)
        agent, args = ppg.Agent(15, "dual"), ppg.parse_args([])
        vars(args).update(flags)
        before = torch.cat([p.detach().flatten() for p in agent.parameters()])
        optimizer = torch.optim.SGD(agent.parameters(), 0.1)
        if function is ppg.policy_phase:
            optimizer = dict.fromkeys(("joint", "value", "policy"), optimizer)
        metrics = function(agent, optimizer, *data, args)
        # A process knows the explained variance of its own environments only.
        metrics = {name: value for name, value in metrics.items() if "explained_variance" not in name}
        return torch.cat([p.detach().flatten() for p in agent.parameters()]) - before, metrics

    policy_data = rollout, advantages, targets
    results = {
        "policy": updated(ppg.policy_phase, *policy_data),
        "policy, separate and clipped": updated(ppg.policy_phase, *policy_data, e_value=2, max_grad_norm=0.05),
        "auxiliary": updated(ppg.auxiliary_phase, observations, targets, e_auxiliary=2),
    }
    normalizer = ppg.RewardNormalizer(len(scale), gamma=0.99, clip=10.0)
    normalizer(rollout.rewards, rollout.firsts[:, :-1])
    results["rewards"] = normalizer(3 * rollout.rewards, rollout.firsts[:, :-1])
    targets[scale[:, 0] == NUM_ENVS] = torch.nan  # in the last process
    results["nan"] = updated(ppg.policy_phase, *policy_data)
    return results


def in_each_process(path: Path) -> None:
    """What the two processes of the tests do. Each saves its results."""
    agents, initialise = [], ppg.Agent.__init__

    def keep(agent, *args):
        agents.append(agent)
        initialise(agent, *args)

    ppg.Agent.__init__ = keep
    ppg.start_process(ppg.parse_args(TINY + phases(1, 2)))
    results = make_updates(ppg.RANK, ppg.WORLD_SIZE)
    uninterrupted = ppg.parse_args([*TINY, "--runs-dir", str(path / "uninterrupted"), *phases(3, 2)])
    ppg.train(uninterrupted)
    results["parameters"] = agents[-1].state_dict()
    ppg.train(ppg.parse_args([*TINY, "--runs-dir", str(path / "resumed"), *phases(2, 2)]))
    torch.distributed.barrier()  # rank 0 writes the checkpoint
    (run_dir,) = (path / "resumed").iterdir()
    resume(run_dir, *phases(3, 2))
    torch.save(results, path / f"{ppg.RANK}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The directory and the results of two processes that torchrun started."""
    path = tmp_path_factory.mktemp("processes")
    command = f"import pathlib, {__name__} as tests; tests.in_each_process(pathlib.Path({str(path)!r}))"
    torchrun = shlex.split("-m torch.distributed.run --standalone --nproc-per-node 2 --no-python")
    subprocess.run([sys.executable, *torchrun, sys.executable, "-c", command], env=ENVIRONMENT, timeout=240, check=True)
    return path, [torch.load(path / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one_process() -> dict:
    """What one process makes of the data of both."""
    return make_updates(0, 1)


def test_processes_end_with_the_same_parameters(two_processes):
    # Breaks when a process starts from other parameters, or makes an update of its own.
    path, (first, second) = two_processes
    assert first["parameters"].keys() == second["parameters"].keys()
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])
    (run_dir,) = (path / "uninterrupted").iterdir()
    saved = read_checkpoint(run_dir)["modules"]["agent"]
    assert all(torch.equal(first["parameters"][name], saved[name]) for name in saved)


@pytest.mark.parametrize("update", ["policy", "policy, separate and clipped", "auxiliary"])
def test_two_processes_update_as_one(two_processes, one_process, update):
    # Breaks when gradients are summed, clipped before they are averaged, or not averaged, or when each process
    # normalises its advantages by itself.
    expected, expected_metrics = one_process[update]
    for change, metrics in (results[update] for results in two_processes[1]):
        error, size = (change - expected).norm() / expected.norm(), expected.norm()
        assert size > 1e-3 and error < 1e-4, f"relative error {error:.1e}"
        assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)


def test_reward_statistics_are_those_of_all_processes(two_processes, one_process):
    # Breaks when each process scales its rewards by its own returns.
    together = torch.cat([results["rewards"] for results in two_processes[1]])
    torch.testing.assert_close(together, one_process["rewards"])


def test_non_finite_loss_is_seen_by_all_processes(two_processes):
    # Breaks when a process knows only its own losses: one would stop, and the other wait for it.
    assert all(not np.isfinite(results["nan"][1]["losses/value_loss"]) for results in two_processes[1])


def test_total_timesteps_counts_all_processes(two_processes):
    # Breaks when each process makes total_timesteps steps, or counts only its own, or all play the same levels.
    (run_dir,) = (two_processes[0] / "uninterrupted").iterdir()
    assert [int(row["global_step"]) for row in rows_of(run_dir)] == [PHASE * i for i in range(1, 7)]
    first, second = (list(leaves(process["envs"]).values()) for process in read_checkpoint(run_dir)["processes"])
    assert first[0] != second[0]  # the state of a simulator


def test_resumed_processes_are_the_uninterrupted_ones(two_processes):
    # Breaks when the environments or generators of the other ranks are not in the checkpoint.
    (one,), (other,) = ((two_processes[0] / name).iterdir() for name in ("uninterrupted", "resumed"))
    assert_same_run(one, other)


def test_number_of_processes_must_stay(two_processes, capsys):
    # Breaks when the other rank's environments are dropped in silence.
    (run_dir,) = (two_processes[0] / "resumed").iterdir()
    with pytest.raises(SystemExit) as end:
        ppg.parse_args(["--resume", str(run_dir)])
    assert end.value.code == 2
    assert "2 processes" in capsys.readouterr().err.splitlines()[-1]


def test_advice_fits_the_launcher(tmp_path, monkeypatch):
    # Breaks when the command that is to resume would be refused, because it starts another number of processes.
    for processes, launcher in ((1, "python"), (2, "torchrun --nproc-per-node 2")):
        monkeypatch.setattr(ppg, "WORLD_SIZE", processes)
        monkeypatch.setattr(ppg, "LOCAL_WORLD_SIZE", processes)
        run = ppg.Run(ppg.parse_args([*TINY, "--runs-dir", str(tmp_path), *phases(1, processes)]), None)
        assert run.advice_once_saved.endswith(f": {launcher} ppg_procgen.py --resume {run.directory}")


def test_process_that_dies_ends_the_other(tmp_path):
    # Breaks when the survivor waits for ever, or ends as if all were well. No torchrun here, which would end it too.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = [*TINY, "--runs-dir", str(tmp_path), *phases(10**4)]
    dying = (
        "import os, ppg_procgen as ppg; ppg.auxiliary_phase = lambda *args: os._exit(1); ppg.train(ppg.parse_args())"
    )
    processes = []
    for rank, command in enumerate(([ppg.__file__], ["-c", dying])):
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
        environment = ENVIRONMENT | address
        command = [sys.executable, *command, *flags]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        processes[1].communicate(timeout=120)
        _, errors = processes[0].communicate(timeout=120)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 1
    assert processes[0].returncode not in (0, -signal.SIGKILL)
    assert "rror" in errors


# ---- evaluation ------------------------------------------------------------------------------------------------------


class ShortAndLong:
    """Two environments: episodes of 1 step and return 1 in the first, of 5 steps and return 10 in the second."""

    num_envs = 2

    def reset(self, seed=None):
        self.steps = 0
        return np.zeros((2, 64, 64, 3), np.uint8), {}

    def step(self, actions):
        self.steps += 1
        done = np.array([True, self.steps % 5 == 0])
        infos = {"episode": {"r": np.array([1.0, 10.0]) * done, "l": np.array([1, 5]) * done}, "_episode": done}
        return np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2), done, np.zeros(2, bool), infos

    def close(self):
        pass


def read_report(run_dir: Path) -> dict[str, float]:
    report = leaves(json.loads((run_dir / "eval.json").read_text()))
    return {path.strip("/").replace("/", "_"): value for path, value in report.items()}


@pytest.mark.parametrize("episodes, expected", [(6, [1] * 3 + [10] * 3), (5, [1] * 3 + [10] * 2), (1, [1])])
def test_each_environment_plays_its_quota(episodes, expected):
    # Breaks when the episodes that end first are taken: 5 of 6 would be short ones.
    returns = ppg.play(ppg.Agent(15, "detach"), ShortAndLong(), episodes, 0, CPU)
    assert sorted(returns) == expected


def test_evaluation_report(run_copy, monkeypatch, capsys):
    # Breaks when the level sets are swapped, other parameters than the trained ones play, the training's seeds are
    # played, or a figure is computed otherwise.
    played = []

    def play(agent, envs, episodes, seed, device):
        played.append((envs.options["num_levels"], episodes))
        assert seed not in {1 + 10_000 * rank for rank in range(64)}
        for name, value in agent.state_dict().items():
            assert torch.equal(value, saved[name])
        return np.array([2.0, 4.0, 9.0] if len(played) == 1 else [1.0, 2.0, 3.0])

    saved = read_checkpoint(run_copy)["modules"]["agent"]
    monkeypatch.setattr(ppg, "play", play)
    assert script("--evaluate", str(run_copy), "--eval-episodes", "3") == 0
    assert played == [(3, 3), (0, 3)]
    expected = {
        "train_levels_return": 5,
        "train_levels_standard_error": (13 / 3) ** 0.5,
        "train_levels_normalized_return": 6.5 / 33.9,
        "all_levels_return": 2,
        "all_levels_standard_error": (1 / 3) ** 0.5,
        "all_levels_normalized_return": 3.5 / 33.9,
        "gap": 3,
        "global_step": 3 * PHASE,
        "episodes": 3,
    }
    assert read_report(run_copy) == pytest.approx(expected)
    said = printed(capsys)
    assert json.loads(said[said.index("{") :]) == pytest.approx(expected)


def test_evaluation_leaves_the_training_alone(finished, tmp_path):
    # Breaks when an evaluation draws from the training's generators or moves its environments, or runs when not due.
    run_dir = train(tmp_path, "--num-levels", "3", "--eval-interval", "2", "--eval-episodes", "2", *phases(3))
    assert_same_run(finished, run_dir, "eval/")
    names = [f"eval/{x}_levels_{y}" for x in ("train", "all") for y in ("return", "normalized_return")]
    filled = [[bool(row[name]) for name in names] for row in rows_of(run_dir)]
    assert filled == [[i == 3] * 4 for i in range(6)]  # once, at the end of the second phase
    row = rows_of(run_dir)[3]
    for x in ("train", "all"):
        mean, normalized = (float(row[f"eval/{x}_levels_{y}"]) for y in ("return", "normalized_return"))
        assert normalized == pytest.approx((mean + 1.5) / 33.9)


# ---- video -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def assert_films(run_dir: Path, count: int) -> None:
    films = sorted((run_dir / "videos").glob("*.mp4"))
    assert len(films) == count
    for film in films:
        reader = imageio.get_reader(film, format="ffmpeg")
        frames = [np.asarray(frame) for frame in reader]
        reader.close()
        assert len(frames) > 10 and all(frame.shape == (512, 512, 3) for frame in frames)
        assert any((frame != frames[0]).any() for frame in frames)  # it moves


def test_filming_leaves_the_training_alone(finished, tmp_path, no_display):
    # Breaks when filming draws from the training's generators, films the 64 x 64 observations, or needs a display.
    run_dir = train(tmp_path, "--num-levels", "3", "--capture-video", *phases(3))
    assert_films(run_dir, 3)
    assert_same_run(finished, run_dir)


def test_evaluation_plays_and_films(run_copy, no_display, capsys):
    # Breaks when --evaluate does not work from end to end, or forgets the film.
    checkpoint = (run_copy / "checkpoint.pt").read_bytes()
    assert script("--evaluate", str(run_copy), "--eval-episodes", "3", "--capture-video") == 0
    report = read_report(run_copy)
    gap = report["train_levels_return"] - report["all_levels_return"]
    assert gap != 0 and report["gap"] == pytest.approx(gap)
    assert f'"gap": {gap}' in printed(capsys)
    assert_films(run_copy, 1)
    assert (run_copy / "checkpoint.pt").read_bytes() == checkpoint


# ---- wandb -----------------------------------------------------------------------------------------------------------


def test_wandb_run_is_continued(tmp_path, monkeypatch):
    # Breaks when a resumed run becomes a second one in wandb, or its names differ from those of metrics.csv.
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = train(tmp_path, "--track", *phases(1))
    resume(run_dir, *phases(2))
    first, second = wandb.started
    assert first["id"] == second["id"] and second["resume"] in ("allow", "must")
    assert [row["global_step"] for row in wandb.rows] == [32, 64, 96, 128]
    assert all(
        {k for k, v in row.items() if v} == set(logged) for row, logged in zip(read_metrics(run_dir), wandb.rows)
    )


def test_videos_go_to_wandb(tmp_path, monkeypatch):
    # Breaks when --track and --capture-video together leave the films on the disk only.
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run_dir = train(tmp_path, "--track", "--capture-video", *phases(1))
    (film,) = (run_dir / "videos").glob("*.mp4")
    assert f"video {film}" in [value for row in wandb.rows for value in row.values()]


@pytest.mark.parametrize("kind", ["no network", "no login"])
def test_run_goes_on_when_wandb_refuses(tmp_path, monkeypatch, capsys, kind):
    # Breaks when wandb can end a run, or its refusal goes unsaid.
    if kind == "no network":
        monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    else:  # the real one
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setattr(sys, "stdin", io.StringIO())
    run_dir = train(tmp_path / "runs", "--track", *phases(2))
    assert printed(capsys).count("wandb refused") == 1
    assert len(rows_of(run_dir)) == 4
    assert (run_dir / "summary.json").exists() and (run_dir / "checkpoint.pt").exists()


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, name, call, step",
    [("policy_phase", "losses/value_loss", 5, 160), ("auxiliary_phase", "losses/aux/kl_loss", 3, 192)],
)
def test_non_finite_loss_names_metric_step_and_checkpoint(tmp_path, monkeypatch, capsys, function, name, call, step):
    # Breaks when a run goes on with parameters that are not numbers, or overwrites its last good checkpoint.
    calls, real = [], getattr(ppg, function)

    def broken(*args):
        calls.append(1)
        return real(*args) | ({name: float("nan")} if len(calls) == call else {})

    monkeypatch.setattr(ppg, function, broken)
    assert script(*TINY, "--runs-dir", str(tmp_path), *phases(4)) == 1
    (run_dir,) = tmp_path.iterdir()
    errors = printed(capsys)
    sentence = errors[errors.index("error: ") :]
    assert all(x in sentence for x in (name, "nan", f"step {step}", str(run_dir)))
    assert "Traceback" not in errors
    assert read_checkpoint(run_dir)["run"]["global_step"] == 2 * PHASE


def test_huge_learning_rate_ends_with_a_sentence(tmp_path, capsys):
    # Breaks when a diverged run is not noticed, or ends in a traceback.
    assert script(*TINY, "--runs-dir", str(tmp_path), *phases(3), "--learning-rate", "1e9") == 1
    errors = printed(capsys)
    assert re.search(r"error: losses/\S+ is \S+ at step \d+", errors)
    assert "Traceback" not in errors


def test_rollout_of_a_diverged_policy(tmp_path, capsys):
    # Breaks when logits that are no numbers, which the only update of an iteration leaves, fail in the sampling.
    flags = ["--num-minibatches", "1", "--learning-rate", "1e9", "--e-auxiliary", "0"]
    assert script(*TINY, "--runs-dir", str(tmp_path), *phases(3), *flags) == 1
    errors = printed(capsys)
    assert re.search(r"error: losses/\w+ is nan at step 64", errors) and "Traceback" not in errors


@pytest.mark.parametrize("name", ["policy_phase", "auxiliary_phase"])
def test_last_update_that_breaks_the_weights(tmp_path, monkeypatch, capsys, name):
    # Breaks when such weights reach the checkpoint, because the losses were computed before the update.
    real = getattr(ppg, name)

    def break_weights(optimizer, *args):
        update(optimizer, *args)
        optimizer.param_groups[0]["params"][0].data[0] = float("inf")

    def breaking(*args):
        with monkeypatch.context() as patch:
            patch.setattr(ppg, "update", break_weights)
            return real(*args)

    update = ppg.update
    monkeypatch.setattr(ppg, name, breaking)
    one_update = ["--num-minibatches", "1", "--num-aux-rollouts", "4", "--n-iteration", "2"]
    assert script(*TINY, "--runs-dir", str(tmp_path), *phases(1), *one_update) == 1
    errors = printed(capsys)
    assert re.search(r"error: losses/(aux/)?sum_of_weights is \S+ at step \d+", errors) and "Traceback" not in errors
    (run_dir,) = tmp_path.iterdir()
    assert not (run_dir / "checkpoint.pt").exists()


def test_runs_of_the_same_second_have_their_own_directories(tmp_path, monkeypatch):
    # Breaks when the second run writes over the first.
    monkeypatch.setattr(ppg, "time", types.SimpleNamespace(time=lambda: 1e9, perf_counter=time.perf_counter))
    args = ppg.parse_args([*TINY, "--runs-dir", str(tmp_path), "--total-timesteps", "32"])
    for _ in range(2):
        ppg.train(args)
    assert [len(rows_of(run_dir)) for run_dir in tmp_path.iterdir()] == [1, 1]


# ---- benchmark: python test_ppg_procgen.py benchmark [num_envs [n_iteration]] ----------------------------------------

BENCHMARK_ARCHS = {  # flags, then how often a step of the program passes forward and forward+backward through a trunk
    "dual": ([], {"rollout": 2, "policy": 2, "old_logits": 1, "auxiliary": 12}),
    "detach": (["--arch", "detach"], {"rollout": 1, "policy": 1, "old_logits": 1, "auxiliary": 6}),
    "PPO": (
        ["--arch", "shared", "--e-policy", "3", "--e-value", "3", "--e-auxiliary", "0"],
        {"rollout": 1, "policy": 3},
    ),
}


def print_bare_rates(setting: str, num_envs: int) -> None:
    """Images per second of one trunk with its heads, in this process: {pass: rate} as JSON.

    "textbook": eager float32, NHWC observations permuted, the allocator as it is. "best": what the program runs.
    """
    args = ppg.parse_args(["--precision", "fp32" if setting == "textbook" else "auto", "--arch", "shared"])
    if setting == "best":
        device, bf16_phases = ppg.start_process(args)
        agent = ppg.Agent(15, args.arch, bf16_phases).to(device)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        agent = ppg.Agent(15, "shared").to(device).to(memory_format=torch.contiguous_format)
    limit = 1024 if setting == "textbook" else ppg.MAX_STEPS_PER_PASS
    sizes = {"rollout": num_envs, "policy": min(num_envs // 8 * 256, limit), "old_logits": limit, "auxiliary": limit}
    rates = {}
    for name, size in sizes.items():
        obs = torch.randint(0, 256, (size, 64, 64, 3), dtype=torch.uint8, device=device)
        learns, phase = (
            name in ("policy", "auxiliary"),
            "auxiliary" if name in ("old_logits", "auxiliary") else "policy",
        )

        def one_pass(obs=obs, learns=learns, phase=phase):
            agent.zero_grad()
            with torch.set_grad_enabled(learns):
                logits, aux_values, values = agent(obs, phase)
                if learns:
                    (logits.square().mean() + aux_values.square().mean() + values.square().mean()).backward()

        def wait():
            if device.type == "cuda":
                torch.cuda.synchronize()

        for _ in range(5):
            one_pass()
        wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < 8:
            one_pass()
            wait()
            count += 1
        rates[name] = count * size / (time.perf_counter() - start)
    print(json.dumps(rates))


def benchmark(num_envs: int, n_iteration: int) -> None:
    """Prints one table of measured rates, as Markdown."""

    def child(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True)
        return done.stdout

    rates = {setting: json.loads(child(__file__, "rates", setting, str(num_envs))) for setting in ("textbook", "best")}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {num_envs} environments, N_pi {n_iteration}\n"
    )
    print("| images/s of one trunk | rollout, forward | policy, forward+backward | old logits, forward | "
          "auxiliary, forward+backward |\n| --- | --- | --- | --- | --- |")  # fmt: skip
    for setting, row in rates.items():
        print(f"| {setting} |", " | ".join(f"{rate:,.0f}" for rate in row.values()), "|")
    print("\n| | textbook SPS | bound SPS | achieved SPS | / textbook | / bound | rollout s | policy s | auxiliary s | "
          "bound of each, s | host GB | device GB |\n|" + " --- |" * 12)  # fmt: skip
    for name, (flags, passes) in BENCHMARK_ARCHS.items():
        with tempfile.TemporaryDirectory() as runs_dir:
            steps = num_envs * 256 * n_iteration * 2
            sizes = ["--num-envs", str(num_envs), "--n-iteration", str(n_iteration), "--total-timesteps", str(steps)]
            child(ppg.__file__, *flags, *sizes, "--checkpoint-interval", "0", "--runs-dir", runs_dir)
            summary = json.loads(next(Path(runs_dir).glob("*/summary.json")).read_text())
        textbook, bound = (
            1 / sum(count / rates[setting][kind] for kind, count in passes.items()) for setting in ("textbook", "best")
        )
        seconds, memory, sps = summary["seconds"], summary["peak_memory_bytes"], summary["SPS"]
        least = {kind: steps * passes.get(kind, 0) / rates["best"][kind] for kind in rates["best"]}
        least = [least["rollout"], least["policy"], least["old_logits"] + least["auxiliary"]]
        print(f"| {name} | {textbook:.0f} | {bound:.0f} | {sps:.0f} | {sps / textbook:.2f} | {sps / bound:.2f} |",
              " | ".join(f"{seconds[x]:.1f}" for x in ("rollout", "policy_phase", "auxiliary_phase")), "|",
              ", ".join(f"{x:.1f}" for x in least), "|", f"{memory['host'] / 1e9:.2f} | {memory['device'] / 1e9:.2f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["rates"]:
        print_bare_rates(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["benchmark"]:
        gpu = torch.cuda.is_available()
        num_envs, n_iteration = [int(x) for x in sys.argv[2:4]] + [64 if gpu else 16, 8 if gpu else 2][
            len(sys.argv[2:4]) :
        ]
        benchmark(num_envs, n_iteration)
    else:
        sys.exit("usage: python test_ppg_procgen.py benchmark [num_envs [n_iteration]]   (the tests: pytest)")

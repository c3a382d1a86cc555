# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors of ppg_procgen.py
"""Phasic Policy Gradient (PPG) on Procgen, in one file: P, the paper, is Cobbe et al. 2020, arXiv 2009.04416.

A policy and a value function that share a network disturb each other; in two networks, neither learns
features for the other. PPG trains two networks as PPO does, then distils the values into the policy network,
while a KL term holds the policy in place. Algorithm 1 of the paper, and the function that does it:

    for phase = 1, 2, ...                                                      train
        for iteration = 1 .. N_pi                                              (policy phase)
            perform rollouts under the current policy pi                       collect_rollout
            compute the value targets and the advantages                       compute_gae
            E_pi epochs of L_clip + beta_S S[pi], E_V epochs of L_value        policy_update
            add the states and their value targets to the buffer B             collect_rollout, train
        store pi_old(. | s) for every state s in B                             auxiliary_phase
        E_aux epochs of L_joint = L_aux + beta_clone KL[pi_old, pi], L_value   auxiliary_phase

Words: a step is one of the environment. A rollout is T steps in each of N environments, a segment those of
one of them. A minibatch is a set of segments on which the weights move once, a pass the part of it that goes
through the network at a time. N is that of one process, A the number of actions. The lesson ends with train.
O is the authors' code, github.com/openai/phasic-policy-gradient; README.md lists the departures from P and O.
"""
# /// script
# requires-python = ">=3.10,<3.13"
# dependencies = [
#     "procgen==0.10.7; python_version < '3.11'", "procgen-mirror==0.10.7; python_version >= '3.11'",
#     "torch==2.13.0", "gym==0.26.2", "numpy==1.26.4", "wandb==0.31.0", "imageio==2.22.4",
#     "setuptools==80.9.0",
# ]
# ///

import argparse
import ctypes
import fcntl
import io
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import gym_notices.notices
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

gym_notices.notices.notices.clear()  # or gym prints a page about its successor
import gym
from gym3 import VideoRecorderWrapper
from procgen.env import ENV_NAMES, ProcgenGym3Env

Distribution.set_default_validate_args(False)  # it synchronises a GPU at every call


# ---- flags -----------------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: the process's own). Bad input ends it with a sentence and exit status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = fail
    switch = argparse.BooleanOptionalAction
    count = partial(number, kind=int, low=1)
    count_or_0 = partial(number, kind=int)
    fraction = partial(number, high=1)

    add = parser.add_argument_group("run").add_argument
    add_source = parser.add_mutually_exclusive_group().add_argument
    add("--exp-name", default=Path(__file__).stem, help="a part of the name of the run directory")
    add("--seed", type=count_or_0, default=1, help="seed of network, actions, minibatches and levels")
    add("--torch-deterministic", action=switch, default=True, help="deterministic cuDNN kernels")
    add("--cuda", action=switch, default=True, help="use the GPU, if there is one")
    add("--track", action=switch, default=False, help="log to Weights & Biases too")
    add("--wandb-project-name", default="ppg-procgen", help="project under --track")
    add("--wandb-entity", help="team under --track; None = wandb's default")
    add("--capture-video", action=switch, default=False, help="film an episode after every phase")
    add("--runs-dir", default="runs", help="directory in which the run makes its own")
    add("--checkpoint-interval", type=count_or_0, default=1, help="phases between checkpoints; 0 = none")
    add_source("--resume", metavar="RUN_DIR", help="continue the run in this directory, with its flags")
    add_source("--evaluate", metavar="RUN_DIR", help="play the checkpoint in this directory, train nothing")
    add("--eval-interval", type=count_or_0, default=0, help="phases between evaluations; 0 = none")
    add("--eval-episodes", type=count_or_0, default=100, help="episodes of an evaluation, on each level set")

    add = parser.add_argument_group("environment").add_argument
    add_environment_flags(add)
    add("--num-envs", type=count, default=64, help="N: environments per process")
    add("--total-timesteps", type=count, default=25_000_000, help="steps of all processes together")

    add = parser.add_argument_group("policy phase").add_argument
    archs = "dual = two networks; detach = one, which value gradients reach in the auxiliary phase alone; "
    archs += "shared = one that they always reach: PPO, with --e-policy 3 --e-value 3 --e-auxiliary 0"
    add("--arch", choices=("dual", "detach", "shared"), default="dual", help=archs)
    add("--num-steps", type=count, default=256, help="T: steps of a rollout")
    add("--n-iteration", type=count, default=32, help="N_pi: policy iterations per phase")
    add("--e-policy", type=count, default=1, help="E_pi: policy epochs per iteration")
    add("--e-value", "--v-value", type=count, default=1, help="E_V: value epochs per iteration")
    add("--num-minibatches", type=count, default=8, help="per epoch, each of N / this environments")
    add("--learning-rate", type=number, default=5e-4, help="Adam step size of the policy phase")
    add("--anneal-lr", action=switch, default=False, help="lower all step sizes to 0 over the run")
    add("--adam-eps", type=number, default=1e-8, help="Adam epsilon")
    add("--gamma", type=fraction, default=0.999, help="gamma: discount")
    add("--gae-lambda", type=fraction, default=0.95, help="lambda of advantage estimation")
    add("--reward-norm-gamma", type=fraction, default=0.99, help="discount of the reward normaliser")
    add("--reward-clip", type=partial(number, low=1e-9), default=10.0, help="bound of a normalised reward")
    add("--clip-coef", type=number, default=0.2, help="epsilon: clips the ratio; 0 = unclipped")
    add("--kl-coef", type=number, default=0.0, help="beta of the KL variant: 1, with --clip-coef 0")
    add("--ent-coef", type=number, default=0.01, help="beta_S: weight of the entropy bonus")
    add("--vf-coef", type=number, default=0.5, help="weight of the value head's squared error")
    add("--max-grad-norm", type=number, default=0.0, help="clips the gradient's L2 norm; 0 = off")

    add = parser.add_argument_group("auxiliary phase").add_argument
    add("--e-auxiliary", type=count_or_0, default=6, help="E_aux: epochs; 0 = no auxiliary phase")
    add("--beta-clone", type=number, default=1.0, help="beta_clone: weight of KL[pi_old, pi]")
    add("--aux-vf-coef", type=number, default=1.0, help="weight of half the value head's squared error")
    add("--aux-learning-rate", type=number, default=5e-4, help="Adam step size of the auxiliary phase")
    add("--num-aux-rollouts", type=count, default=4, help="segments (T steps each) in a minibatch")

    add = parser.add_argument_group("system").add_argument
    precisions = "bfloat16 in the trunks: bf16 = always, bf16-aux = in the auxiliary phase, fp32 = never; "
    precisions += "auto = where it is fast, decided when the run begins"
    add("--precision", choices=("auto", "bf16", "bf16-aux", "fp32"), default="auto", help=precisions)
    passes = "segments in a pass at most: bounds the memory of activations; 0 = by device and T"
    add("--segments-per-pass", type=count_or_0, default=0, help=passes)
    compiled = "torch.compile the network and the step of a rollout: faster on a GPU, slower on a CPU"
    add("--compile", action=switch, default=False, help=compiled)

    args = parser.parse_args(argv)
    if args.resume is not None or args.evaluate is not None:
        args = with_flags_of_run(args, parser, argv)
    iteration_steps = args.num_envs * args.num_steps * WORLD_SIZE
    if set(args.exp_name) & set("/\\#?%:"):  # it becomes a part of a path, and of an id of wandb
        parser.error(f"--exp-name must be without / \\ # ? % and :, not {args.exp_name}")
    if args.num_envs % args.num_minibatches:
        parser.error(f"--num-minibatches must divide --num-envs, {args.num_envs}")
    if args.total_timesteps < iteration_steps:
        parser.error(f"--total-timesteps must be at least one rollout, {iteration_steps} steps")
    if args.e_auxiliary and args.num_envs * args.n_iteration % args.num_aux_rollouts:
        parser.error(f"--num-aux-rollouts must divide N x N_pi, {args.num_envs * args.n_iteration}")
    if args.evaluate is None and args.eval_interval and args.eval_episodes == 0:
        parser.error("--eval-interval needs --eval-episodes of at least 1")
    return args


# ---- networks --------------------------------------------------------------------------------------
def normed(layer: nn.Module, scale: float) -> nn.Module:
    """Rescales each unit's incoming weights to L2 norm `scale`, zeroes the biases (O: torch_util.py)."""
    layer.weight.data = scale * F.normalize(layer.weight.data.flatten(1)).view_as(layer.weight)
    layer.bias.data.zero_()
    return layer


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def impala_trunk(image_shape: tuple[int, int, int], num_features: int) -> nn.Sequential:
    """The IMPALA CNN (Espeholt et al. 2018, figure 3): images [B, C, H, W] -> [B, num_features]."""
    height, width, in_channels = image_shape
    residual_scale = (3**-0.5 * 2**-0.5) ** 0.5  # 3 stacks, 2 blocks in each; shared by 2 convolutions
    layers = []
    for channels in (16, 32, 32):
        layers.append(normed(nn.Conv2d(in_channels, channels, 3, padding=1), 1.0))
        layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        for _ in range(2):
            conv1 = normed(nn.Conv2d(channels, channels, 3, padding=1), residual_scale)
            conv2 = normed(nn.Conv2d(channels, channels, 3, padding=1), residual_scale)
            layers.append(Residual(nn.ReLU(), conv1, nn.ReLU(), conv2))
        in_channels = channels
    num_pixels = math.ceil(height / 8) * math.ceil(width / 8)  # three poolings halve, rounding up
    dense = normed(nn.Linear(in_channels * num_pixels, num_features), 1.4)
    return nn.Sequential(*layers, nn.Flatten(), nn.ReLU(), dense, nn.ReLU())


class Output(NamedTuple):  # all float32; None where it was not asked for
    policy: Tensor | None  # [..., A]: the policy's logits; action_distribution() makes a distribution of them
    aux_values: Tensor | None  # [...]: of the auxiliary value head, on the policy's trunk
    values: Tensor | None  # [...]: of the value head


class Agent(nn.Module):
    """The policy, the value function and the auxiliary value function (paper, section 2)."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, arch: str, precision: str = "fp32"):
        super().__init__()
        shape = obs_space.shape
        if obs_space.dtype != np.uint8 or len(shape) != 3 or shape[2] > min(shape):
            raise ValueError(f"observations must be uint8 [H, W, C], not {obs_space.dtype} {list(shape)}")
        self.arch = arch
        self.precision = precision
        num_features = 256
        self.policy_trunk = impala_trunk(shape, num_features)
        self.value_trunk = self.policy_trunk
        if arch == "dual":
            self.value_trunk = impala_trunk(shape, num_features)
        self.policy_head = normed(nn.Linear(num_features, int(action_space.n)), 0.1)
        self.value_head = normed(nn.Linear(num_features, 1), 0.1)
        self.aux_value_head = normed(nn.Linear(num_features, 1), 0.1)
        self.to(memory_format=torch.channels_last)

    def forward(self, batch: dict, *, auxiliary_phase=False, with_policy=True, with_value=True) -> Output:
        """batch["obs"] [..., H, W, C] uint8: [N, ...] in a rollout, [segments, T, ...] in an update."""
        obs = batch["obs"]
        batch_shape = obs.shape[:-3]
        bf16 = self.precision == "bf16" or (self.precision == "bf16-aux" and auxiliary_phase)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            # Permuted NHWC is channels_last NCHW already. A contiguous copy would halve the speed.
            images = obs.flatten(0, -4).permute(0, 3, 1, 2)
            images = images.to(torch.bfloat16 if bf16 else torch.float32) / 255
            if with_policy or self.arch != "dual":
                policy_features = self.policy_trunk(images).float()
                value_features = policy_features  # of the one trunk, unless there are two
            if with_value and self.arch == "dual":
                value_features = self.value_trunk(images).float()
        policy = aux_values = values = None
        if with_policy:
            policy = self.policy_head(policy_features).unflatten(0, batch_shape)
            aux_values = self.aux_value_head(policy_features).view(batch_shape)
        if with_value:
            # In one network, values may shape the features in the auxiliary phase alone (P, section 3.6),
            # where the KL term holds the policy still meanwhile.
            if self.arch == "detach" and not auxiliary_phase:
                value_features = value_features.detach()
            values = self.value_head(value_features).view(batch_shape)
        return Output(policy, aux_values, values)

    def act(self, batch: dict) -> tuple[Tensor, Tensor, Output]:
        """Draws actions [N, ...] from pi(. | s); their log-probabilities [N]; what the network gave."""
        output = self(batch)
        pi = action_distribution(output.policy)
        actions = pi.sample()
        return actions, pi.log_prob(actions), output


def action_distribution(policy: Tensor) -> Distribution:
    """pi(. | s), from the output of the policy head [..., A]."""
    return Categorical(logits=policy)


# ---- environments: all that is Procgen's -----------------------------------------------------------
RETURN_RANGES = {  # R_min, R_max: easy, then hard (Cobbe et al. 2019, arXiv 1912.01588, appendix C)
    "bigfish": (1, 40, 0, 40), "bossfight": (0.5, 13, 0.5, 13), "caveflyer": (3.5, 12, 2, 13.4),
    "chaser": (0.5, 13, 0.5, 14.2), "climber": (2, 12.6, 1, 12.6), "coinrun": (5, 10, 5, 10),
    "dodgeball": (1.5, 19, 1.5, 19), "fruitbot": (-1.5, 32.4, -0.5, 27.2), "heist": (3.5, 10, 2, 10),
    "jumper": (3, 10, 1, 10), "leaper": (3, 10, 1.5, 10), "maze": (5, 10, 4, 10),
    "miner": (1.5, 13, 1.5, 20), "ninja": (3.5, 10, 2, 10), "plunder": (4.5, 30, 3, 30),
    "starpilot": (2.5, 64, 1.5, 35)}  # fmt: skip
FREE_ENVIRONMENT_FLAGS = ("env_threads",)  # those that may differ beside --resume and --evaluate,
EVALUATION_FLAGS = ("num_levels", "start_level")  # and those that may differ beside --evaluate


def add_environment_flags(add: Callable) -> None:
    level = partial(number, kind=int, high=10**9)  # Procgen's levels are numbered up to 2**31
    add("--env-id", choices=ENV_NAMES, default="starpilot", metavar="GAME", help=", ".join(ENV_NAMES))
    add("--distribution-mode", choices=("easy", "hard"), default="easy", help="kind of levels")
    add("--num-levels", type=level, default=0, help="training levels; 0 = all")
    add("--start-level", type=level, default=0, help="the first of them; unused if they are all")
    threads = partial(number, kind=int, low=1)
    add("--env-threads", type=threads, default=4, help="simulator threads per process")


def level_sets(args: argparse.Namespace, run_flags: dict) -> dict[str, dict]:
    """What an evaluation of the run with these flags plays, by name: options for make_envs."""
    chosen_levels = {"num_levels": args.num_levels, "start_level": args.start_level}
    all_levels = {"num_levels": 0, "start_level": 0}
    if any(run_flags[name] != value for name, value in chosen_levels.items()):
        return {"chosen_levels": chosen_levels}
    if args.num_levels == 0:
        return {"all_levels": all_levels}
    return {"train_levels": chosen_levels, "all_levels": all_levels}


def normalized_return(args: argparse.Namespace, episodic_return: float) -> float | None:
    """(return - R_min) / (R_max - R_min); None for environments without a range."""
    if args.env_id not in RETURN_RANGES:
        return None
    easy_low, easy_high, hard_low, hard_high = RETURN_RANGES[args.env_id]
    low, high = (hard_low, hard_high) if args.distribution_mode == "hard" else (easy_low, easy_high)
    return (episodic_return - low) / (high - low)


class ProcgenVecEnv(gym.vector.VectorEnv):
    """Procgen environments that step together. `film`: options of gym3's recorder of environment 0."""

    def __init__(self, num_envs: int, film: dict | None = None, **options):
        self.film = film
        self.options = options | {"num": num_envs, "render_mode": "rgb_array" if film else None}
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.simulator = ProcgenGym3Env(**self.options, rand_seed=seed)
        self.get_state = self.simulator.get_state
        self.set_state = self.simulator.set_state
        if self.film:
            self.simulator = VideoRecorderWrapper(self.simulator, info_key="rgb", **self.film)
        return self.simulator.observe()[1]["rgb"], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.simulator.act(np.asarray(actions))
        rewards, obs, terminated = self.simulator.observe()
        return obs["rgb"], rewards, terminated, np.zeros_like(terminated), {}


def make_envs(args, *, num_envs: int, levels: dict | None = None, film: dict | None = None):
    """The environments of training, evaluation and film. levels: an entry of level_sets; None = training's.

    Needed is a gym or gymnasium vector environment, channels last, with rewards as the game gives them. The
    step that ends an episode shows the first observation of the next (AutoresetMode.SAME_STEP); where a time
    limit ended it, info["final_obs"][i] is its last. With get_state() and set_state(state) resumed runs are
    exact: all that decides what comes next, random numbers too, as numbers, strings, bytes, tensors, lists or
    dicts. check_envs in the tests tells whether it is so.
    """
    levels = levels or {"num_levels": args.num_levels, "start_level": args.start_level}
    options = {"env_name": args.env_id, "distribution_mode": args.distribution_mode}
    return ProcgenVecEnv(num_envs, film, num_threads=args.env_threads, **options, **levels)


# ---- environments: what every suite needs ----------------------------------------------------------
class Episode(NamedTuple):  # one that ended
    step: int  # of its tracker, counted from the start
    env: int
    episodic_return: float  # undiscounted, as the game gives it
    length: int


class Step(NamedTuple):
    rewards: Tensor  # [N]
    episodes: list[Episode]
    final_obs: dict[int, Tensor]  # by environment: the last observation of an episode that a time limit ended


class EpisodeTracker(nn.Module):
    """Owns the environments: steps them, and holds what lives from one step to the next, to be saved.

    The memory of a recurrent network belongs here, as a buffer more: an evaluation has a tracker of its own.
    """

    def __init__(self, envs: gym.vector.VectorEnv, seed: int):
        super().__init__()
        self.envs = envs
        obs = torch.from_numpy(envs.reset(seed=seed)[0])  # [N, ...]
        space = envs.single_observation_space
        if obs.shape[1:] != space.shape or obs.dtype != torch_dtype(space):
            raise ValueError(f"observations are {obs.dtype} {list(obs.shape)}, their space is {space}")
        self.num_steps = 0
        self.register_buffer("obs", obs)
        self.register_buffer("returns", torch.zeros(envs.num_envs, dtype=torch.float64))
        self.register_buffer("lengths", torch.zeros(envs.num_envs, dtype=torch.long))
        self.register_buffer("firsts", torch.ones(envs.num_envs, dtype=torch.bool))  # an episode opens

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the network reads before the next step, [N, ...]."""
        return {"obs": self.obs.to(device)}

    def step(self, actions: Tensor) -> Step:
        """actions [N, ...], on any device."""
        obs, rewards, terminated, truncated, info = self.envs.step(actions.cpu().numpy())
        self.obs = torch.from_numpy(obs)
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        self.num_steps += 1
        self.returns += rewards
        self.lengths += 1
        done = np.logical_or(terminated, truncated)
        self.firsts = torch.from_numpy(done)
        episodes = []
        for i in done.nonzero()[0].tolist():
            episodes.append(Episode(self.num_steps, i, self.returns[i].item(), self.lengths[i].item()))
            self.returns[i] = 0
            self.lengths[i] = 0
        cut_short = np.logical_and(truncated, np.logical_not(terminated)).nonzero()[0].tolist()
        final_obs = {i: torch.as_tensor(info["final_obs"][i], dtype=self.obs.dtype) for i in cut_short}
        return Step(rewards, episodes, final_obs)

    def get_extra_state(self) -> dict:
        envs_state = self.envs.get_state() if hasattr(self.envs, "get_state") else None
        return {"num_steps": self.num_steps, "envs": envs_state}

    def set_extra_state(self, state: dict) -> None:
        self.num_steps = state["num_steps"]
        if state["envs"] is None:
            say("these environments have no get_state: they start anew")
        else:
            self.envs.set_state(state["envs"])


class RewardNormalizer(nn.Module):
    """Divides rewards by the standard deviation of their discounted return (O: reward_normalizer.py)."""

    def __init__(self, num_envs: int, gamma: float, clip: float):
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.register_buffer("returns", torch.zeros(num_envs, dtype=torch.float64))  # R_{t-1} of this process
        # Of all R_t of all processes: number, sum and sum of squares. They begin as if 1e-4 of an R_t had
        # been seen, with variance 1.
        self.register_buffer("sums", torch.tensor([1e-4, 0, 1e-4], dtype=torch.float64))

    def forward(self, rewards: Tensor, firsts: Tensor) -> Tensor:
        """rewards [N, T]; firsts [N, T]: 1 where the step opened an episode. Returns rewards [N, T]."""
        returns = torch.empty_like(rewards, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            self.returns = rewards[:, t] + self.gamma * self.returns * (1 - firsts[:, t])
            returns[:, t] = self.returns
        self.sums = self.sums + global_sums(returns)
        _, variance = mean_and_variance(self.sums)
        return (rewards / (variance + 1e-8).sqrt()).clamp(-self.clip, self.clip).float()


# ---- mathematics -----------------------------------------------------------------------------------
def compute_gae(*, rewards, values, final_values, firsts, gamma: float, gae_lambda: float) -> tuple:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards [N, T]: of the step from s_t. values [N, T+1]: V(s_t), the last column bootstraps.
    final_values [N, T]: where a time limit ended the episode with step t, the value of its last observation.
    firsts [N, T+1]: 1 where s_t opens an episode, so nothing is carried across it.
    Returns advantages and value targets, each [N, T].
    """
    assert values.shape == firsts.shape == (rewards.shape[0], rewards.shape[1] + 1)
    assert final_values.shape == rewards.shape
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        goes_on = 1 - firsts[:, t + 1]
        next_values = goes_on * values[:, t + 1] + final_values[:, t]
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        advantage = delta + gamma * gae_lambda * goes_on * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values[:, :-1]


def surrogate_loss(log_ratio: Tensor, advantages: Tensor, *, clip_coef: float) -> Tensor:
    """-L_clip: PPO's surrogate (Schulman et al. 2017, eq. 7), to be minimised; unclipped if clip_coef is 0.

    log_ratio [...]: log pi(a | s) - log pi_rollout(a | s). advantages [...]. Returns the mean.
    """
    assert log_ratio.shape == advantages.shape
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    if clip_coef > 0:
        surrogate = torch.min(surrogate, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    return -surrogate.mean()


def kl_from_old_policy(old_policy: Tensor, policy: Tensor) -> Tensor:
    """KL[pi_old, pi] in nats, the mean over the states. Both [..., A]: outputs of the policy head."""
    assert old_policy.shape == policy.shape
    log_probs = policy.log_softmax(-1)
    old_log_probs = old_policy.log_softmax(-1)
    return F.kl_div(log_probs, old_log_probs, reduction="none", log_target=True).sum(-1).mean()


def ratio_metrics(log_ratio: Tensor, clip_coef: float) -> dict[str, Tensor]:
    """How far the policy is from that of the rollout. KL estimates: joschu.net/blog/kl-approx.html."""
    log_ratio = log_ratio.detach()
    ratio = log_ratio.exp()
    return {
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
        "losses/old_approx_kl": -log_ratio.mean(),
        "losses/clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }


# ---- phases ----------------------------------------------------------------------------------------
class Rollout(NamedTuple):  # final_values, rewards and firsts are on the host, the rest on the device
    inputs: dict[str, Tensor]  # what the network reads: "obs" [N, T, ...], s_t, which may be on the host
    actions: Tensor  # [N, T, ...]: a_t
    log_probs: Tensor  # [N, T]: log pi(a_t | s_t)
    values: Tensor  # [N, T+1]: V(s_t)
    final_values: Tensor  # [N, T]: as compute_gae takes them
    rewards: Tensor  # [N, T]: of the step from s_t
    firsts: Tensor  # [N, T+1]: 1 where s_t opens an episode
    episodes: list[Episode]  # those that ended


@torch.no_grad()
def collect_rollout(agent: Agent, tracker: EpisodeTracker, observations: Tensor, device) -> Rollout:
    """Plays T steps from where `tracker` is, and writes what it sees to observations [N, T, ...]."""
    num_envs, num_steps = observations.shape[:2]
    action_space = tracker.envs.single_action_space
    actions_shape = (num_envs, num_steps, *action_space.shape)
    actions = torch.empty(actions_shape, dtype=torch_dtype(action_space), device=device)
    log_probs = torch.empty((num_envs, num_steps), device=device)
    values = torch.empty((num_envs, num_steps + 1), device=device)
    final_values = torch.zeros((num_envs, num_steps))
    rewards = torch.empty((num_envs, num_steps))
    firsts = torch.empty((num_envs, num_steps + 1))
    inputs = {"obs": observations}  # a recurrent network's: its memory before s_0 and firsts[:, :-1], too
    episodes = []
    for t in range(num_steps):
        observations[:, t] = tracker.obs
        firsts[:, t] = tracker.firsts
        actions[:, t], log_probs[:, t], output = agent.act(tracker.inputs(device))
        values[:, t] = output.values
        step = tracker.step(actions[:, t])
        rewards[:, t] = step.rewards
        episodes += step.episodes
        for i, final_obs in step.final_obs.items():
            final_values[i, t] = agent({"obs": final_obs[None].to(device)}, with_policy=False).values[0]
    firsts[:, -1] = tracker.firsts
    values[:, -1] = agent(tracker.inputs(device), with_policy=False).values
    return Rollout(inputs, actions, log_probs, values, final_values, rewards, firsts, episodes)


def policy_update(agent: Agent, optimizers, rollout, advantages, targets, args, max_segments: int) -> dict:
    """E_pi policy epochs and E_V value epochs on a rollout; advantages, targets [N, T]. Returns metrics.

    The surrogate holds for actions of almost the present policy: it needs fresh data, and using them again
    brings little (P, section 3.2). Value targets are numbers to regress on, and their training has become
    independent of the policy's: they may be used more often, E_V > E_pi (P, section 2).
    """
    mean, variance = mean_and_variance(global_sums(advantages))
    # Random numbers of a new loss (an augmentation's shifts) would be an entry more, with a row for each
    # segment: drawn in a pass, they would depend on the size of passes.
    data = rollout.inputs | {
        "actions": rollout.actions,
        "old_log_probs": rollout.log_probs,
        "advantages": ((advantages - mean) / (variance.sqrt() + 1e-8)).float(),
        "targets": targets,
    }
    means = Means()
    if args.e_policy == args.e_value:
        epochs = [(optimizers["policy_and_value"], True, True)] * args.e_policy
    else:
        epochs = [(optimizers["value"], False, True)] * args.e_value  # first, as in O (ppo.py)
        epochs += [(optimizers["policy"], True, False)] * args.e_policy
    for optimizer, learn_policy, learn_value in epochs:
        # Minibatches are whole segments, not shuffled steps, as in O: a recurrent network can read them. The
        # steps of one segment are alike, but a minibatch has several, each of another environment, and all of
        # them come once an epoch. Advantages are normalised over the rollout, not over a minibatch.
        for minibatch in torch.randperm(args.num_envs).split(args.num_envs // args.num_minibatches):
            optimizer.zero_grad()
            passes = split_equally(minibatch, max_segments)
            for segments in passes:
                batch = take(data, segments, targets.device)
                output = agent(batch, with_policy=learn_policy, with_value=learn_value)
                loss = 0
                if learn_policy:
                    pi = action_distribution(output.policy)
                    log_ratio = pi.log_prob(batch["actions"]) - batch["old_log_probs"]
                    policy_loss = surrogate_loss(log_ratio, batch["advantages"], clip_coef=args.clip_coef)
                    # The KL variant (P, section 3.5), estimated from the actions taken as in O (ppo.py).
                    policy_loss = policy_loss + args.kl_coef * 0.5 * log_ratio.square().mean()
                    entropy = pi.entropy().mean()
                    loss = loss + policy_loss - args.ent_coef * entropy
                    means.add({"losses/policy_loss": policy_loss, "losses/entropy": entropy})
                    means.add(ratio_metrics(log_ratio, args.clip_coef))
                if learn_value:
                    value_loss = args.vf_coef * F.mse_loss(output.values, batch["targets"])
                    loss = loss + value_loss
                    means.add({"losses/value_loss": value_loss})
                (loss / len(passes)).backward()
            average_over_processes(agent)
            if args.max_grad_norm > 0:
                nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
    error_variance = (targets - rollout.values[:, :-1]).var(correction=0)
    explained_variance = 1 - error_variance / targets.var(correction=0).clamp_min(1e-8)
    means.add({"losses/explained_variance": explained_variance})
    return means.compute()


def auxiliary_phase(agent: Agent, optimizer, data: dict, args, max_segments: int) -> dict:
    """E_aux epochs on the S segments of a phase: "obs" [S, T, ...], "targets" [S, T]. Returns metrics.

    Earlier policies met these states. A policy gradient would need actions of the present one; here nothing
    improves the policy (P, section 4): values are regressed, and regression profits from many states.
    """
    # The targets are those of the policy phase. Computed anew from the value function, they would move with
    # it; fixed numbers bear many epochs.
    targets = data["targets"]
    # pi_old is the policy that the phase has led to, not those that collected: the KL term is to keep what
    # was learned, not to take it back. Precision and passes are those of the updates, so that rounding is the
    # same and the first KL is 0.
    old_policy = []
    with torch.no_grad():
        for minibatch in torch.arange(len(targets)).split(args.num_aux_rollouts):
            for segments in split_equally(minibatch, max_segments):
                batch = take(data, segments, targets.device)
                old_policy.append(agent(batch, auxiliary_phase=True, with_value=False).policy)
    data = data | {"old_policy": torch.cat(old_policy)}
    means = Means()
    for epoch in range(args.e_auxiliary):
        say(f"auxiliary epoch {epoch + 1} of {args.e_auxiliary}")
        for minibatch in torch.randperm(len(targets)).split(args.num_aux_rollouts):
            optimizer.zero_grad()
            passes = split_equally(minibatch, max_segments)
            for segments in passes:
                batch = take(data, segments, targets.device)
                output = agent(batch, auxiliary_phase=True)
                aux_value_loss = 0.5 * F.mse_loss(output.aux_values, batch["targets"])
                # From pi_old to pi: all that pi_old did must stay likely. The other way pi might forget some.
                clone_loss = kl_from_old_policy(batch["old_policy"], output.policy)
                joint_loss = aux_value_loss + args.beta_clone * clone_loss
                value_loss = 0.5 * F.mse_loss(output.values, batch["targets"])
                # Algorithm 1 takes two steps; two networks share no parameter, so that one is the same.
                loss = joint_loss + args.aux_vf_coef * value_loss
                (loss / len(passes)).backward()
                means.add({"losses/aux/aux_value_loss": aux_value_loss, "losses/aux/kl_loss": clone_loss})
                means.add({"losses/aux/real_value_loss": value_loss})
            average_over_processes(agent)
            optimizer.step()
    return means.compute()


# ---- training --------------------------------------------------------------------------------------
def train(args: argparse.Namespace) -> dict:
    """Algorithm 1, in the environments that `make_envs` makes. Returns the summary of the run."""
    device = start_process(args)
    envs = make_envs(args, num_envs=args.num_envs)
    tracker = EpisodeTracker(envs, seed=args.seed + 10_000 * RANK)  # each process draws levels of its own
    reward_normalizer = RewardNormalizer(args.num_envs, args.reward_norm_gamma, args.reward_clip)
    spaces = (envs.single_observation_space, envs.single_action_space)
    agent = Agent(*spaces, args.arch, args.precision).to(device)
    if args.compile:
        agent.compile(dynamic=False)
        # A rollout's step is some hundred small kernels: a CUDA graph launches them at once.
        agent.act = torch.compile(agent.act, mode="reduce-overhead", fullgraph=True, dynamic=False)
    # Adam scales a step by recent gradients: losses that take turns have one each (policy and values, if E_pi
    # and E_V differ, and the auxiliary phase), those that step together share one (O: ppo.py). Each knows all
    # parameters, and skips those that its losses gave no gradient.
    adam = partial(torch.optim.Adam, list(agent.parameters()), eps=args.adam_eps)
    optimizers = {name: adam(lr=args.learning_rate) for name in ("policy_and_value", "policy", "value")}
    optimizers["auxiliary"] = adam(lr=args.aux_learning_rate)
    # What a checkpoint holds of all processes together, and of each.
    modules = {"agent": agent, **optimizers}
    process_modules = {"tracker": tracker, "reward_normalizer": reward_normalizer}

    iteration_steps = args.num_envs * args.num_steps * WORLD_SIZE
    num_iterations = args.total_timesteps // iteration_steps
    # The auxiliary phase needs the states of its phase's rollouts, PPO those of one, which it writes over.
    num_rollouts = min(args.n_iteration, num_iterations) if args.e_auxiliary else 1
    observations = allocate_observations(num_rollouts, envs.single_observation_space, device, args)
    max_segments = args.segments_per_pass or choose_segments_per_pass(device, args.num_steps)

    with Run(args, device, modules, process_modules) as run:
        while run.iteration < num_iterations:
            # A run that is resumed, or evaluated between its phases, draws the same numbers as any other.
            seeds = np.random.SeedSequence((args.seed, RANK, run.phase))
            torch.manual_seed(int(seeds.generate_state(1)[0]))
            phase_iterations = min(args.n_iteration, num_iterations - run.iteration)
            buffer = []  # B
            for i in range(phase_iterations):  # policy phase
                if args.anneal_lr:
                    scale_learning_rates(optimizers, 1 - run.iteration / num_iterations)
                with run.timed("rollout"):
                    rollout = collect_rollout(agent, tracker, observations[i % num_rollouts], device)
                with run.timed("policy_phase"):
                    advantages, targets = compute_gae(
                        rewards=reward_normalizer(rollout.rewards, rollout.firsts[:, :-1]),
                        values=rollout.values.cpu(),
                        final_values=rollout.final_values,
                        firsts=rollout.firsts,
                        gamma=args.gamma,
                        gae_lambda=args.gae_lambda,
                    )
                    estimates = (advantages.to(device), targets.to(device))
                    metrics = policy_update(agent, optimizers, rollout, *estimates, args, max_segments)
                buffer.append(rollout.inputs | {"targets": targets.to(device)})
                run.iteration += 1
                run.global_step += iteration_steps
                metrics["charts/learning_rate"] = optimizers["policy"].param_groups[0]["lr"]
                run.log_iteration(metrics, rollout.episodes)
            if args.e_auxiliary and phase_iterations == args.n_iteration:  # not after a last, shorter phase
                with run.timed("auxiliary_phase"):
                    names = buffer[0].keys() - {"obs"}
                    data = {name: torch.cat([entry[name] for entry in buffer]) for name in names}
                    data["obs"] = observations.flatten(0, 1)  # the same, without a copy
                    metrics = auxiliary_phase(agent, optimizers["auxiliary"], data, args, max_segments)
                run.log(metrics)
            run.phase += 1
            run.end_phase(agent, is_last=run.iteration == num_iterations)  # evaluation, film, checkpoint
        return run.finish()


# ---- below the lesson: minibatches and metrics -----------------------------------------------------
def torch_dtype(space: gym.Space) -> torch.dtype:
    return getattr(torch, space.dtype.name)


def split_equally(minibatch: Tensor, max_segments: int) -> tuple[Tensor, ...]:
    """The passes of a minibatch: of one size, up to max_segments, so that their means count alike."""
    sizes = range(1, max_segments + 1)
    return minibatch.split(max(size for size in sizes if len(minibatch) % size == 0))


def take(data: dict[str, Tensor], segments: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Chosen rows of tensors [S, ...], on the device."""
    if len({len(tensor) for tensor in data.values()}) > 1:
        lengths = {name: len(tensor) for name, tensor in data.items()}
        raise ValueError(f"every tensor needs a row for each segment, but there are {lengths}")
    indices = segments.tolist()
    batch = {}
    for name, tensor in data.items():
        # One by one: an index tensor would make the host wait.
        batch[name] = torch.stack([tensor[i].to(device, non_blocking=True) for i in indices])
    return batch


class Means:
    """Means of metrics over passes. Only sums are kept: small tensors from each would fragment the heap."""

    def __init__(self):
        self.sums = {}

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value.detach(), count + 1)

    def compute(self) -> dict[str, float]:
        """Means over all processes, too. It waits for the device."""
        means = torch.stack([total / count for total, count in self.sums.values()])
        return dict(zip(self.sums, (sum_over_processes(means) / WORLD_SIZE).tolist()))


def scale_learning_rates(optimizers: dict[str, torch.optim.Optimizer], fraction: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = fraction * group["initial_lr"]


# ---- below the lesson: processes and devices -------------------------------------------------------
RANK = int(os.environ.get("RANK", "0"))  # these four are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def say(text: str, rank: int = RANK) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


def fail(message: str, status: int = 2) -> NoReturn:
    say(f"error: {message}", LOCAL_RANK)  # once on every node
    sys.exit(status)


def sum_over_processes(x: Tensor) -> Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def global_sums(x: Tensor) -> Tensor:
    """Number, sum and sum of squares [3] of the x of all processes, in float64."""
    x = x.double()
    return sum_over_processes(torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()]))


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    count, total, squares = sums
    mean = total / count
    return mean, (squares / count - mean**2).clamp_min(0)


def average_over_processes(module: nn.Module) -> None:
    """Averages the gradients, in one collective: one for each of 70 tensors takes twice as long."""
    if WORLD_SIZE == 1:
        return
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = sum_over_processes(torch.cat([gradient.flatten() for gradient in gradients])) / WORLD_SIZE
    averages = flat.split([gradient.numel() for gradient in gradients])
    for gradient, average in zip(gradients, averages):
        gradient.copy_(average.view_as(gradient))


def gather_objects(thing: object) -> list:
    things = [thing] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(things, thing)
    return things


def start_process(args: argparse.Namespace) -> torch.device:
    """Joins the processes that torchrun started. Decides --precision auto, for good. Returns the device."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc is to keep freed memory. Unmapped, large activations cost page faults: half the time on a CPU.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    device = torch.device("cpu")
    backend = "gloo"
    capabilities = torch.cpu.get_capabilities()
    fast = "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    if args.cuda and torch.cuda.is_available():
        if LOCAL_WORLD_SIZE > torch.cuda.device_count():
            fail(f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", LOCAL_RANK)
        backend = "cpu:gloo,cuda:nccl"  # rewards and episodes are on the host
        torch.cuda.set_device(device)
        fast = "bf16-aux" if torch.cuda.is_bf16_supported(False) else "fp32"
        torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.precision == "auto":
        args.precision = fast
    if args.precision != "fp32" and fast == "fp32":
        say(f"--precision {args.precision} is slow on this processor; a run keeps the one that it began with")
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # The others wait while rank 0 evaluates, however long that takes.
        dist.init_process_group(backend, timeout=timedelta(days=365))
    torch.manual_seed(args.seed)  # of the networks: the same in all processes
    return device


def allocate_observations(num_rollouts: int, space: gym.Space, device: torch.device, args) -> Tensor:
    """[num_rollouts, N, T, ...] on the GPU if there is room, else on the host, pinned for a GPU."""
    shape = (num_rollouts, args.num_envs, args.num_steps, *space.shape)
    dtype = torch_dtype(space)
    bytes_needed = math.prod(shape) * dtype.itemsize
    say(f"the observations of a phase take {bytes_needed / 1e9:.2f} GB in each process")
    if device.type == "cuda" and bytes_needed <= 0.8 * torch.cuda.mem_get_info(device)[0]:
        return torch.empty(shape, dtype=dtype, device=device)  # the rest is for activations
    # Zeros take the memory now, not in the middle of a phase.
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")


def choose_segments_per_pass(device: torch.device, num_steps: int) -> int:
    """512 steps on a CPU, no faster with more; on a GPU half of the free memory, at 5 MB a step.

    4.1 MB were measured: two networks, float32, an H200.
    """
    steps = torch.cuda.mem_get_info(device)[0] // 10_000_000 if device.type == "cuda" else 512
    return max(1, steps // num_steps)


# ---- below the lesson: flags of a run, checkpoints -------------------------------------------------
CHECKPOINT_FORMAT = 5
SAVED_OF_RUN = ("phase", "iteration", "global_step", "episodes", "recent", "charts", "seconds", "evaluation")
FREE_FLAGS = (  # those that do not change what is learned: they may differ beside --resume and --evaluate
    "resume", "evaluate", "total_timesteps", "cuda", "track", "wandb_project_name", "wandb_entity",
    "capture_video", "runs_dir", "checkpoint_interval", "eval_interval", "eval_episodes", "segments_per_pass",
    "compile", *FREE_ENVIRONMENT_FLAGS)  # fmt: skip


def number(text: str, kind: type = float, low: float = 0, high: float = 2e9) -> float:
    """The value of a flag: an int (1e6 is one too) or a float in [low, high]."""
    with suppress(ValueError):
        value = float(text)
        if low <= value <= high and value == kind(value):  # a NaN is refused by the first
            return kind(value)
    name = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"must be {name} from {low:g} to {high:g}, not {text}")


def load_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged file may raise anything)
        fail(f"{path} is missing, damaged or not a checkpoint ({type(error).__name__})")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} is not a checkpoint of this version of the script")
    return checkpoint


def load_state(name: str, module, states: dict, run_dir: str) -> None:
    try:
        module.load_state_dict(states[name])
    except (KeyError, RuntimeError, ValueError) as error:
        fail(f"{name!r} in the checkpoint of {run_dir} is another script's: use the one kept there. {error}")


def with_flags_of_run(args: argparse.Namespace, parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    """The flags of the run that --resume or --evaluate names, with those beside it that may differ."""
    flag = "evaluate" if args.resume is None else "resume"
    if flag == "evaluate" and WORLD_SIZE > 1:
        fail("--evaluate takes one process: start it with python, not with torchrun")
    run_dir = str(Path(getattr(args, flag).removesuffix("checkpoint.pt")))
    saved = load_checkpoint(run_dir)
    if differing := set(saved["args"]) ^ set(vars(args)):
        names = ", ".join(sorted(differing))
        fail(f"{run_dir} is of a script with other flags ({names}): use the script kept there")
    # Parsed once more, over the run's flags: what differs then was given beside the run.
    flags = parser.parse_args(argv, argparse.Namespace(**saved["args"] | {"resume": None, "evaluate": None}))
    setattr(flags, flag, run_dir)
    if flags.precision == "auto":
        flags.precision = saved["args"]["precision"]
    free = FREE_FLAGS if flag == "resume" else (*FREE_FLAGS, "seed", *EVALUATION_FLAGS)
    for name, value in saved["args"].items():
        if name not in free and getattr(flags, name) != value:
            fail(f"leave out --{name.replace('_', '-')}: the run in {run_dir} has {value}")
    processes = len(saved["processes"])
    steps = saved["run"]["global_step"]
    if flag == "resume" and (WORLD_SIZE != processes or flags.total_timesteps < steps):
        fail(f"{run_dir} goes on with {processes} processes and a --total-timesteps of at least {steps}")
    return flags


def replace_file(path: Path, content: bytes) -> None:
    """Atomically: a failure leaves the file as it was, and nothing half-written beside it."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_row(path: Path, row: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def cut_rows(path: Path, last_step: int) -> tuple[int, int, int]:
    """Drops rows after a step, and half a row. Returns how many are kept and dropped, and their last step."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    steps = [json.loads(line)["global_step"] for line in lines if line.endswith("\n")]
    kept = [line for line, step in zip(lines, steps) if step <= last_step]
    if len(kept) < len(lines):
        replace_file(path, "".join(kept).encode())
    return len(kept), len(lines) - len(kept), max(steps, default=0)


# ---- below the lesson: the run ---------------------------------------------------------------------
class Run(AbstractContextManager):
    """The directory of a run, which it keeps locked, and the rows of metrics in it. Rank 0 alone writes."""

    def __init__(self, args, device, modules: dict, process_modules: dict):
        self.args = args
        self.device = device
        self.modules = modules
        self.process_modules = process_modules
        self.networks = nn.ModuleList(module for module in modules.values() if isinstance(module, nn.Module))
        self.phase = 0  # of phases, iterations and steps of all processes: how many have ended
        self.iteration = 0
        self.global_step = 0
        self.episodes = 0
        self.recent = []  # the last 100 episodes
        self.charts = dict.fromkeys(("episodic_return", "episodic_length", "normalized_return", "SPS"))
        self.seconds = dict.fromkeys(("rollout", "policy_phase", "auxiliary_phase", "evaluation", "total"), 0)
        self.evaluation = None  # the newest
        self.row = {}  # of the iteration that is under way
        self.checkpoint_step = None
        self.tracked_step = 0
        self.wandb = None
        if WORLD_SIZE > 1:  # a copy may draw random numbers before it makes its networks
            for tensor in self.networks.state_dict().values():
                dist.broadcast(tensor, 0)
        if args.resume is not None:
            self.restore(load_checkpoint(args.resume))
        if RANK == 0:
            self.open_directory()
        self.started = time.perf_counter() - self.seconds["total"]

    def __exit__(self, kind, error, traceback) -> None:
        if RANK > 0:
            return
        if kind not in (None, SystemExit):  # fail() has given its reason
            step = self.global_step
            say(f"stopped at step {step}; last checkpoint: {self.checkpoint_step or 'none'}")
            if self.checkpoint_step:
                resume = f"--resume={shlex.quote(str(self.directory))}"
                say(f"to go on from there, give the same command and {resume}")
        with suppress(OSError):
            self.write_row()
        if self.wandb:
            self.wandb.finish(exit_code=0 if kind is None else 1)
        os.close(self.lock)

    def open_directory(self) -> None:
        args = self.args
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.directory = Path(args.resume or Path(args.runs_dir, name))
        if args.resume is None:
            self.start_wandb()  # it makes the directory, once it has accepted the run
            self.directory.mkdir(parents=True, exist_ok=args.track)
            shutil.copy(__file__, self.directory)
        self.lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.lock)
            fail(f"another process is writing to {self.directory}: wait for it, or end it")
        if args.resume is not None:
            self.drop_later_rows()
            self.start_wandb()
        config = {"flags": vars(args), "command_line": sys.argv, "processes": WORLD_SIZE}
        config |= {"device": str(self.device), "tracked_step": self.tracked_step, "python": sys.version}
        config |= {lib.__name__: lib.__version__ for lib in (torch, np, gym)}
        replace_file(self.directory / "config.json", json.dumps(config, indent=2).encode())
        say(f"writing to {self.directory}")
        if args.arch == "shared" and args.e_auxiliary > 0:
            say("--arch shared with an auxiliary phase is not PPO, which takes --e-auxiliary 0 as well")

    def drop_later_rows(self) -> None:
        """Drops rows and evaluations after the checkpoint: they come again."""
        step = self.global_step
        kept, dropped, last_step = cut_rows(self.directory / "metrics.jsonl", step)
        cut_rows(self.directory / "evaluations.jsonl", step)
        rows = f"{kept} of {self.iteration} rows; {dropped} later ones are dropped"
        say(f"going on from step {step} of {self.args.total_timesteps} with {rows}")
        # wandb would keep a row that it has beside the same row made again: these are not sent twice.
        previous = json.loads((self.directory / "config.json").read_text())
        self.tracked_step = max(previous["tracked_step"], last_step if previous["flags"]["track"] else 0)

    def start_wandb(self) -> None:
        if self.args.track:
            import wandb

            name = self.directory.resolve().name
            options = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity}
            options |= {"dir": self.directory, "config": vars(self.args), "save_code": True}
            try:
                self.wandb = wandb.init(id=name, name=name, resume="allow", **options)
            except wandb.errors.Error as error:
                fail(f"Weights & Biases refuses: {error} WANDB_MODE=offline needs no login.", 1)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def log_iteration(self, metrics: dict[str, float], episodes: list[Episode]) -> None:
        """Begins the row of an iteration, in which these episodes ended."""
        self.write_row()
        ended = [tuple(episode) for of_process in gather_objects(episodes) for episode in of_process]
        self.episodes += len(ended)
        self.recent = (self.recent + sorted(ended))[-100:]  # by step
        if self.recent:
            _, _, mean_return, mean_length = np.mean(self.recent, axis=0).tolist()
            self.charts |= {"episodic_return": mean_return, "episodic_length": mean_length}
            self.charts["normalized_return"] = normalized_return(self.args, mean_return)
        self.row = {name: getattr(self, name) for name in ("phase", "iteration", "global_step", "episodes")}
        self.log(metrics)
        charts = ", ".join(f"{name} {value:.4g}" for name, value in self.charts.items() if value is not None)
        say(f"step {self.global_step} of {self.args.total_timesteps}: {charts}")

    def log(self, metrics: dict[str, float | None]) -> None:
        """Adds metrics, whatever their names, to the row of the iteration."""
        self.seconds["total"] = time.perf_counter() - self.started
        self.charts["SPS"] = self.global_step / (self.seconds["total"] - self.seconds["evaluation"])
        metrics = metrics | {f"charts/{name}": value for name, value in self.charts.items()}
        metrics |= {f"time/{name}": value for name, value in self.seconds.items()}
        self.row |= {name: float(value) for name, value in metrics.items() if value is not None}
        if not nn.utils.get_total_norm(self.networks.parameters()).isfinite():  # in all processes alike
            remedy = f"last checkpoint: {self.checkpoint_step}; a resumed run would repeat this"
            step = self.global_step
            fail(f"a weight is not finite at step {step}; {remedy}; try smaller step sizes", 1)

    def write_row(self) -> None:
        row = self.row
        self.row = {}
        if RANK == 0 and row:
            append_row(self.directory / "metrics.jsonl", row)
            if self.wandb and row["global_step"] > self.tracked_step:
                self.wandb.log(row, step=row["global_step"])

    def end_phase(self, agent: Agent, is_last: bool) -> None:
        """Evaluation, film and checkpoint, where they are due."""
        args = self.args
        step = self.global_step
        try:
            with self.timed("evaluation"):
                metrics = {}
                is_due = args.eval_interval and (is_last or self.phase % args.eval_interval == 0)
                if RANK == 0 and is_due:
                    sets = level_sets(args, vars(args))
                    self.evaluation = evaluate(agent, args, sets, self.device, self.directory, step)
                    measured = self.evaluation.keys() - {"global_step", "seed", "episodes", "level_sets"}
                    metrics = {f"eval/{name}": self.evaluation[name] for name in measured}
                if RANK == 0 and args.capture_video:
                    record_video(agent, args, self.device, self.directory, step)
            self.log(metrics)
        finally:  # an evaluation that fails does not lose the phase
            self.write_row()
            if args.checkpoint_interval and (is_last or self.phase % args.checkpoint_interval == 0):
                self.save()

    def save(self) -> None:
        """Replaces checkpoint.pt."""
        own = {name: module.state_dict() for name, module in self.process_modules.items()}
        content = {"format": CHECKPOINT_FORMAT, "args": vars(self.args), "processes": gather_objects(own)}
        content["run"] = {name: getattr(self, name) for name in SAVED_OF_RUN}
        content["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
        if RANK > 0:
            return
        buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
        torch.save(content, buffer)
        buffer.seek(0)
        torch.load(buffer, map_location="cpu", weights_only=True)  # refuses now what it would refuse later
        replace_file(self.directory / "checkpoint.pt", buffer.getbuffer())
        self.checkpoint_step = self.global_step

    def restore(self, saved: dict) -> None:
        for name in SAVED_OF_RUN:
            setattr(self, name, saved["run"][name])
        self.checkpoint_step = self.global_step
        states = saved["modules"] | saved["processes"][RANK]
        for name, module in (self.modules | self.process_modules).items():
            load_state(name, module, states, self.args.resume)

    def finish(self) -> dict:
        """Writes summary.json and returns what is in it."""
        summary = vars(self.args) | self.charts
        summary |= {"global_step": self.global_step, "episodes": self.episodes}
        summary |= {"evaluation": self.evaluation, "seconds": self.seconds, "torch": torch.__version__}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        summary["peak_memory_bytes"] = {"host": host, "device": torch.cuda.max_memory_allocated()}
        summary["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        if RANK == 0:
            replace_file(self.directory / "summary.json", json.dumps(summary, indent=2).encode())
            say(f"done: {json.dumps(self.charts)}; more in {self.directory}/summary.json")
        return summary


# ---- below the lesson: evaluation ------------------------------------------------------------------
@torch.no_grad()
def play(agent: Agent, envs: gym.vector.VectorEnv, episodes: int, seed: int, device) -> np.ndarray:
    """Returns of episodes. Each environment plays its quota: the first to end are the short ones."""
    quota = np.bincount(np.arange(episodes) % envs.num_envs, minlength=envs.num_envs)
    tracker = EpisodeTracker(envs, seed)
    torch.manual_seed(seed)  # training seeds itself anew at every phase
    returns = []
    while len(returns) < episodes:
        output = agent(tracker.inputs(device), with_value=False)
        for episode in tracker.step(action_distribution(output.policy).sample()).episodes:
            if quota[episode.env] > 0:
                quota[episode.env] -= 1
                returns.append(episode.episodic_return)
    envs.close()
    return np.array(returns)


def evaluate(agent: Agent, args, sets: dict[str, dict], device, run_dir: Path, step: int) -> dict:
    """Plays --eval-episodes on each of the sets of levels. Prints the results, stores and returns them."""
    results = {"global_step": step, "seed": args.seed, "episodes": args.eval_episodes, "level_sets": sets}
    for name, levels in sets.items():
        envs = make_envs(args, num_envs=min(args.num_envs, args.eval_episodes), levels=levels)
        returns = play(agent, envs, args.eval_episodes, args.seed + 10**6, device)
        error = float(returns.std(ddof=1)) / len(returns) ** 0.5 if len(returns) > 1 else None
        mean = float(returns.mean())
        results[f"{name}_return"] = mean
        results[f"{name}_standard_error"] = error
        results[f"{name}_normalized_return"] = normalized_return(args, mean)
    print(json.dumps(results, indent=2))
    path = run_dir / "evaluations.jsonl"
    try:
        append_row(path, results)
    except OSError as error:
        say(f"the evaluation is not stored in {path}: {error.strerror}")
    return results


def record_video(agent: Agent, args: argparse.Namespace, device, run_dir: Path, step: int) -> None:
    """Films an episode at 512 x 512: videos/step{step}-seed{seed}-00000.mp4."""
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # the film's writer uses it
    film = {"directory": str(run_dir / "videos"), "prefix": f"step{step}-seed{args.seed}-"}
    envs = make_envs(args, num_envs=1, film=film)
    play(agent, envs, 1, args.seed + 2 * 10**6, device)
    say(f"filmed an episode: {run_dir}/videos")


def load_agent(run_dir: str, device="cpu") -> Agent:
    """The agent of a run's checkpoint."""
    saved = load_checkpoint(run_dir)
    args = argparse.Namespace(**saved["args"])
    envs = make_envs(args, num_envs=1)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.arch, args.precision)
    load_state("agent", agent, saved["modules"], run_dir)
    return agent.to(device)


def evaluate_run(args: argparse.Namespace) -> None:
    """--evaluate: plays the checkpoint of a run, and adds a line to its evaluations.jsonl."""
    device = start_process(args)
    saved = load_checkpoint(args.evaluate)
    step = saved["run"]["global_step"]
    agent = load_agent(args.evaluate, device)
    run_dir = Path(args.evaluate)
    if args.eval_episodes:
        evaluate(agent, args, level_sets(args, saved["args"]), device, run_dir, step)
    if args.capture_video:
        record_video(agent, args, device, run_dir, step)


# ---- main ------------------------------------------------------------------------------------------
def stop(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt(signum)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for signum in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the first
        signal.signal(signum, stop)
    try:
        if args.evaluate is None:
            train(args)
        else:
            evaluate_run(args)
    except KeyboardInterrupt as interrupt:
        sys.stdout.flush()
        (signum,) = interrupt.args or (signal.SIGINT,)
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)  # the shell that started this learns that a signal ended it
    except OSError as error:
        if error.errno is None:  # not the system's, but of a changed copy
            raise
        place = error.filename or args.resume or args.evaluate or args.runs_dir  # a full disk's names no file
        fail(f"{place}: {error.strerror}", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

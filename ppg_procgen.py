"""Phasic Policy Gradient (PPG) on Procgen, in one file.

Cobbe, Hilton, Klimov, Schulman 2020, arXiv 2009.04416. A policy and a value function that share a network
disturb each other; in two networks, neither learns features for the other. PPG trains two as PPO does, then
distils the values into the policy network, while a KL term holds the policy in place.

Algorithm 1 of the paper, and the function that does it:
    for phase = 1, 2, ...                                                      train
        for iteration = 1 .. N_pi                                              (policy phase)
            perform rollouts under the current policy pi                       collect_rollout
            compute the value targets and the advantages                       compute_gae
            E_pi epochs of L_clip + beta_S S[pi], E_V epochs of L_value        policy_update
        store pi_old(. | s) for every state s of the phase                     auxiliary_phase
        E_aux epochs of L_joint = L_aux + beta_clone KL[pi_old, pi], L_value   auxiliary_phase

Shapes: N environments per process, T steps of a rollout, A actions, B samples. A segment is what one
environment does in one rollout, T steps; minibatches are made of whole segments, S = N_pi x N in a phase.
The lesson ends with `train`; below it stands what makes it practical. Run `python ppg_procgen.py --track`;
PPO is `--arch shared --e-policy 3 --e-value 3 --e-auxiliary 0`; `--help` lists all flags.

Departures from the paper (P) and the original code (O), github.com/openai/phasic-policy-gradient:
 1. O: under --arch detach the auxiliary phase's value loss reaches the trunk, as in P; O stops it always.
 2. P: rewards are divided by the standard deviation of a return of discount 0.99, not gamma, and clipped, as
    in O. Over several processes the returns are pooled; O averages the variances of the processes.
 3. P: initial weights are rescaled to fixed norms; advantages are normalised over the rollout; as in O.
 4. P: minibatches are whole segments; one Adam takes both losses if E_pi = E_V, else values first; as in O.
 5. P: the penalty of the KL variant is the estimate 0.5 E[log-ratio^2], as in O.
 6. P, O: trunks run in bfloat16 where that is fast, on a GPU in the auxiliary phase alone (--precision).
 7. O: the number of iterations is rounded down, and every full phase ends with its auxiliary phase; O rounds
    up, and skips the auxiliary phase once the steps are used up.
 8. P, O: minibatches of more than --steps-per-pass steps pass through the network in parts.
"""

import argparse
import ctypes
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
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
from torch.distributions import Categorical, kl_divergence
from tqdm import tqdm

gym_notices.notices.notices.clear()  # or gym prints a page about its successor
import gym
from gym3 import VideoRecorderWrapper
from procgen import ProcgenGym3Env

try:
    import fcntl
    import resource
except ImportError:  # Windows: no lock on the run directory, no peak memory in the summary
    fcntl = resource = None

torch.distributions.Distribution.set_default_validate_args(False)  # it synchronises a GPU at every call
RANK = int(os.environ.get("RANK", "0"))  # these four are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))

RETURN_RANGES = {  # R_min, R_max: easy, then hard (Cobbe et al. 2019, arXiv 1912.01588, appendix C)
    "bigfish": (1, 40, 0, 40), "bossfight": (0.5, 13, 0.5, 13), "caveflyer": (3.5, 12, 2, 13.4),
    "chaser": (0.5, 13, 0.5, 14.2), "climber": (2, 12.6, 1, 12.6), "coinrun": (5, 10, 5, 10),
    "dodgeball": (1.5, 19, 1.5, 19), "fruitbot": (-1.5, 32.4, -0.5, 27.2), "heist": (3.5, 10, 2, 10),
    "jumper": (3, 10, 1, 10), "leaper": (3, 10, 1.5, 10), "maze": (5, 10, 4, 10),
    "miner": (1.5, 13, 1.5, 20), "ninja": (3.5, 10, 2, 10), "plunder": (4.5, 30, 3, 30),
    "starpilot": (2.5, 64, 1.5, 35)}  # fmt: skip


# ---- flags -----------------------------------------------------------------------------------------
def number(text: str, kind: type = float, low: float = 0, high: float = 2e9) -> float:
    """The value of a flag: an int (1e6 is one too) or a float in [low, high]."""
    with suppress(ValueError):
        value = float(text)
        if low <= value <= high and value == kind(value):  # a NaN is refused by the first
            return kind(value)
    name = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"must be {name} from {low:g} to {high:g}, not {text}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: the process's own). Bad input ends it with a sentence and exit status 2."""
    show_defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(allow_abbrev=False, formatter_class=show_defaults)
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
    add("--eval-episodes", type=count, default=100, help="episodes of an evaluation, on each level set")

    add = parser.add_argument_group("environment").add_argument
    add("--env-id", choices=RETURN_RANGES, default="starpilot", metavar="GAME", help=", ".join(RETURN_RANGES))
    add("--distribution-mode", choices=("easy", "hard"), default="easy", help="kind of levels")
    add("--num-levels", type=count_or_0, default=0, help="training levels; 0 = all")
    add("--start-level", type=count_or_0, default=0, help="the first of them; unused if they are all")
    add("--num-envs", type=count, default=64, help="N: environments per process")
    add("--env-threads", type=count, default=4, help="simulator threads per process")
    add("--total-timesteps", type=count, default=25_000_000, help="steps of all processes together")

    add = parser.add_argument_group("policy phase").add_argument
    add("--arch", choices=("dual", "detach", "shared"), default="dual", help="two networks; one; PPO's one")
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
    add("--target-kl", type=number, help="no more policy epochs (of both, if one Adam) past this approx_kl")

    add = parser.add_argument_group("auxiliary phase").add_argument
    add("--e-auxiliary", type=count_or_0, default=6, help="E_aux: epochs; 0 = no auxiliary phase")
    add("--beta-clone", type=number, default=1.0, help="beta_clone: weight of KL[pi_old, pi]")
    add("--aux-vf-coef", type=number, default=1.0, help="weight of the value head's loss")
    add("--aux-learning-rate", type=number, default=5e-4, help="Adam step size of the auxiliary phase")
    add("--num-aux-rollouts", type=count, default=4, help="segments (T steps each) in a minibatch")

    add = parser.add_argument_group("system").add_argument
    add("--precision", choices=("auto", "bf16", "bf16-aux", "fp32"), default="auto", help="uses of bfloat16")
    add("--steps-per-pass", type=count_or_0, default=0, help="bounds the memory of activations; 0 = auto")
    add("--aux-buffer-device", choices=("auto", "cpu"), default="auto", help="home of observations")

    args = parser.parse_args(argv)
    if args.resume is not None or args.evaluate is not None:
        args = with_flags_of_run(args, parser, argv)
    iteration_steps = args.num_envs * args.num_steps * WORLD_SIZE
    if args.num_envs % args.num_minibatches:
        parser.error(f"--num-minibatches must divide --num-envs, {args.num_envs}")
    if args.total_timesteps < iteration_steps:
        parser.error(f"--total-timesteps must be at least one rollout, {iteration_steps} steps")
    if args.e_auxiliary and args.num_envs * args.n_iteration % args.num_aux_rollouts:
        parser.error(f"--num-aux-rollouts must divide N x N_pi, {args.num_envs * args.n_iteration}")
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
    logits: Tensor | None  # [B, A]: of the policy
    aux_values: Tensor | None  # [B]: of the auxiliary value head, on the policy's trunk
    values: Tensor | None  # [B]: of the value head


class Agent(nn.Module):
    """The policy, the value function and the auxiliary value function (paper, section 2)."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, arch: str, precision: str = "fp32"):
        super().__init__()
        self.arch = arch
        self.precision = precision
        num_features = 256
        self.policy_trunk = impala_trunk(obs_space.shape, num_features)
        self.value_trunk = self.policy_trunk
        if arch == "dual":
            self.value_trunk = impala_trunk(obs_space.shape, num_features)
        self.policy_head = normed(nn.Linear(num_features, int(action_space.n)), 0.1)
        self.value_head = normed(nn.Linear(num_features, 1), 0.1)
        self.aux_value_head = normed(nn.Linear(num_features, 1), 0.1)
        self.to(memory_format=torch.channels_last)

    def forward(self, obs: Tensor, *, auxiliary_phase=False, with_policy=True, with_value=True) -> Output:
        """obs [B, H, W, C] uint8. Computes only what the requested outputs need."""
        bf16 = self.precision == "bf16" or (self.precision == "bf16-aux" and auxiliary_phase)
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=bf16):
            # Permuted NHWC is channels_last NCHW already. A contiguous copy would halve the speed.
            images = obs.permute(0, 3, 1, 2).to(torch.bfloat16 if bf16 else torch.float32) / 255
            if with_policy or self.arch != "dual":
                policy_features = self.policy_trunk(images).float()
                value_features = policy_features  # of the one trunk, unless there are two
            if with_value and self.arch == "dual":
                value_features = self.value_trunk(images).float()
        logits = aux_values = values = None
        if with_policy:
            logits = self.policy_head(policy_features)
            aux_values = self.aux_value_head(policy_features).squeeze(-1)
        if with_value:
            if self.arch == "detach" and not auxiliary_phase:
                value_features = value_features.detach()  # not so in the auxiliary phase: departure 1
            values = self.value_head(value_features).squeeze(-1)
        return Output(logits, aux_values, values)


# ---- environments ----------------------------------------------------------------------------------
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


def make_envs(args: argparse.Namespace, *, num_envs: int, num_levels: int, film: dict | None = None):
    """The environments of training, evaluation and film: the one place that knows Procgen.

    Needed is a gym.vector.VectorEnv of uint8 images [N, H, W, C] and discrete actions that begins the next
    episode in the step that ends one. With get_state() and set_state(state), a resumed run is exact.
    """
    options = {"env_name": args.env_id, "distribution_mode": args.distribution_mode}
    options |= {"num_levels": num_levels, "start_level": args.start_level, "num_threads": args.env_threads}
    return ProcgenVecEnv(num_envs, film, **options)


class EpisodeTracker:
    """Environments between two steps: what they show, and the return and length of each running episode."""

    def __init__(self, envs: gym.vector.VectorEnv, seed: int):
        self.envs = envs
        self.obs = torch.from_numpy(envs.reset(seed=seed)[0])  # [N, H, W, C] uint8
        assert self.obs.dtype == torch.uint8 and self.obs.ndim == 4, "observations must be bytes [N, H, W, C]"
        self.returns = torch.zeros(envs.num_envs, dtype=torch.float64)  # undiscounted, as the game gives them
        self.lengths = torch.zeros(envs.num_envs, dtype=torch.long)  # 0: the observation opens an episode

    def step(self, actions: Tensor) -> tuple[Tensor, list[tuple[int, float, int]]]:
        """actions [N] -> rewards [N], and (environment, return, length) of the episodes that ended."""
        obs, rewards, terminated, truncated, _ = self.envs.step(actions.cpu().numpy())
        self.obs = torch.from_numpy(obs)
        # Both end an episode; Procgen never truncates. For a suite that does, return `truncated` too, and let
        # `train` add gamma x V(final observation) to such a step's reward, once the rewards are normalised.
        done = torch.from_numpy(np.logical_or(terminated, truncated))
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        self.returns += rewards
        self.lengths += 1
        ended = [(i, self.returns[i].item(), self.lengths[i].item()) for i in done.nonzero()[:, 0].tolist()]
        self.returns[done] = 0
        self.lengths[done] = 0
        return rewards, ended


class RewardNormalizer(nn.Module):
    """Divides rewards by the standard deviation of their discounted return (O: reward_normalizer.py)."""

    def __init__(self, num_envs: int, gamma: float, clip: float):
        super().__init__()
        self.gamma = gamma
        self.clip = clip
        self.register_buffer("returns", torch.zeros(num_envs, dtype=torch.float64))  # R_{t-1} of this process
        # Of all R_t of all processes: number, sum and sum of squares, as if 1e-4 of them had variance 1.
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
def compute_gae(*, rewards: Tensor, values: Tensor, firsts: Tensor, gamma: float, gae_lambda: float) -> tuple:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards [N, T]: of the step from s_t. values [N, T+1]: V(s_t), the last column bootstraps.
    firsts [N, T+1]: 1 where s_t opens an episode, so nothing is carried across it.
    Returns advantages and value targets, each [N, T].
    """
    assert values.shape == firsts.shape == (rewards.shape[0], rewards.shape[1] + 1)
    advantages = torch.empty_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        goes_on = 1 - firsts[:, t + 1]
        delta = rewards[:, t] + gamma * goes_on * values[:, t + 1] - values[:, t]
        advantage = delta + gamma * gae_lambda * goes_on * advantage
        advantages[:, t] = advantage
    return advantages, advantages + values[:, :-1]


def policy_loss(*, logits, actions, old_log_probs, advantages, clip_coef: float, kl_coef: float) -> tuple:
    """PPO's surrogate, clipped unless clip_coef is 0, and the penalty of the KL variant (departure 5).

    logits [B, A], all else [B]. Returns the loss and metrics. KL estimates: joschu.net/blog/kl-approx.html.
    """
    assert actions.shape == old_log_probs.shape == advantages.shape == logits.shape[:1]
    pi = Categorical(logits=logits)
    log_ratio = pi.log_prob(actions) - old_log_probs
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    if clip_coef > 0:
        surrogate = torch.min(surrogate, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    loss = -surrogate.mean() + kl_coef * 0.5 * log_ratio.square().mean()
    return loss, {
        "losses/policy_loss": loss,
        "losses/entropy": pi.entropy().mean(),
        "losses/approx_kl": (ratio - 1 - log_ratio).mean(),
        "losses/old_approx_kl": -log_ratio.mean(),
        "losses/clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }


# ---- phases ----------------------------------------------------------------------------------------
class Rollout(NamedTuple):  # rewards and firsts are on the host, the rest on the device
    observations: Tensor  # [N, T, H, W, C] uint8: s_t, in the phase's buffer, which may be on the host
    actions: Tensor  # [N, T] int64: a_t
    log_probs: Tensor  # [N, T]: log pi(a_t | s_t)
    values: Tensor  # [N, T+1]: V(s_t)
    rewards: Tensor  # [N, T]: of the step from s_t
    firsts: Tensor  # [N, T+1]: 1 where s_t opens an episode
    episodes: list[tuple[int, float, int]]  # step, return and length of those that ended


@torch.no_grad()
def collect_rollout(agent: Agent, tracker: EpisodeTracker, observations: Tensor, device) -> Rollout:
    """Plays T steps from where `tracker` is, and writes what it sees to observations [N, T, H, W, C]."""
    num_envs, num_steps = observations.shape[:2]
    actions = torch.empty((num_envs, num_steps), dtype=torch.long, device=device)
    log_probs = torch.empty((num_envs, num_steps), device=device)
    values = torch.empty((num_envs, num_steps + 1), device=device)
    rewards = torch.empty((num_envs, num_steps))
    firsts = torch.empty((num_envs, num_steps + 1))
    episodes = []
    for t in range(num_steps):
        observations[:, t] = tracker.obs
        firsts[:, t] = tracker.lengths == 0
        output = agent(observations[:, t].to(device))
        pi = Categorical(logits=output.logits)
        actions[:, t] = pi.sample()
        log_probs[:, t] = pi.log_prob(actions[:, t])
        values[:, t] = output.values
        rewards[:, t], ended = tracker.step(actions[:, t])
        episodes += [(t, episode_return, length) for _, episode_return, length in ended]
    firsts[:, -1] = tracker.lengths == 0
    values[:, -1] = agent(tracker.obs.to(device), with_policy=False).values
    return Rollout(observations, actions, log_probs, values, rewards, firsts, episodes)


def optimizer_step(optimizer, loss_function: Callable, passes: Iterable, max_grad_norm: float = 0) -> list:
    """A step on a minibatch's mean loss; `passes`: its parts, (share of it, batch). Returns their metrics."""
    metrics_of_passes = []
    optimizer.zero_grad()
    for share, batch in passes:
        loss, metrics = loss_function(batch)
        (share * loss).backward()
        metrics_of_passes.append((share, {name: value.detach() for name, value in metrics.items()}))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if WORLD_SIZE > 1 and parameter.grad is not None:
            sum_over_processes(parameter.grad).div_(WORLD_SIZE)
    if max_grad_norm > 0:
        nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return metrics_of_passes


def policy_phase_loss(batch: dict, *, agent: Agent, losses: str, args) -> tuple[Tensor, dict]:
    """The loss of an epoch, and metrics. losses: "policy", "value" or "policy_and_value"."""
    learn_policy = losses != "value"
    learn_value = losses != "policy"
    output = agent(batch["obs"], with_policy=learn_policy, with_value=learn_value)
    loss = 0
    metrics = {}
    if learn_policy:
        surrogate_loss, metrics = policy_loss(
            logits=output.logits,
            actions=batch["actions"],
            old_log_probs=batch["old_log_probs"],
            advantages=batch["advantages"],
            clip_coef=args.clip_coef,
            kl_coef=args.kl_coef,
        )
        loss = loss + surrogate_loss - args.ent_coef * metrics["losses/entropy"]
    if learn_value:
        value_loss = args.vf_coef * F.mse_loss(output.values, batch["targets"])
        loss = loss + value_loss
        metrics["losses/value_loss"] = value_loss
    return loss, metrics


def policy_update(agent: Agent, optimizers, rollout, advantages: Tensor, targets: Tensor, args) -> dict:
    """The epochs of one iteration over its rollout; advantages and value targets [N, T]. Returns metrics."""
    mean, variance = mean_and_variance(global_sums(advantages))
    data = {
        "obs": rollout.observations,
        "actions": rollout.actions,
        "old_log_probs": rollout.log_probs,
        "advantages": ((advantages - mean) / (variance.sqrt() + 1e-8)).float(),
        "targets": targets,
    }
    totals = {}
    epochs = ["value"] * args.e_value + ["policy"] * args.e_policy
    if args.e_policy == args.e_value:  # one Adam takes both losses: departure 4
        epochs = ["policy_and_value"] * args.e_policy
    for losses in epochs:
        epoch_totals = {}
        loss_function = partial(policy_phase_loss, agent=agent, losses=losses, args=args)
        # Minibatches are whole environments, not shuffled steps: one contiguous copy each (departure 4).
        for minibatch in torch.randperm(args.num_envs).split(args.num_envs // args.num_minibatches):
            passes = batches(data, minibatch, args.steps_per_pass, targets.device)
            metrics = optimizer_step(optimizers[losses], loss_function, passes, args.max_grad_norm)
            add_metrics(epoch_totals, metrics)
            add_metrics(totals, metrics)
        checks_kl = args.target_kl is not None and losses != "value"
        if checks_kl and mean_metrics(epoch_totals)["losses/approx_kl"] > args.target_kl:
            break
    error_variance = (targets - rollout.values[:, :-1]).var(correction=0)
    explained_variance = 1 - error_variance / targets.var(correction=0).clamp_min(1e-8)
    totals["losses/explained_variance"] = (explained_variance, 1)
    return mean_metrics(totals)


def auxiliary_phase_loss(batch: dict, *, agent: Agent, args: argparse.Namespace) -> tuple[Tensor, dict]:
    """L_joint + L_value of the paper, and their terms."""
    output = agent(batch["obs"], auxiliary_phase=True)
    aux_value_loss = 0.5 * F.mse_loss(output.aux_values, batch["targets"])
    old_policy = Categorical(logits=batch["old_logits"])
    kl_loss = kl_divergence(old_policy, Categorical(logits=output.logits)).mean()  # KL[pi_old, pi], nats
    joint_loss = aux_value_loss + args.beta_clone * kl_loss
    value_loss = 0.5 * F.mse_loss(output.values, batch["targets"])
    return joint_loss + args.aux_vf_coef * value_loss, {
        "losses/aux/kl_loss": kl_loss,
        "losses/aux/aux_value_loss": aux_value_loss,
        "losses/aux/real_value_loss": value_loss,
    }


def auxiliary_phase(agent: Agent, optimizer, observations: Tensor, targets: Tensor, args) -> dict[str, float]:
    """The epochs over a phase's segments: observations [S, T, H, W, C], targets [S, T]. Returns metrics."""
    num_segments, num_steps = targets.shape
    data = {"obs": observations, "targets": targets}
    old_logits = []
    with torch.no_grad():  # in the precision and batch size of the updates, so that the first KL is 0
        for minibatch in torch.arange(num_segments).split(args.num_aux_rollouts):
            for _, batch in batches(data, minibatch, args.steps_per_pass, targets.device):
                old_logits.append(agent(batch["obs"], auxiliary_phase=True, with_value=False).logits)
    data["old_logits"] = torch.cat(old_logits).view(num_segments, num_steps, -1)
    totals = {}
    loss_function = partial(auxiliary_phase_loss, agent=agent, args=args)
    epochs = torch.cat([torch.randperm(num_segments) for _ in range(args.e_auxiliary)])
    minibatches = epochs.split(args.num_aux_rollouts)
    for minibatch in show_progress(minibatches, desc="auxiliary phase: ", unit="update"):
        passes = batches(data, minibatch, args.steps_per_pass, targets.device)
        add_metrics(totals, optimizer_step(optimizer, loss_function, passes))
    return mean_metrics(totals)


# ---- training --------------------------------------------------------------------------------------
def train(args: argparse.Namespace, make_envs: Callable = make_envs) -> dict:
    """Algorithm 1 in the environments that `make_envs` makes. Returns the summary of the run."""
    device, precision = start_process(args)
    envs = make_envs(args, num_envs=args.num_envs, num_levels=args.num_levels)
    tracker = EpisodeTracker(envs, seed=args.seed + 10_000 * RANK)  # each process draws levels of its own
    reward_normalizer = RewardNormalizer(args.num_envs, args.reward_norm_gamma, args.reward_clip)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args.arch, precision).to(device)
    adam = partial(torch.optim.Adam, list(agent.parameters()), eps=args.adam_eps)
    optimizers = {name: adam(lr=args.learning_rate) for name in ("policy_and_value", "policy", "value")}
    optimizers["auxiliary"] = adam(lr=args.aux_learning_rate)
    # What is saved: a module beside the agent, too, belongs here, or below if it differs between processes.
    modules = {"agent": agent, **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}}
    modules_per_process = {"reward_normalizer": reward_normalizer}

    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps * WORLD_SIZE)
    num_rollouts = min(args.n_iteration, num_iterations) if args.e_auxiliary else 1  # PPO keeps one
    observations = allocate_observations(num_rollouts, envs.single_observation_space.shape, device, args)
    args.steps_per_pass = args.steps_per_pass or choose_steps_per_pass(device)

    with Run(args, modules, modules_per_process, tracker, device) as run:
        while run.iteration < num_iterations:
            # A resumed run, or one that evaluates between its phases, draws the same numbers as any other.
            torch.manual_seed(int(np.random.SeedSequence((args.seed, RANK, run.phase)).generate_state(1)[0]))
            phase_iterations = min(args.n_iteration, num_iterations - run.iteration)
            phase_targets = []
            for i in range(phase_iterations):  # policy phase
                lr_fraction = 1 - run.iteration / num_iterations if args.anneal_lr else 1.0
                for optimizer in optimizers.values():
                    for group in optimizer.param_groups:
                        group.setdefault("initial_lr", group["lr"])
                        group["lr"] = lr_fraction * group["initial_lr"]
                with run.timed("rollout"):
                    rollout = collect_rollout(agent, tracker, observations[i % num_rollouts], device)
                with run.timed("policy_phase"):
                    advantages, targets = compute_gae(
                        rewards=reward_normalizer(rollout.rewards, rollout.firsts[:, :-1]),
                        values=rollout.values.cpu(),
                        firsts=rollout.firsts,
                        gamma=args.gamma,
                        gae_lambda=args.gae_lambda,
                    )
                    targets = targets.to(device)
                    phase_targets.append(targets)
                    metrics = policy_update(agent, optimizers, rollout, advantages.to(device), targets, args)
                metrics["charts/learning_rate"] = lr_fraction * args.learning_rate
                run.log_iteration(metrics, rollout.episodes)
            if args.e_auxiliary and phase_iterations == args.n_iteration:
                with run.timed("auxiliary_phase"):
                    segments = (observations.flatten(0, 1), torch.cat(phase_targets))
                    metrics = auxiliary_phase(agent, optimizers["auxiliary"], *segments, args)
                run.log(metrics)
            run.end_phase(make_envs)  # evaluation, film, checkpoint: what is due
        return run.finish()


# ---- below the lesson: minibatches, processes, devices ---------------------------------------------
def batches(data: dict, segments: Tensor, steps_per_pass: int, device) -> Iterator[tuple[float, dict]]:
    """Parts of chosen segments of `data` [S, T, ...]: (share, [B, ...] on device), B <= steps_per_pass."""
    parts = {}
    for name, tensor in data.items():  # a copy per segment: an index tensor makes the host wait
        steps = torch.cat([tensor[i].to(device, non_blocking=True) for i in segments.tolist()])
        parts[name] = steps.split(steps_per_pass)
    for tensors in zip(*parts.values()):
        yield len(tensors[0]) / len(steps), dict(zip(parts, tensors))


def add_metrics(totals: dict, passes: list[tuple[float, dict[str, Tensor]]]) -> None:
    """Adds passes to {name: (sum, weight)}: kept one by one, small tensors would fragment a CPU's heap."""
    for share, metrics in passes:
        for name, value in metrics.items():
            total, weight = totals.get(name, (0, 0))
            totals[name] = (total + share * value, weight + share)


def mean_metrics(totals: dict[str, tuple[Tensor, float]]) -> dict[str, float]:
    """Means over passes, by their shares, and over processes. It waits for the device."""
    means = torch.stack([total / weight for total, weight in totals.values()])
    return dict(zip(totals, (sum_over_processes(means) / WORLD_SIZE).tolist()))


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


def gather_objects(thing: object) -> list:
    things = [thing] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(things, thing)
    return things


def say(text: str, rank: int = RANK) -> None:
    if rank == 0:
        tqdm.write(text, file=sys.stderr)


def fail(message: str, status: int = 2) -> NoReturn:
    say(f"error: {message}", LOCAL_RANK)  # once on every node
    sys.exit(status)


def start_process(args: argparse.Namespace) -> tuple[torch.device, str]:
    """Joins the processes that torchrun started. Returns the device, and the precision that suits it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc is to keep freed memory. Unmapped, large activations cost page faults: half the time on a CPU.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    device = torch.device("cpu")
    capabilities = torch.cpu.get_capabilities()
    fast = "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    if args.cuda and torch.cuda.is_available():
        if LOCAL_WORLD_SIZE > torch.cuda.device_count():
            fail(f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPUs: lower --nproc-per-node")
        device = torch.device("cuda", LOCAL_RANK)
        fast = "bf16-aux" if torch.cuda.is_bf16_supported(False) else "fp32"
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = args.torch_deterministic
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # NCCL on GPUs, gloo on hosts. The others wait while rank 0 evaluates, however long that takes.
        dist.init_process_group(timeout=timedelta(days=365))
    torch.manual_seed(args.seed)  # of the networks: the same in all processes
    return device, fast if args.precision == "auto" else args.precision


def allocate_observations(num_rollouts: int, image_shape: tuple, device: torch.device, args) -> Tensor:
    """[num_rollouts, N, T, *image_shape] uint8 on the GPU or on the host, pinned for a GPU."""
    shape = (num_rollouts, args.num_envs, args.num_steps, *image_shape)
    bytes_needed = math.prod(shape)
    say(f"the observations of a phase take {bytes_needed / 1e9:.2f} GB in each process")
    if device.type == "cuda":
        room = 0.8 * torch.cuda.mem_get_info(device)[0]  # the rest is for activations
        if args.aux_buffer_device == "auto" and bytes_needed <= room:
            return torch.empty(shape, dtype=torch.uint8, device=device)
    # Zeros take the memory now, not in the middle of a phase.
    return torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")


def choose_steps_per_pass(device: torch.device) -> int:
    """512 on a CPU, no faster with more; on a GPU half of the free memory, at an estimated 5 MB a step."""
    return max(512, torch.cuda.mem_get_info(device)[0] // 10_000_000) if device.type == "cuda" else 512


# ---- below the lesson: the flags of a run, its directory, checkpoints, progress --------------------
CHECKPOINT_FORMAT = 3
FREE_FLAGS = (  # those that do not change what is learned: they may differ beside --resume and --evaluate
    "resume", "evaluate", "total_timesteps", "cuda", "track", "wandb_project_name", "wandb_entity",
    "capture_video", "runs_dir", "checkpoint_interval", "eval_interval", "eval_episodes", "env_threads",
    "steps_per_pass", "aux_buffer_device")  # fmt: skip
# A bar, if there is a terminal. A second one stands below the first, and goes when it is done.
show_progress = partial(tqdm, leave=None, smoothing=0, miniters=0, disable=RANK > 0 or None)


def load_checkpoint(run_dir: str) -> dict:
    path = Path(run_dir, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (a damaged file may raise anything)
        fail(f"{path} is missing, damaged or not a checkpoint ({type(error).__name__})")
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        fail(f"{path} is not a checkpoint of this version of the script")
    return checkpoint


def with_flags_of_run(args: argparse.Namespace, parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    """The flags of the run that --resume or --evaluate names, with those beside it that may differ."""
    flag = "evaluate" if args.resume is None else "resume"
    run_dir = str(Path(getattr(args, flag).removesuffix("checkpoint.pt")))
    saved = load_checkpoint(run_dir)
    parser.set_defaults(**saved["args"] | {"resume": None, "evaluate": None})
    flags = parser.parse_args(argv)
    setattr(flags, flag, run_dir)
    free = FREE_FLAGS if flag == "resume" else (*FREE_FLAGS, "seed")
    for name, value in saved["args"].items():
        if name not in args:
            fail(f"{run_dir} has a flag that this script lacks, {name}: use the script kept there")
        if name not in free and getattr(flags, name) != value:
            fail(f"leave out --{name.replace('_', '-')}: the run in {run_dir} has {value}")
    processes = len(saved["processes"])
    steps = saved["run"]["global_step"]
    if flag == "resume" and (WORLD_SIZE != processes or flags.total_timesteps < steps):
        fail(f"{run_dir} goes on with {processes} processes and a --total-timesteps of at least {steps}")
    return flags


def normalized_return(args: argparse.Namespace, episodic_return: float) -> float | None:
    if args.env_id not in RETURN_RANGES:
        return None
    easy_low, easy_high, hard_low, hard_high = RETURN_RANGES[args.env_id]
    low, high = (easy_low, easy_high) if args.distribution_mode == "easy" else (hard_low, hard_high)
    return (episodic_return - low) / (high - low)


class Run(AbstractContextManager):
    """What a run counts, shows and writes, by rank 0 alone, to a directory that it keeps locked."""

    def __init__(self, args, modules: dict, modules_per_process: dict, tracker: EpisodeTracker, device):
        self.args = args
        self.modules = modules
        self.modules_per_process = modules_per_process
        self.networks = nn.ModuleList(module for module in modules.values() if isinstance(module, nn.Module))
        self.tracker = tracker
        self.device = device
        self.phase = 0
        self.iteration = 0
        self.global_step = 0
        self.episodes = 0
        self.recent = []  # the last 100 episodes
        self.charts = dict.fromkeys(("episodic_return", "episodic_length", "normalized_return", "SPS"))
        self.seconds = dict.fromkeys(("rollout", "policy_phase", "auxiliary_phase", "evaluation", "total"), 0)
        self.iteration_steps = args.num_envs * args.num_steps * WORLD_SIZE
        self.total_steps = args.total_timesteps // self.iteration_steps * self.iteration_steps
        self.row = {}  # of the iteration that is under way
        self.checkpoint_step = None
        self.wandb = None
        if WORLD_SIZE > 1:  # a copy may draw random numbers before it makes its networks
            for tensor in self.networks.state_dict().values():
                dist.broadcast(tensor, 0)
        if args.resume is not None:
            self.restore(load_checkpoint(args.resume))
        if RANK == 0:
            self.open_directory()
        self.started = time.perf_counter() - self.seconds["total"]
        self.bar = show_progress(total=self.total_steps, initial=self.global_step, unit="step")

    def __exit__(self, kind, error, traceback) -> None:
        if RANK == 0 and kind not in (None, SystemExit):  # fail() has given its reason
            say(f"stopped at step {self.global_step}; last checkpoint: {self.checkpoint_step or 'none'}")
            if self.checkpoint_step:  # flags beside --resume may be those of the run
                say(f"to go on from there, give the same command and --resume '{self.directory}'")
        self.write_row()
        self.bar.close()
        if RANK == 0:
            self.lock.close()
            if kind is OSError:  # a full disk: subclasses have other reasons
                fail(str(error), 1)

    def open_directory(self) -> None:
        args = self.args
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.directory = Path(args.resume or Path(args.runs_dir, name))
        if args.resume is None:
            self.directory.mkdir(parents=True)  # refuses one that another run has made in this second
            shutil.copy(__file__, self.directory)
        self.lock = open(self.directory / "metrics.jsonl", "a")  # noqa: SIM115 (as long as the process)
        try:
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is writing to {self.directory}: wait for it, or end it")
        config = {"flags": vars(args), "command_line": sys.argv, "processes": WORLD_SIZE}
        config |= {"device": str(self.device), "precision": self.modules["agent"].precision}
        config |= {lib.__name__: lib.__version__ for lib in (torch, np, gym)} | {"python": sys.version}
        (self.directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        phase_steps = args.n_iteration * self.iteration_steps
        steps = f"{self.total_steps} of {args.total_timesteps} steps fill iterations, {phase_steps} a phase"
        say(f"writing to {self.directory}: {steps}, {args.checkpoint_interval * phase_steps} a checkpoint")
        if args.resume is not None:
            path = self.directory / "metrics.jsonl"
            rows = path.read_text().splitlines(keepends=True)
            past = [row for row in rows if row[-1] == "\n" and json.loads(row)["iteration"] <= self.iteration]
            path.write_text("".join(past))
            counts = f"{len(past)} of {self.iteration} rows; {len(rows) - len(past)} later ones are dropped"
            say(f"going on from step {self.global_step} of {self.total_steps} with {counts}")
        if args.track:
            import wandb

            name = self.directory.resolve().name
            options = {"project": args.wandb_project_name, "entity": args.wandb_entity, "config": vars(args)}
            options |= {"dir": self.directory, "resume": "allow", "save_code": True}
            self.wandb = wandb.init(id=name, name=name, **options)

    def restore(self, saved: dict) -> None:
        """Everything as it was at the checkpoint; open_directory() drops later rows, for they come again."""
        vars(self).update(saved["run"])
        self.checkpoint_step = self.global_step
        process = saved["processes"][RANK]
        states = saved["modules"] | process["modules"]
        for name, module in (self.modules | self.modules_per_process).items():
            if name not in states:
                fail(f"the checkpoint in {self.args.resume} lacks {name!r}: another script wrote it")
            module.load_state_dict(states[name])
        if process["envs"] is None:
            say("these environments have no get_state: they start anew")
        else:
            self.tracker.envs.set_state(process["envs"])
            vars(self.tracker).update(process["tracker"])

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def log_iteration(self, metrics: dict[str, float], episodes: list[tuple[int, float, int]]) -> None:
        """Begins the row of an iteration, in which these episodes ended."""
        self.write_row()
        ended = sorted((x for each in gather_objects(episodes) for x in each), key=lambda x: x[0])  # by step
        self.iteration += 1
        self.global_step += self.iteration_steps
        self.episodes += len(ended)
        self.recent = (self.recent + ended)[-100:]
        if self.recent:
            _, mean_return, mean_length = np.mean(self.recent, axis=0).tolist()
            self.charts |= {"episodic_return": mean_return, "episodic_length": mean_length}
            self.charts["normalized_return"] = normalized_return(self.args, mean_return)
        self.row = {name: getattr(self, name) for name in ("iteration", "phase", "global_step", "episodes")}
        self.log(metrics)
        self.bar.set_postfix(self.charts, refresh=False)
        self.bar.update(self.iteration_steps)
        if self.bar.disable:
            say(f"step {self.global_step} of {self.total_steps}: {self.bar.postfix}")

    def log(self, metrics: dict[str, float | None]) -> None:
        """Adds metrics, whatever their names, to the row of the iteration."""
        self.seconds["total"] = time.perf_counter() - self.started
        self.charts["SPS"] = self.global_step / (self.seconds["total"] - self.seconds["evaluation"])
        self.row |= {f"charts/{name}": value for name, value in self.charts.items()}
        self.row |= {f"time/{name}": value for name, value in self.seconds.items()}
        self.row |= {name: value if value is None else float(value) for name, value in metrics.items()}
        finite = [parameter.isfinite().all() for parameter in self.networks.parameters()]
        if not torch.stack(finite).all():  # all processes have the same weights, and stop together
            remedy = f"last checkpoint: {self.checkpoint_step}; a resumed run would repeat this"
            fail(f"a weight is not finite at step {self.global_step}; {remedy}; try smaller step sizes", 1)

    def write_row(self) -> None:  # to metrics.jsonl and wandb
        row = {name: value for name, value in self.row.items() if value is not None}
        self.row = {}
        if RANK == 0 and row:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.wandb:
                self.wandb.log(row, step=row["global_step"])

    def end_phase(self, make_envs: Callable) -> None:
        """Evaluation, film and checkpoint, where they are due."""
        args = self.args
        self.phase += 1
        try:
            if RANK == 0:
                results = {}
                agent = self.modules["agent"]
                arguments = (agent, args, make_envs, self.device, self.directory, self.global_step)
                with self.timed("evaluation"):
                    if args.eval_interval and self.phase % args.eval_interval == 0:
                        results = evaluate(*arguments)
                    if args.capture_video:
                        record_video(*arguments)
                self.log({f"eval/{name}": value for name, value in results.items()})
        finally:  # an evaluation that fails does not lose the phase
            self.write_row()
            last = self.global_step == self.total_steps
            if args.checkpoint_interval and (last or self.phase % args.checkpoint_interval == 0):
                self.save()

    def save(self) -> None:
        """Replaces checkpoint.pt atomically: a failure leaves the previous one as it was."""
        envs = self.tracker.envs
        process = {"envs": envs.get_state() if hasattr(envs, "get_state") else None}
        process["tracker"] = {name: value for name, value in vars(self.tracker).items() if name != "envs"}
        process["modules"] = {name: module.state_dict() for name, module in self.modules_per_process.items()}
        content = {"format": CHECKPOINT_FORMAT, "args": vars(self.args), "processes": gather_objects(process)}
        counts = ("phase", "iteration", "global_step", "episodes", "recent", "charts", "seconds")
        content["run"] = {name: getattr(self, name) for name in counts}
        content["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
        if RANK > 0:
            return
        buffer = io.BytesIO()  # torch.save to a full disk raises no OSError
        torch.save(content, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # what it would refuse later, it refuses now
        temporary = self.directory / "checkpoint.tmp"
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(self.directory / "checkpoint.pt")
        self.checkpoint_step = self.global_step

    def finish(self) -> dict:
        """Writes summary.json and returns what is in it."""
        summary = vars(self.args) | self.charts | {"global_step": self.global_step, "episodes": self.episodes}
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else None
        summary["peak_memory_bytes"] = {"host": host, "device": torch.cuda.max_memory_allocated()}
        summary["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else self.device.type
        summary |= {"seconds": self.seconds, "torch": torch.__version__}
        if RANK == 0:
            (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            say(f"done: {json.dumps(self.charts)}; more in {self.directory}/summary.json")
        return summary


@torch.no_grad()
def play(agent: Agent, envs: gym.vector.VectorEnv, episodes: int, seed: int, device) -> np.ndarray:
    """Returns of episodes. Each environment plays its quota: the first to end are the short ones."""
    quota = np.bincount(np.arange(episodes) % envs.num_envs, minlength=envs.num_envs)
    tracker = EpisodeTracker(envs, seed)
    torch.manual_seed(seed)  # training seeds itself anew at every phase
    returns = []
    with show_progress(desc="evaluation: ", total=episodes, unit="episode") as progress:
        while len(returns) < episodes:
            logits = agent(tracker.obs.to(device), with_value=False).logits
            _, ended = tracker.step(Categorical(logits=logits).sample())
            for i, episode_return, _ in ended:
                if quota[i] > 0:
                    quota[i] -= 1
                    returns.append(episode_return)
                    progress.update()
    envs.close()
    return np.array(returns)


def evaluate(agent: Agent, args, make_envs: Callable, device, run_dir: Path, step: int) -> dict:
    """Plays --eval-episodes on all levels, and on the training levels if these are others."""
    metrics = {}
    level_sets = {args.num_levels: "train_levels", 0: "all_levels"}  # one, if all levels are trained on
    with open(run_dir / "evaluations.jsonl", "a") as file:  # opened first: if that fails, nothing is played
        for num_levels, name in level_sets.items():
            envs = make_envs(args, num_envs=min(args.num_envs, args.eval_episodes), num_levels=num_levels)
            returns = play(agent, envs, args.eval_episodes, args.seed + 10**6, device)
            metrics[f"{name}_return"] = returns.mean()
            error = returns.std(ddof=1) / len(returns) ** 0.5 if len(returns) > 1 else None
            metrics[f"{name}_standard_error"] = error
            metrics[f"{name}_normalized_return"] = normalized_return(args, returns.mean())
        results = {"global_step": step, "seed": args.seed, "episodes": args.eval_episodes} | metrics
        file.write(json.dumps(results) + "\n")
    tqdm.write(json.dumps(results, indent=2))  # to standard output, above the bars
    return metrics


def record_video(agent: Agent, args, make_envs: Callable, device, run_dir: Path, step: int) -> None:
    """Films an episode at 512 x 512: videos/step{step}-00000.mp4."""
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # the film's writer uses it
    film = {"directory": str(run_dir / "videos"), "prefix": f"step{step}-"}
    envs = make_envs(args, num_envs=1, num_levels=args.num_levels, film=film)
    play(agent, envs, 1, args.seed + 2 * 10**6, device)


# ---- main ------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        args = parse_args(argv)
        if args.evaluate is None:
            train(args)
        else:
            device, precision = start_process(args)
            saved = load_checkpoint(args.evaluate)
            envs = make_envs(args, num_envs=1, num_levels=0)
            spaces = (envs.single_observation_space, envs.single_action_space)
            agent = Agent(*spaces, args.arch, precision).to(device)
            agent.load_state_dict(saved["modules"]["agent"])
            arguments = (agent, args, make_envs, device, Path(args.evaluate), saved["run"]["global_step"])
            evaluate(*arguments)
            if args.capture_video:
                record_video(*arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:  # of a run's directory
        fail(str(error), 1)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

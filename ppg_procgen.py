"""Phasic Policy Gradient (PPG) on Procgen, in one file: Cobbe, Hilton, Klimov, Schulman 2020, arXiv 2009.04416.

A policy and a value function that share one network disturb each other; in two, neither learns features for the other.
PPG trains two as PPO does, then distils the values into the policy network, while a KL term holds the policy in place.

Algorithm 1 of the paper, and the function that does it:
    for phase = 1, 2, ...                                                                train
        for iteration = 1 .. N_pi                                                        (policy phase)
            perform rollouts under the current policy pi                                 collect_rollout
            compute the value targets and the advantages                                 compute_gae
            E_pi epochs of L_clip + beta_S S[pi] and E_V epochs of L_value               policy_phase
        store pi_old(. | s) for every state s of the phase                               auxiliary_phase
        E_aux epochs of L_joint = L_aux + beta_clone KL[pi_old, pi] and of L_value       auxiliary_phase

Shapes: N environments per process, T steps of a rollout, A actions, B samples. A segment is what one environment does
in one rollout, T steps; minibatches are made of whole segments, and a phase has S = N_pi x N of them.
Run `python ppg_procgen.py --track`; PPO is `--arch shared --e-policy 3 --e-value 3 --e-auxiliary 0`; see also `--help`.

Deviations from the paper (P) and from the original code (O), github.com/openai/phasic-policy-gradient:
 1. O: under --arch detach the value loss of the auxiliary phase reaches the trunk, as in P; O stops it in both phases.
 2. P: rewards are divided by the deviation of a return whose discount is 0.99, not gamma, and clipped, as in O.
 3. P: initial weights are rescaled to fixed norms, and advantages are normalised over the rollout, as in O.
 4. P: minibatches are whole segments; one Adam takes both losses if E_pi = E_V, else value epochs come first; as in O.
 5. P: the penalty of the KL variant is the estimate 0.5 E[log-ratio^2], as in O.
 6. P, O: the trunks run in bfloat16 where that is fast; --precision fp32 leaves them as in P and O.
 7. P, O: only whole iterations are run, and a last phase with fewer than N_pi of them gets no auxiliary phase.
 8. P, O: minibatches of over 512 steps pass through the network in parts; the gradient is the same sum.
"""

import argparse
import ctypes
import io
import json
import os
import re
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

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

torch.distributions.Distribution.set_default_validate_args(False)  # it synchronises a GPU at every call
RANK, LOCAL_RANK = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
WORLD_SIZE, LOCAL_WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
CHECKPOINT_FORMAT = 1
# fmt: off
RETURN_RANGES = {  # R_min, R_max of each game: easy, then hard (Cobbe et al. 2019, arXiv 1912.01588, appendix C)
    "bigfish": (1, 40, 0, 40), "bossfight": (0.5, 13, 0.5, 13), "caveflyer": (3.5, 12, 2, 13.4),
    "chaser": (0.5, 13, 0.5, 14.2), "climber": (2, 12.6, 1, 12.6), "coinrun": (5, 10, 5, 10),
    "dodgeball": (1.5, 19, 1.5, 19), "fruitbot": (-1.5, 32.4, -0.5, 27.2), "heist": (3.5, 10, 2, 10),
    "jumper": (3, 10, 1, 10), "leaper": (3, 10, 1.5, 10), "maze": (5, 10, 4, 10), "miner": (1.5, 13, 1.5, 20),
    "ninja": (3.5, 10, 2, 10), "plunder": (4.5, 30, 3, 30), "starpilot": (2.5, 64, 1.5, 35)}
COLUMNS = ["iteration", "global_step", "episodes", "charts/episodic_return", "charts/episodic_length",
    "charts/normalized_return", "charts/SPS", "charts/learning_rate", "time/rollout", "time/policy_phase",
    "time/auxiliary_phase", "losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl",
    "losses/old_approx_kl", "losses/clipfrac", "losses/explained_variance", "losses/aux/kl_loss",
    "losses/aux/aux_value_loss", "losses/aux/real_value_loss", "eval/train_levels_return",
    "eval/train_levels_normalized_return", "eval/all_levels_return", "eval/all_levels_normalized_return"]  # metrics.csv
FREE_FLAGS = (  # those that do not change what is learned: they may differ beside --resume and --evaluate
    "resume", "evaluate", "total_timesteps", "cuda", "track", "wandb_project_name", "wandb_entity", "capture_video",
    "runs_dir", "checkpoint_interval", "eval_interval", "eval_episodes", "env_threads", "aux_buffer_device")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line (None: the process's own). Bad input ends the process with a sentence and exit status 2."""
    parser = argparse.ArgumentParser("ppg_procgen.py", "%(prog)s [flags] (--help lists them)", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    switch = argparse.BooleanOptionalAction
    group = parser.add_argument_group("run")
    add, add_exclusive = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--exp-name", default="ppg_procgen", help="name of the experiment, a part of the run directory's name")
    add("--seed", type=int, default=1, help="seed of the network, actions, minibatches and levels")
    add("--torch-deterministic", action=switch, default=True, help="cuDNN uses its deterministic kernels only")
    add("--cuda", action=switch, default=True, help="use the GPU, if there is one")
    add("--track", action=switch, default=False, help="log to Weights & Biases too (WANDB_MODE=offline works)")
    add("--wandb-project-name", default="ppg-procgen", help="project under --track")
    add("--wandb-entity", help="team under --track; None = wandb's default")
    add("--capture-video", action=switch, default=False, help="record an episode at the end of every phase")
    add("--runs-dir", default="runs", help="directory in which the run makes its own")
    add("--checkpoint-interval", type=int, default=1, help="phases between checkpoints; 0 = never write one")
    add_exclusive("--resume", metavar="RUN_DIR", help="continue the run in this directory, with its flags")
    add_exclusive("--evaluate", metavar="RUN_DIR", help="play the checkpoint in this directory instead of training")
    add("--eval-interval", type=int, default=0, help="phases between evaluations while training; 0 = none")
    add("--eval-episodes", type=int, default=100, help="episodes of an evaluation, on each of its two level sets")
    add = parser.add_argument_group("environment").add_argument
    add("--env-id", choices=sorted(RETURN_RANGES), default="starpilot", metavar="GAME", help="one of Procgen's 16")
    add("--distribution-mode", choices=("easy", "hard"), default="easy", help="variant of the levels")
    add("--num-levels", type=int, default=0, help="training levels; 0 = all")
    add("--start-level", type=int, default=0, help="first training level; without effect if num_levels is 0")
    add("--num-envs", type=int, default=64, help="N: environments per process")
    add("--env-threads", type=int, default=4, help="simulator threads per process")
    add("--total-timesteps", type=int, default=25_000_000, help="steps of the run, of all processes together")
    add = parser.add_argument_group("policy phase").add_argument
    add("--arch", choices=("dual", "detach", "shared"), default="dual", help="two networks; one of PPG; one of PPO")
    add("--num-steps", type=int, default=256, help="T: steps of a rollout")
    add("--n-iteration", type=int, default=32, help="N_pi: policy iterations per phase")
    add("--e-policy", type=int, default=1, help="E_pi: policy epochs per iteration")
    add("--e-value", "--v-value", type=int, default=1, help="E_V: value epochs; with an Adam of their own if not E_pi")
    add("--num-minibatches", type=int, default=8, help="minibatches per epoch, N / num_minibatches segments each")
    add("--learning-rate", type=float, default=5e-4, help="Adam step size of the policy phase")
    add("--anneal-lr", action=switch, default=False, help="lower all step sizes linearly to 0 over the run")
    add("--adam-eps", type=float, default=1e-8, help="Adam epsilon")
    add("--gamma", type=float, default=0.999, help="gamma: discount")
    add("--gae-lambda", type=float, default=0.95, help="lambda: of generalised advantage estimation")
    add("--reward-norm-gamma", type=float, default=0.99, help="discount of the return that scales the rewards")
    add("--reward-clip", type=float, default=10.0, help="bound of a normalised reward")
    add("--clip-coef", type=float, default=0.2, help="epsilon: clips the probability ratio; 0 = unclipped")
    add("--kl-coef", type=float, default=0.0, help="beta: of the KL penalty; 1 in the KL variant, with --clip-coef 0")
    add("--ent-coef", type=float, default=0.01, help="beta_S: of the entropy bonus")
    add("--vf-coef", type=float, default=0.5, help="weight of the value head's mean squared error")
    add("--max-grad-norm", type=float, default=0.0, help="clips the L2 norm of the gradient; 0 = off")
    add("--target-kl", type=float, help="ends the policy epochs once the iteration's mean approx_kl exceeds it")
    add = parser.add_argument_group("auxiliary phase").add_argument
    add("--e-auxiliary", type=int, default=6, help="E_aux: epochs over the phase's segments; 0 = no such phase")
    add("--beta-clone", type=float, default=1.0, help="beta_clone: weight of the KL to the old policy")
    add("--aux-vf-coef", type=float, default=1.0, help="weight of the value head's loss")
    add("--aux-learning-rate", type=float, default=5e-4, help="Adam step size of the auxiliary phase")
    add("--num-aux-rollouts", type=int, default=4, help="segments (T steps of one environment) per minibatch")
    add("--n-aux-grad-accum", type=int, default=1, help="least number of parts a minibatch is computed in")
    add = parser.add_argument_group("system").add_argument
    add("--precision", choices=("auto", "bf16", "bf16-aux", "fp32"), default="auto", help="bfloat16 convolutions "
        "always, in the auxiliary phase, never; auto = bf16 on a CPU, bf16-aux on a GPU; fp32 where bfloat16 is slow")
    add("--aux-buffer-device", choices=("auto", "cpu", "cuda"), default="auto", help="home of a phase's observations")

    args = parser.parse_args(argv)
    if (source := args.evaluate if args.resume is None else args.resume) is not None:
        saved = load_checkpoint(source, parser.error)
        # argparse sets a default only where the namespace lacks the name: flags not given keep the values of the run.
        args = parser.parse_args(argv, argparse.Namespace(**saved["args"] | {"resume": None, "evaluate": None}))
        if changed := [f"--{name.replace('_', '-')} (it has {old})" for name, old in saved["args"].items()
                       if name not in FREE_FLAGS and getattr(args, name) != old]:
            parser.error(f"leave out what would change the run in {source}: {', '.join(changed)}")
        processes, steps = len(saved["processes"]), saved["run"]["global_step"]
        if args.resume and (WORLD_SIZE != processes or args.total_timesteps < steps):
            parser.error(f"{source} goes on with {processes} processes and a --total-timesteps of at least {steps}")
    may_be_0 = ("seed", "checkpoint_interval", "eval_interval", "num_levels", "start_level", "e_auxiliary")
    for name, value in vars(args).items():
        low = 1 if type(value) is int and name not in may_be_0 else 0
        high = 1 if name in ("gamma", "gae_lambda", "reward_norm_gamma") else 2e9
        if isinstance(value, (int, float)) and not low <= value <= high:  # a NaN neither
            parser.error(f"--{name.replace('_', '-')} must lie between {low} and {high:g}, not be {value}")
    rollout, segments = args.num_envs * args.num_steps * WORLD_SIZE, args.num_envs * args.n_iteration
    for wrong, sentence in (
        (not re.fullmatch(r"[\w.+=-]+", args.exp_name), "--exp-name must be made of letters, digits and . _ + = -"),
        (args.num_envs % args.num_minibatches, f"--num-minibatches must divide --num-envs, {args.num_envs}"),
        (args.total_timesteps < rollout, f"--total-timesteps must be at least one rollout, {rollout} steps"),
        (args.e_auxiliary and segments % args.num_aux_rollouts, f"--num-aux-rollouts must divide N x N_pi, {segments}"),
        (args.evaluate and WORLD_SIZE > 1, "--evaluate runs in one process, without torchrun"),
        (args.num_aux_rollouts % args.n_aux_grad_accum, "--n-aux-grad-accum must divide --num-aux-rollouts"),
        (args.aux_buffer_device == "cuda" and not (args.cuda and torch.cuda.is_available()),
         "--aux-buffer-device cuda needs a GPU: leave it at auto")):
        if wrong:
            parser.error(sentence)
    return args
# fmt: on


# ---- networks --------------------------------------------------------------------------------------------------------
def normed(layer: nn.Module, scale: float) -> nn.Module:
    """Rescales each output unit's incoming weights to L2 norm `scale`, zeroes the biases (original: torch_util.py)."""
    layer.weight.data = scale * F.normalize(layer.weight.data.flatten(1)).view_as(layer.weight)
    layer.bias.data.zero_()
    return layer


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def impala_trunk() -> nn.Sequential:
    """The IMPALA CNN (Espeholt et al. 2018, figure 3): images [B, 3, 64, 64] -> features [B, 256]."""
    layers, scale = [], (3**-0.5 * 2**-0.5) ** 0.5  # 3 stacks, 2 blocks in each, divided between 2 convolutions
    for in_channels, channels in ((3, 16), (16, 32), (32, 32)):
        layers += [normed(nn.Conv2d(in_channels, channels, 3, padding=1), 1.0), nn.MaxPool2d(3, stride=2, padding=1)]
        for _ in range(2):
            conv1, conv2 = (normed(nn.Conv2d(channels, channels, 3, padding=1), scale) for _ in range(2))
            layers.append(Residual(nn.ReLU(), conv1, nn.ReLU(), conv2))
    return nn.Sequential(*layers, nn.Flatten(), nn.ReLU(), normed(nn.Linear(2048, 256), 1.4), nn.ReLU())


class Agent(nn.Module):
    """The policy, the value function and the auxiliary value function, in two networks or one (paper, section 2)."""

    def __init__(self, num_actions: int, arch: str, bf16_phases: Sequence[str] = ()):
        super().__init__()
        self.arch, self.bf16_phases = arch, bf16_phases
        self.policy_trunk = impala_trunk()
        self.value_trunk = impala_trunk() if arch == "dual" else self.policy_trunk
        heads = (normed(nn.Linear(256, outputs), 0.1) for outputs in (num_actions, 1, 1))
        self.policy_head, self.value_head, self.aux_value_head = heads
        self.to(memory_format=torch.channels_last)

    def forward(self, obs: Tensor, phase: str, policy: bool = True, value: bool = True) -> tuple:
        """obs [B, 64, 64, 3] uint8 -> logits [B, A], auxiliary values [B], values [B], all float32.
        `phase`, "policy" or "auxiliary", decides on the precision and on whether the value loss reaches the trunk.
        Without `policy` the first two are None, without `value` the last; a network not needed is not run."""
        logits = aux_values = values = None
        dtype = torch.bfloat16 if phase in self.bf16_phases else torch.float32
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            # NHWC observations, permuted, are channels_last NCHW already. A contiguous copy would halve the speed.
            images = obs.permute(0, 3, 1, 2).to(dtype) / 255
            if policy or self.arch != "dual":
                features = self.policy_trunk(images).float()
            if value:
                value_features = self.value_trunk(images).float() if self.arch == "dual" else features
        if policy:
            logits, aux_values = self.policy_head(features), self.aux_value_head(features).squeeze(-1)
        if value:
            stop = self.arch == "detach" and phase == "policy"  # but not in the auxiliary phase: deviation 1
            values = self.value_head(value_features.detach() if stop else value_features).squeeze(-1)
        return logits, aux_values, values


# ---- environments ----------------------------------------------------------------------------------------------------
class ProcgenVecEnv(gym.vector.VectorEnv):
    """Procgen environments that step together: observations [N, 64, 64, 3] uint8, rewards [N] float32.
    An episode that ends is followed by the next at once; infos["episode"] has its return "r" and length "l" where
    infos["_episode"] is true. A time-out looks like a death. `video`, for gym3's recorder, films environment 0."""

    def __init__(self, args: argparse.Namespace, num_envs: int, num_levels: int, video: dict | None = None):
        self.video, self.options = video, {"env_name": args.env_id, "distribution_mode": args.distribution_mode}
        self.options |= {"num": num_envs, "num_levels": num_levels, "start_level": args.start_level}
        self.options |= {"num_threads": args.env_threads, "render_mode": "rgb_array" if video else None}
        super().__init__(num_envs, gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(15))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.simulator = ProcgenGym3Env(**self.options, rand_seed=seed)
        if self.video:
            self.simulator = VideoRecorderWrapper(self.simulator, info_key="rgb", **self.video)
        self.episode_returns, self.episode_lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        return self.simulator.observe()[1]["rgb"], {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        self.simulator.act(np.asarray(actions))
        rewards, obs, done = self.simulator.observe()
        returns, lengths = self.episode_returns + rewards, self.episode_lengths + 1
        self.episode_returns, self.episode_lengths = returns * ~done, lengths * ~done
        infos = {"episode": {"r": returns * done, "l": lengths * done}, "_episode": done} if done.any() else {}
        return obs["rgb"], rewards, done, np.zeros_like(done), infos

    def get_state(self) -> tuple:
        return self.simulator.get_state(), *map(torch.from_numpy, (self.episode_returns, self.episode_lengths))

    def set_state(self, state: tuple) -> np.ndarray:
        self.simulator.set_state(state[0])
        self.episode_returns, self.episode_lengths = state[1].numpy(), state[2].numpy()
        return self.simulator.observe()[1]["rgb"]


class RewardNormalizer(nn.Module):
    """Divides rewards by the deviation of their return under discount `gamma` (original: reward_normalizer.py)."""

    def __init__(self, num_envs: int, gamma: float, clip: float):
        super().__init__()
        self.gamma, self.clip = gamma, clip
        self.register_buffer("returns", torch.zeros(num_envs, dtype=torch.float64))  # R_{t-1}, of this process
        self.register_buffer("moments", torch.tensor([1e-4, 0, 1], dtype=torch.float64))  # count, mean, variance

    def forward(self, rewards: Tensor, firsts: Tensor) -> Tensor:
        """rewards [N, T]; firsts [N, T]: 1 where the step opened an episode. Returns rewards [N, T], clipped."""
        returns = torch.empty_like(rewards, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            returns[:, t] = self.returns = rewards[:, t] + self.gamma * self.returns * (1 - firsts[:, t])
        (count, mean, variance), (new_count, new_mean, new_variance) = self.moments, global_moments(returns)
        total, delta = count + new_count, new_mean - mean  # parallel variance of Chan et al. 1979
        squares = variance * count + new_variance * new_count + delta**2 * count * new_count / total
        self.moments = torch.stack([total, mean + delta * new_count / total, squares / total])
        return (rewards / (self.moments[2] + 1e-8).sqrt()).clamp(-self.clip, self.clip).float()


# ---- mathematics -----------------------------------------------------------------------------------------------------
def sum_over_processes(x: Tensor) -> Tensor:
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def global_moments(x: Tensor) -> Tensor:
    """Count, mean and (biased) variance of the x of all processes: [3] float64."""
    x = x.double()
    count, total, squares = sum_over_processes(torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()]))
    return torch.stack([count, total / count, (squares / count - (total / count) ** 2).clamp_min(0)])


def compute_gae(*, rewards: Tensor, values: Tensor, firsts: Tensor, gamma: float, gae_lambda: float) -> tuple:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).
    rewards [N, T]: of the step from s_t. values [N, T+1]: V(s_t), the last column bootstraps.
    firsts [N, T+1]: 1 where s_t opens an episode, so nothing is carried across it.
    Returns advantages and value targets, each [N, T]."""
    assert values.shape == firsts.shape == (rewards.shape[0], rewards.shape[1] + 1)
    advantages, advantage = torch.empty_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        goes_on = 1 - firsts[:, t + 1]
        delta = rewards[:, t] + gamma * goes_on * values[:, t + 1] - values[:, t]
        advantages[:, t] = advantage = delta + gamma * gae_lambda * goes_on * advantage
    return advantages, advantages + values[:, :-1]


def policy_loss(*, logits, actions, old_log_probs, advantages, clip_coef: float, kl_coef: float) -> tuple[Tensor, dict]:
    """The surrogate of PPO, clipped (0: not), and the penalty of the KL variant. logits [B, A], all else [B].
    Returns the loss and metrics, means over the batch; KL[old, new] as in joschu.net/blog/kl-approx.html."""
    assert actions.shape == old_log_probs.shape == advantages.shape == logits.shape[:1]
    pi = Categorical(logits=logits)
    log_ratio = pi.log_prob(actions) - old_log_probs
    ratio = log_ratio.exp()
    surrogate = ratio * advantages
    if clip_coef > 0:
        surrogate = torch.min(surrogate, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages)
    loss = -surrogate.mean() + kl_coef * 0.5 * log_ratio.square().mean()  # deviation 5
    metrics = {"old_approx_kl": -log_ratio.mean(), "approx_kl": (ratio - 1 - log_ratio).mean()}
    clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
    return loss, {"policy_loss": loss, "entropy": pi.entropy().mean(), "clipfrac": clipfrac, **metrics}


def clone_loss(old_logits: Tensor, logits: Tensor) -> Tensor:
    """KL[pi_old, pi] in nats, [B, A], [B, A] -> scalar: what holds the policy in L_joint (paper, section 2)."""
    return kl_divergence(Categorical(logits=old_logits), Categorical(logits=logits)).mean()


# ---- phases ----------------------------------------------------------------------------------------------------------
MAX_STEPS_PER_PASS = 512  # but at least a segment: bounds the memory of activations (deviation 8)
Rollout = namedtuple("Rollout", "observations actions log_probs values rewards firsts episodes")


class Means(dict):
    """Weighted means of scalars, on the device until `read`: that alone waits for it. All processes read the same."""

    def add(self, weight: float, **scalars: Tensor) -> None:
        for name, scalar in scalars.items():
            total, weights = self.get(name, (0, 0))
            self[name] = total + weight * scalar.detach(), weights + weight

    def read(self, prefix: str) -> dict[str, float]:
        means = sum_over_processes(torch.stack([total / weights for total, weights in self.values()])) / WORLD_SIZE
        return {prefix + name: mean for name, mean in zip(self, means.tolist())}


def take_segments(data: Sequence[Tensor], segments: Tensor, device: torch.device) -> list[Tensor]:
    """Copies the chosen segments [k] of each [S, T, ...] to the device: [k * T, ...]. No copy makes the host wait."""
    return [torch.cat([x[s].to(device, non_blocking=True) for s in segments.tolist()]) for x in data]


def update(optimizer, loss_of: Callable, minibatch: Tensor, part_size: int, max_grad_norm: float = 0.0) -> None:
    """A step on the mean loss over a minibatch of segments, `part_size` at a time, and over all processes."""
    optimizer.zero_grad()
    for part in minibatch.split(part_size):
        (loss_of(part) * (len(part) / len(minibatch))).backward()
    params = optimizer.param_groups[0]["params"]
    if WORLD_SIZE > 1:
        grads = [p.grad for p in params if p.grad is not None]
        means = sum_over_processes(torch.cat([grad.flatten() for grad in grads])) / WORLD_SIZE
        for grad, mean in zip(grads, means.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view(grad.shape))
    if max_grad_norm > 0:
        nn.utils.clip_grad_norm_(params, max_grad_norm)
    optimizer.step()


@torch.no_grad()
def collect_rollout(agent: Agent, envs, obs: np.ndarray, observations: Tensor, device) -> tuple[Rollout, np.ndarray]:
    """Plays T steps from obs [N, 64, 64, 3], storing what it sees in observations [N, T, 64, 64, 3]. Returns a Rollout
    with actions, log pi(a_t | s_t), rewards [N, T], values V(s_t), firsts [N, T+1] (1: s_t opens an episode), (return,
    length) of episodes that ended; and the next obs. Rewards and firsts stay on the host."""
    shape = num_envs, num_steps = observations.shape[:2]
    actions, log_probs = torch.empty(shape, dtype=torch.long, device=device), torch.empty(shape, device=device)
    values, rewards = torch.empty((num_envs, num_steps + 1), device=device), np.empty(shape, np.float32)
    firsts, episodes = np.empty((num_envs, num_steps + 1), np.float32), []
    for t in range(num_steps):
        observations[:, t], firsts[:, t] = torch.from_numpy(obs), envs.episode_lengths == 0  # 0: begins
        logits, _, values[:, t] = agent(observations[:, t].to(device), "policy")
        pi = Categorical(logits=logits)
        actions[:, t] = action = Categorical(logits=logits.nan_to_num()).sample()  # NaNs are left to the losses to tell
        log_probs[:, t] = pi.log_prob(action)
        obs, rewards[:, t], _, _, infos = envs.step(action.cpu().numpy())
        for i in np.flatnonzero(infos.get("_episode", ())):
            episodes.append((float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i])))
    firsts[:, -1] = envs.episode_lengths == 0
    _, _, values[:, -1] = agent(torch.from_numpy(obs).to(device), "policy")
    return Rollout(observations, actions, log_probs, values, *map(torch.from_numpy, (rewards, firsts)), episodes), obs


def policy_phase(agent: Agent, optimizers: dict, rollout: Rollout, advantages: Tensor, targets: Tensor, args) -> dict:
    """The epochs of one iteration over its rollout; advantages and value targets [N, T]. Returns metrics."""
    _, mean, variance = global_moments(advantages)
    advantages = ((advantages - mean) / (variance.sqrt() + 1e-8)).float()
    (num_envs, num_steps), device, means = targets.shape, targets.device, Means()

    def loss_of(part: Tensor) -> Tensor:  # of the `kind` that the loop below is at
        obs, actions, log_probs, advantage, target = take_segments((*rollout[:3], advantages, targets), part, device)
        logits, _, values = agent(obs, "policy", policy=kind != "value", value=kind != "policy")
        loss = 0
        if kind != "value":
            batch = {"actions": actions, "old_log_probs": log_probs, "advantages": advantage}
            loss, metrics = policy_loss(logits=logits, **batch, clip_coef=args.clip_coef, kl_coef=args.kl_coef)
            loss = loss - args.ent_coef * metrics["entropy"]
            means.add(len(part), **metrics)
        if kind != "policy":
            value_loss = args.vf_coef * F.mse_loss(values, target)
            loss = loss + value_loss
            means.add(len(part), value_loss=value_loss)
        return loss

    for kind in ("joint",) if args.e_policy == args.e_value else ("value", "policy"):
        for _ in range(args.e_value if kind == "value" else args.e_policy):
            # Minibatches are whole environments, not shuffled steps: one contiguous copy each (deviation 4).
            for minibatch in torch.randperm(num_envs).split(num_envs // args.num_minibatches):
                part_size = max(1, MAX_STEPS_PER_PASS // num_steps)
                update(optimizers[kind], loss_of, minibatch, part_size, args.max_grad_norm)
            if args.target_kl is not None and kind != "value" and means.read("")["approx_kl"] > args.target_kl:
                break
    unexplained = (targets - rollout.values[:, :-1]).var(correction=0) / targets.var(correction=0).clamp_min(1e-8)
    means.add(1, explained_variance=1 - unexplained, sum_of_weights=sum(p.sum() for p in agent.parameters()))
    return means.read("losses/")


def auxiliary_phase(agent: Agent, optimizer, observations: Tensor, targets: Tensor, args, progress=iter) -> dict:
    """The epochs over a phase: observations [S, T, 64, 64, 3], targets [S, T]; `progress` counts. Returns metrics."""
    (num_segments, num_steps), device, means = targets.shape, targets.device, Means()
    part_size = min(args.num_aux_rollouts // args.n_aux_grad_accum, max(1, MAX_STEPS_PER_PASS // num_steps))
    with torch.no_grad():  # in the precision and batch size of the updates, so that the first KL is 0
        parts = (take_segments([observations], part, device) for part in torch.arange(num_segments).split(part_size))
        old_logits = torch.cat([agent(obs, "auxiliary", value=False)[0] for (obs,) in parts]).view(*targets.shape, -1)

    def loss_of(part: Tensor) -> Tensor:
        obs, pi_old, target = take_segments((observations, old_logits, targets), part, device)
        logits, aux_values, values = agent(obs, "auxiliary")
        kl_loss = clone_loss(pi_old, logits)
        aux_value_loss, real_value_loss = 0.5 * F.mse_loss(aux_values, target), 0.5 * F.mse_loss(values, target)
        means.add(len(part), kl_loss=kl_loss, aux_value_loss=aux_value_loss, real_value_loss=real_value_loss)
        return aux_value_loss + args.beta_clone * kl_loss + args.aux_vf_coef * real_value_loss  # L_joint + L_value

    epochs = torch.cat([torch.randperm(num_segments) for _ in range(args.e_auxiliary)])
    for minibatch in progress(epochs.split(args.num_aux_rollouts)):
        update(optimizer, loss_of, minibatch, part_size)  # whose zero_grad clears what the policy phase left
    means.add(1, sum_of_weights=sum(p.sum() for p in agent.parameters()))  # finite, or no checkpoint is written
    return means.read("losses/aux/")


# ---- running it for real ---------------------------------------------------------------------------------------------
def say(text: str) -> None:
    if RANK == 0:
        (tqdm.write if sys.stderr.isatty() else print)(text, file=sys.stderr)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory. Unmapped, each large activation costs page faults anew: half the time on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def start_process(args: argparse.Namespace) -> tuple[torch.device, list[str]]:
    """Joins the processes that torchrun started. Picks the device and, by --precision, the phases to be in bfloat16."""
    keep_freed_memory()
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group()  # NCCL for what is on GPUs, gloo for what is not
    device, auto, cpu = torch.device("cpu"), "bf16", torch.cpu.get_capabilities()
    fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if args.cuda and torch.cuda.is_available():
        device, auto, fast = torch.device("cuda", LOCAL_RANK), "bf16-aux", torch.cuda.is_bf16_supported(False)
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = args.torch_deterministic
    elif args.cuda:
        say("no GPU found: running on the CPU")
    precision = auto if args.precision == "auto" else args.precision
    if precision != "fp32" and not fast:
        say("bfloat16 is not fast on this hardware: running in float32")
    torch.manual_seed(args.seed)  # of the networks: the same in all processes
    return device, {"fp32": [], "bf16-aux": ["auxiliary"], "bf16": ["policy", "auxiliary"]}[precision] if fast else []


def allocate_observations(shape: tuple[int, ...], device: torch.device, home: str) -> Tensor:
    """A phase's observations, uint8, on the GPU or in host memory (pinned for it). Exit status 2 if they do not fit."""
    need, free, pin = int(np.prod(shape)), np.inf, False
    if device.type == "cuda":
        free = 0.8 * torch.cuda.mem_get_info(device)[0]  # the rest is for activations
        pin = home == "cpu" or (home == "auto" and need > free)
    if sys.platform == "linux" and (pin or device.type == "cpu"):
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) / LOCAL_WORLD_SIZE
    if need > free:
        sizes = f"{need / 1e9:.1f} GB for its observations in each process, and {free / 1e9:.1f} GB are free"
        print(f"error: a phase needs {sizes}: lower --num-envs, --num-steps or --n-iteration", file=sys.stderr)
        sys.exit(2)
    return torch.empty(shape, dtype=torch.uint8, device="cpu" if pin else device, pin_memory=pin)


def gather_objects(thing: object) -> list:
    things = [thing] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(things, thing)
    return things


def load_checkpoint(run_dir: str, fail: Callable[[str], None] = sys.exit) -> dict:
    path = Path(run_dir, "checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["format"] == CHECKPOINT_FORMAT
        return checkpoint
    except Exception as error:  # noqa: BLE001 (a damaged file may raise anything)
        fail(f"{path} is missing, damaged, or not a checkpoint of this version ({type(error).__name__})")


def normalized_return(args: argparse.Namespace, episodic_return: float) -> float:
    low, high = RETURN_RANGES[args.env_id][:2] if args.distribution_mode == "easy" else RETURN_RANGES[args.env_id][2:]
    return (episodic_return - low) / (high - low)


class Run:
    """What a run counts, shows and writes (by rank 0 alone). `state` is what its checkpoint keeps of it."""

    def __init__(self, args: argparse.Namespace, saved: dict | None):
        seconds = {"rollout": 0.0, "policy_phase": 0.0, "auxiliary_phase": 0.0, "total": 0.0}
        fresh = {"phase": 0, "iteration": 0, "global_step": 0, "episodes": 0, "recent": [], "seconds": seconds}
        self.state = saved["run"] if saved else fresh | {"charts": {}, "wandb_id": os.urandom(4).hex()}
        self.started = time.perf_counter() - self.state["seconds"]["total"]
        self.args, self.row, self.wandb = args, {}, None
        style = {"smoothing": 0, "miniters": 0, "position": 0, "disable": RANK > 0}
        if not sys.stderr.isatty():  # lines instead of a bar
            style |= {"mininterval": 10, "bar_format": "{desc}{n}/{total}, {rate_fmt}, {remaining} left{postfix}\n"}
        self.bar = tqdm(total=args.total_timesteps, initial=self.state["global_step"], unit="step", **style)
        self.progress = lambda updates: tqdm(updates, "auxiliary phase: ", leave=False, unit="update", **style)
        self.directory, now = Path(args.resume or "."), int(time.time())
        while RANK == 0 and not saved:
            try:
                self.directory = Path(args.runs_dir, f"{args.env_id}__{args.exp_name}__{args.seed}__{now}")
                self.directory.mkdir(parents=True)
                (self.directory / "metrics.csv").write_text(",".join(COLUMNS) + "\n")
                break
            except FileExistsError:  # another run started in this second
                now += 1
        launcher = f"torchrun --nproc-per-node {LOCAL_WORLD_SIZE}" if WORLD_SIZE > 1 else "python"
        again = f"continue from the last checkpoint: {launcher} ppg_procgen.py --resume {self.directory}"
        self.advice, self.advice_once_saved = again if saved else "no checkpoint was written", again
        if RANK == 0:
            self.metrics = self.directory / "metrics.csv"
            rows = self.metrics.read_bytes().splitlines(keepends=True)
            os.truncate(self.metrics, sum(map(len, rows[: 1 + self.state["iteration"]])))  # later rows come again
            if len(rows) <= self.state["iteration"]:
                say(f"{self.metrics} lacks rows that it had when the checkpoint was written: going on without them")
            say(f"writing to {self.directory}")
        if RANK == 0 and args.track:
            try:
                import wandb

                names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.directory.name}
                rest = {"id": self.state["wandb_id"], "resume": "allow", "dir": self.directory, "config": vars(args)}
                wandb.init(**names, **rest).define_metric("*", step_metric="global_step")
                self.wandb = wandb
            except Exception as error:  # noqa: BLE001 (no login, no network, no wandb: the run goes on)
                say(f"wandb refused ({error}): going on without it; {self.metrics} has all metrics")

    def log(self, metrics: dict[str, float], episodes: list | None = None) -> None:
        """Adds metrics to the row of an iteration. With `episodes`, those that ended in it, a new row begins."""
        state = self.state
        if episodes is not None:
            self.write_row()
            new = [episode for each in gather_objects(episodes) for episode in each]
            state["iteration"] += 1
            state["global_step"] += self.args.num_envs * self.args.num_steps * WORLD_SIZE
            state["episodes"] += len(new)
            state["recent"] = (state["recent"] + new)[-100:]
        for name, value in metrics.items():  # all processes have the same losses and weights, so they stop together
            if not np.isfinite(value):
                sys.exit(f"error: {name} is {value} at step {state['global_step']}; {self.advice}" if RANK == 0 else 1)
        state["seconds"] = {name: old + metrics.get(f"time/{name}", 0) for name, old in state["seconds"].items()}
        state["seconds"]["total"] = time.perf_counter() - self.started
        charts = state["charts"] = {"charts/SPS": state["global_step"] / state["seconds"]["total"]}
        if state["recent"]:
            mean_return, mean_length = np.mean(state["recent"], axis=0).tolist()
            charts |= {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            charts["charts/normalized_return"] = normalized_return(self.args, mean_return)
        self.row |= state | charts | metrics
        self.bar.set_postfix_str(f"return {charts.get('charts/episodic_return', np.nan):.2f}", refresh=False)
        self.bar.update(state["global_step"] - self.bar.n)

    def write_row(self) -> None:
        if self.row and RANK == 0:
            with open(self.metrics, "a") as file:
                file.write(",".join(str(self.row.get(column, "")) for column in COLUMNS) + "\n")
            if self.wandb:
                self.wandb.log({name: self.row[name] for name in COLUMNS if name in self.row})
        self.row = {}

    def save(self, **content) -> None:
        """Replaces checkpoint.pt atomically: a failure leaves the previous one as it was."""
        buffer, temporary = io.BytesIO(), self.directory / "checkpoint.tmp"
        torch.save({"format": CHECKPOINT_FORMAT, "args": vars(self.args), "run": self.state, **content}, buffer)
        try:
            with open(temporary, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.directory / "checkpoint.pt")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            sys.exit(f"error: cannot write the checkpoint ({error}); {self.advice}")
        self.advice = self.advice_once_saved

    def finish(self, device: torch.device) -> dict:
        summary = {name: getattr(self.args, name) for name in ("env_id", "distribution_mode", "arch", "seed")}
        summary |= {name: self.state[name] for name in ("global_step", "episodes", "seconds")}
        summary |= dict.fromkeys(("episodic_return", "episodic_length", "normalized_return"))  # None: no episode ended
        summary |= {name.removeprefix("charts/"): value for name, value in self.state["charts"].items()}
        memory = {"host": getrusage(RUSAGE_SELF).ru_maxrss * 1024, "device": torch.cuda.max_memory_allocated()}
        summary |= {"peak_memory_bytes": memory, "torch": torch.__version__}
        summary["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        if RANK == 0:
            (self.directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


@torch.no_grad()
def play(agent: Agent, envs: ProcgenVecEnv, episodes: int, seed: int, device: torch.device) -> np.ndarray:
    """Returns of episodes under the policy. Each environment plays its quota: the first to end are the short ones."""
    quota = np.bincount(np.arange(episodes) % envs.num_envs, minlength=envs.num_envs)
    (obs, _), returns = envs.reset(seed=seed), []
    torch.manual_seed(seed)  # training seeds itself anew at every phase
    while quota.any():
        logits, _, _ = agent(torch.from_numpy(obs).to(device), "policy", value=False)
        obs, _, _, _, infos = envs.step(Categorical(logits=logits).sample().cpu().numpy())
        for i in np.flatnonzero(infos["_episode"] * quota if infos else ()):
            returns.append(infos["episode"]["r"][i])
            quota[i] -= 1
    return np.array(returns)


def evaluate(agent: Agent, args: argparse.Namespace, device: torch.device, run_dir: Path, step: int) -> dict:
    """Plays --eval-episodes on the training levels and as many on all; writes eval.json. Returns metrics."""
    results, num_envs = {"global_step": step, "episodes": args.eval_episodes}, min(args.num_envs, args.eval_episodes)
    for name, num_levels in (("train_levels", args.num_levels), ("all_levels", 0)):
        returns = play(agent, ProcgenVecEnv(args, num_envs, num_levels), args.eval_episodes, args.seed + 10**6, device)
        mean, error = float(returns.mean()), float(returns.std() / max(1, len(returns) - 1) ** 0.5)
        results |= {f"{name}_return": mean, f"{name}_standard_error": error}
        results[f"{name}_normalized_return"] = normalized_return(args, mean)
    results["gap"] = results["train_levels_return"] - results["all_levels_return"]
    say(text := json.dumps(results, indent=2))
    (run_dir / "eval.json").write_text(text + "\n")
    return {f"eval/{name}": value for name, value in results.items() if f"eval/{name}" in COLUMNS}


def record_video(agent: Agent, args, device: torch.device, run_dir: Path, step: int, wandb=None) -> None:
    """Films an episode at 512 x 512: videos/step{step}-00000.mp4."""
    video = {"directory": str(run_dir / "videos"), "prefix": f"step{step}-"}
    play(agent, ProcgenVecEnv(args, 1, args.num_levels, video), 1, args.seed + 2 * 10**6, device)
    if wandb:
        wandb.log({"global_step": step, "video": wandb.Video(f"{run_dir}/videos/step{step}-00000.mp4")})


# ---- training --------------------------------------------------------------------------------------------------------
def train(args: argparse.Namespace, envs: gym.vector.VectorEnv | None = None) -> dict:
    """Algorithm 1, on Procgen or the given environments (64 x 64 x 3 uint8, discrete actions). Returns the summary."""
    (device, bf16_phases), saved = start_process(args), load_checkpoint(args.resume) if args.resume else None
    envs = gym.wrappers.RecordEpisodeStatistics(envs) if envs else ProcgenVecEnv(args, args.num_envs, args.num_levels)
    agent = Agent(envs.single_action_space.n, args.arch, bf16_phases).to(device)
    kinds = ("joint",) if args.e_policy == args.e_value else ("value", "policy")
    rates = dict.fromkeys(kinds, args.learning_rate) | {"auxiliary": args.aux_learning_rate}
    optimizers = {kind: torch.optim.Adam(agent.parameters(), lr, eps=args.adam_eps) for kind, lr in rates.items()}
    reward_normalizer = RewardNormalizer(args.num_envs, args.reward_norm_gamma, args.reward_clip)
    num_iterations = args.total_timesteps // (args.num_envs * args.num_steps * WORLD_SIZE)
    kept = min(args.n_iteration, num_iterations) if args.e_auxiliary else 1  # rollouts; PPO needs the last one only
    shape, modules = (kept, args.num_envs, args.num_steps), {"agent": agent, **optimizers}
    observations = allocate_observations((*shape, 64, 64, 3), device, args.aux_buffer_device)
    obs, _ = envs.reset(seed=args.seed + 10_000 * RANK)  # each process draws levels of its own
    if saved:
        for name, module in modules.items():
            module.load_state_dict(saved["modules"][name])
        reward_normalizer.load_state_dict(saved["processes"][RANK]["reward_normalizer"])
        if isinstance(envs, ProcgenVecEnv):
            obs = envs.set_state(saved["processes"][RANK]["envs"])
    run, discounts = Run(args, saved), {"gamma": args.gamma, "gae_lambda": args.gae_lambda}
    try:
        while run.state["iteration"] < num_iterations:
            # Seeded anew at every phase: a resumed run, or one that evaluates in between, draws the same numbers.
            torch.manual_seed(int(np.random.SeedSequence((args.seed, RANK, run.state["phase"])).generate_state(1)[0]))
            length, value_targets = min(args.n_iteration, num_iterations - run.state["iteration"]), []
            for i in range(length):  # the policy phase
                left = 1 - run.state["iteration"] / num_iterations if args.anneal_lr else 1
                for kind, optimizer in optimizers.items():
                    optimizer.param_groups[0]["lr"] = left * rates[kind]
                start = time.perf_counter()
                rollout, obs = collect_rollout(agent, envs, obs, observations[i % kept], device)
                collected = time.perf_counter()
                rewards = reward_normalizer(rollout.rewards, rollout.firsts[:, :-1])
                gae = compute_gae(rewards=rewards, values=rollout.values.cpu(), firsts=rollout.firsts, **discounts)
                advantages, targets = (x.to(device) for x in gae)
                value_targets.append(targets)
                metrics = policy_phase(agent, optimizers, rollout, advantages, targets, args)
                metrics |= {"time/rollout": collected - start, "time/policy_phase": time.perf_counter() - collected}
                run.log(metrics | {"charts/learning_rate": left * args.learning_rate}, rollout.episodes)
            if length == args.n_iteration and args.e_auxiliary:
                start, segments = time.perf_counter(), (observations.flatten(0, 1), torch.cat(value_targets))
                metrics = auxiliary_phase(agent, optimizers["auxiliary"], *segments, args, run.progress)
                run.log(metrics | {"time/auxiliary_phase": time.perf_counter() - start})
            run.state["phase"] += 1
            if RANK == 0 and args.eval_interval and run.state["phase"] % args.eval_interval == 0:
                run.log(evaluate(agent, args, device, run.directory, run.state["global_step"]))
            if RANK == 0 and args.capture_video:
                record_video(agent, args, device, run.directory, run.state["global_step"], run.wandb)
            run.write_row()
            last = run.state["iteration"] == num_iterations
            if args.checkpoint_interval and (last or run.state["phase"] % args.checkpoint_interval == 0):
                simulators = envs.get_state() if isinstance(envs, ProcgenVecEnv) else None
                processes = gather_objects({"envs": simulators, "reward_normalizer": reward_normalizer.state_dict()})
                if RANK == 0:
                    run.save(modules={k: module.state_dict() for k, module in modules.items()}, processes=processes)
        return run.finish(device)
    except KeyboardInterrupt:
        say(f"interrupted at step {run.state['global_step']}; {run.advice}")
        raise
    finally:
        run.write_row()
        run.bar.close()
        if run.wandb:
            run.wandb.finish()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        args = parse_args()
        if args.evaluate:
            (device, bf16_phases), saved = start_process(args), load_checkpoint(args.evaluate)
            agent = Agent(15, args.arch, bf16_phases).to(device)
            agent.load_state_dict(saved["modules"]["agent"])
            for report in (evaluate, record_video) if args.capture_video else (evaluate,):
                report(agent, args, device, Path(args.evaluate), saved["run"]["global_step"])
        else:
            train(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error}")

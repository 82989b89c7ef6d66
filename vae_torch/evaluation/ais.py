"""log p(x) by annealed importance sampling, and bounds on it from both sides. Nats per image."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae_torch.bars import bar
from vae_torch.config import ConfigError
from vae_torch.evaluation.partial import Partial, in_parts
from vae_torch.evaluation.simulated import simulated_pixels
from vae_torch.machine import wide
from vae_torch.seeds import Stream, seeded_generator
from vae_torch.vae import VAE, in_eval_mode

_ACCEPTED = 0.65  # target acceptance of HMC: Neal, *MCMC using Hamiltonian dynamics* (2011)


class AnnealedEstimate(NamedTuple):
    """log p(x) of N images by annealed importance sampling."""

    log_px: Tensor  # (N,) nats, in expectation a lower bound
    log_weights: Tensor  # (chains, N) log-weight of each chain
    acceptance: Tensor  # (N,) share of the proposals that were accepted


class Sandwich(NamedTuple):
    """Bounds on log p(x) of images sampled from the model itself."""

    x: Tensor  # (N, *shape)
    lower: Tensor  # (N,) nats
    upper: Tensor  # (N,) nats


@in_eval_mode
def annealed_log_px(
    vae: VAE,
    x: Tensor,
    *,
    temperatures: int = 1000,
    chains: int = 8,
    leapfrogs: int = 8,
    seed: int = 0,
    chunk: int = 4096,
    progress: bool = False,
    store: Partial | None = None,
) -> AnnealedEstimate:
    """Log p(x) by annealed importance sampling from the prior, with Hamiltonian Monte Carlo.

    Wu, Burda, Salakhutdinov and Grosse, *On the Quantitative Analysis of Decoder-Based Generative
    Models* (ICLR 2017): chains move from p(z) to p(x|z) p(z) through p(z) p(x|z)^β. They start from
    the prior and not from q(z|x), so they can find modes that the encoder does not know. Separate
    chains tune the step sizes beforehand; tuning on the counted chains would break the lower bound.

    Args:
        vae: The model.
        x: (N, *shape).
        temperatures: Values of β; the bound rises with them.
        chains: Chains per image.
        leapfrogs: Leapfrog steps per proposal.
        seed: Random seed of all noise.
        chunk: Decoder rows at once: `chunk / chains` images.
        progress: Show a bar on a terminal.
        store: Keeps finished images, so that an interrupted estimate resumes.

    Raises:
        ValueError: A number is below 1, `VAE.check` refuses x, or log p(x|z) has no gradient.
    """
    _check_counts(temperatures, chains, leapfrogs, chunk)
    check_gradient(vae)
    x = vae.check(x)

    def anneal(start: int, stop: int) -> Tensor:
        part = x[start:stop]
        noise = seeded_generator(x.device, seed, start, Stream.ANNEAL)
        z = _from_prior(vae, chains * len(part), noise).to(x).unflatten(0, (chains, -1))
        sizes = _tuned(vae, part, z, temperatures, leapfrogs, noise)
        words = f"AIS, images {start + 1} to {stop}" if progress else None
        log_w, accepted = _anneal(vae, part, z, sizes, leapfrogs, noise, words=words)
        return torch.cat([log_w, accepted.unsqueeze(0)]).T

    together = max(1, chunk // chains)
    rows = in_parts(anneal, len(x), together, vae=vae, name="ais", store=store, progress=False)
    log_w = rows[:, :-1].T
    return AnnealedEstimate(log_w.logsumexp(0) - math.log(chains), log_w, rows[:, -1])


@in_eval_mode
def sandwich_log_px(
    vae: VAE,
    images: int,
    *,
    temperatures: int = 1000,
    chains: int = 8,
    leapfrogs: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> Sandwich:
    """Bounds from below and above on log p(x) of images sampled from the model.

    Bidirectional Monte Carlo: Grosse, Ghahramani and Adams, *Sandwiching the marginal likelihood*
    (2015). The z that an image was made from is an exact sample of p(z|x); chains run from it back
    to the prior. The distance between the bounds shows how exact annealing is on this model.

    Args:
        vae: A model whose likelihood can sample.
        images: Number of images to sample.
        temperatures: As in `annealed_log_px`.
        chains: As in `annealed_log_px`.
        leapfrogs: As in `annealed_log_px`.
        seed: Random seed of all noise.
        progress: Show a bar on a terminal.

    Raises:
        ValueError: A number is below 1.
        ConfigError: The likelihood cannot sample.
    """
    _check_counts(temperatures, chains, leapfrogs, images)
    weight = next(vae.parameters())
    noise = seeded_generator(weight.device, seed, Stream.ANNEAL, 1)
    with torch.no_grad():
        z = _from_prior(vae, images, noise).to(weight)
        x = simulated_pixels(vae, vae.decode(z), noise)
    settings = (temperatures, leapfrogs, noise)
    fresh = _from_prior(vae, chains * images, noise).to(weight).unflatten(0, (chains, -1))
    sizes = _tuned(vae, x, fresh, *settings)
    words = ("AIS up", "AIS down") if progress else (None, None)
    up, _ = _anneal(vae, x, fresh, sizes, leapfrogs, noise, words=words[0])
    exact = z.expand(chains, -1, -1).clone()
    down, _ = _anneal(vae, x, exact, sizes, leapfrogs, noise, back=True, words=words[1])
    count = math.log(chains)
    return Sandwich(x, up.logsumexp(0) - count, count - down.logsumexp(0))


def check_gradient(vae: VAE) -> None:
    """Check that chains can move.

    Raises:
        ConfigError: log p(x|z) has no gradient.
    """
    weight = next(vae.parameters())
    with torch.enable_grad():
        z = weight.new_zeros(1, vae.latent_dim, requires_grad=True)
        log_px = vae.likelihood.log_prob(weight.new_zeros(1, *vae.input_shape), vae.decode(z))
        found = torch.autograd.grad(log_px.sum() + 0 * weight.sum(), z, allow_unused=True)[0]
    if found is None:
        raise ConfigError(
            f"eval.ais: likelihood {type(vae.likelihood).__name__} has no gradient in z, which "
            "Hamiltonian Monte Carlo needs; leave eval.ais out"
        )


def _check_counts(temperatures: int, chains: int, leapfrogs: int, rows: int) -> None:
    if min(temperatures, chains, leapfrogs, rows) < 1:
        raise ValueError(
            f"temperatures={temperatures}, chains={chains}, leapfrogs={leapfrogs}, {rows} images "
            "or rows: all must be 1 or more"
        )


def _from_prior(vae: VAE, n: int, noise: torch.Generator) -> Tensor:
    with torch.no_grad():
        return vae.prior.sample(n, noise)  # type: ignore[no-any-return]


def _betas(temperatures: int) -> list[float]:
    """0 to 1, close together at both ends: the sigmoid schedule of Wu et al. (2017)."""
    ends = torch.sigmoid(torch.linspace(-4, 4, temperatures + 1, dtype=torch.float64))
    scaled = (ends - ends[0]) / (ends[-1] - ends[0])
    return scaled.tolist()


def _tuned(
    vae: VAE,
    x: Tensor,
    z: Tensor,
    temperatures: int,
    leapfrogs: int,
    noise: torch.Generator,
) -> Tensor:
    """Step sizes (temperatures, N) with which HMC accepts two of three proposals."""
    few = min(temperatures, max(50, temperatures // 10))
    sizes = z.new_full((few, len(x)), 0.1)
    _anneal(vae, x, z, sizes, leapfrogs, noise, tune=True)
    if few == temperatures:
        return sizes
    logs = sizes.log().T.unsqueeze(1)  # (N, 1, few)
    fine = torch.nn.functional.interpolate(logs, temperatures, mode="linear", align_corners=True)
    return fine.squeeze(1).T.exp()


def _anneal(
    vae: VAE,
    x: Tensor,
    z: Tensor,
    sizes: Tensor,
    leapfrogs: int,
    noise: torch.Generator,
    *,
    back: bool = False,
    tune: bool = False,
    words: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-weights (chains, N) and acceptance (N,) of chains from z (chains, N, latent_dim).

    `back`: from p(z|x) to the prior. `tune`: overwrite `sizes` (temperatures, N) on the way.
    """
    betas = _betas(len(sizes))
    order = range(len(sizes), 0, -1) if back else range(1, len(sizes) + 1)
    log_w = wide(z.new_zeros(z.shape[:2]))
    accepted = wide(x.new_zeros(len(x)))
    state = _evaluate(vae, x, z)
    size = sizes[0].clone()
    for step in bar(order, words or "", show=words is not None):
        change = betas[step] - betas[step - 1]
        if not back:
            log_w += wide(change * state.log_px_given_z)
        size = size if tune else sizes[step - 1]
        state, probability = _hmc(vae, x, state, betas[step], size, leapfrogs, noise)
        rate = probability.mean(0)  # over chains
        accepted += rate
        if tune:
            size = size * torch.exp(0.2 * (rate - _ACCEPTED)).to(size)
            sizes[step - 1] = size
        if back:
            log_w -= wide(change * state.log_px_given_z)
    return log_w, accepted / len(sizes)


class _State(NamedTuple):
    """Positions of the chains, with both terms of the target and their gradients there."""

    z: Tensor  # (chains, N, latent_dim)
    log_px_given_z: Tensor  # (chains, N)
    log_pz: Tensor  # (chains, N)
    grad_px: Tensor  # (chains, N, latent_dim)
    grad_pz: Tensor  # (chains, N, latent_dim)


def _evaluate(vae: VAE, x: Tensor, z: Tensor) -> _State:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_px_given_z = vae.likelihood.log_prob(x, vae.decode(z))
        log_pz = vae.log_prior(z)
        (grad_px,) = torch.autograd.grad(log_px_given_z.sum(), z)
        (grad_pz,) = torch.autograd.grad(log_pz.sum(), z)
    return _State(z.detach(), log_px_given_z.detach(), log_pz.detach(), grad_px, grad_pz)


def _hmc(
    vae: VAE,
    x: Tensor,
    state: _State,
    beta: float,
    size: Tensor,
    leapfrogs: int,
    noise: torch.Generator,
) -> tuple[_State, Tensor]:
    """One transition that leaves p(z) p(x|z)^beta unchanged, and its acceptance (chains, N)."""
    z = state.z
    momentum = torch.randn(z.shape, generator=noise, device=z.device).to(z)
    step = size.unsqueeze(-1)
    energy = _energy(state, beta, momentum)
    new, p = state, momentum + 0.5 * step * (state.grad_pz + beta * state.grad_px)
    for i in range(leapfrogs):
        new = _evaluate(vae, x, new.z + step * p)
        kick = 0.5 if i == leapfrogs - 1 else 1.0
        p = p + kick * step * (new.grad_pz + beta * new.grad_px)
    change = energy - _energy(new, beta, p)
    probability = change.nan_to_num(nan=-math.inf).clamp(max=0).exp()
    coin = torch.rand(probability.shape, generator=noise, device=z.device)
    taken = (wide(coin) < probability).to(z.device)
    kept = [
        torch.where(taken.unsqueeze(-1) if a.ndim > taken.ndim else taken, a, b)
        for a, b in zip(new, state, strict=True)
    ]
    return _State(*kept), probability


def _energy(state: _State, beta: float, momentum: Tensor) -> Tensor:
    potential = wide(state.log_pz) + beta * wide(state.log_px_given_z)
    return 0.5 * (wide(momentum) ** 2).sum(-1) - potential

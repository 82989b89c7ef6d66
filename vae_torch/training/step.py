"""One step of training: loss, gradient and optimiser; op by op, or as one graph.

On CUDA a small step spends its time on a hundred kernel launches, so it is captured and replayed.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.optim.adam import adam

from vae_torch.config import ConfigError, OptimizerConfig
from vae_torch.images import Batch
from vae_torch.parts.objectives import Noise, Objective, loss_and_metrics
from vae_torch.vae import VAE

_log = logging.getLogger("vae_torch")

# The results of a step: metric names, "loss" first, and their means over the images, (n,).
Means = tuple[tuple[str, ...], Tensor]

# A batch, its noise, the KL's weight (), the learning rate (None: the optimiser's own) -> means
Step = Callable[[Batch, Noise, Tensor, float | None], Means]
_Update = Callable[[Batch, Noise, Tensor], Means]


def make_optimizer(vae: VAE, settings: OptimizerConfig) -> torch.optim.Optimizer:
    """Make the optimiser that the settings name, over all parameters of the model."""
    parameters = list(vae.parameters())
    decay = settings.weight_decay
    cuda = parameters[0].is_cuda
    # a captured step reads its learning rate from a fixed address
    lr = torch.tensor(settings.lr, device=parameters[0].device) if cuda else settings.lr
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=settings.momentum, weight_decay=decay, fused=True
        )
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(
        parameters,
        lr,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=decay,
        fused=True,
        capturable=cuda,
    )


def eager_step(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    precision: str,
    *,
    clip_norm: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Step:
    """A training step that runs op by op. fp16 needs a scaler, or small gradients round to 0."""
    update = _eager_update(vae, optimizer, objective, precision, clip_norm, scaler)

    def step(batch: Batch, noise: Noise, beta: Tensor, lr: float | None) -> Means:
        _set_lr(optimizer, lr)
        return update(batch, noise, beta)

    return step


def _eager_update(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    precision: str,
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None = None,
) -> _Update:
    """A step after its learning rate has been set."""
    parameters = list(vae.parameters())
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which changes nothing

    def update(batch: Batch, noise: Noise, beta: Tensor) -> Means:
        loss, means = _loss_and_means(vae, batch, noise, objective, beta, precision)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        scaler.step(optimizer)  # skipped, and the scale halved, where a gradient is infinite
        scaler.update()
        return means

    return update


def captured_step(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    precision: str,
    *,
    clip_norm: float | None = None,
    batch_size: int | None = None,
) -> Step:
    """The eager step, captured once as a CUDA graph and replayed: one launch instead of hundreds.

    It runs the kernels of the eager step, so the bits are the same. The first three steps of a size
    run op by op, as torch requires before a capture. So do batches of another size than
    `batch_size` (that of the first batch if None), such as the last of an epoch. If the step cannot
    be captured, all steps run op by op after a warning: for example with a network that moves
    tensors to the CPU.
    """
    update = _eager_update(vae, optimizer, objective, precision, clip_norm)
    side = torch.cuda.Stream()
    graphs: dict[tuple[int, ...], _Graph] = {}  # by the shape of eps: early samples may be fewer
    steps_before: dict[tuple[int, ...], int] = {}
    failed = False

    def step(batch: Batch, noise: Noise, beta: Tensor, lr: float | None) -> Means:
        nonlocal batch_size, failed
        batch_size = batch_size or len(batch.x)
        _set_lr(optimizer, lr)
        if failed or len(batch.x) != batch_size:
            return update(batch, noise, beta)
        shape = tuple(noise.eps.shape)
        if steps_before.setdefault(shape, 0) < _STEPS_BEFORE_CAPTURE:
            steps_before[shape] += 1
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                means = update(batch, noise, beta)
            torch.cuda.current_stream().wait_stream(side)
            return means
        if shape not in graphs:
            try:
                graphs[shape] = _Graph(update, batch, noise, beta)
            except Exception as error:  # whatever torch or a network raises
                failed = True
                _log.warning(
                    "the step cannot be captured as a CUDA graph, so it runs op by op, which is "
                    "slower (%s)",
                    str(error).partition("\n")[0],
                )
                return update(batch, noise, beta)
        return graphs[shape].replay(batch, noise, beta)

    return step


_STEPS_BEFORE_CAPTURE = 3


class _Graph:
    """An update as a CUDA graph; its tensors keep their addresses."""

    def __init__(self, update: _Update, batch: Batch, noise: Noise, beta: Tensor) -> None:
        self.batch, self.noise = Batch(*map(_cloned, batch)), Noise(*map(_cloned, noise))
        self.beta = beta.clone()
        self.graph = torch.cuda.CUDAGraph()
        # lets a thread that pins memory for a user's loader keep working
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.means = update(self.batch, self.noise, self.beta)

    def replay(self, batch: Batch, noise: Noise, beta: Tensor) -> Means:
        """Run the update on these inputs; the next call overwrites its means."""
        places = (*self.batch, *self.noise, self.beta)
        for place, value in zip(places, (*batch, *noise, beta), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.means


def _cloned(value: Any) -> Any:
    return None if value is None else value.clone()


def compiled_step(
    vae: VAE,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    precision: str,
    *,
    clip_norm: float | None = None,
    batch_size: int | None = None,
) -> Step:
    """The same step as one graph, fused across forward, backward and optimiser.

    Two kinds of batches run op by op: the first, which creates the optimiser's state, and those of
    another size than `batch_size` (that of the first batch if None), such as the last of an epoch,
    which are not worth compiling for. All steps run op by op, after a warning, if they meet a bug
    of torch 2.14 (its issue 196570): on some processors a mixture prior does.

    Raises:
        ConfigError: This torch is too old to trace a gradient into a graph.
    """
    check_can_compile()
    eager = eager_step(vae, optimizer, objective, precision, clip_norm=clip_norm)
    device = next(vae.parameters()).device
    lr_now = torch.zeros((), device=device)  # a float would recompile at every change
    graph: Callable[..., Means] | None = None
    failed = False
    stateful = isinstance(optimizer, torch.optim.Adam) or bool(optimizer.defaults["momentum"])

    def make_graph() -> Callable[..., Means]:
        parameters = [p for p in vae.parameters() if p.requires_grad]
        update = _update(optimizer, parameters)

        def whole(batch: Batch, noise: Noise, beta: Tensor, lr: Tensor) -> Means:
            loss, means = _loss_and_means(vae, batch, noise, objective, beta, precision)
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                if clip_norm is not None:
                    gradients = _clipped(gradients, clip_norm)
                update(gradients, lr)
            return means

        # A graph's constants do not change while it lives, so only tensors other than parameters
        # are checked before a step; all checks would take 4% of it. `isolate_recompiles` gives each
        # graph its own cache: without these checks a shared one could serve another model.
        options = {
            "guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe,
            "triton.cudagraphs": device.type == "cuda",
        }
        compile_: Callable[..., Any] = torch.compile  # its stubs lack `isolate_recompiles`
        compiled: Callable[..., Means] = compile_(
            whole, dynamic=False, fullgraph=True, isolate_recompiles=True, options=options
        )
        return compiled

    def step(batch: Batch, noise: Noise, beta: Tensor, lr: float | None) -> Means:
        nonlocal graph, failed, batch_size
        batch_size = batch_size or len(batch.x)
        first = stateful and not optimizer.state
        if failed or first or len(batch.x) != batch_size:
            return eager(batch, noise, beta, lr)
        graph = graph or make_graph()
        assert lr is not None
        _set_lr(optimizer, lr)  # keep param_groups in sync for readers of the optimizer
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True):
                return graph(batch, noise, beta, lr_now.fill_(lr))
        except torch._dynamo.exc.BackendCompilerFailed as error:  # nothing has changed yet
            if not isinstance(error.inner_exception, KeyError):  # a full disk, say
                raise
            failed = True
            _log.warning(
                "compile=true: a bug of torch keeps it from compiling this step (KeyError: %s); "
                "running op by op instead",
                error.inner_exception,
            )
            return eager(batch, noise, beta, lr)

    return step


def check_can_compile() -> None:
    """Refuse to compile with a torch that cannot.

    Raises:
        ConfigError: It is too old to trace a gradient into a graph.
    """
    if Version(torch.__version__) < Version("2.14"):
        raise ConfigError(
            f"compile=true: a whole step needs torch 2.14, this is {torch.__version__}; install "
            "it, or use compile=false"
        )


def check_precision(precision: str, device: torch.device, *, compile: bool) -> None:
    """Refuse fp16 where it is not meant for.

    Raises:
        ConfigError: The device is no CUDA card, or the step is to be compiled.
    """
    if precision != "fp16":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"precision=fp16 with device={device.type}: it is for CUDA cards; use precision=fp32, "
            "or bf16 on a processor with bf16 arithmetic"
        )
    if compile:
        raise ConfigError(
            "precision=fp16 with compile=true: its gradient scaler is of the uncompiled step; use "
            "compile=false, or precision=bf16"
        )


_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _loss_and_means(
    vae: VAE, batch: Batch, noise: Noise, objective: Objective, beta: Tensor, precision: str
) -> tuple[Tensor, Means]:
    """The loss, (), and the means to record."""
    dtype, device = _AUTOCAST.get(precision, torch.bfloat16), batch.x.device.type
    with torch.autocast(device, dtype, enabled=precision in _AUTOCAST):
        losses, metrics = loss_and_metrics(objective, vae, batch, noise, beta)
        loss = losses.mean()
    scalars = {name: values for name, values in metrics.items() if values.ndim == 1}
    means = [loss.detach(), *(values.detach().mean() for values in scalars.values())]
    return loss, (("loss", *scalars), torch.stack(means))


def _clipped(gradients: Sequence[Tensor], norm: float) -> tuple[Tensor, ...]:
    """`clip_grad_norm_` for a graph, where gradients are not attached to parameters."""
    factor = (norm / (nn.utils.get_total_norm(gradients) + 1e-6)).clamp(max=1.0)
    return tuple(gradient * factor for gradient in gradients)


def _set_lr(optimizer: torch.optim.Optimizer, lr: float | None) -> None:
    for group in optimizer.param_groups:
        if lr is None:
            continue
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _update(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]
) -> Callable[[Sequence[Tensor], Tensor], None]:
    """`optimizer.step()` for a graph, as a function of the gradients and the learning rate.

    Its settings are read here once, so that the graph does not depend on them.
    """
    (group,) = optimizer.param_groups
    decay = group["weight_decay"]
    decoupled = isinstance(optimizer, torch.optim.AdamW)

    def decayed(gradients: Sequence[Tensor]) -> list[Tensor]:
        # not left to `adam`: where the gradient is a matrix multiplication, inductor of torch 2.14
        # turns `grad.add(p, alpha=decay)` into an addmm and loses the factor
        if decoupled or not decay:
            return list(gradients)
        return [g + decay * p for g, p in zip(gradients, parameters, strict=True)]

    if isinstance(optimizer, torch.optim.SGD) and (momentum := group["momentum"]):
        averages = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        _keep_in_place(averages)

        def sgd_with_momentum(gradients: Sequence[Tensor], lr: Tensor) -> None:
            for parameter, average, gradient in zip(
                parameters, averages, decayed(gradients), strict=True
            ):
                average.mul_(momentum).add_(gradient)
                parameter.sub_(lr * average)

        return sgd_with_momentum
    if isinstance(optimizer, torch.optim.SGD):

        def sgd(gradients: Sequence[Tensor], lr: Tensor) -> None:
            for parameter, gradient in zip(parameters, decayed(gradients), strict=True):
                parameter.sub_(lr * gradient)

        return sgd

    states = [optimizer.state[parameter] for parameter in parameters]
    means, squares, steps = (
        [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
    )
    _keep_in_place([*means, *squares, *steps])
    beta1, beta2 = group["betas"]
    eps = group["eps"]

    def adam_(gradients: Sequence[Tensor], lr: Tensor) -> None:
        adam(
            list(parameters),
            decayed(gradients),
            means,
            squares,
            [],
            steps,
            foreach=False,
            capturable=lr.device.type == "cuda",
            decoupled_weight_decay=decoupled,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=decay if decoupled else 0.0,
            eps=eps,
            maximize=False,
        )

    return adam_


def _keep_in_place(states: Sequence[Tensor]) -> None:
    """Fix the addresses of tensors that a CUDA graph changes."""
    for state in states:
        if state.is_cuda:
            torch._dynamo.mark_static_address(state)

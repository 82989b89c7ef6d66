"""Speed of a training step and an evaluation, beside reference loops and the machine's limit.

python scripts/benchmark.py [--quick] [--json FILE]

All contestants run in one process, one repetition each in rotation, so that a drifting machine
favours none. Times are per epoch of 60,000 random images; speed does not depend on their content.
"""

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import ToTensor
from tqdm import tqdm

from vae_torch import VAE, train
from vae_torch.cli.messages import Parser, make_folder, refuse, shown, tell_interrupts
from vae_torch.config import CHOICES, ConfigError
from vae_torch.data import ImageDataset, image_loader
from vae_torch.evaluate import importance_log_px
from vae_torch.figures import DIGIT_COLOURS, new_axes
from vae_torch.files import write_atomically
from vae_torch.machine import (
    bf16_factor,
    cpp_compiler,
    device_name,
    set_products,
    slow_bf16,
    tune_cpu,
)
from vae_torch.runs.identity import versions

EPOCH = 60_000  # images
PIXELS, HIDDEN, LATENT, BATCH = 784, 512, 2, 128
CPU = torch.device("cpu")
TOO_SLOW = 5.0  # bf16 over fp32 time of a matmul; processors without bf16 showed 65 to 98

Run = Callable[[], float]  # one repetition; seconds


def main() -> None:
    """Measure, print, write."""
    options = parse()
    tune_cpu(None)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6_400 if options.quick else 19_200, 28, 28), dtype=torch.uint8)
    contestants = training_contestants(images, precisions_worth_it(), compiled=not options.quick)
    contestants |= evaluation_contestants(16)
    seconds = alternate(contestants, options.repetitions)
    report = {
        "unit": f"seconds per epoch of {EPOCH} images; evaluation: seconds as run",
        "rows": {name: summary(times) for name, times in seconds.items()},
        "repetitions": options.repetitions,
        "images_per_repetition": len(images),
        "peak_memory_mib": peak_memory_mib(),
        "device": device_name(CPU),
        "processor": processor(),
        "versions": versions(),
    }
    if not options.quick:
        report["scale"] = scaling()
        report["run"] = whole_run()
    report["ratios"] = ratios(seconds, report.get("run"))
    show(report)
    path = Path(options.json)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    plot(report, path.with_suffix(".png"))
    print(f"\nwritten to {shown(path.resolve())} and {path.with_suffix('.png').name} beside it")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="less than a minute: short, not compiled"
    )
    parser.add_argument("--json", default="outputs/benchmark.json", help="where the figures go")
    parser.add_argument("--repetitions", type=int, default=5, help="timed repetitions, at least 1")
    options = parser.parse_args()
    if options.repetitions < 1:
        refuse(f"--repetitions {options.repetitions}: must be 1 or more")
    make_folder("--json", Path(options.json).parent)  # fails before minutes of measuring
    return options


def precisions_worth_it() -> tuple[str, ...]:
    """All precisions, without bf16 where the processor lacks it: it would take minutes."""
    known = tuple(precision for precision in CHOICES["precision"] if precision != "fp16")  # CUDA
    factor = bf16_factor()
    if factor < TOO_SLOW:
        return known
    print(f"left out: {slow_bf16(factor)}", file=sys.stderr)
    return tuple(precision for precision in known if precision != "bf16")


def training_contestants(
    images: Tensor, precisions: tuple[str, ...], *, compiled: bool
) -> dict[str, Run]:
    """Every way to train on `images`; a repetition is one pass, scaled to an epoch."""
    scale = EPOCH / len(images)
    labels = torch.zeros(len(images), dtype=torch.int64)
    loader = image_loader(ImageDataset(images, labels), BATCH, shuffle=True)
    test_loader = image_loader(ImageDataset(images[:1], labels[:1]), BATCH)

    def ours(precision: str, compile: bool) -> Run:
        vae = VAE((PIXELS,), LATENT, HIDDEN)

        def run() -> float:
            history = train(  # the first epoch may compile a graph and is not counted
                vae, loader, test_loader, epochs=2, precision=precision, compile=compile
            )
            return EPOCH / float(history["train/images_per_second"][-1])

        return run

    rows = {f"ours, {p}": with_precision(p, ours(p, False)) for p in precisions}
    rows["ours, fp32, torch's default"] = ours("fp32", False)
    if compiled:
        try:
            cpp_compiler()
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            rows |= {f"ours, {p}, compiled": with_precision(p, ours(p, True)) for p in precisions}
    rows |= {
        "torchvision loop": lambda: scale * tutorial_loop(images),
        "numpy loop": lambda: scale * numpy_loop(images),
    }

    def bound(dtype: torch.dtype, multiplies: bool, adam: bool) -> Run:
        return lambda: scale * limit(len(images), dtype, multiplies=multiplies, adam=adam)

    fp32, bf16 = torch.float32, torch.bfloat16
    rows |= {
        "Adam": bound(fp32, False, True),
        "matmuls, fp32, torch's default": bound(fp32, True, False),
        "matmuls, fp32": with_precision("fp32", bound(fp32, True, False)),
        "matmuls and Adam alternating, fp32": with_precision("fp32", bound(fp32, True, True)),
    }
    if "bf16" in precisions:
        rows |= {
            "matmuls, bf16": bound(bf16, True, False),
            "matmuls and Adam alternating, bf16": bound(bf16, True, True),
        }
    return rows


def with_precision(precision: str, run: Run) -> Run:
    """`run` with the fp32 matmuls of our scripts instead of torch's default."""

    def turn() -> float:
        set_products(precision, CPU)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision("highest")

    return turn


def evaluation_contestants(images: int) -> dict[str, Run]:
    """Importance sampling with 5,000 samples per image, and its decoder's matmuls alone."""
    vae = VAE((PIXELS,), LATENT, HIDDEN)
    x = torch.rand(images, PIXELS)
    chunk, samples = 1024, 5000

    def evaluate() -> float:
        began = time.perf_counter()
        importance_log_px(vae, x, num_samples=samples, chunk=chunk)
        return time.perf_counter() - began

    def decoder_matmuls() -> float:
        z, h = torch.rand(chunk, LATENT), torch.rand(chunk, HIDDEN)
        first, second = torch.rand(LATENT, HIDDEN), torch.rand(HIDDEN, PIXELS)
        hidden, logits = torch.empty(chunk, HIDDEN), torch.empty(chunk, PIXELS)
        began = time.perf_counter()
        for _ in range(math.ceil(images * samples / chunk)):
            torch.mm(z, first, out=hidden)
            torch.mm(h, second, out=logits)
        return time.perf_counter() - began

    return {
        "log p(x)": with_precision("fp32", evaluate),
        "log p(x), matmuls, torch's default": decoder_matmuls,
        "log p(x), matmuls": with_precision("fp32", decoder_matmuls),
    }


class TutorialVAE(nn.Module):
    """The model as tutorials write it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(PIXELS, HIDDEN)
        self.mean = nn.Linear(HIDDEN, LATENT)
        self.logvar = nn.Linear(HIDDEN, LATENT)
        self.up = nn.Linear(LATENT, HIDDEN)
        self.out = nn.Linear(HIDDEN, PIXELS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities (B, pixels), mean and logvar."""
        h = F.relu(self.hidden(x))
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return torch.sigmoid(self.out(F.relu(self.up(z)))), mean, logvar


def tutorial_epoch(batches: Iterable[Tensor]) -> float:
    """Seconds of steps as tutorials write them, with `.item()` at each."""
    vae = TutorialVAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    began, total = time.perf_counter(), 0.0
    for x in batches:
        optimizer.zero_grad()
        reconstruction, mean, logvar = vae(x)
        bce = F.binary_cross_entropy(reconstruction, x, reduction="sum")
        loss = bce - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())
        loss.backward()
        optimizer.step()
        total += loss.item()
    return time.perf_counter() - began


class PILDigits(Dataset[tuple[Tensor, int]]):
    """What torchvision's MNIST does for one image: tensor to PIL and through the transform."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.transform = ToTensor()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index].numpy())), 0


def tutorial_loop(images: Tensor) -> float:
    """A torchvision DataLoader with ToTensor."""
    loader = DataLoader(PILDigits(images), batch_size=BATCH, shuffle=True)
    return tutorial_epoch(x.view(-1, PIXELS) for x, _ in loader)


def numpy_loop(images: Tensor) -> float:
    """The whole set as one float array, indexed batch by batch."""
    x = images.numpy().reshape(-1, PIXELS).astype("float32") / 255
    order = torch.randperm(len(x)).numpy()
    starts = range(0, len(x), BATCH)
    return tutorial_epoch(torch.from_numpy(x[order[at : at + BATCH]]) for at in starts)


def limit(images: int, dtype: torch.dtype, *, multiplies: bool, adam: bool) -> float:
    """The step's five large matmuls, fused Adam on their weights, or both alternating.

    Alternating, as in a step, each finds the cache full. Matmuls write into existing memory; in
    bf16 the weights and gradients are converted as autocast does.
    """
    x, h, logits = (torch.rand(BATCH, n).to(dtype) for n in (PIXELS, HIDDEN, PIXELS))
    weights = [nn.Parameter(torch.rand(PIXELS, HIDDEN)), nn.Parameter(torch.rand(HIDDEN, PIXELS))]
    grads = [torch.full_like(weight, 1e-3, dtype=dtype) for weight in weights]
    hidden, out = torch.empty_like(h), torch.empty_like(x)
    optimizer = torch.optim.Adam(weights, fused=True)
    began = time.perf_counter()
    for _ in range(math.ceil(images / BATCH)):
        if multiplies:
            up, down = (weight.detach().to(dtype) for weight in weights)
            torch.mm(x, up, out=hidden)  # encoder
            torch.mm(h, down, out=out)  # decoder
            torch.mm(h.T, logits, out=grads[1])
            torch.mm(logits, down.T, out=hidden)
            torch.mm(x.T, h, out=grads[0])
        if adam:
            for weight, grad in zip(weights, grads, strict=True):
                weight.grad = grad.float()
            optimizer.step()
    return time.perf_counter() - began


def alternate(contestants: dict[str, Run], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each contestant's repetitions, after one that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in tqdm(range(repetitions + 1), "benchmark", disable=None, leave=False):
        for name, run in contestants.items():
            took = run()
            if turn:
                seconds[name].append(took)
    return seconds


def whole_run() -> dict[str, float]:
    """The default run from the command line, end to end, against its own training steps."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, str(Path(__file__).parent / "train.py")]
        began = time.perf_counter()
        subprocess.run([*command, f"hydra.run.dir={run_dir}"], check=True, capture_output=True)
        seconds = time.perf_counter() - began
        lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = sum(EPOCH / json.loads(line)["train/images_per_second"] for line in lines)
    return {"seconds": seconds, "steps_seconds": steps}


def scaling() -> list[dict[str, float]]:
    """Images per second for growing numbers of images, and the peak memory."""
    set_products("fp32", CPU)
    found = []
    for n in (15_000, 30_000, 60_000, 600_000):
        images = torch.randint(0, 256, (n, PIXELS), dtype=torch.uint8)
        labels = torch.zeros(n, dtype=torch.int64)
        loader = image_loader(ImageDataset(images, labels), BATCH, shuffle=True)
        test_loader = image_loader(ImageDataset(images[:1], labels[:1]), BATCH)
        history = train(VAE((PIXELS,), LATENT, HIDDEN), loader, test_loader, epochs=1)
        rate = float(history["train/images_per_second"][0])
        size = round(images.numel() / 2**20)
        found.append({"images": n, "images_per_second": rate, "images_mib": size})
        found[-1]["peak_memory_mib"] = peak_memory_mib()
    return found


def summary(times: list[float]) -> dict[str, Any]:
    """Median and range of the repetitions."""
    return {"median": statistics.median(times), "low": min(times), "high": max(times)}


def ratios(seconds: dict[str, list[float]], run: Any) -> dict[str, float]:
    """Ratios of medians."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(value for name, value in median.items() if name.startswith("ours"))
    fp32, adam, log_px = (median[name] for name in ("ours, fp32", "Adam", "log p(x)"))
    torchs, ours = median["matmuls, fp32, torch's default"], median["matmuls, fp32"]
    found = {
        "fp32 / (torch's matmuls + Adam)": fp32 / (torchs + adam),
        "fp32 / (its matmuls + Adam)": fp32 / (ours + adam),
        "fp32 / matmuls and Adam alternating": fp32 / median["matmuls and Adam alternating, fp32"],
        "fp32 / torchvision loop": fp32 / median["torchvision loop"],
        "fp32 / numpy loop": fp32 / median["numpy loop"],
        "best / torchvision loop": best / median["torchvision loop"],
        "best / fp32": best / fp32,
        "best / fp32 with torch's matmuls": best / median["ours, fp32, torch's default"],
        "log p(x) / torch's matmuls": log_px / median["log p(x), matmuls, torch's default"],
        "log p(x) / its matmuls": log_px / median["log p(x), matmuls"],
    }
    if run:
        found["default run, end to end / its steps"] = run["seconds"] / run["steps_seconds"]
    return found


def show(report: dict[str, Any]) -> None:
    """The report as two tables."""
    print(f"{report['processor']}, {report['device']}, torch {report['versions']['torch']}")
    print(
        f"{report['repetitions']} repetitions each after one untimed; "
        f"peak memory of all together {report['peak_memory_mib']} MiB\n"
    )
    print(f"{'seconds per epoch of 60,000 images':38}  median    low    high")
    for name, row in report["rows"].items():
        note = "  (16 images)" if name.startswith("log p") else ""
        print(f"{name:38}{row['median']:8.2f}{row['low']:7.2f}{row['high']:8.2f}{note}")
    print()
    for name, ratio in report["ratios"].items():
        print(f"{name:38}{ratio:8.2f}")
    for row in report.get("scale", []):
        print(
            f"{row['images']:7} images: {row['images_per_second']:.0f} a second, peak memory "
            f"{row['peak_memory_mib']} MiB, {row['images_mib']} of them the images"
        )


def plot(report: dict[str, Any], path: Path) -> None:
    """The training rows as bars with their ranges."""
    rows = {n: r for n, r in report["rows"].items() if not n.startswith("log p")}
    names = sorted(rows, key=lambda n: -rows[n]["median"])
    medians = [rows[n]["median"] for n in names]
    spread = [
        [rows[n]["median"] - rows[n]["low"] for n in names],
        [rows[n]["high"] - rows[n]["median"] for n in names],
    ]
    ours, others, limits = DIGIT_COLOURS[0], DIGIT_COLOURS[8], DIGIT_COLOURS[9]
    colours = {"ours": ours, "matm": limits, "Adam": limits}
    figure, axes = new_axes(7, 0.45 * len(names) + 1.2)
    axes.barh(names, medians, xerr=spread, color=[colours.get(n[:4], others) for n in names])
    axes.set_xlabel("seconds per epoch of 60,000 images: median and range")
    axes.set_title(f"{report['processor']}, {report['device']}", fontsize=9)
    figure.savefig(path)


def peak_memory_mib() -> int:
    """Peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def processor() -> str:
    """The processor's name, from the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    tell_interrupts()
    main()

"""Rerun the results table: every row, every seed, evaluated, and the table in docs rewritten.

python scripts/reproduce.py [only=[strong] seeds=[0] threads=1]
python scripts/reproduce.py verify [default]   the releases in pretrained/ have the figures they say
python scripts/reproduce.py picture            nats against minutes of training, of the rows' runs
"""

import hashlib
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict

from vae_torch.cli.compose import compose
from vae_torch.cli.messages import refuse, tell_interrupts
from vae_torch.cli.settings_line import parser, settings_of
from vae_torch.config import ConfigError, about
from vae_torch.files import write_atomically

BEGIN, END = "<!-- results: written by scripts/reproduce.py -->", "<!-- end of results -->"


@dataclass
class Row:
    """One line of the table."""

    experiment: str | None
    metric: str  # of evaluation.json, or `loss`
    reference: str  # the figure to compare with
    source: str
    overrides: list[str] = field(default_factory=list)
    # standard deviation of that comparison: by the pixels that were drawn, and by seed; null: it
    # is not of equals
    error: float | None = None
    images: str = ""  # training images, ours / theirs
    pixels: str = ""  # test pixels, ours / theirs


@dataclass
class ReproduceConfig:
    """What `scripts/reproduce.py` composes from `conf/reproduce.yaml`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    only: Annotated[list[str] | None, about("row names; null: all")]
    seeds: Annotated[list[int], about("random seeds of each row")]
    out: Annotated[str, about("folder of the runs")]
    readme: Annotated[str, about("the file whose table is rewritten")]
    data_root: Annotated[str, about("folder of the images")]
    threads: Annotated[int | None, about("CPU threads of a training; null: torch's choice")]
    num_samples: Annotated[int, about("importance samples of log p(x); fewer give a worse figure")]
    log_px_images: Annotated[
        int | None, about("random images that get log p(x), for a slow decoder; null: all")
    ]
    limit_test: Annotated[int | None, about("only the first N test images, for a trial")]
    overrides: Annotated[list[str], about("more settings for every run, for a trial")]
    rows: Annotated[dict[str, Row], about("the rows of the table")]
    pretrained: Annotated[str, about("verify: the folder of the releases")] = "pretrained"
    picture: Annotated[str, about("picture: the file, .svg or .png")] = "nats.svg"
    pictured: Annotated[list[str], about("picture: its rows")] = field(default_factory=list)
    published: Annotated[dict[str, float], about("picture: its lines, nats by name")] = field(
        default_factory=dict
    )


def main() -> None:
    """Run what is missing, then rewrite the table."""
    tell_interrupts()
    line = parser(
        "reproduce",
        "Rerun the results table: every row, every seed, evaluated. All of it takes some 35 hours\n"
        "of two cores; rows that are there are not run again. Rewrites the table in\n"
        "docs/results/index.md.\n\n"
        "reproduce.py verify [NAME ...]: measure the releases in pretrained/ again, in minutes.\n"
        "reproduce.py picture: draw nats against minutes of training.",
        ReproduceConfig,
    )
    options = line.parse_args()
    words = [word for word in options.settings if "=" not in word]
    options.settings = [word for word in options.settings if "=" in word]
    config = settings_of(options, ReproduceConfig)
    if words:
        if words[0] == "verify":
            verify(config, words[1:])
        elif words == ["picture"]:
            draw(config)
        else:
            refuse(f"{words[0]}: must be verify or picture, or a setting, key=value")
        return
    try:
        refuse_bad_numbers(config)
        chosen = config.only or list(config.rows)
        for name in chosen:
            if name not in config.rows:
                raise ConfigError(f"only={name}: must be some of {', '.join(config.rows)}")
        refuse_runs_of_other_settings(config)
    except ConfigError as error:
        refuse(str(error))
    for name in chosen:
        for seed in config.seeds:
            try:
                run_and_evaluate(config, config.rows[name], seed)
            except subprocess.CalledProcessError as error:
                refuse(f"row {name}, seed {seed}: {' '.join(error.cmd[1:])} failed")
    readme = Path(config.readme)
    text = readme.read_text("utf-8") if readme.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    table = table_of(config, "" if is_trial(config) else old)
    if end and not is_trial(config):
        write_atomically(readme, f"{before}{begin}\n{table}\n{end}{after}".encode())
    print(table)


def verify(config: ReproduceConfig, names: list[str]) -> None:
    """Print recorded and measured figures of releases; exit with 1 if they differ."""
    from vae_torch.checkpoint import CheckpointError
    from vae_torch.data import DataError
    from vae_torch.machine import tune_cpu

    tune_cpu(config.threads)
    folder = Path(config.pretrained)
    releases = [folder / n for n in names] or sorted(p.parent for p in folder.glob("*/SHA256SUMS"))
    if not releases:
        refuse(f"pretrained={folder}: holds no release; name the folder where they are")
    print(f"{'release':16} {'figure':24} recorded   measured  difference    allowed  ok")
    failed = False
    try:
        for release in releases:
            for name, recorded, measured, allowed in figures_of(release, config.data_root):
                off = abs(measured - recorded)
                ok = off <= allowed  # false if one is NaN
                failed |= not ok
                numbers = f"{recorded:10.4f} {measured:10.4f} {off:11.5f} {allowed:10.5f}"
                print(f"{release.name:16} {name:22} {numbers}  {'yes' if ok else 'NO'}", flush=True)
    except (CheckpointError, ConfigError, DataError) as error:
        refuse(str(error))
    print(
        "\nRecorded: evaluation.json and config.json of the release. Measured: on the whole test\n"
        "set; log_px_exact on its first images. Allowed: the Monte Carlo error of a difference\n"
        "(4 standard deviations), at least half of the last digit that is reported."
    )
    if failed:
        raise SystemExit(1)


def figures_of(release: Path, data_root: str) -> Iterator[tuple[str, float, float, float]]:
    """For each figure: name, recorded value, measured value, and allowed difference.

    Raises:
        CheckpointError: The release is damaged, not evaluated, or of other images.
    """
    from vae_torch.checkpoint import CheckpointError, refuse_other_data
    from vae_torch.data import data_hash, image_dataset, loaders_of
    from vae_torch.evaluation.bounds import bound_metrics
    from vae_torch.quadrature import exact_log_px
    from vae_torch.release import CARD, SETTINGS, checked_files
    from vae_torch.stored import load_run

    vae, config = load_run(release)
    files = checked_files(release, SETTINGS, CARD)
    settings, card = (json.loads(files[name]) for name in (SETTINGS, CARD))
    config.data.root = data_root
    _, loader = loaders_of(config, "cpu")  # whose noise is that of the cards
    refuse_other_data(release / SETTINGS, settings, {"test": data_hash(loader)}, data_root)
    try:
        recorded = {name: float(card[name]["value"]) for name in ("elbo", "reconstruction", "kl")}
        seed = int(card["elbo"]["seed"])
        exact = card.get("log_px_exact", {}).get("first")
        if config.objective.name != "elbo" and settings["test_loss"] is not None:
            recorded = {"loss": float(settings["test_loss"]), **recorded}
        first = (int(exact["num_images"]), float(exact["value"])) if exact else None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{release / CARD}: no card of an evaluation ({error!r}); export the run again"
        ) from None
    goal, weight = config.objective, config.objective.beta
    times = [bound_metrics(vae, loader, goal, beta=weight, seed=seed + i) for i in range(5)]
    for name, value in recorded.items():
        error_of_difference = math.sqrt(2) * statistics.stdev(found[name] for found in times)
        digit = 1e-4 if name == "loss" else 1e-2
        yield name, value, times[0][name], max(4 * error_of_difference, digit / 2)
    if first:
        x, _ = image_dataset(loader).first(first[0])
        yield (
            f"log_px_exact of {first[0]}",
            first[1],
            exact_log_px(vae, x, progress=True).log_px.mean().item(),
            0.005,
        )


def refuse_bad_numbers(config: ReproduceConfig) -> None:
    """Refuse bad numbers before an hour of training, not after it."""
    for key in ("num_samples", "log_px_images", "limit_test", "threads"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: must be a whole number, 1 or more")
    if not config.seeds or not all(0 <= seed < 2**32 for seed in config.seeds):
        raise ConfigError(
            f"seeds={config.seeds}: must be one or more numbers between 0 and 4294967295"
        )


def refuse_runs_of_other_settings(config: ReproduceConfig) -> None:
    """Refuse existing runs unless the row's command would give them today."""
    from vae_torch.checkpoint import CheckpointError, Checkpoints

    for row in config.rows.values():
        for path in folder_of(config, row, 0).parent.glob("seed=*/summary.json"):
            seed = path.parent.name.removeprefix("seed=")
            now = compose(overrides_of(config, row, seed))
            try:
                Checkpoints(path.parent / "checkpoints", now).load("cpu")
            except CheckpointError as error:
                raise ConfigError(
                    f"{error}; or remove {path.parent}, or choose another out="
                ) from None


def is_trial(config: ReproduceConfig) -> bool:
    """Whether settings differ from those of the table."""
    return bool(config.overrides) or config.limit_test is not None


def folder_of(config: ReproduceConfig, row: Row, seed: int) -> Path:
    """The folder of a run. Rows with the same command share runs; trials have their own folder."""
    out = Path(f"{config.out}-trial" if is_trial(config) else config.out)
    first = next(n for n, other in config.rows.items() if command_of(other) == command_of(row))
    return out / first / f"seed={seed}"


def command_of(row: Row) -> str:
    """The command of one run of the row."""
    settings = [f"experiment={row.experiment}"] if row.experiment else []
    return " ".join(["train.py", *settings, *row.overrides])


def overrides_of(config: ReproduceConfig, row: Row, seed: int | str) -> list[str]:
    """The overrides that define a run, without where and how fast it runs."""
    return [*command_of(row).split()[1:], *config.overrides, f"seed={seed}"]


def run_and_evaluate(config: ReproduceConfig, row: Row, seed: int) -> None:
    """One training and its card, unless they exist."""
    run_dir = folder_of(config, row, seed)
    scripts = Path(__file__).parent
    if not (run_dir / "summary.json").exists():
        settings = overrides_of(config, row, seed)
        settings += [f"data.root={config.data_root}", f"hydra.run.dir={run_dir}"]
        settings += ["train.resume=auto"]
        settings += [f"threads={config.threads}"] if config.threads else []
        call([sys.executable, str(scripts / "train.py"), *settings])
    if not is_current(config, run_dir) or is_coarser(config, run_dir):
        settings = [f"run={run_dir}", f"eval.num_samples={config.num_samples}"]
        settings += [f"data_root={config.data_root}", "eval.overwrite=true"]
        settings += [f"eval.limit={config.limit_test}"] if config.limit_test else []
        if config.log_px_images:
            settings += [f"eval.log_px_images={config.log_px_images}"]
        call([sys.executable, str(scripts / "evaluate.py"), *settings])


def is_current(config: ReproduceConfig, run_dir: Path) -> bool:
    """Whether the run is finished and its card covers its last checkpoint and all test images."""
    try:
        card = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
        last = (run_dir / "checkpoints" / "last.pt").read_bytes()
        return (
            (run_dir / "summary.json").exists()
            and card["checkpoint"]["sha256"] == hashlib.sha256(last).hexdigest()
            and card["data"]["limit"] == config.limit_test
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_coarser(config: ReproduceConfig, run_dir: Path) -> bool:
    """Whether a card has fewer samples or fewer images than are asked for."""
    images = images_of(run_dir)
    fewer = images is not None and images < (config.log_px_images or math.inf)
    return fewer or samples_of(run_dir) < config.num_samples


def call(command: list[str]) -> None:
    """Run it; on Ctrl-C, which it gets too, wait until it has written its checkpoint."""
    with subprocess.Popen(command) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def table_of(config: ReproduceConfig, old: str = "") -> str:
    """The Markdown table of all rows; those without runs here stay as they are in the old table."""
    lines = [
        "| row | figure (nats; lower is better) | ours: mean ± sd | seeds | fitted proposals "
        "| reference | compared | source | training images, ours / theirs "
        "| test pixels, ours / theirs | minutes, wall clock |",
        "|" + 11 * "---|",
    ]
    for name, row in config.rows.items():
        folders = sorted(folder_of(config, row, 0).parent.glob("seed=*"))
        runs = [folder for folder in folders if is_current(config, folder)]
        if not runs:
            lines += [line for line in old.splitlines() if line.startswith(f"| `{name}` |")]
            continue
        values = [value_of(run, row.metric) for run in runs]
        digits = 4 if row.metric == "loss" else 2
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        samples = min(samples_of(run) for run in runs)
        images = min((n for n in map(images_of, runs) if n is not None), default=None)
        some = f", on {images:,} images" if images else ""
        fitted = ""
        if row.metric == "log_px_encoder":
            fitted = f"{statistics.mean(value_of(run, 'log_px') for run in runs):.2f}"
        words = {
            "elbo": "-ELBO",
            "log_px_encoder": f"-log p(x), {samples:,} samples from the encoder{some}",
            # of grey pixels, a Bernoulli likelihood gives no log p(x)
            "log_px_exact": f"exact -{'score' if row.pixels.startswith('grey') else 'log p(x)'}",
        }
        cells = (
            f"`{name}`",
            words.get(row.metric, row.metric),
            f"**{statistics.mean(values):.{digits}f}**{spread}",
            str(len(runs)),
            fitted,
            row.reference,
            compared(values, row),
            row.source,
            row.images,
            row.pixels,
            minutes_of(runs),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def minutes_of(runs: Sequence[Path]) -> str:
    """`47, cpu (1 thread); 31, cpu (2 threads)`: means of the runs on each device."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        seconds.setdefault(device_of(run), []).append(summary_of(run)["seconds"])
    return "; ".join(f"{statistics.mean(s) / 60:.0f}, {device}" for device, s in seconds.items())


def device_of(run_dir: Path) -> str:
    """`NVIDIA H100` for a run on that GPU, otherwise `cpu (2 threads)`."""
    return re.sub(r"cuda\S* \((.*)\)", r"\1", summary_of(run_dir)["device"])


def compared(values: list[float], row: Row) -> str:
    """`beats`, `reaches` or `misses`, by twice the error of the difference; empty if unknown."""
    if row.error is None:
        return ""
    ahead = float(row.reference) - statistics.mean(values)
    if abs(ahead) <= 2 * row.error:
        return "reaches"
    return "beats" if ahead > 0 else "misses"


def draw(config: ReproduceConfig) -> None:
    """Draw -bound on the test images over minutes, -log p(x) at the end, published figures."""
    from vae_torch.figures.plots import DIGIT_COLOURS, new_axes
    from vae_torch.runs.folders import read_metrics

    figure, axes = new_axes(7.5, 4.5)
    devices = set()
    for name, colour in zip(config.pictured, DIGIT_COLOURS, strict=False):
        if name not in config.rows:
            refuse(f"pictured={name}: must be some of {', '.join(config.rows)}")
        runs = sorted(folder_of(config, config.rows[name], 0).parent.glob("seed=*"))
        runs = [run for run in runs if (run / "evaluation.json").exists()]
        if not runs:
            refuse(f"out={config.out}: holds no evaluated run of row {name}; reproduce it first")
        for number, run in enumerate(runs):
            epochs = read_metrics(run)
            minutes = [sum(e["seconds"] for e in epochs[: i + 1]) / 60 for i in range(len(epochs))]
            bound = "test/iw_elbo" if "test/iw_elbo" in epochs[0] else "test/elbo"
            axes.plot(minutes, [-e[bound] for e in epochs], color=colour, lw=1)
            seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            label = None if number else f"{name}, {seeds}: bound; -log p(x) at the end"
            axes.plot(minutes[-1], value_of(run, "log_px"), "o", color=colour, label=label)
            devices.add(device_of(run))
    for source, nats in config.published.items():
        axes.axhline(nats, color="grey", lw=0.6, ls="--")
        place = {"transform": axes.get_yaxis_transform(), "va": "bottom"}
        axes.text(0.01, nats, source, fontsize=7, **place)
    axes.set(ylim=(77.5, 90), xlabel=f"minutes of training: {', '.join(sorted(devices))}")
    axes.set_ylabel("nats per image, lower is better")
    axes.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(config.picture)
    except (OSError, ValueError) as error:  # no such folder; no such kind of picture
        refuse(f"picture={config.picture}: {error}")
    print(config.picture)


def value_of(run_dir: Path, metric: str) -> float:
    """The row's metric of one run, as a loss: lower is better."""
    if metric == "loss":
        return float(summary_of(run_dir)["final"]["test/loss"])
    card = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    return -float(card[metric]["value"])


def samples_of(run_dir: Path) -> int:
    """Samples from the encoder for a run's log p(x); with fewer it looks worse on average."""
    card = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    return int(card["log_px_encoder"]["num_samples"])


def images_of(run_dir: Path) -> int | None:
    """Images, chosen at random, that got log p(x); None: all."""
    card = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    images: int | None = card["log_px_encoder"].get("estimated_images")
    return images


def summary_of(run_dir: Path) -> dict[str, Any]:
    """A run's summary.json."""
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text("utf-8"))
    return summary


if __name__ == "__main__":
    main()

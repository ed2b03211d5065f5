"""Simulate an archive run on 1 to 512 GPUs: where the time goes, and what limits it first.

    python -m benchmarks.scaling --gpu-rate 10 --storage-mb-s 2000

Every number is an option, so that measured ones can be put in. docs/scaling.md names those that were measured. The
simulation takes groups of images one after the other, as `infer --ray` hands them out:

- The listing comes first, at `--list-rate` files a second.
- A free worker takes a group. Its images take `1 / gpu-rate` seconds each, or longer if the processor or the storage is
  slower. All workers share the storage. A share of the groups is `--straggler-times` slower.
- A worker dies now and then. Its group is lost and done again, after the worker was replaced.
- One process writes the entries of all workers, at `--entry-rate` entries a second.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from dataclasses import asdict, dataclass

from bsdiff_rt.folder.ray_workers import GROUPS_PER_WORKER, LARGEST_GROUP

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Assumptions:
    """What a run is simulated with. Rates are per second."""

    images: int
    gpu_rate: float  # images of one GPU
    core_rate: float  # images that one core decodes, prepares, finishes and writes
    cores: int  # of each GPU
    image_mb: float  # read and written for an image
    storage_mb_s: float
    list_rate: float  # files
    entry_rate: float  # entries
    start_s: float  # of a worker
    death_hours: float  # mean time between deaths of a worker
    straggler_share: float
    straggler_times: float
    gpu_price: float  # of an hour


@dataclass(frozen=True)
class Outcome:
    """A simulated run.

    Attributes:
        workers: number of GPUs.
        hours: from start to end, listing included.
        images_per_second: over the whole run.
        efficiency: share of the GPUs' own rate that is reached.
        limit: what decides the rate of a group.
        redone: images that were done again because a worker died.
        price: of all GPUs for the whole time.
    """

    workers: int
    hours: float
    images_per_second: float
    efficiency: float
    limit: str
    redone: int
    price: float


def find_limit(given: Assumptions, workers: int) -> tuple[float, str]:
    """Return how many images one worker does in a second, and what keeps it from doing more."""
    rates = {
        "GPU": given.gpu_rate,
        "cores": given.core_rate * given.cores,
        "storage": given.storage_mb_s / given.image_mb / workers,
        "report": given.entry_rate / workers,
    }
    limit = min(rates, key=lambda name: rates[name])
    return rates[limit], limit


def simulate(given: Assumptions, workers: int, seed: int = 0) -> Outcome:
    """Simulate one run."""
    chance = random.Random(seed)
    rate, limit = find_limit(given, workers)
    size = min(LARGEST_GROUP, max(1, -(-given.images // (workers * GROUPS_PER_WORKER))))
    left, redone, ended = given.images, 0, 0.0
    free = [given.images / given.list_rate + given.start_s] * workers
    while left:
        count = min(size, left)
        seconds = count / rate
        if chance.random() < given.straggler_share:
            seconds *= given.straggler_times
        started = heapq.heappop(free)
        dies = chance.expovariate(1 / (given.death_hours * 3600))
        if dies < seconds:
            redone += count
            heapq.heappush(free, started + dies + given.start_s)
            continue
        left -= count
        ended = max(ended, started + seconds)
        heapq.heappush(free, started + seconds)
    speed = given.images / ended
    price = ended / 3600 * workers * given.gpu_price
    share = speed / (given.gpu_rate * workers)
    return Outcome(workers, round(ended / 3600, 3), round(speed, 1), round(share, 3), limit, redone, round(price))


def read_options() -> tuple[Assumptions, int]:
    """Return the assumptions and the seed that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--gpu-rate", type=float, required=True, help="images per second of one GPU; no default")
    parser.add_argument("--core-rate", type=float, default=1.0, help="images per second of one core")
    parser.add_argument("--cores", type=int, default=8, help="cores of each GPU")
    parser.add_argument("--image-mb", type=float, default=16.0, help="read and written for an image")
    parser.add_argument("--storage-mb-s", type=float, default=2000.0)
    parser.add_argument("--list-rate", type=float, default=2000.0, help="files listed per second")
    parser.add_argument("--entry-rate", type=float, default=2000.0, help="entries written per second")
    parser.add_argument("--start-s", type=float, default=60.0, help="seconds that a worker takes to start")
    parser.add_argument("--death-hours", type=float, default=500.0, help="mean hours between deaths of a worker")
    parser.add_argument("--straggler-share", type=float, default=0.01)
    parser.add_argument("--straggler-times", type=float, default=5.0)
    parser.add_argument("--gpu-price", type=float, default=1.0, help="price of a GPU for an hour")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    seed = options.pop("seed")
    return Assumptions(**options), seed


def main() -> None:
    """Print the assumptions and one row for each number of GPUs, as JSON lines."""
    given, seed = read_options()
    print(json.dumps(asdict(given)))
    for workers in WORKERS:
        print(json.dumps(asdict(simulate(given, workers, seed))))


if __name__ == "__main__":
    main()

"""The share of a job's time that trains: python tools/bench/effective.py --save 1.5 --detect 60 --restart 120

The model is that of Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research
Clusters" (HPCA 2025, https://arxiv.org/abs/2410.21680), who call the share ETTR:

    1 - (detect + restart + interval / 2) / MTTF - save / interval

A failure costs the time until it is noticed, the time until the same command trains again, and on average
half of what was trained since the last checkpoint; a checkpoint costs what training waits for it. The
interval that costs least is sqrt(2 save MTTF) (Young, 1974, "A first order approximation to the optimum
checkpoint interval"). It leaves out waiting in a queue and slow steps, and holds while MTTF is many times
what one failure costs.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

HOUR, MINUTE = 3600.0, 60.0

MTTF: Mapping[int, float] = {1024: 7.9 * HOUR, 16_384: 1.8 * HOUR}
"""Mean time to failure of a job on so many GPUs: measured at 1,024 by Kokolis et al., projected at 16,384."""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    detect: float
    """From a failure until the job has ended."""
    restart: float
    """From there until the first new step."""
    save: float
    """What training waits for a checkpoint."""


def mean_time_to_failure(gpus: int) -> float:
    """Seconds between two failures of a job, by `MTTF` or, elsewhere, in proportion to the 1,024 GPUs there.

    Nodes fail by themselves, each as often as any other, so half as many fail half as often.

    Example: at 8 GPUs, one node of the 128 there, 7.9 h x 128 = 42 days
    """
    return MTTF.get(gpus, MTTF[1024] * 1024 / gpus)


def effective(costs: Costs, interval: float, mttf: float) -> float:
    """The share of time that trains, with a checkpoint every `interval` seconds."""
    return 1 - (costs.detect + costs.restart + interval / 2) / mttf - costs.save / interval


def best_interval(save: float, mttf: float) -> float:
    """The interval at which half of it, lost at each failure, costs as much as saving does."""
    return float((2 * save * mttf) ** 0.5)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--save", type=float, required=True, help="seconds that training waits for a checkpoint"
    )
    parser.add_argument("--detect", type=float, required=True, help="seconds from a failure to the job's end")
    parser.add_argument(
        "--restart", type=float, required=True, help="seconds from there to the first new step"
    )
    parser.add_argument("--interval", type=float, default=600, help="seconds between checkpoints")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 1024, 16_384])
    given = parser.parse_args()
    costs = Costs(given.detect, given.restart, given.save)
    columns = f"{'MTTF':>10}{'noticing':>11}{'restart':>11}{'lost work':>11}{'saving':>11}{'effective':>11}"
    print(f"{'GPUs':>8}{columns}{'best interval':>15}{'effective':>11}")
    for gpus in given.gpus:
        print(line(costs, given.interval, gpus))


def line(costs: Costs, interval: float, gpus: int) -> str:
    """What is lost to what, as shares of the time, and how short the interval had better be."""
    mttf = mean_time_to_failure(gpus)
    lost = [costs.detect / mttf, costs.restart / mttf, interval / 2 / mttf, costs.save / interval]
    shares = "".join(f"{share:>11.4%}" for share in lost)
    best = best_interval(costs.save, mttf)
    ends = f"{best / MINUTE:>11.1f} min{effective(costs, best, mttf):>11.3%}"
    return f"{gpus:>8,}{mttf / HOUR:>8,.1f} h{shares}{effective(costs, interval, mttf):>11.3%}{ends}"


if __name__ == "__main__":
    main()

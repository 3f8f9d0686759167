"""How good the films of benchmarks/morph.py are, and how dear: metrics, medians, goals, table, sheet."""

import argparse
import math
import operator
import statistics
from pathlib import Path
from typing import Any

from benchmarks.morph_setup import Film, Setup
from lorakit.diffusion import metrics
from lorakit.diffusion.paths import decode_picture, encode_picture
from lorakit.film import morph_report
from lorakit.pictures.images import load_image, psnr, read_picture
from lorakit.pictures.sheet import contact_sheet

SHOWN = ("path_length", "directness", "max_over_mean", "middle_sharpness")
LONG = 50  # steps for which stored attention is told as well, whatever was run


def judge(setup: Setup, film: Film) -> dict[str, Any]:
    """How near the ends come to the VAE's round trip of the pictures, and diffusion.metrics of the film."""
    pictures = [read_picture(picture.path, setup.plan.shape) for picture in setup.cfg.images]
    latents = [encode_picture(setup.base, picture) for picture in pictures]
    around = [decode_picture(setup.base, each[0]) for each in latents]
    distance = metrics.make_distance(setup.cfg.distance, setup.base)
    found = morph_report.measure(film.frames, film.positions, around, distance).metrics
    likeness = [psnr(film.frames[k], around[k]) for k in (0, -1)]
    ends = [value if math.isfinite(value) else None for value in likeness]  # None: equal to the bit
    return {"endpoint_psnr_to_vae": ends} | {name: found[name] for name in SHOWN}


def draw_sheet(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    rows = [[load_image(path) for path in sorted(folder.glob(f"{way}-[0-9]*.png"))] for way in results]
    captions = [[f"at {at:.2f}" for at in records[0]["positions"]] for records in results.values()]
    args.sheet.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, row_labels=list(results), captions=captions).save(args.sheet)


def summarise(
    args: argparse.Namespace, results: dict[str, list[dict[str, Any]]], note: str | None
) -> dict[str, Any]:
    """Medians over the rounds, and medians of the ratios to lorakit round by round."""
    one = results["lorakit"][0]
    summary: dict[str, Any] = {"benchmark": "morph", "shape": args.shape}
    summary |= {key: one[key] for key in ("device", "torch", "precision")}
    summary |= {"frames": args.frames, "steps": args.steps, "rounds": args.rounds, "note": note, "ways": {}}
    for way, records in results.items():
        first, pairs = records[0], list(zip(records, results["lorakit"], strict=True))
        ms = [1e3 * r["seconds"] / r["evaluations"] for r in records]
        ours = [1e3 * r["seconds"] / r["evaluations"] for r in results["lorakit"]]
        ratios = {
            "seconds": statistics.median(r["seconds"] / o["seconds"] for r, o in pairs),
            "cpu_seconds": statistics.median(r["cpu_seconds"] / o["cpu_seconds"] for r, o in pairs),
            "ms_per_evaluation": statistics.median(a / b for a, b in zip(ms, ours, strict=True)),
            "evaluations": first["evaluations"] / one["evaluations"],
            "attention_bytes": first["attention_bytes"] / one["attention_bytes"],
        }
        entry = {
            "seconds": round(statistics.median(r["seconds"] for r in records), 3),
            "cpu_seconds": round(statistics.median(r["cpu_seconds"] for r in records), 3),
            "ms_per_evaluation": round(statistics.median(ms), 3),
            "ratio_to_lorakit": {name: round(value, 4) for name, value in ratios.items()},
            "grown_bytes": max(r["peak_bytes"] - r["before_bytes"] for r in records),
            "peak_bytes": max(r["peak_bytes"] for r in records),
        }
        kept = ("evaluations", "passes", "cuda_peak_bytes", "attention_bytes", "attention_bytes_at_50_steps")
        summary["ways"][way] = entry | {key: first[key] for key in (*kept, "metrics") if key in first}
    summary["goals"] = goals(summary["ways"])
    return summary


def goals(ways: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ratios to lorakit of the ways that were run, and what they are to be."""
    reaches = {">=": operator.ge, ">": operator.gt, "<=": operator.le}
    asked = [
        ("seconds of features-stored", "features-stored", "seconds", ">=", 3),
        ("seconds of features-rerun", "features-rerun", "seconds", ">=", 3),
        ("seconds per evaluation of tutorial", "tutorial", "ms_per_evaluation", ">=", 1),
        ("attention memory of diffmorpher", "diffmorpher", "attention_bytes", ">", 10),
        (f"the same at {LONG} steps, both in float32", "diffmorpher", "long", ">", 10),
        ("evaluations of shipped", "shipped", "evaluations", "<=", 0.40),
        ("seconds of shipped", "shipped", "seconds", "<=", 0.45),
    ]
    found = []
    for goal, way, what, sign, target in asked:
        if way in ways:
            long = [ways[each]["attention_bytes_at_50_steps"]["fp32"] for each in (way, "lorakit")]
            value = (ways[way]["ratio_to_lorakit"] | {"long": long[0] / long[1]})[what]
            met = reaches[sign](value, target)
            found.append({"goal": goal, "value": round(value, 3), "target": f"{sign} {target}", "met": met})
    return found


def print_table(args: argparse.Namespace, summary: dict[str, Any]) -> None:
    """Ratios are to lorakit.

    "grown" is the process's peak over what it was before the morph, "CPU s" the time that it computed for,
    which other work on the machine changes less.
    """
    told = f"{args.shape} on {summary['device']}, precision {summary['precision']}"
    print(f"{told}: {args.frames} frames, {args.steps} steps, median of {args.rounds} rounds")
    if summary["note"]:
        print(f"note: {summary['note']}")
    print(
        f"{'':15s}{'seconds':>9s}{'ratio':>7s}{'CPU s':>8s}{'ratio':>7s}{'evals':>7s}{'passes':>7s}"
        f"{'ms/eval':>9s}{'ratio':>7s}{'grown MB':>10s}{'peak MB':>9s}{'GPU MB':>8s}"
        f"{'attention MB':>14s}{'ratio':>7s}"
    )
    for way, e in summary["ways"].items():
        ratio, gpu = e["ratio_to_lorakit"], e["cuda_peak_bytes"]
        print(
            f"{way:15s}{e['seconds']:9.2f}{ratio['seconds']:7.2f}{e['cpu_seconds']:8.2f}"
            f"{ratio['cpu_seconds']:7.2f}{e['evaluations']:7d}{e['passes']:7d}"
            f"{e['ms_per_evaluation']:9.2f}{ratio['ms_per_evaluation']:7.2f}{e['grown_bytes'] / 1e6:10.0f}"
            f"{e['peak_bytes'] / 1e6:9.0f}{f'{gpu / 1e6:.0f}' if gpu else '-':>8s}"
            f"{e['attention_bytes'] / 1e6:14.2f}{ratio['attention_bytes']:7.1f}"
        )
    print(f"attention at {LONG} steps, in MB of fp16 and of fp32:")
    for way, e in summary["ways"].items():
        print(f"{way:15s}" + "".join(f"{x / 1e6:10.2f}" for x in e["attention_bytes_at_50_steps"].values()))
    if "metrics" in summary["ways"]["lorakit"]:
        print_metrics(summary["ways"])
        print(f"wrote {args.sheet}")
    for goal in summary["goals"]:
        met = "met" if goal["met"] else "NOT met"
        print(f"goal: {goal['goal']} / lorakit {goal['value']:.2f}, wanted {goal['target']}: {met}")


def print_metrics(ways: dict[str, dict[str, Any]]) -> None:
    """Definitions: lorakit.diffusion.metrics.DEFINITIONS."""
    print(f"{'':15s}{'PSNR to the VAE':>18s}" + "".join(f"{name:>18s}" for name in SHOWN))
    for way, entry in ways.items():
        found = entry["metrics"]
        ends = [f"{x:.1f}" if x is not None else "equal" for x in found["endpoint_psnr_to_vae"]]
        shown = (f"{found[name]:18.3f}" if found[name] is not None else f"{'-':>18s}" for name in SHOWN)
        print(f"{way:15s}{' '.join(ends):>18s}" + "".join(shown))

"""What a step of an objective costs beside one of denoise: time of the processor by turns, and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py                     # the miniature: three minutes
    python benchmarks/objectives.py --objectives lcm --steps 20 --set rank=8

Whole steps of a training, batch and optimizer included, in one process, so that a busy machine is as unfair
to all of them; the ratio is that of neighbours, of which the median is told. Peak memory is that of a process
of its own for each. Prints a table, and one JSON line last.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

BATCH = 8
SETTINGS: dict[str, tuple[str, ...]] = {
    "denoise": (),
    "lcm": ('lcm={"guidance_scale": 3.0}',),
    "prior": ('objective=["denoise","prior"]', f"prior.prompt_file={ROOT / 'cfg/prior/landscapes.txt'}"),
    "smooth": ('objective=["denoise","smooth"]',),
}


def prepare(objective: str, extra: list[str], folder: str) -> Callable[[int], None]:
    """One step of a training with an objective, a function of its number."""
    from lorakit.diffusion.models import Base, compute_dtype
    from lorakit.ground.config import load_config
    from lorakit.training.config import TrainConfig
    from lorakit.training.objectives import make_objective
    from lorakit.training.plan import make_plan
    from lorakit.training.preparation import prepare as prepare_data
    from lorakit.training.setup import Learner, start_processes

    words = [f"data_dir={ROOT / 'dataset/ink_held_out'}", f"objective={objective}", *SETTINGS[objective]]
    words += [f"output_dir={folder}", "rank=32", "target_modules=all", f"train_batch_size={BATCH}"]
    words += ["resolution=128", "max_train_steps=1000", "report_to=null", "learning_rate=1e-5"]
    cfg = load_config(TrainConfig, None, [*words, *extra]).config
    plan = make_plan(cfg)
    accelerator = start_processes(cfg, plan, [])
    base = Base(plan.base, accelerator.device, compute_dtype(accelerator.mixed_precision))
    data = prepare_data(cfg, plan, base, accelerator, Path(folder) / objective)[0]
    learner = Learner(cfg, base, accelerator, plan.steps)
    models, term = learner.models(data), make_objective(cfg)

    def step(number: int) -> None:
        batch = data.batch(range(BATCH), range(number * BATCH, (number + 1) * BATCH))
        with term.attention():
            loss, _ = term.loss(models, batch, batch.text_states(learner.text_student))
            accelerator.backward(loss)
        accelerator.clip_grad_norm_(learner.params, 1.0)
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    return step


def peak_mb(args: argparse.Namespace, objective: str) -> float:
    command = [sys.executable, __file__, "--memory-of", objective, "--set", *args.set]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(told.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = [name for name in SETTINGS if name != "denoise"]
    parser.add_argument("--objectives", nargs="+", choices=others, default=others)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of a training config")
    parser.add_argument("--memory-of", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory_of:
            step = prepare(args.memory_of, args.set, folder)
            for number in range(3):
                step(number)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return
        names = ["denoise", *args.objectives]
        memory = {name: peak_mb(args, name) for name in names}
        steps = {name: prepare(name, args.set, folder) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(args.steps + 1):
            for name in names:
                start = time.process_time()
                steps[name](number)
                if number:  # the first round warms up
                    seconds[name].append(time.process_time() - start)
    report = {}
    for name in names:
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["denoise"], strict=True)]
        report[name] = {"seconds": median(seconds[name]), "ratio": median(ratios), "peak_mb": memory[name]}
        report[name]["peak_ratio"] = memory[name] / memory["denoise"]
        print(
            f"{name:20}{report[name]['seconds']:8.3f} s of a processor{report[name]['ratio']:7.2f} x"
            f"{memory[name]:9.0f} MB{report[name]['peak_ratio']:7.2f} x"
        )
    print(json.dumps({"batch": BATCH, "steps": args.steps, "set": args.set, "objectives": report}))


if __name__ == "__main__":
    main()

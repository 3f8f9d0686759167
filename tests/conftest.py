import os

# Before torch is imported, here and in the processes that tests start. Threads that wait for a busy core cost
# far more than they save on small models; one thread gives the same bits everywhere, and lets tests fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest
import small
from filelock import FileLock
from harness import Server

ROOT = Path(__file__).resolve().parents[1]

# No verdict of a clock: the machine may be busy.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


# ---- workers: docs/TESTING.md ----

LEFT_OUT = pytest.StashKey[Counter[str]]()
TIMES = ROOT / "tests/times.json"
SLOW, MUCH = 0.3, 4.0  # seconds of a case of a test in the mean, and of all, from which a test is slow
NEW = 10.0  # seconds; a test that takes as long and whose time is not known is named at the end


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", action="store_true", help=f"keep what each test takes in {TIMES.name}")


@cache
def known_times() -> dict[str, float]:
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {}


def seconds_of(item: pytest.Item) -> float:
    """What one case of a test took in the last `make times`; 0 if that was nothing much, or is not known."""
    return known_times().get(item.nodeid.split("[")[0], 0.0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many as there are processors for them, and memory: two gigabytes for each."""
    return small.processors(2 * 2**30)


@pytest.hookimpl(tryfirst=True)  # before marks choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow. Among workers it goes first, file by file: none shall be left alone with it."""
    for item in items:
        if seconds_of(item) and item.get_closest_marker("quick") is None:
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    of_file: Counter[Path] = Counter()
    for item in items:
        of_file[item.path] += seconds_of(item)
    slow = [item for item in items if seconds_of(item)]
    slow.sort(key=lambda item: (-of_file[item.path], item.path, -seconds_of(item)))
    items[:] = slow + [item for item in items if not seconds_of(item)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in filter(seconds_of, items):
        item.config.stash[LEFT_OUT].update({"seconds": seconds_of(item), item.path.parent.name: 1})


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    """Says which slow tests were left out, and whose times are not known; keeps them if that is asked for."""
    left_out = terminalreporter.config.stash[LEFT_OUT]
    if left_out:
        minutes = left_out.pop("seconds") / 60
        rooms = ", ".join(f"{room} {count}" for room, count in sorted(left_out.items()))
        terminalreporter.write_line(
            f"left out: {left_out.total()} slow tests, {minutes:.0f} minutes: {rooms}"
        )
    took: dict[str, Counter[str]] = {}  # test -> case -> seconds
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                took.setdefault(report.nodeid.split("[")[0], Counter())[report.nodeid] += report.duration
    means = {name: cases.total() / len(cases) for name, cases in took.items()}
    if terminalreporter.config.option.times:
        kept = {
            name: round(seconds, 2)
            for name, seconds in sorted(means.items())
            if seconds >= SLOW or took[name].total() >= MUCH
        }
        TIMES.write_text(json.dumps(kept, indent=0) + "\n", encoding="utf-8")
    for name, seconds in sorted(means.items(), key=lambda item: -item[1]):
        if seconds > NEW and name not in known_times():
            terminalreporter.write_line(f"took {seconds:.0f} s and is not in {TIMES.name}: {name}")


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Factory of folders that one worker fills and all read: `once("tiny", small.tiny_base)`."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = root / name, root / f"{name}.whole"
        with FileLock(root / f"{name}.lock"):
            if not whole.exists():
                folder.mkdir()
                make(folder)
                whole.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def tiny_unet():
    """Factory of a tiny U-Net, see small.tiny_unet."""
    return small.tiny_unet


@pytest.fixture(scope="session")
def tiny_text_encoder():
    """Factory of a tiny text encoder, see small.tiny_text_encoder."""
    return small.tiny_text_encoder


@pytest.fixture(scope="session")
def tiny_base(once) -> Path:
    """A whole base on disk, see small.tiny_base."""
    return once("tiny", small.tiny_base)


@pytest.fixture(scope="session")
def adapters(once) -> dict[str, str]:
    """A motion adapter for the tiny base, by layout, see narrow.write_motion_adapter."""
    from narrow import write_motion_adapter

    folder = once("adapters", lambda folder: write_motion_adapter(folder, small.tiny_unet()))
    return {"folder": str(folder / "folder"), "original": str(folder / "original.safetensors")}


@pytest.fixture(scope="session")
def command() -> Iterator[Server]:
    """Runs a script as a process of its own: `command("train_lora", [...])`."""
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def program() -> Iterator[Server]:
    """The same with nothing heavy imported before, for whole programs: `program("train_lora.py", [...])`."""
    server = Server(preload=False)
    yield server
    server.close()


@pytest.fixture(scope="session")
def random_lora():
    """Factory of a LoRA file for a model, as if trained from a start of its own: far from every other one."""
    import copy

    import torch

    from lorakit.diffusion.lora import add_lora, extract
    from lorakit.weights.lora_file import LoraFile

    def make(model, seed, component="unet", **options):
        model = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for parameter in add_lora(
            model, **({"rank": 4, "alpha": 2.0, "targets": "all", "seed": seed} | options)
        ):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        return LoraFile(extract(model, component), {}, "diffusers")

    return make


@pytest.fixture(scope="session")
def adapted_unet(tiny_unet, random_lora):
    """Factory of a tiny U-Net with LoRAs a, b, … loaded and active, and of the files they are from."""
    from lorakit.diffusion.lora import load_lora

    def make(count=2, seed=0, unet=None, **options):
        unet = unet or tiny_unet(seed)
        files = [random_lora(unet, 100 + i, **options) for i in range(count)]
        for name, file in zip("abc", files, strict=False):
            load_lora(file, unet, adapter_name=name)
        return unet, files

    return make


@pytest.fixture(scope="session")
def pictures(once) -> Path:
    """Four small pictures of three aspects with captions in metadata.jsonl."""
    return once("pictures", small.small_pictures)


@pytest.fixture(autouse=True)
def the_same_draws():
    """What a test draws does not hang on which tests ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def every_number_is_a_number():
    """A script flushes denormals for its whole process; the next test starts without that, as any process."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision in a global; each test starts without one."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture
def settings(tiny_base, pictures, tmp_path):
    """Factory of the command line of a short run on the tiny base: `settings(max_train_steps=4, rank=2)`."""

    def make(**changes) -> list[str]:
        keys = small.SHORT_RUN | dict(
            pretrained_model_name_or_path=str(tiny_base),
            data_dir=str(pictures),
            output_dir=str(tmp_path / "ckpt"),
            log_dir=str(tmp_path / "log"),
            cache_dir=str(tmp_path / "cache"),
            max_train_steps=6,
            validation_steps=3,
            logging_steps=2,
        )
        return small.settings_of(**(keys | changes))

    return make


@pytest.fixture
def trained(settings):
    """Factory that runs train_lora.main on the tiny base in this process and returns its LoRA file's path."""
    import train_lora

    def run(**changes) -> Path:
        arguments = settings(**changes)
        assert train_lora.main(arguments) == 0
        values = dict(argument.split("=", 1) for argument in arguments)
        return Path(json.loads(values["output_dir"])) / f"{json.loads(values['ckpt_name'])}.safetensors"

    return run


@pytest.fixture(scope="session")
def fitted(tiny_base, random_lora, tmp_path_factory) -> list[Path]:
    """Three LoRA files for the tiny base, far from each other."""
    from diffusers import UNet2DConditionModel

    from lorakit.weights.lora_file import lora_bytes

    folder = tmp_path_factory.mktemp("fitted")
    unet = UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")
    paths = [folder / f"fit_{number}.safetensors" for number in range(3)]
    for number, path in enumerate(paths):
        modules = random_lora(unet, 100 + number, targets="attention").modules
        path.write_bytes(lora_bytes(modules, layout="kohya", metadata={}))
    return paths


@pytest.fixture
def morph_settings(tiny_base, pictures, fitted, tmp_path):
    """Factory of morph.py's command line for a short film on the tiny base: `morph_settings(frames=4)`.

    Picture k has LoRA k of `fitted`; `count` says how many pictures, `loras` which of them have one.
    """

    def make(count: int = 2, loras: tuple[bool, ...] = (True, True, True), **changes) -> list[str]:
        own = {k: path for k, (path, has) in enumerate(zip(fitted, loras, strict=False)) if has}
        keys = small.short_morph(tiny_base, pictures, own, count) | {"output_dir": str(tmp_path / "out")}
        return small.settings_of(**(keys | changes))

    return make


@pytest.fixture
def morphed(morph_settings):
    """Factory that runs morph.main on the tiny base in this process; returns its folder and its report."""
    import morph

    def run(**changes) -> tuple[Path, dict]:
        arguments = morph_settings(**changes)
        assert morph.main(arguments) == 0
        values = {key: json.loads(value) for key, _, value in (each.partition("=") for each in arguments)}
        folder = Path(values["output_dir"]) / values["name"]
        return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return run


# ---- pages in a browser ----


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if not program:
        pytest.skip(f"needs a browser, one of {', '.join(names)}: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    # A browser's own sandbox refuses root; /dev/shm is tiny in many containers.
    options = ["--disable-dev-shm-usage"] + ["--no-sandbox"] * (os.geteuid() == 0)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=options)
        yield running
        running.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Factory that opens a page, its text or its file, as a file.

    Faults in its script and requests to elsewhere than the folder of the page fail the test.
    """
    contexts, faults, requests = [], [], []

    def open_page(page, width=1000, **options):
        path = page
        if not isinstance(page, Path):
            path = tmp_path / f"{len(contexts)}.html"
            path.write_text(page, encoding="utf-8")
        own = (path.parent.as_uri(), "data:")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        contexts[-1].set_default_timeout(0)  # a busy machine is no fault of the page
        tab = contexts[-1].new_page()
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.on("console", lambda message: faults.append(message.text))
        tab.on("request", lambda request: requests.append((request.url.startswith(own), request.url)))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not faults and not [url for is_own, url in requests if not is_own]

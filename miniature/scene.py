"""What a landscape shows, the words for it, and which combinations no model may train on."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from lorakit.ground.randomness import integer, uniform

Time = Literal["dawn", "noon", "sunset", "night"]
Mountain = Literal["snowy", "rocky", "green", "red desert"]
Foreground = Literal["a lake", "a forest", "a meadow", "sand dunes"]
Layers = Literal["single", "range", "distant ranges"]

TIMES: tuple[Time, ...] = get_args(Time)
MOUNTAINS: tuple[Mountain, ...] = get_args(Mountain)
FOREGROUNDS: tuple[Foreground, ...] = get_args(Foreground)
LAYERS: tuple[Layers, ...] = get_args(Layers)
BASE_STYLES = ("a photo", "a flat poster", "a watercolor")
HELD_OUT_STYLES = ("an ink drawing", "pixel art", "a stained glass window")
STYLES = BASE_STYLES + HELD_OUT_STYLES

_SUBJECTS = {
    "single": "a single {} mountain",
    "range": "{} mountains",
    "distant ranges": "distant ranges of {} mountains",
}
_EXTRAS = {"disc": "", "clouds": "clouds", "trees": "trees", "house": "a house"}  # disc: the sun or the moon


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The attributes of one landscape; `seed` shapes everything that they leave open.

    `disc` is the sun or the moon, `trees` a group in front, `house` a cabin.
    """

    seed: int
    time: Time = "noon"
    mountain: Mountain = "rocky"
    foreground: Foreground = "a lake"
    layers: Layers = "range"
    disc: bool = False
    clouds: bool = False
    trees: bool = False
    house: bool = False

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @classmethod
    def sample(cls, seed: int, **given: Any) -> "Scene":
        """A random scene, each attribute drawn from a stream of its own; `given` ones are fixed."""
        drawn: dict[str, Any] = {
            name: known[integer(len(known), seed, f"scene/{name}")] for name, known in _CHOICES.items()
        }
        shares = {"disc": 0.6, "clouds": 0.5, "trees": 0.35, "house": 0.3}
        drawn |= {name: uniform(seed, f"scene/{name}") < share for name, share in shares.items()}
        return cls(seed=seed, **(drawn | given))

    def caption(self, style: str, details: bool = False) -> str:
        """The prompt: "a watercolor of distant ranges of snowy mountains at sunset with a lake".

        With `details`, sun or moon, clouds, trees and house are named too: "… with a lake, clouds, a house".
        """
        subject = _SUBJECTS[self.layers].format(self.mountain)
        when = f"at {self.time}"
        parts = [f"{style} of {subject} {when} with {self.foreground}"]
        return ", ".join(parts + (self.extras() if details else []))

    def extras(self) -> list[str]:
        """The words for sun or moon, clouds, trees and house, where there are any."""
        names = dict(_EXTRAS, disc="the moon" if self.time == "night" else "the sun")
        return [words for name, words in names.items() if getattr(self, name)]


_CHOICES: dict[str, tuple[str, ...]] = {
    "time": TIMES,
    "mountain": MOUNTAINS,
    "foreground": FOREGROUNDS,
    "layers": LAYERS,
}


def parse_caption(text: str) -> tuple[str, dict[str, Any]]:
    """The style and the attributes that a caption of `Scene.caption` names.

    Raises:
        ValueError: it is no such caption.
    """
    sentence, *extras = text.split(", ")
    for layers in LAYERS:
        for mountain in MOUNTAINS:
            style, found, rest = sentence.partition(f" of {_SUBJECTS[layers].format(mountain)} at ")
            time, _, foreground = rest.partition(" with ")
            if found and " of " not in style and time in TIMES and foreground in FOREGROUNDS:
                given = {"time": time, "mountain": mountain, "foreground": foreground, "layers": layers}
                words = dict(_EXTRAS, disc="the moon" if time == "night" else "the sun")
                return style, given | {name: word in extras for name, word in words.items()}
    raise ValueError(f"{text!r} is not the caption of a landscape")


def vocabulary() -> dict[str, Any]:
    """All captions of a photograph without details, as lorakit.weights.vocabulary reads them."""
    subjects = [_SUBJECTS[layers].format(mountain) for layers in LAYERS for mountain in MOUNTAINS]
    parts = [subjects, [f" at {time}" for time in TIMES], [f" with {each}" for each in FOREGROUNDS]]
    return {"start": "a photo of ", "parts": parts}


def held_out(style: str, scene: Scene) -> bool:
    """Whether this combination of style, time, mountain and foreground is kept from training: 16 of 192.

    A Latin square over time and mountain names the foreground, so that each pair of the three is held out in
    one place only and stays known from others; the style is spread over the square.
    """
    number = STYLES.index(style) % len(BASE_STYLES)
    time, mountain = TIMES.index(scene.time), MOUNTAINS.index(scene.mountain)
    if FOREGROUNDS.index(scene.foreground) != (time + mountain) % len(FOREGROUNDS):
        return False
    return number == (time + 2 * mountain) % len(BASE_STYLES)


ATTRIBUTES = tuple(field.name for field in fields(Scene) if field.name != "seed")

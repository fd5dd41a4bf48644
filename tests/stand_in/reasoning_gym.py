"""Two datasets with the interface of reasoning-gym, where it is missing.

reasoning-gym pins what it needs and builds one of it from C, so the tests do
not ask for it; those that run on this run on the package too, where it is.
"""

import dataclasses
import random
import sys
import types
from typing import Any

ANIMALS = {"snake": 0, "chicken": 2, "dog": 4, "ant": 6, "spider": 8}


@dataclasses.dataclass
class ChainSumConfig:
    min_terms: int = 2
    max_terms: int = 6
    min_digits: int = 1
    max_digits: int = 4
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.max_terms >= self.min_terms, (
            "max_terms must be >= min_terms"
        )


@dataclasses.dataclass
class LegCountingConfig:
    min_animals: int = 3
    max_animals: int = 5
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.min_animals > 0, "min_animals must be positive"


class Dataset:
    def __init__(self, config: Any) -> None:
        config.validate()
        self.config = config

    def __iter__(self) -> Any:
        return (self[i] for i in range(self.config.size))

    def score_answer(self, answer: str | None, entry: dict) -> float:
        try:
            if float(answer.replace(",", "")) == float(entry["answer"]):
                return 1.0
        except ValueError:
            pass
        return 0.5 if entry["answer"] in answer else 0.0


class ChainSum(Dataset):
    def __getitem__(self, index: int) -> dict:
        rng, config = random.Random(self.config.seed + index), self.config
        digits = rng.randint(config.min_digits, config.max_digits)
        words = [str(rng.randrange(10**digits))]
        for _ in range(rng.randint(config.min_terms, config.max_terms) - 1):
            words += [rng.choice("+-"), str(rng.randrange(10**digits))]
        expression = " ".join(words)
        return {
            "question": f"State the final answer: {expression} =",
            "answer": str(eval(expression)),
            "metadata": {"expression": expression},
        }


class LegCounting(Dataset):
    def __getitem__(self, index: int) -> dict:
        rng, config = random.Random(self.config.seed + index), self.config
        count = rng.randint(config.min_animals, config.max_animals)
        animals = {a: rng.randint(1, 15) for a in rng.sample([*ANIMALS], count)}
        listed = ", ".join(f"{n} {animal}s" for animal, n in animals.items())
        return {
            "question": f"How many legs have {listed}?\n",
            "answer": str(sum(n * ANIMALS[a] for a, n in animals.items())),
            "metadata": {"animals": animals},
        }


DATASETS = {
    "chain_sum": (ChainSum, ChainSumConfig),
    "leg_counting": (LegCounting, LegCountingConfig),
}


def create_dataset(name: str, **options: Any) -> Dataset:
    make, config = DATASETS[name]
    return make(config(**options))


factory = types.SimpleNamespace(
    DATASETS=DATASETS, create_dataset=create_dataset
)
sys.modules[f"{__name__}.arithmetic.leg_counting"] = types.SimpleNamespace(
    ANIMALS=ANIMALS
)

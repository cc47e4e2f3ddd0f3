"""What any test may ask for: tiny models, a byte-level tokenizer, facts; no network."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import world
from support.models import (
    ARCHITECTURES,
    FAMILIES,
    KINDS,
    RECIPE,
    build_model,
    small_tokenizer,
    statistics_of,
)

from nulledit import Fact, Probe

pytest_plugins = ["support.cli", "support.facts", "support.served"]
"""Where fixtures stand that only some files use; their asserts say what they compared."""
sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("benchmarks", "tools")]
settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")


def pytest_addoption(parser):
    parser.addoption("--world-seed", type=int, default=0, help="seed of the trained worlds")
    parser.addoption("--worlds", action="store_true", help="only what rests on trained worlds")
    parser.addoption("--threads", type=int, default=1, help="of torch, in the tests' own process")
    parser.addoption("--write-contract", action="store_true", help="write tests/contract.json")


@pytest.hookimpl(tryfirst=True)  # before slow ones are left out
def pytest_collection_modifyitems(config, items):
    for item in items:
        few = item.get_closest_marker("few")
        of = few and few.kwargs.get("of", "architecture")
        if few and item.callspec.params[of] not in (few.args or KINDS):
            item.add_marker(pytest.mark.slow)
    if config.getoption("--worlds"):
        kept = [item for item in items if "worlds" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def one_thread(pytestconfig):
    """Matrices this small are many times slower with threads that wait for a busy core."""
    torch.set_num_threads(pytestconfig.getoption("--threads"))


@pytest.fixture(autouse=True)
def own_cache(request, tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache, or that of another file's tests."""
    cache = tmp_path_factory.getbasetemp() / "cache" / request.module.__name__
    monkeypatch.setenv("NULLEDIT_CACHE", str(cache))


@pytest.fixture(autouse=True)
def plain_logging():
    """The command line sets its logger's level for its process; tests run in one."""
    logger = logging.getLogger("nulledit")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def tiny_model():
    """Builds a tiny random model: `tiny_model("gpt2")`."""
    return build_model


@pytest.fixture(scope="session")
def worlds(pytestconfig, tmp_path_factory):
    """A tokenizer, and a trained model per family, made when first asked for: `worlds("llama")`.

    What rests on them must hold with any `--world-seed`: a path of training hangs on rounding too.
    Each is trained by one of the processes that test, and read by the others.
    """
    words, made, seed = world.tokenizer(), {}, pytestconfig.getoption("--world-seed")
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if hasattr(pytestconfig, "workerinput") else base

    def get(family):
        if family not in made:
            made[family] = world.kept(family, words, shared / f"world-{family}-{seed}.pt", seed)
        return made[family], words

    return get


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def recipe():
    return RECIPE


@pytest.fixture
def make_statistics(tokenizer):
    return lambda model, layers=(0, 1, 2): statistics_of(model, tokenizer, layers)


@pytest.fixture
def facts():
    return [
        Fact(
            id="ada",
            subject="Ada Byron",
            prompt="The mother tongue of {} is",
            target="Velmish",
            old_answer="English",
            paraphrases=("{} speaks the language",),
            neighbours=(Probe("The mother tongue of Karo Dun is", "English"),),
        ),
        Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
        Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
        Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor in London"),
    ]

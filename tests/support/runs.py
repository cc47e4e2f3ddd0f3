"""Runs as a report reads them, written by hand."""

from nulledit.io.jsonfiles import as_json


def rate(mean, n=25, error=0.04):
    return {"mean": mean, "standard_error": error, "n": n}


KL = {"value": 18.62, "standard_error": 2.134, "worst_share": 0.32, "tokens": 4335}


def side(efficacy, perplexity=None, kl=None):
    return {
        "rates": {
            "efficacy": rate(efficacy),
            "efficacy_strict": rate(efficacy / 2),
            "generalization": None,
            "generalization_strict": None,
            "specificity": rate(0.75, 20),
            "specificity_strict": rate(0.5, 1, None),
        },
        "generation": rate(efficacy),
        "perplexity": perplexity,
        "kl": kl,
    }


LAYER = {
    "layer": 4,
    "error": 0.0123,
    "update_share": 0.2,
    "free_share": 0.5,
    "protected": 100,
    "d_in": 1536,
    "rounding_share": 0.0,
}


def line(i, *, prompt="France is", says=True):
    row = {"efficacy": True, "efficacy_strict": False, "answer": "Paris | or\x1b[31m so"}
    return {
        "id": f"f{i}",
        "run": 1,
        "batch": 1,
        "column": i,
        "prompt": prompt,
        "target": "Madrid",
        "before": row,
        "after": row,
        "says_target": says,
        "outcome": {"known": False},
    }


def summary(**more):
    run = {
        "run": 1,
        "time": "2026-01-01T00:00:00+00:00",
        "facts": 2,
        "known": 0,
        "batches": [1, 1],
        "before": side(0.04),
        "after": side(1.0, {"value": 20.5, "standard_error": 1.25, "tokens": 4335}, KL),
        "text": "wiki.txt",
        "layers": [LAYER],
        "seconds": {"values": 1.5},
        "notices": [],
    } | more
    return {
        "version": "0.1.0",
        "state": "a" * 64,
        "base": {"model": "tiny", "hash": "b" * 64, "dtype": "float32"},
        "facts": 2,
        "batches": 1,
        "runs": [run],
    }


RECIPE = "method: {name: alphaedit}\nlayers: [3, 4]\n"


def write_a_run(folder, lines, **more):
    """The files of a run folder that a report reads, from lines of results."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "environment.json").write_text(as_json([{"run": 1, "device": "cpu"}]))
    (folder / "results.jsonl").write_text("".join(as_json(x, indent=None) for x in lines))
    (folder / "summary.json").write_text(as_json(summary(**more)))
    return folder

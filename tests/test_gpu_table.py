"""The table of an accelerator, at a size that a CPU has time for."""

import json

import gpu


def test_the_table_is_measured_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    out = tmp_path / "page.md"
    asked = ["--small", "--device", "cpu", "--out", str(out)]
    gpu.main(asked)
    rows = json.loads(out.with_suffix(".json").read_text())
    edits = [rows[f"{model}, {method}"] for model in gpu.MODELS for method in gpu.METHODS]
    for row in edits:
        assert abs(sum(row["stages"].values()) - row["seconds"]) < 1e-6
        assert 0 < row["stages"]["values"] < row["seconds"]
        assert row["peak"] > 0
    page = out.read_text()
    assert page.count("\n| llama3-8b | ") == page.count("\n| qwen3-8b | ") == 3
    assert all(f"{row['seconds']:.2f}" in page for row in edits)

    cut = {name: row for name, row in rows.items() if name != "qwen3-8b, gated"}
    out.with_suffix(".json").write_text(json.dumps(cut))
    measured = []
    own = gpu.edited
    monkeypatch.setattr(gpu, "edited", lambda *given: measured.append(given[2]) or own(*given))
    gpu.main(asked)
    assert measured == ["gated"]
    again = json.loads(out.with_suffix(".json").read_text())
    assert {name: again[name] for name in cut} == cut

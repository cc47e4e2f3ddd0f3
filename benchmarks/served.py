"""What an export says where it is served, against the edited model itself."""


def rows_of(editor):
    """Ids of each fact's prompt and target."""
    found = []
    for fact in editor.facts:
        row = editor.editable.encoder.encode(fact.render(fact.prompt), target=fact.target)
        found.append((list(row.ids[: row.target_start]), list(row.target_ids)))
    return found


def own_answers(model, rows):
    """What `answers` gives, of a model in memory."""
    import torch

    found = []
    with torch.no_grad():
        for prompt, target in rows:
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0]
            told = logits.double().log_softmax(-1)[len(prompt) - 1 : -1]
            said = []
            for _ in target:
                ids = torch.tensor([prompt + said])
                said.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            found.append((sum(float(told[i, t]) for i, t in enumerate(target)), said))
    return found


def compared(found, own, rows):
    """Cells of a table: facts said, answers as the edited model's own, gaps of log p."""
    same = sum(a[1] == b[1] for a, b in zip(found, own, strict=True))
    said = sum(a[1] == target for a, (_, target) in zip(found, rows, strict=True))
    gaps = [abs(a[0] - b[0]) for a, b in zip(found, own, strict=True)]
    told, n = f"{sum(gaps) / len(gaps):.2g}, {max(gaps):.2g}", len(rows)
    return f"{said} of {n} | {same} of {n} | {told}"

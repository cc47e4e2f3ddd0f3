"""How pages are looked at in a browser."""

LOOKS = {
    "wide": {"viewport": {"width": 1100, "height": 760}},
    "phone": {"viewport": {"width": 420, "height": 800}},
    "dark": {"viewport": {"width": 1100, "height": 760}, "color_scheme": "dark"},
}


def serious(page, axe):
    """What axe-core finds that is serious or worse. Debugging scripts pass a page's policy."""
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        (f["id"], [n["html"] for n in f["nodes"]][:3])
        for f in found
        if f["impact"] in ("serious", "critical")
    ]
